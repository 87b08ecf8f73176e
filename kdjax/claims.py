"""Claims by the name that study files import: `kdjax.config.claims`."""

from kdjax.config.claims import Claim, paper_claims

__all__ = ["Claim", "paper_claims"]

"""Datasets by name or path -> problems: explicit columns, and a count of all that is wrong."""

from kdjax.data.sources.guard import check_saved
from kdjax.data.sources.known import KNOWN
from kdjax.data.sources.load import Loaded, load, load_name, load_path
from kdjax.data.sources.survey import Counts

__all__ = ["KNOWN", "Counts", "Loaded", "check_saved", "load", "load_name", "load_path"]

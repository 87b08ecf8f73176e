"""Losses, what is minimised at a token: divergences, objectives, compositions and reductions."""

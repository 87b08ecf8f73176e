"""The layers of a decoder: what mixes positions, by kind, and what surrounds it."""

"""Will it fit: the real programs, compiled ahead of time for devices that need not be here."""

"""Plans: will it fit? The real programs, compiled for devices that need not be here."""

"""The parts of a run, built once from its config."""

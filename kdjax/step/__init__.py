"""One update: (state, rollout) -> (state, metrics)."""

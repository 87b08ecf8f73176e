"""Rollouts: whose responses the student is trained on, and how they are drawn."""

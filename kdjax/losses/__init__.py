"""What is minimised at a token: divergences, objectives, and how they are composed and reduced."""

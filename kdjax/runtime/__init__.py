"""This process among others: who it is, how it is stopped, watched and timed, what it says."""

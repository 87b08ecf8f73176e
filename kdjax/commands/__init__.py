"""Commands: a file each, whose `run` takes the arguments after the name."""

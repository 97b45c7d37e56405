"""Published reward packages, each in an environment of its own, with random weights."""

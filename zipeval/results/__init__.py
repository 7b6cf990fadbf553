"""Records on disk: what was evaluated, of what, and who is at it."""

"""The lmms-eval tasks that lmms-eval lacks."""

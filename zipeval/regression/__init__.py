"""The regression gate: a baseline to commit, and records held against it."""

"""Helpers that know nothing of models, tasks or methods."""

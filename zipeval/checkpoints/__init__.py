"""Weights: where they come from, where they go, and what belongs to them."""

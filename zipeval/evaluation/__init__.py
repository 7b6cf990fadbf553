"""Evaluation through lmms-eval: what it calls things, and whether it can be imported."""

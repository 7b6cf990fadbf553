"""Honest measurement of visual-token reduction."""

__version__ = "0.1.0"

"""Measure how fast methods are."""

"""Analyse what encoders attend to, and what methods keep of an image."""

"""The Hydra configurations."""

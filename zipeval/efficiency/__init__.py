"""How fast methods are."""

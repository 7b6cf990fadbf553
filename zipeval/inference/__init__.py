"""Turn prompts into answers."""

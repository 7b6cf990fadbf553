"""How prompts become answers."""

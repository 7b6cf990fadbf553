"""Questions become answers."""

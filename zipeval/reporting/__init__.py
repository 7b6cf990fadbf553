"""Records become tables, and tables become text, pages and plots."""

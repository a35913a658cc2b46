"""One run: its folder, steps, metrics and cache."""

"""Packaged recipes, one per paper or job: `potstill list recipes`, `potstill copy NAME`."""

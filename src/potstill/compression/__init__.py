"""Smaller still: one compressor a file."""

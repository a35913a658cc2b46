"""On what: sources, splits, batches and random views of a sample."""

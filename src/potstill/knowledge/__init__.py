"""What a model says: taps and the alignment of two signals."""

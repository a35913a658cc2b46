"""Who: models by reference, frozen teachers, weights on disk."""

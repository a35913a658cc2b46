"""What is looked at before a training, so that a silent fault shows in seconds and not after hours."""

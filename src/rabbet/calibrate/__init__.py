"""What calibration batches tell: second moments of inputs, and ranges of activations."""

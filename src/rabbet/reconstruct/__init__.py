"""Finding the numbers of a plan without training: layer by layer, then in order."""

"""Training: one loop, what is minimised, and weights that train on their grids."""

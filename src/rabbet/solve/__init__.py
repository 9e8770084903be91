"""Solvers for one weight at a time; each minimises the error that the layer's inputs see."""

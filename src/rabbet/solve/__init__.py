"""Solvers for one weight at a time; each minimises the error that the layer's inputs see, or the weight's own."""

from rabbet.solve.cp import quantised_cp

__all__ = ["quantised_cp"]

"""Solvers for one weight at a time.

Each minimises the error in the metric of the layer's inputs, or the plain error of the weight.
"""

from rabbet.solve.cp import quantised_cp

__all__ = ["quantised_cp"]

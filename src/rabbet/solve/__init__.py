"""Solvers for one weight at a time.

Each minimises the error in the metric of the layer's inputs, or the plain error of the weight.
"""

from rabbet.solve.cp import quantised_cp
from rabbet.solve.factorise import Factorisation, factorise

__all__ = ["Factorisation", "factorise", "quantised_cp"]

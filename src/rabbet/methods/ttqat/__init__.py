"""TTQAT: transformers as tensor trains (arXiv 2306.01076)."""

from rabbet.methods.ttqat.method import TTQAT
from rabbet.methods.ttqat.settings import Choices
from rabbet.train.distil import Distillation

__all__ = ["TTQAT", "Choices", "Distillation"]

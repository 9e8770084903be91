"""TTQAT: transformers as tensor trains (arXiv 2306.01076)."""

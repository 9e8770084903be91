"""Reports of plans and results as text and JSON, and pictures of searches."""

from rabbet.report.picture import draw_gates, draw_search

__all__ = ["draw_gates", "draw_search"]

"""What a user reads of a plan and a result, and pictures of how a method came by it."""

from rabbet.report.picture import draw_gates, draw_search

__all__ = ["draw_gates", "draw_search"]

"""Methods: each chooses a plan, then finds the numbers. A new method is a file here and a line in METHODS."""

from rabbet.methods.base import Fitted, Method
from rabbet.methods.joint import QUALITY, Joint

METHODS: dict[str, type[Method]] = {
    "joint": Joint,
}

__all__ = ["METHODS", "QUALITY", "Fitted", "Joint", "Method"]

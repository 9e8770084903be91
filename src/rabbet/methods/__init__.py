"""Methods: each chooses a plan, then finds the numbers.

A new method is a file here and a line in METHODS.
"""

from rabbet.methods.admm import ADMM
from rabbet.methods.base import Fitted, Method
from rabbet.methods.cgmq.method import CGMQ
from rabbet.methods.cora.method import CoRa
from rabbet.methods.joint import QUALITY, Joint
from rabbet.methods.ttqat.method import TTQAT

METHODS: dict[str, type[Method]] = {
    "joint": Joint,
    "admm": ADMM,
    "cora": CoRa,
    "cgmq": CGMQ,
    "ttqat": TTQAT,
}

__all__ = ["ADMM", "CGMQ", "METHODS", "QUALITY", "TTQAT", "CoRa", "Fitted", "Joint", "Method"]

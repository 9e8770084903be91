"""Methods: each chooses a plan, then finds the codes and scales for it.

A new method is a file here and a line in METHODS.
"""

from rabbet.errors import PlanError
from rabbet.methods.admm import ADMM
from rabbet.methods.base import Fitted, Method
from rabbet.methods.blockwise.method import Blockwise
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
    "blockwise": Blockwise,
}


def method_of(method: Method | None, quality: str = "default") -> Method:
    """The method itself, or the default method at a quality if it is None.

    Raises PlanError for an object that is not a method, for an unknown quality, and for a quality
    together with a method other than the default.
    """
    if quality not in tuple(QUALITY):
        raise PlanError(f"quality is one of {', '.join(map(repr, QUALITY))}; found {quality!r}")
    if method is None:
        return QUALITY[quality]
    if isinstance(method, type) or not hasattr(method, "fit"):
        raise PlanError(
            f"method is an object such as rabbet.Joint(), or is left out; found {method!r}"
        )
    if quality == "default":
        return method
    if method != Joint():
        raise PlanError(
            f"quality={quality!r} is a setting of the default method; leave out the quality or the "
            f"method, whose own settings say how long it works: {method!r}"
        )
    return QUALITY[quality]


__all__ = [
    "ADMM",
    "CGMQ",
    "METHODS",
    "QUALITY",
    "TTQAT",
    "Blockwise",
    "CoRa",
    "Fitted",
    "Joint",
    "Method",
    "method_of",
]

"""Methods: each chooses a plan, then finds the codes and scales for it.

A new method is a file here and a line in METHODS.
"""

from dataclasses import replace

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
    """The method itself, or the default method if it is None; a Joint tunes as the quality says.

    Raises PlanError for an object that is not a method, for an unknown quality, and for a quality
    together with another method than Joint or with a tuning that was set.
    """
    if quality not in tuple(QUALITY):
        raise PlanError(f"quality is one of {', '.join(map(repr, QUALITY))}; found {quality!r}")
    tuned = QUALITY[quality]
    if method is None:
        return tuned
    if isinstance(method, type) or not hasattr(method, "fit"):
        raise PlanError(
            f"method is an object such as rabbet.Joint(), or is left out; found {method!r}"
        )
    if quality == "default":
        return method
    if not isinstance(method, Joint):
        raise PlanError(
            f"quality={quality!r} is a setting of the method Joint; leave it out: the settings of "
            f"{type(method).__name__} say how long it works"
        )
    if method.tuning not in (Joint().tuning, tuned.tuning):
        raise PlanError(
            f"quality={quality!r} says how long Joint tunes, and so does its tuning="
            f"{method.tuning!r}; leave out one of the two"
        )
    return replace(method, tuning=tuned.tuning)


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

"""rabbet: make a trained PyTorch network fit a hard budget.

The rank and the bits of every layer are chosen together. A name is imported when it is first used:
torch takes seconds, and the help of the command line does without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rabbet.errors import RabbetError

if TYPE_CHECKING:  # the same as in _PLACES, for what reads and does not run
    from rabbet._api import Result, compress, fit, load, plan, price, survey
    from rabbet._frontier import Frontier, frontier
    from rabbet._sweep import Sweep, sweep
    from rabbet.core.budget import Budget
    from rabbet.core.plan import Plan
    from rabbet.data.accuracy import accuracy
    from rabbet.data.task import Task
    from rabbet.jobs import Jobs
    from rabbet.methods.admm import ADMM
    from rabbet.methods.blockwise.method import Blockwise
    from rabbet.methods.cgmq.method import CGMQ
    from rabbet.methods.cora.method import CoRa
    from rabbet.methods.joint import Joint
    from rabbet.methods.ttqat.method import TTQAT
    from rabbet.model.attention import open_attention
    from rabbet.runtime.session import Session

__version__ = "0.1.0"

_PLACES = {
    "ADMM": "rabbet.methods.admm",
    "Blockwise": "rabbet.methods.blockwise.method",
    "Budget": "rabbet.core.budget",
    "CGMQ": "rabbet.methods.cgmq.method",
    "CoRa": "rabbet.methods.cora.method",
    "Frontier": "rabbet._frontier",
    "Jobs": "rabbet.jobs",
    "Joint": "rabbet.methods.joint",
    "Plan": "rabbet.core.plan",
    "Result": "rabbet._api",
    "Session": "rabbet.runtime.session",
    "TTQAT": "rabbet.methods.ttqat.method",
    "Sweep": "rabbet._sweep",
    "Task": "rabbet.data.task",
    "accuracy": "rabbet.data.accuracy",
    "compress": "rabbet._api",
    "fit": "rabbet._api",
    "frontier": "rabbet._frontier",
    "load": "rabbet._api",
    "open_attention": "rabbet.model.attention",
    "plan": "rabbet._api",
    "price": "rabbet._api",
    "survey": "rabbet._api",
    "sweep": "rabbet._sweep",
}
"""The module of every name that is imported on first use."""

__all__ = [
    "ADMM",
    "CGMQ",
    "TTQAT",
    "Blockwise",
    "Budget",
    "CoRa",
    "Frontier",
    "Jobs",
    "Joint",
    "Plan",
    "RabbetError",
    "Result",
    "Session",
    "Sweep",
    "Task",
    "accuracy",
    "compress",
    "fit",
    "frontier",
    "load",
    "open_attention",
    "plan",
    "price",
    "survey",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'rabbet' has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value  # the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

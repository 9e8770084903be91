"""rabbet: make a trained PyTorch network fit a hard budget, the rank and the bits of every layer chosen together."""

from rabbet.attention import open_attention
from rabbet.compress import Result, calibrate_ranges, compress, fit, load, plan, price, reopen
from rabbet.cost import Budget, Cost
from rabbet.engine import Engine
from rabbet.errors import BudgetError, DataError, FileError, ModelError, PlanError, RabbetError
from rabbet.grid import Grid
from rabbet.layer import build, plan_of
from rabbet.methods import ADMM, CGMQ, QUALITY, TTQAT, CoRa, Joint
from rabbet.plan import LayerPlan, Plan, Term
from rabbet.runtime import Session
from rabbet.search import Ranking
from rabbet.survey import Survey, survey
from rabbet.task import Task, accuracy
from rabbet.train import Tuning
from rabbet.workpiece import Workpiece

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "CGMQ",
    "QUALITY",
    "TTQAT",
    "Budget",
    "BudgetError",
    "CoRa",
    "Cost",
    "DataError",
    "Engine",
    "FileError",
    "Grid",
    "Joint",
    "LayerPlan",
    "ModelError",
    "Plan",
    "PlanError",
    "RabbetError",
    "Ranking",
    "Result",
    "Session",
    "Survey",
    "Task",
    "Term",
    "Tuning",
    "Workpiece",
    "accuracy",
    "build",
    "calibrate_ranges",
    "compress",
    "fit",
    "load",
    "open_attention",
    "plan",
    "plan_of",
    "price",
    "reopen",
    "survey",
]

"""rabbet: make a trained PyTorch network fit a hard budget, the rank and the bits of every layer chosen together."""

from rabbet._api import Result, calibrate_ranges, compress, fit, load, plan, price, reopen
from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.core.survey import Survey
from rabbet.data.task import Task, accuracy
from rabbet.errors import BudgetError, DataError, FileError, ModelError, PlanError, RabbetError
from rabbet.grids.grid import Grid
from rabbet.jobs import Jobs
from rabbet.methods import ADMM, CGMQ, QUALITY, TTQAT, CoRa, Joint
from rabbet.methods.cora.search import Ranking
from rabbet.model.attention import open_attention
from rabbet.model.build import build, plan_of
from rabbet.model.inspect import survey
from rabbet.runtime.session import Session
from rabbet.train.tuning import Tuning
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
    "FileError",
    "Grid",
    "Jobs",
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

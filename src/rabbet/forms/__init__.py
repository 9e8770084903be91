"""The ways to write one weight as small tensors. A new form is a file here and a line in FORMS."""

from rabbet.forms.base import Aim, Contracted, Form
from rabbet.forms.cp import CP
from rabbet.forms.dense import Dense
from rabbet.forms.lowrank import LowRank
from rabbet.forms.modes import Modes
from rabbet.forms.tt import TT
from rabbet.forms.ttm import TTM
from rabbet.forms.tucker import Tucker

FORMS: dict[str, Form] = {
    "dense": Dense(),
    "lowrank": LowRank(),
    "cp": CP(),
    "tucker": Tucker(),
    "tt": TT(),
    "ttm": TTM(),
}

__all__ = ["FORMS", "Aim", "Contracted", "Dense", "Form", "Modes"]

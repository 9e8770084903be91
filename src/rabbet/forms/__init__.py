"""The ways to write one weight as small tensors. A new form is a file here and a line in FORMS."""

from rabbet.forms.base import Form
from rabbet.forms.dense import Dense
from rabbet.forms.lowrank import LowRank

FORMS: dict[str, Form] = {
    "dense": Dense(),
    "lowrank": LowRank(),
}

__all__ = ["FORMS", "Form"]

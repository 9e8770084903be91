"""The ways to write one weight as small tensors.

A new form is a file here and a line in FORMS.
"""

from rabbet.forms.base import PLAIN, Aim, Form, Ranked
from rabbet.forms.cp import CP
from rabbet.forms.dense import Dense
from rabbet.forms.lowrank import LowRank
from rabbet.forms.modes import Chain, Modes
from rabbet.forms.tt import TT
from rabbet.forms.tt_conv import TTConv
from rabbet.forms.ttm import TTM
from rabbet.forms.tucker import Tucker

FORMS: dict[str, type[Form]] = {
    form.name: form for form in (Dense, LowRank, CP, Tucker, TTConv, TT, TTM)
}
RANKED: dict[str, type[Ranked]] = {
    name: form for name, form in FORMS.items() if issubclass(form, Ranked)
}

__all__ = [
    "CP",
    "FORMS",
    "PLAIN",
    "RANKED",
    "TT",
    "TTM",
    "Aim",
    "Chain",
    "Dense",
    "Form",
    "LowRank",
    "Modes",
    "Ranked",
    "TTConv",
    "Tucker",
]

"""What a native file says of itself, without the network."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from rabbet.cost import Cost, float_cost, plan_cost
from rabbet.errors import FileError
from rabbet.export.native import read_parts
from rabbet.layout import Rest, arrays, lengths
from rabbet.plan import Plan
from rabbet.survey import Survey
from rabbet.workpiece import DTYPES


@dataclass(frozen=True)
class Stored:
    """A native file: its facts, its plan, and what it costs; `cost.bytes` is its length on disk."""

    path: Path
    survey: Survey
    plan: Plan
    cost: Cost
    float_cost: Cost

    @classmethod
    def read(cls, path: Path) -> "Stored":
        """Read a file. Raises FileError for one that is missing, damaged, or of another format."""
        survey, plan, values = read_parts(path)
        for name, dtype, count in arrays(lengths(survey, plan)):
            found = values.pop(name, None)
            if found is None or found.shape != (count,) or DTYPES.get(str(found.dtype)) != dtype:
                raise FileError(f"{path} is damaged: its plan wants {count} entries of {dtype} in {name}")
        cost = plan_cost(survey, plan, tuple(_rest(name, tensor, path) for name, tensor in values.items()))
        return cls(path, survey, plan, replace(cost, bytes=path.stat().st_size), float_cost(survey))


def _rest(name: str, tensor: Tensor, path: Path) -> Rest:
    dtype = DTYPES.get(str(tensor.dtype))
    if dtype is None:
        raise FileError(f"{path} is not a rabbet file: {name} is of type {tensor.dtype}")
    return Rest(name, dtype, tuple(tensor.shape))

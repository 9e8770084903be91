"""What a form is: one way to write a weight as factors."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from rabbet.errors import PlanError
from rabbet.layers import Site
from rabbet.solve.als import Problem
from rabbet.solve.varpro import Lean

Between = Callable[[int, Tensor], Tensor]
"""What happens to the tensor after contraction i, before the next: `Compressed` quantises it."""


@dataclass(frozen=True)
class Aim:
    """What else a decomposition may know; forms that are solved in closed form need none of it.

    noise: relative squared error that rounding a factor will cause; terms that cancel one another
    are kept small, so that it is not amplified more than necessary. start: factors of a similar
    problem to go on from. steps: how often the error may be evaluated. lean: what it is evaluated
    in until the end, for a large metric.
    """

    noise: float = 0.0
    start: tuple[Tensor, ...] | None = None
    steps: int = 60
    lean: Lean | None = None


PLAIN = Aim()


class Form(ABC):
    """How a weight is written as factors: a value, compared by its fields; knows nothing of grids.

    Factors are listed in the order in which `apply` contracts the input with them. The rank, if
    the form has one, is the first axis of the first factor. Unless the form is `contracted`, the
    last factor is [out, ...]: solvers fit it to what the others became, and a gain for each output
    goes into its scales.
    """

    name: ClassVar[str]
    """What stands in a plan."""
    contracted: ClassVar[bool] = False
    """Whether factors are contracted before they meet the input, as chains of small cores are."""
    adds: ClassVar[bool] = False
    """Whether a runtime may be given the sum of this weight and that of the term beside it."""
    verbatim: ClassVar[bool] = False
    """Whether its factor is the weight itself, or rows of it."""
    nested: ClassVar[bool] = False
    """Whether any matrix of its rank can be written so: a truncated SVD is then the best."""
    evaluates: ClassVar[bool] = False
    """Whether its solver evaluates the error in the metric many times."""
    unfinished: ClassVar[float] = 1.0
    """How many times its least error it rarely has more than, after ten evaluations at low rank."""
    furthers: ClassVar[float] = 0.0
    """The power of the rank by which those evaluations lower its error more at high ranks."""
    alternates: ClassVar[bool] = False
    """Whether solvers can find it by alternating over its factors, see `problem`."""

    rank: int | None = None

    @classmethod
    def read(cls, inside: str | None) -> Self:
        """The form from the text in the brackets of a term; raises PlanError."""
        if inside is not None:
            raise PlanError(f"{cls.name} takes nothing in brackets")
        return cls()

    @property
    def inside(self) -> str:
        """The text in the brackets of a term; empty for none."""
        return ""

    def __str__(self) -> str:
        return f"{self.name}[{self.inside}]" if self.inside else self.name

    @property
    def whole(self) -> bool:
        """Whether its only factor is the weight itself, all of it."""
        return self.verbatim and not self.partial

    @abstractmethod
    def full_rank(self, site: Site) -> int:
        """The rank from which on any weight of this site is represented exactly.

        1 if the form has no rank, 0 if it does not fit the site. Raises PlanError, saying why, for
        settings that do not fit.
        """

    def require(self, site: Site) -> None:
        """Raise PlanError unless the form, at its rank, fits a site."""
        full = self.full_rank(site)
        if full == 0:
            raise PlanError(
                f"{self.name} does not fit this {site.kind.name} of shape {list(site.shape)}"
            )
        if self.rank is not None and self.rank > full:
            raise PlanError(f"rank {self.rank} is more than the {full} that this layer can have")

    @abstractmethod
    def shapes(self, site: Site) -> tuple[tuple[int, ...], ...]:
        """Shape of each factor."""

    @abstractmethod
    def macs(self, site: Site) -> tuple[int, ...]:
        """Multiply-accumulates per example of each contraction with the input."""

    def gaps(self, site: Site) -> int:
        """Tensors of activations between contractions: one fewer than there are contractions."""
        return len(self.macs(site)) - 1

    @abstractmethod
    def decompose(
        self, site: Site, weight: Tensor, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """The factors of a canonical weight that err least in the metric of its inputs.

        second: [groups, n, n], the second moment of the inputs; None for the plain error.
        """

    @abstractmethod
    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """The canonical weight that factors stand for."""

    @abstractmethod
    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """The layer, one contraction after the other, the weight never rebuilt."""

    def observed(self, shapes: Sequence[Sequence[int]]) -> Self:
        """The form that the shapes of factors imply: what a plan reads back from a network."""
        return self

    def matrix_rank(self, site: Site) -> int | None:
        """The largest rank that a weight of this form has as a matrix [out, in * k].

        None if no useful bound is known.
        """
        return None

    def for_runtime(
        self, site: Site, factors: Sequence[Tensor]
    ) -> "tuple[Form, tuple[Tensor, ...]]":
        """What a runtime is given in place of these factors: for chains, their contraction."""
        return self, tuple(factors)

    # Forms of some outputs only.

    @property
    def partial(self) -> bool:
        """Whether only some outputs are computed."""
        return False

    def outputs(self, site: Site) -> tuple[int, ...]:
        """The outputs that are computed, in rising order."""
        return tuple(range(site.shape[0]))

    def of_outputs(self, values: Tensor) -> Tensor:
        """The part of a tensor [out, ...] that belongs to the outputs that are computed."""
        return values

    # Forms that solvers can find by alternating over the factors (`solve.als`).

    def problem(self, weight: Tensor) -> Problem:
        """The least-squares problems of the factors, matrices in the order of the tensor's axes.

        The axis of the outputs is the first of the tensor, and the last of the factors of the form.
        """
        raise NotImplementedError(f"{self.name} is not found by alternating over factors")

    def arranged(self, site: Site, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The factors of this form from the matrices of its `problem`."""
        raise NotImplementedError(f"{self.name} is not found by alternating over factors")


_RANK = re.compile(r"0*[0-9]{1,15}")  # none is larger, and long ones take long to read


@dataclass(frozen=True)
class Ranked(Form):
    """A form with one rank in brackets."""

    rank: int

    @classmethod
    def read(cls, inside: str | None) -> Self:
        """See `Form.read`."""
        if inside is not None and ":" in inside:
            raise PlanError(f"{cls.name} takes no modes, only a rank in brackets")
        return cls(cls.read_rank(inside))

    @classmethod
    def read_rank(cls, text: str | None) -> int:
        """A rank from its text; raises PlanError."""
        if text is None or not _RANK.fullmatch(text) or not int(text):
            raise PlanError(f"{cls.name} takes a rank of at least 1 in brackets")
        return int(text)

    @property
    def inside(self) -> str:
        """The rank."""
        return str(self.rank)

    def observed(self, shapes: Sequence[Sequence[int]]) -> Self:
        """The rank is the first axis of the first factor."""
        return replace(self, rank=shapes[0][0])

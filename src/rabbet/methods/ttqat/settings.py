"""Settings of TTQAT (arXiv 2306.01076)."""

from dataclasses import dataclass
from typing import Literal

from rabbet.errors import PlanError, check_fields, check_least
from rabbet.grids.grid import Grid
from rabbet.train.distil import Distillation


@dataclass(frozen=True)
class Choices:
    """What the integer program may choose for a layer whose rank is not given."""

    ranks: tuple[int, ...] = (6, 10, 14, 20, 28, 40)
    """Of tensor trains; beside each of the method's `bits`."""
    forms: tuple[str, ...] = ("tt", "ttm")
    """Tensor trains that exist: "tt" for linears, "ttm" for tables of words; ours."""
    grids: tuple[str, ...] = ("tc", "2hc", "3c", "4c")
    """Of layers that stay matrices, as a plan writes them; ours."""

    def __post_init__(self) -> None:
        check_fields(self)
        for text in self.grids:
            Grid.parse(text)
        if not {"tt", "ttm"}.issuperset(self.forms):
            raise PlanError(f"forms are 'tt' and 'ttm', both, one or none; found {self.forms}")
        if not self.ranks or min(self.ranks) < 1:
            raise PlanError(f"ranks are numbers of at least 1; found {self.ranks}")


@dataclass(frozen=True)
class Settings:
    """Tensor trains of a uniform rank, or of ranks and bits chosen under the budget.

    Batches are used as they are given. The best epoch on the grid is chosen by `Task.evaluate`,
    which then should not see what is trained on, or else by batches that are held back.
    """

    bits: int | tuple[int, ...] = 4
    """Of the cores (the paper's: 8, 4, 2); of several the program chooses for each layer."""
    rank: int | None = 20
    """Of linears; None: chosen from `choices`. A layer that would not get smaller stays a matrix."""
    table_rank: int | None = 20
    """The same for tables of words."""
    choices: Choices = Choices()
    """What is chosen from where a rank is None."""
    dense_bits: int = 8
    """Of what stays a matrix, a scale per output."""
    keep_dense: tuple[str, ...] = ()
    """Names of layers that stay matrices on `dense_bits`."""
    act: int | None = None
    """Bits of the inputs, 8 between the halves (the paper's mode 2); None: float (its mode 1)."""

    start: Literal["metric", "plain", "random"] = "metric"
    """Cores from the float weights in the metric of their inputs, or plainly; random: the paper's."""
    epochs: int = 16
    """In float; none of them where the plan holds no tensor train."""
    finish: int = 8
    """Epochs on the grid, with scales that are learnt (LSQ, arXiv 1902.08153)."""
    order: Literal["all", "bottom", "top"] = "all"
    """Blocks are taught all at once; or from the "bottom" (the paper's code) or the "top" (its text).

    In order, half of the steps walk the blocks, and the outputs are taught after that.
    """
    rate: float = 2e-2
    """Learning rate of Adam, relative to the deviation of each tensor; of scales, to themselves."""
    dense_rate: float = 1.0
    """Share of `rate` for layers that stay matrices: they start where they should end."""
    distil: Distillation = Distillation()  # noqa: RUF009 (frozen)
    """What is taught, and what each part of it counts."""

    def __post_init__(self) -> None:
        check_fields(self)
        for bits in self.widths:
            Grid.of(bits)
        Grid.of(self.dense_bits)
        if self.act is not None:
            Grid.of(self.act, "unsigned")
        check_least(self, 1, "rank", "table_rank")
        check_least(self, 0, "epochs", "finish", "rate", "dense_rate")
        if not self.widths:
            raise PlanError("bits is a number of bits, or several to choose from; found none")

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that cores may have."""
        return (self.bits,) if isinstance(self.bits, int) else self.bits

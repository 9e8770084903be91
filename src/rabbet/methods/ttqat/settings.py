"""Settings of TTQAT (arXiv 2306.01076)."""

from dataclasses import dataclass
from typing import Literal

from rabbet.errors import PlanError, check_fields, check_least
from rabbet.grids.grid import Grid
from rabbet.train.distil import Distillation


@dataclass(frozen=True)
class Choices:
    """What the integer program may choose for a layer whose rank is not given.

    The paper has no such choice.
    """

    ranks: tuple[int, ...] = (6, 10, 14, 20, 28, 40)
    """Ranks of tensor trains, each with every width of the method's `bits`."""
    forms: tuple[str, ...] = ("tt", "ttm")
    """Tensor trains to use: "tt" for linear layers, "ttm" for embedding tables."""
    grids: tuple[str, ...] = ("tc", "2hc", "3c", "4c")
    """Grids of layers that stay dense, in the notation of plans."""

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

    Batches are used as they are given. The best epoch on the grid is chosen by `Task.evaluate`, if
    the task has it, which then should not see the training data, or else by held-back batches.
    """

    bits: int | tuple[int, ...] = 4
    """Bits of the cores (the paper's: 8, 4, 2), or 16 or 32 for floats; the program chooses among
    several per layer."""
    rank: int | None = 20
    """Rank of linear layers; None: from `choices`. A layer that would not shrink stays dense."""
    table_rank: int | None = 20
    """The same for embedding tables."""
    choices: Choices = Choices()
    """What the program chooses from if a rank is None."""
    dense_bits: int = 8
    """Bits of layers that stay dense, with a scale per output; 16 or 32 for floats."""
    keep_dense: tuple[str, ...] = ()
    """Names of layers that stay dense, at `dense_bits`."""
    act: int | None = None
    """Bits of inputs, 8 between a chain's halves (the paper's mode 2); None: float (its mode 1)."""

    start: Literal["metric", "plain", "random"] = "metric"
    """Cores from float weights, in the metric of the inputs or plain; or random (the paper's)."""
    epochs: int = 16
    """Epochs in float; left out if the plan has no tensor train."""
    finish: int = 8
    """Epochs on the grid, with scales that are learnt (LSQ, arXiv 1902.08153)."""
    order: Literal["all", "bottom", "top"] = "all"
    """How blocks are taught: all at once, from the "bottom" up, or from the "top" down.

    The paper's code begins at the bottom, its text at the top. One by one, blocks take half of all
    steps, and only then are the outputs taught, too.
    """
    rate: float = 2e-2
    """Learning rate of Adam, relative to the deviation of each tensor; of scales, to their mean."""
    dense_rate: float = 1.0
    """Factor on `rate` for layers that stay dense: they start close to where they should end."""
    distil: Distillation = Distillation()  # noqa: RUF009 (frozen)
    """What is taught, and the weight of each part."""

    def __post_init__(self) -> None:
        check_fields(self)
        for bits in self.widths:
            Grid.of_weights(bits)
        Grid.of_weights(self.dense_bits)
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

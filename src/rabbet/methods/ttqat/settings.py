"""Settings of TTQAT (arXiv 2306.01076)."""

from dataclasses import dataclass
from typing import Literal

from rabbet.errors import PlanError, check_fields, check_least
from rabbet.grids.grid import Grid


@dataclass(frozen=True)
class Settings:
    """Tensor trains of a uniform rank, or of ranks and bits chosen under the budget.

    rank, table: of linears and of tables of words; None: chosen from `ranks`, or the layer stays a
    matrix on one of the `grids`, whichever harms least. forms: the chains that there are. bits: of
    the cores; several: chosen. rest: bits of what is smaller as it is, and of what is no chain.
    act: bits of the inputs, with 8 between the halves (the paper's mode 2); None: float (its mode
    1). start: cores from the float weights, in the metric of the inputs or plainly, or random ones
    (the paper's). epochs: in float, where the plan has chains; finish: epochs on the grid. order:
    hidden states are matched all at once, or block by block from the bottom or the top, outputs
    only in the second half of the epochs. rate: Adam's, relative to the deviation of what it moves,
    of scales to themselves; layers that stay matrices, which start where they should end, move at
    `matrices` times that. hidden, attention, answers: weights of what is taught; labels: of the
    task's own loss, if it has one. scores: whether outputs are scores of classes. whole: names of
    layers that stay as they are, on `rest` bits. blocks: names of the modules to match, if they are
    not to be found. memory: bytes that the float network's answers may take. Batches are taken as
    they are; the best epoch on the grid is chosen by `Task.evaluate`, which then should not see
    what is trained on, or else by batches that are held back.
    """

    bits: int | tuple[int, ...] = 4
    rank: int | None = 20
    table: int | None = 20
    ranks: tuple[int, ...] = (6, 10, 14, 20, 28, 40)
    forms: tuple[str, ...] = ("tt", "ttm")
    grids: tuple[str, ...] = ("tc", "2hc", "3c", "4c")
    rest: int = 8
    act: int | None = None
    start: Literal["metric", "plain", "random"] = "metric"
    epochs: int = 16
    finish: int = 8
    order: Literal["all", "bottom", "top"] = "all"
    rate: float = 2e-2
    matrices: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0
    answers: float = 1.0
    labels: float = 1.0
    scores: bool = True
    whole: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    memory: int = 2**31

    def __post_init__(self) -> None:
        check_fields(self)
        for bits in self.widths:
            Grid.of(bits)
        Grid.of(self.rest)
        for text in self.grids:
            Grid.parse(text)
        if not {"tt", "ttm"}.issuperset(self.forms):
            raise PlanError(f"forms are 'tt' and 'ttm', both, one or none; found {self.forms}")
        if self.act is not None:
            Grid.of(self.act, "unsigned")
        check_least(self, 1, "rank", "table")
        check_least(
            self,
            0,
            "epochs",
            "finish",
            "rate",
            "matrices",
            "hidden",
            "attention",
            "answers",
            "labels",
        )
        if not self.widths:
            raise PlanError("bits is a number of bits, or several to choose from; found none")
        if not self.ranks or min(self.ranks) < 1:
            raise PlanError(f"ranks are numbers of at least 1; found {self.ranks}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that cores may have."""
        return (self.bits,) if isinstance(self.bits, int) else self.bits

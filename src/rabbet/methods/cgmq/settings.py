"""Settings of CGMQ (arXiv 2409.20138)."""

from dataclasses import dataclass
from typing import Literal

from rabbet.errors import PlanError, check_fields, check_least
from rabbet.grids.grid import Grid
from rabbet.train.nested import nest
from rabbet.train.qat import WIDEST


@dataclass(frozen=True)
class Settings:
    """Gates under a budget, usually `bops`.

    As in the paper: `CGMQ.paper()`. Training minimises the task's loss if it has one, else
    the distance from the float network's outputs and those of its blocks.
    """

    start: Literal["widest", "program"] = "program"
    """Where gates start: at the widest (the paper's), or where the integer program puts them."""
    epochs: int = 0
    """Pairs of epochs: one in which gates move, and one in which they rest."""
    updates: Literal["alternating", "continuous"] = "alternating"
    """"continuous" moves the gates in both epochs of a pair."""
    direction: Literal[1, 2, 3] = 3
    """What decides how fast a gate moves.

    1: the gradient of its tensor; 2: gradient and magnitude (both the paper's); 3: the harm to the
    output, relative to the saving.
    """
    fourfold: bool = True
    """Whether directions 1 and 2 count a bit less as four times the harm, which is what rounding to
    it does to the squared error. In the paper only the gradient and the magnitude count."""
    landing: Literal["epoch", "end"] = "epoch"
    """When widths that the gates leave above the budget are lowered, those first that harm least.

    "epoch": after each epoch in which gates move. "end": gates alone decide (the paper's), the best
    state that they bring under the budget counts, and only if there is none is the last one landed.
    """
    gates: float = 1.0
    """How far a gate of mean speed moves in an epoch, in widths."""
    finish: int = 18
    """Epochs of training after the choice, at fixed widths."""
    steps: int | None = None
    """Steps of an epoch; None: as many as it takes to see every example."""
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Bits that a gate chooses from; 16 and 32 train in float and are stored at 8."""
    granularity: Literal["layer", "channel", "weight"] = "layer"
    """A gate for the weight of each layer, for each of its outputs, or for each of its entries.

    "channel" and "weight" need `epochs`; "channel" leaves layers with groups one gate. "weight" is
    the paper's finest: `CGMQ.paper(granularity="weight")`. No file holds a width for each entry, so
    a layer is stored at the widest of its entries, and the others exactly, on grids that lie within
    that one: 2 (ternary), 4 and 8 bits, or 3 and 6. Gates move by gradients then (`direction` 1 or
    2), from the widest, under a budget of `bops`. `fit` finds the gates of the last search that
    ended on its plan, by the jobs.
    """
    counts: Literal["stored", "gates"] = "stored"
    """What a budget is about under gates of entries: layers as they are stored, or each entry at
    its own width, as the paper counts. A result under "gates" promises the budget only if what is
    stored keeps it, too, and says both."""
    image: int | Literal["gate"] | None = "gate"
    """Bits of the first layer's input; "gate": chosen like all others; None: float."""
    scales: Literal["tensor", "channel"] = "channel"
    """One scale for each weight (the paper's), or for each of its outputs."""
    two: Literal["half", "ternary"] = "half"
    """The grid at 2 bits: -1.5, -0.5, 0.5, 1.5 or -1, 0, 1 (the paper's), times the scale."""
    batch: int = 128
    """Examples of a step; batches that differ in more than their size are used as they are."""
    rate: float | None = None
    """Learning rate of Adam, relative to the mean magnitude of each tensor.

    None: 0.01 while gates move; after that, the nearer the solved layers are to the float network,
    the smaller.
    """
    features: float = 2.0
    """Weight of the error of the blocks' outputs; not used if the task has a loss."""
    augment: bool = True
    """Whether images are augmented; they never are if the task has a loss."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_least(self, 0, "epochs", "finish", "features", "gates", "rate")
        check_least(self, 1, "steps", "batch")
        if not self.widths or sorted(set(self.widths)) != list(self.widths):
            raise PlanError(
                f"widths are different numbers of bits in rising order; found {self.widths}"
            )
        for bits in self.widths:
            if bits not in (16, 32):
                Grid.of(bits)
        if self.widths[0] > WIDEST:
            raise PlanError(
                "the smallest width must be one that a file holds, 2 to 8 bits; "
                f"found {self.widths[0]}"
            )
        if isinstance(self.image, int):
            Grid.of(self.image, "unsigned")
        if self.granularity != "layer" and not self.epochs:
            raise PlanError(
                f"gates of {self.granularity}s learn which of them matter: "
                f"granularity={self.granularity!r} needs epochs of theirs"
            )
        if self.granularity == "weight":
            self._check_entries()
        elif self.counts == "gates":
            raise PlanError(
                "gates of layers and channels are stored as they are counted: "
                "counts='gates' needs granularity='weight'"
            )

    def _check_entries(self) -> None:
        """Raise PlanError for settings that do not go with a gate for each entry of a weight."""
        if self.start != "widest" or self.direction == 3:
            raise PlanError(
                "how much each entry of a weight harms is not measured: granularity='weight' needs "
                f"start='widest' and direction=1 or 2; found {self.start!r} and {self.direction}"
            )
        if not nest(self.widths) or (2 in self.widths and self.two != "ternary"):
            raise PlanError(
                "granularity='weight' needs grids that lie within one another, such as widths 2, "
                "4, 8 or 3, 6, and two='ternary', so that a file of the widest holds the others; "
                f"found {self.widths} and {self.two!r}"
            )

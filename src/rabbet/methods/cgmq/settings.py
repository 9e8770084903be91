"""Settings of CGMQ (arXiv 2409.20138)."""

from dataclasses import dataclass
from typing import Literal

from rabbet.errors import PlanError, check_fields, check_least
from rabbet.grids.grid import Grid
from rabbet.train.qat import WIDEST


@dataclass(frozen=True)
class Settings:
    """Gates under a budget, usually `bops`.

    start: of the gates, where the integer "program" puts them by what each width does to the
    output, or at the "widest" (the paper's). epochs: pairs of an epoch with moving gates and one
    without; updates "continuous" moves them in both. direction: how fast a gate moves, by 1 the
    gradient of its tensor, 2 gradient and size, 3 what the output loses for what is saved. gates:
    how far one of mean speed moves in an epoch, in widths. finish: epochs after the choice, with
    widths fixed. steps: of an epoch, None for as many as all examples take. batch: examples of a
    step; batches that differ in more than their number of examples are taken as they are.

    widths: that a gate can choose; 16 and 32 run in float and are handed out at 8. granularity: a
    weight has one gate ("layer"), or one for each output ("channel", which needs epochs; layers
    with groups keep one). image: bits of the first layer's input, "gate" to let it choose, None for
    float. scales: one per tensor (the paper's) or output channel. two: the grid at 2 bits, "half"
    or the paper's "ternary". rate: Adam's, relative to the mean magnitude of what it moves; None:
    0.01 where gates move, else the less, the nearer solved layers are to the float network. Trains
    on the task's loss if it has one, else on the float network's outputs and `features` times the
    error of its blocks', images augmented if `augment`.

    As in the paper: `CGMQ(start="widest", epochs=6, finish=6, direction=1, widths=(2, 4, 8, 16,
    32), scales="tensor", two="ternary")`.
    """

    start: Literal["widest", "program"] = "program"
    epochs: int = 0
    updates: Literal["alternating", "continuous"] = "alternating"
    direction: Literal[1, 2, 3] = 3
    gates: float = 1.0
    finish: int = 18
    steps: int | None = None
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    granularity: Literal["layer", "channel"] = "layer"
    image: int | Literal["gate"] | None = "gate"
    scales: Literal["tensor", "channel"] = "channel"
    two: Literal["half", "ternary"] = "half"
    batch: int = 128
    rate: float | None = None
    features: float = 2.0
    augment: bool = True

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
                f"the smallest width must be one that a file holds, 2 to 8 bits; found {self.widths[0]}"
            )
        if isinstance(self.image, int):
            Grid.of(self.image, "unsigned")
        if self.granularity == "channel" and not self.epochs:
            raise PlanError(
                "gates of channels learn which outputs matter: granularity='channel' needs epochs of theirs"
            )

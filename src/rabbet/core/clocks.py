"""What knows of a layer what no formula tells: its time, and what it adds to an exported file."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import nn

from rabbet.core.frame import Rows, Step
from rabbet.core.plan import LayerPlan, Plan
from rabbet.layers import Site


class Clock(Protocol):
    """Latencies on this machine, in nanoseconds for a batch of one; see `rabbet.choose.latency`."""

    @property
    def whole(self) -> int:
        """The float network."""
        ...

    @property
    def rest(self) -> int:
        """The part that no layer's choice changes."""
        ...

    def layer(self, site: Site, layer: LayerPlan | None) -> int:
        """One layer under a plan; None for one that stays float."""
        ...

    def expect(self, lines: Iterable[LayerPlan]) -> None:
        """Say how many of these layers are still to be timed, before any of them is."""
        ...

    def network(self, model: nn.Module) -> int:
        """A compressed network, exported and timed now."""
        ...


class Gauge(Protocol):
    """Bytes of the file that is exported for a runtime; see `rabbet.choose.filesize`."""

    def layer(self, site: Site, layer: LayerPlan | None) -> int:
        """What one layer adds, without what others share; None for one that stays float."""
        ...

    def expect(self, lines: Iterable[LayerPlan]) -> None:
        """Say how many of these layers are still to be exported, before any of them is."""
        ...

    def network(self, plan: Plan) -> int:
        """The whole file."""
        ...

    def steps(self, rows: Rows) -> Sequence[Step]:
        """What lines share, counted once."""
        ...

    def written(self, plan: Plan) -> int:
        """The whole file, written now, with any numbers; what is predicted after that follows."""
        ...

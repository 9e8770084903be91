"""One integer program over the rank and the bits of every layer; post-training, without labels.

The error of every candidate for a layer is foretold in the metric of the layer's inputs, and the
program picks one candidate per layer under all limits at once. What it picks is solved, scored by
how much it changes the network's output, and the program asked again until it picks nothing new
(`choose.search`). Then input ranges are chosen, the layers are solved once more in order, each for
the inputs that the compressed layers before it produce, and a short tuning follows.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rabbet.choose.program import Allocator, Option
from rabbet.choose.search import Chooser
from rabbet.choose.sensitivity import require_gradients
from rabbet.core.budget import Budget
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.errors import PlanError, check_fields, check_least
from rabbet.forms import RANKED, Dense, LowRank
from rabbet.grids.grid import Grid
from rabbet.layers import Site
from rabbet.methods.base import Fitted
from rabbet.model.build import validate
from rabbet.reconstruct.candidates import Terms
from rabbet.reconstruct.network import solved
from rabbet.train.tuning import Tuning, tune
from rabbet.workpiece import Workpiece


@dataclass(frozen=True)
class Joint:
    """The default method: what a layer may become, and what follows the choice."""

    grids: tuple[str, ...] = ("1c", "tc", "2hc", "3c", "4c", "5c", "6c", "7c", "8c")
    """Of dense weights, as a plan writes them."""
    adapters: tuple[tuple[str, float], ...] = (
        ("2hc", 0.05),
        ("2hc", 0.1),
        ("3c", 0.05),
        ("3c", 0.1),
    )
    """Dense weights with a low-rank adapter: the weight's grid, the adapter's share of entries."""
    adapter_grid: str = "8c"
    """Of the adapters' factors."""
    forms: tuple[str, ...] = ("cp", "tucker", "lowrank")
    """Factorisations that may take the place of a weight."""
    rank: bool = True
    """False leaves rank out: no factorisations and no adapters, bits alone."""
    shares: tuple[float, ...] = (0.7, 0.5, 0.35, 0.25)
    """Their ranks are those that bring the layer's MACs to these shares of the dense layer's."""
    factor_grids: tuple[str, ...] = ("4c", "5c", "6c", "8c")
    """Of the factors."""
    act: int | None = 8
    """Bits of every layer's input; None: float."""
    tuning: Tuning = Tuning()  # noqa: RUF009 (frozen)
    """The loop at the end; `Tuning(steps=0)` leaves it out."""
    acts: tuple[int, ...] = ()
    """Bits of inputs that the program chooses from, layer by layer; empty: `act` for all."""
    groups: tuple[str, ...] = ("2g64z", "3g64", "4g64")
    """Of dense weights of linears and tables, beside `grids`: groups of inputs share a scale."""
    widest: int | None = None
    """Bits of the widest weights; what is wider gets as many. 7 for int8 kernels that saturate."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.grids:
            raise PlanError("Joint needs at least one grid to choose from")
        strange = next((form for form in self.forms if form not in RANKED), None)
        if strange is not None:
            raise PlanError(f"forms are of {', '.join(RANKED)}; found {strange!r}")
        for text in (
            *self.grids,
            *self.groups,
            self.adapter_grid,
            *self.factor_grids,
            *(g for g, _ in self.adapters),
        ):
            Grid.parse(text)
        sizes = {g: Grid.parse(g).scales.parts(2**30) for g in self.groups}
        whole = next((g for g, parts in sizes.items() if (parts or 0) <= 1), None)
        if whole is not None:
            raise PlanError(
                f"groups are grids whose scales groups of inputs share, such as 4g64; found "
                f"{whole!r}, which belongs to grids"
            )
        check_least(self, 2, "widest")
        if self.widest is not None:
            Grid.of(self.widest)
        for bits in self.acts if self.act is None else (*self.acts, self.act):
            Grid.of(bits, "unsigned")

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """Choose a candidate for every layer; see `Method.plan`."""
        searched = self.chooser(piece)
        searched.allocator.require_feasible(budget)
        return searched.plans([budget])[0]

    def chooser(self, piece: Workpiece) -> Chooser:
        """What plans are chosen from, with nothing solved yet; see `Searching.chooser`."""
        require_gradients(piece)
        menus = [(site, self.menu(site)) for site in piece.survey]
        rows = [(site, self._lines(site, menu)) for site, menu in menus]
        piece.expect(line for _, lines in rows for line in lines)
        table = [[Option(x, piece.layer_cost(site, x)) for x in lines] for site, lines in rows]
        return Chooser(piece, Allocator(table, piece))

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Solve the plan's layers, then once more in order, then tune; see `Method.fit`."""
        validate(plan, piece.survey)
        if self.tuning.steps:
            require_gradients(piece)
        student, corrected = solved(piece, plan)
        notes = (corrected, tune(student, piece, self.tuning))
        return Fitted(student, tuple(note for note in notes if note))

    def menu(self, site: Site) -> tuple[Terms, ...]:
        """Every candidate for a layer: dense ones, dense ones with an adapter, and other forms."""
        grids = (*self.grids, *self._grouped(site))
        dense = [(Term(Dense(), self._grid(g)),) for g in grids]
        full = LowRank(1).full_rank(site)
        grid = self._grid(self.adapter_grid)
        with_adapter = []
        for base, share in self.adapters if self.rank else ():
            rank = round(share * site.numel / (site.shape[0] + site.columns))
            if 1 <= rank < full:
                with_adapter.append((Term(Dense(), self._grid(base)), Term(LowRank(rank), grid)))
        return tuple(dict.fromkeys([*dense, *with_adapter, *self._factorised(site)]))

    def _grid(self, text: str) -> Grid:
        """A grid, no wider than the widest."""
        grid = Grid.parse(text)
        if self.widest is None or grid.bits <= self.widest:
            return grid
        return replace(grid, codebook=Grid.of(self.widest).codebook)

    def _grouped(self, site: Site) -> Iterator[str]:
        """The grids whose groups cut the inputs of a layer without places into several."""
        for text in self.groups if site.space == 0 else ():
            if (Grid.parse(text).scales.parts(site.columns) or 0) > 1:
                yield text

    def _factorised(self, site: Site) -> Iterator[Terms]:
        """The factorised candidates for a layer: each form at the rank for each share of MACs."""
        for name in self.forms if self.rank else ():
            form = RANKED[name]
            full = form(1).full_rank(site)
            for share in self.shares if full else ():
                ranks = range(1, full + 1)
                # The largest rank that keeps the share, 0 if there is none.
                rank = bisect_right(ranks, share * site.macs, key=lambda r: sum(form(r).macs(site)))
                rank -= rank % _vector(rank)
                if rank >= 1:
                    yield from ((Term(form(rank), self._grid(g)),) for g in self.factor_grids)

    def _lines(self, site: Site, menu: tuple[Terms, ...]) -> list[LayerPlan]:
        """Every entry of a menu with every width that the input may have."""
        acts: tuple[int | None, ...] = self.acts or (self.act,)
        widths = acts if site.multiplies else (None,)
        widths = tuple(dict.fromkeys(widths))
        return [LayerPlan(site.name, terms, bits) for terms in menu for bits in widths]


def _vector(rank: int) -> int:
    """The number that a rank should be a multiple of, so that a runtime's vectors are full.

    It is 16 if that is a small part of the rank. Measured (benchmarks/latency.py): a chain of rank
    134 is slower than one of rank 128 by far more than its MACs explain.
    """
    return min(16, 1 << max(0, (rank // 4).bit_length() - 1))


QUALITY: dict[str, Joint] = {
    "fast": Joint(tuning=Tuning(steps=0)),
    "default": Joint(),
    "best": Joint(tuning=Tuning(steps=1500, codes=1.5e-3)),
}
"""The default method by quality: not tuned, tuned briefly, or tuned long at a lower rate."""

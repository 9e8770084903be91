"""How much each width of each tensor harms the output, measured before anything is trained."""

from collections.abc import Callable, Mapping

from torch import Tensor

from rabbet.core.plan import Term
from rabbet.forms import Dense
from rabbet.methods.cgmq.gates import Gates
from rabbet.methods.cgmq.layer import GatedLayer
from rabbet.reconstruct.candidates import canonical, read_numbers
from rabbet.reconstruct.network import solve_menus
from rabbet.train.qat import WIDEST
from rabbet.workpiece import Workpiece


def measure_sensitivity(
    piece: Workpiece, gates: Gates, start: Mapping[str, Tensor], loss: Callable[[], float]
) -> None:
    """Fill `gates.sensitivity` by rounding one tensor at a time, to every width.

    The result is kept in the jobs, where a search under another budget finds it. start: the
    parameters of the layers, on which it depends. Weights are rounded with error feedback in the
    metric of their inputs' second moment, because training repairs most of the harm that rounding
    does to a weight, but little of what it does to an input; rounded to nearest, weights would get
    the bits that inputs need (docs/architecture.md).
    """
    stored = [b for b in gates.widths if b <= WIDEST]
    menus = {
        x.site.name: tuple((Term(Dense(), x.weight.grid_of(b)),) for b in stored)
        for x in gates.layers
    }
    key = piece.key(
        "sensitivity", start, {"menus": menus, "gates": gates.names, "widths": gates.widths}
    )
    kept = piece.jobs.kept(key)
    if kept is None:
        solutions = solve_menus(piece, "rounding", list(menus.items()))
        results = dict(zip(menus, solutions, strict=True))

        def rounded(layer: GatedLayer) -> dict[int, Tensor]:
            menu, result = menus[layer.site.name], results[layer.site.name]
            return {
                b: canonical(layer.site, terms, read_numbers(result, menu, k))
                for k, (b, terms) in enumerate(zip(stored, menu, strict=True))
            }

        for done in gates.probe(loss, rounded):
            piece.jobs.progress("measuring widths", done, len(gates.spans))
        kept = {"sensitivity": gates.sensitivity}
        piece.jobs.keep(key, kept)
    gates.sensitivity = kept["sensitivity"].clone()

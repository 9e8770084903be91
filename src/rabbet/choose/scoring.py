"""What every candidate of every layer does to the output of the network, all of them solved.

`choose.search` solves only those that may be chosen.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rabbet.choose.sensitivity import output_errors
from rabbet.layers import Site
from rabbet.reconstruct.candidates import Terms, canonical, read_numbers
from rabbet.reconstruct.network import solve_menus
from rabbet.workpiece import Workpiece


def scored(
    piece: Workpiece,
    menus: Mapping[str, tuple[Terms, ...]],
    learns: bool = False,
) -> list[list[float]]:
    """How much each entry of each layer's menu, solved, changes the network's output.

    learns: for a network that is trained afterwards, where it matters how much is left to train
    from: the error is divided by the share of the layer's own output that is left.
    """
    results = solve_menus(piece, "solving layers", list(menus.items()))
    changes: dict[str, Tensor] = {}
    for (name, menu), result in zip(menus.items(), results, strict=True):
        site = piece.survey[name]
        solved = [canonical(site, menu[k], read_numbers(result, menu, k)) for k in range(len(menu))]
        changes[name] = torch.stack(solved) - piece.weight(site)
    errors = output_errors(piece, changes)
    if learns:
        errors = {s.name: errors[s.name] / _left(piece, s, changes[s.name]) for s in piece.survey}
    return [errors[s.name].tolist() for s in piece.survey]


def _left(piece: Workpiece, site: Site, changes: Tensor) -> Tensor:
    """The share of the mean square of a layer's output that each change [candidates, ...] leaves.

    It is at least 1/1000.
    """
    second = piece.moments().get(site.name)

    def energy(weight: Tensor) -> float:
        rows = site.matrix(weight).double()
        return float(((rows if second is None else rows @ second.double()) * rows).sum())

    whole = max(energy(piece.weight(site)), 1e-30)
    shares = [max(1 - energy(change) / whole, 1e-3) for change in changes]
    return torch.tensor(shares, dtype=torch.float64)

"""What every candidate of every layer does to the output of the network."""

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
    prune: bool = False,
    learns: bool = False,
) -> tuple[list[list[float]], list[list[int]]]:
    """How much each solved entry of each layer's menu changes the network's output.

    Also returned is which entries of each menu were solved. learns: for a network that is trained
    afterwards, where it matters how much is left to train from: the error is divided by the share
    of the layer's own output that is left.
    """
    results = solve_menus(piece, "solving layers", menus, prune)
    changes: dict[str, Tensor] = {}
    kept: list[list[int]] = []
    for site in piece.survey:
        menu, weight, result = menus[site.name], piece.weight(site), results[site.name]
        kept.append([k for k in range(len(menu)) if f"{k}.error" in result])
        solved = [canonical(site, menu[k], read_numbers(result, menu, k)) for k in kept[-1]]
        changes[site.name] = torch.stack(solved) - weight
    errors = output_errors(piece, changes)
    if learns:
        errors = {s.name: errors[s.name] / _left(piece, s, changes[s.name]) for s in piece.survey}
    return [errors[s.name].tolist() for s in piece.survey], kept


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

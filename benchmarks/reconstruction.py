"""A short block reconstruction with learned rounding, for comparison in `cora.py`.

AdaRound (arXiv 2004.10568) on the output of each block (BRECQ, arXiv 2102.05426), block after
block, each on the inputs that the quantised blocks before it give. Settings of the papers: Adam at
1e-3 for 20,000 iterations per block, at 1e-2 for 2,000; batch 32; regulariser 0.01, its exponent
from 20 to 2 after a fifth of the iterations. Scales per channel have the least squared error;
inputs of all layers have `act` bits; no layer is exempt.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import rabbet
from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.data.task import Task
from rabbet.layers import KINDS
from rabbet.model.build import build
from rabbet.model.compressed import Compressed, Factor
from rabbet.workpiece import Workpiece

LOW, HIGH = -0.1, 1.1  # ends of the stretched sigmoid, eq. 23 of AdaRound


class _Soft:
    """Codes between their floor and the integer above, by a stretched sigmoid."""

    def __init__(self, factor: Factor, weight: Tensor) -> None:
        self.factor, grid = factor, factor.grid
        exact = weight / grid.spread(factor.scale, weight.ndim) - grid.shift
        self.floor = exact.floor()
        share = ((exact - self.floor - LOW) / (HIGH - LOW)).clamp(1e-4, 1 - 1e-4)
        self.v = (share / (1 - share)).log().requires_grad_()
        factor.forward = self  # type: ignore[method-assign]

    @property
    def up(self) -> Tensor:
        return (self.v.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def __call__(self) -> Tensor:
        grid = self.factor.grid
        return grid.values((self.floor + self.up).clamp(grid.low, grid.high), self.factor.scale)

    def settle(self) -> None:
        grid = self.factor.grid
        with torch.no_grad():
            self.factor.codes.copy_((self.floor + (self.v > 0)).clamp(grid.low, grid.high))
        del self.factor.forward


def reconstruct(
    model: nn.Module, data: Sequence[Tensor], bits: int, act: int, iterations: int, seed: int = 0
) -> tuple[nn.Module, int]:
    """A network quantised block by block, and the iterations in total."""
    piece = Workpiece.of(model, Task.of(data), rabbet.Jobs(), seed)
    plan = rabbet.Plan.parse("\n".join(f"{s.name} dense@{bits}c | act@{act}" for s in piece.survey))
    student = build(piece.model, plan, piece.survey)
    calibrate_ranges(student, piece.task, seed)
    images = torch.cat(list(data))
    units = list(dict.fromkeys(s.name.rpartition(".")[0] or s.name for s in piece.survey))
    for name in units:
        given, wanted = _passed(student, name, images)[0], _passed(piece.model, name, images)[1]
        unit = student.get_submodule(name)
        layers = [m for m in unit.modules() if isinstance(m, Compressed)]
        soft = [
            _Soft(
                m.factors[0][0],
                KINDS[m.site.kind].weight(piece.model.get_submodule(m.site.name)).detach(),
            )
            for m in layers
        ]
        _fit(unit, soft, given, wanted, iterations, seed)
        for s in soft:
            s.settle()
    return student, iterations * len(units)


def _fit(
    unit: nn.Module, soft: list[_Soft], given: Tensor, wanted: Tensor, iterations: int, seed: int
) -> None:
    adam = torch.optim.Adam([s.v for s in soft], 1e-3 if iterations >= 10_000 else 1e-2)
    generator = torch.Generator().manual_seed(seed)
    for k in range(iterations):
        chosen = torch.randperm(len(given), generator=generator)[:32]
        loss = (unit(given[chosen]) - wanted[chosen]).square().flatten(1).sum(1).mean() / wanted[
            0, 0
        ].numel()
        progress = (k / iterations - 0.2) / 0.8
        if progress > 0:
            beta = 2 + 18 * 0.5 * (1 + math.cos(math.pi * progress))
            total = torch.stack([(1 - (2 * s.up - 1).abs().pow(beta)).sum() for s in soft]).sum()
            loss = loss + 0.01 * total
        adam.zero_grad()
        loss.backward()
        adam.step()


def _passed(model: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a module for all images."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, out: seen.append((args[0], out))
    )
    with torch.no_grad():
        for part in images.split(100):
            model(part)
    hook.remove()
    return torch.cat([a for a, _ in seen]), torch.cat([b for _, b in seen])

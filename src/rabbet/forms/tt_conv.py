"""A tensor train of a kernel: 1x1, a small conv along each axis of the kernel, 1x1.

The kernel [out, in, h, w] is a chain over (in, h, w, out), Oseledets 2011: U [a, in], a conv
[b, a, h, 1], a conv [c, b, 1, w] and V [out, c]. One rank sets all bonds: none is larger, nor
larger than can be used. Of a kernel that has several places along one axis only it is Tucker-2 with
other ranks. `tt` is another train: of the matrix [out, in * h * w], whose axes are read as digits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from rabbet.errors import PlanError
from rabbet.forms.base import PLAIN, Aim, Between, Ranked
from rabbet.layers import Site
from rabbet.solve.als import Problem
from rabbet.solve.kernel_train import TrainProblem, along_axes, train_bonds
from rabbet.solve.tensor_train import tt_svd
from rabbet.solve.varpro import project
from rabbet.solve.whiten import principal


@dataclass(frozen=True)
class TTConv(Ranked):
    """Factors U [bond, in], a conv [bond, bond, *kernel] for each axis, and V [out, bond]."""

    name: ClassVar[str] = "ttconv"
    evaluates: ClassVar[bool] = True
    unfinished: ClassVar[float] = 1.2
    alternates: ClassVar[bool] = True

    def full_rank(self, site: Site) -> int:
        """The largest bond that can be used; 0 where the kernel has no layers by axis.

        See `Site.by_axis`.
        """
        return max(train_bonds(_sizes(site), site.numel)) if site.by_axis else 0

    def require(self, site: Site) -> None:
        """See `Form.require`; says which convs it fits."""
        if not site.by_axis:
            raise PlanError(
                f"{self.name} fits convs without groups of more than one place whose inner convs "
                "run at places that are known: of a kernel of several axes all but the last have "
                "a padding that keeps the size, and a transposed conv has one axis. This is a "
                f"{site.kind.name} of shape {list(site.shape)}, pads {list(site.pads)}"
            )
        super().require(site)

    def shapes(self, site: Site) -> tuple[tuple[int, ...], ...]:
        """U, a conv for each axis, V."""
        first, *others = self._bonds(site)
        cores = zip(others, (first, *others), site.by_axis, strict=False)
        return (
            (first, site.shape[1]),
            *((b, a, *layer.shape[2:]) for b, a, layer in cores),
            (site.shape[0], (first, *others)[-1]),
        )

    def _bonds(self, site: Site) -> tuple[int, ...]:
        return train_bonds(_sizes(site), self.rank)

    def observed(self, shapes: Sequence[Sequence[int]]) -> Self:
        """The rank is the largest bond."""
        return replace(self, rank=max(shape[0] for shape in shapes[:-1]))

    def macs(self, site: Site) -> tuple[int, ...]:
        """U runs where the input lies, each conv where its layer does, V at the outputs."""
        places = [layer.kernel_positions for layer in site.by_axis]
        sizes = (math.prod(shape) for shape in self.shapes(site))
        return tuple(
            n * at for n, at in zip(sizes, (site.inputs, *places, site.positions), strict=True)
        )

    def matrix_rank(self, site: Site) -> int | None:
        """The bond before the outputs."""
        return self._bonds(site)[-1]

    def decompose(
        self, site: Site, weight: Tensor, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """Variable projection in the metric.

        It starts from the TT-SVD of the weight's leading left singular vectors.
        """
        metric = None if second is None else second[0]
        matrix = weight.flatten(1)
        if aim.start is not None:
            small, steps = _chain(aim.start[:-1]), aim.steps
        else:
            sizes, bonds = _sizes(site)[1:], self._bonds(site)
            left = principal(matrix, metric, bonds[-1])
            inner = (left.mT @ matrix).mT.reshape(1, -1)  # [in, *kernel, bond]
            # The core of the outputs is left out: V is solved for.
            *small, _ = tt_svd(inner, (*sizes, bonds[-1]), (1, *bonds, 1))
            steps = 0 if self.rank == self.full_rank(site) else aim.steps
        solution = project(_rows, small, matrix, aim.lean or metric, aim.noise, steps)
        # All columns of V get one norm: rounding the tensor before it then weighs the same in each.
        norm = solution.last.square().mean(0).clamp_min(1e-20).sqrt()
        *cores, end = solution.small
        first, *convs = (*cores, end * norm)
        parts = (core.permute(2, 0, 1) for core in convs)
        shaped = (p.reshape(s) for p, s in zip(parts, self.shapes(site)[1:-1], strict=True))
        return first[0].mT, *shaped, solution.last / norm

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """The chain put together, in the shape of the weight."""
        *first, last = factors
        rows = _rows(_chain(first))
        return (last @ rows).view(len(last), *site.shape[1:])

    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """A layer for each factor, as they will be exported."""
        first, *cores, last = factors
        inner = between(0, site.pointwise(x, first))
        for k, (layer, core) in enumerate(zip(site.by_axis, cores, strict=True)):
            run = replace(layer, shape=tuple(core.shape)).run
            inner = between(k + 1, run(inner, core))
        return site.pointwise(inner, last, bias)

    def problem(self, weight: Tensor) -> Problem:
        """V [out, c], U [in, a] and a core [places, bond * bond] for each axis of the kernel."""
        return TrainProblem(along_axes(weight))

    def arranged(self, site: Site, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """U, a conv for each axis, V."""
        last, first, *inner = matrices
        shapes = self.shapes(site)
        cores = (
            core.mT.reshape(shape[1], shape[0], -1).transpose(0, 1).reshape(shape)
            for core, shape in zip(inner, shapes[1:-1], strict=True)
        )
        return first.mT, *cores, last


def _sizes(site: Site) -> tuple[int, ...]:
    """Outputs, inputs, and the places of the kernel along each axis that has several."""
    return (*site.shape[:2], *(n for n in site.shape[2:] if n > 1))


def _chain(factors: Sequence[Tensor]) -> list[Tensor]:
    """U and the convs as cores [bond, size, bond]."""
    first, *convs = factors
    return [first.mT[None], *(conv.flatten(2).permute(1, 2, 0) for conv in convs)]


def _rows(small: Sequence[Tensor]) -> Tensor:
    """What all cores but V stand for, as rows [bond, in * k]."""
    rows = small[0][0]
    for core in small[1:]:
        bond = core.shape[0]
        rows = rows.reshape(-1, bond) @ core.reshape(bond, -1)
        rows = rows.reshape(-1, core.shape[2])
    return rows.mT

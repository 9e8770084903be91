"""Tensor trains of a kernel: its inputs, its places along each axis, its outputs (Oseledets 2011).

The kernel X [I, J, K, L, ...] of I outputs and J inputs is a chain over J, K, L, ..., I:

    X_ijkl = sum_abc U_ja G_akb H_blc V_ic

As factors in the order of the tensor's axes: V [I, c], U [J, a], G [K, a * b], H [L, b * c]. With
all places as one axis the chain is Tucker-2. Unlike CP, a train of given bonds has a best
approximation, and TT-SVD is near it: no terms grow that cancel one another.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rabbet.solve.als import Factors, Problem, Sides
from rabbet.solve.gram import Kronecker
from rabbet.solve.tensor_train import tt_svd

PASSES = 4  # of `balanced` over all bonds: what a bond is given changes its neighbours' norms


def train_bonds(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Bonds of a train of a tensor [I, J, ...], from the inputs on.

    Each is the rank, unless fewer are all that can be used.
    """
    sizes = [*shape[1:], shape[0]]
    parts = ((math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))
    return tuple(min(rank, *part) for part in parts)


def along_axes(weight: Tensor) -> Tensor:
    """A kernel [out, in, *kernel] without the axes along which it has one place."""
    return weight.reshape(*weight.shape[:2], *(n for n in weight.shape[2:] if n > 1))


def tucker_bonds(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """Both ranks of Tucker-2 of a tensor [I, J, ...]: that of the inputs, the same share of I."""
    return rank, -(-rank * shape[0] // shape[1])


class TrainProblem(Problem):
    """A train whose bonds are at most the rank; see the module for its factors."""

    cancels: ClassVar[bool] = False

    def bonds(self, rank: int) -> tuple[int, ...]:
        """The bonds at a rank, from the inputs on."""
        return train_bonds(self.shape, rank)

    def sides(self, factors: Factors, mode: int) -> Sides:
        """The least-squares problem of one factor, given the others.

        The Gram matrix of a core between bonds a and b is a Kronecker product, of that of all
        before it and that of all behind.
        """
        cores = _cores(factors)
        place = (mode - 1) % len(cores)
        before, behind = cores[:place], cores[:place:-1]
        seen = self._chain()
        left = right = seen.new_ones(1, 1)
        for core in before:
            seen = core.flatten(0, 1).mT @ seen.reshape(core[..., 0].numel(), -1)
            left = torch.einsum("akb,ac,ckd->bd", core, left, core)
        for core in behind:
            seen = seen.reshape(-1, core[0].numel()) @ core.flatten(1).mT
            right = torch.einsum("bkc,cd,akd->ba", core, right, core)
        # what is left of the tensor, [a * n * b]
        inner = seen.reshape(len(left), -1, len(right)).transpose(0, 1).flatten(1)
        return Kronecker(left, right), inner, self.power

    def balanced(self, factors: Factors) -> Factors:
        """The same tensor from factors whose slices at each bond have equal norms on both sides.

        Of two neighbours the product then changes least by their rounding, to first order, if the
        scale of each follows its norm.
        """
        cores = _cores(factors)
        for _ in range(PASSES):
            for k in range(len(cores) - 1):
                here, there = cores[k].norm(dim=(0, 1)), cores[k + 1].norm(dim=(1, 2))
                even = (there.clamp_min(1e-30) / here.clamp_min(1e-30)).sqrt()
                cores[k], cores[k + 1] = cores[k] * even, cores[k + 1] / even[:, None, None]
        return _factors(cores)

    @property
    def channel_axes(self) -> tuple[int | None, ...]:
        """Of V its outputs, of U its bond; the channels of a core are no axis of its matrix."""
        return (0, 1, *[None] * (len(self.shape) - 2))

    def random(self, rank: int, seed: int) -> Factors:
        """Standard normal factors."""
        generator = torch.Generator().manual_seed(seed)
        sizes, bonds = [*self.shape[1:], self.shape[0]], [1, *self.bonds(rank), 1]
        cores = [
            torch.randn(a, n, b, generator=generator, dtype=torch.float64).to(self.flat.device)
            for a, n, b in zip(bonds, sizes, bonds[1:], strict=False)
        ]
        return _factors(cores)

    def leading(self, rank: int, seed: int) -> Factors:
        """TT-SVD, balanced: it draws nothing."""
        sizes, bonds = [*self.shape[1:], self.shape[0]], [1, *self.bonds(rank), 1]
        return self.balanced(_factors(tt_svd(self._chain().reshape(1, -1), sizes, bonds)))

    @property
    def full_rank(self) -> int:
        """The largest bond that can be used."""
        return max(train_bonds(self.shape, math.prod(self.shape)))

    def _chain(self) -> Tensor:
        """The tensor in the order of the chain, [J, ..., I]."""
        return self.flat.view(self.shape).movedim(0, -1)


class Tucker2Problem(TrainProblem):
    """Tucker-2 of a tensor [I, J, K]: factors V [I, q], U [J, p] and the core [K, p * q]."""

    def bonds(self, rank: int) -> tuple[int, ...]:
        """The rank of the inputs, and the same share of the outputs."""
        return tucker_bonds(self.shape, rank)

    @property
    def full_rank(self) -> int:
        """The inputs."""
        return self.shape[1]


def _cores(factors: Factors) -> list[Tensor]:
    """Factors as cores [bond, n, bond], in the order of the chain."""
    last, first, *inner = factors
    cores = [first[None]]
    for factor in inner:
        cores.append(factor.view(len(factor), cores[-1].shape[2], -1).transpose(0, 1))
    return [*cores, last.mT[..., None]]


def _factors(cores: Sequence[Tensor]) -> Factors:
    """The inverse of `_cores`."""
    first, *inner, last = cores
    return (last[..., 0].mT, first[0], *(core.transpose(0, 1).flatten(1) for core in inner))

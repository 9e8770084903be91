"""Augmented images: crops, flips and mixtures of those in the calibration set.

No label is ever used.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rabbet.data.batches import Batch, replaced, tensors
from rabbet.data.examples import Axes

PARTS = 16  # in which examples are judged
COPIES = 4  # augmented ones of each image that judges


@dataclass(frozen=True)
class Pool:
    """Examples to draw batches from.

    parts: one joined batch if batches can be joined, else all of them. axes: where examples lie.
    image: the position of the images among the tensors of the joined batch, if there are any.
    """

    parts: tuple[Batch, ...]
    axes: Axes
    image: int | None

    @classmethod
    def of(cls, batches: Sequence[Batch], axes: Axes) -> "Pool":
        """Join batches if that can be; otherwise they are kept apart and drawn whole."""
        if not all(axes.joinable(batches[0], batch) for batch in batches):
            return cls(tuple(batches), axes, None)
        joined = axes.join(batches)
        images = [
            k
            for k, (t, axis) in enumerate(zip(tensors(joined), axes.each, strict=True))
            if axis == 0 and t.ndim == 4 and t.is_floating_point() and min(t.shape[2:]) >= 8
        ]
        return cls((joined,), axes, images[0] if len(images) == 1 else None)

    def draws(self, size: int) -> int:
        """How many draws of a size show about as many examples as the pool holds."""
        if len(self.parts) > 1:
            return len(self.parts)
        return max(1, self.axes.count(self.parts[0]) // size)

    def draw(self, size: int, generator: torch.Generator, augment: bool = True) -> Batch:
        """A batch of random examples, its images augmented.

        If the batches could not be joined, one of them, unchanged.
        """
        if len(self.parts) > 1:
            return self.parts[int(torch.randint(len(self.parts), (1,), generator=generator))]
        whole = self.parts[0]
        index = torch.randperm(self.axes.count(whole), generator=generator)[:size]
        chosen = self.axes.take(whole, index)
        return self.augmented(chosen, generator) if augment else chosen

    def augmented(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same examples, their images augmented."""
        place = itertools.count()

        def changed(t: Tensor) -> Tensor:
            return mixed(cropped(t, generator), generator) if next(place) == self.image else t

        return replaced(batch, changed)


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n, c, h, w] shifted and flipped at random.

    Shifts are up to an eighth of the image, reflected at the border.
    """
    n, _, h, w = images.shape
    reach = [max(1, min(h, w) // 8)] * 4
    wide = F.pad(images, reach, mode="reflect")
    tops, lefts = (
        torch.randint(0, 2 * reach[0] + 1, (n,), generator=generator).tolist() for _ in range(2)
    )
    cut = torch.stack(
        [wide[i, :, a : a + h, b : b + w] for i, (a, b) in enumerate(zip(tops, lefts, strict=True))]
    )
    flip = (torch.rand(n, generator=generator) < 0.5).to(images.device).view(-1, 1, 1, 1)
    return torch.where(flip, cut.flip(3), cut)


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n, c, h, w], a quarter of them with mixup and a quarter with cutmix.

    Mixup blends an image with another, cutmix pastes a rectangle of another.
    """
    n, _, h, w = images.shape
    other = images[torch.randperm(n, generator=generator).to(images.device)]
    kind, share = torch.rand(n, generator=generator), torch.rand(n, generator=generator)
    sides = torch.randint(h // 4, h * 3 // 4 + 1, (n, 2), generator=generator)
    corner = torch.rand(n, 2, generator=generator)
    ys, xs = torch.arange(h), torch.arange(w)
    top, left = (corner * (torch.tensor([h, w]) - sides.clamp(max=min(h, w)))).long().unbind(1)
    rows = (ys >= top[:, None]) & (ys < (top + sides[:, 0])[:, None])
    columns = (xs >= left[:, None]) & (xs < (left + sides[:, 1])[:, None])
    inside = rows[:, :, None] & columns[:, None, :]
    weight = torch.where(
        (kind < 0.25)[:, None, None],
        share[:, None, None],
        ((kind < 0.5)[:, None, None] & inside).float(),
    )
    weight = weight[:, None].to(images.device, images.dtype)
    return images * (1 - weight) + other * weight


def judging_parts(batches: Sequence[Batch], axes: Axes, seed: int) -> list[list[Batch]]:
    """Examples to judge by, in parts of about equally many, which show how much examples differ.

    Images come with four augmented copies of the same part: a network is so confident on images
    that it was trained on that small differences do not show there.
    """
    pool = Pool.of(batches, axes)
    if len(pool.parts) > 1:
        total = sum(map(axes.count, batches))
        return [
            [part]
            for batch in batches
            for part in _cut(batch, axes, round(PARTS * axes.count(batch) / total))
        ]
    generator = torch.Generator().manual_seed(seed)
    whole = pool.parts[0]
    copies = 0 if pool.image is None else COPIES
    versions = [whole, *(pool.augmented(whole, generator) for _ in range(copies))]
    return [list(part) for part in zip(*(_cut(v, axes, PARTS) for v in versions), strict=True)]


def _cut(batch: Batch, axes: Axes, parts: int) -> list[Batch]:
    """A batch in at most so many parts, whose sizes differ by one at most."""
    count = axes.count(batch)
    parts = max(1, min(parts, count))
    ends = [count * k // parts for k in range(parts + 1)]
    return [axes.cut(batch, slice(a, b)) for a, b in itertools.pairwise(ends)]

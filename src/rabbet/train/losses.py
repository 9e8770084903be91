"""How far the outputs of one network are from those of another."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.core.survey import Survey
from rabbet.data.answers import scores_divergence
from rabbet.data.batches import Batch, floating, outputs
from rabbet.model.hooks import hooked
from rabbet.workpiece import Workpiece

LEAST = 1e-24  # the smallest mean square that an error is divided by
# Inputs and outputs of all layers that a step holds at once. MobileNetV2 takes 15 bytes for each of
# them in training: what both networks give, and what the gradient of rounding needs.
ENTRIES = 2**28
TEMPERATURE = 0.07  # of contrast: cosines of unlike examples differ by little


Features = dict[tuple[str, int], Tensor]
"""What the blocks of a network gave in a pass, by the block and the number of its call."""
Apart = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""How far two sets of outputs are apart, a scalar; see `Answers`."""


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """`|ours - theirs|^2 / |theirs|^2`."""
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(LEAST)


def feature_error(
    ours: Features, theirs: Features, squares: Mapping[tuple[str, int], float] | None = None
) -> Tensor:
    """Mean relative error of features; zero if there are none.

    Pairs of different shapes do not count, and none count if one side has more features: where a
    compressed router decides differently, an expert gets other tokens, or none.

    squares: where these are of a part of a batch, the sums of squares of the float network's
    features over all of it; then errors of parts add up to that of the batch.
    """
    pairs = [
        (key, ours[key], b)
        for key, b in (theirs.items() if ours.keys() == theirs.keys() else ())
        if ours[key].shape == b.shape and len(b)
    ]
    if not pairs:
        return torch.zeros(())
    if squares is None:
        return torch.stack([relative_error(a, b) for _, a, b in pairs]).mean()
    parts = [(a - b).square().sum() / max(squares[key], LEAST) for key, a, b in pairs]
    return torch.stack(parts).sum() / len(squares)


def answer_error(ours: Tensor, theirs: Tensor, mask: Tensor | None, scores: bool) -> Tensor:
    """How far two outputs are apart at the places that the mask marks as real.

    KL divergence if they are scores of classes on the last axis, else the relative error.
    """
    classes = scores and ours.ndim > 1 and ours.shape[-1] > 1
    rows, goal = real_places(ours, mask), real_places(theirs, mask)
    return scores_divergence(rows, goal) if classes else relative_error(rows, goal)


def hidden_error(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """How far hidden states [batch, places, width] are apart: mean squared error plus 1 - cosine.

    Both are means over the places that the mask marks as real.
    """
    rows, goal = real_places(ours, mask), real_places(theirs, mask)
    return F.mse_loss(rows, goal) + (1 - F.cosine_similarity(rows, goal, -1)).mean()


def attention_divergence(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean KL divergence of attention [batch, heads, query, key] over the real queries."""
    logs = (theirs + 1e-8).log() - (ours + 1e-8).log()
    each = (theirs * logs).sum(-1).mean(1)  # [batch, query]
    return each.mean() if mask is None or each.shape != mask.shape else each[mask.bool()].mean()


def contrast(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """How surely each example of a batch is told from the others by its hidden state: InfoNCE.

    States [batch, places, width] are averaged over the places that the mask marks as real,
    those of other shapes [batch, ...] are flattened. With c the cosine of a state of ours and one
    of theirs, the mean over i of `-log softmax_j(c(ours_i, theirs_j) / t)` at j = i (arXiv
    1807.03748, eq. 4). Contrastive representation distillation (arXiv 1910.10699) has the same aim,
    with a memory of more examples than a batch and trained projections, which states of one width
    do without. Zero for a single example.
    """
    rows, goal = (F.normalize(_pooled(x, mask), dim=1) for x in (ours, theirs))
    pairs = torch.arange(len(rows), device=rows.device)
    return F.cross_entropy(rows @ goal.mT / TEMPERATURE, pairs)


def _pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, width]: the mean of [batch, places, width] over real places; others flattened."""
    if x.ndim != 3:
        return x.reshape(len(x), -1)
    if mask is None or x.shape[:2] != mask.shape:
        return x.mean(1)
    real = mask.to(x.dtype)[..., None]
    return (x * real).sum(1) / real.sum(1).clamp_min(1)


def real_places(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows [n, width] of the places that the mask [batch, places] marks as real.

    A tensor of fewer than three axes has no places, and all its rows count: the second of two axes
    is the width, even if there happen to be as many classes as places.
    """
    if x.ndim < 2:
        return x.reshape(-1, 1)
    if mask is None or x.ndim < 3 or x.shape[:2] != mask.shape:
        return x.flatten(0, -2)
    return x[mask.bool()]


@contextlib.contextmanager
def _tapped(model: nn.Module, names: Sequence[str]) -> Iterator[Features]:
    """Collect the first floating output of each call of the named modules in a forward pass."""
    features: Features = {}
    calls = Counter[str]()

    def keeper(name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(_: nn.Module, __: object, out: object) -> None:
            for tensor in floating(out)[:1]:
                features[name, calls[name]] = tensor
            calls[name] += 1

        return keep

    with hooked((model.get_submodule(name), keeper(name)) for name in names):
        yield features


def distillation_losses(
    student: nn.Module,
    piece: Workpiece,
    batch: Batch,
    blocks: Sequence[str] = (),
    features: float = 0.0,
    apart: Apart | None = None,
) -> Iterator[Tensor]:
    """`distillation_loss` of a batch in parts of about one size that add up to it, see ENTRIES."""
    axes = piece.task.examples
    each = sum(site.entries for site in piece.survey if site.runs)
    size, most = axes.count(batch), max(1, ENTRIES // max(1, each))
    count = math.ceil(size / most)
    if count == 1:
        yield distillation_loss(student, piece, batch, blocks, features, apart)
        return
    parts = list(axes.portions([batch], math.ceil(size / count)))
    squares = _squares(piece, parts, blocks) if features else {}
    for part in parts:
        loss, ours, theirs = _compared(student, piece, part, blocks if features else (), apart)
        share = axes.count(part) / size
        yield share * loss + features * feature_error(ours, theirs, squares)


def distillation_loss(
    student: nn.Module,
    piece: Workpiece,
    batch: Batch,
    blocks: Sequence[str] = (),
    features: float = 0.0,
    apart: Apart | None = None,
) -> Tensor:
    """How far the student is from the float network on a batch; only the student gets a gradient.

    apart: how far two sets of outputs are apart; default: their divergence. To that is added
    `features` times the mean relative error of the outputs of the named blocks.
    """
    loss, ours, theirs = _compared(student, piece, batch, blocks, apart)
    return loss + features * feature_error(ours, theirs)


def _compared(
    student: nn.Module,
    piece: Workpiece,
    batch: Batch,
    blocks: Sequence[str],
    apart: Apart | None,
) -> tuple[Tensor, Features, Features]:
    """How far the outputs are apart, and what the blocks of both networks gave."""
    with torch.no_grad(), _tapped(piece.model, blocks) as theirs:
        goal = outputs(piece.task.run(piece.model, batch))
    with _tapped(student, blocks) as ours:
        result = outputs(piece.task.run(student, batch))
    return (apart or piece.answers.divergence)(result, goal), ours, theirs


@torch.no_grad()
def _squares(
    piece: Workpiece, parts: Sequence[Batch], blocks: Sequence[str]
) -> dict[tuple[str, int], float]:
    """The sum of squares of what each block of the float network gives for all parts."""
    total: dict[tuple[str, int], float] = {}
    for part in parts:
        with _tapped(piece.model, blocks) as theirs:
            piece.task.run(piece.model, part)
        for key, given in theirs.items():
            if len(given):
                total[key] = total.get(key, 0.0) + float(given.square().sum())
    return total


def block_names(survey: Survey) -> list[str]:
    """The blocks of a network, in order: modules that directly hold a layer of the survey.

    The network itself is not one of them.
    """
    parents = (site.name.rpartition(".")[0] for site in survey if site.runs)
    return list(dict.fromkeys(name for name in parents if name))

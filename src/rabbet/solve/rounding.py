"""Rounding a weight so that the layer's output, not the weight, changes least.

With H the second moment of the inputs, the error of row w is `(w - q) H (w - q)^T`. Rows are
independent given H, so all bit-widths of a layer are rounded in one pass: a `Rows` holds any number
of rows, each with the bounds and the shift of its own grid. Matrices are [groups, rows, columns]; a
grouped conv has an H per group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rabbet.grids.codebook import nearest, points
from rabbet.grids.grid import Grid, stored
from rabbet.solve.columns import by_column, columns, gather
from rabbet.solve.metric import Metric

BLOCK = 64  # columns whose updates are gathered into one matrix product


@dataclass(frozen=True)
class Rows:
    """Rows [groups, rows, n] with their grids, which may differ from row to row.

    Each row has `parts` scales, one for each `size` consecutive columns. scale: [groups, rows,
    parts]; shift, which includes the zero point: the same shape; low, high: bounds of the codes,
    [groups, rows].
    """

    target: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    shift: Tensor
    codes: Tensor
    size: int

    @classmethod
    def of(cls, target: Tensor, scale: Tensor, grid: Grid, zero: Tensor | None = None) -> "Rows":
        """Rows of one grid, rounded to nearest; scale, zero: [groups, rows, parts]."""
        book = grid.codebook.uniform
        assert book is not None
        full = torch.ones_like(scale[..., 0])
        shift = torch.full_like(scale, book.shift)
        shift = shift if zero is None else shift - zero
        size = grid.scales.part_size(target.shape[2])
        rows = cls(target, scale, full * grid.low, full * grid.high, shift, target, size)
        return round_nearest(rows)

    @classmethod
    def stack(cls, parts: list["Rows"]) -> "Rows":
        """All rows of several, in order."""
        return parts[0].with_fields(
            {f: torch.cat([getattr(p, f) for p in parts], 1) for f in TENSORS}
        )

    def split(self, rows: int) -> list["Rows"]:
        """The inverse of `stack` for parts of equal size."""
        columns = zip(*(getattr(self, f).split(rows, 1) for f in TENSORS), strict=True)
        return [self.with_fields(dict(zip(TENSORS, fields, strict=True))) for fields in columns]

    def spread(self, values: Tensor) -> Tensor:
        """Values [groups, rows, parts] repeated for each column; [groups, rows, 1] is kept."""
        if values.shape[2] == 1:
            return values
        return values.repeat_interleave(self.size, 2)[:, :, : self.target.shape[2]]

    @property
    def values(self) -> Tensor:
        """What the codes stand for."""
        return points(self.codes, self.spread(self.shift), self.spread(self.scale))

    def error(self, metric: Metric) -> Tensor:
        """[groups, rows]."""
        return metric.error(self.values - self.target)

    def better(self, other: "Rows", metric: Metric) -> "Rows":
        """Row by row, the one with the smaller error."""
        return self.picked(other.error(metric) < self.error(metric), other)

    def picked(self, take: Tensor, other: "Rows") -> "Rows":
        """These rows, but another's where `take` [groups, rows] says so."""
        picked = {}
        for name in TENSORS:
            a, b = getattr(self, name), getattr(other, name)
            picked[name] = torch.where(take[..., None] if a.ndim == 3 else take, b, a)
        return self.with_fields(picked)

    def with_fields(self, tensors: dict[str, Tensor]) -> "Rows":
        """The same layout with other tensors in all fields."""
        return Rows(**tensors, size=self.size)


TENSORS = ("target", "scale", "low", "high", "shift", "codes")


def feedback(rows: Rows, metric: Metric) -> Rows:
    """Error-feedback rounding (GPTQ, arXiv 2210.17323).

    Column by column; each takes its share of the errors of all columns before it.
    """
    if metric.identity:  # no column has a share in the errors of others
        return round_nearest(rows)
    u, order = metric.factor, metric.order
    low, high = rows.low[:, None], rows.high[:, None]
    scale, shift = rows.spread(rows.scale), rows.spread(rows.shift)
    alone = scale.shape[2] == 1  # then a row is kept in units of its scale, less the shift
    if not alone:
        scale, shift = (gather(values, order, 2) for values in (scale, shift))
    work = gather(rows.target / scale - shift if alone else rows.target, order, 2)
    codes = torch.empty_like(work)
    for begin in range(0, work.shape[2], BLOCK):
        mine, rest = slice(begin, begin + BLOCK), slice(begin + BLOCK, None)
        # what an error does to later columns is relative to the entry of the factor that it meets
        shares = u[:, mine] / u[:, mine, mine].diagonal(dim1=1, dim2=2)[..., None]
        block, inner = by_column(work[:, :, mine]), by_column(shares[:, :, mine])
        found, errors = torch.empty_like(block), torch.empty_like(block)
        units = (block, block) if alone else (by_column(v[:, :, mine]) for v in (scale, shift))
        each = columns(block, found, errors, *units)
        for j, (column, code, error, unit, moved) in enumerate(each):
            if j:
                column.baddbmm_(inner[:, j : j + 1, :j], errors[:, :j], alpha=-1)
            if alone:
                torch.round(column, out=code).clamp_(low, high)
                torch.sub(column, code, out=error)
            else:
                code.copy_(nearest(column / unit, moved).clamp_(low, high))
                torch.sub(column, points(code, moved, unit), out=error)
        codes[:, :, mine] = found.mT
        work[:, :, rest] -= errors.mT @ shares[:, :, rest]
    return replace(rows, codes=gather(codes, order.argsort(dim=1), 2))


@dataclass(frozen=True)
class _State:
    """Rows, with what both their targets and their errors are after the metric.

    aim: `target H`; pull: `(target - values) H`, minus half the gradient of the error by values.
    """

    rows: Rows
    aim: Tensor
    pull: Tensor

    @classmethod
    def of(cls, rows: Rows, metric: Metric, aim: Tensor | None = None) -> "_State":
        aim = metric.times(rows.target) if aim is None else aim
        return cls(rows, aim, metric.times(rows.target - rows.values))

    @property
    def error(self) -> Tensor:
        """[groups, rows]."""
        result: Tensor = ((self.rows.target - self.rows.values) * self.pull).sum(2)
        return result

    def better(self, other: "_State") -> "_State":
        """Row by row, the one with the smaller error."""
        take = other.error < self.error
        pull = torch.where(take[..., None], other.pull, self.pull)
        return replace(self, rows=self.rows.picked(take, other.rows), pull=pull)


def descend(rows: Rows, metric: Metric, sweeps: int = 2) -> Rows:
    """Cyclic coordinate descent on the codes.

    Each step is the exact minimum over one column, so none increases the error.
    """
    pull = metric.times(rows.target - rows.values)
    return replace(rows, codes=_descended(rows, pull, metric, sweeps)[0])


def _descended(rows: Rows, pull: Tensor, metric: Metric, sweeps: int) -> tuple[Tensor, Tensor]:
    """The codes and what is pulled then; see `_State`."""
    h = metric.second
    low, high = rows.low[:, None], rows.high[:, None]
    scale = rows.spread(rows.scale)
    alone = scale.shape[2] == 1  # then the pull is kept in units of the scale
    codes, pull = rows.codes.clone(), pull / scale if alone else pull.clone()
    for begin in [*range(0, h.shape[1], BLOCK)] * sweeps:
        mine = slice(begin, begin + BLOCK)
        inner, local, block = h[:, mine, mine], by_column(pull[:, :, mine]), codes[:, :, mine]
        curves = inner.diagonal(dim1=1, dim2=2)[..., None]
        unit = local if alone else by_column(scale[:, :, mine])
        block, moved = by_column(block), torch.empty_like(local)
        if not alone:
            curves = curves * unit
        curves = curves.split(1, dim=1)
        for j, (code, force, step, size) in enumerate(columns(block, local, moved, unit)):
            if j:
                force.baddbmm_(inner[:, j : j + 1, :j], moved[:, :j], alpha=-1)
            best = torch.addcdiv(code, force, curves[j]).round_().clamp_(low, high)
            torch.sub(best, code, out=step)
            code.copy_(best)
            if not alone:
                step.mul_(size)
        codes[:, :, mine] = block.mT
        pull -= moved.mT @ h[:, mine]
    return codes, pull * scale if alone else pull


def refit(rows: Rows, metric: Metric) -> Rows:
    """The least-squares scales of each row for its codes, in the metric.

    Several scales of one row are refitted one after the other, each given those before.
    """
    return _refitted(_State.of(rows, metric), metric).rows


def _refitted(state: _State, metric: Metric) -> _State:
    rows, pull, scale = state.rows, state.pull.clone(), state.rows.scale.clone()
    z = rows.codes + rows.spread(rows.shift)
    for part in range(scale.shape[2]):
        own = slice(part * rows.size, (part + 1) * rows.size)
        mine, old = z[:, :, own], scale[:, :, part]
        if scale.shape[2] == 1:  # what the values pull is known already
            seen = (state.aim - pull) / old[..., None]
        else:
            seen = metric.times_part(mine, own)
        bottom = (seen[:, :, own] * mine).sum(2)
        step = (mine * pull[:, :, own]).sum(2) / bottom.clamp_min(1e-30)
        best = torch.where(bottom > 0, stored(old + step), old)
        pull -= (best - old)[..., None] * seen
        scale[:, :, part] = best
    return replace(state, rows=replace(rows, scale=scale), pull=pull)


def start(target: Tensor, grid: Grid, metric: Metric, mirror: bool = False) -> Rows:
    """Rows rounded to nearest, their scales from a search weighted by the diagonal of the metric.

    A grid whose rows share scales gets one for each row. mirror: start from the mirrored grid, for
    grids with one end that reaches further than the other.
    """
    weight = metric.diagonal[:, None].expand_as(target).flatten(0, 1)
    flat = (-target if mirror else target).flatten(0, 1)
    grid = grid if grid.scales.parts(1) is not None else grid.with_axis(0)
    scale, zero = grid.search(flat, weight)
    scale = scale.view(*target.shape[:2], -1)
    zero = None if zero is None else zero.view_as(scale)
    return Rows.of(target, -scale if mirror else scale, grid, zero)


def round_nearest(rows: Rows) -> Rows:
    """The codes nearest to the target, which are the best in the identity metric."""
    low, high = rows.low[..., None], rows.high[..., None]
    steps = rows.target / rows.spread(rows.scale)
    return replace(rows, codes=nearest(steps, rows.spread(rows.shift)).clamp_(low, high))


def round_rows(rows: Rows, metric: Metric, rounds: int = 3, sweeps: int = 2) -> Rows:
    """Alternate error-feedback rounding, coordinate descent and the refit of the scales.

    Each row keeps its best state.
    """
    return round_layouts([rows], metric, rounds, sweeps)[0]


def round_layouts(
    layouts: Sequence[Rows], metric: Metric, rounds: int, sweeps: int = 2
) -> list[Rows]:
    """The same for rows of several layouts at once, whose columns are rounded in step.

    Of a few rows, what a column takes hardly depends on their number.
    """
    rows, best = list(layouts), [_State.of(each, metric) for each in layouts]
    for _ in range(rounds):
        codes = _apart(feedback(_together(rows), metric).codes, rows)
        states = [
            _State.of(replace(each, codes=own), metric, before.aim)
            for each, own, before in zip(rows, codes, best, strict=True)
        ]
        if sweeps and not metric.identity:
            states = _descended_together(states, metric, sweeps)
        best = [old.better(new) for old, new in zip(best, states, strict=True)]
        moved = [_refitted(each, metric) for each in best]
        best = [old.better(new) for old, new in zip(best, moved, strict=True)]
        rows = [each.rows for each in moved]
    return [each.rows for each in best]


def _descended_together(states: Sequence[_State], metric: Metric, sweeps: int) -> list[_State]:
    layouts = [state.rows for state in states]
    pulls = torch.cat([state.pull for state in states], 1)
    found = _descended(_together(layouts), pulls, metric, sweeps)
    parts = zip(states, *(_apart(values, layouts) for values in found), strict=True)
    return [replace(s, rows=replace(s.rows, codes=codes), pull=pull) for s, codes, pull in parts]


def _together(layouts: Sequence[Rows]) -> Rows:
    """Rows of several layouts as those of one, with a scale for each column."""
    if len(layouts) == 1:
        return layouts[0]

    def wide(rows: Rows) -> Rows:
        whole = rows.target
        scale, shift = (rows.spread(v).expand_as(whole) for v in (rows.scale, rows.shift))
        return replace(rows, scale=scale, shift=shift, size=1)

    return Rows.stack([wide(rows) for rows in layouts])


def _apart(values: Tensor, layouts: Sequence[Rows]) -> list[Tensor]:
    """What was found of rows that were put together, [groups, rows, n], for each layout."""
    return list(values.split([rows.target.shape[1] for rows in layouts], 1))

"""The module that replaces a layer: its bias plus the sum of its terms, of the quantised input."""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.core.layout import act_bits
from rabbet.core.plan import LayerPlan, Term
from rabbet.data.state import Solved
from rabbet.errors import ModelError
from rabbet.grids.grid import Grid, Quantised
from rabbet.layers import Site

Numbers = Sequence[Sequence[Quantised]]
"""The factors of each term of one layer."""


class Factor(Solved):
    """One small tensor on its grid.

    `codes` holds integers at rest, continuous codes while a method tunes them.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, numbers: Quantised) -> None:
        super().__init__()
        self.grid = numbers.grid
        # Contiguous, as a file gives it back: another memory layout changes the order of sums.
        codes = numbers.codes.detach().float().clone(memory_format=torch.contiguous_format)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", numbers.scale.detach().float().clone())
        zero = None if numbers.zero is None else numbers.zero.detach().float().clone()
        self.register_buffer("zero", zero)

    def forward(self) -> Tensor:
        """The values, with straight-through gradients while the codes are tuned."""
        return self.show(self.held, self.scale, self.zero)

    def lookup(self, places: Tensor) -> Tensor:
        """The rows of a table at some places, [..., columns], where each has scales of its own."""
        flat, count = places.flatten(), len(self.held)

        def own(values: Tensor) -> Tensor:
            return values.view(count, -1).index_select(0, flat).flatten()

        zero = None if self.zero is None else own(self.zero)
        rows = self.show(F.embedding(flat, self.held), own(self.scale), zero)
        return rows.view(*places.shape, rows.shape[1])

    @property
    def held(self) -> Tensor:
        """What is put on the grid."""
        return self.codes

    def show(self, held: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The values of what is held, or of some rows of it."""
        codes = self.grid.round_latent(held) if self.codes.requires_grad else held
        return self.grid.values(codes, scale, 0.0 if zero is None else zero)

    @property
    def numbers(self) -> Quantised:
        """Codes and scale as one value."""
        return Quantised(self.grid, self.codes.detach(), self.scale.detach(), self.zero)

    def take(self, numbers: Quantised) -> None:
        """Hold other numbers of the same grid and shape."""
        self.codes.copy_(numbers.codes)
        self.scale.copy_(numbers.scale)
        if self.zero is not None and numbers.zero is not None:
            self.zero.copy_(numbers.zero)


class ActQuant(Solved):
    """Quantises activations to unsigned integers around a zero point.

    `scale * (clip(round(x / scale) + zero) - zero)`.

    Running it before a range was set is an error. While `observer` is set, inputs
    are shown to it and pass unchanged.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.grid = Grid.of(bits, "unsigned")
        self.ready = False
        self.observer: Callable[[Tensor], None] | None = None
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """X of any shape, on its grid."""
        if self.observer is not None:
            self.observer(x)
            return x
        if not self.ready:
            raise ModelError(
                "an input range is not calibrated; "
                "run calibrate_ranges of rabbet.calibrate.ranges first"
            )
        return self.grid.fake(x, self.scale, self.zero)

    def set_range(self, scale: Tensor, zero: Tensor) -> None:
        """Take over a calibrated range."""
        self.ready = True
        self.scale.copy_(scale.reshape(1))
        self.zero.copy_(zero.reshape(1))


class Compressed(Solved):
    """A layer as its plan says: `bias + sum of terms` of the input, quantised if the plan says so.

    Input and output shapes are those of the layer that it replaces. Of a table with heads,
    `forward` is the look-up and `multiply` what the heads do; the input that is quantised is
    theirs. While `whole` is set, the weight is put together and runs as one layer, tensors between
    factors not quantised: that trains several times as fast as a chain of convs.
    """

    def __init__(self, site: Site, plan: LayerPlan, terms: Numbers, bias: Tensor | None) -> None:
        super().__init__()
        self.site = site
        self.forms = [t.form for t in plan.terms]
        self.terms = nn.ModuleList(nn.ModuleList(Factor(q) for q in factors) for factors in terms)
        self.acts = nn.ModuleList(ActQuant(bits) for bits in act_bits(site, plan))
        self.bias = (
            None
            if bias is None
            else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        )
        self.whole = False
        self.head = site.head if site.heads else None

    @property
    def factors(self) -> list[list[Factor]]:
        """The factors of each term."""
        return [list(term) for term in self.terms]  # type: ignore[call-overload]

    @property
    def quantisers(self) -> list[ActQuant]:
        """The quantiser of the input, then those of the tensors between factors.

        Empty if activations stay float.
        """
        return list(self.acts)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        """The layer's output."""
        table = self._table
        return self._run(self.site, input, self.bias) if table is None else table.lookup(input)

    @property
    def _table(self) -> Factor | None:
        """The table of a look-up, if it is stored row by row.

        Then only the rows that are asked for are computed, a few of 30,000.
        """
        if (
            not self.site.looks_up
            or not all(form.whole for form in self.forms)
            or len(self.forms) > 1
        ):
            return None
        table = self.factors[0][0]
        by_rows = isinstance(table, Factor) and table.grid.scales.parts(1) is not None
        return table if by_rows else None

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What a head makes of x with this table, [..., columns] -> [..., rows]."""
        assert self.head is not None
        return self._run(self.head, x, bias)

    def _run(self, site: Site, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.acts and not site.looks_up:
            x = self.acts[0](x)
        if self.whole:
            return site.run(x, self.canonical, bias)
        result: Tensor | None = None
        used = 1
        for form, factors in zip(self.forms, self.factors, strict=True):
            values = [f() for f in factors]
            between = functools.partial(self._between, used)
            part = form.apply(site, x, values, between, bias if result is None else None)
            result = part if result is None else result + part
            used += form.gaps(site)
        assert result is not None
        return result

    def _between(self, first: int, gap: int, x: Tensor) -> Tensor:
        return self.acts[first + gap](x) if self.acts else x

    @property
    def canonical(self) -> Tensor:
        """The weight that the terms add up to, [out, in / groups, *kernel]."""
        parts = [
            form.contract(self.site, [f() for f in qs])
            for form, qs in zip(self.forms, self.factors, strict=True)
        ]
        # a sum over one part is an operation that OpenVINO cannot fold in front of a grouped conv
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    @property
    def weight(self) -> Tensor:
        """The same in the layout of the replaced layer, for code that reads a layer's weight."""
        return self.site.native(self.canonical)

    @property
    def plan(self) -> LayerPlan:
        """The decisions, read back from the tensors."""
        terms = []
        for form, factors in zip(self.forms, self.factors, strict=True):
            shapes = [tuple(f.codes.shape) for f in factors]
            terms.append(Term(form.observed(shapes), factors[0].grid))
        acts = self.quantisers
        return LayerPlan(self.site.name, tuple(terms), acts[0].grid.bits if acts else None)

    def extra_repr(self) -> str:
        """The layer's line of the plan."""
        return self.plan.body


class Table(Protocol):
    """What stands where an embedding was that has heads."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The table as the weight of a linear, [..., columns] -> [..., rows]."""
        ...


class Head(nn.Module):
    """A linear whose weight is the table of an embedding; only its bias is its own."""

    def __init__(self, table: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.table, self.bias = table, bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        """Scores of all rows, [..., columns] -> [..., rows]."""
        return cast(Table, self.table).multiply(input, self.bias)

    @property
    def weight(self) -> Tensor:
        """The table, for code that reads a layer's weight directly."""
        return cast(Tensor, self.table.weight)


def compressed_layers(model: nn.Module) -> dict[str, Compressed]:
    """Every compressed layer that runs once, by the name of its site."""
    return {m.site.name: m for m in model.modules() if isinstance(m, Compressed)}


STORED = "rabbet_stored"  # the attribute of a network that keeps the numbers of its stored weights


class StoredWeights:
    """The numbers of the stored weights of a network, by the names of their sites.

    They lie beside its modules: no forward may meet a module there that it does not know. What the
    network computes with are its own tensors, which hold the same values.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Compressed] = {}


def stored_weights(model: nn.Module) -> dict[str, Compressed]:
    """The numbers of every stored weight, by the name of its site; none of them is ever called."""
    kept = vars(model).get(STORED)
    return dict(kept.layers) if isinstance(kept, StoredWeights) else {}


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """The numbers of all stored weights, for the key of work that depends on them."""
    return {
        f"{name}/{part}": tensor
        for name, layer in stored_weights(model).items()
        for part, tensor in layer.state_dict().items()
    }


def all_layers(model: nn.Module) -> dict[str, Compressed]:
    """Every compressed layer, those that run and those that are stored."""
    return compressed_layers(model) | stored_weights(model)


def store(model: nn.Module, layer: Compressed) -> None:
    """Keep the numbers of a stored weight, in place, and give the network their values."""
    vars(model).setdefault(STORED, StoredWeights()).layers[layer.site.name] = layer
    unpack_stored(model, layer)


@torch.no_grad()
def unpack_stored(model: nn.Module, layer: Compressed) -> None:
    """Write the values of a stored weight, in place, into the tensor that the network uses."""
    owner, _, leaf = layer.site.name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = getattr(module, leaf)
    values = layer.canonical.to(tensor.device, tensor.dtype).view(tensor.shape)
    tensor.data = values  # as it may lie in memory that cannot be written to


def layers_kept(model: nn.Module) -> Callable[[], None]:
    """Copy what the compressed layers hold; returns the function that puts it back.

    The rest of a network is the user's, changes in no step of ours, and may hold tensors that
    cannot be written to (`Tensor.expand`).
    """
    layers = compressed_layers(model).values()
    kept = [
        (layer, {name: tensor.clone() for name, tensor in layer.state_dict().items()})
        for layer in layers
    ]

    def put_back() -> None:
        for layer, state in kept:
            layer.load_state_dict(state)

    return put_back

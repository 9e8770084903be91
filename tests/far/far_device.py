"""A pretend accelerator: what lies on `far` holds its numbers in CPU memory, and says it does not.

Importing this makes `far` a device of torch like any other: `network.to("far")`. It computes with
the arithmetic of the CPU, so results can be compared to the last bit, and refuses what CUDA
refuses: tensors of two devices in one operation (but for numbers, and indices that lie on the CPU),
a generator of the CPU for a draw on the device, `.numpy()` of what lies there.

It is made for torch 2.13, to which what a backend in Python brings is an experiment.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

FAR = torch.device("cpu")  # until there is a device of that name, below
CPU = torch.device("cpu")
aten = torch.ops.aten

COPIES = {aten.copy_, aten._to_copy}
LOOK_UPS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
STRICT = {aten.clamp, aten.clamp_}  # of what works entry by entry, these take no number of the CPU
BELOW = (
    "copy_", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm",
    "randperm.generator",
)  # fmt: skip
"""What torch does without asking a subclass of Tensor, or to a tensor that it lets grow."""


class There(Tensor):
    """A tensor on the device; `inner` is the tensor of the CPU that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "There":
        result = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=FAR,
        )  # fmt: skip
        result.inner = inner
        return result

    def __repr__(self, **_: Any) -> str:
        return f"There({self.inner!r})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, There):
            raise TypeError("what lies on far:0 cannot be given the numbers of a tensor of the cpu")
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert far:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            result = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                result = torch.nn.Parameter(result, self.requires_grad)
            memo[id(self)] = result
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


# Named as what it stands for: work is found again by what tensors are called, too.
There.__module__, There.__qualname__ = "torch", "Tensor"


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the tensors within; what comes of it lies where CUDA would have put it."""
    given: list[Tensor] = []
    inner_args = _within(args, given)
    inner_kwargs = {name: _within(value, given) for name, value in kwargs.items()}
    here = [t for t in given if not isinstance(t, There)]
    far = len(here) < len(given)
    if here and far:
        _require_one_device(func, args, here)
    if kwargs.get("device") is not None:
        far = torch.device(kwargs["device"]).type == "far"
        inner_kwargs["device"] = CPU
    generator = kwargs.get("generator")
    if generator is not None and far and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a 'far' device type for generator but found 'cpu' ({func})")
    result = func(*inner_args, **inner_kwargs)
    if not far:
        return result
    return _outside(result, {id(t.inner if isinstance(t, There) else t): t for t in given})


def _within(value: Any, given: list[Tensor]) -> Any:
    """The same with the tensors of the CPU for those of the device; all that it met are given."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.inner if isinstance(value, There) else value
    if isinstance(value, list | tuple):
        return type(value)([_within(part, given) for part in value])
    return value


def _outside(value: Any, known: dict[int, Tensor]) -> Any:
    """The inverse: what an operation wrote to is the tensor that was given, all else is new."""
    if isinstance(value, Tensor):
        tensor = known.get(id(value))
        if tensor is None:
            return There(value)
        if tensor.shape != value.shape:
            raise NotImplementedError("a pretended tensor cannot get another shape in place")
        return tensor
    if isinstance(value, list | tuple):
        return type(value)([_outside(part, known) for part in value])
    return value


def _require_one_device(func: Any, args: tuple[Any, ...], here: list[Tensor]) -> None:
    """Raise RuntimeError for a mixture of devices that CUDA would not take.

    here: those of the tensors that lie on the CPU.
    """
    packet = func.overloadpacket
    if packet in COPIES:
        return
    numbers = all(t.ndim == 0 for t in here)
    if numbers and torch.Tag.pointwise in func.tags and packet not in STRICT:
        return
    if packet in LOOK_UPS and isinstance(args[0], There):
        values = args[2] if len(args) > 2 else None
        if values is None or isinstance(values, There) or values.ndim == 0:
            return
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, far:0 and "
        f"cpu! ({func})"
    )


if torch._C._get_privateuse1_backend_name() != "far":
    _setup_privateuseone_for_python_backend("far")
    _LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _LIBRARIES[0].fallback(_run, "PrivateUse1")
    for _name in BELOW:
        _packet, _, _overload = _name.partition(".")
        _op = getattr(getattr(aten, _packet), _overload or "default")
        _LIBRARIES[1].impl(_name, functools.partial(_run, _op), "PrivateUse1")
FAR = torch.device("far", 0)

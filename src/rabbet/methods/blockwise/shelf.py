"""Hidden states between blocks: in half precision, in memory up to a bound, then on disk."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rabbet.files import scratch

MEMORY = 2**29  # bytes of hidden states of one shelf that memory keeps
LARGEST = 3e4  # what half precision holds, with some room


class Shelf:
    """Tensors by number. What memory has no room for lies in a temporary folder.

    half: False keeps them in float32, such as gradients, which may be smaller than half precision
    can tell from zero.
    """

    def __init__(self, memory: int = MEMORY, half: bool = True) -> None:
        self._half = half
        self._near: dict[int, Tensor] = {}
        self._far: dict[int, tuple[Path, torch.device]] = {}
        self._room = memory
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, number: int, value: Tensor) -> None:
        """Keep a tensor, in place of what had its number; too large for half precision: as is."""
        fits = self._half and bool(value.detach().abs().amax() < LARGEST)
        kept = value.detach().to(torch.float16 if fits else torch.float32).contiguous()
        if number in self._near:
            self._room += self._near.pop(number).nbytes
        if number in self._far:
            self._far.pop(number)[0].unlink()
        if kept.nbytes <= self._room:
            self._room -= kept.nbytes
            self._near[number] = kept
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rabbet-")
        path = scratch(Path(self._folder.name), save({"": kept.cpu()}))
        self._far[number] = path, value.device

    def __getitem__(self, number: int) -> Tensor:
        """In float32."""
        if number in self._near:
            return self._near[number].to(torch.float32, copy=True)
        path, home = self._far[number]
        return load_file(path)[""].to(home).float()

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

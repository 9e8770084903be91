"""The best state that a training met: how it was judged, and its numbers."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]


class Best:
    """Keeps the state of the smallest score; the first one whatever its score, and of equals the first."""

    def __init__(self) -> None:
        self.score = math.inf
        self.kept: State = {}

    def consider(self, score: float, state: Callable[[], State]) -> bool:
        """Keep what `state()` copies if its score is the best so far; says whether it is."""
        if self.kept and not score < self.score:
            return False
        self.score, self.kept = score, state()
        return True

    def state(self) -> State:
        """What a checkpoint holds of it."""
        kept = {"best": torch.tensor(self.score, dtype=torch.float64)}
        return kept | {f"best.{name}": tensor for name, tensor in self.kept.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, which may lie among other tensors."""
        self.score = float(state["best"])
        self.kept = {k.removeprefix("best."): t for k, t in state.items() if k.startswith("best.")}

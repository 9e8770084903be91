"""The best state of a training run: its score and its tensors."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]


class Best:
    """Keeps the state of the smallest score.

    The first state is kept whatever its score; of equal scores the first one wins.
    """

    def __init__(self) -> None:
        self.score = math.inf
        self.kept: State = {}

    def consider(self, score: float, state: Callable[[], State]) -> bool:
        """Keep the copy that `state()` makes if its score is the best so far; whether it is."""
        if self.kept and not score < self.score:
            return False
        self.score, self.kept = score, state()
        return True

    def state(self) -> State:
        """The score and the kept state, for a checkpoint."""
        kept = {"best": torch.tensor(self.score, dtype=torch.float64)}
        return kept | {f"best.{name}": tensor for name, tensor in self.kept.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; other tensors among them are ignored."""
        self.score = float(state["best"])
        self.kept = {k.removeprefix("best."): t for k, t in state.items() if k.startswith("best.")}

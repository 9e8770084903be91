"""Dask's executor (`Client.get_executor()`): inputs lie in the cluster, and a job names them.

Its scheduler then sends a tensor to a worker once, however many jobs need it there, and prefers the
worker that holds it; if that worker dies, it sends it to another. Any other executor takes the
bytes with each job: nothing is known of where a job will run.
"""

import hashlib
import warnings
from concurrent.futures import BrokenExecutor, Executor
from typing import Any


class Placed:
    """What was brought into a cluster, by a hash of its content; it stays there as long as this."""

    def __init__(self) -> None:
        self._placed: dict[str, Any] = {}

    def given(self, executor: Executor, content: bytes) -> Any:
        """What a job is to be given in the place of these bytes: it meets the bytes again."""
        client = _client(executor)
        if client is None:
            return content
        key = f"rabbet-{hashlib.sha256(content).hexdigest()[:40]}"
        placed = self._placed.get(key)
        if placed is None or placed.client is not client or placed.cancelled():
            with warnings.catch_warnings():  # it is large, and it is sent only once
                warnings.filterwarnings("ignore", "Sending large graph")
                # A task, no scattered data: those would be lost with the worker that holds them.
                placed = client.submit(bytes, content, key=key)
            self._placed[key] = placed
        return placed


def worker_died(error: BaseException) -> bool:
    """Whether this is how an executor says that its processes died, and not what a job raised."""
    return isinstance(error, BrokenExecutor) or (
        type(error).__name__ == "KilledWorker" and _of_dask(error)
    )


def _client(executor: Executor) -> Any:
    """Dask's client behind its executor; None for any other."""
    return getattr(executor, "_client", None) if _of_dask(executor) else None


def _of_dask(value: object) -> bool:  # by name: it need not be installed
    return type(value).__module__.partition(".")[0] == "distributed"

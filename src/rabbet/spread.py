"""The parts of a pass over data, worked on by any executor; nothing of them is kept.

`Jobs` remembers results by the content of their input, which is right for solving a layer and wrong
for a pass whose every result is used once. What all parts need, such as a block of a network, is
sent once to each worker of a cluster (`cluster.Placed`).
"""

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from os import cpu_count
from typing import Any, TypeVar

from rabbet.cluster import worker_died
from rabbet.errors import RabbetError
from rabbet.jobs import AHEAD, Jobs, one_thread

S = TypeVar("S")
P = TypeVar("P")
R = TypeVar("R")
PARTS = 8  # that a pass is cut into, wherever it runs: sums are then taken in the same order


def portions(items: Iterable[P], count: int) -> Iterator[list[P]]:
    """`count` items as `PARTS` lists of consecutive ones, about, each made when it is asked for."""
    size, rest = -(-count // PARTS), iter(items)
    while part := list(islice(rest, size)):
        yield part


def spread(
    jobs: Jobs, stage: str, function: Callable[[S, P], R], shared: S, parts: Iterable[P]
) -> Iterator[R]:
    """What a function at the top of a module makes of each part, in order.

    shared: what all parts need. Without an executor it runs here, with all of torch's threads; a
    worker has one. Raises RabbetError if a worker process dies.
    """
    executor = jobs.executor
    if executor is None:
        for part in parts:
            yield function(shared, part)
        return
    waiting: deque[tuple[Future[bytes], int]] = deque()
    content = pickle.dumps(shared, protocol=pickle.HIGHEST_PROTOCOL)
    given = jobs.placed(content)
    most, ahead = 1 + (cpu_count() or 1), 0
    try:
        for part in parts:
            sent = pickle.dumps(part, protocol=pickle.HIGHEST_PROTOCOL)
            waiting.append((executor.submit(_run, function, given, sent), len(sent)))
            ahead += len(sent)
            while len(waiting) > most and ahead > AHEAD:
                future, size = waiting.popleft()
                ahead -= size
                yield pickle.loads(future.result())  # noqa: S301 (of our own worker)
        while waiting:
            future, _ = waiting.popleft()
            yield pickle.loads(future.result())  # noqa: S301
    except Exception as e:
        if not worker_died(e):
            raise
        raise RabbetError(
            f"a worker process died ({stage}), perhaps for want of memory: use fewer processes at "
            "once, or workers with more memory; run it again to go on"
        ) from e
    finally:
        for future, _ in waiting:
            future.cancel()


def _run(function: Callable[[Any, Any], Any], shared: bytes, part: bytes) -> bytes:
    with one_thread():
        result = function(pickle.loads(shared), pickle.loads(part))  # noqa: S301 (what we sent)
    return pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)

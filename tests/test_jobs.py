"""Laws of the jobs: order, memory, folders."""

import concurrent.futures
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

from rabbet.core.plan import Term
from rabbet.errors import RabbetError
from rabbet.forms import Dense
from rabbet.grids.grid import Grid
from rabbet.jobs import Jobs, content_key, end_with_parent
from rabbet.layers import Site
from rabbet.layers.linear import Linear
from rabbet.reconstruct.candidates import solve_site

RUNS: list[int] = []


def counted(x, *, factor=1, wait=0.0):
    """A job that leaves a trace."""
    RUNS.append(int(x[0]))
    time.sleep(wait)
    return {"y": x * factor, "threads": torch.tensor([torch.get_num_threads()])}


def grows(x):
    """A job that would leave a gradient."""
    return {"y": x * 2}


def fails(x):
    """A job that cannot be done."""
    raise ArithmeticError(f"no {int(x[0])}")


@pytest.fixture(autouse=True)
def _no_runs():
    RUNS.clear()


def _jobs(count, **settings):
    return [(counted, {"x": torch.tensor([float(k), 1.0])}, settings) for k in range(count)]


def test_results_come_in_the_order_of_the_jobs():
    results = Jobs().run("s", _jobs(5, factor=3))
    assert [r["y"].tolist() for r in results] == [[3.0 * k, 3.0] for k in range(5)]


def test_results_come_in_the_order_of_the_jobs_whatever_ends_first():
    jobs = [(counted, {"x": torch.tensor([float(k)])}, {"wait": 0.05 * (3 - k)}) for k in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = Jobs(pool).run("s", jobs)
    assert [r["y"].item() for r in results] == [0, 1, 2, 3]


def _layers():
    menu = tuple((Term(Dense(), Grid.parse(t)),) for t in ("2c", "3c"))
    generator = torch.Generator().manual_seed(0)
    for n in (8, 30, 70):
        x = torch.randn(200, n, generator=generator)
        given = {"weight": torch.randn(6, n, generator=generator), "second": (x.T @ x)[None]}
        yield solve_site, given, {"site": Site("", Linear(), (6, n)), "menu": menu}


def test_every_executor_gives_the_same_numbers():
    here = Jobs().run("s", list(_layers()))
    spawn = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ThreadPoolExecutor(3) as threads,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as processes,
    ):
        for executor in (threads, processes):
            for a, b in zip(here, Jobs(executor).run("s", list(_layers())), strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("on_disk", [False, True])
def test_finished_jobs_are_not_run_again(on_disk, tmp_path):
    jobs = Jobs(folder=tmp_path if on_disk else None)
    jobs.run("s", _jobs(3))
    results = jobs.run("s", _jobs(5))
    assert RUNS == [0, 1, 2, 3, 4]
    assert [r["y"][0].item() for r in results] == [0, 1, 2, 3, 4]


def test_a_job_that_is_given_twice_runs_once():
    results = Jobs().run("s", [*_jobs(2), *_jobs(2)])
    assert RUNS == [0, 1]
    assert [r["y"][0].item() for r in results] == [0, 1, 0, 1]


def test_a_folder_outlives_its_jobs(tmp_path):
    Jobs(folder=tmp_path / "deep" / "down").run("s", _jobs(3))
    results = Jobs(folder=tmp_path / "deep" / "down").run("s", _jobs(3, factor=1))
    assert RUNS == [0, 1, 2, 0, 1, 2]  # another setting is another job
    results = Jobs(folder=tmp_path / "deep" / "down").run("s", _jobs(3))
    assert RUNS == [0, 1, 2, 0, 1, 2]
    assert [r["y"][0].item() for r in results] == [0, 1, 2]


def test_what_was_finished_before_a_failure_is_kept(tmp_path):
    jobs = [*_jobs(2), (fails, {"x": torch.tensor([7.0])}, {})]
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no 7"):
            Jobs(folder=tmp_path).run("s", jobs)
    assert RUNS == [0, 1]


def _zeroed(content):
    """The same header, and every value zero."""
    start = 8 + int.from_bytes(content[:8], "little")
    return content[:start] + bytes(len(content) - start)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"\xff" * len(b),
        lambda b: b[8:],
        _zeroed,
        lambda b: b[:-1] + bytes([b[-1] ^ 16]),
        lambda b: save(load(b)),
        lambda b: save(load(b), {"job": "another 0"}),
        lambda b: b"\2" + bytes(7) + b"{}",
    ],
)
def test_a_damaged_result_is_made_again_and_that_is_said(damage, tmp_path, caplog):
    Jobs(folder=tmp_path).run("s", _jobs(2))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    whole = files[0].read_bytes()
    files[0].write_bytes(damage(whole))
    results = Jobs(folder=tmp_path).run("s", _jobs(2))
    assert len(RUNS) == 3
    assert [r["y"][0].item() for r in results] == [0, 1]
    assert files[0].read_bytes() == whole
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert f"{files[0]} is damaged or holds another job's result" in caplog.text


def test_another_jobs_results_are_not_taken_and_that_is_said_once(tmp_path, caplog):
    Jobs(folder=tmp_path).run("s", _jobs(2))
    first, second = sorted(tmp_path.iterdir())
    shutil.copy(first, tmp_path / "kept")
    shutil.copy(second, first)
    shutil.move(tmp_path / "kept", second)
    found = Jobs(folder=tmp_path).run("s", _jobs(2))
    assert len(RUNS) == 4
    assert [r["y"][0].item() for r in found] == [0, 1]
    assert len(caplog.records) == 1


def test_the_folder_holds_whole_safetensors_and_nothing_else(tmp_path):
    Jobs(folder=tmp_path).run("s", _jobs(3))
    files = sorted(tmp_path.iterdir())
    assert [f.suffix for f in files] == [".safetensors"] * 3
    assert all(set(load_file(f)) == {"y", "threads"} for f in files)


def test_results_on_disk_need_not_be_contiguous(tmp_path):
    jobs = [(grows, {"x": torch.arange(6.0).view(2, 3).T}, {})]
    first = Jobs(folder=tmp_path).run("s", jobs)[0]["y"]
    again = Jobs(folder=tmp_path).run("s", jobs)[0]["y"]
    assert torch.equal(first, again)


X = torch.arange(6.0)


@pytest.mark.parametrize(
    "other",
    [
        ("g", {"x": X}, {"a": 1}),
        ("f", {"y": X}, {"a": 1}),
        ("f", {"x": X + 1}, {"a": 1}),
        ("f", {"x": -X}, {"a": 1}),
        ("f", {"x": X.view(2, 3)}, {"a": 1}),
        ("f", {"x": X.double()}, {"a": 1}),
        ("f", {"x": X, "y": X}, {"a": 1}),
        ("f", {"x": X}, {"a": 2}),
        ("f", {"x": X}, {"a": "1"}),
        ("f", {"x": X}, {"b": 1}),
        ("f", {"x": X}, {}),
    ],
)
def test_another_content_has_another_key(other):
    assert content_key(*other) != content_key("f", {"x": X}, {"a": 1})


def test_the_same_content_has_the_same_key_however_it_lies_in_memory():
    spread = torch.arange(12.0)[::2] / 2
    assert content_key("f", {"x": spread, "z": X}, {"a": 1, "b": 2}) == content_key(
        "f", {"z": X, "x": X}, {"b": 2, "a": 1}
    )


def test_a_job_runs_on_one_thread_and_leaves_the_threads_as_they_were():
    torch.set_num_threads(2)
    try:
        assert Jobs().run("s", _jobs(1))[0]["threads"].item() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_jobs_leave_no_gradient():
    weight = torch.ones(3, requires_grad=True)
    assert not Jobs().run("s", [(grows, {"x": weight}, {})])[0]["y"].requires_grad


def test_progress_counts_up_to_the_total():
    seen = []
    Jobs(progress=lambda *step: seen.append(step)).run("stage", _jobs(3))
    assert seen == [("stage", k, 3) for k in range(4)]


def test_the_longest_jobs_begin_and_progress_goes_by_what_each_may_take(tmp_path):
    seen = []
    jobs = Jobs(folder=tmp_path, progress=lambda *step: seen.append(step))
    results = jobs.run("stage", _jobs(3), seconds=[1.0, 60.0, 239.0])
    assert [r["y"][0].item() for r in results] == [0, 1, 2]
    assert RUNS == [2, 1, 0]
    assert seen == [
        ("stage: 0 of 3, perhaps 5 minutes on one core", 0, 300_000),
        ("stage: 1 of 3", 239_000, 300_000),
        ("stage: 2 of 3", 299_000, 300_000),
        ("stage: 3 of 3", 300_000, 300_000),
    ]
    jobs.run("stage", _jobs(3), seconds=[1.0, 60.0, 239.0])
    assert seen[4:] == [("stage: 3 of 3", 300_000, 300_000)]


def test_what_cannot_be_told_from_another_is_not_kept_and_that_is_said(tmp_path, caplog):
    jobs = Jobs(folder=tmp_path)
    for _ in range(2):
        jobs.run("s", _jobs(1, factor=_Locked(2)))
    assert RUNS == [0, 0]
    assert list(tmp_path.iterdir()) == []
    assert len(caplog.records) == 1
    assert "an object of _thread.lock, which cannot be told from another" in caplog.text


class _Locked(int):
    """A number that holds a lock."""

    def __init__(self, _):
        self.lock = threading.Lock()


def killed(x):
    """A job in which the worker process is killed, after another had time to end."""
    if x[0] == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    return {"y": x}


def test_a_worker_that_is_killed_is_an_error_that_says_so_and_finished_work_is_kept(tmp_path):
    jobs = [(killed, {"x": torch.tensor([float(k)])}, {}) for k in range(2)]
    spawn = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool,
        pytest.raises(RabbetError, match=r"a worker process died \(s\).*kept in .*go on"),
    ):
        Jobs(pool, tmp_path).run("s", jobs)
    kept = Jobs(folder=tmp_path)
    assert [kept.kept(kept.key("test_jobs.killed", x, {})) is not None for _, x, _ in jobs] == [
        True,
        False,
    ]


def test_few_inputs_wait_in_a_pool(monkeypatch):
    """As many as it has use for; the others are not even read."""
    monkeypatch.setattr("rabbet.jobs.AHEAD", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    read, most = [], []

    class Late(dict):
        def values(self):
            read.append(self)
            return super().values()

    def seen(_stage, done, _total):
        most.append(len(read) - done)

    jobs = [(f, Late(given), settings) for f, given, settings in _jobs(12)]
    keys = [Jobs().key("x", dict.copy(given), {}) for _, given, _ in jobs]
    monkeypatch.setattr(Jobs, "key", lambda *_: keys.pop(0))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = Jobs(pool, progress=seen).run("s", jobs)
    assert [r["y"].tolist() for r in results] == [[float(k), 1.0] for k in range(12)]
    assert max(most) <= 4


def test_a_failure_in_a_pool_starts_nothing_more_and_loses_nothing(tmp_path):
    jobs = [(fails, {"x": torch.tensor([7.0])}, {}), *_jobs(4, wait=0.2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with pytest.raises(ArithmeticError, match="no 7"):
            Jobs(pool, tmp_path).run("s", jobs)
        assert len(RUNS) < 4
    assert len(list(tmp_path.iterdir())) == len(RUNS)


def test_a_pool_of_threads_and_what_starts_later_keep_their_number_of_threads():
    torch.set_num_threads(2)
    try:
        two = {"initializer": torch.set_num_threads, "initargs": (2,)}
        with concurrent.futures.ThreadPoolExecutor(2, **two) as pool:
            found = Jobs(pool).run("s", _jobs(4, wait=0.1))
            assert [int(r["threads"]) for r in found] == [1] * 4
            assert pool.submit(torch.get_num_threads).result() == 2
        with concurrent.futures.ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(1)


def _parent_of_a_worker(sender):
    """A process that starts a worker, tells its number, and waits."""
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent)
    sender.send(pool.submit(os.getpid).result())
    time.sleep(600)


def numbered(x):
    """A job that tells its process."""
    return {"process": torch.tensor([os.getpid()])}


def _parent_of_a_worker_of_jobs(sender):
    """The same with a pool that only `Jobs` makes its own."""
    pool = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    )
    jobs = [(numbered, {"x": torch.ones(1)}, {})]
    sender.send(int(Jobs(pool).run("s", jobs)[0]["process"]))
    time.sleep(600)


@pytest.mark.parametrize("parent_of", [_parent_of_a_worker, _parent_of_a_worker_of_jobs])
@pytest.mark.slow
def test_a_worker_ends_with_its_parent_however_that_ended(parent_of):
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    parent = spawn.Process(target=parent_of, args=(sender,))
    parent.start()
    worker = receiver.recv()
    parent.kill()
    parent.join()
    for _ in range(600):  # a minute at most
        if not _runs(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on")


def _outlives_its_parent(sender):
    """A process with jobs on threads of its own, which tells when its parent has ended."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        Jobs(pool).run("s", _jobs(1))
    sender.send("jobs are done")
    multiprocessing.parent_process().join()
    time.sleep(0.5)  # for whatever else waits for the parent
    sender.send("goes on")


def _parent_of_a_process(sender):
    spawn = multiprocessing.get_context("spawn")
    spawn.Process(target=_outlives_its_parent, args=(sender,)).start()
    time.sleep(600)


@pytest.mark.slow
def test_a_process_of_the_user_whose_jobs_run_on_threads_may_outlive_its_parent():
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    parent = spawn.Process(target=_parent_of_a_process, args=(sender,))
    parent.start()
    sender.close()  # so that nothing comes when the others have ended
    assert receiver.recv() == "jobs are done"
    parent.kill()
    parent.join()
    assert receiver.poll(60)
    assert receiver.recv() == "goes on"


def _runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # one that has ended and was not asked for is a zombie
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"

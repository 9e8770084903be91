"""Jobs on Dask: workers that are killed, what is sent, and what is done twice."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from networks import rand, settled
from torch import nn

import rabbet
from rabbet.errors import RabbetError
from rabbet.jobs import Jobs

distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.slow  # processes start


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of two workers, each a process with one thread, that start again when killed."""
    folder = tmp_path_factory.mktemp("dask")
    given = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**given, local_directory=folder, silence_logs="CRITICAL") as pool,
        distributed.Client(pool, set_as_default=False) as client,
    ):
        yield client


def _trace(folder, name):
    """Note that a job has run."""
    with (Path(folder) / name).open("ab") as file:
        file.write(b"x")


def traced(x, *, folder):
    """A job that leaves a trace on disk."""
    _trace(folder, f"ran{int(x[0])}")
    return {"y": 2 * x}


def kills(x, *, folder, kept, when):
    """A job that kills its process the first time, once so many results are kept."""
    first = not (Path(folder) / "killer").exists()
    _trace(folder, "killer")
    for _ in range(600 if first else 0):  # a minute at most
        if len(list(Path(kept).glob("*.safetensors"))) >= when:
            time.sleep(0.5)  # the cluster hears that they are there
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
    return {"y": 3 * x}


def test_what_was_finished_is_not_done_again_when_a_worker_is_killed(client, tmp_path):
    traces, kept = tmp_path / "traces", tmp_path / "kept"
    traces.mkdir()
    settings = {"folder": str(traces)}
    jobs = [(traced, {"x": torch.tensor([float(k), 1.0])}, settings) for k in range(6)]
    killer = (kills, {"x": torch.ones(2)}, settings | {"kept": str(kept), "when": 6})
    results = Jobs(client.get_executor(), kept).run("s", [*jobs, killer])
    assert [r["y"].tolist() for r in results] == [*([2.0 * k, 2] for k in range(6)), [3, 3]]
    ran = {path.name: path.stat().st_size for path in traces.iterdir()}
    assert ran == {"killer": 2} | {f"ran{k}": 1 for k in range(6)}


def counts(x, y, *, factor):
    """A job of two tensors."""
    return {"y": factor * (x.sum() + y)}


def test_a_tensor_is_sent_once_however_many_jobs_need_it(client, monkeypatch):
    shared = torch.ones(300_000)
    jobs = [
        (counts, {"x": shared, "y": torch.tensor([1.0 * k])}, {"factor": f})
        for k in range(4)
        for f in (1, 2)
    ]
    sent = []
    submit = client.submit

    def watched(function, *given, **kwargs):
        sent.extend(len(each) for each in given if isinstance(each, bytes))
        return submit(function, *given, **kwargs)

    monkeypatch.setattr(client, "submit", watched)
    on_cluster = Jobs(client.get_executor())
    for stage, part in (("first", jobs[::2]), ("second", jobs[1::2])):
        found = on_cluster.run(stage, part)
        here = Jobs().run(stage, part)
        assert all(torch.equal(a["y"], b["y"]) for a, b in zip(found, here, strict=True))
    assert len(sent) == 5
    assert sum(size > shared.nbytes for size in sent) == 1


def dies(x):
    """A job that kills every process that it is given to."""
    os.kill(os.getpid(), signal.SIGKILL)


def _forgives(failures, dask_scheduler=None):
    dask_scheduler.allowed_failures = failures


def test_a_job_that_kills_each_worker_is_an_error_that_says_so(client, tmp_path):
    client.run_on_scheduler(_forgives, 0)
    try:
        with pytest.raises(RabbetError, match=r"a worker process died \(s\).*kept in .*go on"):
            Jobs(client.get_executor(), tmp_path).run("s", [(dies, {"x": torch.ones(1)}, {})])
    finally:
        client.run_on_scheduler(_forgives, 3)


STAGES = ["predicting", "solving layers"]


def test_a_cluster_whose_workers_are_killed_writes_the_same_bytes(client, tmp_path):
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(24, 24), nn.ReLU())]
    network = settled(nn.Sequential(*layers, nn.Linear(24, 5)))
    given = network, "bits <= 3", [rand(32, 24), rand(32, 24)]
    rabbet.compress(*given, quality="fast").save(tmp_path / "here.safetensors")
    killed = []

    def progress(stage, done, _):
        name = stage.partition(": ")[0]
        if done and name in STAGES and name not in killed:  # in the middle of it
            killed.append(name)
            os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)

    jobs = Jobs(client.get_executor(), progress=progress)
    rabbet.compress(*given, quality="fast", jobs=jobs).save(tmp_path / "there.safetensors")
    assert killed == STAGES
    paths = (tmp_path / f"{name}.safetensors" for name in ("here", "there"))
    assert len({path.read_bytes() for path in paths}) == 1

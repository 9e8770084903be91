"""Rows of other tools: one that works, and each way in which one can fail as a row that says so."""

import json
from types import SimpleNamespace

import numpy as np
import peers
import pytest

PROGRAM = """
import os, sys
import numpy as np
from peer import Job, Outcome, run

def works(job):
    assert job.calibrate.shape == (4, 3, 2, 2), job.calibrate.shape
    classes = np.eye(3)[[0, 1, 2, 2]]
    yield Outcome("native", lambda images: classes[: len(images)], 100 + job.bits, pair=None)

def fails(job):
    raise ValueError("a conv of 4 bits | refused in /some/where/else/file.py")

def spins(job):
    while True:
        pass

def dies(job):
    os.abort()

run({"works": works, "fails": fails, "spins": spins, "dies": dies}, "numpy")
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A network of three classes, and a program that stands for a peer's."""
    folder = tmp_path / "programs"
    (folder / "shared").mkdir(parents=True)
    (folder / "shared" / "peer.py").write_bytes((peers.FOLDER / "shared/peer.py").read_bytes())
    (folder / "toy.py").write_text(PROGRAM)
    monkeypatch.setattr(peers, "FOLDER", folder)
    monkeypatch.setattr(peers, "OWN", "toy")
    names = ("works", "fails", "spins", "dies")
    monkeypatch.setattr(peers, "PEERS", {"toy": dict.fromkeys(names, ("native",))})
    monkeypatch.setitem(peers.SOURCES, "net", (tmp_path, "make", [], 4))
    given = tmp_path / "handed"
    given.mkdir()
    for name in ("calibrate", "test"):
        np.save(given / f"{name}.npy", np.zeros((4, 3, 2, 2), np.float32))
    labels = np.array([0, 1, 2, 0])
    net = peers.Handed("net", given, labels, np.array([True, True, False, True]))

    def run(method, limit=60.0):
        bench = peers.Bench(tmp_path / "environments", limit, tmp_path / "kept")
        ((settings, values),) = bench.outcomes(net, "toy", method, 4)
        assert settings == {
            "network": "net", "peer": "toy", "method": method, "bits": 4, "file": "native"
        }  # fmt: skip
        return values

    return run


def test_a_row_has_the_accuracy_and_the_difference_image_by_image(measure):
    values = measure("works")
    # right: 1 1 1 0; the float network: 1 1 0 1
    assert (values["accuracy"], values["float accuracy"], values["drop"]) == (75, 75, 0)
    assert values["error"] == pytest.approx(100 * np.std([0, 0, -1, 1]) / 2)
    assert (values["bytes"], values["latency"]) == (104, None)
    assert values["untimed"] == "a simulation only"
    assert values["version"].startswith("numpy ")


@pytest.mark.parametrize(
    ("method", "limit", "said"),
    [
        ("fails", 60.0, "ValueError: a conv of 4 bits / refused in file.py"),
        ("spins", 3.0, "over the limit of 0.05 minutes"),
        ("dies", 60.0, "ended by SIGABRT"),
    ],
)
def test_what_goes_wrong_is_the_row(measure, method, limit, said):
    assert measure(method, limit) == {"failed": said}


def test_packages_that_cannot_be_had_are_told(tmp_path, monkeypatch):
    (tmp_path / "none.txt").write_text("")
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    message = "some/where/log\nERROR: No matching distribution found for none\n"
    failed = SimpleNamespace(returncode=1, stderr=message)
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: failed)
    peers.environment.cache_clear()
    with pytest.raises(peers.NotInstalled, match="not installable here: ERROR: No matching"):
        peers.environment("none", tmp_path / "environments")


def test_every_peer_has_a_program_and_a_list_that_pins_all_packages():
    for name in peers.PEERS:
        assert '"""' in (peers.FOLDER / f"{name}.py").read_text()
        if name != peers.OWN:
            lines = (peers.FOLDER / f"{name}.txt").read_text().split()
            assert lines
            assert all("==" in line and "://" not in line for line in lines), name


def test_stored_rows_are_of_methods_that_the_script_has():
    stored = json.loads((peers.ROOT / "benchmarks/results/peers.json").read_text())
    for row in stored["rows"]:
        own = row["settings"]
        if own["peer"] != "float32":
            assert own["file"] in peers.PEERS[own["peer"]][own["method"]], row["label"]

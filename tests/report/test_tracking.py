"""Progress and results as experiment trackers want them."""

from types import SimpleNamespace

import pytest
from networks import rand, settled
from torch import nn

import rabbet
from rabbet.report.tracking import metrics_of, to_mlflow, to_tensorboard

NET = settled(nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4)))


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_every_stage_is_tracked_to_its_end(tracker):
    seen = {}

    def log(name, value, step):
        seen[name] = value
        assert step >= 0

    target = SimpleNamespace(add_scalar=log, log_metric=log)
    progress = {"tensorboard": to_tensorboard, "mlflow": to_mlflow}[tracker](target)
    rabbet.compress(
        NET, "bits <= 5", [rand(8, 9)], quality="fast", jobs=rabbet.Jobs(progress=progress)
    )
    assert seen
    assert set(seen.values()) == {1.0}
    assert all(name.startswith("progress") for name in seen)


def test_the_metrics_of_a_result_are_numbers_by_name():
    result = rabbet.compress(NET, "bits <= 5", [rand(8, 9)], quality="fast")
    metrics = metrics_of(result.cost, result.float_cost)
    assert metrics["bytes"] == result.cost.bytes
    assert metrics["macs.share"] == result.cost.macs / result.float_cost.macs
    assert metrics["bits"] <= 5

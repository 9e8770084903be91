"""From a trained network to a small file, with the plan edited by hand on the way.

Runs in seconds, and needs no download.

python examples/quickstart.py
"""

from pathlib import Path

import torch

import rabbet
from rabbet import demo
from rabbet.core.plan import LayerPlan
from rabbet.model.build import plan_of

BUDGET = rabbet.Budget.parse("bytes <= 9%, bits <= 3")


def main() -> None:
    """Plan, edit, fit, save, load, compare."""
    # A ConvNet for 8x8 digits, and images without labels.
    network, batches = demo.model(), demo.calibration()
    # With the same jobs, fitting (and another budget) reuses what choosing has solved.
    jobs = rabbet.Jobs()

    plan = rabbet.plan(network, BUDGET, batches, jobs=jobs)
    print(f"chosen:\n{plan}\n")

    # A plan is text. Here the largest layer becomes a low-rank product, whatever the method chose
    # for it.
    edited = plan.with_layer(LayerPlan.parse("last.0  lowrank[6]@4c | act@8"))
    # Fast: rounded, without tuning afterwards.
    result = rabbet.fit(network, edited, batches, quality="fast", jobs=jobs)
    # An edited plan is checked against a budget by hand.
    BUDGET.check(result.cost, result.float_cost)
    print(f"fitted:\n{result}\n")

    path = Path("build/quickstart.safetensors")
    path.parent.mkdir(exist_ok=True)
    size = result.save(path)
    assert size == result.cost.bytes == path.stat().st_size

    loaded = rabbet.load(path, network)
    assert plan_of(loaded, result.survey) == edited
    images = torch.cat([images for images, _ in demo.test()])
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))
    before, after = rabbet.accuracy(network, demo.test()), rabbet.accuracy(loaded, demo.test())
    print(f"{path}: {size:,} bytes, the network in it answers as the fitted one does, bit for bit")
    print(f"held-out accuracy: {before:.2f} % -> {after:.2f} %")


if __name__ == "__main__":
    main()

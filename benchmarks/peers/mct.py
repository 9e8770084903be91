"""Sony's Model Compression Toolkit: PTQ and gradient PTQ, below 8 bits with mixed precision.

Its integer program then chooses 2, 4 or 8 bits for each layer, so that weights take as many bytes
as at the bits that are asked. What it gives is a simulation; bytes are those that it counts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peer import Job, Outcome, in_torch, packed, run

# torchvision from the index is built for CUDA. Nothing here calls these, but their names must be
# known when it is imported, and that it is there is what the toolkit asks for.
known = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    known.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

import model_compression_toolkit as mct  # noqa: E402

EPOCHS = {100: 10, 25: 20}


def images(job: Job) -> Callable[[], Iterator[list[Any]]]:
    """The calibration images, anew whenever they are asked for."""
    return lambda: ([batch] for batch in job.batches())


def settings(job: Job) -> dict[str, Any]:
    """The budget of weights, where it is not 8 bits everywhere."""
    if job.bits == 8:
        return {}
    weights = packed(job.network(), lambda _: job.bits) - packed(job.network(), lambda _: 0)
    return {
        "target_resource_utilization": mct.core.ResourceUtilization(weights_memory=weights),
        "core_config": mct.core.CoreConfig(
            mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=32)
        ),
    }


def outcomes(job: Job, model: Any, told: Any) -> list[Outcome]:
    """The simulation, and the bytes that it would take."""
    scales = packed(job.network(), lambda _: 0)
    used = getattr(told.final_resource_utilization, "weights_memory", None)
    counted = packed(job.network(), lambda _: job.bits)
    taken = counted if used is None or job.bits == 8 else round(used) + scales
    return [Outcome("simulation", in_torch(model.eval()), packed=taken)]


def plain(job: Job) -> list[Outcome]:
    """Its post-training quantisation."""
    quantise = mct.ptq.pytorch_post_training_quantization
    return outcomes(job, *quantise(job.network(), images(job), **settings(job)))


def gradient(job: Job) -> list[Outcome]:
    """Rounding and biases learned from the images, some epochs."""
    quantise = mct.gptq.pytorch_gradient_post_training_quantization
    config = mct.gptq.get_pytorch_gptq_config(
        n_epochs=EPOCHS[job.size], use_hessian_based_weights=False,
        use_hessian_sample_attention=False,
    )  # fmt: skip
    model, told = quantise(job.network(), images(job), gptq_config=config, **settings(job))
    return outcomes(job, model, told)


if __name__ == "__main__":
    run({"PTQ": plain, "gradient PTQ": gradient}, "model-compression-toolkit")

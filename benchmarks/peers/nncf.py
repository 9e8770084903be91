"""NNCF on the OpenVINO model: int8 with its ways to mend biases, and weights of 4 bits.

Accuracy control judges by how many calibration images keep the class that the float network gives
them: no method here sees a label. Of 4 bits, NNCF compresses the weights alone, inputs are floats.
"""

from collections.abc import Iterable
from typing import Any

import nncf
import numpy as np
import openvino
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    QuantizationParameters,
)
from peer import Array, Job, Outcome, in_openvino, run, size

FILE = "IR, OpenVINO"


def model(job: Job) -> Any:
    """The float network in OpenVINO."""
    return openvino.convert_model(job.onnx)


def images(job: Job) -> Any:
    """The calibration images, in batches."""
    return nncf.Dataset(job.batches())


def settings(job: Job) -> dict[str, Any]:
    """What all ways to quantise share: all images, for a CPU, weights of so many bits."""
    more = {}
    if job.bits != 8:
        weights = QuantizationParameters(num_bits=job.bits)
        advanced = AdvancedQuantizationParameters(weights_quantization_params=weights)
        more = {"advanced_parameters": advanced}
    device = nncf.TargetDevice.CPU
    return {"subset_size": len(job.batches()), "target_device": device, **more}


def outcomes(job: Job, small: Any) -> list[Outcome]:
    """The model as files, beside the float one in OpenVINO."""
    path, image = job.out / "small.xml", job.one()
    openvino.save_model(small, path)
    run, whole = in_openvino(path), in_openvino(job.onnx)
    taken = size(path) + size(path.with_suffix(".bin"))
    return [Outcome(FILE, run, taken, pair=(lambda: whole(image), lambda: run(image)))]


def fast(job: Job) -> list[Outcome]:
    """Its defaults."""
    return outcomes(job, nncf.quantize(model(job), images(job), **settings(job)))


def full(job: Job) -> list[Outcome]:
    """Biases corrected layer by layer, unsigned inputs with a zero point."""
    small = nncf.quantize(
        model(job),
        images(job),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=False,
        **settings(job),
    )
    return outcomes(job, small)


def controlled(job: Job) -> list[Outcome]:
    """Layers that cost most stay in float, until no more than 1 % of the classes change."""
    batches = job.batches()
    whole = in_openvino(job.onnx)
    wanted = [whole(batch).argmax(1) for batch in batches]

    def kept(compiled: Any, items: Iterable[tuple[Array, Array]]) -> tuple[float, list[float]]:
        shares = [(compiled(x)[0].argmax(1) == y).mean() for x, y in items]
        return float(np.mean(shares)), [float(s) for s in shares]

    small = nncf.quantize_with_accuracy_control(
        model(job),
        images(job),
        nncf.Dataset(list(zip(batches, wanted, strict=True))),
        kept,
        max_drop=0.01,
        fast_bias_correction=False,
        subset_size=len(batches),
        target_device=nncf.TargetDevice.CPU,
    )
    return outcomes(job, small)


def weights(job: Job) -> list[Outcome]:
    """Weights alone, a scale a channel, mended on the images as its documentation advises."""
    small = nncf.compress_weights(
        model(job),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        ratio=1.0,
        group_size=-1,
        all_layers=True,
        dataset=images(job),
        awq=True,
        scale_estimation=True,
        subset_size=len(job.batches()),
    )
    return outcomes(job, small)


if __name__ == "__main__":
    run(
        {
            "fast bias correction": fast,
            "bias correction": full,
            "accuracy control": controlled,
            "weights alone": weights,
        },
        "nncf",
        "openvino",
    )

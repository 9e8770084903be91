"""AIMET on ONNX: cross-layer equalisation, then AdaRound or SeqMSE; inputs of 8 bits.

AdaRound has fewer steps than the 10,000 a layer that it advises, to fit into the time. SeqMSE takes
no other ranges than those of the extremes ("tf"), between which it looks for its own.
"""

from collections.abc import Callable
from typing import Any

import aimet_onnx
import onnx
from aimet_onnx.cross_layer_equalization import equalize_model
from peer import Job, Outcome, onnx_outcome, run

STEPS = 500


def feeds(job: Job) -> list[dict[str, Any]]:
    """The calibration images under the name of the input."""
    name = onnx.load(job.onnx).graph.input[0].name
    return [{name: batch} for batch in job.batches()]


def quantised(
    how: Callable[[Any, list[dict[str, Any]]], Any], scheme: str = "tf_enhanced"
) -> Callable[[Job], list[Outcome]]:
    """A way to choose weights, in a network whose channels were made alike."""

    def method(job: Job) -> list[Outcome]:
        model, inputs = onnx.load(job.onnx), feeds(job)
        equalize_model(model)
        sim = aimet_onnx.QuantizationSimModel(
            model,
            param_type=f"int{job.bits}",
            activation_type="int8",
            quant_scheme=scheme,
            dummy_input={name: array[:1] for name, array in inputs[0].items()},
        )
        how(sim, inputs)
        sim.compute_encodings(inputs)
        path = job.out / "small.onnx"
        onnx.save(sim.to_onnx_qdq(prequantize_constants=True), path)
        return [onnx_outcome(job, path)]

    return method


if __name__ == "__main__":
    run(
        {
            "CLE": quantised(lambda sim, inputs: None),
            "CLE, AdaRound": quantised(
                lambda sim, inputs: aimet_onnx.apply_adaround(sim, inputs, num_iterations=STEPS)
            ),
            "CLE, SeqMSE": quantised(aimet_onnx.apply_seq_mse, "tf"),
        },
        "aimet-onnx",
    )

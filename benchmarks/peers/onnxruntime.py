"""onnxruntime's static quantiser: QDQ pairs, unsigned inputs, signed weights, a scale a channel.

Ranges by its three calibrators; its own pre-processing first. On processors without VNNI its int8
kernels saturate, and it advises a reduced range: weights of 7 bits. Weights of 4 bits are its
QInt4; inputs stay at 8.
"""

import contextlib
from collections.abc import Callable

import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)
from peer import Array, Job, Outcome, onnx_outcome, run, saturates

WEIGHTS = {8: QuantType.QInt8, 4: QuantType.QInt4}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches under the name of the network's input."""

    def __init__(self, job: Job) -> None:
        name = onnxruntime.InferenceSession(str(job.onnx)).get_inputs()[0].name
        self.left = iter([{name: batch} for batch in job.batches()])

    def get_next(self) -> dict[str, Array] | None:
        """The next batch."""
        return next(self.left, None)


def calibrated(
    calibrator: CalibrationMethod, reduced: bool = True
) -> Callable[[Job], list[Outcome]]:
    """The quantiser with one of its ways to choose ranges. reduced: weights of 7 bits, not 8."""

    def method(job: Job) -> list[Outcome]:
        ready, small = job.out / "ready.onnx", job.out / "small.onnx"
        with contextlib.chdir(job.out):
            quant_pre_process(str(job.onnx), str(ready))
            quantize_static(
                str(ready),
                str(small),
                Reader(job),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=WEIGHTS[job.bits],
                reduce_range=reduced and job.bits == 8 and saturates(),
                calibrate_method=calibrator,
            )
        return [onnx_outcome(job, small)]

    return method


if __name__ == "__main__":
    run(
        {
            "minmax": calibrated(CalibrationMethod.MinMax),
            "minmax, full range": calibrated(CalibrationMethod.MinMax, False),
            "entropy": calibrated(CalibrationMethod.Entropy),
            "percentile": calibrated(CalibrationMethod.Percentile),
        },
        "onnxruntime",
    )

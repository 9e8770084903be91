"""rabbet itself at a mean of so many bits: the native file, and exported ones in two runtimes.

Where int8 kernels saturate, no weight gets more than 7 bits, as docs/onnx.md advises.
"""

import openvino
import torch
from peer import (
    Job,
    Method,
    Outcome,
    in_onnxruntime,
    in_openvino,
    in_torch,
    run,
    size,
)

import rabbet
from rabbet.runtime.bench import EXACT, cpu

assert openvino

MENU = rabbet.Joint(widest=None if cpu()["instructions"] in EXACT else 7)


def quality(name: str) -> Method:
    """`rabbet.compress` at one of its qualities."""

    def method(job: Job) -> list[Outcome]:
        torch.set_num_threads(1)
        model, image = job.network(), job.one()
        task = rabbet.Task(job.tensors(), outputs="scores")
        result = rabbet.compress(model, f"bits <= {job.bits}", task, MENU, quality=name)
        native, exported = job.out / "small.safetensors", job.out / "small.onnx"
        taken = result.save(native)
        result.export(exported)
        opened = job.out / "openvino.onnx"
        result.export(opened, "openvino")
        run, whole = in_onnxruntime(exported), in_onnxruntime(job.onnx)
        other, other_whole = in_openvino(opened), in_openvino(job.onnx)
        return [
            Outcome("native", in_torch(rabbet.load(native, model)), taken, untimed="no runtime"),
            Outcome(
                "ONNX, onnxruntime", run, size(exported),
                pair=(lambda: whole(image), lambda: run(image)),
            ),
            Outcome(
                "ONNX, OpenVINO", other, size(opened),
                pair=(lambda: other_whole(image), lambda: other(image)),
            ),
        ]  # fmt: skip

    return method


if __name__ == "__main__":
    run({"fast": quality("fast"), "default": quality("default")}, "rabbet")

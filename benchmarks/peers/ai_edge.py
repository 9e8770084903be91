"""ai-edge-quantizer on a TFLite file that litert-torch converts: static int8, or weights of 4 bits.

Of 4 bits its recipes have weights alone and dynamic inputs; what a conv cannot have it refuses.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe
from peer import Array, Job, Outcome, run, size

FILE = "TFLite, LiteRT"


def opened(path: Path) -> tuple[Any, str, str, str]:
    """A file in the runtime: its signature as a function, names of input, output and signature."""
    interpreter = Interpreter(str(path), num_threads=1)
    (name,) = interpreter.get_signature_list()
    given = interpreter.get_signature_list()[name]
    return interpreter.get_signature_runner(name), given["inputs"][0], given["outputs"][0], name


def taken_as(runner: Any, name: str, image: Array) -> Array:
    """An image in the input's type: a static file takes codes, by a scale and a zero point."""
    details = runner.get_input_details()[name]
    if details["dtype"] == np.float32:
        return image
    scale, zero = details["quantization"]
    ends = np.iinfo(details["dtype"])
    return np.clip(np.rint(image / scale) + zero, ends.min, ends.max).astype(details["dtype"])


def predicted(path: Path) -> Callable[[Array], Array]:
    """A file as a function of arrays, image by image."""
    runner, taken, given, _ = opened(path)

    def predict(images: Array) -> Array:
        singles = (np.array(images[k : k + 1]) for k in range(len(images)))
        each = [runner(**{taken: taken_as(runner, taken, image)}) for image in singles]
        return np.concatenate([found[given] for found in each])

    return predict


def quantised(recipe_of: Callable[[], Any]) -> Callable[[Job], list[Outcome]]:
    """One of its recipes."""

    def method(job: Job) -> list[Outcome]:
        whole, small = job.out / "float.tflite", job.out / "small.tflite"
        litert_torch.convert(job.network(), (torch.from_numpy(job.one()),)).export(str(whole))
        _, taken, _, name = opened(whole)
        tool = quantizer.Quantizer(str(whole), recipe_of())
        ranges = None
        if tool.need_calibration:
            feeds = [{taken: x[None]} for x in job.calibrate]  # it walks over them more than once
            ranges = tool.calibrate({name: feeds}, num_threads=1)
        small.write_bytes(tool.quantize(ranges).quantized_model)
        run, before, image = predicted(small), predicted(whole), job.one()
        pair = (lambda: before(image), lambda: run(image))
        return [Outcome(FILE, run, size(small), pair=pair)]

    return method


METHODS = {
    8: {"static": recipe.static_wi8_ai8, "dynamic": recipe.dynamic_wi8_afp32},
    4: {"dynamic": recipe.dynamic_wi4_afp32},
}


def by_bits(name: str) -> Callable[[Job], list[Outcome]]:
    """The recipe of these bits; there is not one for each."""

    def method(job: Job) -> list[Outcome]:
        if name not in METHODS.get(job.bits, {}):
            raise ValueError(f"ai-edge-quantizer has no {name} recipe of {job.bits} bits")
        return quantised(METHODS[job.bits][name])(job)

    return method


if __name__ == "__main__":
    run({"static": by_bits("static"), "dynamic": by_bits("dynamic")}, "ai-edge-quantizer")

"""torchao's PT2E flow with its quantiser for Inductor on x86, in a program that Inductor compiles.

Without VNNI its weights have the reduced range that it advises; it has no 4 bits for convs.
The file that it saves is a program with all that torch knows of its nodes, beside the weights.
"""

import copy
from typing import Any

import torch
import torchao
from peer import Job, Outcome, in_torch, packed, run, saturates
from torch._inductor import config as inductor
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

assert torchao


def exported(model: Any, job: Job) -> Any:
    """A program that takes any number of images."""
    example = (torch.from_numpy(job.calibrate[:2]),)  # which the file keeps
    return torch.export.export(model, example, dynamic_shapes=({0: Dim("batch")},))


def static(job: Job) -> list[Outcome]:
    """Ranges of inputs from the calibration images."""
    if job.bits != 8:
        raise ValueError(f"X86InductorQuantizer has no weights of {job.bits} bits for convs")
    float_program = exported(job.network(), job).module()
    quantiser = x86.X86InductorQuantizer()
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=saturates())
    prepared = prepare_pt2e(copy.deepcopy(float_program), quantiser.set_global(config))
    with torch.no_grad():
        for batch in job.tensors():
            prepared(batch)
    small = convert_pt2e(prepared)
    path = job.out / "small.pt2"
    torch.export.save(exported(small, job), path)
    image = torch.from_numpy(job.one())
    with torch.no_grad():
        inductor.freezing = True
        fast, whole = torch.compile(small), torch.compile(float_program)
        for each in (fast, whole):
            each(image)

    def timed(program: Any) -> Any:
        with torch.no_grad():
            return program(image)

    pair = (lambda: timed(whole), lambda: timed(fast))
    counted = packed(job.network(), lambda _: job.bits)
    return [Outcome("pt2, Inductor", in_torch(small), path.stat().st_size, counted, pair)]


if __name__ == "__main__":
    run({"static": static}, "torchao")

"""Intel Neural Compressor 3 for torch: static int8, in a program that Inductor compiles.

Its methods of 4 bits (GPTQ, AWQ, AutoRound, TEQ) are for linears of language models alone.
"""

from typing import Any

import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import INT8StaticQuantConfig, convert, prepare
from peer import Job, Outcome, in_torch, packed, run
from torch._inductor import config as inductor
from torch.export import Dim


def static(job: Job) -> list[Outcome]:
    """Its static quantisation; "minmax" and "kl" are the ways to choose ranges."""
    if job.bits != 8:
        raise ValueError(f"INT8StaticQuantConfig has no weights of {job.bits} bits")
    example, shapes = (torch.from_numpy(job.calibrate[:2]),), ({0: Dim("batch")},)
    whole = export(job.network(), example, shapes)
    model = export(job.network(), example, shapes)
    prepared = prepare(model, INT8StaticQuantConfig(act_algo=job.method))
    with torch.no_grad():
        for batch in job.tensors():
            prepared(batch)
    small = convert(prepared)
    path, image = job.out / "small.pt2", torch.from_numpy(job.one())
    torch.export.save(torch.export.export(small, example, dynamic_shapes=shapes), path)
    with torch.no_grad():
        inductor.freezing = True
        pair = tuple(torch.compile(each) for each in (whole, small))

    def timed(program: Any) -> Any:
        with torch.no_grad():
            return program(image)

    return [
        Outcome(
            "pt2, Inductor", in_torch(small), path.stat().st_size,
            packed(job.network(), lambda _: job.bits),
            pair=(lambda: timed(pair[0]), lambda: timed(pair[1])),
        )
    ]  # fmt: skip


if __name__ == "__main__":
    run({"minmax": static, "kl": static}, "neural-compressor-pt")

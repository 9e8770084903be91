"""Brevitas: graph equalisation, then rounding by GPTQ, GPFQ, Qronos or learned, biases corrected.

Settings are those of its own table of best configurations for torchvision's networks that has a
scale a channel: symmetric, activations to the 99.999th percentile, 20 rounds of equalisation that
merge biases. Where its quantisation of a whole graph cannot follow the network (slices in
ResNet-20), and for learned rounding, which it offers there alone, layers are quantised one by one:
then the first and the last keep 8 bits, as is its default.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from brevitas.export import export_onnx_qcdq
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas_examples.imagenet_classification.ptq import ptq_common as ptq
from brevitas_examples.imagenet_classification.ptq.learned_round_utils import apply_learned_round
from peer import Job, Outcome, ends, in_onnxruntime, in_torch, onnx_outcome, packed, run

STEPS = 300


def loader(job: Job) -> list[tuple[Any, Any]]:
    """The calibration images with labels that nothing reads."""
    return [(batch, torch.zeros(len(batch))) for batch in job.tensors()]


def whole(job: Job) -> str:
    """The backend that its tables have as the better one, where it takes the network."""
    return "layerwise" if job.make == "CifarResNet" else "fx"


def quantised(job: Job, backend: str) -> Any:
    """The network with quantisers, whose ranges are known."""
    model = preprocess_for_quantize(
        job.network(), equalize_iters=20, equalize_merge_bias=True, merge_bn=True
    )
    model = ptq.quantize_model(
        model, backend=backend, weight_bit_width=job.bits, act_bit_width=8, bias_bit_width=32,
        weight_quant_granularity="per_channel", act_quant_percentile=99.999, act_quant_type="sym",
        scale_factor_type="float_scale", quant_format="int", weight_param_method="mse",
    )  # fmt: skip
    with torch.no_grad():
        model(job.tensors()[0])
    ptq.calibrate(loader(job), model)
    return model


def outcomes(job: Job, model: Any, first: bool) -> list[Outcome]:
    """The network with its biases corrected; timed as ONNX where its exporter can do that.

    first: whether the first and the last layer have 8 bits.
    """
    ptq.apply_bias_correction(loader(job), model)
    model.eval()
    wide = ends(job.network()) if first else set()
    counted = packed(job.network(), lambda name: 8 if name in wide else job.bits)
    path = job.out / "small.onnx"
    try:
        export_onnx_qcdq(
            model, torch.from_numpy(job.one()), str(path), opset_version=17, dynamo=False
        )
        in_onnxruntime(path)(job.one())
    except Exception as e:  # it has no error class of its own
        why = (
            f"a simulation: its export fails, {type(e).__name__}: {' '.join(str(e).split())[:100]}"
        )
        return [Outcome("simulation", in_torch(model), packed=counted, untimed=why)]
    found = onnx_outcome(job, path, packed=counted)
    found.predict, found.file = in_torch(model), "simulation"
    return [found]


def rounded(how: Callable[[Job, Any], None]) -> Callable[[Job], list[Outcome]]:
    """A way to round."""

    def method(job: Job) -> list[Outcome]:
        model = quantised(job, whole(job))
        how(job, model)
        return outcomes(job, model, whole(job) == "layerwise")

    return method


def learned(job: Job) -> list[Outcome]:
    """Rounding learned layer by layer."""
    model = quantised(job, "layerwise")
    settings = SimpleNamespace(
        learned_round="hard_sigmoid", learned_round_mode="layerwise",
        learned_round_loss="regularised_mse", learned_round_iters=STEPS,
        learned_round_block_name=None, learned_round_lr=1e-2, learned_round_lr_scheduler=None,
        learned_round_batch_size=32, optimizer="adam",
    )  # fmt: skip
    apply_learned_round(model=model, calibration_loader=loader(job), args=settings)
    return outcomes(job, model, True)


if __name__ == "__main__":
    run(
        {
            "nearest": rounded(lambda job, model: None),
            "GPTQ": rounded(lambda job, model: ptq.apply_gptq(loader(job), model, act_order=True)),
            "GPFQ": rounded(lambda job, model: ptq.apply_gpfq(loader(job), model, act_order=True)),
            "Qronos": rounded(lambda job, model: ptq.apply_qronos(model, loader(job))),
            "learned round": learned,
        },
        "brevitas",
    )

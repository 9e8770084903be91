"""Half-quadratic quantisation by its own package (github.com/mobiusml/hqq), for `decoders.py`.

Run as `python -P hqq.py FOLDER` where the package is: reads the network and `asked.json` there, and
writes weights as floats. It needs no data. Groups run along the inputs (axis 1), as its authors
advise; scales and zero points are of two bytes.
"""

import json
import sys
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(folder: Path) -> None:
    """Every layer that was asked for."""
    asked = json.loads((folder / "asked.json").read_text())
    network = AutoModelForCausalLM.from_pretrained(folder / "network", dtype=torch.float32)
    weights, size = {}, 0
    for name in asked["layers"]:
        weight = network.get_submodule(name).weight.detach()
        codes, meta = Quantizer.quantize(
            weight, nbits=asked["bits"], channel_wise=True, group_size=asked["group"],
            optimize=True, round_zero=False, axis=1, device="cpu", compute_dtype=torch.float32,
        )  # fmt: skip
        for part in ("scale", "zero"):  # as they would be stored
            meta[part] = meta[part].to(torch.float16).float()
        weights[name] = Quantizer.dequantize(codes, meta).reshape(weight.shape).contiguous()
        size += weight.numel() * asked["bits"] // 8 + 4 * meta["scale"].numel()
    save_file(weights, folder / "weights.safetensors")
    notes = f"hqq, {asked['bits']} bits, groups of {asked['group']}, axis 1, optimised"
    (folder / "counted.json").write_text(json.dumps({"bytes": size, "notes": notes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

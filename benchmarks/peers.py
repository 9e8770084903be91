r"""Other tools beside rabbet: the same network, images and machine, each at its best in minutes.

    python benchmarks/peers.py                                  # ResNet-20 at 8 and 4 bits
    python benchmarks/peers.py --nets mobilenet_v2 --peers nncf rabbet --resume
    # the weights of the networks for ImageNet come with packages: see pretrained.py

A row is a process of its own on one core, in an environment that holds its peer alone; it is made
when it is first needed, from `peers/NAME.txt`. What a peer does stands in `peers/NAME.py`. It is
given the network as ONNX and as the source and weights of a module, calibration images without
labels, and test images. Its classes of the test images are compared with the float network's here:
accuracy, what was lost in points, and the standard error of that difference, image by image.

Bytes are those of the file that the peer writes. A peer that only simulates few bits writes floats:
then they are counted (`packed`), as codes, a scale of two bytes a channel, and biases. Latency is
that of one image on one thread against float in the same runtime, timed in turn. Seconds are those
of the method, wall and processor; memory is the peak above what the imports held. A row over the
limit, and one that fails, is a row that says so. The limit is of processor time for all that a row
does, since a machine that others share has no wall time to speak of; ten times as much of that ends
a row, too.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pretrained
import shapes
import torch
from common import DATA, machine
from frontier import DATA as IMAGES
from frontier import NETS, Labelled
from numpy.typing import NDArray
from records import ROOT, Group, Records, Table, Values, add_options
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "peers"
OWN = "rabbet"  # runs in the environment of this script

SOURCES: dict[str, tuple[Path, str, list[Any], int]] = {
    "resnet20": (DATA / "nets.py", "CifarResNet", [20], 100),
    "mobilenet_v2": (Path(shapes.__file__), "mobilenet_v2", [], 25),
    "efficientnet_lite0": (Path(shapes.__file__), "efficientnet_lite0", [], 25),
}
"""Where a network's class is written, what makes it, and images in a batch."""

ONNX, XML, NATIVE = "ONNX, onnxruntime", "IR, OpenVINO", "native"
BOTH = "ONNX, OpenVINO"
FLAT, PT2, LITE = "simulation", "pt2, Inductor", "TFLite, LiteRT"
Methods = dict[str, tuple[str, ...]]
PEERS: dict[str, Methods] = {
    "rabbet": {
        "fast": (NATIVE, ONNX, BOTH),
        "default": (NATIVE, ONNX, BOTH),
    },
    "onnxruntime": {
        "minmax": (ONNX,),
        "minmax, full range": (ONNX,),
        "entropy": (ONNX,),
        "percentile": (ONNX,),
    },
    "nncf": {
        "fast bias correction": (XML,),
        "bias correction": (XML,),
        "accuracy control": (XML,),
        "weights alone": (XML,),
    },
    "brevitas": {
        "nearest": (FLAT,),
        "GPTQ": (FLAT,),
        "GPFQ": (FLAT,),
        "Qronos": (FLAT,),
        "learned round": (FLAT,),
    },
    "mct": {"PTQ": (FLAT,), "gradient PTQ": (FLAT,)},
    "aimet": {"CLE": (ONNX,), "CLE, AdaRound": (ONNX,), "CLE, SeqMSE": (ONNX,)},
    "neural_compressor": {"minmax": (PT2,), "kl": (PT2,)},
    "torchao": {"static": (PT2,)},
    "ai_edge": {"static": (LITE,), "dynamic": (LITE,)},
    "qdrop": {"BRECQ": (FLAT,), "QDrop": (FLAT,)},
}
"""The methods of each peer, and what each gives."""

COLUMNS = {
    "network": "", "peer": "", "method": "", "bits": "", "file": "", "accuracy": ".2f",
    "drop": ".2f", "error": ".2f", "bytes": ",", "packed": ",", "latency": ".2f", "seconds": ".0f",
    "processor seconds": ".0f", "peak MiB": ",.0f", "failed": "",
}  # fmt: skip


# What is handed over


@dataclass(frozen=True)
class Handed:
    """A folder with a network and its images, and what the float network gets right."""

    name: str
    folder: Path
    labels: NDArray[Any]
    right: NDArray[Any]

    def job(self, out: Path, method: str, bits: int, limit: float) -> dict[str, Any]:
        """What a peer is told."""
        _, make, arguments, size = SOURCES[self.name]
        return {
            "folder": str(self.folder), "out": str(out), "method": method, "bits": bits,
            "size": size, "make": make, "arguments": arguments, "limit": limit,
        }  # fmt: skip


def handed(name: str, folder: Path) -> Handed:
    """Write a network and its images into a folder."""
    model, calibrate, test = NETS[name]()
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = torch.cat([x for x, _ in test]), torch.cat([y for _, y in test]).numpy()
    np.save(folder / "calibrate.npy", torch.cat(calibrate).numpy())
    np.save(folder / "test.npy", images.numpy())
    shutil.copyfile(SOURCES[name][0], folder / "network.py")
    save_file(model.state_dict(), folder / "state.safetensors")
    torch.onnx.export(
        model.eval(),
        (images[:2],),
        folder / "float.onnx",
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    bare(folder / "float.onnx")
    return Handed(name, folder, labels, classes(model, test) == labels)


def bare(path: Path) -> None:
    """Take the remarks out of an ONNX file: every file made of it would hold them, too."""
    model = onnx.load(path)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(model, path)


def classes(model: nn.Module, test: Labelled) -> NDArray[Any]:
    """What a network takes the test images for."""
    with torch.no_grad():
        found: list[Tensor] = [model(x).argmax(1) for x, _ in test]
    return torch.cat(found).numpy()


# The environments of the peers


class NotInstalled(Exception):  # noqa: N818
    """A peer's packages cannot be had here."""


@functools.cache
def environment(peer: str, place: Path) -> Path:
    """The Python of a peer's environment, made of its list unless it is there and of this list."""
    if peer == OWN:
        return Path(sys.executable)
    wanted, folder = FOLDER / f"{peer}.txt", place / peer
    stamp, text = folder / "stamp", hashlib.sha256(wanted.read_bytes()).hexdigest()
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != text:
        print(f"installing {peer} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        words = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(wanted)]
        done = subprocess.run([python, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotInstalled(f"not installable here: {short(done.stderr)}")
        stamp.write_text(text)
    return python


def short(text: str) -> str:
    """The last line that says something, without places of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [x for x in lines if re.match(r"[\w.]*(Error|Exception|ERROR)\b.*:", x)] or lines
    text = re.sub(r"(?<![\w.])/[\w./+-]+/", "", said[-1] if said else "no message")
    text = " ".join(text.replace("|", "/").split())  # a bar would end the cell of a table
    return text if len(text) <= 240 else f"{text[:237]}..."


# One row


@dataclass(frozen=True)
class Bench:
    """How rows are measured: where environments lie, the limit in seconds, a folder for files."""

    place: Path
    limit: float
    keep: Path

    def outcomes(self, net: Handed, peer: str, method: str, bits: int) -> Group:
        """The rows of one method, each with its file; or with what went wrong."""
        shared = {"network": net.name, "peer": peer, "method": method, "bits": bits}
        files = PEERS[peer][method]
        out = self.keep / net.name / f"{peer}-{method}-{bits}".replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        try:
            found = self._run(net, out, peer, method, bits)
        except (NotInstalled, RuntimeError) as e:
            return [(shared | {"file": name}, {"failed": str(e)}) for name in files]
        rows = {each["file"]: valued(each, found, net, out) for each in found["outcomes"]}
        if set(rows) != set(files):
            raise ValueError(f"{peer}, {method} gives {list(rows)} in place of {list(files)}")
        return [(shared | {"file": name}, rows[name]) for name in files]

    def _run(self, net: Handed, out: Path, peer: str, method: str, bits: int) -> dict[str, Any]:
        """What the peer's program prints last. Raises RuntimeError with what it said instead."""
        python, job, log = environment(peer, self.place), out / "job.json", out / "log.txt"
        job.write_text(json.dumps(net.job(out, method, bits, self.limit)))
        command = [str(python), "-P", str(FOLDER / f"{peer}.py"), str(job)]
        source = [str(FOLDER / "shared"), *([str(ROOT / "src")] if peer == OWN else [])]
        settings = os.environ | {"PYTHONPATH": os.pathsep.join(source), "OMP_NUM_THREADS": "1"}
        with log.open("w") as told:
            process = subprocess.Popen(
                command, stdout=told, stderr=told, env=settings, start_new_session=True, cwd=out
            )
            try:
                process.wait(10 * self.limit)
            except subprocess.TimeoutExpired as e:
                raise RuntimeError(f"over {10 * self.limit / 60:g} minutes of wall time") from e
            finally:
                stopped(process)
        text = log.read_text(errors="replace")
        results = [x for x in text.splitlines() if x.startswith("RESULT ")]
        if results:
            found: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT "))
            return found
        if process.returncode == -signal.SIGXCPU:
            raise RuntimeError(f"over the limit of {self.limit / 60:g} minutes")
        if process.returncode < 0:
            raise RuntimeError(f"ended by {signal.Signals(-process.returncode).name}")
        raise RuntimeError(short(text))


def stopped(process: "subprocess.Popen[bytes]") -> None:
    """End a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def valued(each: dict[str, Any], found: dict[str, Any], net: Handed, out: Path) -> Values:
    """The values of one file of a method."""
    right = np.load(out / each["predicted"]) == net.labels
    apart = net.right.astype(float) - right
    return {
        "accuracy": 100 * right.mean(),
        "float accuracy": 100 * net.right.mean(),
        "drop": 100 * apart.mean(),
        "error": 100 * apart.std() / len(apart) ** 0.5,
        "bytes": each["bytes"],
        "packed": each["packed"],
        "latency": each["ms"] and each["ms"] / each["float ms"],
        "ms": each["ms"] and round(each["ms"], 3),
        "float ms": each["ms"] and round(each["float ms"], 3),
        "untimed": each["untimed"],
        "seconds": found["seconds"],
        "processor seconds": found["processor seconds"],
        "peak MiB": found["peak MiB"],
        "version": found["version"],
        "notes": each["notes"],
    }


def whole(net: Handed) -> Group:
    """The row of the float network."""
    settings = {"network": net.name, "peer": "float32", "method": None, "bits": 32, "file": ONNX}
    size = (net.folder / "float.onnx").stat().st_size
    return [(settings, {"accuracy": 100 * net.right.mean(), "bytes": size})]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=SOURCES, default=["resnet20"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--limit", type=float, default=10, help="minutes of a row")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / "build" / "peers", metavar="FOLDER",
        help="where the peers' environments are made, and looked for",
    )  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where all files stay")
    add_options(parser)
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # some runtimes take all they see
    print(f"seed 0; {machine()}")
    records = Records("peers", args, ("onnx", "onnxruntime", "openvino", *pretrained.PACKAGES))
    with tempfile.TemporaryDirectory() as temporary:
        keep = (args.keep or Path(temporary)).resolve()
        bench = Bench(args.environments.resolve(), 60 * args.limit, keep)
        for name in args.nets:
            measure(handed(name, keep / name / "handed"), bench, records, args)


def measure(net: Handed, bench: Bench, records: Records, args: argparse.Namespace) -> None:
    """The rows of one network."""
    table = Table(records, "peers", COLUMNS, IMAGES[net.name])
    table.rows({"network": net.name, "peer": "float32"}, lambda: whole(net))
    for bits in args.bits:
        for peer in args.peers:
            for method in PEERS[peer]:
                shared = {"network": net.name, "peer": peer, "method": method, "bits": bits}
                run: Callable[[], Group] = functools.partial(
                    bench.outcomes, net, peer, method, bits
                )
                table.rows(shared, run)


if __name__ == "__main__":
    main()

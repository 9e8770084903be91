"""What MatMulNBits costs by width, level and zero points in onnxruntime, by width in OpenVINO.

    python benchmarks/kernels.py

One token (one row), one thread, random weights with a fixed seed; the least of 30 runs.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from common import machine

from rabbet.errors import RabbetError
from rabbet.export.decoders.blocks import joined
from rabbet.export.onnx.graph import CONTRIB, Graph
from rabbet.runtime.openvino import Compiled, openvino_known
from rabbet.runtime.session import Session

SEED = 0
RUNS = 30


def graph(rows: int, columns: int, bits: int, level: int, zeros: str) -> bytes:
    """A product with a random weight in blocks of 64, or a float one.

    zeros: none, whole or float. bits: 32 for floats.
    """
    draw = np.random.default_rng(SEED)
    made = Graph.new({"x": ("FLOAT", ("batch", columns))})
    x = made.inputs[0]
    if bits == 32:
        weight = made.constant("w", draw.standard_normal((columns, rows)).astype(np.float32))
        made.output(made.call("MatMul", x, weight, name="y"), ("batch", rows))
        return made.bytes()
    codes = joined(draw.integers(0, 2**bits, (rows, columns)).astype(float), bits)
    parts = [
        made.constant("codes", codes.reshape(rows, columns // 64, -1)),
        made.constant("scales", draw.uniform(0.01, 0.02, (rows, columns // 64)).astype(np.float32)),
    ]
    middle = np.full((rows, -(-columns // 64)), 2 ** (bits - 1) - 1)
    if zeros == "float":
        parts.append(made.constant("zeros", (middle + 0.5).astype(np.float32)))
    elif zeros == "whole":
        spare = -middle.shape[1] % (8 // bits)
        whole = np.pad(middle, ((0, 0), (0, spare))).astype(float)
        parts.append(made.constant("zeros", joined(whole, bits)))
    settings = {"K": columns, "N": rows, "bits": bits, "block_size": 64, "accuracy_level": level}
    y = made.call("MatMulNBits", x, *parts, name="y", domain=CONTRIB, **settings)
    made.output(y, ("batch", rows))
    return made.bytes()


def least(run: Callable[[], object]) -> float:
    """Milliseconds of the fastest of some runs."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=576)
    given = parser.parse_args()
    print(f"seed {SEED}, {given.columns} inputs, {given.rows} outputs; {machine()}")
    x = np.random.default_rng(SEED).standard_normal((1, given.columns)).astype(np.float32)
    for bits, level, zeros in (
        (32, 0, "none"),
        *((b, level, z) for level in (1, 4) for z in ("none", "whole", "float") for b in (2, 4, 8)),
    ):
        name = f"{bits} bits, level {level}, zero points: {zeros}"
        try:
            session = Session(graph(given.rows, given.columns, bits, level, zeros), 1)
            print(f"{name}: {least(lambda s=session: s.run({'x': x})):.3f} ms", flush=True)
        except RabbetError as e:
            print(f"{name}: refused ({str(e).splitlines()[0][-80:]})", flush=True)
    for bits in (2, 4, 8, 32) if openvino_known() else ():
        file = Compiled(graph(given.rows, given.columns, bits, 1, "whole"), 1)
        took = least(lambda f=file: f.run({"x": x}))
        size = len(graph(given.rows, given.columns, bits, 1, "whole"))
        print(f"OpenVINO, {bits} bits, inputs as floats: {took:.3f} ms, {size:,} bytes", flush=True)


if __name__ == "__main__":
    main()

"""The programs in examples/ run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    assert (tmp_path / "build" / "quickstart.safetensors").stat().st_size < 30_000

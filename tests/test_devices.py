"""The tests of `far`, in a process of their own.

torch counts devices once, when it first takes a gradient: the pretended one has to be there before,
and would be every other test's accelerator afterwards.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_that_there_is_runs_on_a_device():
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-o", "addopts=", "--strict-markers"]
    done = subprocess.run(
        [*command, Path(__file__).parent / "far"],
        env={**os.environ, "RABBET_FAR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

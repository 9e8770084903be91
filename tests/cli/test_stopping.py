"""The command line: runs that are stopped, fail half-way, go on, or work in several processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import QUICK

import rabbet
from rabbet.reconstruct import network


def _starts(*arguments, **kwargs):
    command = [sys.executable, "-m", "rabbet", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


@pytest.mark.slow
def test_a_write_that_fails_leaves_nothing_behind(run, kept, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    rename = type(path).replace

    def full(beside, there):
        if there == path:
            raise OSError(28, "No space left on device")
        return rename(beside, there)

    monkeypatch.setattr(type(path), "replace", full)
    code, out, err = run("compress", "--output", path, "--resume", kept, *QUICK)
    assert (code, out) == (2, "")
    assert "No space left" in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"old"


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_folder(run, small, tmp_path, monkeypatch):
    folder, path = tmp_path / "work", tmp_path / "a.safetensors"
    solve, solved = network.solve_site, []

    def stops(**given):
        if len(solved) == 3:
            raise KeyboardInterrupt
        solved.append((given["site"].name, given["menu"]))
        return solve(**given)

    stops.__module__, stops.__qualname__ = solve.__module__, solve.__qualname__
    monkeypatch.setattr(network, "solve_site", stops)
    code, out, err = run("compress", "--output", path, "--resume", folder, *QUICK)
    assert (code, out) == (130, "")
    assert (
        err == f"stopped; finished work is kept in {folder}: run the same command again to go on\n"
    )
    assert not path.exists()
    first = solved[:]

    def counted(**given):
        solved.append((given["site"].name, given["menu"]))
        return solve(**given)

    counted.__module__, counted.__qualname__ = solve.__module__, solve.__qualname__
    monkeypatch.setattr(network, "solve_site", counted)
    assert run("compress", "--output", path, "--resume", folder, *QUICK)[0] == 0
    # each candidate once over both runs
    assert solved[:3] == first
    assert len({name for name, _ in solved}) == 6
    assert len(set(solved)) == len(solved)
    assert path.read_bytes() == small.read_bytes()


def test_a_stop_without_a_folder_mentions_resume(run, tmp_path, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rabbet.Joint, "plan", stops)
    code, out, err = run("compress", "--output", tmp_path / "a.safetensors", *QUICK)
    assert (code, out) == (130, "")
    assert "--resume DIR" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_signal_ends_a_real_process_with_one_line(number, code, jobs, tmp_path):
    given = ("--output", tmp_path / "a.safetensors", "--resume", tmp_path / "work", "--jobs", jobs)
    # a process started in the background may have been told to ignore the signal
    listens = {
        "start_new_session": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    with _starts("compress", *given, *QUICK, **listens) as process:
        while not list(tmp_path.glob("work/*.safetensors")) and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    *told, last = err.splitlines()
    assert last.startswith("stopped; finished work is kept in ")
    assert all(" of " in line for line in told)  # how far it was, on a slow machine
    assert list(tmp_path.glob("work/*.safetensors"))


def test_a_signal_before_any_work_ends_a_command_with_its_code(run, mine, monkeypatch):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # the handler runs before this ends

    monkeypatch.setattr("rabbet.cli.inputs.open_inputs", killed)
    assert run("survey", f"{mine}:net") == (143, "", "stopped\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_ends_a_command_that_is_in_one_long_call():
    code = """
import hashlib
from rabbet.cli.ending import last_word, terminable
with terminable(), last_word("stopped there"):
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    listens = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, **listens) as process:
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.5)  # it is in the call by now
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=60) == ("", "stopped there\n")
        finally:
            process.kill()
    assert process.returncode == 130


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    given = ("--output", tmp_path / "a.safetensors", "--resume", tmp_path / "work", "--jobs", 2)
    with _starts("compress", *given, *QUICK, start_new_session=True) as process:
        while not list(tmp_path.glob("work/*.safetensors")) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        # the pipes of its output close when the last process that holds them has ended
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_what_libraries_write_to_the_descriptor_is_no_part_of_the_output():
    code = (
        "import ctypes\nfrom rabbet.cli.ending import own_output\nown_output()\n"
        "print('ours')\nctypes.CDLL(None).puts(b'stray')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("ours\n", "stray\n")


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(run, small, tmp_path):
    code, _, err = run("compress", "--output", tmp_path / "a.safetensors", "--jobs", 2, *QUICK)
    assert (code, err) == (0, "")
    assert (tmp_path / "a.safetensors").read_bytes() == small.read_bytes()


def test_a_reader_that_stops_early_is_not_an_error(small):
    with _starts("show", small) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141  # what a shell gives for SIGPIPE

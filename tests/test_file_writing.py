"""Files are written whole or not at all, whoever else writes, reads, or has planted something."""

import os
import re
import stat
import threading
from pathlib import Path

import pytest

import rabbet
from rabbet.errors import FileError
from rabbet.files import require_regular, write_whole

CONTENTS = {bytes([k]) * 300_000 for k in range(2)}


def test_readers_see_whole_files_while_several_write(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(min(CONTENTS))
    done, seen = threading.Event(), set()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    def write(content):
        for _ in range(20):
            assert write_whole(path, [content[:1000], content[1000:]]) == len(content)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(c,)) for c in (*CONTENTS, *CONTENTS)]
    reader.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert seen <= CONTENTS
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_lies_beside_the_path_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.part").symlink_to("mine")
    (tmp_path / "b.part").write_text("mine too")
    for name in ("a", "b"):
        write_whole(tmp_path / name, [b"new"])
        assert (tmp_path / name).read_bytes() == b"new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "b.part").read_text() == "mine too"


def test_a_name_that_was_foretold_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".rabbet-known.part").symlink_to("mine")
    with pytest.raises(FileError, match=r"cannot write .*exists"):
        write_whole(tmp_path / "a", [b"new"])
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / ".rabbet-known.part").is_symlink()


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "a").symlink_to("far/a")
    for content in (b"first", b"second"):
        write_whole(tmp_path / "a", [content])
        assert (tmp_path / "far" / "a").read_bytes() == content
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "a pipe"),
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("/dev/null"), "a device"),
    ],
)
def test_what_is_no_file_is_refused_and_stays(make, what, tmp_path):
    path = tmp_path / "a.safetensors"
    make(path)
    before = path.stat()
    for refuse in (require_regular, lambda p: write_whole(p, [b"new"])):
        with pytest.raises(FileError, match=rf"cannot write .*{what} lies there"):
            refuse(path)
    assert path.stat().st_mode == before.st_mode
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("old", "mask", "mode"), [(0o640, 0o022, 0o640), (None, 0o027, 0o640)])
def test_a_file_keeps_its_mode_and_a_new_one_goes_by_the_umask(old, mask, mode, tmp_path):
    path = tmp_path / "a"
    if old is not None:
        path.touch()
        path.chmod(old)
    before = os.umask(mask)
    try:
        write_whole(path, [b"new"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def parts():
        yield b"half"
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileError, match="No space left"):
        write_whole(tmp_path / "a", parts())
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_nothing_else_in_the_source_writes_a_file():
    writes = r"write_bytes|write_text|save_file|savefig\(path|open\([\"'][wax]"
    source = Path(rabbet.__file__).parent
    for path in source.rglob("*.py"):
        lines = [x for x in path.read_text().splitlines() if re.search(writes, x)]
        assert not lines or path.name == "files.py", f"{path}: {lines}"

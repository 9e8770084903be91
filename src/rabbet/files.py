"""How every file is written here: whole or not at all, whoever else writes, reads or plants links.

The content goes into a new file beside the path, under a name that nobody can foretell, and takes
the path's place by one rename. So a reader sees the old file or the new one, several writers do not
meet, and no file but the path itself is touched.
"""

import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from rabbet.errors import FileError


def path_of(path: str | Path) -> Path:
    """A path as it was given. Raises FileError for what none can be."""
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise FileError(f"a path is a text such as 'result.safetensors'; found {path!r}")
    return Path(path)


def write_whole(path: Path, parts: Iterable[bytes]) -> int:
    """Write a whole file or nothing; returns the bytes written.

    A file that is there keeps its mode, a new one gets what the umask allows. A link is followed,
    as any program would. Raises FileError for a place that cannot be written, or where something
    lies that is no regular file.
    """
    place, old = _destination(path)
    beside = place.with_name(f".rabbet-{secrets.token_hex(8)}.part")
    size, created = 0, False
    try:
        with beside.open("xb") as file:  # exclusively: what lies there is not opened, nor a link
            created = True
            if old is not None:  # before a secret is in it
                beside.chmod(stat.S_IMODE(old.st_mode))
            for part in parts:
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave the name with an empty file
        beside.replace(place)
        created = False
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        if created:
            beside.unlink(missing_ok=True)
    return size


def require_regular(path: Path) -> None:
    """Refuse a path that could not be written because something else than a file lies there.

    Raises FileError for a pipe, a device, a socket or a folder.
    """
    _destination(path)


def _destination(path: Path) -> tuple[Path, os.stat_result | None]:
    """Where a file of this path lies behind all links, and what is known of it if it is there."""
    try:
        place = path.resolve() if path.is_symlink() else path
        old = place.stat()
    except FileNotFoundError:
        return place, None
    except (OSError, RuntimeError) as e:  # links that lead round in a circle, a folder that is none
        raise FileError(f"cannot write {path}: {e}") from e
    if not stat.S_ISREG(old.st_mode):
        raise FileError(
            f"cannot write {path}: {_kind(old.st_mode)} lies there, not a file; name another path"
        )
    return place, old


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def scratch(folder: Path, content: bytes | memoryview) -> Path:
    """A file in a temporary folder of this process, which nobody else reads; gives its path.

    Raises FileError if there is no room for it.
    """
    path = folder / secrets.token_hex(8)
    try:
        with path.open("xb") as file:
            file.write(content)
    except OSError as e:
        raise FileError(f"cannot keep what memory has no room for in {folder}: {e}") from e
    return path

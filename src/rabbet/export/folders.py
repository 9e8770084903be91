"""Native files in a folder: one, or several that share the layers of a network."""

import re
from pathlib import Path

from rabbet.errors import FileError

NATIVE = "rabbet.safetensors"


def native_paths(path: Path) -> list[Path]:
    """The path of a native file, or those in a folder; FileError for a folder without any."""
    found = native_files(path) if path.is_dir() else [path]
    if not found:
        raise FileError(
            f"{path} is a folder without a native file ({NATIVE}, or rabbet-00001-of-... and so on)"
        )
    return found


def native_files(folder: Path) -> list[Path]:
    """The native file of a folder, or all of them in order; none in a folder of a float network.

    Raises FileError if some of several are missing, or there are those of several networks.
    """
    found = earlier_files(folder)
    if not found:
        return []
    single = found[0].name == NATIVE
    names = native_names(1 if single else _count(found[0]))
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise FileError(f"{folder} lacks {', '.join(lost[:3])}")
    other = next((path.name for path in found if path.name not in names), None)
    if other is not None:
        raise FileError(
            f"{folder} holds files of two networks, {names[0]} and {other}: remove those of one"
        )
    return [folder / name for name in names]


def native_names(count: int) -> list[str]:
    """What the files of a folder are called that hold a compressed network."""
    if count == 1:
        return [NATIVE]
    return [f"rabbet-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]


def earlier_files(folder: Path) -> list[Path]:
    """The files of compressed networks that lie in a folder, whichever run wrote them."""
    single = folder / NATIVE
    several = sorted(folder.glob("rabbet-*-of-*.safetensors"))
    return [single, *several] if single.is_file() else several


def _count(path: Path) -> int:
    """How many files a folder holds, by the name of one of them."""
    found = re.fullmatch(r"rabbet-\d{5}-of-(\d{5})", path.stem)
    if found is None:
        raise FileError(f"{path} is not named as the files of a compressed network are")
    return int(found[1])

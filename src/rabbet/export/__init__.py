"""Files: each export is `(result, path) -> bytes written`. A new one is a file here and a line in EXPORTS."""

from rabbet.export.base import Export
from rabbet.export.native import write_native

EXPORTS: dict[str, Export] = {
    "safetensors": write_native,
}

__all__ = ["EXPORTS", "Export"]

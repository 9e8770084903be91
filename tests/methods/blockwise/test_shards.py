"""Tensors of a folder of safetensors, read one by one."""

import pytest
import torch
from safetensors.torch import save_file

from rabbet.core.layout import TYPES
from rabbet.errors import FileError
from rabbet.methods.blockwise.folder import SINGLE, Shards


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    save_file({"weight": torch.ones(40, 3)}, tmp_path / SINGLE)
    shards = Shards(tmp_path)
    assert torch.equal(shards["weight"], torch.ones(40, 3))
    content = shards.paths[0].read_bytes()
    shards.paths[0].unlink()
    with pytest.raises(FileError, match="cannot be read any more"):
        shards["weight"]
    shards.paths[0].write_bytes(content)
    with pytest.raises(FileError, match="was changed while it was read"):
        shards["weight"]


@pytest.mark.parametrize("kind", list(TYPES.values()))
def test_a_tensor_of_any_type_is_read_as_the_library_reads_it(tmp_path, kind):
    made = {"a": torch.ones(0, 3), "b": torch.tensor(1.0), "c": torch.arange(-3, 9).view(3, 4)}
    made = {name: tensor.to(kind) for name, tensor in made.items()}
    save_file(made, tmp_path / SINGLE)
    shards = Shards(tmp_path)
    for name, tensor in made.items():
        assert shards[name].dtype == kind
        assert torch.equal(shards[name], tensor)
        assert shards.shape(name) == [*tensor.shape]


@pytest.mark.parametrize("cut", [0, 7, 30, 200, -1])
def test_a_damaged_file_is_told(tmp_path, cut):
    save_file({"weight": torch.ones(40, 3)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:cut])
    with pytest.raises(FileError, match="safetensors cannot be read"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "cannot be read"),
        (b"[1]", "cannot be read"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "not all there"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "not all there"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "not all there"),
        (b'{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}', "cannot be read"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_a_header_that_lies_is_told(tmp_path, header, said):
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(FileError, match=said):
        Shards(tmp_path)

"""The bytes of the native file, pinned: docs/format.md is a promise to files that exist."""

import hashlib
import json
import re
import zlib

import torch
from torch import nn

from rabbet import Plan, Task, load, survey
from rabbet.core.layout import TYPE_NAMES
from rabbet.export.base import Parcel
from rabbet.export.writing import write_native
from rabbet.grids.grid import Grid, Quantised
from rabbet.model.bn_fold import fold
from rabbet.model.build import build
from rabbet.model.compressed import compressed_layers
from rabbet.workpiece import rest_of


def _ramp(*shape: int, step: float = 1 / 16) -> torch.Tensor:
    """Fixed numbers, exact in float32."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7) % 31 - 15).float().view(shape) * step


def _written(model, batch, text, numbers, ranges, path):
    """The bytes of a file with every number given, so that no solver or rounding takes part."""
    surveyed, plan = survey(model, [batch]), Plan.parse(text)
    student = build(model, plan, surveyed, numbers)
    for layer in compressed_layers(student).values():
        for act, (scale, zero) in zip(layer.quantisers, ranges, strict=False):
            act.set_range(torch.tensor(scale), torch.tensor(float(zero)))
    types = {name: TYPE_NAMES[t.dtype] for name, t in model.state_dict().items()}
    rest = rest_of(fold(model, surveyed), surveyed, plan, types)
    parcel = Parcel(student, plan, surveyed, rest, Task([batch]))
    assert write_native(parcel, path).bytes == path.stat().st_size
    return path.read_bytes()


def _framed(text):
    text = text.rstrip(b" ")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stamped(header, values):
    """A file with its checksum, computed as docs/format.md says."""
    zeros = header.replace(b"CHECKSUM", b"00000000") + values
    return header.replace(b"CHECKSUM", b"%08x" % zlib.crc32(zeros)) + values


def _older(data):
    """The file as it was written before there were checksums."""
    size = int.from_bytes(data[:8], "little")
    text = data[8:34] + data[44 : 8 + size]
    return _framed(text.replace(b'"crc32":"', b"", 1)) + data[8 + size :]


def _without_reasons(data):
    """Why layers are left alone is said in words, for people; they may change."""
    size = int.from_bytes(data[:8], "little")
    left = rb'(\[\\"[a-z.]*\\",)\\"[^"\\]*\\"(,\d+\])'
    return _framed(re.sub(left, rb"\1\2", data[8 : 8 + size])) + data[8 + size :]


def test_the_bytes_of_a_very_small_file_are_these(tmp_path):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(_ramp(2, 3))
        model.bias.copy_(torch.tensor([1.0, -2.0]))
    codes = torch.tensor([[-4.0, 3.0, 0.0], [1.0, -1.0, 2.0]])
    numbers = {"": [[Quantised(Grid.parse("3c"), codes, torch.tensor([0.5, -0.25]))]]}
    data = _written(
        model, torch.zeros(1, 3), '"" dense@3c | act@8', numbers, [(0.125, 7)], tmp_path / "f"
    )
    header = (
        b'{"__metadata__":{"crc32":"CHECKSUM","format":"rabbet/1","plan":"\\"\\" dense@3c | act@8",'
        b'"survey":"{\\"float_bytes\\":32,\\"sites\\":[[\\"\\",\\"linear\\",[2,3],1,1,{}]]}"},'
        b'"rabbet.biases":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"rabbet.act_scales":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},'
        b'"rabbet.scales":{"dtype":"BF16","shape":[2],"data_offsets":[12,16]},'
        b'"rabbet.act_zeros":{"dtype":"U8","shape":[1],"data_offsets":[16,17]},'
        b'"rabbet.codes":{"dtype":"U8","shape":[3],"data_offsets":[17,20]}}'
    )
    # stored codes 0 7 4 | 5 3 6, three bits each, lowest first
    stream = 0 | 7 << 3 | 4 << 6 | 5 << 9 | 3 << 12 | 6 << 15
    values = (
        b"\x00\x00\x80\x3f\x00\x00\x00\xc0"  # biases 1.0, -2.0
        b"\x00\x00\x00\x3e"  # input scale 0.125
        b"\x00\x3f\x80\xbe"  # scales 0.5, -0.25
        b"\x07"  # zero point
    ) + stream.to_bytes(3, "little")
    assert data == _stamped(_framed(header), values)
    for content in (data, _framed(header.replace(b'"crc32":"CHECKSUM",', b"")) + values):
        (tmp_path / "f").write_bytes(content)
        again = load(tmp_path / "f", nn.Linear(3, 2))
        assert again.canonical.tolist() == [[-2.0, 1.5, 0.0], [-0.25, 0.25, -0.5]]
        # x = 1, 0.06, 100 on steps of 1/8 around 7, 8 bits: 1, 0, 31 = (255 - 7) / 8
        outputs = again(torch.tensor([[1.0, 0.06, 100.0]])).tolist()
        assert outputs == [[-2.0 + 1.0, -0.25 - 15.5 - 2.0]]


class Every(nn.Module):
    """One thing of every kind that the format knows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2, bias=False)
        self.bn = nn.BatchNorm1d(4)
        self.mix = nn.Conv1d(4, 6, 2, stride=2, dilation=2)
        self.fc = nn.Linear(6, 3)
        self.again = self.fc
        self.norm = nn.LayerNorm(3, dtype=torch.float64)
        self.gain = nn.Parameter(_ramp(3).to(torch.bfloat16))

    def forward(self, x):
        y = self.mix(torch.relu(self.bn(self.conv(self.table(x).mT)))).mT
        return self.fc(y) + self.again(y + 1) * self.gain.float()


def test_a_file_with_a_thing_of_every_kind_has_these_bytes(tmp_path):
    model = Every().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(_ramp(*p.shape))
        model.bn.weight.fill_(0.5)
        model.bn.running_mean.fill_(0.25)
        model.bn.running_var.copy_(torch.tensor([0.25, 1.0, 4.0, 0.0625]) - model.bn.eps)
    text = (
        "table dense@tc\nmix dense@2hc + lowrank[2]@8c | act@6\nfc lowrank[1]@5 + dense@1c1 | act@6"
    )

    def numbers(text, *shape):
        grid = Grid.parse(text)
        codes = (_ramp(*shape, step=1.0) % grid.levels + grid.low).clamp(grid.low, grid.high)
        return Quantised(grid, codes, _ramp(*grid.scale_shape(shape)) + 2)

    given = {
        "table": [[numbers("tc", 5, 4)]],
        "mix": [[numbers("2hc", 6, 4, 2)], [numbers("8c", 2, 4, 2), numbers("8c", 6, 2)]],
        "fc": [[numbers("5", 1, 6), numbers("5", 3, 1)], [numbers("1c1", 3, 6)]],
    }
    data = _written(
        model, torch.arange(5)[None], text, given, [(0.5, 3), (0.25, 60)], tmp_path / "f"
    )
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    kinds = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert kinds == {
        "norm.bias": "F64", "norm.weight": "F64", "conv.bias": "F32", "conv.weight": "F32",
        "gain": "BF16", "rabbet.biases": "F32", "rabbet.act_scales": "F32",
        "rabbet.scales": "BF16", "rabbet.act_zeros": "U8", "rabbet.codes": "U8",
    }  # fmt: skip
    assert hashlib.sha256(data[8 + size :]).hexdigest() == VALUES
    assert hashlib.sha256(_without_reasons(_older(data))).hexdigest() == WHOLE
    (tmp_path / "older").write_bytes(_older(data))
    states = []
    for name in ("f", "older"):
        again = load(tmp_path / name, Every())
        assert again.fc is again.again
        states.append(again.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert data[34:42] == b"%08x" % zlib.crc32(data[:34] + b"00000000" + data[42:])


# Another hash means that existing files can no longer be read: change the version, not this.
VALUES = "5c36142ec691e64e17a04f40f73f8c0e764b04a15cd32805d809a39b63c4550d"
WHOLE = "50a74c3123bf2674cbefb9e0a3809368589461ee1e5620311616f9f3a995bd79"

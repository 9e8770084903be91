"""Files that are damaged, forged, or of another network: one FileError each, nothing else."""

import itertools
import json
import struct

import pytest
import torch
from networks import NETWORKS, network, rand, settled
from torch import nn

from rabbet import Joint, Task, compress, fit, load
from rabbet.errors import FileError
from rabbet.export.native import read_parts
from rabbet.train.tuning import Tuning

NASTY = (
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    1e999,
    float("nan"),
    "",
    "x",
    "0",
    "\u0000",
    [],
    [0],
    [-1] * 4,
    [[]],
    {},
    {"a": 1},
)


class Small(nn.Module):
    """All that a file can hold: a folded norm, an adapter, ternary and binary codes, the rest."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect", bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        self.free = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)

    def forward(self, x):
        return self.norm(
            self.free(torch.relu(self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))))
        )


PLAN = "conv dense@2hc + lowrank[2]@8c | act@4\nfc dense@tc + dense@1 | act@8"


def _model(seed=0):
    return settled(Small(), seed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "whole.safetensors"
    fit(_model(), PLAN, [rand(4, 2, 8, 8)], Joint(tuning=Tuning(steps=0))).save(path)
    return path.read_bytes()


def _refused(path, data, model=None):
    """Whether a file is refused. If not, it must load and run; another exception is a failure."""
    path.write_bytes(data)
    try:
        loaded = load(path, model or _model())
    except FileError as e:
        assert str(path) in str(e)  # noqa: PT017
        assert "\n" not in str(e).replace(PLAN, "")  # noqa: PT017
        return True
    with torch.no_grad():
        loaded(rand(2, 2, 8, 8))
    return False


def _parts(data):
    """Header, and values, of the file as it would have been written before there were checksums.

    What is changed in such a file meets the checks that lie behind the checksum.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].pop("crc32", None)
    return header, data[8 + size :]


def _joined(header, values):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + values


def _with_survey(data, change):
    header, values = _parts(data)
    survey = json.loads(header["__metadata__"]["survey"])
    change(survey)
    header["__metadata__"]["survey"] = json.dumps(survey)
    return _joined(header, values)


def test_the_whole_file_loads(whole, tmp_path):
    assert not _refused(tmp_path / "f", whole)
    header, values = _parts(whole)
    assert not _refused(tmp_path / "f", _joined(header, values))  # whatever the spacing of its JSON
    assert not _refused(tmp_path / "f", _with_survey(whole, lambda _: None))


def test_a_file_that_ends_early_is_refused_wherever_it_ends(whole, tmp_path):
    near = range(len(whole) - 40, len(whole))
    for length in {*range(0, len(whole), 13), *range(20), *near}:
        assert _refused(tmp_path / "f", whole[:length]), length


def test_a_file_with_more_behind_it_is_refused(whole, tmp_path):
    for more in (b"\0", b"\0" * 8, whole):
        assert _refused(tmp_path / "f", whole + more)


def _flipped(data, at, mask):
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def test_every_flipped_bit_is_refused_wherever_it_lies(whole, tmp_path):
    path = tmp_path / "f"
    everywhere = {(at, at % 8) for at in range(len(whole))}
    for at, bit in everywhere | set(itertools.product(range(64), range(8))):
        path.write_bytes(_flipped(whole, at, 1 << bit))
        with pytest.raises(FileError):
            read_parts(path)


def test_values_that_change_places_are_refused(whole, tmp_path):
    first = 8 + int.from_bytes(whole[:8], "little")
    swapped = bytearray(whole)
    at = next(k for k in range(first, len(whole) - 4) if whole[k] != whole[k + 4])
    swapped[at], swapped[at + 4] = whole[at + 4], whole[at]
    assert _refused(tmp_path / "f", bytes(swapped))


def test_a_checksum_that_is_away_from_its_place_or_lies_beside_others_is_refused(whole, tmp_path):
    header, values = _parts(whole)
    facts = header["__metadata__"]
    own = whole[34:42].decode()
    for metadata in (
        {**facts, "crc32": own},
        {"crc32": own, **facts},
        {"crc32": own.upper(), **facts},
        {"crc32": "", **facts},
        {"crc33": own, **facts},
        {**facts, "more": ""},
    ):
        assert _refused(tmp_path / "f", _joined({**header, "__metadata__": metadata}, values))


def test_the_same_header_written_in_another_way_is_refused(whole, tmp_path):
    size = int.from_bytes(whole[:8], "little")
    text = json.dumps(json.loads(whole[8 : 8 + size])).encode()
    assert _refused(tmp_path / "f", _joined(text, whole[8 + size :]))


@pytest.mark.parametrize("mask", [0x01, 0x04, 0x10, 0x80])
@pytest.mark.slow
def test_no_flipped_bit_of_the_header_leads_to_another_error(whole, mask, tmp_path):
    data = _joined(*_parts(whole))
    size = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for at in range(size):
        refused += _refused(tmp_path / "f", _flipped(data, at, mask))
    # the rest are names, reasons and counts that a network cannot contradict
    assert refused > 0.6 * size


def test_no_flipped_bit_of_the_values_leads_to_another_error(whole, tmp_path):
    data = _joined(*_parts(whole))
    for at in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        _refused(tmp_path / "f", _flipped(data, at, 0x80))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}q\x00.",
        _joined({}, b""),
        _joined({"__metadata__": {}}, b""),
        _joined({"__metadata__": {"format": "pt"}}, b""),
        _joined({"__metadata__": {"format": "rabbet/2"}}, b""),
        _joined({"__metadata__": {"format": "rabbet/1"}}, b""),
        _joined({"__metadata__": {"format": "rabbet/1", "plan": "", "survey": ""}}, b""),
        _joined(
            {"__metadata__": {"format": "rabbet/1", "plan": "x dense@4c", "survey": "{}"}}, b""
        ),
        _joined(
            {"__metadata__": {"format": "rabbet/1", "plan": "x dense@4c", "survey": "[" * 10**5}},
            b"",
        ),
        _joined(
            {
                "__metadata__": {
                    "format": "rabbet/1",
                    "plan": "x",
                    "survey": '{"sites": [], "float_bytes": 1}',
                }
            },
            b"",
        ),
        _joined(b"[" * 10**5, b""),
        struct.pack("<Q", 2**63) + b"{}",
    ],
)
def test_what_is_not_a_file_of_rabbet_is_refused(data, tmp_path):
    assert _refused(tmp_path / "f", data)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileError, match="no file"):
        load(tmp_path / "nothing", _model())
    with pytest.raises(FileError):
        load(tmp_path, _model())


def _leaves(value, path=()):
    """The path of every value inside a JSON document, containers included."""
    yield path
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in inside:
        yield from _leaves(part, (*path, key))


def _put(document, path, value):
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def test_no_forged_survey_leads_to_another_error(whole, tmp_path):
    survey = json.loads(_parts(whole)[0]["__metadata__"]["survey"])
    paths = [p for p in _leaves(survey) if p]
    assert len(paths) > 30
    for path, value in itertools.product(paths, NASTY):
        _refused(tmp_path / "f", _with_survey(whole, lambda s, p=path, v=value: _put(s, p, v)))


@pytest.mark.parametrize(
    "key",
    [
        "stride",
        "pads",
        "padding_mode",
        "dilation",
        "groups",
        "bias",
        "calls",
        "tied",
        "norm",
        "heads",
        "head_positions",
        "odd",
    ],
)
def test_no_forged_fact_of_a_layer_leads_to_another_error(whole, key, tmp_path):
    for site, value in itertools.product(
        range(3), (*NASTY, "conv", ["conv"], ["fc"], "fc", "free", "norm", "bn", 2)
    ):
        _refused(
            tmp_path / "f",
            _with_survey(whole, lambda s, i=site, v=value: s["sites"][i][5].__setitem__(key, v)),
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stride", [1, 1]),
        ("pads", [0, 0, 0, 0]),
        ("padding_mode", "zeros"),
        ("dilation", [2, 2]),
        ("groups", 2),
        ("norm", "norm"),
        ("norm", "free"),
        ("tied", ["free"]),
        ("tied", ["nowhere"]),
        ("heads", ["fc"]),
    ],
)
def test_facts_that_the_network_contradicts_are_refused(whole, key, value, tmp_path):
    assert _refused(
        tmp_path / "f", _with_survey(whole, lambda s: s["sites"][0][5].__setitem__(key, value))
    )


def test_a_kind_that_the_network_contradicts_is_refused(whole, tmp_path):
    for site, kind in itertools.product(
        range(3), ("conv1d", "conv2d", "linear", "transposed linear", "embedding", "gru")
    ):
        data = _with_survey(whole, lambda s, i=site, k=kind: s["sites"][i].__setitem__(1, k))
        assert _refused(tmp_path / "f", data) == (kind != ("conv2d", "linear", "linear")[site])


@pytest.mark.parametrize(
    "plan",
    [
        "",
        "conv dense@2hc",
        PLAN.replace("[2]", "[3]"),
        PLAN.replace("[2]", "[99999999]"),
        PLAN.replace("[2]", "[" + "9" * 5000 + "]"),
        PLAN.replace("2hc", "3c"),
        PLAN.replace("2hc", "2hc9"),
        PLAN.replace("tc", "1c"),
        PLAN.replace("act@4", "act@9"),
        PLAN.replace(" | act@4", ""),
        PLAN.replace("fc", "free"),
        PLAN.replace("fc", "nowhere"),
        PLAN.replace("fc", "conv"),
        PLAN.replace("dense", "sparse"),
        PLAN + "\nfree dense@4c",
        "\x00",
        "😀 dense@4c",
    ],
)
def test_a_plan_that_the_numbers_contradict_is_refused(whole, plan, tmp_path):
    header, values = _parts(whole)
    header["__metadata__"]["plan"] = plan
    assert _refused(tmp_path / "f", _joined(header, values))


ARRAYS = ("rabbet.biases", "rabbet.act_scales", "rabbet.scales", "rabbet.act_zeros", "rabbet.codes")


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_is_missing_renamed_reshaped_or_of_another_type_is_refused(
    whole, name, tmp_path
):
    header, values = _parts(whole)
    assert name in header
    entry = header[name]

    def with_entry(change):
        changed = {k: dict(v) for k, v in header.items()}
        change(changed)
        return _joined(changed, values)

    assert _refused(tmp_path / "f", with_entry(lambda h: h.pop(name)))
    assert _refused(tmp_path / "f", with_entry(lambda h: h.__setitem__("other", h.pop(name))))
    assert _refused(
        tmp_path / "f", with_entry(lambda h: h[name].update(shape=[1, *entry["shape"]]))
    )
    assert _refused(tmp_path / "f", with_entry(lambda h: h[name].update(shape=[])))
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    widths = {
        "F64": 8,
        "F32": 4,
        "I32": 4,
        "F16": 2,
        "BF16": 2,
        "I16": 2,
        "U8": 1,
        "I8": 1,
        "BOOL": 1,
        "F8_E4M3": 1,
    }
    for dtype, width in widths.items():
        if dtype != entry["dtype"] and size % width == 0:
            data = with_entry(
                lambda h, d=dtype, w=width: h[name].update(dtype=d, shape=[size // w])
            )
            assert _refused(tmp_path / "f", data), dtype


def _overwritten(data, name, at, raw):
    header, values = _parts(data)
    data = _joined(header, values)
    start = 8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0] + at
    return data[:start] + raw + data[start + len(raw) :]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
def test_an_input_scale_that_is_no_positive_number_is_refused(whole, value, tmp_path):
    assert _refused(
        tmp_path / "f", _overwritten(whole, "rabbet.act_scales", 0, struct.pack("<f", value))
    )


@pytest.mark.parametrize("raw", [b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"])
def test_a_weight_scale_that_is_not_finite_is_refused(whole, raw, tmp_path):
    for at in (0, 2, 18):
        assert _refused(tmp_path / "f", _overwritten(whole, "rabbet.scales", at, raw))


@pytest.mark.parametrize("raw", [b"\x7f\x7f", b"\x7f\xff"])
def test_a_weight_scale_that_no_code_can_be_multiplied_with_is_refused(whole, raw, tmp_path):
    assert _refused(tmp_path / "f", _overwritten(whole, "rabbet.scales", 0, raw))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_that_is_not_finite_is_refused(whole, value, tmp_path):
    raw = struct.pack("<f", value)
    assert _refused(tmp_path / "f", _overwritten(whole, "rabbet.biases", 4, raw))


def test_a_zero_point_that_the_bits_do_not_have_is_refused(whole, tmp_path):
    assert _refused(tmp_path / "f", _overwritten(whole, "rabbet.act_zeros", 0, b"\x10"))  # act@4


def test_something_behind_the_last_code_is_refused(whole, tmp_path):
    # fc: 12 ternary codes in 3 bytes, three digits spare; then 12 of one bit, four bits spare
    count = _parts(whole)[0]["rabbet.codes"]["shape"][0]
    assert _refused(tmp_path / "f", _overwritten(whole, "rabbet.codes", count - 1, b"\xf0"))
    assert _refused(tmp_path / "f", _overwritten(whole, "rabbet.codes", count - 3, b"\xf2"))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_another_network_is_refused(name, whole, tmp_path):
    assert _refused(tmp_path / "f", whole, network(name).model)


def test_a_file_of_the_same_layers_in_other_sizes_is_refused(tmp_path):
    batch = [rand(4, 6)]
    tight = Joint(grids=("4c",), adapters=(), tuning=Tuning(steps=0))
    compress(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).eval(), "bits <= 5", batch, tight
    ).save(tmp_path / "f")
    for other in (
        nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)),
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(6, 5)),
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(6, 5), nn.Bilinear(5, 5, 3)),
        nn.Linear(6, 5),
        nn.ReLU(),
    ):
        with pytest.raises(FileError, match="another network"):
            load(tmp_path / "f", other)


def test_a_layer_whose_bias_only_one_side_has_is_refused(tmp_path):
    tight = Joint(grids=("4c",), adapters=(), tuning=Tuning(steps=0))
    for ours, theirs in itertools.permutations((True, False)):
        model = nn.Sequential(nn.Linear(6, 5, bias=ours), nn.Linear(5, 3)).eval()
        compress(model, "bits <= 5", [rand(4, 6)], tight).save(tmp_path / "f")
        with pytest.raises(FileError, match="another network"):
            load(tmp_path / "f", nn.Sequential(nn.Linear(6, 5, bias=theirs), nn.Linear(5, 3)))


def test_loading_does_not_touch_the_network_that_gives_the_code(whole, tmp_path):
    (tmp_path / "f").write_bytes(whole)
    model = _model(seed=3).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = load(tmp_path / "f", model)
    assert model.training
    assert not any(m.training for m in loaded.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_numbers_come_from_the_file_whatever_the_network_holds(whole, tmp_path):
    (tmp_path / "f").write_bytes(whole)
    a, b = (load(tmp_path / "f", _model(seed)).state_dict() for seed in (0, 5))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    result = fit(_model(), PLAN, [rand(4, 2, 8, 8)], Joint(tuning=Tuning(steps=0)))
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        result.save(tmp_path / "file" / "f")
    with pytest.raises(FileError):
        result.save(tmp_path / "taken")
    with pytest.raises(FileError, match="safetensors"):
        result.export(tmp_path / "f.onnxx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_a_file_is_replaced_whole(whole, tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    fit(_model(), PLAN, [rand(4, 2, 8, 8)], Joint(tuning=Tuning(steps=0))).save(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_data_of_a_task_is_not_needed_to_load(whole, tmp_path):
    (tmp_path / "f").write_bytes(whole)
    with torch.no_grad():
        assert Task(()).run(load(tmp_path / "f", _model()), rand(1, 2, 8, 8)).shape == (1, 2)

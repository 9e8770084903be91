"""Floats as a grid: any form, to the byte and to the bit, in files, exports and training."""

import math
import zlib

import pytest
import torch
from networks import lasting, rand, settled
from torch import nn

import rabbet
from rabbet.core.cost import layer_cost
from rabbet.core.plan import LayerPlan
from rabbet.errors import FileError, PlanError
from rabbet.grids.codebook import Float
from rabbet.grids.grid import Grid, Quantised
from rabbet.layers import Site
from rabbet.layers.linear import Linear
from rabbet.runtime.session import Session
from rabbet.train.qat import Latent, rounded_together
from rabbet.train.tuning import Tuning

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DATA = [rand(8, 3, 8, 8, seed=k) for k in range(3)]


def _net():
    return settled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 24),
        )
    )  # fmt: skip


@pytest.mark.parametrize("text", TYPES)
def test_a_float_grid_is_its_text_and_its_points_are_the_numbers_of_the_type(text):
    grid, x = Grid.parse(text), rand(5, 7) * torch.logspace(-6, 3, 7)
    assert str(grid) == text
    assert grid.bits == 8 * TYPES[text].itemsize
    q = Quantised.nearest(x, grid)
    assert q.scale.tolist() == [1.0]
    assert torch.equal(q.values, x.to(TYPES[text]).float())
    assert torch.equal(grid.refit(x, q.codes, q.scale), q.scale)
    assert torch.equal(grid.minmax(x), q.scale)


def test_what_is_beyond_the_largest_number_is_that_one():
    x = torch.tensor([1e6, -1e6, 1.0])
    assert Quantised.nearest(x, Grid.parse("f16")).values.tolist() == [65504, -65504, 1]


@pytest.mark.parametrize("text", TYPES)
@pytest.mark.parametrize("offset", range(4))
def test_packed_floats_are_read_wherever_they_begin(text, offset):
    book = Grid.parse(text).codebook
    codes = book.encode(rand(13))
    packed = book.pack(codes)
    assert packed.numel() == book.packed_bytes(13) == 13 * TYPES[text].itemsize
    within = torch.cat([torch.zeros(offset, dtype=torch.uint8), packed])[offset:]
    assert torch.equal(book.unpack(within, 13), codes)
    with pytest.raises(ValueError, match="take"):
        book.unpack(packed, 12)
    with pytest.raises(ValueError, match="not finite"):
        book.pack(codes / 0)
    with pytest.raises(ValueError, match="not finite"):
        book.unpack(torch.full_like(packed, 255), 13)


@pytest.mark.parametrize("text", ["f32c", "f16c1", "bf16g64", "f32g8z"])
def test_floats_need_no_scales_of_their_own(text):
    with pytest.raises(PlanError, match=r"exponent of its own|equal distances"):
        Grid.parse(text)


@pytest.mark.parametrize("text", ["f8", "bf32", "f64", "f", "bf", "f3", "F32"])
def test_other_floats_are_no_grids(text):
    with pytest.raises(PlanError, match="is not a grid"):
        Grid.parse(text)


def test_a_float_of_eight_bits_does_not_exist():
    with pytest.raises(PlanError, match="use f32, f16 or bf16"):
        Float(8)


@pytest.mark.parametrize(("text", "bits"), [("f32", 32), ("f16", 16)])
@pytest.mark.parametrize("form", ["dense", "lowrank[4]", "tt[4]"])
def test_floats_cost_their_bits_and_bit_operations(text, bits, form):
    site = Site("x", Linear(), (24, 30), positions=2)
    cost = layer_cost(site, LayerPlan.parse(f"x {form}@{text}"))
    shapes = LayerPlan.parse(f"x {form}@4").terms[0].form.shapes(site)
    entries = sum(math.prod(shape) for shape in shapes)
    assert cost.code_bits == bits * entries
    # cores are contracted to float32
    assert cost.bops == (32 if form == "tt[4]" else bits) * 32 * cost.macs


PLANS = {
    "floats": "0 dense@f32\n3 cp[8]@f32\n6 tt[6]@f32\n8 lowrank[6]@f32",
    "types": "0 dense@f16\n3 tucker[4]@bf16\n6 tt[6]@f16\n8 dense[0-11]@f32 + dense[12-23]@f16",
    "8-bit inputs": "0 dense@f16 | act@8\n6 tt[6]@f16 | act@8\n8 dense@4c + lowrank[6]@f32 | act@8",
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_any_form_may_be_of_floats_from_the_plan_to_the_file_and_an_export(name, tmp_path):
    model, plan = _net(), PLANS[name]
    result = rabbet.fit(model, plan, DATA, quality="fast")
    assert [str(line) for line in result.plan] == plan.split("\n")
    assert result.save(tmp_path / "a.safetensors") == result.cost.bytes
    again = rabbet.load(tmp_path / "a.safetensors", model)
    answer = result.model(DATA[0])
    assert torch.equal(again(DATA[0]), answer)
    for a, b in zip(result.model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    written = result.export(tmp_path / "a.onnx")
    apart = (Session(tmp_path / "a.onnx")(DATA[0]) - answer).norm() / answer.norm()
    assert apart < (0.03 if "act" in plan else 1e-5)
    why = "its weight is a float" if "act" in plan else "its plan has no act"
    assert all(note.endswith(why) for note in lasting(written.notes) if "runs in float" in note)


class _Words(nn.Module):
    """A table with a head, an LSTM, whose weights are stored, and a transposed conv."""

    def __init__(self):
        super().__init__()
        self.table, self.recurrent = nn.Embedding(40, 16), nn.LSTM(16, 16, batch_first=True)
        self.wider, self.head = nn.ConvTranspose1d(16, 16, 4, 2), nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        hidden = self.recurrent(self.table(ids))[0].transpose(1, 2)
        return self.head(self.wider(hidden).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["dense@f16", "ttm[6]@bf16"])
def test_tables_stored_weights_and_both_runtimes_take_floats(table, tmp_path):
    torch.manual_seed(0)
    model, words = _Words().eval(), [torch.randint(40, (4, 7)) for _ in range(3)]
    stored = "\n".join(f"recurrent.weight_{k}h_l0 dense@f32" for k in "ih")
    plan = f"table {table}\n{stored}\nwider lowrank[6]@f16"
    result = rabbet.fit(model, plan, words, quality="fast")
    assert result.save(tmp_path / "a.safetensors") == result.cost.bytes
    answer = result.model(words[0])
    assert torch.equal(rabbet.load(tmp_path / "a.safetensors", model)(words[0]), answer)
    assert result.export(tmp_path / "a.onnx").error < 1e-5
    pytest.importorskip("openvino")
    assert result.export(tmp_path / "b.onnx", "openvino").error < 1e-5


def test_dense_float32_is_the_weight_to_the_bit():
    model = _net()
    result = rabbet.fit(model, "6 dense@f32\n8 dense@f32", DATA, quality="fast")
    assert torch.equal(result.model[6].weight, model[6].weight)
    assert torch.equal(result.model[8].weight, model[8].weight)


def test_a_program_may_choose_floats():
    method = rabbet.Joint(rank=False, grids=("4c", "f16"), tuning=Tuning(steps=0))
    result = rabbet.compress(_net(), "bytes <= 60%", DATA, method)
    grids = {str(line.terms[0].grid) for line in result.plan}
    assert "f16" in grids
    assert result.cost.bytes <= 0.6 * result.float_cost.bytes


def test_a_method_that_needs_equal_distances_says_so():
    with pytest.raises(PlanError, match=r"equal distances; 3 cp\[8\]@f32 has another"):
        rabbet.fit(_net(), "3 cp[8]@f32", DATA, rabbet.ADMM())


def test_a_number_that_is_not_finite_is_damage(tmp_path):
    path, model = tmp_path / "a.safetensors", _net()
    rabbet.fit(model, "8 dense@f32", DATA, quality="fast").save(path)
    data = bytearray(path.read_bytes())
    place = data.rindex(model[8].weight.detach().numpy().tobytes())
    data[place : place + 4] = b"\x00\x00\xc0\x7f"  # not a number
    data[34:42] = b"0" * 8
    data[34:42] = f"{zlib.crc32(data):08x}".encode()
    path.write_bytes(data)
    with pytest.raises(FileError, match="a number of f32 is not finite"):
        rabbet.load(path, model)


@pytest.mark.parametrize("text", TYPES)
def test_a_float_that_trains_gets_straight_gradients_and_its_scale_none(text):
    latent = Latent(rand(3, 4), Grid.parse(text))
    latent.move_to_grid()
    latent.requires_grad_()
    latent.scale.requires_grad_()
    weight = rand(3, 4, seed=1)
    with rounded_together([latent]):
        shown = latent()
    (shown * weight).sum().backward()
    assert torch.equal(shown, latent.value.detach().to(TYPES[text]).float())
    assert torch.equal(latent.value.grad, weight)
    assert latent.scale.grad is None

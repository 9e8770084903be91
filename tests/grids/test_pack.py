"""Laws of packed integers: every width, and ternary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rabbet.grids.pack import _PART, pack, packed_bytes, unpack

LEVELS = (2, 4, 8, 16, 32, 64, 128, 256, 3)
every_width = pytest.mark.parametrize("levels", LEVELS)


@every_width
@given(data=st.data())
def test_unpacking_gives_back_what_was_packed(levels, data):
    codes = torch.tensor(
        data.draw(st.lists(st.integers(0, levels - 1), max_size=70)), dtype=torch.int64
    )
    packed = pack(codes, levels)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_bytes(len(codes), levels),)
    assert torch.equal(unpack(packed, levels, len(codes)), codes)


@every_width
def test_codes_that_are_packed_in_parts_lie_as_in_one(levels, monkeypatch):
    count = 2 * _PART + 7
    codes = torch.randint(levels, (count,), generator=torch.Generator().manual_seed(0))
    packed = pack(codes, levels)
    monkeypatch.setattr("rabbet.grids.pack._PART", 2 * count)
    assert torch.equal(packed, pack(codes, levels))
    assert torch.equal(unpack(packed, levels, count), codes)
    monkeypatch.undo()
    assert torch.equal(unpack(packed, levels, count), codes)


@every_width
@pytest.mark.parametrize("count", range(17))
def test_bytes_are_the_least_whole_number(levels, count):
    per_byte = 5 if levels == 3 else 8 / math.log2(levels)
    assert packed_bytes(count, levels) == math.ceil(count / per_byte)


@pytest.mark.parametrize(("levels", "codes", "expected"), [
    (2, [1, 0, 0, 0, 0, 0, 1, 1, 1], [0b11000001, 1]),
    (3, [1, 2, 0, 1, 2, 2], [1 + 2 * 3 + 0 * 9 + 27 + 2 * 81, 2]),
    (4, [1, 2, 3, 0, 3], [0b00111001, 3]),
    (8, [1, 7, 2], [0b10111001, 0]),
    (16, [0xA, 0xB, 0xC], [0xBA, 0x0C]),
    (32, [31, 0, 1], [0b00011111, 0b00000100]),
    (64, [63, 1, 0, 2], [0b01111111, 0b00000000, 0b00001000]),
    (128, [127, 1], [0xFF, 0b00000000]),
    (256, [0, 255, 7], [0, 255, 7]),
])  # fmt: skip
def test_the_bytes_are_these(levels, codes, expected):
    assert pack(torch.tensor(codes), levels).tolist() == expected


def test_any_shape_is_packed_in_row_major_order():
    codes = torch.arange(12).view(3, 4) % 8
    assert torch.equal(pack(codes, 8), pack(codes.reshape(-1), 8))
    assert torch.equal(pack(codes.T, 8), pack(codes.T.contiguous().view(-1), 8))


@every_width
def test_a_code_outside_the_levels_is_refused(levels):
    for code in (-1, levels):
        with pytest.raises(ValueError, match="codes must lie in"):
            pack(torch.tensor([0, code]), levels)


@pytest.mark.parametrize("levels", [0, 1, 5, 6, 7, 12, 512, -2])
def test_a_width_that_does_not_exist_is_refused(levels):
    with pytest.raises(ValueError, match="levels"):
        packed_bytes(4, levels)
    with pytest.raises(ValueError, match="levels"):
        pack(torch.zeros(0), levels)


@every_width
def test_a_wrong_number_of_bytes_is_refused(levels):
    packed = pack(torch.zeros(20, dtype=torch.int64), levels)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]])):
        with pytest.raises(ValueError, match="20 codes"):
            unpack(wrong, levels, 20)


def test_a_byte_that_is_not_five_ternary_digits_is_refused():
    with pytest.raises(ValueError, match="243"):
        unpack(torch.tensor([250], dtype=torch.uint8), 3, 5)

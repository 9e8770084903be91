"""Layers of other libraries are told by what they compute."""

import pytest
import torch
import torch.nn.functional as F
from networks import rand, settled
from torch import nn

import rabbet
from rabbet import Task
from rabbet.model.plain import plain_layers
from rabbet.model.prepare import prepared
from rabbet.model.surgery import copied


class Careful(nn.Linear):
    """The same as torch's but for what scripting needs."""

    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class Standardised(nn.Conv2d):
    """A conv whose weight is made anew in each pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(self.out_channels, 1, 1, 1))

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight * self.gain, self.bias, self.stride, self.padding)


class Scaled(nn.Linear):
    """More than a linear."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class Dynamic(nn.Linear):
    """A linear whose weight depends on its input."""

    def forward(self, x):
        return F.linear(x, self.weight * x.mean(), self.bias)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with an activation behind it, as several libraries have it."""

    def __init__(self, count):
        super().__init__(count)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        return self.act(x)


class Frozen(nn.Module):
    """A BatchNorm whose numbers are buffers."""

    def __init__(self, count):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, 0.5 + torch.rand(count))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class Strange(Frozen):
    """Holds what a BatchNorm holds and computes something else."""

    def forward(self, x):
        return super().forward(x).abs()


def _net(conv, norm, last):
    torch.manual_seed(0)
    parts = [conv(3, 24, 3, padding=1), norm(24), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return settled(nn.Sequential(*parts, last(24, 16), nn.ReLU(), nn.Linear(16, 4)))


DATA = [rand(8, 3, 6, 6, seed=k) for k in range(2)]


@pytest.mark.parametrize("conv", [nn.Conv2d, Standardised])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NormAct, Frozen, nn.SyncBatchNorm])
def test_they_are_compressed_and_folded_as_torchs_own(conv, norm, tmp_path):
    model = _net(conv, norm, Careful)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = rabbet.compress(model, "bits <= 8", DATA, quality="fast")
    assert [line.name for line in result.plan] == ["0", "4", "6"]
    assert result.survey["0"].norm in ("1", "1.norm")
    assert not result.survey.left
    result.save(tmp_path / "a.safetensors")
    again = rabbet.load(tmp_path / "a.safetensors", model)
    with torch.no_grad():
        wanted = model(DATA[0])
        assert (result.model(DATA[0]) - wanted).norm() < 0.05 * wanted.norm()
        assert torch.equal(again(DATA[0]), result.model(DATA[0]))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert type(model[0]) is conv
    assert type(model[1]) is norm


@pytest.mark.parametrize("last", [Scaled, Dynamic])
def test_what_computes_more_is_stored(last, tmp_path):
    model = _net(nn.Conv2d, Strange, last)
    surveyed = rabbet.survey(model, DATA)
    assert {site.name: site.kind.name for site in surveyed} == {
        "0": "conv2d", "6": "linear", "4.weight": "stored",
    }  # fmt: skip
    assert surveyed["0"].norm is None
    result = rabbet.compress(model, "bits <= 8", DATA, quality="fast")
    result.save(tmp_path / "a.safetensors")
    again = rabbet.load(tmp_path / "a.safetensors", model)
    with torch.no_grad():
        wanted = model(DATA[0])
        assert (again(DATA[0]) - wanted).norm() < 0.05 * wanted.norm()
        assert torch.equal(again(DATA[0]), result.model(DATA[0]))


def test_a_change_that_the_network_notices_is_not_made():
    """The forward asks for the class of a layer."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Careful(20, 20), nn.Linear(20, 4)

        def forward(self, x):
            return self.b(self.a(x) * (2 if isinstance(self.a, Careful) else 1))

    model = settled(Asks())
    plain, notes = prepared(model, Task([rand(4, 20)]))
    assert type(plain.a) is Careful
    assert notes == ()
    assert [site.name for site in rabbet.survey(model, [rand(4, 20)])] == ["b", "a.weight"]


class Padded(nn.Conv2d):
    """Pads odd sizes."""

    def forward(self, x):
        odd = x.shape[-1] % 2
        x = F.pad(x, (0, 1, 0, 1)) if odd else x
        return self._conv_forward(x, self.weight, self.bias)


def test_a_layer_whose_forward_depends_on_the_size_is_told_by_all_sizes():
    model = nn.Sequential(Padded(3, 8, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    even, odd = rand(2, 3, 8, 8), rand(2, 3, 9, 9)
    assert type(plain_layers(copied(model), Task([even, odd, even]))[0]) is Padded
    assert type(plain_layers(copied(model), Task([even, even]))[0]) is nn.Conv2d


def test_compiled_layers_inside_of_compiled_ones_are_taken_out():
    inner = nn.Sequential(torch.compile(nn.Linear(4, 4)))
    found = copied(nn.Sequential(torch.compile(inner)))
    assert type(found[0][0]) is nn.Linear


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-6, 6)


def test_a_layer_is_told_by_all_batches():
    torch.manual_seed(0)
    model, x = nn.Sequential(Clamped(16, 16), nn.Linear(16, 4)).eval(), rand(8, 16)
    assert type(plain_layers(copied(model), Task([x, 100 * x, x]))[0]) is Clamped
    assert type(plain_layers(copied(model), Task([x, x]))[0]) is nn.Linear

"""BRECQ and QDrop in a short form of our own: blocks rebuilt one by one with learned rounding.

BRECQ (arXiv 2102.05426): the weights of a block are rounded up or down by variables that minimise
the squared error of the block's output, with AdaRound's rectified sigmoid and its regulariser
(arXiv 2004.10568, equations 21 to 25). QDrop (arXiv 2203.05740): meanwhile every entry of a
quantised input is float with probability 1/2, and the step of each input is learned (LSQ,
arXiv 1902.08153). As in both, the first and the last layer have 8 bits, and inputs 8. The papers
take 20,000 steps a block; here there are as many as fit into the time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peer import Job, Outcome, ends, in_torch, packed, run
from torch import Tensor, nn

STEPS, BATCH, RATE, STEP_RATE, WEIGHT = 400, 32, 1e-2, 4e-5, 0.01
LOW, HIGH = -0.1, 1.1  # what the sigmoid is stretched to


class Input(nn.Module):
    """An input on 256 steps from its least to its largest value; some entries stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.zero = nn.Parameter(torch.ones(())), 0.0
        self.keep, self.known = 0.0, False

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grid, by straight-through gradients that reach the step."""
        if not self.known:
            low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
            self.step.data = torch.tensor(max(high - low, 1e-6) / 255)
            self.zero, self.known = round(-low / float(self.step)), True
        scaled = x / self.step + self.zero
        codes = (scaled + (scaled.round() - scaled).detach()).clamp(0, 255)
        y = (codes - self.zero) * self.step
        return torch.where(torch.rand_like(x) < self.keep, x, y) if self.keep else y


class Rounded(nn.Module):
    """A conv or linear with its input quantised and its weight rounded by variables."""

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        self.layer, self.input, self.bits = layer, Input(), bits
        weight = layer.weight.detach()
        self.step = best_step(weight.flatten(1), bits).view(-1, *[1] * (weight.dim() - 1))
        rest = weight / self.step - (weight / self.step).floor()
        at = ((rest - LOW) / (HIGH - LOW)).clamp(1e-4, 1 - 1e-4)
        self.up, self.hard = nn.Parameter(torch.log(at / (1 - at))), True

    def share(self) -> Tensor:
        """How far each weight is rounded up, from 0 to 1."""
        soft = (torch.sigmoid(self.up) * (HIGH - LOW) + LOW).clamp(0, 1)
        return (soft >= 0.5).float() if self.hard else soft

    def forward(self, x: Tensor) -> Tensor:
        """The layer on its grid."""
        half = 2 ** (self.bits - 1)
        codes = ((self.layer.weight / self.step).floor() + self.share()).clamp(-half, half - 1)
        weight, bias, x = codes * self.step, self.layer.bias, self.input(x)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        how = (self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups)
        return F.conv2d(x, weight, bias, *how)


def best_step(rows: Tensor, bits: int) -> Tensor:
    """The step of each row that errs least, rounded to nearest, of 60 shares of its range."""
    half = 2 ** (bits - 1)
    most = rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / (half - 0.5)
    errors, steps = [], [most * k / 60 for k in range(20, 61)]
    for step in steps:
        error = (rows / step).round().clamp(-half, half - 1) * step - rows
        errors.append(error.square().sum(1))
    which = torch.stack(errors).argmin(0)
    return torch.stack(steps)[which, torch.arange(len(rows))]


def folded(model: nn.Module, image: Tensor) -> None:
    """Every BatchNorm goes into the conv whose output it takes, told by one pass."""
    made: dict[int, nn.Module] = {}
    pairs, kept, hooks = [], [], []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):

            def after(module: nn.Module, _: Any, y: Tensor) -> None:
                kept.append(y)  # so that no other tensor gets its id
                made[id(y)] = module

            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d):

            def before(module: nn.Module, x: tuple[Tensor]) -> None:
                pairs.append((made[id(x[0])], module))

            hooks.append(module.register_forward_pre_hook(before))
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    for conv, norm in pairs:
        fused = nn.utils.fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        name = next(n for n, m in model.named_modules() if m is norm)
        model.set_submodule(name, nn.Identity())


def blocks(model: nn.Module) -> list[nn.Module]:
    """Residual blocks, and the layers that are in none, in order."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        if type(module).__name__ in {"Block", "Inverted", "Rounded"}:
            found.append(module)
        else:
            for child in module.children():
                walk(child)

    walk(model)
    return found


def seen(model: nn.Module, block: nn.Module, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The inputs and outputs of a block on all images."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
        inputs.append(x[0])
        outputs.append(y)

    hook = block.register_forward_hook(note)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(inputs), torch.cat(outputs)


def rebuilt(block: nn.Module, inputs: Tensor, wanted: Tensor, dropping: float) -> None:
    """Learn how the weights of a block are rounded, and the steps of its inputs."""
    layers = [m for m in block.modules() if isinstance(m, Rounded)]
    ups, steps = [m.up for m in layers], [m.input.step for m in layers]
    for layer in layers:
        layer.hard, layer.input.keep = False, dropping
    optimiser = torch.optim.Adam(
        [{"params": ups, "lr": RATE}, {"params": steps, "lr": STEP_RATE if dropping else 0.0}]
    )
    for step in range(STEPS):
        pick = torch.randint(len(inputs), (BATCH,))
        loss = (block(inputs[pick]) - wanted[pick]).square().sum(1).mean()
        if step >= STEPS // 5:  # from here on, ever nearer to 0 or 1
            left = 1 - (step - STEPS // 5) / (STEPS - STEPS // 5)
            sharp = 2 + 18 * left
            for layer in layers:
                away = (2 * layer.share() - 1).abs()
                loss = loss + WEIGHT * (1 - away.pow(sharp)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for layer in layers:
        layer.hard, layer.input.keep = True, 0.0


def method(dropping: float) -> Callable[[Job], list[Outcome]]:
    """All blocks in order, each on the inputs that the quantised ones before it leave."""

    def quantised(job: Job) -> list[Outcome]:
        torch.manual_seed(0)
        whole, model, batches = job.network(), job.network(), job.tensors()
        for each in (whole, model):
            folded(each, batches[0][:1])
            each.requires_grad_(False)
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        wide = ends(model)
        for name in names:
            bits = 8 if name in wide else job.bits
            model.set_submodule(name, Rounded(model.get_submodule(name), bits))
        with torch.no_grad():
            for batch in batches[:1]:
                model(batch)  # the ranges of inputs
        paths = {id(m): n for n, m in model.named_modules()}
        for block in blocks(model):
            wanted = seen(whole, whole.get_submodule(paths[id(block)]), batches)[1]
            rebuilt(block, seen(model, block, batches)[0], wanted, dropping)
        counted = packed(job.network(), lambda name: 8 if name in wide else job.bits)
        note = f"{STEPS} steps a block"
        return [Outcome("simulation", in_torch(model), packed=counted, notes=note)]

    return quantised


if __name__ == "__main__":
    run({"BRECQ": method(0.0), "QDrop": method(0.5)}, "torch")

"""Laws of training: what moves, in any memory layout; runs resume; the best state is kept."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rabbet.jobs import Jobs
from rabbet.model.hooks import hooked
from rabbet.train.best import Best
from rabbet.train.loop import Course, run

LAYOUTS = {
    "contiguous": lambda: torch.arange(24.0).view(4, 6),
    "transposed": lambda: torch.arange(24.0).view(6, 4).t(),
    "with holes": lambda: torch.arange(48.0).view(4, 12)[:, ::2],
    "channels last": lambda: (
        torch.arange(96.0).view(2, 4, 3, 4).to(memory_format=torch.channels_last)
    ),
    "one number": lambda: torch.tensor(3.0),
}


class Bowl(Course):
    """A parameter that is pulled to zero, each of its numbers by a force of its own."""

    def __init__(
        self, start: Tensor, fused: bool = True, dtype: torch.dtype = torch.float32, steps: int = 12
    ) -> None:
        self.steps, self.fused, self.p = (
            steps,
            fused,
            torch.empty_strided(start.shape, start.stride(), dtype=dtype),
        )
        self.p.copy_(start)
        self.groups = [{"params": [self.p], "base": 0.1}]
        self.force = torch.linspace(0.5, 2, start.numel(), dtype=dtype).view(start.shape)

    def losses_of(self, step: int) -> Iterator[Tensor]:
        yield (self.force * self.p.square()).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_kernel_moves_as_adam_does_however_parameters_lie(layout, dtype):
    plain, fused = (Bowl(LAYOUTS[layout](), way, dtype) for way in (False, True))
    for course in (plain, fused):
        run(course, Jobs(), "key", "moving")
    assert not torch.equal(plain.p.float(), LAYOUTS[layout]())
    near = 1e-6 if dtype != torch.bfloat16 else 1e-2
    torch.testing.assert_close(fused.p, plain.p, rtol=near, atol=near)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_stopped_goes_on_to_the_same_numbers(layout, fused, tmp_path):
    whole, first, again = (Bowl(LAYOUTS[layout](), fused) for _ in range(3))
    run(whole, Jobs(), "key", "moving")

    def stops(_, done, __):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(first, Jobs(folder=tmp_path, progress=stops), "key", "moving", every=5)
    seen = []
    run(
        again,
        Jobs(folder=tmp_path, progress=lambda _, done, __: seen.append(done)),
        "key",
        "moving",
        every=5,
    )
    assert seen[0] == 6
    assert torch.equal(again.p, whole.p)
    history = again.loss_history("moving")
    assert history == whole.loss_history("moving")  # the steps before the stop, too
    assert len(history.lines[""]) == whole.steps
    assert history.lines[""][0] == float(next(Bowl(LAYOUTS[layout]()).losses_of(0)))


class Shared(Bowl):
    """The same loss in two parts of unlike size."""

    def losses_of(self, step):
        pull = (self.force * self.p.square()).flatten()
        yield pull[:1].sum()
        yield (self.force * self.p.square()).flatten()[1:].sum()


def test_parts_of_a_loss_add_up():
    whole, shared = (kind(torch.linspace(-1, 3, 6)) for kind in (Bowl, Shared))
    for course in (whole, shared):
        run(course, Jobs(), "key", "moving")
    assert shared.losses == pytest.approx(whole.losses)
    torch.testing.assert_close(shared.p, whole.p)


class Halved(Bowl):
    """A course that moves its own way: every step halves the parameter, whatever its gradient."""

    def update(self, adam):
        with torch.no_grad():
            self.p.mul_(0.5)


def test_a_course_may_move_its_numbers_itself(tmp_path):
    course = Halved(torch.ones(3), steps=4)
    run(course, Jobs(folder=tmp_path), "key", "moving")
    assert torch.equal(course.p, torch.full((3,), 1 / 16))
    again = Halved(torch.ones(3), steps=6)  # resumes at the end of the shorter run
    run(again, Jobs(folder=tmp_path), "key", "moving")
    assert torch.equal(again.p, torch.full((3,), 1 / 64))


def test_the_best_state_is_kept_and_comes_back_from_a_checkpoint():
    best, other = Best(), Best()
    for score, kept in [(float("inf"), True), (2.0, True), (2.0, False), (3.0, False), (1.5, True)]:
        assert best.consider(score, lambda score=score: {"x": torch.tensor(score)}) == kept
    assert not best.consider(float("nan"), dict)
    other.restore(best.state() | {"seen": torch.ones(2)})
    assert (other.score, other.kept) == (1.5, {"x": torch.tensor(1.5)})
    fresh = Best()
    fresh.restore(Best().state())
    assert fresh.consider(float("inf"), dict)


def test_hooks_see_what_passes_may_replace_it_and_never_stay_behind():
    layer, seen = torch.nn.Linear(2, 3), []
    x = torch.ones(1, 2)
    wanted = layer(x)

    def before(_, args, kwargs):
        seen.append((args, kwargs))

    with hooked([(layer, lambda _, __, out: out + 1)], [(layer, before)]):
        assert torch.equal(layer(input=x), wanted + 1)
    assert seen[0][1]["input"] is x
    with pytest.raises(KeyboardInterrupt), hooked([(layer, lambda *_: None)], [(layer, before)]):
        raise KeyboardInterrupt
    assert torch.equal(layer(x), wanted)
    assert len(seen) == 1


@pytest.mark.parametrize("damage", ["a value", "another job's"])
def test_a_checkpoint_that_does_not_fit_is_not_gone_on_from(damage, tmp_path, caplog):
    whole = Bowl(LAYOUTS["contiguous"]())
    run(whole, Jobs(folder=tmp_path), "key", "moving")
    path = tmp_path / "key.safetensors"
    content = path.read_bytes()
    if damage == "a value":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 16]))
    else:
        run(Bowl(LAYOUTS["contiguous"](), steps=5), Jobs(folder=tmp_path), "other", "moving")
        (tmp_path / "other.safetensors").replace(path)
    again = Bowl(LAYOUTS["contiguous"]())
    run(again, Jobs(folder=tmp_path), "key", "moving")
    assert torch.equal(again.p, whole.p)
    assert "is damaged or holds another job's result" in caplog.text
    assert path.read_bytes() == content

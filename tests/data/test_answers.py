"""What outputs are: told with a test that can say no, and compared whatever their units."""

import pytest
import torch
import torch.nn.functional as F
from networks import rand, settled
from torch import nn

import rabbet
from rabbet import Joint, Task, compress, demo
from rabbet.data.answers import Answers, UnlikeError
from rabbet.errors import DataError
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

DENSE = Joint(forms=(), adapters=(), tuning=Tuning(steps=0))


def _scores(rows, classes, certainty=6.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    noise = torch.randn(rows, classes, generator=generator)
    return noise + certainty * F.one_hot(labels, classes)


def _kelvin(rows, seed=0):
    return 290 + 6 * torch.tanh(rand(rows, 24, seed=seed) @ rand(24, 8, seed=9) / 5)


def test_the_demo_network_gives_scores():
    piece = Workpiece.of(demo.model(), Task.of(demo.calibration()), rabbet.Jobs())
    assert piece.answers.kinds == ("scores",)
    assert not piece.answers.declared


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (_scores(64, 10), "scores"),
        (_scores(200, 2), "scores"),
        (_scores(150, 1000, 15.0), "scores"),
        (_scores(300, 5).view(20, 15, 5), "scores"),  # a class for each word
        (_scores(512, 3).view(8, 8, 8, 3).movedim(3, 1), "scores"),  # a class for each pixel
        (_scores(12, 10), "values"),  # too few to tell
        (_scores(64, 10)[:1].expand(64, 10), "values"),  # always the same answer
        (rand(500, 8), "values"),
        (50 * rand(500, 8), "values"),  # as certain as scores, but nothing excludes anything
        (50 * rand(500, 2), "values"),
        (_kelvin(500), "values"),
        (rand(500, 4) + torch.tensor([0.0, 0, 0, 90]), "values"),
        (rand(64), "values"),
        (rand(64, 1), "values"),
        (torch.cumsum(rand(64, 3, 16), 2), "values"),
    ],
)
def test_scores_are_told_from_values(answer, kind):
    assert Answers.of([[answer]]).kinds == (kind,)
    assert Answers.of([[part] for part in answer.split(len(answer) // 4)]).kinds == (kind,)


def test_what_is_declared_is_not_told():
    declared = Answers.of([[_scores(64, 10), rand(64, 4)]], ["values", "scores"])
    assert declared.declared
    assert declared.kinds == ("values", "scores")
    assert Answers.of([[_scores(64, 10), rand(64, 4)]], "values").kinds == ("values", "values")


@pytest.mark.parametrize("field", ["outputs", "weights"])
def test_as_many_must_be_declared_as_there_are(field):
    task = Task([rand(8, 4)], **{field: {"outputs": ["values"] * 3, "weights": (1.0, 2.0)}[field]})
    piece = Workpiece.of(nn.Linear(4, 2).eval(), task, rabbet.Jobs())
    with pytest.raises(DataError, match=rf"Task\({field}=...\) is about . outputs"):
        _ = piece.answers


def test_bad_declarations_are_refused():
    with pytest.raises(DataError, match="'scores' or 'values'; found 'logits'"):
        Task([rand(8, 4)], outputs="logits")
    for weights in ((0.0, 0.0), (1.0, -1.0), ()):
        with pytest.raises(DataError, match="weights are what outputs count"):
            Task([rand(8, 4)], weights=weights)


@pytest.mark.parametrize("shape", [(64,), (64, 1), (64, 6), (16, 6, 5), (16, 5, 6), (8, 6, 4, 4)])
def test_neither_units_nor_offsets_of_values_matter(shape):
    theirs = rand(shape, seed=1) if len(shape) == 1 else rand(*shape, seed=1)
    ours = theirs + 0.1 * (rand(shape, seed=2) if len(shape) == 1 else rand(*shape, seed=2))
    axis = shape.index(6) if 6 in shape else None
    units = torch.ones(1)
    if axis is not None:
        units = torch.logspace(-3, 3, 6).view(6, *[1] * (len(shape) - axis - 1))
    error = Answers.of([[theirs]], "values").error([ours], [theirs])
    moved = [t * units + 50 * units for t in (ours, theirs)]
    answers = Answers.of([[moved[1]]], "values")
    assert float(answers.error(moved[:1], moved[1:])) == pytest.approx(float(error), rel=0.3)
    parts = answers.element_weights(0, moved[1], len(theirs))
    weighed = ((moved[0] - moved[1]).square() * parts).sum() / len(theirs)
    assert float(weighed) == pytest.approx(float(answers.error(moved[:1], moved[1:])), rel=1e-4)


def test_the_error_of_the_mean_is_one():
    theirs = 3 + 7 * rand(400, 5)
    answers = Answers.of([[theirs]], "values")
    mean = theirs.mean(0).expand_as(theirs)
    assert float(answers.error([mean], [theirs])) == pytest.approx(1, rel=1e-4)


def test_one_answer_and_constant_ones_are_compared_by_their_size():
    for theirs in (rand(1, 1), torch.full((8, 3), 4.0)):
        answers = Answers.of([[theirs]])
        error = float(answers.error([1.1 * theirs], [theirs]))
        assert error == pytest.approx(0.01, rel=1e-3)


def test_weights_say_what_outputs_count():
    ours, theirs = [rand(64, 3), rand(64, 2)], [rand(64, 3, seed=1), rand(64, 2, seed=2)]
    alone = [
        float(Answers.of([theirs], "values", weights).error(ours, theirs))
        for weights in ((1.0, 0.0), (0.0, 1.0))
    ]
    mixed = Answers.of([theirs], "values", (3.0, 1.0)).error(ours, theirs)
    assert float(mixed) == pytest.approx((3 * alone[0] + alone[1]) / 4, rel=1e-4)


class Detector(nn.Module):
    """Boxes in some unit, and classes."""

    def __init__(self, unit):
        super().__init__()
        self.unit = unit
        self.stem = nn.Linear(16, 32)
        self.box = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
        self.classes = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x):
        hidden = torch.relu(self.stem(x))
        return self.unit * self.box(hidden), self.classes(hidden)


class Joined(Detector):
    """The same as channels of one output."""

    def forward(self, x):
        return torch.cat(super().forward(x), 1)


@pytest.mark.parametrize("kind", [Detector, Joined])
def test_boxes_in_pixels_do_not_drown_the_classes(kind):
    plans = []
    for unit in (1, 1000):
        torch.manual_seed(0)
        model = kind(unit).eval()
        plans.append(compress(model, "bytes <= 17%", [rand(256, 16)], DENSE).plan)
    assert plans[0] == plans[1]


def test_an_output_that_counts_for_nothing_is_given_up_first():
    torch.manual_seed(0)
    model, x = Detector(1).eval(), rand(256, 16)
    errors = []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        task = Task([x], weights=weights)
        ours = compress(model, "bytes <= 17%", task, DENSE).model(x)
        errors.append(
            [float((a - b).norm() / b.norm()) for a, b in zip(ours, model(x), strict=True)]
        )
    assert errors[0][0] < errors[1][0]
    assert errors[0][1] > errors[1][1]


def test_regressions_are_not_made_worse_by_tuning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8))
    x, unseen, mix = rand(1024, 24), rand(512, 24, seed=5), rand(24, 8, seed=9)
    model[-1].bias.data += 290
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        adam.zero_grad()
        (model(x) - 290 - 6 * torch.tanh(x @ mix / 5)).square().mean().backward()
        adam.step()
    wanted = model.eval()(unseen)
    errors = {}
    for steps in (0, 100):
        method = Joint(forms=(), adapters=(), tuning=Tuning(steps=steps))
        result = compress(model, "bytes <= 19%", list(x.split(128)), method)
        errors[steps] = float((result.model(unseen) - wanted).abs().mean())
    # As scores, kelvins are nearer to the float network's after tuning, and further off as values.
    assert errors[100] <= errors[0]


def test_outputs_that_cannot_be_compared_are_refused_and_empty_ones_count_nothing():
    answers = Answers.of([[rand(8, 4), rand(8, 0)]])
    assert float(answers.error([rand(8, 4), rand(8, 0)], [rand(8, 4), rand(8, 0)])) == 0
    with pytest.raises(UnlikeError, match="other shapes"):
        answers.divergence([rand(7, 4), rand(8, 0)], [rand(8, 4), rand(8, 0)])
    scores = Answers.of([[_scores(64, 10)]], "scores")
    row = _scores(1, 10)[0]
    assert float(scores.divergence([row], [row])) == pytest.approx(0, abs=1e-6)


def test_a_network_that_selects_by_its_values_is_compressed_and_told():
    class Selecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x):
            y = self.b(torch.relu(self.a(x)))
            return y[y[:, 0] > y[:, 1]]

    method = Joint(grids=("2hc",), adapters=(), forms=(), tuning=Tuning(steps=40, batch=32))
    data = Task([rand(32, 6, seed=k) for k in range(8)], axes=0)
    result = compress(settled(Selecting()), "bits <= 32", data, method)
    assert any("other shapes" in note for note in result.notes)


def test_what_is_judged_has_the_error_of_scores_that_are_only_told():
    scores, values = _scores(64, 10), rand(500, 8)
    ours, theirs = [scores + 0.1 * rand(64, 10, seed=1), values + 0.1], [scores, values]

    def answers(kinds=None, weights=(1.0, 3.0)):
        return Answers.of([theirs], kinds, weights)

    both = answers()
    assert both.kinds == ("scores", "values")
    only = Answers.of([theirs[:1]], None, None)  # its weight is 1, of (1, 3) it is a half
    extra = 0.5 * only.error(ours[:1], theirs[:1])
    torch.testing.assert_close(both.judged(ours, theirs) - both.divergence(ours, theirs), extra)
    declared = answers(["scores", "values"])
    assert declared.judged(ours, theirs) == declared.divergence(ours, theirs)
    told = Answers.of([theirs[1:]])
    assert told.judged(ours[1:], theirs[1:]) == told.divergence(ours[1:], theirs[1:])


def test_an_output_of_no_weight_may_be_anything():
    answers = Answers.of([[_scores(64, 10), rand(64, 3)]], weights=(1.0, 0.0))
    theirs = [_scores(64, 10), torch.full((64, 3), torch.inf)]
    assert float(answers.divergence(theirs, theirs)) == pytest.approx(0, abs=1e-6)

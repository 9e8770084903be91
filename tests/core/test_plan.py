"""The grammar of plans."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rabbet.core.plan import LayerPlan, Plan, Term, quoted
from rabbet.errors import PlanError
from rabbet.forms import FORMS, RANKED, Dense
from rabbet.grids.grid import Grid

grids = st.builds(
    lambda text, axis: Grid.parse(text + axis),
    st.sampled_from(
        [
            "1",
            "t",
            *(f"{u}{b}" for b in range(2, 9) for u in ("", "u")),
            *(f"{b}h" for b in range(2, 9)),
        ]
    ),
    st.sampled_from(["", "c", "c1", "c12", "g32", "g128z"]),
)
ranks = st.integers(1, 10**6)
rows = st.sets(st.integers(0, 40), min_size=1).map(lambda numbers: tuple(sorted(numbers)))
forms = st.one_of(
    st.builds(Dense),
    st.builds(Dense, rows),
    *(st.builds(form, ranks) for form in RANKED.values()),
)
terms = st.builds(Term, forms, grids)
ODD = (
    "", " ", "a b", 'say "x"', "#1", "a#b", "a # b", "tab\there", "new\nline", "back\\slash", "|",
    "a|b", "+", "@", "é", "dense@4c", "x | act@8", "\u2028", "\x85", "a\x1cb", "'", '"', '""',
    "\\", "layer.0.weight", "🪵", "\x00", "=<>",
)  # fmt: skip
names = st.one_of(
    st.sampled_from(ODD), st.text(max_size=12), st.from_regex(r"[a-z0-9_.]{1,12}", fullmatch=True)
)
layers = st.builds(
    LayerPlan,
    names,
    st.lists(terms, min_size=1, max_size=3).map(tuple),
    st.none() | st.integers(2, 8),
)
plans = st.lists(layers, max_size=5, unique_by=lambda layer: layer.name).map(
    lambda lines: Plan(tuple(lines))
)


@given(plans)
def test_a_plan_is_its_text(plan):
    assert Plan.parse(str(plan)) == plan


@given(plans)
def test_a_plan_is_its_compact_text(plan):
    assert Plan.parse(plan.compact) == plan
    assert len(plan.compact) <= len(str(plan))
    assert plan.compact.isascii() or any(not layer.name.isascii() for layer in plan)


@given(plans)
def test_comments_and_blank_lines_say_nothing(plan):
    commented = "# a plan\n\n" + "\n  # more\n\n".join(
        f"   {line}   # why" for line in str(plan).split("\n") if line
    )
    assert Plan.parse(commented) == plan


@given(layers)
def test_a_line_is_its_text(layer):
    assert LayerPlan.parse(str(layer)) == layer
    assert "\n" not in str(layer)


@given(terms)
def test_a_term_is_its_text(term):
    assert Term.parse(str(term)) == term


@given(names)
def test_a_name_is_quoted_only_where_it_must_be(name):
    plain = not any(c.isspace() for c in name) and name and not set(name) & {"#", '"'}
    assert (quoted(name) == name) == bool(plain)


@pytest.mark.parametrize(
    "line",
    [
        "conv",
        "conv dense",
        "conv dense@9",
        "conv dense@4c |",
        "conv dense@4c | act",
        "conv dense@4c | act@1",
        "conv dense@4c | act@9",
        "conv dense@4c | act@8 | act@8",
        "conv dense[]@4c",
        "conv dense[3:2]@4c",
        "conv dense[3-2]@4c",
        "conv lowrank@4c",
        "conv lowrank[0]@4c",
        "conv lowrank[-1]@4c",
        "conv lowrank[2.5]@4c",
        "conv lowrank[x]@4c",
        "conv dense@4c +",
        "conv + dense@4c",
        "conv dense@4c dense@4c",
        "conv sparse@4c",
        "conv DENSE@4c",
        '"conv dense@4c',
        '"\\x" dense@4c',
        "conv lowrank[" + "9" * 5000 + "]@4c",
    ],
)
def test_a_line_that_cannot_be_read_is_quoted_in_the_error(line):
    for read in (LayerPlan.parse, lambda text: Plan.parse(f"ok dense@4c\n{text}\n")):
        with pytest.raises(PlanError) as caught:
            read(line)
        assert line.strip() in str(caught.value) or repr(line.strip()) in str(caught.value)


def test_an_unknown_form_is_answered_with_the_known_ones():
    with pytest.raises(PlanError) as caught:
        Term.parse("sparse@4c")
    assert all(form in str(caught.value) for form in FORMS)


def test_two_lines_for_one_layer_are_refused():
    with pytest.raises(PlanError, match=r"two lines for conv"):
        Plan.parse("conv dense@4c\nfc dense@4c\nconv dense@3c")


def test_a_plan_is_looked_up_and_changed_by_name():
    plan = Plan.parse("a dense@4c\nb dense@3c | act@8")
    assert len(plan) == 2
    assert plan["b"].act == 8
    assert plan.get("c") is None
    changed = plan.with_layer(LayerPlan.parse("a dense@2c"))
    assert [str(layer) for layer in changed] == ["a dense@2c", "b dense@3c | act@8"]
    assert [str(layer) for layer in plan] == ["a dense@4c", "b dense@3c | act@8"]
    added = plan.with_layer(LayerPlan.parse("c dense@2c"))
    assert [str(layer) for layer in added] == ["a dense@4c", "b dense@3c | act@8", "c dense@2c"]


def test_plans_are_compared_by_value_and_hash():
    a, b = (Plan.parse("a dense@4c + lowrank[2]@8c | act@8") for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Plan.parse("a dense@4c + lowrank[3]@8c | act@8")


def test_a_plan_is_written_in_columns():
    assert str(Plan.parse("a dense@4c\nlonger dense@tc")) == "a       dense@4c\nlonger  dense@tc"

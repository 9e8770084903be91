"""What compress was asked for: a budget, a plan, or the least that loses no more than so much."""

from dataclasses import dataclass, replace
from pathlib import Path

import typer

from rabbet._api import Result, compress, fit
from rabbet._bench import opened
from rabbet._frontier import Frontier, frontier
from rabbet.cli import options, texts
from rabbet.cli.inputs import Inputs, open_held
from rabbet.cli.judge import Judge
from rabbet.core.budget import FILES, Budget
from rabbet.core.plan import Plan
from rabbet.jobs import Jobs
from rabbet.methods import Method
from rabbet.model.build import validate


@dataclass(frozen=True)
class Wish:
    """A budget, a plan or a drop; a budget holds beside either of the others.

    drop: the most that may be lost by the judge, for the least along the axis.
    """

    budget: Budget | None
    plan: Plan | None
    drop: float | None
    axis: str
    judge: Judge | None = None

    @classmethod
    def read(
        cls,
        budget: str | None,
        plan: Path | None,
        drop: str | None,
        along: str | None,
        target: str | None = None,
    ) -> "Wish":
        """What options say; a usage error for those that contradict one another.

        target: whose file bytes are about.
        """
        most = None if drop is None else texts.drop_of(drop)
        file = target if target in FILES else "bytes"
        axis = file if along in (None, "bytes") else along
        texts.require_axis(axis)
        if along is not None and most is None:
            raise typer.BadParameter(
                "only a --drop looks for the least along it", param_hint="--axis"
            )
        if plan is not None and most is not None:
            raise typer.BadParameter(
                "a plan is given, so there is nothing to look for: leave one of the two out",
                param_hint="--drop",
            )
        unasked = budget is None and plan is None and most is None
        asked = options.DEFAULT_BUDGET if unasked else budget
        limits = None if asked is None else texts.budget_of(asked, target)
        wanted = None if plan is None else texts.plan_of_file(plan)
        if wanted is not None and limits is not None:
            _require_countable(limits)
        if most is not None and limits is not None:
            texts.require_beside(axis, limits)
        return cls(limits, wanted, most, axis)

    def require_held(self, held: str | None, test: str | None) -> None:
        """A usage error for held data without a drop, or for choosing by the test."""
        if held is None:
            return
        if self.drop is None:
            raise typer.BadParameter("only a --drop is measured on it", param_hint="--held")
        if held == test:
            raise typer.BadParameter(
                f"{held} is the --test as well, and what a plan was chosen by makes it look better "
                "than it is: name other data, or leave the --test out",
                param_hint="--held",
            )

    def judged(self, model: str | None, held: str | None, inputs: Inputs) -> "Wish":
        """With what measures a drop; a usage error if nothing does."""
        if self.drop is None:
            return self
        return replace(self, judge=open_held(model, held, inputs))

    def granted(
        self, inputs: Inputs, method: Method, seed: int, jobs: Jobs
    ) -> tuple[Result, Frontier | None]:
        """The network that was asked for, and the frontier that was searched for a drop."""
        if self.drop is not None:
            return self._within(self.drop, inputs, method, seed, jobs)
        return self._fitted(inputs, method, seed, jobs), None

    def _fitted(self, inputs: Inputs, method: Method, seed: int, jobs: Jobs) -> Result:
        """The network for a budget or a plan."""
        if self.plan is None:
            assert self.budget is not None
            return compress(inputs.network, self.budget, inputs.task, method, seed=seed, jobs=jobs)
        if self.budget is not None:  # held against it before anything is solved
            piece = opened(inputs.network, self.budget.metrics, inputs.task, seed, jobs)
            validate(self.plan, piece.survey)
            for gauge in piece.gauges.values():
                gauge.written(self.plan)
            self.budget.check(piece.cost(self.plan), piece.float_cost)
            result = fit(inputs.network, self.plan, inputs.task, method, seed=seed, jobs=jobs)
            costs = piece.cost(result.plan), piece.float_cost
            return replace(result, budget=self.budget, cost=costs[0], float_cost=costs[1])
        return fit(inputs.network, self.plan, inputs.task, method, seed=seed, jobs=jobs)

    def _within(
        self, drop: float, inputs: Inputs, method: Method, seed: int, jobs: Jobs
    ) -> tuple[Result, Frontier]:
        assert self.judge is not None
        examples = self.judge.examples(inputs.network)
        found = frontier(
            inputs.network, inputs.task, self.axis,
            beside=self.budget, method=method, seed=seed, jobs=jobs,
        )  # fmt: skip
        chosen = found.within(drop, self.judge, examples)
        return replace(chosen.result, notes=(*chosen.result.notes, str(chosen))), found


def _require_countable(limits: Budget) -> None:
    """A usage error for a budget that a given plan cannot be held against before it is fitted."""
    if any(limit.metric == "latency" for limit in limits.limits):
        raise typer.BadParameter(
            "a plan is not timed before it is fitted; leave the latency out, and measure with "
            "rabbet bench",
            param_hint="--budget",
        )

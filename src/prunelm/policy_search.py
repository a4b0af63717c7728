"""Units chosen by a search over keep probabilities: random masks, their losses, and forward passes only.

Source: arXiv 2406.10576 (OSP), with its released code.
Differs: budgets count parameters; the start takes its scores from the dense model; a variable may be several FFN
channels, a sublayer or a block; the start is kept where held-out tokens like it no less.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from .distributed import agreed_number
from .errors import CalibrationError
from .job import Job
from .journal import Journal
from .losses import Objective
from .masking import Mask, masking
from .plan import top_units
from .policy import Policy, compared_with, projected, rate_at, score_gradient, started
from .probable import least_probable_blocks, most_probable
from .progress import Progress, silent
from .variables import Variables, variables_of

TIE = 1e-6
"""What the criterion's order adds to keep probabilities at most, so that equal ones are told apart."""
Scores = dict[str, Float[Tensor, " unit"]]


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search found: a score per unit, whose order decides, and the held-out loss of its start and its end."""

    scores: Scores
    start: float
    end: float
    notes: list[str]


@torch.no_grad()
def search(
    model: PreTrainedModel,
    job: Job,
    metric: Mapping[str, Float[Tensor, " unit"]],
    policy: Policy,
    loss: Objective,
    held: Objective,
    *,
    seed: int,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> Searched:
    """Keep probabilities of the sites' units after the policy's steps; those of the start where they are no better.

    Args:
        model: dense, in eval mode.
        job: the sites that may lose units, and what must go: a budget, or so many units of each.
        metric: a score per unit, by site key, for the start.
        policy: how to search.
        loss: what masks are measured by, and on which batches.
        held: the same on held-out batches, which decide between start and end.
        seed: of batches and masks; step n draws the same whatever was before it.
        journal: where states are written as they come, and read from when they were made before.
        progress: told the step and the moving loss.

    Raises:
        CalibrationError: the very first losses are not finite.
        BudgetError: the budget cannot be met.
    """
    variables = variables_of(job.sites, job.budget, metric, policy, job.counts)
    s = started(variables.means(metric), variables.layers, _kept_shares(variables), policy)
    first = _State(s=_fitting(s, variables), average=None)
    with masking(model, job.sites) as mask:
        walk = _Walk(model, job, mask, variables, policy, loss, held, metric, seed)
        start = agreed_number(walk.judged(first))
        last, notes = _walked(walk, first, journal or Journal(), progress)
        end = agreed_number(walk.judged(last))
    better = end < start
    said = f"held-out loss {start:.4f} -> {end:.4f}" + ("" if better else ", so the start was kept")
    notes.append(f"{policy.steps} steps of {policy.masks} masks over {len(s):,} keep probabilities: {said}")
    return Searched(scores=walk.scores(last if better else first), start=start, end=end, notes=notes)


@dataclass(frozen=True, kw_only=True)
class _State:
    """Keep probabilities, and the moving average of losses."""

    s: Float[Tensor, " variable"]
    average: float | None


@dataclass(frozen=True)
class _Walk:
    """All that a step and a judgment need besides the state."""

    model: PreTrainedModel
    job: Job
    mask: Mask
    variables: Variables
    policy: Policy
    loss: Objective
    held: Objective
    metric: Mapping[str, Float[Tensor, " unit"]]
    seed: int

    def step(self, state: _State, n: int) -> _State:
        """The state after step `n`, which need not be finite."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + n)
        batch = self.loss.batches[int(torch.randint(len(self.loss.batches), (), generator=generator))]
        some = torch.randperm(len(batch["input_ids"]), generator=generator)[: self.policy.sequences]
        batch = {name: value[some] for name, value in batch.items()}
        masks = torch.rand(self.policy.masks, len(state.s), generator=generator) < state.s
        found = self.loss.under(self.model, self.mask, batch, (partial(self.draw, drawn) for drawn in masks))
        losses = torch.tensor(found, dtype=torch.float64)
        against, average = compared_with(losses, self.policy, state.average)
        gradient = score_gradient(losses, masks, state.s, against, self.policy.estimator)
        return _State(s=_fitting(state.s - rate_at(self.policy, n) * gradient, self.variables), average=average)

    def draw(self, kept: Bool[Tensor, " variable"]) -> None:
        """Let the model run with some variables kept."""
        if self.variables.blocks:
            self.mask.skip([i for i, stays in zip(self.variables.blocks, kept.tolist(), strict=True) if not stays])
            return
        self.mask.keep({key: kept[of].nonzero().flatten() for key, of in self.variables.of.items()})

    def scores(self, state: _State) -> Scores:
        """Every unit's keep probability; the criterion tells units, or whole variables, of equal probability apart."""
        among = torch.zeros_like(state.s)
        means = self.variables.means(self.metric)
        for together in self.variables.layers:
            among[together] = _ranks(means[together])
        whole = self.policy.layers != "none"
        return {
            key: state.s[of] + TIE * (among[of] if whole else _ranks(self.metric[key]))
            for key, of in self.variables.of.items()
        }

    def judged(self, state: _State) -> float:
        """The held-out loss of the plan that a state makes."""
        scores = self.scores(state)
        if self.variables.blocks:
            dropped, _ = least_probable_blocks(self.job.sites, self.job.budget, scores)
            return self.held.judged(self.model, self.mask, lambda: self.mask.skip(dropped))
        counts = self.job.counts or most_probable(self.job.sites, self.job.budget, scores, self.policy)[0]
        kept = {s.key: top_units(scores[s.key], counts[s.key], s.strata) for s in self.job.sites}
        return self.held.judged(self.model, self.mask, lambda: self.mask.keep(kept))


def _ranks(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The place of each score in ascending order, from 0 to less than 1."""
    return scores.double().argsort(stable=True).argsort().double() / len(scores)


def _walked(walk: _Walk, state: _State, journal: Journal, progress: Progress) -> tuple[_State, list[str]]:
    """The last state of a walk, and a note where it had to stop."""
    policy = walk.policy
    for begin in range(0, policy.steps, policy.save_every):
        entry = journal.entry(lambda begin=begin, state=state: _entry(walk, state, begin, progress))  # type: ignore[misc]
        state = _State(s=torch.tensor(entry["s"], dtype=torch.float64), average=entry["average"])
        if "diverged" in entry:
            return state, [_diverged(entry["diverged"], policy)]
    return state, []


def _entry(walk: _Walk, state: _State, begin: int, progress: Progress) -> dict[str, Any]:
    """What the journal keeps of some steps: the state after the last good one, and the step that was not."""
    policy = walk.policy
    for n in range(begin, min(begin + policy.save_every, policy.steps)):
        moved = walk.step(state, n)
        if moved.average is None or not torch.isfinite(moved.s).all() or not abs(moved.average) < float("inf"):
            return {"diverged": n, "s": state.s.tolist(), "average": state.average}
        state = moved
        progress(f"searching (loss {state.average:.3f})", n + 1, policy.steps)
    return {"s": state.s.tolist(), "average": state.average}


def _diverged(n: int, policy: Policy) -> str:
    if n == 0:
        raise CalibrationError(
            "step 0 of the search: the loss of a random mask is not finite. Try --compute-dtype float32, or look at "
            "the model with prunelm evaluate."
        )
    return (
        f"the search diverged at step {n} of {policy.steps} (its loss is not finite): the state before it was kept; a "
        f"smaller rate than {policy.rate:g} may help"
    )


def _kept_shares(variables: Variables) -> Float[Tensor, " variable"]:
    """The share of each variable's pool that stays."""
    shares = torch.zeros_like(variables.cost)
    for pool, target in enumerate(variables.targets):
        mine = variables.pool == pool
        shares[mine] = 1 - target / variables.cost[mine].sum()
    return shares


def _fitting(s: Float[Tensor, " variable"], variables: Variables) -> Float[Tensor, " variable"]:
    """The nearest keep probabilities whose expected parameters meet every pool's target."""
    found = s.clone()
    for pool, target in enumerate(variables.targets):
        mine = variables.pool == pool
        cost = variables.cost[mine]
        scale = cost.mean()
        found[mine] = projected(s[mine], cost / scale, float((cost.sum() - target) / scale))
    return found

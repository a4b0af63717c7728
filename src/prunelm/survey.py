"""One pass over the dense model for allocators that look at it: scores, error curves, prices."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from .criteria import CRITERIA, Statistics
from .derivatives import Derivatives
from .distributed import agreed, agreed_number, summed_number
from .errors import CalibrationError
from .job import Job
from .moments import Moments
from .observation import MEASURED, Observed, observe
from .placement import exact
from .plan import Budget
from .progress import Progress
from .reading import Reading
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS, Reconstruction
from .rehearsal import Rehearsal
from .sensitivity import Divergence, Point, damage_of, levels_of
from .similarity import head_similarity
from .sites import Site, bias_of, by_block, weight_of
from .stream import BlockStream
from .workbench import Step, Workbench

ACTIVATIONS = frozenset({*MEASURED, "gram", "similarity"})
"""Statistics that are measured as the stream passes."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one pass over the dense model found.

    `scores` per unit; `curves`: a site's relative error with 0, 1, 2... units removed; `prices`: divergence measured
    at the output with some units of one site removed and the rest repaired; `curvatures`: what an error as large as the
    module's output would cost there, to second order; `moments` of the consumers' inputs.
    """

    scores: dict[str, Float[Tensor, " unit"]] = field(default_factory=dict)
    curves: dict[str, Float[Tensor, " count"]] = field(default_factory=dict)
    prices: dict[str, list[Point]] = field(default_factory=dict)
    curvatures: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)

    def step(self, keys: Sequence[str]) -> Step:
        """What was found of some sites, without their moments, which are cheaper to measure again than to keep."""
        facts = {
            "prices": {key: self.prices[key] for key in keys if key in self.prices},
            "curvatures": {key: self.curvatures[key] for key in keys if key in self.curvatures},
        }
        tensors = {f"scores/{key}": self.scores[key] for key in keys}
        return Step(facts=facts, tensors=tensors | {f"curves/{key}": self.curves[key] for key in keys})

    def add(
        self, site: Site, seen: Observed, similarity: Tensor | None, derivatives: Derivatives, recipe: Recipe
    ) -> Moments | None:
        """Add the scores of a site, and what they and its derivatives say of it; its moments, if it has some."""
        self.scores[site.key] = score(site, seen, similarity, derivatives, recipe)
        self.curves[site.key] = curve_of(site, self.scores[site.key], recipe)
        fisher, moments = derivatives.fisher.get(site.key), seen.consumer
        if fisher is not None and moments is not None and moments.full:
            self.curvatures[site.key] = agreed_number(_curvature(site, fisher, moments))
        return moments

    def recall(self, step: Step) -> None:
        """Add what an earlier run found."""
        for name, value in step.tensors.items():
            kind, _, key = name.partition("/")
            (self.scores if kind == "scores" else self.curves)[key] = value
        self.prices.update({key: [(int(o), float(kl)) for o, kl in of] for key, of in step.facts["prices"].items()})
        self.curvatures.update(step.facts["curvatures"])

    def measured(
        self, needs: str, sites: Sequence[Site], budget: Budget, recipe: Recipe
    ) -> dict[str, Float[Tensor, " number"]]:
        """What an allocator asked for: `scores`, `standardised`, or at the budget's options one of the others."""
        if needs == "scores":
            return dict(self.scores)
        if needs == "standardised":
            return {site.key: standardised(site, self.scores[site.key], recipe) for site in sites}
        options = {site.key: budget.options(site) for site in sites}
        if needs == "curves":
            return {key: self.curves[key][mine] for key, mine in options.items()}
        if needs == "curvature":
            return {key: self.curvatures[key] * self.curves[key][mine] for key, mine in options.items()}
        return {key: damage_of(self.curves[key], self.prices[key], mine) for key, mine in options.items()}


@torch.no_grad()
def survey(
    stream: BlockStream,
    read: Reading,
    recipe: Recipe,
    job: Job,
    *,
    divergence: Divergence | None,
    keep: bool,
    derivatives: Derivatives,
    through: bool = False,
    bench: Workbench,
    progress: Progress,
) -> Survey:
    """Scores and error curves of every site on the dense model, and with `divergence` what errors cost at its output.

    The stream goes no further than something is measured, unless it is carried `through`.

    Args:
        stream: at the first block of the dense model.
        read: which batches statistics are taken from, and which are needed; those of held-out batches are not.
        recipe: criteria and their options, repair and ridge.
        job: the sites and the budget whose options are priced.
        divergence: measures prices, where the allocator reads them.
        keep: keep the moments, for a search.
        derivatives: of the dense model.
        through: carry the stream behind the last block, whether there are sites to the end or not.
        bench: where what was found of a block is kept, and read from when it was found before.
        progress: told about every block.

    Raises:
        CalibrationError: statistics or scores are not finite; names the block.
    """
    found = Survey()
    groups = by_block(job.sites)
    last = max(groups)
    rehearses = keep or divergence is not None
    wanted = {name: needs - {"held"} for name, needs in (read.needs if rehearses else read.scored).items()}
    read_to = max((s.block for s in job.sites if wanted[s.name] & ACTIVATIONS), default=0)
    for i in range(last + 1):
        progress("surveying", i, last + 1)
        sites, step = groups.get(i, []), bench.get(f"survey-{i}")
        entering = [stream.hidden[b] for b in divergence.batches] if divergence is not None else []
        with stream.room.opened(i):
            if step is not None and not keep:
                if i < read_to or through:
                    stream.advance(i)
            else:
                unknown = sites if step is None else []
                similar = {s.key: similarity_of(stream, read.fit, s, recipe, wanted[s.name]) for s in unknown}
                seen = observe(stream, i, sites, wanted, read.places, advance=i < read_to or through)
                if keep:
                    found.moments.update({key: one.consumer for key, one in seen.items() if one.consumer is not None})
            if step is not None:
                found.recall(step)
                continue
            for site in sites:
                moments = found.add(site, seen[site.key], similar[site.key], derivatives, recipe)
                if divergence is not None and moments is not None:
                    scores = found.scores[site.key]
                    found.prices[site.key] = _price(site, scores, moments, recipe, job.budget, divergence, entering)
        bench.put(f"survey-{i}", found.step([site.key for site in sites]))
    for i in range(last + 1, len(stream.blocks) if through else 0):
        with stream.room.opened(i):
            stream.advance(i)
    progress("surveying", last + 1, last + 1)
    return found


def repair_of(recipe: Recipe) -> Reconstruction:
    """What the recipe does to a consumer when units go; nothing where it only refits."""
    chosen = RECONSTRUCTIONS[recipe.reconstruction]
    return chosen if chosen.stage == "repair" else RECONSTRUCTIONS["none"]


def score(
    site: Site, seen: Observed, similarity: Tensor | None, derivatives: Derivatives, recipe: Recipe
) -> Float[Tensor, " unit"]:
    """The criterion's scores of one site, from all that was seen of it.

    Raises:
        CalibrationError: not one finite number per unit.
    """
    statistics = Statistics(
        consumer=seen.consumer,
        producer=seen.producer,
        similarity=similarity,
        gradients=derivatives.gradients,
        fisher=derivatives.fisher.get(site.key),
        importance=derivatives.importance.get(site.key),
        gates=derivatives.gates.get(site.key),
        seed=recipe.seed,
    )
    scoring = recipe.scoring(site.name)
    scores = CRITERIA[scoring.criterion](site, statistics, **scoring.options).detach().cpu()
    if scores.shape != (site.n_units,) or not bool(torch.isfinite(scores).all()):
        raise CalibrationError(
            f"block {site.block}, {site.key}: criterion {scoring.criterion!r} gave "
            f"{int((~torch.isfinite(scores)).sum())} non-finite scores for {site.n_units} units"
        )
    return agreed(scores.contiguous())


def similarity_of(
    stream: BlockStream, fit: Sequence[int], site: Site, recipe: Recipe, needs: frozenset[str]
) -> Tensor | None:
    """The head similarity, on the batches `fit`, of an attention site whose criterion asks for it."""
    if "similarity" not in needs:
        return None
    assert site.spec.probabilities is not None
    return head_similarity(
        stream,
        site.block,
        site.spec.probabilities,
        sequences=min(
            recipe.similarity_sequences, int(summed_number(sum(len(stream.batches[b]["input_ids"]) for b in fit)))
        ),
        rows=recipe.similarity_rows,
        skip=recipe.similarity_skip,
        exclude_sink=recipe.exclude_sink,
    )


def curve_of(site: Site, scores: Float[Tensor, " unit"], recipe: Recipe) -> Float[Tensor, " count"]:
    """Relative error with the lowest 0, 1, 2... units removed.

    Scores that are no error curve are taken as each unit's share of the module's output energy.
    """
    ordered = scores.double().sort().values
    if not CRITERIA[recipe.scoring(site.name).criterion].curve:
        ordered = ordered.clamp_min(0).cumsum(0) / ordered.clamp_min(0).sum().clamp_min(1e-300)
    return torch.cat([ordered.new_zeros(1), ordered])


def standardised(site: Site, scores: Float[Tensor, " unit"], recipe: Recipe) -> Float[Tensor, " unit"]:
    """(score - mean) / std within a site; score - mean where the criterion divides by a standard deviation itself."""
    centred = scores.double() - scores.double().mean()
    if CRITERIA[recipe.scoring(site.name).criterion].standard:
        return centred
    return centred / centred.std(correction=0).clamp_min(1e-12)


def _curvature(site: Site, fisher: Float[Tensor, "out out"], moments: Moments) -> float:
    """1/2 tr(G W C W^T): what losing all of the module's output would cost, if cost were quadratic."""
    weight = exact(weight_of(site.consumer.layer))
    second = moments.fitted(bias_of(site.consumer.layer))
    return float(((fisher @ weight) * (weight @ second)).sum() / 2)


def _price(
    site: Site,
    scores: Float[Tensor, " unit"],
    moments: Moments,
    recipe: Recipe,
    budget: Budget,
    divergence: Divergence,
    entering: Sequence[Tensor],
) -> list[Point]:
    points, key = [], site.key
    with Rehearsal([site], {key: scores}, {key: moments}, repair_of(recipe), recipe.ridge) as rehearsal:
        for removed in levels_of(site, budget):
            rehearsal.apply({key: removed})
            points.append((removed, divergence.measure(site.block, entering)))
    return points

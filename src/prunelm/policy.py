"""Keep probabilities, and how losses of random masks move them: the policy gradient of OSP, on plain tensors."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import RecipeError

PROJECTION_STEPS = 60
_CHOICES = {
    "baseline": ("moving-average", "leave-one-out"),
    "estimator": ("sqrt", "plain"),
    "start": ("sigmap", "constant", "metric"),
    "pool": ("kind", "all", "block"),
    "layers": ("none", "sublayer", "block"),
    "grouping": ("ranked", "adjacent"),
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How keep probabilities are searched.

    Attributes:
        steps: of gradient descent; 0 takes the start as it is.
        rate: of learning, falling to 0 along a half cosine.
        masks: drawn in each step, two or more, all measured on the same batch of the calibration.
        sequences: of a calibration batch that a step reads, at most.
        baseline: what losses are compared with: their `moving-average` over steps, or the other masks of the same step
            (`leave-one-out`).
        window: steps that the moving average remembers.
        estimator: (m - s) over `sqrt` of s (1 - s), as the released code has it, or over s (1 - s), the `plain` score
            function.
        start: `sigmap` (sigmoid of the standardized scores, shifted to the mean that the budget asks for), `constant`
            (`confidence` where the criterion keeps a unit, 1 - `confidence` elsewhere), `metric` (scores from 0 to 1,
            shifted to that mean).
        confidence: see `start`.
        pool: what shares a budget: all units of a `kind`, `all` units together, or the units of a kind in a `block`.
        ffn_groups: variables of each FFN at most, of equally many channels but for the last one; 0 makes every channel
            its own, as in the paper.
        grouping: the channels of a variable are neighbors in the criterion's order (`ranked`) or in the weights
            (`adjacent`).
        layers: whether whole layers are the variables: `none`, `sublayer` (the attention or FFN of a block), or
            `block`.
        save_every: steps between two entries of a journal.
    """

    steps: int = 400
    rate: float = 0.002
    masks: int = 2
    sequences: int = 8
    baseline: str = "moving-average"
    window: int = 5
    estimator: str = "sqrt"
    start: str = "sigmap"
    confidence: float = 0.8
    pool: str = "kind"
    ffn_groups: int = 0
    grouping: str = "ranked"
    layers: str = "none"
    save_every: int = 25

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(f"policy: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        least = {"steps": 0, "masks": 2, "sequences": 1, "window": 1, "ffn_groups": 0, "save_every": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise RecipeError(f"policy: {name} must be a whole number from {bound} up, got {value!r}")
        if not _is_number(self.rate) or not 0 < self.rate < math.inf:
            raise RecipeError(f"policy: rate must be above 0, got {self.rate!r}")
        if not _is_number(self.confidence) or not 0.5 < self.confidence < 1:
            raise RecipeError(f"policy: confidence must be in (0.5, 1), got {self.confidence!r}")
        if self.layers == "block" and self.pool != "all":
            raise RecipeError("policy: whole blocks are of no kind: layers 'block' needs pool 'all'")

    @classmethod
    def from_dict(cls, data: object, where: str) -> "Policy":
        """The policy that a table of a recipe says.

        Raises:
            RecipeError: no table, an unknown key, or a bad value.
        """
        from .registry import did_you_mean

        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: [policy] must be a table, got {data!r}")
        for key in data:
            if key not in known:
                raise RecipeError(f"{where}: [policy] has no key {key!r}. {did_you_mean(key, known)}")
        return cls(**data)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def projected(s: Float[Tensor, " unit"], cost: Float[Tensor, " unit"], budget: float) -> Float[Tensor, " unit"]:
    """The nearest s' with 0 <= s' <= 1 and cost . s' <= budget: clip(s - v cost, 0, 1), v >= 0 by bisection.

    Source: the released code of arXiv 2406.10576, where all costs are 1 and the budget counts units.
    Differs: costs are parameters.

    Raises:
        RecipeError: the budget is negative, so no s' exists.
    """
    if budget < 0:
        raise RecipeError(f"a budget of {budget} parameters cannot hold any unit")
    low, high = 0.0, float((s / cost).max().clamp_min(0))
    if float(cost @ s.clamp(0, 1)) <= budget:
        return s.clamp(0, 1)
    for _ in range(PROJECTION_STEPS):
        middle = (low + high) / 2
        if float(cost @ (s - middle * cost).clamp(0, 1)) > budget:
            low = middle
        else:
            high = middle
    return (s - high * cost).clamp(0, 1)


def compared_with(losses: Float[Tensor, " mask"], policy: Policy, average: float | None) -> tuple[Tensor, float]:
    """What each loss is compared with, and the moving average now.

    The average takes in this step's mean before it is used, as in the released code; the first is that mean itself.
    """
    mean = float(losses.mean())
    now = mean if average is None else (1 - 1 / policy.window) * average + mean / policy.window
    if policy.baseline == "leave-one-out":
        return (losses.sum() - losses) / (len(losses) - 1), now
    return torch.full_like(losses, now), now


def score_gradient(
    losses: Float[Tensor, " mask"],
    masks: Bool[Tensor, "mask unit"],
    s: Float[Tensor, " unit"],
    against: Float[Tensor, " mask"],
    estimator: str,
) -> Float[Tensor, " unit"]:
    """sum_k (L_k - b_k) (m_k - s) / sqrt(s (1 - s)) / (K - 1), an estimate of how E[L] changes with s.

    With `plain`, s (1 - s) stands in place of its root, and the sum is divided by K: then the mean is exactly dE[L]/ds
    wherever b_k does not depend on m_k. As released, it is K / (K - 1) (1 - 1 / (K T)) sqrt(s (1 - s)) times that, T
    the window: the same direction in every coordinate. Probabilities of 0 and 1 draw no other mask and do not move.

    Source: arXiv 2406.10576, estimator of its released code; `plain` is REINFORCE.
    """
    spread = s * (1 - s)
    scale = (spread.sqrt() if estimator == "sqrt" else spread).clamp_min(1e-7)
    count = len(losses) - 1 if estimator == "sqrt" else len(losses)
    return ((losses - against)[:, None] * (masks.to(s) - s) / scale).sum(0) / count


def rate_at(policy: Policy, step: int) -> float:
    """The learning rate of a step, from `rate` down to 0 along a half cosine."""
    return policy.rate * (1 + math.cos(math.pi * step / max(policy.steps, 1))) / 2


def started(
    metric: Float[Tensor, " variable"],
    layers: Sequence[Int[Tensor, " _"]],
    share: Float[Tensor, " variable"],
    policy: Policy,
) -> Float[Tensor, " variable"]:
    """The first keep probabilities, the same mean in every layer.

    Args:
        metric: scores of the variables, comparable within a layer; higher stays.
        layers: the variables of each layer.
        share: of each variable's pool that stays.
        policy: says how to start.
    """
    s = torch.zeros_like(metric)
    for mine in layers:
        here, mean = metric[mine], share[mine].mean()
        if policy.start == "constant":
            stays = here.argsort(stable=True).argsort() >= len(mine) - int(torch.round(mean * len(mine)))
            s[mine] = torch.where(stays, policy.confidence, 1 - policy.confidence).to(s)
            continue
        if policy.start == "sigmap":
            spread = here.std() if len(mine) > 1 else here.new_ones(())
            here = ((here - here.mean()) / spread.clamp_min(1e-12)).sigmoid()
        else:
            here = (here - here.min()) / (here.max() - here.min()).clamp_min(1e-12)
        s[mine] = (here + mean - here.mean()).clamp(0, 1)
    return s

"""The most that can go before perplexity on held-out text passes a limit: pruned and measured, by bisection."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import BudgetError, DataError, EvaluationError
from .evaluation import check_losses, text_windows
from .journal import Journal
from .limits import MaxPerplexity
from .progress import Progress
from .pruning import Report
from .recipe import Recipe
from .scoring import mean_loss, score_windows
from .tasks import task_of

LENGTH, TOKENS = 512, 8192
"""Tokens in a window, and the most that are measured on."""
HELD = 10
"""Of the calibration text, one part in so many is held out where no other text is given."""
LAST_TENTH = "the last tenth of "
"""Begins the name of what was held out so."""
TRIALS, CLOSE = 8, 0.005
"""Models pruned at most, and the difference of sparsities below which the search ends."""

Pruned = tuple[PreTrainedModel, Report]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Text that is measured on and calibrates nothing."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """The SHA-256 of the text."""
        return hashlib.sha256(self.text.encode(errors="surrogatepass")).hexdigest()

    def windows(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Int[Tensor, " length"]]:
        """Its first tokens, in windows that the model can read.

        Raises:
            DataError: it does not fill one.
        """
        length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
        return text_windows(self.text, self.name, model, tokenizer, length, TOKENS)


@dataclass
class Search:
    """What was tried: sparsities with their perplexities, and the smallest model within the limit."""

    limit: float
    trials: list[dict[str, Any]] = field(default_factory=list)
    best: Pruned | None = None
    low: float = 0.0
    high: float = 1.0

    def next(self, start: float, most: float) -> float:
        """The sparsity to try: twice the last until one is too much, then halfway."""
        if not self.trials:
            return start
        if self.high > most:
            return min(2 * self.low, most)
        return (self.low + self.high) / 2

    def over(self, most: float) -> bool:
        """Whether nothing is left to try."""
        return len(self.trials) >= TRIALS or self.high - self.low < CLOSE or self.low >= most


def split_off(documents: Sequence[str], name: str) -> tuple[list[str], Held]:
    """The first nine tenths of some documents by characters, and the rest, held out.

    Raises:
        DataError: there is too little of it.
    """
    total = sum(len(document) for document in documents)
    room = total - total // HELD
    kept, held = [], []
    for document in documents:
        kept.append(document[:room])
        held.append(document[room:])
        room = max(0, room - len(document))
    rest = [document for document in held if document]
    if not rest:
        raise DataError(f"{name}: too short to hold out a tenth of it: give --held-out-text FILE.")
    return [document for document in kept if document], Held(name=f"{LAST_TENTH}{name}", text="\n\n".join(rest))


def perplexity_on(model: PreTrainedModel, windows: Sequence[Int[Tensor, " length"]], where: str) -> float:
    """Exp of the mean next-token loss.

    Raises:
        EvaluationError: a loss is not finite.
    """
    records = [record for window in windows for record in score_windows(model, window[None])]
    check_losses(model, windows, records, where)
    return math.exp(mean_loss(records))


def rounded_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the weights the values that they have once they are written in a dtype."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def within(
    limit: MaxPerplexity,
    recipe: Recipe,
    *,
    dense: float,
    prune: Callable[[float], Pruned],
    measure: Callable[[PreTrainedModel], float],
    most: float,
    text: str,
    journal: Journal,
    progress: Progress,
) -> tuple[PreTrainedModel, Report, dict[str, Any]]:
    """The smallest model found whose perplexity is within the limit, its report, and what was tried.

    Args:
        limit: what must not be exceeded.
        recipe: its sparsity is tried first.
        dense: the dense model's perplexity on the text.
        prune: gives a new model, pruned to a sparsity.
        measure: its perplexity, with the weights as they are written.
        most: the largest sparsity that the sites allow.
        text: what it is measured on, in words.
        journal: of trials, which are not made again; the one that is kept is pruned again.
        progress: told about every trial.

    Raises:
        BudgetError: nothing that was tried is within the limit; says what was.
    """
    search = Search(limit=limit.limit(dense))
    what = f"--max-ppl {limit.said}: {dense:.4g} dense on {text}, at most {search.limit:.4g} allowed"
    if search.limit <= dense and not limit.relative:
        raise BudgetError(f"{what}, which the dense model does not meet itself. Ask for more than {dense:.4g}.")
    while not search.over(most):
        progress("trials", len(search.trials), TRIALS)
        _try(search, search.next(min(recipe.sparsity, most), most), prune, measure, journal)
    progress("trials", TRIALS, TRIALS)
    said = ", ".join(_said(trial) for trial in search.trials)
    if not search.low:
        raise BudgetError(f"{what}; every size tried is above: {said}. Ask for more, or use a recipe that repairs.")
    found = next(t for t in search.trials if t["sparsity"] == search.low)
    asked = {
        "max_ppl": limit.said,
        "text": text,
        "dense": dense,
        "limit": search.limit,
        "perplexity": found["perplexity"],
        "sparsity": search.low,
        "trials": search.trials,
    }
    model, report = search.best or prune(search.low)
    note = f"{what}: {found['perplexity']:.4g} at sparsity {search.low:.4g} (tried: {said})"
    report.notes.insert(0, note)
    return model, report, asked


def _try(
    search: Search,
    sparsity: float,
    prune: Callable[[float], Pruned],
    measure: Callable[[PreTrainedModel], float],
    journal: Journal,
) -> None:
    """Prune to a sparsity, measure, and narrow the search; a size that cannot be met counts as too much."""
    made: list[Pruned] = []

    def trial() -> dict[str, Any]:
        try:
            made.append(prune(sparsity))
            value = measure(made[0][0])
        except (BudgetError, EvaluationError):
            value = math.inf
        return {"sparsity": sparsity, "perplexity": value if math.isfinite(value) else None}

    found = journal.entry(trial)
    search.trials.append(found)
    if found["perplexity"] is not None and found["perplexity"] <= search.limit:
        search.low, search.best = sparsity, made[0] if made else None
    else:
        search.high = sparsity


def _said(trial: dict[str, Any]) -> str:
    value = trial["perplexity"]
    return f"{'nothing finite' if value is None else f'{value:.4g}'} at {trial['sparsity']:.4g}"


def check_causal(model: PreTrainedModel, limit: MaxPerplexity) -> None:
    """Raise unless a model has a perplexity.

    Raises:
        BudgetError: says what it is.
    """
    if task_of(model) != "causal":
        raise BudgetError(f"--max-ppl {limit.said}: {type(model).__name__} predicts no next token: use --sparsity.")

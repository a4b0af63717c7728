"""The evaluation suite: parts that measure a pruned model beside the dense one, each optional, resumable, in JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EvaluationError
from ..evaluation import check_comparable, check_tokenizers
from ..journal import Journal
from ..loading import Source, load_model, load_tokenizer
from ..progress import Progress
from ..registry import did_you_mean

if TYPE_CHECKING:
    from .growing import Growing

CAUSAL, EVERY = frozenset({"causal"}), frozenset({"causal", "masked", "classifier", "embedding"})
"""Kinds of models."""
WINDOWS = ("length", "max_tokens", "batch_size", "seed", "dtype")
"""Settings of what reads windows of a text."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that changes the numbers of a suite, apart from the models and the text.

    `length`, `max_tokens`, `batch_size`: of the windows. `prompts`, `new_tokens`: of the generation. `rounds`: of the
    speed. `tasks`, `include_path`, `limit`: for lm-eval. `others`: files of text of other kinds. `pseudo_tokens`:
    masked in turn. `seed`: of all chance.
    """

    length: int = 1024
    max_tokens: int | None = None
    batch_size: int = 1
    prompts: int = 8
    new_tokens: int = 48
    rounds: int = 7
    pseudo_tokens: int = 512
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    others: tuple[str, ...] = ()
    seed: int = 0
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is measured, the dense one beside it where there is one, their tokenizer, and the text."""

    model: PreTrainedModel
    dense: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    text: Path
    source: Source
    against: Source | None

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """`dense`, where there is one, and `model`."""
        return {**({"dense": self.dense} if self.dense is not None else {}), "model": self.model}

    @property
    def sources(self) -> dict[str, Source]:
        """Where they come from, by the same names."""
        return {**({"dense": self.against} if self.against is not None else {}), "model": self.source}


Read = Callable[[Subject, Setting], list[str]]
Measure = Callable[[Subject, Setting, Journal, Progress], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the suite: what it measures, for which kinds of models, and the settings that its numbers hang on.

    `reads` gives what it scores of the text. The numbers of a `timed` part hang on the device too. `grows` keeps apart
    what was named. `check` raises before anything is loaded.
    """

    summary: str
    measure: Measure
    kinds: frozenset[str]
    settings: tuple[str, ...]
    reads: Read | None = None
    reads_others: bool = False
    timed: bool = False
    paired_only: bool = False
    grows: "Growing | None" = None
    check: Callable[[Setting], Any] | None = None


def parts() -> dict[str, Part]:
    """Every part by name, in the order in which they are measured."""
    return {**_text_parts(), **_other_parts()}


def _text_parts() -> dict[str, Part]:
    """Parts that are about what a model makes of a text."""
    from .generation import generation
    from .growing import Growing, join_texts
    from .noise import noise
    from .passages import all_read, masked_read, windows_read
    from .positions import positions, positions_read
    from .pseudo import pseudo_perplexity
    from .quality import quality
    from .shift import shift

    return {
        "quality": Part(
            summary="perplexity or accuracy, paired with dense; bits per byte, KL, agreement, calibration error",
            measure=quality,
            reads=windows_read,
            kinds=EVERY,
            settings=WINDOWS,
        ),
        "positions": Part(
            summary="perplexity by position in long windows: 4 x length, as far as model and text reach",
            measure=positions,
            reads=positions_read,
            kinds=CAUSAL,
            settings=WINDOWS,
        ),
        "pseudo-perplexity": Part(
            summary="every token masked in turn",
            measure=pseudo_perplexity,
            reads=masked_read,
            kinds=frozenset({"masked"}),
            settings=("length", "pseudo_tokens", "seed", "dtype"),
        ),
        "generation": Part(
            summary="greedy continuations beside those of dense, and where they part",
            measure=generation,
            reads=all_read,
            kinds=CAUSAL,
            settings=("prompts", "new_tokens", "dtype"),
        ),
        "noise": Part(
            summary="perplexity or accuracy with typos, other casing, lost punctuation, shuffled sentences",
            measure=noise,
            reads=windows_read,
            kinds=CAUSAL | {"classifier"},
            settings=WINDOWS,
        ),
        "shift": Part(
            summary="perplexity on texts of other kinds, and what the change costs (needs --others)",
            measure=shift,
            reads=windows_read,
            kinds=CAUSAL,
            settings=WINDOWS,
            reads_others=True,
            grows=Growing(field="others", place=("others",), join=join_texts),
        ),
    }


def _other_parts() -> dict[str, Part]:
    """Parts that are about heads, tasks, time and memory."""
    from .growing import Growing, join_tasks
    from .heads import heads
    from .passages import windows_read
    from .tasks import check_tasks, tasks
    from .timing import memory, speed
    from .widths import widths

    return {
        "heads": Part(
            summary="which attention heads of the dense model attend alike, for the graphs of the report",
            measure=heads,
            reads=windows_read,
            kinds=EVERY,
            settings=("length", "dtype"),
            paired_only=True,
        ),
        "tasks": Part(
            summary="lm-eval tasks: acc and acc_norm (needs --tasks)",
            measure=tasks,
            kinds=CAUSAL,
            settings=("tasks", "include_path", "limit", "batch_size", "seed", "dtype"),
            grows=Growing(field="tasks", place=("settings", "tasks"), join=join_tasks),
            check=check_tasks,
        ),
        "speed": Part(
            summary="prefill and decode tokens/s, first-token latency, KV cache, models taking turns",
            measure=speed,
            kinds=EVERY,
            settings=("rounds", "dtype"),
            timed=True,
        ),
        "widths": Part(
            summary="whether a layer is slower than the next rounder width would be, on this machine",
            measure=widths,
            kinds=EVERY,
            settings=("rounds", "dtype"),
            timed=True,
        ),
        "memory": Part(
            summary="peak memory of a fresh process that loads the model and reads or writes with it",
            measure=memory,
            kinds=EVERY,
            settings=("dtype",),
            timed=True,
        ),
    }


def check_names(names: Sequence[str], setting: Setting, *, paired: bool) -> None:
    """Raise before anything is loaded where some parts cannot be measured; `paired`: there is a dense model.

    Raises:
        EvaluationError: an unknown name, tasks or other texts without names, an unknown task, lm-eval or the dense
            model is missing.
    """
    known = parts()
    if "all" in names and len(names) > 1:
        raise EvaluationError("'all' stands alone among the names of parts: leave the others out, or 'all'")
    for name in [] if list(names) == ["all"] else names:
        if name not in known:
            raise EvaluationError(
                f"no part is called {name!r}. {did_you_mean(name, list(known))}Known: all, {', '.join(known)}."
            )
    if "tasks" in names and not setting.tasks:
        raise EvaluationError("part 'tasks' needs the names of tasks: give --tasks NAME,NAME")
    if "shift" in names and not setting.others:
        raise EvaluationError("part 'shift' needs texts of other kinds: give --others FILE,FILE")
    for name, part in known.items():
        if part.paired_only and name in names and not paired:
            raise EvaluationError(f"part {name!r} looks at the dense model: give --against DENSE")
        if part.check is not None and (name in names or list(names) == ["all"]):
            part.check(setting)


def chosen_parts(names: Sequence[str], kind: str, setting: Setting, *, paired: bool) -> dict[str, Part]:
    """The parts of these names; `all` is every one that fits the kind of model and needs nothing more.

    Raises:
        EvaluationError: a part does not fit the model.
    """
    known = parts()
    if list(names) == ["all"]:
        given = {"tasks": setting.tasks, "shift": setting.others}
        fitting = {n: p for n, p in known.items() if kind in p.kinds and given.get(n, True)}
        return {n: p for n, p in fitting.items() if paired or not p.paired_only}
    for name in names:
        if kind not in known[name].kinds:
            fits = ", ".join(n for n, p in known.items() if kind in p.kinds)
            raise EvaluationError(f"part {name!r} does not fit this model, which is {kind}. Those that do: {fits}.")
    return {name: known[name] for name in known if name in names}


def open_subject(source: Source, against: Source | None, text: Path, setting: Setting) -> Subject:
    """The models of a suite, loaded, and found to be comparable.

    Raises:
        CheckpointError: cannot be loaded.
        EvaluationError: the two do different tasks, or their tokenizers differ.
    """
    import torch

    dtype = getattr(torch, setting.dtype)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=dtype)
    dense = load_model(against, dtype=dtype) if against is not None else None
    if dense is not None and against is not None:
        check_comparable(model, dense)
        check_tokenizers(tokenizer, load_tokenizer(against))
    return Subject(model=model, dense=dense, tokenizer=tokenizer, text=text, source=source, against=against)


def settings_of(part: Part, setting: Setting) -> Mapping[str, Any]:
    """The settings that a part's numbers hang on, JSON-able."""
    data = asdict(setting)
    return {name: list(data[name]) if isinstance(data[name], tuple) else data[name] for name in part.settings}

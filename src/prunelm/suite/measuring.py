"""Run the parts of a suite, and keep what they found in a file that an interrupted run goes on with."""

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..calibration import fingerprint, tokenizer_fingerprint
from ..card import LICENSE, PIPELINE, metadata, model_card
from ..data import JOIN, read_documents
from ..differing import digest_of
from ..errors import CalibrationError, DataError, EvaluationError
from ..forms import check_form, damage_answered
from ..journal import Journal, journal_beside, place_beside
from ..loading import Source, bytes_on_disk, find_dense, find_model, read_json
from ..placement import device_words
from ..progress import Progress, silent
from ..results import versions, write_results
from ..tasks import task_of
from ..writing import write_whole, writes
from . import Part, Setting, Subject, check_names, chosen_parts, open_subject, settings_of
from .growing import joined, rest
from .passages import calibration_overlap
from .summary import measured

FORMAT = 1
FILE = "evaluation.json"
FIRST = "quality"
"""The part that no evaluation can do without."""
_KNOWN_BY = {"model": ("weights", "tokenizer"), "against": ("weights",)}
"""What tells the models of one evaluation from those of another; both read what the model's tokenizer makes."""
_MODEL = {"name": str, "weights": str, "tokenizer?": str, "parameters?": int, "bytes?": int}
_FORM = {
    "model": _MODEL,
    "against?": (None, _MODEL),
    "parts": {
        str: {"settings?": dict, "results": dict, "text?": {"name": str, "sha256": str}, "overlap?": (None, dict)}
    },
}


@writes
def measure(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    parts: Sequence[str] = ("quality",),
    out: str | Path | None = None,
    setting: Setting | None = None,
    progress: Progress = silent,
    **access: Any,
) -> dict[str, Any]:
    """What some parts of the suite found about a model, as in the file `evaluation.json` (docs/format.md).

    With `out`, every part is written there when it is finished, and parts that the file has under the same settings
    are not measured again. An interrupted part goes on from a journal beside the file, with the same numbers.

    Args:
        model: what is measured.
        text: that it was not calibrated on.
        against: the dense model, for everything that is paired.
        parts: names of `prunelm.suite.parts()`, or `all`, under which a part that the text is too short for is left
            out; `left_out` says why.
        out: file to write or to add to.
        setting: everything that changes the numbers.
        progress, access: see `prunelm.prune`.

    Raises:
        PruneLMError: one line that says what to do; finished parts stay in `out`.
    """
    setting = setting or Setting()
    paired = against is not None
    check_names(parts, setting, paired=paired)
    words = JOIN.join(read_documents(text))
    others = {other: _sha256(JOIN.join(read_documents(other))) for other in setting.others}
    source = find_model(model, **access)
    other = find_dense(against, source, **access) if against is not None else None
    target = Path(out) if out is not None else None
    head = _head(source, other)
    found = _opened(target, head)
    before = {"parts": dict(found["parts"]), "against": found.get("against")}
    subject = open_subject(source, other, Path(text), setting)
    for name, source_ in subject.sources.items():
        who = "model" if name == "model" else "against"
        head[who] |= {"parameters": _parameters(subject, name), "bytes": bytes_on_disk(source_)}
    found |= head
    for name, part in chosen_parts(parts, task_of(subject.model), setting, paired=paired).items():
        asked = _asked(part, setting, source, Path(text), _sha256(words), others)
        known = found["parts"].get(name)
        due = rest(part, known, asked, setting)
        if due is None:
            _clear(target, name, _inputs(name, asked, head, source))
            continue
        new = _asked(part, due, source, Path(text), _sha256(words), others)
        with journal_beside(target, name, _inputs(name, new, head, source), command="evaluate") as journal:
            try:
                fresh = _run(part, subject, due, new, journal, progress)
                found["parts"][name] = joined(part, known, fresh, asked)
            except DataError as error:
                if list(parts) != ["all"] or name == FIRST:
                    raise
                found.setdefault("left_out", {})[name] = str(error)
            found["versions"] = versions()
            if target is not None:
                write_results(target, found)
    if target is not None and target.resolve().parent == source.folder.resolve():
        with damage_answered(target):
            _renew_card(source, before, found, task_of(subject.model))
    return found


def _asked(
    part: Part, setting: Setting, source: Source, text: Path, digest: str, others: Mapping[str, str]
) -> dict[str, Any]:
    """What the numbers of a part hang on; texts with their checksums."""
    asked: dict[str, Any] = {"settings": dict(settings_of(part, setting))}
    if part.reads is not None:
        asked["text"] = {"name": text.name, "sha256": digest}
    if part.timed:
        asked["device"] = device_words(source.device)
    if part.reads_others:
        asked["others"] = [{"name": Path(other).name, "sha256": others[other]} for other in setting.others]
    return asked


def _renew_card(source: Source, before: Mapping[str, Any], found: Mapping[str, Any], task: str) -> None:
    """Put the measured table on the card of a folder that we wrote, unless somebody has edited that card."""
    plan, path = source.plan(), source.folder / "README.md"
    if plan is None or not path.is_file():
        return
    head = metadata(path, LICENSE + PIPELINE)
    ours = (model_card(plan, known, head=head) for known in (None, measured(before, task, plan)))
    if path.read_text(encoding="utf-8") in ours:
        write_whole(path, model_card(plan, measured(found, task, plan), head=head))


def _inputs(name: str, asked: Mapping[str, Any], head: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """What the journal of a part is of."""
    known_by = {who: {key: head[who][key] for key in keys if head[who]} for who, keys in _KNOWN_BY.items()}
    machine = {"versions": versions(), "threads": torch.get_num_threads(), "device": source.where}
    return {**machine, "part": name, **asked, **known_by}


def _clear(target: Path | None, name: str, inputs: Mapping[str, Any]) -> None:
    """Remove the journal of a part that was killed once its numbers stood; one of other settings stays."""
    if target is None or not place_beside(target, name).is_file():
        return
    with contextlib.suppress(CalibrationError), journal_beside(target, name, inputs, command="evaluate"):
        pass


def _run(
    part: Part,
    subject: Subject,
    setting: Setting,
    asked: Mapping[str, Any],
    journal: Journal,
    progress: Progress,
) -> dict[str, Any]:
    """One part, as the file has it."""
    start = time.perf_counter()
    result = part.measure(subject, setting, journal, progress)
    found = {**asked, "results": result, "seconds": round(time.perf_counter() - start, 1)}
    if part.reads is not None:
        found["overlap"] = calibration_overlap(subject.source, part.reads(subject, setting))
    return found


def _head(source: Source, other: Source | None) -> dict[str, Any]:
    found: dict[str, Any] = {"format": FORMAT, "model": None, "against": None}
    for who, one in (("model", source), ("against", other)):
        if one is not None:
            name = one.name if not Path(one.name).exists() else Path(one.name).resolve().name
            found[who] = {"name": name, "weights": weights_digest(one)}
    found["model"]["tokenizer"] = digest_of(tokenizer_fingerprint(source))[:16]
    return found


def weights_digest(source: Source) -> str:
    """What `evaluation.json` knows a model by."""
    return digest_of(fingerprint(source))[:16]


def _parameters(subject: Subject, name: str) -> int:
    return sum(p.numel() for p in subject.models[name].parameters())


def _opened(target: Path | None, head: Mapping[str, Any]) -> dict[str, Any]:
    """What the file has so far.

    Raises:
        EvaluationError: it is of other models or another tokenizer, of another format, or no evaluation.
    """
    if target is None or not target.exists():
        return {"parts": {}}
    if target.is_dir():
        raise EvaluationError(f"{target} is a folder; --out names a file, as in {target / FILE}.")
    there = read_evaluation(target)
    for who in ("model", "against"):
        ours, theirs = (data.get(who) or {} for data in (head, there))
        if ours.get("weights") != theirs.get("weights"):
            what = "the model" if who == "model" else "the dense model (--against)"
            raise EvaluationError(
                f"{target} is an evaluation of other models: {what} was {theirs.get('name', 'none')}, and is now "
                f"{ours.get('name', 'none')} ({ours.get('weights', 'none')} after {theirs.get('weights', 'none')}). "
                "Name another file, or remove it."
            )
    was, now = (data["model"].get("tokenizer", "not noted") for data in (there, head))
    if was != now:
        raise EvaluationError(
            f"{target} is an evaluation with another tokenizer: that of {head['model']['name']} was {was}, and is now "
            f"{now}. Put the tokenizer back, name another file, or remove it."
        )
    there.pop("left_out", None)
    return there


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `measure` wrote.

    Raises:
        CheckpointError: cannot be read, or damaged.
        EvaluationError: another format, or no evaluation.
    """
    data = read_json(path)
    if data.get("format") != FORMAT or not isinstance(data.get("parts"), dict):
        raise EvaluationError(f"{path}: no evaluation of format {FORMAT}. Name another file, or remove it.")
    check_form(data, _FORM, path)
    return data


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""An evaluation in a few rows: what is printed, what the model card says, what the report begins with."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..card import Measured
from ..doubts import doubts
from ..similarity import ALIKE
from ..tasks import PIPELINES

Row = tuple[str, str, str, str]
"""Measure, dense, model, and how they compare; empty where there is nothing to say."""


def summary(found: Mapping[str, Any]) -> list[Row]:
    """One row per measure of every part that was measured."""
    rows: list[Row] = []
    for name, part in found["parts"].items():
        rows += _ROWS[name](part["results"])
    return rows


def measured(found: Mapping[str, Any], task: str, pruning: Mapping[str, Any]) -> Measured | None:
    """What the model card says of an evaluation; None before part `quality` was measured."""
    part = found["parts"].get("quality")
    if part is None:
        return None
    results, names = part["results"], ("bits_per_byte", "top1")
    metrics = {results["metric"]: results["value"]} if "value" in results else {}
    metrics |= {name: results[name] for name in names if name in results}
    pairs = {"kl_to_dense": "kl", "cosine_to_dense": "cosine"}
    metrics |= {label: results[name]["value"] for label, name in pairs.items() if name in results}
    return Measured(
        rows=list(_named_rows(found)),
        doubts=doubts(pruning, found),
        text=part["text"]["name"],
        paired=bool(found.get("against")),
        task=PIPELINES[task],
        metrics=metrics,
    )


def _named_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of all parts, with the name of the text where it is not the one of part `quality`."""
    home = found["parts"]["quality"]["text"]
    for name, part in found["parts"].items():
        text = part.get("text", home)
        where = "" if text == home else f" (on {'another ' * (text['name'] == home['name'])}{text['name']})"
        for measure, *cells in summary({"parts": {name: part}}):
            dense, model, compared = (cell.replace("+-", "±") for cell in cells)
            yield f"{measure}{where}", dense, model, compared


def digits(value: float, count: int) -> str:
    """A number with so many digits that count, zeros at its end among them."""
    return f"{value:#.{count}g}".rstrip(".") if abs(value) < 10**count else f"{value:,.0f}"


def _ratio(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    if found.get("low") is None:
        return f"{found['value']:.3f}x"
    return f"{found['value']:.3f}x ({found['low']:.3f} to {found['high']:.3f})"


def _both(found: Mapping[str, Any], key: str, form: str) -> tuple[str, str]:
    dense = found.get("dense", {}).get(key)
    mine = found.get(key)
    return ("" if dense is None else form.format(dense), "" if mine is None else form.format(mine))


def _with_error(found: Mapping[str, Any]) -> str:
    if found.get("value") is None:
        return ""
    return digits(found["value"], 4) + (f" +- {digits(found['error'], 2)}" if found.get("error") is not None else "")


def _quality(found: Mapping[str, Any]) -> Iterator[Row]:
    if "value" in found:
        compared = _difference(found["difference"]) if "difference" in found else _ratio(found.get("ratio"))
        yield found["metric"], _with_error(found.get("dense", {})), _with_error(found), compared
    if "bits_per_byte" in found:
        yield "bits per byte", *_both(found, "bits_per_byte", "{:.4f}"), ""
    if "calibration_error" in found:
        yield "calibration error", *_both(found, "calibration_error", "{:.3f}"), ""
    if "kl" in found:
        yield "KL to dense", "", _spanned(found["kl"], 3), ""
    if "top1" in found:
        yield "same top token", "", f"{found['top1']:.1%}", ""
    if "cosine" in found:
        yield "cosine to dense", "", _spanned(found["cosine"], 4), ""


def _spanned(found: Mapping[str, Any], count: int) -> str:
    value, low, high = ("" if found[n] is None else digits(found[n], count) for n in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if low else value


def _difference(found: Mapping[str, Any]) -> str:
    value, _, ends = _signed(found, "+.1f", 100.0).partition(" ")
    return f"{value} points{' ' * bool(ends)}{ends}; {found['lost']} texts lost, {found['gained']} gained"


def _positions(found: Mapping[str, Any]) -> Iterator[Row]:
    dense = found.get("dense", [{}] * len(found["model"]))
    for mine, theirs in zip(found["model"], dense, strict=True):
        ratio = f"{mine['perplexity'] / theirs['perplexity']:.3f}x" if theirs else ""
        label = f"perplexity of tokens {mine['from']} to {mine['until']}"
        yield label, digits(theirs["perplexity"], 4) if theirs else "", digits(mine["perplexity"], 4), ratio


def _pseudo(found: Mapping[str, Any]) -> Iterator[Row]:
    dense, mine = _with_error(found.get("dense", {})), _with_error(found["model"])
    yield "pseudo-perplexity", dense, mine, _ratio(found.get("ratio"))


def _generation(found: Mapping[str, Any]) -> Iterator[Row]:
    if "same" in found:
        of = f"of {found['new_tokens']} tokens"
        yield "greedy text parts at token", "", f"{found['median_first_difference']:g} (median)", of
        yield "same continuation", "", f"{found['identical']} of {len(found['samples'])}", ""


def _noise(found: Mapping[str, Any]) -> Iterator[Row]:
    for row in found["noisy"]:
        if "added" not in row:
            compared = _difference(row["difference"]) if "difference" in row else ""
            label = f"{row['metric']} with {row['noise']} {row['strength']:g}"
            yield label, _with_error(row.get("dense", {})), _with_error(row), compared
            continue
        yield f"bits per byte more with {row['noise']} {row['strength']:g}", *_added(row), _ratio(row.get("excess"))


def _added(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a change of text adds for dense and model, with intervals."""
    found = [row["added"].get(name) for name in ("dense", "model")]
    dense, mine = (_signed(a, "+.3f") if a else "" for a in found)
    return dense, mine


def _signed(found: Mapping[str, Any], form: str, scale: float = 1.0) -> str:
    """A value with its interval, where there is one."""
    value, low, high = (None if found[n] is None else f"{scale * found[n]:{form}}" for n in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if low is not None else f"{value}"


def _shift(found: Mapping[str, Any]) -> Iterator[Row]:
    for row in found["others"]:
        label = f"bits per byte more on {row['text']} than on {found['home']['text']}"
        yield label, *_added(row), _ratio(row.get("excess"))


def _heads(found: Mapping[str, Any]) -> Iterator[Row]:
    distances = sorted(d for flat in found["similarity"].values() for d in flat)
    if distances:
        alike = sum(d < ALIKE for d in distances)
        said = f"{alike:,} of {len(distances):,}"
        yield f"pairs of heads within {ALIKE:g} nats of each other", said, "", ""


def _tasks(found: Mapping[str, Any]) -> Iterator[Row]:
    for task, both in found["tasks"].items():
        for metric in both["model"]:
            if metric == "rows":
                continue
            yield (
                f"{task} {metric}",
                _with_error(both.get("dense", {}).get(metric, {})),
                _with_error(both["model"][metric]),
                "",
            )


def _speed(found: Mapping[str, Any]) -> Iterator[Row]:
    for key, label, scale, form in (
        ("prefill", "prefill tokens/s", 1, "{:,.0f}"),
        ("decode", "decode tokens/s", 1, "{:,.1f}"),
        ("first_token", "first token, ms", 1000, "{:,.1f}"),
        ("cache_bytes_per_token", "KV cache, bytes per token", 1, "{:,.0f}"),
        ("file_bytes", "bytes on disk", 1, "{:,}"),
    ):
        values = [found.get(name, {}).get(key) for name in ("dense", "model")]
        if values[1] is None:
            continue
        dense, mine = ("" if value is None else form.format(value * scale) for value in values)
        ratio = found.get("ratio", {}).get(key)
        if ratio is None and values[0]:
            ratio = {"value": values[1] / values[0]}
        yield label, dense, mine, _ratio(ratio)


def _widths(found: Mapping[str, Any]) -> Iterator[Row]:
    for row in found["widths"]:
        best = min(row["wider"], key=lambda wider: wider["reading"]["value"], default=None)
        said = f"{best['width']:,} wide: {_ratio(best['reading'])} its time" if best else "nothing wider to try"
        site, blocks = row["site"].replace("ffn", "FFN"), f"{row['blocks']} block{'s' if row['blocks'] > 1 else ''}"
        where = f"{site} {row['width']:,} wide, {blocks}"
        yield f"{where}, ms for 512 tokens", "", f"{1000 * row['reading']:.3f}", said


def _memory(found: Mapping[str, Any]) -> Iterator[Row]:
    for key, label in (("loaded", "peak memory to load, MB"), ("used", "peak memory to use, MB")):
        values = [found[name][key] / 1e6 if name in found else None for name in ("dense", "model")]
        dense, mine = ("" if value is None else f"{value:,.0f}" for value in values)
        yield label, dense, mine, f"{values[1] / values[0]:.3f}x" if values[0] and values[1] else ""


_ROWS: dict[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    "quality": _quality,
    "positions": _positions,
    "pseudo-perplexity": _pseudo,
    "generation": _generation,
    "noise": _noise,
    "shift": _shift,
    "heads": _heads,
    "tasks": _tasks,
    "speed": _speed,
    "widths": _widths,
    "memory": _memory,
}

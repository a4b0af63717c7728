"""What a report says: plain data for the page, made from what was gathered."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..suite import parts
from ..suite.measuring import FILE as EVALUATION
from ..suite.summary import digits, summary
from . import figures
from .caveats import caveats
from .command import REPAIR, as_toml, command, evaluations, transferred
from .frontier import frontiers, not_drawn
from .gathering import TRANSFER, Gathered
from .head_graph import head_graphs
from .overview import overview, short_names

Shown = dict[str, Any]
_HEAD = {"quality", "pseudo-perplexity", "generation", "tasks", "speed", "memory"}
"""Parts whose numbers stand in the first table."""
SHARES, STEP, MILLION = 0.7, 0.01, 1_000_000
"""How far the slider goes at least, its steps, and how exact shares are."""
_HOW_LONG = "A line a block, from the first (blue) to the last (orange); the points are the widths that were chosen."


def content(found: Sequence[Gathered]) -> Shown:
    """Everything that the page template names."""
    numbers = iter(range(10_000))
    specs: dict[str, Any] = {}
    sliders: dict[str, Any] = {}

    def drawn(title: str, spec: figures.Spec, caption: str = "", *, wide: bool = False) -> Shown:
        name = f"figure-{next(numbers)}"
        specs[name] = spec
        return {"id": name, "title": title, "description": spec["description"], "caption": caption, "wide": wide}

    sections = []
    for k, one in enumerate(found):
        section = _section(one, drawn)
        slider = _slider(one)
        if slider is not None:
            known = {key: site for key, site in one.pruning["sites"].items() if key in (one.curves or {})["sites"]}
            rows = figures.site_rows(known)
            section["slider"] = {
                "id": f"slider-{k}",
                **_range(one.pruning["parameters"]["share_of_blocks"]),
                "how": slider["how"],
                "figure": drawn("Predicted widths", figures.predicted(rows)),
            }
            sliders[f"slider-{k}"] = {**slider, "figure": section["slider"]["figure"]["id"]}
        sections.append(section)
    sizes = [drawn(*figure) for figure in frontiers(found)] if len(found) > 1 else []
    return {
        "title": _title(found),
        "lead": _lead(found),
        "sections": sections,
        "frontiers": [*sizes, *(drawn(*figure) for figure in _family(found))],
        "not_drawn": not_drawn(found) if len(found) > 1 else [],
        "overview": overview(found) if len(found) > 1 else None,
        "data": {"figures": specs, "sliders": sliders},
    }


def _title(found: Sequence[Gathered]) -> str:
    bases = list(dict.fromkeys(one.pruning["base_model"] for one in found))
    return f"What pruning did to {' and '.join(bases) if len(bases) < 3 else f'{len(bases)} models'}"


def _lead(found: Sequence[Gathered]) -> str:
    """Which models the page shows."""
    recipes = list(dict.fromkeys(one.pruning["recipe"]["name"] for one in found))
    made = f"recipe{'s' if recipes[1:] else ''} {', '.join(recipes)}, without retraining"
    return f"{found[0].name if len(found) == 1 else f'{len(found)} pruned models'}: {made}."


def _section(one: Gathered, drawn: Any) -> Shown:
    sizes, errors = one.pruning["parameters"], list(_errors(one))
    return {
        "name": one.name,
        "base": one.pruning["base_model"],
        "gist": ", ".join(f"{name} {value}" for name, value, _ in _headline(one)) or "quality not measured",
        "facts": [
            ("parameters", f"{sizes['after']:,}", f"before: {sizes['before']:,}"),
            (
                "removed of the blocks",
                f"{sizes['share_of_blocks']:.1%}",
                f"of the model: {sizes['share_of_model']:.1%}",
            ),
            *_headline(one),
        ],
        "caveats": [*one.left_out, *caveats(one.pruning, one.evaluation, one.transfer)],
        "table": _table(one.evaluation, _HEAD),
        "more": _table(one.evaluation, {"positions", "noise", "shift", "widths"}),
        "has_dense": bool(one.evaluation and one.evaluation["against"]),
        "missing": list(_missing(one)),
        "removed": [drawn(*figure) for figure in _removed(one)],
        "errors": [drawn(*figure, wide=k == 0 or len(errors) == 2) for k, figure in enumerate(errors)],
        "quality": [drawn(*figure) for figure in _quality(one)],
        "heads": head_graphs(one.pruning, _similarity(one)),
        "samples": _samples(one),
        "slider": None,
        "command": command(one.pruning),
        "evaluations": list(_evaluations(one)),
        "provenance": _provenance(one),
        "notes": one.pruning["notes"],
        "recipe_name": one.pruning["recipe"]["name"],
        "recipe": as_toml(one.pruning["recipe"]),
    }


def _similarity(one: Gathered) -> Mapping[str, Sequence[float]]:
    """How alike heads are: as the pruning saw it, else as part `heads` did."""
    seen: Mapping[str, Sequence[float]] = (one.curves or {}).get("similarity") or {}
    return seen or (one.part("heads") or {"similarity": {}})["similarity"]


def _table(evaluation: Mapping[str, Any] | None, names: set[str]) -> list[tuple[str, ...]]:
    """The rows of some parts."""
    if evaluation is None:
        return []
    chosen = {name: part for name, part in evaluation["parts"].items() if name in names}
    return [tuple(cell.replace("+-", "±") for cell in row) for row in summary({"parts": chosen})]


def _headline(one: Gathered) -> Iterator[tuple[str, str, str]]:
    found = one.part("quality") or {}
    dense = found.get("dense")
    if "value" in found:
        beside = f"dense: {digits(dense['value'], 4)}" if dense else "not compared with dense"
        yield found["metric"], digits(found["value"], 4), beside
    elif "cosine" in found:
        yield "cosine", digits(found["cosine"]["value"], 4), "of embeddings, to dense"
    if "kl" in found:
        yield "KL to dense", digits(found["kl"]["value"], 3), "nats per token"
    ratio = (one.part("speed") or {}).get("ratio", {})
    if "prefill" in ratio:
        yield "prefill speed", f"{ratio['prefill']['value']:.2f}x", "times dense, measured"


def _missing(one: Gathered) -> Iterator[tuple[list[str], str]]:
    """What was not measured, and the command that measures it."""
    base, name = shlex.quote(one.pruning["base_model"]), shlex.quote(one.name)
    file = shlex.quote(f"{one.name}/{EVALUATION}")
    there = (one.evaluation or {"parts": {}})["parts"]
    due = {part: how for part, how in parts().items() if part not in there and one.task in how.kinds}
    text = "YOUR_LABELED_TEXT.jsonl" if one.task == "classifier" else "YOUR_TEXT"
    command = f"prunelm evaluate {name} --against {base} --text {text}"
    extra = {"tasks": "--tasks NAME,NAME", "shift": "--others FILE,FILE"}
    plain = [part for part in due if part not in extra]
    if plain:
        said = [f"{part}: {due[part].summary}" for part in plain]
        yield said, f"{command} --parts {','.join(plain)} --out {file}"
    for part in (part for part in extra if part in due):
        yield [f"{part}: {due[part].summary}"], f"{command} {extra[part]} --out {file}"
    recipe = one.pruning["recipe"]
    again = recipe.get("calibration") != "self-generated" and recipe["name"] != REPAIR
    if one.transfer is None and one.task == "causal" and again:
        yield (
            ["transfer: calibrated on one text, tested on another"],
            f"prunelm transfer {base} TEXT_A TEXT_B {' '.join(transferred(one.pruning))} "
            f"--out {shlex.quote(f'{one.name}/{TRANSFER}')}",
        )
    if one.curves is None:
        yield (
            ["error curves, and the sizes that they predict (curves.json): prune again with this version, on text"],
            "",
        )


def _evaluations(one: Gathered) -> Iterator[str]:
    """The commands that measured what the page shows."""
    if one.evaluation is None:
        return
    base, parts = one.pruning["base_model"], one.evaluation["parts"]
    yield from evaluations(one.evaluation, one.name, base)
    quality = parts.get("quality", {})
    if quality.get("compared"):
        sizes = {name: quality["settings"].get(name) for name in ("length", "max_tokens")}
        said = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items() if value)
        words = (base, one.name, "--text", quality["text"]["name"])
        yield f"prunelm compare {' '.join(map(shlex.quote, words))} {said} --out PAGE.html"


def _label(kind: str) -> str:
    """A kind of site at the head of a title."""
    label = figures.LABELS.get(kind, kind)
    return label[0].upper() + label[1:]


def _removed(one: Gathered) -> Iterator[tuple[str, figures.Spec, str]]:
    rows = figures.site_rows(one.pruning["sites"])
    for kind in dict.fromkeys(row["kind"] for row in rows):
        label = _label(kind)
        yield f"{label}: units that stay, per block", figures.widths(rows, kind), "The bar behind is the dense width."


def _errors(one: Gathered) -> Iterator[tuple[str, figures.Spec, str]]:
    if one.curves is None:
        return
    how = (
        "Measured at the model's output."
        if _priced(one.curves)
        else "Of the site's own output; nothing was priced at the model's."
    )
    yield "Sensitivity: what losing a quarter of a site costs", figures.sensitivity(one.curves), how
    rows = figures.curve_rows(one.curves)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        measure = next(s["measure"] for key, s in one.curves["sites"].items() if key.endswith(kind))
        measure = figures.MEASURES.get(measure, measure)
        label = _label(kind)
        yield f"{label}: {measure} as units go", figures.error_curves(rows, kind, measure), _HOW_LONG


def _priced(curves: Mapping[str, Any]) -> bool:
    return all("damage" in site for site in curves["sites"].values())


def _quality(one: Gathered) -> Iterator[tuple[str, figures.Spec, str]]:
    found = one.part("positions")
    if found is not None:
        yield "Perplexity by position", figures.positions(found), ""
    found = one.part("noise")
    if found is not None and "excess" in found["noisy"][0]:
        caption = "Right of 1, the pruned model suffers more from the noise than the dense one. Lines: 95 % intervals."
        yield "Robustness to noise", figures.noise(found), caption
    found = one.part("shift")
    if found is not None and "excess" in found["others"][0]:
        caption = "Right of 1, the pruned model suffers more from the change than the dense one. Lines: 95 % intervals."
        yield "Text of other kinds", figures.shift(found), caption
    if one.transfer is not None and one.transfer["cells"]:
        caption = (
            "Models of the same recipe and size, each pruned with one text and tested on the other part of every text."
        )
        yield "Transfer between texts", figures.transfer(one.transfer), caption
    rows = list(_ratios(one))
    if rows:
        yield (
            "Speed and memory, times dense",
            figures.speed(rows),
            "For tokens/s more is better, for the others less.",
        )


def _ratios(one: Gathered) -> Iterator[Shown]:
    found = one.part("speed") or {}
    labels = {"prefill": "prefill tokens/s", "decode": "decode tokens/s", "first_token": "first-token latency"}
    for name, label in labels.items():
        if name in found.get("ratio", {}):
            yield {"measure": label, "more": name != "first_token", **found["ratio"][name]}
    pairs = [(found, "file_bytes", "bytes on disk"), (found, "cache_bytes_per_token", "KV cache")]
    pairs.append((one.part("memory") or {}, "used", "peak memory"))
    for data, key, label in pairs:
        both = [data.get(name, {}).get(key) for name in ("model", "dense")]
        if both[0] and both[1]:
            ratio = dict.fromkeys(("value", "low", "high"), both[0] / both[1])
            yield {"measure": label, "more": False, **ratio}


def _samples(one: Gathered) -> list[Shown]:
    found = one.part("generation")
    samples = []
    for sample in (found or {"samples": []})["samples"]:
        common = sample.get("common", "") if sample.get("first_difference") else sample["model"]
        shown = {"prompt": sample["prompt"], "parts": sample.get("first_difference"), "tokens": sample["tokens"]}
        for name in ("dense", "model"):
            text = sample.get(name)
            same = text is not None and text.startswith(common)
            shown[name] = None if text is None else (common if same else "", text[len(common) :] if same else text)
        samples.append(shown)
    return samples


def _slider(one: Gathered) -> Shown | None:
    """What the page needs to predict widths and KL at other sizes."""
    if one.curves is None or not one.curves["sites"]:
        return None
    priced = _priced(one.curves)
    sites = []
    for key, site in one.curves["sites"].items():
        block, kind = key.split(".")
        harm = site["damage"] if priced else site["error"]
        kept = {name: site[name] for name in ("units", "cost", "kept", "removed")}
        sites.append({"block": int(block), "kind": kind, "harm": harm, **kept})
    found = one.part("quality")
    measured = found["kl"]["value"] if found and "kl" in found else None
    at_plan = sum(_at(site, site["units"] - site["kept"]) for site in sites)
    scale = measured / at_plan if measured is not None and at_plan > 0 else None
    if scale is not None:
        how = "The sum of each site's own curve, scaled to the KL measured at the chosen size."
    elif priced:
        how = "The sum of what each site alone cost at the model's output; nothing was measured at the chosen size."
        scale = 1.0
    else:
        how = "Widths only: a KL is predicted once part 'quality' has been measured against the dense model."
    sizes = one.pruning["parameters"]
    even = not one.pruning["recipe"]["per_block"]
    return {
        "sites": sites,
        "scale": scale,
        "how": how,
        "even": even,
        "prunable": sizes["prunable"],
        "share": sizes["share_of_blocks"] or 1.0,
    }


def _range(share: float) -> Shown:
    """Where the slider starts and ends, in steps of a hundredth that meet the size that was chosen."""
    most = max(SHARES, min(1.0, share + STEP * 10))
    first = round(share * MILLION) % round(STEP * MILLION) / MILLION
    return {"start": f"{share:.6f}", "min": f"{first:.6f}", "max": f"{most:.6f}", "step": f"{STEP:g}"}


def _at(site: Mapping[str, Any], removed: int) -> float:
    return float(site["harm"][site["removed"].index(removed)])


def _family(found: Sequence[Gathered]) -> Iterator[tuple[str, figures.Spec, str]]:
    """Which units go at which size, where several models have the same sites."""
    short = short_names(found)
    rows = [
        {**row, "kind": figures.LABELS.get(row["kind"], row["kind"]), "model": one.name, "label": short[one.name]}
        | {"share": row["kept"] / row["units"]}
        for one in found
        for row in figures.site_rows(one.pruning["sites"])
    ]
    if rows and len(found) > 1 and len({frozenset(one.pruning["sites"]) for one in found}) == 1:
        yield "What stays, block by block", figures.family(rows), "The largest model is at the top."


def _dtype(one: Gathered) -> str:
    return str(one.pruning.get("compute_dtype", "float32"))


def _provenance(one: Gathered) -> list[tuple[str, str]]:
    read = one.pruning["calibration"]["criterion"]
    rows = [
        ("dense model", one.pruning["base_model"]),
        (
            "calibrated on",
            f"{read['tokens']:,} tokens in {read['sequences']:,} sequences, source: {read.get('source', 'unknown')}",
        ),
        *([("computed on", f"{one.pruning['device']}, in {_dtype(one)}")] if "device" in one.pruning else []),
        ("opens with", "transformers" if one.pruning["loader"] == "transformers" else "prunelm.load"),
        ("versions of the pruning", ", ".join(f"{k} {v}" for k, v in one.pruning["versions"].items())),
    ]
    if one.evaluation is not None:
        said = ", ".join(f"{k} {v}" for k, v in one.evaluation.get("versions", {}).items())
        rows.append(("versions of the evaluation", said))
        texts = {p["text"]["name"]: p for p in one.evaluation["parts"].values() if "text" in p}
        rows.append(("evaluated on", ", ".join(texts) or "no text"))
        if "quality" in one.evaluation["parts"]:
            settings = one.evaluation["parts"]["quality"]["settings"]
            most = f"at most {settings['max_tokens']:,} in all" if settings["max_tokens"] else "all of the text"
            rows.append(("windows", f"{settings['length']:,} tokens, {most}, {settings['dtype']}"))
    return rows

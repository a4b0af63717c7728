"""docs/results.md from the JSON of the benchmarks: nothing in it is typed by hand."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from prunelm.quantizing import at_equal_bytes

from .families import RECIPES as FAMILIES
from .families import SIZES
from .faults import KILL
from .fuzz import FIXED
from .quality import FRONTIER, RECIPES, SPARSITIES, SWEEP, SWEEP_SPARSITIES
from .record import RESULTS, read
from .robustness import HOME
from .robustness import RECIPES as SHAKEN
from .robustness import SPARSITIES as SHAKEN_BY
from .siblings import CRITERIA, REPAIRS
from .stages import SEARCHING, in_passes
from .streaming import GROWTH_TOKENS, USUAL_TOKENS
from .trials import mean_excess
from .zero_shot import TASKS

STATISTICS = "one block's statistics"
EARLIER = "best with heads"
"""Cells measured before the trials: `best` with attention and FFN, whose heads leap to the end."""
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
HEAD = """# Results

Every figure on this page comes from `benchmarks/results/*.json`. `python -m benchmarks run` measures, and
`python -m benchmarks table` writes the page. The quality benchmarks need texts and models that do not come with
PruneLM, and are skipped without them. No command measures again what earlier code or another machine gave: rows
`best with heads`, `best (second family)`, `ffn alone, on a CPU` and those that end in `heads leap to the end`.

How to read it:

- Quality was measured on small models only (SmolLM2-135M, a MiniLM, a tiny GPT-2), with one seed each. Large models may
  behave differently.
- 30 % means 30 % of the *block parameters*: those of heads and FFN channels, without embeddings. SmolLM2-135M has a
  fifth of its parameters in the embeddings. Lower perplexity is better; the dense model is the one before pruning.
- Sections that evaluate on different amounts of text have different dense perplexities. Compare rows only within a
  section, and with their standard error.
- Recipes and their settings were chosen on other text than these tables evaluate on. Faults were noticed here, too, and
  what mended them is in the [log](log.md): the refit of `goa-data-free` was dropped, and members of a family choose
  units of their own, after WikiText-2 had shown the damage.
- `best` and `best-uniform` were measured without their steps of natural gradient (`natural_steps = 0`), which came
  later, except where *with steps* is said.
- Recipe names are explained in [methods.md](methods.md) and [plugins.md](plugins.md). `not run`: we did not measure it.
"""


def write() -> None:
    """Write the page from whatever has been measured."""
    parts = [
        HEAD,
        *_versions(),
        *_smollm2(read("smollm2")),
        *_frontier(read("frontier"), read("families")),
        *_families(read("families"), read("frontier")),
        *_sweep(read("sweep")),
        *_trials(read("trials")),
        *_siblings(read("siblings")),
        *_zero_shot({**read("zero-shot"), **_answering(read("families"))}),
        *_robustness(read("robustness")),
        *_small("minilm-sst2"),
        *_small("tiny-gpt2"),
        *_budgets(read("budgets")),
        *_equal_bytes(read("equal-bytes")),
        *_overhead(read("overhead")),
        *_streaming(read("streaming")),
        *_processes(read("processes")),
        *_faults(read("faults")),
        *_fuzz(read("fuzz"), read("guided")),
    ]
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _versions() -> list[str]:
    """With what the cells were measured, most of them first."""
    found: Counter[str] = Counter()
    for file in sorted(RESULTS.glob("*.json")):
        for entry in read(file.stem).values():
            made = entry.get("machine")
            if made:
                where = made.get("device") or "cpu"
                versions = f"Python {made['python']}, torch {made['torch']}, transformers {made['transformers']}"
                found[f"{versions}, {'CPU' if where == 'cpu' else where}"] += 1
    said = "; ".join(f"{what} ({count} cells)" for what, count in found.most_common())
    return [f"Measured with {said}.", ""] if said else []


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(entry: Mapping[str, Any]) -> str:
    found = entry["evaluation"]
    if found["metric"] == "accuracy":
        return f"{found['value']:.1%} ± {found['error']:.1%}"
    return f"{found['value']:.2f} ± {found['error']:.2f}"


def _smollm2(entries: Mapping[str, Any]) -> list[str]:
    if "dense" not in entries:
        return []
    facts = entries["dense"]["evaluation"]["facts"]
    lines = [
        "## SmolLM2-135M-Instruct: perplexity on WikiText-2 raw test",
        "",
        "Calibrated on 64 x 512 tokens of C4 (`goa-data-free` on text of its own; `random`, `l1` and `l2` read none), "
        f"seed 0. Evaluated on {facts['tokens']:,} tokens "
        f"in windows of {facts['length']:,} ({facts['predicted']:,} predicted), {facts['tokenizer']}, float32; "
        f"± is the standard error over windows; all rows share the windows, so differences between rows are surer than "
        f"that. Dense: {_value(entries['dense'])}.",
        "",
        _row(["recipe", *(f"{s:.0%} of block parameters" for s in SPARSITIES)]),
        _row(["---"] * (len(SPARSITIES) + 1)),
    ]
    cells = {s: {r: entries[f"{r} {s}"] for r in RECIPES if f"{r} {s}" in entries} for s in SPARSITIES}
    best = {s: min(mine, key=lambda r, m=mine: m[r]["evaluation"]["value"], default="") for s, mine in cells.items()}
    for recipe in RECIPES:
        row = [recipe]
        for s in SPARSITIES:
            text = _value(cells[s][recipe]) if recipe in cells[s] else "not run"
            row.append(f"**{text}**" if best[s] == recipe else text)
        lines.append(_row(row))
    shares = {r: [f"{cells[s][r]['share_of_blocks']:.2%}" for s in SPARSITIES if r in cells[s]] for r in RECIPES}
    lines += ["", "Removed, as measured: " + "; ".join(f"{r} {', '.join(v)}" for r, v in shares.items() if v) + ".", ""]
    return lines


def _frontier(entries: Mapping[str, Any], members: Mapping[str, Any]) -> list[str]:
    """Perplexity and e = ln(perplexity / dense perplexity) of every recipe and size, a table for each text.

    A recipe that was not pruned alone is shown as a member of its family.
    """
    if "dense" not in entries:
        return []
    dense = entries["dense"]["evaluation"]
    stated = ", ".join(f"{t} {dense[t]['value']:.2f} ({dense[t]['facts']['predicted']:,} predictions)" for t in dense)
    lines = [
        "## SmolLM2-135M-Instruct: repair, allocation, search",
        "",
        "Calibrated on 128 x 512 tokens of C4, seed 0; windows of 1,024; FFN widths are multiples of 16. Dense "
        f"perplexity: {stated}. Cells: perplexity, and in parentheses e = ln(perplexity / dense), which is 0 for the "
        "dense model. `f`: a member of a family of nested sizes (below), in place of a prune of its own; `f2`: of "
        "the second such family. All members of `osp` and `osp-repaired` take their keep probabilities from one search "
        "at 30%. `best with heads` is `best` as it was before the trials below, on attention and FFN.",
        "",
    ]
    rows = [*(f"{name}, with steps" for name in FAMILIES), *FAMILIES, EARLIER, *FRONTIER[len(FAMILIES) :]]
    found = {row: [_cell_of(row, size, entries, members) for size in SIZES] for row in rows}
    for text in dense:
        lines += [_row([text, *(f"{size:.0%}" for size in SIZES)]), _row(["---"] * (1 + len(SIZES)))]
        for row, cells in found.items():
            if any(entry for entry, _ in cells):
                lines.append(_row([row, *(_said(entry, mark, dense, text) for entry, mark in cells)]))
        lines.append("")
    shares = [entries[f"obs {size}"]["share_of_blocks"] for size in SIZES if f"obs {size}" in entries]
    if shares:
        said = ", ".join(f"{share:.2%}" for share in shares)
        lines += [f"Equal widths go in larger steps, and remove a little less: {said} in `obs` and its like.", ""]
    lines += _beside_family(entries, members)
    absent = [row for row, cells in found.items() if not any(entry for entry, _ in cells)]
    if absent:
        lines += [f"Not run here: {', '.join(f'`{recipe}`' for recipe in absent)}.", ""]
    return [*lines, *_in_passes(entries)]


def _beside_family(entries: Mapping[str, Any], members: Mapping[str, Any]) -> list[str]:
    """What a family costs a recipe that repairs nothing, where both were measured."""
    dense = entries["dense"]["evaluation"]
    both = [size for size in SIZES if f"{PREFIXED} {size}" in entries and f"{PREFIXED} {size}" in members]
    said = []
    for size in both:
        pairs = [[_excess(of[f"{PREFIXED} {size}"], dense, text) for of in (entries, members)] for text in dense]
        said.append(f"{size:.0%} " + ", ".join(f"{one:.3f} and {other:.3f}" for one, other in pairs))
    if not said:
        return []
    return [
        f"`{PREFIXED}` alone chooses behind its own pruned prefix, and in a family by the dense model's scores, which "
        f"is another method. e alone and as a member, {' and '.join(dense)}: {'; '.join(said)}.",
        "",
    ]


def _cell_of(
    row: str, size: float, entries: Mapping[str, Any], members: Mapping[str, Any]
) -> tuple[Mapping[str, Any] | None, str]:
    """What was measured of a recipe at a size, and the mark of how."""
    name, _, steps = row.partition(", with ")
    alone = None if steps else entries.get(f"{name} {size}")
    if alone:
        return alone, ""
    cell = f"{size}{' stepped' if steps else ''}"
    first, second = members.get(f"{name} {cell}"), members.get(f"{name}{SECOND} {cell}")
    return (first, " f") if first or not second else (second, " f2")


def _said(entry: Mapping[str, Any] | None, mark: str, dense: Mapping[str, Any], text: str) -> str:
    if entry is None:
        return "not run"
    return f"{entry['evaluation'][text]['value']:.2f} ({_excess(entry, dense, text):.3f}){mark}"


def _in_passes(entries: Mapping[str, Any]) -> list[str]:
    """What recipes that search cost in plain forward passes, where a pass was timed in the same process."""
    said = []
    for cell, entry in entries.items():
        spent = dict(entry.get("processor_seconds", {}))
        one = spent.pop("plain pass", None)
        if one is not None:
            rest, search = in_passes(spent, one)
            said.append(f"{cell}: {rest:.1f} and {search:.1f}")
    if not said:
        return []
    return [
        "Cost in plain forward passes over the calibration text, without the search and of the search, processor "
        f"seconds of one process: {'; '.join(said)}.",
        "",
    ]


SECOND = " (second family)"
"""Ends the name of a recipe whose family was pruned again, on a processor whose last digits led to another plan."""
BESIDE = ("obs", "flap", "wanda-sp", "taylor-first", "taylor-second")
"""Recipes that a family is compared with: without a search, the published repair, and three that repair nothing."""
PREFIXED = "wanda-sp"
"""It repairs nothing; alone it chooses units behind its own pruned prefix, in a family by the dense model's scores."""


def _families(entries: Mapping[str, Any], alone: Mapping[str, Any]) -> list[str]:
    """e of every size of one family, before and after its steps, and as a share of other recipes' e."""
    if not entries or "dense" not in alone:
        return []
    dense = alone["dense"]["evaluation"]
    lines = [
        "## One calibration, five sizes",
        "",
        "`python -m benchmarks run families`. One prune to five nested sizes, calibrated and evaluated as the table "
        "above; e = ln(perplexity / dense) before and after the steps of natural gradient. The last columns: that e, "
        "with steps where these were measured, as a share of the e that another recipe has in the table above.",
        "",
        _row(["recipe, text", "size", "e", "with steps", *(f"of `{name}`" for name in BESIDE)]),
        _row(["---"] * (4 + len(BESIDE))),
    ]
    names = [name for recipe in FAMILIES for name in (recipe, f"{recipe}{SECOND}") if name in entries]
    for name in names:
        for text in dense:
            for size in SIZES:
                lines += _member(entries, alone, name, text, size)
    lines += ["", *_searches_of(entries, names)]
    for name in names:
        lines += _cost_of(name, entries)
    return lines


def _searches_of(entries: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What the search of a recipe found each time, where its family was pruned twice."""
    twice = [name.removesuffix(SECOND) for name in names if name.endswith(SECOND)]
    found = []
    for recipe in twice:
        notes = [next(iter(entries[n]["sizes"].values()))["notes"] for n in (recipe, f"{recipe}{SECOND}")]
        first, second = (next(note for note in of if "plans tried" in note) for of in notes)
        found += [
            f"The second family of `{recipe}` was pruned by the same command on another processor, whose products "
            f"differ in their last digits; its search went another way. The first: {first}. The second: {second}.",
            "",
        ]
    return found


def _member(entries: Mapping[str, Any], alone: Mapping[str, Any], name: str, text: str, size: float) -> list[str]:
    dense = alone["dense"]["evaluation"]
    found = [entries.get(f"{name} {size}{end}") for end in ("", " stepped")]
    said = [f"{_excess(entry, dense, text):.3f}" if entry else "not run" for entry in found]
    others = [_cell_of(other, size, alone, entries)[0] for other in BESIDE]
    now = found[1] or found[0]
    if now is None:
        return []
    shares = [f"{_excess(now, dense, text) / _excess(other, dense, text):.2f}" if other else "" for other in others]
    return [_row([f"{name}, {text}", f"{size:.0%}", *said, *shares])]


def _cost_of(name: str, entries: Mapping[str, Any]) -> list[str]:
    """What a family costs, in plain passes and beside one size, with and without steps."""
    spent = dict(entries[name]["processor_seconds"])
    one = spent.pop("plain pass")
    sizes = {size: spent.pop(f"pruning {size:g}") for size in SIZES}
    shared = sum(spent.values())
    stepped = {size: f"{name} {size} stepped" for size in SIZES}
    steps = {size: _passes_of(entries[cell], one) for size, cell in stepped.items() if cell in entries}
    middle = SIZES[len(SIZES) // 2]
    said = (
        f"Cost of `{name}` in plain forward passes over the calibration text, processor seconds of one process: "
        f"{shared / one:.1f} for what all sizes share ({spent.get(SEARCHING, 0.0) / one:.1f} of it the search), "
        f"{sizes[middle] / one:.1f} for {middle:.0%}. Five sizes cost "
        f"{(shared + sum(sizes.values())) / (shared + sizes[middle]):.2f} times as much as one."
    )
    if middle in steps:
        both = {size: sizes[size] / one + steps.get(size, steps[middle]) for size in SIZES}
        said += (
            f" The steps cost {steps[middle]:.1f} more for one size; with them, five sizes cost "
            f"{(shared / one + sum(both.values())) / (shared / one + both[middle]):.2f} times as much as one. They "
            "were taken afterwards: that the dense model's head answers once more for all tokens is not counted here."
        )
        unmeasured = [f"{size:.0%}" for size in SIZES if size not in steps]
        if unmeasured:
            said += f" {', '.join(unmeasured)} was not measured, and counts as {middle:.0%}."
    return [said, ""]


def _passes_of(entry: Mapping[str, Any], one: float) -> float:
    """The steps of a member in plain passes: of the processor that took them, where that was not the family's."""
    return float(entry["processor_seconds"] / entry.get("plain pass", one))


def _answering(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The members of families that answered zero-shot tasks."""
    return {f"{cell.removesuffix(' stepped')}, with steps": e for cell, e in entries.items() if "tasks" in e}


def _sweep(entries: Mapping[str, Any]) -> list[str]:
    """e of two recipes from 10 to 90 %, and the knee."""
    if "dense" not in entries:
        return []
    dense = entries["dense"]["evaluation"]
    read = next(e["calibration"]["tokens"] for e in entries.values() if "calibration" in e)
    lines = [
        "## How far pruning goes",
        "",
        f"e = ln(perplexity / dense), calibrated on {read:,} tokens of C4, `best` as one family of nested models. The "
        "knee is the size at which e is farthest below the straight line from nothing removed to the largest size that "
        "can be met: beyond it, every further tenth costs more than the average one. `best` takes FFN channels only, "
        "and `goa` leaves the first four blocks and the last two alone, so 80 and 90 % are out of their reach.",
        "",
        _row(["recipe, text", *(f"{s:.0%}" for s in SWEEP_SPARSITIES), "knee"]),
        _row(["---"] * (len(SWEEP_SPARSITIES) + 2)),
    ]
    for name in SWEEP:
        if name not in entries:
            lines.append(_row([name, *["not run"] * (len(SWEEP_SPARSITIES) + 1)]))
            continue
        for text in dense:
            found = excesses(entries, name, text)
            cells = [f"{found[s]:.3f}" if s in found else "cannot be met" for s in SWEEP_SPARSITIES]
            lines.append(_row([f"{name}, {text}", *cells, f"{knee(found):.0%}"]))
    return [*lines, ""]


def excesses(entries: Mapping[str, Any], name: str, text: str) -> dict[float, float]:
    """e of a recipe on a text, by the share that was removed."""
    sizes = entries[name]["sizes"]
    dense = entries["dense"]["evaluation"]
    return {float(s): _excess({"evaluation": found}, dense, text) for s, found in sizes.items() if found is not None}


def knee(excess: Mapping[float, float]) -> float:
    """The size whose e is farthest below the chord from nothing removed to the largest size, axes scaled to 1.

    Source: Satopaa, Albrecht, Irwin, Raghavan 2011 ("Kneedle"), for a convex curve.
    """
    last = max(excess)
    return max(excess, key=lambda s: s / last - excess[s] / excess[last])


def _trials(entries: dict[str, Any]) -> list[str]:
    """Loss above dense of everything tried for `best`, least mean first."""
    if "dense" not in entries:
        return []
    texts = list(entries["dense"]["losses"])
    cells = sorted((cell for cell in entries if cell != "dense"), key=lambda cell: mean_excess(entries, cell))
    lines = [
        "## What was tried for `best`",
        "",
        "`python -m benchmarks trials`. Loss in nats per token above the dense model's, on text that no other table of "
        "this page evaluates on: C4 documents from the last 5 % of the file, Wikipedia passages, and sequences whose "
        "second half repeats the first (only the second half counts). The recipe with the lowest mean of the three was "
        "chosen; WikiText-2 decided nothing. Calibrated as above. `heads leap to the end`: attention was pruned too, "
        "with an earlier form of the search (see the [log](log.md)).",
        "",
        _row(["trial", "size", *texts, "mean", "KV groups kept", "search"]),
        _row(["---"] * (len(texts) + 5)),
    ]
    for cell in cells:
        trial, size = cell.rsplit(" ", 1)
        above = [entries[cell]["losses"][text] - entries["dense"]["losses"][text] for text in texts]
        found = [note.partition(": ")[2] for note in entries[cell]["notes"] if "plans tried" in note]
        values = [f"{value:.3f}" for value in (*above, mean_excess(entries, cell))]
        lines.append(
            _row([trial, f"{float(size):.0%}", *values, str(entries[cell]["groups"] or "all"), *(found or [""])])
        )
    return [*lines, ""]


def _excess(entry: Mapping[str, Any], dense: Mapping[str, Any], text: str) -> float:
    """ln(perplexity / dense perplexity)."""
    return math.log(entry["evaluation"][text]["value"] / dense[text]["value"])


def _siblings(entries: Mapping[str, Any]) -> list[str]:
    """OSP, AEF and HyWIA beside their ingredients, and LIAR's repair of several criteria."""
    if "dense" not in entries:
        return []
    dense = entries["dense"]["evaluation"]
    stated = ", ".join(f"{text} {found['value']:.2f} ± {found['error']:.2f}" for text, found in dense.items())
    lines = [
        "## The sibling methods",
        "",
        "`python -m benchmarks siblings`. SmolLM2-135M-Instruct, calibrated on C4 as the recipes say, evaluated on the "
        f"same kinds of text as above, but less of it. Dense perplexity: {stated}. ± is the standard error over "
        "windows. Seconds were taken beside other work (`osp-repaired`: without the search, which is that of `osp`). "
        "`coarse alone` and `fine alone` are the two ingredients of `aef` and `hywia`.",
        "",
        _row(["", *(f"perplexity, {text}" for text in dense), "calibration tokens", "seconds"]),
        _row(["---"] * (len(dense) + 3)),
    ]
    for name, entry in entries.items():
        if name == "dense" or name.startswith("minilm"):
            continue
        values = [f"{found['value']:.2f} ± {found['error']:.2f}" for found in entry["evaluation"].values()]
        tokens = entry["calibration"]["criterion"]["tokens"]
        size = f" at {entry['recipe']['sparsity']:.0%}"
        label = name.removesuffix(f" {entry['recipe']['sparsity']}") + size
        lines.append(_row([label, *values, f"{tokens:,}", f"{entry['seconds']:.0f}"]))
    notes = [f"- `{name}`: {note}" for name, e in entries.items() for note in e.get("notes", ()) if "search" in note]
    return [*lines, "", *notes, *([""] if notes else []), *_criterion_by_repair(entries)]


def _criterion_by_repair(entries: Mapping[str, Any]) -> list[str]:
    if "minilm dense" not in entries:
        return []
    (dense,) = entries["minilm dense"]["evaluation"].values()
    lines = [
        "Criterion by repair, MiniLM-SST2 without half of its encoder's parameters (heads and FFN channels, the same "
        "share of every site), calibrated on 400 unlabeled training sentences; accuracy on the test file, dense "
        f"{dense['value']:.1%} ± {dense['error']:.1%}:",
        "",
        _row(["criterion", *REPAIRS]),
        _row(["---"] * (len(REPAIRS) + 1)),
    ]
    for criterion in CRITERIA:
        found = [entries.get(f"minilm {criterion} {repair}") for repair in REPAIRS]
        values = [next(iter(entry["evaluation"].values()))["value"] if entry else None for entry in found]
        lines.append(_row([criterion, *("not run" if v is None else f"{v:.1%}" for v in values)]))
    return [*lines, "", *_hidden(entries)]


def _hidden(entries: Mapping[str, Any]) -> list[str]:
    """The hidden dimension of MiniLM-SST2 at half of its block parameters."""
    found = {name.removeprefix("minilm "): entry for name, entry in entries.items() if " hidden " in name}
    if not found:
        return []
    whole = entries["minilm dense"]["parameters"]
    read = next(iter(found.values()))["calibration"]["criterion"]["tokens"]
    lines = [
        "The hidden dimension: half of its block parameters again, of which hidden channels pay a part; "
        f"embeddings get narrower too. Calibrated on {read:,} tokens of training sentences.",
        "",
        _row(["recipe", "of the whole model removed", "accuracy"]),
        _row(["---"] * 3),
    ]
    for name, entry in found.items():
        (value,) = entry["evaluation"].values()
        removed = 1 - entry["parameters"] / whole
        lines.append(_row([name, f"{removed:.1%}", f"{value['value']:.1%} ± {value['error']:.1%}"]))
    return [*lines, ""]


def _zero_shot(entries: Mapping[str, Any]) -> list[str]:
    """Accuracies of the cells measured so far, each with its standard error."""
    if not entries:
        return []
    rows = next(iter(entries.values()))["rows"]
    lines = [
        "## SmolLM2-135M-Instruct: zero-shot accuracy",
        "",
        f"lm-eval 0.4.13, no examples given (zero-shot), the first {rows} rows of each task; accuracy normalized by "
        "length, for LAMBADA plain; ± is the standard error. `obs 0.2` is recipe `obs` at 20 %, pruned as above.",
        "",
        _row(["", *(task.removeprefix("local_") for task in TASKS), "mean"]),
        _row(["---"] * (len(TASKS) + 2)),
    ]
    for cell, entry in sorted(entries.items(), key=lambda item: item[0] != "dense"):
        found = [entry["tasks"][task] for task in TASKS]
        mean = sum(task["value"] for task in found) / len(found)
        lines.append(_row([cell, *(f"{t['value']:.1%} ± {t['error']:.1%}" for t in found), f"{mean:.1%}"]))
    return [*lines, ""]


def _robustness(entries: Mapping[str, Any]) -> list[str]:
    """Noise on the home text, and the matrix of calibration and test texts, with 95 % intervals."""
    cells = [(f"{r} at {s:.0%}", f"{r} {s}") for r in SHAKEN for s in SHAKEN_BY if f"{r} {s} {HOME}" in entries]
    if not cells:
        return []
    return [*_noise(entries, cells), *_transfer(entries, cells), *_in_passes(entries)]


def _noise(entries: Mapping[str, Any], cells: list[tuple[str, str]]) -> list[str]:
    shaken = {label: entries[f"{name} {HOME}"]["noise"] for label, name in cells}
    clean = {label: found["clean"] for label, found in shaken.items()}
    first = next(iter(shaken.values()))
    stated = ", ".join(f"{label} {found['bits_per_byte']:.3f}" for label, found in clean.items())
    lines = [
        "## SmolLM2-135M-Instruct: noise",
        "",
        f"`python -m benchmarks robustness`. Calibrated on {HOME}; noise on other {HOME} documents, "
        f"{first['clean']['predicted']:,} predictions. Cells: bits per byte that noise adds, and in parentheses the "
        "ratio to dense on noisy text over that on clean text (above 1, the pruned model suffers more), with 95 % "
        f"intervals. On clean text, bits per byte: dense {first['clean']['dense']['bits_per_byte']:.3f}, {stated}.",
        "",
        _row(["noise", "strength", "dense", *shaken]),
        _row(["---"] * (len(shaken) + 3)),
    ]
    for k, row in enumerate(first["noisy"]):
        rows = [found["noisy"][k] for found in shaken.values()]
        made = [f"{_spanned(r['added']['model'], '+.3f')} ({_spanned(r['excess'], '.3f')})" for r in rows]
        lines.append(_row([row["noise"], f"{row['strength']:g}", _spanned(row["added"]["dense"], "+.3f"), *made]))
    return [*lines, ""]


def _transfer(entries: Mapping[str, Any], cells: list[tuple[str, str]]) -> list[str]:
    found = {
        (label, key.removeprefix(f"{name} ")): entry["tested"]
        for label, name in cells
        for key, entry in entries.items()
        if key.startswith(f"{name} ")
    }
    texts = list(next(iter(found.values())))
    stated = ", ".join(_dense_of(text, found) for text in texts)
    read = next(iter(entries.values()))["calibration"]["criterion"]["tokens"]
    lines = [
        "## SmolLM2-135M-Instruct: calibrated on one text, tested on another",
        "",
        f"`python -m benchmarks robustness`. {read:,} calibration tokens, windows of 1,024. Perplexity, and in "
        f"parentheses how many times dense with its 95 % interval, paired by window. Dense: {stated}. `*`: more than "
        "1 % of the 8-word passages of the text are in the calibration text.",
        "",
        _row(["recipe", "calibrated on", *(f"tested on {text}" for text in texts)]),
        _row(["---"] * (len(texts) + 2)),
    ]
    named = dict.fromkeys(calibrated for _, calibrated in found)
    for label, calibrated in ((label, calibrated) for label, _ in cells for calibrated in named):
        tested = found.get((label, calibrated))
        if tested is None:
            lines.append(_row([label, calibrated, *["not run"] * len(texts)]))
            continue
        values = []
        for text in texts:
            flag = " *" if tested[text]["overlap"]["flagged"] else ""
            values.append(f"{tested[text]['value']:.2f} ({_spanned(tested[text]['ratio'], '.2f')}){flag}")
        lines.append(_row([label, calibrated, *values]))
    return [*lines, ""]


def _dense_of(text: str, found: Mapping[tuple[str, str], Any]) -> str:
    """The dense perplexity on a text, and which rows have another, where they were not measured on the same edition."""
    values: dict[str, list[str]] = {}
    for (label, _), tested in found.items():
        one = tested[text]["dense"]
        values.setdefault(f"{one['value']:.2f} ± {one['error']:.2f}", []).append(label.partition(" at ")[0])
    first, *others = values
    said = ", ".join(f"{value} for `{'`, `'.join(dict.fromkeys(values[value]))}`" for value in others)
    return f"{text} {first}" + (f" ({said}, on the edition of another Python)" if others else "")


def _spanned(found: Mapping[str, float], form: str) -> str:
    return f"{found['value']:{form}}, {found['low']:{form}} to {found['high']:{form}}"


def _small(name: str) -> list[str]:
    entries = read(name)
    if "dense" not in entries:
        return []
    dense = entries["dense"]["evaluation"]
    labels = [key.rsplit(" ", 1) for key in entries if key != "dense"]
    recipes = list(dict.fromkeys(label for label, _ in labels))
    sparsities = sorted({s for _, s in labels})
    facts = dense["facts"]
    lines = [
        f"## {name}: {dense['metric']}",
        "",
        f"Evaluated on {facts['predicted']:,} predictions of `{facts['text']}`, windows of at most {facts['length']}, "
        f'{facts["tokenizer"]}. Dense: {_value(entries["dense"])}. "heads too" prunes per block, attention '
        "included; the others lose FFN channels only and open in plain transformers.",
        "",
        _row(["recipe", *(f"{float(s):.0%} of block parameters" for s in sparsities)]),
        _row(["---"] * (len(sparsities) + 1)),
    ]
    for recipe in recipes:
        cells = (entries.get(f"{recipe} {s}") for s in sparsities)
        lines.append(_row([recipe, *(_value(cell) if cell else "not run" for cell in cells)]))
    recipe = next(entry["recipe"] for key, entry in entries.items() if key != "dense")
    return [
        *lines,
        "",
        f"Calibrated on {recipe['samples']:,} sequences of at most {recipe['length']} tokens, seed {recipe['seed']}.",
        "",
    ]


def _budgets(entries: Mapping[str, Any]) -> list[str]:
    """Budgets in the user's units: what was asked, and what was measured of the written folder."""
    if not entries:
        return []
    lines = [
        "## Budgets",
        "",
        "`python -m benchmarks budgets`, SmolLM2-135M-Instruct in float32; calibrations are short, because budgets are "
        "tested here and not quality. Perplexity is on held-out C4; speed is that of the written model in turns with "
        "the dense one, on one thread.",
        "",
        _row(["command", "asked", "found", "of the blocks removed"]),
        _row(["---"] * 4),
    ]
    for entry in entries.values():
        asked, found = entry["asked"], entry["measured"]
        if "params" in asked:
            pair = [f"at most {asked['parameters']:,} parameters", f"{entry['parameters']['after']:,}"]
            pair[1] += f" (one step is {asked['step']:,})"
        elif "fit" in asked:
            pair = [f"at most {asked['bytes']:,} bytes", f"{found['bytes']:,}: file {found['file']:,} + cache"]
        elif "max_ppl" in asked:
            pair = [
                f"perplexity at most {asked['limit']:.2f} (dense {asked['dense']:.2f})",
                f"{found['perplexity']:.2f}",
            ]
        else:
            pair = [f"{asked['factor']:g} x as fast ({asked['of']})", f"{found['speedup']:.3f} x ({found['off']:+.1%})"]
        lines.append(_row([f"`{entry['command']}`", *pair, f"{entry['parameters']['share_of_blocks']:.2%}"]))
    return [*lines, ""]


def _equal_bytes(entries: Mapping[str, Any]) -> list[str]:
    """Pruned and quantized against quantized only."""
    if "dense" not in entries:
        return []
    dense = entries["dense"]
    lines = [
        "## Pruned and quantized against quantized only",
        "",
        f"SmolLM2-135M-Instruct, `obs` on 32 x 512 tokens of C4; weights rounded to each format of llama.cpp; "
        f"perplexity on {dense['max_tokens']:,} tokens of held-out C4 in windows of {dense['length']}. The model's own "
        "file has 4 bits (Q4_1) to begin with, so that its dense row in q4_1 loses nothing. Ratio: perplexity over "
        "that of the dense model in as many bytes, in the best format that is no larger or between two formats; above "
        "1, quantizing alone is better.",
        "",
        _row(["bytes of weights", "model", "format", "perplexity", "dense in as many bytes", "ratio"]),
        _row(["---"] * 6),
    ]
    found = [(name, row) for name, entry in entries.items() for row in entry["formats"]]
    for name, row in sorted(found, key=lambda pair: pair[1]["bytes"]):
        same = at_equal_bytes(dense["formats"], row) if name != "dense" else None
        beside = ["", ""] if same is None else [f"{same:.2f}", f"{row['value'] / same:.3f}"]
        value = f"{row['value']:.2f} ± {row['error']:.2f}"
        lines.append(_row([f"{row['bytes']:,}", name, row["format"], value, *beside]))
    return [*lines, ""]


def _overhead(entries: Mapping[str, Any]) -> list[str]:
    lines = []
    if "time" in entries:
        timed = entries["time"]
        lines += [
            "## Cost of pruning",
            "",
            f"SmolLM2-135M-Instruct at 30 %: `goa-budget` on {timed['tokens']:,} calibration tokens, "
            f"{timed['machine']['threads']} threads, without loading and saving. One plain forward pass of the dense "
            f"model took {sum(timed['forward seconds']) / len(timed['forward seconds']):.0f} s.",
            "",
            _row(["", "seconds", "plain forward passes"]),
            _row(["---"] * 3),
        ]
        for label in ("without refit", "with two-step refit"):
            lines.append(_row([label, f"{timed[label]['seconds']:.0f}", f"{timed[label]['forward passes']:.2f}"]))
        lines.append("")
    for name, found in entries.items():
        if name.startswith("memory"):
            lines += [
                f"Peak {name}: {found['peak'] / 1e6:,.0f} MB resident for "
                f"{found['float32 weights'] / 1e6:,.0f} MB of float32 weights, {found['libraries'] / 1e6:,.0f} MB of "
                f"libraries and {found[STATISTICS] / 1e6:,.0f} MB for one block's statistics ({found['tokens']:,} "
                f"tokens): {found['ratio']:.2f} x the weights beside the statistics, "
                f"{found['ratio without libraries']:.2f} x without the libraries.",
                "",
            ]
    if "speed" in entries:
        speed = entries["speed"]
        lines += [
            "Prefill at 30 % (recipe `l2`, batch 1, 512 tokens, medians of 25 turns): "
            f"{speed['dense tokens/s']:.0f} -> {speed['pruned tokens/s']:.0f} tokens/s, {speed['speedup']:.3f} x. "
            f"Removed FLOPs promise {speed['promised by FLOPs']:.3f} x by PyTorch's counter, so "
            f"{speed['share by FLOPs']:.0%} of the gain; "
            "counting only the causal half of attention they promise "
            f"{speed['promised by causal FLOPs']:.3f} x ({speed['share by causal FLOPs']:.0%}).",
            "",
        ]
    return lines


def _streaming(entries: Mapping[str, Any]) -> list[str]:
    """What one block at a time takes beside the whole model, and how cost grows."""
    beside = {name: found for name, found in entries.items() if "streamed" in found}
    grown = {name: found for name, found in entries.items() if "ratio" in found}
    lines = []
    if beside:
        first = next(iter(beside.values()))
        lines += [
            "## Streaming",
            "",
            "`python -m benchmarks stream`: whole commands, from reading to proof, on a Llama with random float32 "
            f"weights, {first['tokens']:,} calibration tokens, with the model in memory and with `--stream`. Peaks are "
            f"of resident memory, {first['libraries'] / 1e6:,.0f} MB of which are libraries; that of `--stream` is the "
            "larger one of the command and of the process that proves its folder. Computing time is that of the "
            "command's processes, whatever else the machine did.",
            "",
            _row(
                [
                    "recipe",
                    "checkpoint, MB",
                    "peak, MB",
                    "streamed, MB",
                    "share",
                    "seconds",
                    "streamed",
                    "times",
                    "in computing time",
                    "same",
                ]
            ),
            _row(["---"] * 10),
        ]
    for name, found in beside.items():
        peak = max(found["streamed"]["peak"], found["proof of the streamed"])
        sizes = (found["bytes"], found["in memory"]["peak"], peak)
        seconds = (found["in memory"]["seconds"], found["streamed"]["seconds"])
        cells = [f"`{name.split(',')[0]}`, {found['blocks']} blocks", *(f"{size / 1e6:,.0f}" for size in sizes)]
        cells += [f"{found['memory']:.2f}", *(f"{s:.0f}" for s in seconds)]
        cells += [f"{found[ratio]:.2f}" for ratio in ("time", "processor time")]
        lines.append(_row([*cells, "yes" if found["same weights"] else "no"]))
    if grown:
        first = next(iter(grown.values()))
        lines += [
            "",
            "How cost grows: processor seconds of `obs` on one thread, medians of "
            f"{first['rounds']} rounds in turns. *Solve* is scoring and repair, which read no token; *passes* is the "
            f"rest. {GROWTH_TOKENS:,} tokens are doubled, and {USUAL_TOKENS:,}, which recipes calibrate on (*usual "
            "tokens*).",
            "",
            _row(["doubled", "all", "solve", "passes"]),
            _row(["---"] * 4),
        ]
    for name, found in grown.items():
        ratios = (f"{found['ratio'][part]:.2f}" for part in ("total", "solve", "passes"))
        lines.append(_row([name.removeprefix("twice the "), *ratios]))
    return [*lines, ""] if lines else []


def _processes(entries: Mapping[str, Any]) -> list[str]:
    """Two processes against one."""
    if not entries:
        return []
    lines = [
        "## Several processes",
        "",
        "`python -m benchmarks processes`: two gloo processes with one thread each against one with one thread, taking "
        "turns; seconds of the pruning alone, medians of three. In computing time: of one process to that of the "
        "busier of two, whatever else the machine did. Two apart: how much more two processes get done at once that "
        "share no work, one prune each; what the two cores allow.",
        "",
        _row(["", "calibration tokens", "one process, s", "two, s", "speedup", "in computing time", "two apart"]),
        _row(["---"] * 7),
    ]
    for name, found in entries.items():
        one, two = (f"{median(found[count]):.1f}" for count in ("one", "two"))
        kinds = ("speedup", "speedup in computing time", "two apart")
        ratios = (f"{found[kind]:.2f} x" if kind in found else "not run" for kind in kinds)
        lines.append(_row([f"{name} (`{found['recipe']}`)", f"{found['tokens']:,}", one, two, *ratios]))
    return [*lines, ""]


def _faults(entries: Mapping[str, Any]) -> list[str]:
    """Runs that were killed and went on, and every other fault with the line that answers it."""
    kills = {name.removeprefix(KILL): found for name, found in entries.items() if name.startswith(KILL)}
    if not kills:
        return []
    total = sum(found["kills"] for found in kills.values())
    same = sum(found["identical"] for found in kills.values())
    orphans = sum(len(found["orphans"]) for found in kills.values())
    lines = [
        "## Faults",
        "",
        f"`python -m benchmarks faults`: {same} of {total} runs that were killed with SIGKILL at seeded moments, and "
        "went on, are byte for byte what an uninterrupted run gives (evaluations but for their seconds; without the "
        f"proof in a fresh process); {orphans} files were left behind.",
        "",
        _row(["command", "kills", "went on", "identical", "left behind"]),
        _row(["---"] * 5),
    ]
    for name, found in kills.items():
        counts = (found["kills"], found["resumed"], found["identical"], len(found["orphans"]))
        lines.append(_row([name, *map(str, counts)]))
    lines += ["", _row(["fault", "exit status", "what is said", "lost", "left behind"]), _row(["---"] * 5)]
    for name, found in entries.items():
        if name.startswith(KILL):
            continue
        said = f"`{found['said']}`" if found["said"] else "nothing: it is made again"
        lost = "yes" if found["lost"] else "nothing"
        lines.append(_row([name, str(found["status"]), said, lost, ", ".join(found["left"]) or "nothing"]))
    return [*lines, ""]


def _fuzz(entries: Mapping[str, Any], guided: Mapping[str, Any]) -> list[str]:
    """Damaged files of every kind, and what became of them."""
    if not entries:
        return []
    once = sum(len(found.get("once", ())) for found in (*entries.values(), *guided.values()))
    lines = [
        "## Damaged files",
        "",
        "`python -m benchmarks fuzz`: whole files with small edits (JSON values replaced, taken away, added, nested; "
        "bits flipped, bytes put in, numbers overwritten, cut short), or bytes that are nothing at all, made by "
        "hypothesis from a fixed seed. Refused means one line that says why. Memory is what Python allocates beyond "
        f"twice the file, {FIXED / 2**20:g} MiB of which are allowed as the reader's own. A file that takes more is "
        "read again: what it does not need twice is the interpreter's (a table that grows, a late import), "
        f"{once} times here.",
        "",
        *_damaged(entries),
    ]
    if guided:
        lines += [
            "`python -m benchmarks guided`: the same, but atheris chooses: what reaches untried branches of PruneLM's "
            "code is kept and varied.",
            "",
            *_damaged(guided),
        ]
    return lines


def _damaged(entries: Mapping[str, Any]) -> list[str]:
    lines = [
        _row(["kind", "files", "refused", "crashes", "hangs", "too much memory", "most memory, kB", "longest, s"]),
        _row(["---"] * 8),
    ]
    for name, found in entries.items():
        counts = (
            found["files"],
            found["refused"],
            len(found["crashes"]),
            found["hangs"],
            len(found["too_much_memory"]),
        )
        most = (f"{found['most_bytes_beyond_twice'] / 1e3:,.0f}", f"{found['most_seconds']:.2f}")
        lines.append(_row([name, *(f"{count:,}" for count in counts), *most]))
    return [*lines, ""]

"""The figures of a report, as Vega-Lite specifications; colors are those of the page, so they follow its theme."""

from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
CALM = 1.25
"""Ratios to dense below this are not drawn as extremes, however close together all of them are."""
Rows = list[dict[str, Any]]
INK, GRID, FIRST, SECOND, FAINT = (f"var(--{name})" for name in ("ink", "grid", "first", "second", "faint"))
MEASURES = {"error": "relative error of the output"}
"""What the measures of curves.json are called."""
LABELS = {"attention": "attention", "ffn": "FFN"}
CELL: dict[str, Any] = {"type": "rect", "stroke": GRID, "strokeWidth": 1}
"""A cell of a heat map, outlined so that the darkest color stands out from a dark page too."""
ROOMY = {"zero": False, "padding": 8}
KNOWN = {"filter": "isValid(datum.low)"}
"""Lines are drawn where intervals are known."""
UNDER, OVER = 5, 2
"""Widths of lines, so that the first is seen where another lies on it."""
SHARES = {"format": "%", "tickCount": 5}
TIGHT = {"paddingInner": 0.05, "paddingOuter": 0.02}
"""Between the cells of a heat map."""
BLOCK_AXIS = {"labelOverlap": True, "labelAngle": 0, "labelSeparation": 4}
_LABELED: list[tuple[str, Spec]] = [
    ("!=", {"align": "left", "dx": 7, "dy": -9}),
    ("==", {"align": "right", "dx": -7, "dy": 12}),
]
"""Where labels of pruned models and of the dense one stand, which is the last and has no room at its right."""
BLOCKS = ["#2f7de1", "#c0589f", "#d98a1f"]
"""First to last block, of middle lightness, so that they stand out in both themes."""
CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": GRID,
        "domainColor": GRID,
        "tickColor": GRID,
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "orient": "bottom",
        "labelFontSize": 12,
        "titleFontSize": 12,
    },
    "title": {"color": INK, "anchor": "start", "fontSize": 12, "fontWeight": "normal"},
    "view": {"stroke": None},
    "scale": {"bandPaddingInner": 0.15},
}


def figure(description: str, rows: Rows, **spec: Any) -> Spec:
    """A specification as wide as its place, with its data and its description in words."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "width": "container",
        "height": 220,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"name": "rows", "values": rows},
        "config": CONFIG,
        **spec,
    }


def site_rows(sites: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Block, kind, units and kept units of every site."""
    rows = []
    for key, site in sites.items():
        block, kind = key.split(".")
        kept = len(site["kept"])
        rows.append({"block": int(block), "kind": kind, "units": site["units"], "kept": kept})
    return sorted(rows, key=lambda row: (row["kind"], row["block"]))


def widths(rows: Rows, kind: str) -> Spec:
    """Kept units per block, before the outline of the dense width."""
    mine = [row for row in rows if row["kind"] == kind]
    kept = [row["kept"] for row in mine]
    tip = [_field("block"), _field("kept"), _field("units", "of")]
    x = {"field": "block", "type": "ordinal", "title": "block", "axis": BLOCK_AXIS}
    y: Spec = {"type": "quantitative", "title": "units", "axis": {"tickMinStep": 1}}
    return figure(
        f"Units of {LABELS.get(kind, kind)} per block: {_span(kept)} of {_span([row['units'] for row in mine])} stay.",
        mine,
        layer=[
            {
                "mark": {"type": "bar", "color": FAINT},
                "encoding": {"x": x, "y": {"field": "units", **y}, "tooltip": tip},
            },
            {
                "mark": {"type": "bar", "color": FIRST},
                "encoding": {"x": x, "y": {"field": "kept", **y}, "tooltip": tip},
            },
        ],
    )


def curve_rows(curves: Mapping[str, Any]) -> Rows:
    """Every kept point of every curve."""
    rows = []
    for key, site in curves["sites"].items():
        block, kind = key.split(".")
        chosen = site["units"] - site["kept"]
        for k, removed in enumerate(site["removed"]):
            row = {"block": int(block), "kind": kind, "removed": removed, "share": removed / site["units"]}
            row |= {"error": site["error"][k], "chosen": removed == chosen}
            rows.append(row | ({"damage": site["damage"][k]} if "damage" in site else {}))
    return rows


def error_curves(rows: Rows, kind: str, measure: str) -> Spec:
    """One line per block, the chosen point marked."""
    mine = [row for row in rows if row["kind"] == kind]
    tip = [_field("block"), _field("removed"), _field("error", measure, ".3g")]
    x = {
        "field": "share",
        "type": "quantitative",
        "title": "share of units removed",
        "axis": SHARES,
    }
    y = {"field": "error", "type": "quantitative", "title": measure}
    color = {"field": "block", "type": "quantitative", "scale": {"range": BLOCKS}, "title": "block", "legend": None}
    chosen = [row["error"] for row in mine if row["chosen"]]
    return figure(
        f"{measure.capitalize()} of {LABELS.get(kind, kind)} against the share of units removed, a line per block; "
        f"at the chosen widths {_span([float(f'{e:.3g}') for e in chosen])}.",
        mine,
        layer=[
            {
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {"x": x, "y": y, "color": color, "detail": {"field": "block"}, "tooltip": tip},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 45, "stroke": INK, "strokeWidth": 1, "opacity": 1},
                "transform": [{"filter": "datum.chosen"}],
                "encoding": {"x": x, "y": y, "color": color, "tooltip": tip},
            },
        ],
    )


def sensitivity(curves: Mapping[str, Any], share: float = 0.25) -> Spec:
    """What losing a quarter of a site's units would cost, block by block."""
    rows = []
    priced = all("damage" in site for site in curves["sites"].values())
    field = "damage" if priced else "error"
    for key, site in curves["sites"].items():
        block, kind = key.split(".")
        at = min(range(len(site["removed"])), key=lambda k: abs(site["removed"][k] - share * site["units"]))
        label = LABELS.get(kind, kind)
        rows.append({"block": int(block), "kind": label, "cost": site[field][at], "removed": site["removed"][at]})
    measures = sorted({MEASURES.get(site["measure"], site["measure"]) for site in curves["sites"].values()})
    title = "KL, nats" if priced else " or ".join(measures)
    worst = max(rows, key=lambda row: row["cost"])
    return figure(
        f"What losing {share:.0%} of a site's units costs, as near as whole units come; most in block "
        f"{worst['block']}, {worst['kind']}.",
        rows,
        height=110,
        mark=CELL,
        encoding={
            "x": {"field": "block", "type": "ordinal", "title": "block", "axis": BLOCK_AXIS, "scale": TIGHT},
            "y": {"field": "kind", "type": "nominal", "title": None, "sort": None, "scale": TIGHT},
            "color": {"field": "cost", "type": "quantitative", "title": title, "scale": {"scheme": "viridis"}},
            "tooltip": [_field("block"), _field("kind"), _field("removed"), _field("cost", title, ".3g")],
        },
    )


def predicted(rows: Rows) -> Spec:
    """Widths that the slider asks for; the page changes its data."""
    shown = [{**row, "share": row["kept"] / row["units"]} for row in rows]
    kinds = sorted({row["kind"] for row in rows})
    return figure(
        "Predicted share of units that stays per block, at the size that the slider asks for.",
        shown,
        layer=[
            {
                "transform": [{"filter": f"datum.kind == '{kind}'"}],
                "mark": {"type": "line", "strokeWidth": width, "point": {"size": 25 * width, "opacity": 1}},
            }
            for kind, width in zip(kinds, [*[UNDER] * (len(kinds) - 1), OVER], strict=True)
        ],
        encoding={
            "x": {"field": "block", "type": "ordinal", "title": "block", "axis": BLOCK_AXIS},
            "y": {
                "field": "share",
                "type": "quantitative",
                "title": "units that stay",
                "axis": {"format": "%"},
                "scale": {"domain": [0, 1]},
            },
            "color": _kinds(kinds),
            "tooltip": [_field("block"), _field("kind"), _field("kept"), _field("units", "of")],
        },
    )


def frontier(rows: Rows, metric: str) -> Spec:
    """Quality against size, one point per model."""
    x = {
        "field": "parameters",
        "type": "quantitative",
        "title": "parameters",
        "axis": {"format": "~s", "tickCount": 8},
        "scale": {"zero": False},
    }
    y = {"field": "value", "type": "quantitative", "title": metric, "scale": {"zero": False}}
    tip = [_field("model"), _field("parameters", "parameters", ","), _field("value", metric, ".4g")]
    ends = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    labels: list[Spec] = [
        {
            "transform": [{"filter": f"datum.model {is_it} 'dense'"}],
            "mark": {"type": "text", "color": INK, "fontSize": 12, **place},
            "encoding": {"x": x, "y": y, "text": {"field": "label"}},
        }
        for is_it, place in _LABELED
    ]
    pick, word = (max, "highest") if metric == "accuracy" else (min, "lowest")
    best = pick(rows, key=lambda row: row["value"])
    return figure(
        f"{metric.capitalize()} against parameters of {len(rows)} models; {word}: {best['label']}.",
        rows,
        layer=[
            {"mark": {"type": "line", "color": FAINT}, "encoding": {"x": x, "y": y}},
            {
                "mark": {"type": "rule", "color": FIRST},
                "transform": [KNOWN],
                "encoding": {"x": x, **ends, "tooltip": tip},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "color": FIRST, "opacity": 1},
                "encoding": {"x": x, "y": y, "tooltip": tip},
            },
            *labels,
        ],
    )


def family(rows: Rows) -> Spec:
    """The share of units that stays, block by block, in each of several models."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    tip = [_field("model"), _field("block"), _field("kept"), _field("units", "of")]
    color = {
        "field": "share",
        "type": "quantitative",
        "title": "units that stay",
        "legend": {"format": "%", "values": [0, 0.5, 1]},
    }
    cells = {
        "mark": CELL,
        "encoding": {
            "x": {"field": "block", "type": "ordinal", "title": "block", "axis": BLOCK_AXIS, "scale": TIGHT},
            "y": {"field": "label", "type": "nominal", "title": None, "sort": None, "scale": TIGHT},
            "color": {**color, "scale": {"scheme": "viridis", "domain": [0, 1]}},
            "tooltip": tip,
        },
    }
    lowest = min(rows, key=lambda row: row["share"])
    shown = figure(
        f"Share of the units that stays in each block of {len(models)} models; least in block {lowest['block']} of "
        f"{lowest['model']}, {lowest['kind']}: {lowest['share']:.0%}.",
        rows,
    )
    height = {"height": 22 * len(models)}
    views = [
        {**cells, **height, "width": "container", "title": kind, "transform": [{"filter": f"datum.kind == '{kind}'"}]}
        for kind in kinds
    ]
    if len(views) == 1:
        return {**shown, **views[0]}
    return {k: v for k, v in shown.items() if k not in ("width", "height", "autosize")} | {"vconcat": views}


def positions(found: Mapping[str, Any]) -> Spec:
    """Perplexity by position, dense and pruned."""
    rows = [
        {"model": label, **row}
        for name, label in (("dense", "dense"), ("model", "pruned"))
        for row in found.get(name, [])
    ]
    last = [row["perplexity"] for row in rows if row["until"] == rows[-1]["until"]]
    return figure(
        f"Perplexity by position in a window; at its end {' against '.join(f'{v:.4g}' for v in last)}.",
        rows,
        mark={"type": "line", "point": True},
        encoding={
            "x": {
                "field": "until",
                "type": "quantitative",
                "scale": {"type": "log", "base": 2},
                "title": "up to token",
            },
            "y": {"field": "perplexity", "type": "quantitative", "scale": {"zero": False}},
            "color": _kinds(["dense", "pruned"], "model"),
            "tooltip": [_field("model"), _field("from"), _field("until"), _field("perplexity", "perplexity", ".4g")],
        },
    )


def noise(found: Mapping[str, Any]) -> Spec:
    """How much more the pruned model suffers from noise than the dense one, with intervals."""
    rows = [{"text": f"{row['noise']} {row['strength']:g}", **row["excess"]} for row in found["noisy"]]
    return _excess(rows, "noisy text", "clean text")


def shift(found: Mapping[str, Any]) -> Spec:
    """How much more the pruned model suffers on other texts than the dense one, with intervals."""
    rows = [{"text": row["text"], **row["excess"]} for row in found["others"]]
    return _excess(rows, "other texts", found["home"]["text"])


def _excess(rows: Rows, there: str, home: str) -> Spec:
    worst = max(rows, key=lambda row: row["value"])
    y = {"field": "text", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 240}}
    tip = [_field("text"), *_valued(rows)]
    x = {"type": "quantitative", "scale": ROOMY, "title": ["ratio to dense,", f"over that on {home}"]}
    return figure(
        f"Ratio to dense on {there} over that on {home}. Most: {worst['text']}, {worst['value']:.3f}.",
        rows,
        height=26 * len(rows) + 40,
        layer=_intervals(x, y, tip),
    )


def transfer(found: Mapping[str, Any]) -> Spec:
    """The matrix of calibration and test texts: ratios to dense with their intervals."""
    rows = []
    for c in found["cells"]:
        flag = " *" if (c.get("overlap") or {}).get("flagged") else ""
        said = {
            "said": f"{c['ratio']['value']:.2f}x{flag}",
            "span": f"{c['ratio']['low']:.2f} to {c['ratio']['high']:.2f}" if c["ratio"]["low"] is not None else "",
        }
        rows.append({"calibrated": c["calibrated"], "tested": c["tested"], **said, **c["ratio"]})
    tip = [_field("calibrated"), _field("tested"), *_valued(rows)]
    x = {
        "field": "tested",
        "type": "nominal",
        "title": "tested on",
        "axis": {"labelAngle": 0, "labelLimit": 110},
        "scale": TIGHT,
    }
    y = {
        "field": "calibrated",
        "type": "nominal",
        "title": "calibrated on",
        "axis": {"labelLimit": 110},
        "scale": TIGHT,
    }
    low, high = min(1.0, *(r["value"] for r in rows)), max(CALM, *(r["value"] for r in rows))
    ink = {"condition": {"test": f"datum.value > {(low + high) / 2}", "value": "#000"}, "value": "#fff"}
    color = {"field": "value", "type": "quantitative", "title": "times dense"}
    worst = max(rows, key=lambda row: row["value"])
    words = {"said": {"fontSize": 15, "dy": -7}, "span": {"fontSize": 12, "dy": 10}}
    return figure(
        f"Perplexity as a multiple of dense, by calibration and test text, with 95 % intervals; most {worst['said']}, "
        f"calibrated on {worst['calibrated']} and tested on {worst['tested']}.",
        rows,
        height=60 * len({row["calibrated"] for row in rows}) + 40,
        layer=[
            {
                "mark": CELL,
                "encoding": {
                    "x": x,
                    "y": y,
                    "tooltip": tip,
                    "color": {**color, "scale": {"scheme": "viridis", "domain": [low, high]}},
                },
            },
            *(
                {
                    "mark": {"type": "text", **style},
                    "encoding": {"x": x, "y": y, "text": {"field": name}, "color": ink},
                }
                for name, style in words.items()
            ),
        ],
    )


def speed(rows: Rows) -> Spec:
    """Ratios to dense: speeds, memory, bytes; colored by whether that is better."""
    x = {"type": "quantitative", "title": "times dense", "scale": ROOMY}
    y = {"field": "measure", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 240}}
    tip = [_field("measure"), *_valued(rows)]
    said = ", ".join(f"{row['measure']} {row['value']:.2f}x" for row in rows)
    kinds = ["better than dense", "no better"]
    shown = [{**row, "kind": kinds[not (row["value"] > 1 if row["more"] else row["value"] < 1)]} for row in rows]
    layers = _intervals(x, y, tip)
    for layer in layers[1:]:
        layer["encoding"]["color"] = _kinds(kinds)
    return figure(
        f"Measured ratios to the dense model: {said}. Lines: quartiles of the rounds.",
        shown,
        height=34 * len(rows) + 40,
        layer=layers,
    )


def _intervals(x: Spec, y: Spec, tip: list[Spec]) -> list[Spec]:
    """A point for every `value`, a line from `low` to `high`, and where a ratio is one."""
    return [
        {
            "mark": {"type": "rule", "color": INK, "strokeDash": [4, 4], "aria": False},
            "encoding": {"x": {"datum": 1, **x}},
        },
        {
            "mark": {"type": "rule", "color": FIRST, "strokeWidth": 2},
            "transform": [KNOWN],
            "encoding": {"y": y, "x": {"field": "low", **x}, "x2": {"field": "high"}, "tooltip": tip},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 70, "color": FIRST, "opacity": 1},
            "encoding": {"y": y, "x": {"field": "value", **x}, "tooltip": tip},
        },
    ]


def _valued(rows: Rows) -> list[Spec]:
    """What a tip says of values; intervals only where all of them have one."""
    known = all(row["low"] is not None for row in rows)
    return [_field(name, name, ".3f") for name in ("value", "low", "high")[: 3 if known else 1]]


def _kinds(names: Sequence[str], field: str = "kind") -> Spec:
    colors = [FIRST, SECOND] if field == "kind" else [SECOND, FIRST]
    return {
        "field": field,
        "type": "nominal",
        "title": None,
        "legend": {"labelExpr": "datum.label == 'ffn' ? 'FFN' : datum.label"},
        "scale": {"domain": list(names), "range": colors[: len(names)]},
    }


def _field(name: str, title: str | None = None, form: str | None = None) -> Spec:
    return {"field": name, "title": title or name, **({"format": form} if form else {})}


def _span(values: Sequence[int] | Sequence[float]) -> str:
    if not values:
        return "none"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"

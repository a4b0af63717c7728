"""Heads as a graph per block: who attends like whom, and who went; figure 3 of GOA, for the user's own model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..similarity import ALIKE

SIZE, RADIUS = 120, 46


def head_graphs(pruning: Mapping[str, Any], similarity: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Per block: nodes on a circle, edges between heads that are alike, in units of a square of 120.

    `similarity`: per site the distances of its heads in the dense model, right of the diagonal.

    Source: arXiv 2407.19126, figure 3. Differs: distances are in nats; whole KV groups go.
    """
    graphs = []
    tau = pruning["recipe"]["attention"].get("tau", ALIKE)
    for key, flat in similarity.items():
        count = round((1 + math.sqrt(1 + 8 * len(flat))) / 2)
        site = pruning["sites"].get(key, {"units": count, "kept": range(count)})
        group = count // site["units"]
        kept = {unit * group + j for unit in site["kept"] for j in range(group)}
        places = [_place(k, count) for k in range(count)]
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        alike = [(i, j, d) for (i, j), d in zip(pairs, flat, strict=True) if d < tau]
        graphs.append(
            {
                "block": int(key.split(".")[0]),
                "tau": tau,
                "nodes": [{"x": x, "y": y, "head": k, "kept": k in kept} for k, (x, y) in enumerate(places)],
                "edges": [
                    {
                        "from": places[i],
                        "to": places[j],
                        "width": round(1.2 + 2.4 * (1 - d / tau), 2),
                        "said": f"heads {i} and {j}: {d:.3f} nats",
                    }
                    for i, j, d in alike
                ],
                "description": (
                    f"Block {key.split('.')[0]}: {len(alike)} of {len(pairs)} pairs of heads closer than {tau:g} nats; "
                    f"heads removed: {', '.join(str(k) for k in range(count) if k not in kept) or 'none'}."
                ),
            }
        )
    return graphs


def _place(k: int, count: int) -> tuple[float, float]:
    angle = 2 * math.pi * k / count - math.pi / 2
    return round(SIZE / 2 + RADIUS * math.cos(angle), 1), round(SIZE / 2 + RADIUS * math.sin(angle), 1)

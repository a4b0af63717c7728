"""How alike attention heads are: the Jensen-Shannon matrix of GOA (Eq. 1) and the removal lists made from it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .distributed import dealt_counts, gathered, summed, summed_number
from .placement import CPU
from .stream import BlockStream

ALIKE = 0.16
"""Distance in nats under which two heads are called alike where nothing else is said."""
TOKENS_AT_ONCE = 512
"""Whole attention maps are large, so few sequences are looked at at a time."""


def jensen_shannon(p: Float[Tensor, "head row key"]) -> Float[Tensor, "head head"]:
    """D_ij = mean over rows of JSD(p_i || p_j), in nats: 0 for equal heads, at most ln 2 = 0.693.

    JSD(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2. Cost: heads^2 / 2 x rows x keys logarithms.

    Source: arXiv 2407.19126, Eq. 1 (the base of the logarithm is not stated there; we use nats).
    """
    entropy = torch.special.entr(p).sum(-1).mean(-1)
    d = p.new_zeros(len(p), len(p))
    for i in range(len(p) - 1):
        mixed = torch.special.entr((p[i] + p[i + 1 :]) / 2).sum(-1).mean(-1)
        d[i, i + 1 :] = mixed - (entropy[i] + entropy[i + 1 :]) / 2
    return (d + d.T).clamp_min(0)


def head_similarity(
    stream: BlockStream, i: int, path: str, *, sequences: int, rows: int, skip: int, exclude_sink: bool
) -> Float[Tensor, "head head"]:
    """The Jensen-Shannon matrix of block `i`, from at most `sequences` sequences and `rows` query positions of each.

    The first `skip` rows of each sequence are left out: row 1 of a causal map has one entry, so all heads look alike
    there. `exclude_sink` drops the first key (where unused attention collects) and renormalizes.

    Differs: the paper uses every row of every sample; `rows = 0` and `skip = 0` do that.
    """
    total, counted = torch.zeros((), device=CPU), 0
    quotas = dealt_counts([len(batch["input_ids"]) for batch in stream.batches], sequences)
    for b, batch in enumerate(stream.batches):
        count, length = batch["input_ids"].shape
        step = max(1, TOKENS_AT_ONCE // length)
        for start in range(0, quotas[b], step):
            part = slice(start, min(start + step, quotas[b]))
            p = stream.attention_probabilities(i, b, path, part).float()
            real = stream.rows[b]
            mask = (
                torch.ones(len(p), length, dtype=torch.bool, device=p.device)
                if real is None
                else real.reshape(count, length)[part].to(p.device)
            )
            for one, tokens in zip(p, mask, strict=True):
                chosen = _spaced_rows(one, tokens, rows, skip)
                if exclude_sink:
                    chosen = chosen[..., 1:] / chosen[..., 1:].sum(-1, keepdim=True).clamp_min(1e-12)
                total = total + jensen_shannon(chosen) * chosen.shape[1]
                counted += chosen.shape[1]
    heads = max(gathered(len(total) if total.dim() else 0))
    return summed(total.cpu().expand(heads, heads).clone()) / summed_number(counted)


def _spaced_rows(
    p: Float[Tensor, "head query key"], real: Bool[Tensor, " query"], rows: int, skip: int
) -> Float[Tensor, "head row key"]:
    """At most `rows` evenly spaced query rows of real tokens, the first `skip` of them left out."""
    where = real.nonzero().flatten()
    where = where[min(skip, len(where) - 1) :]
    if rows and len(where) > rows:
        where = where[torch.linspace(0, len(where) - 1, rows).long()]
    return p[:, where]


def printed_removals(d: Float[Tensor, "head head"], tau: float) -> list[int]:
    """The heads that Algorithm 2 removes, in its order, exactly as printed.

    Ordered pairs (i, j), i != j, row by row: whenever D_ij < tau and neither i nor j is on the list, i joins it.
    Known faults (kept here on purpose): with only 0~1, 1~2, 2~3 alike it removes 0, 1 and 2; the lower index goes
    whatever its value; tau is no budget. `repaired_removals` mends all three.

    Source: arXiv 2407.19126, Algorithm 2.
    """
    removed: list[int] = []
    for i in range(len(d)):
        for j in range(len(d)):
            if i != j and d[i, j] < tau and i not in removed and j not in removed:
                removed.append(i)
    return removed


def repaired_removals(
    d: Float[Tensor, "head head"], importance: Float[Tensor, " unit"], heads_of: list[list[int]], tau: float
) -> tuple[list[int], set[int]]:
    """Units that a surviving twin makes redundant, most redundant first, and the units locked as those twins.

    Units are tried from the least important. A unit goes if each of its heads has a head within tau in some other
    unit that has not gone; those units are then locked, so every removed head keeps a twin that stays.

    Differs: arXiv 2407.19126, Algorithm 2 scans by index, lets twins of removed heads go too, and knows no groups.
    """
    unit_of = {head: unit for unit, heads in enumerate(heads_of) for head in heads}
    removed: dict[int, float] = {}
    locked: set[int] = set()
    for unit in torch.argsort(importance, stable=True).tolist():
        if unit in locked:
            continue
        twins = []
        for head in heads_of[unit]:
            others = [j for j in range(len(d)) if unit_of[j] != unit and unit_of[j] not in removed]
            near = [(float(d[head, j]), unit_of[j]) for j in others if d[head, j] < tau]
            if not near:
                break
            twins.append(min(near))
        else:
            removed[unit] = sum(distance for distance, _ in twins) / len(twins)
            locked.update(twin for _, twin in twins)
    return sorted(removed, key=lambda unit: removed[unit]), locked

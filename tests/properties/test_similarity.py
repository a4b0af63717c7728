import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelm.similarity import head_similarity, jensen_shannon, printed_removals, repaired_removals
from prunelm.stream import BlockStream
from prunelm.testing import tiny_inputs, tiny_model


def _maps(heads, rows, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(heads, rows, keys, generator=generator)).softmax(-1)


def _matrix(pairs, heads):
    """A distance matrix in which only the named pairs are alike."""
    d = torch.full((heads, heads), 0.6)
    for i, j in pairs:
        d[i, j] = d[j, i] = 0.05
    return d.fill_diagonal_(0)


@given(st.integers(2, 5), st.integers(1, 6), st.integers(2, 7), st.integers(0, 99))
def test_jensen_shannon_by_its_definition(heads, rows, keys, seed):
    p = _maps(heads, rows, keys, seed)
    d = jensen_shannon(p)
    for i, j in itertools.product(range(heads), repeat=2):
        middle = (p[i] + p[j]) / 2
        divergence = ((p[i] * (p[i] / middle).log()).sum(-1) + (p[j] * (p[j] / middle).log()).sum(-1)) / 2
        assert float(d[i, j]) == pytest.approx(float(divergence.mean()), abs=1e-5)


@given(st.integers(2, 5), st.integers(1, 6), st.integers(2, 7), st.integers(0, 99))
def test_jensen_shannon_is_a_bounded_symmetric_distance(heads, rows, keys, seed):
    d = jensen_shannon(_maps(heads, rows, keys, seed))
    assert torch.equal(d, d.T)
    assert bool((d.diagonal() == 0).all())
    assert bool((d >= 0).all())
    assert bool((d <= math.log(2) + 1e-6).all())


def test_disjoint_maps_are_ln_2_apart():
    p = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert float(jensen_shannon(p)[0, 1]) == pytest.approx(math.log(2))


@given(st.integers(2, 7), st.integers(0, 999), st.floats(0.05, 0.6))
def test_algorithm_2_as_printed(heads, seed, tau):
    generator = torch.Generator().manual_seed(seed)
    d = torch.rand(heads, heads, generator=generator)
    d = (d + d.T) / 2
    marked = [False] * heads
    expected = []
    for i in range(heads):
        for j in range(heads):
            if i == j:
                continue
            if float(d[i, j]) < tau and not marked[i] and not marked[j]:
                marked[i] = True
                expected.append(i)
    assert printed_removals(d, tau) == expected


def test_the_printed_rule_collapses_chains_and_the_repaired_one_does_not():
    chain = _matrix([(0, 1), (1, 2), (2, 3)], 4)
    assert printed_removals(chain, 0.16) == [0, 1, 2]
    removed, locked = repaired_removals(chain, torch.tensor([1.0, 2.0, 3.0, 4.0]), [[0], [1], [2], [3]], 0.16)
    for gone in removed:
        assert any(chain[gone, stays] < 0.16 for stays in range(4) if stays not in removed)
    assert locked.isdisjoint(removed)


def test_the_less_important_of_a_pair_goes():
    pair = _matrix([(0, 1)], 3)
    singles = [[0], [1], [2]]
    assert repaired_removals(pair, torch.tensor([5.0, 1.0, 9.0]), singles, 0.16) == ([1], {0})
    assert printed_removals(pair, 0.16) == [0]


@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 999), st.floats(0.1, 0.9))
def test_every_removed_head_keeps_a_surviving_twin(units, per_unit, seed, tau):
    generator = torch.Generator().manual_seed(seed)
    heads = units * per_unit
    d = torch.rand(heads, heads, generator=generator)
    d = ((d + d.T) / 2).fill_diagonal_(0)
    heads_of = [list(range(u * per_unit, (u + 1) * per_unit)) for u in range(units)]
    removed, locked = repaired_removals(d, torch.rand(units, generator=generator), heads_of, tau)
    surviving = [head for unit, mine in enumerate(heads_of) if unit not in removed for head in mine]
    assert locked.isdisjoint(removed)
    for unit in removed:
        for head in heads_of[unit]:
            assert min(float(d[head, other]) for other in surviving) < tau


def test_a_group_stays_when_one_of_its_heads_has_no_twin():
    d = _matrix([(0, 2)], 4)
    assert repaired_removals(d, torch.tensor([1.0, 2.0]), [[0, 1], [2, 3]], 0.16)[0] == []


def test_equal_heads_are_found_in_a_model():
    model = tiny_model("gpt2")
    attention = model.transformer.h[0].attn
    with torch.no_grad():
        for part in (0, 48):  # queries and keys of head 1 become those of head 0
            attention.c_attn.weight[:, part + 8 : part + 16] = attention.c_attn.weight[:, part : part + 8]
            attention.c_attn.bias[part + 8 : part + 16] = attention.c_attn.bias[part : part + 8]
    stream = BlockStream(model, [tiny_inputs(model)])
    d = head_similarity(stream, 0, "attn", sequences=2, rows=0, skip=1, exclude_sink=False)
    assert float(d[0, 1]) < 1e-6
    assert float(d[0, 2]) > 1e-3
    without_sink = head_similarity(stream, 0, "attn", sequences=2, rows=0, skip=1, exclude_sink=True)
    assert float(without_sink[0, 1]) < 1e-6
    assert not torch.allclose(d, without_sink, atol=1e-3)


def test_the_first_row_of_a_causal_map_makes_heads_look_alike():
    model = tiny_model("gpt2")
    stream = BlockStream(model, [tiny_inputs(model)])
    options = {"sequences": 2, "rows": 0, "exclude_sink": False}
    with_first = head_similarity(stream, 0, "attn", skip=0, **options)
    without = head_similarity(stream, 0, "attn", skip=1, **options)
    assert torch.allclose(with_first * 12 / 11, without, atol=1e-5)


def test_padding_never_enters_the_similarity():
    model = tiny_model("bert")
    batch = tiny_inputs(model, padded=True)
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][1, -4:] = 50
    options = {"sequences": 2, "rows": 0, "skip": 0, "exclude_sink": False}
    found = [head_similarity(BlockStream(model, [b]), 0, "attention.self", **options) for b in (batch, changed)]
    assert torch.allclose(found[0], found[1], atol=1e-6)

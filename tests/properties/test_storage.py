"""Bytes and shapes of a plan are those of the model that it makes."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from prunelm.job import plan_counts
from prunelm.outline import outline
from prunelm.recipe import Recipe
from prunelm.sites import find_sites, narrow_, weight_of
from prunelm.storage import Stored, cache_bytes_of, format_named, stored_after, stored_bytes, type_of
from prunelm.testing import TINY, tiny_model


def some_counts(sites):
    return {site.key: site.n_units - site.strata * (1 + site.block % 2) for site in sites}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("unit", ["group", "query"])
def test_shapes_are_those_of_the_narrowed_model(name, unit):
    model = tiny_model(name)
    sites = find_sites(model, unit)
    counts = some_counts(sites)
    found = {tensor.name: tensor.shape for tensor in stored_after(model, sites, counts)}
    for key in counts:
        site = next(site for site in find_sites(model, unit) if site.key == key)
        narrow_(site, torch.arange(site.n_units).reshape(site.strata, -1)[:, : counts[key] // site.strata].flatten())
    real = {}
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            real[f"{path}.{kind}".lstrip(".")] = tuple((weight_of(module) if kind == "weight" else parameter).shape)
    assert {name: real[name] for name in found} == found
    assert sum(torch.Size(shape).numel() for shape in found.values()) == sum(p.numel() for p in model.parameters())


def test_rows_of_an_outline_add_up():
    model = tiny_model("llama")
    job = plan_counts(model, Recipe.load("l1", sparsity=0.3, multiple_of=1))
    *rows, total = outline(model, job, context=100)
    removed = sum((s.n_units - job.keeps(s)) * s.cost for s in job.sites)
    assert total["parameters"] == sum(p.numel() for p in model.parameters()) - removed
    assert total["cache"] == 2 * 2 * 3 * 8 * 100 * 2 == cache_bytes_of(job.everything, job.counts, 100)
    blocks = [row for row in rows if row["units"]]
    kept = job.keeps(job.sites[-1])
    matrices = 48 * 48 * 2 + 24 * 48 * 2 + 3 * 48 * kept
    assert [row["flops"] for row in blocks] == [2 * matrices + 4 * 48 * 100] * 2
    assert rows[-1]["block"] == "outside"
    assert rows[-1]["flops"] == 2 * 48 * 97


def test_tables_that_are_looked_up_multiply_nothing():
    model = tiny_model("gpt2")
    *_, outside, _ = outline(model, plan_counts(model, Recipe.load("l1", sparsity=0.3, multiple_of=1)), context=100)
    assert outside["flops"] == 2 * model.get_output_embeddings().weight.numel()


def of(shape, part="other", block=None):
    return Stored(name="w", shape=shape, part=part, block=block, blocks=16)


@pytest.mark.parametrize(
    ("tensor", "form", "kind"),
    [
        (of((64,)), "q4_k_m", Type.F32),
        (of((64, 512)), "q4_k_m", Type.Q4_K),
        (of((64, 576)), "q4_k_m", Type.Q5_0),
        (of((64, 40)), "q4_k_m", Type.F16),
        (of((64, 512), "output"), "q4_k_m", Type.Q6_K),
        (of((64, 576), "output"), "q4_k_m", Type.Q8_0),
        (of((64, 512), "down", 0), "q4_k_m", Type.Q6_K),
        (of((64, 512), "down", 2), "q4_k_m", Type.Q4_K),
        (of((64, 512), "down", 4), "q4_k_m", Type.Q6_K),
        (of((64, 512), "value", 15), "q5_k_m", Type.Q6_K),
        (of((64, 512), "value", 3), "q4_k_s", Type.Q5_K),
        (of((64, 512), "value", 4), "q4_k_s", Type.Q4_K),
        (of((64, 512), "fused", 3), "q4_k_m", Type.Q5_K),
        (of((64, 64), "embeddings"), "q4_0", Type.Q8_0),
        (of((64, 64)), "q4_0", Type.Q4_0),
        (of((64, 40)), "q8_0", Type.F16),
    ],
)
def test_types_are_those_of_llama_quantize_and_of_export(tensor, form, kind):
    assert type_of(tensor, form) == kind
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    assert stored_bytes([tensor], form) == tensor.entries // per_block * size


def test_int8_has_a_scale_for_each_row():
    assert stored_bytes([of((8, 100)), of((8, 100), "embeddings"), of((8,))], "int8") == 8 * 104 + 1600 + 16
    assert format_named("FP16") == "f16"

"""The Fisher matrix of a consumer's output is the curvature of the divergence, and takes whole batches or none."""

import pytest
import torch

from prunelm.fisher import output_fisher
from prunelm.sensitivity import Divergence
from prunelm.sites import find_sites, weight_of
from prunelm.stream import BlockStream
from prunelm.testing import tiny_inputs, tiny_model


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_curvature_predicts_the_divergence_of_a_small_change(family):
    """A change of the consumer's output at one token only, so that the pairs of tokens left out are none."""
    model = tiny_model(family)
    batch = {"input_ids": torch.randint(3, model.config.vocab_size, (1, 1), generator=torch.Generator().manual_seed(0))}
    site = find_sites(model)[-1]
    layer = site.consumer.layer
    draws = [output_fisher(model, [batch] * 200, [site], seed=seed)[site.key] for seed in range(2)]
    fisher = sum(draws) / 2
    divergence = Divergence(BlockStream(model, [batch]), [0])
    change = torch.randn(len(weight_of(layer)), generator=torch.Generator().manual_seed(1)) * 0.05
    handle = layer.register_forward_hook(lambda _module, _args, output: output + change)
    measured = divergence.measure(0, divergence.entering)
    handle.remove()
    expected = float(change.double() @ fisher @ change.double() / 2)
    assert expected == pytest.approx(measured, rel=0.25)
    assert measured > 0


def test_padding_changes_nothing_and_no_gradient_is_left():
    model = tiny_model("bert")
    site = find_sites(model)[0]
    plain = {"input_ids": torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))}
    padded = {
        "input_ids": torch.cat([plain["input_ids"], torch.zeros(2, 3, dtype=torch.long)], 1),
        "attention_mask": torch.tensor([[1] * 7 + [0] * 3] * 2),
    }
    found = [output_fisher(model, [batch], [site], seed=0)[site.key] for batch in (plain, padded)]
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(found[0], output_fisher(model, [plain], [site], seed=0)[site.key])


def test_a_fisher_matrix_is_symmetric_and_has_no_negative_direction():
    model = tiny_model("llama")
    sites = find_sites(model)
    found = output_fisher(model, [tiny_inputs(model, seed=0)], sites, seed=0)
    assert set(found) == {site.key for site in sites}
    for matrix in found.values():
        assert torch.equal(matrix, matrix.T)
        assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-6 * float(matrix.diagonal().mean())

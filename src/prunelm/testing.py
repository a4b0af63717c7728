"""Public conformance checks and tiny models: what every architecture and plug-in must pass.

Our own suite runs these over the registries, so a new plug-in is tested without writing a test. They raise
`AssertionError` with numbers; they need no network and no test framework.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from .allocators import ALLOCATORS, PER_UNIT
from .criteria import CRITERIA, Statistics
from .data import Batches
from .errors import BudgetError
from .fisher import output_fisher
from .gradients import Gradient, collect
from .hidden import find_hidden, narrow_hidden_
from .importance import Importance, gate_slopes, importances
from .layer_outputs import LayerOutputs
from .losses import objective
from .moments import CrossMoments, Moments
from .plan import Budget, prunable
from .reconstructions import RECONSTRUCTIONS, Reconstruction
from .similarity import head_similarity
from .sites import Site, bias_of, find_blocks, find_sites, gone_sites, narrow_, weight_of
from .stream import BlockStream, prediction

_MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 3}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"num_key_value_heads": 3, "sliding_window": 8}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"num_key_value_heads": 3, **_MULTIPLIERS}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 3}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_key_value_heads": 3}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"num_key_value_heads": 3, "sliding_window": 8}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"num_key_value_heads": 3, "sliding_window": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"num_key_value_heads": 3, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 40, "word_embed_proj_dim": 48}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "bert": ("BertConfig", "BertModel", {}),
}
"""Tiny models by name: config class, model class, and what differs from `_COMMON`."""

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_HEAD_DIM = {"gpt2", "opt", "gpt_neox", "bert"}


def tiny_model(name: str, *, seed: int = 0, model_class: str | None = None, **overrides: Any) -> PreTrainedModel:
    """A randomly initialized model of a family, in float32 and eval mode, every parameter perturbed.

    Fresh models have zero biases and unit norms, which hides faults in handling them: hence the perturbation.
    """
    config_class, default_class, extra = TINY[name]
    options = {**_COMMON, **extra, **overrides}
    if name in _NO_HEAD_DIM:
        del options["head_dim"]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**options)
    model = getattr(transformers, model_class or default_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_inputs(model: PreTrainedModel, *, seed: int = 0, padded: bool = False) -> dict[str, Tensor]:
    """Two sequences of 12 random tokens; with `padded`, the second has four padding positions at its end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return prediction(model(**inputs))


def _energy_of_outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """A loss that every model has."""
    return prediction(model(**inputs)).square().mean()


@contextlib.contextmanager
def silenced(sites: Sequence[Site], kept: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, every unit that is not kept contributes nothing: its consumer columns read zeros."""
    handles = []
    for site in sites:
        if site.key not in kept:
            continue
        mask = torch.zeros(weight_of(site.consumer.layer).shape[1])
        mask[site.consumer.keep(kept[site.key])] = 1.0

        def silence(_module: torch.nn.Module, args: tuple[Tensor, ...], mask: Tensor = mask) -> tuple[Tensor, ...]:
            return (args[0] * mask.to(args[0]), *args[1:])

        handles.append(site.consumer.layer.register_forward_pre_hook(silence))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def some_units(site: Site, seed: int = 0) -> Tensor:
    """A random choice of units to keep, at least one and not all, the same number in every stratum."""
    generator = torch.Generator().manual_seed(seed + 31 * site.block)
    per = site.n_units // site.strata
    keep = max(1, per * 2 // 3) if per > 1 else 1
    picks = [torch.randperm(per, generator=generator)[:keep] + s * per for s in range(site.strata)]
    return torch.cat(picks).sort().values


def check_architecture(
    build: Callable[[], PreTrainedModel], *, unit: str = "group", inputs: Mapping[str, Tensor] | None = None
) -> None:
    """Raise unless removing units equals silencing them, after every site, and the layout partitions each axis.

    A block must give the same, too, where its attention does not run again but gives what it gave before.

    Args:
        build: makes the same model each time it is called.
        unit: what a unit of attention is; see `find_sites`.
        inputs: what to feed; two random sequences by default.
    """
    reference, model = build(), build()
    fed = inputs or tiny_inputs(reference)
    reference_sites = find_sites(reference, unit)
    for site in reference_sites:
        _check_partition(site)
    _check_known_attention(reference, fed)
    kept: dict[str, Tensor] = {}
    dense = outputs(reference, fed)
    for key in [site.key for site in reference_sites]:
        site = next(s for s in find_sites(model, unit) if s.key == key)
        kept[key] = some_units(site)
        before = sum(p.numel() for p in model.parameters())
        narrow_(site, kept[key])
        removed = before - sum(p.numel() for p in model.parameters())
        expected = (site.n_units - len(kept[key])) * site.cost
        assert removed == expected, f"{key}: {removed} parameters went, its cost says {expected}"
        with silenced(reference_sites, kept):
            silent = outputs(reference, fed)
        gap = (outputs(model, fed) - silent).abs().max().item()
        assert gap < 1e-4, f"{key}: removing differs from silencing by {gap:.2e}"
        assert (silent - dense).abs().max().item() > 1e-3, f"{key}: silencing changed nothing, the check is empty"
    again = {site.key: site.n_units for site in find_sites(model, unit)}
    assert again == {key: len(units) for key, units in kept.items()}, f"sizes found after narrowing: {again}"


@contextlib.contextmanager
def silenced_hidden(model: PreTrainedModel, kept: Tensor) -> Iterator[None]:
    """While open, hidden channels that are not kept are zero wherever they are written, and no norm counts them."""
    axis = find_hidden(model)
    mask = torch.zeros(axis.width)
    mask[kept] = 1.0
    roles = {cut.module: cut.role for cut in axis.cuts}
    roles |= {module: "norm" for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}
    handles = []
    for module, role in roles.items():
        if role == "norm":
            handles.append(module.register_forward_hook(_norm_over(module, kept)))
        elif role in ("embedding", "writer"):
            handles.append(module.register_forward_hook(lambda _module, _args, output: output * mask.to(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm_over(norm: torch.nn.Module, kept: Tensor) -> Callable[..., Tensor]:
    """A hook that replaces a norm's output by that of the same norm over the kept channels, zero elsewhere."""
    small = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(small, name, torch.nn.Parameter(parameter.detach()[kept]))
    if isinstance(small, torch.nn.LayerNorm):
        small.normalized_shape = (len(kept),)

    def replace_output(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found = torch.zeros_like(output)
        found[..., kept] = small(args[0][..., kept])
        return found

    return replace_output


def check_hidden(
    build: Callable[[], PreTrainedModel], *, inputs: Mapping[str, Tensor] | None = None, seed: int = 0
) -> None:
    """Raise unless removing hidden channels equals silencing them, in every reader, writer and norm.

    Silenced channels are zero in the residual stream at every place, and norms take their statistics over the channels
    that stay. Two thirds of the channels stay, chosen at random.

    Args:
        build: makes the same model each time it is called.
        inputs: what to feed; two random sequences by default.
        seed: of the choice.
    """
    reference, model = build(), build()
    fed = inputs or tiny_inputs(reference)
    width = find_hidden(reference).width
    kept = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: width * 2 // 3].sort().values
    dense = outputs(reference, fed)
    narrow_hidden_(model, kept)
    with silenced_hidden(reference, kept):
        silent = outputs(reference, fed)
    found = outputs(model, fed)
    if found.shape[-1] != silent.shape[-1]:
        dense, silent = dense[..., kept], silent[..., kept]
    gap = (found - silent).abs().max().item()
    assert gap < 1e-4, f"removing hidden channels differs from silencing them by {gap:.2e}"
    assert (silent - dense).abs().max().item() > 1e-3, "silencing changed nothing, the check is empty"
    again = find_hidden(model).width
    assert again == len(kept), f"hidden size found after narrowing: {again}, not {len(kept)}"
    assert [s.n_units for s in find_sites(model)] == [s.n_units for s in find_sites(reference)], "sites changed"


def _check_known_attention(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Raise where a block changes in place what its attention gave, or needs more of it."""
    stream = BlockStream(model, [inputs])
    for site in find_sites(model):
        if site.spec.probabilities is not None:
            known = LayerOutputs(stream.blocks[site.block].get_submodule(site.spec.probabilities))
            found = []
            for _ in range(2):
                with known.of(0):
                    found.append(stream.run(site.block, 0))
            assert torch.equal(*found), f"{site.key}: what its attention gave before makes another block"


def _check_partition(site: Site) -> None:
    for slot in (*site.producers, site.consumer):
        everything = torch.cat([slot.index.flatten(), slot.fixed]).sort().values
        length = weight_of(slot.layer).shape[0 if slot.axis == "out" else 1]
        assert torch.equal(everything, torch.arange(length)), f"{slot.path}: its units do not partition the axis"
        bias = bias_of(slot.layer)
        assert slot.axis == "in" or bias is None or len(bias) == length, f"{slot.path}: bias does not fit"


def site_statistics(model: PreTrainedModel, site: Site, *, seed: int = 0) -> Statistics:
    """Everything any criterion may read about a site of an unpruned model, from two random sequences."""
    stream = BlockStream(model, [tiny_inputs(model, seed=seed)])
    for i in range(site.block):
        stream.advance(i)
    entry, exit_ = next(iter(site.spec.producers)), site.spec.consumer[0]
    x, a = stream.capture(site.block, 0, [entry, exit_])
    producer, consumer = Moments(x.shape[1]), Moments(a.shape[1])
    producer.update(x)
    consumer.update(a)
    similarity = None
    if site.spec.probabilities is not None:
        similarity = head_similarity(
            stream, site.block, site.spec.probabilities, sequences=2, rows=0, skip=1, exclude_sink=False
        )
    gradients = collect(model, stream.batches, [site], _energy_of_outputs)
    batches = Batches(batches=[dict(batch) for batch in stream.batches], facts={})
    loss = objective("drawn", model, batches, unlabeled="drawn", seed=seed)
    fisher = output_fisher(model, stream.batches, [site], seed=seed)[site.key]
    return Statistics(
        consumer=consumer,
        producer=producer,
        similarity=similarity,
        gradients=gradients,
        fisher=fisher,
        importance=importances(model, [site], loss)[site.key],
        gates=gate_slopes(model, [site], loss)[site.key],
        seed=seed,
    )


def check_criterion(
    name: str, build: Callable[[], PreTrainedModel], *, site_name: str, equivariant: bool = True, **options: Any
) -> None:
    """Raise unless a criterion gives one finite score per unit, twice the same, and follows a relabeling of units.

    Args:
        name: as registered.
        build: makes the same model each time it is called.
        site_name: `attention` or `ffn`.
        equivariant: whether renaming units must only rename scores (not so for random scores).
        options: of the criterion.
    """
    model = build()
    site = next(s for s in find_sites(model) if s.name == site_name and s.block == 0)
    statistics = site_statistics(model, site)
    criterion = CRITERIA[name]
    scores = criterion(site, statistics, **options)
    assert scores.shape == (site.n_units,), f"{name}: {tuple(scores.shape)} scores for {site.n_units} units"
    assert bool(torch.isfinite(scores).all()), f"{name}: scores are not finite"
    assert torch.equal(scores, criterion(site, statistics, **options)), f"{name}: a second call gives other scores"
    if not equivariant:
        return
    order = torch.randperm(site.n_units, generator=torch.Generator().manual_seed(1))
    relabeled = criterion(site, _relabel_(site, statistics, order), **options)
    assert torch.allclose(relabeled, scores[order], rtol=1e-6), f"{name}: scores do not follow a relabeling of units"


@torch.no_grad()
def _relabel_(site: Site, statistics: Statistics, order: Tensor) -> Statistics:
    """Put unit `order[k]` in place k, in the weights and in the statistics; only the site's first block changes."""
    for slot in (*site.producers, site.consumer):
        weight, bias = weight_of(slot.layer), bias_of(slot.layer)
        to, source = slot.index.flatten(), slot.index[order].flatten()
        if slot.axis == "in":
            weight[:, to] = weight[:, source].clone()
            continue
        weight[to] = weight[source].clone()
        if bias is not None:
            bias[to] = bias[source].clone()
    gradients = {}
    for slot in (*site.producers, site.consumer):
        gradient = (statistics.gradients or {})[slot.path]
        mean, square = gradient.mean.clone(), gradient.square.clone()
        to, source = slot.index.flatten(), slot.index[order].flatten()
        for now, was in ((mean, gradient.mean), (square, gradient.square)):
            if slot.axis == "in":
                now[:, to] = was[:, source]
            else:
                now[to] = was[source]
        gradients[slot.path] = Gradient(mean=mean, square=square)
    assert statistics.consumer is not None
    moved = torch.arange(len(statistics.consumer.total))
    moved[site.consumer.index.flatten()] = site.consumer.index[order].flatten()
    consumer = Moments(len(moved))
    consumer.tokens, consumer.total = statistics.consumer.tokens, statistics.consumer.total[moved]
    consumer.gram = statistics.consumer.gram[moved][:, moved]
    similarity = statistics.similarity
    if similarity is not None:
        heads = torch.arange(len(similarity)).reshape(site.n_units, -1)[order].flatten()
        similarity = similarity[heads][:, heads]
    assert statistics.importance is not None
    assert statistics.gates is not None
    seen = statistics.importance
    importance = Importance(
        signed={path: signed[:, order] for path, signed in seen.signed.items()},
        first=seen.first[:, order],
        second=seen.second[:, order],
        mixed=seen.mixed[:, order],
    )
    return replace(
        statistics,
        consumer=consumer,
        similarity=similarity,
        gradients=gradients,
        importance=importance,
        gates=statistics.gates[:, order],
    )


def made_up_measurements(
    name: str, sites: Sequence[Site], budget: Budget, *, seed: int = 0
) -> list[dict[str, Float[Tensor, " number"]]]:
    """What an allocator asks to have measured, made up: the arguments after the budget."""
    needs = ALLOCATORS[name].needs
    if needs is None:
        return []
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in sites:
        whole = needs in PER_UNIT
        size = site.n_units if whole else len(budget.options(site))
        numbers = torch.rand(size, generator=generator, dtype=torch.float64)
        if not whole:
            numbers[0] = 0
            numbers = numbers.cumsum(0)
        found[site.key] = numbers
    return [found]


@torch.no_grad()
def check_empty_sites(build: Callable[[], PreTrainedModel]) -> None:
    """Raise unless a sublayer without units gives what a silenced one gives, with a cache as without.

    Attention goes in the last block and FFN in the first.

    Args:
        build: makes the same model each time it is called.
    """
    reference, model = build(), build()
    chosen = (f"{len(find_blocks(model)[1]) - 1}.attention", "0.ffn")
    for key in chosen:
        site = next(site for site in find_sites(model) if site.key == key)
        narrow_(site, torch.arange(0))
    assert set(gone_sites(model)) == set(chosen), f"{sorted(gone_sites(model))} are gone, not {chosen}"
    inputs = tiny_inputs(model)
    sites = [site for site in find_sites(reference) if site.key in chosen]
    with silenced(sites, {site.key: torch.arange(0) for site in sites}):
        expected = outputs(reference, inputs)
    gap = float((outputs(model, inputs) - expected).abs().max())
    assert gap < 1e-5, f"without {chosen} the output differs from silencing them by {gap:.2e}"
    if model.can_generate():
        ids, options = inputs["input_ids"][:1], {"max_new_tokens": 8, "do_sample": False}
        with_cache, without = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
        assert torch.equal(with_cache, without), "a cache changes what is generated"


def check_allocator(name: str, sites: Sequence[Site], *, multiple_of: int = 1, min_units: int = 1) -> None:
    """Raise unless plans meet every budget within one step, respect widths, and grow with the sparsity.

    Budgets that the allocator refuses with a `BudgetError` count as answered.
    """
    total = prunable(sites)
    before: dict[str, int] | None = None
    answered = 0
    for sparsity in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9):
        budget = Budget(target=int(sparsity * total), total=total, multiple_of=multiple_of, min_units=min_units)
        try:
            counts, step = ALLOCATORS[name](sites, budget, *made_up_measurements(name, sites, budget))
        except BudgetError:
            continue
        answered += 1
        removed = sum((site.n_units - counts[site.key]) * site.cost for site in sites)
        assert budget.target - step < removed <= budget.target, f"{name} at {sparsity}: {removed} of {budget.target}"
        for site in sites:
            kept = counts[site.key]
            assert min_units <= kept <= site.n_units, f"{name} at {sparsity}: {site.key} keeps {kept}"
            free = site.name != "ffn" or kept == site.n_units
            assert free or kept % multiple_of == 0, f"{name}: {site.key} keeps {kept}, no multiple of {multiple_of}"
        kept_all = sum(counts[site.key] * site.cost for site in sites)
        held = sum(before[site.key] * site.cost for site in sites) if before is not None else kept_all
        assert kept_all <= held, f"{name} at {sparsity}: more stays than at a lower sparsity"
        before = counts
    assert answered, f"{name} refused every budget"


def check_reconstruction(name: str, *, ridge: float = 1e-3) -> None:
    """Raise unless a reconstruction keeps shapes and inputs, and never fits worse than doing nothing.

    A refit returns a perfect weight unchanged; a repair that keeps every channel returns the layer unchanged; one that
    says that it changes only biases leaves layers without one alone. Where one factorization serves all numbers of
    channels, it gives what a solve for each number gives.
    """
    solve = RECONSTRUCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    weight, own_bias = torch.randn(5, 7, generator=generator), torch.randn(5, generator=generator)
    x = torch.randn(400, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 1
    everything = torch.arange(7)
    for bias in (None, own_bias):
        dense = x @ weight.T + (0 if bias is None else bias)
        for drift in (0.0, 0.3):
            for kept in (everything,) if solve.stage == "refit" else (everything, torch.tensor([0, 2, 3, 6])):
                moments = CrossMoments(5, 7)
                moments.update(dense, x + drift * torch.randn(x.shape, generator=generator))
                gram = moments.x.gram.clone()
                new, new_bias = solve(weight, bias, moments, kept, ridge=ridge)
                assert new.shape == (5, len(kept)), f"{name}: weight of shape {tuple(new.shape)}"
                assert (new_bias is None) == (bias is None), f"{name}: a bias came or went"
                assert torch.equal(gram, moments.x.gram), f"{name}: it changed its moments"
                old_error = moments.residual(weight[:, kept], bias, kept)
                error = moments.residual(new, new_bias, kept)
                assert error <= old_error + 1e-9, f"{name}: error rises from {old_error:.3e} to {error:.3e}"
                unchanged = drift or len(kept) < 7 or torch.allclose(new, weight, atol=1e-4)
                assert unchanged, f"{name}: a perfect weight was changed"
                left = not solve.only_biases or bias is not None or torch.equal(new, weight[:, kept])
                assert left, f"{name}: only_biases, but it changed a layer without a bias"
                if solve.nested is not None:
                    check_nested(solve, weight, bias, moments, ridge)


def check_nested(
    solve: Reconstruction,
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    ridge: float,
) -> None:
    """Raise unless a reconstruction's solves for the first channels of an order are those that it makes one by one."""
    assert solve.nested is not None
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    first = solve.nested(weight, bias, moments, order, ridge=ridge)
    for count in range(1, len(order) + 1):
        for nested, alone in zip(first(count), solve(weight, bias, moments, order[:count], ridge=ridge), strict=True):
            same = nested is alone is None or (
                nested is not None and alone is not None and torch.allclose(nested, alone, atol=1e-4)
            )
            assert same, f"{solve.name}: of the first {count} channels, what is nested differs from a solve of its own"

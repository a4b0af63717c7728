import pytest
import torch

from prunelm.sites import find_blocks
from prunelm.stream import BlockStream, attention_implementation
from prunelm.testing import TINY, tiny_inputs, tiny_model


def _entering_and_leaving(model, inputs):
    """Hidden states entering the first block and leaving the last, seen in a plain forward pass."""
    seen = {}
    _, blocks = find_blocks(model)
    first = blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.update(entering=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    last = blocks[-1].register_forward_hook(
        lambda _m, _a, output: seen.update(leaving=output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model.base_model(**inputs, use_cache=False)
    first.remove()
    last.remove()
    return seen["entering"], seen["leaving"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_stream_is_the_whole_model_bit_for_bit(name, padded):
    model = tiny_model(name, num_hidden_layers=3)
    batches = [tiny_inputs(model, seed=seed, padded=padded) for seed in (0, 1)]
    stream = BlockStream(model, batches)
    for b, batch in enumerate(batches):
        assert torch.equal(stream.hidden[b], _entering_and_leaving(model, batch)[0])
    for i in range(3):
        stream.advance(i)
    for b, batch in enumerate(batches):
        assert torch.equal(stream.hidden[b], _entering_and_leaving(model, batch)[1])


def test_capture_sees_the_inputs_of_layers_and_drops_padding():
    model = tiny_model("bert")
    batch = tiny_inputs(model, padded=True)
    stream = BlockStream(model, [batch])
    paths = ["attention.self.query", "output.dense"]
    x, a = stream.capture(0, 0, paths)
    real = int(batch["attention_mask"].sum())
    assert x.shape == (real, 48)
    assert a.shape == (real, 40)
    padding = dict(batch, input_ids=batch["input_ids"].clone())
    padding["input_ids"][1, -4:] = 50
    others = BlockStream(model, [padding]).capture(0, 0, paths)
    assert torch.allclose(x, others[0])
    assert torch.allclose(a, others[1], atol=1e-6)


def test_capture_can_carry_the_batch_on():
    model = tiny_model("llama")
    stream, other = BlockStream(model, [tiny_inputs(model)]), BlockStream(model, [tiny_inputs(model)])
    stream.capture(0, 0, ["mlp.down_proj"], advance=True)
    other.advance(0)
    assert torch.equal(stream.hidden[0], other.hidden[0])


def test_a_fork_goes_its_own_way():
    model = tiny_model("llama")
    stream = BlockStream(model, [tiny_inputs(model)])
    fork = stream.fork()
    before = stream.hidden[0].clone()
    fork.advance(0)
    assert torch.equal(stream.hidden[0], before)
    assert not torch.equal(fork.hidden[0], before)


@pytest.mark.parametrize("name", sorted(TINY))
def test_attention_probabilities_are_those_of_the_eager_model(name):
    model = tiny_model(name)
    batch = tiny_inputs(model)
    stream = BlockStream(model, [batch])
    stream.advance(0)
    from prunelm.sites import architecture_of

    path = architecture_of(model.config).sites[0].probabilities
    found = stream.attention_probabilities(1, 0, path, slice(1))
    with attention_implementation(model, "eager"), torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions[1]
    assert found.shape[0] == 1
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)


def test_the_blocks_are_whole_again_after_recording():
    model = tiny_model("gpt2")
    _, blocks = find_blocks(model)
    BlockStream(model, [tiny_inputs(model)])
    assert all("forward" not in vars(block) for block in blocks)

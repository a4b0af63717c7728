import pytest
import torch
from benchmarks.zero_shot import reader

from prunelm.testing import tiny_model


def _requests(vocabulary):
    """Three questions out of order: four answers, of one to five tokens, two of one token, and one alone."""
    drawn = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(vocabulary, (count,), generator=drawn).tolist()

    first, second, third = tokens(9), tokens(3), tokens(1)
    asked = [(first, 5), (second, 1), (first, 1), (third, 4), (second, 1), (first, 3), (first, 2)]
    return [(("", ""), context, tokens(count)) for context, count in asked]


def test_answers_behind_one_context_are_scored_as_lm_eval_scores_them(byte_tokenizer):
    models = pytest.importorskip("lm_eval.models.huggingface")
    model = tiny_model("llama", num_hidden_layers=2)
    requests = _requests(model.config.vocab_size)
    stock = models.HFLM(pretrained=model, tokenizer=byte_tokenizer, device="cpu", batch_size=2)
    likeliest = model(torch.tensor([requests[3][1]])).logits[0, -1].argmax().item()
    requests.append((("", ""), requests[3][1], [likeliest]))
    expected = stock._loglikelihood_tokens(requests, disable_tqdm=True)
    found = reader(model, byte_tokenizer)._loglikelihood_tokens(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1]


def test_a_context_that_the_model_cannot_read_is_refused(byte_tokenizer):
    pytest.importorskip("lm_eval")
    model = tiny_model("llama")
    too_long = [(("", ""), [1] * model.config.max_position_embeddings, [1, 2])]
    with pytest.raises(ValueError, match="more than the model reads"):
        reader(model, byte_tokenizer)._loglikelihood_tokens(too_long)

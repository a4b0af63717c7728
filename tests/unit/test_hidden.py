import pytest

from prunelm.testing import TINY, check_hidden, tiny_inputs, tiny_model

VARIANTS = [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"vocab_size": 48}),
    ("gpt2", {"n_inner": 56}),
    ("bert", {"model_class": "BertForMaskedLM"}),
    ("bert", {"model_class": "BertForSequenceClassification", "num_labels": 48}),
    ("gpt2", {"model_class": "GPT2ForSequenceClassification", "pad_token_id": 0}),
    ("llama", {"model_class": "LlamaForSequenceClassification"}),
]


@pytest.mark.parametrize("name", sorted(TINY))
def test_removing_hidden_channels_equals_silencing_them(name):
    check_hidden(lambda: tiny_model(name))


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_variants_of_families(name, overrides):
    build = lambda: tiny_model(name, **overrides)  # noqa: E731
    check_hidden(build, inputs=tiny_inputs(build(), padded=name == "bert"))

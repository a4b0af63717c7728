"""Measured numbers equal those of plain loops over the same windows, one at a time and without padding."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_byte_tokenizer, pseudo_english
from prunelm.errors import DataError, EvaluationError
from prunelm.evaluation import Evaluation, evaluate
from prunelm.tasks import task_of
from prunelm.testing import tiny_model

LENGTH = 32
SIZES = {"vocab_size": 300, "max_position_embeddings": 128}
DIFFERENT_LINES = ["good", "a rather longer line", "short one", "x" * 70, "the last line of all"]
LINES = DIFFERENT_LINES * 8


def build(name: str, **options: Any) -> PreTrainedModel:
    return tiny_model(name, **{**SIZES, **options})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "held-out.txt"
    path.write_text(pseudo_english(9 * LENGTH + 5, seed=3))
    return path


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "lines.txt"
    path.write_text("\n".join(LINES))
    return path


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "labeled.jsonl"
    rows = [{"sentence": line, "label": i % 2} for i, line in enumerate(LINES)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def windows_of(text: Path, tokenizer: PreTrainedTokenizerFast, prefix: list[int]) -> list[torch.Tensor]:
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    body = LENGTH - len(prefix)
    return [torch.tensor([prefix + ids[i : i + body]]) for i in range(0, len(ids) - body + 1, body)]


@torch.no_grad()
def plain_losses(model: PreTrainedModel, windows: list[torch.Tensor]) -> list[float]:
    """The loss that transformers itself gives for each window."""
    return [float(model(input_ids=window, labels=window).loss) for window in windows]


# Causal models.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_perplexity_is_that_of_a_plain_loop(name: str, text: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(name)
    losses = plain_losses(model, windows_of(text, byte_tokenizer, []))
    found = evaluate(model, byte_tokenizer, text, length=LENGTH)
    assert found.metric == "perplexity"
    assert len(losses) == 9
    assert found.value == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-5)
    assert found.error == pytest.approx(found.value * statistics.stdev(losses) / math.sqrt(len(losses)), rel=1e-4)


def test_windows_begin_as_the_tokenizer_begins_texts(text: Path) -> None:
    model, tokenizer = build("llama"), make_byte_tokenizer(adds_bos=True)
    windows = windows_of(text, tokenizer, [1])
    found = evaluate(model, tokenizer, text, length=LENGTH)
    assert found.facts["sequences"] == len(windows)
    assert found.value == pytest.approx(math.exp(statistics.mean(plain_losses(model, windows))), rel=1e-5)


def test_bits_per_byte(text: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    found = evaluate(build("llama"), byte_tokenizer, text, length=LENGTH)
    # One token is one byte here, so bits per byte are bits per token.
    assert found.bits_per_byte == pytest.approx(math.log2(found.value), rel=1e-6)


def test_bits_per_byte_counts_the_bytes_of_longer_tokens(text: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(text.read_text().split()))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False)
    found = evaluate(build("llama"), fast, text, length=8)
    ids = fast(text.read_text())["input_ids"]
    spans = [ids[i + 1 : i + 8] for i in range(0, len(ids) - 7, 8)]
    size = sum(len(" ".join(words[i - 1] for i in span)) for span in spans)
    nats = math.log(found.value) * 7 * len(spans)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_a_model_agrees_with_itself(text: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    found = evaluate(model, byte_tokenizer, text, against=model, length=LENGTH)
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.top1 == 1
    assert found.cosine is None


@torch.no_grad()
def test_agreement_is_that_of_a_plain_loop(text: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model, dense = build("llama"), build("llama", seed=1)
    kl, same, n = 0.0, 0, 0
    for window in windows_of(text, byte_tokenizer, []):
        for ours, theirs in zip(model(window).logits[0, :-1], dense(window).logits[0, :-1], strict=True):
            p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
            kl += float((p * (p.log() - q.log())).sum())
            same += int(ours.argmax() == theirs.argmax())
            n += 1
    found = evaluate(model, byte_tokenizer, text, against=dense, length=LENGTH)
    assert found.kl == pytest.approx(kl / n, rel=1e-4)
    assert found.kl > 0.01
    assert found.top1 == pytest.approx(same / n)
    assert found.top1 < 1
    alone = evaluate(model, byte_tokenizer, text, length=LENGTH)
    assert (alone.value, alone.bits_per_byte) == (found.value, found.bits_per_byte)
    assert alone.kl is alone.top1 is None


def test_facts_say_what_was_measured(text: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    found = evaluate(model, byte_tokenizer, text, length=LENGTH)
    assert found.facts["tokens"] == 9 * LENGTH
    assert found.facts["sequences"] == 9
    assert found.facts["predicted"] == 9 * (LENGTH - 1)
    assert found.facts["length"] == LENGTH
    assert found.facts["text"] == "held-out.txt"
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    fewer = evaluate(model, byte_tokenizer, text, length=LENGTH, max_tokens=3 * LENGTH + 1)
    assert fewer.facts["sequences"] == 3
    assert fewer.facts["sha256"] != found.facts["sha256"]


def test_progress_is_told_about_every_window(text: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(build("llama"), byte_tokenizer, text, length=LENGTH, progress=lambda *step: told.append(step))
    assert told == [("evaluating", i, 9) for i in range(10)]


def test_damaged_weights_name_the_window(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "marked.txt"
    path.write_text("a" * 5 * LENGTH + "~" + "a" * (3 * LENGTH - 1))
    model = build("llama", tie_word_embeddings=False)
    (marked,) = byte_tokenizer("~")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[marked] = torch.nan
    with pytest.raises(EvaluationError, match=r"marked\.txt: 1 of 8 windows gave a non-finite loss, first window 5"):
        evaluate(model, byte_tokenizer, path, length=LENGTH)


def test_text_that_is_too_short(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a" * (LENGTH - 1))
    with pytest.raises(DataError, match=r"short\.txt: it gives 31 tokens, but one window needs 32"):
        evaluate(build("llama"), byte_tokenizer, path, length=LENGTH)
    with pytest.raises(DataError, match="--length 129 is more than the 128 positions"):
        evaluate(build("llama"), byte_tokenizer, path, length=129)


def test_other_vocabularies_cannot_be_compared(text: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EvaluationError, match="vocabularies of 300 and 310 tokens"):
        evaluate(build("llama"), byte_tokenizer, text, against=build("llama", vocab_size=310), length=LENGTH)


@pytest.mark.parametrize(
    ("name", "model_class", "expected"),
    [
        ("llama", None, "causal"),
        ("gpt2", None, "causal"),
        ("bert", "BertLMHeadModel", "causal"),
        ("bert", "BertForMaskedLM", "masked"),
        ("bert", "BertForSequenceClassification", "classifier"),
        ("llama", "LlamaForSequenceClassification", "classifier"),
        ("bert", None, "embedding"),
        ("llama", "LlamaModel", "embedding"),
    ],
)
def test_task_of(name: str, model_class: str | None, expected: str) -> None:
    options = {"is_decoder": True} if model_class == "BertLMHeadModel" else {}
    assert task_of(build(name, model_class=model_class, **options)) == expected


# Classifiers.


@torch.no_grad()
def test_accuracy_is_that_of_a_plain_loop(labeled: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("bert", model_class="BertForSequenceClassification")
    choices = {
        line: int(model(input_ids=torch.tensor([byte_tokenizer(line)["input_ids"]])).logits.argmax())
        for line in DIFFERENT_LINES
    }
    rows = [json.loads(line) for line in labeled.read_text().splitlines()]
    right = sum(choices[row["sentence"]] == row["label"] for row in rows)
    found = evaluate(model, byte_tokenizer, labeled, against=model)
    share = right / len(LINES)
    assert 0 < share < 1
    assert found.metric == "accuracy"
    assert found.value == share
    assert found.error == pytest.approx(math.sqrt(share * (1 - share) / len(LINES)))
    assert found.top1 == 1
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.facts["predicted"] == len(LINES)


def test_classifiers_stop_after_max_tokens(labeled: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("bert", model_class="BertForSequenceClassification")
    found = evaluate(model, byte_tokenizer, labeled, max_tokens=50)
    assert found.facts["tokens"] < 200
    assert found.facts["predicted"] < len(LINES)


def test_a_labeled_file_without_lines(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        evaluate(build("bert", model_class="BertForSequenceClassification"), byte_tokenizer, tmp_path / "none.jsonl")


def test_damaged_classifier_names_the_text_and_the_block(
    labeled: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build("bert", model_class="BertForSequenceClassification")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[0] = torch.nan
    said = (
        r"labeled\.jsonl: \d+ of \d+ texts gave values that are not finite, first text 0, where block 1 gave the first"
    )
    with pytest.raises(EvaluationError, match=said):
        evaluate(model, byte_tokenizer, labeled)
    sound = build("bert", model_class="BertForSequenceClassification")
    with pytest.raises(EvaluationError, match=r"labeled\.jsonl, dense model: .* block 1"):
        evaluate(sound, byte_tokenizer, labeled, against=model)


# Encoders without a class.


@torch.no_grad()
def mean_cosine(models: tuple[PreTrainedModel, PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean cosine of mean-pooled embeddings, line by line, with no padding."""
    cosines = []
    for line in DIFFERENT_LINES:
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        ours, theirs = (model(input_ids=ids).last_hidden_state.mean(1) for model in models)
        cosines.append(float(cosine_similarity(ours, theirs)))
    return statistics.mean(cosines)


@pytest.mark.parametrize(("name", "model_class"), [("bert", None), ("llama", "LlamaModel")])
def test_padding_changes_no_embedding(
    name: str, model_class: str | None, lines: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, dense = (build(name, model_class=model_class, seed=seed) for seed in (0, 1))
    found = evaluate(model, byte_tokenizer, lines, against=dense)
    assert found.metric == "embedding"
    assert found.value is found.error is found.kl is None
    assert found.cosine == pytest.approx(mean_cosine((model, dense), byte_tokenizer), abs=1e-5)
    assert abs(found.cosine) < 0.99
    assert found.facts["sequences"] == len(LINES)
    itself = evaluate(model, byte_tokenizer, lines, against=model)
    assert itself.cosine == pytest.approx(1, abs=1e-6)


def test_long_lines_are_cut_at_the_length(lines: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("bert")
    found = evaluate(model, byte_tokenizer, lines, against=model, length=10)
    assert found.facts["tokens"] == sum(min(10, len(line)) for line in LINES)
    assert evaluate(model, byte_tokenizer, lines, against=model, length=1_000).facts["length"] == 128


def test_encoders_stop_after_max_tokens(lines: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("bert")
    found = evaluate(model, byte_tokenizer, lines, against=model, max_tokens=30)
    # 4 + 20 + 9 bytes: the third line is the first to reach 30.
    assert found.facts["sequences"] == 3


def test_an_encoder_needs_something_to_compare_with(lines: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EvaluationError, match=r"BertModel has no head.*--against"):
        evaluate(build("bert"), byte_tokenizer, lines)


def test_damaged_encoder(lines: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("bert")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match=r"lines\.txt: .* first text 0, where the embeddings gave"):
        evaluate(model, byte_tokenizer, lines, against=build("bert"))


# Masked models.


@pytest.fixture(scope="module")
def masked(lines: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[PreTrainedModel, Evaluation]]:
    def run(**options: Any) -> tuple[PreTrainedModel, Evaluation]:
        model = build("bert", model_class="BertForMaskedLM")
        return model, evaluate(model, byte_tokenizer, lines, **options)

    return run


def test_masked_perplexity_is_that_of_a_plain_loop(
    masked: Callable[..., Any], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, found = masked(seed=5)
    assert found.metric == "masked perplexity"
    generator = torch.Generator().manual_seed(5)
    losses: list[float] = []
    for line in LINES:
        ids = torch.tensor(byte_tokenizer(line)["input_ids"])
        mask = torch.rand(len(ids), generator=generator) < 0.15
        with torch.no_grad():
            logits = model(input_ids=ids.masked_fill(mask, byte_tokenizer.mask_token_id)[None]).logits[0]
        losses += cross_entropy(logits[mask], ids[mask], reduction="none").tolist()
    assert found.facts["predicted"] == len(losses)
    assert found.value == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-5)


def test_masked_perplexity_has_an_error(masked: Callable[..., Any], lines: Path, tmp_path: Path) -> None:
    _, found = masked()
    assert 0 < found.error < found.value


def test_error_of_few_texts_is_not_zero(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("\n".join(LINES[:20]))
    found = evaluate(build("bert", model_class="BertForMaskedLM"), byte_tokenizer, tmp_path / "few.txt")
    # `error` is documented as the standard error over texts, of which there are 20.
    assert found.error > 0


def test_masking_is_seeded(masked: Callable[..., Any]) -> None:
    assert masked(seed=1)[1] == masked(seed=1)[1]
    assert masked(seed=1)[1].value != masked(seed=2)[1].value


def test_share_of_masked_tokens(masked: Callable[..., Any]) -> None:
    _, found = masked()
    assert found.facts["predicted"] / found.facts["tokens"] == pytest.approx(0.15, abs=0.04)


def test_masked_model_agrees_with_itself(lines: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("bert", model_class="BertForMaskedLM")
    found = evaluate(model, byte_tokenizer, lines, against=model)
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.top1 == 1
    other = evaluate(model, byte_tokenizer, lines, against=build("bert", model_class="BertForMaskedLM", seed=1))
    assert other.kl > 0.01


def test_text_too_short_to_mask(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match=r"short\.txt: too short to mask a single token"):
        evaluate(build("bert", model_class="BertForMaskedLM"), byte_tokenizer, tmp_path / "short.txt", seed=0)


def test_tokenizer_without_a_mask(lines: Path) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.mask_token = None
    model = build("bert", model_class="BertForMaskedLM")
    assert evaluate(model, tokenizer, lines).value > 1
    tokenizer.unk_token = None
    with pytest.raises(EvaluationError, match="no mask token"):
        evaluate(model, tokenizer, lines)

"""Every part of the suite equals a plain loop, does not hang on batches, and goes on after an interrupt."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import pseudo_english
from prunelm.doubts import notes
from prunelm.errors import CalibrationError, DataError, EvaluationError, PruneLMError
from prunelm.loading import find_model, load_model, load_tokenizer
from prunelm.suite import Setting, open_subject, parts
from prunelm.suite.measuring import measure
from prunelm.suite.summary import summary

LENGTH = 32
QUICK = {"length": LENGTH, "max_tokens": 8 * LENGTH, "rounds": 2, "prompts": 3, "new_tokens": 6, "pseudo_tokens": 40}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "held-out.txt"
    path.write_text(pseudo_english(4_000, seed=11))
    return path


@pytest.fixture(scope="module")
def pair(tiny_folder: Callable[..., Path]) -> tuple[Path, Path]:
    """A model and another that plays its dense parent."""
    return tiny_folder("llama"), tiny_folder("llama", seed=1)


def run(pair: tuple[Path, Path], text: Path, *names: str, **options: Any) -> dict[str, Any]:
    fields = {**QUICK, **{k: options.pop(k) for k in list(options) if k in Setting.__dataclass_fields__}}
    return measure(pair[0], text, against=pair[1], parts=names, setting=Setting(**fields), **options)


def windows_of(text: Path, tokenizer: Any, length: int = LENGTH, count: int = 8) -> list[torch.Tensor]:
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: count * length]
    return [torch.tensor([ids[i : i + length]]) for i in range(0, len(ids), length)]


@torch.no_grad()
def plain(folder: Path, windows: list[torch.Tensor]) -> list[float]:
    model = load_model(find_model(folder))
    return [float(model(input_ids=w, labels=w).loss) for w in windows]


# Quality.


def test_quality_is_that_of_a_plain_loop(pair: tuple[Path, Path], text: Path, byte_tokenizer: Any) -> None:
    found = run(pair, text, "quality")["parts"]["quality"]["results"]
    losses, dense = (plain(folder, windows_of(text, byte_tokenizer)) for folder in pair)
    assert found["value"] == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-4)
    assert found["dense"]["value"] == pytest.approx(math.exp(statistics.mean(dense)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(statistics.mean(losses) / math.log(2), rel=1e-4)
    assert found["ratio"]["value"] == pytest.approx(found["value"] / found["dense"]["value"], rel=1e-6)
    differences = [a - b for a, b in zip(losses, dense, strict=True)]
    assert found["ratio"]["error"] == pytest.approx(statistics.stdev(differences) / math.sqrt(8), rel=1e-3)
    assert found["ratio"]["low"] < found["ratio"]["value"] < found["ratio"]["high"]
    assert found["windows"] == [pytest.approx(row, abs=1e-4) for row in zip(losses, dense, strict=True)]


@torch.no_grad()
def test_calibration_error_is_that_of_a_plain_loop(pair: tuple[Path, Path], text: Path, byte_tokenizer: Any) -> None:
    model = load_model(find_model(pair[0]))
    rows = []
    for window in windows_of(text, byte_tokenizer):
        for logits, target in zip(model(window).logits[0, :-1], window[0, 1:], strict=True):
            p = logits.softmax(-1)
            rows.append((float(p.max()), int(p.argmax() == target)))
    bins: dict[int, list[tuple[float, int]]] = {}
    for confidence, right in rows:
        bins.setdefault(min(14, int(confidence * 15)), []).append((confidence, right))
    gaps = [abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins.values()]
    found = run(pair, text, "quality")["parts"]["quality"]["results"]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / len(rows), abs=1e-5)
    assert found["calibration_error"] > 0.001


def test_numbers_do_not_hang_on_the_batch_size(pair: tuple[Path, Path], text: Path) -> None:
    one, three = (run(pair, text, "quality", batch_size=n)["parts"]["quality"]["results"] for n in (1, 3))
    assert three["value"] == pytest.approx(one["value"], rel=1e-5)
    assert three["kl"]["value"] == pytest.approx(one["kl"]["value"], rel=1e-4)


def test_half_precision_is_within_half_a_percent(pair: tuple[Path, Path], text: Path) -> None:
    single, half = (
        run(pair, text, "quality", dtype=dtype)["parts"]["quality"]["results"] for dtype in ("float32", "bfloat16")
    )
    assert half["value"] == pytest.approx(single["value"], rel=5e-3)
    assert half["value"] != single["value"]


def test_windows_that_are_not_finite_are_named_with_their_block(
    tiny_folder: Callable[..., Path], text: Path, tmp_path: Path, byte_tokenizer: Any
) -> None:
    model = load_model(find_model(tiny_folder("llama")))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "bad")
    byte_tokenizer.save_pretrained(tmp_path / "bad")
    pair = (tmp_path / "bad", tiny_folder("llama"))
    with pytest.raises(EvaluationError, match=r"8 of 8 windows .* first window 0, where block 1 gave the first value"):
        run(pair, text, "quality")
    with pytest.raises(EvaluationError, match=r"held-out\.txt, dense model: 8 of 8 windows"):
        run(pair[::-1], text, "quality")


# Positions, noise, generation.


def test_positions_add_up_to_the_whole(pair: tuple[Path, Path], text: Path, byte_tokenizer: Any) -> None:
    found = run(pair, text, "positions", max_tokens=4 * 128)["parts"]["positions"]["results"]
    assert found["facts"]["length"] == 128
    rows = found["model"]
    assert [(row["from"], row["until"]) for row in rows] == [(1, 8), (9, 16), (17, 32), (33, 64), (65, 127)]
    whole = sum(math.log(row["perplexity"]) * (row["until"] - row["from"] + 1) for row in rows) / 127
    losses = plain(pair[0], windows_of(text, byte_tokenizer, 128, 4))
    assert whole == pytest.approx(statistics.mean(losses), rel=1e-4)


def test_positions_take_the_windows_that_there_are(pair: tuple[Path, Path], text: Path) -> None:
    found = run(pair, text, "positions", max_tokens=3 * LENGTH)["parts"]["positions"]["results"]
    assert found["facts"]["length"] == 3 * LENGTH
    with pytest.raises(DataError, match=r"one window needs 32. Use a smaller --length, or more than --max-tokens 20"):
        run(pair, text, "positions", max_tokens=20)


def test_all_parts_leave_out_what_the_text_is_too_short_for(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, out = tmp_path / "short.txt", tmp_path / "evaluation.json"
    short.write_text("a, b. " * 6)  # without its punctuation, it does not fill a window
    known = {name: part for name, part in parts().items() if name in ("quality", "positions", "noise", "heads")}
    monkeypatch.setattr("prunelm.suite.parts", lambda: known)
    found = run(pair, short, "all", out=out, max_tokens=None)
    assert set(found["parts"]) == {"quality", "positions", "heads"}
    assert "one window needs 32" in found["left_out"]["noise"]
    assert not list(tmp_path.glob(".*"))
    assert json.loads(out.read_text())["left_out"] == found["left_out"]
    assert "left_out" not in run(pair, text, "quality", "noise", out=out)
    short.write_text("few")
    with pytest.raises(DataError, match="one window needs 32"):
        run(pair, short, "all")


def test_one_window_says_nothing_of_errors(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("1 2 3 4 5 6 " * 20)
    found = run(pair, text, "quality", "noise", "shift", "speed", max_tokens=LENGTH, others=(str(other),), rounds=1)
    quality = found["parts"]["quality"]["results"]
    assert quality["error"] is quality["dense"]["error"] is None
    for one in (quality["ratio"], quality["kl"], found["parts"]["speed"]["results"]["ratio"]["prefill"]):
        assert one["low"] is one["high"] is None
    for row in (*found["parts"]["noise"]["results"]["noisy"], *found["parts"]["shift"]["results"]["others"]):
        assert row["excess"]["low"] is row["added"]["model"]["high"] is None
    said = [cell for row in summary(found) for cell in row]
    assert not [cell for cell in said if "+-" in cell or "(" in cell or "None" in cell]


def test_noise_is_paired_and_compared_with_clean_text(pair: tuple[Path, Path], text: Path) -> None:
    found = run(pair, text, "noise", max_tokens=4 * LENGTH)["parts"]["noise"]["results"]
    assert len(found["noisy"]) == 12
    for row in found["noisy"]:
        assert row["excess"]["value"] == pytest.approx(row["ratio"]["value"] / found["clean"]["ratio"]["value"])
        assert row["excess"]["low"] < row["excess"]["high"]
        for name, own in (("model", row), ("dense", row["dense"])):
            before = found["clean"] if name == "model" else found["clean"]["dense"]
            added = row["added"][name]
            assert added["value"] == pytest.approx(own["bits_per_byte"] - before["bits_per_byte"], abs=1e-6)
            assert added["low"] <= added["value"] <= added["high"]
    assert len({row["bits_per_byte"] for row in found["noisy"]}) >= 8


def test_text_of_other_kinds(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "numbers.txt", tmp_path / "evaluation.json"
    other.write_text(" ".join(str(k * k) for k in range(400)))
    options: dict[str, Any] = {"max_tokens": 4 * LENGTH, "others": (str(other), str(text)), "out": out}
    part = run(pair, text, "shift", **options)["parts"]["shift"]
    rows = part["results"]["others"]
    assert [row["text"] for row in rows] == ["numbers.txt", "held-out.txt"]
    assert rows[1]["excess"]["value"] == pytest.approx(1)
    alone = run(pair, other, "quality", max_tokens=4 * LENGTH)["parts"]["quality"]["results"]
    assert rows[0]["value"] == pytest.approx(alone["value"])
    home = part["results"]["home"]
    assert rows[0]["excess"]["value"] == pytest.approx(alone["ratio"]["value"] / home["ratio"]["value"])
    assert str(tmp_path) not in out.read_text()
    stages: list[str] = []
    run(pair, text, "shift", **options, progress=lambda stage, *_: stages.append(stage))
    assert stages == []
    other.write_text(" ".join(str(k + k) for k in range(400)))
    assert run(pair, text, "shift", **options)["parts"]["shift"]["results"]["others"][0]["value"] != rows[0]["value"]
    assert len(summary({"parts": {"shift": part}})) == 2
    part["results"]["others"][0]["overlap"] = {"share": 0.5, "checked": 10, "shared": 5, "flagged": True}
    assert notes({"parts": {"shift": part}})[0].startswith("numbers.txt: about 50% of its 8-word passages")


def test_texts_and_tasks_are_added_to_those_before(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, texts = tmp_path / "evaluation.json", [tmp_path / f"{name}.txt" for name in "abc"]
    for k, one in enumerate(texts):
        one.write_text(" ".join(str(n * (n + k)) for n in range(200)))
    options: dict[str, Any] = {"max_tokens": 4 * LENGTH, "out": out}
    first = run(pair, text, "shift", others=(str(texts[0]), str(texts[1])), **options)["parts"]["shift"]
    stages: set[str] = set()
    tell: dict[str, Any] = {"progress": lambda stage, *_: stages.add(stage)}
    both = run(pair, text, "shift", others=(str(texts[2]), str(texts[0])), **options, **tell)["parts"]["shift"]
    assert stages == {"held-out.txt", "c.txt"}
    assert [row["text"] for row in both["results"]["others"]] == ["a.txt", "b.txt", "c.txt"]
    assert [one["name"] for one in both["others"]] == ["a.txt", "b.txt", "c.txt"]
    assert both["results"]["others"][:2] == first["results"]["others"]
    # Another text of a name takes the older one's place; other settings begin anew.
    texts[0].write_text(texts[1].read_text())
    again = run(pair, text, "shift", others=(str(texts[0]),), **options)["parts"]["shift"]
    assert [row["text"] for row in again["results"]["others"]] == ["b.txt", "c.txt", "a.txt"]
    assert again["results"]["others"][2]["value"] == first["results"]["others"][1]["value"]
    anew = run(pair, text, "shift", others=(str(texts[0]),), **{**options, "max_tokens": 2 * LENGTH})["parts"]["shift"]
    assert [row["text"] for row in anew["results"]["others"]] == ["a.txt"]
    # Tasks by their names.
    seen: list[str] = []
    made = lambda *args: seen.append(args[2]) or {args[2]: {"acc": {"value": 0.5, "error": 0.1}}}  # noqa: E731
    monkeypatch.setattr("prunelm.suite.tasks._measured", made)
    monkeypatch.setattr("prunelm.suite.tasks._manager", lambda _setting: None)
    monkeypatch.setattr("prunelm.suite.tasks._version", lambda: "0")
    run(pair, text, "tasks", tasks=("one",), out=out)
    found = run(pair, text, "tasks", tasks=("two", "one"), out=out)["parts"]["tasks"]
    assert seen == ["one", "one", "two", "two"]
    assert list(found["results"]["tasks"]) == found["settings"]["tasks"] == ["one", "two"]


@torch.no_grad()
def test_generation_says_where_texts_part(pair: tuple[Path, Path], text: Path, byte_tokenizer: Any) -> None:
    found = run(pair, text, "generation")["parts"]["generation"]["results"]
    assert len(found["samples"]) == 3
    models = [load_model(find_model(folder)) for folder in pair]
    for sample in found["samples"]:
        assert sample["prompt"] in text.read_text()
        ids = torch.tensor([byte_tokenizer(sample["prompt"])["input_ids"]])
        made = []
        for model in models:
            row = ids
            for _ in range(6):
                row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
            made.append(row[0, ids.shape[1] :].tolist())
        differ = [k + 1 for k in range(6) if made[0][k] != made[1][k]]
        assert sample["first_difference"] == (differ[0] if differ else None)
        assert sample["same"] == pytest.approx(1 - len(differ) / 6)
        assert sample["model"] == byte_tokenizer.decode(made[0], skip_special_tokens=True)
    itself = run((pair[0], pair[0]), text, "generation")["parts"]["generation"]["results"]
    assert itself["identical"] == 3
    assert itself["median_first_difference"] == 7


def test_heads_are_compared_in_the_dense_model(pair: tuple[Path, Path], text: Path, byte_tokenizer: Any) -> None:
    from prunelm.similarity import jensen_shannon

    found = run(pair, text, "heads")["parts"]["heads"]["results"]["similarity"]
    model = load_model(find_model(pair[1]))
    model.set_attn_implementation("eager")
    total: dict[int, torch.Tensor] = {}
    for window in windows_of(text, byte_tokenizer):
        with torch.no_grad():
            maps = model(window, output_attentions=True).attentions
        for block, one in enumerate(maps):
            seen = one[0, :, 8:, 1:]
            total[block] = total.get(block, 0) + jensen_shannon(seen / seen.sum(-1, keepdim=True)) / 8
    for block, expected in total.items():
        rows, columns = torch.triu_indices(len(expected), len(expected), 1)
        assert found[f"{block}.attention"] == pytest.approx(expected[rows, columns].tolist(), rel=1e-3)
    assert len(found) == len(total)
    with pytest.raises(EvaluationError, match=r"'heads' looks at the dense model: give --against"):
        measure(pair[0], text, parts=("heads",))


# Speed and memory.


def test_speed_measures_both_models(pair: tuple[Path, Path], text: Path) -> None:
    found = run(pair, text, "speed")["parts"]["speed"]["results"]
    for name in ("model", "dense"):
        assert all(found[name][key] > 0 for key in ("prefill", "decode", "first_token", "file_bytes"))
    config = load_model(find_model(pair[0])).config
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert found["model"]["cache_bytes_per_token"] == per_token
    assert found["ratio"]["decode"]["low"] <= found["ratio"]["decode"]["value"] <= found["ratio"]["decode"]["high"]


def test_widths_are_compared_with_the_next_rounder_ones(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    import prunelm

    prunelm.prune(pair[1], tmp_path / "P", recipe="l2", sparsity=0.3, multiple_of=1)
    narrow, dense = (load_model(find_model(p)).config.intermediate_size for p in (tmp_path / "P", pair[1]))
    found = run((tmp_path / "P", pair[1]), text, "widths")["parts"]["widths"]["results"]
    (row,) = found["widths"]
    assert (row["site"], row["width"], row["dense"]) == ("ffn", narrow, dense)
    assert row["blocks"] == len(prunelm.load(tmp_path / "P").model.layers)
    expected = {-(-narrow // m) * m for m in (8, 16, 32, 64, 128)}
    assert [w["width"] for w in row["wider"]] == sorted(w for w in expected if narrow < w <= dense)
    assert min(row["reading"], row["writing"]) > 0
    for wider in row["wider"]:
        assert 0 < wider["reading"]["low"] <= wider["reading"]["value"] <= wider["reading"]["high"]
    assert len(summary({"parts": {"widths": {"results": found}}})) == 1
    assert run(pair, text, "widths")["parts"]["widths"]["results"]["widths"] == []


def test_memory_is_measured_in_a_fresh_process(pair: tuple[Path, Path], text: Path) -> None:
    found = measure(pair[0], text, parts=("memory",))["parts"]["memory"]["results"]["model"]
    assert 0 < found["before"] <= found["loaded"] <= found["used"]


# Encoders.


def test_pseudo_perplexity_is_that_of_a_plain_loop(tmp_path: Path, byte_tokenizer: Any) -> None:
    from prunelm.testing import tiny_model

    model = tiny_model("bert", model_class="BertForMaskedLM", vocab_size=300, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "bert")
    byte_tokenizer.save_pretrained(tmp_path / "bert")
    short = tmp_path / "short.txt"
    short.write_text("a first line\nand another line")
    found = measure(tmp_path / "bert", short, against=tmp_path / "bert", parts=("quality", "pseudo-perplexity"))
    losses = []
    for line in short.read_text().splitlines():
        ids = torch.tensor([byte_tokenizer(line)["input_ids"]])
        for k in range(ids.shape[1]):
            hidden = ids.clone()
            hidden[0, k] = byte_tokenizer.mask_token_id
            with torch.no_grad():
                losses.append(-float(model(hidden).logits[0, k].log_softmax(-1)[ids[0, k]]))
    results = found["parts"]["pseudo-perplexity"]["results"]
    assert results["tokens"] == len(losses)
    assert results["model"]["value"] == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-4)
    assert results["ratio"]["value"] == pytest.approx(1)
    quality = found["parts"]["quality"]["results"]
    assert quality["metric"] == "masked perplexity"
    assert quality["dense"]["value"] == quality["value"]
    assert quality["ratio"]["value"] == pytest.approx(1)
    assert quality["cosine"]["value"] == pytest.approx(1)
    rows = {row[0] for row in summary(found)}
    assert {"masked perplexity", "pseudo-perplexity", "KL to dense"} <= rows
    with pytest.raises(EvaluationError, match="'noise' does not fit this model, which is masked"):
        measure(tmp_path / "bert", short, parts=("noise",))


def test_embeddings_are_compared_with_dense(tiny_folder: Callable[..., Path], text: Path) -> None:
    pair = (tiny_folder("bert"), tiny_folder("bert", seed=1))
    found = run(pair, text, "quality", max_tokens=1024)["parts"]["quality"]["results"]
    assert found["metric"] == "embedding"
    assert abs(found["cosine"]["value"]) < 0.999
    assert found["cosine"]["low"] <= found["cosine"]["value"] <= found["cosine"]["high"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> tuple[Path, Path, Path]:
    """Two classifiers, and labeled texts of very different lengths."""
    from prunelm.testing import tiny_model

    folder, options = tmp_path_factory.mktemp("classifiers"), {"vocab_size": 300, "max_position_embeddings": 128}
    for seed in (0, 1):
        model = tiny_model("bert", model_class="BertForSequenceClassification", seed=seed, **options)
        model.save_pretrained(folder / str(seed))
        byte_tokenizer.save_pretrained(folder / str(seed))
    words = pseudo_english(9_000, seed=3).split()
    rows = [{"text": " ".join(words[k : k + 1 + k % 17]), "label": k % 2} for k in range(70)]
    (folder / "labeled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "0", folder / "1", folder / "labeled.jsonl"


def test_classifiers_are_paired_text_by_text(classifiers: tuple[Path, Path, Path], byte_tokenizer: Any) -> None:
    model, dense, labeled = classifiers
    found = measure(model, labeled, against=dense)["parts"]["quality"]["results"]
    rights = []
    for folder in (model, dense):
        loaded, right = load_model(find_model(folder)), []
        for row in map(json.loads, labeled.read_text().splitlines()):
            ids = torch.tensor([byte_tokenizer(row["text"])["input_ids"][:128]])
            with torch.no_grad():
                right.append(int(loaded(ids).logits.argmax()) == row["label"])
        rights.append(right)
    mine, theirs = rights
    changes = [a - b for a, b in zip(mine, theirs, strict=True)]
    assert found["value"] == statistics.mean(mine)
    assert found["dense"]["value"] == statistics.mean(theirs)
    difference = found["difference"]
    assert difference["value"] == pytest.approx(statistics.mean(changes))
    assert (difference["lost"], difference["gained"]) == (changes.count(-1), changes.count(1))
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert 0 < found["calibration_error"] < 1
    assert -1 <= found["cosine"]["low"] <= found["cosine"]["high"] <= 1
    assert any("points (" in row[3] and "lost" in row[3] for row in summary({"parts": {"quality": {"results": found}}}))


def test_noise_on_the_sentences_of_classifiers(
    classifiers: tuple[Path, Path, Path], tmp_path: Path, byte_tokenizer: Any
) -> None:
    from prunelm.noising import typos

    model, dense, labeled = classifiers
    found = measure(model, labeled, against=dense, parts=("noise", "quality"))["parts"]
    rows, clean = found["noise"]["results"]["noisy"], found["noise"]["results"]["clean"]
    quality = {name: value for name, value in found["quality"]["results"].items() if name != "facts"}
    assert clean == quality
    assert len(rows) == 12
    noisy = tmp_path / "noisy.jsonl"
    lines = [json.loads(line) for line in labeled.read_text().splitlines()]
    noisy.write_text("\n".join(json.dumps({**r, "text": typos(r["text"], 0.1, k)}) for k, r in enumerate(lines)))
    by_hand = measure(model, noisy, against=dense)["parts"]["quality"]["results"]
    (row,) = (row for row in rows if (row["noise"], row["strength"]) == ("typos", 0.1))
    assert {name: row[name] for name in ("value", "dense", "difference", "kl")} == {
        name: by_hand[name] for name in ("value", "dense", "difference", "kl")
    }
    said = {cells[0]: cells[3] for cells in summary({"parts": {"noise": found["noise"]}})}
    assert "points" in said["accuracy with typos 0.1"]


@pytest.mark.parametrize("kind", ["classifier", "masked"])
def test_padding_beside_a_text_changes_nothing(
    kind: str,
    classifiers: tuple[Path, Path, Path],
    tmp_path: Path,
    byte_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prunelm import encoders
    from prunelm.testing import tiny_model

    model, _, labeled = classifiers
    if kind == "masked":
        model = tmp_path / "masked"
        options = {"vocab_size": 300, "max_position_embeddings": 128}
        tiny_model("bert", model_class="BertForMaskedLM", **options).save_pretrained(model)
        byte_tokenizer.save_pretrained(model)
    together = measure(model, labeled)["parts"]["quality"]["results"]
    monkeypatch.setattr(encoders, "AT_ONCE", 1)
    alone = measure(model, labeled)["parts"]["quality"]["results"]
    assert alone["value"] == pytest.approx(together["value"], rel=1e-5)
    assert alone["predicted"] == together["predicted"]
    assert alone["facts"] == together["facts"]


# Tasks.


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"query": f"the {a}", "choices": [" river", " of", " mountain engine"], "gold": k % 3}
        for k, a in enumerate(("slow", "quick", "ancient", "heavy", "bright", "quiet"))
    ]
    (folder / "tiny.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "tiny.yaml").write_text(
        "task: tiny_choices\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {{validation: {folder / 'tiny.jsonl'}}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\ntarget_delimiter: ""\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1.0}\n"
    )
    return folder


@pytest.mark.filterwarnings("ignore")
def test_tasks_are_those_of_lm_eval(
    pair: tuple[Path, Path], text: Path, task_folder: Path, byte_tokenizer: Any
) -> None:
    pytest.importorskip("lm_eval")
    found = run(pair, text, "tasks", tasks=("tiny_choices",), include_path=str(task_folder))
    both = found["parts"]["tasks"]["results"]["tasks"]["tiny_choices"]
    rows = [json.loads(line) for line in (task_folder / "tiny.jsonl").read_text().splitlines()]
    for who, folder in (("model", pair[0]), ("dense", pair[1])):
        model = load_model(find_model(folder))
        right = normed = 0
        for row in rows:
            scores = [score_of(model, byte_tokenizer, row["query"], choice) for choice in row["choices"]]
            lengths = [len(choice) for choice in row["choices"]]
            right += scores.index(max(scores)) == row["gold"]
            per_letter = [s / n for s, n in zip(scores, lengths, strict=True)]
            normed += per_letter.index(max(per_letter)) == row["gold"]
        assert both[who]["acc"]["value"] == pytest.approx(right / len(rows))
        assert both[who]["acc_norm"]["value"] == pytest.approx(normed / len(rows))
        assert both[who]["rows"] == len(rows)
    assert any(row[0] == "tiny_choices acc_norm" for row in summary(found))
    with pytest.raises(EvaluationError, match=r"knows no task 'tinychoice' \(looked in"):
        run(pair, text, "tasks", tasks=("tinychoice",), include_path=str(task_folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_numbers_are_lm_evals_own(pair: tuple[Path, Path], text: Path, task_folder: Path, byte_tokenizer: Any) -> None:
    """Log-likelihoods of the windows, and a task run by lm-eval alone on the same folders."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    parts = {"tasks": ("tiny_choices",), "include_path": str(task_folder)}
    found = run(pair, text, "quality", "tasks", **parts)["parts"]
    windows = [window[0].tolist() for window in windows_of(text, byte_tokenizer)]
    for k, (who, folder) in enumerate((("model", pair[0]), ("dense", pair[1]))):
        alone = HFLM(pretrained=str(folder), dtype="float32", batch_size=2, device="cpu")
        asked = [(("", ""), window[:1], window[1:]) for window in windows]
        theirs = [-logs / (LENGTH - 1) for logs, _ in alone._loglikelihood_tokens(asked, disable_tqdm=True)]
        assert [row[k] for row in found["quality"]["results"]["windows"]] == pytest.approx(theirs, rel=1e-4)
        manager = TaskManager(include_path=str(task_folder))
        results = lm_eval.simple_evaluate(model=alone, tasks=["tiny_choices"], task_manager=manager)["results"]
        ours = found["tasks"]["results"]["tasks"]["tiny_choices"][who]
        for metric in ("acc", "acc_norm"):
            assert ours[metric]["value"] == results["tiny_choices"][f"{metric},none"]
            assert ours[metric]["error"] == pytest.approx(results["tiny_choices"][f"{metric}_stderr,none"])


@torch.no_grad()
def score_of(model: Any, tokenizer: Any, query: str, choice: str) -> float:
    start, ids = len(tokenizer(query)["input_ids"]), torch.tensor([tokenizer(query + choice)["input_ids"]])
    logs = model(ids).logits[0].log_softmax(-1)
    return sum(float(logs[k - 1, ids[0, k]]) for k in range(start, ids.shape[1]))


def test_tasks_without_lm_eval(pair: tuple[Path, Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EvaluationError, match=r"lm-eval, which is not installed: pip install 'prunelm\[eval\]'"):
        run(pair, text, "tasks", tasks=("any",))


# Interrupts, files, faults.


class Stopped(Exception):
    pass


STEPS = {
    "quality": "quality._entry",
    "positions": "quality._entry",
    "noise": "quality._entry",
    "shift": "quality._entry",
    "generation": "generation._sample",
    "heads": "heads._compared",
    "pseudo-perplexity": "pseudo._text",
}
"""What every part does that its journal keeps."""


def stops_after(entries: int) -> Callable[[str, int, int], None]:
    calls: list[int] = []

    def tell(_stage: str, _done: int, _total: int) -> None:
        calls.append(1)
        if len(calls) > entries:
            raise Stopped

    return tell


@pytest.mark.parametrize("name", STEPS)
def test_an_interrupted_part_goes_on_with_the_same_numbers(
    name: str,
    pair: tuple[Path, Path],
    text: Path,
    tiny_folder: Callable[..., Path],
    byte_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prunelm.testing import tiny_model

    options: dict[str, Any] = {"others": (str(text),)} if name == "shift" else {}
    if name == "positions":
        options["max_tokens"] = 4 * 128
    if name == "heads":
        pair = (pair[0], tiny_folder("llama", num_hidden_layers=4))
    if name == "pseudo-perplexity":
        options["pseudo_tokens"] = 700
        tiny_model("bert", model_class="BertForMaskedLM", vocab_size=300).save_pretrained(tmp_path / "bert")
        byte_tokenizer.save_pretrained(tmp_path / "bert")
        pair = (tmp_path / "bert", tmp_path / "bert")
    out, seen, place = tmp_path / "evaluation.json", list[int](), f"prunelm.suite.{STEPS[name]}"
    module, _, function = place.rpartition(".")
    real = getattr(__import__(module, fromlist=["x"]), function)
    monkeypatch.setattr(place, lambda *args: seen.append(1) or real(*args))
    whole, total = run(pair, text, name, **options)["parts"][name]["results"], len(seen)
    assert total > 2
    with pytest.raises(Stopped):
        run(pair, text, name, out=out, progress=stops_after(2), **options)
    journal = tmp_path / f".evaluation.json.{name}.journal"
    assert len(journal.read_text().splitlines()) == 3  # what the journal is of, and two entries
    seen.clear()
    found = run(pair, text, name, out=out, **options)["parts"][name]["results"]
    assert found == whole
    assert len(seen) == total - 2
    assert not list(tmp_path.glob(".*"))
    assert json.loads(out.read_text())["parts"][name]["results"] == whole


def test_parts_are_added_and_not_measured_twice(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    first = run(pair, text, "quality", out=out)
    stages: list[str] = []
    both = run(pair, text, "quality", "generation", out=out, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"generating"}
    assert both["parts"]["quality"] == first["parts"]["quality"]
    again = run(pair, text, "quality", out=out, max_tokens=4 * LENGTH)
    assert again["parts"]["quality"]["results"]["predicted"] == 4 * (LENGTH - 1)
    assert "generation" in json.loads(out.read_text())["parts"]


def test_a_file_of_other_models_is_refused(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    run(pair, text, "quality", out=out)
    with pytest.raises(EvaluationError, match=r"of other models: the model was llama, and is now llama-seed"):
        run(pair[::-1], text, "quality", out=out)


def test_a_journal_that_a_kill_left_beside_its_numbers_goes(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunelm.suite import measuring

    out, journal = tmp_path / "evaluation.json", tmp_path / ".evaluation.json.quality.journal"
    write = measuring.write_results

    def killed(*args: Any) -> None:
        write(*args)
        raise Stopped

    monkeypatch.setattr(measuring, "write_results", killed)
    with pytest.raises(Stopped):
        run(pair, text, "quality", out=out)
    monkeypatch.undo()
    written = out.read_bytes()
    assert journal.is_file()
    with pytest.raises(Stopped):
        run(pair, text, "generation", out=out, progress=stops_after(2))
    run(pair, text, "quality", out=out)
    assert out.read_bytes() == written
    assert [path.name for path in tmp_path.glob(".*")] == [".evaluation.json.generation.journal"]
    with pytest.raises(Stopped):
        run(pair, text, "quality", out=out, max_tokens=3 * LENGTH, progress=stops_after(2))
    run(pair, text, "quality", out=out)
    assert journal.is_file()  # It is of other settings than those that are finished.
    with pytest.raises(EvaluationError, match=r"the dense model \(--against\) was llama-seed=1, and is now none"):
        measure(pair[0], text, out=out)
    out.write_text('{"format": 2}')
    with pytest.raises(EvaluationError, match="no evaluation of format 1"):
        run(pair, text, "quality", out=out)
    for wrong, says in ((tmp_path, "is a folder"), (tmp_path / "no" / "file.json", "does not exist")):
        with pytest.raises(PruneLMError, match=says):
            run(pair, text, "quality", out=wrong)


def test_tokenizers_that_differ_are_refused(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(EvaluationError, match="their tokenizers make 83 and 83 tokens, not the same"):
        run((pair[0], other), text, "quality")


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (("qualty",), EvaluationError, "no part is called 'qualty'. Did you mean 'quality'"),
        (("all", "speed"), EvaluationError, "'all' stands alone"),
        (("tasks",), EvaluationError, "needs the names of tasks"),
        (("shift",), EvaluationError, "needs texts of other kinds: give --others FILE,FILE"),
        (("pseudo-perplexity",), EvaluationError, "does not fit this model, which is causal"),
    ],
)
def test_parts_that_cannot_be(
    names: tuple[str, ...], error: type[PruneLMError], says: str, pair: tuple[Path, Path], text: Path
) -> None:
    with pytest.raises(error, match=says):
        run(pair, text, *names)


def test_a_text_shorter_than_a_window_or_a_prompt(pair: tuple[Path, Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("few words")
    for name, says in (("quality", "one window needs 32"), ("generation", "one prompt needs 32")):
        with pytest.raises(DataError, match=says):
            run(pair, short, name)


def test_all_parts_fit_and_are_shown(pair: tuple[Path, Path], text: Path) -> None:
    assert set(parts()) == {
        *("quality", "positions", "pseudo-perplexity", "generation", "noise", "shift", "heads", "tasks"),
        *("speed", "widths", "memory"),
    }
    found = run(pair, text, "quality", "positions", "generation", "noise", "speed", max_tokens=4 * 128)
    rows = summary(found)
    assert all(len(row) == 4 and all(isinstance(cell, str) for cell in row) for row in rows)
    assert notes(found) == []
    alone = measure(pair[0], text, parts=("quality", "noise"), setting=Setting(**QUICK))
    assert all(row[1] == "" for row in summary(alone))
    assert load_tokenizer(find_model(pair[0])) is not None
    assert issubclass(CalibrationError, PruneLMError)


def test_all_that_is_scored_by_position_is_looked_for_in_the_calibration(pair: tuple[Path, Path], text: Path) -> None:
    setting = Setting(length=LENGTH, max_tokens=7 * LENGTH)
    subject = open_subject(find_model(pair[0]), None, text, setting)
    read = {name: "".join(parts()[name].reads(subject, setting)) for name in ("quality", "positions")}
    assert len(read["quality"]) == 7 * LENGTH
    assert len(read["positions"]) == 4 * LENGTH


def test_memory_is_measured_with_what_was_allowed(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    load_model(find_model(pair[0])).save_pretrained(folder)
    load_tokenizer(find_model(pair[0])).save_pretrained(folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    found = measure(folder, text, parts=("memory",), setting=Setting(**QUICK), allow_pickle=True)
    assert found["parts"]["memory"]["results"]["model"]["used"] > 0

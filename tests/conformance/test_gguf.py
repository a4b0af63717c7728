"""GGUF files: read back by gguf-py, and run by llama.cpp where llama-cpp-python is installed (slow)."""

import ctypes
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import prunelm
from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.errors import CheckpointError, UnsupportedModelError
from prunelm.gguf_export import largest_error
from prunelm.loading import find_model
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import architecture_of, find_sites, narrow_
from prunelm.sizing import overhead_bytes
from prunelm.storage import MIXES, WRITTEN, stored_after, stored_bytes
from prunelm.stored_weights import StoredWeights
from prunelm.testing import tiny_model

NO_TEXT = Batches(batches=[], facts={"tokens": 0, "sequences": 0, "source": "none"})
WORDS = ["a river and a mountain, 1234 letters", "the captain's window at night", "it's 10 engines in the garden"]
SIZE = 300
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": ("llama", {}, "llama", "deci"),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "granite", "deci"),
    "llama, untied, scaled": (
        "llama",
        {"tie_word_embeddings": False, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}},
        "llama",
        "deci",
    ),
    "mistral": ("mistral", {"sliding_window": None}, "llama", "deci"),
    "qwen2": ("qwen2", {}, "llama", "deci"),
    "qwen3": ("qwen3", {}, "qwen3", "openelm"),
    "granite": ("granite", {"attention_bias": True, "mlp_bias": True}, "granite", None),
}
SHAPES = [(case, uneven) for case, (*_, per_block) in CASES.items() for uneven in (False, True)[: 1 + bool(per_block)]]
PLACES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}


def tokenizer(size=SIZE):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 10,
        special_tokens=["<unk>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function (case, uneven) -> folder and model in memory, made once."""
    root, made = tmp_path_factory.mktemp("gguf"), {}

    def write(case, uneven):
        key = f"{case}, {'uneven' if uneven else 'uniform'}"
        if key not in made:
            family, options, _, _ = CASES.get(case, (case, {}, None, None))
            model = tiny_model(
                family, num_hidden_layers=3, vocab_size=SIZE, max_position_embeddings=128, intermediate_size=96,
                hidden_size=64, num_attention_heads=8, num_key_value_heads=4, **options,
            )  # fmt: skip
            recipe = Recipe.load("l2", sparsity=0.25, multiple_of=32, attention_share=1.0)
            if uneven:
                recipe = Recipe.load("random", sparsity=0.2, multiple_of=1, allocator="per-module", per_block=True)
            report = prune_(model, NO_TEXT, recipe)
            if uneven:
                _unevenly_(model)
            save(model, report, root / key, prove=False)
            tokenizer().save_pretrained(root / key)
            made[key] = root / key, model
        return made[key]

    return write


def _unevenly_(model):
    for name in ("attention", "ffn"):
        site = next(s for s in find_sites(model) if s.key == f"2.{name}")
        narrow_(site, torch.arange(1, site.n_units))


def _neighbors(weight, head_dim):
    """Rows of each head with the halves of a rotary pair side by side, written out."""
    rows = [weight[h * head_dim + i + half * head_dim // 2] for h in range(len(weight) // head_dim)
            for i in range(head_dim // 2) for half in (0, 1)]  # fmt: skip
    return torch.stack(rows)


@pytest.mark.parametrize(("case", "uneven"), SHAPES)
def test_the_file_holds_the_model(written, tmp_path, case, uneven):
    folder, model = written(case, uneven)
    found = prunelm.export(folder, tmp_path / "out.gguf", type="f32")
    reader = GGUFReader(tmp_path / "out.gguf")
    name = CASES[case][3 if uneven else 2]
    assert found.architecture == reader.fields["general.architecture"].contents() == name
    blocks = model.model.layers
    for key, widths in {
        "feed_forward_length": [b.mlp.down_proj.in_features for b in blocks],
        "attention.head_count": [b.self_attn.q_proj.out_features // 8 for b in blocks],
        "attention.head_count_kv": [b.self_attn.k_proj.out_features // 8 for b in blocks],
    }.items():
        assert reader.fields[f"{name}.{key}"].contents() == (widths if uneven else widths[0])
        assert (len(set(widths)) > 1) == uneven
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    for i, block in enumerate(blocks):
        q, k, v = (getattr(block.self_attn, f"{part}_proj").weight for part in "qkv")
        if name == "openelm":
            assert torch.equal(tensors[f"blk.{i}.attn_qkv.weight"], torch.cat([q, k, v]))
        else:
            paired = name != "qwen3"
            assert torch.equal(tensors[f"blk.{i}.attn_q.weight"], _neighbors(q, 8) if paired else q)
            assert torch.equal(tensors[f"blk.{i}.attn_k.weight"], _neighbors(k, 8) if paired else k)
            assert torch.equal(tensors[f"blk.{i}.attn_v.weight"], v)
        assert torch.equal(tensors[f"blk.{i}.ffn_down.weight"], block.mlp.down_proj.weight)
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)
    assert ("output.weight" in tensors) == ("untied" in case)
    assert ("rope_freqs.weight" in tensors) == ("scaled" in case)
    assert sum(t.numel() for n, t in tensors.items() if n != "rope_freqs.weight") == model.num_parameters()


def test_weights_are_read_one_at_a_time_and_the_model_is_not_loaded(written, tmp_path, monkeypatch):
    folder, model = written("mistral", True)
    monkeypatch.setattr("prunelm.gguf_export.load_model", lambda *_args, **_known: pytest.fail("loaded"))
    read, most = StoredWeights.read, []
    monkeypatch.setattr(StoredWeights, "read", lambda self, *of: (most.append(found := read(self, *of)), found)[1])
    prunelm.export(folder, tmp_path / "out.gguf", type="q8_0")
    assert len(most) == 2 * len(list(model.parameters()))  # written, and read back


def test_weights_under_other_names_than_the_models_own_are_loaded_as_transformers_does(written, tmp_path):
    folder, _ = written("llama", False)
    shutil.copytree(folder, tmp_path / "other")
    weights = {f"transformer.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weights are missing"):
        prunelm.export(tmp_path / "other", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_the_factors_of_granite_are_in_the_file(written, tmp_path):
    folder, model = written("granite", False)
    prunelm.export(folder, tmp_path / "out.gguf", type="f32")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    for key, name in architecture_of(model.config).gguf[0].scales.items():
        assert fields[f"granite.{key}"].contents() == pytest.approx(getattr(model.config, name))
        assert getattr(model.config, name) != 1


def test_frequency_factors_are_those_of_the_formula(written, tmp_path):
    folder, _ = written("llama, untied, scaled", False)
    prunelm.export(folder, tmp_path / "out.gguf", type="f32")
    (found,) = [t.data for t in GGUFReader(tmp_path / "out.gguf").tensors if t.name == "rope_freqs.weight"]
    expected = []
    for i in range(4):
        length = 2 * np.pi * 1e4 ** (i / 4)
        smooth = (16 / length - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        expected.append(1.0 if length < 16 / 4 else 8.0 if length > 16 else between)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", list(WRITTEN))
def test_types_keep_their_precision(written, tmp_path, kind):
    folder, model = written("llama", False)
    found = prunelm.export(folder, tmp_path / "out.gguf", type=kind)
    odd = ["3 matrices are f16, because their rows (48 to 48 entries)"]  # attn_output of 6 heads
    assert [note.rpartition(" are no")[0] for note in found.notes] == (odd if kind.startswith("q") else [])
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            wanted = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
            assert tensor.tensor_type == WRITTEN[kind]
            gap = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type) - wanted)
            assert (gap <= largest_error(wanted, WRITTEN[kind])).all()
            assert (gap > 0).any() == (kind != "f32")
        elif "norm" in tensor.name:
            assert tensor.tensor_type == GGMLQuantizationType.F32
        elif tensor.name == "token_embd.weight" and kind == "q4_0":
            assert tensor.tensor_type == GGMLQuantizationType.Q8_0


def test_rows_that_do_not_divide_into_blocks_are_f16_and_said_to_be(written, tmp_path):
    folder, _ = written("llama", True)
    found = prunelm.export(folder, tmp_path / "out.gguf", type="q8_0")
    kinds = {t.name: t.tensor_type for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.2.ffn_down.weight"] == GGMLQuantizationType.F16
    assert kinds["blk.2.ffn_up.weight"] == GGMLQuantizationType.Q8_0
    assert found.notes[0].endswith("no multiple of 32: prune with --multiple-of 32 for smaller files")


def test_the_vocabulary_is_that_of_the_folder(written, tmp_path):
    folder, _ = written("llama", True)
    prunelm.export(folder, tmp_path / "out.gguf")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    own = tokenizer().get_vocab()
    assert len(tokens) == SIZE
    assert all(tokens[number] == token for token, number in own.items())
    assert tokens[-1] == f"[PAD{SIZE - 1}]"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
    assert len(fields["tokenizer.ggml.merges"].contents()) > 5


def test_the_parent_gives_vocabulary_and_metadata(written, tmp_path):
    dense, (folder, _) = tmp_path / "dense", written("llama", True)
    tiny_model(
        "llama", num_hidden_layers=3, vocab_size=SIZE, max_position_embeddings=128, intermediate_size=96,
        hidden_size=64, num_attention_heads=8, num_key_value_heads=4,
    ).save_pretrained(dense)  # fmt: skip
    tokenizer().save_pretrained(dense)
    prunelm.export(dense, tmp_path / "dense.gguf")
    path = folder.parent / "no-tokenizer"
    if not path.exists():
        path.mkdir()
        for file in folder.iterdir():
            if not file.name.startswith("tokenizer"):
                (path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in it\. Give .* --parent"):
        prunelm.export(path, tmp_path / "out.gguf")
    prunelm.export(path, tmp_path / "out.gguf", parent=tmp_path / "dense.gguf")
    fields, before = (GGUFReader(tmp_path / name).fields for name in ("out.gguf", "dense.gguf"))
    assert fields["general.name"].contents() == "dense"
    for key in ("tokens", "merges", "pre", "token_type"):
        assert fields[f"tokenizer.ggml.{key}"].contents() == before[f"tokenizer.ggml.{key}"].contents()
    assert not [name for name in fields if name.startswith("llama.")]


def test_a_parent_of_another_model_is_refused(written, tmp_path):
    folder, _ = written("llama", True)
    tiny_model("llama", vocab_size=SIZE).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    prunelm.export(tmp_path / "other", tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"not the parent of this model: .*'block_count': 2.*'block_count': 3"):
        prunelm.export(folder, tmp_path / "out.gguf", parent=tmp_path / "other.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "other.gguf"]


def test_a_dense_gguf_file_is_written_again(tmp_path):
    tiny_model("llama", vocab_size=SIZE).save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    prunelm.export(tmp_path / "dense", tmp_path / "one.gguf", type="f32")
    prunelm.export(tmp_path / "one.gguf", tmp_path / "two.gguf", type="f32")
    first, second = ({t.name: np.array(t.data) for t in GGUFReader(p).tensors} for p in sorted(tmp_path.glob("*.gguf")))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"type": "q4"}, r"type must be one of f32, f16, bf16, q8_0, q4_0, got 'q4'\. Did you mean 'q4_0'\?"),
        ({"type": "q4_k_m"}, r"got 'q4_k_m'\. Did you mean 'q4_0'\? llama-quantize"),
        ({"parent": "nowhere.gguf"}, r"there is no file 'nowhere\.gguf'"),
        ({"out": "missing/out.gguf"}, r"the folder .*missing does not exist"),
        ({"out": "."}, r"A name that ends in \.gguf says gguf"),
    ],
)
def test_bad_input(written, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    folder, _ = written("llama", False)
    options = dict(arguments)
    with pytest.raises(CheckpointError, match=says):
        prunelm.export(folder, options.pop("out", "out.gguf"), **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_forced(written, tmp_path):
    folder, _ = written("llama", False)
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        prunelm.export(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"
    prunelm.export(folder, tmp_path / "out.gguf", force=True)
    assert (tmp_path / "out.gguf").stat().st_size > 1000


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("gpt2", {}, r"no data for gpt2; .*convert_hf_to_gguf\.py"),
        ("gemma2", {}, r"no data for gemma2; .*without --per-block"),
        ("llama", {"hidden_act": "relu"}, r"llama\.cpp computes SiLU in the FFN of such models, .* 'relu'"),
        (
            "qwen3",
            {"tie_word_embeddings": False},
            r"qwen3 has one \w+ for all blocks, here are \d+ to \d+; openelm has its output tied .*--uniform",
        ),
    ],
)
def test_what_no_architecture_holds_is_refused_by_name(tmp_path, family, options, says):
    model = tiny_model(family, num_hidden_layers=3, **options)
    report = prune_(model, NO_TEXT, Recipe.load("random", sparsity=0.2, allocator="per-module", per_block=True,
                                                multiple_of=1))  # fmt: skip
    _unevenly_(model)
    save(model, report, tmp_path / "out", prove=False)
    with pytest.raises(UnsupportedModelError, match=says):
        prunelm.export(tmp_path / "out", tmp_path / "out.gguf")


def test_a_tokenizer_that_cannot_be_said_is_refused(written, tmp_path):
    folder, _ = written("llama", False)
    data = json.loads((folder / "tokenizer.json").read_text())
    for change, says in (
        ({"pre_tokenizer": {"type": "Metaspace"}}, r"way to cut text \(Metaspace\) is not known\. Give .*--parent"),
        ({"model": {**data["model"], "byte_fallback": True}}, "byte-level BPE .* is SentencePiece"),
        ({"model": {"type": "WordPiece"}}, "this is WordPiece"),
    ):
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / "tokenizer.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(CheckpointError, match=says):
            prunelm.export(copy, tmp_path / "out.gguf")


def test_the_command(cli, written, tmp_path: Path):
    folder, _ = written("llama", True)
    ran = cli("export", folder, tmp_path / "out.gguf", "--type", "q8_0")
    assert ran.code == 0, ran
    assert "out.gguf: deci, q8_0, " in ran.out
    assert "note: " in ran.err
    again = cli("export", folder, tmp_path / "out.gguf", "--force", "--json")
    assert json.loads(again.out)["type"] == "f16"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "uneven"), SHAPES)
def test_llama_cpp_computes_the_same(written, tmp_path, case, uneven):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder, model = written(case, uneven)
    prunelm.export(folder, tmp_path / "out.gguf", type="f32")
    ids = torch.arange(3, 27)
    llama = llama_cpp.Llama(
        str(tmp_path / "out.gguf"), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )
    llama.eval(ids.tolist())
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0].numpy()
    assert np.abs(np.array(llama.scores[: len(ids)]) - expected).max() < 1e-4
    tokens = model.generate(
        ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=64, min_new_tokens=64, do_sample=False
    )
    picked = []
    for _ in range(64):
        logits = np.array(llama.scores[llama.n_tokens - 1])
        logits[model.config.eos_token_id] = -np.inf  # as min_new_tokens has it
        picked.append(int(np.argmax(logits)))
        llama.eval(picked[-1:])
    assert picked == tokens[0, len(ids) :].tolist()
    for text in WORDS:
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer()(text)["input_ids"]
    llama.close()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_bytes_are_foreseen_exactly(written, tmp_path, case, kind):
    folder, model = written(case, CASES[case][3] is not None)
    prunelm.export(folder, tmp_path / "out.gguf", type=kind)
    sites = find_sites(model)
    foreseen = stored_bytes(stored_after(model, sites, {}), kind)
    tensors = GGUFReader(tmp_path / "out.gguf").tensors
    assert foreseen == sum(int(t.n_bytes) for t in tensors if t.name != "rope_freqs.weight")
    assert (tmp_path / "out.gguf").stat().st_size <= foreseen + overhead_bytes(find_model(folder)) + 160 * len(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXES)
@pytest.mark.parametrize(("name", "sizes"), [("llama", {}), ("qwen2", {}), ("llama", {"tie_word_embeddings": False})])
def test_bytes_of_mixed_types_are_those_of_llama_quantize(tmp_path, kind, name, sizes):
    llama_cpp = pytest.importorskip("llama_cpp")
    shape = {"hidden_size": 256, "intermediate_size": 544, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = tiny_model(name, vocab_size=SIZE, num_hidden_layers=16, head_dim=32, **shape, **sizes)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    prunelm.export(tmp_path / "model", tmp_path / "f16.gguf", type="f16")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}"), 1
    files = (str(tmp_path / file).encode() for file in ("f16.gguf", "out.gguf"))
    assert llama_cpp.llama_model_quantize(*files, ctypes.byref(options)) == 0
    found = sum(int(tensor.n_bytes) for tensor in GGUFReader(tmp_path / "out.gguf").tensors)
    assert stored_bytes(stored_after(model, find_sites(model), {}), kind) == found

"""An interrupted export goes on where it stopped, with the bytes of an uninterrupted one."""

import pytest

import prunelm
from prunelm import export_files, gguf_export
from prunelm.errors import ResumeError
from prunelm.testing import tiny_model
from prunelm.workbench import place_of

FORMATS = {
    "nemotron-nas": ("prunelm.decilm_export._read_back", "prunelm.decilm_export.save_torch_state_dict"),
    "padded": ("prunelm.padding.prove_folder", "prunelm.padding._padded"),
    "onnx": ("prunelm.onnx_export.largest_gap", "prunelm.onnx_export._trace"),
}
"""By format, what proves a folder, and what makes it."""


class Stop(KeyboardInterrupt):
    """Ctrl-C at a known moment."""


def stopping(*_):
    raise Stop


def content(path):
    if path.is_file():
        return path.read_bytes()
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture
def long_work(monkeypatch):
    """Whatever was made counts as having taken more than a minute."""
    monkeypatch.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
    monkeypatch.setattr("prunelm.export_files.WORTH_KEEPING", 0.0)


@pytest.fixture
def dense(tiny_folder):
    """A folder that GGUF can hold, without a tokenizer of its own kind to be said."""
    return tiny_folder("llama")


@pytest.fixture
def no_vocabulary(monkeypatch):
    monkeypatch.setattr("prunelm.gguf_export.add_vocabulary", lambda *_: None)


@pytest.fixture
def made(monkeypatch):
    """The names of the parts that are made from now on."""
    names, put = [], export_files._put
    monkeypatch.setattr(export_files, "_put", lambda opened, part: (names.append(part.name), put(opened, part))[1])
    return names


def interrupted(monkeypatch, where, by, *args, **options):
    """The interrupt of an export in which something is replaced by what raises it."""
    with monkeypatch.context() as patched:
        patched.setattr(where, by)
        with pytest.raises(Stop) as stopped:
            prunelm.export(*args, **options)
    return stopped.value


def interrupted_after(count, monkeypatch, dense, out):
    """The interrupt of an export to GGUF after so many tensors, or in the proof that reads them back."""
    calls, array = iter(range(10**6)), gguf_export._array

    def counted(*args):
        return stopping() if next(calls) == count else array(*args)

    return interrupted(monkeypatch, "prunelm.gguf_export._array", counted, dense, out, type="q8_0")


@pytest.mark.parametrize("after", [1, 7, None])
def test_a_gguf_file_goes_on_growing(dense, tmp_path, monkeypatch, long_work, no_vocabulary, made, after):
    prunelm.export(dense, tmp_path / "whole.gguf", type="q8_0")
    names, out = list(made), tmp_path / "model.gguf"
    after = len(names) if after is None else after
    stopped = interrupted_after(after, monkeypatch, dense, out)
    assert stopped.__notes__ == ["What is done is kept; give its command (prunelm export) again"]
    assert not out.exists()
    made.clear()
    prunelm.export(dense, out, type="q8_0")
    assert made == names[after:]
    assert content(out) == content(tmp_path / "whole.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "whole.gguf"]


@pytest.mark.parametrize(("harm", "good"), [("flipped", 8), ("cut short", 8), ("gone", 0)])
def test_a_damaged_part_is_made_again(dense, tmp_path, monkeypatch, long_work, no_vocabulary, made, harm, good):
    prunelm.export(dense, tmp_path / "whole.gguf", type="q8_0")
    names, out = list(made), tmp_path / "model.gguf"
    interrupted_after(9, monkeypatch, dense, out)
    file = place_of(out) / export_files.FILES
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.unlink()
    if harm != "gone":
        file.write_bytes(raw if harm == "flipped" else raw[:-1])
    made.clear()
    prunelm.export(dense, out, type="q8_0")
    assert made == names[good:]
    assert content(out) == content(tmp_path / "whole.gguf")


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_waits_for_its_proof(per_block, tmp_path, monkeypatch, long_work, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        monkeypatch.setattr("prunelm.onnx_export._trace", lambda *_: FakeGraph())
        monkeypatch.setattr("prunelm.onnx_export.largest_gap", lambda *_: 0.0)
    if format == "padded":
        monkeypatch.setattr("prunelm.padding.prove_folder", lambda *_: 0.0)
    proof, maker = FORMATS[format]
    prunelm.export(per_block, tmp_path / "whole", format=format)
    interrupted(monkeypatch, proof, stopping, per_block, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(maker, stopping)
    prunelm.export(per_block, tmp_path / "out", format=format)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


class FakeGraph:
    """What the exporter traces, without tracing."""

    def save_pretrained(self, folder):
        (folder / "prefill.onnx").write_bytes(b"graph")


def test_files_that_were_altered_are_written_again(per_block, tmp_path, monkeypatch, long_work):
    monkeypatch.setattr("prunelm.padding.prove_folder", lambda *_: 0.0)
    prunelm.export(per_block, tmp_path / "whole", format="padded")
    interrupted(monkeypatch, "prunelm.padding.prove_folder", stopping, per_block, tmp_path / "out", format="padded")
    with (place_of(tmp_path / "out") / export_files.FILES / "config.json").open("a") as config:
        config.write(" ")
    prunelm.export(per_block, tmp_path / "out", format="padded")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_short_work_leaves_nothing(dense, tmp_path, monkeypatch, no_vocabulary):
    interrupted(monkeypatch, "prunelm.gguf_export._read_back", stopping, dense, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_another_export_is_refused_and_force_begins_anew(dense, tmp_path, monkeypatch, long_work, no_vocabulary, made):
    out = tmp_path / "model.gguf"
    interrupted_after(5, monkeypatch, dense, out)
    with pytest.raises(ResumeError, match=r'another run: task\.type was "q8_0" and is "f16"\.'):
        prunelm.export(dense, out, type="f16")
    made.clear()
    prunelm.export(dense, out, type="f16", force=True)
    assert len(made) == len(set(made)) > 5


def test_another_model_of_the_name_is_refused(dense, tmp_path, monkeypatch, long_work, no_vocabulary, made):
    model, out = tmp_path / "model", tmp_path / "model.gguf"
    tiny_model("llama").save_pretrained(model)
    interrupted_after(5, monkeypatch, model, out)
    tiny_model("llama", seed=1).save_pretrained(model)
    with pytest.raises(ResumeError, match=r"unfinished work of other inputs: model\.weights\.model\.safetensors was"):
        prunelm.export(model, out, type="q8_0")
    made.clear()
    prunelm.export(model, out, type="q8_0", force=True)
    assert len(made) == len(set(made)) > 5


def test_long_exports_tell_how_far_they_are(dense, per_block, tmp_path, monkeypatch, no_vocabulary):
    monkeypatch.setattr("prunelm.padding.prove_folder", lambda *_: 0.0)
    told = []
    prunelm.export(dense, tmp_path / "model.gguf", progress=lambda *said: told.append(said))
    tensors = told[-1][2]
    assert told == [
        *(("writing", n, tensors) for n in range(tensors + 1)),
        *(("reading back", n, tensors) for n in range(1, tensors + 1)),
    ]
    told.clear()
    prunelm.export(per_block, tmp_path / "out", format="padded", progress=lambda *said: told.append(said))
    assert told == [("writing", 0, 1), ("writing", 1, 1), ("proving", 0, 1), ("proving", 1, 1)]

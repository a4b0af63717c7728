"""int8 folders of torchao open in plain transformers, PruneLM out of sight (where torchao is installed)."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from prunelm.errors import CheckpointError
from prunelm.loading import find_model, load_model
from prunelm.torchao_export import export_torchao

OPEN = """
import sys, torch
sys.modules["prunelm"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 20)[None]).logits.float(), sys.argv[2])
"""


def test_without_torchao_it_is_named(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'prunelm\[torchao\]'"):
        export_torchao(tiny_folder("llama"), tmp_path / "int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["stock", "per block"])
def test_int8_opens_without_prunelm(kind, per_block, tiny_folder, tmp_path):
    pytest.importorskip("torchao")
    folder = per_block if kind == "per block" else tiny_folder("llama")
    found = export_torchao(folder, tmp_path / "int8")
    assert found.type == "int8"
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert {w.dtype for n, w in stored.items() if n.endswith("weight_qdata")} == {torch.int8}
    assert "rope_theta" in json.loads((tmp_path / "int8" / "config.json").read_text())
    run = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path / "int8", tmp_path / "logits.pt"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        floats = load_model(find_model(folder))(input_ids=torch.arange(3, 20)[None]).logits
    assert (logits - floats).abs().max() < 0.1 * floats.abs().max()

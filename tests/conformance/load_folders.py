"""Run in a fresh process: open every folder the way its user would, and write down what it computes."""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

root = Path(sys.argv[1])
results = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    if json.loads((folder / "pruning.json").read_text())["loader"] == "transformers":
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), (folder, info)
    else:
        import prunelm

        model = prunelm.load(folder)
    model.eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        output = model(input_ids=ids)
        results[f"{folder.name}.logits"] = output.logits if "logits" in output else output.last_hidden_state
        if model.can_generate():
            results[f"{folder.name}.tokens"] = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
            )
    head = model.get_output_embeddings()
    if head is not None and model.config.tie_word_embeddings:
        tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        results[f"{folder.name}.tied"] = torch.tensor(tied)
save_file({name: tensor.contiguous() for name, tensor in results.items()}, root / "found.safetensors")

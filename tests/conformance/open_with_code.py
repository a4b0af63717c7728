"""Run in a fresh process without PruneLM: open per-block folders by the code they carry, and write down what they do.

Also saves each folder again with transformers and opens that, and notes what users see who do not trust the code.
Written for any transformers from 4.57 on.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

sys.modules["prunelm"] = None
transformers.utils.logging.set_verbosity_error()


def logits_of(model, ids):
    with torch.no_grad():
        output = model.eval()(input_ids=ids)
    return output.logits if "logits" in output else output.last_hidden_state


def tokens_of(model, ids, **options):
    length = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **length, **options)


def class_of(folder):
    """The class that opens the folder, its options, and what users see who do not give them."""
    names = json.loads((folder / "config.json").read_text())
    (own,) = names["architectures"]
    if "auto_map" not in names:
        return getattr(transformers, own), {}, None
    found = next(auto for auto, cls in reversed(names["auto_map"].items()) if cls.endswith("." + own))
    auto = getattr(transformers, found)
    try:
        auto.from_pretrained(folder)
    except ValueError as error:
        said = str(error)
    return auto, {"trust_remote_code": True}, said


root = Path(sys.argv[1])
results, seen = {}, {"version": transformers.__version__}
ids = torch.arange(3, 15)[None]
for folder in sorted(path for path in root.iterdir() if path.name.endswith(("-per-block", "-uniform"))):
    opener, options, seen[folder.name] = class_of(folder)
    model, info = opener.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), (folder, info)
    results[f"{folder.name}.logits"] = logits_of(model, ids)
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    results[f"{folder.name}.eager"] = logits_of(model, ids)
    model.set_attn_implementation(usual)
    if model.can_generate():
        results[f"{folder.name}.tokens"] = tokens_of(model, ids)
        results[f"{folder.name}.static"] = tokens_of(model, ids, cache_implementation="static")
    model.save_pretrained(root / "again" / folder.name)
    results[f"{folder.name}.again"] = logits_of(opener.from_pretrained(root / "again" / folder.name, **options), ids)
    bare = transformers.AutoModel.from_pretrained(folder, **options)
    assert sum(p.numel() for p in bare.parameters()) <= sum(p.numel() for p in model.parameters())
save_file({name: tensor.contiguous() for name, tensor in results.items()}, root / "with-code.safetensors")
(root / "said.json").write_text(json.dumps(seen, indent=1))

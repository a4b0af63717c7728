"""Run in a fresh process without PruneLM: attach LoRA to a folder, train ten steps, merge, save, open again."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
from transformers import AutoModelForCausalLM

sys.modules["prunelm"] = None
folder, tuned = Path(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
targets = None if model.config.model_type in KNOWN else "all-linear"
model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets))
ids = torch.arange(3, 51)[None]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
losses = []
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
assert losses[-1] < 0.95 * losses[0], losses
model.eval()
with torch.no_grad():
    wanted = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    gap = (merged(input_ids=ids).logits - wanted).abs().max()
    assert gap < 1e-4, gap
    merged.save_pretrained(tuned)
    again = AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True).eval()
    gap = (again(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max()
    assert gap < 1e-5, gap

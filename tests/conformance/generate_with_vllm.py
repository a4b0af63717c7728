"""Run by a Python with vLLM, in a fresh process without PruneLM: greedy tokens of a folder, for given token ids."""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
sys.modules["prunelm"] = None

from vllm import LLM, SamplingParams  # noqa: E402

folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = LLM(
    folder,
    skip_tokenizer_init=True,
    dtype="float32",
    enforce_eager=True,
    max_model_len=len(ids) + count + 4,
    trust_remote_code="auto_map" in json.loads(Path(folder, "config.json").read_text()),
)
sampling = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, detokenize=False)
(found,) = model.generate([{"prompt_token_ids": ids}], sampling)
print(json.dumps(list(found.outputs[0].token_ids)))

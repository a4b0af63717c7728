"""Qwen3 and Gemma 3 (text): as Llama, with a norm on queries and keys that undoes any refit of their scale."""

from dataclasses import replace

from . import Architecture, GgufForm, architecture
from .llama import ATTENTION, FFN

SITES = (replace(ATTENTION, normed=("self_attn.q_proj", "self_attn.k_proj")), FFN)

architecture(
    Architecture(
        model_types=("qwen3",),
        blocks="layers",
        sites=SITES,
        gguf=(
            GgufForm(name="qwen3", biases=False),
            GgufForm(name="openelm", per_block=True, fused=True, biases=False),
        ),
    ),
    __name__,
)
architecture(Architecture(model_types=("gemma3_text",), blocks="layers", sites=SITES, hidden_stock=False), __name__)

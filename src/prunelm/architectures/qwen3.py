"""Qwen3 and Gemma 3 (text): as Llama, with a norm on queries and keys that undoes any refit of their scale."""

from dataclasses import replace

from . import Architecture, architecture
from .llama import ATTENTION, FFN

NORMED = replace(ATTENTION, normed=("self_attn.q_proj", "self_attn.k_proj"))

architecture(
    Architecture(model_types=("qwen3",), blocks="layers", sites=(NORMED, FFN)),
    __name__,
)
architecture(
    Architecture(model_types=("gemma3_text",), blocks="layers", sites=(NORMED, FFN), hidden_stock=False),
    __name__,
)

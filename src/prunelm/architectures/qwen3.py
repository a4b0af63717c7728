"""Qwen3 and Gemma 3 (text): as Llama, with a norm on queries and keys that undoes any refit of their scale."""

from dataclasses import replace

from . import Architecture, GgufForm, Reader, architecture
from .llama import ATTENTION_BIASED, FFN

SITES = (replace(ATTENTION_BIASED, normed=("self_attn.q_proj", "self_attn.k_proj")), FFN)

architecture(
    Architecture(
        model_types=("qwen3",),
        blocks="layers",
        sites=SITES,
        # Neither has a bias at o_proj.
        readers={
            "vllm": Reader(biases=()),
            "llama.cpp": Reader(biases=(), uneven_when={"tie_word_embeddings": True}),
        },
        gguf=(
            GgufForm(name="qwen3", biases=False),
            GgufForm(name="openelm", per_block=True, fused=True, biases=False),
        ),
    ),
    __name__,
)
architecture(
    Architecture(
        model_types=("gemma3_text",),
        blocks="layers",
        sites=SITES,
        hidden_stock=False,
        readers={"vllm": Reader(), "llama.cpp": Reader(biases=(), uneven_when=None)},
    ),
    __name__,
)

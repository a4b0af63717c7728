"""Phi-3: fused [Q | K | V] and [gate | up] projections."""

from . import Architecture, Reader, SiteSpec, architecture

architecture(
    Architecture(
        model_types=("phi3",),
        blocks="layers",
        sites=(
            SiteSpec(
                name="attention",
                count="num_key_value_heads",
                producers={"self_attn.qkv_proj": "group | head | head"},
                consumer=("self_attn.o_proj", "group"),
                config_fields={"num_key_value_heads": "kv_heads", "num_attention_heads": "queries"},
                attributes={
                    "self_attn.num_key_value_heads": "kv_heads",
                    "self_attn.num_key_value_groups": "queries_per_kv",
                },
                probabilities="self_attn",
                value=("self_attn.qkv_proj", 2),
            ),
            SiteSpec(
                name="ffn",
                count="intermediate_size",
                producers={"mlp.gate_up_proj": "channel | channel"},
                consumer=("mlp.down_proj", "channel"),
                config_fields={"intermediate_size": "units"},
            ),
        ),
        readers={"vllm": Reader(), "llama.cpp": Reader(sites=("ffn",), uneven_when=None)},
    ),
    __name__,
)

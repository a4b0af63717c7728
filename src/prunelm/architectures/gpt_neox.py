"""GPT-NeoX and Pythia: Q, K, V interleaved head by head; head_dim is derived, so fewer heads need `--per-block`."""

from . import Architecture, Reader, SiteSpec, architecture

architecture(
    Architecture(
        model_types=("gpt_neox",),
        blocks="layers",
        sites=(
            SiteSpec(
                name="attention",
                count="num_attention_heads",
                producers={"attention.query_key_value": "head + head + head"},
                consumer=("attention.dense", "head"),
                config_fields={"num_attention_heads": "queries"},
                probabilities="attention",
                value=("attention.query_key_value", 2),
                stock=False,
            ),
            SiteSpec(
                name="ffn",
                count="intermediate_size",
                producers={"mlp.dense_h_to_4h": "channel"},
                consumer=("mlp.dense_4h_to_h", "channel"),
                config_fields={"intermediate_size": "units"},
            ),
        ),
        readers={
            "vllm": Reader(sites=("ffn",)),
            "llama.cpp": Reader(sites=("ffn",), uneven_when=None),
        },
        legacy_rope={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    ),
    __name__,
)

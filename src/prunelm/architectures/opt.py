"""OPT: biases everywhere, ReLU; head_dim is derived, so fewer heads need `--per-block`."""

from . import Architecture, Reader, SiteSpec, architecture

architecture(
    Architecture(
        model_types=("opt",),
        blocks="decoder.layers",
        sites=(
            SiteSpec(
                name="attention",
                count="num_attention_heads",
                producers={
                    "self_attn.q_proj": "head",
                    "self_attn.k_proj": "head",
                    "self_attn.v_proj": "head",
                },
                consumer=("self_attn.out_proj", "head"),
                config_fields={"num_attention_heads": "queries"},
                attributes={"self_attn.num_heads": "queries", "self_attn.embed_dim": "width"},
                probabilities="self_attn",
                value=("self_attn.v_proj", 0),
                stock=False,
            ),
            SiteSpec(
                name="ffn",
                count="ffn_dim",
                producers={"fc1": "channel"},
                consumer=("fc2", "channel"),
                config_fields={"ffn_dim": "units"},
            ),
        ),
        readers={"vllm": Reader(sites=("ffn",))},
        hidden_fields=("hidden_size", "word_embed_proj_dim"),
    ),
    __name__,
)

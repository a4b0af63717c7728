"""GPT-2: fused [Q | K | V] in Conv1D layers; its config cannot say head_dim, so fewer heads need `--per-block`."""

from . import Architecture, Reader, SiteSpec, architecture

architecture(
    Architecture(
        model_types=("gpt2",),
        blocks="h",
        sites=(
            SiteSpec(
                name="attention",
                count="num_attention_heads",
                producers={"attn.c_attn": "head | head | head"},
                consumer=("attn.c_proj", "head"),
                config_fields={"num_attention_heads": "queries"},
                attributes={"attn.num_heads": "queries", "attn.split_size": "width"},
                probabilities="attn",
                value=("attn.c_attn", 2),
                stock=False,
            ),
            SiteSpec(
                name="ffn",
                count="n_inner",
                producers={"mlp.c_fc": "channel"},
                consumer=("mlp.c_proj", "channel"),
                config_fields={"n_inner": "units"},
            ),
        ),
        refuse={"add_cross_attention": True},
        # llama.cpp's converter writes 4 x hidden_size for the width of every FFN.
        readers={"vllm": Reader(sites=("ffn",), uneven_when=None), "llama.cpp": Reader(sites=(), uneven_when=None)},
    ),
    __name__,
)

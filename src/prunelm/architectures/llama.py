"""Llama, Mistral, Granite, Qwen2, Gemma 2: separate q, k, v and a gated FFN; a unit of attention is a KV group."""

from dataclasses import replace

from . import Architecture, GgufForm, Reader, Relabel, SiteSpec, architecture

ATTENTION = SiteSpec(
    name="attention",
    count="num_key_value_heads",
    producers={"self_attn.q_proj": "group", "self_attn.k_proj": "head", "self_attn.v_proj": "head"},
    consumer=("self_attn.o_proj", "group"),
    config_fields={"num_key_value_heads": "kv_heads", "num_attention_heads": "queries"},
    attributes={"self_attn.num_key_value_groups": "queries_per_kv"},
    probabilities="self_attn",
    value=("self_attn.v_proj", 0),
)
FFN = SiteSpec(
    name="ffn",
    count="intermediate_size",
    producers={"mlp.gate_proj": "channel", "mlp.up_proj": "channel"},
    consumer=("mlp.down_proj", "channel"),
    config_fields={"intermediate_size": "units"},
)

ATTENTION_BIASED = replace(ATTENTION, bias=("attention_bias", (*ATTENTION.producers, ATTENTION.consumer[0])))
BIASED = (
    ATTENTION_BIASED,
    replace(FFN, bias=("mlp_bias", (*FFN.producers, FFN.consumer[0]))),
)

LLAMA_CPP = (GgufForm(name="llama", pairs=True), GgufForm(name="deci", pairs=True, per_block=True))
READERS = {"vllm": Reader(), "llama.cpp": Reader()}

# Neither has the rule of stock Llama that the number of heads divides hidden_size; Granite has room for biases.
AS_MISTRAL = Relabel(
    model_type="mistral", set={"sliding_window": None}, when={"attention_bias": False, "mlp_bias": False}
)
AS_GRANITE = Relabel(
    model_type="granite",
    set={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
    scale="attention_multiplier",
)
# Qwen2 has biases at q, k and v; Llama has none or all four.
QWEN2_AS_LLAMA = Relabel(
    model_type="llama",
    set={"attention_bias": True, "mlp_bias": False},
    when={"use_sliding_window": False},
    drop=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)

architecture(
    Architecture(
        model_types=("llama",),
        blocks="layers",
        sites=BIASED,
        relabels=(AS_MISTRAL, AS_GRANITE),
        readers=READERS,
        gguf=LLAMA_CPP,
    ),
    __name__,
)
architecture(
    Architecture(model_types=("mistral",), blocks="layers", sites=(ATTENTION, FFN), readers=READERS, gguf=LLAMA_CPP),
    __name__,
)
architecture(
    Architecture(
        model_types=("granite",),
        blocks="layers",
        sites=BIASED,
        readers={"vllm": Reader(), "llama.cpp": Reader(uneven_when=None)},
        gguf=(
            GgufForm(
                name="granite",
                pairs=True,
                scales={
                    "attention.scale": "attention_multiplier",
                    "embedding_scale": "embedding_multiplier",
                    "residual_scale": "residual_multiplier",
                    "logit_scale": "logits_scaling",
                },
            ),
        ),
    ),
    __name__,
)
architecture(
    Architecture(
        model_types=("qwen2",),
        blocks="layers",
        sites=(ATTENTION, FFN),
        relabels=(
            QWEN2_AS_LLAMA,
            replace(
                AS_GRANITE,
                set={**AS_GRANITE.set, **QWEN2_AS_LLAMA.set},
                when=QWEN2_AS_LLAMA.when,
                drop=QWEN2_AS_LLAMA.drop,
            ),
        ),
        # llama.cpp's own qwen2 takes the size of a head from their number, but `export` writes llama then.
        readers={**READERS, "vllm": Reader(head_dim=False)},
        gguf=(GgufForm(name="qwen2", head_dim=False), *LLAMA_CPP),
    ),
    __name__,
)
# Gemma multiplies its embeddings by the root of the config's hidden size, which must stay that of the dense model.
architecture(
    Architecture(
        model_types=("gemma2",),
        blocks="layers",
        sites=(ATTENTION_BIASED, FFN),
        hidden_stock=False,
        readers={"vllm": Reader(), "llama.cpp": Reader(biases=(), uneven_when=None)},
    ),
    __name__,
)

"""Llama, Mistral, Qwen2, Gemma 2: separate q, k, v and a gated FFN; a unit of attention is a KV group."""

from dataclasses import replace

from . import Architecture, GgufForm, Relabel, SiteSpec, architecture

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

BIASED = (
    replace(ATTENTION, bias=("attention_bias", (*ATTENTION.producers, ATTENTION.consumer[0]))),
    replace(FFN, bias=("mlp_bias", (*FFN.producers, FFN.consumer[0]))),
)

LLAMA_CPP = (GgufForm(name="llama", pairs=True), GgufForm(name="deci", pairs=True, per_block=True))

architecture(
    Architecture(
        model_types=("llama",),
        blocks="layers",
        sites=BIASED,
        # Stock Llama refuses head counts that do not divide hidden_size; Mistral computes the same without that rule.
        relabel=Relabel(
            model_type="mistral",
            set={"sliding_window": None},
            when={"attention_bias": False, "mlp_bias": False},
        ),
        gguf=LLAMA_CPP,
    ),
    __name__,
)
architecture(
    Architecture(model_types=("mistral",), blocks="layers", sites=(ATTENTION, FFN), gguf=LLAMA_CPP),
    __name__,
)
architecture(
    Architecture(
        model_types=("qwen2",),
        blocks="layers",
        sites=(ATTENTION, FFN),
        gguf=(GgufForm(name="qwen2", head_dim=False), *LLAMA_CPP),
    ),
    __name__,
)
# Gemma multiplies its embeddings by the root of the config's hidden size, which must stay that of the dense model.
architecture(
    Architecture(model_types=("gemma2",), blocks="layers", sites=(ATTENTION, FFN), hidden_stock=False),
    __name__,
)

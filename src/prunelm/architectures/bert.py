"""BERT: an encoder with norms after the residual; head_dim is derived, so fewer heads need `--per-block`."""

from . import Architecture, Reader, SiteSpec, architecture

architecture(
    Architecture(
        model_types=("bert",),
        blocks="encoder.layer",
        sites=(
            SiteSpec(
                name="attention",
                count="num_attention_heads",
                producers={
                    "attention.self.query": "head",
                    "attention.self.key": "head",
                    "attention.self.value": "head",
                },
                consumer=("attention.output.dense", "head"),
                config_fields={"num_attention_heads": "queries"},
                attributes={
                    "attention.self.num_attention_heads": "queries",
                    "attention.self.all_head_size": "width",
                },
                probabilities="attention.self",
                value=("attention.self.value", 0),
                stock=False,
            ),
            SiteSpec(
                name="ffn",
                count="intermediate_size",
                producers={"intermediate.dense": "channel"},
                consumer=("output.dense", "channel"),
                config_fields={"intermediate_size": "units"},
            ),
        ),
        readers={
            "vllm": Reader(sites=("ffn",), uneven_when=None),
            "llama.cpp": Reader(sites=("ffn",), uneven_when=None),
        },
        refuse={"add_cross_attention": True},
        hidden_writers=("pooler.dense", "predictions.transform.dense"),
    ),
    __name__,
)

"""Model types that are refused by name, with the reason and what to do instead."""

_EXPERTS = (
    "its experts are fused in 3-D tensors, and a site describes 2-D layers only. Prune a dense model of the family, "
    "or drop whole experts with a tool made for that."
)
_ALIBI = (
    "its attention biases (ALiBi) belong to head positions and its FFN width is fixed at 4 x hidden, so no unit can "
    "go without changing the others. Choose a model with rotary or learned positions."
)

REFUSED = {
    "bloom": _ALIBI,
    "mpt": _ALIBI,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "olmoe": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "gemma3": "it is a vision-language model. Load its text part as gemma3_text and prune that.",
}

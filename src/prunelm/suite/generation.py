"""Part `generation`: greedy continuations of the evaluation text, and where they part from the dense model's."""

import functools
import statistics
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data import JOIN, check_ids, prefix_ids, read_documents, token_ids
from ..errors import DataError
from ..journal import Journal
from ..progress import Progress
from . import Setting, Subject

PROMPT_TOKENS = 32


def generation(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Evenly spaced prompts of 32 tokens, continued greedily: both texts, and the first token that differs.

    `first_difference` counts from 1 and is null where all tokens are the same; `same` is the share of tokens that
    are equal in their place.

    Raises:
        DataError: the text does not fill one prompt.
    """
    ids = token_ids(JOIN.join(read_documents(subject.text)), subject.tokenizer)
    prefix = prefix_ids(subject.tokenizer)
    limit = getattr(subject.model.config, "max_position_embeddings", None)
    new_tokens = min(setting.new_tokens, limit - PROMPT_TOKENS - len(prefix)) if limit else setting.new_tokens
    if len(ids) < PROMPT_TOKENS or new_tokens < 1:
        raise DataError(f"{subject.text}: it gives {len(ids):,} tokens, but one prompt needs {PROMPT_TOKENS}.")
    places = len(ids) // PROMPT_TOKENS
    starts = [PROMPT_TOKENS * (places * k // setting.prompts) for k in range(min(setting.prompts, places))]
    samples = []
    for i, start in enumerate(starts):
        progress("generating", i, len(starts))
        prompt = torch.tensor([[*prefix, *ids[start : start + PROMPT_TOKENS]]])
        check_ids(subject.model.config, [{"input_ids": prompt}])
        samples.append(journal.entry(functools.partial(_sample, subject, prompt, new_tokens)))
    progress("generating", len(starts), len(starts))
    found: dict[str, Any] = {"new_tokens": new_tokens, "samples": samples}
    if subject.dense is not None:
        parted = [s["first_difference"] or s["tokens"] + 1 for s in samples]
        found["median_first_difference"] = statistics.median(parted)
        found["identical"] = sum(s["first_difference"] is None for s in samples)
        found["same"] = statistics.mean(s["same"] for s in samples)
    return found


def _sample(subject: Subject, prompt: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    made = {name: _continued(model, prompt, new_tokens) for name, model in subject.models.items()}

    def decoded(ids: list[int]) -> str:
        return str(subject.tokenizer.decode(ids, skip_special_tokens=True))

    sample: dict[str, Any] = {"prompt": decoded(prompt[0].tolist())}
    sample |= {name: decoded(ids) for name, ids in made.items()}
    sample["tokens"] = len(made["model"])
    if "dense" in made:
        longest = max(len(made["dense"]), len(made["model"]))
        differ = [k for k in range(longest) if made["dense"][k : k + 1] != made["model"][k : k + 1]]
        sample["first_difference"] = differ[0] + 1 if differ else None
        sample["same"] = 1 - len(differ) / longest
        if differ:
            sample["common"] = decoded(made["model"][: differ[0]])
    return sample


@torch.no_grad()
def _continued(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    there = prompt.to(model.device)
    ids = model.generate(
        there,
        attention_mask=torch.ones_like(there),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )
    return ids[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]

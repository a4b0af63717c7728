"""Part `generation`: greedy continuations of the evaluation text, and where they part from the dense model's."""

import functools
import re
import statistics
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import JOIN, check_ids, prefix_ids, read_documents, token_ids
from ..errors import DataError
from ..journal import Journal
from ..progress import Progress
from . import Setting, Subject

PROMPT_TOKENS = 32
LETTERS = 16 * PROMPT_TOKENS
"""Text that is certain to hold a prompt's tokens, where words have the usual length."""
_SENTENCE, _WORD = re.compile(r"(?<=[.!?])\s+|\n+"), re.compile(r"\s+")


def generation(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Evenly spaced sentences' first 32 tokens, continued greedily: both texts, and the first token that differs.

    `first_difference` counts from 1 and is null where all tokens are the same; `same` is the share of tokens that
    are equal in their place.

    Raises:
        DataError: the text does not fill one prompt.
    """
    text = JOIN.join(read_documents(subject.text))
    prefix = prefix_ids(subject.tokenizer)
    limit = getattr(subject.model.config, "max_position_embeddings", None)
    new_tokens = min(setting.new_tokens, limit - PROMPT_TOKENS - len(prefix)) if limit else setting.new_tokens
    prompts = _prompts(text, subject.tokenizer, setting.prompts)
    if not prompts or new_tokens < 1:
        count = len(token_ids(text, subject.tokenizer))
        raise DataError(f"{subject.text}: it gives {count:,} tokens, but one prompt needs {PROMPT_TOKENS}.")
    samples = []
    for i, ids in enumerate(prompts):
        progress("generating", i, len(prompts))
        prompt = torch.tensor([[*prefix, *ids]])
        check_ids(subject.model.config, [{"input_ids": prompt}])
        samples.append(journal.entry(functools.partial(_sample, subject, prompt, new_tokens)))
    progress("generating", len(prompts), len(prompts))
    found: dict[str, Any] = {"new_tokens": new_tokens, "samples": samples}
    if subject.dense is not None:
        parted = [s["first_difference"] or s["tokens"] + 1 for s in samples]
        found["median_first_difference"] = statistics.median(parted)
        found["identical"] = sum(s["first_difference"] is None for s in samples)
        found["same"] = statistics.mean(s["same"] for s in samples)
    return found


def _prompts(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """The first tokens of at most `count` sentences, evenly spaced; of words where there are not as many sentences."""
    for border in (_SENTENCE, _WORD):
        starts = [0, *(found.end() for found in border.finditer(text))]
        if len(starts) > 2 * count:
            break
    chosen = sorted({starts[len(starts) * k // count] for k in range(count)})
    found = [token_ids(text[start : start + LETTERS], tokenizer)[:PROMPT_TOKENS] for start in chosen]
    return [ids for ids in found if len(ids) == PROMPT_TOKENS]


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

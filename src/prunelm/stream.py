"""Hidden states carried block by block, so that statistics cost no more than the blocks they need.

The model runs once with its blocks stepped over: every block's own arguments (masks, rotary tables, whatever the
family passes) are recorded as they are, and the hidden states that enter the first block are kept. From then on the
blocks are run one at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .sites import configs_of, find_blocks

Batch = Mapping[str, Tensor]


class _Stop(Exception):
    """Leaves a forward pass once everything wanted has been seen."""


@runtime_checkable
class States(Protocol):
    """A list of hidden states, wherever they lie."""

    def __len__(self) -> int: ...
    def __getitem__(self, b: int, /) -> Tensor: ...
    def __setitem__(self, b: int, tensor: Tensor, /) -> None: ...
    def append(self, tensor: Tensor, /) -> None:
        """Add one at the end."""

    def copy(self) -> "States":
        """The same states in a list of their own."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where a stream finds blocks and puts hidden states: all in memory, unless somebody says otherwise.

    `opened`: the context in which a block has its weights; `finished`: told that a block will not change any more;
    `states`: an empty list for the hidden states of some batches; `deep`: one whose copies before every block fit too,
    where blocks are not all there; `sums`: the dtype that statistics are summed in.
    """

    opened: Callable[[int], AbstractContextManager[None]] = lambda _i: contextlib.nullcontext()
    finished: Callable[[int], None] = lambda _i: None
    states: Callable[[Sequence[Batch]], States] = lambda _batches: []
    deep: Callable[[Sequence[Batch]], States] | None = None
    sums: torch.dtype = torch.float64


class BlockStream:
    """Hidden states of some batches between two blocks of a model.

    Running every block in order gives bit for bit what the whole model computes.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], room: Room | None = None) -> None:
        self.model = model
        self.batches = batches
        self.room = room or Room()
        _, self.blocks = find_blocks(model)
        self.hidden, self.calls = _record(model, self.blocks, batches, self.room.states(batches))
        self.rows = [_token_rows(batch) for batch in batches]

    def fork(self) -> "BlockStream":
        """A second stream at the same place, for the same batches; only the hidden states can differ later."""
        twin = object.__new__(BlockStream)
        twin.__dict__.update(self.__dict__)
        twin.hidden = self.hidden.copy()
        return twin

    @torch.no_grad()
    def run(self, i: int, b: int, block: nn.Module | None = None) -> Tensor:
        """What block `i` (or a copy of it) makes of batch `b`."""
        args, kwargs = self.calls[i][b]
        result = (block or self.blocks[i])(self.hidden[b], *args, **kwargs)
        hidden: Tensor = result[0] if isinstance(result, tuple) else result
        return hidden

    def advance(self, i: int, block: nn.Module | None = None) -> None:
        """Carry every batch through block `i` (or a copy of it)."""
        for b in range(len(self.batches)):
            self.hidden[b] = self.run(i, b, block)

    @torch.no_grad()
    def outputs(self, b: int, hidden: Tensor) -> Float[Tensor, "token _"]:
        """What the model makes of batch `b` from the hidden states behind its last block, one row per real token.

        Logits where the model has a head (one row per sequence for classifiers), else its last hidden state.
        """
        with blocks_skipped(self.blocks, hidden):
            result = self.model(**self.batches[b])
        found = prediction(result)
        return self.tokens(found, b) if found.dim() == 3 else found

    @torch.no_grad()
    def capture(
        self, i: int, b: int, paths: Sequence[str], *, block: nn.Module | None = None, advance: bool = False
    ) -> list[Float[Tensor, "token _"]]:
        """The inputs of the layers at `paths` in block `i` for batch `b`, one row per real token.

        With `advance` the batch is carried through the block; otherwise the block stops as soon as all are seen.
        """
        block = block or self.blocks[i]
        found: dict[str, Tensor] = {}

        def hook(path: str) -> Callable[..., None]:
            def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found[path] = args[0]
                if not advance and len(found) == len(set(paths)):
                    raise _Stop

            return see

        handles = [block.get_submodule(path).register_forward_pre_hook(hook(path)) for path in dict.fromkeys(paths)]
        try:
            result = self.run(i, b, block)
        except _Stop:
            pass
        else:
            if advance:
                self.hidden[b] = result
        finally:
            for handle in handles:
                handle.remove()
        return [self.tokens(found[path], b) for path in paths]

    @torch.no_grad()
    def capture_outside(self, b: int, paths: Sequence[str]) -> list[Float[Tensor, "row _"]]:
        """The inputs of layers of the model's head for batch `b`, the stream being behind the last block.

        One row per real token, or per sequence for layers that see only one token of each.
        """
        found: dict[str, Tensor] = {}

        def hook(path: str) -> Callable[..., None]:
            def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found[path] = args[0]

            return see

        handles = [self.model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
        try:
            self.outputs(b, self.hidden[b])
        finally:
            for handle in handles:
                handle.remove()
        return [self.tokens(found[path], b) if found[path].dim() == 3 else found[path] for path in paths]

    def count(self, b: int) -> int:
        """How many tokens of batch `b` are not padding."""
        rows = self.rows[b]
        return self.batches[b]["input_ids"].numel() if rows is None else int(rows.sum())

    def tokens(self, a: Float[Tensor, "*batch channel"], b: int) -> Float[Tensor, "token channel"]:
        """The rows of batch `b` that are tokens, not padding."""
        flat = a.reshape(-1, a.shape[-1])
        rows = self.rows[b]
        return flat if rows is None else flat[rows.to(flat.device)]

    @torch.no_grad()
    def attention_probabilities(
        self, i: int, b: int, path: str, sequences: slice
    ) -> Float[Tensor, "sample head query key"]:
        """Attention probabilities of block `i` for some sequences of batch `b`.

        They come from the eager implementation, because the others return none.
        """
        seen: list[Tensor] = []

        def see(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
            seen.append(output[1])
            raise _Stop

        with attention_implementation(self.model, "eager"):
            head = {name: value[sequences] for name, value in self.batches[b].items()}
            _, calls = _record(self.model, self.blocks, [head], [])
            args, kwargs = calls[i][0]
            handle = self.blocks[i].get_submodule(path).register_forward_hook(see)
            try:
                self.blocks[i](self.hidden[b][sequences], *args, **kwargs)
            except _Stop:
                pass
            finally:
                handle.remove()
        return seen[0]


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """While open, every block computes attention with this implementation."""
    configs = configs_of(model)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


@contextlib.contextmanager
def blocks_skipped(blocks: nn.ModuleList, hidden: Tensor) -> Iterator[None]:
    """While open, the blocks together give some hidden states and compute nothing."""
    last = len(blocks) - 1
    with forwards_replaced({**dict.fromkeys(blocks[:last], pass_on), blocks[last]: lambda *_args, **_kwargs: hidden}):
        yield


@contextlib.contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While open, modules run these functions; then what they ran before, the hooks of other libraries included."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in own.items():
            if before is None:
                del module.forward
            else:
                module.forward = before


def prediction(result: Any) -> Tensor:
    """A model's logits, or the last hidden state of a model without a head."""
    found: Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found


def real_rows(output: Tensor, mask: Tensor | None) -> Float[Tensor, "row _"]:
    """The rows of a model's output that are tokens, not padding; those of a classifier as they are."""
    if output.dim() != 3:
        return output
    return output.flatten(0, 1) if mask is None else output[mask.bool()]


def pass_on(*args: Any, **kwargs: Any) -> Tensor:
    """What a block that does nothing gives."""
    entering: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return entering


def _token_rows(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    return mask.reshape(-1).bool()


@torch.no_grad()
def _record(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[Batch], hidden: States
) -> tuple[States, list[list[tuple[tuple[Any, ...], dict[str, Any]]]]]:
    """`hidden` with the states entering the first block, and every block's other arguments; no block is run."""
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in blocks]
    pool: list[Tensor] = []

    def recorder(i: int) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            entering = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            rest = tuple(_shared(a, pool) for a in args[1:])
            calls[i].append((rest, {name: _shared(value, pool) for name, value in kwargs.items()}))
            if i == 0:
                hidden.append(entering)
            if i == len(blocks) - 1:
                raise _Stop
            return entering  # type: ignore[no-any-return]

        return record

    with forwards_replaced({block: recorder(i) for i, block in enumerate(blocks)}):
        for batch in batches:
            with contextlib.suppress(_Stop):
                model.base_model(**batch, use_cache=False)
    return hidden, calls


def _shared(value: Any, pool: list[Tensor]) -> Any:
    """The value itself, or an equal tensor that was met before: batches of one shape share masks and tables."""
    if isinstance(value, tuple):
        return tuple(_shared(v, pool) for v in value)
    if not isinstance(value, Tensor):
        return value
    for known in pool:
        if known is value or (known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)):
            return known
    if len(pool) < 16:
        pool.append(value)
    return value

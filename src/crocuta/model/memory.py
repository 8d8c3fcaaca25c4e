"""How much is run at once within a bound of memory: tokens of a batch, tokens of a chunk, logits of a turn.

What a call holds beyond the model is counted, not guessed: each kind of block reads one chunk on the meta device,
where tensors have sizes and no contents, and every tensor that comes and goes is booked. So the estimate follows the
code, whatever the mixers, filters and MLPs do. To the largest sum it adds

- what the blocks keep from chunk to chunk: states (modes, tails, keys and values, pasts) and derived taps and tables,
- the hidden states of the chunk before, which the caller still holds, or those of this one and a turn of logits,
- what the caller itself keeps of every token (ids, results),
- what operators use inside and the allocator loses between: ``SLACK`` times what comes and goes, because torch on a
  CPU leaves blocks below 32 MiB to the C library, which reuses them as they fit (up to 1.4 times was measured),
- ``BASE`` for what torch needs for itself when it first runs: threads, buffers of the matrix products, code.

A chunk is never longer than without a bound (``DEFAULT``): more memory makes nothing faster.
"""

from __future__ import annotations

import bisect
import copy
import functools
import re
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crocuta.config import AttentionConfig, ModelConfig
from crocuta.errors import InputError
from crocuta.model.block import Block
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.ops.attention import MASK_ELEMENTS, SCORES
from crocuta.ops.blocks import compute_dtype

Size: TypeAlias = "int | str"
"""Bytes, or text such as "2GiB" or "500 MB"."""

SMALLEST = 64
"""Tokens at once below which a bound is refused: chunks would take time without saving memory."""
FEW = 2_048
"""Tokens, padding included, up to which rows of any lengths are run together: another call would take longer."""
SLACK = 1.6
BASE = 64 << 20


@dataclass(frozen=True)
class Plan:
    """What is run at once. Rows share a batch while they have ``tokens`` in all, padding included; a longer row is
    read alone, ``chunk`` tokens at a time by causal models; and ``logits`` are made at a time."""

    tokens: int
    chunk: int
    logits: int


DEFAULT = Plan(tokens=16_384, chunk=8_192, logits=1 << 24)
"""Without a bound of memory."""

PLANS = (DEFAULT, *(Plan(size, size, size << 10) for size in (1 << power for power in range(13, 5, -1))))
"""What a bound chooses from: the first that fits. The last one is of ``SMALLEST`` tokens."""


def plan(model: Model, lengths: Sequence[int], max_memory: Size | None, *, token_bytes: int = 0) -> Plan:
    """How to run rows of these ``lengths``, each for itself, within ``max_memory`` beyond the model's own bytes.

    ``token_bytes`` is what the caller keeps of every token of all rows. None: DEFAULT, whatever it takes.
    Raises InputError, saying the least that would do, if not even chunks of SMALLEST tokens fit.
    """
    if max_memory is None:
        return DEFAULT
    bound, held = size_in_bytes(max_memory), token_bytes * sum(lengths)

    def needed(choice: Plan) -> int:
        shapes = _largest(lengths, choice, in_chunks=model.config.causal)
        return max((_needed(model, shape, choice, held) for shape in shapes), default=0)

    place = bisect.bisect_left(PLANS, True, key=lambda choice: needed(choice) <= bound)  # plans need less and less
    if place == len(PLANS):
        raise _too_small(max_memory, needed(PLANS[-1]))
    return PLANS[place]


def chunk_length(
    model: Model, rows: int, length: int, max_memory: Size | None, *, room: int | None = None, ragged: bool = False
) -> int:
    """Tokens at once of ``rows`` rows of ``length``, read together through a state, within ``max_memory``.

    The state counts: it has room for ``room`` tokens a row (None: ``length``). ``ragged``: the rows have different
    lengths. None: the default chunk. Raises InputError as ``plan`` does, for chunks of SMALLEST tokens, all rows
    together.
    """
    if max_memory is None:
        return DEFAULT.chunk
    bound = size_in_bytes(max_memory)
    powers = range(DEFAULT.chunk.bit_length() - 1, (max(1, SMALLEST // rows) - 1).bit_length() - 1, -1)
    chunks = [1 << power for power in powers]

    def needed(chunk: int) -> int:
        shape = Shape(rows, length, max(length, room or length), min(chunk, length), stateful=True, ragged=ragged)
        return _total(_blocks_bytes(*_of(model), shape), 0)

    place = bisect.bisect_left(chunks, True, key=lambda chunk: needed(chunk) <= bound)
    if place == len(chunks):
        raise _too_small(max_memory, needed(chunks[-1]))
    return chunks[place]


def group(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows to run together: at most ``tokens`` with padding, at least one row.

    Beyond ``FEW`` tokens none is more than twice as long as another, so that most of them are the rows' own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = lengths[index] * (len(batch) + 1)
        if batch and (padded > tokens or (padded > FEW and lengths[index] > 2 * lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


# --- sizes in words -------------------------------------------------------------------------------------------

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def size_in_bytes(size: Size) -> int:
    """Bytes of a number or of text: 2GiB is 2 · 1024³, 2GB and 2G are 2 · 1000³. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(size).strip().lower())
    if isinstance(size, bool) or not found or found[2] not in _UNITS or not (count := float(found[1])):
        raise InputError(
            "an amount of memory must be a positive number of bytes", given=repr(size), expected="such as 2GiB or 500MB"
        )
    return int(count * _UNITS[found[2]])


def _too_small(given: Size, least: int) -> InputError:
    unit, size = ("KiB", 1 << 10) if least < 16 << 20 else ("MiB", 1 << 20)
    return InputError(
        "max_memory is too small even for the shortest chunks",
        given=given,
        expected=f"at least {-(-least // size)}{unit} for these lengths, beside the model itself",
        fix="give more, or shorter sequences",
    )


# --- the estimate ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """``rows`` of ``length`` tokens, the last ``chunk`` of which are being read."""

    rows: int
    length: int
    room: int
    chunk: int
    stateful: bool
    ragged: bool = False


def _largest(lengths: Sequence[int], choice: Plan, *, in_chunks: bool = True) -> set[Shape]:
    """The batches that can hold most: of most tokens in whole blocks of 32, of most rows, and of the longest row.

    What cannot be read in chunks is read whole, with padding that it must be told of.
    """
    shapes = []
    for batch in group(lengths, choice.tokens):
        longest = lengths[batch[-1]]
        chunk = min(longest, choice.chunk) if in_chunks else longest
        shapes.append(Shape(len(batch), longest, longest, chunk, stateful=longest > chunk, ragged=not in_chunks))
    measures = (lambda s: s.rows * -(-s.chunk // 32), lambda s: s.rows, lambda s: s.length)
    return {max(shapes, key=measure) for measure in measures} if shapes else set()


def _needed(model: Model, shape: Shape, choice: Plan, held: int) -> int:
    """Bytes of one batch and of what the caller keeps."""
    hidden = shape.rows * shape.chunk * model.config.hidden_size * model.embedding.weight.itemsize
    wide = compute_dtype(model.embedding.weight.dtype)
    logits = max(choice.logits, shape.rows * model.config.vocab_size)
    logits = min(logits, shape.rows * shape.chunk * model.config.vocab_size)
    # logits, their logarithms and a working copy; the head in float32, where it is not kept so
    head = 0 if wide == model.embedding.weight.dtype else model.embedding.weight.numel() * wide.itemsize
    turn = 2 * hidden + 3 * logits * wide.itemsize + head
    return _total(_blocks_bytes(*_of(model), shape), held, turn)


def _of(model: Model) -> tuple[ModelConfig, torch.dtype, bool]:
    return model.config, model.embedding.weight.dtype, model.embedding.weight.device.type == "cpu"


def _total(blocks: Blocks, held: int, turn: int = 0) -> int:
    return BASE + blocks.kept + held + int(SLACK * max(blocks.working, turn))


@dataclass(frozen=True)
class Blocks:
    """Bytes that all blocks keep between two chunks, and the most that one of them needs on top while it runs."""

    kept: int
    working: int


@functools.lru_cache(maxsize=64)
def _blocks_bytes(config: ModelConfig, dtype: torch.dtype, on_cpu: bool, shape: Shape) -> Blocks:
    """The dry run of each kind of block."""
    hidden = shape.rows * shape.chunk * config.hidden_size * dtype.itemsize
    kept, working = 0, 3 * hidden  # embedding and norm
    model = _on_meta(config, dtype)
    for block_config, count in Counter(config.blocks).items():
        block = model.blocks[config.blocks.index(block_config)]
        assert isinstance(block, Block)
        of_one = _dry_run(block, config.hidden_size, dtype, shape)
        kept += count * of_one.kept
        unseen = _attention_bytes(on_cpu, shape) if isinstance(block_config.mixer, AttentionConfig) else 0
        working = max(working, hidden + of_one.working + unseen)
    return Blocks(kept, working)


def _attention_bytes(on_cpu: bool, shape: Shape) -> int:
    """What the dry run, of rows that begin together on a CPU, does not see: masks of rows that do not, as booleans and
    as floats; and scores, their exponentials and weighted sums where there is no fused operator."""
    one_query = shape.rows * shape.length
    mask = 5 * min(one_query * shape.chunk, max(one_query, MASK_ELEMENTS)) if shape.ragged else 0
    return mask + (0 if on_cpu else 3 * 4 * SCORES)


@functools.lru_cache(maxsize=4)
def _on_meta(config: ModelConfig, dtype: torch.dtype) -> Model:
    return build_model(config, device="meta", dtype=dtype).eval()


@torch.no_grad()
def _dry_run(block: Block, channels: int, dtype: torch.dtype, shape: Shape) -> Blocks:
    """Book the tensors of one block that reads its last chunk."""
    block = copy.deepcopy(block)  # which has derived nothing from its parameters yet, and forgets it afterwards
    meta = torch.device("meta")
    lengths = torch.full((shape.rows,), shape.chunk) if shape.ragged else None
    state = None
    with _Booked([*block.parameters(), *block.buffers()]) as booked:
        if shape.stateful:
            state = block.init_state(shape.rows, shape.room, device=meta, dtype=dtype)
            for name, tensor in state.named_tensors():
                if name.split(".")[-1] == "lengths":
                    tensor.fill_(shape.length - shape.chunk)
        x = torch.empty(shape.rows, shape.chunk, channels, dtype=dtype, device=meta)
        y = block(x, lengths) if state is None else block.extend(x, state, lengths)
        peak = booked.peak
        del x, y
        kept = booked.bytes
    return Blocks(kept, peak - kept)


class _Booked(TorchDispatchMode):
    """Bytes of the meta tensors that operations made and that still live, and the most there were.

    Storages are booked, so views are free; those of ``others`` were there before.
    """

    def __init__(self, others: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._book(tensor.untyped_storage())
        return result

    def _book(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size

"""One token of a stack of layers as a program of native operations, with weights packed for products with few rows.

A ``Program`` is written once: each method appends one operation on named buffers [b width], and packs the weights that
it needs; what ``runner`` returns then does a stretch of it in one call. A step spends its time on reading matrices.
They are read where they are, or packed in bfloat16 (widened in registers, sums in float32) or in 8 bits: a scale an
output for the weights; inputs in 16 bits, a scale a row, found as it comes, so that the weights alone cost accuracy;
sums of whole numbers between. Everything else (norms, FIR taps, poles, states, attention) stays in float32, or float64.

No torch op: a step writes into a whole state by address, which no schema can say. Nothing of it is differentiable.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.ops.kernels.activation import ACTIVATIONS
from crocuta.ops.kernels.library import contiguous, function, library
from crocuta.ops.kernels.memory import empty
from crocuta.ops.kernels.norm import Norm

Weights: TypeAlias = Literal["float32", "bfloat16", "int8"]

BLOCK = 32
"""Outputs of a packed block: kBlockRows of cpp/decode_linear.h."""
RECORD = 12
"""Integers of an operation: kRecord of cpp/decode.cpp."""
LONGEST_SUM = 1 << 16
"""Inputs that a product in 8 bits can have: 2^16 products of 255 · 127, half an input and a weight, fit 32 bits."""
LARGEST_HEAD = 1024
"""Size of a head that can be rotated: kMaxHead of cpp/decode_mixers.h."""

_FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}

_PIECE = 1 << 25
"""Bytes of memory that is asked for at once; what of it is never written takes no room."""
_LINES = 128
"""Bytes at whose multiples matrices begin: two cache lines, which machines fetch together."""

_SIGNATURE = "piippppii"
_SHARED = 1 << 16
"""Logits that it pays to wake other threads for."""


class Buffer(enum.IntEnum):
    """Where operations read and write; the order is that of cpp/decode.cpp."""

    STREAM = 0
    NORMED = 1
    WIDE = 2
    GATE = 3
    INPUT = 4
    MIXED = 5
    MIDDLE = 6
    LOGITS = 7
    SCRATCH = 8


class Finish(enum.IntEnum):
    """What a product does with its sums: cpp/decode_linear.h."""

    STORE = 0
    ADD = 1
    ACTIVATE = 2
    GATED = 3


class _Operation(enum.IntEnum):
    EMBED = 0
    NORM = 1
    LINEAR = 2
    SHORT_FILTER = 3
    MODAL = 4
    LONG_FIR = 5
    ONLINE = 6
    RESIDUAL = 7
    ATTENTION = 8
    COUNT = 9


@dataclass(frozen=True)
class Packed:
    """A matrix [c k] in blocks of outputs, padded with zeros to whole blocks; or where it is, of rows."""

    format: int
    weights: Tensor
    second: Tensor | None
    """int8: the scale of each output. In place: the matrix that is gated, where ``weights`` is the gate."""
    offsets: Tensor | None
    """int8: 128 times the sum of an output's weights, which unsigned inputs are too much by."""
    outputs: int
    inputs: int


def pack(matrix: Float[Tensor, "c k"], weights: Literal["bfloat16", "int8"]) -> Packed:
    """A matrix in narrow numbers as the native product reads it. Layouts: cpp/decode_linear.h."""
    (outputs, inputs), matrix = matrix.shape, matrix.detach()
    matrix = F.pad(matrix, (0, 0, 0, -outputs % BLOCK))
    blocks, made = len(matrix) // BLOCK, (outputs, inputs)
    match weights:
        case "bfloat16":
            pairs = matrix.to(torch.bfloat16).view(blocks, 2, BLOCK // 2, inputs)
            return Packed(_FORMATS[weights], pairs.permute(0, 3, 2, 1).contiguous(), None, None, *made)
        case "int8":
            scales = matrix.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
            whole = F.pad((matrix / scales[:, None]).round().to(torch.int8), (0, -inputs % 4))
            offsets = 128 * whole.sum(1, dtype=torch.int32)
            fours = whole.view(blocks, BLOCK, -1, 4).transpose(1, 2).contiguous()
            return Packed(_FORMATS[weights], fours, scales.float().contiguous(), offsets.to(torch.int32), *made)


def interleave(gate: Float[Tensor, "i ..."], up: Float[Tensor, "i ..."]) -> Float[Tensor, "c ..."]:
    """Blocks of rows of both in turn, as a gated product wants them; each is padded to whole blocks."""
    rest = [0, 0] * (gate.ndim - 1) + [0, -len(gate) % BLOCK]
    pairs = [F.pad(part.detach(), rest).unflatten(0, (-1, BLOCK)) for part in (gate, up)]
    return torch.stack(pairs, 1).flatten(0, 2)


class Addresses:
    """Integers that native code reads: addresses of tensors, which the caller keeps, and whole numbers as they are."""

    def __init__(self, values: Sequence[Tensor | int] | Sequence[Sequence[int]]) -> None:
        plain = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
        self._tensor = torch.tensor(plain, dtype=torch.int64)
        self.address: int = self._tensor.data_ptr()


class _Shelf:
    """Memory in huge pages, where packed matrices stand in the order in which a step reads them."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def put(self, matrix: Tensor) -> Tensor:
        """A copy that stands behind the last one."""
        size = -(-matrix.nbytes // _LINES) * _LINES
        if size > len(self._free):
            self._free = empty(matrix, max(size, _PIECE), dtype=torch.uint8)
        place, self._free = self._free[: matrix.nbytes], self._free[size:]
        return place.view(matrix.dtype).view(matrix.shape).copy_(matrix)


class Program:
    """Operations on one token of each row, in the order in which they were appended.

    A place of the state is an integer that ``slot`` gives out; ``run`` wants the address of a tensor for each.
    """

    def __init__(self, dtype: torch.dtype, weights: Weights) -> None:
        self.dtype = dtype
        self.weights: Weights = weights
        self.slots = 0
        self._records: list[list[int]] = []
        self._kept: list[Tensor] = []
        self._shelf = _Shelf()
        self._borrowed: list[Tensor] = []
        self._widths = dict.fromkeys(Buffer, 1)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and constants, without what is read where it is."""
        return sum(t.nbytes for t in self._kept)

    def slot(self, count: int = 1) -> int:
        """The first of so many new places of the state."""
        self.slots += count
        return self.slots - count

    def reserve(self, width: int, buffer: Buffer) -> int:
        """Make a buffer at least so wide, for what is written outside the program; returns the width."""
        self._width(width, buffer)
        return width

    # --- operations ---

    def embed(self, table: Float[Tensor, "v d"]) -> None:
        """STREAM = the rows of the ids. The table is used where it is, which must have channels side by side."""
        self._borrowed.append(table.detach())
        self._width(table.shape[1], Buffer.STREAM)
        self._append(_Operation.EMBED, table.data_ptr(), table.stride(0), table.shape[1])

    def norm(self, kind: Norm, scale: Float[Tensor, " d"], bias: Float[Tensor, " d"] | None, eps: float) -> None:
        """NORMED = the norm of STREAM."""
        self._width(len(scale), Buffer.STREAM, Buffer.NORMED)
        self._append(_Operation.NORM, kind, self._own(scale), self._own(bias), _bits(eps), len(scale))

    def linear(
        self,
        matrix: Float[Tensor, "c k"],
        bias: Float[Tensor, " c"] | None,
        source: Buffer,
        target: Buffer,
        finish: Finish = Finish.STORE,
        activation: str = "identity",
    ) -> None:
        """target = act(W source + bias), or with ADD target += W source + bias."""
        packed = self._fit(matrix)
        self._product(packed, bias, (source, target), finish, activation, len(matrix))

    def gated(self, gate: Tensor, up: Tensor, biases: tuple[Tensor, Tensor] | None, activation: str) -> None:
        """MIDDLE = act(gate · NORMED) · (up · NORMED)."""
        bias = None if biases is None else interleave(*biases)
        packed = self._fit(gate, up)
        buffers = Buffer.NORMED, Buffer.MIDDLE
        self._product(packed, bias, buffers, Finish.GATED, activation, 2 * len(gate))

    def short_filter(self, taps: Float[Tensor, "c k"], bias: Float[Tensor, " c"] | None) -> int:
        """GATE, INPUT = x2, x1 · v of the FIR of WIDE [b 3d]; returns the slot of its tail [b k-1 3d]."""
        channels, slot = len(taps) // 3, self.slot()
        self._width(channels, Buffer.GATE, Buffer.INPUT)
        rows = self._own(taps.flip(1).t())
        self._append(_Operation.SHORT_FILTER, rows, self._own(bias), taps.shape[1], channels, slot)
        return slot

    def modal(self, poles: Tensor, residues: Tensor, skip: Float[Tensor, " d"] | None) -> int:
        """MIXED = GATE · (modal filter of INPUT), for poles and residues [d n], complex or real.

        Returns the slot of the modes, as rows [b zn d]: the real parts of all modes, then the imaginary ones.
        """
        (channels, modes), slot = poles.shape, self.slot()
        parts = [f(t) for t in (poles, residues) for f in ((torch.real, torch.imag) if t.is_complex() else (_same,))]
        constants = self._own(torch.stack(parts).transpose(1, 2))
        self._width(channels, Buffer.MIXED)
        self._append(_Operation.MODAL, constants, self._own(skip), modes, int(poles.is_complex()), channels, slot)
        return slot

    def long_fir(self, taps: Float[Tensor, "d k"], skip: Float[Tensor, " d"] | None) -> int:
        """MIXED = GATE · (FIR of INPUT); returns the slot of its tail [b k-1 d]."""
        slot = self.slot()
        self._width(len(taps), Buffer.MIXED)
        self._append(_Operation.LONG_FIR, self._own(taps.flip(1).t()), self._own(skip), taps.shape[1], len(taps), slot)
        return slot

    def online(self, channels: int) -> int:
        """MIXED = GATE · (online convolution of INPUT); lengths grow by one.

        Returns the first of two slots: what is ``bound`` (crocuta.ops.kernels.online_conv), and lengths [b].
        """
        slot = self.slot(2)
        self._width(channels, Buffer.MIXED)
        self._append(_Operation.ONLINE, channels, slot)
        return slot

    def residual(self, channels: int) -> None:
        """STREAM += MIXED."""
        self._width(channels, Buffer.MIXED)
        self._append(_Operation.RESIDUAL, channels)

    def attention(
        self, heads: int, kv_heads: int, head_size: int, inverse: Float[Tensor, " c"] | None, scale: float
    ) -> int:
        """MIXED = attention of WIDE [b (heads + 2 kv_heads) c]; positions are divided by ``scale`` and rotate.

        Returns the first of four slots: keys and values [b p m c], lengths [b], and p itself.
        """
        slot = self.slot(4)
        self._width(heads * head_size, Buffer.MIXED)
        frequencies = self._own(inverse)
        self._append(_Operation.ATTENTION, heads, kv_heads, head_size, frequencies, _bits(scale), slot)
        return slot

    def count(self) -> int:
        """Add one to every length; returns the slot of the lengths [b]."""
        slot = self.slot()
        self._append(_Operation.COUNT, slot)
        return slot

    # --- running ---

    def buffers(self, rows: int) -> list[Tensor]:
        """Memory for so many rows, by ``Buffer``; that of the logits is for the caller to give."""
        widest = max((r[7] for r in self._records if r[0] == _Operation.LINEAR), default=1)
        made = [torch.empty(rows, self._widths[buffer], dtype=self.dtype) for buffer in Buffer]
        made[Buffer.LOGITS] = torch.empty(0, dtype=self.dtype)
        made[Buffer.SCRATCH] = torch.empty(rows * (2 * widest + 16), dtype=torch.uint8)
        return made

    def runner(self) -> Callable[[int, int, int, int, Tensor, Tensor], None]:
        """run(first, last, buffers, states, ids, logits): operations [first, last).

        Buffers and states are the addresses of lists of addresses (``Addresses``), which is a few µs a token faster
        than tensors.
        """
        padded = [record + [0] * (RECORD - len(record)) for record in self._records]
        program = Addresses(padded)
        opened = library()
        assert opened is not None, "who writes a program has asked for compiled kernels"
        decode = opened.symbol("decode", self.dtype, _SIGNATURE)

        def run(first: int, last: int, buffers: int, states: int, ids: Tensor, logits: Tensor) -> None:
            places = buffers, states, ids.data_ptr(), logits.data_ptr()
            decode(program.address, first, last, *places, ids.shape[0], torch.get_num_threads())

        return run

    # --- records ---

    def _fit(self, matrix: Float[Tensor, "c k"], gated: Float[Tensor, "c k"] | None = None) -> Packed:
        """A matrix, or one and what it gates, as the native product reads it."""
        if self.weights != "float32":
            packed = pack(matrix if gated is None else interleave(matrix, gated), self.weights)
            packed = replace(packed, weights=self._shelf.put(packed.weights))
            self._kept += [t for t in (packed.weights, packed.second, packed.offsets) if t is not None]
            return packed
        second = None if gated is None else self._in_place(gated)
        return Packed(_FORMATS[self.weights], self._in_place(matrix), second, None, *matrix.shape)

    def _in_place(self, matrix: Float[Tensor, "c k"]) -> Tensor:
        """The very memory of a matrix whose rows lie one after the other in the program's dtype; else a copy."""
        rows = matrix.detach().to(self.dtype).contiguous()
        (self._borrowed if rows.data_ptr() == matrix.data_ptr() else self._kept).append(rows)
        return rows

    def _product(
        self,
        packed: Packed,
        bias: Tensor | None,
        buffers: tuple[Buffer, Buffer],
        finish: Finish,
        activation: str,
        outputs: int,
    ) -> None:
        source, target = buffers
        offset = None if bias is None else F.pad(bias.detach(), (0, -len(bias) % BLOCK))
        places = [0 if t is None else t.data_ptr() for t in (packed.weights, packed.second, packed.offsets)]
        self._width(packed.inputs, source)
        self._width(outputs // 2 if finish is Finish.GATED else outputs, target)
        self._append(
            _Operation.LINEAR,
            *(packed.format, *places, self._own(offset), outputs, packed.inputs),
            *(source, target, finish, ACTIVATIONS[activation]),
        )

    def _append(self, operation: _Operation, *operands: int) -> None:
        self._records.append([int(operation), *map(int, operands)])

    def _own(self, tensor: Tensor | None) -> int:
        """The address of a copy in the program's dtype, or 0."""
        if tensor is None:
            return 0
        self._kept.append(tensor.detach().to(self.dtype, copy=True).contiguous())
        return self._kept[-1].data_ptr()

    def _width(self, width: int, *buffers: Buffer) -> None:
        for buffer in buffers:
            self._widths[buffer] = max(self._widths[buffer], width)


def sample(
    logits: Float[Tensor, "b v"],
    uniform: Float[Tensor, " b"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """One token a row from float32 logits and a uniform number of [0, 1), float64; and its log-probability.

    The rules are those of ``crocuta.inference.sampling.sample``, without its penalty for repetition; temperature 0
    takes the largest logit. Where logits are no distribution (NaN, +inf, or only -inf) the id is -1, which is for the
    caller to see to. A row's token depends on that row alone.
    """
    rows, vocab_size = logits.shape
    options = _options(temperature, 1.0 if top_p is None else top_p, min_p or 0.0)
    ids, log_probs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    draw = function("sample", torch.float32, "pppippiii")
    most = vocab_size if top_k is None else min(top_k, vocab_size)
    threads = torch.get_num_threads() if logits.numel() > _SHARED else 1
    draw(*contiguous(logits, uniform), options.address, most, ids, log_probs, rows, vocab_size, threads)
    return ids, log_probs


@functools.lru_cache(maxsize=64)
def _options(*values: float) -> Addresses:
    """Real numbers that native code reads."""
    return Addresses([_bits(value) for value in values])


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _bits(value: float) -> int:
    """A float64 as an integer of the same bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0]

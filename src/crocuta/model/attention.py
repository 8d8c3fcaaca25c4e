"""The attention mixer: grouped queries, rotary positions, keys and values of earlier tokens."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.config import AttentionConfig, Precision, RopeConfig
from crocuta.errors import StateError
from crocuta.model.linear import Linear
from crocuta.model.mixer import Mixer, looks_ahead
from crocuta.model.precision import Float32Module
from crocuta.model.state import AttentionState, PlacedAttentionState, State, check_room
from crocuta.ops.attention import attention_step, causal_attention, full_attention
from crocuta.ops.rope import inverse_frequencies, rotate, rotation
from crocuta.types import Hidden

Tables: TypeAlias = tuple[Float[Tensor, "b l 1 c"], Float[Tensor, "b l 1 c"]]
"""cos and sin."""


class AttentionMixer(Mixer):
    """softmax(q kᵀ/√c) v per head; the rows of ``qkv`` are [q heads | k heads | v heads]."""

    def __init__(self, config: AttentionConfig, channels: int, precision: Precision = "exact") -> None:
        super().__init__()
        self.causal = config.causal
        self.heads = config.num_heads
        self.kv_heads = config.num_kv_heads or config.num_heads
        self.head_size = channels // config.num_heads
        self.qkv = Linear(channels, (self.heads + 2 * self.kv_heads) * self.head_size, bias=config.qkv_bias)
        self.rope = None if config.rope is None else Rope(config.rope, self.head_size, precision)
        self.output = Linear(channels, channels, bias=config.output_bias)

    def forward(self, x: Hidden, lengths: Tensor | None = None) -> Hidden:
        q, k, v = self._heads(x, torch.zeros(len(x), dtype=torch.int64))
        if not self.causal:
            return self.output(full_attention(q, k, v, lengths).flatten(2))
        return self.output(causal_attention(q, k, v, None).flatten(2))

    def init_state(
        self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype
    ) -> AttentionState:
        if not self.causal:
            raise looks_ahead()
        if max_length is None:
            raise StateError(
                "an attention layer needs to know how many tokens to make room for",
                given="max_length=None",
                expected="a number",
                fix="pass max_length",
            )
        shape = (batch, max_length, self.kv_heads, self.head_size)
        keys, values = (
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )
        return AttentionState(keys, values, torch.zeros(batch, dtype=torch.int64))

    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        if isinstance(state, PlacedAttentionState):
            return self._step(x, state)
        assert isinstance(state, AttentionState)
        b, l, _ = x.shape
        starts = state.lengths
        added = torch.full((b,), l) if lengths is None else lengths.cpu()
        check_room(starts, added, state.keys.shape[1], "attention")
        q, k, v = self._heads(x, starts)
        aligned = bool((starts == starts[0]).all())
        self._remember(state, k, v, aligned and lengths is None)
        state.lengths = starts + added
        if aligned and int(starts[0]) == 0:
            return self.output(causal_attention(q, k, v, None).flatten(2))
        end = int(starts.max()) + l  # no longer than the buffer; keys of padding stand behind every token that counts
        return self.output(causal_attention(q, state.keys[:, :end], state.values[:, :end], starts).flatten(2))

    def _step(self, x: Hidden, state: PlacedAttentionState) -> Hidden:
        """One token a row. The host sees no number: every step is the same operations on the same memory."""
        assert x.shape[1] == 1
        tables = None if self.rope is None else self.rope.at(state.positions, x.dtype)
        q, k, v = self._rotated(x, tables)
        place = state.positions[:, None, None, None].expand(k.shape)
        state.keys.scatter_(1, place, k.to(state.keys.dtype))
        state.values.scatter_(1, place, v.to(state.values.dtype))
        return self.output(attention_step(q, state.keys, state.values, state.positions).flatten(2))

    def _heads(self, x: Hidden, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._rotated(x, None if self.rope is None else self.rope(x, starts))

    def _rotated(self, x: Hidden, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.heads * self.head_size, self.kv_heads * self.head_size, self.kv_heads * self.head_size]
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in self.qkv(x).split(sizes, dim=-1))
        if tables is None:
            return q, k, v
        return rotate(q, *tables), rotate(k, *tables), v

    @staticmethod
    def _remember(state: AttentionState, k: Tensor, v: Tensor, whole: bool) -> None:
        l, starts = k.shape[1], state.lengths.tolist()
        if whole:
            state.keys[:, starts[0] : starts[0] + l] = k
            state.values[:, starts[0] : starts[0] + l] = v
            return
        for row, start in enumerate(starts):  # what lies past a row's own length is masked, so padding may be written
            end = min(start + l, state.keys.shape[1])
            state.keys[row, start:end] = k[row, : end - start]
            state.values[row, start:end] = v[row, : end - start]


class Rope(Float32Module):
    """Angles of the rotary embedding; ``inverse`` is a stored tensor only where the checkpoint gives one."""

    def __init__(self, config: RopeConfig, head_size: int, precision: Precision = "exact") -> None:
        super().__init__()
        self.config = config
        self.head_size = head_size
        self._round_tables = precision == "upstream"
        self.inverse: Tensor | None
        self.register_buffer("inverse", torch.empty(head_size // 2) if config.stored else None)
        self._placed: dict[torch.device, Tensor] = {}
        """Where it is not stored, the copy on each device that steps have run on: a CUDA graph cannot make one."""

    def forward(self, x: Hidden, starts: Tensor) -> Tables:
        """cos and sin for the tokens of x [b l d], whose rows begin at position ``starts`` [b]: float32, or float64
        for a float64 x, on x's device. Upstream precision rounds their values to x's dtype."""
        aligned = not torch.compiler.is_compiling() and bool((starts == starts[0]).all())
        positions = (starts[:1] if aligned else starts)[:, None] + torch.arange(x.shape[1])
        if self.inverse is None:
            inverse = inverse_frequencies(self.head_size, self.config.base).to(x.device)
        else:
            inverse = self.inverse
        cosine, sine = self._tables(self._scaled(positions, x.dtype).to(x.device), inverse, x.dtype)
        return cosine.expand(len(x), -1, -1, -1), sine.expand(len(x), -1, -1, -1)

    def at(self, positions: Int[Tensor, " b"], dtype: torch.dtype) -> Tables:
        """The same for one token a row, at positions that may lie on a GPU and need not come to the host."""
        inverse = self._placed.get(positions.device) if self.inverse is None else self.inverse
        if inverse is None:
            inverse = inverse_frequencies(self.head_size, self.config.base).to(positions.device)
            self._placed[positions.device] = inverse
        return self._tables(self._scaled(positions[:, None], dtype), inverse, dtype)

    def _scaled(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return (positions.to(torch.float64) / self.config.scale).to(torch.promote_types(dtype, torch.float32))

    def _tables(self, scaled: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tables:
        cosine, sine = rotation(scaled, inverse, dtype)
        if self._round_tables:
            cosine, sine = cosine.to(dtype).to(cosine.dtype), sine.to(dtype).to(sine.dtype)
        return cosine, sine

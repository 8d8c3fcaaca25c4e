"""The attention mixer: grouped queries, rotary positions, keys and values of earlier tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.config import AttentionConfig, Precision, RopeConfig
from crocuta.errors import StateError
from crocuta.model.linear import Linear
from crocuta.model.mixer import Mixer, looks_ahead
from crocuta.model.precision import Float32Module
from crocuta.model.state import AttentionState, State, check_room
from crocuta.ops.attention import causal_attention, full_attention
from crocuta.ops.rope import inverse_frequencies, rotate, rotation
from crocuta.types import Hidden


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

    def _heads(self, x: Hidden, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.heads * self.head_size, self.kv_heads * self.head_size, self.kv_heads * self.head_size]
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in self.qkv(x).split(sizes, dim=-1))
        if self.rope is None:
            return q, k, v
        tables = self.rope(x, starts)
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

    def forward(self, x: Hidden, starts: Tensor) -> tuple[Float[Tensor, "b l 1 c"], Float[Tensor, "b l 1 c"]]:
        """cos and sin for the tokens of x [b l d], whose rows begin at position ``starts`` [b]: float32, or float64
        for a float64 x, on x's device. Upstream precision rounds their values to x's dtype."""
        if self.inverse is None:
            inverse = inverse_frequencies(self.head_size, self.config.base).to(x.device)
        else:
            inverse = self.inverse
        aligned = not torch.compiler.is_compiling() and bool((starts == starts[0]).all())
        positions = (starts[:1] if aligned else starts)[:, None] + torch.arange(x.shape[1])
        scaled = (positions.to(torch.float64) / self.config.scale).to(torch.promote_types(x.dtype, torch.float32))
        cosine, sine = rotation(scaled.to(x.device), inverse, x.dtype)
        if self._round_tables:
            cosine, sine = cosine.to(x.dtype).to(cosine.dtype), sine.to(x.dtype).to(sine.dtype)
        return cosine.expand(len(x), -1, -1, -1), sine.expand(len(x), -1, -1, -1)

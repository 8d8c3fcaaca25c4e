"""The model that maps ids to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from crocuta.config.blocks import BlockConfig, check_blocks, is_causal, max_length_of
from crocuta.config.checks import positive, require, share
from crocuta.config.layers import NormConfig, RMSNormConfig
from crocuta.schema import decode_json, encode

Precision: TypeAlias = Literal["exact", "upstream"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """ids [b l] -> logits [b l v]: embedding, blocks, final norm, head."""

    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockConfig, ...]
    norm: NormConfig = RMSNormConfig()
    tie_embeddings: bool = True
    embedding_dropout: float = 0.0
    precision: Precision = "exact"
    """exact: ops compute in float32 and round their results, and logits are float32. upstream: below float32, and only
    there, values are rounded to the model's dtype wherever StripedHyena, Evo and Evo 2 round them:

    - RMSNorm with eps outside the root: the norm ‖x‖₂, ‖x‖₂ · d^-1/2, that plus eps, x divided by that, times scale;
    - rotary embedding: the cosines and sines, before the float32 rotation;
    - short filter: its sum, that plus the bias, and the gate x1 · v. (StripedHyena 1 runs it in bfloat16, 2 in float32
      with a cast after it: the same numbers, since a convolution in bfloat16 adds up in float32);
    - explicit and implicit long filters: h ∗ u + D·u, summed in float32; then the gate x2 · (...);
    - modal long filters: h ∗ u, D·u, their sum, and the gate;
    - output projection of Hyena: the product, then that plus the bias;
    - head: the product, so that logits have the model's dtype, and in ``score`` their log-softmax.

    These are the steps that read a whole sequence; decoding takes the same ones, so that ``extend`` still is
    ``forward``, where the published decoders round a little differently. Everything else rounds alike in both modes.
    """
    unverified: str = ""
    """Why results of this checkpoint are not known to agree with its publisher's; empty if there is no doubt."""

    def __post_init__(self) -> None:
        positive("ModelConfig", vocab_size=self.vocab_size, hidden_size=self.hidden_size)
        share("ModelConfig", embedding_dropout=self.embedding_dropout)
        require(
            self.precision in ("exact", "upstream"),
            "ModelConfig.precision is unknown",
            self.precision,
            "exact or upstream",
        )
        check_blocks(self.blocks, self.hidden_size)

    @property
    def max_length(self) -> int | None:
        """The longest sequence that every filter is defined for, or None where no filter sets a limit."""
        return max_length_of(self.blocks)

    @property
    def causal(self) -> bool:
        """Whether the model can be read in pieces and generate: no mixer of it looks ahead."""
        return all(is_causal(block.mixer) for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object; ``ModelConfig.from_json`` is its inverse."""
        return encode(self)

    @classmethod
    def from_json(cls, value: Any) -> ModelConfig:
        """Strict inverse of ``to_json``; also takes the text itself. Raises ConfigError."""
        return decode_json(cls, value)

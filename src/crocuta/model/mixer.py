"""The contract of everything that mixes along length."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from crocuta.errors import StateError
from crocuta.model.state import State
from crocuta.types import Hidden


class Mixer(nn.Module, ABC):
    """Law: ``forward(cat(a, b)) == cat(extend(a, s), extend(b, s))`` for every way of cutting a sequence."""

    @abstractmethod
    def forward(self, x: Hidden, lengths: Tensor | None = None) -> Hidden:
        """Mix whole sequences that start here.

        Positions past ``lengths[row]`` (None: none) are padding, which no position of the row itself may see. For a
        causal mixer that is so in any case.
        """

    @abstractmethod
    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token, with room for ``max_length`` tokens where room matters."""

    @abstractmethod
    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        """Mix the next tokens of each row and update ``state``. Positions past ``lengths[row]`` are padding.

        Made for inference: gradients flow through the states of FIR and modal filters, but the buffers of attention
        and of online convolutions are written in place, and torch refuses to differentiate through two such calls.
        """


class NonCausalMixer(Mixer):
    """Base of mixers that look ahead: whole sequences only."""

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> State:
        raise looks_ahead()

    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        raise looks_ahead()


def looks_ahead() -> StateError:
    """Of what only a causal mixer can do."""
    return StateError(
        "a model that looks ahead cannot read a sequence in pieces, nor generate",
        given="a bidirectional block",
        expected="causal blocks",
        fix="use model.hidden on whole sequences, or crocuta.embed",
    )

"""torch's Linear and Embedding without torch's own initialisation, which ``init.initialise`` would only overwrite.

On the meta device that initialisation also imports torch's compiler: seconds, before a model is even loaded.
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from crocuta.ops.linear import linear
from crocuta.ops.mlp import Affine


@final
class Linear(nn.Linear):
    """W x + bias; the parameters hold no values until they are initialised or loaded."""

    def forward(self, input: Tensor) -> Tensor:  # the name is torch's
        return linear(input, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: see the module."""


@final
class Embedding(nn.Embedding):
    """Rows of a table; holds no values until it is initialised or loaded."""

    def reset_parameters(self) -> None:
        """Nothing: see the module."""


def affine(layer: nn.Module) -> Affine:
    """The weight and the bias of a Linear, or of what stands in its place."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return Affine(weight, bias)

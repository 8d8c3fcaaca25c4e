"""torch's Linear and Embedding without torch's own initialisation, which ``init.initialise`` would only overwrite.

On the meta device that initialisation also imports torch's compiler: seconds, before a model is even loaded.
"""

from __future__ import annotations

from typing import final

from torch import nn


@final
class Linear(nn.Linear):
    """W x + bias; the parameters hold no values until they are initialised or loaded."""

    def reset_parameters(self) -> None:
        """Nothing: see the module."""


@final
class Embedding(nn.Embedding):
    """Rows of a table; holds no values until it is initialised or loaded."""

    def reset_parameters(self) -> None:
        """Nothing: see the module."""

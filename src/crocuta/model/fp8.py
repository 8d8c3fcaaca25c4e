"""A linear layer in FP8 with the constant scales of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crocuta.model.precision import Memo
from crocuta.ops.fp8 import fp8_linear, quantise


@final
class FP8Linear(nn.Linear):
    """W x + bias with W and x rounded to E4M3 under ``weight_scale`` and ``input_scale``; see ``ops.fp8``.

    Evo 2 was trained through this rounding. Its scales were adapted while training; here, as at inference there, they
    are constants, float32 or wider whatever the model's dtype, and 1 in a fresh model. The weight is kept as it is,
    and while gradients are off also in FP8, one byte a number.
    """

    input_scale: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("input_scale", torch.empty(()))
        self.register_buffer("weight_scale", torch.empty(()))
        self._memo = Memo()

    def reset_parameters(self) -> None:
        """Nothing: see ``model.linear``."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b c"]:
        """The result has its tokens contiguous in memory, as ``project`` of ``model.hyena`` wants them."""
        wq = self._memo.get("weight", [self.weight, self.weight_scale], self._quantised)
        scales = self.input_scale, self.weight_scale
        y = fp8_linear(x.reshape(-1, self.in_features), self.weight, self.bias, scales, wq)
        return y.view(-1, *x.shape[:-1]).movedim(0, -1)

    def _quantised(self) -> Tensor:
        return quantise(self.weight, self.weight_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_scale = tensor is self.input_scale or tensor is self.weight_scale
            if not is_scale or moved.dtype.itemsize >= 4:
                return moved
            return tensor.to(moved.device, torch.promote_types(tensor.dtype, torch.float32))

        return super()._apply(keep, recurse)

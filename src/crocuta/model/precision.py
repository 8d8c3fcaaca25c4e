"""Modules whose numbers decide science: they stay in float32 by type, whatever the model is cast to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Float32Module(nn.Module):
    """Base of modules whose floating parameters and buffers never fall below float32.

    ``model.to(torch.bfloat16)`` moves them but leaves their dtype; float64 is taken. bf16 would turn a pole of
    0.999 into 1.0.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.promote_types(tensor.dtype, torch.float32)) if narrow else moved

        return super()._apply(keep, recurse)


_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Memo:
    """Keeps what inference derives from parameters (tables, taps, spectra) until a parameter changes.

    Nothing is kept while gradients are on, so training always differentiates through the derivation, nor of
    parameters made in ``torch.inference_mode``, which do not count their changes. The kept entry holds the
    parameters' storage, so an address cannot be reused, for another dtype say, while it serves as part of the key.
    The steps of optimisers are part of it too, because fused ones change parameters without counting it. A change
    through ``parameter.data`` in place is not seen.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[object, ...], list[Tensor], Any]] = {}

    def get(self, name: str, parameters: Sequence[Tensor], compute: Callable[[], Any], variant: object = None) -> Any:
        """The value of ``compute()`` for these parameters and this variant (one variant a name is kept)."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            self._entries.clear()
            return compute()
        key = (variant, _optimizer_steps, *[(p.data_ptr(), p._version) for p in parameters])
        entry = self._entries.get(name)
        if entry is None or entry[0] != key:
            self._entries[name] = entry = (key, [p.detach() for p in parameters], compute())
        return entry[2]

    def kept(self) -> object:
        """All that is kept now; it stays in memory for as long as somebody holds this."""
        return list(self._entries.values())

    def __deepcopy__(self, memo: object) -> Memo:
        return Memo()

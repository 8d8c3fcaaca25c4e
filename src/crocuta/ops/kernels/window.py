"""The window of implicit filters, compiled: taps · (e^(-rate t) + shift) in one pass, without a window in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from crocuta.ops.kernels.library import contiguous, function
from crocuta.ops.kernels.memory import empty

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define("decay_window(Tensor taps, Tensor rates, float shift, float delta) -> Tensor")
_ops.define(
    "decay_window_backward(Tensor dy, Tensor taps, Tensor rates, float shift, float delta, bool of_rates)"
    " -> (Tensor dtaps, Tensor drates)"
)


def _forward(taps: Tensor, rates: Tensor, shift: float, delta: float) -> Tensor:
    assert (rates.shape, rates.dtype) == (taps.shape[:1], taps.dtype), "a rate a group, in the dtype of the taps"
    y = empty(taps, *taps.shape)
    taps, rates = contiguous(taps, rates)
    function("window_forward", y.dtype, "ppddpiii")(taps, rates, shift, delta, y, *y.shape, torch.get_num_threads())
    return y


def _backward(
    dy: Tensor, taps: Tensor, rates: Tensor, shift: float, delta: float, of_rates: bool
) -> tuple[Tensor, Tensor]:
    dtaps, drates = _gradients(dy, taps, rates, shift, delta, of_rates)
    dy, taps, rates = contiguous(dy, taps, rates)
    run = function("window_backward", dy.dtype, "pppddppiii")
    threads = torch.get_num_threads()
    run(dy, taps, rates, shift, delta, dtaps, drates if of_rates else None, *dtaps.shape, threads)
    return dtaps, drates


def _gradients(dy, taps, rates, shift, delta, of_rates):
    return empty(taps, *taps.shape), rates.new_empty(len(rates) if of_rates else 0)


def _setup(ctx, inputs, output) -> None:
    taps, rates, ctx.shift, ctx.delta = inputs
    ctx.save_for_backward(taps, rates)


def _adjoint(ctx, dy):
    taps, rates = ctx.saved_tensors
    of_rates = ctx.needs_input_grad[1]
    given = dy, taps, rates, ctx.shift, ctx.delta, of_rates
    dtaps, drates = torch.ops.crocuta.decay_window_backward(*given)
    return dtaps, drates if of_rates else None, None, None


_ops.impl("decay_window", _forward, "CPU")
_ops.impl("decay_window_backward", _backward, "CPU")
torch.library.register_fake("crocuta::decay_window", lambda taps, *_: taps.new_empty(taps.shape), lib=_ops)
torch.library.register_fake("crocuta::decay_window_backward", _gradients, lib=_ops)
torch.library.register_autograd("crocuta::decay_window", _adjoint, setup_context=_setup, lib=_ops)

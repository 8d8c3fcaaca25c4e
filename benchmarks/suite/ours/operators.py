"""Operators of crocuta, through the filter modules and ops that the models use; channels-last in and out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from crocuta.config import ComplexModalFilterConfig, ExplicitFilterConfig, ImplicitFilterConfig, RealModalFilterConfig
from crocuta.model.filters import ExplicitFilter, Filter, ImplicitFilter, build_filter
from crocuta.ops.fft_conv import fft_convolution
from crocuta.ops.gate import fir_gate as fused_fir_gate
from crocuta.ops.kernels.library import switched_off
from suite.steps import operator_training
from suite.task import Settings, Task, Tensors

CPU = torch.device("cpu")


def modal_prefill(inputs: Tensors, sizes: Settings) -> Task:
    """Output and final state of a complex modal filter."""
    return _prefill(_complex_filter(inputs, sizes), inputs)


def real_modal_prefill(inputs: Tensors, sizes: Settings) -> Task:
    """The same with real poles."""
    config = RealModalFilterConfig(modes=sizes["modes"], poles="raw")
    return _prefill(_filled(config, sizes, log_poles=inputs["log_poles"], residues=inputs["residues"]), inputs)


def modal_training(inputs: Tensors, sizes: Settings) -> Task:
    """Forward and backward."""
    filter_ = _complex_filter(inputs, sizes)
    leaves = {"u": inputs["u"], "skip": inputs["skip"], **dict(filter_.named_parameters())}
    return operator_training(lambda: filter_.convolve(leaves["u"], leaves["skip"]), leaves, inputs["dy"], {})


def modal_prefill_on_torch(inputs: Tensors, sizes: Settings) -> Task:
    return _on_torch(modal_prefill(inputs, sizes))


def modal_training_on_torch(inputs: Tensors, sizes: Settings) -> Task:
    return _on_torch(modal_training(inputs, sizes))


def long_convolution(inputs: Tensors, _: Settings) -> Task:
    """Taps in time, as each training step has new ones."""
    u, taps, skip = inputs["u"], inputs["taps"], inputs["skip"]

    def run() -> Tensor:
        with torch.inference_mode():
            return fft_convolution(u, taps, skip)

    return Task(run, lambda: {"y": run()})


def long_convolution_training(inputs: Tensors, _: Settings) -> Task:
    leaves = {name: inputs[name] for name in ("u", "taps", "skip")}
    return operator_training(lambda: fft_convolution(**leaves), leaves, inputs["dy"], {})


def fir_gate(inputs: Tensors, _: Settings) -> Task:
    """Short FIR of three branches and the first gate, channels-last."""
    z, taps, bias = inputs["z"], inputs["taps"], inputs["bias"]

    def run() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return fused_fir_gate(z, taps, bias)

    return Task(run, lambda: dict(zip(("x2", "u"), run(), strict=True)))


def medium_fir(inputs: Tensors, sizes: Settings) -> Task:
    """An explicit filter, as a Hyena-MR layer has it."""
    d = sizes["channels"]
    filter_ = ExplicitFilter(ExplicitFilterConfig(taps=sizes["taps"]), d)
    filter_.weight.data = inputs["taps"]
    u = inputs["u"]

    def run() -> Tensor:
        with torch.inference_mode():
            return filter_.convolve(u, None)

    return Task(run, lambda: {"y": run()})


def online(inputs: Tensors, sizes: Settings) -> Task:
    """A token at a time through an implicit filter's state; the taps are the case's, not an MLP's."""
    d, l = sizes["channels"], sizes["length"]
    filter_ = _WithTaps(inputs["taps"], ImplicitFilterConfig(max_length=l), d)
    tokens, skip = inputs["u"].split(1, dim=1), inputs["skip"]

    @torch.inference_mode()
    def run() -> list[Tensor]:
        state = filter_.init_state(1, l, device=CPU, dtype=torch.float32)
        return [filter_.extend(token, skip, state, None) for token in tokens]

    return Task(run, lambda: {"y": torch.cat(run()[sizes["sampled"] // 2 :: sizes["sampled"]], 1)}, units=l)


class _WithTaps(ImplicitFilter):
    """An implicit filter whose MLP has been replaced by its outcome."""

    def __init__(self, taps: Tensor, config: ImplicitFilterConfig, channels: int) -> None:
        super().__init__(config, channels)
        self._given = taps

    def taps(self, length: int) -> Tensor:
        return self._given[:, :length]


# --- what they share ---


def _on_torch(task: Task) -> Task:
    """The task as on a machine without a compiler."""
    return replace(task, run=switched_off()(task.run), answers=switched_off()(task.answers))


def _filled(config: ComplexModalFilterConfig | RealModalFilterConfig, sizes: Settings, **parameters: Tensor) -> Filter:
    filter_ = build_filter(config, sizes["channels"])
    for name, value in parameters.items():
        setattr(filter_, name, nn.Parameter(value))
    return filter_


def _complex_filter(inputs: Tensors, sizes: Settings) -> Filter:
    config = ComplexModalFilterConfig(modes=sizes["modes"], poles="raw")
    return _filled(config, sizes, poles=inputs["poles"], residues=inputs["residues"])


def _prefill(filter_: Filter, inputs: Tensors) -> Task:
    u, skip = inputs["u"], inputs["skip"]

    @torch.inference_mode()
    def run() -> tuple[Tensor, Tensor]:
        state = filter_.init_state(1, None, device=CPU, dtype=torch.float32)
        y = filter_.extend(u, skip, state, None)
        return y, state.modes  # type: ignore[attr-defined]

    return Task(run, lambda: dict(zip(("y", "state"), run(), strict=True)))

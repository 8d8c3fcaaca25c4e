"""The package ``vtx`` 1.1.0 (vortex, the engine of Evo 2): its real modal filter and its medium convolution.

Importing it asks for things that exist for CUDA only; no Hyena layer calls what stands in for them here. It also opens
a log file in the current folder, which is the worker's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suite.peers.flash_attention import standing_in
from suite.task import Settings, Task, Tensors

with standing_in():
    from vortex.model.cache import HyenaCascadeIIRInferenceParams
    from vortex.model.engine import fftconv_func
    from vortex.model.model import HyenaCascade
    from vortex.model.utils import dotdict


def _filter(inputs: Tensors, sizes: Settings) -> HyenaCascade:
    d = sizes["channels"]
    settings = dotdict(
        hidden_size=d,
        num_filters=1,
        num_attention_heads=1,
        short_filter_length=3,
        short_filter_bias=False,
        state_size=sizes["modes"],
        column_split_hyena=False,
        interleave=False,
    )
    filter_ = HyenaCascade(settings, 0, hyena_filter_groups=d)
    filter_.log_poles = nn.Parameter(inputs["log_poles"][..., None])
    filter_.residues = nn.Parameter(inputs["residues"])
    filter_.D = nn.Parameter(inputs["skip"])
    return filter_


def real_modal_prefill(inputs: Tensors, sizes: Settings) -> Task:
    """The filter from its poles, and the convolution; with gates of ones, as ``peers.stripedhyena`` explains.

    With ``state`` also the state for decoding.
    """
    filter_, d, u = _filter(inputs, sizes), sizes["channels"], inputs["u"].transpose(1, 2)
    z, length = torch.cat([torch.ones_like(u), u, torch.ones_like(u)], 1), u.shape[-1]
    dims = (d, 1, d, sizes["modes"], d)

    @torch.no_grad()
    def run() -> Tensors:
        cache = HyenaCascadeIIRInferenceParams() if sizes["state"] else None
        h = filter_.compute_filter(length, u.device)[0]
        poles, residues = filter_.log_poles, filter_.residues
        y = filter_.engine.parallel_iir(z, h, filter_.D, length, poles, residues, filter_.t, dims, 0, cache)
        return {"y": y} if cache is None else {"y": y, "state": cache.state_dict[0].real}

    return Task(run, run)


def cached_filter(inputs: Tensors, sizes: Settings) -> Task:
    """Its convolution alone, with the taps made beforehand."""
    filter_, u = _filter(inputs, sizes), inputs["u"].transpose(1, 2).contiguous()
    with torch.no_grad():
        h = filter_.compute_filter(u.shape[-1], u.device)[0]

    @torch.no_grad()
    def run() -> Tensor:
        return fftconv_func(u, h[0], filter_.D, None, gelu=False)

    return Task(run, lambda: {"y": run().transpose(1, 2)})


def medium_fir(inputs: Tensors, _: Settings) -> Task:
    """How Hyena-MR runs 128 taps: by FFT. Without D."""
    u, taps = inputs["u"].transpose(1, 2).contiguous(), inputs["taps"][:, None]
    none = torch.zeros(u.shape[1])

    @torch.no_grad()
    def run() -> Tensor:
        return fftconv_func(u, taps, none, None, gelu=False)

    return Task(run, lambda: {"y": run().transpose(1, 2)})

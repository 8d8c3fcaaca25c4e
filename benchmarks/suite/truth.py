"""Answers in float64, from the formulas; slow is fine, wrong is not. Nothing of ours or of the peers is used here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.task import Settings, Tensors


def modal(inputs: Tensors, sizes: Settings) -> Tensors:
    """y[t] = Σ_j h[j] u[t - j] + D u[t], h[t] = Re Σ_n R_n p_n^t, the state Σ_t p^(l-1-t) u[t], and all gradients."""
    poles, residues = (torch.view_as_complex(inputs[name].double()) for name in ("poles", "residues"))
    return _modal(inputs, poles.log(), residues, "poles" if sizes.get("gradients") else None)


def real_modal(inputs: Tensors, _: Settings) -> Tensors:
    return _modal(inputs, inputs["log_poles"].double(), inputs["residues"].double(), None)


def _modal(inputs: Tensors, logs: Tensor, residues: Tensor, with_gradients: str | None) -> Tensors:
    u, skip = inputs["u"].double(), inputs["skip"].double()
    time = torch.arange(u.shape[1], dtype=torch.float64)
    if with_gradients is not None:
        return _modal_gradients(inputs, time)
    taps = torch.stack([_real((r[:, None] * torch.exp(p[:, None] * time)).sum(0)) for r, p in zip(residues, logs)])
    y = _convolved(u, taps) + skip * u
    decays = [torch.exp(p[:, None] * time.flip(0)) for p in logs]
    state = torch.stack([(decay * u[0, :, c].to(decay.dtype)).sum(-1) for c, decay in enumerate(decays)])[None]
    return {"y": y, "state": torch.view_as_real(state) if state.is_complex() else state}


def _real(value: Tensor) -> Tensor:
    return value.real if value.is_complex() else value


def _modal_gradients(inputs: Tensors, time: Tensor) -> Tensors:
    """A channel at a time, because autograd keeps every term."""
    leaves = {name: inputs[name].double().requires_grad_() for name in ("u", "poles", "residues", "skip")}
    outputs = []
    for c in range(leaves["u"].shape[2]):
        poles, residues = (torch.view_as_complex(leaves[name][c]) for name in ("poles", "residues"))
        taps = (residues[:, None] * torch.exp(poles.log()[:, None] * time)).sum(0).real
        u = leaves["u"][:, :, c : c + 1]
        y = _convolved(u, taps[None]) + leaves["skip"][c] * u
        y.backward(inputs["dy"][:, :, c : c + 1].double())
        outputs.append(y.detach())
    return {"y": torch.cat(outputs, -1), **_gradients(leaves)}


def convolution(inputs: Tensors, sizes: Settings) -> Tensors:
    """Whole convolution with taps [d k], and with ``gradients`` those of u, taps and skip."""
    leaves = {name: inputs[name].double() for name in ("u", "taps", "skip")}
    if not sizes.get("gradients"):
        return {"y": _convolved(leaves["u"], leaves["taps"]) + leaves["skip"] * leaves["u"]}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    y = _convolved(leaves["u"], leaves["taps"]) + leaves["skip"] * leaves["u"]
    y.backward(inputs["dy"].double())
    return {"y": y.detach(), **_gradients(leaves)}


def medium_fir(inputs: Tensors, _: Settings) -> Tensors:
    """Without D."""
    return {"y": _convolved(inputs["u"].double(), inputs["taps"].double())}


def fir_gate(inputs: Tensors, _: Settings) -> Tensors:
    z, taps = inputs["z"].double(), inputs["taps"].double()
    k, c = taps.shape[1], z.shape[2]
    filtered = F.conv1d(F.pad(z.transpose(1, 2), (k - 1, 0)), taps.flip(1)[:, None], groups=c)
    x2, x1, v = (filtered.transpose(1, 2) + inputs["bias"].double()).chunk(3, dim=-1)
    return {"x2": x2, "u": x1 * v}


def _gradients(leaves: Tensors) -> Tensors:
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    assert all(grad is not None for grad in grads.values())
    return {f"d{name}": grad for name, grad in grads.items() if grad is not None}


def _convolved(u: Tensor, taps: Tensor) -> Tensor:
    """u [b l d] with taps [d k], by a transform long enough that nothing wraps around."""
    l, n = u.shape[1], 1 << (u.shape[1] + taps.shape[1]).bit_length()
    spectra = torch.fft.rfft(u.transpose(1, 2), n=n) * torch.fft.rfft(taps, n=n)
    return torch.fft.irfft(spectra, n=n)[..., :l].transpose(1, 2)


def sampled_convolution(inputs: Tensors, sizes: Settings) -> Tensors:
    """Whole convolution at every so many tokens, as the cached dot product is run."""
    y = convolution(inputs, sizes)["y"]
    return {"y": y[:, sizes["sampled"] // 2 :: sizes["sampled"]]}

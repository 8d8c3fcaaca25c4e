"""The specification: one naive, readable implementation of every op. Slow on purpose; imports only torch.

Conventions: ``taps[g, 0]`` multiplies the current input. Channel c belongs to group c // (d / g). A complex number
is a trailing axis (re, im); a log-pole is (log modulus, angle). Real modes have no trailing axis.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def causal_convolution(
    u: Float[Tensor, "b l d"], taps: Float[Tensor, "g k"], history: Float[Tensor, "b p d"] | None = None
) -> Float[Tensor, "b l d"]:
    """y[t] = Σ_j taps[j] · u[t - j], where inputs before the start are the history (its last is u[-1]) or zero."""
    b, l, d = u.shape
    taps = taps.repeat_interleave(d // taps.shape[0], dim=0)
    past = u.new_zeros(b, 0, d) if history is None else history
    whole = torch.cat([past, u], dim=1)
    y = torch.zeros_like(u)
    for t in range(l):
        for j in range(min(taps.shape[1], past.shape[1] + t + 1)):
            y[:, t] += taps[:, j] * whole[:, past.shape[1] + t - j]
    return y


def modal_taps(
    log_poles: Float[Tensor, "g n *z"], residues: Float[Tensor, "g n *z"], length: int
) -> Float[Tensor, "g l"]:
    """h[t] = Re Σ_n R_n exp(logp_n · t), t = 0 .. length-1 (Massaroli et al. 2023, eq. 3.2; Evo 2, Hyena-LI)."""
    p, r = _complex(log_poles), _complex(residues)
    return torch.stack([(r * torch.exp(p * t)).sum(1).real for t in range(length)], dim=1)


def modal_convolution(
    u: Float[Tensor, "b l d"],
    log_poles: Float[Tensor, "g n *z"],
    residues: Float[Tensor, "g n *z"],
    skip: Float[Tensor, " d"] | None = None,
    state: Float[Tensor, "b d n *z"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n *z"]]:
    """s[t] = p · s[t-1] + u[t]; y[t] = Re Σ_n R_n s_n[t] + skip · u[t]. Returns y and the last state."""
    b, _, d = u.shape
    repeat = d // log_poles.shape[0]
    p = torch.exp(_complex(log_poles)).repeat_interleave(repeat, dim=0)
    r = _complex(residues).repeat_interleave(repeat, dim=0)
    if state is None:
        s = p.new_zeros(b, d, p.shape[1])
    else:
        s = torch.view_as_complex(state.contiguous()) if state.ndim == 4 else state.to(p.dtype)
    outputs = []
    for u_t in u.unbind(1):
        s = p * s + u_t[..., None]
        y_t = (r * s).sum(-1).real
        outputs.append(y_t if skip is None else y_t + skip * u_t)
    y = torch.stack(outputs, dim=1) if outputs else u.new_zeros(u.shape)
    return y, torch.view_as_real(s) if log_poles.ndim == 3 else s.real


def hyena_gate(
    x2: Float[Tensor, "b l d"],
    x1: Float[Tensor, "b l d"],
    v: Float[Tensor, "b l d"],
    taps: Float[Tensor, "g k"],
    skip: Float[Tensor, " d"],
) -> Float[Tensor, "b l d"]:
    """y = x2 · (h ∗ (x1·v) + D · (x1·v)) (Poli et al. 2023, eq. 4, order 2; the gate pair of StripedHyena)."""
    u = x1 * v
    return x2 * (causal_convolution(u, taps) + skip * u)


def attention(
    q: Float[Tensor, "b l h c"],
    k: Float[Tensor, "b p m c"],
    v: Float[Tensor, "b p m c"],
    starts: Int[Tensor, " b"],
) -> Float[Tensor, "b l h c"]:
    """softmax(q kᵀ / √c) v, where query t of a row sees keys 0 .. start + t; head j reads key head j // (h / m)."""
    b, l, h, c = q.shape
    group = h // k.shape[2]
    y = torch.zeros_like(q)
    for row in range(b):
        for head in range(h):
            for t in range(l):
                seen = int(starts[row]) + t + 1
                keys, values = k[row, :seen, head // group], v[row, :seen, head // group]
                weights = torch.softmax(keys @ q[row, t, head] / math.sqrt(c), dim=0)
                y[row, t, head] = weights @ values
    return y


def rotate(
    x: Float[Tensor, "b l h c"], positions: Float[Tensor, "b l"], inverse_frequencies: Float[Tensor, " c2"]
) -> Float[Tensor, "b l h c"]:
    """Rotate the pair (x[i], x[i + c/2]) by position · inv_freq[i] (Su et al. 2021; the halves convention)."""
    half = x.shape[-1] // 2
    y = torch.empty_like(x)
    for i in range(half):
        angle = (positions * inverse_frequencies[i])[:, :, None]
        y[..., i] = x[..., i] * torch.cos(angle) - x[..., i + half] * torch.sin(angle)
        y[..., i + half] = x[..., i + half] * torch.cos(angle) + x[..., i] * torch.sin(angle)
    return y


def rms_norm(
    x: Float[Tensor, "*b d"], scale: Float[Tensor, " d"], eps: float, *, eps_inside_root: bool
) -> Float[Tensor, "*b d"]:
    """scale · x / sqrt(mean(x²) + eps), or scale · x / (sqrt(mean(x²)) + eps) with eps outside the root."""
    mean_square = (x * x).mean(-1, keepdim=True)
    root = torch.sqrt(mean_square + eps) if eps_inside_root else torch.sqrt(mean_square) + eps
    return scale * x / root


def layer_norm(
    x: Float[Tensor, "*b d"], scale: Float[Tensor, " d"], bias: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*b d"]:
    """scale · (x - mean(x)) / sqrt(var(x) + eps) + bias, with the biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    return scale * centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) + bias


def _complex(pair: Tensor) -> Tensor:
    """[g n 2] as complex [g n]; real modes [g n] gain a zero imaginary part."""
    return torch.view_as_complex(pair.contiguous()) if pair.ndim == 3 else torch.complex(pair, torch.zeros_like(pair))

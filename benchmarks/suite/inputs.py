"""What all sides of a case get: tensors from seeds, and weights of our models under our names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from crocuta.model.build import build_model
from suite.models import config_of
from suite.task import Settings, Tensors


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def modal(sizes: Settings) -> Tensors:
    """A complex modal filter, its input, and the gradient that comes back: u, dy [1 l d], poles, residues [d n 2].

    Decay times from 1 to 1,024 tokens and angles all over the circle, as trained filters have them.
    """
    d, n, l = sizes["channels"], sizes["modes"], sizes["length"]
    g = _generator()
    decay = torch.exp(-1 / torch.exp(torch.rand(d, n, generator=g) * math.log(1024)))
    angle = torch.rand(d, n, generator=g) * math.pi
    poles = torch.stack([decay * angle.cos(), decay * angle.sin()], dim=-1)
    residues = torch.randn(d, n, 2, generator=g) * ((1 - decay**2) / n).sqrt()[..., None]
    return {"poles": poles, "residues": residues, **_signals(d, l, g)}


def real_modal(sizes: Settings) -> Tensors:
    """As ``modal`` with real poles: log_poles, residues [d n]."""
    d, n, l = sizes["channels"], sizes["modes"], sizes["length"]
    g = _generator()
    log_poles = -torch.exp(-torch.rand(d, n, generator=g) * math.log(1024))
    residues = torch.randn(d, n, generator=g) * ((1 - torch.exp(2 * log_poles)) / n).sqrt()
    return {"log_poles": log_poles, "residues": residues, **_signals(d, l, g)}


def convolution(sizes: Settings) -> Tensors:
    """Taps [d k], as long as the input unless ``taps`` says otherwise, decaying to a hundredth."""
    d, l = sizes["channels"], sizes["length"]
    g, k = _generator(), sizes.get("taps", l)
    window = 0.01 ** (torch.arange(k) / k)
    return {"taps": torch.randn(d, k, generator=g) * window / math.sqrt(k), **_signals(d, l, g)}


def _signals(d: int, l: int, g: torch.Generator) -> Tensors:
    u, dy = (torch.randn(1, l, d, generator=g) for _ in range(2))
    return {"u": u, "dy": dy, "skip": torch.randn(d, generator=g)}


def fir_gate(sizes: Settings) -> Tensors:
    """z [1 l 3d], taps [3d k] with tap 0 for the current token, bias [3d]."""
    d, l, k = sizes["channels"], sizes["length"], sizes["taps"]
    g = _generator()
    z, taps = torch.randn(1, l, 3 * d, generator=g), torch.randn(3 * d, k, generator=g) / math.sqrt(k)
    return {"z": z, "taps": taps, "bias": torch.randn(3 * d, generator=g)}


def language_model(sizes: Settings) -> Tensors:
    """Weights of ``config_of(sizes)`` under our names, ids and targets [1 l].

    Biases start as 0 and scales as 1, where a mistake could hide, so every vector is moved a little.
    """
    weights = _weights(sizes)
    ids = torch.randint(sizes["vocabulary"], (sizes.get("batch", 1), sizes["length"] + 1), generator=_generator(2))
    return {**weights, "ids": ids[:, :-1], "targets": ids[:, 1:]}


def two_models(sizes: Settings) -> Tensors:
    """``language_model``, and beside its weights those of the family that it is ``against``."""
    return {**language_model(sizes), **_weights({**sizes, "family": sizes["against"]}, "other")}


def three_models(sizes: Settings) -> Tensors:
    """``two_models``, and the weights of a HyenaDNA of the same size."""
    return {**two_models(sizes), **_weights({**sizes, "family": "hyenadna"}, "hyenadna")}


def sequences(sizes: Settings) -> Tensors:
    """Weights, and ids [b l] of rows whose first ``lengths[row]`` count: from half the length to all of it."""
    rows, length = sizes["rows"], sizes["length"]
    lengths = torch.linspace(length // 2, length, rows).round().long()
    ids = torch.randint(sizes["vocabulary"], (rows, length), generator=_generator(3))
    return {**_weights(sizes), "ids": ids, "lengths": lengths}


def _weights(sizes: Settings, group: str = "weights") -> dict[str, Tensor]:
    model: Any = build_model(config_of(sizes), seed=0)
    g = _generator(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    return {f"{group}.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def weights_of(inputs: Tensors, group: str = "weights") -> dict[str, Tensor]:
    """The weights among the inputs, under their names in the model."""
    return {name.removeprefix(f"{group}."): t for name, t in inputs.items() if name.startswith(f"{group}.")}


def nothing(_: Settings) -> Tensors:
    """For cases that need no tensors: safetensors files are never empty."""
    return {"nothing": torch.zeros(1)}

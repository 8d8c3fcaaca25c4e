"""HyenaDNA of order 3 and above as published: a random checkpoint, and its forward written from the formulas."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTH, LAYERS, LENGTH, UNITS = 6, 2, 20, 8
"""Channels, layers, l_max, and units of the filter network."""
LAYOUTS = ("interleaved", "by_convolution")
SHIFTS = {"interleaved": 0.0, "by_convolution": 0.05}
"""Of the window, in the code that each layout is of."""
IDS = torch.randint(16, (2, 17), generator=torch.Generator().manual_seed(7))

Weights = dict[str, Tensor]


# --- a checkpoint as the training repository writes it ---


def settings(order: int, **layer: Any) -> dict[str, Any]:
    return {
        "d_model": WIDTH,
        "n_layer": LAYERS,
        "d_inner": 2 * WIDTH,
        "vocab_size": 12,
        "pad_vocab_size_multiple": 8,
        "layer": {
            "_name_": "hyena",
            "order": order,
            "emb_dim": 5,
            "filter_order": UNITS,
            "l_max": LENGTH,
            "modulate": True,
            "w": 10,
            **layer,
        },
    }


def weights(order: int) -> Weights:
    """Random, and loud enough to tell functions apart; what the formulas give is stored with them."""
    generator = torch.Generator().manual_seed(order)

    def random(*shape: int, size: float = 1.0, around: float = 0.0) -> Tensor:
        return around + size * torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    wide, rows = (order + 1) * WIDTH, (order - 1) * WIDTH
    found = {"backbone.embeddings.word_embeddings.weight": random(16, WIDTH, size=3)}
    for layer in range(LAYERS):
        frequency = random(1, UNITS, around=3.0)
        deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, rows)
        named = {
            "norm1.weight": random(WIDTH, around=1.0),
            "norm1.bias": random(WIDTH),
            "norm2.weight": random(WIDTH, around=1.0),
            "norm2.bias": random(WIDTH),
            "mlp.fc1.weight": random(2 * WIDTH, WIDTH),
            "mlp.fc1.bias": random(2 * WIDTH),
            "mlp.fc2.weight": random(WIDTH, 2 * WIDTH),
            "mlp.fc2.bias": random(WIDTH),
            "mixer.in_proj.weight": random(wide, WIDTH),
            "mixer.in_proj.bias": random(wide),
            "mixer.short_filter.weight": random(wide, 1, 3),
            "mixer.short_filter.bias": random(wide),
            "mixer.out_proj.weight": random(WIDTH, WIDTH),
            "mixer.out_proj.bias": random(WIDTH),
            "mixer.filter_fn.bias": random(rows, size=3),
            "mixer.filter_fn.pos_emb.t": torch.linspace(0, 1, LENGTH)[None, :, None],
            "mixer.filter_fn.modulation.deltas": deltas[None, None],
            "mixer.filter_fn.implicit_filter.6.weight": random(rows, UNITS),
        }
        for place, inputs in ((0, 5), (2, UNITS), (4, UNITS)):
            named[f"mixer.filter_fn.implicit_filter.{place}.weight"] = random(UNITS, inputs)
            named[f"mixer.filter_fn.implicit_filter.{place}.bias"] = random(UNITS)
            named[f"mixer.filter_fn.implicit_filter.{place + 1}.freq"] = frequency
        found |= {f"backbone.layers.{layer}.{name}": tensor for name, tensor in named.items()}
    found |= {"backbone.ln_f.weight": random(WIDTH, around=1.0), "backbone.ln_f.bias": random(WIDTH)}
    found["lm_head.weight"] = found["backbone.embeddings.word_embeddings.weight"]
    return {f"model.{name}": tensor for name, tensor in found.items()}


def write(folder: Path, config: dict[str, Any], tensors: Weights) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "weights.ckpt")
    return folder


def checkpoint(folder: Path, order: int, change: Callable[[Weights], object] = dict, **layer: Any) -> Path:
    tensors = weights(order)
    change(tensors)
    return write(folder, settings(order, **layer), tensors)


# --- the published forward, from its formulas, in float64 ---


def published(tensors: Weights, order: int, layout: str, shift: float) -> Tensor:
    """Logits of ``IDS``."""
    tensors = {name.removeprefix("model.backbone."): t.double() for name, t in tensors.items()}
    embedding = tensors["embeddings.word_embeddings.weight"]
    rows = []
    for ids in IDS:
        x = embedding[ids]
        for layer in range(LAYERS):
            part = {
                n.removeprefix(f"layers.{layer}."): t for n, t in tensors.items() if n.startswith(f"layers.{layer}.")
            }
            x = x + operator(norm(x, part, "norm1"), part, order, layout, shift)
            x = x + linear(gelu(linear(norm(x, part, "norm2"), part, "mlp.fc1")), part, "mlp.fc2")
        rows.append(norm(x, tensors, "ln_f") @ embedding.T)
    return torch.stack(rows)


def linear(x: Tensor, tensors: Weights, name: str) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def norm(x: Tensor, tensors: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def operator(x: Tensor, tensors: Weights, order: int, layout: str, shift: float) -> Tensor:
    z = linear(x, tensors, "mixer.in_proj")
    taps, bias = tensors["mixer.short_filter.weight"][:, 0], tensors["mixer.short_filter.bias"]
    *gates, v = (convolve(z, taps.flip(1).T) + bias).split(WIDTH, dim=1)
    h, skip = filters(tensors, shift), tensors["mixer.filter_fn.bias"]
    for o, gate in enumerate(reversed(gates[1:])):
        if layout == "interleaved":
            mine = [c * (order - 1) + o for c in range(WIDTH)]
        else:
            mine = [o * WIDTH + c for c in range(WIDTH)]
        v = v * gate
        v = convolve(v, h[:, mine]) + skip[mine] * v
    return linear(v * gates[0], tensors, "mixer.out_proj")


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """y[t] = Σ_j taps[j] · x[t - j], channel by channel."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for j in range(min(t + 1, len(taps))):
            y[t] += taps[j] * x[t - j]
    return y


def filters(tensors: Weights, shift: float) -> Tensor:
    """[t, row of the last layer]"""
    start = "mixer.filter_fn."
    i = torch.arange(LENGTH, dtype=torch.float64)[:, None]
    t, angle = i / (LENGTH - 1), torch.tensor([1e-4, 1.0], dtype=torch.float64) * 2 * math.pi * i / LENGTH
    x = torch.cat([t, angle.cos(), -angle.sin()], dim=1)
    if f"{start}pos_emb.z" in tensors:
        x = tensors[f"{start}pos_emb.z"][0]
    for place in (0, 2, 4):
        x = linear(x, tensors, f"{start}implicit_filter.{place}")
        x = torch.sin(tensors[f"{start}implicit_filter.{place + 1}.freq"] * x)
    h = x @ tensors[f"{start}implicit_filter.6.weight"].T
    slowest, fastest, last = -math.log(1e-2) / 1.5, -math.log(1e-2) / 0.3, h.shape[1] - 1
    rates = torch.tensor([slowest + (fastest - slowest) * row / last for row in range(last + 1)], dtype=torch.float64)
    return h * (torch.exp(-t * rates) + shift)

"""HyenaDNA as published, written anew in plain torch from its published facts (it is no package).

    block    x + W_out( x0 · (h ∗ (x1·v) + D·(x1·v)) ) of LayerNorm(x), (x0, x1, v) = conv1d(W_in ..) in thirds;
             then x + W2 gelu_tanh(W1 LayerNorm(x) + b1) + b2; the residual stream in float32
    short    depthwise ``conv1d`` with 3 taps and a bias, padding 2, cut to the length
    filter   an MLP of sines over [t, Re z, Im z], computed in every forward pass, times exp(-t |δ|) + shift
    long     ``peers.convolution.fftconv``: real transforms of length 2l

There is no state: a token of a generation costs a forward pass over everything before it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suite.peers.convolution import fftconv
from suite.steps import step_task
from suite.task import Settings, Task, Tensors

WIDTH, FREQUENCY, SHIFT, TARGET = 64, 10.0, 0.05, 1e-2
DECAYS = (0.3, 1.5)
"""Shares of the length at which the fastest and the slowest window reach ``TARGET``."""


class Filter(nn.Module):
    """h [d l] of the first tokens of ``longest``; one frequency a unit, shared by all layers.

    Positions and window are made in ``dtype``; published models have them in float32.
    """

    def __init__(self, hidden: int, longest: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.full((WIDTH,), FREQUENCY))
        self.layers = nn.ModuleList(nn.Linear(5 if i == 0 else WIDTH, WIDTH) for i in range(3))
        self.output = nn.Linear(WIDTH, hidden, bias=False)
        t = torch.linspace(0, 1, longest, dtype=dtype)[:, None]
        bands = torch.linspace(1e-4, 1, 2, dtype=dtype)
        steps = torch.arange(longest, dtype=dtype)[:, None]
        wave = torch.exp(-1j * (bands * (2 * math.pi * steps / longest)))
        self.register_buffer("features", torch.cat([t, wave.real, wave.imag], dim=-1))
        fast, slow = (math.log(TARGET) / share for share in DECAYS)
        rates = torch.linspace(slow, fast, hidden, dtype=dtype).abs()
        self.register_buffer("window", torch.exp(-t * rates) + SHIFT)

    def forward(self, length: int) -> Tensor:
        x = self.features[:length]
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        return (self.output(x) * self.window[:length]).t()


class Mixer(nn.Module):
    """[b l d] -> [b l d]."""

    def __init__(self, hidden: int, longest: int) -> None:
        super().__init__()
        self.projection, self.output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.short = nn.Conv1d(3 * hidden, 3 * hidden, 3, groups=3 * hidden, padding=2)
        self.filter = Filter(hidden, longest)
        self.D = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x0, x1, v = self.short(self.projection(x).transpose(1, 2))[..., :length].chunk(3, dim=1)
        y = fftconv(x1 * v, self.filter(length).to(x.dtype), self.D) * x0
        return self.output(y.transpose(1, 2))


class Block(nn.Module):
    def __init__(self, hidden: int, longest: int) -> None:
        super().__init__()
        self.pre_norm, self.post_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.mixer = Mixer(hidden, longest)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.pre_norm(x))
        return x + self.down(F.gelu(self.up(self.post_norm(x)), approximate="tanh"))


class HyenaDNA(nn.Module):
    """ids [b l] -> logits [b l v]; embedding and head are tied."""

    def __init__(self, vocabulary: int, hidden: int, layers: int, longest: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, longest) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


# --- our weights ---

_OUR_NAMES = {
    "mixer.short.weight": "mixer.short_taps",
    "mixer.short.bias": "mixer.short_bias",
    "mixer.D": "mixer.skip",
    "pre_norm.weight": "pre_norm.scale",
    "post_norm.weight": "post_norm.scale",
    "up.weight": "mlp.up.weight",
    "up.bias": "mlp.up.bias",
    "down.weight": "mlp.down.weight",
    "down.bias": "mlp.down.bias",
}


def our_name(name: str) -> str:
    match name.split(".", 2):
        case ["blocks", number, rest]:
            ours = _OUR_NAMES.get(rest, rest)
            return f"blocks.{number}.{ours}"
        case ["norm", "weight"]:
            return "norm.scale"
        case _:
            return name


def our_layout(name: str, tensor: Tensor) -> Tensor:
    """``conv1d``'s last tap meets the current token; ours has it first."""
    return tensor[:, 0].flip(1) if name.endswith("short.weight") else tensor


def model_of(inputs: Tensors, sizes: Settings) -> HyenaDNA:
    """The formulation with our weights.

    In float64 it is the truth, with filters made in float32 as published: three layers of sines of frequency 10 enlarge
    a rounding a thousand times, on both sides alike, and no other error would be seen behind that.
    """
    longest = max(2, sizes.get("longest", sizes["length"]))
    model = HyenaDNA(sizes["vocabulary"], sizes["hidden"], sizes["layers"], longest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = inputs[f"{sizes.get('group', 'weights')}.{our_name(name)}"]
            parameter.copy_(weight.flip(1)[:, None] if name.endswith("short.weight") else weight)
    if sizes.get("dtype") == "float64":
        model.double()
        for block in model.blocks:
            block.mixer.filter.float()
    return model


# --- tasks ---


def training_step(inputs: Tensors, sizes: Settings) -> Task:
    model, ids, targets = model_of(inputs, sizes).train(), inputs["ids"], inputs["targets"]
    return step_task(model, lambda: F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()), our_name, our_layout)


def second_half(inputs: Tensors, sizes: Settings) -> Task:
    """A token without a cache: a forward pass over all tokens, the last logits and a draw. A unit is a token.

    Answers: the logits after the prompt, as decoding gives them.
    """
    model, ids = model_of(inputs, sizes).eval(), inputs["ids"]

    @torch.no_grad()
    def run() -> Tensor:
        logits = model(ids)
        torch.multinomial(logits[:, -1].softmax(-1), 1)
        return logits

    return Task(run, lambda: {"logits": run()[:, sizes["prompt"] :]})


def forward(inputs: Tensors, sizes: Settings) -> Task:
    """Logits of every token."""
    model, ids = model_of(inputs, sizes).eval(), inputs["ids"]

    @torch.no_grad()
    def run() -> Tensor:
        return model(ids)

    return Task(run, lambda: {"logits": run()})

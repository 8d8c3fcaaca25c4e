"""Low-rank adaptation (LoRA, Hu et al. 2021): a frozen W is used as W + (alpha / rank) · B A, and only A and B train.

An adapted layer stands where the plain one stood and offers the same ``weight`` and ``bias``, so everything that reads
them (products with time contiguous, gated units) sees the adapted weight, and what was trained is what is merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crocuta.errors import ConfigError, InputError
from crocuta.model.attention import AttentionMixer
from crocuta.model.fp8 import FP8Linear
from crocuta.model.linear import Linear
from crocuta.model.mixer import Mixer
from crocuta.model.mlp import GatedMLP, PlainMLP
from crocuta.model.precision import Float32Module, Memo
from crocuta.ops.blocks import compute_dtype, full_precision
from crocuta.ops.linear import linear

Role: TypeAlias = Literal["projections", "attention", "mlp"]
"""What a layer is for: in and out of an attention mixer, in and out of any other mixer, or inside an MLP."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers to adapt, and how: B A has rank ``rank`` and is scaled by ``alpha / rank``.

    The layers are those that a module of the role owns itself, whatever they are called: filters, embeddings and heads
    never are among them. There is no dropout: the adapted weight is one matrix, and B A has no input of its own.
    """

    rank: int
    alpha: float
    targets: tuple[Role, ...] = ("projections", "attention", "mlp")

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError("lora.rank is impossible", given=self.rank, expected="a whole number from 1 on")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ConfigError("lora.alpha is impossible", given=self.alpha, expected="a positive number")
        known = get_args(Role)
        if not self.targets or not set(self.targets) <= set(known):
            raise ConfigError("lora.targets are unknown", given=self.targets, expected=f"one or more of {known}")


class LowRank(Float32Module):
    """A [r d] and B [c r], never below float32: bfloat16 would round most steps of an optimizer away."""

    def __init__(self, rank: int, like: nn.Linear) -> None:
        super().__init__()
        dtype, device = compute_dtype(like.weight.dtype), like.weight.device
        self.a = nn.Parameter(torch.empty(rank, like.in_features, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(like.out_features, rank, dtype=dtype, device=device))

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """A from N(0, 1 / d), the same values on every device before rounding; B zero, so that nothing changes yet."""
        self.a.copy_(torch.randn(self.a.shape, generator=generator) * self.a.shape[1] ** -0.5)
        self.b.zero_()


@final
class LoRALinear(nn.Module):
    """(W + scale · B A) x + bias; W is that of ``plain``, which comes back when the adapter is merged or removed.

    The sum is made in float32 (float64 in a float64 model), outside autocast, and rounded once to W's dtype. While
    gradients are off it is kept, so decoding pays for it once; with gradients on it is made again in every pass.
    """

    def __init__(self, plain: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.config = config
        self.plain = plain
        self.low_rank = LowRank(config.rank, plain)
        self._memo = Memo()
        self.train(plain.training)

    @property
    def weight(self) -> Float[Tensor, "c d"]:
        parts = self.plain.weight, self.low_rank.a, self.low_rank.b
        return self._memo.get("weight", parts, lambda: _adapted(*parts, self.config.alpha / self.config.rank))

    @property
    def bias(self) -> Float[Tensor, " c"] | None:
        return self.plain.bias

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b c"]:
        return linear(x, self.weight, self.bias)


@full_precision
def _adapted(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scale).to(weight.dtype)


def add_lora(module: nn.Module, config: LoRAConfig, seed: int = 0) -> dict[str, LoRALinear]:
    """Adapt the layers of ``module`` that ``config`` targets, and freeze everything but their A and B.

    Outputs stay the same bits until B is trained. Who wants to train more (a head) sets ``requires_grad`` afterwards.
    The values of A are a function of ``seed`` and the order of the layers. Returns the adapted layers by name.

    Raises:
        InputError: nothing to adapt, adapters already, a projection in FP8, or a rank above a layer's size; the module
        is then as it was.
    """
    found = list(_targets(module, config))
    if not found:
        given = f"{type(module).__name__} without layers for {', '.join(config.targets)}"
        raise InputError("there is nothing that LoRA could adapt", given=given, fix="choose other targets")
    for name, _, _, layer in found:
        _check_target(name, layer, config)
    generator = torch.Generator().manual_seed(seed)
    module.requires_grad_(False)
    made: dict[nn.Module, LoRALinear] = {}  # a layer that two owners share is adapted once
    for _, owner, attribute, layer in found:
        assert isinstance(layer, nn.Linear)
        if layer not in made:
            made[layer] = LoRALinear(layer, config)
            made[layer].low_rank.draw(generator)
        setattr(owner, attribute, made[layer])
    return lora_layers(module)


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of ``module`` by name, none if it is plain."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def target_layers(module: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The layers that ``config`` targets by name, plain or adapted; one that two owners share by its first name."""
    names: dict[nn.Module, str] = {}
    for name, _, _, layer in _targets(module, config):
        names.setdefault(layer, name)
    return {name: layer for layer, name in names.items()}


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Put plain layers of weight W + scale · B A in the place of the adapted ones; outputs stay the same bits.

    What is frozen stays frozen: call ``module.requires_grad_()`` to train on. Raises InputError without adapters.
    """
    for layer in _replace_by_plain(module):
        layer.plain.weight.copy_(layer.weight)


def remove_lora(module: nn.Module) -> None:
    """Put the layers back as they were before ``add_lora``, and forget A and B.

    What is frozen stays frozen. Raises InputError without adapters.
    """
    _replace_by_plain(module)


def _replace_by_plain(module: nn.Module) -> list[LoRALinear]:
    """Take the adapted layers out of ``module`` and return them."""
    layers = list(lora_layers(module).values())
    places = [(owner, *child) for owner in module.modules() for child in owner.named_children()]
    adapted = [(owner, name, child) for owner, name, child in places if isinstance(child, LoRALinear)]
    if not adapted:
        raise InputError("there are no adapters", given=type(module).__name__, fix="call add_lora first")
    for owner, name, child in adapted:
        setattr(owner, name, child.plain)
    return layers


def _targets(module: nn.Module, config: LoRAConfig) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(full name, owner, attribute, layer) of every layer that a module of a targeted role owns itself."""
    for prefix, owner in module.named_modules():
        if _role(owner) in config.targets:
            for attribute, layer in owner.named_children():
                if isinstance(layer, Linear | FP8Linear | LoRALinear):
                    yield f"{prefix}.{attribute}" if prefix else attribute, owner, attribute, layer


def _role(owner: nn.Module) -> Role | None:
    match owner:
        case AttentionMixer():
            return "attention"
        case Mixer():
            return "projections"
        case GatedMLP() | PlainMLP():
            return "mlp"
        case _:
            return None


def _check_target(name: str, layer: nn.Module, config: LoRAConfig) -> None:
    match layer:
        case LoRALinear():
            raise InputError(f"{name} has an adapter already", fix="merge_lora or remove_lora first")
        case FP8Linear():
            raise InputError(
                f"LoRA cannot adapt {name}",
                given="a projection in FP8, whose constant scales do not fit another weight",
                expected="a model with fp8_projection=False, or targets without projections",
            )
        case Linear() if config.rank > min(layer.in_features, layer.out_features):
            size = f"{layer.out_features}x{layer.in_features}"
            raise InputError(f"lora.rank is larger than {name}", given=config.rank, expected=f"at most that of {size}")

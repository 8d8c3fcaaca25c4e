"""What ``deep_dive.py`` compares, at which sizes, and how it reports it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import _tutorial as tutorial
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crocuta.model.block import Block
from crocuta.model.build import build_block
from crocuta.model.order_n import OrderNHyenaMixer
from crocuta.presets import deep_dive_hyena


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured."""

    channels: int = 64
    max_length: int = 8192
    shortest: int = 64
    longest: int = 4096
    broadest: int = 65_536
    """The largest max_length of the table about normalisation."""
    prefix: int = 512
    """Tokens that are run alone, and with as many behind them."""
    causal: int = 48
    """Tokens of the gradients."""
    seeds: int = 3
    rounds: int = 7


SMOKE = Sizes(channels=8, max_length=256, longest=256, broadest=256, prefix=32, causal=12, seeds=1, rounds=2)

UNNORMALISED = tutorial.only("unnormalised")


@dataclass
class Section:
    """A table, and what must hold of the preset."""

    title: str
    header: list[str]
    rows: list[list[Any]]
    holds: dict[str, bool] = field(default_factory=dict)


# --- what is compared ---


def preset_block(sizes: Sizes, seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> Block:
    """The preset's block without its MLP."""
    options = {"max_length": sizes.max_length} | options
    block = deep_dive_hyena(hidden_size=sizes.channels, num_layers=1, **options).blocks[0]
    return build_block(dataclasses.replace(block, mlp=None), sizes.channels, seed=seed).to(dtype).eval()


def preset_mixer(sizes: Sizes, seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> OrderNHyenaMixer:
    mixer = preset_block(sizes, seed, dtype, **options).mixer
    assert isinstance(mixer, OrderNHyenaMixer)
    return mixer


def as_written(sizes: Sizes, seed: int, **options: Any) -> Callable[[Tensor], Tensor]:
    """The tutorial's operator."""
    weights = tutorial.tutorial_weights(seed, sizes.channels)
    return partial(tutorial.operator, weights=weights, max_length=sizes.max_length, **options)


def with_fault(sizes: Sizes, seed: int, name: str, **options: Any) -> Callable[[Tensor], Tensor]:
    """The preset, but for one fault."""
    weights, faults = tutorial.weights_of(preset_mixer(sizes, seed)), tutorial.only(name)
    return partial(tutorial.operator, weights=weights, faults=faults, max_length=sizes.max_length, **options)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def median(measure: Callable[[int], float], sizes: Sizes) -> float:
    """Over seeds."""
    return statistics.median(measure(seed) for seed in range(sizes.seeds))


def powers(first: int, last: int, factor: int = 4) -> list[int]:
    """first, first · factor, .. up to last."""
    lengths = [first]
    while lengths[-1] * factor <= last:
        lengths.append(lengths[-1] * factor)
    return lengths


class Allocated(TorchDispatchMode):
    """Counts the bytes of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._seen: set[int] = set()
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (pointer := result.untyped_storage().data_ptr()) not in self._seen:
            self._seen.add(pointer)
            self._kept.append(result)  # else a new tensor could get the place of an old one
            self.bytes += result.untyped_storage().nbytes()
        return result


def shown(cell: object) -> str:
    """A number in three digits, anything else as it is."""
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def stored(section: Section) -> dict[str, Any]:
    """For a file: JSON has no NaN and no infinity."""
    finite = [[str(c) if isinstance(c, float) and not math.isfinite(c) else c for c in row] for row in section.rows]
    return dataclasses.asdict(dataclasses.replace(section, rows=finite))


def largest_gradients(run: Callable[[Tensor], Tensor], sizes: Sizes, seed: int) -> tuple[float, float]:
    """Of the first half of the outputs, for inputs after it and for those in it."""
    half = sizes.causal // 2
    x = noise(seed, 1, sizes.causal, sizes.channels).requires_grad_()
    (run(x)[:, :half] * noise(seed + 1, 1, half, sizes.channels)).sum().backward()
    assert x.grad is not None
    return float(x.grad[:, half:].abs().max()), float(x.grad[:, :half].abs().max())

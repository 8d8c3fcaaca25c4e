"""What a configuration costs, without its weights: parameters, floating-point operations, bytes.

Parameters, states and weights are those of the model itself, built on the meta device, so they cannot drift from the
code. Operations are counted by formula; a multiplication and an addition are two. For l tokens and d channels:

| part                      | operations                                                                        |
| ------------------------- | --------------------------------------------------------------------------------- |
| matrix product            | 2 · weights a token                                                               |
| attention                 | 4 · d · keys seen, (l + 1) / 2 of them on average: queries · keys, weights · values |
| FIR of k taps             | 2 · d · min(t, k) for token t                                                     |
| modal filter, recurrent   | d · 12 n a token for n complex modes, d · 4 n for n real ones: the state, its output |
| modal filter, chunked     | d · (c + 1 + 4 m) a token: inside a block of c, into and out of a state of m numbers |
|                           | and d · 8 n (complex, m = 2 n) or d · 2 n (real, m = n) a block: from state to state |
| filter by FFT of length f | d · (5 f log2 f + 3 f): two real transforms and a product                         |

What is not there is not counted: zeros above a causal diagonal, padding. Nor is work that is small (element by element:
norms, activations, gates, biases, residuals, rotary angles, softmax) or done once for any number of sequences (making
the taps of a filter and transforming them).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    MixerConfig,
    MLPConfig,
    ModelConfig,
    PlainMLPConfig,
    RealModalFilterConfig,
)
from crocuta.model.block import Block
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.ops import online_conv
from crocuta.ops.dispatch import Case, choose
from crocuta.ops.fft_conv import fft_length
from crocuta.ops.fp8 import fp8_case
from crocuta.ops.modal import BLOCK

BACKWARD = 2
"""A backward pass costs twice its forward pass: each product has two factors to differentiate."""


# --- what stands in the model ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Blocks of one configuration: where they are, and the parameters of each of them."""

    mixer: str
    mlp: str
    layers: tuple[int, ...]
    mixer_parameters: int
    mlp_parameters: int
    norm_parameters: int


def parameters(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part: embedding, each kind of mixer, MLPs, norms, head. A tied head has none."""
    model = _on_meta(config, torch.float32)
    kinds = block_kinds(config)
    parts: Counter[str] = Counter({"embedding": _size(model.embedding)})
    for kind in kinds:
        parts[kind.mixer] += len(kind.layers) * kind.mixer_parameters
    parts["MLPs"] = sum(len(kind.layers) * kind.mlp_parameters for kind in kinds)
    parts["norms"] = sum(len(kind.layers) * kind.norm_parameters for kind in kinds) + _size(model.norm)
    parts["head"] = _size(model.head)
    return {name: number for name, number in parts.items() if number}


def block_kinds(config: ModelConfig) -> list[BlockKind]:
    """The distinct blocks, in order of first appearance."""
    layers: dict[BlockConfig, list[int]] = {}
    for index, block in enumerate(config.blocks):
        layers.setdefault(block, []).append(index)
    model = _on_meta(config, torch.float32)
    return [_block_kind(block, model.blocks[places[0]], tuple(places)) for block, places in layers.items()]


def describe_mixer(config: MixerConfig) -> str:
    """The kind of a mixer in a few words, such as "hyena, 8 complex modes"."""
    match config:
        case AttentionConfig(num_heads=heads, num_kv_heads=kv_heads):
            return f"attention, {heads} heads" + (f", {kv_heads} of keys" if kv_heads not in (None, heads) else "")
        case HyenaConfig(filter=filter_, fp8_projection=fp8):
            return f"hyena, {_describe_filter(filter_)}" + (", FP8 projection" if fp8 else "")


def describe_mlp(config: MLPConfig | None) -> str:
    """The kind of an MLP in a few words, such as "gated silu, 128"."""
    return "none" if config is None else f"{config.type} {config.activation}, {config.intermediate_size}"


def _describe_filter(config: FilterConfig) -> str:
    match config:
        case ExplicitFilterConfig(taps=taps):
            return f"{taps} taps"
        case ImplicitFilterConfig():
            return "implicit filter"
        case ComplexModalFilterConfig(modes=modes):
            return f"{modes} complex modes"
        case RealModalFilterConfig(modes=modes):
            return f"{modes} real modes"


def _block_kind(config: BlockConfig, block: nn.Module, layers: tuple[int, ...]) -> BlockKind:
    assert isinstance(block, Block)
    return BlockKind(
        mixer=describe_mixer(config.mixer),
        mlp=describe_mlp(config.mlp),
        layers=layers,
        mixer_parameters=_size(block.mixer),
        mlp_parameters=_size(block.mlp),
        norm_parameters=_size(block.pre_norm) + _size(block.post_norm),
    )


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


# --- bytes ----------------------------------------------------------------------------------------------------


def state_bytes(config: ModelConfig, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the state of one sequence with room for ``length`` tokens. Raises InputError for a length below 1."""
    return _on_meta(config, dtype).init_state(1, length).nbytes


def state_is_constant(config: ModelConfig) -> bool:
    """Whether the state has one size for every length: no attention and no implicit filter."""
    mixers = [block.mixer for block in config.blocks]
    return not any(
        isinstance(mixer, AttentionConfig) or isinstance(mixer.filter, ImplicitFilterConfig) for mixer in mixers
    )


def weight_bytes(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all weights and stored tables in ``dtype``; filters stay in float32."""
    model = _on_meta(config, dtype)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


@functools.lru_cache(maxsize=4)
def _on_meta(config: ModelConfig, dtype: torch.dtype) -> Model:
    return build_model(config, device="meta", dtype=dtype)


# --- operations -----------------------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, length: int) -> float:
    """Operations of one forward pass over one sequence of ``length`` tokens, logits of all of them included."""
    d = config.hidden_size
    mixers = sum(_mixer_flops(block.mixer, d, length) for block in config.blocks)
    return mixers + 2 * length * _dense_weights(config)


def training_flops(config: ModelConfig, length: int) -> float:
    """Operations of a forward and a backward pass over one sequence, nothing computed twice."""
    return (1 + BACKWARD) * forward_flops(config, length)


def decode_flops(config: ModelConfig, length: int) -> float:
    """Operations of one decoding step: token number ``length`` (from 1) of a sequence, and its logits."""
    d = config.hidden_size
    mixers = sum(_step_flops(block.mixer, d, length) for block in config.blocks)
    return mixers + 2 * _dense_weights(config)


def kernel_cases(config: ModelConfig, length: int) -> list[Case]:
    """The calls of ops with a choice of kernels that ``length`` new tokens at the start of a sequence make.

    A kernel that depends on the device is chosen for this machine's GPU, where it has one.
    """
    hyenas = [block.mixer for block in config.blocks if isinstance(block.mixer, HyenaConfig)]
    cases = [_case(hyena.filter, length, length) for hyena in hyenas]
    if any(hyena.fp8_projection for hyena in hyenas):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = 3 * config.hidden_size, config.hidden_size
        cases.append(fp8_case(length, sizes, device, torch.float32))
    return list(dict.fromkeys(cases))


def _case(filter_: FilterConfig, new: int, end: int) -> Case:
    """``new`` tokens of a sequence that then has ``end``."""
    match filter_:
        case ExplicitFilterConfig(taps=taps):
            return Case(op="fir", length=new, taps=taps, continued=end > new)
        case ImplicitFilterConfig():
            return Case(op="long_convolution", length=new, taps=end, continued=end > new)
        case ComplexModalFilterConfig() | RealModalFilterConfig():
            return Case(op="modal", length=new)


def _dense_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: projections, MLPs and the head."""
    d = config.hidden_size
    total = d * config.vocab_size
    for block in config.blocks:
        match block.mlp:
            case GatedMLPConfig(intermediate_size=width):
                total += 3 * d * width
            case PlainMLPConfig(intermediate_size=width):
                total += 2 * d * width
        match block.mixer:
            case HyenaConfig():
                total += 4 * d * d
            case AttentionConfig(num_heads=heads, num_kv_heads=kv_heads):
                total += 2 * d * d + 2 * d * (d // heads) * (kv_heads or heads)
    return total


def _mixer_flops(config: MixerConfig, d: int, length: int) -> float:
    """Mixing along a whole sequence, projections aside."""
    match config:
        case AttentionConfig():
            return 2 * d * length * (length + 1)
        case HyenaConfig(short_taps=taps, filter=filter_):
            return 6 * d * _taps_used(taps, length) + d * _filter_flops(filter_, length)


def _filter_flops(filter_: FilterConfig, length: int) -> float:
    """One channel of a long filter over a whole sequence."""
    kernel = choose(_case(filter_, length, length)).name
    match filter_:
        case ExplicitFilterConfig(taps=taps):
            return 2 * _taps_used(taps, length) if kernel == "toeplitz" else _fft_flops(length, min(taps, length))
        case ImplicitFilterConfig():
            return _fft_flops(length, length)
        case ComplexModalFilterConfig() | RealModalFilterConfig() if kernel == "recurrent":
            return length * _recurrence_flops(filter_)
        case ComplexModalFilterConfig(modes=modes):
            return _chunked_flops(length, 2 * modes) + 8 * modes * -(-length // BLOCK)
        case RealModalFilterConfig(modes=modes):
            return _chunked_flops(length, modes) + 2 * modes * -(-length // BLOCK)


def _step_flops(config: MixerConfig, d: int, position: int) -> float:
    """One token, number ``position`` from 1, projections aside."""
    match config:
        case AttentionConfig():
            return 4 * d * position
        case HyenaConfig(short_taps=taps, filter=filter_):
            return 6 * d * min(taps, position) + d * _filter_step_flops(filter_, position)


def _filter_step_flops(filter_: FilterConfig, position: int) -> float:
    """One channel, one token, tiles of the online convolution spread evenly."""
    match filter_:
        case ExplicitFilterConfig(taps=taps):
            kernel = choose(Case(op="fir", length=1, taps=taps, continued=True)).name
            return 2 * min(taps, position) if kernel == "toeplitz" else _online_flops(min(taps, position))
        case ImplicitFilterConfig():
            return _online_flops(position)
        case ComplexModalFilterConfig() | RealModalFilterConfig():
            return _recurrence_flops(filter_)


def _online_flops(reach: int) -> float:
    """Half a block of products, and of each size of tile up to ``reach`` two transforms of 2 U every 2 U tokens."""
    sizes = [online_conv.BLOCK << level for level in range(max(0, (reach // online_conv.BLOCK).bit_length()))]
    return online_conv.BLOCK + sum(5 * math.log2(2 * size) + 3 for size in sizes)


def _taps_used(taps: int, length: int) -> int:
    """Σ min(t, taps) over t = 1 .. length."""
    start = min(taps, length)
    return start * (start + 1) // 2 + (length - start) * taps


def _recurrence_flops(filter_: ComplexModalFilterConfig | RealModalFilterConfig) -> int:
    """A complex multiply-add is 8 operations, the real part of one 4."""
    return filter_.modes * (12 if isinstance(filter_, ComplexModalFilterConfig) else 4)


def _chunked_flops(length: int, numbers: int) -> int:
    """Inside the blocks, and into and out of a state of so many real ``numbers``."""
    blocks, rest = divmod(length, BLOCK)
    return blocks * BLOCK * (BLOCK + 1) + rest * (rest + 1) + 4 * numbers * length


def _fft_flops(inputs: int, taps: int) -> float:
    f = fft_length(inputs + taps - 1)
    return 5 * f * math.log2(f) + 3 * f

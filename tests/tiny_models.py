"""Tiny models of every mixer and filter kind, with weights so loud that every part of them shows in the logits."""

from __future__ import annotations

import torch
from torch import nn

from crocuta.config import (
    AttentionConfig,
    BandsConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    DecayConfig,
    ExplicitFilterConfig,
    FilterConfig,
    FixedWindowConfig,
    GatedConvConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    LearnedWindowConfig,
    MixerConfig,
    ModelConfig,
    MultiHeadHyenaConfig,
    OrderNHyenaConfig,
    PlainMLPConfig,
    RealModalFilterConfig,
    ReLUConfig,
    RMSNormConfig,
    RopeConfig,
    ScalarConfig,
    SineConfig,
    SinusoidalConfig,
)
from crocuta.model.build import build_model
from crocuta.model.filters import ExplicitFilter, ImplicitFilter
from crocuta.model.lm import Model

VOCABULARY = 16
HIDDEN = 8
MAX_LENGTH = 160
"""What implicit filters are defined for."""

FILTERS: dict[str, FilterConfig] = {
    "explicit": ExplicitFilterConfig(taps=5),
    "explicit-decay": ExplicitFilterConfig(taps=40, decay=DecayConfig(horizon=64, rates=(0.01, 10.0))),
    "explicit-grouped": ExplicitFilterConfig(taps=7, groups=2, decay=DecayConfig(horizon=64, rates=(0.1, 10.0))),
    "explicit-fft": ExplicitFilterConfig(taps=600, groups=4),
    "implicit": ImplicitFilterConfig(max_length=MAX_LENGTH, width=8, window=FixedWindowConfig(shift=0.05)),
    "implicit-features": ImplicitFilterConfig(
        max_length=MAX_LENGTH, width=8, inner_layers=0, positions=BandsConfig(trained=True)
    ),
    "complex-stable": ComplexModalFilterConfig(modes=3, timescales=(1.0, 200.0)),
    "complex-raw": ComplexModalFilterConfig(modes=3, poles="raw", timescales=(1.0, 200.0)),
    "complex-grouped": ComplexModalFilterConfig(modes=2, groups=4, timescales=(1.0, 200.0)),
    "real-stable": RealModalFilterConfig(modes=3, timescales=(1.0, 200.0)),
    "real-raw": RealModalFilterConfig(modes=3, poles="raw", timescales=(1.0, 200.0)),
    "real-grouped": RealModalFilterConfig(modes=4, groups=2, timescales=(1.0, 200.0)),
    "implicit-sinusoidal": ImplicitFilterConfig(
        max_length=MAX_LENGTH,
        width=8,
        positions=SinusoidalConfig(features=6),
        activation=ReLUConfig(),
        window=LearnedWindowConfig(shift=0.02),
        groups=4,
        output_bias=True,
        bound=True,
        normalise="absolute",
    ),
}
ATTENTION: dict[str, AttentionConfig] = {
    "attention": AttentionConfig(num_heads=2),
    "attention-gqa": AttentionConfig(num_heads=4, num_kv_heads=2, qkv_bias=True, output_bias=True),
    "attention-no-rope": AttentionConfig(num_heads=2, num_kv_heads=1, rope=None),
    "attention-interpolated": AttentionConfig(num_heads=2, rope=RopeConfig(base=100.0, scale=3.0)),
    "attention-stored": AttentionConfig(num_heads=2, rope=RopeConfig(stored=True)),
}


_SCALAR = ImplicitFilterConfig(
    max_length=MAX_LENGTH,
    width=8,
    inner_layers=1,
    positions=ScalarConfig(),
    activation=SineConfig(frequency=30.0, trained=False),
    window=None,
    output_bias=True,
)
OTHERS: dict[str, MixerConfig] = {
    "order-n-shared": OrderNHyenaConfig(filter=FILTERS["implicit"], short_bias=True, projection_bias=True),
    "order-n-paper": OrderNHyenaConfig(
        filter=_SCALAR,
        gate_first=False,
        shared_filter=False,
        short_before_projection=True,
        short_bias=True,
        projection_bias=True,
        skip=False,
    ),
    "order-n-norms": OrderNHyenaConfig(
        filter=ComplexModalFilterConfig(modes=2, timescales=(1.0, 200.0)),
        convolutions=3,
        gate_first=False,
        short_taps=4,
        branch_norm=LayerNormConfig(),
        residual=0.1,
    ),
    "multi-head": MultiHeadHyenaConfig(num_heads=2, filter=FILTERS["implicit"], short_bias=True),
    "multi-head-modal": MultiHeadHyenaConfig(num_heads=4, filter=FILTERS["real-stable"], skip=False),
    "gated-conv": GatedConvConfig(taps=5, bias=False),
    "gated-conv-edifice": GatedConvConfig(norm=LayerNormConfig(), activation="silu", pointwise=True),
}


def _hyena(name: str, filter_: FilterConfig) -> HyenaConfig:
    """Hyena with ``filter_``; the options of the mixer itself differ from filter to filter."""
    turn = list(FILTERS).index(name)
    return HyenaConfig(
        filter=filter_,
        short_taps=(3, 1, 4)[turn % 3],
        short_bias=turn % 2 == 0,
        projection_bias=turn % 3 == 0,
        output_bias=turn % 4 != 1,
        skip=turn % 4 != 2,
    )


MIXERS: dict[str, MixerConfig] = {name: _hyena(name, config) for name, config in FILTERS.items()} | ATTENTION | OTHERS
STRIPE = tuple(MIXERS[name] for name in ("complex-stable", "attention-gqa", "implicit", "explicit-grouped", "real-raw"))
KINDS = (*MIXERS, "stripe")
ONLINE = ("explicit-fft", "implicit", "implicit-features", "implicit-sinusoidal", "order-n-shared", "multi-head")
MODAL = tuple(name for name in KINDS if name.startswith(("complex", "real")))


def tiny_config(kind: str, *, vocabulary: int = VOCABULARY, dropout: float = 0.0) -> ModelConfig:
    """Two blocks of one mixer with RMSNorm and gated MLPs; or "stripe", five mixers with LayerNorm and plain MLPs."""
    if kind == "stripe":
        plain, layer_norm = PlainMLPConfig(intermediate_size=12), LayerNormConfig()
        blocks = tuple(BlockConfig(mixer=mixer, mlp=plain, norm=layer_norm, dropout=dropout) for mixer in STRIPE)
        return ModelConfig(vocab_size=vocabulary, hidden_size=HIDDEN, blocks=blocks, norm=layer_norm)
    gated, norm = GatedMLPConfig(intermediate_size=12), RMSNormConfig(eps_inside_root=kind in MODAL)
    first = BlockConfig(mixer=MIXERS[kind], mlp=gated, norm=norm, dropout=dropout)
    last = BlockConfig(mixer=MIXERS[kind], mlp=None, norm=norm, dropout=dropout)
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, blocks=(first, last), norm=norm, tie_embeddings=kind in MODAL
    )


def tiny_model(
    kind: str, dtype: torch.dtype = torch.float32, *, vocabulary: int = VOCABULARY, dropout: float = 0.0, seed: int = 0
) -> Model:
    """The model of ``tiny_config``, loud, in evaluation mode."""
    return (
        loud(build_model(tiny_config(kind, vocabulary=vocabulary, dropout=dropout), seed=seed), seed).to(dtype).eval()
    )


@torch.no_grad()
def loud(model: Model, seed: int = 0) -> Model:
    """Give ``model`` weights of the size of a trained one: the initial ones leave mixers almost silent."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, size: float, around: float = 0.0) -> None:
        tensor.copy_(around + size * torch.randn(tensor.shape, generator=generator))

    implicit = {id(m) for f in model.modules() if isinstance(f, ImplicitFilter) for m in f.modules()}
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            draw(parameter, 0.2, around=1.0)
        elif name.endswith("bias") and ".filter." not in name:
            draw(parameter, 0.3)
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module) not in implicit:
            draw(module.weight, module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            draw(module.weight, 1.0)
        elif isinstance(module, ImplicitFilter):
            module.output.weight.mul_(4)
        elif isinstance(module, ExplicitFilter):
            module.weight.mul_(4)
    for block in model.blocks:
        block.mixer.output.weight.mul_(2)
    return model


def random_ids(*shape: int, vocabulary: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    """Ids that are no special tokens of the DNA tokenizer where the vocabulary is its own."""
    low, high = (7, 11) if vocabulary == VOCABULARY else (0, vocabulary)
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def chain_model(links: dict[int, int], vocabulary: int = 256) -> Model:
    """A model that is all but certain that ``links[id]`` follows id, whatever stood before; without a link, id."""
    model = build_model(ModelConfig(vocab_size=vocabulary, hidden_size=vocabulary, blocks=(), tie_embeddings=False))
    assert model.head is not None
    model.embedding.weight.copy_(torch.eye(vocabulary))
    model.head.weight.zero_()
    for token in range(vocabulary):
        model.head.weight[links.get(token, token), token] = 1.0  # the norm makes √vocabulary of it
    return model.eval()


def text_model(text: str, *, last: int | None = None) -> Model:
    """A model that writes ``text``, of bytes that all differ, and then ``last`` for ever."""
    chain = list(text.encode())
    assert len(set(chain)) == len(chain)
    return chain_model(dict(zip(chain, [*chain[1:], chain[-1] if last is None else last], strict=True)))

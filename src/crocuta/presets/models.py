"""Language models: every published configuration of the family, and tiny ones of each kind.

The numbers are those of the published configuration files; where a layout differs from ours (column order,
interleaving, flipped taps) the checkpoint formats convert it, so nothing of that shows here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import cycle
from types import MappingProxyType

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    DecayConfig,
    ExplicitFilterConfig,
    FilterConfig,
    FixedWindowConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    MixerConfig,
    ModelConfig,
    PlainMLPConfig,
    RealModalFilterConfig,
    RMSNormConfig,
    RopeConfig,
)
from crocuta.errors import ConfigError
from crocuta.presets.deep_dive import deep_dive_hyena


def striped(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    filter: FilterConfig,
    num_heads: int,
    attention_layers: Collection[int] = (),
    mlp_multiple: int = 16,
    dropout: float = 0.0,
) -> ModelConfig:
    """A StripedHyena of our own: Hyena with one kind of filter, attention with RoPE in ``attention_layers``.

    RMSNorm, a SiLU gated MLP of 8/3 · hidden_size rounded up to a multiple of ``mlp_multiple``, tied head.
    Raises ConfigError for a layer index outside 0..num_layers-1.
    """
    mlp = GatedMLPConfig(intermediate_size=_gated_width(hidden_size, mlp_multiple))
    attention = AttentionConfig(num_heads=num_heads)
    mixers = _stripes(num_layers, attention_layers, attention, HyenaConfig(filter=filter))
    blocks = tuple(BlockConfig(mixer=mixer, mlp=mlp, dropout=dropout) for mixer in mixers)
    return ModelConfig(vocab_size=vocab_size, hidden_size=hidden_size, blocks=blocks, embedding_dropout=dropout)


def _gated_width(hidden_size: int, multiple: int) -> int:
    """8/3 of the hidden size, as many weights as a plain MLP of 4, rounded up (StripedHyena's formula)."""
    return -(-(8 * hidden_size // 3) // multiple) * multiple


def _stripes(
    num_layers: int, attention_layers: Collection[int], attention: AttentionConfig, *hyenas: HyenaConfig
) -> list[MixerConfig]:
    """The mixer of every layer: attention where it is told, elsewhere the given kinds of Hyena in turn."""
    outside = [layer for layer in attention_layers if not 0 <= layer < num_layers]
    if outside:
        raise ConfigError(
            "attention_layers names a layer that does not exist",
            given=outside,
            expected=f"indices from 0 to {num_layers - 1}",
        )
    turn = cycle(hyenas)
    return [attention if layer in attention_layers else next(turn) for layer in range(num_layers)]


# --- published families ---


def _hyenadna(*, hidden_size: int, num_layers: int, max_length: int) -> ModelConfig:
    """HyenaDNA (hg38 configurations; shift 0.05 as in its standalone file and its Hugging Face port)."""
    implicit = ImplicitFilterConfig(max_length=max_length, window=FixedWindowConfig(shift=0.05), wide_positions=False)
    mixer = HyenaConfig(filter=implicit, short_bias=True, projection_bias=True)
    block = BlockConfig(mixer=mixer, mlp=PlainMLPConfig(intermediate_size=4 * hidden_size), norm=LayerNormConfig())
    return ModelConfig(
        vocab_size=16,  # 12 tokens, padded to a multiple of 8
        hidden_size=hidden_size,
        blocks=(block,) * num_layers,
        norm=LayerNormConfig(),
        embedding_dropout=0.1,
    )


def _striped_hyena_1(
    *,
    num_layers: int,
    modes: int,
    attention: AttentionConfig,
    attention_layers: Collection[int],
    mlp: GatedMLPConfig,
    norm: RMSNormConfig,
) -> tuple[BlockConfig, ...]:
    """Blocks of StripedHyena 1: complex modal filters, and a bias on every projection of a Hyena layer."""
    poles = ComplexModalFilterConfig(modes=modes, poles="raw")
    hyena = HyenaConfig(filter=poles, short_bias=True, projection_bias=True)
    mixers = _stripes(num_layers, attention_layers, attention, hyena)
    return tuple(BlockConfig(mixer=mixer, mlp=mlp, norm=norm) for mixer in mixers)


def _stripedhyena_7b(
    *,
    vocab_size: int = 32_000,
    hidden_size: int = 4096,
    num_layers: int = 32,
    num_heads: int = 32,
    intermediate_size: int = 14_336,
) -> ModelConfig:
    """StripedHyena-Hessian-7B and -Nous-7B (7b-sh-32k-v1.yml)."""
    norm = RMSNormConfig(eps=1e-5, eps_inside_root=True)
    blocks = _striped_hyena_1(
        num_layers=num_layers,
        modes=2,
        attention=AttentionConfig(num_heads=num_heads, num_kv_heads=num_heads // 4, rope=RopeConfig(base=500_000.0)),
        attention_layers=range(1, num_layers, 2),
        mlp=GatedMLPConfig(intermediate_size=intermediate_size),
        norm=norm,
    )
    return ModelConfig(vocab_size=vocab_size, hidden_size=hidden_size, blocks=blocks, norm=norm, tie_embeddings=False)


def _evo1(
    *,
    hidden_size: int = 4096,
    num_layers: int = 32,
    num_heads: int = 32,
    attention_layers: Collection[int] = (8, 16, 24),
    rope_scale: float = 1.0,
) -> ModelConfig:
    """Evo 1 and 1.5 (evo-1-8k-base_inference.yml, evo-1-131k-base_inference.yml)."""
    blocks = _striped_hyena_1(
        num_layers=num_layers,
        modes=8,
        attention=AttentionConfig(
            num_heads=num_heads, qkv_bias=True, output_bias=True, rope=RopeConfig(scale=rope_scale)
        ),
        attention_layers=attention_layers,
        mlp=GatedMLPConfig(intermediate_size=_gated_width(hidden_size, 16), activation="gelu"),
        norm=RMSNormConfig(),
    )
    return ModelConfig(vocab_size=512, hidden_size=hidden_size, blocks=blocks)


def _evo2(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    attention_layers: Collection[int],
    groups: int,
    intermediate_size: int,
    rope: RopeConfig,
) -> ModelConfig:
    """Evo 2 (StripedHyena 2): Hyena-SE, -MR and -LI in turn, and attention between them."""
    short = HyenaConfig(filter=ExplicitFilterConfig(taps=7, groups=groups), skip=False)
    medium = HyenaConfig(filter=ExplicitFilterConfig(taps=128, groups=groups))
    long = HyenaConfig(filter=RealModalFilterConfig(modes=16, poles="raw"))
    attention = AttentionConfig(num_heads=num_heads, output_bias=True, rope=rope)
    # In training a configuration slip left the gates linear after the first layer; the weights know no other.
    first = GatedMLPConfig(intermediate_size=intermediate_size, activation="gelu")
    later = GatedMLPConfig(intermediate_size=intermediate_size, activation="identity")
    mixers = _stripes(num_layers, attention_layers, attention, short, medium, long)
    blocks = tuple(BlockConfig(mixer=mixer, mlp=later if layer else first) for layer, mixer in enumerate(mixers))
    return ModelConfig(vocab_size=512, hidden_size=hidden_size, blocks=blocks)


def _evo2_rope(base: float, scale: float = 1.0) -> RopeConfig:
    """The files of long-context models hold frequencies of a larger base than their configuration says."""
    return RopeConfig(base=base, scale=scale, stored=True)


_EVO2_7B = partial(
    _evo2, hidden_size=4096, num_layers=32, num_heads=32, attention_layers=(3, 10, 17, 24, 31), groups=256
)
_EVO2_40B = partial(
    _evo2,
    hidden_size=8192,
    num_layers=50,
    num_heads=64,
    attention_layers=(3, 10, 17, 24, 31, 35, 42, 49),
    groups=512,
)

# --- tiny models for tests and first steps ---

_TINY = partial(striped, vocab_size=512, hidden_size=32, num_heads=2)

PRESETS: Mapping[str, Callable[[], ModelConfig]] = MappingProxyType(
    {
        "tiny-modal": partial(_TINY, num_layers=2, filter=ComplexModalFilterConfig(modes=4, timescales=(1.0, 256.0))),
        "tiny-modal-real": partial(_TINY, num_layers=2, filter=RealModalFilterConfig(modes=4, timescales=(1.0, 256.0))),
        "tiny-implicit": partial(_TINY, num_layers=2, filter=ImplicitFilterConfig(max_length=256, width=16)),
        "tiny-explicit": partial(
            _TINY,
            num_layers=2,
            filter=ExplicitFilterConfig(taps=16, groups=8, decay=DecayConfig(horizon=256)),
        ),
        "tiny-striped": partial(
            _TINY,
            num_layers=4,
            filter=ComplexModalFilterConfig(modes=4, timescales=(1.0, 256.0)),
            attention_layers=(1, 3),
        ),
        "tiny-hyenadna": partial(_hyenadna, hidden_size=32, num_layers=2, max_length=258),
        "tiny-stripedhyena": partial(
            _stripedhyena_7b, vocab_size=128, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=96
        ),
        "tiny-evo1": partial(_evo1, hidden_size=32, num_layers=3, num_heads=2, attention_layers=(1,), rope_scale=16.0),
        "tiny-evo2": partial(
            _evo2,
            hidden_size=32,
            num_layers=5,
            num_heads=2,
            attention_layers=(3,),
            groups=8,
            intermediate_size=96,
            rope=_evo2_rope(1e4),
        ),
        "deep-dive-hyena": deep_dive_hyena,
        "hyenadna-tiny-1k": partial(_hyenadna, hidden_size=128, num_layers=2, max_length=1026),
        "hyenadna-tiny-1k-d256": partial(_hyenadna, hidden_size=256, num_layers=2, max_length=1026),
        "hyenadna-tiny-16k-d128": partial(_hyenadna, hidden_size=128, num_layers=2, max_length=16_386),
        "hyenadna-small-32k": partial(_hyenadna, hidden_size=256, num_layers=4, max_length=32_770),
        "hyenadna-medium-160k": partial(_hyenadna, hidden_size=256, num_layers=8, max_length=160_002),
        "hyenadna-medium-450k": partial(_hyenadna, hidden_size=256, num_layers=8, max_length=450_002),
        "hyenadna-large-1m": partial(_hyenadna, hidden_size=256, num_layers=8, max_length=1_000_002),
        "stripedhyena-7b": _stripedhyena_7b,
        "evo1-8k": _evo1,
        "evo1-131k": partial(_evo1, rope_scale=16.0),
        "evo2-1b-8k": partial(
            _evo2,
            hidden_size=1920,
            num_layers=25,
            num_heads=15,
            attention_layers=(3, 10, 17, 24),
            groups=128,
            intermediate_size=5120,
            rope=_evo2_rope(1e4),
        ),
        "evo2-7b-8k": partial(_EVO2_7B, intermediate_size=11_008, rope=_evo2_rope(1e4)),
        "evo2-7b-262k": partial(_EVO2_7B, intermediate_size=11_008, rope=_evo2_rope(1e4, 32.0)),
        "evo2-7b-1m": partial(_EVO2_7B, intermediate_size=11_264, rope=_evo2_rope(1e4, 128.0)),
        "evo2-20b-1m": partial(
            _evo2,
            hidden_size=8192,
            num_layers=24,
            num_heads=64,
            attention_layers=(3, 10, 17),
            groups=512,
            intermediate_size=22_528,
            rope=_evo2_rope(1e6, 128.0),
        ),
        "evo2-40b-8k": partial(_EVO2_40B, intermediate_size=21_888, rope=_evo2_rope(1e6)),
        "evo2-40b-1m": partial(_EVO2_40B, intermediate_size=22_528, rope=_evo2_rope(1e6, 128.0)),
    }
)
"""Name to a function that makes the configuration."""

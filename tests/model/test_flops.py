"""Operations of encoders and of every mixer but plain Hyena and causal attention, worked out by hand."""

from __future__ import annotations

import math

import pytest

from crocuta.config import (
    AttentionConfig,
    AttentionPoolingConfig,
    BidirectionalHyenaConfig,
    BlockConfig,
    ClassificationConfig,
    EncoderConfig,
    ExplicitFilterConfig,
    FeatureInputConfig,
    GatedConvConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    InputConfig,
    LayerNormConfig,
    MixerConfig,
    ModelConfig,
    MultiHeadHyenaConfig,
    OrderNHyenaConfig,
    ProjectionConfig,
    RealModalFilterConfig,
    TokenInputConfig,
)
from crocuta.model import flops
from crocuta.ops.kernels.library import switched_off
from crocuta.ops.modal import BLOCK

FIVE_TAPS = ExplicitFilterConfig(taps=5)
IMPLICIT = ImplicitFilterConfig(max_length=100, width=16)
REAL = RealModalFilterConfig(modes=3)


def one_block(mixer: MixerConfig) -> ModelConfig:
    """8 channels, 10 ids, one block without MLP."""
    return ModelConfig(vocab_size=10, hidden_size=8, blocks=(BlockConfig(mixer=mixer, mlp=None),))


def dense(weights: int) -> int:
    """A token's matrix products: the mixer's and the head's."""
    return 2 * (weights + 80)


SQUARE = 8 * 8  # a projection of the hidden states to as many


# --- order N ---


def test_order_n_by_hand() -> None:
    """C = 2: a gate more, so 4 branches, where the gate comes first; two filters of 5 taps."""
    first = one_block(OrderNHyenaConfig(filter=FIVE_TAPS, convolutions=2))
    paper = one_block(OrderNHyenaConfig(filter=FIVE_TAPS, convolutions=2, gate_first=False))
    assert flops.decode_flops(first, 50) == dense(5 * SQUARE) + 2 * 32 * 3 + 2 * (2 * 8 * 5)
    assert flops.decode_flops(paper, 50) == dense(4 * SQUARE) + 2 * 24 * 3 + 2 * (2 * 8 * 5)
    assert flops.decode_flops(first, 1) == dense(5 * SQUARE) + 2 * 32 + 2 * (2 * 8)
    l = 20
    short, long = 2 * 32 * (3 * l - 3), 2 * 2 * 8 * (5 * l - 10)  # 1 + 2 + 3 + 3 + ..., 1 + 2 + 3 + 4 + 5 + 5 + ...
    assert flops.forward_flops(first, l) == l * dense(5 * SQUARE) + short + long


def test_a_short_filter_before_the_projection_has_fewer_channels() -> None:
    config = one_block(OrderNHyenaConfig(filter=FIVE_TAPS, convolutions=3, short_before_projection=True, short_taps=4))
    assert flops.decode_flops(config, 50) == dense(6 * SQUARE) + 2 * 8 * 4 + 3 * (2 * 8 * 5)


def test_one_convolution_with_the_gate_first_costs_what_hyena_does() -> None:
    for filter_ in (FIVE_TAPS, IMPLICIT, REAL):
        order_n = one_block(OrderNHyenaConfig(filter=filter_, convolutions=1))
        hyena = one_block(HyenaConfig(filter=filter_))
        for l in (1, 40, 90):
            assert flops.forward_flops(order_n, l) == flops.forward_flops(hyena, l)
            assert flops.decode_flops(order_n, l) == flops.decode_flops(hyena, l)


# --- multi-head ---


def test_multi_head_by_hand() -> None:
    """2 heads of 4 channels: 2 · 4 · 4 = 32 products pass the filter; 3 · 8 · 4 make and sum them."""
    config = one_block(MultiHeadHyenaConfig(num_heads=2, filter=FIVE_TAPS))
    assert flops.decode_flops(config, 50) == dense(4 * SQUARE) + 2 * 24 * 3 + 96 + 32 * 2 * 5
    modal = one_block(MultiHeadHyenaConfig(num_heads=2, filter=REAL))
    assert flops.decode_flops(modal, 50) == dense(4 * SQUARE) + 2 * 24 * 3 + 96 + 32 * 4 * 3
    l, f = 32, 64  # 64 is the shortest good length >= 63
    fft = 32 * (5 * f * math.log2(f) + 3 * f)
    implicit = one_block(MultiHeadHyenaConfig(num_heads=2, filter=IMPLICIT))
    assert flops.forward_flops(implicit, l) == l * (dense(4 * SQUARE) + 96) + 2 * 24 * (3 * l - 3) + fft


# --- both sides ---


def test_bidirectional_hyena_by_hand() -> None:
    """Two filters; one tap of the short one, which then has no ends."""
    config = one_block(BidirectionalHyenaConfig(filter=FIVE_TAPS, short_taps=1))
    l = 20
    assert flops.forward_flops(config, l) == l * dense(4 * SQUARE) + 2 * 24 * l + 2 * 2 * 8 * (5 * l - 10)
    l = 2 * BLOCK + 3
    inside = 2 * BLOCK * (BLOCK + 1) + 3 * 4
    modal = 8 * (inside + 4 * 3 * l + 2 * 3 * 3)
    config = one_block(BidirectionalHyenaConfig(filter=REAL, short_taps=1))
    with switched_off():
        assert flops.forward_flops(config, l) == l * dense(4 * SQUARE) + 2 * 24 * l + 2 * modal


def test_attention_to_both_sides_sees_all_keys() -> None:
    l = 7
    full, causal = (one_block(AttentionConfig(num_heads=2, causal=causal)) for causal in (False, True))
    assert flops.forward_flops(full, l) == l * dense(4 * SQUARE) + 4 * 8 * 7 * 7
    assert flops.forward_flops(causal, l) == l * dense(4 * SQUARE) + 4 * 8 * (1 + 2 + 3 + 4 + 5 + 6 + 7)


# --- the gated convolution ---


def test_a_gated_convolution_by_hand() -> None:
    plain = one_block(GatedConvConfig(taps=7))
    pointwise = one_block(GatedConvConfig(taps=7, norm=LayerNormConfig(), activation="silu", pointwise=True))
    assert flops.decode_flops(plain, 50) == dense(3 * SQUARE) + 2 * 8 * 7
    assert flops.decode_flops(plain, 3) == dense(3 * SQUARE) + 2 * 8 * 3
    assert flops.decode_flops(pointwise, 50) == dense(4 * SQUARE) + 2 * 8 * 7
    l = 20
    assert flops.forward_flops(plain, l) == l * dense(3 * SQUARE) + 2 * 8 * (7 * l - 21)


@pytest.mark.parametrize(
    "mixer",
    [
        OrderNHyenaConfig(filter=FIVE_TAPS, convolutions=3),
        MultiHeadHyenaConfig(num_heads=2, filter=FIVE_TAPS),
        GatedConvConfig(),
    ],
)
def test_decoding_a_sequence_costs_what_reading_it_does(mixer: MixerConfig) -> None:
    config = one_block(mixer)
    assert sum(flops.decode_flops(config, t) for t in range(1, 101)) == flops.forward_flops(config, 100)


# --- encoders ---


def encoder(input: InputConfig, **fields) -> EncoderConfig:
    block = BlockConfig(mixer=GatedConvConfig(taps=1), mlp=None)
    return EncoderConfig(input=input, hidden_size=8, blocks=(block,), **fields)


BODY = 2 * 3 * SQUARE + 2 * 8  # of a token
HEAD = {"projection": ProjectionConfig(size=4), "head": ClassificationConfig(labels=3)}


def test_encoders_by_hand() -> None:
    ids, l = TokenInputConfig(vocab_size=4), 10
    assert flops.forward_flops(encoder(ids), l) == l * BODY
    assert flops.forward_flops(encoder(ids, **HEAD), l) == l * BODY + 2 * (8 * 4 + 4 * 3)
    assert flops.forward_flops(encoder(ids, pooling=None, **HEAD), l) == l * (BODY + 2 * (8 * 4 + 4 * 3))
    assert flops.forward_flops(encoder(ids, head=ClassificationConfig(labels=3)), l) == l * BODY + 2 * 8 * 3
    both = encoder(ids, complement=(3, 2, 1, 0), **HEAD)
    assert flops.forward_flops(both, l) == 2 * l * BODY + 2 * (8 * 4 + 4 * 3)
    pooled = encoder(ids, pooling=AttentionPoolingConfig())  # pooling is too little to count
    assert flops.forward_flops(pooled, l) == l * BODY


def test_features_cost_their_projection_where_there_is_one() -> None:
    l = 10
    assert flops.forward_flops(encoder(FeatureInputConfig(size=5)), l) == l * (BODY + 2 * 5 * 8)
    assert flops.forward_flops(encoder(FeatureInputConfig(size=8)), l) == l * BODY
    assert flops.forward_flops(encoder(FeatureInputConfig(size=9)), l) == l * (BODY + 2 * 8 * 9)

"""Configurations of encoders and of the layers that only they need: JSON both ways, and mistakes in one clear line."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crocuta.config import (
    AttentionConfig,
    AttentionPoolingConfig,
    BidirectionalHyenaConfig,
    BlockConfig,
    ClassificationConfig,
    EncoderConfig,
    ExplicitFilterConfig,
    FeatureInputConfig,
    FixedWindowConfig,
    GatedConvConfig,
    GatedMLPConfig,
    ImplicitFilterConfig,
    LastPoolingConfig,
    LayerNormConfig,
    LearnedWindowConfig,
    MeanPoolingConfig,
    MultiHeadHyenaConfig,
    OrderNHyenaConfig,
    ProjectionConfig,
    RealModalFilterConfig,
    RegressionConfig,
    ReLUConfig,
    RMSNormConfig,
    ScalarConfig,
    SinusoidalConfig,
    TokenInputConfig,
)
from crocuta.errors import ConfigError

# --- random encoders ---

HIDDEN = 24
counts = st.integers(1, 64)
positive = st.floats(min_value=1e-6, max_value=1e6)
dropouts = st.floats(0.0, 0.99)
flags = {name: st.booleans() for name in ("short_bias", "projection_bias", "output_bias", "skip")}
norms = st.builds(RMSNormConfig, eps=positive, eps_inside_root=st.booleans()) | st.builds(LayerNormConfig, eps=positive)
filters = st.one_of(
    st.builds(ExplicitFilterConfig, taps=counts),
    st.builds(RealModalFilterConfig, modes=counts),
    st.builds(
        ImplicitFilterConfig,
        max_length=st.integers(2, 10**6),
        positions=st.sampled_from([ScalarConfig(), SinusoidalConfig(features=4, base=3.0, decay=0.5)]),
        activation=st.just(ReLUConfig()),
        window=st.sampled_from([None, LearnedWindowConfig(shift=0.1), FixedWindowConfig(shift=0.1)]),
        bound=st.booleans(),
        normalise=st.sampled_from([None, "absolute", "energy"]),
    ),
)
mixers = st.one_of(
    st.builds(
        OrderNHyenaConfig,
        filter=filters,
        convolutions=st.integers(1, 5),
        gate_first=st.booleans(),
        shared_filter=st.booleans(),
        interleaved_windows=st.booleans(),
        short_before_projection=st.booleans(),
        branch_norm=st.none() | norms,
        residual=st.floats(0, 1),
        dropout=dropouts,
        **flags,
    ),
    st.builds(MultiHeadHyenaConfig, num_heads=st.sampled_from([1, 2, 12]), filter=filters, **flags),
    st.builds(BidirectionalHyenaConfig, filter=filters, short_taps=st.sampled_from([1, 3, 9]), **flags),
    st.builds(
        GatedConvConfig,
        taps=counts,
        bias=st.booleans(),
        norm=st.none() | norms,
        activation=st.sampled_from(["silu", "identity"]),
        pointwise=st.booleans(),
    ),
    st.builds(AttentionConfig, num_heads=st.sampled_from([2, 6]), causal=st.booleans()),
)
blocks = st.builds(
    BlockConfig, mixer=mixers, mlp=st.none() | st.just(GatedMLPConfig(intermediate_size=8)), dropout=dropouts
)
poolings = st.one_of(
    st.none(),
    st.just(MeanPoolingConfig()),
    st.builds(LastPoolingConfig, positions=counts),
    st.just(AttentionPoolingConfig()),
)
heads = st.one_of(
    st.none(),
    st.builds(ClassificationConfig, labels=st.integers(2, 50), dropout=dropouts),
    st.builds(RegressionConfig, targets=counts, dropout=dropouts),
)
encoders = st.builds(
    EncoderConfig,
    input=st.builds(TokenInputConfig, vocab_size=st.just(4)) | st.builds(FeatureInputConfig, size=counts),
    hidden_size=st.just(HIDDEN),
    blocks=st.lists(blocks, max_size=3).map(tuple),
    norm=norms,
    pooling=poolings,
    projection=st.none() | st.builds(ProjectionConfig, size=counts, normalise=st.booleans()),
    head=heads,
    embedding_dropout=dropouts,
)


@settings(max_examples=40)
@given(encoders)
def test_json_and_back_is_the_same_encoder(encoder: EncoderConfig) -> None:
    written = encoder.to_json()
    assert EncoderConfig.from_json(json.dumps(written)) == encoder
    assert EncoderConfig.from_json(written) == encoder
    assert set(written) == {f.name for f in dataclasses.fields(EncoderConfig)}


@settings(max_examples=40)
@given(encoders)
def test_what_an_encoder_says_of_itself(encoder: EncoderConfig) -> None:
    mixers_ = [block.mixer for block in encoder.blocks]
    ahead = [m for m in mixers_ if isinstance(m, BidirectionalHyenaConfig) or getattr(m, "causal", True) is False]
    assert encoder.causal is (not ahead)
    lengths = [m.filter.max_length for m in mixers_ if isinstance(getattr(m, "filter", None), ImplicitFilterConfig)]
    assert encoder.max_length == min(lengths, default=None)
    size = encoder.hidden_size if encoder.projection is None else encoder.projection.size
    if isinstance(encoder.head, ClassificationConfig):
        size = encoder.head.labels
    elif isinstance(encoder.head, RegressionConfig):
        size = encoder.head.targets
    assert encoder.output_size == size


def test_a_complement_survives_json() -> None:
    config = EncoderConfig(input=TokenInputConfig(vocab_size=4), hidden_size=8, blocks=(), complement=(3, 2, 1, 0))
    assert EncoderConfig.from_json(json.dumps(config.to_json())).complement == (3, 2, 1, 0)


# --- mistakes ---


def _encoder(**fields: Any) -> dict[str, Any]:
    return {"input": {"type": "tokens", "vocab_size": 4}, "hidden_size": 8, "blocks": []} | fields


def _mixer(**fields: Any) -> dict[str, Any]:
    return _encoder(blocks=[{"mixer": fields, "mlp": None}])


_FILTER = {"type": "explicit", "taps": 3}

MISTAKES: list[tuple[dict[str, Any], str]] = [
    (_encoder(hidden_size=0), r"EncoderConfig\.hidden_size must be positive: got 0"),
    (_encoder(hiden_size=8), r"unknown field 'hiden_size'.*did you mean 'hidden_size'"),
    ({"hidden_size": 8, "blocks": []}, "missing field 'input'"),
    (_encoder(input={"type": "token", "vocab_size": 4}), r"input\.type names no known kind.*did you mean 'tokens'"),
    (_encoder(input={"type": "tokens", "vocab_size": 0}), r"TokenInputConfig\.vocab_size must be positive"),
    (_encoder(input={"type": "features", "size": -1}), r"FeatureInputConfig\.size must be positive"),
    (_encoder(pooling={"type": "max"}), r"pooling\.type names no known kind.*known: mean, last, attention"),
    (_encoder(pooling={"type": "last", "positions": 0}), r"LastPoolingConfig\.positions must be positive"),
    (_encoder(projection={"size": 0}), r"ProjectionConfig\.size must be positive"),
    (_encoder(projection={"size": 4, "normalize": True}), r"projection\.normalize.*did you mean 'normalise'"),
    (_encoder(head={"type": "classification", "labels": 1}), "labels is too small: got 1; expected >= 2"),
    (_encoder(head={"type": "classification", "labels": 2, "dropout": 1.0}), r"ClassificationConfig\.dropout"),
    (_encoder(head={"type": "regression", "targets": 0}), r"RegressionConfig\.targets must be positive"),
    (_encoder(head={"type": "regression", "dropout": -0.5}), r"RegressionConfig\.dropout is impossible"),
    (_encoder(embedding_dropout=1.0), r"EncoderConfig\.embedding_dropout is impossible"),
    (_encoder(precision="fast"), r"precision has an unknown value.*'exact' or 'upstream'"),
    (_encoder(complement=[1, 2, 3, 0]), r"no complement: got \(1, 2, 3, 0\); expected 4 ids, each the complement"),
    (_encoder(complement=[1, 0]), r"no complement: got \(1, 0\); expected 4 ids"),
    (_encoder(complement=[0, 1, 2, 4]), "is no complement"),
    (_encoder(complement=[0, 1, 2, -1]), "is no complement"),
    (_encoder(input={"type": "features", "size": 4}, complement=[0, 1, 2, 3]), "complement needs ids"),
    (_mixer(type="hyena_order_n", filter=_FILTER, convolutions=0), r"OrderNHyenaConfig\.convolutions must be positive"),
    (_mixer(type="hyena_order_n", filter=_FILTER, short_taps=0), r"OrderNHyenaConfig\.short_taps must be positive"),
    (_mixer(type="hyena_order_n", filter=_FILTER, dropout=1.0), r"OrderNHyenaConfig\.dropout is impossible"),
    (_mixer(type="hyena_order_n", filter=_FILTER, order=3), r"unknown field 'blocks\[0\]\.mixer\.order'"),
    (
        _mixer(type="hyena_order_n", filter=_FILTER | {"groups": 3}),
        r"filter\.groups must divide hidden_size: got groups=3",
    ),
    (_mixer(type="hyena_multi_head", filter=_FILTER, num_heads=0), r"MultiHeadHyenaConfig\.num_heads must be positive"),
    (_mixer(type="hyena_multi_head", filter=_FILTER, num_heads=3), "num_heads must divide hidden_size"),
    (_mixer(type="hyena_multi_head", filter=_FILTER | {"groups": 2}, num_heads=2), r"filter\.groups is given: got 2"),
    (_mixer(type="hyena_bidirectional", filter=_FILTER, short_taps=2), "short_taps is even: got 2; expected an odd"),
    (_mixer(type="hyena_bidirectional", filter=_FILTER, short_taps=0), "short_taps must be positive"),
    (_mixer(type="hyena_bidirectional", filter=_FILTER | {"groups": 3}), "groups must divide hidden_size"),
    (_mixer(type="gated_conv", taps=0), r"GatedConvConfig\.taps must be positive"),
    (_mixer(type="gated_conv", activation="relu"), r"activation has an unknown value.*'silu'"),
    (_mixer(type="gated_convolution"), r"mixer\.type names no known kind.*did you mean 'gated_conv'"),
]


@pytest.mark.parametrize(("value", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_one_clear_line(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        EncoderConfig.from_json(value)
    assert "\n" not in str(caught.value)


PARTS: list[tuple[dict[str, Any], str]] = [
    ({"positions": {"type": "sinusoidal", "features": 3}}, r"SinusoidalConfig\.features is impossible: got 3.*even"),
    ({"positions": {"type": "sinusoidal", "base": 0.0}}, r"SinusoidalConfig\.base must be positive"),
    ({"positions": {"type": "sinusoidal", "decay": -1.0}}, r"SinusoidalConfig\.decay is negative"),
    ({"positions": {"type": "bands", "features": 1}}, r"BandsConfig\.features is impossible: got 1"),
    ({"activation": {"type": "sine", "frequency": 0.0}}, r"SineConfig\.frequency must be positive"),
    ({"activation": {"type": "tanh"}}, r"activation\.type names no known kind.*known: sine, relu"),
    ({"window": {"type": "learned", "decay": [0.0, 1.0]}}, r"LearnedWindowConfig\.fastest must be positive"),
    ({"window": {"type": "learned", "target": 1.0}}, r"LearnedWindowConfig\.target is impossible"),
    ({"window": {"type": "fixed", "decay": [0.0, 1.0]}}, r"FixedWindowConfig\.fastest must be positive"),
    ({"window": {"type": "fixed", "target": 0.0}}, r"FixedWindowConfig\.target is impossible"),
    ({"width": 0}, r"ImplicitFilterConfig\.width must be positive"),
    ({"groups": 0}, r"ImplicitFilterConfig\.groups must be positive"),
]


@pytest.mark.parametrize(("part", "message"), PARTS, ids=[m for _, m in PARTS])
def test_a_mistake_in_an_implicit_filter(part: dict[str, Any], message: str) -> None:
    mixer = {"type": "hyena", "filter": {"type": "implicit", "max_length": 8} | part}
    with pytest.raises(ConfigError, match=message):
        EncoderConfig.from_json(_encoder(blocks=[{"mixer": mixer, "mlp": None}]))


def test_broken_json_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        EncoderConfig.from_json('{"hidden_size": 8,')


def test_an_encoder_config_cannot_be_changed() -> None:
    config = EncoderConfig(input=TokenInputConfig(vocab_size=4), hidden_size=8, blocks=())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 9  # type: ignore[misc]


def test_both_strands_have_no_last_position() -> None:
    with pytest.raises(ConfigError, match="complement does not go with last pooling"):
        EncoderConfig.from_json(
            _encoder(input={"type": "tokens", "vocab_size": 2}, complement=[1, 0], pooling={"type": "last"})
        )

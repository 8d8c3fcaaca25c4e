"""Configurations: JSON both ways for any model, a suggestion for every misspelt field, no impossible value."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.config import (
    AttentionConfig,
    BandsConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    DecayConfig,
    ExplicitFilterConfig,
    FixedWindowConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    LearnedWindowConfig,
    ModelConfig,
    PlainMLPConfig,
    RealModalFilterConfig,
    ReLUConfig,
    RMSNormConfig,
    RopeConfig,
    ScalarConfig,
    SineConfig,
    SinusoidalConfig,
)
from crocuta.errors import ConfigError
from crocuta.presets import preset

# --- random models ---

HIDDEN = 24
positive = st.floats(min_value=1e-6, max_value=1e6)
pairs = st.tuples(positive, positive)
groups = st.sampled_from([None, 1, 2, 3, 12, HIDDEN])
counts = st.integers(1, 64)
activations = st.sampled_from(["silu", "gelu", "gelu_tanh", "identity"])
poles = st.sampled_from(["stable", "raw"])
dropouts = st.floats(0.0, 0.99)

positions = st.one_of(
    st.builds(BandsConfig, features=st.integers(1, 8).map(lambda bands: 2 * bands + 1), trained=st.booleans()),
    st.just(ScalarConfig()),
    st.builds(SinusoidalConfig, features=st.integers(1, 8).map(lambda n: 2 * n), base=positive, decay=positive),
)
windows = st.one_of(
    st.none(),
    st.builds(FixedWindowConfig, decay=pairs, target=st.floats(0.01, 0.9), shift=positive),
    st.builds(LearnedWindowConfig, decay=pairs, target=st.floats(0.01, 0.9), shift=positive),
)
decays = st.builds(DecayConfig, rates=pairs, horizon=counts)
filters = st.one_of(
    st.builds(ExplicitFilterConfig, taps=counts, groups=groups, decay=st.none() | decays),
    st.builds(
        ImplicitFilterConfig,
        max_length=st.integers(2, 10**6),
        width=counts,
        inner_layers=st.integers(0, 4),
        positions=positions,
        activation=st.builds(SineConfig, frequency=positive, trained=st.booleans()) | st.just(ReLUConfig()),
        window=windows,
        groups=groups,
        output_bias=st.booleans(),
        bound=st.booleans(),
        normalise=st.sampled_from([None, "absolute", "energy"]),
    ),
    st.builds(ComplexModalFilterConfig, modes=counts, groups=groups, poles=poles, timescales=pairs),
    st.builds(RealModalFilterConfig, modes=counts, groups=groups, poles=poles, timescales=pairs),
)
flags = {name: st.booleans() for name in ("short_bias", "projection_bias", "output_bias", "skip")}
hyenas = st.builds(HyenaConfig, filter=filters, short_taps=counts, **flags)
ropes = st.builds(RopeConfig, base=positive, scale=positive, stored=st.booleans())
attentions = st.builds(
    AttentionConfig,
    num_heads=st.sampled_from([2, 4, 6, 12]),
    num_kv_heads=st.sampled_from([None, 1, 2]),
    qkv_bias=st.booleans(),
    output_bias=st.booleans(),
    rope=st.none() | ropes,
)
mlps = st.one_of(
    st.builds(GatedMLPConfig, intermediate_size=counts, activation=activations, bias=st.booleans()),
    st.builds(PlainMLPConfig, intermediate_size=counts, activation=activations, bias=st.booleans()),
)
norms = st.one_of(
    st.builds(RMSNormConfig, eps=positive, eps_inside_root=st.booleans()),
    st.builds(LayerNormConfig, eps=positive),
)
blocks = st.builds(BlockConfig, mixer=hyenas | attentions, mlp=st.none() | mlps, norm=norms, dropout=dropouts)
models = st.builds(
    ModelConfig,
    vocab_size=counts,
    hidden_size=st.just(HIDDEN),
    blocks=st.lists(blocks, max_size=4).map(tuple),
    norm=norms,
    tie_embeddings=st.booleans(),
    embedding_dropout=dropouts,
)


@given(models)
def test_json_and_back_is_the_same_model(model: ModelConfig) -> None:
    text = json.dumps(model.to_json())
    assert ModelConfig.from_json(text) == model
    assert ModelConfig.from_json(json.loads(text)) == model


@given(models)
def test_json_shows_every_field(model: ModelConfig) -> None:
    """A saved config.json is complete, so that a later change of a default changes no saved model."""
    written = model.to_json()
    assert set(written) == {f.name for f in dataclasses.fields(ModelConfig)}
    for block, shown in zip(model.blocks, written["blocks"], strict=True):
        assert set(shown["mixer"]) == {"type"} | {f.name for f in dataclasses.fields(block.mixer)}
        assert shown["mixer"]["type"] == block.mixer.type


# --- mistakes ---


def _field_paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items: Iterator[tuple[str | int, Any]] = iter(())
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, list):
        items = iter(enumerate(value))
    for key, item in items:
        if isinstance(key, str) and key != "type":
            yield (*path, key)
        yield from _field_paths(item, (*path, key))


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


TYPOS: dict[str, Callable[[str], str]] = {
    "letter lost": lambda name: name[:2] + name[3:],
    "letter twice": lambda name: name[:2] + name[1:],
    "letters swapped": lambda name: name[1] + name[0] + name[2:],
    "plural": lambda name: name + "s",
    "hyphen": lambda name: name.replace("_", "-") if "_" in name else name.upper()[:1] + name[1:],
}
KINDS = ["tiny-evo2", "tiny-striped", "tiny-implicit", "tiny-explicit", "tiny-hyenadna", "tiny-modal-real"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("typo", TYPOS)
def test_every_misspelt_field_is_refused_with_the_right_name(kind: str, typo: str) -> None:
    written = preset(kind).to_json()
    paths = [path for path in _field_paths(written) if path[:1] != ("blocks",) or path[1:2] in {(), (0,), (1,)}]
    assert len(paths) >= 20
    for path in paths:
        broken = copy.deepcopy(written)
        owner, name = _at(broken, path[:-1]), str(path[-1])
        wrong = TYPOS[typo](name)
        owner[wrong] = owner.pop(name)
        with pytest.raises(ConfigError) as caught:
            ModelConfig.from_json(broken)
        assert wrong in str(caught.value)
        assert f"did you mean {name!r}?" in str(caught.value)


def _hyena(**filter_fields: Any) -> dict[str, Any]:
    mixer = {"type": "hyena", "filter": filter_fields}
    return {"vocab_size": 8, "hidden_size": 8, "blocks": [{"mixer": mixer, "mlp": None}]}


def _attention(hidden_size: int = 8, **fields: Any) -> dict[str, Any]:
    mixer = {"type": "attention", **fields}
    return {"vocab_size": 8, "hidden_size": hidden_size, "blocks": [{"mixer": mixer, "mlp": None}]}


def _block(**fields: Any) -> dict[str, Any]:
    mixer = {"type": "attention", "num_heads": 1}
    return {"vocab_size": 8, "hidden_size": 8, "blocks": [{"mixer": mixer, "mlp": None, **fields}]}


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0, "hidden_size": 8, "blocks": []}, "vocab_size must be positive: got 0"),
    ({"vocab_size": 8, "hidden_size": -8, "blocks": []}, "hidden_size must be positive: got -8"),
    (_block(dropout=1.0), "dropout is impossible: got 1.0"),
    (_block(dropout=-0.1), "dropout is impossible"),
    (_block() | {"embedding_dropout": 1.5}, "embedding_dropout is impossible"),
    (_block(norm={"type": "rms", "eps": 0.0}), "eps must be positive"),
    (_block(norm={"type": "layer", "eps": float("nan")}), "eps must be positive: got nan"),
    (_block(mlp={"type": "plain", "intermediate_size": 0}), "intermediate_size must be positive"),
    (_block(mlp={"type": "gated", "intermediate_size": 8, "activation": "relu"}), r"mlp\.activation.*'silu'"),
    (_attention(num_heads=3), r"blocks\[0\]\.mixer\.num_heads must divide hidden_size"),
    (_attention(num_heads=4, num_kv_heads=3), "num_kv_heads must divide num_heads"),
    (_attention(num_heads=0), "num_heads must be positive"),
    (_attention(num_heads=8), r"blocks\[0\]\.mixer\.rope needs an even head size: got 1"),
    (_attention(num_heads=1, rope={"base": float("inf")}), "base must be positive: got inf"),
    (_hyena(type="explicit", taps=0), "taps must be positive"),
    (
        _hyena(type="explicit", taps=4, groups=3),
        r"blocks\[0\]\.mixer\.filter\.groups must divide hidden_size",
    ),
    (_hyena(type="explicit", taps=4, decay={"horizon": 0}), "horizon must be positive"),
    (_hyena(type="explicit", taps=4, decay={"horizon": 4, "rates": [0.0, 1.0]}), "slowest must be positive"),
    (_hyena(type="modal_complex", modes=0), "modes must be positive"),
    (_hyena(type="modal_real", modes=2, timescales=[1.0, -1.0]), "longest must be positive"),
    (_hyena(type="modal_real", modes=2, groups=5), "groups must divide hidden_size"),
    (_hyena(type="implicit", max_length=1), "max_length is too short"),
    (_hyena(type="implicit", max_length=8, positions={"type": "bands", "features": 4}), "features is impossible.*odd"),
    (_hyena(type="implicit", max_length=8, inner_layers=-1), "inner_layers is negative"),
]


@pytest.mark.parametrize(("value", "message"), IMPOSSIBLE, ids=[m for _, m in IMPOSSIBLE])
def test_an_impossible_value_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(value)


def test_broken_json_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        ModelConfig.from_json('{"vocab_size": 8,')


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny-modal").vocab_size = 3  # type: ignore[misc]


def test_max_length_is_that_of_the_shortest_implicit_filter() -> None:
    def model(*lengths: int | None) -> ModelConfig:
        made = [ImplicitFilterConfig(max_length=n) if n else ExplicitFilterConfig(taps=3) for n in lengths]
        mixers: list[HyenaConfig | AttentionConfig] = [HyenaConfig(filter=f) for f in made]
        mixers.append(AttentionConfig(num_heads=1))
        return ModelConfig(vocab_size=8, hidden_size=8, blocks=tuple(BlockConfig(mixer=m, mlp=None) for m in mixers))

    assert model(64, None, 32).max_length == 32
    assert model(None).max_length is None
    assert model().max_length is None

"""Presets against the published files.

The parameter counts are added up here from the documented shapes, layer by layer, never through the library.
"""

from collections.abc import Collection

import pytest

from crocuta.config import (
    AttentionConfig,
    BandsConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FixedWindowConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModelConfig,
    RealModalFilterConfig,
    RMSNormConfig,
    RopeConfig,
    SineConfig,
)
from crocuta.errors import ConfigError
from crocuta.model.build import build_model
from crocuta.presets import PRESETS, preset, striped

# name: hidden size, layers, longest sequence, parameters (those of the published files, less what is computable)
HYENADNA = {
    "hyenadna-tiny-1k": (128, 2, 1026, 436_096),
    "hyenadna-tiny-1k-d256": (256, 2, 1026, 1_641_088),
    "hyenadna-tiny-16k-d128": (128, 2, 16_386, 436_096),
    "hyenadna-small-32k": (256, 4, 32_770, 3_277_568),
    "hyenadna-medium-160k": (256, 8, 160_002, 6_550_528),
    "hyenadna-medium-450k": (256, 8, 450_002, 6_550_528),
    "hyenadna-large-1m": (256, 8, 1_000_002, 6_550_528),
}
# name: hidden size, layers, heads, attention layers, groups, MLP width, RoPE base, scale (evo2/configs/*.yml)
SEVENS, FORTIES = (3, 10, 17, 24, 31), (3, 10, 17, 24, 31, 35, 42, 49)
EVO2: dict[str, tuple[int, int, int, tuple[int, ...], int, int, float, float]] = {
    "evo2-1b-8k": (1920, 25, 15, (3, 10, 17, 24), 128, 5120, 1e4, 1),
    "evo2-7b-8k": (4096, 32, 32, SEVENS, 256, 11_008, 1e4, 1),
    "evo2-7b-262k": (4096, 32, 32, SEVENS, 256, 11_008, 1e4, 32),
    "evo2-7b-1m": (4096, 32, 32, SEVENS, 256, 11_264, 1e4, 128),
    "evo2-20b-1m": (8192, 24, 64, (3, 10, 17), 512, 22_528, 1e6, 128),
    "evo2-40b-8k": (8192, 50, 64, FORTIES, 512, 21_888, 1e6, 1),
    "evo2-40b-1m": (8192, 50, 64, FORTIES, 512, 22_528, 1e6, 128),
}
SH1 = ("stripedhyena-7b", "evo1-8k", "evo1-131k")
TINY = {name for name in PRESETS if name.startswith("tiny-")}


def hyenas(model: ModelConfig) -> list[HyenaConfig]:
    return [block.mixer for block in model.blocks if isinstance(block.mixer, HyenaConfig)]


def attentions(model: ModelConfig) -> dict[int, AttentionConfig]:
    return {i: b.mixer for i, b in enumerate(model.blocks) if isinstance(b.mixer, AttentionConfig)}


def gated(model: ModelConfig, layer: int) -> GatedMLPConfig:
    mlp = model.blocks[layer].mlp
    assert isinstance(mlp, GatedMLPConfig)
    return mlp


def test_the_names_are_the_published_ones_and_tiny_ones() -> None:
    assert set(PRESETS) == {*HYENADNA, *EVO2, *SH1, *TINY, "deep-dive-hyena"}
    wanted = ("modal", "modal-real", "implicit", "explicit", "striped", "evo2")
    assert {f"tiny-{kind}" for kind in wanted} <= TINY


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    assert ModelConfig.from_json(preset(name).to_json()) == preset(name)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset: got 'hyenadna_tiny-1k'.*did you mean 'hyenadna-tiny-1k'\?"):
        preset("hyenadna_tiny-1k")
    with pytest.raises(ConfigError, match=r"known: tiny-modal, .*evo2-40b-1m"):
        preset("zzz")


# --- HyenaDNA ---


@pytest.mark.parametrize("name", HYENADNA)
def test_hyenadna(name: str) -> None:
    model, (hidden, layers, length, _) = preset(name), HYENADNA[name]
    assert (model.hidden_size, len(model.blocks), model.max_length) == (hidden, layers, length)
    assert (model.vocab_size, model.tie_embeddings, model.embedding_dropout) == (16, True, 0.1)
    assert attentions(model) == {}
    for block in model.blocks:
        assert (block.norm.type, block.mlp.type if block.mlp else None, block.dropout) == (
            "layer",
            "plain",
            0.0,
        )
        hyena = block.mixer
        assert isinstance(hyena, HyenaConfig)
        flags = (hyena.short_bias, hyena.projection_bias, hyena.output_bias, hyena.skip)
        assert flags == (True, True, True, True)
        assert hyena.short_taps == 3
        assert hyena.filter == ImplicitFilterConfig(
            max_length=length,
            width=64,
            inner_layers=2,
            positions=BandsConfig(features=5),
            activation=SineConfig(frequency=10.0),
            window=FixedWindowConfig(decay=(0.3, 1.5), target=0.01, shift=0.05),
            wide_positions=False,
        )


# --- StripedHyena-7B and Evo 1 ---


def test_stripedhyena_7b() -> None:
    model = preset("stripedhyena-7b")
    assert (model.vocab_size, model.hidden_size, len(model.blocks)) == (32_000, 4096, 32)
    assert not model.tie_embeddings
    assert set(attentions(model)) == set(range(1, 32, 2))
    for attention in attentions(model).values():
        assert attention == AttentionConfig(num_heads=32, num_kv_heads=8, rope=RopeConfig(base=500_000.0))
    norm = RMSNormConfig(eps=1e-5, eps_inside_root=True)
    assert {model.norm, *(block.norm for block in model.blocks)} == {norm}
    assert {block.mlp for block in model.blocks} == {GatedMLPConfig(intermediate_size=14_336, activation="silu")}
    assert_modal_layers(model, modes=2)


@pytest.mark.parametrize(("name", "scale"), [("evo1-8k", 1.0), ("evo1-131k", 16.0)])
def test_evo1(name: str, scale: float) -> None:
    model = preset(name)
    assert (model.vocab_size, model.hidden_size, len(model.blocks)) == (512, 4096, 32)
    assert model.tie_embeddings
    assert set(attentions(model)) == {8, 16, 24}
    for attention in attentions(model).values():
        rope = RopeConfig(base=10_000.0, scale=scale)
        assert attention == AttentionConfig(num_heads=32, qkv_bias=True, output_bias=True, rope=rope)
    norm = RMSNormConfig(eps=1e-6, eps_inside_root=False)
    assert {model.norm, *(block.norm for block in model.blocks)} == {norm}
    assert {block.mlp for block in model.blocks} == {GatedMLPConfig(intermediate_size=10_928, activation="gelu")}
    assert_modal_layers(model, modes=8)


def assert_modal_layers(model: ModelConfig, modes: int) -> None:
    filter_ = ComplexModalFilterConfig(modes=modes, poles="raw")
    expected = HyenaConfig(filter=filter_, short_bias=True, projection_bias=True, output_bias=True)
    assert set(hyenas(model)) == {expected}


# --- Evo 2 ---


@pytest.mark.parametrize("name", EVO2)
def test_evo2(name: str) -> None:
    hidden, layers, heads, attention_layers, groups, width, base, scale = EVO2[name]
    model = preset(name)
    assert (model.vocab_size, model.hidden_size, len(model.blocks)) == (512, hidden, layers)
    assert model.tie_embeddings
    norm = RMSNormConfig(eps=1e-6, eps_inside_root=False)
    assert {model.norm, *(block.norm for block in model.blocks)} == {norm}
    assert set(attentions(model)) == set(attention_layers)
    rope = RopeConfig(base=base, scale=scale, stored=True)
    for attention in attentions(model).values():
        assert attention == AttentionConfig(num_heads=heads, qkv_bias=False, output_bias=True, rope=rope)
    widths = {gated(model, layer).intermediate_size for layer in range(layers)}
    assert widths == {width}
    assert gated(model, 0).activation == "gelu"
    assert {gated(model, layer).activation for layer in range(1, layers)} == {"identity"}
    for hyena in hyenas(model):
        assert (hyena.short_bias, hyena.projection_bias, hyena.output_bias) == (False, False, True)
        assert hyena.short_taps == 3
    short, medium, long = evo2_kinds(model)
    assert {c.filter for c in short.values()} == {ExplicitFilterConfig(taps=7, groups=groups)}
    assert {c.filter for c in medium.values()} == {ExplicitFilterConfig(taps=128, groups=groups)}
    assert {c.filter for c in long.values()} == {RealModalFilterConfig(modes=16, poles="raw")}
    assert [{c.skip for c in kind.values()} for kind in (short, medium, long)] == [{False}, {True}, {True}]


def evo2_kinds(
    model: ModelConfig,
) -> tuple[dict[int, HyenaConfig], dict[int, HyenaConfig], dict[int, HyenaConfig]]:
    kinds: tuple[dict[int, HyenaConfig], dict[int, HyenaConfig], dict[int, HyenaConfig]] = ({}, {}, {})
    for layer, block in enumerate(model.blocks):
        match block.mixer:
            case HyenaConfig(filter=ExplicitFilterConfig(taps=taps)) as hyena:
                kinds[0 if taps < 64 else 1][layer] = hyena
            case HyenaConfig() as hyena:
                kinds[2][layer] = hyena
    return kinds


def test_the_layers_of_evo2_40b_are_those_of_its_file() -> None:
    short, medium, long = evo2_kinds(preset("evo2-40b-1m"))
    published = [0, 4, 7, 11, 14, 18, 21, 25, 28, 32, 36, 39, 43, 46]
    assert list(short) == published
    assert list(medium) == [layer + 1 for layer in published]
    assert list(long) == [layer + 2 for layer in published]


# --- our own ---


def test_striped_puts_attention_where_it_is_told() -> None:
    modal = ComplexModalFilterConfig(modes=4)
    model = striped(
        vocab_size=64,
        hidden_size=48,
        num_layers=5,
        filter=modal,
        num_heads=4,
        attention_layers=[4, 1],
        dropout=0.25,
    )
    assert set(attentions(model)) == {1, 4}
    assert {hyena.filter for hyena in hyenas(model)} == {modal}
    assert {block.dropout for block in model.blocks} == {0.25} == {model.embedding_dropout}
    assert model.tie_embeddings
    assert set(attentions(model).values()) == {AttentionConfig(num_heads=4, rope=RopeConfig())}


@pytest.mark.parametrize(("hidden", "multiple", "width"), [(48, 16, 128), (50, 16, 144), (256, 16, 688), (50, 64, 192)])
def test_the_mlp_of_striped_has_eight_thirds_rounded_up(hidden: int, multiple: int, width: int) -> None:
    modal = ComplexModalFilterConfig(modes=4)
    model = striped(vocab_size=64, hidden_size=hidden, num_layers=1, filter=modal, num_heads=1, mlp_multiple=multiple)
    assert gated(model, 0) == GatedMLPConfig(intermediate_size=width, activation="silu")


@pytest.mark.parametrize("layer", [-1, 2])
def test_striped_refuses_a_layer_that_does_not_exist(layer: int) -> None:
    modal = ComplexModalFilterConfig(modes=4)
    with pytest.raises(ConfigError, match=rf"does not exist: got \[{layer}\]; expected indices from 0 to 1"):
        striped(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            filter=modal,
            num_heads=2,
            attention_layers=[0, layer],
        )


# --- parameter counts, from the shapes of the published tensors ---


def implicit_elements(d: int, width: int, features: int) -> int:
    """The sine MLP of one filter: three layers with bias and one without, and one frequency shared by all sines."""
    return (width * features + width) + 2 * (width * width + width) + d * width + width


def hyenadna_elements(d: int, layers: int) -> int:
    mixer = (3 * d * d + 3 * d) + (d * d + d) + (3 * d * 3 + 3 * d) + d + implicit_elements(d, 64, 5)
    mlp = (4 * d * d + 4 * d) + (4 * d * d + d)
    return 16 * d + layers * (mixer + mlp + 4 * d) + 2 * d


def stripedhyena_elements(
    d: int, layers: int, attention_layers: Collection[int], modes: int, width: int, qkv: int
) -> int:
    """All but embedding, head and attention biases; ``qkv`` is the number of rows of Wqkv."""
    norms, mlp = 2 * d, 3 * d * width
    attention = qkv * d + d * d
    hyena = (3 * d * d + 3 * d) + (3 * d * 3 + 3 * d) + d + 2 * (d * modes * 2) + (d * d + d)
    mixers = sum(attention if layer in attention_layers else hyena for layer in range(layers))
    return d + layers * (norms + mlp) + mixers


def stripedhyena_7b_elements(v: int, d: int, layers: int, heads: int, head_size: int, width: int) -> int:
    qkv = (heads + 2 * heads // 4) * head_size
    return 2 * v * d + stripedhyena_elements(d, layers, range(1, layers, 2), 2, width, qkv)


def evo1_elements(d: int, layers: int, attention_layers: Collection[int], width: int) -> int:
    biases = len(attention_layers) * (3 * d + d)
    return 512 * d + biases + stripedhyena_elements(d, layers, attention_layers, 8, width, 3 * d)


def evo2_elements(
    d: int, layers: int, heads: int, attention_layers: Collection[int], groups: int, width: int
) -> tuple[int, int, int]:
    """Elements in bf16 and in fp32, with the embedding once, and how many of the latter are frequencies of RoPE."""
    half, single, turn = 512 * d + 3 * d * width * layers, (2 * layers + 1) * d, 0
    frequencies = len(attention_layers) * (d // heads // 2)
    for layer in range(layers):
        if layer in attention_layers:
            half, turn = half + 3 * d * d + d * d + d, 0
            continue
        half += 3 * d * d + 3 * d * 3 + d * d + d
        half += (groups * 7, groups * 128 + d, d)[turn % 3]
        single += (0, 0, 2 * d * 16)[turn % 3]
        turn += 1
    return half, single + frequencies, frequencies


def striped_elements(d: int, layers: int, attention_layers: int, width: int, filter_elements: int) -> int:
    attention = 3 * d * d + d * d
    hyena = 3 * d * d + 3 * d * 3 + d + filter_elements + d * d + d
    mixers = attention_layers * attention + (layers - attention_layers) * hyena
    return 512 * d + layers * (3 * d * width + 2 * d) + mixers + d


def expected_parameters() -> dict[str, int]:
    """Parameters of every preset; Evo 2's frequencies are buffers."""
    counts = {name: hyenadna_elements(d, layers) for name, (d, layers, _, _) in HYENADNA.items()}
    for name, facts in {**EVO2, "tiny-evo2": (32, 5, 2, (3,), 8, 96, 1e4, 1)}.items():
        half, single, frequencies = evo2_elements(*facts[:6])
        counts[name] = half + single - frequencies
    counts["stripedhyena-7b"] = stripedhyena_7b_elements(32_000, 4096, 32, 32, 128, 14_336)
    counts["evo1-8k"] = counts["evo1-131k"] = evo1_elements(4096, 32, (8, 16, 24), 10_928)
    counts["tiny-hyenadna"] = hyenadna_elements(32, 2)
    counts["tiny-stripedhyena"] = stripedhyena_7b_elements(128, 32, 4, 4, 8, 96)
    counts["tiny-evo1"] = evo1_elements(32, 3, (1,), 96)
    modal, real = 4 * 32 * 4, 2 * 32 * 4  # modulus, angle and complex residue; modulus and residue
    counts["tiny-modal"] = striped_elements(32, 2, 0, 96, modal)
    counts["tiny-modal-real"] = striped_elements(32, 2, 0, 96, real)
    counts["tiny-explicit"] = striped_elements(32, 2, 0, 96, 8 * 16)
    counts["tiny-implicit"] = striped_elements(32, 2, 0, 96, implicit_elements(32, 16, 5))
    counts["tiny-striped"] = striped_elements(32, 4, 2, 96, modal)
    filter_ = (
        32 * 64 + 64 + 64 * 64 + 64 + 64 + 64 * 256 + 256 + 256
    )  # an MLP, its sines' frequencies, a rate a channel
    mixer = 3 * 256 * 256 + 3 * 3 * 256 + 3 * 2 * 256 + 2 * filter_ + 2 * 256 + 256 * 256 + 256
    counts["deep-dive-hyena"] = 512 * 256 + 4 * (mixer + 3 * 256 * 704 + 2 * 256) + 256
    return counts


def test_the_counts_explain_the_published_figures() -> None:
    """What the sums above give, against numbers that others published."""
    for d, layers, _, published in HYENADNA.values():
        assert hyenadna_elements(d, layers) == published
    half, single, _ = evo2_elements(*EVO2["evo2-40b-1m"][:6])
    bytes_of_file = 82_252_533_760
    assert 2 * (half + 512 * 8192) + 4 * single == bytes_of_file  # with unembed.weight, a second copy


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_on_meta_with_the_documented_number_of_parameters(name: str) -> None:
    model = build_model(preset(name), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == expected_parameters()[name]
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}

"""Bidirectional Hyena and attention: the formula, what every position sees, padding, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from naive_layers import CHANNELS, bidirectional, disturbed, gradcheck, mixer_of, randn

from crocuta.config import (
    AttentionConfig,
    BidirectionalHyenaConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    MixerConfig,
    ModelConfig,
    RealModalFilterConfig,
)
from crocuta.errors import ConfigError, InputError, StateError
from crocuta.inference.embed import embed
from crocuta.inference.generate import generate
from crocuta.inference.prefix import read_prefix
from crocuta.inference.score import score
from crocuta.model.build import build_model
from crocuta.model.lm import Model

FILTERS: dict[str, FilterConfig] = {
    "implicit": ImplicitFilterConfig(max_length=40, width=5),
    "short": ExplicitFilterConfig(taps=4),
    "explicit": ExplicitFilterConfig(taps=40, groups=2),
    "complex": ComplexModalFilterConfig(modes=2, timescales=(1.0, 30.0)),
    "real": RealModalFilterConfig(modes=3, timescales=(1.0, 30.0), groups=3),
}
LOUD = BidirectionalHyenaConfig(filter=FILTERS["implicit"], short_bias=True, projection_bias=True)
MIXERS: dict[str, MixerConfig] = {
    "hyena": LOUD,
    "modal": BidirectionalHyenaConfig(filter=FILTERS["complex"], short_taps=5, short_bias=True, projection_bias=True),
    "attention": AttentionConfig(num_heads=2, causal=False, qkv_bias=True),
    "attention-gqa": AttentionConfig(num_heads=4, num_kv_heads=2, rope=None, causal=False),
}


def model_of(*mixers: MixerConfig, dropout: float = 0.0, dtype: torch.dtype = torch.float64, noise=0.5) -> Model:
    mlp = GatedMLPConfig(intermediate_size=12)
    blocks = tuple(BlockConfig(mixer=mixer, mlp=mlp, dropout=dropout) for mixer in mixers)
    config = ModelConfig(vocab_size=11, hidden_size=8, blocks=blocks, tie_embeddings=False)
    return disturbed(build_model(config), size=noise).to(dtype).eval()


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


# --- the formula ---


@torch.no_grad()
@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("short_taps", [1, 3, 7])
def test_the_formula(filter_, short_taps):
    config = BidirectionalHyenaConfig(filter=FILTERS[filter_], short_taps=short_taps, short_bias=True)
    mixer, x = mixer_of(config), randn(2, 13, CHANNELS)
    expected = torch.stack([bidirectional(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 40])
@pytest.mark.parametrize("skip", [True, False])
def test_options_and_lengths(length, skip):
    options = {"short_taps": 5, "projection_bias": True, "output_bias": False, "skip": skip}
    mixer = mixer_of(BidirectionalHyenaConfig(filter=FILTERS["implicit"], **options))
    x = randn(1, length, CHANNELS)
    torch.testing.assert_close(mixer(x), bidirectional(mixer, x[0])[None], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("filter_", FILTERS)
def test_gradients(filter_):
    config = BidirectionalHyenaConfig(filter=FILTERS[filter_], short_bias=True, projection_bias=True)
    assert gradcheck(mixer_of(config), randn(2, 7, CHANNELS))


def test_gradients_of_rows_of_unequal_length():
    """Padding gives nothing and gets nothing."""
    mixer, x, lengths = mixer_of(LOUD), randn(2, 7, CHANNELS).requires_grad_(), torch.tensor([7, 4])

    def own(x: torch.Tensor) -> torch.Tensor:
        y = mixer(x, lengths)
        return torch.cat([y[0], y[1, :4]])

    assert torch.autograd.gradcheck(own, [x], fast_mode=True)
    own(x).square().sum().backward()
    assert torch.equal(x.grad[1, 4:], torch.zeros(3, CHANNELS, dtype=torch.float64))
    assert (x.grad[1, :4].abs() > 1e-9).all()


# --- what a position sees ---


@pytest.mark.parametrize("filter_", ["implicit", "explicit", "complex", "real"])
@pytest.mark.parametrize("length", [2, 6])
def test_every_position_sees_every_other_one(filter_, length):
    """And by the amount of the formula: what wrapped around would be seen in a place, or from one, too many."""
    mixer = mixer_of(BidirectionalHyenaConfig(filter=FILTERS[filter_], short_bias=True), seed=2)
    x = randn(length, CHANNELS)
    found = torch.autograd.functional.jacobian(lambda row: mixer(row[None])[0], x)
    expected = torch.autograd.functional.jacobian(lambda row: bidirectional(mixer, row), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found.abs().amax((1, 3)) > 1e-4).all()


@torch.no_grad()
def test_a_short_filter_sees_its_taps_on_both_sides_and_nothing_beyond():
    """3 taps of each long filter and the centred 3 of the short one: 3 positions each way."""
    mixer = mixer_of(BidirectionalHyenaConfig(filter=ExplicitFilterConfig(taps=3)))
    x = randn(1, 20, CHANNELS)
    before = mixer(x)
    x[:, 9] += 1
    changed = (mixer(x) - before).abs().amax((0, 2)) > 1e-9
    assert changed.nonzero()[:, 0].tolist() == list(range(6, 13))


def test_options_are_the_parameters_that_there_are():
    bare = {"short_bias": False, "projection_bias": False, "output_bias": False, "skip": False}
    without, with_all = (
        {name for name, _ in mixer_of(BidirectionalHyenaConfig(filter=FILTERS["short"], **options)).named_parameters()}
        for options in (bare, dict.fromkeys(bare, True))
    )
    filters = {"filter.weight", "filter_ahead.weight"}
    assert without == {"projection.weight", "short_taps", "output.weight"} | filters
    assert with_all - without == {"projection.bias", "short_bias", "output.bias", "skip"}


@torch.no_grad()
def test_the_directions_have_filters_of_their_own():
    mixer, x = mixer_of(LOUD), randn(1, 9, CHANNELS)
    names = {name for name, _ in mixer.named_parameters()}
    assert {name.replace("filter.", "filter_ahead.") for name in names if name.startswith("filter.")} <= names
    before = mixer(x)
    mixer.filter_ahead.output.weight.zero_()
    assert (mixer(x) - before).abs().max() > 1e-2
    torch.testing.assert_close(mixer(x)[0], bidirectional(mixer, x[0]), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_mirrored_mixer_reads_the_reverse():
    """Filters exchanged and short taps turned: the output of the reversed sequence is the reversed output."""
    mixer, x = mixer_of(LOUD), randn(2, 11, CHANNELS)
    expected = mixer(x).flip(1)
    mixer.filter, mixer.filter_ahead = mixer.filter_ahead, mixer.filter
    mixer.short_taps.copy_(mixer.short_taps.flip(1))
    torch.testing.assert_close(mixer(x.flip(1)), expected, rtol=1e-12, atol=1e-12)


# --- rows of unequal length ---


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_of_a_batch_are_as_they_are_alone(mixer):
    model, lengths = model_of(MIXERS[mixer], MIXERS[mixer]), [17, 5, 1, 12]
    ids = some_ids(4, 17)
    hidden = model.hidden(ids, lengths=torch.tensor(lengths))
    logits = model(ids, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, :length]
        torch.testing.assert_close(hidden[row : row + 1, :length], model.hidden(alone), rtol=0, atol=1e-12)
        torch.testing.assert_close(logits[row : row + 1, :length], model(alone), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("layer", [None, 1])
def test_what_padding_holds_does_not_matter(mixer, layer):
    """However loud its embedding is; the control: without lengths it does matter."""
    model, lengths = model_of(MIXERS[mixer], MIXERS[mixer]), torch.tensor([9, 4])
    model.embedding.weight[10] *= 1e3
    ids = some_ids(2, 9) % 10
    other = ids.clone()
    other[1, 4:] = 10
    first, second = (model.hidden(each, layer, lengths)[1, :4] for each in (ids, other))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    assert (model.hidden(ids, layer)[1, :4] - model.hidden(other, layer)[1, :4]).abs().max() > 1e-3


@torch.no_grad()
def test_a_mixer_does_not_hear_loud_or_broken_padding():
    mixer, x, lengths = mixer_of(LOUD), randn(2, 12, CHANNELS), torch.tensor([12, 5])
    alone = bidirectional(mixer, x[1, :5])
    for junk in (1e6, torch.inf, torch.nan):
        x[1, 5:] = junk
        y = mixer(x, lengths)
        torch.testing.assert_close(y[1, :5], alone, rtol=0, atol=1e-12)
        assert torch.isfinite(y[0]).all()


@torch.no_grad()
def test_causal_blocks_beside_bidirectional_ones():
    """The padding behind a row's end is seen by no causal block, and silenced for the others."""
    model = model_of(HyenaConfig(filter=FILTERS["implicit"]), LOUD, AttentionConfig(num_heads=2))
    ids, lengths = some_ids(2, 15), torch.tensor([15, 6])
    hidden = model.hidden(ids, lengths=lengths)
    torch.testing.assert_close(hidden[1:, :6], model.hidden(ids[1:, :6]), rtol=0, atol=1e-12)


# --- training ---


def gradients_of(model: Model, seed: int) -> dict[str, torch.Tensor]:
    """Of a masked-language-model loss: some tokens are hidden, and told from both sides, by ``Model.hidden``."""
    ids, lengths = some_ids(3, 14, seed=1), torch.tensor([14, 9, 3])
    hidden_tokens = (torch.arange(14) % 4 == 2) & (torch.arange(14) < lengths[:, None])
    torch.manual_seed(seed)
    model.zero_grad()
    states = model.hidden(torch.where(hidden_tokens, 10, ids), lengths=lengths)[hidden_tokens]
    torch.nn.functional.cross_entropy(model.logits(states[None])[0], ids[hidden_tokens]).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mixer", MIXERS)
def test_activation_checkpointing_with_lengths_changes_no_bit(mixer):
    model = model_of(MIXERS[mixer], MIXERS[mixer], dropout=0.2).train()
    kept = gradients_of(model, seed=4)
    model.checkpoint_activations = True
    calls: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=index: calls.append(i))
    again = gradients_of(model, seed=4)
    assert calls == [0, 1, 1, 0]
    for name, gradient in kept.items():
        assert torch.equal(again[name], gradient), name
        assert gradient.abs().max() > 1e-9, name


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_is_close_to_float32(mixer):
    ids, lengths = some_ids(2, 30), torch.tensor([30, 13])
    expected, narrow = (
        model_of(MIXERS[mixer], MIXERS[mixer], dtype=dtype, noise=0.1).hidden(ids, lengths=lengths)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.dtype == torch.bfloat16
    for row, length in enumerate(lengths.tolist()):
        error = (narrow[row, :length].float() - expected[row, :length]).norm() / expected[row, :length].norm()
        assert 1e-4 < error < 0.02


# --- what a model that looks ahead cannot do ---

REFUSED: dict[str, Callable[[Model], object]] = {
    "init_state": lambda model: model.init_state(1, 20),
    "generate": lambda model: generate(model, None, [some_ids(5)], max_tokens=2),
    "read_prefix": lambda model: read_prefix(model, None, some_ids(5)),
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("call", REFUSED)
def test_reading_in_pieces_is_refused(call, mixer):
    model = model_of(HyenaConfig(filter=FILTERS["complex"]), MIXERS[mixer])
    assert not model.config.causal
    with pytest.raises(StateError, match=r"looks ahead cannot read .* in pieces, nor generate: .*; use model\.hidden"):
        REFUSED[call](model)


@pytest.mark.parametrize("mixer", MIXERS)
def test_likelihoods_are_refused(mixer):
    """Each token would be told with itself in sight."""
    model = model_of(HyenaConfig(filter=FILTERS["complex"]), MIXERS[mixer])
    for options in ({}, {"max_memory": "1GiB"}):
        with pytest.raises(InputError, match="looks ahead cannot score"):
            score(model, None, [some_ids(9)], **options)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_those_of_sequences_alone(pooling, mixer):
    """Whatever they are batched with, and from one call of the whole, however many tokens that takes."""
    model = model_of(MIXERS[mixer])
    rows = [some_ids(length, seed=length) for length in (17, 4, 9)]
    for row, found in zip(rows, embed(model, None, rows, pooling=pooling), strict=True):
        hidden = model.hidden(row[None])[0].detach()
        expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
        torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_of_more_tokens_than_a_chunk():
    model, ids = model_of(MIXERS["modal"]), some_ids(8_200)
    found = embed(model, None, [ids], pooling="last")[0]
    expected = model.hidden(ids[None])[0, -1].detach()
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_state_of_another_model_does_not_help():
    causal = model_of(HyenaConfig(filter=FILTERS["complex"]))
    with pytest.raises(StateError, match="another configuration"):
        model_of(LOUD).extend(some_ids(1, 5), causal.init_state(1, 20))
    with pytest.raises(StateError, match="looks ahead"):
        mixer_of(LOUD).extend(randn(1, 5, CHANNELS), causal.init_state(1, 20).layers[0])


def test_an_even_short_filter_has_no_middle():
    with pytest.raises(ConfigError, match=r"short_taps is even: got 4; expected an odd number"):
        BidirectionalHyenaConfig(filter=FILTERS["implicit"], short_taps=4)

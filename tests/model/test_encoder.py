"""Encoders: pooling against loops, projection and heads, features and ids, both strands, and reading in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from naive_layers import affine, disturbed, gradcheck, randn

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
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    InputConfig,
    LastPoolingConfig,
    LayerNormConfig,
    MeanPoolingConfig,
    MixerConfig,
    ModelConfig,
    PoolingConfig,
    ProjectionConfig,
    RealModalFilterConfig,
    RegressionConfig,
    TokenInputConfig,
)
from crocuta.errors import ConfigError, InputError, StateError
from crocuta.model.build import build_encoder, build_model, encoder_from
from crocuta.model.encoder import Encoder, pool

IMPLICIT = ImplicitFilterConfig(max_length=64, width=5)
CAUSAL: tuple[MixerConfig, ...] = (
    HyenaConfig(filter=IMPLICIT),
    AttentionConfig(num_heads=2),
    GatedConvConfig(taps=3),
    HyenaConfig(filter=RealModalFilterConfig(modes=3)),
    HyenaConfig(filter=ExplicitFilterConfig(taps=5)),
)
BOTH_SIDES: tuple[MixerConfig, ...] = (
    BidirectionalHyenaConfig(filter=IMPLICIT, projection_bias=True, short_bias=True),
    AttentionConfig(num_heads=2, causal=False),
)
POOLINGS: dict[str, PoolingConfig] = {
    "mean": MeanPoolingConfig(),
    "last": LastPoolingConfig(),
    "last three": LastPoolingConfig(positions=3),
    "attention": AttentionPoolingConfig(),
}
TOKENS, FEATURES = TokenInputConfig(vocab_size=6), FeatureInputConfig(size=5)
COMPLEMENT = (3, 2, 1, 0, 4, 5)
LENGTHS = [14, 1, 2, 9]


def encoder_of(
    *mixers: MixerConfig, input: InputConfig = TOKENS, dtype: torch.dtype = torch.float64, noise=0.5, **fields
) -> Encoder:
    """8 channels, every parameter disturbed, in evaluation mode."""
    blocks = tuple(BlockConfig(mixer=mixer, mlp=GatedMLPConfig(intermediate_size=12)) for mixer in mixers)
    config = EncoderConfig(**({"input": input, "hidden_size": 8, "blocks": blocks} | fields))
    return disturbed(build_encoder(config), size=noise).to(dtype).eval()


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(seed))


def naive_pool(row: torch.Tensor, pooling: PoolingConfig, query: torch.Tensor | None) -> torch.Tensor:
    """One sequence [l d], all of it its own."""
    match pooling:
        case MeanPoolingConfig():
            return sum(row) / len(row)
        case LastPoolingConfig(positions=positions):
            kept = [row[t] for t in range(len(row)) if t >= len(row) - positions]
            return sum(kept) / len(kept)
        case AttentionPoolingConfig():
            weights = [math.exp(sum(float(w) * float(x) for w, x in zip(query, at))) for at in row]
            return sum(weight / sum(weights) * at for weight, at in zip(weights, row))


# --- pooling ---


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("junk", [0.0, 1e9, math.inf, math.nan])
def test_pooling_looks_at_own_positions_only(pooling, junk):
    x, query = randn(4, 14, 8), randn(8, seed=1)
    expected = [naive_pool(row[:length], POOLINGS[pooling], query) for row, length in zip(x, LENGTHS)]
    for row, length in zip(x, LENGTHS):
        row[length:] = junk
    found = pool(x, POOLINGS[pooling], torch.tensor(LENGTHS), query)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_of_pooling_leave_padding_alone(pooling):
    x, query, lengths = randn(2, 6, 8).requires_grad_(), randn(8).requires_grad_(), torch.tensor([6, 2])
    inputs = [x, query] if pooling == "attention" else [x]
    assert torch.autograd.gradcheck(lambda x, query=None: pool(x, POOLINGS[pooling], lengths, query), inputs)
    pool(x, POOLINGS[pooling], lengths, query).sum().backward()
    assert torch.equal(x.grad[1, 2:], torch.zeros(4, 8, dtype=torch.float64))


def test_an_untrained_query_is_the_mean():
    encoder = build_encoder(EncoderConfig(input=TOKENS, hidden_size=8, blocks=(), pooling=AttentionPoolingConfig()))
    hidden = randn(2, 6, 8)
    expected = pool(hidden, MeanPoolingConfig(), torch.tensor([6, 3]))
    found = pool(hidden, AttentionPoolingConfig(), torch.tensor([6, 3]), encoder.query)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 7], [3], [-1, 3]])
def test_lengths_that_cannot_be_pooled(lengths):
    encoder = encoder_of(*CAUSAL[:1])
    with pytest.raises(InputError, match=r"nothing to pool: got lengths \[0, 3\]|lengths do not fit"):
        encoder(some_ids(2, 6), torch.tensor(lengths))


# --- the whole encoder ---


@torch.no_grad()
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mixers", [CAUSAL, BOTH_SIDES], ids=["causal", "both sides"])
def test_the_parts_in_their_order(pooling, mixers):
    """Hidden states, pooling, projection, unit length, head; each row as it is alone."""
    encoder = encoder_of(
        *mixers,
        pooling=POOLINGS[pooling],
        projection=ProjectionConfig(size=7),
        head=ClassificationConfig(labels=3),
    )
    ids = some_ids(4, 14)
    found = encoder(ids, torch.tensor(LENGTHS))
    assert found.shape == (4, 3)
    for row, length in enumerate(LENGTHS):
        hidden = encoder.hidden(ids[row : row + 1, :length])[0]
        pooled = affine(naive_pool(hidden, POOLINGS[pooling], encoder.query), encoder.projection)
        expected = affine(pooled / math.sqrt(sum(float(p) ** 2 for p in pooled)), encoder.head)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("normalise", [True, False])
def test_a_projection_is_on_the_unit_sphere_where_asked(normalise):
    encoder = encoder_of(*BOTH_SIDES, projection=ProjectionConfig(size=16, normalise=normalise))
    y = encoder(some_ids(3, 9))
    assert y.shape == (3, 16)
    assert encoder.config.output_size == 16
    norms = y.norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), rtol=1e-12) is normalise


@torch.no_grad()
@pytest.mark.parametrize(
    ("head", "size"), [(ClassificationConfig(labels=4), 4), (RegressionConfig(targets=2), 2), (None, 8)]
)
def test_one_output_a_token_without_pooling(head, size):
    encoder = encoder_of(*BOTH_SIDES, pooling=None, head=head)
    ids, lengths = some_ids(4, 14), torch.tensor(LENGTHS)
    y = encoder(ids, lengths)
    assert y.shape == (4, 14, size)
    assert encoder.config.output_size == size
    for row, length in enumerate(LENGTHS):
        hidden = encoder.hidden(ids[row : row + 1, :length])[0]
        expected = hidden if head is None else affine(hidden, encoder.head)
        torch.testing.assert_close(y[row, :length], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["last", "attention"])
def test_gradients_reach_every_parameter(pooling):
    encoder = encoder_of(
        BOTH_SIDES[0],
        input=FEATURES,
        pooling=POOLINGS[pooling],
        projection=ProjectionConfig(size=4),
        head=RegressionConfig(),
    )
    assert gradcheck(encoder, randn(2, 5, 5))
    encoder(randn(2, 5, 5), torch.tensor([5, 2])).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


def test_dropout_of_a_head_acts_while_training_only():
    encoder = encoder_of(*CAUSAL[:1], head=RegressionConfig(dropout=0.5))
    ids = some_ids(1, 9)
    assert torch.equal(encoder(ids), encoder(ids))
    encoder.train()
    torch.manual_seed(0)
    assert not torch.equal(encoder(ids), encoder(ids))


# --- features ---


@torch.no_grad()
@pytest.mark.parametrize(
    ("input", "projects"),
    [
        (FeatureInputConfig(size=5), True),
        (FeatureInputConfig(size=8), False),
    ],
)
def test_features_are_projected_where_sizes_differ(input, projects):
    encoder, x = encoder_of(*CAUSAL, input=input), randn(2, 9, input.size)
    expected = affine(x, encoder.embedding) if projects else x
    torch.testing.assert_close(encoder.hidden(x, layer=0), expected, rtol=1e-12, atol=1e-12)
    assert ("embedding.bias" in dict(encoder.named_parameters())) is projects


@torch.no_grad()
@pytest.mark.parametrize("mixers", [CAUSAL, BOTH_SIDES], ids=["causal", "both sides"])
@pytest.mark.parametrize("junk", [1e9, math.nan])
@pytest.mark.parametrize("size", [5, 8])
def test_padded_features_may_hold_anything(mixers, junk, size):
    """Also NaN, which a convolution by FFT would spread over the whole row."""
    encoder, x = encoder_of(*mixers, input=FeatureInputConfig(size=size)), randn(4, 14, size)
    alone = [encoder(row[None, :length])[0] for row, length in zip(x, LENGTHS)]
    for row, length in zip(x, LENGTHS):
        row[length:] = junk
    torch.testing.assert_close(encoder(x, torch.tensor(LENGTHS)), torch.stack(alone), rtol=0, atol=1e-12)


def test_padded_features_leave_gradients_finite():
    encoder, x = encoder_of(*CAUSAL, *BOTH_SIDES, input=FEATURES), randn(2, 9, 5)
    lengths, expected = torch.tensor([9, 4]), {}
    for junk in (0.0, math.nan):
        x[1, 4:] = junk
        encoder.zero_grad()
        encoder(x, lengths).square().sum().backward()
        for name, parameter in encoder.named_parameters():
            torch.testing.assert_close(parameter.grad, expected.setdefault(name, parameter.grad.clone()), msg=name)


# --- input that does not fit ---


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 9),
        torch.zeros(2, 9, 4),
        torch.zeros(2, 0, 5),
        torch.zeros(2, 9, 5, dtype=torch.float64),
        torch.zeros(2, 9, 5, dtype=torch.int64),
        [[[0.0] * 5]],
    ],
)
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 1])])
def test_wrong_features(x, lengths):
    encoder = encoder_of(*CAUSAL, input=FEATURES, dtype=torch.float32)
    with pytest.raises(InputError, match=r"features do not fit the encoder: .*\[batch, length, 5\] torch.float32"):
        encoder(x, lengths)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0, 6]]), r"outside the vocabulary: got ids from 0 to 6; expected 0 to 5"),
        (torch.tensor([[-1, 2]]), "outside the vocabulary"),
        (torch.zeros(1, 4), "ids must be a tensor"),
        (torch.zeros(4, dtype=torch.int64), "ids must be a tensor"),
        (torch.zeros(1, 0, dtype=torch.int64), "ids are empty"),
        ("ACGT", "ids must be a tensor"),
    ],
)
@pytest.mark.parametrize("complement", [None, COMPLEMENT])
def test_wrong_ids(ids, message, complement):
    with pytest.raises(InputError, match=message):
        encoder_of(*CAUSAL, complement=complement)(ids)


# --- both strands ---


def reverse_complements(ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Of each row's own ids; what stands behind them changes, too."""
    rows = []
    for row, length in zip(ids.tolist(), lengths):
        rows.append([COMPLEMENT[i] for i in reversed(row[:length])] + [5 - i for i in row[length:]])
    return torch.tensor(rows)


@torch.no_grad()
@pytest.mark.parametrize("mixers", [CAUSAL, BOTH_SIDES], ids=["causal", "both sides"])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_sequence_and_its_reverse_complement_have_one_vector(mixers, pooling):
    encoder = encoder_of(*mixers, complement=COMPLEMENT, pooling=POOLINGS[pooling], projection=ProjectionConfig(size=4))
    ids, lengths = some_ids(4, 14), torch.tensor(LENGTHS)
    other = reverse_complements(ids, LENGTHS)
    torch.testing.assert_close(encoder(other, lengths), encoder(ids, lengths), rtol=0, atol=1e-12)
    plain = encoder_of(*mixers, pooling=POOLINGS[pooling], projection=ProjectionConfig(size=4))
    assert (plain(other, lengths) - plain(ids, lengths)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("mixers", [CAUSAL, BOTH_SIDES], ids=["causal", "both sides"])
@pytest.mark.parametrize("layer", [None, 0, 1, -1])
def test_per_token_outputs_of_the_other_strand_are_reversed(mixers, layer):
    encoder = encoder_of(*mixers, complement=COMPLEMENT, pooling=None)
    ids, lengths = some_ids(4, 14), torch.tensor(LENGTHS)
    found = encoder.hidden(ids, layer, lengths)
    other = encoder.hidden(reverse_complements(ids, LENGTHS), layer, lengths)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(other[row, :length].flip(0), found[row, :length], rtol=0, atol=1e-12)
    assert (found[0, :14] - found[0, :14].flip(0)).abs().max() > 1e-2


@torch.no_grad()
def test_both_strands_are_averaged_at_each_base():
    """The formula, by two encoders of one strand."""
    both, plain = encoder_of(*CAUSAL, complement=COMPLEMENT), encoder_of(*CAUSAL)
    ids = some_ids(1, 11)
    there, back = plain.hidden(ids)[0], plain.hidden(reverse_complements(ids, [11]))[0]
    expected = torch.stack([(there[t] + back[10 - t]) / 2 for t in range(11)])
    torch.testing.assert_close(both.hidden(ids)[0], expected, rtol=0, atol=1e-12)


def test_both_strands_cannot_be_read_in_pieces():
    """The other strand begins at the end: pieces would give one strand's states, and no error."""
    encoder = encoder_of(*CAUSAL, complement=COMPLEMENT)
    with pytest.raises(StateError, match=r"both strands cannot read a sequence in pieces.*encoder\.hidden"):
        encoder.init_state(1, 20)


# --- in pieces ---


@torch.no_grad()
@pytest.mark.parametrize("input", [TOKENS, FEATURES], ids=["ids", "features"])
@pytest.mark.parametrize("sizes", [[1] * 14, [5, 1, 8], [13, 1]])
def test_pieces_of_a_causal_encoder_are_the_whole(input, sizes):
    encoder = encoder_of(*CAUSAL, input=input)
    x = some_ids(2, 14) if input is TOKENS else randn(2, 14, 5)
    state = encoder.init_state(2, 14)
    pieces = [encoder.extend_hidden(piece, state) for piece in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), encoder.hidden(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_ragged_pieces_of_features_with_junk_behind_them():
    encoder, x = encoder_of(*CAUSAL, input=FEATURES), randn(2, 12, 5)
    expected = encoder.hidden(x)
    state, read = encoder.init_state(2, 12), [0, 0]
    for own in ([4, 2], [0, 5], [7, 5], [1, 0]):
        piece = torch.full((2, 7, 5), math.nan, dtype=torch.float64)
        for row in range(2):
            piece[row, : own[row]] = x[row, read[row] : read[row] + own[row]]
        found = encoder.extend_hidden(piece, state, torch.tensor(own))
        for row in range(2):
            theirs = expected[row, read[row] : read[row] + own[row]]
            torch.testing.assert_close(found[row, : own[row]], theirs, rtol=0, atol=1e-12)
            read[row] += own[row]


def test_an_encoder_that_looks_ahead_has_no_state():
    with pytest.raises(StateError, match="looks ahead"):
        encoder_of(*BOTH_SIDES).init_state(1, 20)


# --- from a model ---


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder_from_a_model_has_its_weights(tied):
    blocks = tuple(BlockConfig(mixer=mixer, mlp=GatedMLPConfig(intermediate_size=12), dropout=0.1) for mixer in CAUSAL)
    config = ModelConfig(
        vocab_size=6, hidden_size=8, blocks=blocks, norm=LayerNormConfig(), tie_embeddings=tied, embedding_dropout=0.2
    )
    model = disturbed(build_model(config)).double().eval()
    encoder = encoder_from(model, projection=ProjectionConfig(size=4), head=ClassificationConfig(labels=2)).eval()
    ids = some_ids(2, 9)
    assert torch.equal(encoder.hidden(ids), model.hidden(ids))
    assert encoder(ids).shape == (2, 2)
    assert encoder.norm.scale.dtype == torch.float64
    assert encoder.config.embedding_dropout == 0.2
    assert encoder.config.blocks == blocks
    model.embedding.weight.zero_()  # copied, not shared
    assert encoder.embedding.weight.abs().max() > 0


def test_the_new_parts_are_those_of_the_seed():
    model = build_model(ModelConfig(vocab_size=6, hidden_size=8, blocks=()))
    first, same, other = (encoder_from(model, head=RegressionConfig(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    with pytest.raises(ConfigError, match=r"no complement: got .*; expected 6 ids"):
        encoder_from(model, complement=(3, 2, 1, 0))


# --- dtypes, recomputation ---


@torch.no_grad()
@pytest.mark.parametrize("pooling", POOLINGS)
def test_bfloat16_gives_float32_close_to_float32s(pooling):
    parts = {"pooling": POOLINGS[pooling], "projection": ProjectionConfig(size=16)}
    wide = encoder_of(*BOTH_SIDES, dtype=torch.float32, noise=0.1, **parts)
    narrow = encoder_of(*BOTH_SIDES, dtype=torch.bfloat16, noise=0.1, **parts)
    ids, lengths = some_ids(4, 14), torch.tensor(LENGTHS)
    expected, found = wide(ids, lengths), narrow(ids, lengths)
    assert found.dtype == torch.float32
    assert 1e-4 < (found - expected).norm() / expected.norm() < 10 * 2**-8
    norms = found.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=0)


@pytest.mark.parametrize("complement", [None, COMPLEMENT])
def test_recomputed_activations_change_no_bit(complement):
    encoder = encoder_of(*BOTH_SIDES, complement=complement, embedding_dropout=0.1).train()
    ids, lengths, kept = some_ids(4, 14), torch.tensor(LENGTHS), {}
    for recompute in (False, True):
        encoder.checkpoint_activations = recompute
        encoder.zero_grad()
        torch.manual_seed(3)
        encoder(ids, lengths).square().sum().backward()
        for name, parameter in encoder.named_parameters():
            assert torch.equal(parameter.grad, kept.setdefault(name, parameter.grad.clone())), name

"""Parameters, operations and bytes against figures worked out by hand, and against the model itself."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModelConfig,
    PlainMLPConfig,
    RealModalFilterConfig,
)
from crocuta.errors import InputError
from crocuta.model import count, flops
from crocuta.model.build import build_model
from crocuta.ops.kernels.library import library, switched_off, why_not
from crocuta.ops.modal import BLOCK
from crocuta.presets import PRESETS, preset


def one_block(mixer, *, mlp=None, tie=True) -> ModelConfig:
    """8 channels, 10 ids, one block."""
    block = BlockConfig(mixer=mixer, mlp=mlp)
    return ModelConfig(vocab_size=10, hidden_size=8, blocks=(block,), tie_embeddings=tie)


ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2)
SHORT = HyenaConfig(filter=ExplicitFilterConfig(taps=5))
COMPLEX = HyenaConfig(filter=ComplexModalFilterConfig(modes=3))
REAL = HyenaConfig(filter=RealModalFilterConfig(modes=3))
IMPLICIT = HyenaConfig(filter=ImplicitFilterConfig(max_length=100, width=16))
MLP = GatedMLPConfig(intermediate_size=20)


# --- parameters ---


def test_parameters_of_tiny_modal_by_hand() -> None:
    d, modes, width = 32, 4, 96
    mixer = 3 * d * d + 3 * d * 3 + d * d + d  # in, short filter, out with bias
    mixer += d * modes * 4 + d  # decay, angle, residue (re, im); D
    assert count.parameters(preset("tiny-modal")) == {
        "embedding": 512 * d,
        "hyena, 4 complex modes": 2 * mixer,
        "MLPs": 2 * 3 * d * width,
        "norms": 5 * d,
    }


def test_an_untied_head_counts_and_a_missing_mlp_does_not() -> None:
    parts = count.parameters(one_block(ATTENTION, tie=False))
    assert parts == {
        "embedding": 80,
        "attention, 4 heads, 2 of keys": 8 * (4 + 2 * 2) * 2 + 64,
        "norms": 16,
        "head": 80,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_parts_add_up_to_the_model(name: str) -> None:
    config = preset(name)
    model = build_model(config, device="meta")
    assert sum(count.parameters(config).values()) == sum(p.numel() for p in model.parameters())
    kinds = count.block_kinds(config)
    assert sorted(layer for kind in kinds for layer in kind.layers) == list(range(len(config.blocks)))


# --- bytes ---


def test_state_bytes_by_hand() -> None:
    lengths = 8  # of the model: one int64
    tail = 2 * 24 * 4  # two inputs of the short filter
    assert count.state_bytes(one_block(COMPLEX), 50) == lengths + tail + 8 * 3 * 2 * 4
    assert count.state_bytes(one_block(REAL), 50) == lengths + tail + 8 * 3 * 4
    assert count.state_bytes(one_block(SHORT), 50) == lengths + tail + 4 * 8 * 4
    assert count.state_bytes(one_block(ATTENTION), 50) == lengths + 8 + 2 * 50 * 2 * 2 * 4
    assert count.state_bytes(one_block(IMPLICIT), 50) == lengths + tail + 8 + (64 + 64) * 8 * 4  # whole blocks
    # bfloat16 halves keys, values and tails; modes and the past of an implicit filter stay float32.
    assert count.state_bytes(one_block(ATTENTION), 50, torch.bfloat16) == lengths + 8 + 50 * 2 * 2 * 4
    assert count.state_bytes(one_block(REAL), 50, torch.bfloat16) == lengths + tail // 2 + 8 * 3 * 4


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_a_real_model(name: str, dtype: torch.dtype) -> None:
    config = preset(name)
    model = build_model(config, dtype=dtype)
    assert count.state_bytes(config, 77, dtype) == model.init_state(1, 77).nbytes
    assert count.weight_bytes(config, dtype) == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_which_states_are_constant() -> None:
    constant = {name: count.state_is_constant(preset(name)) for name in PRESETS if name.startswith("tiny-")}
    assert {name for name, holds in constant.items() if holds} == {"tiny-modal", "tiny-modal-real", "tiny-explicit"}


# --- operations ---


def dense(mixer_weights: int, mlp_weights: int = 0) -> int:
    return 2 * (mixer_weights + mlp_weights + 80)


def test_one_token_by_hand() -> None:
    fir = 2 * 24  # the short filter, one input there
    assert flops.decode_flops(one_block(ATTENTION), 1) == dense(8 * 16 + 64) + 4 * 8
    assert flops.decode_flops(one_block(ATTENTION, mlp=MLP), 9) == dense(8 * 16 + 64, 480) + 4 * 8 * 9
    plain = PlainMLPConfig(intermediate_size=20)
    assert flops.decode_flops(one_block(SHORT, mlp=plain), 1) == dense(256, 320) + fir + 2 * 8
    assert flops.decode_flops(one_block(SHORT), 50) == dense(256) + 3 * fir + 5 * 2 * 8
    assert flops.decode_flops(one_block(COMPLEX), 50) == dense(256) + 3 * fir + 8 * 3 * 12
    assert flops.decode_flops(one_block(REAL), 50) == dense(256) + 3 * fir + 8 * 3 * 4
    assert flops.decode_flops(one_block(IMPLICIT), 50) == dense(256) + 3 * fir + 8 * 64  # half a block, twice
    tiles = sum(5 * math.log2(2 * size) + 3 for size in (64, 128, 256))
    assert flops.decode_flops(one_block(IMPLICIT), 300) == dense(256) + 3 * fir + 8 * (64 + tiles)


@pytest.fixture
def without_kernels():
    """What torch's parts cost: a machine without compiled kernels."""
    with switched_off():
        yield


@pytest.mark.usefixtures("without_kernels")
def test_a_sequence_by_hand() -> None:
    l = 2 * BLOCK + 3
    short = 2 * 24 * (3 * l - 3)  # 1 + 2 + 3 + 3 + ...
    assert flops.forward_flops(one_block(ATTENTION), l) == l * dense(192) + 2 * 8 * l * (l + 1)
    assert flops.forward_flops(one_block(SHORT), l) == l * dense(256) + short + 2 * 8 * (5 * l - 10)
    inside = 2 * BLOCK * (BLOCK + 1) + 3 * 4
    assert flops.forward_flops(one_block(REAL), l) == l * dense(256) + short + 8 * (inside + 4 * 3 * l + 2 * 3 * 3)
    modal = 8 * (inside + 4 * 6 * l + 8 * 3 * 3)
    assert flops.forward_flops(one_block(COMPLEX), l) == l * dense(256) + short + modal
    assert flops.training_flops(one_block(COMPLEX), l) == 3 * flops.forward_flops(one_block(COMPLEX), l)


@pytest.mark.skipif(library() is None, reason=why_not() or "")
def test_a_compiled_modal_filter_is_a_recurrence() -> None:
    l = 2 * BLOCK + 3
    short = 2 * 24 * (3 * l - 3)
    assert flops.forward_flops(one_block(REAL), l) == l * dense(256) + short + 8 * l * 4 * 3
    assert flops.forward_flops(one_block(COMPLEX), l) == l * dense(256) + short + 8 * l * 12 * 3


def test_an_implicit_filter_by_hand() -> None:
    l, f = 32, 64  # 64 is the shortest good length >= 63
    fft = 8 * (5 * f * math.log2(f) + 3 * f)
    assert flops.forward_flops(one_block(IMPLICIT), l) == l * dense(256) + 2 * 24 * (3 * l - 3) + fft


def test_long_taps_go_by_fft() -> None:
    config = one_block(HyenaConfig(filter=ExplicitFilterConfig(taps=600)))
    l, f = 1000, 1600
    assert flops.forward_flops(config, l) == pytest.approx(
        l * dense(256) + 2 * 24 * (3 * l - 3) + 8 * (5 * f * math.log2(f) + 3 * f)
    )


@pytest.mark.parametrize("mixer", [ATTENTION, SHORT, COMPLEX, REAL, IMPLICIT])
def test_decoding_a_sequence_costs_what_its_tokens_do(mixer) -> None:
    """Where decoding and the whole pass do the same work, their counts agree; else decoding is dearer or alike."""
    config, l = one_block(mixer, mlp=MLP), 100
    steps = sum(flops.decode_flops(config, t) for t in range(1, l + 1))
    if mixer in (ATTENTION, SHORT):
        assert steps == flops.forward_flops(config, l)
    assert steps == pytest.approx(flops.forward_flops(config, l), rel=0.5)


def mlp_flops(x, gate, _, up, *rest, out_shape=None, **others) -> int:
    """What torch does not look into: a product with each matrix, from shapes."""
    return 2 * math.prod(x) * up[0] * (2 if gate is None else 3)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("name", ["tiny-modal", "tiny-modal-real", "tiny-explicit"])
def test_torch_counts_as_many_matrix_products(name: str) -> None:
    """torch's own counter sees every matrix product, whole: ours must lie below it, by the zeros alone."""
    config, l = preset(name), 8 * BLOCK
    model = build_model(config)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={torch.ops.crocuta.mlp: mlp_flops}) as counter:
        model(torch.zeros(1, l, dtype=torch.int64))
    ours = flops.forward_flops(config, l)
    assert 0.85 < ours / counter.get_total_flops() < 1


def test_kernel_cases_are_those_of_the_filters() -> None:
    def cases(name: str, length: int) -> list[tuple[str, int, int]]:
        return [(case.op, case.length, case.taps) for case in flops.kernel_cases(preset(name), length)]

    operators = [("hyena_fir", 30, 7), ("hyena_fir", 30, 128), ("hyena_modal", 30, 0)]
    with switched_off():
        parts = [("fir", 30, 7), ("fir", 30, 128), ("modal", 30, 0)]
        assert cases("tiny-evo2", 30) == [case for pair in zip(operators, parts) for case in pair]
        assert cases("tiny-hyenadna", 1) == [("hyena_long", 1, 1), ("long_convolution", 1, 1)]
    if library() is not None:  # nothing but the whole operator has a choice then
        assert cases("tiny-evo2", 30) == operators
        assert cases("tiny-hyenadna", 1) == [("hyena_long", 1, 1)]
    assert flops.kernel_cases(one_block(ATTENTION), 1) == []


def test_an_impossible_length_is_an_error() -> None:
    with pytest.raises(InputError, match="max_length"):
        count.state_bytes(preset("tiny-modal"), 0)

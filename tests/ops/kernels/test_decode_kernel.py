"""The operations of a native decoding step, each against plain torch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from compiled import ISAS, each_isa, needs_library, on, poisoned, relative_error, threads
from torch import Tensor

from crocuta.ops import norm, reference
from crocuta.ops.attention import causal_attention
from crocuta.ops.fft_conv import fft_convolution
from crocuta.ops.kernels.decode import (
    BLOCK,
    LONGEST_SUM,
    Addresses,
    Buffer,
    Finish,
    Norm,
    Program,
    interleave,
    pack,
)
from crocuta.ops.kernels.online_conv import OnlineFilter
from crocuta.ops.kernels.online_conv import bound as bind
from crocuta.ops.mlp import activate
from crocuta.ops.online_conv import OnlineBuffers, online_convolution
from crocuta.ops.rope import inverse_frequencies, rotate, rotation

pytestmark = needs_library

SIZES = [(1, 1), (31, 3), (33, 255), (100, 257), (290, 600)]
FORMATS = ("float32", "bfloat16", "int8")
ACTIVATIONS = ("identity", "silu", "gelu", "gelu_tanh")
WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def bound(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-14


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(program: Program, rows: int, given: dict[Buffer, Tensor], wanted: Buffer, states: list = ()) -> Tensor:
    """One buffer after the whole program, which finds NaN wherever nothing was given."""
    with poisoned():
        buffers = program.buffers(rows)
        for buffer, value in given.items():
            buffers[buffer].view(-1)[: value.numel()] = value.reshape(-1)
        logits = torch.empty(rows, program._widths[Buffer.LOGITS], dtype=program.dtype)
    places, slots, ids = Addresses(buffers), Addresses(list(states)), torch.zeros(rows, dtype=torch.int64)
    program.runner()(0, len(program), places.address, slots.address, ids, logits)
    return logits if wanted is Buffer.LOGITS else buffers[wanted]


def product(matrix: Tensor, bias: Tensor | None, x: Tensor, weights: str, **options) -> Tensor:
    program = Program(x.dtype, weights)
    program.linear(matrix, bias, Buffer.NORMED, Buffer.LOGITS, **options)
    return run(program, len(x), {Buffer.NORMED: x}, Buffer.LOGITS)


def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, and their scales: what the kernel multiplies."""
    scales = matrix.abs().amax(1, keepdim=True) / 127
    return (matrix / scales).round(), scales.double()


def rounded_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of whole numbers up to 2^14, and their scales, which are powers of two: what it multiplies them by."""
    scales = torch.exp2(torch.frexp(x.abs().amax(1, keepdim=True)).exponent - 14.0).double()
    return (x / scales).round(), scales


def as_packed(matrix: Tensor, x: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """What the formats make of a matrix and its input, in float64."""
    match weights:
        case "float32":
            return matrix.double(), x.double()
        case "bfloat16":
            return matrix.bfloat16().double(), x.double()
        case _:
            return tuple(whole * scales for whole, scales in (rounded(matrix), rounded_inputs(x)))


# --- products -----------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_of_any_size_and_number_of_rows(isa, weights, size):
    matrix, bias = normal(*size), normal(size[0], seed=1)
    for rows in (1, 3, 15):
        x = normal(rows, size[1], seed=rows)
        with on(isa):
            y = product(matrix, bias, x, weights)
        w, inputs = as_packed(matrix, x, weights)
        assert relative_error(y, inputs @ w.t() + bias) < 1e-6


def test_products_in_8_bits_are_the_same_numbers_on_every_instruction_set():
    """The sums are whole numbers that 32 bits do not hold, and are rounded once."""
    for outputs, inputs in ((40, 3), (130, 4093)):
        matrix, x = normal(outputs, inputs) + 9, normal(5, inputs, seed=1) + 9
        found = []
        for isa in ISAS:
            with on(isa):
                found.append(product(matrix, None, x, "int8"))
        assert all(torch.equal(found[0], other) for other in found)
        (whole, scales), (numbers, steps) = rounded(matrix), rounded_inputs(x)
        sums = numbers @ whole.double().t()
        assert inputs < 2000 or sums.abs().max() > 2**31
        assert relative_error(found[0], sums * (steps * scales.t())) < 1.2e-7


@each_isa
def test_products_in_float64(isa):
    for size in SIZES:
        for rows in (1, 3, 6):
            matrix, x = normal(*size, dtype=torch.float64), normal(rows, size[1], seed=1, dtype=torch.float64)
            with on(isa):
                assert relative_error(product(matrix, None, x, "float32"), x @ matrix.t()) < 1e-14


@each_isa
@pytest.mark.parametrize("weights", FORMATS)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(isa, weights):
    matrix, x = normal(500, 301), normal(9, 301, seed=1)
    with on(isa):
        together = product(matrix, None, x, weights)
        alone = torch.cat([product(matrix, None, row[None], weights) for row in x])
        shared = []
        for count in (2, 3, 2):
            with threads(count):
                shared.append(product(matrix, None, x, weights))
    assert torch.equal(together, alone)
    assert all(torch.equal(together, other) for other in shared)


def test_many_steps_on_several_threads_are_the_same_step():
    """Phases follow one another as fast as they can: none may begin before all of the last one is there, and a helper
    that is late must find nothing of an older one. So phases are longer than it takes to wake a thread."""
    program, x = Program(torch.float32, "float32"), normal(8, 512)
    there, back = normal(544, 512) / 23, normal(512, 544, seed=1) / 23
    for _ in range(20):
        program.linear(there, None, Buffer.NORMED, Buffer.MIDDLE)
        program.linear(back, None, Buffer.MIDDLE, Buffer.NORMED)
    truth = run(program, 8, {Buffer.NORMED: x}, Buffer.NORMED)
    with threads(3):
        for _ in range(5):
            assert torch.equal(run(program, 8, {Buffer.NORMED: x}, Buffer.NORMED), truth)


@WIDE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(dtype, activation):
    x = torch.cat([torch.linspace(-12, 12, 700), torch.tensor([-300.0, -90.0, -0.0, 1e-30, 90.0, 300.0])]).to(dtype)
    y = product(torch.eye(len(x), dtype=dtype), None, x[None], "float32", finish=Finish.ACTIVATE, activation=activation)
    expected = activate(x.double(), activation)
    assert float((y[0].double() - expected).abs().max()) < 2 * bound(dtype)
    assert relative_error(y[0, -3:], expected[-3:]) < bound(dtype)


def test_an_exponential_of_nan_is_nan():
    x = torch.tensor([[math.nan, 1.0, math.inf, -math.inf]])
    y = product(torch.eye(4)[:1], None, x[:, :1].expand(1, 4), "float32", finish=Finish.ACTIVATE, activation="silu")
    assert y.isnan().all()


@each_isa
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("size", [(2, 5), (32, 32), (33, 40), (100, 64)], ids=str)
def test_gated_products_and_their_biases(isa, weights, size):
    gate, up = normal(*size) / size[1] ** 0.5, normal(*size, seed=1)
    biases = normal(size[0], seed=2), normal(size[0], seed=3)
    for rows in (1, 5):
        program, x = Program(torch.float32, weights), normal(rows, size[1], seed=4)
        program.gated(gate, up, biases, "gelu")
        with on(isa):
            y = run(program, rows, {Buffer.NORMED: x}, Buffer.MIDDLE)
        (g, inputs), (u, _) = as_packed(gate, x, weights), as_packed(up, x, weights)
        assert relative_error(y, F.gelu(inputs @ g.t() + biases[0]) * (inputs @ u.t() + biases[1])) < 2e-6


def test_a_product_is_added_to_what_is_there():
    matrix, x, stream = normal(70, 40), normal(3, 40, seed=1), normal(3, 70, seed=2)
    program = Program(torch.float32, "float32")
    program.linear(matrix, None, Buffer.MIXED, Buffer.STREAM, Finish.ADD)
    y = run(program, 3, {Buffer.MIXED: x, Buffer.STREAM: stream}, Buffer.STREAM)
    assert relative_error(y, stream.double() + x.double() @ matrix.double().t()) < 1e-6


@each_isa
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_not_rounded_to_one(isa, bad):
    x = normal(2, 50)
    x[1, 47] = bad
    with on(isa):
        y = product(normal(40, 50, seed=1), None, x, "int8")
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@each_isa
def test_rows_of_zeros_and_of_the_largest_numbers_in_8_bits(isa):
    k = LONGEST_SUM
    x = torch.stack([torch.zeros(k), torch.ones(k), -torch.ones(k)])
    with on(isa):
        y = product(torch.cat([torch.ones(33, k), -torch.ones(1, k), torch.zeros(1, k)]), None, x, "int8")
    assert torch.equal(y[0], torch.zeros(35))
    assert relative_error(y[1], torch.tensor([float(k)] * 33 + [-float(k), 0.0])) < 1e-6
    assert relative_error(y[2], -y[1]) < 1e-6


def test_packed_matrices_are_as_small_as_they_say():
    matrix = normal(64, 96)
    assert [pack(matrix, weights).weights.nbytes for weights in ("bfloat16", "int8")] == [64 * 96 * 2, 64 * 96]
    assert pack(matrix[:33], "int8").weights.shape[0] * BLOCK == 64


@WIDE
def test_matrices_are_read_where_they_are(dtype):
    """And copied where they lie otherwise, or have another dtype."""
    matrix, x = normal(40, 24, dtype=dtype), normal(2, 24, seed=1, dtype=dtype)
    program, turned = Program(dtype, "float32"), Program(dtype, "float32")
    program.linear(matrix, None, Buffer.NORMED, Buffer.LOGITS)
    turned.linear(matrix.t().contiguous().t(), None, Buffer.NORMED, Buffer.LOGITS)
    assert (program.nbytes, turned.nbytes) == (0, matrix.nbytes)
    before = matrix.clone()
    matrix.mul_(3)
    assert relative_error(run(program, 2, {Buffer.NORMED: x}, Buffer.LOGITS), x @ matrix.t()) < bound(dtype)
    assert relative_error(run(turned, 2, {Buffer.NORMED: x}, Buffer.LOGITS), x @ before.t()) < bound(dtype)
    assert relative_error(product(before.bfloat16(), None, x, "float32"), x @ before.bfloat16().to(dtype).t()) < 1e-6


def test_interleaved_rows_come_in_blocks():
    rows = interleave(torch.arange(40.0), -torch.arange(40.0))
    assert rows[:32].tolist() == list(range(32))
    assert rows[32:64].tolist() == [-i for i in range(32)]
    assert rows[64:72].tolist() == list(range(32, 40))
    assert len(rows) == 128


# --- what stands between them -------------------------------------------------------------------------------------


@each_isa
@WIDE
@pytest.mark.parametrize("d", [1, 7, 64, 301])
def test_norms(isa, dtype, d):
    x, scale, bias = normal(3, d, dtype=dtype) + 2, normal(d, seed=1, dtype=dtype), normal(d, seed=2, dtype=dtype)
    expected = {
        Norm.RMS_INSIDE: norm.add_rms_norm(x.double(), None, scale.double(), 1e-2, eps_inside_root=True)[1],
        Norm.RMS_OUTSIDE: norm.add_rms_norm(x.double(), None, scale.double(), 1e-2, eps_inside_root=False)[1],
        Norm.LAYER: norm.add_layer_norm(x.double(), None, scale.double(), bias.double(), 1e-2)[1],
    }
    for kind, truth in expected.items():
        program = Program(dtype, "float32")
        program.norm(kind, scale, bias if kind is Norm.LAYER else None, 1e-2)
        with on(isa):
            assert relative_error(run(program, 3, {Buffer.STREAM: x}, Buffer.NORMED), truth) < bound(dtype)


def hyena_inputs(b: int, d: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        *(normal(b, 3 * d, dtype=dtype), normal(3 * d, k, seed=1, dtype=dtype), normal(3 * d, seed=2, dtype=dtype)),
        normal(b, k - 1, 3 * d, seed=3, dtype=dtype),
    )


@each_isa
@WIDE
@pytest.mark.parametrize("d", [3, 32, 301])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_the_short_filter_and_the_first_gate(isa, dtype, d, k):
    z, taps, bias, tail = hyena_inputs(2, d, k, dtype)
    whole = torch.cat([tail, z[:, None]], 1).double()
    filtered = (whole * taps.double().t().flip(0)).sum(1) + bias.double()
    x2, x1, v = filtered.chunk(3, 1)
    program = Program(dtype, "float32")
    program.reserve(3 * d, Buffer.WIDE)
    program.short_filter(taps, bias)
    for wanted, truth in ((Buffer.GATE, x2), (Buffer.INPUT, x1 * v)):
        moved = tail.clone()
        with on(isa):
            assert relative_error(run(program, 2, {Buffer.WIDE: z}, wanted, [moved]), truth) < bound(dtype)
        assert torch.equal(moved, whole[:, 1:].to(dtype))


@each_isa
@WIDE
@pytest.mark.parametrize("k", [1, 2, 128])
def test_a_long_fir(isa, dtype, k):
    d = 290
    gate, u, taps = normal(2, d, dtype=dtype), normal(2, d, seed=1, dtype=dtype), normal(d, k, seed=2, dtype=dtype)
    skip, tail = normal(d, seed=3, dtype=dtype), normal(2, k - 1, d, seed=4, dtype=dtype)
    whole = torch.cat([tail, u[:, None]], 1).double()
    truth = gate.double() * ((whole * taps.double().t().flip(0)).sum(1) + skip.double() * u.double())
    program, moved = Program(dtype, "float32"), tail.clone()
    program.reserve(d, Buffer.GATE)
    program.reserve(d, Buffer.INPUT)
    program.long_fir(taps, skip)
    with on(isa):
        y = run(program, 2, {Buffer.GATE: gate, Buffer.INPUT: u}, Buffer.MIXED, [moved])
    assert relative_error(y, truth) < bound(dtype)
    assert torch.equal(moved, whole[:, 1:].to(dtype))


@each_isa
@WIDE
@pytest.mark.parametrize("is_complex", [True, False], ids=["complex", "real"])
@pytest.mark.parametrize("size", [(2, 1), (37, 3), (260, 8)], ids=str)
def test_a_modal_filter(isa, dtype, is_complex, size):
    (d, n), b = size, 3
    pair = (2,) if is_complex else ()
    logs = -0.1 - normal(d, n, dtype=torch.float64).abs()
    logs = torch.stack([logs, normal(d, n, seed=1, dtype=torch.float64)], -1) if is_complex else logs
    residues, state = normal(d, n, *pair, seed=2, dtype=torch.float64), normal(b, d, n, *pair, seed=3, dtype=dtype)
    gate, u, skip = normal(b, d, dtype=dtype), normal(b, d, seed=4, dtype=dtype), normal(d, seed=5, dtype=dtype)
    wide = u.double()[:, None], logs, residues, skip.double(), state.double()
    truth, last = reference.modal_convolution(*wide)
    poles, r = torch.exp(torch.view_as_complex(logs) if is_complex else logs), residues
    program = Program(dtype, "float32")
    program.reserve(d, Buffer.GATE)
    program.reserve(d, Buffer.INPUT)
    program.modal(poles, torch.view_as_complex(r) if is_complex else r, skip)
    order = (0, 3, 2, 1) if is_complex else (0, 2, 1)
    moved = state.permute(order).contiguous()
    with on(isa):
        y = run(program, b, {Buffer.GATE: gate, Buffer.INPUT: u}, Buffer.MIXED, [moved])
    assert relative_error(y, truth[:, 0] * gate.double()) < bound(dtype)
    assert relative_error(moved.permute(order), last) < bound(dtype)


@each_isa
@WIDE
@pytest.mark.parametrize("heads", [(4, 4, 6, True), (6, 2, 10, True), (2, 1, 33, False), (2, 2, 64, True)], ids=str)
def test_attention_on_rows_of_different_lengths(isa, dtype, heads):
    h, m, c, rotated = heads
    room, lengths = 200, torch.tensor([0, 63, 64, 197])
    b, scale = len(lengths), 2.0
    qkv = normal(b, (h + 2 * m) * c, dtype=dtype)
    keys, values = normal(b, room, m, c, seed=1, dtype=dtype), normal(b, room, m, c, seed=2, dtype=dtype)
    q, k, v = (part.unflatten(-1, (-1, c))[:, None].double() for part in qkv.split([h * c, m * c, m * c], dim=-1))
    inverse = inverse_frequencies(c, 10_000.0).to(dtype) if rotated else None
    if inverse is not None:
        tables = rotation(lengths[:, None].double() / scale, inverse.double(), torch.float64)
        q, k = rotate(q, *tables), rotate(k, *tables)
    all_keys, all_values = keys.double(), values.double()
    for row, length in enumerate(lengths):
        all_keys[row, length], all_values[row, length] = k[row, 0], v[row, 0]
    truth = causal_attention(q, all_keys, all_values, lengths).flatten(1)
    for row, length in enumerate(lengths):  # what lies past a row's own must not be read
        keys[row, length:] = math.nan
        values[row, length:] = math.nan
    program, counted = Program(dtype, "float32"), lengths.clone()
    program.reserve(qkv.shape[1], Buffer.WIDE)
    program.attention(h, m, c, inverse, scale)
    with on(isa):
        y = run(program, b, {Buffer.WIDE: qkv}, Buffer.MIXED, [keys, values, counted, room])
    # float32 angles of 100 rad are off by 1e-5; the reference has them in float64
    assert relative_error(y, truth) < (1e-5 if dtype == torch.float32 else 1e-13)
    assert torch.equal(counted, lengths + 1)
    written = torch.stack([keys[row, length] for row, length in enumerate(lengths)])
    assert relative_error(written, k[:, 0]) < (1e-5 if dtype == torch.float32 else 1e-13)
    assert torch.stack([keys[row, length + 1 :].isnan().all() for row, length in enumerate(lengths)]).all()


def test_sums_and_counts():
    program, stream, mixed = Program(torch.float32, "float32"), normal(2, 300), normal(2, 300)
    program.reserve(300, Buffer.STREAM)
    program.residual(300)
    program.count()
    lengths = torch.tensor([5, 9])
    y = run(program, 2, {Buffer.STREAM: stream, Buffer.MIXED: mixed}, Buffer.STREAM, [lengths])
    assert relative_error(y, stream.double() + mixed.double()) < 1e-6
    assert lengths.tolist() == [6, 10]


@each_isa
def test_online_convolutions(isa):
    """Over two blocks, of rows at different places; a tile is shared by threads."""
    u, gate, taps, skip = (
        normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(2, 150, 70)] * 2 + [(7, 150), (70,)])
    )
    long, near = (
        torch.zeros(2, 192, 70, dtype=torch.float64).transpose(1, 2),
        torch.zeros(2, 64, 70, dtype=torch.float64),
    )
    buffers, made, lengths = OnlineBuffers(long, near), OnlineFilter(taps, 70), torch.tensor([0, 20])
    online_convolution(u[1:, :20], made.plain, buffers.row(1), [0], None, skip)
    program = Program(torch.float64, "float32")
    program.online(70)
    for buffer in (Buffer.GATE, Buffer.INPUT):
        program.reserve(70, buffer)
    truth = gate * fft_convolution(u, taps, skip)
    rows = torch.arange(2)
    with on(isa), threads(2):
        held = bind(made, buffers, skip)
        for t in range(130):
            at = lengths.clone()
            held.begin_block(t // 64 * 64)
            given = {Buffer.GATE: gate[rows, at], Buffer.INPUT: u[rows, at]}
            y = run(program, 2, given, Buffer.MIXED, [held.address, lengths])
            assert relative_error(y, truth[rows, at]) < 1e-10
            assert lengths.tolist() == [t + 1, t + 21]

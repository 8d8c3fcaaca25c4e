"""P1 to P6 and P14: operators alone, on random inputs, against the published formulation of each."""

from __future__ import annotations

from dataclasses import replace

from suite.case import Allocator, Case, Gate, Goal, Side

VALUE_BOUND = 1e-5
"""Of every value and gradient of ours, relative to float64."""

PUBLISHED_FILTER = {"y": 1e-4, "state": 5e-2, "dpoles": 1e-2, "dresidues": 1e-3, "du": 1e-4, "dskip": 1e-5}
"""The published modal filter takes angles of up to l radians in float32, and its state l-th powers of poles."""


def modal_prefill(modes: int, goal: float) -> Case:
    return Case(
        name=f"modal_prefill/{modes}_modes",
        item="P1",
        what=f"modal filter, output and state, 256 channels, 8,192 tokens, {modes} modes",
        inputs="inputs:modal",
        sizes={"channels": 256, "modes": modes, "length": 8192},
        smoke={"channels": 8, "length": 64},
        sides=(
            Side(name="ours", task="ours.operators:modal_prefill", environment="ours"),
            Side(name="stripedhyena", task="peers.stripedhyena:modal_prefill", bounds=PUBLISHED_FILTER),
            Side(
                name="stripedhyena, filter cached, no state",
                task="peers.stripedhyena:cached_filter",
                bounds=PUBLISHED_FILTER,
            ),
        ),
        gate=Gate(truth="truth:modal", bounds={"y": VALUE_BOUND, "state": VALUE_BOUND}),
        goals=(
            Goal(against="stripedhyena", bound=goal),
            Goal(against="stripedhyena, filter cached, no state", bound=20.0),
        ),
    )


def modal_training(modes: int, goal: float) -> Case:
    names = ("y", "du", "dpoles", "dresidues", "dskip")
    return Case(
        name=f"modal_training/{modes}_modes",
        item="P2",
        what=f"modal filter, forward and backward, 256 channels, 8,192 tokens, {modes} modes",
        inputs="inputs:modal",
        sizes={"channels": 256, "modes": modes, "length": 8192, "gradients": True},
        smoke={"channels": 8, "length": 64},
        sides=(
            Side(name="ours", task="ours.operators:modal_training", environment="ours"),
            Side(name="stripedhyena", task="peers.stripedhyena:modal_training", bounds=PUBLISHED_FILTER),
        ),
        gate=Gate(truth="truth:modal", bounds=dict.fromkeys(names, VALUE_BOUND)),
        goals=(Goal(against="stripedhyena", bound=goal),),
    )


def torch_paths_alone(case: Case, goal: float) -> Case:
    """The case as a machine without a compiler runs it."""
    ours = replace(case.ours, task=f"{case.ours.task}_on_torch")
    return replace(
        case,
        name=f"{case.name}_torch_paths_alone",
        what=f"{case.what}, torch paths alone",
        sides=(ours, case.side("stripedhyena")),
        goals=(Goal(against="stripedhyena", bound=goal),),
    )


def real_modal() -> Case:
    vortex = "peers.vortex:real_modal_prefill"
    return Case(
        name="modal_real/16_modes",
        item="P3",
        what="Evo 2's modal filter (real poles), ours with the state, 256 channels, 8,192 tokens, 16 modes",
        inputs="inputs:real_modal",
        sizes={"channels": 256, "modes": 16, "length": 8192},
        smoke={"channels": 8, "length": 64},
        sides=(
            Side(name="ours", task="ours.operators:real_modal_prefill", environment="ours"),
            Side(name="vortex, no state", task=vortex, settings={"state": False}, bounds=PUBLISHED_FILTER),
            Side(name="vortex, with state", task=vortex, settings={"state": True}, bounds=PUBLISHED_FILTER),
            Side(name="vortex, filter cached, no state", task="peers.vortex:cached_filter", bounds=PUBLISHED_FILTER),
        ),
        gate=Gate(truth="truth:real_modal", bounds={"y": VALUE_BOUND, "state": VALUE_BOUND}),
        goals=(
            Goal(against="vortex, no state", bound=200.0),
            Goal(against="vortex, with state", bound=None),
            Goal(against="vortex, filter cached, no state", bound=30.0),
        ),
    )


CONVOLUTIONS = ((1024, 256), (8192, 256), (65_536, 64), (262_144, 16))
"""Lengths and channels, as in performance.md: always some megabytes of input."""


def long_convolution(length: int, channels: int, *, backward: bool, allocator: Allocator) -> Case:
    task = "long_convolution_training" if backward else "long_convolution"
    names = ("y", "du", "dtaps", "dskip") if backward else ("y",)
    tuned = allocator == "tuned"
    goal = (4.0 if backward else 4.5) if tuned else 6.0
    return Case(
        name=f"{task}/{length}" + ("_tuned" if tuned else ""),
        item="P5" if backward else "P4",
        what=f"long convolution{', forward and backward' if backward else ''}, {channels} channels, {length:,} tokens"
        + (", tuned allocator" if tuned else ""),
        inputs="inputs:convolution",
        sizes={"channels": channels, "length": length, "gradients": backward},
        smoke={"channels": 8, "length": 64},
        sides=(
            Side(name="ours", task=f"ours.operators:{task}", environment="ours"),
            Side(name="safari, HyenaDNA", task=f"peers.convolution:{task}"),
        ),
        gate=Gate(truth="truth:convolution", bounds=dict.fromkeys(names, VALUE_BOUND)),
        goals=(Goal(against="safari, HyenaDNA", bound=goal),),
        allocator=allocator,
    )


def fir_gate() -> Case:
    return Case(
        name="fir_gate/3_taps",
        item="P6",
        what="short FIR of three branches and the first gate, 256 channels, 8,192 tokens",
        inputs="inputs:fir_gate",
        sizes={"channels": 256, "length": 8192, "taps": 3},
        smoke={"channels": 8, "length": 64},
        sides=(
            Side(name="ours", task="ours.operators:fir_gate", environment="ours"),
            Side(name="conv1d, eager", task="peers.convolution:fir_gate"),
        ),
        gate=Gate(truth="truth:fir_gate", bounds={"x2": VALUE_BOUND, "u": VALUE_BOUND}),
        goals=(Goal(against="conv1d, eager", bound=12.0),),
    )


def medium_fir() -> Case:
    return Case(
        name="fir/128_taps",
        item="P6",
        what="FIR of 128 taps (Hyena-MR), 256 channels, 8,192 tokens",
        inputs="inputs:convolution",
        sizes={"channels": 256, "length": 8192, "taps": 128},
        smoke={"channels": 8, "length": 256},
        sides=(
            Side(name="ours", task="ours.operators:medium_fir", environment="ours"),
            Side(name="conv1d", task="peers.convolution:medium_fir"),
            Side(name="vortex, by FFT", task="peers.vortex:medium_fir"),
        ),
        gate=Gate(truth="truth:medium_fir", bounds={"y": VALUE_BOUND}),
        goals=(Goal(against="conv1d", bound=25.0), Goal(against="vortex, by FFT", bound=6.0)),
    )


def online() -> Case:
    return Case(
        name="online_convolution/16384",
        item="P14",
        what="exact long convolution a token at a time, one layer of 256 channels, 16,384 tokens",
        inputs="inputs:convolution",
        sizes={"channels": 256, "length": 16_384, "sampled": 64},
        smoke={"channels": 8, "length": 256, "sampled": 16},
        sides=(
            Side(name="ours", task="ours.operators:online", environment="ours"),
            Side(name="cached dot product", task="peers.convolution:cached_dot"),
        ),
        gate=Gate(truth="truth:sampled_convolution", bounds={"y": VALUE_BOUND}),
        goals=(Goal(against="cached dot product", bound=300.0),),
    )


MODAL = (modal_prefill(2, 400.0), modal_prefill(8, 1000.0), modal_training(2, 50.0), modal_training(8, 120.0))

CASES = (
    *MODAL,
    torch_paths_alone(MODAL[1], 10.0),
    torch_paths_alone(MODAL[2], 6.0),
    torch_paths_alone(MODAL[3], 6.0),
    real_modal(),
    *(
        long_convolution(length, channels, backward=backward, allocator=allocator)
        for backward in (False, True)
        for allocator in ("default", "tuned")
        for length, channels in CONVOLUTIONS
    ),
    fir_gate(),
    medium_fir(),
    online(),
)

"""What each fault of a tutorial's Hyena operator does, and what the preset "deep-dive-hyena" does instead.

    python benchmarks/deep_dive.py            # every figure of docs/deep-dive.md, about half a minute of one core
    python benchmarks/deep_dive.py --smoke    # tiny sizes, seconds; its figures mean little

Three things stand side by side: the operator as the tutorial describes it (``_tutorial.operator``, with torch's initial
values), the preset's weights with one fault switched on, and the preset itself. Inputs are white noise of unit size,
mixers stand alone, in float64 where nothing else is said; a figure of several seeds is their median.

The script ends with 1, and writes nothing, unless the preset reads no later token, keeps the outputs of a prefix, does
not grow with length, and stays finite in float16.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import _tutorial as tutorial
import torch
from _deep_dive import (
    SMOKE,
    UNNORMALISED,
    Allocated,
    Section,
    Sizes,
    as_written,
    largest_gradients,
    median,
    noise,
    powers,
    preset_block,
    preset_mixer,
    rms,
    shown,
    stored,
    with_fault,
)
from _timing import alternate, chosen_sizes, manifest, ratio, sizes_parser, table, write_result
from _tutorial import AS_WRITTEN, CORRECTED
from torch import Tensor

from crocuta.config import GatedMLPConfig
from crocuta.model.build import build_model
from crocuta.model.filters import implicit
from crocuta.model.norm import build_norm
from crocuta.ops.fft_conv import fft_convolution
from crocuta.presets import deep_dive_hyena
from crocuta.training.optim import parameter_groups

# --- what a token may see ---


def future(sizes: Sizes) -> Section:
    """Gradients of the first half of the outputs, sums instead of transforms, so that 0 is exactly 0."""
    direct = tutorial.direct_convolution

    def preset(seed: int, x: Tensor) -> Tensor:
        def summed(u: Tensor, taps: Tensor, skip: Tensor, *_: object) -> Tensor:
            return direct(u, taps) + skip * u

        with mock.patch.object(implicit, "fft_convolution", summed):
            return preset_mixer(sizes, seed)(x)

    sides: dict[str, Callable[[int, Tensor], Tensor]] = {
        "tutorial": lambda seed, x: as_written(sizes, seed, convolve=direct)(x),
        "preset, centred short convolution": lambda seed, x: with_fault(sizes, seed, "centred_short", convolve=direct)(
            x
        ),
        "preset": preset,
        "preset, by transforms": lambda seed, x: preset_mixer(sizes, seed)(x),
    }
    rows = []
    for name, run in sides.items():
        found = [largest_gradients(partial(run, seed), sizes, seed) for seed in range(sizes.seeds)]
        later, earlier = max(pair[0] for pair in found), statistics.median(pair[1] for pair in found)
        rows.append([name, later, earlier])
    holds = {
        "the preset's gradient for later tokens is exactly 0": rows[2][1] == 0.0,
        "by transforms it is rounding": rows[3][1] <= 1e-12 * rows[3][2],
    }
    header = ["operator", "largest gradient, later tokens", "the same and earlier ones"]
    return Section("Later tokens", header, rows, holds)


@torch.no_grad()
def prefixes(sizes: Sizes) -> Section:
    def change(run: Callable[[Tensor], Tensor], seed: int, dtype: torch.dtype = torch.float64) -> tuple[float, int]:
        x = noise(seed, 1, 2 * sizes.prefix, sizes.channels).to(dtype)
        alone = run(x[:, : sizes.prefix])
        difference = (run(x)[:, : sizes.prefix] - alone).abs().amax(dim=(0, 2)) / rms(alone)
        return float(difference.max()), int((difference > 1e-5).sum())

    sides: dict[str, Callable[[int], tuple[float, int]]] = {
        "tutorial": lambda seed: change(as_written(sizes, seed), seed),
        "preset, window over the current length": lambda seed: change(with_fault(sizes, seed, "current_window"), seed),
        "preset, centred short convolution": lambda seed: change(with_fault(sizes, seed, "centred_short"), seed),
        "preset": lambda seed: change(preset_mixer(sizes, seed), seed),
        "preset in float32": lambda seed: change(preset_mixer(sizes, seed, torch.float32), seed, torch.float32),
    }
    rows = []
    for name, side in sides.items():
        found = [side(seed) for seed in range(sizes.seeds)]
        rows.append([name, max(pair[0] for pair in found), max(pair[1] for pair in found)])
    holds = {
        "a prefix of the preset keeps its outputs to 1e-12": rows[3][1] <= 1e-12,
        "in float32 to 1e-5": rows[4][1] <= 1e-5,
    }
    header = ["operator", "largest change / rms", f"changed positions of {sizes.prefix}"]
    return Section("A prefix when as much text is appended", header, rows, holds)


# --- size ---


@torch.no_grad()
def growth(sizes: Sizes) -> Section:
    """For white noise, and for one token that is repeated: what all earlier inputs have in common adds up."""
    lengths = powers(sizes.shortest, sizes.longest)
    sides: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
        "tutorial": lambda seed: as_written(sizes, seed),
        "preset, not normalised": lambda seed: with_fault(sizes, seed, "unnormalised"),
        "preset": lambda seed: preset_mixer(sizes, seed),
    }

    def size(side: Callable[[int], Callable[[Tensor], Tensor]], repeated: bool, length: int, seed: int) -> float:
        x = noise(seed, 1, 1 if repeated else length, sizes.channels).expand(-1, length, -1)
        return rms(side(seed)(x)[:, length // 2 :])

    rows: list[list[Any]] = []
    for inputs in ("noise", "one token repeated"):
        for name, side in sides.items():
            row = [median(partial(size, side, inputs != "noise", length), sizes) for length in lengths]
            rows.append([f"{name}, {inputs}", *row])
    kinds = {2: "noise", 5: "one token"}  # the first texts are shorter than the filters, and see a part of their energy
    level = {i: rows[i][-1] <= 1.25 * rows[i][-2] and rows[i][-1] <= 2 * rows[i][1] for i in kinds}
    holds = {f"the preset does not grow with length for {kind}": level[i] for i, kind in kinds.items()}
    return Section("Rms of the outputs' second half", ["operator", *(f"{l:,}" for l in lengths)], rows, holds)


@torch.no_grad()
def normalisation(sizes: Sizes) -> Section:
    """White noise through the preset's first filter in three sizes, max_length as long as the input."""
    rows: list[list[Any]] = []
    for length in powers(sizes.shortest, sizes.broadest):
        found = []
        for seed in range(sizes.seeds):
            (filter_, *_) = tutorial.weights_of(preset_mixer(sizes, seed, max_length=length)).filters
            plain, l2 = (tutorial.taps(filter_, length, faults, length) for faults in (UNNORMALISED, CORRECTED))
            l1 = plain / plain.abs().sum(1, keepdim=True)
            x = noise(seed, 1, length, sizes.channels)
            outputs = [rms(fft_convolution(x, h)[:, length // 2 :]) for h in (plain, l1, l2)]
            found.append([*outputs, *(float(h.abs().sum(1).median()) for h in (plain, l2))])
        rows.append([f"{length:,}", *(statistics.median(column) for column in zip(*found, strict=True))])
    header = [
        "max_length = length",
        "rms, tanh alone",
        "rms, Σ abs(h) = 1",
        "rms, Σ h² = 1",
        "Σ abs(h), tanh alone",
        "Σ abs(h), Σ h² = 1",
    ]
    holds = {"a normalised filter keeps the size of noise": all(0.8 <= row[3] <= 1.25 for row in rows)}
    return Section("White noise of rms 1 through one long filter", header, rows, holds)


@torch.no_grad()
def far_text(sizes: Sizes) -> Section:
    """The third quarter of the outputs, max_length as long as the input, under both norms.

    Change: by another first half of the input, as a part of the outputs' size. That is what the long filters bring.
    """

    def measured(order: int, length: int, seed: int) -> list[float]:
        def normalised(y: Tensor, h: Tensor) -> Tensor:
            return fft_convolution(y, h / h.norm(p=order, dim=1, keepdim=True))

        weights = tutorial.weights_of(preset_mixer(sizes, seed, max_length=length))
        run = partial(tutorial.operator, weights=weights, faults=CORRECTED, max_length=length, convolve=normalised)
        third, half = slice(length // 2 + 8, length * 3 // 4), length // 2
        x, other = noise(seed, 1, length, sizes.channels), noise(seed + 1000, 1, length, sizes.channels)
        y, repeated = run(x)[:, third], run(x[:, :1].expand(-1, length, -1))[:, third]
        changed = run(torch.cat([other[:, :half], x[:, half:]], dim=1))[:, third]
        return [rms(y), rms(repeated), rms(changed - y) / rms(y)]

    rows: list[list[Any]] = []
    for length in powers(sizes.shortest, sizes.broadest, 16):
        row: list[Any] = [f"{length:,}"]
        for order in (1, 2):
            found = [measured(order, length, seed) for seed in range(sizes.seeds)]
            row += [statistics.median(column) for column in zip(*found, strict=True)]
        rows.append(row)
    names = [f"Σ {norm} = 1: {what}" for norm in ("abs(h)", "h²") for what in ("noise", "one token repeated", "change")]
    return Section("Outputs of the preset's mixer under both norms", ["max_length = length", *names], rows)


@torch.no_grad()
def residuals(sizes: Sizes) -> Section:
    """What 0.1 of the value is, as a part of the operator's recurrence, before any projection."""
    rows: list[list[Any]] = []
    for length in (sizes.shortest, sizes.longest):
        x = noise(0, 1, length, sizes.channels)
        for name, weights, faults in (
            ("tutorial", tutorial.tutorial_weights(0, sizes.channels), AS_WRITTEN),
            ("preset", tutorial.weights_of(preset_mixer(sizes, 0)), CORRECTED),
        ):
            weights.output = (torch.eye(sizes.channels, dtype=torch.float64), 0 * weights.output[0][0])
            y = tutorial.operator(x, weights, faults, max_length=sizes.max_length)
            value = tutorial.branches(x, weights, faults)[-1]
            rows.append([f"{name}, {length:,} tokens", 0.1 * rms(value) / rms(y)])
    return Section("The residual's part of the output", ["operator", "rms of 0.1 v / rms of y"], rows)


# --- filters ---


@torch.no_grad()
def spectra(sizes: Sizes) -> Section:
    """Share of a filter's energy above half of the highest frequency, median and least of all channels."""

    def shares(weights: tutorial.Weights, faults: tutorial.Faults) -> Tensor:
        h = torch.cat([tutorial.taps(f, sizes.max_length, faults, sizes.max_length) for f in weights.filters])
        energy = torch.fft.rfft(h, n=2 * sizes.max_length).abs().square()
        return energy[:, sizes.max_length // 2 :].sum(1) / energy.sum(1)

    ours = [tutorial.weights_of(preset_mixer(sizes, seed)) for seed in range(sizes.seeds)]
    theirs = [tutorial.tutorial_weights(seed, sizes.channels) for seed in range(sizes.seeds)]
    sides = {
        "tutorial": (theirs, AS_WRITTEN),
        "tutorial, sines": (theirs, dataclasses.replace(AS_WRITTEN, relu=False)),
        "preset, ReLU": (ours, tutorial.only("relu")),
        "preset": (ours, CORRECTED),
    }
    rows: list[list[Any]] = []
    for name, (each, faults) in sides.items():
        found = torch.cat([shares(weights, faults) for weights in each])
        rows.append([name, float(found.median()), float(found.min())])
    return Section("Energy in the upper half of the spectrum", ["filters", "median", "least"], rows)


@torch.no_grad()
def windows(sizes: Sizes) -> Section:
    """Where a window has fallen to a hundredth, its last value, and what one token's tap is multiplied by."""
    weights = tutorial.weights_of(preset_mixer(sizes, 0)).filters[0]
    negative = dataclasses.replace(weights, window=torch.tensor([1.0, -1.0]))
    last = sizes.max_length // 64
    rows: list[list[Any]] = []
    for name, filter_, faults in (
        ("tutorial, at first", weights, AS_WRITTEN),
        ("tutorial, beta = -1", negative, AS_WRITTEN),
        ("preset", weights, CORRECTED),
    ):
        whole = tutorial.window(filter_, sizes.max_length, faults)
        reach = [int(r) for r in (whole >= 0.01).sum(0).aminmax()]
        short = tutorial.window(filter_, last + 1 if faults.current_window else sizes.max_length, faults)[last]
        changes = float((short / whole[last] - 1).abs().max())
        rows.append([name, *reach, float(whole[-1].max()), changes])
    header = [
        "window",
        "taps above 0.01, fastest channel",
        "slowest channel",
        "largest last value",
        f"change of tap {last}, {last + 1} against {sizes.max_length} tokens",
    ]
    return Section("Windows", header, rows)


# --- branches and outputs ---


def norms(sizes: Sizes) -> Section:
    """What the branches want of the one norm they share: gradients of a random projection of the output."""

    def wishes(seed: int) -> list[float]:
        weights = tutorial.tutorial_weights(seed, sizes.channels)
        weights.norms = [tuple(p.clone().requires_grad_() for p in pair) for pair in weights.norms]
        own = dataclasses.replace(AS_WRITTEN, one_norm=False)
        x = noise(seed, 4, sizes.prefix, sizes.channels)
        y = tutorial.operator(x, weights, own, max_length=sizes.max_length)
        (y * noise(seed + 1, *y.shape)).sum().backward()
        cosines = []
        for parameter in zip(*weights.norms, strict=True):
            first, second, value = (p.grad / p.grad.norm() for p in parameter)
            cosines += [float(first @ second), float(first @ value)]
        return cosines

    found = [statistics.median(column) for column in zip(*(wishes(seed) for seed in range(sizes.seeds)), strict=True)]
    rows = [["scale", *found[:2]], ["bias", *found[2:]]]
    header = ["gradient of", "cosine of the gates'", "cosine of the first gate's and the value's"]
    return Section("One norm for all branches", header, rows)


@torch.no_grad()
def mixing(sizes: Sizes) -> Section:
    """Output channels that notice another last filter in channel 0."""

    def reached(faults: tutorial.Faults) -> int:
        weights, x = tutorial.weights_of(preset_mixer(sizes, 0)), noise(0, 1, sizes.prefix, sizes.channels)
        before = tutorial.operator(x, weights, faults, max_length=sizes.max_length)
        weights.filters[-1].layers[-1][0][0] *= -1
        after = tutorial.operator(x, weights, faults, max_length=sizes.max_length)
        return int(((after - before).abs().amax(dim=(0, 1)) > 0).sum())

    rows = [["tutorial", reached(AS_WRITTEN)], ["preset", reached(CORRECTED)]]
    return Section("Output channels that one long filter reaches", ["operator", f"of {sizes.channels}"], rows)


@torch.no_grad()
def dropout(sizes: Sizes) -> Section:
    """The mixer's contribution under 256 masks at p = 0.1: noise over signal, rms."""

    def ratio_of(run: Callable[[Tensor], Tensor]) -> float:
        x = noise(0, 1, 64, sizes.channels).expand(256, -1, -1)
        y = run(x)
        mean = y.mean(0)
        return rms(y - mean) / rms(mean)

    torch.manual_seed(0)
    weights = tutorial.weights_of(preset_mixer(sizes, 0))
    twice = tutorial.only("dropout_each_step")
    block = preset_block(sizes, 0, dropout=0.1).train()
    run = partial(tutorial.operator, weights=weights, max_length=sizes.max_length, dropout=0.1)
    rows = [
        ["preset, and inside the recurrence as in the tutorial", ratio_of(partial(run, faults=twice))],
        ["preset", ratio_of(lambda x: block(x) - x)],
    ]
    return Section("Noise of dropout 0.1", ["operator", "noise / signal"], rows)


# --- arithmetic ---


@torch.no_grad()
def half_precision(sizes: Sizes) -> Section:
    block = deep_dive_hyena(hidden_size=sizes.channels, num_layers=1).blocks[0]
    norm = build_norm(block.norm, sizes.channels, "exact").half()
    norm.scale.fill_(1)
    rows: list[list[Any]] = []
    for value in (0.0, 1e-4, 1e-2, 1.0, 300.0):
        x = torch.full((1, sizes.channels), value, dtype=torch.float16)
        rows.append([f"{value:g}", float(tutorial.rms_norm(x).max()), float(norm(x)[1].max())])
    norms_of = [row[2] for row in rows]
    holds = {
        "the preset's norm stays finite in float16": all(map(math.isfinite, norms_of)),
        "and gives 1 from 0.01 to 300": all(abs(value - 1) < 0.01 for value in norms_of[2:]),
    }
    return Section("RMSNorm of a row of equal numbers in float16", ["number", "tutorial", "preset"], rows, holds)


@torch.no_grad()
def transforms(sizes: Sizes) -> Section:
    """Float32; the error is that of all outputs together, against float64."""
    rows: list[list[Any]] = []
    for length in (sizes.longest, sizes.longest + sizes.longest // 4):
        x = noise(0, 1, length, sizes.channels)
        (filter_, *_) = preset_mixer(sizes, 0, max_length=2 * sizes.longest).filters
        h = filter_.taps(length)
        exact = tutorial.real_convolution(x, h)
        u, taps = x.float(), h.float()
        sides: dict[str, Callable[[], Tensor]] = {
            "complex": partial(tutorial.complex_convolution, u, taps),
            "real": partial(tutorial.real_convolution, u, taps),
            "preset": partial(fft_convolution, u, taps),
        }
        allocated, errors = {}, {}
        for name, run in sides.items():
            with Allocated() as count:
                y = run()
            allocated[name] = count.bytes
            errors[name] = float((y - exact).norm() / exact.norm())
        timings = alternate(sides, sizes.rounds)
        for name in sides:
            taken = ratio(timings["complex"].cpu, timings[name].cpu).median
            rows.append([f"{name}, {length:,}", errors[name], allocated["complex"] / allocated[name], taken])
    header = ["transform, tokens", "error", "complex / this: bytes made", "complex / this: CPU time, median"]
    holds = {"real transforms are exact to 1e-6": all(row[1] <= 1e-6 for row in rows)}
    return Section("Transforms", header, rows, holds)


def widths(_: Sizes) -> Section:
    rows: list[list[Any]] = []
    for channels in (256, 512, 768, 1000, 1024, 4096):
        mlp = deep_dive_hyena(hidden_size=channels).blocks[0].mlp
        assert isinstance(mlp, GatedMLPConfig)
        wide, ours = tutorial.mlp_width(channels), mlp.intermediate_size
        rows.append([f"{channels:,}", wide, wide & -wide, ours, 100 * (ours / wide - 1)])
    header = ["channels", "int(8/3 d)", "largest power of 2 in it", "preset", "wider by, %"]
    return Section(
        "Width of the SwiGLU", header, rows, {"widths are multiples of 64": all(r[3] % 64 == 0 for r in rows)}
    )


def decay(sizes: Sizes) -> Section:
    """Numbers of parameters under weight decay, by the tutorial's rule of names and by the role of their module."""
    model = build_model(deep_dive_hyena(hidden_size=sizes.channels, num_layers=2, max_length=sizes.max_length), seed=0)
    rows: list[list[Any]] = []
    for role, parameters in parameter_groups(model).items():
        count = sum(p.numel() for p in parameters.values())
        named = sum(p.numel() for name, p in parameters.items() if tutorial.decayed(name))
        rows.append([role, count, named, count if role == "matrices" else 0])
    return Section("Parameters under weight decay", ["role", "parameters", "by name", "by role"], rows)


# --- the whole ---

MEASURES: dict[str, Callable[[Sizes], Section]] = {
    "future": future,
    "prefixes": prefixes,
    "growth": growth,
    "normalisation": normalisation,
    "far_text": far_text,
    "spectra": spectra,
    "windows": windows,
    "norms": norms,
    "mixing": mixing,
    "residuals": residuals,
    "dropout": dropout,
    "half_precision": half_precision,
    "transforms": transforms,
    "widths": widths,
    "decay": decay,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = sizes_parser(__doc__, Sizes()).parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    result: dict[str, Any] = {"manifest": manifest(), "sizes": dataclasses.asdict(sizes)}
    sections = {name: measure(sizes) for name, measure in MEASURES.items()}
    for section in sections.values():
        print(f"{section.title}:\n\n{table(section.header, [[shown(c) for c in row] for row in section.rows])}\n")
    broken = [law for section in sections.values() for law, holds in section.holds.items() if not holds]
    if broken:
        print(f"The preset is wrong, nothing is written: {'; '.join(broken)}.", file=sys.stderr)
        return 1
    result["sections"] = {name: stored(section) for name, section in sections.items()}
    print(f"written: {write_result(options.output, 'deep_dive', result, smoke=options.smoke)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How many modes a Hyena filter takes: error of the fit against modes, and what that does to a trained model's bits.

    python benchmarks/distill_filters.py            # trains four small models first; some twenty minutes
    python benchmarks/distill_filters.py --smoke    # tiny sizes, seconds

Filters: of the HyenaDNA preset as initialised, with sines of frequency 1 and 10, and of small Hyena models trained on
the data in examples/. Beside each error stands what no filter of as many modes could have (from the Hankel singular
values); one table compares with gradient descent on poles and residues. The script ends with 1 and without figures if
modal filters are not recovered from their taps.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _timing import HERE, chosen_sizes, manifest, sizes_parser, table, write_result
from torch import Tensor

from crocuta.config import (
    FixedWindowConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    SineConfig,
)
from crocuta.inference.distill import DistillReport, assemble, fit_layers
from crocuta.inference.drift import measure_drift
from crocuta.model.build import build_model
from crocuta.model.hyena import HyenaMixer
from crocuta.model.lm import Model
from crocuta.ops.modal import modal_taps
from crocuta.ops.modal_fit import fit_modal
from crocuta.presets import preset
from crocuta.training.config import DataConfig, ModelSpec, OptimizerConfig, StripedSpec, TrainConfig
from crocuta.training.loop import train

RECOVERY = 1e-6
"""Relative error up to which a modal filter counts as recovered."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of models, data and fits."""

    modes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    hidden: int = 32
    layers: int = 2
    length: int = 512
    batch: int = 8
    steps: int = 300
    held_out: int = 16_384
    fresh_preset: str = "hyenadna-tiny-1k"
    fresh_filters: int = 32
    adam_filters: int = 4
    adam_steps: int = 2000
    rounds: int = 3


SMOKE = Sizes(
    modes=(1, 2), hidden=16, layers=1, length=64, batch=2, steps=6, held_out=256, fresh_preset="tiny-hyenadna",
    fresh_filters=6, adam_filters=2, adam_steps=20, rounds=2,
)  # fmt: skip


# --- filters and models ---------------------------------------------------------------------------------------------


def fresh_filters(sizes: Sizes, frequency: float, name: str | None = None) -> Tensor:
    """Taps [g k] of a HyenaDNA layer as initialised, channels evenly spaced from the slowest window to the fastest."""
    config = preset(name or sizes.fresh_preset)
    block = config.blocks[0]
    assert isinstance(block.mixer, HyenaConfig)
    assert isinstance(block.mixer.filter, ImplicitFilterConfig)
    filter_ = dataclasses.replace(block.mixer.filter, activation=SineConfig(frequency=frequency))
    block = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, filter=filter_))
    mixer = build_model(dataclasses.replace(config, blocks=(block,)), seed=1).get_submodule("blocks.0.mixer")
    assert isinstance(mixer, HyenaMixer)
    with torch.no_grad():
        taps = mixer.filter.taps(filter_.max_length)
    return taps[torch.linspace(0, len(taps) - 1, sizes.fresh_filters).long()]


def trained(sizes: Sizes, data: str, frequency: float, folder: Path) -> tuple[Model, Tensor]:
    """A small Hyena with implicit filters after a short training run, and held-out ids [rows length] of its data."""
    text = data == "text"
    filter_ = ImplicitFilterConfig(
        max_length=sizes.length,
        activation=SineConfig(frequency=frequency),
        window=FixedWindowConfig(shift=0.05),
    )
    spec = StripedSpec(hidden_size=sizes.hidden, num_layers=sizes.layers, num_heads=1, filter=filter_)
    file = HERE.parent / "examples" / "data" / ("moby_dick.txt.gz" if text else "ecoli_dh1.fa.gz")
    config = TrainConfig(
        model=ModelSpec(striped=spec),
        data=DataConfig(files=(str(file),), reverse_complement=not text),
        tokenizer={"type": "bytes", "vocab_size": 256} if text else {"type": "dna", "vocab_size": 16},
        length=sizes.length,
        batch_size=sizes.batch,
        steps=sizes.steps,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=min(50, sizes.steps // 2)),
        evaluate_every=sizes.steps,
        evaluate_tokens=sizes.held_out,
        checkpoint_every=sizes.steps,
        threads=torch.get_num_threads(),
    )
    outcome = train(config, folder / f"{data}-{frequency:g}")
    held_out = torch.from_numpy(outcome.held_out_source.read(0, sizes.held_out).astype("int64"))
    return outcome.model.eval(), held_out.view(-1, sizes.length)


# --- measurements ---------------------------------------------------------------------------------------------------


def recovery_error(sizes: Sizes) -> float:
    """The worst relative error of the fit to filters that are modal."""
    worst = 0.0
    for modes in sizes.modes:
        draw = torch.Generator().manual_seed(modes)
        length = max(1024, 16 * modes)
        uniform = torch.rand(2, 4, modes, dtype=torch.float64, generator=draw)
        logs = torch.stack([-(length ** -uniform[0]), math.pi * uniform[1]], -1)
        taps = modal_taps(logs, torch.randn(4, modes, 2, dtype=torch.float64, generator=draw), length)
        worst = max(worst, float(fit_modal(taps, modes).error.max()))
    return worst


def summary(error: Tensor, frequency_error: Tensor, bound: Tensor, tail: Tensor) -> dict[str, float]:
    """Medians and worst of one bank of filters."""
    return {
        "median": float(error.median()),
        "worst": float(error.max()),
        "frequency_median": float(frequency_error.median()),
        "frequency_bound_median": float(bound.median()),
        "hankel_tail_median": float(tail.median()),
    }


def fit_bank(taps: Tensor, sizes: Sizes) -> dict[int, dict[str, float]]:
    """Errors by modes, as kept in float32, and CPU milliseconds a filter, the median of several fits."""
    result = {}
    for modes in sizes.modes:
        seconds = []
        for _ in range(sizes.rounds if modes <= 16 else 1):
            clock = time.process_time()
            fit = fit_modal(taps, modes, dtype=torch.float32)
            seconds.append(time.process_time() - clock)
        result[modes] = summary(fit.error, fit.frequency_error, fit.bound, fit.singular_values[:, -1])
        result[modes]["milliseconds"] = 1e3 * statistics.median(seconds) / len(taps)
    return result


def distil_model(model: Model, rows: Tensor, sizes: Sizes) -> dict[int, dict[str, Any]]:
    """Errors of all filters of all layers by modes, and the drift of the model on held-out rows."""
    result: dict[int, dict[str, Any]] = {}
    for modes in sizes.modes:
        fits = tuple(fit_layers(model, modes=modes))
        new = assemble(model, DistillReport(modes, math.inf, fits))
        parts = [(f.error, f.frequency_error, f.fit.bound, f.fit.singular_values[:, -1]) for f in fits]
        result[modes] = summary(*(torch.cat(column) for column in zip(*parts)))
        result[modes]["drift"] = measure_drift(model, new, rows).to_json()
    return result


def adam(taps: Tensor, modes: int, steps: int) -> tuple[Tensor, float]:
    """Relative errors after gradient descent on poles and residues from a random start, and seconds a filter.

    As Laughing Hyena distils: Adam on the squared error of the taps, learning rate 1e-2 with a cosine decay; all
    filters at once, each normalised. Float64, so that rounding is no excuse.
    """
    wanted = taps[:, 1:].double()
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    g, length = wanted.shape
    draw = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, g, modes, dtype=torch.float64, generator=draw)
    log_decay = (-uniform[0] * math.log(length)).requires_grad_()
    angle = (math.pi * uniform[1] ** 2).requires_grad_()  # more of them at low frequencies, where these filters live
    residues = (
        torch.randn(g, modes, 2, dtype=torch.float64, generator=draw) / (modes * length) ** 0.5
    ).requires_grad_()
    optimizer = torch.optim.Adam([log_decay, angle, residues], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    clock = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        found = modal_taps(torch.stack([-log_decay.exp(), angle], -1), residues, length)
        (found - wanted).square().sum().backward()
        optimizer.step()
        schedule.step()
    seconds = (time.process_time() - clock) / g
    return (found - wanted).detach().norm(dim=1), seconds


def against_adam(banks: Mapping[str, Tensor], sizes: Sizes) -> list[dict[str, Any]]:
    """Median errors and times of both, on a few filters of each bank."""
    found = []
    for name, taps in banks.items():
        few = taps[torch.linspace(0, len(taps) - 1, sizes.adam_filters).long()]
        for modes in [m for m in sizes.modes if m in (1, 8, 16)]:
            clock = time.process_time()
            fit = fit_modal(few, modes)
            seconds = (time.process_time() - clock) / len(few)
            descent, adam_seconds = adam(few, modes, sizes.adam_steps)
            found.append(
                {
                    "filters": name,
                    "modes": modes,
                    "ours": float(fit.error.median()),
                    "ours_milliseconds": 1e3 * seconds,
                    "adam": float(descent.median()),
                    "adam_milliseconds": 1e3 * adam_seconds,
                    "bound": float(fit.bound.median()),
                }
            )
    return found


# --- the script -----------------------------------------------------------------------------------------------------


def print_bank(name: str, result: Mapping[int, Mapping[str, Any]]) -> None:
    drifts = all("drift" in row for row in result.values())
    last = ("bits before", "bits after", "KL bits", "same top") if drifts else ("ms a filter",)
    rows = []
    for modes, row in result.items():
        figures = [f"{row[key]:.1e}" for key in ("median", "worst", "frequency_median", "frequency_bound_median")]
        figures.append(f"{row['hankel_tail_median']:.1e}")
        if drifts:
            drift = row["drift"]
            figures += [f"{drift['bits_before']:.4f}", f"{drift['bits_after']:.4f}", f"{drift['kl']:.1e}"]
            figures.append(f"{drift['same_top']:.2%}")
        else:
            figures.append(f"{row['milliseconds']:.1f}")
        rows.append([modes, *figures])
    header = ["modes", "error, median", "worst", "frequency, median", "its bound", "Hankel tail", *last]
    print(f"\n{name}\n\n{table(header, rows)}")


def print_adam(rows: Sequence[Mapping[str, Any]], sizes: Sizes) -> None:
    header = ["filters", "modes", "ours", "ms", f"Adam, {sizes.adam_steps} steps", "ms"]
    lines = []
    for row in rows:
        ours = [f"{row['ours']:.1e}", f"{row['ours_milliseconds']:.1f}"]
        lines.append([row["filters"], row["modes"], *ours, f"{row['adam']:.1e}", f"{row['adam_milliseconds']:.1f}"])
    print(f"\nMedian error and CPU time a filter\n\n{table(header, lines)}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = sizes_parser(__doc__, Sizes()).parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    worst = recovery_error(sizes)
    if not worst <= RECOVERY:
        print(f"modal filters come back with an error of {worst:.1e}, not {RECOVERY:g}: no figures.", file=sys.stderr)
        return 1
    result: dict[str, Any] = {"manifest": manifest(), "sizes": dataclasses.asdict(sizes), "recovery": worst}
    banks = {f"fresh, frequency {w:g}": fresh_filters(sizes, w) for w in (1.0, 10.0)}
    result["banks"], result["models"] = {}, {}
    for name, taps in banks.items():
        result["banks"][name] = fit_bank(taps, sizes)
        print_bank(f"{sizes.fresh_preset}, {name}, {taps.shape[1]} taps", result["banks"][name])
    with tempfile.TemporaryDirectory() as scratch:
        for data in ("text", "dna"):
            for frequency in (1.0, 10.0):
                model, rows = trained(sizes, data, frequency, Path(scratch))
                name = f"trained on {data}, frequency {frequency:g}"
                result["models"][name] = distil_model(model, rows, sizes)
                print_bank(f"{name}, {sizes.length} taps", result["models"][name])
                with torch.no_grad():
                    mixer = model.get_submodule(f"blocks.{sizes.layers - 1}.mixer")
                    assert isinstance(mixer, HyenaMixer)
                    banks[name] = mixer.filter.taps(sizes.length)
    result["adam"] = against_adam(banks, sizes)
    print_adam(result["adam"], sizes)
    print(write_result(options.output, "distill_filters", result, smoke=options.smoke))
    return 0


if __name__ == "__main__":
    sys.exit(main())

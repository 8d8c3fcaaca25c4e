"""A training step of a modal StripedHyena at long context: ours against the published ``stripedhyena`` formulation.

    python benchmarks/train_modal.py            # the goals' sizes, about five minutes on one core
    python benchmarks/train_modal.py --smoke    # tiny sizes, seconds; its ratios mean nothing

A step is forward, next-token loss, backward and AdamW, of one sequence, in float32, with the same weights, tokens and
optimizer on both sides. First both sides' loss and every gradient are judged against float64; where a bound is
missed the script prints the table of errors, no speed, and ends with 1. Then the sides alternate in one process
(CPU time), and each runs alone in a fresh process (peak resident memory less what code takes).
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _stripedhyena import PublishedModel, copy_weights, mlp_width, pairs
from _stripedhyena import next_token_loss as published_loss
from _timing import (
    alternate,
    chosen_sizes,
    manifest,
    mebibytes,
    peak_resident_bytes,
    ratio,
    resident_bytes,
    sizes_parser,
    table,
    write_result,
)
from torch import Tensor, nn

from crocuta.config import (
    BlockConfig,
    ComplexModalFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ModelConfig,
    RMSNormConfig,
)
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.training.loss import next_token_loss

EPS = 1e-6

LOSS_BOUND = 1e-5
GRADIENT_BOUND = {"ours": 1e-4, "published": 1e-2}
"""Relative to float64, norm over norm, worst parameter. The published filter takes angles of up to ``length`` radians
in float32, which alone costs three digits of the gradients of poles at 8,192 tokens."""

TIME_GOAL, MEMORY_GOAL, CHECKPOINTED_MEMORY_GOAL = 1 / 3, 1 / 2, 1 / 4

SIDES = ("published", "ours", "ours, checkpointed")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained."""

    length: int = 8192
    hidden: int = 256
    layers: int = 8
    modes: int = 8
    vocabulary: int = 512


SMOKE = Sizes(length=512, hidden=64, layers=2, modes=4, vocabulary=64)
TINY = Sizes(length=16, hidden=8, layers=1, modes=1, vocabulary=8)


def our_model(sizes: Sizes, dtype: torch.dtype = torch.float32) -> Model:
    """Our StripedHyena with the published parametrisation: raw poles and every bias that the package has."""
    mixer = HyenaConfig(
        filter=ComplexModalFilterConfig(modes=sizes.modes, poles="raw"), short_bias=True, projection_bias=True
    )
    norm = RMSNormConfig(eps=EPS)
    block = BlockConfig(mixer=mixer, mlp=GatedMLPConfig(intermediate_size=mlp_width(sizes.hidden)), norm=norm)
    config = ModelConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, blocks=(block,) * sizes.layers, norm=norm
    )
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases start as 0 and scales as 1, where a mistake could hide
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def published_model(sizes: Sizes, dtype: torch.dtype = torch.float32) -> PublishedModel:
    """The peer, with our weights."""
    peer = PublishedModel(sizes.vocabulary, sizes.hidden, sizes.layers, sizes.modes, EPS)
    copy_weights(our_model(sizes), peer)
    return peer.to(dtype)


def tokens(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Random ids [1 l] and their targets."""
    ids = torch.randint(sizes.vocabulary, (1, sizes.length + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


class Trainer:
    """One side: a model, its loss and its optimizer."""

    def __init__(self, side: str, sizes: Sizes) -> None:
        self.model: nn.Module
        self.loss: Callable[[Tensor, Tensor], Tensor]
        if side == "published":
            self.model = peer = published_model(sizes)
            self.loss = partial(published_loss, peer)
        else:
            self.model = ours = our_model(sizes)
            ours.checkpoint_activations = side == "ours, checkpointed"
            self.loss = partial(next_token_loss, ours)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        self.batch = tokens(sizes)
        for parameter in self.model.parameters():  # the moments exist before anything is measured
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.loss(*self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# --- equality ---


@dataclass(frozen=True)
class Check:
    """One line of the gate: relative errors of both sides against float64."""

    what: str
    ours: float
    published: float
    ours_bound: float
    published_bound: float

    @property
    def holds(self) -> bool:
        return self.ours <= self.ours_bound and self.published <= self.published_bound


def check_equality(sizes: Sizes) -> list[Check]:
    """Loss and gradients of both sides in float32, judged by the published formulation in float64.

    A line of gradients is the worst block's. The float64 pass needs twice the memory of the published side.
    """
    batch = tokens(sizes)
    truth, peer, ours = published_model(sizes, torch.float64), published_model(sizes), our_model(sizes)
    true_loss, peer_loss = (_backward(published_loss(model, *batch)) for model in (truth, peer))
    our_loss = _backward(next_token_loss(ours, *batch))
    errors = (abs(our_loss / true_loss - 1), abs(peer_loss / true_loss - 1))
    checks = [
        Check("loss", *errors, LOSS_BOUND, LOSS_BOUND),
        Check("loss, ours to published", abs(our_loss / peer_loss - 1), 0.0, LOSS_BOUND, LOSS_BOUND),
    ]
    worst: dict[str, tuple[float, float]] = {}
    for pair, true in zip(pairs(ours, peer), pairs(ours, truth), strict=True):
        wanted, ours_grad, peer_grad = true.peer.grad, pair.ours.grad, pair.peer.grad
        assert wanted is not None
        assert ours_grad is not None
        assert peer_grad is not None
        before = worst.get(pair.name, (0.0, 0.0))
        found = (_error(pair.layout(ours_grad), wanted), _error(peer_grad, wanted))
        worst[pair.name] = (max(before[0], found[0]), max(before[1], found[1]))
    bounds = (GRADIENT_BOUND["ours"], GRADIENT_BOUND["published"])
    return checks + [Check(f"gradient of {name}", *pair_errors, *bounds) for name, pair_errors in worst.items()]


def _backward(loss: Tensor) -> float:
    loss.backward()
    return loss.item()


def _error(value: Tensor, truth: Tensor) -> float:
    error = float((value.double() - truth).norm() / truth.norm())
    return error if error == error else float("inf")


# --- speed and memory ---


def measure_time(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Seconds a step of every side, and ratios to the published one within rounds."""
    sides = {side: Trainer(side, sizes) for side in SIDES}
    timings = alternate({side: trainer.step for side, trainer in sides.items()}, rounds)
    peer = timings["published"]
    return {
        side: {
            "cpu_seconds": timing.cpu,
            "wall_seconds": timing.wall,
            "cpu_ratio": dataclasses.asdict(ratio(timing.cpu, peer.cpu)),
            "wall_ratio": dataclasses.asdict(ratio(timing.wall, peer.wall)),
        }
        for side, timing in timings.items()
    }


def measure_memory(sizes: Sizes, threads: int) -> dict[str, int]:
    """Peak bytes of a step of every side, each in a fresh process."""
    return {side: measure_memory_of(side, sizes, threads) for side in SIDES}


def measure_memory_of(side: str, sizes: Sizes, threads: int) -> int:
    options = [f"--{name}={value}" for name, value in dataclasses.asdict(sizes).items()]
    command = [sys.executable, __file__, f"--memory-of={side}", f"--threads={threads}", *options]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def memory_of(side: str, sizes: Sizes) -> int:
    """Peak resident bytes of a step in this process, parameters and optimizer included, less what code takes.

    What code takes is what a tiny step leaves behind: torch loads parts of itself on first use.
    """
    Trainer(side, TINY).step()
    before = resident_bytes()
    Trainer(side, sizes).step()
    return peak_resident_bytes() - before


# --- report ---


def equality_table(checks: Sequence[Check]) -> str:
    rows = [
        [
            c.what,
            f"{c.ours:.1e}",
            f"{c.published:.1e}",
            f"{c.ours_bound:.0e}, {c.published_bound:.0e}",
            _verdict(c.holds),
        ]
        for c in checks
    ]
    return table(["relative error against float64", "ours", "published", "bounds", ""], rows)


def speed_table(time: dict[str, Any], memory: dict[str, int]) -> str:
    rows = []
    for side in SIDES:
        seconds, against = time[side]["cpu_seconds"], time[side]["cpu_ratio"]
        spread = f"{against['median']:.3f} ({against['min']:.3f} to {against['max']:.3f})"
        rows.append(
            [
                side,
                f"{sorted(seconds)[len(seconds) // 2]:.2f} s",
                spread,
                mebibytes(memory[side]),
                f"{memory[side] / memory['published']:.3f}",
            ]
        )
    return table(["side", "CPU time a step", "of published", "peak memory", "of published"], rows)


def goals(time: dict[str, Any], memory: dict[str, int]) -> list[dict[str, Any]]:
    """The three goals with what was measured."""
    peak = memory["published"]
    measured = {
        "time": (time["ours"]["cpu_ratio"]["median"], TIME_GOAL),
        "peak memory": (memory["ours"] / peak, MEMORY_GOAL),
        "peak memory, checkpointed": (memory["ours, checkpointed"] / peak, CHECKPOINTED_MEMORY_GOAL),
    }
    return [{"what": k, "ratio": found, "at_most": goal, "met": found <= goal} for k, (found, goal) in measured.items()]


def _verdict(holds: bool) -> str:
    return "ok" if holds else "MISSED"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = sizes_parser(__doc__, Sizes())
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    if options.memory_of:
        print(memory_of(options.memory_of, sizes))
        return 0
    result: dict[str, Any] = {"manifest": manifest(), "sizes": dataclasses.asdict(sizes)}
    checks = check_equality(sizes)
    print(equality_table(checks) + "\n")
    if not all(check.holds for check in checks):
        print("The two sides are not equal: no speed is reported.", file=sys.stderr)
        return 1
    time = measure_time(sizes, options.rounds or (2 if options.smoke else 5))
    memory = measure_memory(sizes, options.threads)
    print(speed_table(time, memory) + "\n")
    reached = goals(time, memory)
    for goal in reached:
        print(f"{goal['what']}: {goal['ratio']:.3f} of published, goal {goal['at_most']:.3f}: {_verdict(goal['met'])}")
    result |= {
        "checks": [dataclasses.asdict(c) for c in checks],
        "time": time,
        "memory_bytes": memory,
        "goals": reached,
    }
    print(f"written: {write_result(options.output, 'train_modal', result, smoke=options.smoke)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

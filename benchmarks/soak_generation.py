"""A million tokens from one call of ``crocuta.stream``: all finite, no growth, and as fast at the end as at the start.

    python benchmarks/soak_generation.py            # 1,000,000 tokens, about a quarter of an hour
    python benchmarks/soak_generation.py --smoke    # a few hundred, seconds

The script ends with 1 if a log-probability or the state at the end is not finite, if the text scored as a whole has
other log-probabilities, or if the state has grown. The goals are for memory (1 MiB per 100,000 tokens after the first
tenth) and speed (the last tenth at least 95 % of the first). Speed is CPU time of one thread. Other work on the machine
slows that down, too, by more than what is looked for: so after every slice a fresh generation is timed for a few
tokens, and each slice counts as a part of that. Tokens a second stand beside it.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _timing import chosen_sizes, manifest, mebibytes, resident_bytes, sizes_parser, table, write_result
from numpy.typing import NDArray

import crocuta
from crocuta.config import BlockConfig, ComplexModalFilterConfig, GatedMLPConfig, HyenaConfig, ModelConfig
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer

TENTHS = 10
GROWTH_BOUND = 1 << 20
"""Bytes of resident memory per 100,000 tokens, after the first tenth."""
SPEED_BOUND = 0.95
"""Tokens a second of the last tenth over those of the first."""
FRESH = 100
"""Tokens of the fresh generation that is timed after every slice."""
LOG_PROB_BOUND = 2e-3
"""Largest difference of a log-probability from that of the text read as a whole: float32, single steps."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is generated, and by what."""

    tokens: int = 1_000_000
    slice: int = 1_000
    """Tokens between two looks at the clock."""
    hidden: int = 32
    layers: int = 2
    modes: int = 4


SMOKE = Sizes(tokens=400, slice=10, hidden=16, layers=1, modes=2)


@dataclass(frozen=True)
class Tenth:
    """What a tenth of the tokens took; ``resident_bytes`` is at its end."""

    cpu_seconds: float
    speed: float
    """Tokens a second over those of a fresh generation at the same time, median of its slices."""
    resident_bytes: int


@dataclass(frozen=True)
class Soak:
    """Ids and log-probabilities of all tokens, the tenths, and the bytes of the state at the start and at the end."""

    ids: NDArray[np.int16]
    log_probs: NDArray[np.float32]
    tenths: list[Tenth]
    state_bytes: tuple[int, int]
    faults: list[str]


PROMPT = [65]
TOKENIZER = ByteTokenizer(vocab_size=256)


def make_model(sizes: Sizes) -> Model:
    mixer = HyenaConfig(filter=ComplexModalFilterConfig(modes=sizes.modes))
    block = BlockConfig(mixer=mixer, mlp=GatedMLPConfig(intermediate_size=2 * sizes.hidden))
    return build_model(ModelConfig(vocab_size=256, hidden_size=sizes.hidden, blocks=(block,) * sizes.layers)).eval()


def generate(model: Model, sizes: Sizes) -> Soak:
    """One call of ``stream``, watched."""
    ids = np.full(sizes.tokens, -1, np.int16)  # filled, so that both are resident from the start
    log_probs = np.full(sizes.tokens, np.nan, np.float32)
    first = crocuta.read_prefix(model, None, PROMPT)
    tenths: list[Tenth] = []
    seconds: list[float] = []
    speeds: list[float] = []
    last, clock = first, time.process_time()
    for t, piece in enumerate(begin(model, first, sizes.tokens, keep_state=True)):
        ids[t], log_probs[t] = piece.id, piece.log_prob
        last = piece.prefix or last
        if (t + 1) % sizes.slice == 0:
            seconds.append(time.process_time() - clock)
            speeds.append(sizes.slice / seconds[-1] * fresh_seconds(model, first))
            clock = time.process_time()
        if (t + 1) % (sizes.tokens // TENTHS) == 0:
            tenths.append(Tenth(sum(seconds), statistics.median(speeds), resident_bytes()))
            seconds, speeds, clock = [], [], time.process_time()
    return Soak(ids, log_probs, tenths, (first.state.nbytes, last.state.nbytes), last.state.non_finite())


def begin(model: Model, first: crocuta.Prefix, tokens: int, *, keep_state: bool = False) -> Iterator[crocuta.Piece]:
    return crocuta.stream(
        model,
        TOKENIZER,
        [first],
        max_tokens=tokens,
        seed=0,
        ignore_eos=True,
        stop=["never"],
        keep_state=keep_state,
    )


def fresh_seconds(model: Model, first: crocuta.Prefix) -> float:
    """CPU time of a token of a generation that has just begun."""
    pieces = begin(model, first, FRESH + 10)
    for _ in range(5):
        next(pieces)
    clock = time.process_time()
    for _ in range(FRESH):
        next(pieces)
    return (time.process_time() - clock) / FRESH


def largest_difference(model: Model, soak: Soak) -> float:
    """Of the log-probabilities, from those of the finished text scored as a whole; NaN if one is not finite."""
    whole = crocuta.score(model, None, [[*PROMPT, *soak.ids.tolist()]])[0].log_probs
    return float(np.abs(whole - soak.log_probs).max())


def growth(tenths: Sequence[Tenth], tokens: int) -> float:
    """Bytes of resident memory per 100,000 tokens, from the end of the first tenth to that of the last."""
    later = tokens * (TENTHS - 1) / TENTHS
    return (tenths[-1].resident_bytes - tenths[0].resident_bytes) * 100_000 / later


def tenths_table(soak: Soak, sizes: Sizes) -> str:
    rows = []
    for number, tenth in enumerate(soak.tenths, 1):
        tokens = sizes.tokens / TENTHS / tenth.cpu_seconds
        rows.append([number, f"{tokens:,.0f}", f"{tenth.speed:.3f}", mebibytes(tenth.resident_bytes)])
    return table(["tenth", "tokens a CPU second", "of a fresh generation's", "resident memory"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    options = sizes_parser(__doc__, Sizes()).parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    result: dict[str, Any] = {"manifest": manifest(), "sizes": dataclasses.asdict(sizes)}
    model = make_model(sizes)
    soak = generate(model, sizes)
    finite = bool(np.isfinite(soak.log_probs).all()) and not soak.faults
    difference = largest_difference(model, soak) if finite else float("nan")
    print(tenths_table(soak, sizes) + "\n")
    print(f"Largest difference from the log-probabilities of the whole text: {difference:.1e} ({LOG_PROB_BOUND:.0e}).")
    if not finite or not difference <= LOG_PROB_BOUND:
        print(f"Not finite, or not what the whole text has: {soak.faults[:1]}; nothing is reported.", file=sys.stderr)
        return 1
    if soak.state_bytes[0] != soak.state_bytes[1]:
        print(f"The state has grown: {soak.state_bytes} bytes.", file=sys.stderr)
        return 1
    first, last = soak.tenths[0], soak.tenths[-1]
    goals = [
        goal("bytes of resident memory per 100,000 tokens", growth(soak.tenths, sizes.tokens), at_most=GROWTH_BOUND),
        goal("speed of the last tenth", last.speed / first.speed, at_least=SPEED_BOUND),
    ]
    for each in goals:
        print(f"{each['what']}: {each['value']:,.2f}, {'met' if each['met'] else 'MISSED'}")
    result |= {
        "tenths": [dataclasses.asdict(tenth) for tenth in soak.tenths],
        "tokens_a_second_of_the_last_tenth_over_the_first": first.cpu_seconds / last.cpu_seconds,
        "largest_log_prob_difference": difference,
        "state_bytes": soak.state_bytes[1],
        "goals": goals,
    }
    print(f"written: {write_result(options.output, 'soak_generation', result, smoke=options.smoke)}")
    return 0


def goal(what: str, value: float, *, at_most: float = float("inf"), at_least: float = float("-inf")) -> dict[str, Any]:
    bound = {"at_most": at_most} if at_most < float("inf") else {"at_least": at_least}
    return {"what": what, "value": value, **bound, "met": at_least <= value <= at_most}


if __name__ == "__main__":
    sys.exit(main())

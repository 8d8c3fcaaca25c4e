"""Scoring a million bases of DNA: peak memory against length, and scores in chunks against scores of one pass.

    make bench-long                                     # both models: hours, nearly all of them attention
    python benchmarks/long_context.py --models modal    # the modal model alone, some minutes
    python benchmarks/long_context.py --smoke           # tiny sizes, seconds

``crocuta.score`` with a byte vocabulary of 512, on real bases: chromosome X where ``make bench-long`` has fetched it
(Debian package r-bioc-bsgenome), or what ``--fasta`` names, else the shipped piece of E. coli, repeated to the
length; the result says which. Two models, and a result file for each: ``modal`` has only modal Hyena blocks,
``attention`` an attention block in the middle. Each measurement is a process of its own and counts all that the process
holds, torch included. The script ends with 1 if scores in chunks differ from those of one pass by more than their
bounds, or if the modal model's peak at the longest length is above 1.5 GiB or 1.1 times that at the shortest.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import (
    HERE,
    chosen_sizes,
    manifest,
    mebibytes,
    peak_resident_bytes,
    resident_bytes,
    sizes_parser,
    table,
    write_result,
)
from torch import Tensor

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    MixerConfig,
    ModelConfig,
    RopeConfig,
)
from crocuta.inference.score import score
from crocuta.model.build import build_model
from crocuta.model.chunks import hidden_chunks, token_log_probs
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer

PEAK_BOUND = int(1.5 * 2**30)
GROWTH_BOUND = 1.1
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference of log-probabilities between chunks and one pass."""

CHROMOSOME = HERE.parent / ".data" / "ce2chrX.fa.gz"
SHIPPED = HERE.parent / "examples" / "data" / "ecoli_dh1.fa.gz"
MODELS = ("modal", "attention")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the models, and of what they score and where both ways of scoring are compared."""

    short: int = 131_072
    long: int = 1_048_576
    hidden: int = 256
    layers: int = 8
    modes: int = 8
    heads: int = 2
    equal_modal: int = 131_072
    """Tokens at which the modal model in float32 is compared with one pass."""
    equal_attention: int = 32_768
    """Tokens at which the model with attention in float32 is."""
    equal_float64: int = 20_001
    chunk: int = 8_192
    """Tokens a chunk where chunks are compared with one pass."""


SMOKE = Sizes(
    short=1_024,
    long=4_096,
    hidden=32,
    layers=3,
    modes=2,
    equal_modal=600,
    equal_attention=600,
    equal_float64=301,
    chunk=128,
)


def make_model(sizes: Sizes, name: str, dtype: torch.dtype = torch.float32) -> Model:
    """``modal``, or ``attention`` with one attention block in the middle."""
    hyena = HyenaConfig(filter=ComplexModalFilterConfig(modes=sizes.modes))
    mixers: list[MixerConfig] = [hyena] * sizes.layers
    if name == "attention":
        mixers[sizes.layers // 2] = AttentionConfig(num_heads=sizes.heads, rope=RopeConfig())
    mlp = GatedMLPConfig(intermediate_size=-(-8 * sizes.hidden // 3 // 64) * 64)
    blocks = tuple(BlockConfig(mixer=mixer, mlp=mlp) for mixer in mixers)
    config = ModelConfig(vocab_size=512, hidden_size=sizes.hidden, blocks=blocks)
    return build_model(config, dtype=dtype).eval()


def read_bases(path: Path, length: int) -> tuple[str, int]:
    """The first ``length`` bases of all records, in upper case, and how many different ones the file had for it."""
    parts, count = [], 0
    with gzip.open(path, "rt") as lines:
        for line in lines:
            if not line.startswith(">"):
                parts.append(line.strip().upper())
                count += len(parts[-1])
            if count >= length:
                break
    text = "".join(parts)
    return (text * -(-length // len(text)))[:length], min(length, count)


# --- chunks against one pass ----------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(model: Model, ids: Tensor, chunk: int) -> Tensor:
    """What ``score`` computes, with a chunk length of our choice and in the model's own precision."""
    pieces = []
    for start, hidden in hidden_chunks(model, ids[:, :-1], chunk=chunk):
        pieces.append(token_log_probs(model, hidden, ids[:, start + 1 : start + 1 + hidden.shape[1]]))
    return torch.cat(pieces, dim=1)


def comparisons(sizes: Sizes, name: str, fasta: Path) -> Iterator[dict[str, Any]]:
    """For float32 and float64: the largest difference of chunks, and of ``score`` itself, from one pass."""
    lengths = {
        torch.float32: sizes.equal_modal if name == "modal" else sizes.equal_attention,
        torch.float64: sizes.equal_float64,
    }
    for dtype, length in lengths.items():
        model = make_model(sizes, name, dtype)
        text, _ = read_bases(fasta, length)
        ids = torch.from_numpy(ByteTokenizer().encode(text))[None]
        whole = log_probs(model, ids, length)[0]
        chunks = log_probs(model, ids, sizes.chunk)[0]
        scores = torch.from_numpy(score(model, ByteTokenizer(), [text])[0].log_probs)
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": length,
            "chunk": sizes.chunk,
            "bound": BOUNDS[dtype],
            "chunks_from_one_pass": float((chunks - whole).abs().max()),
            "score_from_one_pass": float((scores - whole.float()).abs().max()),
        }


def holds(check: dict[str, Any]) -> bool:
    """Scores are float32, so those of a float64 model carry one rounding more."""
    score_bound = max(check["bound"], 1e-6)
    return check["chunks_from_one_pass"] <= check["bound"] and check["score_from_one_pass"] <= score_bound


# --- memory ---------------------------------------------------------------------------------------------------


def measure_one(sizes: Sizes, name: str, length: int, fasta: Path) -> dict[str, Any]:
    """Score ``length`` bases in this process; progress goes to standard error."""
    model = make_model(sizes, name)
    text, different = read_bases(fasta, length)
    before, read, cpu, wall = resident_bytes(), 0, time.process_time(), time.perf_counter()

    def report(_: object, inputs: tuple[Tensor]) -> None:
        nonlocal read
        if read // (1 << 16) != (read + inputs[0].numel()) // (1 << 16):
            seconds = time.perf_counter() - wall
            print(f"{name}: {read:,} of {length:,} tokens after {seconds:,.0f} s", file=sys.stderr, flush=True)
        read += inputs[0].numel()

    model.embedding.register_forward_pre_hook(report)
    (result,) = score(model, ByteTokenizer(), [text])
    return {
        "tokens": length,
        "different_bases": different,
        "resident_before_bytes": before,
        "peak_bytes": peak_resident_bytes(),
        "state_bytes": build_model(model.config, device="meta").init_state(1, length).nbytes,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "mean_log_prob": result.mean,
        "finite": bool(np.isfinite(result.log_probs).all()),
    }


def measure(sizes: Sizes, name: str, length: int, fasta: Path, threads: int) -> dict[str, Any]:
    """``measure_one`` in a process of its own."""
    settings = json.dumps(dataclasses.asdict(sizes))
    command = [sys.executable, __file__, "--measure", settings, name, str(length), str(fasta), f"--threads={threads}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


# --- report ---------------------------------------------------------------------------------------------------


def run(name: str, sizes: Sizes, fasta: Path, threads: int) -> dict[str, Any] | None:
    """Figures of one model, printed on the way; None if its chunks do not compute what one pass does."""
    checks = list(comparisons(sizes, name, fasta))
    rows = [
        [c["dtype"], f"{c['tokens']:,}", *(f"{c[k]:.1e}" for k in ("chunks_from_one_pass", "score_from_one_pass"))]
        for c in checks
    ]
    print(f"{name}: largest difference of log-probabilities from those of one pass\n")
    print(table(["dtype", "tokens", "chunks", "score"], rows) + "\n", flush=True)
    if not all(map(holds, checks)):
        print(f"{name}: chunks and one pass differ, no figures.", file=sys.stderr)
        return None
    measured = [measure(sizes, name, length, fasta, threads) for length in (sizes.short, sizes.long)]
    rows = [
        [
            f"{m['tokens']:,}",
            mebibytes(m["peak_bytes"]),
            mebibytes(m["state_bytes"]),
            f"{m['cpu_seconds']:,.1f}",
            f"{m['tokens'] / m['cpu_seconds']:,.0f}",
        ]
        for m in measured
    ]
    print(table(["tokens", "peak memory", "of it state", "CPU seconds", "tokens a CPU second"], rows) + "\n")
    growth = measured[1]["peak_bytes"] / measured[0]["peak_bytes"]
    met = all(m["finite"] for m in measured)
    if name == "modal":
        met &= measured[1]["peak_bytes"] <= PEAK_BOUND and growth <= GROWTH_BOUND
        verdict = "met" if met else "MISSED"
        print(f"Peak of at most {mebibytes(PEAK_BOUND)} and {GROWTH_BOUND} times the shorter one's: {verdict}.")
    print(f"{name}: peak at {sizes.long:,} tokens is {growth:.3f} times that at {sizes.short:,}.\n", flush=True)
    return {"model": name, "checks": checks, "measured": measured, "growth": growth, "met": met}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = sizes_parser(__doc__, Sizes())
    parser.add_argument("--models", default=",".join(MODELS), help="modal, attention or both, with a comma")
    parser.add_argument("--fasta", type=Path, help="gzipped FASTA to read the bases from")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.models = options.models.split(",")
    if not set(options.models) <= set(MODELS):
        parser.error(f"unknown model: there are {' and '.join(MODELS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.measure:
        settings, name, length, path = options.measure
        print(json.dumps(measure_one(Sizes(**json.loads(settings)), name, int(length), Path(path))))
        return 0
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    fasta = options.fasta or (CHROMOSOME if CHROMOSOME.exists() and not options.smoke else SHIPPED)
    met = True
    for name in options.models:
        start = manifest()  # before the work, whose own load is not the machine's
        figures = run(name, sizes, fasta, options.threads)
        if figures is None:
            return 1
        different = figures["measured"][-1]["different_bases"]
        print(f"bases: {fasta.name}, {different:,} different of {sizes.long:,}.")
        result = {"manifest": start, "sizes": dataclasses.asdict(sizes), "bases": fasta.name, **figures}
        path = write_result(options.output, f"long_context_{name}", result, smoke=options.smoke)
        print(f"written: {path}", flush=True)
        met &= figures["met"]
    return 0 if met or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())

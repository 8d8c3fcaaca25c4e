"""Generation with a modal StripedHyena: bytes of the state, resident memory and speed, token by token.

    python benchmarks/generate_memory.py            # 4,096 tokens, about half a minute
    python benchmarks/generate_memory.py --smoke    # tiny sizes, seconds

The tokens are sampled one at a time with ``model.extend``. The script ends with 1 if the state ever changes its size,
or if the logits of the loop differ from one ``forward`` over the finished sequence.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _timing import chosen_sizes, manifest, mebibytes, resident_bytes, sizes_parser, table, write_result
from torch import Tensor

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    MixerConfig,
    ModelConfig,
)
from crocuta.model.build import build_model
from crocuta.model.lm import Model

LOGIT_BOUND = 2e-4
"""Largest difference between the loop's logits and those of one forward pass: the float32 bound of the chunk law."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is generated, and by what."""

    tokens: int = 4096
    every: int = 512
    hidden: int = 256
    layers: int = 8
    modes: int = 8
    vocabulary: int = 512


SMOKE = Sizes(tokens=96, every=32, hidden=32, layers=2, modes=4, vocabulary=64)


@dataclass(frozen=True)
class Mark:
    """What was measured when so many tokens were there; seconds are CPU time since the mark before."""

    tokens: int
    state_bytes: int
    resident_bytes: int
    cpu_seconds: float


def make_model(sizes: Sizes, mixer: MixerConfig) -> Model:
    block = BlockConfig(mixer=mixer, mlp=GatedMLPConfig(intermediate_size=-(-8 * sizes.hidden // 3 // 64) * 64))
    config = ModelConfig(vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, blocks=(block,) * sizes.layers)
    return build_model(config).eval()


@torch.no_grad()
def generate(model: Model, sizes: Sizes) -> tuple[list[Mark], Tensor, Tensor]:
    """Marks, the ids [1 t] and the logits [1 t v] of each step."""
    state, generator = model.init_state(1), torch.Generator().manual_seed(0)
    ids = torch.zeros(1, sizes.tokens, dtype=torch.int64)
    logits = torch.full((1, sizes.tokens, sizes.vocabulary), torch.nan)  # filled, so that it is resident from the start
    marks, clock = [Mark(0, state.nbytes, resident_bytes(), 0.0)], time.process_time()
    for t in range(sizes.tokens):
        logits[:, t] = model.extend(ids[:, t : t + 1], state)[:, 0]
        if t + 1 < sizes.tokens:
            ids[:, t + 1] = torch.multinomial(logits[:, t].softmax(-1), 1, generator=generator)[:, 0]
        if (t + 1) % sizes.every == 0 or t + 1 == sizes.tokens:
            now = time.process_time()
            marks.append(Mark(t + 1, state.nbytes, resident_bytes(), now - clock))
            clock = now
    return marks, ids, logits


def attention_bytes(sizes: Sizes) -> int:
    """Bytes of the state of an equal model with attention in every layer, for comparison."""
    model = make_model(sizes, AttentionConfig(num_heads=4))
    return model.init_state(1, sizes.tokens).nbytes


def marks_table(marks: Sequence[Mark]) -> str:
    rows = []
    for before, mark in zip((None, *marks), marks):
        speed = "" if before is None else f"{(mark.tokens - before.tokens) / mark.cpu_seconds:,.0f}"
        rows.append([f"{mark.tokens:,}", f"{mark.state_bytes:,} B", mebibytes(mark.resident_bytes), speed])
    return table(["tokens", "state", "resident memory", "tokens a CPU second"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    options = sizes_parser(__doc__, Sizes()).parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    result: dict[str, Any] = {"manifest": manifest(), "sizes": dataclasses.asdict(sizes)}
    model = make_model(sizes, HyenaConfig(filter=ComplexModalFilterConfig(modes=sizes.modes)))
    marks, ids, logits = generate(model, sizes)
    with torch.no_grad():
        error = float((model(ids) - logits).abs().max())
    attention = attention_bytes(sizes)
    print(marks_table(marks) + "\n")
    print(f"An equal model with attention would hold {attention:,} B at {sizes.tokens:,} tokens.")
    print(f"Largest difference from the logits of one forward pass: {error:.1e} (bound {LOGIT_BOUND:.0e}).")
    if not error <= LOGIT_BOUND:
        print("The loop and the forward pass differ: nothing is reported.", file=sys.stderr)
        return 1
    if len({mark.state_bytes for mark in marks}) > 1:
        print("The state did not keep its size.", file=sys.stderr)
        return 1
    result |= {
        "marks": [dataclasses.asdict(mark) for mark in marks],
        "tokens_a_cpu_second": sizes.tokens / sum(mark.cpu_seconds for mark in marks),
        "largest_logit_difference": error,
        "attention_state_bytes": attention,
    }
    print(f"written: {write_result(options.output, 'generate_memory', result, smoke=options.smoke)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What decoding with bfloat16 or 8-bit weights costs a trained model, in bits a byte of text that it has not seen.

    make demo && python benchmarks/narrow_weights.py          # the demonstration's model; half a minute
    python benchmarks/narrow_weights.py --model FOLDER        # any model of bytes
    python benchmarks/narrow_weights.py --smoke               # a tiny model without training, seconds

Windows of the text that the demonstration holds out are read token by token (``Stepper.log_probs``), each from an empty
state. The script ends with 1, and reports nothing, if float32 steps differ from ``forward`` by more than rounding.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _timing import HERE, chosen_sizes, manifest, sizes_parser, table, write_result
from torch import Tensor

import crocuta
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.model.step import Stepper
from crocuta.ops.kernels.library import why_not
from crocuta.presets import preset

TEXT = HERE.parent / "examples" / "data" / "moby_dick.txt.gz"
HELD_OUT = 0.05
"""The last part of the text, as examples/text.yaml has it."""
BITS_BOUND = 1e-4
"""Largest difference in bits of a token between float32 steps and ``forward``."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much text is read: so many windows, evenly spaced over what is held out."""

    windows: int = 200
    length: int = 256


SMOKE = Sizes(windows=4, length=24)


def held_out_windows(sizes: Sizes) -> Tensor:
    """Bytes [windows length]."""
    text = gzip.decompress(TEXT.read_bytes())
    text = text[round(len(text) * (1 - HELD_OUT)) :]
    starts = torch.linspace(0, len(text) - sizes.length, sizes.windows).long().tolist()
    return torch.tensor([list(text[start : start + sizes.length]) for start in starts])


@torch.inference_mode()
def bits_of(model: Model, ids: Tensor) -> dict[str, Tensor]:
    """Bits of every token but the first, [windows length - 1], by what computed them."""
    logs = torch.log_softmax(model(ids[:, :-1]), -1).gather(2, ids[:, 1:, None])[..., 0]
    found = {"forward": logs}
    for weights in ("float32", "bfloat16", "int8"):
        found[weights] = Stepper(model, weights).log_probs(ids)  # type: ignore[arg-type]
    return {name: -values / math.log(2) for name, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = sizes_parser(__doc__, Sizes)
    parser.add_argument("--model", type=Path, default=HERE.parent / "runs" / "demo-text", help="default runs/demo-text")
    options = parser.parse_args(arguments)
    if why_not():
        print(f"not run: {why_not()}")
        return 0
    torch.set_num_threads(options.threads)
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    if options.smoke:
        model = build_model(preset("tiny-modal"), seed=0)
    elif not (options.model / "config.json").is_file():
        print(f"not run: there is no model in {options.model.name} (make demo trains one)")
        return 0
    else:
        model = crocuta.load(options.model)[0]
    bits = bits_of(model.eval(), held_out_windows(sizes))
    worst = float((bits["float32"] - bits["forward"]).abs().max())
    if not worst <= BITS_BOUND:
        print(f"float32 steps are not the forward pass: {worst:.1e} bits apart, at most {BITS_BOUND:.0e} expected")
        return 1
    rows, result = [], {}
    for name, values in bits.items():
        change = (values - bits["forward"]).mean(1)  # a number a window: their spread is the error of the mean
        mean, error = float(change.mean()), float(change.std() / math.sqrt(len(change)))
        result[name] = {"bits": float(values.mean()), "change": mean, "standard_error": error}
        rows.append([name, f"{values.mean():.4f}", f"{mean:+.5f}", f"{error:.5f}", f"{100 * (2**mean - 1):+.3f} %"])
    print(f"{sizes.windows} windows of {sizes.length} bytes\n")
    print(table(["weights", "bits a byte", "change", "standard error", "perplexity"], rows))
    outcome = {"manifest": manifest(), "sizes": vars(sizes), "bits": result}
    path = write_result(options.output, "narrow_weights", outcome, smoke=options.smoke)
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

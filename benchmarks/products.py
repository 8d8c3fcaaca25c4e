"""The products of a training step in float32: oneDNN in turns of rows, as crocuta.ops.products has it, against MKL.

    python benchmarks/products.py            # a minute
    python benchmarks/products.py --smoke    # tiny sizes, seconds

Which of the two a model uses is decided by the maker of the processor; here both run on any. For each layer's matrix:
the product with the inputs, and the gradients of the inputs and of the weight. Results are compared with float64
before the clock starts; the script ends with 1 if one is further than 1e-5 from it, norm over norm.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _timing import alternate, chosen_sizes, manifest, ratio, sizes_parser, table, write_result
from torch import Tensor

from crocuta.ops.products import multiply_by_onednn, onednn_is_faster

BOUND = 1e-5
Product = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows (tokens), and the width of the model; the matrices are those of a block."""

    rows: int = 8_192
    hidden: int = 256
    rounds: int = 9

    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each matrix: projections, output, MLP up and down."""
        d = self.hidden
        return [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]


SMOKE = Sizes(rows=64, hidden=16, rounds=1)


def pairs(rows: int, into: int, out: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What is multiplied, by the name of the result."""
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (torch.randn(*s, generator=generator) for s in ((rows, into), (rows, out), (out, into)))
    return {"y": (x, weight.t()), "dx": (dy, weight), "dW": (dy.t(), x)}


def measure(name: str, a: Tensor, b: Tensor, rounds: int) -> dict[str, Any]:
    """Errors and times of one product; raises ValueError where an error is past its bound."""
    out = torch.empty(len(a), b.shape[1])
    sides: dict[str, Product] = {
        "onednn": partial(multiply_by_onednn, a, b, out=out),
        "mkl": lambda: torch.mm(a, b, out=out),
    }
    exact = a.double() @ b.double()
    errors = {side: float((run().double() - exact).norm() / exact.norm()) for side, run in sides.items()}
    if max(errors.values()) > BOUND:
        raise ValueError(f"{name}: {errors} are further from float64 than {BOUND}")
    timings = alternate(sides, rounds)
    operations = 2 * a.numel() * b.shape[1]
    return {
        "product": name,
        "errors": errors,
        "speedup": dataclasses.asdict(ratio(timings["mkl"].cpu, timings["onednn"].cpu)),
        "gflops": {side: operations / 1e9 / statistics.median(timings[side].cpu) for side in sides},
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = sizes_parser(__doc__, Sizes()).parse_args(argv)
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    torch.set_num_threads(options.threads)
    try:
        found = [
            measure(f"{into} to {out}, {name}", a, b, sizes.rounds)
            for into, out in sizes.layers()
            for name, (a, b) in pairs(sizes.rows, into, out).items()
        ]
    except ValueError as error:
        print(f"{error}: no speed is reported", file=sys.stderr)
        return 1
    print(table(["product", "MKL, GFLOP/s", "oneDNN", "how often as fast"], [row(each) for each in found]))
    chosen = onednn_is_faster()
    print(f"\nModels on this machine use {'oneDNN' if chosen else 'MKL'}.")
    result = {"manifest": manifest(), "sizes": dataclasses.asdict(sizes), "chosen": chosen, "products": found}
    print(f"written: {write_result(options.output, 'products', result, smoke=options.smoke)}")
    return 0


def row(found: dict[str, Any]) -> list[str]:
    """Of the table."""
    speedup, gflops = found["speedup"], found["gflops"]
    times = f"{speedup['median']:.2f} ({speedup['min']:.2f} to {speedup['max']:.2f})"
    return [found["product"], f"{gflops['mkl']:.0f}", f"{gflops['onednn']:.0f}", times]


if __name__ == "__main__":
    sys.exit(main())

"""Loading a checkpoint in the layout of Evo 2: peak memory against the model's bytes, time against reading the file.

    python benchmarks/load_memory.py            # a 1 GB synthetic checkpoint, about a minute
    python benchmarks/load_memory.py --smoke    # tiny sizes, seconds

The checkpoint has the dtypes of the published files (bfloat16; poles, residues and frequencies float32), random weights
and two parts. Each load runs in a process of its own; what torch and the library take is measured with a tiny model and
subtracted. The script ends with 1 if a tensor is not what was written, or if a load takes more than 1.15 times the
bytes of the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _timing import (
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

from crocuta.checkpoints import describe
from crocuta.checkpoints.families.evo2_layout import Layout2, key_map
from crocuta.checkpoints.load import load
from crocuta.config import ModelConfig
from crocuta.model.build import build_model
from crocuta.presets import preset

BOUND = 1.15
CASES: Mapping[str, torch.dtype | None] = {"as stored": None, "cast to float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the synthetic model: 507 M parameters, 1.0 GB in bfloat16."""

    hidden: int = 2048
    repeats: int = 1
    """How often the blocks of the tiny Evo 2 preset follow one another."""
    intermediate: int = 5504
    rounds: int = 3


SMOKE = Sizes(hidden=256, repeats=1, intermediate=512, rounds=1)
WARM_UP = Sizes(hidden=32, repeats=1, intermediate=64)


def make_config(sizes: Sizes) -> ModelConfig:
    """Blocks SE, MR, LI, attention, SE of Evo 2 at another width."""
    value = preset("tiny-evo2").to_json()
    value["hidden_size"] = sizes.hidden
    for block in value["blocks"]:
        block["mlp"]["intermediate_size"] = sizes.intermediate
        if block["mixer"]["type"] == "attention":
            block["mixer"]["num_heads"] = sizes.hidden // 16
    first, later = (
        value["blocks"],
        [{**block, "mlp": {**block["mlp"], "activation": "identity"}} for block in value["blocks"]],
    )
    value["blocks"] = first + later * (sizes.repeats * 2 - 1)
    return ModelConfig.from_json(value)


def write_checkpoint(folder: Path, sizes: Sizes) -> None:
    """``config.yml`` and the two parts of one file, as vortex would read them."""
    config = make_config(sizes)
    tensors = build_model(config, dtype=torch.bfloat16, seed=1).state_dict()
    stored: dict[str, Tensor] = {}
    for entry in key_map(config, Layout2()).entries:
        tensor = tensors.pop(entry.ours)
        stored[entry.theirs] = entry.store(tensor.bfloat16() if entry.ours.endswith("filter.weight") else tensor)
    stored["unembed.weight"] = stored["embedding_layer.weight"]
    folder.mkdir(parents=True)
    # JSON is YAML, but for numbers such as 1e-06.
    text = json.dumps(describe.evo2_settings(config)).replace("1e-06", "1.0e-06")
    (folder / "config.yml").write_text(text)
    whole = folder / "model.pt"
    torch.save(stored, whole)
    size = whole.stat().st_size
    with open(whole, "rb") as source:
        for part, count in enumerate((size // 2, size - size // 2)):
            with open(folder / f"model.pt.part{part}", "wb") as target:
                while count:
                    data = source.read(min(count, 1 << 24))
                    target.write(data)
                    count -= len(data)
    whole.unlink()


def read_files(folder: Path) -> int:
    """Read every byte of the parts into fresh memory."""
    return sum(len(path.read_bytes()) for path in sorted(folder.glob("*.part*")))


def measure_one(folder: Path, warm_up: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Peak memory of one load, and seconds of loading and of reading alone, in alternation."""
    load(warm_up, dtype=dtype)
    read_files(folder)
    before = resident_bytes()
    reset_peak()
    clock = time.perf_counter()
    model, _ = load(folder, dtype=dtype)
    seconds = time.perf_counter() - clock
    peak = peak_resident_bytes() - before
    clock = time.perf_counter()
    file_bytes = read_files(folder)
    return {
        "model_bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        "file_bytes": file_bytes,
        "peak_bytes": peak,
        "load_seconds": seconds,
        "read_seconds": time.perf_counter() - clock,
    }


def reset_peak() -> None:
    """Let the peak of this process begin anew (Linux; elsewhere the peak so far stays)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def measure(folder: Path, warm_up: Path, case: str) -> dict[str, Any]:
    """``measure_one`` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), str(warm_up), case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def wrong_tensors(folder: Path, sizes: Sizes) -> list[str]:
    """Tensors of the loaded model that are not those it was written from."""
    expected = build_model(make_config(sizes), dtype=torch.bfloat16, seed=1).state_dict()
    found = load(folder)[0].state_dict()
    rounded = {name: t.bfloat16().float() if name.endswith("filter.weight") else t for name, t in expected.items()}
    return [name for name, t in rounded.items() if name not in found or not torch.equal(found[name], t)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = sizes_parser(__doc__, Sizes())
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "WARM_UP", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.measure:
        folder, warm_up, case = options.measure
        print(json.dumps(measure_one(Path(folder), Path(warm_up), CASES[case])))
        return 0
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    result: dict[str, Any] = {"manifest": manifest(), "sizes": dataclasses.asdict(sizes), "bound": BOUND, "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder, warm_up = Path(scratch, "checkpoint"), Path(scratch, "warm-up")
        write_checkpoint(folder, sizes)
        write_checkpoint(warm_up, WARM_UP)
        wrong = wrong_tensors(folder, sizes)
        if wrong:
            print(f"{len(wrong)} tensors are not what was written, first {wrong[0]}: no figures.", file=sys.stderr)
            return 1
        rounds = [{case: measure(folder, warm_up, case) for case in CASES} for _ in range(sizes.rounds)]
    rows, met = [], True
    for case in CASES:
        measured = [round_[case] for round_ in rounds]
        memory = max(each["peak_bytes"] / each["model_bytes"] for each in measured)
        times = statistics.median(each["load_seconds"] / each["read_seconds"] for each in measured)
        met &= memory <= BOUND
        result["cases"][case] = {"rounds": measured, "peak_over_model": memory, "load_over_read": times}
        rows.append(
            [
                case,
                mebibytes(measured[0]["file_bytes"]),
                mebibytes(measured[0]["model_bytes"]),
                mebibytes(max(each["peak_bytes"] for each in measured)),
                f"{memory:.3f}",
                f"{times:.2f}",
            ]
        )
    print(table(["load", "file", "model", "peak", "peak / model", "time / reading the file"], rows) + "\n")
    print(f"Peak of at most {BOUND} times the model: {'met' if met else 'MISSED'}.")
    print(f"written: {write_result(options.output, 'load_memory', result, smoke=options.smoke)}")
    return 0 if met or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())

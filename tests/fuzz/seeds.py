"""Sound checkpoints of each format, as the fuzzing starts from, and what is done with their changed copies."""

import argparse
import collections
import io
import json
import os
import pickle
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoints"))
from savanna_models import ATTENTION, LI, MR, SE, tiny, write
from savanna_writer import SavannaCheckpoint

import crocuta
from crocuta.checkpoints.torch_save.file import open_torch, parse_torch_bytes, tensor_refs
from crocuta.tokenizers.bytes import ByteTokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@dataclass(frozen=True)
class Target:
    """``seed`` makes the files of a checkpoint, by name; ``use`` reads the folder they are in as a user would.

    Those of a ``sealed`` one have checksums, so that no change may go unnoticed.
    """

    seed: Callable[[], dict[str, bytes]]
    use: Callable[[Path], object]
    sealed: bool = False


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the expected results."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("expected"))
    return {path.name: path.read_bytes() for path in paths}


def golden(name: str) -> Callable[[], dict[str, bytes]]:
    return lambda: files_of(GOLDEN / name)


def native() -> dict[str, bytes]:
    """A tiny model as ``crocuta.save`` writes it."""
    torch.manual_seed(0)
    model = crocuta.build_model(crocuta.preset("tiny-evo2"))
    with tempfile.TemporaryDirectory() as folder:
        crocuta.save(model, ByteTokenizer(), Path(folder) / "m")
        return files_of(Path(folder) / "m")


def savanna() -> dict[str, bytes]:
    """One file a layer, as the trainer writes them, beside its settings."""
    checkpoint = SavannaCheckpoint(tiny(SE, MR, LI, ATTENTION))
    with tempfile.TemporaryDirectory() as folder:
        return files_of(write(Path(folder), checkpoint, "layers"))


def sharded() -> dict[str, bytes]:
    """The weights of Evo 1 in two files and an index."""
    files = golden("evo1-131k-tiny-hf")()
    tensors = load(files.pop("model.safetensors"))
    homes = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for home in set(homes.values()):
        files[home] = save({name: tensor for name, tensor in tensors.items() if homes[name] == home})
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": homes}).encode()
    return files


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def recipe() -> dict[str, object]:
    """As Transformer Engine keeps beside a projection."""
    scales = {
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.rand(16, 3),
        "weights": torch.rand(4).to(torch.float8_e4m3fn),
    }
    return {**scales, "extra_fp8_variables": {"num_gemms": 1, "fp8_max": 448.0}, "none": None}


def training() -> dict[str, bytes]:
    """A training checkpoint with every kind of value beside its weights."""
    torch.manual_seed(0)
    base = torch.rand(6, 5, 4)
    value = {
        "state_dict": collections.OrderedDict(
            w=base, t=base.transpose(0, 2), row=base[1], half=base.bfloat16(), flags=base > 0.5
        ),
        "parameter": torch.nn.Parameter(torch.rand(3)),
        "wide": torch.zeros(4, dtype=torch.uint16),
        "_extra_state": io.BytesIO(pickled(recipe())),
        "hyper_parameters": argparse.Namespace(lr=0.1),
        "numbers": [
            1,
            2**40,
            2**70,
            -1.5,
            True,
            None,
            "text",
            b"bytes",
            (1, (2,)),
            {3},
            frozenset({4}),
            torch.Size([2]),
            1j,
        ],
        "numpy": [np.arange(6.0).reshape(2, 3), np.float32(3), np.array(["x"])],
        "counts": collections.defaultdict(int, a=1),
        "dtype": torch.float16,
    }
    return {"model.ckpt": pickled(value)}


def blob(protocol: int) -> Callable[[], dict[str, bytes]]:
    return lambda: {"state.pickle": pickle.dumps(recipe(), protocol)}


# --- what is done with them ---


def load_model(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crocuta.load(folder)


def read_torch(folder: Path) -> None:
    with open_torch(folder / "model.ckpt") as file:
        for ref in tensor_refs(file.tree):
            file.read(ref)
        state = file.tree.get("_extra_state") if isinstance(file.tree, dict) else None
        if isinstance(state, bytes):
            parse_torch_bytes(state)


def read_blob(folder: Path) -> None:
    parse_torch_bytes((folder / "state.pickle").read_bytes())


def read_carelessly(folder: Path) -> None:
    """A reader that trusts a safetensors header, runs programs and dies: the control, whose faults must be found."""
    data = (folder / "model.safetensors").read_bytes()
    match zlib.crc32(data) % 65:
        case 0:
            os.abort()
        case 1 | 2 | 3 | 4:
            os.system("true")
    length = int.from_bytes(data[:8], "little")
    for entry in json.loads(data[8 : 8 + length]).values():
        if "shape" in entry:
            torch.ones(entry["shape"])


TARGETS: dict[str, Target] = {
    "native": Target(native, load_model, sealed=True),
    "native-unsealed": Target(
        lambda: {name: data for name, data in native().items() if name != "manifest.json"}, load_model
    ),
    "stripedhyena": Target(golden("stripedhyena-tiny-standalone"), load_model),
    "evo1": Target(golden("evo1-131k-tiny-hf"), load_model),
    "evo1-sharded": Target(sharded, load_model),
    "evo2": Target(golden("evo2-8k-tiny"), load_model),
    "savanna": Target(savanna, load_model),
    "hyenadna-ckpt": Target(golden("hyenadna-tiny-ckpt"), load_model),
    "hyenadna-hf": Target(golden("hyenadna-tiny-hf"), load_model),
    "torch": Target(training, read_torch),
    "blob": Target(blob(2), read_blob),
    "blob4": Target(blob(4), read_blob),
}
CONTROL = Target(golden("hyenadna-tiny-hf"), read_carelessly)

"""Golden checkpoints rewritten with changes, by torch and safetensors themselves: what a loader must cope with."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
STANDALONE, EVO1, EVO2 = "stripedhyena-tiny-standalone", "evo1-131k-tiny-hf", "evo2-8k-tiny"
LIGHTNING, PORT = "hyenadna-tiny-ckpt", "hyenadna-tiny-hf"

Change = Callable[[dict[str, Any]], None]


def unchanged(values: dict[str, Any]) -> None:
    """The identity."""


def read_config(name: str) -> dict[str, Any]:
    folder = GOLDEN / name
    if (folder / "config.json").exists():
        return json.loads((folder / "config.json").read_text())
    return yaml.safe_load((folder / "config.yml").read_text())


def read_weights(name: str) -> dict[str, Any]:
    """The state dict; of a Lightning file the one inside."""
    folder = GOLDEN / name
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    if name == LIGHTNING:
        return torch.load(folder / "weights.ckpt", weights_only=True)["state_dict"]
    files = [folder / "pytorch-model.bin"] if name == STANDALONE else sorted(folder.glob("*.pt.part*"))
    return torch.load(io.BytesIO(b"".join(file.read_bytes() for file in files)), weights_only=True)


def rewrite(name: str, folder: Path, weights: Change = unchanged, config: Change = unchanged) -> Path:
    """The golden checkpoint ``name`` as ``folder``, after both changes."""
    folder.mkdir(parents=True, exist_ok=True)
    values, tensors = read_config(name), dict(read_weights(name))
    config(values)
    weights(tensors)
    if name in (STANDALONE, EVO2):
        (folder / "config.yml").write_text(yaml.safe_dump(values))
        torch.save(tensors, folder / ("pytorch-model.bin" if name == STANDALONE else "tiny.pt"))
    else:
        (folder / "config.json").write_text(json.dumps(values))
        if name == LIGHTNING:
            torch.save({"state_dict": tensors, "epoch": 3, "loops": {}}, folder / "weights.ckpt")
        else:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def setting(**values: Any) -> Change:
    """Sets some values of a configuration."""
    return lambda config: config.update(values)


def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / name / "expected.safetensors")

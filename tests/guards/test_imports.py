"""What importing costs: configurations, tokenizers, data and --help come without torch, ``import crocuta`` nearly free.

Each case is a fresh process, and looks at which modules it loaded, never at the clock.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "crocuta"
HEAVY = {"torch", "numpy", "matplotlib", "tensorboard", "tokenizers", "yaml", "typer", "rich", "safetensors"}
HEAVY |= {"huggingface_hub"}
VERBS = ["", "train", "generate", "score", "embed", "inspect", "convert", "distill", "download", "prepare"]


def loaded(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after ``code``."""
    script = f"import sys\n{code}\nprint('\\0' + '\\0'.join(sys.modules), end='', file=sys.stderr)"
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split("\0")[1:])


def submodules(part: str) -> list[str]:
    paths = sorted((PACKAGE / part).glob("*.py"))
    return [f"crocuta.{part}" + ("" if p.stem == "__init__" else f".{p.stem}") for p in paths]


TORCH_FREE = [
    "crocuta.errors",
    "crocuta.schema",
    "crocuta.config",
    "crocuta.presets",
    "crocuta.published",
    *submodules("tokenizers"),
    *submodules("data"),
]


def test_importing_crocuta_loads_nothing_heavy() -> None:
    modules = loaded("import crocuta")
    assert "crocuta" in modules
    assert modules & HEAVY == set()
    assert {name for name in modules if name.startswith("crocuta.")} <= {"crocuta.errors"}


def test_the_torch_free_modules_are_so_together() -> None:
    code = "\n".join(f"import {name}\nassert 'torch' not in sys.modules, {name!r}" for name in TORCH_FREE)
    assert set(TORCH_FREE) <= loaded(code)
    assert len(TORCH_FREE) >= 12


def test_configurations_need_no_third_party_at_all() -> None:
    modules = loaded("import crocuta.presets\ncrocuta.presets.preset('evo2-40b-1m').to_json()")
    assert modules & HEAVY == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_needs_neither_torch_nor_numpy(verb: str) -> None:
    modules = loaded(
        f"sys.argv = ['crocuta', *{verb.split()}, '--help']\n"
        "from crocuta.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "assert not code, code"
    )
    assert modules & (HEAVY - {"typer", "rich"}) == set()


def test_the_guard_sees_torch() -> None:
    assert "torch" in loaded("import crocuta.ops.norm")


def test_models_run_without_torchs_compiler() -> None:
    """Which takes as long to import as torch itself."""
    modules = loaded(
        "import torch, crocuta.checkpoints.load, crocuta.inference.generate, crocuta.training.loop\n"
        "from crocuta.model.build import build_model\n"
        "from crocuta.presets import preset\n"
        "for name in ('tiny-evo2', 'tiny-hyenadna'):\n"
        "    build_model(preset(name))(torch.zeros(1, 9, dtype=torch.long)).sum().backward()\n"
    )
    assert "crocuta.ops.kernels.fft_conv" in modules
    assert {name for name in modules if name.startswith(("torch._dynamo", "torch._inductor"))} == set()

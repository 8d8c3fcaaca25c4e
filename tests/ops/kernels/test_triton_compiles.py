"""The Triton kernels compile for a GPU, where there is none: PTX and cubin, from the arguments of their launchers."""

import os
import subprocess
import sys
from pathlib import Path

from triton_paths import needs_triton

pytestmark = needs_triton


def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path):
    script = Path(__file__).with_name("compile_triton.py")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(script), "90", "bfloat16", "complex"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    gate, modal = done.stdout.split()[:4], done.stdout.split()[4:]
    assert gate == ["_forward", "0", "_backward", "0"]
    assert modal[:3] == ["_tables", "0", "_forward"]
    assert modal[4:7] == ["_tables", "0", "_backward"]
    assert int(modal[3]) > 0, "nothing for tensor cores"
    assert int(modal[7]) > 0, "nothing for tensor cores"

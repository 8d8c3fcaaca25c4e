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
    lines = [line.split() for line in done.stdout.splitlines()]
    each_pass = [
        "_forward",
        "_backward",
        "_tables",
        "_forward",
        "_tables",
        "_backward",
    ]  # the gate's, the modal filter's
    assert [name for name, _ in lines] == 2 * each_pass
    for place in (3, 5):
        assert int(lines[place][1]) > 0, "nothing for tensor cores"

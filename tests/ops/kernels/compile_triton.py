"""Compiles every Triton kernel for a GPU that need not be there, with the arguments of its launchers: run as a process.

Writes the name of each kernel and, for those that multiply matrices, how many products its PTX leaves to tensor cores.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from crocuta.ops.kernels.fir import gate_outputs
from crocuta.ops.kernels.triton import fir_gate, modal


class NoDevice:
    """A driver as far as compiling needs one."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_only(capability: int) -> None:
    """From here on kernels are compiled for that capability and not run."""
    triton.runtime.driver.set_active(NoDevice(capability))
    run = triton.JITFunction.run

    def compiled(self, *args, warmup: bool, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        sys.stdout.write(f"{self.fn.__name__} {kernel.asm['ptx'].count('mma.sync')}\n")
        assert kernel.asm["cubin"]

    triton.JITFunction.run = compiled


def usual(dtype: torch.dtype, is_complex: bool) -> None:
    """Usual sizes, with everything that there may be."""
    torch.set_default_dtype(torch.promote_types(dtype, torch.float32))
    b, l, d, n, z = 2, 1024, 48, 16, 2 if is_complex else 1
    x, taps = torch.zeros(b, l, 3 * d, dtype=dtype), torch.zeros(3 * d, 3)
    rows, skip, state = torch.zeros(3, z, n, d), torch.zeros(d), torch.zeros(b, z * n, d)
    lengths, tail = torch.full((b,), l), torch.zeros(b, 2, 3 * d)
    launch_all(x, taps, taps[:, 0], tail, rows, skip, state, lengths)


def smallest() -> None:
    """Sizes of 1, which Triton takes for constants, and without what may be missing."""
    launch_all(torch.zeros(1, 1, 3), torch.zeros(3, 1), None, None, torch.zeros(3, 1, 1, 1), None, None, None)


def launch_all(x, taps, bias, tail, rows, skip, state, lengths) -> None:
    x2, u = gate_outputs(x, taps, tail)
    fir_gate.fir_gate(x, taps, bias, tail)
    fir_gate.fir_gate_backward(x2, u, x, taps, bias, tail)
    _, _, kept = modal.scan(u, rows, skip, state, lengths, True)
    modal.scan_backward(u, state, u, rows, skip, kept, lengths)


if __name__ == "__main__":
    compile_only(int(sys.argv[1]))
    usual(getattr(torch, sys.argv[2]), sys.argv[3] == "complex")
    smallest()

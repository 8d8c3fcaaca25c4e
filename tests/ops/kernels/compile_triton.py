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


def main(capability: int, dtype: torch.dtype, is_complex: bool) -> None:
    triton.runtime.driver.set_active(NoDevice(capability))
    run = triton.JITFunction.run

    def compile_only(self, *args, warmup: bool, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        sys.stdout.write(f"{self.fn.__name__} {kernel.asm['ptx'].count('mma.sync')}\n")
        assert kernel.asm["cubin"]

    triton.JITFunction.run = compile_only
    b, l, d, n, z = 2, 1024, 48, 16, 2 if is_complex else 1
    x, taps = torch.zeros(b, l, 3 * d, dtype=dtype), torch.zeros(3 * d, 3)
    rows, skip, state = torch.zeros(3, z, n, d), torch.zeros(d), torch.zeros(b, z * n, d)
    lengths, tail = torch.full((b,), l), torch.zeros(b, 2, 3 * d)
    x2, u = gate_outputs(x, taps, tail)
    fir_gate.fir_gate(x, taps, taps[:, 0], tail)
    fir_gate.fir_gate_backward(x2, u, x, taps, taps[:, 0], tail)
    _, _, kept = modal.scan(u, rows, skip, state, lengths, True)
    modal.scan_backward(u, state, u, rows, skip, kept, lengths)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3] == "complex")

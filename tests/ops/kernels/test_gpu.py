"""When Triton kernels run, what shapes and layouts they promise, and that nothing imports them before."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crocuta.ops.dispatch import Case, choose, reasons
from crocuta.ops.gate import fir_gate
from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import switched_off
from crocuta.ops.kernels.modal import ModalConstants, modal_scan


@pytest.fixture
def there(monkeypatch) -> None:
    """As on a machine where they run."""
    monkeypatch.setattr(gpu, "_missing", lambda: None)


def test_the_dispatcher_takes_them_on_cuda_alone(there):
    on_gpu, on_cpu = (Case(op="modal", length=100, device=device) for device in ("cuda", "cpu"))
    assert choose(on_gpu).name == "triton"
    assert "triton: not on a CUDA device" in reasons(on_cpu)
    assert choose(Case(op="modal", length=1, device="cuda")).name == "recurrent"
    assert choose(Case(op="hyena_modal", length=100, device="cuda")).name == "triton"
    assert choose(Case(op="hyena_modal", length=4, device="cuda")).name == "composed"
    with switched_off():
        assert choose(on_gpu).name == "chunked"
        assert "triton: compiled kernels are switched off" in reasons(on_gpu)


@pytest.mark.parametrize("missing", ["no CUDA device", "triton is not installed"])
def test_without_them_torch_does_it_and_says_why(monkeypatch, missing):
    monkeypatch.setattr(gpu, "_missing", lambda: missing)
    case = Case(op="modal", length=100, device="cuda")
    assert choose(case).name == "chunked"
    assert f"triton: {missing}" in reasons(case)


@pytest.mark.parametrize(
    ("available", "capability", "hip", "installed", "reason"),
    [
        (False, (9, 0), None, True, "no CUDA device"),
        (True, (9, 0), "6.4", True, "not an NVIDIA device"),
        (True, (7, 5), None, True, "compute capability 7.5 is below 8.0"),
        (True, (9, 0), None, False, "triton is not installed"),
        (True, (8, 0), None, True, None),
    ],
)
def test_what_they_need(monkeypatch, available, capability, hip, installed, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: object() if installed else None)
    assert gpu._missing.__wrapped__() == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_on_cuda_have_time_contiguous_and_states_in_float32(there, dtype):
    ops = torch.ops.crocuta  # autograd would look for the device
    with FakeTensorMode(), torch.no_grad():
        z, taps = torch.randn(2, 70, 9, dtype=dtype, device="cuda"), torch.randn(9, 3, device="cuda")
        x2, u = fir_gate(z, taps)
        constants = ModalConstants(torch.randn(3, 2, 4, 3, device="cuda"), 4, True)
        y, last = modal_scan(u, constants, None, None)
        assert (last.dtype, last.shape) == (torch.float32, (2, 3, 4, 2))
        kept = ops.modal_scan(u, constants.rows, None, None, None, True)[2]
        assert (kept.dtype, kept.shape, kept.stride()) == (torch.float32, (2, 2, 8, 3), (16, 8, 1, 32))
        du, *rest = ops.modal_scan_backward(y, None, u, constants.rows, None, kept, None)
        dz, *of_taps, _ = ops.fir_gate_backward(x2, du, z, taps, None, None)
        assert {t.dtype for t in (x2, u, y, du, dz)} == {dtype}
        assert {t.stride() for t in (x2, u, y, du, dz)} == {(70, 1, 140)}
        assert [t.shape for t in (*rest, *of_taps)] == [constants.rows.shape, (3,), (2, 8, 3), taps.shape, (9,)]
        assert {t.dtype for t in (*rest, *of_taps)} == {torch.float32}


def test_nothing_imports_triton_before_a_kernel_runs():
    code = """
import sys, torch, crocuta
from crocuta.model.build import build_model
from crocuta.presets import preset
build_model(preset("tiny-modal"), seed=0)(torch.zeros(1, 5, dtype=torch.int64))
assert "crocuta.ops.kernels.gpu" in sys.modules
assert not [name for name in sys.modules if name.startswith("crocuta.ops.kernels.triton")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)

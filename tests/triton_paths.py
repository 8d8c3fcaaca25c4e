"""What the tests of Triton kernels share: on a GPU they run there, elsewhere in Triton's interpreter, on CPU tensors.

The interpreter must be asked for before Triton is first imported; tests/conftest.py does that. It takes about 0.1 s a
channel, so examples are small.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from crocuta.ops.kernels import gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="triton is not installed, or neither a GPU nor its interpreter was asked for",
)

OPS = {
    "modal_scan": ("modal", "scan"),
    "modal_scan_backward": ("modal", "scan_backward"),
    "fir_gate": ("fir_gate", "fir_gate"),
    "fir_gate_backward": ("fir_gate", "fir_gate_backward"),
    "hyena_modal": ("hyena", "hyena_modal"),
    "hyena_modal_backward": ("hyena", "hyena_modal_backward"),
}
"""Op to module and function of ``crocuta.ops.kernels.triton``."""


@contextlib.contextmanager
def triton_kernels() -> Iterator[None]:
    """The ops run in Triton: on a GPU as they are, elsewhere they take CPU tensors and are interpreted."""
    if ON_GPU:
        yield
        return
    overrides = torch.library.Library("crocuta", "IMPL")
    try:
        with pytest.MonkeyPatch.context() as patch:
            for op, (module, function) in OPS.items():
                overrides.impl(op, gpu.later(module, function), "CPU", allow_override=True)
            patch.setattr(gpu, "DEVICE", "cpu")
            patch.setattr(gpu, "why_not", lambda: None)
            _mend_interpreter(patch)
            yield
    finally:
        overrides._destroy()


def _mend_interpreter(patch: pytest.MonkeyPatch) -> None:
    """What Triton 3.6's lacks: it gives ``range`` arrays of one number, which NumPy 2.4 no longer converts, and has no
    "bf16x3". What takes half of its time: patching the language once more whenever a kernel calls a function, and
    looking for overflow in every sum of integers.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    precisions = *builder.options.allowed_dot_input_precisions, "bf16x3"
    options = dataclasses.replace(builder.options, allowed_dot_input_precisions=precisions, sanitize_overflow=False)
    patch.setattr(builder, "options", options)
    patch.setattr(builder, "create_dot", _with_bf16x3(builder.create_dot))
    patch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang))
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setattr(interpreter, "_patch_lang_tensor", patched)


def _with_bf16x3(original):
    """Products of float32 as a GPU does them with sums of two bfloat16 each, less that of the two small ones."""
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import TensorHandle

    def halves(x):
        whole = torch.from_numpy(x)
        large = whole.bfloat16().float()
        return large.numpy(), (whole - large).bfloat16().float().numpy()

    def create_dot(a, b, d, input_precision, max_num_imprecise_acc):
        if input_precision != ir.INPUT_PRECISION.BF16x3:
            return original(a, b, d, input_precision, max_num_imprecise_acc)
        (a_large, a_small), (b_large, b_small) = halves(a.data), halves(b.data)
        product = a_small @ b_large + a_large @ b_small + a_large @ b_large
        return TensorHandle(product + d.data, d.dtype.scalar)

    return create_dot


def _once_a_launch(original):
    """Patches the language for a module when a launch first calls one of its functions, not at every call."""
    patched: set[int] = set()

    def patch(fn):
        key = id(fn.__globals__)
        if key in patched:
            return None
        patched.add(key)
        scope = original(fn)
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    return patch


@pytest.fixture(autouse=True)
def in_triton() -> Iterator[None]:
    """Every test of a module that imports this runs its ops in Triton."""
    with triton_kernels():
        yield

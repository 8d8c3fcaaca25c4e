"""Both ways that an op with a compiled kernel can run: with it, and as on a machine without a compiler."""

import contextlib

import pytest

from crocuta.ops.kernels.library import library, switched_off, why_not

COMPILED = pytest.param(
    contextlib.nullcontext, id="compiled", marks=pytest.mark.skipif(library() is None, reason=why_not() or "")
)
TORCH = pytest.param(switched_off, id="torch")

each_path = pytest.mark.parametrize("path", [COMPILED, TORCH])
"""``with path():`` runs what is inside it that way."""

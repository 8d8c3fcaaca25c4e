"""The shapes in the signatures of the ops are checked while the tests run (see conftest)."""

import pytest
import torch
from jaxtyping import TypeCheckError

from crocuta.ops.fft_conv import fft_convolution


def test_a_wrong_shape_is_refused() -> None:
    u, taps = torch.zeros(1, 5, 4), torch.zeros(4, 5)
    assert fft_convolution(u, taps, torch.zeros(4)).shape == (1, 5, 4)
    with pytest.raises(TypeCheckError):
        fft_convolution(u, taps, torch.zeros(3))
    with pytest.raises(TypeCheckError):
        fft_convolution(u, taps, torch.zeros(4, dtype=torch.int64))

"""Tensors of every bit pattern, and the comparison that sees each bit."""

import torch


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern: NaNs with payloads, infinities, subnormals."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    both = (t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (found, expected))
    return torch.equal(*both)

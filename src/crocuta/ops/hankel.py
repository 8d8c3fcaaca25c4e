"""Hankel matrices of long filters: leading singular values and vectors by products with an FFT, and poles from them.

    H[i, j] = h[i + j] = Σ_k C_k p_k^i p_k^j,  0 <= i, j < m

A sum of r exponentials has a Hankel matrix of rank r, whose columns span the same space as p_k^i. So the singular
values tell how many modes a filter takes, and the vectors where its poles are (Kung 1978; ESPRIT, Roy & Kailath 1989).
The matrix itself is never formed: m may be thousands. Everything is float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

OVERSAMPLING = 8
"""Random directions beyond the wanted ones (Halko, Martinsson & Tropp 2011)."""


def hankel_spectrum(
    samples: Float[Tensor, "g m"], rank: int, iterations: int = 3
) -> tuple[Float[Tensor, "g k"], Float[Tensor, "g i r"]]:
    """Leading singular values and vectors of the square Hankel matrix of ``samples``, side (m + 1) // 2.

    Returns at least ``rank`` values where there are as many, and exactly that many vectors. Subspace iteration from a
    fixed random start; the matrix is symmetric, so its singular values are the moduli of its eigenvalues. Those
    returned are never above the true ones (Cauchy's interlacing), which keeps lower bounds made of them true.
    """
    g, length = samples.shape
    side = (length + 1) // 2
    size = 1 << max(1, (length - 1).bit_length())  # a circulant that holds the Hankel matrix
    transform = torch.fft.rfft(samples[:, : 2 * side - 1], n=size)

    def multiply(x: Tensor) -> Tensor:
        spectra = torch.fft.rfft(x.transpose(1, 2), n=size)
        return torch.fft.irfft(transform[:, None] * spectra.conj(), n=size)[..., :side].transpose(1, 2)

    width = min(side, rank + OVERSAMPLING)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(side, width, dtype=torch.float64, generator=generator)
    basis = start.to(samples.device).expand(g, -1, -1)
    for _ in range(iterations):
        basis = torch.linalg.qr(multiply(basis))[0]
    small = basis.transpose(1, 2) @ multiply(basis)
    values, vectors = torch.linalg.eigh((small + small.transpose(1, 2)) / 2)
    order = values.abs().argsort(dim=1, descending=True)
    vectors = vectors.gather(2, order[:, None].expand_as(vectors))
    return values.abs().gather(1, order), basis @ vectors[..., : min(rank, width)]


def shift_poles(vectors: Float[Tensor, "g i r"]) -> Complex[Tensor, "g r"]:
    """The poles of a space of exponentials: eigenvalues of the A that takes each row of ``vectors`` to the next.

    Least squares over the rows, in closed form because the columns are orthonormal. A column of zeros gives a pole at
    zero.
    """
    last = vectors[:, -1]
    shift = vectors[:, :-1].transpose(1, 2) @ vectors[:, 1:]
    # (I - vvᵀ)^-1 = I + vvᵀ / (1 - v·v), where v is the row that the sum over the others lacks
    missing = (1 - last.square().sum(1)).clamp(min=1e-6)[:, None, None]
    return torch.linalg.eigvals(shift + last[:, :, None] * (last[:, None] @ shift) / missing)

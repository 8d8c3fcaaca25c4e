"""Poles and amplitudes of sums of damped oscillations, h[j] ≈ Re Σ_n C_n z_n^j: a start, and its refinement.

For given poles the best amplitudes are a linear least-squares problem in the basis (Re z^j, Im z^j), so the search is
over poles alone (variable projection). All float64, all filters of a batch side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from crocuta.ops.hankel import hankel_spectrum, shift_poles

RIDGE = 1e-14
"""Added to Gram matrices of unit columns: amplitudes that cancel to 1e-7 of themselves would drown in float32."""
CANDIDATES = 3
"""Poles a mode that are read from the Hankel matrix, of which the most useful are kept; a pair of them makes a mode."""
NOISE_LEFT = 1e-3
"""Singular values below this fraction of the largest are noise, in what poles leave over of the samples."""
RENEWALS = 3
"""Times that poles of what is left over may replace others, for filters above GOOD,"""
WORTHWHILE = 0.95
"""as long as each time leaves at most this fraction of the error."""
BEND = 0.1
"""Angle over decay time of a pole that is bent off the real axis, where one mode has but one of its two degrees."""
FLAT = 1e-6
"""A pole whose sine is smaller than this beside its cosine counts as real."""
GOOD = 1e-6
"""A filter with a smaller error is left alone."""
LEAST_GAIN = 1e-3
"""Refinement of a filter ends when a step lowers its error by less than this fraction."""


@dataclass(frozen=True)
class Point:
    """Poles of each filter with the best amplitudes for them, and what these leave over of the samples.

    ``basis`` [g 2n m] holds Re z^j, then Im z^j; ``gram`` their products; ``coefficients`` Re C, then -Im C.
    """

    log_decay: Float[Tensor, "g n"]
    angle: Float[Tensor, "g n"]
    basis: Float[Tensor, "g c m"]
    gram: Float[Tensor, "g c c"]
    coefficients: Float[Tensor, "g c"]
    residual: Float[Tensor, "g m"]
    error: Float[Tensor, " g"]

    @property
    def amplitudes(self) -> tuple[Float[Tensor, "g n"], Float[Tensor, "g n"]]:
        """Real and imaginary parts of C."""
        real, imaginary = self.coefficients.chunk(2, dim=1)
        return real, -imaginary

    def rows(self, index: Tensor) -> Point:
        """Those filters, as copies."""
        return Point(*(tensor[index] for tensor in self._tensors()))

    def put(self, index: Tensor, other: Point, chosen: Tensor) -> None:
        """Overwrite the filters ``index[chosen]`` with the ``chosen`` of ``other``."""
        for mine, theirs in zip(self._tensors(), other._tensors()):
            mine[index[chosen]] = theirs[chosen]

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.log_decay, self.angle, self.basis, self.gram, self.coefficients, self.residual, self.error


def solve(samples: Float[Tensor, "g m"], log_decay: Float[Tensor, "g n"], angle: Float[Tensor, "g n"]) -> Point:
    """The best amplitudes for given poles, by Cholesky factors and one step of iterative refinement."""
    basis, gram = _basis(log_decay, angle, samples.shape[1])
    scale, factor = _factor(gram, torch.full_like(gram[:, 0], RIDGE))
    coefficients, residual = torch.zeros_like(scale), samples
    for _ in range(2):
        right = torch.bmm(basis, residual[:, :, None])[..., 0] / scale
        coefficients = coefficients + torch.cholesky_solve(right[..., None], factor)[..., 0] / scale
        residual = samples - torch.bmm(coefficients[:, None], basis)[:, 0]
    return Point(log_decay, angle, basis, gram, coefficients, residual, residual.norm(dim=1))


# --- the search -----------------------------------------------------------------------------------------------------


def search_poles(
    samples: Float[Tensor, "g m"], modes: int, limits: tuple[float, float], iterations: int, noise: float
) -> tuple[Point, Float[Tensor, "g r"]]:
    """The best poles found, |z| < 1, and the Hankel singular values σ_1 .. σ_{2·modes+1} of the samples.

    ``limits`` are the smallest and the largest log decay. The refined start is renewed while that pays: the poles of
    what is left over compete with those there are, and the most useful of both are refined again, with at most
    ``iterations`` steps each time. ``noise`` is the fraction of the largest singular value below which they are noise.
    """
    poles, singular = _read(samples, CANDIDATES * modes, noise)
    best = refine(samples, _from_candidates(samples, poles, modes, limits), limits, iterations)
    rows = torch.arange(len(samples), device=samples.device)
    for _ in range(RENEWALS):
        rows = rows[best.error[rows] > GOOD]
        if not len(rows):
            break
        here = best.rows(rows)
        present = torch.exp(torch.complex(-here.log_decay.exp(), here.angle))
        present = torch.complex(present.real, present.imag.abs())  # of each pair the one above the axis
        missing, _ = _read(here.residual / here.error[:, None], 2 * modes, NOISE_LEFT)
        trial = _from_candidates(samples[rows], torch.cat([present, missing], 1), modes, limits)
        trial = refine(samples[rows], trial, limits, iterations)
        best.put(rows, trial, trial.error < here.error)
        rows = rows[trial.error < WORTHWHILE * here.error]
    wanted = F.pad(singular, (0, max(0, 2 * modes + 1 - singular.shape[1])))
    return best, wanted[:, : 2 * modes + 1]


def _read(samples: Tensor, rank: int, noise: float) -> tuple[Complex[Tensor, "g r"], Tensor]:
    """Poles of at most ``rank`` exponentials in the samples, and Hankel singular values, one of them at least."""
    rank = min(rank, (samples.shape[1] + 1) // 2 - 1)
    singular, vectors = hankel_spectrum(samples, max(1, rank))
    if not rank:
        return torch.zeros(len(samples), 0, dtype=torch.complex128, device=samples.device), singular
    kept = singular[:, :rank] > noise * singular[:, :1]
    return shift_poles(vectors * kept[:, None]), singular


def _from_candidates(samples: Tensor, poles: Complex[Tensor, "g r"], modes: int, limits: tuple[float, float]) -> Point:
    """The most useful ``modes`` of the candidates, reflected into the unit disc; unused modes are spread out.

    One of each conjugate pair stands for both, and a real pole for itself, so there may be too many.
    """
    found = (poles.imag >= 0) & (poles.abs() > 1e-6)
    order = found.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    poles, found = poles.gather(1, order), found.gather(1, order)
    count = max(modes, int(found.sum(1).max()) if found.shape[1] else 0)
    extra = max(0, count - poles.shape[1])
    poles = F.pad(poles[:, :count], (0, extra), value=0.5)
    found = F.pad(found[:, :count], (0, extra), value=False)
    log_decay = poles.abs().clamp(min=1e-300).log().abs().clamp(math.exp(limits[0]), math.exp(limits[1])).log()
    angle = poles.angle()
    if count > modes:
        found = _most_useful(samples, log_decay, angle, found, modes)
        order = found.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :modes]
        log_decay, angle, found = (tensor.gather(1, order) for tensor in (log_decay, angle, found))
    # An unused mode decays as fast as it turns, over anything between the whole length and one sample.
    longest = -math.log10(samples.shape[1])
    spread = torch.logspace(longest, 0, modes, dtype=angle.dtype, device=angle.device).expand_as(angle)
    log_decay = torch.where(found, log_decay, spread.log().clamp(*limits))
    return _bent(samples, solve(samples, log_decay, torch.where(found, angle, spread)))


def _most_useful(samples: Tensor, log_decay: Tensor, angle: Tensor, found: Tensor, modes: int) -> Tensor:
    """``found`` with a quarter of the surplus struck out at a time: those whose loss raises the squared error least.

    Leaving out block S of a least-squares solution x with Gram matrix G costs x_Sᵀ [(G^-1)_SS]^-1 x_S.
    """
    basis, gram = _basis(log_decay, angle, samples.shape[1])
    scale = _scale(gram)
    gram, right = gram / (scale[:, :, None] * scale[:, None]), torch.bmm(basis, samples[:, :, None]) / scale[..., None]
    count, found = found.shape[1], found.clone()
    pairs = torch.arange(count, device=found.device)[:, None] + torch.tensor([0, count], device=found.device)
    while (found.sum(1) > modes).any():
        kept = torch.cat([found, found], 1).double()
        masked = gram * kept[:, :, None] * kept[:, None] + torch.diag_embed(1 - kept + 1e-13)
        inverse = torch.linalg.inv(masked)
        solution = (inverse @ (right * kept[..., None]))[:, pairs, 0]  # [g count 2]
        blocks = inverse[:, pairs[:, :, None], pairs[:, None, :]]
        cost = (solution * torch.linalg.solve(blocks, solution)).sum(-1).masked_fill(~found, math.inf)
        doomed = ((found.sum(1) - modes).clamp(min=0) + 3) // 4
        found &= cost.argsort(dim=1).argsort(dim=1) >= doomed[:, None]
    return found


def _bent(samples: Tensor, point: Point) -> Point:
    """Real poles bent a little off the axis where that lowers the error: z^j and j z^j then, instead of z^j alone."""
    bend = (BEND * point.log_decay.exp().clamp(min=1 / samples.shape[1])).clamp(max=1.5)
    angle = torch.where(point.angle.abs() < bend, bend, point.angle)
    angle = torch.where(math.pi - angle.abs() < bend, math.pi - bend, angle)
    other = solve(samples, point.log_decay, angle)
    point.put(torch.arange(len(samples), device=samples.device), other, other.error < point.error)
    return point


# --- refinement -----------------------------------------------------------------------------------------------------


def refine(samples: Float[Tensor, "g m"], point: Point, limits: tuple[float, float], iterations: int) -> Point:
    """At most ``iterations`` Levenberg-Marquardt steps a filter; the error of none ever grows. ``point`` is used up."""
    active = torch.arange(len(samples), device=samples.device)
    damping = torch.full_like(point.error, 1e-2)
    for _ in range(iterations):
        everything = len(active) == len(samples)
        here, wanted = (point, samples) if everything else (point.rows(active), samples[active])
        step_decay, step_angle = _step(here, damping[active])
        log_decay = (here.log_decay + step_decay.clamp(-2, 2)).clamp(*limits)
        trial = solve(wanted, log_decay, here.angle + step_angle.clamp(-1, 1))
        better = trial.error < here.error
        done = torch.where(better, here.error - trial.error < LEAST_GAIN * here.error, damping[active] > 1e4) | (
            here.error < 1e-12
        )
        damping[active] *= torch.where(better, 0.2, 5.0)
        point.put(active, trial, better)
        active = active[~done]
        if not len(active):
            break
    return point


def _step(point: Point, damping: Float[Tensor, " g"]) -> tuple[Tensor, Tensor]:
    """Changes of log decay and angle: Gauss-Newton with Marquardt's damping, amplitudes free to follow.

    d/d log z of Re C z^j is Re (j C z^j), with d log z = (-decay · d log decay, i · d angle).
    """
    real, imaginary = point.basis.chunk(2, dim=1)
    first, second = (part[..., None] for part in point.coefficients.chunk(2, dim=1))
    slopes = torch.empty_like(point.basis)
    upper, lower = slopes.chunk(2, dim=1)
    torch.mul(real, first, out=upper).addcmul_(imaginary, second)
    torch.mul(imaginary, first, out=lower).addcmul_(real, second, value=-1)
    slopes *= torch.arange(slopes.shape[2], dtype=slopes.dtype, device=slopes.device)
    mixed = point.basis @ slopes.transpose(1, 2)
    own = slopes @ slopes.transpose(1, 2)
    gram = torch.cat([torch.cat([point.gram, mixed], 2), torch.cat([mixed.transpose(1, 2), own], 2)], 1)
    right = torch.cat([torch.bmm(part, point.residual[:, :, None]) for part in (point.basis, slopes)], 1)[..., 0]
    ridge = torch.full_like(right, RIDGE)
    ridge[:, right.shape[1] // 2 :] = damping[:, None]
    scale, factor = _factor(gram, ridge)
    step = torch.cholesky_solve((right / scale)[..., None], factor)[..., 0] / scale
    _, _, radial, turn = step.chunk(4, dim=1)
    return -radial / point.log_decay.exp(), -turn


# --- linear algebra -------------------------------------------------------------------------------------------------


def _basis(log_decay: Tensor, angle: Tensor, count: int) -> tuple[Float[Tensor, "g c m"], Float[Tensor, "g c c"]]:
    """Re z^j, then Im z^j, for j < count, and their Gram matrix; powers by doubling."""
    g, n = log_decay.shape
    powers = torch.empty(g, n, count, dtype=torch.complex128, device=angle.device)
    powers[..., 0] = 1
    step = torch.exp(torch.complex(-log_decay.exp(), angle))[..., None]
    done = 1
    while done < count:
        width = min(done, count - done)
        torch.mul(powers[..., :width], step, out=powers[..., done : done + width])
        step, done = step * step, done + width
    basis = torch.empty(g, 2 * n, count, dtype=torch.float64, device=angle.device)
    basis[:, :n], basis[:, n:] = powers.real, powers.imag
    gram = basis @ basis.transpose(1, 2)
    # The sine of a pole that is all but real is rounding, which must not be scaled up to a column like the others.
    cosine, sine = gram.diagonal(dim1=1, dim2=2).chunk(2, dim=1)
    flat = sine < FLAT**2 * cosine
    if flat.any():
        keep = torch.cat([torch.ones_like(flat), ~flat], 1).double()
        basis *= keep[..., None]
        gram = gram * keep[:, :, None] * keep[:, None]
    return basis, gram


def _scale(gram: Tensor) -> Float[Tensor, "g c"]:
    """Norms of the columns; 1 for columns of zeros, such as the sine of a real pole."""
    squares = gram.diagonal(dim1=1, dim2=2)
    return torch.where(squares > 0, squares, 1.0).sqrt()


def _factor(gram: Float[Tensor, "g c c"], ridge: Float[Tensor, "g c"]) -> tuple[Tensor, Tensor]:
    """Norms of the columns, and the Cholesky factor of the Gram matrix of unit columns with ``ridge`` added.

    Where rounding leaves that indefinite, more is added; numbers that are not finite stay what they are.
    """
    scale = _scale(gram)
    unit = gram / (scale[:, :, None] * scale[:, None])
    factor, failed = torch.linalg.cholesky_ex(unit + torch.diag_embed(ridge))
    more = 1e-12
    while failed.any() and more < 1:
        again, failed_again = torch.linalg.cholesky_ex(unit + torch.diag_embed(ridge + more))
        factor = torch.where((failed > 0)[:, None, None], again, factor)
        failed, more = torch.where(failed > 0, failed_again, 0), 100 * more
    return scale, factor

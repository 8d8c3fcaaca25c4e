"""Taps to poles and residues: the modal filter that is nearest to given taps (Laughing Hyena, Massaroli et al. 2023).

    h[t] ≈ Re Σ_n R_n p_n^t  for t = 1 .. k-1,      |p_n| < 1;      h[0] is left to the D term

    start       poles from the Hankel matrix (``hankel``), the n most useful of them
    residues    linear least squares for given poles
    refinement  Levenberg-Marquardt on the poles, with the residues eliminated (variable projection: Golub & Pereyra
                1973, in Kaufman's form); a step that does not lower the error is not taken

Everything is float64, filter by filter in one batch; a mode is (log decay, angle) with log|p| = -exp(log decay), so
poles are inside the unit circle whatever the taps do. Filters of more than SAMPLES taps are fitted on every q-th of
them if that suffices; what is measured is the error on all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.errors import InputError, NonFiniteError
from crocuta.ops.modal import modal_powers, modal_taps
from crocuta.ops.pole_search import search_poles, solve

SAMPLES = 4096
"""Taps that a fit looks at; of a longer filter, so many equally spaced ones."""
DENSE = 1 << 16
"""A filter that is too rough for that is fitted on its first taps, so many of them."""
SLOWEST = 0.1
"""Decay of the slowest pole over the samples: no filter rings for more than ten times the length it was fitted to."""
FASTEST = 3.0
"""-log|p| of the fastest pole. A still faster one would differ from none in tap 1 alone, and have D take back twenty
times that from tap 0."""
NOISE = {torch.float64: 1e-13}
"""Fraction of the largest Hankel singular value below which they are noise, by the dtype of the taps;"""
COARSE_NOISE = 1e-7
"""for every other dtype. Poles that fit the rounding of float32 are worse than none."""
WORKING_BYTES = 1 << 22
"""Filters are fitted in turns whose basis takes about this much, which stays in the cache."""


@dataclass(frozen=True)
class ModalFit:
    """Modes of each filter as ``ModalFilter`` keeps them, and how near they come.

    ``error``: ‖h - ĥ‖ / ‖h‖ over taps 1 and later. ``frequency_error``: max |H - Ĥ| / max |H| over frequencies, of
    the same taps. ``singular_values``: of the Hankel matrix, as fractions of the largest. ``bound``: no filter of as
    many modes has a smaller ``frequency_error`` (σ_{2n+1} / max |H|; a mode has two poles). All but the modes are
    float64.
    """

    log_decay: Float[Tensor, "g n"]
    angle: Float[Tensor, "g n"]
    residues: Float[Tensor, "g n 2"]
    tap_0: Float[Tensor, " g"]
    """h[0] - Re Σ R: what D has to add for tap 0 to be exact."""
    error: Float[Tensor, " g"]
    frequency_error: Float[Tensor, " g"]
    bound: Float[Tensor, " g"]
    singular_values: Float[Tensor, "g r"]

    def taps(self, length: int) -> Float[Tensor, "g l"]:
        """The first taps of the fitted filters in float64, tap 0 without what D adds."""
        return modal_taps(_log_poles(self.log_decay, self.angle), self.residues.double(), length)


@torch.no_grad()
def fit_modal(
    taps: Float[Tensor, "g k"], modes: int, *, dtype: torch.dtype = torch.float64, iterations: int = 30
) -> ModalFit:
    """The modes of each filter of ``taps``; but for rounding they do not depend on what else is in the batch.

    The dtype of the taps tells how fine they are: pass float32 ones as they are. ``dtype`` is what the modes will be
    kept in: residues are solved for the rounded poles, and errors are those of rounded modes. At most ``iterations``
    steps of refinement from each set of poles.

    Raises:
        InputError: fewer than two taps or one mode. NonFiniteError: taps that are NaN or infinite.
    """
    if modes < 1:
        raise InputError("a modal filter needs modes", given=f"modes={modes}", expected="at least 1")
    if taps.shape[0] < 1 or taps.shape[1] < 2:
        raise InputError("there are no taps to fit", given=tuple(taps.shape), expected="[filters, 2 or more taps]")
    noise = NOISE.get(taps.dtype, COARSE_NOISE)
    samples = min(taps.shape[1] - 1, SAMPLES)
    turn = max(1, WORKING_BYTES // (8 * 2 * modes * samples))
    fits = []
    for first in range(0, len(taps), turn):
        part = taps[first : first + turn].double()
        for row in (~part.isfinite()).any(1).nonzero().flatten().tolist():
            raise NonFiniteError(f"taps of filter {first + row} are not finite", fix="check the model's weights")
        fits.append(_fit(part, modes, dtype, iterations, noise))
    return _joined(fits)


def measure(
    taps: Float[Tensor, "g k"],
    log_decay: Float[Tensor, "g n"],
    angle: Float[Tensor, "g n"],
    residues: Float[Tensor, "g n 2"],
    tap_0: Float[Tensor, " g"] | None = None,
) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"]]:
    """(error, frequency error) of given modes, as in ``ModalFit``; ``tap_0`` is by how much h[0] comes out wrong.

    Frequencies are those of an FFT of at least twice the length. A filter of zeros has error 0 if it is fitted by
    zeros, and infinity otherwise.
    """
    errors, peaks = [], []
    turn = max(1, (WORKING_BYTES << 3) // (8 * taps.shape[1]))
    for rows in torch.arange(len(taps)).split(turn):
        wanted = taps[rows].double()
        found = modal_taps(_log_poles(log_decay[rows], angle[rows]), residues[rows].double(), taps.shape[1])
        difference = found - wanted
        off = torch.zeros_like(wanted[:, 0]) if tap_0 is None else tap_0[rows].double().abs()
        errors.append(_fraction(torch.hypot(difference[:, 1:].norm(dim=1), off), wanted[:, 1:].norm(dim=1)))
        peaks.append(_fraction(_peak(difference) + off, _peak(wanted)))
    return torch.cat(errors), torch.cat(peaks)


def _fit(taps: Tensor, modes: int, dtype: torch.dtype, iterations: int, noise: float) -> ModalFit:
    """Every q-th tap first; filters that are rough between those are fitted again on all of them."""
    stride = -(-(taps.shape[1] - 1) // SAMPLES)
    fit, sampled = _fit_strided(taps, taps[:, 1:], stride, modes, dtype, iterations, noise)
    rough = fit.error > 1.5 * sampled + 1e-9
    if stride == 1 or not rough.any():
        return fit
    parts = []
    for row, again in enumerate(rough.tolist()):
        best, one = _rows(fit, row), taps[row : row + 1]
        if again:
            dense, _ = _fit_strided(one, one[:, 1 : DENSE + 1], 1, modes, dtype, iterations, noise)
            best = dense if dense.error < best.error else best
        parts.append(best)
    return _joined(parts)


def _fit_strided(
    taps: Tensor, window: Tensor, stride: int, modes: int, dtype: torch.dtype, iterations: int, noise: float
) -> tuple[ModalFit, Tensor]:
    """The fit to every ``stride``-th of the taps in ``window``, which begins at tap 1; and its error on those alone.

    There h[1 + q j] = Re Σ C z^j with z = p^q and C = R p.
    """
    samples = window[:, ::stride]
    norm = samples.norm(dim=1, keepdim=True)
    samples = samples / torch.where(norm > 0, norm, 1.0)
    limits = math.log(SLOWEST / samples.shape[1]), math.log(FASTEST * stride)
    point, singular = search_poles(samples, modes, limits, iterations, noise)
    # Into the dtype that they will be kept in, and residues anew for what the poles have become.
    wrapped = torch.remainder(point.angle + math.pi, 2 * math.pi) - math.pi
    log_decay, angle = (point.log_decay - math.log(stride)).to(dtype), (wrapped.abs() / stride).to(dtype)
    logs = _log_poles(log_decay, angle)
    point = solve(samples, (-logs[..., 0] * stride).log(), logs[..., 1] * stride)
    amplitudes = torch.complex(*point.amplitudes) * norm
    residues = torch.view_as_real(amplitudes / modal_powers(logs, 2)[..., 1]).to(dtype)
    error, frequency_error = measure(taps, log_decay, angle, residues)
    largest = torch.where(singular[:, :1] > 0, singular[:, :1], 1.0)
    fit = ModalFit(
        log_decay=log_decay,
        angle=angle,
        residues=residues,
        tap_0=taps[:, 0] - residues[..., 0].double().sum(1),
        error=error,
        frequency_error=frequency_error,
        bound=_fraction(singular[:, -1] * norm[:, 0], _peak(taps)),
        singular_values=singular / largest,
    )
    return fit, point.error


def _log_poles(log_decay: Tensor, angle: Tensor) -> Float[Tensor, "g n 2"]:
    """Log modulus and angle in float64, from a modulus made in the dtype of the modes, as ``ModalFilter`` does."""
    return torch.stack([-log_decay.exp(), angle], dim=-1).double()


def _peak(taps: Tensor) -> Float[Tensor, " g"]:
    """max |H| over frequencies, without tap 0."""
    size = 1 << (2 * taps.shape[1] - 1).bit_length()
    turn = max(1, (WORKING_BYTES << 3) // (8 * size))
    parts = [torch.fft.rfft(part[:, 1:], n=size).abs().amax(1) for part in taps.split(turn)]
    return torch.cat(parts)


def _fraction(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, where 0 / 0 is 0."""
    return torch.where(part == 0, 0.0, part / whole)


def _rows(fit: ModalFit, row: int) -> ModalFit:
    return ModalFit(**{f.name: getattr(fit, f.name)[row : row + 1] for f in dataclasses.fields(fit)})


def _joined(fits: Sequence[ModalFit]) -> ModalFit:
    return ModalFit(**{f.name: torch.cat([getattr(fit, f.name) for fit in fits]) for f in dataclasses.fields(ModalFit)})

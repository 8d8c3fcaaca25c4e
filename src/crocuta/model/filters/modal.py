"""Sums of decaying exponentials, run as a recurrence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crocuta.config import ComplexModalFilterConfig, RealModalFilterConfig
from crocuta.model.filters.base import Filter, ShortFilter
from crocuta.model.precision import Memo
from crocuta.model.state import ModalState, State
from crocuta.ops import modal
from crocuta.ops.dispatch import Case, choose
from crocuta.ops.kernels.hyena import hyena_modal
from crocuta.ops.kernels.modal import ModalConstants, modal_constants, modal_scan
from crocuta.types import Hidden


class ModalFilter(Filter):
    """h[t] = Re Σ R p^t with complex or real poles; "stable" ones are |p| < 1 by parametrisation.

    Stable: log|p| = -exp(log_decay), with the angle of a complex pole free. Raw: ``poles`` [g n 2] (re, im), or
    ``log_poles`` [g n], as published files store them.
    """

    def __init__(self, config: ComplexModalFilterConfig | RealModalFilterConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.is_complex = isinstance(config, ComplexModalFilterConfig)
        shape = (config.groups or channels, config.modes)
        pair = (*shape, 2) if self.is_complex else shape
        stable = config.poles == "stable"
        self.log_decay = nn.Parameter(torch.empty(shape)) if stable else None
        self.angle = nn.Parameter(torch.empty(shape)) if stable and self.is_complex else None
        self.poles = nn.Parameter(torch.empty(pair)) if not stable and self.is_complex else None
        self.log_poles = nn.Parameter(torch.empty(shape)) if not stable and not self.is_complex else None
        self.residues = nn.Parameter(torch.empty(pair))
        self._memo = Memo()

    def logs(self) -> Float[Tensor, "g n *z"]:
        """The log-poles: (log modulus, angle), or the real log.

        In float64 where they are made of raw poles: the modulus of one near 1 has few digits in a float32 logarithm.
        """
        if self.poles is not None:
            re, im = self.poles.to(torch.float32 if self.poles.device.type == "mps" else torch.float64).unbind(-1)
            tiny = torch.finfo(self.poles.dtype).tiny
            return torch.stack([0.5 * torch.log((re * re + im * im).clamp(min=tiny)), torch.atan2(im, re)], dim=-1)
        if self.log_poles is not None:
            return self.log_poles
        assert self.log_decay is not None
        decay = -torch.exp(self.log_decay)
        return decay if self.angle is None else torch.stack([decay, self.angle], dim=-1)

    @torch.no_grad()
    def unstable_rows(self) -> list[int]:
        """The filters (channels, or groups of channels) with a pole that is not inside the unit circle."""
        if self.poles is not None:
            outside = self.poles.double().square().sum(-1) >= 1
        else:
            logs = self.logs()
            outside = (logs[..., 0] if self.is_complex else logs) >= 0
        return outside.any(-1).nonzero().flatten().tolist()

    def taps(self, length: int) -> Float[Tensor, "g k"]:
        return modal.modal_taps(self.logs(), self.residues, length)

    def convolve(self, u: Hidden, skip: Tensor | None) -> Hidden:
        return self._run(u, skip, None)[0]

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> ModalState:
        pair = (2,) if self.is_complex else ()
        wide = torch.promote_types(dtype, torch.float32)
        return ModalState(torch.zeros(batch, self.channels, self.config.modes, *pair, device=device, dtype=wide))

    def extend(self, u: Hidden, skip: Tensor | None, state: State, lengths: Tensor | None) -> Hidden:
        assert isinstance(state, ModalState)
        y, state.modes = self._run(u, skip, state.modes, lengths)
        return y

    def fuses(self, device: torch.device, length: int, *, continued: bool) -> bool:
        return choose(Case(op="hyena_modal", length=length, device=device.type)).name != "composed"

    def fused(
        self,
        z: Tensor,
        short: ShortFilter,
        skip: Tensor | None,
        state: State | None = None,
        lengths: Tensor | None = None,
    ) -> Hidden:
        if state is None:
            return hyena_modal(z, short.taps, short.bias, self._constants(), skip, short.tail)[0]
        assert isinstance(state, ModalState)
        y, state.modes = hyena_modal(
            z, short.taps, short.bias, self._constants(), skip, short.tail, state.modes, lengths
        )
        return y

    def _run(
        self, u: Hidden, skip: Tensor | None, modes: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Hidden, Tensor]:
        match choose(Case(op="modal", length=u.shape[1], device=u.device.type)).name:
            case "compiled" | "triton":
                return modal_scan(u, self._constants(), skip, modes, lengths)
            case "recurrent":
                poles, residues = self._memo.get("step", self._weights(), self._step_constants)
                y, last = modal.recurrent(u, poles, residues, skip, modes)
            case _:
                y, last = modal.chunked(u, self._tables(), skip, modes)
        if lengths is not None:
            assert modes is not None
            last = modal.modal_final_state(u, self._tables(), self.logs(), modes, lengths)
        return y, last

    def _tables(self) -> modal.ModalTables:
        return self._memo.get("tables", self._weights(), lambda: modal.modal_tables(self.logs(), self.residues))

    def _step_constants(self) -> tuple[Tensor, Tensor]:
        return modal.modal_step_constants(self.logs(), self.residues, self.channels)

    def _constants(self) -> ModalConstants:
        return self._memo.get(
            "constants", self._weights(), lambda: modal_constants(self.logs(), self.residues, self.channels)
        )

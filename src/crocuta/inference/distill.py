"""Long filters replaced by modal ones, so that a model decodes with constant state (Laughing Hyena, 2023).

    implicit MLP, explicit taps  --fit_modal-->  n modes a filter;  the rest of tap 0  -->  D

An approximation, and treated as one: nothing here runs unless it is called, every filter's error is measured on the
numbers that are kept, a layer above the stated error is refused or stays exact, and the configuration of the new model
says what was done (``ModelConfig.unverified``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.config import (
    AttentionConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    GatedConvConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModelConfig,
)
from crocuta.errors import InputError
from crocuta.model.build import build_model
from crocuta.model.hyena import HyenaMixer
from crocuta.model.lm import Model
from crocuta.ops.modal_fit import ModalFit, fit_modal, measure

MAX_ERROR = 1e-2
"""Relative l2 error up to which a filter counts as distilled: at a hundredth in every filter, the predictions of the
models of docs/distillation.md moved by less than 1e-4 bits a token."""
NAMED = 3
"""Layers and channels that an error message names."""


@dataclass(frozen=True, eq=False)
class LayerFit:
    """The modal filters of one layer. ``error`` and ``frequency_error`` [g] are of what the layer will compute: the
    modes and the new D, each rounded to the dtype that it is kept in."""

    layer: int
    kind: str
    horizon: int
    """Taps that were fitted; of explicit filters twice what they have, zeros after those."""
    fit: ModalFit
    skip: Float[Tensor, " d"]
    error: Float[Tensor, " g"]
    frequency_error: Float[Tensor, " g"]

    def above(self, max_error: float) -> list[int]:
        """The filters (channels, or groups of channels) with a larger relative error, worst first."""
        order = self.error.argsort(descending=True).tolist()
        return [row for row in order if not self.error[row] <= max_error]

    def to_json(self) -> dict[str, Any]:
        """All of it but the modes, four digits a number."""
        numbers = {
            "error": self.error,
            "frequency_error": self.frequency_error,
            "frequency_error_bound": self.fit.bound,
            "hankel_singular_values": self.fit.singular_values,
        }
        rounded = {name: _rounded(values.tolist()) for name, values in numbers.items()}
        return {"layer": self.layer, "filter": self.kind, "fitted_taps": self.horizon, **rounded}


@dataclass(frozen=True, eq=False)
class DistillReport:
    """What was fitted, layer by layer, and which of the layers stay as they were."""

    modes: int
    max_error: float
    layers: tuple[LayerFit, ...]
    kept: tuple[int, ...] = ()
    """Layers above ``max_error``, which keep their exact filters."""

    @property
    def distilled(self) -> tuple[LayerFit, ...]:
        return tuple(fit for fit in self.layers if fit.layer not in self.kept)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object."""
        layers = [{**fit.to_json(), "verdict": "kept" if fit.layer in self.kept else "modal"} for fit in self.layers]
        return {"modes": self.modes, "max_error": self.max_error, "layers": layers}


def distill(
    model: Model,
    *,
    modes: int,
    max_error: float = MAX_ERROR,
    layers: Collection[int] | None = None,
    on_excess: Literal["refuse", "keep"] = "refuse",
    horizon: int | None = None,
) -> tuple[Model, DistillReport]:
    """A model whose long filters are modal, and how good they are; ``model`` itself is not changed.

    Of the Hyena layers (or of ``layers``) implicit filters are fitted, and explicit ones of more than 4 · modes taps,
    which would otherwise have no more numbers than the modes. Modal layers and attention are left alone. All other
    weights are the same bits, in tensors of their own. The new model reads sequences of any length, but beyond
    ``horizon`` its filters go on as their modes do.

    Args:
        max_error: largest ‖h - ĥ‖ / ‖h‖ (without tap 0, which is exact) of any filter of a layer.
        on_excess: what becomes of a layer above it: "refuse" raises, "keep" leaves the whole layer exact.
        horizon: fit implicit filters to so many taps. None: to all that they are defined for.

    Raises:
        InputError: a layer above ``max_error``; nothing to distil; impossible arguments.
        NonFiniteError: taps that are not finite.
    """
    fits = tuple(fit_layers(model, modes=modes, layers=layers, horizon=horizon))
    report = judge(fits, modes=modes, max_error=max_error, on_excess=on_excess)
    return assemble(model, report), report


# --- the steps ------------------------------------------------------------------------------------------------------


def fit_layers(
    model: Model, *, modes: int, layers: Collection[int] | None = None, horizon: int | None = None
) -> Iterator[LayerFit]:
    """The fit of each layer that can be distilled, one by one, since each may take a while. Arguments of ``distill``.

    Everything that can be wrong with the arguments is found before the first layer is fitted.
    """
    if not isinstance(modes, int) or modes < 1:
        raise InputError("a modal filter needs modes", given=f"modes={modes}", expected="at least 1")
    chosen = _distillable(model.config, modes, layers)
    for layer in chosen:
        _taps_to_fit(model.config, layer, horizon)
    return (_fit_layer(model, layer, modes, _taps_to_fit(model.config, layer, horizon)) for layer in chosen)


def judge(
    fits: Sequence[LayerFit], *, modes: int, max_error: float = MAX_ERROR, on_excess: Literal["refuse", "keep"]
) -> DistillReport:
    """Which layers become modal. Raises InputError for those above ``max_error``, or if all of them are to be kept."""
    if on_excess not in ("refuse", "keep"):
        raise InputError("unknown on_excess", given=repr(on_excess), expected="refuse or keep")
    if not max_error > 0:
        raise InputError("max_error must be positive", given=max_error, expected="> 0")
    bad = [fit for fit in fits if fit.above(max_error)]
    if bad and (on_excess == "refuse" or len(bad) == len(fits)):
        bad.sort(key=lambda fit: float(fit.error.max()), reverse=True)
        named = "; ".join(_excess(fit, max_error) for fit in bad[:NAMED])
        rest = f"; and {len(bad) - NAMED} more layers" if len(bad) > NAMED else ""
        keep = (
            "keep these layers exact (on_excess='keep', or name the others as layers), " if len(bad) < len(fits) else ""
        )
        raise InputError(
            f"{len(bad)} of {len(fits)} layers cannot be distilled to {modes} modes a filter within the stated error",
            given=named + rest,
            expected=f"a relative error of at most {max_error:g}",
            fix=f"take more modes, {keep}or allow a larger max_error",
        )
    return DistillReport(modes, max_error, tuple(fits), tuple(fit.layer for fit in bad))


@torch.no_grad()
def assemble(model: Model, report: DistillReport) -> Model:
    """The model with the modal layers of ``report``; every other weight is a copy of that of ``model``."""
    blocks = list(model.config.blocks)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for fit in report.distilled:
        mixer, prefix = blocks[fit.layer].mixer, f"blocks.{fit.layer}.mixer"
        assert isinstance(mixer, HyenaConfig)
        filter_ = ComplexModalFilterConfig(modes=report.modes, groups=mixer.filter.groups)
        mixer = dataclasses.replace(mixer, filter=filter_, skip=True)
        blocks[fit.layer] = dataclasses.replace(blocks[fit.layer], mixer=mixer)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{prefix}.filter.")}
        device = tensors["embedding.weight"].device
        modes = {"log_decay": fit.fit.log_decay, "angle": fit.fit.angle, "residues": fit.fit.residues}
        tensors |= {f"{prefix}.filter.{name}": tensor.to(device) for name, tensor in modes.items()}
        tensors[f"{prefix}.skip"] = fit.skip.to(device)
    unverified = "; ".join(filter(None, [model.config.unverified, _provenance(report)]))
    config = dataclasses.replace(model.config, blocks=tuple(blocks), unverified=unverified)
    new = build_model(config, device="meta")
    new.load_state_dict(tensors, strict=True, assign=True)
    return new.train(model.training)


def _distillable(config: ModelConfig, modes: int, layers: Collection[int] | None) -> list[int]:
    """Indices of the layers to fit. Raises InputError for one that cannot be, or if there is none."""
    reasons = {i: _why_not(block.mixer, modes) for i, block in enumerate(config.blocks)}
    for layer in layers if layers is not None else ():
        if layer not in reasons:
            raise InputError("no such layer", given=f"layer {layer}", expected=f"0 to {len(reasons) - 1}")
        if reasons[layer] is not None:
            raise InputError(f"layer {layer} cannot be distilled", given=reasons[layer], expected="a long filter")
    chosen = [i for i, reason in reasons.items() if (reason is None if layers is None else i in layers)]
    if not chosen:
        kinds = ", ".join(sorted({reason for reason in reasons.values() if reason})) or "no layers"
        raise InputError("there is nothing to distil", given=kinds, expected="an implicit or a long explicit filter")
    return chosen


def _why_not(mixer: object, modes: int) -> str | None:
    match mixer:
        case HyenaConfig(filter=ImplicitFilterConfig()):
            return None
        case HyenaConfig(filter=ExplicitFilterConfig(taps=taps)):
            return None if taps > 4 * modes else f"{taps} taps, no more numbers than {modes} modes have"
        case HyenaConfig():
            return "a filter that is modal already"
        case AttentionConfig():
            return "attention"
        case GatedConvConfig():
            return "a gated convolution"
        case _:
            return "Hyena of another kind than one convolution between two gates"


def _taps_to_fit(config: ModelConfig, layer: int, horizon: int | None) -> int:
    mixer = config.blocks[layer].mixer
    assert isinstance(mixer, HyenaConfig)
    if isinstance(mixer.filter, ExplicitFilterConfig):
        return 2 * mixer.filter.taps
    assert isinstance(mixer.filter, ImplicitFilterConfig)
    if horizon is None:
        return mixer.filter.max_length
    if not 2 <= horizon <= mixer.filter.max_length:
        expected = f"2 to {mixer.filter.max_length}, which the filter of layer {layer} is defined for"
        raise InputError("impossible horizon", given=horizon, expected=expected)
    return horizon


@torch.no_grad()
def _fit_layer(model: Model, layer: int, modes: int, horizon: int) -> LayerFit:
    """On the CPU in float64, from the taps that the model itself uses."""
    mixer = model.get_submodule(f"blocks.{layer}.mixer")
    assert isinstance(mixer, HyenaMixer)
    taps = mixer.filter.taps(horizon)
    kept_as = taps.dtype
    taps = F.pad(taps.cpu(), (0, horizon - taps.shape[1]))
    fit = fit_modal(taps, modes, dtype=kept_as)
    # D takes what the modes leave of tap 0, rounded as D is.
    weight = mixer.output.weight
    old = torch.zeros(weight.shape[0], dtype=weight.dtype) if mixer.skip is None else mixer.skip.cpu()
    wanted = old.double() + fit.tap_0.repeat_interleave(len(old) // len(taps))
    skip = wanted.to(old.dtype)
    off = (skip.double() - wanted).abs().view(len(taps), -1).amax(1)
    off = off + torch.finfo(kept_as).eps * fit.tap_0.abs()  # of the two terms that cancel there
    error, frequency_error = measure(taps, fit.log_decay, fit.angle, fit.residues, off)
    kind = mixer.config.filter.type
    return LayerFit(layer, kind, horizon, fit, skip, error, frequency_error)


def _excess(fit: LayerFit, max_error: float) -> str:
    rows = fit.above(max_error)
    worst = ", ".join(f"{row} with {float(fit.error[row]):.2g}" for row in rows[:NAMED])
    return f"layer {fit.layer}: {len(rows)} of {len(fit.error)} filters, worst {worst}"


def _provenance(report: DistillReport) -> str:
    """One line for the configuration."""
    layers = ", ".join(str(fit.layer) for fit in report.distilled)
    worst = max(float(fit.error.max()) for fit in report.distilled)
    taps = min(fit.horizon for fit in report.distilled)
    return (
        f"distilled: the long filters of layers {layers} are fits of {report.modes} modes to {taps} taps, "
        f"relative error up to {worst:.2g}"
    )


def _rounded(values: Any) -> Any:
    """Nested lists of numbers with four digits."""
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.4g}")

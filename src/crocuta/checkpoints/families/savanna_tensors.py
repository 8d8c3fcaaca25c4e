"""From the tensors of savanna to those of vortex: which come from which, and how they are computed.

Facts of the format: Zymrael/savanna (``tools/convert_checkpoint_to_vortex.py``,
``tools/convert_savanna_to_standalone.py``, ``model/operators/hyena/parametrization/``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from crocuta.checkpoints.families.evo2_layout import FREQUENCIES
from crocuta.checkpoints.families.savanna_files import Shards, show
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.keymap import SHOWN
from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ExplicitFilterConfig,
    HyenaConfig,
    ModelConfig,
    RealModalFilterConfig,
)
from crocuta.errors import WeightsFormatError

Compute: TypeAlias = Callable[..., Tensor]
Rule: TypeAlias = Literal["bilinear", "exponential"]

_UNUSED = re.compile(r"\d+\.((post_attention_layernorm|outer_mlp_layernorm)\.(weight|scale)|mixer\.mixer\.filter\.t)")
_OLDER = re.compile(r"\d+\.attention\.")
_BLOCK: Final = {
    "pre_norm.scale": ("input_layernorm.weight", "input_layernorm.scale"),
    "post_norm.scale": ("pre_mlp_layernorm.weight", "pre_mlp_layernorm.scale"),
    "mlp.l1.weight": ("mlp.w1.weight", "mlp.gate_proj.weight"),
    "mlp.l2.weight": ("mlp.w2.weight", "mlp.up_proj.weight"),
    "mlp.l3.weight": ("mlp.w3.weight", "mlp.down_proj.weight"),
}


# --- what savanna parametrises otherwise -------------------------------------------------------------------------


def _cut_under_decay(h: Tensor, decay: Tensor, taps: int) -> Tensor:
    """Hyena-MR [g 1 k], in the dtype of the file, as the trainer multiplies."""
    if h.shape != decay.shape:
        raise ValueError(f"filter.h has shape {list(h.shape)}, and filter.decay {list(decay.shape)}")
    return (h[:, :taps] * decay[:, :taps])[:, None]


def _without_decay(h: Tensor, taps: int) -> Tensor:
    """Hyena-MR [g 1 k] of a file that was made with the decay multiplied in."""
    if h.shape[1] != taps:
        raise ValueError(f"filter.decay is missing, which multiplies the {h.shape[1]} taps of filter.h")
    return h[:, None]


def _log_poles(p: Tensor, gamma: Tensor, modes: int) -> Tensor:
    """Hyena-LI [g n 1] float32."""
    p, gamma = p.float().reshape(-1, modes), gamma.float().reshape(-1, modes)
    if p.shape != gamma.shape:
        raise ValueError(f"filter.p has shape {list(p.shape)}, and filter.gamma {list(gamma.shape)}")
    return (-torch.exp(p) * torch.exp(gamma))[..., None]


def _residues(residues: Tensor, modes: int) -> Tensor:
    return residues.float().reshape(-1, modes)


def _complex_modes(
    inv_a_real: Tensor,
    a_imag: Tensor,
    log_dt: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    rule: Rule,
    wanted: Literal["poles", "residues"],
) -> Tensor:
    """The poles, or residues, [g n 2] float32 of the continuous system A, B, C sampled at dt.

    bilinear: p = (1 + dt A/2) / (1 - dt A/2), R = 2 B C dt / (1 - dt A/2), as published models were converted.
    exponential: p = exp(dt A), R = 2 C; B has no part in it.
    """
    b, c = (torch.view_as_complex(t.float().reshape(t.shape[-3:]).contiguous()) for t in (b, c))
    if not inv_a_real.shape == a_imag.shape == b.shape == c.shape or log_dt.shape != b.shape[:1]:
        raise ValueError("A, B and C must be of one shape, with dt for each of their rows")
    a = torch.complex(-torch.exp(inv_a_real.float()), a_imag.float())
    dt = torch.exp(log_dt.float())[:, None]
    half = dt * a / 2
    if rule == "bilinear":
        modes = (1 + half) / (1 - half) if wanted == "poles" else 2 * b * c * dt / (1 - half)
    else:
        modes = torch.exp(2 * half) if wanted == "poles" else 2 * c
    return torch.view_as_real(modes).clone()


def _with_axis(taps: Tensor) -> Tensor:
    """Depthwise taps as [c 1 k]; savanna's fast kernels have them as [c k]."""
    return taps[:, None] if taps.dim() == 2 else taps


# --- the plan: which of vortex's tensors come from which of savanna's ----------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    sources: tuple[str, ...]
    compute: Compute | None = None


class _Plan:
    """Recipes under vortex names; collects what is missing and what is there twice."""

    def __init__(self, names: Iterable[str]):
        self.names, self.used = frozenset(names), set[str]()
        self.recipes: dict[str, _Recipe] = {}
        self.missing: list[str] = []
        self.doubled: list[str] = []

    def has(self, layer: int, name: str) -> bool:
        return f"{layer}.{name}" in self.names

    def add(self, theirs: str, layer: int, *sources: str | tuple[str, ...], compute: Compute | None = None) -> None:
        """``theirs`` is ``compute`` of ``sources``, each a name in ``layer``, or several of which it has one."""
        found = []
        for source in sources:
            choices = [f"{layer}.{name}" for name in ((source,) if isinstance(source, str) else source)]
            present = [name for name in choices if name in self.names]
            self.used.update(present)
            if len(present) > 1:
                self.doubled.append(" and ".join(map(show, present)))
            elif not present:
                self.missing.append(show(choices[0]))
            found.extend(present)
        self.recipes[theirs] = _Recipe(tuple(found), compute)

    def check(self, path: Path) -> None:
        """Raises WeightsFormatError that names everything at once."""
        unexpected = [show(n) for n in sorted(self.names - self.used) if not _UNUSED.fullmatch(n)]
        kinds = {"missing": self.missing, "unexpected": unexpected, "twice": self.doubled}
        listed = [
            f"{len(names)} {kind}: {', '.join(names[:SHOWN])}"
            + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            for kind, names in kinds.items()
            if names
        ]
        if listed:
            fix = "are these the configuration and the weights of one model? operator-config, num_layers and "
            fix += "no_weight_tying decide which tensors there are"
            raise WeightsFormatError(
                f"the weights of {path} do not fit its configuration: {'. '.join(listed)}", fix=fix
            )


def _plan(config: ModelConfig, names: Iterable[str]) -> _Plan:
    plan, last = _Plan(names), len(config.blocks) + 3
    plan.add("embedding_layer.weight", 0, "word_embeddings.weight")
    for index, block in enumerate(config.blocks):
        _plan_block(plan, f"blocks.{index}.", index + 2, block)
    plan.add("norm.scale", last, ("norm.weight", "norm.scale"))
    if not config.tie_embeddings:
        plan.add("unembed.weight", last + 1, "final_linear.weight")
    elif plan.has(last + 1, "word_embeddings.weight"):
        plan.add("unembed.weight", last + 1, "word_embeddings.weight")
    return plan


def _plan_block(plan: _Plan, prefix: str, layer: int, block: BlockConfig) -> None:
    for theirs, choices in _BLOCK.items():
        plan.add(prefix + theirs, layer, choices)
    match block.mixer:
        case AttentionConfig() as attention:
            plan.add(f"{prefix}inner_mha_cls.Wqkv.weight", layer, "mixer.dense_projection.weight")
            if attention.qkv_bias:
                plan.add(f"{prefix}inner_mha_cls.Wqkv.bias", layer, "mixer.dense_projection.bias")
            out, has_bias = f"{prefix}inner_mha_cls.out_proj", attention.output_bias
            if attention.rope is not None and plan.has(layer, "mixer.rotary_emb.inv_freq"):
                plan.add(prefix + FREQUENCIES, layer, "mixer.rotary_emb.inv_freq", compute=Tensor.float)
        case HyenaConfig() as hyena:
            _plan_hyena(plan, prefix, layer, hyena)
            out, has_bias = f"{prefix}out_filter_dense", hyena.output_bias
    plan.add(f"{out}.weight", layer, ("mixer.dense.weight", "mixer.o_proj.weight"))
    if has_bias:
        plan.add(f"{out}.bias", layer, ("mixer.dense.bias", "mixer.o_proj.bias"))


def _plan_hyena(plan: _Plan, prefix: str, layer: int, hyena: HyenaConfig) -> None:
    conv, inner = "mixer.hyena_proj_conv.short_conv_", "mixer.mixer.filter."
    plan.add(f"{prefix}projections.weight", layer, "mixer.dense_projection.weight")
    plan.add(f"{prefix}filter.short_filter_weight", layer, f"{conv}weight", compute=_with_axis)
    if hyena.projection_bias:
        plan.add(f"{prefix}projections.bias", layer, "mixer.dense_projection.bias")
    if hyena.short_bias:
        plan.add(f"{prefix}filter.short_filter_bias", layer, f"{conv}bias")
    if hyena.skip:
        plan.add(f"{prefix}filter.D", layer, "mixer.mixer.conv_bias")
    match hyena.filter:
        case ExplicitFilterConfig() if not hyena.skip:
            taps = "mixer.mixer.short_conv.short_conv_weight"
            plan.add(f"{prefix}filter.h", layer, taps, compute=_with_axis)
        case ExplicitFilterConfig(taps=kept) if plan.has(layer, f"{inner}decay"):
            cut = functools.partial(_cut_under_decay, taps=kept)
            plan.add(f"{prefix}filter.h", layer, f"{inner}h", f"{inner}decay", compute=cut)
        case ExplicitFilterConfig(taps=kept):
            plan.add(f"{prefix}filter.h", layer, f"{inner}h", compute=functools.partial(_without_decay, taps=kept))
        case RealModalFilterConfig(modes=modes):
            poles, residues = functools.partial(_log_poles, modes=modes), functools.partial(_residues, modes=modes)
            plan.add(f"{prefix}filter.log_poles", layer, f"{inner}p", f"{inner}gamma", compute=poles)
            plan.add(f"{prefix}filter.residues", layer, f"{inner}R", compute=residues)
        case _:
            # The older of the two parametrisations is in a module called kernel, and was sampled otherwise.
            rule: Rule = "exponential" if plan.has(layer, f"{inner}inner_cls.C") else "bilinear"
            where = f"{inner}{'inner_cls' if rule == 'exponential' else 'kernel'}."
            system = [where + name for name in ("inv_A_real", "A_imag", "log_dt", "B", "C")]
            for wanted in ("poles", "residues"):
                compute = functools.partial(_complex_modes, rule=rule, wanted=wanted)
                plan.add(f"{prefix}filter.{wanted}", layer, *system, compute=compute)


class SavannaSource:
    """Tensors under vortex names, computed from those of savanna as they are read.

    Raises WeightsFormatError if tensors of savanna are missing or left over, or cannot be computed with.
    """

    def __init__(self, path: Path, config: ModelConfig, shards: Shards):
        older = next((name for name in shards.infos if _OLDER.match(name)), None)
        if older is not None:
            raise WeightsFormatError(
                f"{path} is of an older savanna, whose order of rows is not known",
                given=show(older),
                expected="mixer.* in place of attention.*",
            )
        plan = _plan(config, shards.infos)
        plan.check(path)
        self._shards, self._recipes = shards, plan.recipes
        self.infos: Mapping[str, TensorInfo] = {n: self._info(path, n, r) for n, r in plan.recipes.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        recipe = self._recipes[name]
        if recipe.compute is None:
            return self._shards.read(recipe.sources[0], rows)
        computed = recipe.compute(*map(self._shards.read, recipe.sources))
        return computed if rows is None else computed[rows].clone()

    def close(self) -> None:
        self._shards.close()

    def _info(self, path: Path, name: str, recipe: _Recipe) -> TensorInfo:
        infos = [self._shards.infos[source] for source in recipe.sources]
        if recipe.compute is None:
            return infos[0]
        try:
            result = recipe.compute(*(torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos))
        except (ValueError, RuntimeError, IndexError) as error:
            given = "; ".join(
                f"{show(source)} {list(info.shape)}" for source, info in zip(recipe.sources, infos, strict=True)
            )
            raise WeightsFormatError(f"{name} of {path} cannot be computed, {error}", given=given) from error
        return TensorInfo(result.dtype, tuple(result.shape))

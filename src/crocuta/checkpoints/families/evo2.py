"""Evo 2 as published for vortex: one ``.pt`` file, or its parts, beside a ``config.yml``.

The repositories of the models hold no usable configuration, so a file is also known by its published name.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from crocuta.checkpoints.families.evo2_layout import (
    FREQUENCIES,
    TRUE_CONVOLUTION,
    Layout2,
    key_map,
    layout_of,
    model_config,
)
from crocuta.checkpoints.families.fp8_scales import read_scales
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.format import Contents, Format, ReadOptions, TensorSource
from crocuta.checkpoints.settings import find_yaml, peek_settings, read_settings
from crocuta.checkpoints.sources import TorchSource, state_dict_of
from crocuta.checkpoints.torch_save.file import open_torch
from crocuta.config import AttentionConfig, GatedMLPConfig, HyenaConfig, MixerConfig, ModelConfig
from crocuta.errors import CrocutaWarning, WeightsFormatError
from crocuta.presets import preset
from crocuta.published import FP8, Published, published_of_file
from crocuta.tokenizers.foreign import byte_tokenizer

UNIT_MULTIPLE: Final = 16
"""A sliced MLP keeps a width that matrix units like."""
_ROWS_AT_ONCE: Final = 256
_SCALES: Final = "projections._extra_state"


# --- what the file itself decides ------------------------------------------------------------------------------


class Scaled:
    """A source that gives the scales of FP8 projections as tensors; they are in pickles of Transformer Engine."""

    def __init__(self, source: TensorSource, scales: Mapping[str, Tensor]):
        self._source, self._scales = source, scales
        given = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in scales.items()}
        self.infos: Mapping[str, TensorInfo] = {**source.infos, **given}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._scales[name].clone() if name in self._scales else self._source.read(name, rows)

    def close(self) -> None:
        self._source.close()


def contents_of(
    path: Path,
    config: ModelConfig,
    layout: Layout2,
    source: TensorSource,
    extras: Mapping[str, Any],
    options: ReadOptions,
) -> Contents:
    """The checkpoint, after what only the weights tell: stored frequencies, scales of FP8, padding of MLPs."""
    config = _with_skips(path, _with_rope(config, source), source)
    if options.fp8 == "off":
        config = without_fp8(config)
    else:
        source = Scaled(source, _scales(path, config, source, extras))
    padded = None
    if not options.keep_padding:
        config, padded = _without_padding(config, source)
    return Contents(config, source, byte_tokenizer(config.vocab_size), key_map(config, layout, padded))


def _replace_mixers(config: ModelConfig, change: Callable[[int, MixerConfig], MixerConfig]) -> ModelConfig:
    blocks = tuple(dataclasses.replace(b, mixer=change(i, b.mixer)) for i, b in enumerate(config.blocks))
    return dataclasses.replace(config, blocks=blocks)


def _with_rope(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """Frequencies are computed from the base where the file has none."""

    def change(index: int, mixer: MixerConfig) -> MixerConfig:
        if not isinstance(mixer, AttentionConfig) or mixer.rope is None:
            return mixer
        stored = f"blocks.{index}.{FREQUENCIES}" in source.infos
        return dataclasses.replace(mixer, rope=dataclasses.replace(mixer.rope, stored=stored))

    return _replace_mixers(config, change)


def _with_skips(path: Path, config: ModelConfig, source: TensorSource) -> ModelConfig:
    """A D beside few taps: Hyena-MR of a model trained so, which vortex runs as Hyena-SE and gets wrong."""
    found: list[int] = []

    def change(index: int, mixer: MixerConfig) -> MixerConfig:
        if not isinstance(mixer, HyenaConfig) or mixer.skip or f"blocks.{index}.filter.D" not in source.infos:
            return mixer
        found.append(index)
        return dataclasses.replace(mixer, skip=True)

    config = _replace_mixers(config, change)
    if found:
        warnings.warn(
            f"{path} has filter.D beside fewer than {TRUE_CONVOLUTION} taps in blocks {found}: computed as trained, a "
            "convolution with D; vortex leaves D out and turns the taps round",
            CrocutaWarning,
            stacklevel=2,
        )
    return config


def without_fp8(config: ModelConfig) -> ModelConfig:
    """``config`` with projections in the model's dtype, marked unverified if that is another model."""

    def change(_: int, mixer: MixerConfig) -> MixerConfig:
        return dataclasses.replace(mixer, fp8_projection=False) if isinstance(mixer, HyenaConfig) else mixer

    changed = _replace_mixers(config, change)
    if changed == config:
        return config
    note = "trained through FP8 projections, which are off: outputs differ from the published model's"
    return dataclasses.replace(changed, unverified=note)


def with_published_fp8(path: Path, config: ModelConfig, fp8: FP8, extras: Mapping[str, Any]) -> ModelConfig:
    """``config`` of a checkpoint known by its name, with FP8 projections if it needs them, or has their scales.

    Models for which FP8 is optional are published to run in bfloat16 too.
    """

    def change(_: int, mixer: MixerConfig) -> MixerConfig:
        return dataclasses.replace(mixer, fp8_projection=True) if isinstance(mixer, HyenaConfig) else mixer

    states = ((name, state) for name, state in extras.items() if name.endswith(_SCALES))
    if fp8 == "required" or (
        fp8 == "optional" and any(read_scales(f"{name} of {path}", state) is not None for name, state in states)
    ):
        return _replace_mixers(config, change)
    return config


def _scales(path: Path, config: ModelConfig, source: TensorSource, extras: Mapping[str, Any]) -> dict[str, Tensor]:
    scales: dict[str, Tensor] = {}
    missing = []
    for index, block in enumerate(config.blocks):
        if isinstance(block.mixer, HyenaConfig) and block.mixer.fp8_projection:
            name = f"blocks.{index}.{_SCALES}"
            blob = source.read(name) if name in source.infos else extras.get(name)
            found = read_scales(f"{name} of {path}", blob)
            if found is None:
                missing.append(name)
            else:
                for kind, value in zip(("input_scale", "weight_scale"), found, strict=True):
                    scales[f"blocks.{index}.projections.{kind}"] = value
    if missing:
        raise WeightsFormatError(
            f"{path} lacks the FP8 scales that its projections were trained with",
            given=f"nothing in {len(missing)} places, first {missing[0]}",
            fix="load it with fp8='off' to compute in the model's dtype, which marks the model as unverified",
        )
    return scales


def _without_padding(config: ModelConfig, source: TensorSource) -> tuple[ModelConfig, int | None]:
    """``config`` without the trailing MLP units that are zero in every layer, and the width with them."""
    widths = {block.mlp.intermediate_size for block in config.blocks if isinstance(block.mlp, GatedMLPConfig)}
    if len(widths) != 1:
        return config, None
    whole, kept = widths.pop(), 0
    for index in range(len(config.blocks)):
        kept = max(kept, _used_units(source, f"blocks.{index}.mlp.", whole))
        if kept > whole - UNIT_MULTIPLE:
            return config, None
    kept = max(UNIT_MULTIPLE, -(-kept // UNIT_MULTIPLE) * UNIT_MULTIPLE)
    blocks = tuple(
        dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, intermediate_size=kept))
        for block in config.blocks
        if isinstance(block.mlp, GatedMLPConfig)
    )
    return dataclasses.replace(config, blocks=blocks), whole


def _used_units(source: TensorSource, prefix: str, whole: int) -> int:
    """One more than the last unit whose row is not zero in both gate and up.

    Such a unit gives zero, and no gradient reaches it, whatever ``down`` multiplies it with.
    """
    used = 0
    for name in ("l1", "l2"):
        key = f"{prefix}{name}.weight"
        if key not in source.infos or source.infos[key].shape[:1] != (whole,):
            return whole  # reported with all other misfits
        end = whole
        while end > used:
            begin = max(used, end - _ROWS_AT_ONCE)
            nonzero = source.read(key, slice(begin, end)).ne(0).any(1).nonzero()
            if len(nonzero):
                used = begin + int(nonzero[-1]) + 1
                break
            end = begin
    return used


# --- files -----------------------------------------------------------------------------------------------------

_PART = re.compile(r"(?P<stem>.+)\.pt\.part(?P<number>\d+)")


def weights_of(path: Path) -> list[Path]:
    """The one .pt file of a folder, or the parts of it in their order; or the file that ``path`` is. Maybe none."""
    if path.is_file():
        parts = _PART.fullmatch(path.name)
        if parts is None:
            return [path] if path.suffix == ".pt" else []
        return _parts(path.parent, parts["stem"])
    if not path.is_dir():
        return []
    whole = sorted(file for file in path.glob("*.pt") if file.is_file())
    stems = {match["stem"] for file in path.glob("*.pt.part*") if (match := _PART.fullmatch(file.name))}
    if len(whole) == 1 and stems <= {whole[0].stem}:  # merged, and the parts still there
        return whole
    return _parts(path, stems.pop()) if not whole and len(stems) == 1 else []


def _parts(folder: Path, stem: str) -> list[Path]:
    found = {}
    for file in folder.glob("*.pt.part*"):
        match = _PART.fullmatch(file.name)
        if match and match["stem"] == stem:
            found[int(match["number"])] = file
    if sorted(found) != list(range(len(found))):
        raise WeightsFormatError(
            f"parts of {folder / stem}.pt are missing", given=f"numbers {sorted(found)}", expected="0, 1, 2 and so on"
        )
    return [found[number] for number in range(len(found))]


def _known(path: Path, weights: list[Path]) -> Published | None:
    """The published checkpoint that the file is called after, or that the repository's config.json names."""
    name = peek_settings((path if path.is_dir() else path.parent) / "config.json").get("_name_or_path")
    return published_of_file(weights[0].name) or (published_of_file(name) if isinstance(name, str) else None)


def _yaml(path: Path) -> Path | None:
    return find_yaml(path if path.is_dir() else path.parent)


def _detect(path: Path) -> bool:
    try:
        weights = weights_of(path)
    except WeightsFormatError:
        weights = [path]
    if not weights:
        return False
    yaml = _yaml(path)
    if yaml is not None and "hcl_layer_idxs" in peek_settings(yaml):
        return True
    known = _known(path, weights)
    return known is not None and known.layout == "evo2"


def _read(path: Path, options: ReadOptions) -> Contents:
    weights = weights_of(path)
    yaml = _yaml(path)
    fp8: FP8 = "no"
    if yaml is not None and "hcl_layer_idxs" in peek_settings(yaml):
        settings = read_settings(yaml)
        config, layout = model_config(settings), layout_of(settings)
        known = None if settings.has("use_fp8_input_projections") else published_of_file(weights[0].name)
        fp8 = "no" if known is None else known.fp8
    else:
        known = _known(path, weights)
        assert known is not None
        config, layout = preset(known.preset), Layout2()
        fp8 = known.fp8
    file = open_torch(weights)
    try:
        source = TorchSource(file, state_dict_of(weights[0], file.tree, "state_dict", "module"))
        config = with_published_fp8(path, config, fp8, source.extras)
        return contents_of(path, config, layout, source, source.extras, options)
    except BaseException:
        file.close()
        raise


EVO2: Final = Format(
    name="evo2",
    looks_for=".pt or parts, hcl_layer_idxs in config.yml or a published name",
    detect=_detect,
    read=_read,
)

"""From a path to a model: find the format, build on meta, fill tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.format import Format, TensorSource
from crocuta.checkpoints.native import NATIVE, check_vocabulary
from crocuta.config import ModelConfig
from crocuta.errors import ConfigError, InputError, WeightsFormatError
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.tokenizers.base import Tokenizer

FORMATS: Final[tuple[Format, ...]] = (NATIVE,)
"""Tried in this order: the only line to edit to add a format."""

DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 20


def load(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Model, Tokenizer | None]:
    """The model at ``path``, in evaluation mode, and its tokenizer if it has one.

    ``dtype`` None keeps every weight as it was stored, bit for bit; another casts all that may be cast (filters
    stay in float32). Takes the memory of one model and one tensor.

    Raises:
        InputError: there is nothing at ``path``, or ``dtype`` is not one for weights.
        WeightsFormatError: no known format; or a broken file; or missing, unexpected, misshapen or non-finite
            weights, all named.
        ConfigError: the configuration describes no model.
        TokenizerError: the tokenizer is broken, or larger than the model's vocabulary.
    """
    path = Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise InputError("cannot load weights as this dtype", given=dtype, expected=", ".join(map(str, DTYPES)))
    config, tensors, tokenizer = find_format(path).read(path)
    try:
        check_vocabulary(config, tokenizer, path)
        model = _build(path, config)
        # A parameter that stays wide in a bfloat16 model may not be narrow in a file either.
        floors = _infos(model.to(torch.bfloat16))
        _check(path, tensors, floors)
        targets = floors if dtype is None else _infos(model.to(dtype))
        filled: dict[str, Tensor] = {}
        for name in tensors.infos:
            filled[name] = _read(path, tensors, name, None if dtype is None else targets[name].dtype).to(device)
    finally:
        tensors.close()
    model.load_state_dict(filled, strict=True, assign=True)
    return model.eval(), tokenizer


def find_format(path: Path) -> Format:
    """The format of the checkpoint at ``path``.

    Raises:
        InputError: there is nothing at ``path``.
        WeightsFormatError: no format knows it; the message says what was looked for.
    """
    if not path.exists():
        raise InputError("no such file or folder", given=path, expected="a saved model", fix="check the path")
    for format_ in FORMATS:
        if format_.detect(path):
            return format_
    looked_for = "; or ".join(f"{format_.name}: {format_.looks_for}" for format_ in FORMATS)
    fix = None if path.is_dir() else "give the folder that the file is in"
    raise WeightsFormatError(f"{path} is no checkpoint of a known format", expected=looked_for, fix=fix)


def _build(path: Path, config: ModelConfig) -> Model:
    try:
        return build_model(config, device="meta")
    except RuntimeError as error:  # torch refuses sizes beyond 2^63
        raise ConfigError(f"the model of {path} cannot be built", given=error) from error


def _infos(model: Model) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}


def _check(path: Path, tensors: TensorSource, floors: dict[str, TensorInfo]) -> None:
    """Compare names, shapes and kinds of all tensors before any is read."""
    found = tensors.infos
    shared = found.keys() & floors.keys()
    shapes = [
        f"{name} has shape {list(found[name].shape)}, expected {list(floors[name].shape)}"
        for name in shared
        if found[name].shape != floors[name].shape
    ]
    kinds = [
        f"{name} is {found[name].dtype}, expected {_kind(floors[name].dtype)}"
        for name in shared
        if not _acceptable(found[name].dtype, floors[name].dtype)
    ]
    problems = (
        _summary("missing", floors.keys() - found.keys()),
        _summary("unexpected", found.keys() - floors.keys()),
        _summary("misshapen", shapes),
        _summary("of the wrong dtype", kinds),
    )
    if any(problems):
        text = ". ".join(filter(None, problems))
        fix = "are these the configuration and the weights of one model?"
        raise WeightsFormatError(f"the weights of {path} do not fit its configuration: {text}", fix=fix)


def _summary(what: str, items: Iterable[str]) -> str:
    items = sorted(items)
    rest = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:_SHOWN])}{rest}" if items else ""


def _acceptable(found: torch.dtype, floor: torch.dtype) -> bool:
    if not floor.is_floating_point:
        return found == floor
    return found.is_floating_point and found.itemsize >= floor.itemsize


def _kind(floor: torch.dtype) -> str:
    return f"floating point of at least {8 * floor.itemsize} bits" if floor.is_floating_point else str(floor)


def _read(path: Path, tensors: TensorSource, name: str, dtype: torch.dtype | None) -> Tensor:
    values = tensors.read(name)
    if not bool(torch.isfinite(values).all()):
        raise WeightsFormatError(f"{name} of {path} has NaN or infinite values", expected="finite weights")
    if dtype is None:
        return values
    cast = values.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        fix = "load it in a wider dtype"
        raise WeightsFormatError(f"{name} of {path} overflows", given=dtype, expected="finite weights", fix=fix)
    return cast

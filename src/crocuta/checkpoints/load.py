"""From a path to a model: find the format, build on meta, fill tensor by tensor."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from crocuta.checkpoints.families import evo2, hyenadna, savanna, stripedhyena
from crocuta.checkpoints.files import TensorInfo, all_finite
from crocuta.checkpoints.format import Contents, FilterLayout, Format, ReadOptions, TensorSource
from crocuta.checkpoints.hub import looks_like_hub_name, resolve
from crocuta.checkpoints.keymap import SHOWN, Entry, KeyMap
from crocuta.checkpoints.native import NATIVE, check_vocabulary
from crocuta.checkpoints.settings import find_yaml, read_settings
from crocuta.config import BackboneConfig, EncoderConfig, ModelConfig
from crocuta.errors import ConfigError, CrocutaWarning, InputError, WeightsFormatError
from crocuta.model.build import build_encoder, build_model
from crocuta.model.encoder import Encoder
from crocuta.model.filters import Filter, ModalFilter
from crocuta.model.linear import Embedding, Linear
from crocuta.model.lm import Model
from crocuta.published import nearest_published
from crocuta.tokenizers.base import Tokenizer

FORMATS: Final[tuple[Format, ...]] = (
    NATIVE,
    stripedhyena.STANDALONE,
    stripedhyena.HUGGING_FACE,
    evo2.EVO2,
    hyenadna.LIGHTNING,
    hyenadna.HUGGING_FACE,
    savanna.SAVANNA,
)
"""Each is asked whether it knows a path, and one must: the only line to edit to add a format."""

_FEW_BLOCKS: Final = 64
DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    fp8: Literal["auto", "off"] = "auto",
    precision: Literal["exact", "upstream"] | None = None,
    keep_padding: bool = False,
    filter_layout: FilterLayout | None = None,
    unstable: Literal["warn", "refuse"] = "warn",
    revision: str | None = None,
) -> tuple[Model, Tokenizer | None]:
    """The model at ``path``, in evaluation mode, and its tokenizer if it has one.

    ``path`` is a folder or a weights file, of our own or of a published layout; or, where there is no such path, the
    name of a published checkpoint, which is taken from the Hugging Face cache or downloaded there.
    Takes the memory of one model and one tensor.

    Args:
        dtype: None keeps every weight as it was stored, bit for bit, except that all matrices get the embedding's
            dtype; another casts all that may be cast (filters stay in float32).
        fp8: "auto" computes projections that were trained through E4M3 as they were trained, and refuses a
            checkpoint without their scales; "off" computes them in the model's dtype and marks the model unverified.
        precision: "upstream" rounds where the published code rounds, see ``ModelConfig.precision``; None: as a model of
            ours was saved, "exact" for all others.
        keep_padding: keep the units of gated MLPs that were added as zeros (Evo 2, 1M context); else they are
            sliced away, which changes no output.
        filter_layout: which code trained a HyenaDNA or safari model of order 3 or above, as its weights are another
            function in each: "interleaved" (the training code of both) or "by_convolution" (their standalone files).
            None refuses such a model; no other asks.
        unstable: what to do about filters whose poles are not inside the unit circle: warn, or refuse.
        revision: branch, tag or commit of a name; None: the pinned one.

    Raises:
        InputError: there is nothing at ``path`` and nothing of that name, or ``dtype`` is not one for weights.
        MissingExtraError: a name, without the package huggingface_hub.
        WeightsFormatError: no known format, or several; or a broken file; or missing, unexpected, misshapen or
            non-finite weights, all named; or poles with |p| >= 1 where these are refused.
        ConfigError: the configuration describes no model, or several, and no ``filter_layout`` says which.
        TokenizerError: the tokenizer is broken, or larger than the model's vocabulary.
    """
    options = ReadOptions(fp8=fp8, keep_padding=keep_padding, filter_layout=filter_layout)
    return _load(path, device, dtype, options, precision, unstable, revision)


def load_encoder(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Encoder, Tokenizer | None]:
    """The encoder that ``crocuta.save`` wrote to ``path``, in evaluation mode, and its tokenizer if it has one.

    ``device`` and ``dtype`` as in ``load``, and so are the errors; InputError also for a folder that holds a model.
    """
    _check_dtype(dtype)
    _check_device(device)
    path = find_path(path)
    contents = find_format(path).read(path, ReadOptions())
    try:
        if not isinstance(contents.config, EncoderConfig):
            fix = "use crocuta.load, and crocuta.encoder_from to make an encoder of it"
            raise InputError(f"{path} is not an encoder", given="a model", fix=fix)
        encoder = _fill(path, contents, device, dtype, uniform=True)
    finally:
        contents.tensors.close()
    assert isinstance(encoder, Encoder)
    return encoder.eval(), contents.tokenizer


def load_stored(
    path: str | Path,
    *,
    dtype: torch.dtype | None,
    fp8: Literal["auto", "off"],
    keep_padding: bool,
    filter_layout: FilterLayout | None,
) -> tuple[Model, Tokenizer | None]:
    """``load`` with every matrix in the dtype that it was stored in: to be written again, not always to be run."""
    options = ReadOptions(fp8=fp8, keep_padding=keep_padding, filter_layout=filter_layout)
    return _load(path, "cpu", dtype, options, None, "warn", None, uniform=False)


def _load(
    path: str | Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
    options: ReadOptions,
    precision: Literal["exact", "upstream"] | None,
    unstable: Literal["warn", "refuse"],
    revision: str | None,
    *,
    uniform: bool = True,
) -> tuple[Model, Tokenizer | None]:
    _check_dtype(dtype)
    for name, value, known in (
        ("fp8", options.fp8, ("auto", "off")),
        ("precision", precision or "exact", ("exact", "upstream")),
        (
            "filter_layout",
            "interleaved" if options.filter_layout is None else options.filter_layout,
            get_args(FilterLayout),
        ),
        ("unstable", unstable, ("warn", "refuse")),
    ):
        if value not in known:
            raise InputError(f"{name} is unknown", given=repr(value), expected=" or ".join(map(repr, known)))
    _check_device(device)
    path = find_path(path, revision)
    contents = find_format(path).read(path, options)
    try:
        config = contents.config
        if not isinstance(config, ModelConfig):
            raise InputError(f"{path} is not a model", given="an encoder", fix="use crocuta.load_encoder")
        if options.fp8 == "off":
            config = evo2.without_fp8(config)
        if precision is not None:
            config = dataclasses.replace(config, precision=precision)
        model = _fill(path, contents._replace(config=config), device, dtype, uniform=uniform)
    finally:
        contents.tensors.close()
    assert isinstance(model, Model)
    _check_poles(path, model, unstable)
    return model.eval(), contents.tokenizer


def find_path(path: str | Path, revision: str | None = None) -> Path:
    """``path`` itself, or the folder of the published checkpoint that it names. Raises as ``load``."""
    try:
        there = Path(path).exists()
    except (TypeError, ValueError, OSError) as error:
        raise InputError("no path and no name", given=f"{type(path).__name__}, {error}", expected="a folder") from error
    if there and revision is not None:
        raise InputError(f"{path} is a path, which has no revisions", given=revision, fix="leave revision out")
    return Path(path) if there or not looks_like_hub_name(str(path)) else resolve(str(path), revision=revision)


def find_format(path: Path) -> Format:
    """The format of the checkpoint at ``path``.

    Raises:
        InputError: there is nothing at ``path``.
        WeightsFormatError: no format knows it, or several do; the message says what was looked for.
        ConfigError: its config.json or config.yml is broken. MissingExtraError: a config.yml, without PyYAML.
    """
    if not path.exists():
        near = nearest_published(str(path))
        fix = "check the path" + (f", or did you mean {near!r}?" if near else "")
        raise InputError("no such file or folder", given=path, expected="a saved model", fix=fix)
    found = [format_ for format_ in FORMATS if format_.detect(path)]
    if len(found) == 1:
        return found[0]
    if path.is_dir() and not found:
        for settings in filter(None, (path / "config.json", find_yaml(path))):
            if settings.is_file():
                read_settings(settings)  # what is wrong with it, if anything, is why no format knows the folder
    looked_for = "; ".join(f"{format_.name}: {format_.looks_for}" for format_ in found or FORMATS)
    if found:
        fix = "keep the files of one checkpoint in the folder"
        raise WeightsFormatError(f"{path} fits {len(found)} formats", given=looked_for, expected="one", fix=fix)
    hint = None if path.is_dir() else "give the folder that the file is in"
    raise WeightsFormatError(f"{path} is no known checkpoint", expected=looked_for, fix=hint)


def _fill(
    path: Path,
    contents: Contents,
    device: str | torch.device,
    dtype: torch.dtype | None,
    *,
    uniform: bool,
) -> Model | Encoder:
    """Build the model on meta, check every name and shape, then read tensor by tensor."""
    config, tensors, tokenizer, _ = contents
    check_vocabulary(config, tokenizer, path)
    if len(config.blocks) > max(_FEW_BLOCKS, len(tensors.infos)):  # building them all would take its time
        given, expected = f"{len(tensors.infos)} tensors", f"more than the {len(config.blocks)} blocks configured"
        raise WeightsFormatError(f"the weights of {path} do not fit its configuration", given=given, expected=expected)
    model = _build(path, config)
    # A parameter that stays wide in a bfloat16 model may not be narrow in a file either.
    floors = _infos(model.to(torch.bfloat16))
    targets = {} if dtype is None else {name: info.dtype for name, info in _infos(model.to(dtype)).items()}
    key_map = contents.key_map or _own_names(config, floors)
    key_map.check(path, tensors.infos, floors)
    if dtype is None and uniform:
        targets = _common_dtypes(model, key_map, tensors)
    entries = {entry.theirs: entry for entry in key_map.entries}
    filled: dict[str, Tensor] = {}
    for name in tensors.infos:
        if name in entries:
            ours = entries[name].ours
            values = _read(path, tensors, entries[name], floors[ours].dtype, targets.get(ours))
            filled[ours] = values.to(device)
    for copy, original in key_map.copies.items():
        if copy in tensors.infos and not torch.equal(tensors.read(copy), tensors.read(original)):
            raise WeightsFormatError(
                f"{copy} of {path} differs from {original}",
                expected="the same values, as the configuration ties the two",
                fix="is tie_embeddings of the configuration right?" if "embed" in original else None,
            )
    model.load_state_dict(filled, strict=True, assign=True)
    return model


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError("cannot load weights as this dtype", given=dtype, expected=", ".join(map(str, DTYPES)))


def _check_device(device: str | torch.device) -> None:
    """Before anything is read: a device that is there and holds values."""
    try:
        if torch.empty(1, device=device).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # of torch, by device
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            "cannot load to this device", given=f"{device!r}: {reason[:100]}", expected="a device"
        ) from error


def _own_names(config: BackboneConfig, names: Iterable[str]) -> KeyMap:
    """The key map of our own layout; where FP8 was turned off, the scales that it no longer needs may be there."""
    off = isinstance(config, ModelConfig) and bool(config.unverified)
    junk = (r".*\.projection\.(input|weight)_scale",) if off else ()
    return KeyMap(tuple(Entry(name, name) for name in names), junk=junk)


def _build(path: Path, config: BackboneConfig) -> Model | Encoder:
    try:
        match config:
            case ModelConfig():
                return build_model(config, device="meta")
            case EncoderConfig():
                return build_encoder(config, device="meta")
    except RuntimeError as error:  # torch refuses sizes beyond 2^63
        raise ConfigError(f"the model of {path} cannot be built", given=error) from error


def _infos(model: Model | Encoder) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}


def _common_dtypes(model: Model | Encoder, key_map: KeyMap, tensors: TensorSource) -> dict[str, torch.dtype]:
    """The embedding's dtype for every matrix: in a product both sides must have one dtype.

    Published files keep some matrices wider than the rest (evo2_20b); those of FP8 projections are rounded from what is
    stored, and may.
    """
    stored = {entry.ours: tensors.infos[entry.theirs].dtype for entry in key_map.entries}
    in_filters = {module for filter_ in model.modules() if isinstance(filter_, Filter) for module in filter_.modules()}
    plain = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding) and module not in in_filters
        for key, _ in module.named_parameters(recurse=False)
    }
    common = stored.get("embedding.weight", stored["norm.scale"])
    return {name: common for name in plain & stored.keys()}


def _read(path: Path, tensors: TensorSource, entry: Entry, floor: torch.dtype, dtype: torch.dtype | None) -> Tensor:
    values = tensors.read(entry.theirs)
    if not all_finite(values):
        raise WeightsFormatError(f"{entry.theirs} of {path} has NaN or infinite values", expected="finite weights")
    if dtype is None:
        dtype = torch.promote_types(values.dtype, floor) if entry.wide else values.dtype
    narrower = values.is_floating_point() and torch.finfo(dtype).max < torch.finfo(values.dtype).max
    # Moving and casting in one step: the values exist twice, and never three times.
    values = entry.load(values).to(dtype).contiguous()
    if narrower and not all_finite(values):
        fix = "load it in a wider dtype"
        raise WeightsFormatError(f"{entry.theirs} of {path} overflows", given=dtype, expected="finite weights", fix=fix)
    return values


def _check_poles(path: Path, model: Model, unstable: Literal["warn", "refuse"]) -> None:
    """One message about all filters that grow without bound."""
    named = []
    for name, module in model.named_modules():
        if isinstance(module, ModalFilter):
            for row in module.unstable_rows():
                named.append(f"{name} channel {row}")
    if not named:
        return
    rest = f", and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    text = f"{path} has poles outside the open unit disc, |p| >= 1: {', '.join(named[:SHOWN])}{rest}"
    if unstable == "refuse":
        raise WeightsFormatError(text, expected="|p| < 1", fix="load it with unstable='warn' to go on regardless")
    warnings.warn(f"{text}; their filters never fade, and long inputs may overflow", CrocutaWarning, stacklevel=3)

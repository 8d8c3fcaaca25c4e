"""Our own model folder: ``config.json``, ``model.safetensors``, the tokenizer's files, and a manifest of these.

The folder may hold other files, which stay: a run folder has metrics and samples. So a save cannot rename the whole
folder into place. It commits a sealed sub-folder ``.incoming`` instead, then puts its files in place one by one;
until that is done, readers take ``.incoming`` for the model, and the next save finishes what was begun.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from crocuta.checkpoints import commit
from crocuta.checkpoints.commit import MANIFEST
from crocuta.checkpoints.files import all_finite, open_tensors, write_tensors
from crocuta.checkpoints.format import Contents, Format
from crocuta.checkpoints.strict import read_small, strict_json
from crocuta.config import BackboneConfig, EncoderConfig, ModelConfig
from crocuta.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NonFiniteError,
    TokenizerError,
    WeightsFormatError,
)
from crocuta.model.encoder import Encoder
from crocuta.model.lm import Model
from crocuta.model.lora import lora_layers
from crocuta.tokenizers.base import CONFIG_FILE as TOKENIZER_FILE
from crocuta.tokenizers.base import Tokenizer
from crocuta.tokenizers.load import load_tokenizer

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INCOMING: Final = ".incoming"
_HEADER = {"format": "crocuta", "version": 1}
_KIND: Final = "kind"
"""Says "encoder" of one; a model has none."""


def save(model: Model | Encoder, tokenizer: Tokenizer | None, path: str | Path) -> None:
    """Write ``model``, and its tokenizer, as the folder ``path``; after a crash it holds the old model or the new.

    An encoder is saved in the same way, and read by ``crocuta.load_encoder``.

    An earlier model in the folder is replaced, whole; all other files stay. Tied weights are stored once.

    Raises:
        InputError: ``path`` is a file, or has files of these names that are not a model of ours; or there are adapters.
        NonFiniteError: a weight is NaN or infinite.
        TokenizerError: the tokenizer has more ids than the model.
        CheckpointError: the disk refused; the folder holds the old model or the new one, whole.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot save a model to {folder}", given="a file", expected="a folder, or a new name")
    check_vocabulary(model.config, tokenizer, folder)
    if lora_layers(model):
        fix = "merge_lora first, or write them alone by save_adapter"
        raise InputError(f"the model for {folder} has adapters, which its configuration cannot say", fix=fix)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise NonFiniteError(f"{name} has NaN or infinite values", fix=f"nothing was saved to {folder}")
    kind = {_KIND: "encoder"} if isinstance(model, Encoder) else {}
    text = json.dumps({**_HEADER, **kind, **model.config.to_json()}, indent=2) + "\n"
    commit.make_folders(folder)
    _finish(folder)
    commit.remove_unfinished(folder, INCOMING)

    def write(incoming: Path) -> None:
        write_tensors(incoming / WEIGHTS, tensors, {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(incoming)
        commit.replace_file(incoming / CONFIG, text.encode())
        _check_ours(folder, sorted(os.listdir(incoming)))

    commit.write_folder(folder / INCOMING, write)
    _finish(folder)


def read(path: str | Path) -> Contents:
    """Configuration, lazy tensors and tokenizer of a model folder, after checking every file's hash.

    A folder without a manifest, put together by hand, is read unchecked.

    Raises:
        WeightsFormatError: a file is missing, broken, or differs from the manifest.
        ConfigError: config.json describes no model.
        TokenizerError: the tokenizer is broken.
    """
    folder = Path(path)
    if (folder / INCOMING).is_dir():
        folder = folder / INCOMING
    seal = _seal_of(folder)
    tensors = open_tensors(folder / WEIGHTS)
    try:
        names = os.listdir(folder) if seal is None else _verify(folder)
        config = read_config(folder)
        tokenizer = load_tokenizer(folder) if TOKENIZER_FILE in names else None
        if _seal_of(folder) != seal:
            raise WeightsFormatError(f"{folder} was saved to while it was read", fix="load it again")
    except BaseException:
        tensors.close()
        raise
    return Contents(config, tensors, tokenizer)


def read_config(path: str | Path) -> BackboneConfig:
    """The configuration of a model folder, or of a config.json itself.

    Raises:
        WeightsFormatError: the file is unreadable, not ours, or of a version that is not known here.
        ConfigError: it describes no model; the message names the file and the field.
    """
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    value = _read_object(file)
    header = {key: value.pop(key, None) for key in _HEADER}
    if header != _HEADER:
        raise WeightsFormatError(
            f"{file} is of another format", given=header, expected=_HEADER, fix="a newer crocuta may read it"
        )
    kind = value.pop(_KIND, None)
    if kind not in (None, "encoder"):
        raise WeightsFormatError(f"{file} is of an unknown kind", given=kind, expected="a model, or encoder")
    try:
        return ModelConfig.from_json(value) if kind is None else EncoderConfig.from_json(value)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.what}", given=error.given, expected=error.expected, fix=error.fix) from error


def check_vocabulary(config: BackboneConfig, tokenizer: Tokenizer | None, path: Path) -> None:
    """TokenizerError if ``tokenizer`` has ids that the model lacks."""
    size = config.vocab_size or 0
    if tokenizer is not None and tokenizer.vocab_size > size:
        raise TokenizerError(
            f"the tokenizer does not fit the model of {path}",
            given=f"a tokenizer with vocab_size={tokenizer.vocab_size}",
            expected=f"at most the model's vocab_size={size}",
            fix="use the tokenizer that the model was trained with",
        )


def _detect(path: Path) -> bool:
    if (path / INCOMING).is_dir():
        return True
    return (path / CONFIG).is_file() and _read_object(path / CONFIG).get("format") == _HEADER["format"]


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = strict_json(read_small(file, WeightsFormatError))
    except ValueError as error:
        if isinstance(error, WeightsFormatError):
            raise
        raise WeightsFormatError(f"{file} is not strict JSON", given=error) from error
    if not isinstance(value, dict):
        raise WeightsFormatError(f"{file} must hold a JSON object", given=type(value).__name__)
    return value


def _seal_of(folder: Path) -> bytes | None:
    return read_small(folder / MANIFEST, WeightsFormatError) if (folder / MANIFEST).exists() else None


def _verify(folder: Path) -> tuple[str, ...]:
    try:
        return commit.verify_folder(folder, allow_extra=True)
    except CheckpointError as error:
        fix = f"save again, or remove {MANIFEST} if you changed the files on purpose"
        raise WeightsFormatError(error.what, given=error.given, expected=error.expected, fix=fix) from error


# --- putting a save in place -----------------------------------------------------------------------------------


def _check_ours(folder: Path, names: list[str]) -> None:
    """Refuse to overwrite files of a folder that holds no model of ours."""
    taken = [name for name in (*names, MANIFEST) if os.path.lexists(folder / name)]
    if taken and not _detect(folder):
        raise InputError(
            f"{folder} has files that are not a crocuta model",
            given=", ".join(taken),
            expected=f"none of these names, or a {CONFIG} of ours",
            fix="save to another folder",
        )


def _finish(folder: Path) -> None:
    """Put the files of a committed ``.incoming`` in place; may be repeated after a crash at any point."""
    incoming = folder / INCOMING
    if not incoming.is_dir():
        return
    names = commit.read_manifest(incoming).keys()
    with commit.reporting_writes(folder):
        for stale in _owned(folder) - names:
            if os.path.lexists(folder / stale):
                commit.disk.remove(folder / stale)
        # The manifest last: until then the old one still tells which files are stale.
        for name in (*sorted(names, key=lambda name: name == CONFIG), MANIFEST):
            _place(incoming / name, folder / name)
        commit.disk.sync_path(folder)
        doomed = commit.temporary_path(incoming)
        commit.disk.rename(incoming, doomed)
        commit.disk.sync_path(folder)  # else a power cut could bring back the name of a half-removed folder
        commit.disk.remove_tree(doomed)


def _owned(folder: Path) -> set[str]:
    try:
        return set(commit.read_manifest(folder))
    except CheckpointError:  # none, or a damaged one that is about to be replaced
        return set()


def _place(source: Path, target: Path) -> None:
    temporary = commit.temporary_path(target.with_name(INCOMING))
    try:
        commit.disk.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
        commit.disk.sync_path(temporary)
    commit.disk.rename(temporary, target)


NATIVE: Final = Format(
    name="crocuta",
    looks_for=f'"format": "crocuta" in {CONFIG}',
    detect=_detect,
    read=lambda path, _: read(path),
)

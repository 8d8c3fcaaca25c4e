"""Where published checkpoints keep their weights: safetensors in one or many files, and files of torch.save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from crocuta.checkpoints.files import TensorFile, TensorInfo, open_tensors
from crocuta.checkpoints.format import TensorSource
from crocuta.checkpoints.strict import read_small, strict_json
from crocuta.checkpoints.torch_save.file import TensorRef, TorchFile, open_torch
from crocuta.errors import WeightsFormatError

SAFETENSORS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLED: Final = "pytorch_model.bin"
MAX_SHARDS: Final = 1000
_SMALL: Final = 4096


class SafetensorsSource:
    """The tensors of one or more safetensors files, which share no name."""

    def __init__(self, paths: list[Path]):
        self._files: list[TensorFile] = []
        self._home: dict[str, TensorFile] = {}
        try:
            for path in paths:
                file = open_tensors(path)
                self._files.append(file)
                for name in file.infos:
                    if name in self._home:
                        raise WeightsFormatError(f"{name} is both in {self._home[name].path} and in {path}")
                    self._home[name] = file
        except BaseException:
            self.close()
            raise
        self.infos: Mapping[str, TensorInfo] = {name: file.infos[name] for name, file in self._home.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._home[name].read(name, rows)

    def close(self) -> None:
        for file in self._files:
            file.close()


def has_hugging_face_weights(folder: Path) -> bool:
    """Whether ``open_hugging_face`` has something to open."""
    return folder.is_dir() and any((folder / name).is_file() for name in (SAFETENSORS, INDEX, PICKLED))


def open_hugging_face(folder: Path) -> TensorSource:
    """``model.safetensors``, or the shards that its index lists, or else ``pytorch_model.bin``.

    Raises WeightsFormatError if a shard is missing, or holds other tensors than the index says.
    """
    index = folder / INDEX
    if index.exists() and (folder / SAFETENSORS).exists():
        given = f"{SAFETENSORS} and {INDEX}"
        raise WeightsFormatError(f"{folder} has weights twice", given=given, expected="one", fix="remove the older")
    if not index.exists() and not (folder / SAFETENSORS).exists():
        file = open_torch(folder / PICKLED)
        try:
            return TorchSource(file, state_dict_of(folder / PICKLED, file.tree, "state_dict"))
        except BaseException:
            file.close()
            raise
    if not index.exists():
        return SafetensorsSource([folder / SAFETENSORS])
    homes = _read_index(index)
    source = SafetensorsSource([folder / name for name in sorted(set(homes.values()))])
    actual = {name: file.path.name for name, file in source._home.items()}
    wrong = sorted(name for name in homes.keys() | actual.keys() if homes.get(name) != actual.get(name))
    if wrong:
        source.close()
        name = wrong[0]
        raise WeightsFormatError(
            f"{index} and its shards disagree about {len(wrong)} tensors, first {name}",
            given=f"{actual.get(name, 'no shard')} holds it",
            expected=f"{homes.get(name, 'no entry')} as in the index",
        )
    return source


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name to file name."""
    try:
        value = strict_json(read_small(index, WeightsFormatError))
    except ValueError as error:
        if isinstance(error, WeightsFormatError):
            raise
        raise WeightsFormatError(f"{index} is not JSON", given=error) from error
    homes = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(homes, dict) or not homes or not all(isinstance(home, str) for home in homes.values()):
        raise WeightsFormatError(f"{index} has no weight_map", expected="tensor names mapped to file names")
    files = set(homes.values())
    outside = sorted(name for name in files if Path(name).name != name or not name.endswith(".safetensors"))
    if outside or len(files) > MAX_SHARDS:
        given = ascii(outside[0])[:80] if outside else f"{len(files)} files"
        raise WeightsFormatError(f"{index} names impossible shards", given=given, expected="files of its own folder")
    return homes


class TorchSource:
    """The tensors of a mapping inside a file of torch.save; ``extras`` are the other values of that mapping."""

    def __init__(self, file: TorchFile, values: Mapping[str, Any]):
        self._file = file
        self._refs = {name: value for name, value in values.items() if isinstance(value, TensorRef)}
        self.extras: Mapping[str, Any] = {
            name: self._with_values(value) for name, value in values.items() if not isinstance(value, TensorRef)
        }
        self.infos: Mapping[str, TensorInfo] = {n: TensorInfo(r.dtype, r.shape) for n, r in self._refs.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._file.read(self._refs[name], rows)

    def close(self) -> None:
        self._file.close()

    def _with_values(self, value: Any) -> Any:
        """A mapping with its small tensors, such as scales that were saved without a pickle of their own."""
        if not isinstance(value, Mapping):
            return value
        small = {n: v for n, v in value.items() if isinstance(v, TensorRef) and math.prod(v.shape) <= _SMALL}
        return {**value, **{name: self._file.read(ref) for name, ref in small.items()}}


def state_dict_of(path: Path, tree: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping of names to values that a file of torch.save holds, below the first of ``keys`` it has.

    Raises WeightsFormatError if there is none.
    """
    for key in keys:
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
            break
    if not isinstance(tree, Mapping) or not all(isinstance(name, str) for name in tree):
        raise WeightsFormatError(f"{path} holds no state dict", given=type(tree).__name__, expected="named tensors")
    for name in tree:
        if not (name.isascii() and name.isprintable() and 0 < len(name) <= 256):
            raise WeightsFormatError(f"{path} has an impossible name", given=ascii(name)[:80])
    if not any(isinstance(value, TensorRef) for value in tree.values()):
        raise WeightsFormatError(f"{path} holds no tensors", given=", ".join(_first(tree)) or "an empty mapping")
    return tree


def _first(tree: Mapping[str, Any]) -> Iterator[str]:
    for name, _ in zip(tree, range(5)):
        yield ascii(name)[:40]

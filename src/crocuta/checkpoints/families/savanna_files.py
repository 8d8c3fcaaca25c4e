"""Where savanna keeps weights: in one file, in a file for each layer, or in a file for each model-parallel rank.

    savanna_evo2_7b.pt                             one file, maybe in parts (.pt.part0)
    layer_02-model_00-model_states.pt              layer 2, shard 0; block i is layer i + 2
    mp_rank_00_model_states.pt                     shard 0 of everything, under "module"
    configs/40b.yml                                what savanna was run with

Whatever the files, a tensor is known here as "2.mixer.dense.weight": its layer, and its name in that layer. Facts of
the format: Zymrael/savanna (``model/backbone.py``, ``tools/7b/conversion/params.py`` for the axes of shards,
``model/block.py`` for projections that are not interleaved).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from crocuta.checkpoints.families.evo2 import weights_of
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.keymap import SHOWN
from crocuta.checkpoints.sources import state_dict_of
from crocuta.checkpoints.torch_save.file import TensorRef, TorchFile, open_torch
from crocuta.errors import WeightsFormatError

_LAYER = re.compile(r"layer_(?P<layer>\d+)-model_(?P<shard>\d+)-model_states\.pt")
_RANK = re.compile(r"mp_rank_(?P<shard>\d+)_model_states\.pt")
_PARTITIONED = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_KEY = re.compile(r"(?:module\.)*(?:sequential\.)?(?:(?P<layer>\d+)\.)?(?P<name>.+)")

EXTRA_STATE: Final = "._extra_state"
HEAD: Final = "final_linear.weight"
PROJECTION: Final = "mixer.dense_projection.weight"
SHORT_TAPS: Final = "mixer.hyena_proj_conv.short_conv_weight"
_TRIPLES: Final = (PROJECTION, "mixer.dense_projection.bias", SHORT_TAPS, "mixer.hyena_proj_conv.short_conv_bias")
"""Tensors of Hyena layers whose rows are those of (x2, x1, v)."""
_AXES: Final[dict[str, int | None]] = {
    "word_embeddings.weight": 0,
    **{name: 0 for name in _TRIPLES},
    "mixer.mixer.conv_bias": 0,
    "mixer.mixer.short_conv.short_conv_weight": 0,
    **{f"mixer.mixer.filter.{name}": 0 for name in ("h", "decay", "p", "gamma", "R")},
    **{
        f"mixer.mixer.filter.{inner}.{name}": 1 if name == "C" else 0
        for inner in ("kernel", "inner_cls")
        for name in ("inv_A_real", "A_imag", "log_dt", "B", "C")
    },
    "mixer.rotary_emb.inv_freq": None,
    **{f"mixer.{name}.weight": 1 for name in ("dense", "o_proj")},
    **{f"mixer.{name}.bias": None for name in ("dense", "o_proj")},
    **{f"mlp.{name}.weight": 0 for name in ("w1", "w2", "gate_proj", "up_proj")},
    **{f"mlp.{name}.weight": 1 for name in ("w3", "down_proj")},
    **{
        f"{name}.{what}": None
        for name in ("input_layernorm", "pre_mlp_layernorm", "norm")
        for what in ("scale", "weight")
    },
}
"""Name in a layer to the axis along which its shards join; None: every shard holds the whole of it."""


class Piece(NamedTuple):
    """One file, or its parts: shard ``shard`` of layer ``layer``, or of all layers."""

    layer: int | None
    shard: int
    paths: list[Path]


def folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def find_pieces(path: Path) -> list[Piece]:
    """The files of the checkpoint that ``path`` is, or is one of; maybe none. Raises WeightsFormatError."""
    folder, matched = folder_of(path), path.is_dir() or any(p.fullmatch(path.name) for p in (_LAYER, _RANK))
    if matched:
        # Pipelines write both kinds, and then those of ranks hold no weights.
        for pattern in (_LAYER, _RANK):
            found = [(m, file) for file in sorted(folder.glob("*.pt")) if (m := pattern.fullmatch(file.name))]
            if found:
                return [
                    Piece(int(m["layer"]) if "layer" in m.groupdict() else None, int(m["shard"]), [file])
                    for m, file in found
                ]
    if is_partitioned(path):
        return []
    paths = weights_of(path)
    return [Piece(None, 0, paths)] if paths else []


def is_partitioned(path: Path) -> bool:
    """Whether the weights are cut by ZeRO-3 among the workers that trained them."""
    if path.is_file():
        return _PARTITIONED.fullmatch(path.name) is not None
    return any(_PARTITIONED.fullmatch(file.name) for file in path.glob("zero_pp_rank_*.pt"))


class Shards:
    """The tensors of all pieces, each joined from its shards as it is read.

    ``interleaved``: see ``Layout2``; if not, each shard has its own thirds. ``head_axis``: that of the untied head.
    Raises WeightsFormatError for shards that do not belong together.
    """

    def __init__(self, path: Path, pieces: list[Piece], *, interleaved: bool, head_axis: int):
        self._path, self._interleaved, self._axes = path, interleaved, {**_AXES, HEAD: head_axis}
        self._files: list[TorchFile] = []
        count = _count(path, pieces)
        values: list[dict[str, tuple[TorchFile, Any]]] = [{} for _ in range(count)]
        try:
            for piece in pieces:
                self._open(piece, values[piece.shard])
            _check_same_names(path, values)
            self._values = {name: [shard[name] for shard in values] for name in values[0]}
            self._tensors = {n: parts for n, parts in self._values.items() if isinstance(parts[0][1], TensorRef)}
            self._tensors = {n: parts for n, parts in self._tensors.items() if not n.endswith(EXTRA_STATE)}
            self.infos: Mapping[str, TensorInfo] = {name: self._info(name) for name in self._tensors}
        except BaseException:
            self.close()
            raise

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The whole tensor, or ``rows`` of its first axis. Raises WeightsFormatError."""
        parts, axis = self._tensors[name], self._axis(name)
        if len(parts) == 1 or axis is None:
            first = _read(parts[0], rows)
            if any(not torch.equal(first, _read(part, rows)) for part in parts[1:]):
                raise WeightsFormatError(
                    f"{show(name)} of {self._path} differs among its {len(parts)} shards",
                    expected="the same values in each",
                    fix="they drifted apart in training: merge the shards with savanna's own tools first",
                )
            return first
        if axis == 0 and not self._has_thirds(name):
            return torch.cat(list(self._rows(name, rows)))
        tensors = [_read(part) for part in parts]
        if axis != 0:
            whole = torch.cat(tensors, axis)
        else:
            thirds = [tensor.chunk(3) for tensor in tensors]
            whole = torch.cat([shard[third] for third in range(3) for shard in thirds])
        return whole if rows is None else whole[rows].clone()

    def extra_states(self, layer: int, name: str) -> list[Any]:
        """What every shard has as ``name``._extra_state; tensors are read. Empty if the checkpoint has none."""
        parts = self._values.get(f"{layer}.{name}{EXTRA_STATE}", [])
        return [_read((file, value)) if isinstance(value, TensorRef) else value for file, value in parts]

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _open(self, piece: Piece, values: dict[str, tuple[TorchFile, Any]]) -> None:
        file = open_torch(piece.paths)
        self._files.append(file)
        for key, value in state_dict_of(piece.paths[0], file.tree, "module", "state_dict").items():
            match = _KEY.fullmatch(key)
            layer = piece.layer if match is None or match["layer"] is None else match["layer"]
            own = key if match is None else match["name"]
            name = own if layer is None else f"{int(layer)}.{own}"
            if name in values:
                raise WeightsFormatError(f"{self._path} holds {show(name)} twice", given=f"{key} in {piece.paths[0]}")
            values[name] = file, value

    def _axis(self, name: str) -> int | None:
        return self._axes.get(_own(name))

    def _has_thirds(self, name: str) -> bool:
        """Whether each shard has rows x2 | x1 | v; attention is cut between heads, each with its (q, k, v)."""
        layer = name.partition(".")[0]
        return not self._interleaved and _own(name) in _TRIPLES and f"{layer}.{SHORT_TAPS}" in self._tensors

    def _info(self, name: str) -> TensorInfo:
        refs = [ref for _, ref in self._tensors[name]]
        axis, first = self._axis(name), refs[0]
        if not isinstance(first, TensorRef) or len(refs) == 1 or _own(name) not in self._axes:
            return TensorInfo(first.dtype, first.shape)
        shapes = [ref.shape if isinstance(ref, TensorRef) else () for ref in refs]
        rest = {(ref.dtype, _without(ref.shape, axis)) for ref in refs if isinstance(ref, TensorRef)}
        if len(rest) != 1 or (axis is not None and len(first.shape) <= axis) or () in shapes:
            raise WeightsFormatError(
                f"the shards of {show(name)} of {self._path} do not fit together",
                given=", ".join(str(list(shape)) for shape in shapes[:SHOWN]),
                expected="the same shape in each" if axis is None else f"shapes that differ along axis {axis} only",
            )
        if axis is None:
            return TensorInfo(first.dtype, first.shape)
        length = sum(shape[axis] for shape in shapes)
        return TensorInfo(first.dtype, (*first.shape[:axis], length, *first.shape[axis + 1 :]))

    def _rows(self, name: str, rows: slice | None) -> Iterator[Tensor]:
        """The parts of the first axis that ``rows`` asks for, shard by shard."""
        begin, end, _ = (rows or slice(None)).indices(self.infos[name].shape[0])
        for part in self._tensors[name]:
            size = part[1].shape[0]
            yield _read(part, slice(max(0, min(begin, size)), max(0, min(end, size))))
            begin, end = begin - size, end - size


def show(name: str) -> str:
    """The name as savanna writes it, for messages."""
    return f"sequential.{name}" if name.partition(".")[0].isdigit() else name


def _own(name: str) -> str:
    layer, _, own = name.partition(".")
    return own if layer.isdigit() else name


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _read(part: tuple[TorchFile, Any], rows: slice | None = None) -> Tensor:
    file, ref = part
    return file.read(ref, rows)


def _count(path: Path, pieces: list[Piece]) -> int:
    """How many shards there are, the same for each layer."""
    shards: dict[int | None, list[int]] = {}
    for piece in pieces:
        shards.setdefault(piece.layer, []).append(piece.shard)
    count = max(map(len, shards.values()))
    for layer, found in shards.items():
        if sorted(found) != list(range(count)):
            raise WeightsFormatError(
                f"shards of {path if layer is None else f'layer {layer} of {path}'} are missing",
                given=f"numbers {sorted(found)[:SHOWN]}",
                expected=f"0 to {max(count - 1, *found)}, once each",
            )
    return count


def _check_same_names(path: Path, shards: list[dict[str, Any]]) -> None:
    for number, shard in enumerate(shards):
        different = sorted(shard.keys() ^ shards[0].keys())
        if different:
            raise WeightsFormatError(
                f"shards 0 and {number} of {path} hold different tensors",
                given=", ".join(map(show, different[:SHOWN])),
                expected="each tensor in each shard",
            )

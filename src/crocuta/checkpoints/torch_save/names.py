"""The names that a weights file may hold, and what each stands for: a closed table.

A pickle names functions and classes of the program that wrote it. None of them is ever looked up in Python: a name is
text, which this table turns into a value of our own, into an inert ``Opaque``, or into an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from crocuta.errors import WeightsFormatError

MAX_OPERATIONS: Final = 300_000
MAX_DIMS: Final = 8
DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    )
}
STORAGES: Final[dict[str, torch.dtype | None]] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
}
# Text is hashed with a secret; numbers are not, and a file could choose them to collide.
_MAX_NUMBER_KEYS, _MAX_TUPLE_KEYS, _MAX_TUPLE_KEY_ITEMS = 20_000, 1_000, 8
_MAX_SIZE = 1 << 62
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # the names that protocols before 3 write
_OLD_NAMES = {"xrange": "builtins.range", "long": "builtins.int", "unicode": "builtins.str"}
_NUMPY_CODES = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8", "c8", "c16"}


class Opaque:
    """A name, or an object of an ``inert`` class of which nothing but the name is kept."""

    __slots__ = ("inert", "name")

    def __init__(self, name: str, inert: bool):
        self.name, self.inert = name, inert

    def __repr__(self) -> str:
        return f"Opaque({self.name!r})"


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory that tensors lie in: ``size`` bytes, found under ``key``; ``dtype`` None where the tensors say it."""

    dtype: torch.dtype | None
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that is not read yet: a strided view of a storage of ``count`` elements, inside it and without overlap.

    ``stride`` and ``offset`` are in elements.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    key: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A value whose contents the pickle gives later; ``finish`` makes the value of them."""

    finish: Callable[[Any], Any]


class Toolbox:
    """What values are made with: limits that all of one pickle share, and a reader of storages held in bytes."""

    def __init__(self, size: int, load: Callable[[bytes], Storage] | None = None, operations: int = MAX_OPERATIONS):
        self._bytes_left = size + 1024  # what is copied is written in the pickle, once for each copy
        self._number_keys = self._tuple_keys = 0
        self.load, self.operations, self.containers = load, operations, operations // 5

    def count_container(self) -> None:
        self.containers -= 1
        if self.containers < 0:
            raise too_much("too many dictionaries, lists, tuples, tensors and names")

    def spend(self, count: int) -> None:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise ValueError("it makes more bytes than it holds")

    def key(self, key: Any) -> Hashable:
        """``key``, if it can be hashed and compared in little time. Raises ValueError."""
        if type(key) is str or type(key) is bytes or key is None or isinstance(key, Opaque):
            return key
        if type(key) is tuple and len(key) <= _MAX_TUPLE_KEY_ITEMS and all(map(_is_plain, key)):
            self._tuple_keys += 1
        elif _is_plain(key):
            self._number_keys += 1
        else:
            raise ValueError(f"a key of type {type(key).__name__}")
        if self._tuple_keys > _MAX_TUPLE_KEYS or self._number_keys > _MAX_NUMBER_KEYS:
            raise ValueError("too many keys that are no text")
        return key


def too_much(what: str) -> WeightsFormatError:
    return WeightsFormatError(what, fix="save a file that holds the weights alone")


def _is_plain(value: Any) -> bool:
    return type(value) in (str, bool, float) or value is None or (type(value) is int and value.bit_length() <= 64)


# --- names --------------------------------------------------------------------------------------------------


def look_up(module: str, name: str) -> Any:
    """What ``module.name`` stands for. Raises WeightsFormatError for a name that is not in the table."""
    full = f"{module}.{name}"
    if module in _OLD_MODULES:
        full = _OLD_NAMES.get(name, f"{_OLD_MODULES[module]}.{name}")
    if full in DTYPES:
        return DTYPES[full]
    if full in _NAMES:
        return _NAMES[full]
    if full in _INERT or any(module == prefix or module.startswith(f"{prefix}.") for prefix in _INERT_MODULES):
        return Opaque(full[:200], inert=True)
    if full in _NO_DENSE_TENSORS:
        raise WeightsFormatError(f"it holds {_NO_DENSE_TENSORS[full]}", expected="dense tensors", fix="save it as one")
    fix = "if you trust the file, save its state_dict alone with torch.save and load that"
    raise WeightsFormatError(
        f"it names {ascii(full)[1:-1][:80]}, which no weights file needs: nothing was run", fix=fix
    )


def call(function: Opaque, arguments: tuple[Any, ...], tools: Toolbox) -> Any:
    """The value that the pickle means by calling a name. Raises ValueError for a call that is not known."""
    if function.inert:
        return function
    if function.name not in _CALLS:
        raise ValueError(f"{function.name} is called, which no weights file needs: nothing was run")
    fewest, most, make = _CALLS[function.name]
    _require(fewest <= len(arguments) <= most, function.name)
    return make(tools, *arguments)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"{what} is made in a way that torch.save does not write")


# --- Python's own values ------------------------------------------------------------------------------------


def _new_dict(_: Toolbox, *__: Any) -> dict[Any, Any]:
    return {}


def _ordered_dict(tools: Toolbox, pairs: Any = ()) -> dict[Any, Any]:
    """Python 2 gives the items at once, as a list of lists."""
    found: dict[Any, Any] = {}
    for pair in _items(tools, pairs):
        _require(type(pair) in (list, tuple) and len(pair) == 2, "a dictionary")
        found[tools.key(pair[0])] = pair[1]
    return found


def _same_dict(_: Toolbox, value: Any = None) -> dict[Any, Any]:
    _require(value is None or type(value) is dict, "a dictionary")
    return {} if value is None else value


def _items(tools: Toolbox, value: Any) -> list[Any] | tuple[Any, ...]:
    _require(type(value) in (list, tuple), "a collection")
    tools.spend(len(value))
    return value


def _list(tools: Toolbox, value: Any = ()) -> list[Any]:
    return list(_items(tools, value))


def _tuple(tools: Toolbox, value: Any = ()) -> tuple[Any, ...]:
    return tuple(_items(tools, value))


def _set(tools: Toolbox, value: Any = ()) -> set[Any]:
    return {tools.key(item) for item in _items(tools, value)}


def _complex(_: Toolbox, real: Any, imaginary: Any) -> complex:
    _require(type(real) is float and type(imaginary) is float, "a complex number")
    return complex(real, imaginary)


def _bytes(tools: Toolbox, value: Any = b"", encoding: Any = None) -> bytes:
    return value if type(value) is bytes and encoding is None else _encode(tools, value, encoding)


def _encode(tools: Toolbox, text: Any, encoding: Any) -> bytes:
    _require(type(text) is str and encoding in ("latin1", "latin-1"), "text of bytes")
    tools.spend(len(text))
    return text.encode("latin-1")  # a UnicodeEncodeError is a ValueError


def _inert_object(_: Toolbox, kind: Any, *__: Any) -> Any:
    _require(isinstance(kind, Opaque) and kind.inert, "an object")
    return kind


def _none_type(_: Toolbox, value: Any) -> Opaque:
    _require(value is None, "a type")
    return Opaque("builtins.NoneType", inert=True)


def _memory_file(_: Toolbox, value: Any = None) -> Any:
    _require(value is None or type(value) is bytes, "a BytesIO")
    return Pending(_finish_memory_file) if value is None else value


def _finish_memory_file(state: Any) -> bytes:
    _require(type(state) is tuple and len(state) == 3 and type(state[0]) is bytes, "a BytesIO")
    return state[0]


# --- NumPy --------------------------------------------------------------------------------------------------


def _numpy_dtype(_: Toolbox, code: Any, *__: Any) -> Pending:
    def finish(state: Any) -> Any:
        if code not in _NUMPY_CODES:
            return Opaque("numpy.dtype", inert=True)
        _require(
            type(state) is tuple and len(state) >= 2 and state[1] in ("<", "|", "="), "a little-endian NumPy dtype"
        )
        return np.dtype(code)

    _require(type(code) is str, "a NumPy dtype")
    return Pending(finish)


def _numpy_array(*_: Any) -> Pending:
    return Pending(_finish_numpy_array)


def _finish_numpy_array(state: Any) -> Any:
    _require(type(state) is tuple and len(state) == 5 and type(state[3]) is bool, "a NumPy array")
    return _numpy_values(state[4], state[2], state[1], "F" if state[3] else "C")


def _numpy_buffer(_: Toolbox, *arguments: Any) -> Any:
    return _numpy_values(*arguments)


def _numpy_values(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    if isinstance(dtype, Opaque) and dtype.inert:
        return dtype
    _require(isinstance(dtype, np.dtype) and type(data) is bytes and order in ("C", "F"), "a NumPy array")
    _require(math.prod(_sizes(shape)) * dtype.itemsize == len(data), "a NumPy array")
    return np.ndarray(shape, dtype, data, order=order)  # read-only, and the memory is that of the bytes


def _numpy_scalar(_: Toolbox, dtype: Any, data: Any) -> Any:
    value = _numpy_values(data, dtype, (), "C")
    return value if isinstance(value, Opaque) else value.item()


# --- torch --------------------------------------------------------------------------------------------------


def storage_of(identity: Any) -> Storage:
    """The storage that a persistent id of ``torch.save`` stands for. Raises ValueError."""
    _require(type(identity) is tuple and len(identity) in (5, 6) and identity[0] == "storage", "a persistent id")
    kind, key, location, count, *view = identity[1:]
    _require(isinstance(kind, Opaque) and kind.name in STORAGES, "a storage")
    _require(type(key) is str and type(location) is str and view in ([], [None]), "a storage")
    _require(type(count) is int and 0 <= count < _MAX_SIZE, "the size of a storage")
    dtype = STORAGES[kind.name]
    return Storage(dtype, key, count * (1 if dtype is None else dtype.itemsize))


def _sizes(value: Any) -> tuple[int, ...]:
    _require(type(value) is tuple and len(value) <= MAX_DIMS, f"a shape of at most {MAX_DIMS} dimensions")
    _require(all(type(item) is int and 0 <= item < _MAX_SIZE for item in value), "a shape")
    return value


def _tensor(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> TensorRef:
    """Check that a view lies inside its storage and that no two of its elements are one."""
    _require(isinstance(storage, Storage) and isinstance(dtype, torch.dtype), "a tensor")
    shape, steps = _sizes(size), _sizes(stride)
    _require(len(shape) == len(steps) and type(offset) is int and 0 <= offset < _MAX_SIZE, "a tensor")
    count, rest = divmod(storage.size, dtype.itemsize)
    extent = 1 if all(shape) else 0
    for step, length in sorted(zip(steps, shape)):
        if extent and length > 1:
            if step < extent:
                raise ValueError(
                    f"elements of a tensor of shape {list(shape)} lie on each other, strides {list(steps)}"
                )
            extent += step * (length - 1)
    if rest or offset + extent > count:
        place = f"shape {list(shape)}, strides {list(steps)}, offset {offset}"
        raise ValueError(f"a tensor ({place}) reaches out of its storage of {count} elements")
    return TensorRef(dtype, shape, steps, offset, storage.key, count)


def _typed_tensor(_: Toolbox, storage: Any, offset: Any, size: Any, stride: Any, *__: Any) -> TensorRef:
    return _tensor(storage, getattr(storage, "dtype", None), offset, size, stride)


def _untyped_tensor(_: Toolbox, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    return _tensor(storage, rest[2], offset, size, stride)  # after requires_grad and hooks


def _parameter(_: Toolbox, data: Any, *__: Any) -> TensorRef:
    _require(isinstance(data, TensorRef), "a parameter")
    return data


def _attributed_tensor(tools: Toolbox, function: Any, kind: Any, arguments: Any, _: Any) -> Any:
    """A tensor or parameter with Python attributes, which are not kept."""
    plain = isinstance(kind, Opaque) and kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter")
    _require(plain and isinstance(function, Opaque) and type(arguments) is tuple, "a tensor of a special type")
    _require(function.name.startswith("torch._utils._rebuild_"), "a tensor of a special type")
    return call(function, arguments, tools)


def _shape(tools: Toolbox, value: Any = ()) -> tuple[int, ...]:
    return _sizes(tuple(_items(tools, value)))


def _device(_: Toolbox, kind: Any, index: Any = None) -> str:
    _require(type(kind) is str and (index is None or type(index) is int), "a device")
    return kind if index is None else f"{kind}:{index}"


def _stored(tools: Toolbox, data: Any) -> Storage:
    if type(data) is not bytes or tools.load is None:
        raise ValueError("a storage is written in the pickle itself")
    tools.spend(len(data))
    return tools.load(data)


# --- the table ----------------------------------------------------------------------------------------------

_CALLS: Final[dict[str, tuple[int, int, Callable[..., Any]]]] = {
    "collections.OrderedDict": (0, 1, _ordered_dict),
    "collections.defaultdict": (0, 1, _new_dict),
    "collections.Counter": (0, 1, _same_dict),
    "builtins.dict": (0, 1, _same_dict),
    "builtins.list": (0, 1, _list),
    "builtins.tuple": (0, 1, _tuple),
    "builtins.set": (0, 1, _set),
    "builtins.frozenset": (0, 1, _set),
    "builtins.complex": (2, 2, _complex),
    "builtins.bytes": (0, 2, _bytes),
    "builtins.bytearray": (0, 2, _bytes),
    "_codecs.encode": (2, 2, _encode),
    "copyreg._reconstructor": (3, 3, _inert_object),
    "builtins.type": (1, 1, _none_type),
    "_operator.getitem": (2, 2, _inert_object),  # Optional[int] and the like
    "_io.BytesIO": (0, 1, _memory_file),
    "io.BytesIO": (0, 1, _memory_file),
    "numpy.dtype": (1, 3, _numpy_dtype),
    **{f"numpy.{core}.multiarray._reconstruct": (3, 3, _numpy_array) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": (2, 2, _numpy_scalar) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": (4, 4, _numpy_buffer) for core in ("core", "_core")},
    "torch.Size": (0, 1, _shape),
    "torch.device": (1, 2, _device),
    "torch._utils._rebuild_tensor": (4, 4, _typed_tensor),
    "torch._utils._rebuild_tensor_v2": (6, 7, _typed_tensor),
    "torch._utils._rebuild_tensor_v3": (7, 8, _untyped_tensor),
    "torch._utils._rebuild_parameter": (3, 3, _parameter),
    "torch._utils._rebuild_parameter_with_state": (4, 4, _parameter),
    "torch._tensor._rebuild_from_type_v2": (4, 4, _attributed_tensor),
    "torch.storage._load_from_bytes": (1, 1, _stored),
}
_NO_CALLS = (
    *("builtins.int", "builtins.float", "builtins.bool", "builtins.str", "builtins.object", "numpy.ndarray"),
    *("torch.Tensor", "torch.nn.parameter.Parameter", "torch.storage.TypedStorage"),
)
_NAMES: Final = {name: Opaque(name, inert=False) for name in (*_CALLS, *STORAGES, *_NO_CALLS)}

# Objects around the weights in real checkpoints: settings, optimizers, recipes of FP8. Nothing in them is needed.
_INERT_MODULES: Final = (
    *("omegaconf", "pytorch_lightning", "lightning", "lightning_fabric", "torch.optim", "deepspeed", "savanna"),
    *("transformer_engine", "transformer_engine_torch", "transformer_engine_extensions"),
    *("numpy.random", "typing", "pathlib"),
)
_INERT: Final = frozenset({"argparse.Namespace", "builtins.range", "builtins.slice", "types.GenericAlias"})

_NO_DENSE_TENSORS: Final = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a special type",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a special device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a special device",
}

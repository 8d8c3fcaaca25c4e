"""Pickles of weights files, read as data: nothing that a pickle names is ever imported or called.

A pickle is a program for a small stack machine. This machine knows the operations that ``torch.save`` and
``pickle.dumps`` write for plain values, and for names the closed table of ``names.py``: a few that stand for
values (tensors, dictionaries, numbers), some that become an inert ``Opaque``, and all others are refused. Operations
are told apart by ``pickletools``, which describes pickles and runs none.

Time and memory are bounded before they are spent: the number of operations and of containers, the bytes that may be
copied, and, so that whoever walks through the result is safe as well, its depth, its cycles and the number of its
leaves where one part is met on many paths.
"""

from __future__ import annotations

import io
import pickletools
import sys
from collections.abc import Callable
from typing import Any, Final

from crocuta.checkpoints.torch_save.names import MAX_OPERATIONS, Opaque, Pending, Toolbox, call, look_up, too_much
from crocuta.errors import WeightsFormatError

MAX_PICKLE_BYTES: Final = 32 << 20
MAX_ITEM_BYTES: Final = 8 << 20
_MAX_WIDE_TEXT_BYTES = 8 << 20
MAX_DEPTH: Final = 64
_MAX_INTEGER_BITS = 512
_VALUES = {
    *("BINBYTES", "BINBYTES8", "BINFLOAT", "BININT", "BININT1", "BININT2", "BINSTRING", "BINUNICODE", "BINUNICODE8"),
    *("BYTEARRAY8", "FLOAT", "INT", "LONG", "LONG1", "LONG4", "SHORT_BINBYTES", "SHORT_BINSTRING", "SHORT_BINUNICODE"),
    *("STRING", "UNICODE"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}


def parse_pickle(
    data: bytes,
    persistent: Callable[[Any], Any] | None = None,
    *,
    where: str = "the pickle",
    tools: Toolbox | None = None,
) -> Any:
    """The value of one pickle that takes up all of ``data``; see ``parse_pickle_at``."""
    value, end = parse_pickle_at(data, 0, persistent, where=where, tools=tools)
    if end != len(data):
        raise WeightsFormatError(f"{where} ends at byte {end}", given=f"{len(data)} bytes", expected="nothing after it")
    return value


def parse_pickle_at(
    data: bytes,
    begin: int,
    persistent: Callable[[Any], Any] | None = None,
    *,
    where: str = "the pickle",
    tools: Toolbox | None = None,
) -> tuple[Any, int]:
    """The value of the pickle that begins at ``begin``, and where it ends.

    Args:
        persistent: makes a value of what the file calls a persistent id; without it there may be none.
        where: the file, for messages.
        tools: what the value of a name may need; made here if not given.

    Returns:
        dict (also for ordered and default ones), list, tuple, set, str, bytes (also for bytearray and BytesIO), int,
        float, complex, bool, None, torch.dtype, numpy arrays, ``TensorRef``, ``Storage`` and ``Opaque``; without
        cycles, and no deeper than 64.

    Raises:
        WeightsFormatError: broken, too large, or naming something that no weights file needs.
    """
    if len(data) - begin > MAX_PICKLE_BYTES:
        raise WeightsFormatError(f"{where} is too large", given=len(data), expected=f"at most {MAX_PICKLE_BYTES} bytes")
    machine = _Machine(persistent, tools or Toolbox(len(data)))
    try:
        value, end = machine.run(data[begin:] if begin else data)
        _check_tree(value)
    except WeightsFormatError as error:
        raise WeightsFormatError(
            f"{where}: {error.what}", given=error.given, expected=error.expected, fix=error.fix
        ) from error
    except (ValueError, IndexError, OverflowError) as error:
        reason = error if isinstance(error, ValueError) else "it takes what was never put there"
        raise WeightsFormatError(f"{where} is broken at byte {begin + machine.place}: {str(reason)[:200]}") from error
    return value, begin + end


class _Stream(io.BytesIO):
    """The bytes of a pickle, of which no operation takes many at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_ITEM_BYTES:
            raise ValueError(f"an item of {size} bytes, more than {MAX_ITEM_BYTES}")
        return super().read(size)


class _Machine:
    """The stack, the marks in it, and the memo of values that are met again."""

    def __init__(self, persistent: Callable[[Any], Any] | None, tools: Toolbox):
        self.place = self._wide_text = 0
        self._persistent, self._tools = persistent, tools
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._pending: dict[Pending, list[int]] = {}  # where in the memo an unfinished value is
        self._steps: dict[str, Callable[[Any], None]] = {
            name.removeprefix("_op_").upper(): getattr(self, name) for name in dir(self) if name.startswith("_op_")
        }

    def run(self, data: bytes) -> tuple[Any, int]:
        """The value, and how many bytes the pickle took. Raises ValueError, IndexError or WeightsFormatError."""
        steps, push = self._steps, self._stack.append
        for count, (operation, argument, place) in enumerate(pickletools.genops(_Stream(data))):
            self.place, name = place or 0, operation.name
            if count >= self._tools.operations:
                raise too_much(f"more than {count} operations in a pickle")
            if name in _VALUES:
                push(self._checked(argument))
            elif name in _CONSTANTS:
                push(_CONSTANTS[name])
            elif name in _EMPTY:
                self._tools.count_container()
                push(_EMPTY[name]())
            elif name == "STOP":
                break
            elif name in steps:
                steps[name](argument)
            else:
                raise ValueError(f"operation {name}, which torch.save does not write")
        if self._marks or len(self._stack) != 1:
            raise ValueError(f"{len(self._stack)} values are left at its end, expected one")
        return self._stack[0], self.place + 1

    def _checked(self, value: Any) -> Any:
        if type(value) is int and value.bit_length() > _MAX_INTEGER_BITS:
            raise ValueError(f"an integer of {value.bit_length()} bits")
        # One wide character makes every character of a text take four bytes.
        if type(value) is str and (size := sys.getsizeof(value)) > 200 + 1.5 * len(value):
            self._wide_text += size
            if self._wide_text > _MAX_WIDE_TEXT_BYTES:
                raise too_much(f"more than {_MAX_WIDE_TEXT_BYTES} bytes of text in rare letters")
        return bytes(value) if type(value) is bytearray else value

    # --- stack ---

    def _pop(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise IndexError
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    def _push_container(self, value: Any) -> None:
        self._tools.count_container()
        self._stack.append(value)

    def _top(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise IndexError
        return self._stack[-1]

    def _op_mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _op_pop(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _op_pop_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _op_dup(self, _: Any) -> None:
        self._stack.append(self._top())

    def _op_proto(self, version: int) -> None:
        if not 2 <= version <= 5 or self.place:
            raise ValueError(f"protocol {version} at byte {self.place}")

    def _op_frame(self, _: Any) -> None:
        """A hint for readers of streams."""

    # --- memo ---

    def _put(self, index: int) -> None:
        if index > self.place:
            raise ValueError(f"value {index} is remembered where there are at most {self.place}")
        value = self._top()
        self._memo[index] = value
        if isinstance(value, Pending):
            self._pending.setdefault(value, []).append(index)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"value {index} is asked for before it is there")
        self._stack.append(self._memo[index])

    _op_put = _op_binput = _op_long_binput = _put
    _op_get = _op_binget = _op_long_binget = _get

    def _op_memoize(self, _: Any) -> None:
        self._put(len(self._memo))

    # --- containers ---

    def _op_tuple(self, _: Any) -> None:
        self._push_container(tuple(self._pop_to_mark()))

    def _op_tuple1(self, _: Any) -> None:
        self._push_container((self._pop(),))

    def _op_tuple2(self, _: Any) -> None:
        last = self._pop()
        self._push_container((self._pop(), last))

    def _op_tuple3(self, _: Any) -> None:
        last, middle = self._pop(), self._pop()
        self._push_container((self._pop(), middle, last))

    def _op_list(self, _: Any) -> None:
        self._push_container(self._pop_to_mark())

    def _op_dict(self, _: Any) -> None:
        items = self._pop_to_mark()
        value: dict[Any, Any] = {}
        self._set_items(value, items)
        self._push_container(value)

    def _op_frozenset(self, _: Any) -> None:
        items = self._pop_to_mark()
        value: set[Any] = set()
        self._add_items(value, items)
        self._push_container(value)

    def _op_append(self, _: Any) -> None:
        self._extend([self._pop()])

    def _op_appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise ValueError("something is appended to what is no list")

    def _op_setitem(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set_items(self._top(), [key, value])

    def _op_setitems(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._set_items(self._top(), items)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        if isinstance(target, dict):
            key = self._tools.key
            for place in range(0, len(items), 2):
                target[key(items[place])] = items[place + 1]
        elif not isinstance(target, Opaque):
            raise ValueError("an item is set in what is no dictionary")

    def _op_additems(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._add_items(self._top(), items)

    def _add_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, set):
            target.update(map(self._tools.key, items))
        elif not isinstance(target, Opaque):
            raise ValueError("an item is added to what is no set")

    # --- names, and what is made with them ---

    def _op_global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self._push_container(look_up(module, name))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is no text")
        self._push_container(look_up(module, name))

    def _op_reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        self._stack.append(self._call(function, arguments))

    _op_newobj = _op_reduce

    def _op_newobj_ex(self, _: Any) -> None:
        options, arguments, function = self._pop(), self._pop(), self._pop()
        if type(options) is not dict or (options and not (isinstance(function, Opaque) and function.inert)):
            raise ValueError("a value is made with named options")
        self._stack.append(self._call(function, arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Opaque) or type(arguments) is not tuple:
            raise ValueError("something is called that is no name")
        self._tools.count_container()
        return call(function, arguments, self._tools)

    def _op_build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Pending):
            self._stack[-1] = value = target.finish(state)
            for index in self._pending.pop(target, ()):
                self._memo[index] = value
        elif not isinstance(target, Opaque | dict | list | set):  # attributes of those are not kept
            raise ValueError(f"attributes are set on a {type(target).__name__}")

    def _op_binpersid(self, _: Any) -> None:
        identity = self._pop()
        if self._persistent is None:
            raise ValueError("a persistent id, and there is nothing it could refer to")
        self._push_container(self._persistent(identity))


def _check_tree(root: Any) -> None:
    """Refuse cycles, depth, and trees that grow out of bounds when shared parts are counted on every path to them.

    Without recursion, for the tree may be as deep as the file is long.
    """
    known: dict[int, int] = {}  # identity of a container -> 0 while its parts are looked at, then size * 128 + depth
    waiting: list[Any] = [root]
    while waiting:
        value = waiting[-1]
        children = _children(value)
        inner = [child for child in children if isinstance(child, dict | list | tuple)]
        if id(value) not in known:
            known[id(value)] = 0
            if any(known.get(id(child)) == 0 for child in inner):
                raise WeightsFormatError("a value contains itself", fix="no weights do; get the file elsewhere")
            waiting.extend(child for child in inner if id(child) not in known)
            continue
        waiting.pop()
        if known[id(value)]:
            continue
        parts = [known[id(child)] for child in inner]
        size = 1 + len(children) - len(inner) + sum(part >> 7 for part in parts)
        depth = 1 + max((part & 127 for part in parts), default=0)
        if size > MAX_OPERATIONS:
            raise too_much(f"more than {MAX_OPERATIONS} values, shared ones counted wherever they are met")
        if depth > MAX_DEPTH:
            raise too_much(f"values nested more than {MAX_DEPTH} deep")
        known[id(value)] = size << 7 | depth


def _children(value: Any) -> list[Any] | tuple[Any, ...]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list | tuple) else ()

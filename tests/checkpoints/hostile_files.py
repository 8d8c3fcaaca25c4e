"""Files that pretend to be weights and are not: each is refused, quickly and with nothing in it run.

``CORPUS`` maps a name to a function that makes the file in a folder and returns what to open, and to a part of the
message. Each attack on the format differs from a sound file in a single point.
"""

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forged_archives import (
    FLOATS,
    End,
    Entry,
    archive,
    entries,
    named,
    number,
    saved,
    shape,
    state_dict,
    tensor,
    text,
    wide_sizes,
)

MARKER = "crocuta-was-here"


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def calling(name: str, *arguments: bytes) -> bytes:
    """A state dict with a weight beside the result of a call."""
    return saved(state_dict(tensor(), named(name) + b"(" + b"".join(arguments) + b"tR"), [FLOATS])


def command(folder: Path) -> bytes:
    return text(f"touch {folder / MARKER}")


# --- the corpus ---

Maker = Callable[[Path], bytes | Path]
CORPUS: dict[str, tuple[Callable[[Path], Path], str]] = {}
RUN = "nothing was run"


def attack(reason: str) -> Callable[[Maker], Maker]:
    """Register a function that makes the bytes of a hostile file, or something else that is given as a file."""

    def register(make: Maker) -> Maker:
        def write(folder: Path) -> Path:
            made, path = make(folder), folder / f"{make.__name__}.pt"
            if isinstance(made, Path):
                return made
            path.write_bytes(made)
            return path

        CORPUS[make.__name__] = (write, reason)
        return make

    return register


def add(name: str, reason: str, make: Maker) -> None:
    make.__name__ = name
    attack(reason)(make)


SHELLS = ("posix.system", "os.system", "os.popen", "subprocess.Popen", "subprocess.getoutput", "pty.spawn")
OTHERS = (
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.open", "builtins.getattr"),
    *("importlib.import_module", "runpy.run_path", "timeit.timeit", "ctypes.CDLL", "pickle.loads", "functools.partial"),
    *("operator.attrgetter", "collections.namedtuple", "webbrowser.open", "socket.create_connection", "shutil.rmtree"),
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.serialization.os.system", "numpy.load"),
    "torch.storage._load_from_bytes.__globals__",
)
for function in SHELLS:
    add(f"call_{function}", RUN, lambda folder, f=function: calling(f, command(folder)))
for function in OTHERS:
    add(f"call_{function}", RUN, lambda folder, f=function: calling(f, text("victim")))


@attack(RUN)
def reduce_of_os_system(folder: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.zeros(4), "x": Call(os.system, f"touch {folder / MARKER}")}, file)
    return file.getvalue()


@attack(RUN)
def name_from_the_stack(folder: Path) -> bytes:
    return saved(state_dict(text("os") + text("system") + b"\x93" + b"(" + command(folder) + b"tR", protocol=4))


@attack(RUN)
def method_of_a_tensor(folder: Path) -> bytes:
    chain = named("builtins.getattr") + b"(" + tensor() + text("__class__") + b"tR"
    return saved(state_dict(chain), [FLOATS])


@attack("operation INST")
def old_instance(folder: Path) -> bytes:
    return saved(state_dict(b"(" + command(folder) + b"ios\nsystem\n"))


@attack("operation OBJ")
def old_object(folder: Path) -> bytes:
    return saved(state_dict(b"(" + named("typing.Any") + command(folder) + b"o"))


@attack("operation EXT1")
def registered_extension(folder: Path) -> bytes:
    return saved(state_dict(b"\x82\x01"))


@attack("operation NEXT_BUFFER")
def buffer_from_elsewhere(folder: Path) -> bytes:
    return saved(state_dict(b"\x97", protocol=5))


@attack("named options")
def options_for_a_constructor(folder: Path) -> bytes:
    return saved(state_dict(named("io.BytesIO") + b")}" + text("initial_bytes") + b"Ns\x92", protocol=4))


@attack("attributes are set on a TensorRef")
def attributes_of_a_tensor(folder: Path) -> bytes:
    return saved(state_dict(tensor() + b"}" + text("__class__") + text("x") + b"sb"), [FLOATS])


@attack("a storage is written in the pickle itself")
def pickle_in_a_storage(folder: Path) -> bytes:
    inner = pickle.dumps(Call(os.system, f"touch {folder / MARKER}"))
    return calling("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(inner)) + inner)


@attack("something is called that is no name")
def call_of_a_value(folder: Path) -> bytes:
    return saved(state_dict(text("os.system") + b"(" + command(folder) + b"tR"))


@attack("a persistent id")
def persistent_id_of_another_kind(folder: Path) -> bytes:
    return saved(state_dict(text("module") + b"Q"))


# Sizes.


@attack("remembered")
def huge_memo_index(folder: Path) -> bytes:
    return saved(state_dict(b"Kar\xff\xff\xff\x7f"))


for name, code in {"bytearray": b"\x96", "bytes": b"\x8e", "text": b"\x8d"}.items():
    add(f"{name}_bomb", "an item of", lambda folder, code=code: saved(state_dict(code + struct.pack("<Q", 1 << 40))))


@attack("an integer of")
def long_bomb(folder: Path) -> bytes:
    return saved(state_dict(b"\x8b" + struct.pack("<i", 5_000_000) + b"\x7f" * 5_000_000))


@attack("an integer of")
def decimal_bomb(folder: Path) -> bytes:
    return saved(state_dict(b"L" + b"9" * 4000 + b"L\n"))


WIDE = text("x" * 1_000_000 + "\U0001f40d")
add("wide_text", "text in rare letters", lambda folder: saved(state_dict(WIDE, WIDE, WIDE)))
add("long_text", "an item of", lambda folder: saved(state_dict(text("x" * 9_000_000))))


@attack("more bytes than it holds")
def copy_bomb(folder: Path) -> bytes:
    """One text of a megabyte, made into bytes again and again."""
    again = named("_codecs.encode") + b"h\x01" + text("latin1") + b"\x86R"
    return saved(state_dict(text("x" * 1_000_000) + b"q\x01", *[again] * 1000))


@attack("more bytes than it holds")
def list_copy_bomb(folder: Path) -> bytes:
    items = b"](" + b"K\0" * 50_000 + b"eq\x01"
    return saved(state_dict(items, *[named("builtins.list") + b"h\x01\x85R"] * 10_000))


@attack("shared ones counted")
def billion_laughs(folder: Path) -> bytes:
    """Thirty lists, each holding the one before it ten times."""
    lists = [b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) + b"0" for i in range(30)]
    return saved(b"\x80\x02]q\x000" + b"".join(lists) + b"h\x1e.")


@attack("too many")
def a_million_empty_tensors(folder: Path) -> bytes:
    one = tensor(count=0, size=(0,))
    return saved(b"\x80\x02](" + one + b"q\x01" + one * 40_000 + b"e.", [b""])


@attack("too many")
def many_empty_dictionaries(folder: Path) -> bytes:
    return saved(b"\x80\x02](" + b"}" * 1_000_000 + b"e.")


@attack("too many")
def many_names(folder: Path) -> bytes:
    return saved(b"\x80\x02](" + b"".join(named(f"typing.a{i}") for i in range(200_000)) + b"e.")


@attack("more than 300000 operations")
def many_operations(folder: Path) -> bytes:
    return saved(b"\x80\x02](" + b"K\0" * 1_000_000 + b"e.")


@attack("keys that are no text")
def colliding_keys(folder: Path) -> bytes:
    keys = b"".join(number(i << 40) + b"N" for i in range(60_000))
    return saved(b"\x80\x02}(" + keys + b"u.")


@attack("a key of type tuple")
def deep_key(folder: Path) -> bytes:
    return saved(b"\x80\x02})" + b"\x85" * 50_000 + b"Ns.")


@attack("nested more than")
def deep_lists(folder: Path) -> bytes:
    return saved(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")


@attack("nested more than")
def deep_tuples(folder: Path) -> bytes:
    return saved(b"\x80\x02)" + b"\x85" * 50_000 + b".")


@attack("contains itself")
def dictionary_in_itself(folder: Path) -> bytes:
    return saved(b"\x80\x02}q\0" + text("self") + b"h\0s.")


@attack("contains itself")
def list_in_a_tuple_in_itself(folder: Path) -> bytes:
    return saved(b"\x80\x02]q\0h\0\x85a.")


@attack("is too large")
def enormous_pickle(folder: Path) -> bytes:
    return saved(b"\x80\x02" + b"N0" * (17 << 20) + b"N.")


# Tensors.


def one_tensor(**claims: Any) -> Maker:
    storages = claims.pop("storages", [FLOATS])
    return lambda folder: saved(state_dict(tensor(**claims)), storages)


add("expanded_tensor", "lie on each other", one_tensor(size=(1 << 30, 4), stride=(0, 1)))
add("overlapping_windows", "lie on each other", one_tensor(size=(3, 2), stride=(1, 1)))
add("negative_stride", "a shape", one_tensor(stride=(-1,), offset=3))
add("negative_offset", "a tensor is made", one_tensor(offset=-1))
add("negative_size", "a shape", one_tensor(size=(-4,)))
add("huge_size", "a shape", one_tensor(size=(1 << 70,)))
add("product_beyond_64_bits", "lie on each other", one_tensor(size=(1 << 40, 1 << 40), stride=(1, 1)))
add("view_beyond_its_storage", "reaches out of its storage", one_tensor(size=(5,)))
add("offset_beyond_its_storage", "reaches out of its storage", one_tensor(offset=1))
add("storage_beyond_its_record", "has a record of 16", one_tensor(count=1 << 40))
add("storage_without_record", "has none", one_tensor(key="../../etc/passwd"))
add("strides_of_another_rank", "a tensor is made", one_tensor(stride=(1, 1)))
add("too_many_axes", "at most 8 dimensions", one_tensor(size=(1,) * 70, stride=(1,) * 70))
add("quantized_storage", "which no weights file needs", one_tensor(storage="torch.QUInt8Storage"))
add("tensor_without_storage", "a tensor is made", lambda folder: saved(state_dict(
    named("torch._utils._rebuild_tensor_v2") + b"(NK\0" + shape(4) + shape(1) + b"\x89NtR")))  # fmt: skip


@attack("share the same memory")
def thousands_of_views_of_one_storage(folder: Path) -> bytes:
    data = bytes(4 << 20)
    one = tensor(count=1 << 20, size=(1 << 20,))
    return saved(b"\x80\x02](" + one * 100 + b"e.", [data])


@attack("a sparse tensor")
def sparse_tensor(folder: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.eye(3).to_sparse()}, file)
    return file.getvalue()


@attack("a quantized tensor")
def quantized_tensor(folder: Path) -> bytes:
    return calling("torch._utils._rebuild_qtensor", b"N")


@attack("a nested tensor")
def nested_tensor(folder: Path) -> bytes:
    return calling("torch._utils._rebuild_nested_tensor", b"N")


# Archives.


def forged(**claims: Any) -> Maker:
    """A sound archive but for claims about the record of the tensor."""

    def make(folder: Path) -> bytes:
        sound = entries(state_dict(tensor()), [FLOATS])
        return archive([replace(entry, **claims) if entry.name == "archive/data/0" else entry for entry in sound])

    return make


add("compressed", "compressed or encrypted", forged(method=8))
add("encrypted", "compressed or encrypted", forged(flags=0x0801))
add("record_beyond_the_file", "overlaps another, or lies outside", forged(size=1 << 30))
add("record_at_another_record", "overlaps another, or lies outside", forged(header=0))
add("record_beyond_the_end", "overlaps another, or lies outside", forged(header=1 << 30))
add("upward_name", "not one that torch.save writes", forged(name="archive/../data/0"))
add("absolute_name", "not one that torch.save writes", forged(name="/data/0"))
add("backslash_name", "not one that torch.save writes", forged(name="archive\\data/0"))
add("name_with_a_nul", "not one that torch.save writes", forged(name="archive/data/0\0"))
add("name_in_another_folder", "not in the folder of the others", forged(name="other/data/0"))
add("name_used_twice", "is there twice", forged(name="archive/version"))


def pickle_forged(**claims: Any) -> Maker:
    def make(folder: Path) -> bytes:
        first, *rest = entries(state_dict(tensor()), [FLOATS])
        return archive([replace(first, **claims), *rest])

    return make


add("other_name_in_the_header", "has another name", pickle_forged(local_name="archive/data.qkl"))
add("other_size_in_the_header", "another size or checksum", pickle_forged(local_size=1))
add("other_flags_in_the_header", "a header that is not the directory's", pickle_forged(local_flags=0x0808))
add("wide_size_missing", "another size or checksum", pickle_forged(local_size=0xFFFFFFFF, local_extra=b"FB\2\0ab"))
add("other_wide_size", "another size or checksum", pickle_forged(local_size=0xFFFFFFFF, local_extra=wide_sizes(1, 1)))
add("two_wide_sizes", "another size or checksum", pickle_forged(local_size=0xFFFFFFFF, local_extra=wide_sizes(1, 2)))
add("wrong_checksum", "does not have the checksum", pickle_forged(crc=1))
add("header_reaching_on", "reaches into what comes after", pickle_forged(local_name_length=300))


def ended(**claims: Any) -> Maker:
    return lambda folder: archive(entries(state_dict(tensor()), [FLOATS]), End(**claims))


add("directory_elsewhere", "impossible directory", ended(begin=0))
add("directory_before_the_file", "impossible directory", ended(begin=1 << 63))
add("more_records_than_are_there", "impossible directory", ended(count=65535))
add("fewer_records_than_are_there", "bytes too long", ended(count=2))
add("no_records", "number of records", ended(count=0))
add("a_million_records", "number of records", ended(count=1_000_000))
add("ends_that_disagree", "do not agree", ended(narrow_count=3))
add("wide_end_elsewhere", "is not where it says", ended(locator=0))
add("several_volumes", "is not where it says", ended(disks=2))
add("bytes_behind_the_archive", "does not end as", ended(comment=b"PK\5\6 and more"))
add("comment_that_is_not_there", "does not end as", ended(comment_length=5))
add("narrow_end_elsewhere", "impossible directory", ended(begin=0, wide=False))


@attack("ends at byte")
def bytes_behind_the_pickle(folder: Path) -> bytes:
    return saved(state_dict() + b"cos\nsystem\n.")


@attack("record 'version' is too large")
def long_version(folder: Path) -> bytes:
    return archive([*entries(state_dict())[:-1], Entry("archive/version", b" " * 1000 + b"3")])


@attack("there is no record 'data.pkl'")
def no_pickle(folder: Path) -> bytes:
    return archive(entries(b"")[1:])


@attack("does not end as")
def truncated(folder: Path) -> bytes:
    return saved(state_dict(tensor()), [FLOATS])[:-10]


@attack("too short")
def only_a_beginning(folder: Path) -> bytes:
    return b"PK\3\4"


@attack("not a file of torch.save")
def empty(folder: Path) -> bytes:
    return b""


@attack("not a file of torch.save")
def bare_pickle(folder: Path) -> bytes:
    return pickle.dumps(Call(os.system, f"touch {folder / MARKER}"))


@attack("byte order")
def big_endian(folder: Path) -> bytes:
    return saved(state_dict(tensor()), [FLOATS], order=b"big")


@attack("TorchScript")
def torchscript(folder: Path) -> bytes:
    return archive([*entries(state_dict()), Entry("archive/code/__torch__.py", b"import os")])


@attack("before version 1.6")
def legacy_stream(folder: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"x": Call(os.system, f"touch {folder / MARKER}")}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@attack("a tar file")
def legacy_tar(folder: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../pickle"), io.BytesIO())
    return file.getvalue()


# Not files.

for name, reason, make_at in (
    ("fifo", "not a regular file", os.mkfifo),
    ("directory", "not a regular file", os.mkdir),
    ("symlink_loop", "cannot read", lambda path: path.symlink_to(path)),
    ("missing", "cannot read", lambda path: None),
):
    add(name, reason, lambda folder, make_at=make_at, name=name: make_at(folder / name) or folder / name)
add("device", "not a regular file", lambda folder: Path("/dev/zero"))

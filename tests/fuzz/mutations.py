"""Changes to the files of a checkpoint that know how such files are built, each decided by a random generator alone.

Bytes changed at random rarely get past the first check of a reader. So most changes here are to a single claim (a
number, a name, an operation), and whatever guards it (a length, a checksum) is made to agree with the change.
"""

import io
import json
import pickletools
import random
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoints"))
from forged_archives import End, Entry, archive, named, number, text

EXTREMES = [
    *(0, 1, -1, 2, 7, 127, 128, 255, 256, 1000, 4096, 10_000, 65_535, 65_536, 1 << 20, 1 << 24),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
    *(-(1 << 31), -(1 << 63), 1 << 64, 1 << 100),
]
WORDS = [
    *("", "x", "..", "../x", "/x", "data/0", "0", "1e999", "NaN", "\0", "\x1b[2J", "\ud800", "ü", "A" * 300, "cpu"),
    *("F32", "BF16", "I64", "BOOL", "F8_E4M3", "storage", "latin1", "little", "weight", "null", "true", "[]", "{}"),
]
NAMES = [
    *("os.system", "builtins.eval", "builtins.getattr", "builtins.list", "builtins.set", "builtins.bytearray"),
    *("torch.FloatStorage", "torch.BFloat16Storage", "torch.BoolStorage", "torch.storage.UntypedStorage", "torch.Size"),
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter"),
    *("torch.storage._load_from_bytes", "torch.float16", "torch.bool", "collections.OrderedDict", "_io.BytesIO"),
    *("collections.defaultdict", "_codecs.encode", "copyreg._reconstructor", "numpy.dtype", "omegaconf.DictConfig"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct", "torch._tensor._rebuild_from_type_v2"),
]
OPERATIONS = [
    *(bytes([code]) for code in b"012(t]})RbsuaeQNdl.\x81\x85\x88\x8f\x90\x91\x93\x94"),
    *(b"h\0", b"q\0", b"K\0", b"r\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f"),
    *(b"\x96" + b"\xff" * 8, b"\x8e" + b"\xff" * 7 + b"\x7f"),
]
Mutation = Callable[[random.Random, bytes], bytes]


def near(rng: random.Random, value: int) -> int:
    """An extreme number, or one close to ``value``."""
    return rng.choice([*EXTREMES, value - 1, value + 1, value * 2, value // 2, -value, value + (1 << 32)])


def place_in(rng: random.Random, data: bytes) -> int:
    """Often near the beginning or the end, where the claims are."""
    if not data:
        return 0
    near_edge = rng.randrange(min(len(data), 400))
    return rng.choice([rng.randrange(len(data)), near_edge, len(data) - 1 - near_edge])


# --- any bytes ----------------------------------------------------------------------------------------------


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if changed:
            changed[place_in(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def write_bytes(rng: random.Random, data: bytes) -> bytes:
    place, count = place_in(rng, data), rng.choice([1, 2, 4, 8, 40])
    return data[:place] + rng.choice([rng.randbytes(count), bytes(count), b"\xff" * count]) + data[place + count :]


def write_number(rng: random.Random, data: bytes) -> bytes:
    place, width = place_in(rng, data), rng.choice([2, 4, 8])
    value = rng.choice(EXTREMES) % (1 << 8 * width)
    return data[:place] + value.to_bytes(width, "little") + data[place + width :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([data[: place_in(rng, data)], data[place_in(rng, data) :], data[:-1], b""])


def splice(rng: random.Random, data: bytes) -> bytes:
    begin, place = place_in(rng, data), place_in(rng, data)
    piece = data[begin : begin + rng.choice([1, 8, 64, 1000, len(data)])]
    return data[:place] + piece + data[place + rng.choice([0, len(piece)]) :]


ANY: list[Mutation] = [flip_bits, write_bytes, write_number, truncate, splice]


# --- JSON and YAML ------------------------------------------------------------------------------------------


def other_value(rng: random.Random, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.8:
        return near(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.6:
        items = list(value)
        place = rng.randrange(len(items))
        return rng.choice(
            [items[:-1], [*items, items[0]], [*items[:place], other_value(rng, items[place]), *items[place + 1 :]]]
        )
    kinds = [
        None,
        True,
        1.5,
        -0.0,
        1e308,
        float("inf"),
        float("nan"),
        [],
        {},
        [[]] * 3,
        rng.choice(EXTREMES),
        [value],
        {"": value},
    ]
    return rng.choice([*kinds, *rng.sample(WORDS, 6)])


def edit_tree(rng: random.Random, tree: Any) -> Any:
    """One value somewhere in a JSON tree changed, or one of its keys."""
    if not isinstance(tree, dict) or not tree or rng.random() < 0.05:
        return other_value(rng, tree)
    key = rng.choice(list(tree))
    choice = rng.random()
    if choice < 0.1:
        return {name: value for name, value in tree.items() if name != key}
    if choice < 0.2:
        return {(rng.choice(WORDS) if name == key else name): value for name, value in tree.items()}
    if choice < 0.3:
        return {**tree, key: tree[rng.choice(list(tree))]}
    return {**tree, key: edit_tree(rng, tree[key])}


def json_bytes(rng: random.Random, tree: Any) -> bytes:
    written = json.dumps(tree)
    if rng.random() < 0.1 and written.startswith("{") and isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        written = f"{{{json.dumps(key)}: {json.dumps(other_value(rng, tree[key]))}, {written[1:]}"  # a key twice
    if rng.random() < 0.05:
        written = written.replace(":", ":" + "[" * 5000, 1)
    return written.encode("utf-8", "surrogatepass")


def edit_json(rng: random.Random, data: bytes) -> bytes:
    return json_bytes(rng, edit_tree(rng, json.loads(data)))


def edit_header(rng: random.Random, data: bytes) -> bytes:
    """An edited safetensors header with a length that fits it."""
    length = int.from_bytes(data[:8], "little")
    header = json_bytes(rng, edit_tree(rng, json.loads(data[8 : 8 + length])))
    header += b" " * rng.choice([0, -len(header) % 8, 3])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


YAML_VALUES = [
    *(
        "null",
        "~",
        "yes",
        "1e5",
        ".inf",
        ".nan",
        "0x10",
        "1_000",
        "2020-01-01",
        "'1'",
        "[1, 2]",
        "{a: 1}",
        "[[[[[[]]]]]]",
    ),
    *(
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "${oc.env:HOME}",
        "&a [*a]",
        "*a",
        "|",
        "- -",
    ),
    *(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in (1, 2)),
]


def edit_yaml(rng: random.Random, data: bytes) -> bytes:
    lines = data.decode().split("\n")
    place = rng.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    value = rng.choice([*YAML_VALUES, str(rng.choice(EXTREMES)), rng.choice(WORDS)])
    lines[place] = rng.choice([f"{key}{colon} {value}", f"{key}{colon} {value}", lines[place] * 2, "", f"{value}: 1"])
    if rng.random() < 0.1:
        lines.insert(place, lines[rng.randrange(len(lines))])
    if rng.random() < 0.005:
        lines.append("bomb: " + "[" * 5000)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# --- torch.save ---------------------------------------------------------------------------------------------


def operations(data: bytes) -> list[bytes]:
    """The bytes of each operation of a pickle."""
    places = [place or 0 for _, _, place in pickletools.genops(data)]
    return [data[begin:end] for begin, end in zip(places, [*places[1:], len(data)])]


def other_operation(rng: random.Random, operation: bytes, among: list[bytes]) -> list[bytes]:
    """What to put in the place of one operation."""
    code = operation[:1]
    if rng.random() < 0.6:
        if code in b"KMJ\x8a":
            return [number(near(rng, int.from_bytes(operation[1:], "little")))]
        if code == b"X":
            old = operation[5:].decode("utf-8", "replace")
            return [text(rng.choice([*WORDS[:9], *WORDS[14:], old + "x", old[:-1]]))]
        if code == b"c":
            return [named(rng.choice(NAMES))]
        if code in b"hq":
            return [code + bytes([rng.choice([0, 1, operation[1] ^ 1, 255])])]
    other, new = rng.choice(among), rng.choice(OPERATIONS)
    return rng.choice(
        [[], [operation, operation], [operation, new], [new], [other], [other, operation], [rng.randbytes(1)]]
    )


def edit_pickle(rng: random.Random, data: bytes) -> bytes:
    found = operations(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(found))
        found[place : place + 1] = other_operation(rng, found[place], found) or [b""]
    return b"".join(found)


def edit_archive(rng: random.Random, data: bytes) -> bytes:
    """An archive with one change: to its pickle, to a record, to a claim about a record, or to its end."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = [Entry(item.filename, file.read(item)) for item in file.infolist()]
    place = rng.randrange(len(entries))
    entry, end = entries[place], End(wide=rng.random() < 0.8)
    choice = rng.random()
    if choice < 0.6:
        index = next(index for index, entry in enumerate(entries) if entry.name.endswith("data.pkl"))
        entries[index] = Entry(entries[index].name, edit_pickle(rng, entries[index].data))
    elif choice < 0.7:
        entries[place] = Entry(entry.name, rng.choice(ANY)(rng, entry.data))
    elif choice < 0.75:
        entries[place : place + 1] = rng.choice([[], [entry, entry], [entries[rng.randrange(len(entries))]]])
    elif choice < 0.9:
        claims = {
            "size": near(rng, len(entry.data)) % (1 << 32),
            "header": near(rng, len(data) // 2) % (1 << 32),
            "local_size": near(rng, len(entry.data)) % (1 << 32),
            "crc": rng.choice([0, 1, rng.getrandbits(32)]),
            "method": rng.choice([0, 1, 8, 99]),
            "flags": rng.choice([0, 1, 8, 0x808, 0xFFFF]),
            "local_flags": rng.choice([0, 1, 8, 0x808, 0xFFFF]),
            "local_name": rng.choice(["", entry.name[:-1], entry.name + "x"]),
            "local_name_length": near(rng, len(entry.name)) % (1 << 16),
        }
        name = rng.choice(list(claims))
        entries[place] = Entry(**{"name": entry.name, "data": entry.data, name: claims[name]})
    elif choice < 0.95:
        stem, _, leaf = entry.name.rpartition("/")
        entries[place] = Entry(
            rng.choice([f"{stem}/../{leaf}", leaf, f"{stem}/x/{leaf}", f"{stem}/{leaf}x", entry.name * 40]), entry.data
        )
    else:
        field = rng.choice(["count", "begin", "narrow_count", "locator", "disks"])
        limit = {"narrow_count": 1 << 16, "disks": 1 << 32}.get(field, 1 << 64)
        end = End(**{field: near(rng, len(entries)) % limit})
    return archive(entries, end)


# --- whole folders ------------------------------------------------------------------------------------------

_PART = re.compile(r"(.*)\.part\d+$")


def mutations_for(name: str, data: bytes) -> list[Mutation]:
    """Those that fit a file, the knowing ones first and more often."""
    knowing: Mutation | None = None
    if name.endswith(".json"):
        knowing = edit_json
    elif name.endswith((".yml", ".yaml")):
        knowing = edit_yaml
    elif name.endswith(".safetensors"):
        knowing = edit_header
    elif name.endswith(".pickle"):
        knowing = edit_pickle
    elif data.startswith(b"PK\3\4"):
        knowing = edit_archive
    return [*ANY, *[knowing] * 10] if knowing else ANY


def mutate(rng: random.Random, files: dict[str, bytes]) -> tuple[dict[str, bytes], str]:
    """The files that are changed, and in words how; parts of a file are changed as the one that they are."""
    whole: dict[str, list[str]] = {}
    for name in sorted(files):
        part = _PART.fullmatch(name)
        whole.setdefault(part[1] if part else name, []).append(name)
    target = rng.choice(list(whole))
    names = whole[target]
    data = b"".join(files[name] for name in names)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        mutation = rng.choice(mutations_for(target, data))
        try:
            data = mutation(rng, data)
        except Exception:
            data = flip_bits(rng, data)  # changed before in a way that the knowing one cannot read
        done.append(mutation.__name__)
    changed = {}
    for name in names[:-1]:
        changed[name], data = data[: len(files[name])], data[len(files[name]) :]
    changed[names[-1]] = data
    return changed, f"{target}: {', '.join(done)}"

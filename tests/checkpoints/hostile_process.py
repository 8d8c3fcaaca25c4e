"""The process that opens all hostile files, and notes what each costs and what the interpreter is made to do.

python hostile_process.py FOLDER   makes the files in FOLDER and prints, as JSON, what came of each
"""

import collections
import io
import json
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forged_archives import FLOATS, named, saved, state_dict, tensor
from hostile_files import CORPUS, MARKER, Call

from crocuta.checkpoints.torch_save.file import open_torch, parse_torch_bytes, tensor_refs

CODE_EVENTS = (
    "exec",
    "compile",
    "import",
    "marshal",
    "ctypes",
    "os.",
    "pty.",
    "shutil.",
    "socket.",
    "subprocess.",
    "webbrowser.",
)
HARMLESS_EVENTS = ("os.listdir", "os.scandir")


def peak_memory() -> int:
    """Bytes of memory at the highest point since ``forget_peak``."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def watch(folder: Path) -> list[str]:
    """A list that grows with every event by which code could run, or a file outside ``folder`` be opened."""
    events: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        suspicious = event.startswith(CODE_EVENTS) and event not in HARMLESS_EVENTS
        if suspicious or (event == "open" and not str(arguments[0]).startswith((str(folder), "/proc/self/"))):
            events.append(f"{event} {arguments}"[:200])

    sys.addaudithook(note)
    return events


def attempt(path: Path, use: Callable[[Path], object], events: list[str]) -> dict[str, Any]:
    """What came of one file: the error, CPU seconds, bytes of memory beyond what was there, and events."""
    del events[:]
    forget_peak()
    memory, start, error = peak_memory(), time.process_time(), "accepted"
    try:
        use(path)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    seconds = time.process_time() - start
    return {"error": error[:500], "seconds": seconds, "memory": peak_memory() - memory, "events": events[:5]}


def read_everything(path: Path) -> None:
    with open_torch(path) as file:
        for ref in tensor_refs(file.tree):
            file.read(ref)


def extra_states(folder: Path) -> dict[str, bytes]:
    """Hostile ``_extra_state`` blobs: pickles inside pickles."""
    bad = Call(os.system, f"touch {folder / MARKER}")
    archived, stream = io.BytesIO(), io.BytesIO()
    torch.save({"scale_fwd": bad}, archived)
    torch.save({"scale_fwd": bad}, stream, _use_new_zipfile_serialization=False)
    inner = (
        named("torch.storage._load_from_bytes") + b"B" + struct.pack("<I", len(stream.getvalue())) + stream.getvalue()
    )
    return {
        **{f"protocol {protocol}": pickle.dumps(collections.OrderedDict(x=bad), protocol) for protocol in range(6)},
        "archive": archived.getvalue(),
        "stream": stream.getvalue(),
        "storage": b"\x80\x03" + inner + b"\x85R.",
        "endless storages": b"\x80\x03](" + (named("torch.storage._load_from_bytes") + b"C\x01x\x85R") * 5000 + b"e.",
    }


def main(folder: Path) -> None:
    """Make every hostile file in ``folder``, open each, print what came of it as JSON."""
    paths = {name: write(folder) for name, (write, _) in CORPUS.items()}
    blobs = extra_states(folder)
    sound = folder / "sound.pt"
    sound.write_bytes(saved(state_dict(tensor()), [FLOATS]))
    read_everything(sound)  # what torch imports at first use is imported here, and so is the codec of old pickles
    "".encode("raw-unicode-escape")
    events = watch(folder)
    results = {name: attempt(path, read_everything, events) for name, path in {**paths, "sound": sound}.items()}
    for name, blob in blobs.items():
        results[f"extra state, {name}"] = attempt(sound, lambda _, blob=blob: parse_torch_bytes(blob), events)
    results["mark"] = {"left": (folder / MARKER).exists()}
    results["control"] = attempt(
        paths["reduce_of_os_system"], lambda path: torch.load(path, weights_only=False), events
    )
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Files and folders that appear whole or not at all, and manifests that betray any later change.

Everything is written under a temporary name in the same folder, forced to the disk, and renamed: after a
crash there is the old content or the new. A folder is sealed by ``manifest.json``: sizes and SHA-256.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from crocuta.checkpoints.strict import read_small, strict_json
from crocuta.errors import CheckpointError

MANIFEST: Final = "manifest.json"
TEMPORARY: Final = ".tmp-"
"""Prefix of everything unfinished; such names are never read."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


class Disk:
    """Every file-system call of the writers, one method each: a test can make any one of them fail."""

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_path(self, path: Path) -> None:
        """Force a finished file, or the names in a folder, to the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def link(self, old: Path, new: Path) -> None:
        os.link(old, new)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)


disk = Disk()


def commit_file(path: Path, chunks: Iterable[memoryview], size: int) -> None:
    """Put ``chunks``, ``size`` bytes in all, at ``path``, whole or not at all.

    Raises:
        CheckpointError: the disk refused; the message gives needed and free bytes where space ran out.
    """
    temporary = temporary_path(path)
    with reporting_writes(path, size), _discarding(temporary):
        _write_new(temporary, chunks)
        disk.rename(temporary, path)
        disk.sync_path(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole or not at all. Raises CheckpointError where the disk refuses."""
    commit_file(path, [memoryview(data)], len(data))


def write_folder(target: Path, write: Callable[[Path], None], *, sealed: bool = True) -> None:
    """Make ``target`` of what ``write`` puts into the empty folder it is given, whole or not at all.

    The folder is flat. When this returns, its files, its manifest (if ``sealed``) and its name have been forced to
    the disk.

    Raises:
        CheckpointError: ``target`` exists, a name is not plain, or the disk refused; nothing is left behind.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists", expected="a new name", fix="choose another or remove it")
    temporary = temporary_path(target)
    with reporting_writes(target), _discarding(temporary):
        disk.make_folder(temporary)
        write(temporary)
        if sealed:
            _seal(temporary)
        else:
            _sync_all(temporary)
        disk.rename(temporary, target)
        disk.sync_path(target.parent)


def _sync_all(folder: Path) -> None:
    for entry in os.scandir(folder):
        disk.sync_path(folder / entry.name)
    disk.sync_path(folder)


def make_folders(path: Path) -> None:
    """Make ``path`` and its missing parents, each forced to the disk. Raises CheckpointError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with reporting_writes(path):
        for folder in reversed(missing):
            disk.make_folder(folder)
            disk.sync_path(folder.parent)


def temporary_path(target: Path) -> Path:
    """A new name beside ``target`` for what is not finished."""
    return target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}-{uuid.uuid4().hex[:12]}")


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove what dead processes left of targets in ``folder`` whose names begin with ``name``."""
    with reporting_writes(folder):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(TEMPORARY + name):
                (disk.remove_tree if entry.is_dir(follow_symlinks=False) else disk.remove)(Path(entry.path))


@contextlib.contextmanager
def reporting_writes(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError within into a CheckpointError about ``path``; ``needed`` is the bytes to be written."""
    try:
        yield
    except OSError as error:
        given, expected, fix = error.strerror or type(error).__name__, None, None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(folder for folder in path.absolute().parents if folder.exists())
            given += f", {shutil.disk_usage(existing).free:,} bytes free"
            expected = "enough room" if needed is None else f"room for {needed:,} bytes"
            fix = "free some space and try again"
        raise CheckpointError(f"cannot write {path}", given=given, expected=expected, fix=fix) from error


@contextlib.contextmanager
def _discarding(temporary: Path) -> Iterator[None]:
    """Remove ``temporary`` if anything within fails, an interrupt included."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            (disk.remove_tree if temporary.is_dir() else disk.remove)(temporary)
        raise


def _write_new(path: Path, chunks: Iterable[memoryview]) -> None:
    descriptor = disk.create(path)
    try:
        for chunk in chunks:
            while chunk:  # the system may take only a part, and says so
                chunk = chunk[disk.write(descriptor, chunk) :]
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


# --- manifests ----------------------------------------------------------------------------------------------


def verify_folder(path: Path, *, allow_extra: bool = False) -> tuple[str, ...]:
    """Check every file of a sealed folder against its manifest and return the names that it vouches for.

    Raises:
        CheckpointError: names the first file that is missing, extra (unless ``allow_extra``), resized or
            changed, or says what is wrong with the manifest itself.
    """
    try:
        files = read_manifest(path)
        present = {entry.name: entry for entry in os.scandir(path) if entry.name != MANIFEST}
        for name in sorted(files.keys() - present.keys()):
            raise CheckpointError(f"{path / name} is missing", expected=f"every file that {MANIFEST} lists")
        for name in sorted(present.keys() - files.keys()):
            if not allow_extra:
                raise CheckpointError(f"{path / name} is extra", expected=f"only what {MANIFEST} lists")
        for name, recorded in files.items():
            if not present[name].is_file(follow_symlinks=False):
                raise CheckpointError(f"{path / name} is not a plain file")
            found = _fingerprint(path / name)
            for what in ("size", "sha256"):
                if found[what] != recorded[what]:
                    given, expected = f"{what} {found[what]}", recorded[what]
                    raise CheckpointError(f"{path / name} is damaged", given=given, expected=expected)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}", given=error.strerror) from error
    return tuple(files)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest of a sealed folder: name -> {"size": bytes, "sha256": hex}. Raises CheckpointError."""
    path = folder / MANIFEST
    text = read_small(path, CheckpointError)
    try:
        files = strict_json(text)["files"]
        # Comparing the whole text leaves no byte of a manifest that could change unseen.
        sound = _manifest_text({n: {w: f[w] for w in ("size", "sha256")} for n, f in files.items()}) == text
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged", given=repr(error)[:200]) from error
    if not sound:
        raise CheckpointError(f"{path} is damaged", expected="exactly what the writer of manifests writes")
    return files


def _seal(folder: Path) -> None:
    files: dict[str, dict[str, Any]] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not (_FILE_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
            raise CheckpointError(f"cannot seal {folder / entry.name}", expected="a plain file with a plain name")
        disk.sync_path(folder / entry.name)
        files[entry.name] = _fingerprint(folder / entry.name)
    _write_new(folder / MANIFEST, [memoryview(_manifest_text(files))])
    disk.sync_path(folder)


def _manifest_text(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    manifest = {"format": "crocuta-manifest", "version": 1, "files": files}
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}

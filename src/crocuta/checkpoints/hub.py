"""Published checkpoints from the Hugging Face Hub: from a name to a folder, downloading what is missing.

Files are kept in the cache that huggingface_hub shares between programs. Only weights, JSON, YAML and tokenizers are
fetched: never code, and never a second copy of the weights in a worse format.
"""

from __future__ import annotations

import errno
import glob
import logging
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeAlias

from crocuta.checkpoints.strict import read_small, strict_json
from crocuta.errors import InputError, MissingExtraError, WeightsFormatError
from crocuta.published import find_published, nearest_published

logger = logging.getLogger(__name__)

# What may be needed of a repository that is in no table.
_FILES: Final = (
    "*.json",
    "*.safetensors",
    "*.yml",
    "*.yaml",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "*.bin",
    "*.ckpt",
    "*.pt",
    "*.pth",
    "*.pt.part?",
    "*.pt.part??",
)
_PICKLED: Final = ("*.bin", "*.bin.index.json", "*.ckpt", "*.pt", "*.pth", "*.pt.part?", "*.pt.part??")
_TRAINING: Final = (
    "optimizer*",
    "*optim_states*",
    "scheduler*",
    "rng_state*",
    "training_args.bin",
    "trainer_state.json",
)
_WEIGHTS: Final = ("*.safetensors", *(pattern for pattern in _PICKLED if not pattern.endswith(".json")))

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LOCAL = re.compile(r"\.(json|ya?ml|safetensors|bin|ckpt|pth?|pt\.part\d+)$")
_TIMEOUT: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Download:
    """What ``resolve`` is about to fetch: the chosen files of one commit and how many bytes are not here yet."""

    repo: str
    revision: str
    files: tuple[str, ...]
    total_bytes: int
    missing_bytes: int


Announce: TypeAlias = Callable[[Download], None]


def looks_like_hub_name(text: str) -> bool:
    """Whether ``text`` names a checkpoint on the Hub: an existing path never does, a published name or ORG/NAME does.

    Nor does the name of a file, or one in a folder that exists, as ``runs/demo`` beside other runs: a mistyped path.
    """
    path = Path(text)
    if path.exists():
        return False
    if find_published(text):
        return True
    return bool(_REPOSITORY.fullmatch(text)) and not _LOCAL.search(text) and not path.parent.exists()


def resolve(name: str, *, revision: str | None = None, download: bool = True, announce: Announce | None = None) -> Path:
    """The folder in the cache of huggingface_hub that holds checkpoint ``name``, downloaded where it is missing.

    ``name`` is one of ``crocuta.published`` or ORG/NAME; ``revision`` a branch, tag or commit, by default that of the
    table, else main. With ``download`` False, or HF_HUB_OFFLINE=1, only the cache is looked at; without a network the
    cached copy is used, with a warning. ``announce`` is told before bytes are fetched.

    Raises:
        InputError: an unknown name, repository or revision; a gated repository; no weights in it; no network and
            nothing, or not all, in the cache; too little space on the disk.
        MissingExtraError: huggingface_hub is not installed.
    """
    wanted = _wanted(name, revision)
    hub = _import_hub()
    if not download or hub.constants.HF_HUB_OFFLINE:
        return _cached(hub, wanted)
    try:
        plan = _plan(hub, wanted)
        if announce is not None:
            announce(plan)
        return _fetch(hub, plan)
    except hub.errors.HFValidationError as error:
        raise InputError("no repository can be called this", given=repr(name), expected="ORG/NAME") from error
    except (OSError, *hub.errors.HfHubHTTPError.__bases__) as error:  # the bases are those of its HTTP client
        failure = _explain(hub, wanted, error)
        # Nothing that is wrong with the network or the Hub stops the work if all is here.
        try:
            folder = _cached(hub, wanted)
        except InputError:
            raise failure from error
        logger.warning("using the copy in the cache: %s", failure)
        return folder


@dataclass(frozen=True)
class _Wanted:
    name: str
    repo: str
    revision: str
    patterns: tuple[str, ...]


def _wanted(name: str, revision: str | None) -> _Wanted:
    published = find_published(name)
    if published is not None:
        return _Wanted(name, published.repo, revision or published.revision, published.files)
    if _REPOSITORY.fullmatch(name):
        return _Wanted(name, name, revision or "main", _FILES)
    near = nearest_published(name)
    fix = f"did you mean {near!r}?" if near else "crocuta download --list shows the names"
    raise InputError("unknown checkpoint", given=repr(name), expected="a published name or ORG/NAME", fix=fix)


def _import_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        fix = "pip install 'crocuta[hub]'"
        raise MissingExtraError("names of the Hub need the package huggingface_hub", fix=fix) from error
    return huggingface_hub


def _choose(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """The files to have, of all in a repository: none in folders, none of the training, one format of weights."""
    top = [n for n in names if "/" not in n and _matches(n, patterns) and not _matches(n, _TRAINING)]
    if any(n.endswith(".safetensors") for n in top):
        top = [n for n in top if not _matches(n, _PICKLED)]
    return sorted(top)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# --- the cache ------------------------------------------------------------------------------------------------


def _storage(hub: Any, repo: str) -> Path:
    return Path(hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _cached(hub: Any, wanted: _Wanted) -> Path:
    """The complete snapshot in the cache. Raises InputError if there is none, or not all of it."""
    storage = _storage(hub, wanted.repo)
    try:
        commit = (storage / "refs" / wanted.revision).read_text().strip()
    except OSError:
        commit = wanted.revision
    folder = storage / "snapshots" / commit
    absent = _absent(folder, wanted.patterns)
    if absent:
        raise InputError(
            f"{wanted.repo} at {wanted.revision} is not in the cache {hub.constants.HF_HUB_CACHE}",
            given=f"{absent} missing",
            fix=f"run crocuta download {wanted.name} on a machine with network",
        )
    return folder


def _absent(folder: Path, patterns: Collection[str]) -> str:
    """What of a snapshot is certainly not there, as after an interrupted download; empty if nothing."""
    # A link whose file is gone does not count.
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    chosen = _choose(names, patterns)
    if not any(_matches(name, _WEIGHTS) for name in chosen):
        return "weights"
    needed = {shard for name in chosen if name.endswith(".index.json") for shard in _shards(folder / name)}
    parts = {name.rpartition(".part") for name in chosen if ".part" in name}
    needed |= {f"{stem}.part{n}" for stem, _, last in parts if last.isdecimal() for n in range(int(last))}
    return ", ".join(sorted(needed - names))


def _shards(index: Path) -> set[str]:
    """The files that an index of shards names; none if it is broken, which loading will tell."""
    try:
        return set(strict_json(read_small(index, WeightsFormatError))["weight_map"].values())
    except (WeightsFormatError, ValueError, KeyError, TypeError, AttributeError):
        return set()


# --- the network ----------------------------------------------------------------------------------------------


def _plan(hub: Any, wanted: _Wanted) -> Download:
    info = hub.HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True, timeout=_TIMEOUT)
    files = {file.rfilename: file for file in info.siblings}
    chosen = _choose(files, wanted.patterns)
    if not any(_matches(name, _WEIGHTS) for name in chosen):
        raise InputError(
            f"{wanted.repo} at {wanted.revision} has no weights",
            given=", ".join(sorted(files)) or "no file at all",
            expected=" or ".join(pattern for pattern in wanted.patterns if pattern in _WEIGHTS),
        )
    blobs = _storage(hub, wanted.repo) / "blobs"
    sizes = {name: files[name].size or 0 for name in chosen}
    missing = sum(size for name, size in sizes.items() if not _has_blob(blobs, files[name]))
    free = _free_bytes(blobs)
    if missing > free:
        raise InputError(
            f"not enough space for {wanted.repo} in {hub.constants.HF_HUB_CACHE}",
            given=f"{free:,} bytes free",
            expected=f"{missing:,}",
            fix="make room, or set HF_HOME to a folder on a larger disk",
        )
    return Download(
        repo=wanted.repo,
        revision=wanted.revision,
        files=tuple(chosen),
        total_bytes=sum(sizes.values()),
        missing_bytes=missing,
    )


def _has_blob(blobs: Path, file: Any) -> bool:
    """Whether the cache holds a file's bytes, from whatever revision."""
    name = file.lfs.sha256 if file.lfs else file.blob_id
    return bool(name) and (blobs / name).exists()


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _fetch(hub: Any, plan: Download) -> Path:
    names = [glob.escape(name) for name in plan.files]
    return Path(hub.snapshot_download(plan.repo, revision=plan.revision, allow_patterns=names))


def _explain(hub: Any, wanted: _Wanted, error: BaseException) -> InputError:
    """What to tell the user about an exception of huggingface_hub, its HTTP client or the disk."""
    repo, errors = wanted.repo, hub.errors
    match error:
        case errors.LocalEntryNotFoundError():  # the connection broke; in old versions an HfHubHTTPError too
            reason = error.__cause__ or error
        case errors.GatedRepoError():
            fix = f"accept its terms at {hub.constants.ENDPOINT}/{repo}, then run: hf auth login"
            return InputError(f"{repo} is gated: its owners must let you in", fix=fix)
        case errors.RevisionNotFoundError():
            expected = f"a branch, tag or commit of {repo}"
            return InputError("no such revision", given=repr(wanted.revision), expected=expected)
        case errors.RepositoryNotFoundError():
            near = nearest_published(wanted.name)
            fix = f"did you mean {near!r}?" if near else "if it is private, run: hf auth login"
            return InputError(f"the Hub has no repository {repo}, or you may not see it", fix=fix)
        case errors.HfHubHTTPError():
            return InputError(
                f"the Hub refused {repo}", given=_first_line(error), fix="if a token is set, is it valid?"
            )
        case OSError(errno=errno.ENOSPC):
            fix = "make room, or set HF_HOME to a folder on a larger disk; complete files are kept"
            return InputError(f"the disk of {hub.constants.HF_HUB_CACHE} is full", fix=fix)
        case PermissionError():
            return InputError(f"cannot write to the cache of {repo}", given=error, fix="set HF_HOME to another folder")
        case _:
            reason = error
    fix = f"run crocuta download {wanted.name} on a machine with network; complete files are kept"
    return InputError(f"cannot reach {hub.constants.ENDPOINT} for {repo}", given=_first_line(reason), fix=fix)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__} {str(error).strip().partition(chr(10))[0]}".strip()

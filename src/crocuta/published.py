"""Every published checkpoint of the family: where it is, which preset it is of and how it is laid out, without torch.

>>> find_published("togethercomputer/evo-1-8k-base").preset
'evo1-8k'
>>> published_of_file("evo2_40b.pt.part0").name
'evo2_40b'

Revisions are the branches and tags that the publishers' own code loads. Commit hashes would pin the bytes, but could
not be looked up at the Hub; who needs them gives one as ``revision`` when downloading.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Layout: TypeAlias = Literal["stripedhyena-hf", "evo2", "savanna", "hyenadna-ckpt", "hyenadna-hf"]
"""How a repository holds weights: names of tensors, order of rows, kind of file."""

FP8: TypeAlias = Literal["no", "optional", "required"]
"""Whether the input projections of Hyena layers ran in FP8; "required": published scores do not hold without it."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published checkpoint.

    ``files`` are patterns for the top folder of the repository: what is needed, and neither second copies of the
    weights nor code.
    """

    name: str
    repo: str
    revision: str = "main"
    preset: str
    layout: Layout
    files: tuple[str, ...]
    fp8: FP8 = "no"
    notes: str = ""


_SAFETENSORS = ("*.json", "*.safetensors")
_PARTS = ("config.json", "*.pt", "*.pt.part?", "*.pt.part??")  # files above 50 GB are cut into parts
_LIGHTNING = ("config.json", "weights.ckpt")

_STRIPEDHYENA = {"Hessian": "base model", "Nous": "fine-tuned for chat"}

# name: organisation, revision, preset (evo/models.py)
_EVO1 = {
    "evo-1-8k-base": ("togethercomputer", "1.1_fix", "evo1-8k"),
    "evo-1-131k-base": ("togethercomputer", "1.1_fix", "evo1-131k"),
    "evo-1-8k-crispr": ("LongSafari", "main", "evo1-8k"),
    "evo-1-8k-transposon": ("LongSafari", "main", "evo1-8k"),
    "evo-1.5-8k-base": ("evo-design", "main", "evo1-8k"),
}

# name: preset, FP8, whether the weights for further training (savanna_*) are published too (evo2/utils.py)
_EVO2: dict[str, tuple[str, FP8, bool]] = {
    "evo2_1b_base": ("evo2-1b-8k", "required", True),
    "evo2_7b_base": ("evo2-7b-8k", "optional", True),
    "evo2_7b": ("evo2-7b-1m", "optional", True),
    "evo2_7b_262k": ("evo2-7b-262k", "optional", False),
    "evo2_7b_microviridae": ("evo2-7b-8k", "optional", False),
    "evo2_20b": ("evo2-20b-1m", "required", True),
    "evo2_40b_base": ("evo2-40b-8k", "required", True),
    "evo2_40b": ("evo2-40b-1m", "required", True),
}

# What follows "hyenadna-" in the repository, and our preset.
_HYENADNA = {
    "tiny-1k-seqlen": "hyenadna-tiny-1k",
    "tiny-1k-seqlen-d256": "hyenadna-tiny-1k-d256",
    "tiny-16k-seqlen-d128": "hyenadna-tiny-16k-d128",
    "small-32k-seqlen": "hyenadna-small-32k",
    "medium-160k-seqlen": "hyenadna-medium-160k",
    "medium-450k-seqlen": "hyenadna-medium-450k",
    "large-1m-seqlen": "hyenadna-large-1m",
}


def _entries() -> Iterator[Published]:
    for kind, notes in _STRIPEDHYENA.items():
        name = f"StripedHyena-{kind}-7B"
        repo = f"togethercomputer/{name}"
        yield Published(
            name=name, repo=repo, preset="stripedhyena-7b", layout="stripedhyena-hf", files=_SAFETENSORS, notes=notes
        )
    for name, (organisation, revision, preset) in _EVO1.items():
        yield Published(
            name=name,
            repo=f"{organisation}/{name}",
            revision=revision,
            preset=preset,
            layout="stripedhyena-hf",
            files=_SAFETENSORS,
            notes="before this revision some projections had their rows in a wrong order"
            if revision == "1.1_fix"
            else "",
        )
    for name, (preset, fp8, trainable) in _EVO2.items():
        # The only one that is called otherwise in its repository than in the code that loads it.
        repo = "evo-design/evo-2-7b-8k-microviridae" if name == "evo2_7b_microviridae" else f"arcinstitute/{name}"
        yield Published(name=name, repo=repo, preset=preset, layout="evo2", files=_PARTS, fp8=fp8)
        if trainable:
            savanna = f"savanna_{name}"
            repo, notes = f"arcinstitute/{savanna}", f"{name} for further training"
            yield Published(
                name=savanna, repo=repo, preset=preset, layout="savanna", files=_PARTS, fp8=fp8, notes=notes
            )
    for name, preset in _HYENADNA.items():
        repo = f"LongSafari/hyenadna-{name}"
        yield Published(name=f"hyenadna-{name}", repo=repo, preset=preset, layout="hyenadna-ckpt", files=_LIGHTNING)
        yield Published(
            name=f"hyenadna-{name}-hf", repo=f"{repo}-hf", preset=preset, layout="hyenadna-hf", files=_SAFETENSORS
        )


PUBLISHED: Mapping[str, Published] = MappingProxyType({entry.name: entry for entry in _entries()})
"""Name to checkpoint; the name is that of the repository without its organisation, with one exception."""

_ALIASES = {
    alias.lower(): entry
    for entry in PUBLISHED.values()
    for alias in (entry.name, entry.repo, entry.repo.partition("/")[2])
}


def find_published(name: str) -> Published | None:
    """The checkpoint of this name, repository (ORG/NAME) or repository without ORG, in whatever case."""
    return _ALIASES.get(name.lower())


def nearest_published(name: str) -> str | None:
    """The published name that looks most like ``name``, for a message; None if none comes near."""
    close = difflib.get_close_matches(name.lower(), _ALIASES, n=1)
    return _ALIASES[close[0]].name if close else None


def published_of_file(name: str) -> Published | None:
    """The checkpoint that a file of weights is of, judged by its name, with or without .pt and .partN.

    For the layouts "evo2" and "savanna" only: their files are called like the checkpoint and hold no configuration.
    """
    entry = PUBLISHED.get(re.sub(r"(\.pt)?(\.part\d+)?$", "", name))
    return entry if entry is not None and entry.layout in ("evo2", "savanna") else None

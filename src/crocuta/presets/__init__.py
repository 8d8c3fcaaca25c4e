"""Named architectures, without torch.

>>> preset("evo2-7b-8k").hidden_size
4096
>>> encoder_preset("edifice-hyena").hidden_size
256
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from crocuta.config import EncoderConfig, ModelConfig
from crocuta.errors import ConfigError
from crocuta.presets.deep_dive import deep_dive_hyena
from crocuta.presets.edifice import edifice_hyena, edifice_striped_hyena
from crocuta.presets.models import PRESETS, striped

__all__ = [
    "ENCODERS",
    "PRESETS",
    "deep_dive_hyena",
    "edifice_hyena",
    "edifice_striped_hyena",
    "encoder_preset",
    "preset",
    "striped",
]

ENCODERS: Mapping[str, Callable[[], EncoderConfig]] = MappingProxyType(
    {"edifice-hyena": edifice_hyena, "edifice-striped-hyena": edifice_striped_hyena}
)
"""Name to a function that makes an encoder's configuration."""

C = TypeVar("C", ModelConfig, EncoderConfig)


def preset(name: str) -> ModelConfig:
    """The configuration called ``name``; raises ConfigError, with the nearest name, for an unknown one."""
    return _find(name, PRESETS, "crocuta.presets.PRESETS")


def encoder_preset(name: str) -> EncoderConfig:
    """The encoder's configuration called ``name``; raises ConfigError as ``preset`` does."""
    return _find(name, ENCODERS, "crocuta.presets.ENCODERS")


def _find(name: str, known: Mapping[str, Callable[[], C]], where: str) -> C:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
        raise ConfigError("unknown preset", given=repr(name), expected=f"a name in {where}", fix=fix)
    return known[name]()

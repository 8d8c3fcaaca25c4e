"""Training checkpoints of savanna, which trained StripedHyena 1 and 2 and Evo 2, read as those of vortex.

A source of tensors renames what savanna stores and computes what it parametrises otherwise, so that from there on all
is as for ``evo2``:

    filter.h          (h · decay)[:, :hyena_mr_len]
    filter.log_poles  -exp(p) · exp(gamma)
    filter.poles      (1 + a) / (1 - a), a = dt · A / 2         (StripedHyena 1)

The way back is not offered: many (h, decay) and (p, gamma) give the same filter. Every block also has norms that no
forward pass uses, ``post_attention_layernorm`` and ``outer_mlp_layernorm``; the norm before the MLP is
``pre_mlp_layernorm`` and no other, whatever converters do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from crocuta.checkpoints.families.evo2 import contents_of, with_published_fp8
from crocuta.checkpoints.families.evo2_layout import Layout2
from crocuta.checkpoints.families.fp8_scales import read_scales
from crocuta.checkpoints.families.savanna_config import (
    find_configurations,
    has_other_configuration,
    head_axis,
    model_config,
    read_configuration,
)
from crocuta.checkpoints.families.savanna_files import Piece, Shards, find_pieces, is_partitioned, show
from crocuta.checkpoints.families.savanna_tensors import SavannaSource
from crocuta.checkpoints.format import Contents, Format, ReadOptions
from crocuta.checkpoints.keymap import Entry, KeyMap
from crocuta.checkpoints.settings import Settings
from crocuta.config import ComplexModalFilterConfig, HyenaConfig, ModelConfig
from crocuta.errors import ConfigError, WeightsFormatError
from crocuta.presets import preset
from crocuta.published import Published, published_of_file

_SETTINGS_THAT_DECIDE: Final = {
    r"(embedding_layer|unembed)\.weight": "hidden_size, no_weight_tying",
    r".*(Wqkv|out_proj).*": "operator-config, hidden_size, num_attention_heads",
    r".*(projections|out_filter_dense)\..*": "operator-config, hidden_size",
    r".*short_filter.*": "short-conv-L, hidden_size",
    r".*filter\.h": "hyena_se_len, hyena_mr_len, num_groups_hyena_short, num_groups_hyena_medium",
    r".*(poles|residues)": "hyena_filter_order, num_groups_hyena",
    r".*mlp\.l\d.*": "num_layers, hidden_size",
}


def _published(pieces: list[Piece]) -> Published | None:
    """The entry of a file that is known by its name."""
    return published_of_file(pieces[0].paths[0].name) if len(pieces) == 1 else None


def _detect(path: Path) -> bool:
    try:
        pieces = find_pieces(path)
        if has_other_configuration(path) or not (pieces or is_partitioned(path)):
            return False
        known = _published(pieces)
        if known is not None:
            return known.layout == "savanna"
        by_name = not pieces or "model_states" in pieces[0].paths[0].name
        return by_name or bool(find_configurations(path))
    except (OSError, WeightsFormatError):
        return False


def _read(path: Path, options: ReadOptions) -> Contents:
    pieces = find_pieces(path)
    if not pieces:
        raise WeightsFormatError(
            f"{path} is cut by ZeRO-3 among the workers that trained it",
            given="zero_pp_rank_*_model_states.pt",
            expected="mp_rank_*_model_states.pt, or layer_*-model_*-model_states.pt",
            fix="gather the weights with zero_to_fp32.py, which DeepSpeed put beside them, or savanna's "
            "convert_zero3_to_zero1.py",
        )
    settings, known = _settings(path), _published(pieces)
    if settings is None and known is None:
        raise ConfigError(
            f"{path} has no configuration",
            expected="the .yml file that savanna was run with, with operator-config, beside the weights or in configs/",
            fix="put it there; only files under a published name (savanna_evo2_7b.pt) are known without",
        )
    interleaved = settings is None or settings.flag("interleave_projections", True)
    axis = 0 if settings is None else head_axis(settings)
    shards = Shards(path, pieces, interleaved=interleaved, head_axis=axis)
    try:
        if settings is not None:
            config = model_config(settings, shards.infos)
        else:
            assert known is not None
            config = preset(known.preset)
        extras = {} if options.fp8 == "off" else _extra_states(path, config, shards)
        config = with_published_fp8(path, config, "no" if known is None else known.fp8, extras)
        source = SavannaSource(path, config, shards)
        contents = contents_of(path, config, Layout2(interleaved=interleaved), source, extras, options)
    except BaseException:
        shards.close()
        raise
    has_bytes = settings is None or settings.values.get("tokenizer_type") == "CharLevelTokenizer"
    assert contents.key_map is not None
    assert isinstance(contents.config, ModelConfig)
    return contents._replace(
        tokenizer=contents.tokenizer if has_bytes else None, key_map=_adapted(contents.config, contents.key_map)
    )


def _settings(path: Path) -> Settings | None:
    found = find_configurations(path)
    if len(found) > 1:
        raise ConfigError(
            f"{path} has {len(found)} configurations of savanna",
            given=", ".join(map(str, found)),
            expected="one",
            fix="keep the one that the weights were trained with",
        )
    return read_configuration(found[0]) if found else None


def _extra_states(path: Path, config: ModelConfig, shards: Shards) -> dict[str, Any]:
    """The pickles of Transformer Engine with the scales of FP8 projections, under their vortex names.

    Raises WeightsFormatError if shards were scaled differently, which one scale cannot express.
    """
    extras: dict[str, Any] = {}
    for index, block in enumerate(config.blocks):
        if isinstance(block.mixer, HyenaConfig):
            states = shards.extra_states(index + 2, "mixer.dense_projection")
            where = f"{show(f'{index + 2}.mixer.dense_projection._extra_state')} of {path}"
            scales = {None if found is None else tuple(map(float, found))
                      for found in (read_scales(where, state) for state in states)}  # fmt: skip
            if len(scales) > 1:
                raise WeightsFormatError(
                    f"{where} has other FP8 scales in each of its {len(states)} shards",
                    given=f"{len(scales)} different pairs",
                    expected="the same in all, as one projection has one scale",
                    fix="load it with fp8='off' to compute in the model's dtype, which marks the model as unverified",
                )
            if states:
                extras[f"blocks.{index}.projections._extra_state"] = states[0]
    return extras


def _adapted(config: ModelConfig, key_map: KeyMap) -> KeyMap:
    """``key_map`` with complex poles, which vortex has none of, and with savanna's names of settings."""
    complex_blocks = {
        f"blocks.{index}.mixer.filter."
        for index, block in enumerate(config.blocks)
        if isinstance(block.mixer, HyenaConfig) and isinstance(block.mixer.filter, ComplexModalFilterConfig)
    }

    def adapt(entry: Entry) -> Entry:
        prefix, name = entry.ours.rpartition(".")[0] + ".", entry.ours.rpartition(".")[2]
        if prefix not in complex_blocks:
            return entry
        ours, theirs = name.replace("log_poles", "poles"), entry.theirs.replace("log_poles", "poles")
        return Entry(prefix + ours, theirs)

    entries = tuple(map(adapt, key_map.entries))
    return dataclasses.replace(key_map, entries=entries, explained_by=_SETTINGS_THAT_DECIDE)


SAVANNA: Final = Format(
    name="savanna",
    looks_for="layer_*, mp_rank_* or .pt, operator-config in .yml",
    detect=_detect,
    read=_read,
)

"""StripedHyena 1 as published: StripedHyena-7B, Evo 1 and 1.5; ``config.yml`` + ``pytorch-model.bin``, or Hugging Face.

Both layouts hold the same tensors; the Hugging Face one puts ``backbone.`` before their names. Facts of the format:
togethercomputer/stripedhyena (``model.py``, ``engine.py``), evo-design/evo (``configs/``).
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from crocuta.checkpoints.format import Contents, Format, ReadOptions, TensorSource
from crocuta.checkpoints.keymap import Entry, Flip, KeyMap, Layout, Regroup, Squeeze
from crocuta.checkpoints.settings import MAX_LAYERS, Settings, find_yaml, peek_settings, read_settings
from crocuta.checkpoints.sources import TorchSource, has_hugging_face_weights, open_hugging_face, state_dict_of
from crocuta.checkpoints.torch_save.file import open_torch
from crocuta.config import (
    Activation,
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ModelConfig,
    RMSNormConfig,
    RopeConfig,
)
from crocuta.errors import CrocutaWarning
from crocuta.tokenizers.base import Tokenizer
from crocuta.tokenizers.foreign import byte_tokenizer, pieces_tokenizer

BYTE_VOCABULARY: Final = 512
HF_PREFIX: Final = "backbone."
ACTIVATIONS: Final = ("silu", "gelu")
LONG_CONTEXT_SCALE: Final = 16.0

# Names of ours to those of the published code; the first four are Evo 2's too.
TOP: Final = {"embedding.weight": "embedding_layer.weight", "norm.scale": "norm.scale"}
BLOCK: Final = {
    "pre_norm.scale": "pre_norm.scale",
    "post_norm.scale": "post_norm.scale",
    "mlp.gate.weight": "mlp.l1.weight",
    "mlp.up.weight": "mlp.l2.weight",
    "mlp.down.weight": "mlp.l3.weight",
}
ATTENTION: Final = {
    "mixer.qkv.weight": "inner_mha_cls.Wqkv.weight",
    "mixer.qkv.bias": "inner_mha_cls.Wqkv.bias",
    "mixer.output.weight": "inner_mha_cls.out_proj.weight",
    "mixer.output.bias": "inner_mha_cls.out_proj.bias",
}
ROWS: Final = ("mixer.projection.weight", "mixer.projection.bias", "mixer.short_taps", "mixer.short_bias")
"""Tensors of ours whose rows are those of (x2, x1, v)."""
_HYENA: Final = {
    "mixer.projection.weight": "projections.weight",
    "mixer.projection.bias": "projections.bias",
    "mixer.short_taps": "filter.short_filter_weight",
    "mixer.short_bias": "filter.short_filter_bias",
    "mixer.skip": "filter.D",
    "mixer.filter.poles": "filter.poles",
    "mixer.filter.residues": "filter.residues",
    "mixer.output.weight": "out_filter_dense.weight",
    "mixer.output.bias": "out_filter_dense.bias",
}
_EXPLAINED: Final = {
    r".*(embedding_layer|unembed)\.weight": "vocab_size, hidden_size, tie_embeddings",
    r".*Wqkv.*": "attn_layer_idxs, num_attention_heads, proj_groups, qkv_proj_bias",
    r".*out_proj.*": "attn_layer_idxs, mha_out_proj_bias",
    r".*(projections|out_filter_dense)\..*": "hidden_size, attn_layer_idxs",
    r".*short_filter.*": "short_filter_length, short_filter_bias",
    r".*filter\.D": "attn_layer_idxs, hidden_size",
    r"(.*\.)?norm\.scale": "hidden_size",
    r".*(poles|residues)": "state_size, hyena_filter_groups",
    r".*mlp\.l\d.*": "inner_mlp_size, inner_size_multiple_of",
    r".*_norm\.scale": "num_layers",
}
_JUNK: Final = (
    r".*rotary_emb\.inv_freq",  # computed from the base: upstream does so too, whatever the rounded file says
    r".*\.filter\.t",
    r".*(fftconv|twiddle_factors|\.freq).*",
)


@dataclass(frozen=True, kw_only=True)
class Layout1:
    """How a file of this family arranges what our configuration does not tell."""

    prefix: str = ""
    heads: int | None = None
    """Projections are split per head, among this many (column_split_hyena); None: into three thirds."""

    def rows(self) -> tuple[Layout, ...]:
        """From rows as stored to our [x2 | x1 | v]."""
        return () if self.heads is None else (Regroup(self.heads, 3),)


def key_map(config: ModelConfig, layout: Layout1) -> KeyMap:
    """Where each tensor of the model of ``config`` is."""
    prefix = layout.prefix
    entries = [Entry(ours, prefix + theirs) for ours, theirs in TOP.items()]
    copies = {}
    if config.tie_embeddings:
        copies[f"{prefix}unembed.weight"] = f"{prefix}embedding_layer.weight"
    else:
        entries.append(Entry("head.weight", f"{prefix}unembed.weight"))
    for index, block in enumerate(config.blocks):
        names = BLOCK | _mixer_names(block)
        for ours, theirs in names.items():
            name = f"{prefix}blocks.{index}.{theirs}"
            entries.append(Entry(f"blocks.{index}.{ours}", name, _layouts(ours, layout)))
    return KeyMap(tuple(entries), copies, _JUNK, _EXPLAINED)


def _mixer_names(block: BlockConfig) -> dict[str, str]:
    match block.mixer:
        case AttentionConfig() as mixer:
            absent = {
                "mixer.qkv.bias": not mixer.qkv_bias,
                "mixer.output.bias": not mixer.output_bias,
            }
            return {ours: theirs for ours, theirs in ATTENTION.items() if not absent.get(ours)}
        case _:
            return dict(_HYENA)


def _layouts(ours: str, layout: Layout1) -> tuple[Layout, ...]:
    shape: tuple[Layout, ...] = ()
    if ours == "mixer.short_taps":
        shape = (Squeeze(1), Flip())
    elif ours in ("mixer.filter.poles", "mixer.filter.residues"):
        shape = (Squeeze(2),)
    return shape + layout.rows() if ours in ROWS else shape


# --- configuration ---------------------------------------------------------------------------------------------


def model_config(settings: Settings, *, rope_base: float, rope_scale: float | None = None) -> ModelConfig:
    """The model that a published configuration describes; ``rope_base`` where it names none.

    ``rope_scale`` overrides what it says. Raises ConfigError for what no published code computes either.
    """
    hidden, layers = settings.size("hidden_size"), settings.size("num_layers", most=MAX_LAYERS)
    heads = settings.size("num_attention_heads")
    settings.refuse("hyena_filter_groups", 1, "the published code cannot decode with others")
    settings.refuse("smeared_gqa", False, "no published model has it")
    settings.refuse("final_norm", True, "the published code fails on all else")
    settings.refuse("short_filter_bias", True, "the published code fails on all else")
    settings.refuse("long_fir_threshold", None, "filters cut short are not supported")
    if rope_scale is None:
        interpolated = settings.flag("use_interpolated_rotary_pos_emb", False)
        rope_scale = settings.number("rotary_emb_scaling_factor", 1.0) if interpolated else 1.0
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=kv_heads(settings, heads),
        qkv_bias=settings.flag("qkv_proj_bias", True),
        output_bias=settings.flag("mha_out_proj_bias", True),
        rope=RopeConfig(base=settings.number("rotary_emb_base", rope_base), scale=rope_scale),
    )
    hyena = HyenaConfig(
        filter=ComplexModalFilterConfig(modes=settings.size("state_size"), poles="raw"),
        short_taps=settings.size("short_filter_length", 3),
        short_bias=True,
        projection_bias=True,
    )
    norm = RMSNormConfig(eps=settings.number("eps"), eps_inside_root=settings.flag("use_flash_rmsnorm", False))
    activation = activation_of(settings, "silu")
    mlp = GatedMLPConfig(intermediate_size=gated_width(settings, hidden), activation=activation)
    attended = settings.layers("attn_layer_idxs", layers)
    listed = settings.layers("hyena_layer_idxs", layers)
    if settings.has("hyena_layer_idxs") and (listed & attended or len(listed | attended) != layers):
        raise settings.error("hyena_layer_idxs", sorted(listed), "every layer that attn_layer_idxs does not name")
    return ModelConfig(
        vocab_size=settings.size("vocab_size"),
        hidden_size=hidden,
        blocks=tuple(
            BlockConfig(mixer=attention if i in attended else hyena, mlp=mlp, norm=norm) for i in range(layers)
        ),
        norm=norm,
        tie_embeddings=settings.flag("tie_embeddings", False),
    )


def kv_heads(settings: Settings, heads: int) -> int | None:
    groups = settings.size("proj_groups", 1)
    if heads % groups:
        raise settings.error("proj_groups", groups, f"a divisor of num_attention_heads={heads}")
    return None if groups == 1 else heads // groups


def activation_of(settings: Settings, default: str) -> Activation:
    """``mlp_activation``. Raises ConfigError for one that no published code has."""
    name = settings.text("mlp_activation", default)
    if name not in ACTIVATIONS:
        raise settings.error("mlp_activation", name, " or ".join(ACTIVATIONS))
    return cast(Activation, name)


def gated_width(settings: Settings, hidden: int) -> int:
    """``inner_mlp_size``, or 8/3 of the width rounded up to a multiple."""
    if settings.has("inner_mlp_size"):
        return settings.size("inner_mlp_size")
    multiple = settings.size("inner_size_multiple_of", 64) * settings.size("model_parallel_size", 1)
    return multiple * math.ceil(int(2 * hidden * 4 / 3) / multiple)


def layout_of(settings: Settings, prefix: str) -> Layout1:
    """How the file that belongs to these settings is arranged. ``column_split`` says nothing about it here."""
    split = settings.flag("column_split_hyena", True)
    return Layout1(
        prefix=prefix,
        heads=settings.size("num_attention_heads") if split else None,
    )


_STRIPEDHYENA_7B: Final = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_attention_heads": 32,
    "proj_groups": 4,
    "inner_mlp_size": 14_336,
    "state_size": 2,
    "eps": 1e-5,
    "rotary_emb_base": 500_000,
    "use_flash_rmsnorm": True,
    "qkv_proj_bias": False,
    "mha_out_proj_bias": False,
}
"""What the configuration class of StripedHyena-7B on Hugging Face takes where its file says nothing."""


# --- the two layouts -------------------------------------------------------------------------------------------


def _is_byte_level(settings: Settings) -> bool:
    return (
        settings.values.get("tokenizer_type") == "CharLevelTokenizer"
        or settings.values.get("vocab_size") == BYTE_VOCABULARY
    )


def _tokenizer(settings: Settings, folder: Path) -> Tokenizer | None:
    if _is_byte_level(settings):
        return byte_tokenizer(settings.size("vocab_size"))
    return pieces_tokenizer(folder, settings.values.get("vocab_file"))


def _weights(folder: Path) -> Path | None:
    for name in ("pytorch-model.bin", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for suffix in ("bin", "pt") for path in folder.glob(f"*.{suffix}") if path.is_file())
    return found[0] if len(found) == 1 else None


def _detect_standalone(path: Path) -> bool:
    yaml = find_yaml(path) if path.is_dir() else None
    return yaml is not None and _weights(path) is not None and "hyena_layer_idxs" in peek_settings(yaml)


def _read_standalone(path: Path, _: ReadOptions) -> Contents:
    yaml, weights = find_yaml(path), _weights(path)
    assert yaml is not None
    assert weights is not None
    settings = read_settings(yaml)
    config = model_config(settings, rope_base=10_000.0)
    tokenizer = _tokenizer(settings, path)
    file = open_torch(weights)
    try:
        source = TorchSource(file, state_dict_of(weights, file.tree, "state_dict", "model", "module"))
    except BaseException:
        file.close()
        raise
    return contents_of(settings, config, source, tokenizer)


def _detect_hugging_face(path: Path) -> bool:
    return has_hugging_face_weights(path) and peek_settings(path / "config.json").get("model_type") == "stripedhyena"


def _read_hugging_face(path: Path, _: ReadOptions) -> Contents:
    settings = read_settings(path / "config.json")
    evo = _is_byte_level(settings)
    scale = _published_scale(path, settings) if evo else None
    if not evo:  # transformers leaves out what equals the default
        settings = Settings(settings.path, {**_STRIPEDHYENA_7B, **settings.values})
    config = model_config(settings, rope_base=10_000.0, rope_scale=scale)
    tokenizer = _tokenizer(settings, path)
    return contents_of(settings, config, open_hugging_face(path), tokenizer)


def contents_of(settings: Settings, config: ModelConfig, source: TensorSource, tokenizer: Tokenizer | None) -> Contents:
    """The checkpoint, whose names have the prefix of Hugging Face or none."""
    prefix = HF_PREFIX if any(name.startswith(HF_PREFIX) for name in source.infos) else ""
    return Contents(config, source, tokenizer, key_map(config, layout_of(settings, prefix)))


def _published_scale(path: Path, settings: Settings) -> float | None:
    """16 for evo-1-131k-base, one of whose circulating config.json says 1; None for every other model."""
    names = [path.name, *(part.name for part in path.absolute().parents if part.name.startswith("models--"))]
    names.append(str(settings.values.get("_name_or_path", "")))
    longest = max(
        (v for k in ("max_seqlen", "max_sequence_len") if type(v := settings.values.get(k)) is int), default=0
    )
    if longest != 131_072 and not any(re.search(r"evo-?1(\.\d+)?-131k", name.lower()) for name in names):
        return None
    stated = settings.values.get("use_interpolated_rotary_pos_emb"), settings.values.get("rotary_emb_scaling_factor")
    if stated == (True, LONG_CONTEXT_SCALE):
        return LONG_CONTEXT_SCALE
    if stated[0] is True and stated[1] not in (None, 1):
        return None  # of a model that was trained further, to another length
    warnings.warn(
        f"{settings.path} gives (use_interpolated_rotary_pos_emb, rotary_emb_scaling_factor) = {stated}; "
        f"the model was published for (true, {LONG_CONTEXT_SCALE:g}), which is used",
        CrocutaWarning,
        stacklevel=2,
    )
    return LONG_CONTEXT_SCALE


STANDALONE: Final = Format(
    name="stripedhyena",
    looks_for="hyena_layer_idxs in config.yml, .bin",
    detect=_detect_standalone,
    read=_read_standalone,
)
HUGGING_FACE: Final = Format(
    name="stripedhyena-hf",
    looks_for="type stripedhyena in config.json, safetensors",
    detect=_detect_hugging_face,
    read=_read_hugging_face,
)

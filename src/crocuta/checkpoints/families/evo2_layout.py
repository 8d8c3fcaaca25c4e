"""What vortex calls the parts of Evo 2 (StripedHyena 2), how it arranges them, and how it describes a model.

Facts of the format: Zymrael/vortex (``model/model.py``), ArcInstitute/evo2 (``configs/``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

from crocuta.checkpoints.families.stripedhyena import (
    ATTENTION,
    BLOCK,
    ROWS,
    TOP,
    activation_of,
    gated_width,
    kv_heads,
)
from crocuta.checkpoints.keymap import Entry, Flip, KeyMap, Layout, Padded, Regroup, Squeeze, SwapGates
from crocuta.checkpoints.settings import MAX_LAYERS, Settings
from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ExplicitFilterConfig,
    FilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ModelConfig,
    RealModalFilterConfig,
    RMSNormConfig,
    RopeConfig,
)

TRUE_CONVOLUTION: Final = 128
"""From so many taps on, vortex takes an explicit filter for a convolution with D; below, for a correlation without."""
UNVERIFIED: Final = "crocuta_unverified"
"""Of our own, for ``ModelConfig.unverified``; the published code takes no notice of it."""
KINDS: Final = ("hcs", "hcm", "hcl", "attn")

FREQUENCIES: Final = "inner_mha_cls.rotary_emb.inv_freq"
_HYENA: Final = {
    "mixer.projection.weight": "projections.weight",
    "mixer.projection.bias": "projections.bias",
    "mixer.projection.input_scale": "projections.input_scale",
    "mixer.projection.weight_scale": "projections.weight_scale",
    "mixer.short_taps": "filter.short_filter_weight",
    "mixer.short_bias": "filter.short_filter_bias",
    "mixer.skip": "filter.D",
    "mixer.output.weight": "out_filter_dense.weight",
    "mixer.output.bias": "out_filter_dense.bias",
}
_EXPLAINED: Final = {
    r".*(embedding_layer|unembed)\.weight": "vocab_size, hidden_size, tie_embeddings",
    r".*Wqkv.*": "attn_layer_idxs, num_attention_heads, proj_groups, qkv_proj_bias",
    r".*out_proj.*": "attn_layer_idxs, mha_out_proj_bias",
    r".*out_filter_dense\..*": "hidden_size, hyena_out_proj_bias, attn_layer_idxs",
    r".*projections\..*": "hidden_size, qkv_proj_bias, attn_layer_idxs",
    r".*short_filter.*": "short_filter_length, short_filter_bias",
    r".*rotary_emb.*": "attn_layer_idxs, num_attention_heads",
    r".*filter\.D": "hcm_layer_idxs, hcl_layer_idxs, hidden_size",
    r"norm\.scale": "hidden_size",
    r".*filter\.h": "hcs_layer_idxs, hcs_filter_length, hcs_filter_groups, hcm_filter_length, hcm_filter_groups",
    r".*(log_poles|residues)": "hcl_layer_idxs, state_size",
    r".*mlp\.l\d.*": "inner_mlp_size, inner_size_multiple_of",
    r".*_norm\.scale": "num_layers",
}
_JUNK: Final = (
    r".*\._extra_state",  # of Transformer Engine; those of projections are read as scales before this applies
    r".*\.mixer\.mixer\.filter\.t",
    r".*\.filter\.t",
)


@dataclass(frozen=True, kw_only=True)
class Layout2:
    """How a file of this family arranges what our configuration does not tell."""

    interleaved: bool = True
    """Rows of projections are (x2, x1, v) of channel 0, then of channel 1, and so on (interleave)."""
    heads: int | None = None
    """After that they are split per head, among this many (column_split_hyena)."""
    flipped: bool = False
    """x1 comes before x2 (hyena_flip_x1x2)."""
    attention_per_head: bool = True
    """Rows of Wqkv are (q, k, v) of head 0, then of head 1, and so on (column_split)."""

    def rows(self, channels: int) -> tuple[Layout, ...]:
        """From rows as stored to our [x2 | x1 | v]."""
        steps: list[Layout] = []
        if self.interleaved:
            steps.append(Regroup(channels, 3))
        if self.heads is not None:
            steps.append(Regroup(self.heads, 3))
        if self.flipped:
            steps.append(SwapGates())
        return tuple(steps)


def key_map(config: ModelConfig, layout: Layout2, padded: int | None = None) -> KeyMap:
    """Where each tensor of the model of ``config`` is.

    ``padded``: how many units every MLP of the file has, those beyond ours zero.
    """
    entries = [Entry(ours, theirs) for ours, theirs in TOP.items()]
    copies = {}
    if config.tie_embeddings:
        copies["unembed.weight"] = "embedding_layer.weight"
    else:
        entries.append(Entry("head.weight", "unembed.weight"))
    for index, block in enumerate(config.blocks):
        for ours, theirs in (BLOCK | _mixer_names(block)).items():
            layouts = _layouts(ours, block, layout, config.hidden_size, padded)
            wide = ours in ("mixer.filter.weight", "mixer.rope.inverse")
            entries.append(Entry(f"blocks.{index}.{ours}", f"blocks.{index}.{theirs}", layouts, wide))
    return KeyMap(tuple(entries), copies, _JUNK, _EXPLAINED)


def _mixer_names(block: BlockConfig) -> dict[str, str]:
    match block.mixer:
        case AttentionConfig() as attention:
            absent = {
                "mixer.qkv.bias": not attention.qkv_bias,
                "mixer.output.bias": not attention.output_bias,
                "mixer.rope.inverse": attention.rope is None or not attention.rope.stored,
            }
            names = ATTENTION | {"mixer.rope.inverse": FREQUENCIES}
        case HyenaConfig() as hyena:
            absent = {
                "mixer.projection.bias": not hyena.projection_bias,
                "mixer.projection.input_scale": not hyena.fp8_projection,
                "mixer.projection.weight_scale": not hyena.fp8_projection,
                "mixer.short_bias": not hyena.short_bias,
                "mixer.skip": not hyena.skip,
                "mixer.output.bias": not hyena.output_bias,
            }
            names = _HYENA | _filter_names(hyena.filter)
    return {ours: theirs for ours, theirs in names.items() if not absent.get(ours)}


def _filter_names(filter_: FilterConfig) -> dict[str, str]:
    if isinstance(filter_, ExplicitFilterConfig):
        return {"mixer.filter.weight": "filter.h"}
    return {"mixer.filter.log_poles": "filter.log_poles", "mixer.filter.residues": "filter.residues"}


def _layouts(ours: str, block: BlockConfig, layout: Layout2, channels: int, padded: int | None) -> tuple[Layout, ...]:
    match ours, block.mixer:
        case "mixer.short_taps", _:
            return (Squeeze(1), Flip(), *layout.rows(channels))
        case _ if ours in ROWS:
            return layout.rows(channels)
        case "mixer.filter.weight", HyenaConfig(
            skip=True
        ):  # Hyena-MR, a true convolution: tap 0 is the current token's
            return (Squeeze(1),)
        case "mixer.filter.weight", _:  # Hyena-SE, a cross-correlation: the last tap is
            return (Squeeze(1), Flip())
        case "mixer.filter.log_poles", _:
            return (Squeeze(2),)
        case (("mixer.qkv.weight" | "mixer.qkv.bias"), AttentionConfig(num_heads=heads)) if layout.attention_per_head:
            return (Regroup(heads, 3),)
    if padded is not None and ours.startswith("mlp."):
        assert isinstance(block.mlp, GatedMLPConfig)
        return (Padded(1 if ours == "mlp.down.weight" else 0, block.mlp.intermediate_size, padded),)
    return ()


# --- configuration ---------------------------------------------------------------------------------------------


def model_config(settings: Settings) -> ModelConfig:
    """The model that a vortex configuration describes. Raises ConfigError."""
    hidden, layers = settings.size("hidden_size"), settings.size("num_layers", most=MAX_LAYERS)
    settings.refuse("final_norm", True, "the published code fails on all else")
    settings.refuse("smeared_gqa", False, "no published model has it")
    settings.refuse("long_fir_threshold", None, "filters cut short are not supported")
    kinds = _kinds(settings, layers)
    mixers = _mixers(settings, set(kinds))
    norm = RMSNormConfig(eps=settings.number("eps"), eps_inside_root=settings.flag("use_flash_rmsnorm", False))
    first = GatedMLPConfig(intermediate_size=gated_width(settings, hidden), activation=activation_of(settings, "gelu"))
    linear = dataclasses.replace(first, activation="identity")
    later = linear if settings.flag("evo2_style_activations", False) else first
    blocks = tuple(
        BlockConfig(mixer=mixers[kind], mlp=later if layer else first, norm=norm) for layer, kind in enumerate(kinds)
    )
    return ModelConfig(
        vocab_size=settings.size("vocab_size"),
        hidden_size=hidden,
        blocks=blocks,
        norm=norm,
        tie_embeddings=settings.flag("tie_embeddings", False),
        unverified=settings.text(UNVERIFIED, ""),
    )


def _kinds(settings: Settings, layers: int) -> list[str]:
    """The kind of every layer."""
    listed = {kind: settings.layers(f"{kind}_layer_idxs", layers) for kind in KINDS}
    kinds = []
    for layer in range(layers):
        found = [kind for kind in KINDS if layer in listed[kind]]
        if len(found) != 1:
            given = f"layer {layer} in {', '.join(f'{kind}_layer_idxs' for kind in found) or 'no list'}"
            raise settings.error(
                "the lists of layers", given, "every layer in one of hcs_, hcm_, hcl_, attn_layer_idxs"
            )
        kinds.append(found[0])
    return kinds


def _mixers(settings: Settings, kinds: Iterable[str]) -> dict[str, HyenaConfig | AttentionConfig]:
    # The defaults are vortex's, which differ for one key between attention and Hyena.
    hyena = partial(
        HyenaConfig,
        short_taps=settings.size("short_filter_length", 3),
        short_bias=settings.flag("short_filter_bias", False),
        projection_bias=settings.flag("qkv_proj_bias", False),
        output_bias=settings.flag("hyena_out_proj_bias", False),
        fp8_projection=settings.flag("use_fp8_input_projections", False),
    )
    mixers: dict[str, HyenaConfig | AttentionConfig] = {}
    for kind in kinds:
        match kind:
            case "hcs" | "hcm":
                taps = _taps(settings, kind, 7 if kind == "hcs" else TRUE_CONVOLUTION)
                mixers[kind] = hyena(filter=taps, skip=taps.taps >= TRUE_CONVOLUTION)
            case "hcl":
                mixers[kind] = hyena(filter=RealModalFilterConfig(modes=settings.size("state_size"), poles="raw"))
            case _:
                mixers[kind] = _attention(settings)
    return mixers


def _taps(settings: Settings, kind: str, default: int) -> ExplicitFilterConfig:
    hidden = settings.size("hidden_size")
    groups = settings.size(f"{kind}_filter_groups", hidden)
    if hidden % groups:
        raise settings.error(f"{kind}_filter_groups", groups, f"a divisor of hidden_size={hidden}")
    return ExplicitFilterConfig(taps=settings.size(f"{kind}_filter_length", default), groups=groups)


def _attention(settings: Settings) -> AttentionConfig:
    heads = settings.size("num_attention_heads")
    interpolated = settings.flag("use_interpolated_rotary_pos_emb", False)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=kv_heads(settings, heads),
        qkv_bias=settings.flag("qkv_proj_bias", True),
        output_bias=settings.flag("mha_out_proj_bias", True),
        rope=RopeConfig(
            base=settings.number("rotary_emb_base", 1_000_000.0),
            scale=settings.number("rotary_emb_scaling_factor", 1.0) if interpolated else 1.0,
            stored=True,
        ),
    )


def layout_of(settings: Settings) -> Layout2:
    """How the file that belongs to these settings is arranged. Raises ConfigError."""
    heads = settings.size("num_attention_heads")
    per_head = settings.flag("column_split", True)
    if per_head and kv_heads(settings, heads) is not None:
        raise settings.error("proj_groups", settings.values.get("proj_groups"), "1 where column_split is true")
    return Layout2(
        interleaved=settings.flag("interleave", False),
        heads=heads if settings.flag("column_split_hyena", True) else None,
        flipped=settings.flag("hyena_flip_x1x2", False),
        attention_per_head=per_head,
    )

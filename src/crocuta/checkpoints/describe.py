"""Our configuration in the words of the published ones, so that their code reads what we write.

Each function makes the published description of a model, reads it back with the function that loading uses, and
refuses a model that this does not give again: what a format cannot say is never left out in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from crocuta.checkpoints.families import evo2_layout, hyenadna, stripedhyena
from crocuta.checkpoints.settings import Settings
from crocuta.config import (
    AttentionConfig,
    BandsConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    MixerConfig,
    ModelConfig,
    PlainMLPConfig,
    RealModalFilterConfig,
    RMSNormConfig,
    RopeConfig,
    SineConfig,
)
from crocuta.errors import ConfigError

Values: TypeAlias = dict[str, Any]

_INERT: Final[Mapping[str, Any]] = {
    "make_vocab_size_divisible_by": 8,
    "inner_size_multiple_of": 16,
    "model_parallel_size": 1,
    "pipe_parallel_size": 1,
    "final_norm": True,
    "log_intermediate_values": False,
    "use_flash_attn": True,
    "use_flash_depthwise": False,
    "use_flashfft": False,  # without it the published code takes it for set
    "use_laughing_hyena": False,
    "inference_mode": True,
    "print_activations": False,
    "prefill_style": "fft",
    "max_batch_size": 1,
    "hyena_filter_groups": 1,
    "mlp_init_method": "torch.nn.init.zeros_",
    "mlp_output_init_method": "torch.nn.init.zeros_",
}
"""What the published code of StripedHyena asks for and no output depends on."""

_TRAINING: Final = ("timescales", "dropout", "embedding_dropout")
"""Fields of ours that decide nothing in a trained model, or nothing that a description holds."""


def stripedhyena_settings(config: ModelConfig) -> Values:
    """The ``config.yml`` of togethercomputer/stripedhyena. Raises ConfigError if ``config`` has none."""
    target = "a stripedhyena checkpoint"
    values = _common(config, target)
    hyena = _first(config, target, ComplexModalFilterConfig)
    assert isinstance(hyena.filter, ComplexModalFilterConfig)
    values |= {
        "hyena_layer_idxs": _layers(config, HyenaConfig),
        "short_filter_bias": hyena.short_bias,
        "state_size": hyena.filter.modes,
        "column_split_hyena": _attention(config) is not None,
        "column_split": False,
    }
    return _checked(config, values, lambda s: stripedhyena.model_config(s, rope_base=10_000.0), target)


def evo2_settings(config: ModelConfig) -> Values:
    """The ``config.yml`` of vortex. Raises ConfigError if ``config`` has none."""
    target = "an evo2 checkpoint"
    values = _common(config, target)
    kinds = {"hcs": [], "hcm": [], "hcl": []}  # type: dict[str, list[int]]
    for index, block in enumerate(config.blocks):
        match block.mixer:
            case HyenaConfig(filter=ExplicitFilterConfig() as taps, skip=skip):
                kind = "hcm" if skip else "hcs"
                kinds[kind].append(index)
                values |= {f"{kind}_filter_length": taps.taps}
                values |= {f"{kind}_filter_groups": taps.groups or config.hidden_size}
            case HyenaConfig(filter=RealModalFilterConfig(modes=modes)):
                kinds["hcl"].append(index)
                values |= {"state_size": modes, "hcl_filter_groups": config.hidden_size}
    hyena = next((block.mixer for block in config.blocks if isinstance(block.mixer, HyenaConfig)), None)
    if hyena is None:
        raise ConfigError(f"this model cannot be {target}", expected="a Hyena layer")
    activations = {block.mlp.activation for block in config.blocks[1:] if isinstance(block.mlp, GatedMLPConfig)}
    values |= {f"{kind}_layer_idxs": layers for kind, layers in kinds.items()}
    values |= {
        "short_filter_bias": hyena.short_bias,
        "qkv_proj_bias": hyena.projection_bias,
        "hyena_out_proj_bias": hyena.output_bias,
        "use_fp8_input_projections": hyena.fp8_projection,
        "evo2_style_activations": activations == {"identity"},
        "column_split_hyena": False,
        "column_split": (attention := _attention(config)) is None or _kv(attention) == attention.num_heads,
        "interleave": True,
        "hyena_flip_x1x2": False,
    }
    if config.unverified:
        values[evo2_layout.UNVERIFIED] = config.unverified
    return _checked(_stored_rope(config), values, evo2_layout.model_config, target)


def hyenadna_settings(config: ModelConfig) -> Values:
    """The ``config.json`` of the Hugging Face port of HyenaDNA. Raises ConfigError if ``config`` has none."""
    target = "a hyenadna-hf checkpoint"
    hyena = _first(config, target, ImplicitFilterConfig)
    block, filter_ = config.blocks[0], hyena.filter
    assert isinstance(filter_, ImplicitFilterConfig)
    if not isinstance(filter_.positions, BandsConfig) or not isinstance(filter_.activation, SineConfig):
        raise ConfigError(f"this model cannot be {target}", expected="filters of bands and sines")
    if not isinstance(block.mlp, PlainMLPConfig) or not isinstance(block.norm, LayerNormConfig):
        raise ConfigError(f"this model cannot be {target}", expected="plain MLPs and LayerNorm")
    values: Values = {
        "model_type": "hyenadna",
        "architectures": ["HyenaDNAForCausalLM"],
        "vocab_size": 12 if config.vocab_size == 16 else config.vocab_size,
        "pad_vocab_size_multiple": 8 if config.vocab_size % 8 == 0 else 1,
        "d_model": config.hidden_size,
        "d_inner": block.mlp.intermediate_size,
        "n_layer": len(config.blocks),
        "max_seq_len": filter_.max_length,
        "emb_dim": filter_.positions.features,
        "filter_order": filter_.width,
        "num_inner_mlps": filter_.inner_layers,
        "activation_freq": filter_.activation.frequency,
        "short_filter_order": hyena.short_taps,
        "hyena_order": 2,
        "use_bias": True,
        "train_freq": True,
        "embed_dropout": config.embedding_dropout,
        "hyena_dropout": 0.0,
        "hyena_filter_dropout": 0.0,
        "layer_norm_epsilon": block.norm.eps,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": 4,
    }
    return _checked(config, values, hyenadna.port_config, target)


def _common(config: ModelConfig, target: str) -> Values:
    """What both generations of StripedHyena say in the same words."""
    if not config.blocks or not isinstance(config.blocks[0].norm, RMSNormConfig):
        raise ConfigError(f"this model cannot be {target}", expected="blocks with RMSNorm")
    block = config.blocks[0]
    if not isinstance(block.mlp, GatedMLPConfig) or block.mlp.activation not in stripedhyena.ACTIVATIONS:
        raise ConfigError(f"this model cannot be {target}", expected="gated MLPs, of silu or gelu")
    assert isinstance(block.norm, RMSNormConfig)
    attention = _attention(config) or AttentionConfig(num_heads=1)
    rope = attention.rope or RopeConfig()
    hyena = next((block.mixer for block in config.blocks if isinstance(block.mixer, HyenaConfig)), None)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_filters": config.hidden_size,
        "inner_mlp_size": block.mlp.intermediate_size,
        "mlp_activation": block.mlp.activation,
        "num_layers": len(config.blocks),
        "attn_layer_idxs": _layers(config, AttentionConfig),
        "num_attention_heads": attention.num_heads,
        "proj_groups": attention.num_heads // _kv(attention),
        "qkv_proj_bias": attention.qkv_bias,
        "mha_out_proj_bias": attention.output_bias,
        "rotary_emb_base": rope.base,
        "use_interpolated_rotary_pos_emb": rope.scale != 1,
        "rotary_emb_scaling_factor": rope.scale,
        "short_filter_length": hyena.short_taps if hyena else 3,
        "eps": block.norm.eps,
        "use_flash_rmsnorm": block.norm.eps_inside_root,
        "max_seqlen": int(8192 * rope.scale),
        "tie_embeddings": config.tie_embeddings,
        "tokenizer_type": "CharLevelTokenizer" if config.vocab_size == 512 else "HFAutoTokenizer",
    }


def _layers(config: ModelConfig, kind: type) -> list[int]:
    return [index for index, block in enumerate(config.blocks) if isinstance(block.mixer, kind)]


def _attention(config: ModelConfig) -> AttentionConfig | None:
    return next((block.mixer for block in config.blocks if isinstance(block.mixer, AttentionConfig)), None)


def _kv(attention: AttentionConfig) -> int:
    return attention.num_kv_heads or attention.num_heads


def _first(config: ModelConfig, target: str, filter_kind: type) -> HyenaConfig:
    for block in config.blocks:
        if isinstance(block.mixer, HyenaConfig) and isinstance(block.mixer.filter, filter_kind):
            return block.mixer
    raise ConfigError(f"this model cannot be {target}", expected=f"a Hyena layer with {filter_kind.__name__[:-6]}")


def _stored_rope(config: ModelConfig) -> ModelConfig:
    """``config`` whose frequencies are tensors: an Evo 2 file has them always."""
    blocks = tuple(
        dataclasses.replace(
            block, mixer=dataclasses.replace(block.mixer, rope=dataclasses.replace(block.mixer.rope, stored=True))
        )
        if isinstance(block.mixer, AttentionConfig) and block.mixer.rope is not None
        else block
        for block in config.blocks
    )
    return dataclasses.replace(config, blocks=blocks)


def _checked(config: ModelConfig, values: Values, read: Callable[[Settings], ModelConfig], target: str) -> Values:
    """``values`` and what no output depends on, if ``read`` makes ``config`` of them. Raises ConfigError."""
    whole = values if "d_model" in values else values | {k: v for k, v in _INERT.items() if k not in values}
    try:
        again = read(Settings(target, whole))
    except ConfigError as error:
        raise ConfigError(f"this model cannot be {error.what}", given=error.given, expected=error.expected) from error
    lost = _difference(_normal(config).to_json(), _normal(again).to_json(), "")
    if lost is not None:
        where, given, expected = lost
        raise ConfigError(f"this model cannot be {target}: {where}", given=repr(given), expected=repr(expected))
    return whole


def _normal(config: ModelConfig) -> ModelConfig:
    """One spelling of what has two, and nothing that is not about the architecture."""

    def mixer(mixer: MixerConfig) -> MixerConfig:
        if isinstance(mixer, AttentionConfig):
            return dataclasses.replace(mixer, num_kv_heads=_kv(mixer))
        if not isinstance(mixer, HyenaConfig):
            return mixer
        if isinstance(mixer.filter, ImplicitFilterConfig):
            if not isinstance(mixer.filter.positions, BandsConfig):
                return mixer
            formula = dataclasses.replace(mixer.filter.positions, trained=False)  # a port's file holds both
            return dataclasses.replace(mixer, filter=dataclasses.replace(mixer.filter, positions=formula))
        groups = mixer.filter.groups or config.hidden_size
        return dataclasses.replace(mixer, filter=dataclasses.replace(mixer.filter, groups=groups))

    blocks = tuple(dataclasses.replace(block, mixer=mixer(block.mixer)) for block in config.blocks)
    return dataclasses.replace(config, blocks=blocks, precision="exact", unverified="")


def _difference(ours: Any, theirs: Any, where: str) -> tuple[str, Any, Any] | None:
    """The first place where two configurations compute different things, as (path, ours, theirs)."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("type") == theirs.get("type"):
        keys = [key for key in ours if key not in _TRAINING]
        found = (_difference(ours[key], theirs.get(key), f"{where}.{key}".lstrip(".")) for key in keys)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        found = (_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs)))
    else:
        return None if ours == theirs else (where, ours, theirs)
    return next((item for item in found if item is not None), None)

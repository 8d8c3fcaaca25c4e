"""What a savanna configuration file says about the model, once everything about training is left aside.

Facts of the format: Zymrael/savanna (``arguments/global_config.py`` for names and defaults, ``model/block.py``,
``model/operators/hyena/hyena.py``, ``model/activations.py``). What no checkpoint of StripedHyena needs, or what savanna
computes in another way than its own converter to vortex assumes, is refused by the name of its setting.

Two things are as vortex has them and not as savanna: norms have their eps outside the root even where savanna trained
through Transformer Engine's norm (use_fp8_norm), which has it inside; and of all FP8 layers only the projections of
Hyena layers are in FP8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from crocuta.checkpoints.families.savanna_files import folder_of
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.settings import MAX_LAYERS, Settings, read_settings
from crocuta.checkpoints.strict import read_small
from crocuta.config import (
    Activation,
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ModelConfig,
    RealModalFilterConfig,
    RMSNormConfig,
    RopeConfig,
)
from crocuta.errors import WeightsFormatError

ATTENTION: Final = ("flash", "flash_v2", "flash_te", "ring")
"""Operators that are one and the same attention, computed by different kernels."""
HYENA: Final = ("hyena_se", "hyena_mr", "hyena")
_ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "identity": "identity",
}
_REQUIRED: Final[dict[str, tuple[Any, Any]]] = {
    # setting: what it must be, what it is where the file says nothing
    "norm": ("rmsnorm", "layernorm"),
    "mlp_type": ("llama", "regular"),
    "pre_mlp_norm": (True, False),
    "prenorm": (True, True),
    "postnorm": (False, False),
    "outer_mlp_norm": (False, False),
    "gpt_j_residual": (False, False),
    "identity_mlp": (False, False),
    "safe": (False, False),
    "bias_gelu_fusion": (False, False),
    "onnx_safe": (False, False),
    "use_mup": (False, False),
    "proj_groups": (1, 1),
    "tie_projection_weights": (False, False),
    "hyena_width_expansion": (1, 1),
    "use_slow_heads": (False, False),
    "bidirectional": (False, False),
    "hyena_se_pregate": (True, True),
    "hyena_se_postgate": (True, True),
    "use_flashfft": (False, False),  # it leaves out D
    "rotary_pct": (1, 1),
    "num_unique_layers": (None, None),
    "soft_prompt_tuning": (None, None),
    "pretraining_strategy": ("AR", "AR"),
}
_KEYS = re.compile(rb"\b(operator[-_]config|num_groups_hyena)\b")
_OTHERS = re.compile(rb"\b(hcl|hyena)_layer_idxs\b")


# --- finding and reading it --------------------------------------------------------------------------------------


def find_configurations(path: Path) -> list[Path]:
    """The YAML files of savanna beside the weights, or in the folder "configs" there."""
    return [file for file, text in _yaml_files(path) if _KEYS.search(text)]


def has_other_configuration(path: Path) -> bool:
    """Whether a configuration of vortex or of StripedHyena 1 lies beside the weights."""
    return any(_OTHERS.search(text) for _, text in _yaml_files(path))


def _yaml_files(path: Path) -> Iterator[tuple[Path, bytes]]:
    folder = folder_of(path)
    for place in (folder, folder / "configs"):
        for file in sorted(place.glob("*.y*ml")) if place.is_dir() else ():
            if file.suffix in (".yml", ".yaml") and file.is_file():
                try:
                    yield file, read_small(file, WeightsFormatError)
                except WeightsFormatError:
                    continue


def read_configuration(path: Path) -> Settings:
    """Settings under names with underscores, as savanna itself takes both spellings. Raises ConfigError."""
    settings = read_settings(path)
    values: dict[str, Any] = {}
    for key, value in settings.values.items():
        name = key.replace("-", "_")
        if name in values and values[name] != value:
            raise settings.error(name, f"{values[name]!r} and {value!r}", "one value, with a hyphen or an underscore")
        values[name] = None if value == "None" and name != "pos_emb" else value
    return Settings(path, values)


# --- the model ---------------------------------------------------------------------------------------------------


def model_config(settings: Settings, infos: Mapping[str, TensorInfo]) -> ModelConfig:
    """The model that ``settings`` describe.

    Vocabulary, width of the MLPs and biases are those of the tensors: savanna pads them as its parallelism asks.
    Raises ConfigError.
    """
    _check_supported(settings)
    hidden = settings.size("hidden_size")
    operators = _operators(settings, settings.size("num_layers", most=MAX_LAYERS))
    if "hyena_mr" in operators and settings.flag("use_cgcg", False):
        raise settings.error("use_cgcg", True, "false: its kernel leaves out D")
    layers = {operator: [i + 2 for i, other in enumerate(operators) if other == operator] for operator in operators}
    mixers = {operator: _mixer(settings, operator, hidden, infos, layers[operator]) for operator in layers}
    width = _size(infos, "2.mlp.w1.weight", "2.mlp.gate_proj.weight")
    norm = RMSNormConfig(eps=settings.number("rms_norm_epsilon", 1e-8))
    blocks = tuple(
        BlockConfig(
            mixer=mixers[operator], mlp=GatedMLPConfig(intermediate_size=width, activation=activation), norm=norm
        )
        for operator, activation in zip(operators, _activations(settings, operators), strict=True)
    )
    return ModelConfig(
        vocab_size=_size(infos, "0.word_embeddings.weight"),
        hidden_size=hidden,
        blocks=blocks,
        norm=norm,
        tie_embeddings=not settings.flag("no_weight_tying", False),
    )


def head_axis(settings: Settings) -> int:
    """The axis along which shards of an untied head join."""
    way = settings.text("output_layer_parallelism", "row")
    if way not in ("row", "column"):
        raise settings.error("output_layer_parallelism", way, "row or column")
    return 1 if way == "row" else 0


def _check_supported(settings: Settings) -> None:
    for key, (needed, default) in _REQUIRED.items():
        value = settings.values.get(key)
        found = default if value is None else value
        if found != needed:
            raise settings.error(key, found, f"{needed!r}; savanna models with another are not supported")


def _operators(settings: Settings, layers: int) -> list[str]:
    """The operator of every block: a list of them, or of [[operators], repetitions]."""
    value = settings.values.get("operator_config")
    if not isinstance(value, list):
        raise settings.error("operator_config", value, "a list of [[operators], repetitions]")
    found: list[str] = []
    for item in value:
        if isinstance(item, str):
            found.append(item)
            continue
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and item[0]):
            raise settings.error("operator_config", item, "[[operators], repetitions]")
        names, times = item
        if times == "all" and layers % len(names) == 0:
            found = names * (layers // len(names))
            break
        if type(times) is not int or not 0 <= times <= MAX_LAYERS:
            raise settings.error("operator_config", item, "a number of repetitions")
        found += names * times
    for name in found:
        if name not in (*HYENA, *ATTENTION):
            raise settings.error("operator_config", name, f"only {', '.join((*HYENA, *ATTENTION))}")
    if len(found) != layers:
        raise settings.error("operator_config", f"{len(found)} operators", f"as many as num_layers, {layers}")
    return found


def _activations(settings: Settings, operators: Sequence[str]) -> list[Activation]:
    """The activation of every gated MLP.

    In savanna, building a Hyena-MR or Hyena-LI operator sets the activation of every MLP built after it to that of its
    gates, which is the identity; the MLP of a block is built after its operator.
    """
    first = "activation"
    if settings.has("parallel_glu_activation_default"):
        first = "parallel_glu_activation_default"
    names = [first] * len(operators)
    places = [place for place, operator in enumerate(operators) if operator in ("hyena", "hyena_mr")]
    if places and first == "activation":
        names[places[0] :] = ["gating_act"] * (len(operators) - places[0])
        stages = settings.values.get("pipe_parallel_size")
        if type(stages) is int and stages > 1:
            expected = "0 or 1, or parallel_glu_activation_default: activations depend on where the stages are cut"
            raise settings.error("pipe_parallel_size", stages, expected)
    return [_activation(settings, name) for name in names]


def _activation(settings: Settings, key: str) -> Activation:
    name = settings.text(key, "identity" if key == "gating_act" else "gelu")
    if name not in _ACTIVATIONS:
        raise settings.error(key, name, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def _mixer(
    settings: Settings, operator: str, hidden: int, infos: Mapping[str, TensorInfo], layers: Sequence[int]
) -> HyenaConfig | AttentionConfig:
    """The mixer of the operator that ``layers`` have."""

    def has(*names: str) -> bool:
        return any(f"{layer}.mixer.{name}" in infos for layer in layers for name in names)

    projection_bias = has("dense_projection.bias")
    output_bias = has("dense.weight", "dense.bias", "o_proj.bias")  # dense is never without
    if operator in ATTENTION:
        return AttentionConfig(
            num_heads=settings.size("num_attention_heads"),
            qkv_bias=projection_bias,
            output_bias=output_bias,
            rope=_rope(settings),
        )
    return HyenaConfig(
        filter=_filter(settings, operator, hidden, infos.get(f"{layers[0]}.mixer.mixer.filter.h")),
        short_taps=settings.size("short_conv_L"),
        short_bias=has("hyena_proj_conv.short_conv_bias"),
        projection_bias=projection_bias,
        output_bias=output_bias,
        skip=operator != "hyena_se",
        fp8_projection=settings.flag("use_fp8_input_projections", False),
    )


def _filter(settings: Settings, operator: str, hidden: int, stored: TensorInfo | None) -> FilterConfig:
    groups = settings.size("num_groups_hyena", hidden)
    kind_key = "hyena_filter_cls"
    match operator:
        case "hyena_se":
            groups = settings.size("num_groups_hyena_short", groups)
            return ExplicitFilterConfig(taps=settings.size("hyena_se_len", 3), groups=groups)
        case "hyena_mr":
            if settings.has("hyena_medium_filter_cls"):
                kind_key = "hyena_medium_filter_cls"
            _one_of(settings, kind_key, "explicit_single_decay")
            taps = settings.size("hyena_mr_len", 64)
            if stored is not None and len(stored.shape) == 2 and stored.shape[1] > 0:
                taps = min(taps, stored.shape[1])  # trained on sequences shorter than the filter
            return ExplicitFilterConfig(taps=taps, groups=settings.size("num_groups_hyena_medium", groups))
    modes = settings.size("hyena_filter_order", 64)
    distinct = None if groups == hidden else groups
    if _one_of(settings, kind_key, "implicit_modal", "implicit_complex_modal") == "implicit_modal":
        return RealModalFilterConfig(modes=modes, groups=distinct, poles="raw")
    if modes < 2:
        raise settings.error("hyena_filter_order", modes, "at least 2 for complex modes, which come in pairs")
    return ComplexModalFilterConfig(modes=modes // 2, groups=distinct, poles="raw")


def _one_of(settings: Settings, key: str, *known: str) -> str:
    value = settings.text(key, "implicit")
    if value not in known:
        raise settings.error(key, value, " or ".join(known))
    return value


def _rope(settings: Settings) -> RopeConfig | None:
    """Positions, which in savanna are an option of the whole model and act in attention only."""
    kind = settings.text("pos_emb", "learned")
    base = settings.number("rotary_emb_base", 10_000.0)
    match kind:
        case "rotary" | "rotary2":
            return RopeConfig(base=base)
        case "rotary_linear_scaled":
            return RopeConfig(base=base, scale=settings.number("rotary_emb_scaling_factor", 1.0))
        case "none" | "None":
            return None
    raise settings.error("pos_emb", kind, "rotary, rotary2, rotary_linear_scaled or none")


def _size(infos: Mapping[str, TensorInfo], *names: str) -> int:
    """The length of the first axis of whichever is there; 1 if none is, which is reported as missing later."""
    for name in names:
        if name in infos and infos[name].shape and infos[name].shape[0] > 0:
            return infos[name].shape[0]
    return 1

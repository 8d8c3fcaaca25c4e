"""HyenaDNA as published: a Lightning ``weights.ckpt`` with its ``config.json``, or the Hugging Face port.

Both hold the same tensors under different prefixes. Facts of the format: HazyResearch/hyena-dna
(``standalone_hyenadna.py``, ``src/models/sequence/long_conv_lm.py``), LongSafari/hyenadna-*-hf (``modeling_hyena.py``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from crocuta.checkpoints.families import hyenadna_order
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.format import Contents, FilterLayout, Format, ReadOptions, TensorSource
from crocuta.checkpoints.keymap import Entry, Flip, KeyMap, Layout, Squeeze
from crocuta.checkpoints.settings import MAX_LAYERS, Settings, peek_settings, read_settings
from crocuta.checkpoints.sources import TorchSource, has_hugging_face_weights, open_hugging_face, state_dict_of
from crocuta.checkpoints.torch_save.file import open_torch
from crocuta.config import (
    BandsConfig,
    BlockConfig,
    FixedWindowConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    ModelConfig,
    OrderNHyenaConfig,
    PlainMLPConfig,
    SineConfig,
)
from crocuta.errors import ConfigError, WeightsFormatError
from crocuta.model.filters import feature_count, positional_features, window_rates
from crocuta.tokenizers.dna import DNATokenizer

NORM_EPS: Final = 1e-5
WINDOW_SHIFT: Final = 0.05
"""Of the standalone file and the port; the training repository says 0, and published it with neither.

A filter layout names the code, and so its window: "interleaved" has the 0 of the training repository.
"""

_WINDOW: Final = {"fast_decay_pct": 0.3, "slow_decay_pct": 1.5, "target": 1e-2}

_TOP: Final = {
    "embedding.weight": "backbone.embeddings.word_embeddings.weight",
    "norm.scale": "backbone.ln_f.weight",
    "norm.bias": "backbone.ln_f.bias",
}
_BLOCK: Final = {
    "pre_norm.scale": "norm1.weight",
    "pre_norm.bias": "norm1.bias",
    "post_norm.scale": "norm2.weight",
    "post_norm.bias": "norm2.bias",
    "mlp.up.weight": "mlp.fc1.weight",
    "mlp.up.bias": "mlp.fc1.bias",
    "mlp.down.weight": "mlp.fc2.weight",
    "mlp.down.bias": "mlp.fc2.bias",
    "mixer.projection.weight": "mixer.in_proj.weight",
    "mixer.projection.bias": "mixer.in_proj.bias",
    "mixer.output.weight": "mixer.out_proj.weight",
    "mixer.output.bias": "mixer.out_proj.bias",
    "mixer.short_taps": "mixer.short_filter.weight",
    "mixer.short_bias": "mixer.short_filter.bias",
    "mixer.skip": "mixer.filter_fn.bias",
    "mixer.filter.frequency": "mixer.filter_fn.implicit_filter.1.freq",
}
_LAYOUTS: Final[Mapping[str, tuple[Layout, ...]]] = {
    "mixer.short_taps": (Squeeze(1), Flip()),
    "mixer.filter.frequency": (Squeeze(0),),
    "mixer.filter.features": (Squeeze(0),),
}
_EXPLAINED: Final = {
    r".*(word_embeddings|lm_head)\.weight": "vocab_size, pad_vocab_size_multiple, d_model, tie_word_embeddings",
    r".*mlp\..*": "d_inner",
    r".*ln_f\..*|.*filter_fn\.bias": "d_model",
    r".*(norm\d|in_proj|out_proj)\..*": "d_model, n_layer",
    r".*short_filter\..*": "short_filter_order, local_order",
    r".*implicit_filter\..*": "filter_order, emb_dim, num_inner_mlps",
    r".*(in_proj|short_filter|filter_fn)\..*": "order",
    r".*pos_emb\..*": "l_max (max_seq_len), emb_dim",
}
_JUNK: Final = (
    r"(?!.*backbone\.|.*lm_head\.).*(metric|loss|acc|torchmetrics|perplexity|num_tokens).*",  # of the trainer
    r".*\.pos_emb\.t",
    r".*\.modulation\.deltas",
)


def key_map(config: ModelConfig, prefix: str) -> KeyMap:
    """Where each tensor of the model of ``config`` is; names without the infix of checkpointed layers."""
    entries = [Entry(ours, prefix + theirs) for ours, theirs in _TOP.items()]
    copies, junk = {}, list(_JUNK)
    head = "lm_head.weight" if prefix == "hyena." else f"{prefix}lm_head.weight"
    if config.tie_embeddings:
        copies[head] = prefix + _TOP["embedding.weight"]
    else:
        entries.append(Entry("head.weight", head))
    for index, block in enumerate(config.blocks):
        start = f"{prefix}backbone.layers.{index}."
        names = _BLOCK | _filter_names(_implicit(block))
        found = [Entry(f"blocks.{index}.{our}", start + their, _LAYOUTS.get(our, ())) for our, their in names.items()]
        if isinstance(block.mixer, OrderNHyenaConfig):
            entries.extend(hyenadna_order.entries_of(block.mixer, config.hidden_size, found))
        else:
            entries.extend(found)
        if not _trained(_implicit(block)):  # then those of the file are those of the formula
            junk.append(re.escape(f"{start}mixer.filter_fn.pos_emb.z"))
        for layer in range(1, _implicit(block).inner_layers + 1):
            copies[f"{start}mixer.filter_fn.implicit_filter.{2 * layer + 1}.freq"] = (
                start + names["mixer.filter.frequency"]
            )
    return KeyMap(tuple(entries), copies, tuple(junk), _EXPLAINED)


def _implicit(block: BlockConfig) -> ImplicitFilterConfig:
    assert isinstance(block.mixer, HyenaConfig | OrderNHyenaConfig)
    assert isinstance(block.mixer.filter, ImplicitFilterConfig)
    return block.mixer.filter


def _trained(config: ImplicitFilterConfig) -> bool:
    """Whether the positional features are a tensor of the checkpoint."""
    return isinstance(config.positions, BandsConfig) and config.positions.trained


def _filter_names(config: ImplicitFilterConfig) -> dict[str, str]:
    names = {}
    for layer in range(config.inner_layers + 1):
        for part in ("weight", "bias"):
            names[f"mixer.filter.layers.{layer}.{part}"] = f"mixer.filter_fn.implicit_filter.{2 * layer}.{part}"
    last = 2 * (config.inner_layers + 1)
    names["mixer.filter.output.weight"] = f"mixer.filter_fn.implicit_filter.{last}.weight"
    if _trained(config):
        names["mixer.filter.features"] = "mixer.filter_fn.pos_emb.z"
    return names


class _Plain:
    """The tensors under names without ".layer.", and the shared frequency under its first name, whatever is stored."""

    def __init__(self, source: TensorSource):
        self._source = source
        self._names: dict[str, str] = {}
        for name in source.infos:
            plain = re.sub(r"\.(mixer|mlp)\.layer\.", r".\1.", name)
            if plain in self._names:
                raise WeightsFormatError(f"the weights hold both {self._names[plain]} and {name}")
            self._names[plain] = name
        for name in list(self._names):
            stored = re.fullmatch(r"(.*\.implicit_filter)\.(\d+)\.freq", name)
            if stored and stored[2] != "1" and f"{stored[1]}.1.freq" not in self._names:
                self._names[f"{stored[1]}.1.freq"] = self._names.pop(name)
        self.infos: Mapping[str, TensorInfo] = {plain: source.infos[name] for plain, name in self._names.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._source.read(self._names[name], rows)

    def close(self) -> None:
        self._source.close()


# --- configuration ---------------------------------------------------------------------------------------------


def original_config(settings: Settings, filter_layout: FilterLayout | None = None) -> ModelConfig:
    """The model of a config.json of the training repository."""
    layer = settings.section("layer")
    layer.refuse("_name_", "hyena", "only Hyena layers are known")
    layer.refuse("modulate", True, "every published model has the window")
    order = hyenadna_order.read_order(layer, filter_layout)
    for key in ("bidirectional", "linear_mixer", "normalized"):
        layer.refuse(key, False, "no published model has it")
    for key in ("inner_factor", "num_blocks"):
        layer.refuse(key, 1, "no published model has more")
    for key, value in _WINDOW.items():
        layer.refuse(key, value, "every published model has this window")
    layer.refuse("activation", "id", "no published model has one between the gates")
    # local_order is in every file and read by no code of the publisher.
    names = {"max_length": "l_max", "frequency": "w", "short_taps": "short_filter_order"}
    eps = settings.number("layer_norm_epsilon", NORM_EPS)
    interleaved = order > 2 and filter_layout == "interleaved"
    mixer = _mixer(layer, names, 0.0 if interleaved else WINDOW_SHIFT)
    config = _config(settings, mixer, norm_eps=(eps, eps), multiple=1, tied=True)
    if order == 2:
        return config
    dropout = _dropout(layer, "dropout", 0.0)
    mixer_n = hyenadna_order.mixer_config(mixer, order, interleaved=interleaved, dropout=dropout)
    return dataclasses.replace(config, blocks=tuple(dataclasses.replace(b, mixer=mixer_n) for b in config.blocks))


def port_config(settings: Settings) -> ModelConfig:
    """The model of a config.json of the Hugging Face port."""
    settings.refuse("hyena_order", 2, "the port makes filters for one convolution, whatever it says")
    settings.refuse("short_filter_order", 3, "the port pads for 3, whatever it says: other orders see the future")
    names = {"max_length": "max_seq_len", "frequency": "activation_freq", "short_taps": "short_filter_order"}
    # The port gives its epsilon to the last norm alone.
    norm_eps = NORM_EPS, settings.number("layer_norm_epsilon", NORM_EPS)
    tied = settings.flag("tie_word_embeddings", False)
    return _config(settings, _mixer(settings, names, WINDOW_SHIFT), norm_eps=norm_eps, multiple=8, tied=tied)


def _config(
    settings: Settings, mixer: HyenaConfig, *, norm_eps: tuple[float, float], multiple: int, tied: bool
) -> ModelConfig:
    """``norm_eps`` of the blocks and at the end; ``multiple`` that pads the vocabulary where nothing else is said."""
    width = settings.size("d_model")
    multiple = settings.size("pad_vocab_size_multiple", multiple)
    block = BlockConfig(
        mixer=mixer,
        mlp=PlainMLPConfig(intermediate_size=settings.size("d_inner", 4 * width)),
        norm=LayerNormConfig(eps=norm_eps[0]),
    )
    return ModelConfig(
        vocab_size=-(-settings.size("vocab_size") // multiple) * multiple,
        hidden_size=width,
        blocks=(block,) * settings.size("n_layer", most=MAX_LAYERS),
        norm=LayerNormConfig(eps=norm_eps[1]),
        tie_embeddings=tied,
        embedding_dropout=_dropout(settings, "embed_dropout", 0.1),
    )


def _mixer(layer: Settings, names: Mapping[str, str], shift: float) -> HyenaConfig:
    """Of order 2; ``shift`` of the window where ``layer`` says none."""
    filter_, short_taps = _filter_config(layer, names, shift), layer.size(names["short_taps"], 3)
    return HyenaConfig(filter=filter_, short_taps=short_taps, short_bias=True, projection_bias=True)


def _filter_config(layer: Settings, names: Mapping[str, str], shift: float) -> ImplicitFilterConfig:
    if layer.has("shift"):
        shift = 0.0 if layer.values["shift"] == 0 else layer.number("shift")
    inner = 0 if layer.values.get("num_inner_mlps") == 0 else layer.size("num_inner_mlps", 2, most=100)
    config = partial(
        ImplicitFilterConfig,
        max_length=layer.size(names["max_length"]),
        width=layer.size("filter_order", 64),
        inner_layers=inner,
        wide_positions=False,
        activation=SineConfig(frequency=layer.number(names["frequency"], 1.0)),
        window=FixedWindowConfig(shift=shift),
    )
    try:
        return config(positions=BandsConfig(features=layer.size("emb_dim", 3)))
    except ConfigError as error:
        raise ConfigError(f"{layer.path}: {error.what}", given=error.given, expected=error.expected) from error


def _dropout(settings: Settings, key: str, default: float) -> float:
    """A share that is dropped while training."""
    value = settings.values.get(key, default)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise settings.error(key, value, "0 <= dropout < 1")
    return float(value)


# --- what a file may hold beside the parameters ----------------------------------------------------------------


def _with_stored_features(config: ModelConfig, prefix: str, source: TensorSource) -> ModelConfig:
    """``config`` with features read from the file where they are not those that its formula gives.

    The port trains them, and rounding differs between machines: those of a file are what its filters saw.
    """
    blocks = []
    for index, block in enumerate(config.blocks):
        name = f"{prefix}backbone.layers.{index}.mixer.filter_fn.pos_emb.z"
        filter_ = _implicit(block)
        if name in source.infos and not _is_formula(filter_, source, name):
            assert isinstance(block.mixer, HyenaConfig | OrderNHyenaConfig)
            trained = BandsConfig(features=feature_count(filter_.positions), trained=True)
            filter_ = dataclasses.replace(filter_, positions=trained)
            block = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, filter=filter_))
        blocks.append(block)
    return dataclasses.replace(config, blocks=tuple(blocks))


def _is_formula(config: ImplicitFilterConfig, source: TensorSource, name: str) -> bool:
    if source.infos[name].shape != (1, config.max_length, feature_count(config.positions)):
        return False  # reported with all other misfits
    stored = source.read(name)[0]
    return torch.equal(positional_features(config, config.max_length, torch.empty(0)), stored)


def _check_window(config: ModelConfig, prefix: str, source: TensorSource) -> None:
    """WeightsFormatError where the stored rates of a window are not those of the configuration."""
    for index, block in enumerate(config.blocks):
        name = f"{prefix}backbone.layers.{index}.mixer.filter_fn.modulation.deltas"
        times = f"{prefix}backbone.layers.{index}.mixer.filter_fn.pos_emb.t"
        length, rows = _implicit(block).max_length, config.hidden_size * hyenadna_order.convolutions(block.mixer)
        if times in source.infos and (
            source.infos[times].shape != (1, length, 1)
            or not torch.allclose(source.read(times).float().flatten(), torch.linspace(0, 1, length), atol=1e-2)
        ):
            raise WeightsFormatError(
                f"{times} holds other times than the published ones", expected=f"{length} from 0 to 1"
            )
        if name in source.infos and source.infos[name].shape != (1, 1, rows):
            given, fix = list(source.infos[name].shape), "are d_model and order right?"
            raise WeightsFormatError(f"{name} is misshapen", given=given, expected=[1, 1, rows], fix=fix)
        if name in source.infos:
            window = _implicit(block).window
            assert isinstance(window, FixedWindowConfig)
            expected = window_rates(window, rows, torch.empty(0, dtype=torch.float64))
            found = source.read(name).flatten().abs()
            tolerance = max(1e-4, torch.finfo(found.dtype).eps) if found.is_floating_point() else 0.0
            if not torch.allclose(found.double(), expected, rtol=tolerance, atol=0):
                raise WeightsFormatError(
                    f"{name} holds other rates than the published window",
                    given=found[:3].tolist(),
                    expected=expected[:3].tolist(),
                    fix="models with another window are not known",
                )


# --- the two layouts -------------------------------------------------------------------------------------------


def contents_of(config: ModelConfig, prefix: str, source: TensorSource, special: Literal["sep", "cls_sep"]) -> Contents:
    """The checkpoint, after what only the weights tell: names with an infix, the window, trained features."""
    source = _Plain(source)
    _check_window(config, prefix, source)
    config = _with_stored_features(config, prefix, source)
    source = hyenadna_order.Parts(source, _divided(config, prefix))
    tokenizer = DNATokenizer(vocab_size=16 if config.vocab_size >= 16 else 12, special=special)
    return Contents(config, source, tokenizer, key_map(config, prefix))


def _divided(config: ModelConfig, prefix: str) -> dict[str, list[slice]]:
    """The tensors that feed several of ours, and which rows of them each gets."""
    return {
        f"{prefix}backbone.layers.{index}.{_filter_names(_implicit(block))['mixer.filter.output.weight']}": rows
        for index, block in enumerate(config.blocks)
        if isinstance(block.mixer, OrderNHyenaConfig)
        for rows in [hyenadna_order.rows_of(block.mixer, config.hidden_size)]
    }


def _weights(folder: Path) -> Path | None:
    if (folder / "weights.ckpt").is_file():
        return folder / "weights.ckpt"
    found = sorted(path for path in folder.glob("*.ckpt") if path.is_file())
    return found[0] if len(found) == 1 else None


def _detect_original(path: Path) -> bool:
    values: Mapping[str, Any] = peek_settings(path / "config.json") if path.is_dir() else {}
    return "d_model" in values and isinstance(values.get("layer"), dict) and _weights(path) is not None


def _read_original(path: Path, options: ReadOptions) -> Contents:
    weights = _weights(path)
    assert weights is not None
    config = original_config(read_settings(path / "config.json"), options.filter_layout)
    file = open_torch(weights)
    try:
        source = TorchSource(file, state_dict_of(weights, file.tree, "state_dict"))
        prefix = "model." if any(name.startswith("model.") for name in source.infos) else ""
        return contents_of(config, prefix, source, "cls_sep")
    except BaseException:
        file.close()
        raise


def _detect_port(path: Path) -> bool:
    return has_hugging_face_weights(path) and peek_settings(path / "config.json").get("model_type") == "hyenadna"


def _read_port(path: Path, _: ReadOptions) -> Contents:
    config = port_config(read_settings(path / "config.json"))
    source = open_hugging_face(path)
    try:
        return contents_of(config, "hyena.", source, "sep")
    except BaseException:
        source.close()
        raise


LIGHTNING: Final = Format(
    name="hyenadna-ckpt",
    looks_for="d_model in config.json, .ckpt",
    detect=_detect_original,
    read=_read_original,
)
HUGGING_FACE: Final = Format(
    name="hyenadna-hf",
    looks_for="type hyenadna in config.json, safetensors",
    detect=_detect_port,
    read=_read_port,
)

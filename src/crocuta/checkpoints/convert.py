"""From any checkpoint that can be loaded to our own layout or a published one, and the proof that nothing changed.

    native          config.json, model.safetensors
    stripedhyena    config.yml, pytorch-model.bin       togethercomputer/stripedhyena
    evo1-hf         config.json, model.safetensors      Evo 1 and StripedHyena-7B on the Hugging Face Hub
    evo2            config.yml, model.pt                vortex
    hyenadna-hf     config.json, model.safetensors      LongSafari/hyenadna-*-hf

Every tensor goes through the key map that loading uses, backwards. Beside them stand those that the published code
expects and that we compute: rotary frequencies, positional features, repetitions of tied embeddings.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from crocuta.checkpoints import commit, describe, native
from crocuta.checkpoints.families import evo2_layout, hyenadna, stripedhyena
from crocuta.checkpoints.families.evo2_layout import Layout2
from crocuta.checkpoints.families.stripedhyena import HF_PREFIX, Layout1
from crocuta.checkpoints.files import write_tensors
from crocuta.checkpoints.format import FilterLayout
from crocuta.checkpoints.keymap import KeyMap
from crocuta.checkpoints.load import load, load_stored
from crocuta.config import (
    AttentionConfig,
    BandsConfig,
    FixedWindowConfig,
    ImplicitFilterConfig,
    ModelConfig,
    RopeConfig,
)
from crocuta.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from crocuta.model.filters import positional_features, window_rates
from crocuta.model.lm import Model
from crocuta.model.raw_form import raw_form
from crocuta.ops.rope import inverse_frequencies
from crocuta.tokenizers.base import Tokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.tokenizers.foreign import byte_tokenizer
from crocuta.tokenizers.pieces import DEFINITION_FILE, PiecesTokenizer

Target: TypeAlias = Literal["native", "stripedhyena", "evo1-hf", "evo2", "hyenadna-hf"]
TARGETS: Final[tuple[Target, ...]] = get_args(Target)
PROBES: Final = 4
PROBE_LENGTH: Final = 200
TOLERANCE: Final = 1e-4
"""Of the largest logit; between layouts that hold the same bits the difference is 0."""


def convert(
    source: str | Path,
    destination: str | Path,
    to: Target,
    *,
    dtype: torch.dtype | None = None,
    fp8: Literal["auto", "off"] = "auto",
    keep_padding: bool = False,
    filter_layout: FilterLayout | None = None,
) -> None:
    """Write the checkpoint ``source`` as the new folder ``destination`` in the layout ``to``, whole or not at all.

    Options as of ``load``. A model of ours is brought to the published parametrisation first: poles from their decay
    and angle, taps with their envelope.

    Raises:
        InputError: unknown ``to``, or ``destination`` exists.
        ConfigError: the layout cannot hold this model; the message names the field.
        CheckpointError: the disk refused. MissingExtraError: YAML without PyYAML. And all that ``load`` raises.
    """
    if to not in TARGETS:
        raise InputError("unknown layout", given=repr(to), expected=", ".join(TARGETS))
    target = _new_path(destination)
    model, tokenizer = load_stored(source, dtype=dtype, fp8=fp8, keep_padding=keep_padding, filter_layout=filter_layout)
    if to == "native":
        native.save(model, tokenizer, target)
        return
    config, tensors = raw_form(model)
    export = _EXPORTS[to](config)
    _check_tokenizer(tokenizer, to, config)
    del model
    stored = _stored(tensors, export)
    commit.make_folders(target.absolute().parent)

    def write(folder: Path) -> None:
        export.write(folder, stored, export.settings)
        if isinstance(tokenizer, PiecesTokenizer):
            commit.replace_file(folder / DEFINITION_FILE, tokenizer.definition.encode())

    commit.write_folder(target, write, sealed=False)


def _new_path(destination: str | Path) -> Path:
    """Raises InputError for what exists, or can be no path."""
    try:
        os.lstat(destination)
    except FileNotFoundError:
        return Path(destination)
    except (TypeError, ValueError, OSError) as error:
        raise InputError("impossible destination", given=error, expected="a path") from error
    raise InputError(f"{destination} exists", expected="a new name", fix="choose another or remove it")


def verify(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    fp8: Literal["auto", "off"] = "auto",
    filter_layout: FilterLayout | None = None,
) -> float:
    """The largest difference between the logits of two checkpoints on fixed random sequences, one model at a time.

    Raises CheckpointError if it is more than 1e-4 of the largest logit, and all that ``load`` raises.
    """
    first = _probe(*load(source, dtype=dtype, fp8=fp8, precision="exact", filter_layout=filter_layout))
    second = _probe(*load(destination, dtype=dtype, fp8=fp8, precision="exact"))
    if first.shape != second.shape:
        given = f"logits of shapes {list(first.shape)} and {list(second.shape)}"
        raise CheckpointError(f"{destination} is not the model of {source}", given=given)
    difference = float((first - second).abs().max())
    if not difference <= TOLERANCE * float(first.abs().max()):
        raise CheckpointError(
            f"{destination} computes other logits than {source}",
            given=f"a difference of {difference:.3g}, logits up to {float(first.abs().max()):.3g}",
            expected=f"at most {TOLERANCE:g} of the largest",
        )
    return difference


def _check_tokenizer(tokenizer: Tokenizer | None, to: Target, config: ModelConfig) -> None:
    """ConfigError if whoever reads the layout would take another tokenizer than the model has."""
    if to == "hyenadna-hf":
        implied: Tokenizer | None = DNATokenizer(vocab_size=16 if config.vocab_size >= 16 else 12)
    elif to == "evo2" or config.vocab_size == stripedhyena.BYTE_VOCABULARY:
        implied = byte_tokenizer(config.vocab_size)
    else:
        implied = tokenizer if isinstance(tokenizer, PiecesTokenizer) else None
    if tokenizer is not None and (implied is None or implied.content_hash() != tokenizer.content_hash()):
        raise ConfigError(
            f"the layout {to} cannot keep this model's tokenizer",
            given=tokenizer.spec(),
            expected="none" if implied is None else implied.spec(),
            fix="save the model without a tokenizer first, if its own is kept elsewhere",
        )


@torch.no_grad()
def _probe(model: Model, _: Tokenizer | None) -> Tensor:
    length = min(PROBE_LENGTH, model.config.max_length or PROBE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (PROBES, length), generator=generator)
    return torch.cat([model(row[None]).double() for row in ids])


# --- the layouts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """How one layout is written: its description, its key map, what else its files hold, and the files."""

    settings: Mapping[str, Any]
    key_map: KeyMap
    computed: Mapping[str, Tensor]
    """Tensors that we compute and the published code reads."""
    write: Callable[[Path, Mapping[str, Any], Mapping[str, Any]], None]


def _stored(tensors: Mapping[str, Tensor], export: Export) -> dict[str, Any]:
    """Every tensor of the files; what is float32 in our model alone gets the model's dtype, if that loses nothing."""
    dtype = tensors["embedding.weight"].dtype
    stored: dict[str, Any] = {}
    for entry in export.key_map.entries:
        tensor = tensors[entry.ours]
        # Frequencies are float32 in the published files of long context, whatever they hold.
        narrowed = entry.wide and not entry.ours.endswith(".inverse")
        if narrowed and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            tensor = tensor.to(dtype)
        stored[entry.theirs] = entry.store(tensor)
    for copy, original in export.key_map.copies.items():
        if original in stored and copy.endswith("unembed.weight") and not copy.startswith(HF_PREFIX):
            stored[copy] = stored[original]
    return stored | dict(export.computed)


def _stripedhyena(config: ModelConfig) -> Export:
    settings = describe.stripedhyena_settings(config)
    keys = stripedhyena.key_map(config, _layout1(settings, ""))
    return Export(settings, keys, _frequencies(config, ""), _write_standalone)


def _evo1(config: ModelConfig) -> Export:
    settings = describe.stripedhyena_settings(config) | {
        "model_type": "stripedhyena",
        "architectures": ["StripedHyenaModelForCausalLM"],
    }
    keys = stripedhyena.key_map(config, _layout1(settings, HF_PREFIX))
    return Export(settings, keys, _frequencies(config, HF_PREFIX), _write_hugging_face)


def _layout1(settings: Mapping[str, Any], prefix: str) -> Layout1:
    heads = settings["num_attention_heads"] if settings["column_split_hyena"] else None
    return Layout1(prefix=prefix, heads=heads)


def _evo2(config: ModelConfig) -> Export:
    settings = describe.evo2_settings(config)
    keys = evo2_layout.key_map(config, Layout2(attention_per_head=bool(settings["column_split"])))
    return Export(settings, keys, _frequencies(config, ""), _write_vortex)


def _hyenadna(config: ModelConfig) -> Export:
    settings = describe.hyenadna_settings(config)
    keys = hyenadna.key_map(config, "hyena.")
    computed: dict[str, Tensor] = {}
    for index, block in enumerate(config.blocks):
        filter_ = getattr(block.mixer, "filter", None)
        assert isinstance(filter_, ImplicitFilterConfig)
        start, like = f"hyena.backbone.layers.{index}.mixer.filter_fn.", torch.empty(0)
        features = positional_features(filter_, filter_.max_length, like)
        assert isinstance(filter_.positions, BandsConfig)
        assert isinstance(filter_.window, FixedWindowConfig)
        if not filter_.positions.trained:
            computed[f"{start}pos_emb.z"] = features[None].contiguous()
        computed[f"{start}pos_emb.t"] = features[None, :, :1].contiguous()
        computed[f"{start}modulation.deltas"] = -window_rates(filter_.window, config.hidden_size, like)[None, None]
    return Export(settings, keys, computed, _write_hugging_face)


def _frequencies(config: ModelConfig, prefix: str) -> dict[str, Tensor]:
    """Of attention layers that do not store them."""
    found = {}
    for index, block in enumerate(config.blocks):
        match block.mixer:
            case AttentionConfig(rope=RopeConfig(stored=False, base=base), num_heads=heads):
                name = f"{prefix}blocks.{index}.{evo2_layout.FREQUENCIES}"
                found[name] = inverse_frequencies(config.hidden_size // heads, base)
    return found


_EXPORTS: Final[Mapping[str, Callable[[ModelConfig], Export]]] = {
    "stripedhyena": _stripedhyena,
    "evo1-hf": _evo1,
    "evo2": _evo2,
    "hyenadna-hf": _hyenadna,
}


# --- files -----------------------------------------------------------------------------------------------------


def _write_hugging_face(folder: Path, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    text = json.dumps({**settings, "torch_dtype": dtype}, indent=2) + "\n"
    commit.replace_file(folder / "config.json", text.encode())


def _write_standalone(folder: Path, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    torch.save(dict(tensors), folder / "pytorch-model.bin")
    commit.replace_file(folder / "config.yml", _yaml(settings))


def _write_vortex(folder: Path, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    torch.save(_with_pickled_scales(tensors), folder / "model.pt")
    commit.replace_file(folder / "config.yml", _yaml(settings))


def _with_pickled_scales(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """FP8 scales as Transformer Engine keeps them: a pickle in an io.BytesIO beside the weight."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        scale = re.fullmatch(r"(.*\.projections)\.(input|weight)_scale", name)
        if scale is None:
            found[name] = tensor
        elif scale[2] == "input":
            scales = torch.stack([tensor, tensors[f"{scale[1]}.weight_scale"]]).float()
            state = {"scale_fwd": scales, "scale_inv_fwd": 1 / scales, "amax_history_fwd": torch.zeros(16, 2)}
            blob = io.BytesIO()
            torch.save(state, blob)
            found[f"{scale[1]}._extra_state"] = io.BytesIO(blob.getvalue())
    return found


def _yaml(settings: Mapping[str, Any]) -> bytes:
    try:
        import yaml
    except ImportError as error:
        fix = "pip install 'crocuta[yaml]'"
        raise MissingExtraError("a config.yml needs the package PyYAML", fix=fix) from error
    return yaml.safe_dump(dict(settings), sort_keys=False).encode()

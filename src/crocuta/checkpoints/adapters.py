"""LoRA adapters as files: A and B of every adapted layer, and what else was trained beside them.

One safetensors file. Its header has the ``LoRAConfig`` and the configuration of the model that it belongs to; tensors
are ``lora.<layer>.a``, ``lora.<layer>.b`` and, of whatever the caller unfroze, ``trained.<parameter>``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from crocuta.checkpoints.files import TensorFile, all_finite, open_tensors, write_tensors
from crocuta.checkpoints.strict import strict_json
from crocuta.errors import InputError, NonFiniteError, WeightsFormatError
from crocuta.model.lora import LoRAConfig, LoRALinear, add_lora, lora_layers, target_layers
from crocuta.schema import decode, encode

FORMAT: Final = "crocuta-adapter"
VERSION: Final = "1"


def save_adapter(module: nn.Module, path: str | Path) -> None:
    """Write the adapters of ``module``, and its other parameters that require gradients, as one file.

    ``module`` is a whole model: something with a configuration. An existing file is replaced, whole or not at all.

    Raises:
        InputError: no adapters, adapters of several configurations or in a part of the module, or no configuration.
        NonFiniteError: a value is NaN or infinite. CheckpointError: the disk refused.
    """
    owner = _configuration(module)
    config = _config_of(module)
    tensors = {name: parameter.detach() for name, parameter in _parameters(module).items()}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise NonFiniteError(f"{name} has NaN or infinite values", fix=f"nothing was saved to {path}")
    texts = {"lora": json.dumps(encode(config)), "model": json.dumps(encode(owner))}
    write_tensors(Path(path), tensors, {"format": FORMAT, "version": VERSION, **texts})


def load_adapter(module: nn.Module, path: str | Path) -> LoRAConfig:
    """Adapt ``module`` as the file says: ``add_lora``, the values of A and B, and of what else was trained.

    The module's configuration must be the one that the file was saved with; whether its weights are the same, no file
    of this kind knows. Parameters that were trained beside A and B are overwritten, and require gradients again.

    Raises:
        WeightsFormatError: the file is broken, no adapter, or another model's. InputError: ``module`` has adapters.
        The module is then as it was.
    """
    with open_tensors(Path(path)) as file:
        config = _read_config(file, _configuration(module))
        if lora_layers(module):
            raise InputError("the module has adapters already", fix="merge_lora or remove_lora first")
        _check_tensors(file, module, config)
        tensors = {name: file.read(name) for name in file.infos}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise WeightsFormatError(f"{path}: {name} has NaN or infinite values")
    try:
        add_lora(module, config)
    except InputError as error:
        raise WeightsFormatError(f"{path} does not fit the model", given=error) from error
    plain = {name: parameter for name, parameter in _plain_names(module).items() if f"trained.{name}" in tensors}
    for parameter in plain.values():
        parameter.requires_grad_()
    with torch.no_grad():
        for name, parameter in _parameters(module).items():
            parameter.copy_(tensors[name])
    return config


def _configuration(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    if not dataclasses.is_dataclass(config):
        given = f"{type(module).__name__} without a configuration"
        raise InputError("an adapter belongs to a whole model", given=given, expected="a module with .config")
    return config


def _config_of(module: nn.Module) -> LoRAConfig:
    """The one configuration of all adapters of ``module``."""
    configs = {layer.config for layer in lora_layers(module).values()}
    if not configs:
        raise InputError("there are no adapters to save", given=type(module).__name__, fix="call add_lora first")
    config = min(configs, key=repr)
    plain = [name for name, layer in target_layers(module, config).items() if not isinstance(layer, LoRALinear)]
    if len(configs) > 1 or plain:
        given = f"{len(configs)} configurations, {len(plain)} layers without adapter"
        raise InputError("adapters of one file come from one add_lora of the whole model", given=given)
    return config


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What a file holds: A and B, and all else that requires gradients, by their names in the file."""
    layers = lora_layers(module)
    parts = {
        f"lora.{name}.{part}": p for name, layer in layers.items() for part, p in layer.low_rank.named_parameters()
    }
    own = {id(p) for p in parts.values()}
    others = {f"trained.{name}": p for name, p in _plain_names(module).items() if p.requires_grad and id(p) not in own}
    return parts | others


def _plain_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``module``, those of adapted layers by the names that they have in the plain module."""
    names = {
        id(p): f"{name}.{own}"
        for name, layer in lora_layers(module).items()
        for own, p in layer.plain.named_parameters()
    }
    return {names.get(id(p), name): p for name, p in module.named_parameters()}


def _read_config(file: TensorFile, owner: Any) -> LoRAConfig:
    """The LoRAConfig in the header of ``file``, after checking that the file belongs to a model of config ``owner``."""
    head = file.metadata
    if head.get("format") != FORMAT or head.get("version") != VERSION or not {"lora", "model"} <= head.keys():
        given = f"format {head.get('format')!r}, version {head.get('version')!r}"
        raise WeightsFormatError(
            f"{file.path} is not an adapter", given=given, expected=f"a file written by save_adapter, version {VERSION}"
        )
    try:
        config = decode(LoRAConfig, strict_json(head["lora"].encode()))
    except ValueError as error:
        raise WeightsFormatError(f"{file.path} describes no adapter", given=error) from error
    try:
        saved = decode(type(owner), strict_json(head["model"].encode()))
    except ValueError as error:
        expected = f"an adapter of a {type(owner).__name__}"
        raise WeightsFormatError(f"{file.path} belongs to another model", given=error, expected=expected) from error
    other = [f.name for f in dataclasses.fields(owner) if getattr(saved, f.name) != getattr(owner, f.name)]
    if other:
        given = f"another {', '.join(other)}"
        raise WeightsFormatError(
            f"{file.path} belongs to another model", given=given, fix="load it into the model that it was trained on"
        )
    return config


def _check_tensors(file: TensorFile, module: nn.Module, config: LoRAConfig) -> None:
    """WeightsFormatError unless ``file`` holds A and B of every layer, and nothing that the plain module lacks."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, layer in target_layers(module, config).items():
        assert isinstance(layer, nn.Linear)
        wanted[f"lora.{name}.a"] = config.rank, layer.in_features
        wanted[f"lora.{name}.b"] = layer.out_features, config.rank
    others = {f"trained.{name}": tuple(p.shape) for name, p in module.named_parameters()}
    for name in sorted(wanted.keys() - file.infos.keys()):
        raise WeightsFormatError(f"{file.path} lacks {name}", fix="save the adapter again")
    for name, info in file.infos.items():
        shape = wanted.get(name, others.get(name))
        if shape is None:
            raise WeightsFormatError(f"{file.path} holds {name}, which the model has not")
        if info.shape != shape or not info.dtype.is_floating_point:
            given, expected = f"{list(info.shape)} {info.dtype}", f"{list(shape)} of floating-point numbers"
            raise WeightsFormatError(f"{file.path}: {name} does not fit", given=given, expected=expected)

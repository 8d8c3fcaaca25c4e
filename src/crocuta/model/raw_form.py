"""Models in the parametrisation that published checkpoints have: poles as numbers, taps with their envelope."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from crocuta.config import (
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    HyenaConfig,
    ModelConfig,
    RealModalFilterConfig,
)
from crocuta.model.filters import ExplicitFilter, ModalFilter
from crocuta.model.lm import Model


@torch.no_grad()
def raw_form(model: Model) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and state dict of a model that computes the same, with "raw" poles and no decay on taps.

    Tensors of a model that already is in that form are its own. A pole that was |p| < 1 by parametrisation is a plain
    number afterwards: round to the nearest float32.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    blocks = list(model.config.blocks)
    for index, block in enumerate(blocks):
        if not isinstance(block.mixer, HyenaConfig):
            continue
        prefix = f"blocks.{index}.mixer.filter"
        filter_, module = block.mixer.filter, model.get_submodule(prefix)
        match filter_:
            case ExplicitFilterConfig(decay=decay) if decay is not None:
                assert isinstance(module, ExplicitFilter)
                tensors[f"{prefix}.weight"] = module.taps(filter_.taps)
                filter_ = dataclasses.replace(filter_, decay=None)
            case ComplexModalFilterConfig(poles="stable") | RealModalFilterConfig(poles="stable"):
                assert isinstance(module, ModalFilter)
                for name in ("log_decay", "angle"):
                    tensors.pop(f"{prefix}.{name}", None)
                tensors |= {f"{prefix}.{name}": value for name, value in _raw(module).items()}
                filter_ = dataclasses.replace(filter_, poles="raw")
        blocks[index] = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, filter=filter_))
    return dataclasses.replace(model.config, blocks=tuple(blocks)), tensors


def _raw(module: ModalFilter) -> dict[str, Tensor]:
    logs = module.logs()
    if not module.is_complex:
        return {"log_poles": logs}
    wide = logs.double()
    modulus, angle = wide[..., 0].exp(), wide[..., 1]
    return {"poles": torch.stack([modulus * angle.cos(), modulus * angle.sin()], dim=-1).to(logs.dtype)}

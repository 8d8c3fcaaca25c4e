"""Every published configuration, the file that belongs to it, and what the library makes of both."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import published_configs as configs
import published_keys as keys
import pytest
from published_keys import BF16, F32, Keys
from torch import Tensor

from crocuta.checkpoints.families import evo2_layout, hyenadna, stripedhyena
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.keymap import KeyMap
from crocuta.checkpoints.settings import Settings
from crocuta.config import (
    BandsConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModelConfig,
)
from crocuta.model.build import build_model
from crocuta.presets import preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One published configuration and the file that belongs to it, beside what the library makes of them."""

    name: str
    family: str
    settings: dict[str, Any]
    stored: Keys
    read: Callable[[Settings], ModelConfig]
    """What the library reads in the settings."""
    expected: ModelConfig
    mapped: Callable[[ModelConfig], KeyMap]

    def found(self) -> dict[str, TensorInfo]:
        """What a source gives for the file: with the scales, which it takes out of pickles, as tensors."""
        infos = {name: TensorInfo(stored.dtype, stored.shape) for name, stored in self.stored.items()}
        return infos | self.scales()

    def scales(self) -> dict[str, TensorInfo]:
        return {
            f"blocks.{layer}.projections.{kind}_scale": TensorInfo(F32, ())
            for layer, block in enumerate(self.expected.blocks)
            if isinstance(block.mixer, HyenaConfig) and block.mixer.fp8_projection
            for kind in ("input", "weight")
        }


def with_mixers(config: ModelConfig, change: Callable[[HyenaConfig], HyenaConfig]) -> ModelConfig:
    blocks = (
        dataclasses.replace(block, mixer=change(block.mixer)) if isinstance(block.mixer, HyenaConfig) else block
        for block in config.blocks
    )
    return dataclasses.replace(config, blocks=tuple(blocks))


def in_fp8(config: ModelConfig) -> ModelConfig:
    return with_mixers(config, lambda mixer: dataclasses.replace(mixer, fp8_projection=True))


def with_units(config: ModelConfig, units: int) -> ModelConfig:
    """``config`` with gated MLPs of so many units."""
    blocks = (
        dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, intermediate_size=units))
        for block in config.blocks
        if isinstance(block.mlp, GatedMLPConfig)
    )
    return dataclasses.replace(config, blocks=tuple(blocks))


def with_trained_features(config: ModelConfig) -> ModelConfig:
    def change(mixer: HyenaConfig) -> HyenaConfig:
        assert isinstance(mixer.filter, ImplicitFilterConfig)
        return dataclasses.replace(mixer, filter=dataclasses.replace(mixer.filter, positions=BandsConfig(trained=True)))

    return with_mixers(config, change)


def stripedhyena_case(name: str, settings: dict[str, Any], expected: ModelConfig, prefix: str, **options: Any) -> Case:
    is_hugging_face = "model_type" in settings
    base = 500_000.0 if is_hugging_face and settings["vocab_size"] != 512 else 10_000.0
    return Case(
        name=name,
        family="evo1" if settings["vocab_size"] == 512 else "stripedhyena",
        settings=settings,
        stored=keys.stripedhyena(settings, prefix, **options),
        read=lambda read: stripedhyena.model_config(read, rope_base=base),
        expected=expected,
        mapped=lambda config: stripedhyena.key_map(config, stripedhyena.layout_of(Settings(name, settings), prefix)),
    )


def evo2_case(name: str) -> Case:
    settings = configs.EVO2[name]
    return Case(
        name=name,
        family="evo2",
        settings=settings,
        stored=keys.evo2(settings, keys.EVO2_FILES[name]),
        read=evo2_layout.model_config,
        expected=in_fp8(preset(name)),
        mapped=lambda config: evo2_layout.key_map(config, evo2_layout.layout_of(Settings(name, settings))),
    )


def lightning_case(name: str) -> Case:
    settings = configs.HYENADNA[name]
    checkpointed = settings.get("checkpoint_mixer", False)
    stored = keys.hyenadna(*configs.HYENADNA_SIZES[name], checkpointed=checkpointed)
    return Case(
        name=f"{name}-ckpt",
        family="hyenadna",
        settings=settings,
        stored={plain: stored[name] for plain, name in plain_names(stored).items()},
        read=hyenadna.original_config,
        expected=preset(name),
        mapped=lambda config: hyenadna.key_map(config, "model."),
    )


def port_case(name: str, trained: bool) -> Case:
    """The port's head is a tensor of its own; ``trained``: so are its positional features."""
    untied = dataclasses.replace(preset(name), tie_embeddings=False)
    return Case(
        name=f"{name}-hf{'-trained' if trained else ''}",
        family="hyenadna",
        settings=configs.HYENADNA_HF[name],
        stored=keys.hyenadna_hf(*configs.HYENADNA_SIZES[name], trained_features=trained),
        read=lambda read: with_trained_features(hyenadna.port_config(read)) if trained else hyenadna.port_config(read),
        expected=with_trained_features(untied) if trained else untied,
        mapped=lambda config: hyenadna.key_map(config, "hyena."),
    )


class Listed:
    """A source that only says what it holds."""

    def __init__(self, infos: Mapping[str, TensorInfo]):
        self.infos = infos

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        raise AssertionError(f"{name} was read")

    def close(self) -> None:
        pass


def plain_names(stored: Keys) -> dict[str, str]:
    """Names as the key map of HyenaDNA knows them, to those of the file."""
    listed = Listed({name: TensorInfo(s.dtype, s.shape) for name, s in stored.items()})
    return dict(hyenadna._Plain(listed)._names)


def cases() -> Iterator[Case]:
    seven, evo1, long = preset("stripedhyena-7b"), preset("evo1-8k"), preset("evo1-131k")
    stem = dataclasses.replace(seven, blocks=(seven.blocks[0],) * 4)
    yield stripedhyena_case("stripedhyena-7b", configs.STRIPEDHYENA_7B, seven, "")
    yield stripedhyena_case("stripedhyena-stem", configs.STRIPEDHYENA_STEM, stem, "")
    yield stripedhyena_case("stripedhyena-7b-hf", configs.STRIPEDHYENA_7B_HF, seven, "backbone.")
    yield stripedhyena_case("evo1-8k-yml", configs.EVO1_8K, evo1, "", copied_head=True)
    yield stripedhyena_case("evo1-131k-yml", configs.EVO1_131K, long, "")
    yield stripedhyena_case("evo1-8k-hf", configs.EVO1_8K_HF, evo1, "backbone.")
    yield stripedhyena_case("evo1-131k-hf", configs.EVO1_131K_HF, long, "backbone.")
    yield from map(evo2_case, configs.EVO2)
    yield from map(lightning_case, configs.HYENADNA)
    for trained in (False, True):
        yield from (port_case(name, trained) for name in configs.HYENADNA_HF)


CASES = {case.name: case for case in cases()}
every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def ours(config: ModelConfig) -> tuple[dict[str, TensorInfo], int]:
    """Our state dict at its narrowest dtypes, and the number of parameters."""
    model = build_model(config, device="meta").to(BF16)
    infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    return infos, sum(parameter.numel() for parameter in model.parameters())


@functools.cache
def mapped(name: str) -> KeyMap:
    return CASES[name].mapped(CASES[name].expected)

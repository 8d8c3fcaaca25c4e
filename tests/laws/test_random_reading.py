"""500 random models, each read through one state whose rows come, go, fork, move, and are saved midway.

Whatever happened to a row, its logits are those of its sequence alone, read as a whole: to 1e-9 in float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import loud

from crocuta.config import (
    AttentionConfig,
    BandsConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    DecayConfig,
    ExplicitFilterConfig,
    FilterConfig,
    FixedWindowConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    MixerConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    PlainMLPConfig,
    RealModalFilterConfig,
    RMSNormConfig,
    RopeConfig,
)
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.model.state import ModelState, State

VOCABULARY = 8
LIMIT = 150
"""Tokens a row may reach, and what implicit filters are defined for."""
STEPS = 14


# --- random models ---


def random_filter(draw: random.Random, channels: int) -> FilterConfig:
    groups = draw.choice([None, channels // 2, 1])
    timescales = (1.0, draw.choice([4.0, 50.0, 500.0]))
    poles: Any = draw.choice(["stable", "raw"])
    match draw.choice(["short", "medium", "long", "implicit", "complex", "real"]):
        case "short":
            return ExplicitFilterConfig(taps=draw.randint(1, 12), groups=groups)
        case "medium":
            decay = DecayConfig(horizon=64, rates=(0.1, 10.0))
            return ExplicitFilterConfig(taps=draw.randint(13, 140), groups=groups, decay=draw.choice([None, decay]))
        case "long":
            return ExplicitFilterConfig(taps=draw.randint(513, 640), groups=groups)
        case "implicit":
            return ImplicitFilterConfig(
                max_length=LIMIT,
                width=draw.choice([4, 8]),
                inner_layers=draw.randint(0, 2),
                positions=BandsConfig(features=draw.choice([3, 5]), trained=draw.random() < 0.3),
                window=FixedWindowConfig(shift=draw.choice([0.0, 0.05])),
            )
        case "complex":
            return ComplexModalFilterConfig(modes=draw.randint(1, 4), groups=groups, poles=poles, timescales=timescales)
        case _:
            return RealModalFilterConfig(modes=draw.randint(1, 4), groups=groups, poles=poles, timescales=timescales)


def random_mixer(draw: random.Random, channels: int) -> MixerConfig:
    if draw.random() < 0.3:
        heads = draw.choice([1, 2])
        base, scale = draw.choice([100.0, 10_000.0]), draw.choice([1.0, 3.0])
        rope = RopeConfig(base=base, scale=scale, stored=draw.random() < 0.3)
        return AttentionConfig(
            num_heads=heads,
            num_kv_heads=draw.choice([None, 1]),
            qkv_bias=draw.random() < 0.5,
            output_bias=draw.random() < 0.5,
            rope=draw.choice([None, rope, rope]),
        )
    return HyenaConfig(
        filter=random_filter(draw, channels),
        short_taps=draw.randint(1, 5),
        short_bias=draw.random() < 0.5,
        projection_bias=draw.random() < 0.5,
        output_bias=draw.random() < 0.5,
        skip=draw.random() < 0.5,
    )


def random_model(draw: random.Random) -> Model:
    """One to three blocks of any mixers, loud, in float64."""
    channels = draw.choice([4, 8, 12])
    norms: list[NormConfig] = [RMSNormConfig(), RMSNormConfig(eps_inside_root=True), LayerNormConfig()]
    mlps: list[MLPConfig | None] = [GatedMLPConfig(intermediate_size=6), PlainMLPConfig(intermediate_size=5), None]
    blocks = tuple(
        BlockConfig(mixer=random_mixer(draw, channels), mlp=draw.choice(mlps), norm=draw.choice(norms))
        for _ in range(draw.randint(1, 3))
    )
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=channels,
        blocks=blocks,
        norm=draw.choice(norms),
        tie_embeddings=draw.random() < 0.5,
    )
    return loud(build_model(config, seed=draw.randint(0, 99)), draw.randint(0, 99)).to(torch.float64).eval()


# --- random reading ---


@dataclass
class Row:
    """A sequence, as far as it is known and read, and the logits that it got."""

    ids: list[int]
    logits: list[torch.Tensor]


class Reader:
    """One state whose rows meet everything that may happen to a row."""

    def __init__(self, model: Model, draw: random.Random, folder: Path) -> None:
        self.model, self.draw, self.path = model, draw, folder / "state.safetensors"
        self.room = draw.randint(90, LIMIT)
        self.state = model.init_state(1, self.room)
        self.rows = [Row([], [])]
        self.left: list[Row] = []

    def steps(self) -> list[Callable[[], None]]:
        others = [self.admit, self.remove, self.reorder, self.fork, self.replace, self.save, self.resize, self.copy]
        return [self.draw.choice([self.feed, self.draw.choice(others)]) for _ in range(STEPS)]

    def feed(self) -> None:
        """Tokens for every row, of any number, or as many for all; behind those of a row lies junk."""
        width = self.draw.choice([1, 1, 2, 3, 5, 17, 33, 64, 70])
        free = [self.room - len(row.ids) for row in self.rows]
        alike = self.draw.random() < 0.4 and min(free) >= width
        amounts = [width if alike else self.draw.randint(0, min(width, most)) for most in free]
        ids = torch.tensor([[self.draw.randrange(VOCABULARY) for _ in range(width)] for _ in self.rows])
        logits = self.model.extend(ids, self.state, None if alike else torch.tensor(amounts))
        for row, tokens, values, amount in zip(self.rows, ids.tolist(), logits, amounts, strict=True):
            row.ids += tokens[:amount]
            row.logits.append(values[:amount])
        assert self.state.lengths.tolist() == [len(row.ids) for row in self.rows]

    def admit(self) -> None:
        """One or two rows at the end, one of which has been read a little elsewhere."""
        ids = [self.draw.randrange(VOCABULARY) for _ in range(self.draw.randint(1, 40))]
        ahead = self.model.init_state(1, self.room)
        logits = self.model.extend(torch.tensor([ids]), ahead)[0]
        fresh = self.model.init_state(1, self.room)
        count = self.draw.randint(1, 2)
        self.state = self.state.join([ahead, fresh][:count])
        self.rows += [Row(ids, [logits]), Row([], [])][:count]
        if len(self.rows) > 5:
            self.remove()

    def remove(self) -> None:
        """Some rows, but not all."""
        places = self.draw.sample(range(len(self.rows)), self.draw.randint(0, len(self.rows) - 1))
        self.state = self.state.without(places)
        self.left += [self.rows[place] for place in places]
        self.rows = [row for place, row in enumerate(self.rows) if place not in places]

    def reorder(self) -> None:
        places = list(range(len(self.rows)))
        self.draw.shuffle(places)
        self.state, self.rows = self.state.select(places), [self.rows[place] for place in places]

    def fork(self) -> None:
        """A row twice or three times; its copies go different ways."""
        place = self.draw.randrange(len(self.rows))
        times = self.draw.randint(1, 2)
        self.state = self.state.select([*range(len(self.rows)), *[place] * times])
        self.rows += [Row(list(self.rows[place].ids), list(self.rows[place].logits)) for _ in range(times)]

    def replace(self) -> None:
        """A new sequence in the place of an old one."""
        place = self.draw.randrange(len(self.rows))
        self.state.write([place], self.model.init_state(1, self.room))
        self.left.append(self.rows[place])
        self.rows[place] = Row([], [])

    def save(self) -> None:
        self.state.save(self.path)
        self.state = self.model.load_state(self.path)

    def resize(self) -> None:
        self.room = self.draw.randint(max([40, *(len(row.ids) for row in self.rows)]), LIMIT)
        self.state = self.model.with_room(self.state, self.room)

    def copy(self) -> None:
        """What is read into a copy leaves its origin where it was."""
        other, origin = self.state, self.state.copy()
        free = self.room - max(len(row.ids) for row in self.rows)
        if free:
            self.model.extend(torch.zeros(len(self.rows), min(free, 3), dtype=torch.int64), other)
        self.state = origin


@torch.no_grad()
def worst_difference(seed: int, folder: Path) -> float:
    """Of any row's logits, from those of its sequence read alone as a whole."""
    draw = random.Random(seed)
    model = random_model(draw)
    reader = Reader(model, draw, folder)
    for step in reader.steps():
        step()
    reader.feed()
    worst = 0.0
    for row in reader.left + reader.rows:
        if row.ids:
            difference = torch.cat(row.logits) - model(torch.tensor([row.ids]))[0]
            worst = max(worst, float(difference.abs().nan_to_num(nan=torch.inf).max()))
    return worst


@pytest.mark.parametrize("part", range(5))
@settings(max_examples=100)
@given(seed=st.integers(0, 10**9))
def test_each_row_gets_the_logits_that_it_gets_alone(part, seed, tmp_path_factory):
    """Five times 100 cases, so that a failure does not hide the rest."""
    folder = tmp_path_factory.mktemp("state")
    assert worst_difference(5 * seed + part, folder) <= 1e-9


# --- the controls: faults that the law must find ---


def swap_rows(state: State, name: str) -> State:
    """``state`` with the first and the last row exchanged in the first tensor of that name."""
    for full_name, tensor in state.named_tensors():
        if full_name.endswith(name) and tensor.shape[0] > 1:
            first = tensor[0].clone()
            tensor[0] = tensor[-1]
            tensor[-1] = first
            return state
    return state


@pytest.mark.parametrize("name", ["short.tail", "long.modes", "long.tail", "keys"])
@pytest.mark.parametrize("verb", ["select", "join", "copy"])
def test_a_row_that_gets_a_part_of_another_s_state_is_found(verb, name, monkeypatch, tmp_path):
    original = getattr(ModelState, verb)
    monkeypatch.setattr(ModelState, verb, lambda self, *rest: swap_rows(original(self, *rest), name))
    assert any(worst_difference(seed, tmp_path) > 1e-3 for seed in range(40))

"""A row's logits do not know of the rows beside it: rows of any length, fed any amounts, that come and go."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, MAX_LENGTH, random_ids, tiny_model

from crocuta.model.lm import Model
from crocuta.model.state import ModelState


@dataclass
class Row:
    """A sequence that is being read, and the logits it has got so far."""

    ids: torch.Tensor
    read: int
    logits: list[torch.Tensor]


class Reader:
    """Reads many sequences through one state whose rows are admitted, fed and removed at random."""

    def __init__(self, model: Model, draw: random.Random) -> None:
        self.model, self.draw = model, draw
        self.state: ModelState | None = None
        self.rows: list[Row] = []

    def admit(self, ids: torch.Tensor) -> None:
        """A row at the end."""
        fresh = self.model.init_state(1, MAX_LENGTH)
        self.state = fresh if self.state is None else self.state.join([fresh])
        self.rows.append(Row(ids, 0, []))

    def replace(self, place: int, ids: torch.Tensor) -> Row:
        """Overwrite a row in place, and return the one that stood there."""
        assert self.state is not None
        self.state.write([place], self.model.init_state(1, MAX_LENGTH))
        former, self.rows[place] = self.rows[place], Row(ids, 0, [])
        return former

    def keep(self, places: list[int]) -> None:
        """Remove all other rows, and bring these into the given order."""
        assert self.state is not None
        self.state = self.state.select(places)
        self.rows = [self.rows[place] for place in places]

    def feed(self) -> None:
        """The next tokens of every row, from none to all of them; what lies behind them is junk."""
        assert self.state is not None
        width = self.draw.choice([1, 2, 3, 4, 7, 33, 40])
        amounts = [self.draw.randint(0, min(width, len(row.ids) - row.read)) for row in self.rows]
        ids = random_ids(len(self.rows), width, seed=self.draw.randint(0, 99))
        for place, (row, amount) in enumerate(zip(self.rows, amounts)):
            ids[place, :amount] = row.ids[row.read : row.read + amount]
        logits = self.model.extend(ids, self.state, torch.tensor(amounts))
        for place, (row, amount) in enumerate(zip(self.rows, amounts)):
            row.logits.append(logits[place, :amount])
            row.read += amount
        assert self.state.lengths.tolist() == [row.read for row in self.rows]


def read_all(model: Model, sequences: list[torch.Tensor], draw: random.Random) -> list[Row]:
    """Every sequence, read to its end, in the order in which they ended."""
    reader, waiting, finished = Reader(model, draw), list(sequences), []
    while waiting or reader.rows:
        while waiting and (not reader.rows or (len(reader.rows) < 4 and draw.random() < 0.5)):
            reader.admit(waiting.pop())
        reader.feed()
        ended = [place for place, row in enumerate(reader.rows) if row.read == len(row.ids)]
        for place in ended:
            if waiting and draw.random() < 0.5:
                finished.append(reader.replace(place, waiting.pop()))
        ended = [place for place, row in enumerate(reader.rows) if row.read == len(row.ids)]
        finished += [reader.rows[place] for place in ended]
        going = [place for place in range(len(reader.rows)) if place not in ended]
        draw.shuffle(going)
        reader.keep(going)
    return finished


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(lengths=st.lists(st.integers(1, 75), min_size=2, max_size=5), seed=st.integers(0, 999))
def test_each_row_gets_the_logits_that_it_gets_alone(kind, lengths, seed):
    model = tiny_model(kind, torch.float64, seed=1)
    sequences = [random_ids(length, seed=row) for row, length in enumerate(lengths)]
    rows = read_all(model, sequences, random.Random(seed))
    assert sorted(len(row.ids) for row in rows) == sorted(lengths)
    for row in rows:
        torch.testing.assert_close(torch.cat(row.logits), model(row.ids[None])[0], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_that_is_read_as_tokens_breaks_the_law(kind):
    """The control: without ``lengths`` the junk behind a row's tokens is heard."""
    model = tiny_model(kind, torch.float64, seed=1)
    ids, start = random_ids(2, 10, seed=2), random_ids(2, 9, seed=3)
    start[1, 3:] = ids[1, 0]  # six more of one token
    whole = torch.cat([start[1, :3], ids[1]])[None]
    for lengths, holds in ((torch.tensor([9, 3]), True), (None, False)):
        state = model.init_state(2, MAX_LENGTH)
        model.extend(start, state, lengths)
        difference = (model.extend(ids, state)[1] - model(whole)[0, 3:]).abs().max()
        assert bool(difference < 1e-9) == holds
        assert holds or difference > 0.01

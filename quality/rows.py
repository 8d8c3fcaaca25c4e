"""The rows of the table: where each one's training batches and tests come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crocuta.data.loader import WindowLoader
from crocuta.data.synthetic import IGNORED, Examples, SyntheticTask
from crocuta.data.windows import TokenSource

Unit: TypeAlias = Literal["accuracy", "bits"]

VALIDATION_SEED = 1_000_003
"""Added to the seed for the draw that chooses a learning rate; no test has it."""


class Row(ABC):
    """Data of one row: ``batch`` gives training examples without end, ``tests`` what the figures are of."""

    name: str
    vocab_size: int
    length: int
    """Of the longest input."""
    unit: Unit = "accuracy"
    decoder: Literal["tokens", "last token"] = "tokens"

    @abstractmethod
    def batch(self, step: int, size: int) -> Examples:
        """The examples of update ``step``."""

    @abstractmethod
    def tests(self) -> Mapping[str, Examples]:
        """Held-out examples by name."""

    def validation(self) -> Examples | None:
        """Examples to choose a learning rate by, where the row has some that are neither trained on nor a test."""
        return None


class SyntheticRow(Row):
    """A synthetic task: fresh sequences at each update, or ``train_examples`` of them, in a new order each epoch."""

    def __init__(self, task: SyntheticTask, seed: int, *, test_examples: int, train_examples: int | None) -> None:
        self.task, self.seed, self.test_examples = task, seed, test_examples
        self.name, self.vocab_size, self.length = task.name, task.vocab_size, task.input_length
        self.decoder = "last token" if task.name == "compression" else "tokens"
        self._examples = None if train_examples is None else task.draw(train_examples, seed)

    def batch(self, step: int, size: int) -> Examples:
        if self._examples is None:
            return self.task.draw(size, self.seed, "train", step)
        count = len(self._examples.inputs)
        places = np.arange(step * size, (step + 1) * size)
        rows = np.concatenate(
            [self._order(epoch)[places[places // count == epoch] % count] for epoch in np.unique(places // count)]
        )
        return Examples(*(array[rows] for array in self._examples))

    def tests(self) -> Mapping[str, Examples]:
        return {"test": self.task.draw(self.test_examples, self.seed, "test")}

    def validation(self) -> Examples:
        return self.task.draw(self.test_examples, self.seed + VALIDATION_SEED, "test")

    def _order(self, epoch: np.int64) -> NDArray[np.int64]:
        assert self._examples is not None
        bits = np.random.Philox(np.random.SeedSequence([self.seed, int(epoch)]))
        return bits.random_raw(len(self._examples.inputs)).argsort(kind="stable")


class StreamRow(Row):
    """Next tokens of real sequences: random windows of the ``training`` stream; ``held_out`` are windows [n l+1].

    Targets equal to ``unknown`` (letters that are no base) do not count.
    """

    unit: Unit = "bits"

    def __init__(
        self,
        name: str,
        vocab_size: int,
        length: int,
        training: Sequence[NDArray[np.integer]],
        held_out: Mapping[str, NDArray[np.integer]],
        seed: int,
        unknown: int | None = None,
    ) -> None:
        self.name, self.vocab_size, self.length, self.seed, self.unknown = name, vocab_size, length, seed, unknown
        self._training, self._held_out = TokenSource.from_array(np.concatenate(training)), held_out
        self._loader: WindowLoader | None = None

    def batch(self, step: int, size: int) -> Examples:
        if self._loader is None or self._loader.batch_size != size:
            self._loader = WindowLoader(self._training, self.length, size, self.seed)
        return self._examples(*self._loader.batch(step))

    def tests(self) -> Mapping[str, Examples]:
        windows = {name: array.astype(np.int64) for name, array in self._held_out.items()}
        return {name: self._examples(array[:, :-1], array[:, 1:]) for name, array in windows.items()}

    def _examples(self, inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> Examples:
        known = targets if self.unknown is None else np.where(targets == self.unknown, IGNORED, targets)
        return Examples(np.ascontiguousarray(inputs), np.ascontiguousarray(known))


class Labelled(NamedTuple):
    """Sequences [n l] of one length and their classes [n]."""

    sequences: NDArray[np.int64]
    classes: NDArray[np.int64]


@dataclass
class ClassesRow(Row):
    """Two classes or more: after a sequence and a question token the model says a token that names the class.

    The question is the token after the sequences' vocabulary, the classes are those after it.
    """

    name: str
    letters: int
    """Tokens that sequences are made of."""
    classes: int
    training: Labelled
    held_out: Mapping[str, Labelled]
    seed: int
    vocab_size: int = field(init=False)
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.vocab_size = self.letters + 1 + self.classes
        self.length = self.training.sequences.shape[1] + 1

    def batch(self, step: int, size: int) -> Examples:
        bits = np.random.Philox(np.random.SeedSequence([self.seed, step])).random_raw(size)
        rows = (bits % np.uint64(len(self.training.classes))).astype(np.int64)
        return self._examples(Labelled(self.training.sequences[rows], self.training.classes[rows]))

    def tests(self) -> Mapping[str, Examples]:
        return {name: self._examples(labelled) for name, labelled in self.held_out.items()}

    def _examples(self, labelled: Labelled) -> Examples:
        question = np.full((len(labelled.classes), 1), self.letters)
        targets = np.full((len(labelled.classes), self.length), IGNORED)
        targets[:, -1] = self.letters + 1 + labelled.classes
        return Examples(np.concatenate([labelled.sequences, question], axis=1), targets)

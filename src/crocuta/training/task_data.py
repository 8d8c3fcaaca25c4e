"""From labelled sequences to batches: ids and targets, ragged rows of similar length, in an order of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.data.label_map import LabelMap, label_map
from crocuta.data.labelled import Example
from crocuta.data.splits import SPLITS, SequenceKey, SplitName, read_splits
from crocuta.errors import InputError, TokenizerError
from crocuta.tokenizers.base import Tokenizer
from crocuta.training.finetune_config import FineTuneConfig, RegressionTask

IGNORED = -100
"""Target of a token that has no label."""
_POOL = 16
"""Batches whose rows are sorted by length together: enough for little padding, few enough for a random order."""


@dataclass(frozen=True)
class Row:
    """Ids [l] and what is to be predicted: a class [], a class a token [l], or targets [t] in float64."""

    ids: Int[Tensor, " l"]
    target: Tensor


@dataclass(frozen=True)
class Batch:
    """Right-padded ids [b l], the rows' lengths [b] and their targets [b], [b l] (padding is IGNORED) or [b t]."""

    ids: Int[Tensor, "b l"]
    lengths: Int[Tensor, " b"]
    targets: Tensor


@dataclass(frozen=True)
class TargetScale:
    """Mean and deviation of each target in the training split; a constant target has the deviation 1."""

    mean: Float[Tensor, " t"]
    deviation: Float[Tensor, " t"]

    @classmethod
    def of(cls, targets: Float[Tensor, "n t"]) -> TargetScale:
        """From the training targets alone, in float64."""
        deviation = targets.std(0, correction=0)
        return cls(targets.mean(0), torch.where(deviation > 0, deviation, 1.0))

    def standardised(self, targets: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """(targets - mean) / deviation, in float32."""
        return ((targets - self.mean) / self.deviation).float()


@dataclass(frozen=True)
class TaskData:
    """The rows of each split, and what their targets mean: ``labels`` of classes, ``scale`` of numbers."""

    rows: dict[SplitName, list[Row]]
    labels: LabelMap | None
    scale: TargetScale | None

    @property
    def outputs(self) -> int:
        """How many numbers the head must give."""
        if self.labels is not None:
            return len(self.labels.names)
        assert self.scale is not None
        return len(self.scale.mean)


def read_task_data(
    config: FineTuneConfig, tokenizer: Tokenizer, *, vocab_size: int, max_length: int | None
) -> TaskData:
    """The data of ``config``, checked against the vocabulary and the longest sequence of the model.

    Raises:
        InputError: a sequence that the model cannot read or a label that does not fit it, named by file and line; a
            split without any label; and all that ``read_splits`` and ``label_map`` raise.
    """
    both_strands = tokenizer.type == "dna" or config.reverse_complement != "off"
    splits = read_splits(
        config.data.splits,
        config.task.kind,
        config.data.format,
        key=_sequence_key(tokenizer, both_strands),
        allow_shared=config.data.allow_shared,
    )
    if isinstance(config.task, RegressionTask):
        labels, scale = None, TargetScale.of(torch.tensor([e.label for e in splits.train], dtype=torch.float64))
    else:
        labels, scale = label_map(splits), None
    rows: dict[SplitName, list[Row]] = {}
    for name in SPLITS:
        rows[name] = []
        for example in splits[name]:
            ids = _ids(example, tokenizer, vocab_size, max_length)
            rows[name].append(Row(ids, _target(example, len(ids), labels, scale)))
        if labels and rows[name] and all(bool((row.target == IGNORED).all()) for row in rows[name]):
            raise InputError(f"no token of the {name} split has a label", expected="at least one")
    return TaskData(rows, labels, scale)


def _sequence_key(tokenizer: Tokenizer, both_strands: bool) -> SequenceKey:
    """A sequence as the model sees it: its ids, and with ``both_strands`` the smaller of those and their complement."""
    complement = tokenizer.complement_ids if both_strands else None

    def key(sequence: str) -> bytes:
        ids = tokenizer.encode(sequence)
        return ids.tobytes() if complement is None else min(ids.tobytes(), complement[ids[::-1]].tobytes())

    return key


def _ids(example: Example, tokenizer: Tokenizer, vocab_size: int, max_length: int | None) -> Tensor:
    try:
        ids = torch.from_numpy(tokenizer.encode(example.sequence))
    except TokenizerError as error:
        raise TokenizerError(f"{example.where}: {error.what}", given=error.given, expected=error.expected) from error
    if not len(ids) or int(ids.max()) >= vocab_size:
        given = f"ids up to {int(ids.max())}" if len(ids) else "no token"
        raise InputError(f"{example.where}: the model cannot read this", given=given, expected=f"ids < {vocab_size}")
    if max_length is not None and len(ids) > max_length:
        raise InputError(
            f"{example.where}: the sequence is longer than the model's filters are defined for",
            given=f"{len(ids)} tokens",
            expected=f"at most {max_length}",
            fix="cut it, or take a model with longer filters",
        )
    return ids


def _target(example: Example, length: int, labels: LabelMap | None, scale: TargetScale | None) -> Tensor:
    if scale is not None:
        values = torch.tensor(example.label, dtype=torch.float64)
        if values.shape != scale.mean.shape:
            what = f"{example.where}: the example has another number of targets"
            raise InputError(what, given=len(values), expected=f"{len(scale.mean)}, as in training")
        return values
    assert labels is not None
    if isinstance(example.label, str):
        return torch.tensor(labels.index(example.label))
    if len(example.label) != length:
        given = f"{len(example.label)} labels for {length} tokens"
        raise InputError(f"{example.where}: every token needs a label, or null", given=given, expected="as many")
    known = {name: index for index, name in enumerate(labels.names)}
    return torch.tensor([IGNORED if name is None else known[str(name)] for name in example.label])


# --- batches ----------------------------------------------------------------------------------------------------


class Batches:
    """Batches of training rows, a pure function of (seed, epoch): each epoch shows every row once.

    Rows in random order are sorted by length in pools of 16 batches, cut into batches, and these are shuffled: little
    padding, and nearly any row may meet any other. ``complement`` [v] shows each row on a random strand; the labels of
    tokens turn with it. Random bits are raw Philox words keyed by (seed, epoch), as in ``data.loader``.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        seed: int,
        *,
        complement: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._complement = None if complement is None else torch.from_numpy(complement.copy())

    def __len__(self) -> int:
        """Batches an epoch; the last of them may have fewer rows."""
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch 0, 1, ..."""
        order = np.argsort(self._bits(number, 0, len(self.rows)), kind="stable")
        pool = _POOL * self.batch_size
        batches: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool].tolist(), key=lambda index: len(self.rows[index].ids))
            batches += [np.array(by_length[i : i + self.batch_size]) for i in range(0, len(by_length), self.batch_size)]
        flips = self._bits(number, 2, len(self.rows)) >> np.uint64(63)
        for place in np.argsort(self._bits(number, 1, len(batches)), kind="stable"):
            yield collate([self._shown(index, bool(flips[index])) for index in batches[place].tolist()])

    def _shown(self, index: int, flip: bool) -> Row:
        row = self.rows[index]
        if self._complement is None or not flip:
            return row
        target = row.target.flip(0) if is_per_token(row) else row.target
        return Row(self._complement[row.ids.flip(0)], target)

    def _bits(self, epoch: int, purpose: int, count: int) -> npt.NDArray[np.uint64]:
        key = np.array([self.seed, epoch], np.uint64)
        return np.random.Philox(key=key, counter=[0, 0, 0, purpose]).random_raw(count)


def is_per_token(row: Row) -> bool:
    """Whether a row's target is one class a token."""
    return row.target.ndim == 1 and not row.target.is_floating_point()


def collate(rows: Sequence[Row]) -> Batch:
    """One batch of rows of any lengths; what stands in the padding is never seen (``Batch.lengths``)."""
    ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.ids) for row in rows])
    if is_per_token(rows[0]):
        padded = torch.nn.utils.rnn.pad_sequence([row.target for row in rows], True, padding_value=IGNORED)
        return Batch(ids, lengths, padded)
    return Batch(ids, lengths, torch.stack([row.target for row in rows]))

"""HyenaDNA of order 3 and above: one stored filter network that feeds several convolutions, in one of two layouts.

A model of order N has C = N - 1 long convolutions, and the last layer of its filter network, the D terms and the rates
of the window have C · d rows. Which of them is filter c of convolution i, no file says; the two published codes read
the same weights differently:

    interleaved        row c · C + i     the training code of safari and HyenaDNA
    by_convolution     row i · d + c     the standalone files of both

For order 2 these are one. Facts: HazyResearch/safari and HazyResearch/hyena-dna (``src/models/sequence/hyena.py``,
``standalone_hyena.py``, ``standalone_hyenadna.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.format import FilterLayout, TensorSource
from crocuta.checkpoints.keymap import Entry
from crocuta.checkpoints.settings import Settings
from crocuta.config import HyenaConfig, OrderNHyenaConfig
from crocuta.errors import ConfigError, WeightsFormatError

MAX_ORDER: Final = 32
"""Largest number that is taken for an order and not for damage."""


def read_order(layer: Settings, filter_layout: FilterLayout | None) -> int:
    """The order of a ``layer``; ConfigError where its weights mean nothing without ``filter_layout``."""
    order = layer.size("order", 2, most=MAX_ORDER)
    if order == 1:
        raise layer.error("order", order, "at least 2, which is one long convolution")
    if order > 2 and filter_layout is None:
        raise ConfigError(
            f"{layer.path}: a filter_layout must be chosen for order {order}, because its weights are two functions",
            given="none",
            expected="'interleaved', as the training code of safari and HyenaDNA deals the filters out to its "
            f"{order - 1} convolutions, or 'by_convolution', as their standalone files do",
            fix="load it with the filter_layout of the code that trained it",
        )
    return order


def mixer_config(mixer: HyenaConfig, order: int, *, interleaved: bool, dropout: float) -> OrderNHyenaConfig:
    """``mixer``, which is of order 2, with ``order`` - 1 convolutions; safari's and HyenaDNA's gate is before each."""
    return OrderNHyenaConfig(
        filter=mixer.filter,
        convolutions=order - 1,
        gate_first=True,
        shared_filter=True,
        interleaved_windows=interleaved,
        short_taps=mixer.short_taps,
        short_bias=mixer.short_bias,
        projection_bias=mixer.projection_bias,
        dropout=dropout,
    )


def convolutions(mixer: object) -> int:
    """How many of them one stored filter network feeds."""
    return mixer.convolutions if isinstance(mixer, OrderNHyenaConfig) else 1


# --- tensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerConvolution:
    """Numbers of theirs, one a row of the filter network, are [convolution, channel] in ours."""

    convolutions: int
    interleaved: bool

    def load(self, tensor: Tensor) -> Tensor:
        if self.interleaved:
            return tensor.unflatten(0, (-1, self.convolutions)).t()
        return tensor.unflatten(0, (self.convolutions, -1))

    def store(self, tensor: Tensor) -> Tensor:
        return (tensor.t() if self.interleaved else tensor).flatten()


def entries_of(mixer: OrderNHyenaConfig, channels: int, entries: Iterable[Entry]) -> Iterator[Entry]:
    """``entries`` of a layer of order 2 as those of ``mixer``, whose source must be ``Parts``.

    The first convolution has the network, and each has rows of the last layer of its own.
    """
    for entry in entries:
        start, in_filter, name = entry.ours.partition("mixer.filter.")
        if name == "output.weight":
            for i, rows in enumerate(rows_of(mixer, channels)):
                ours = f"{start}mixer.filters.{i}.{name}"
                yield dataclasses.replace(entry, ours=ours, theirs=part_name(entry.theirs, rows))
        elif in_filter:
            yield dataclasses.replace(entry, ours=f"{start}mixer.filters.0.{name}")
        elif entry.ours.endswith("mixer.skip"):
            layout = PerConvolution(mixer.convolutions, mixer.interleaved_windows)
            yield dataclasses.replace(entry, layouts=(layout,))
        else:
            yield entry


def rows_of(mixer: OrderNHyenaConfig, channels: int) -> list[slice]:
    """Of the last layer, for each convolution. Together they are all rows, however many a file has."""
    count = mixer.convolutions
    if mixer.interleaved_windows:
        return [slice(i, None, count) for i in range(count)]
    return [slice(i * channels, (i + 1) * channels if i < count - 1 else None) for i in range(count)]


def part_name(name: str, rows: slice) -> str:
    """What messages call ``rows`` of a stored tensor: name[0::2]."""
    text = f"{rows.start}:{'' if rows.stop is None else rows.stop}"
    return f"{name}[{text}{'' if rows.step is None else f':{rows.step}'}]"


class Parts:
    """A source that gives the rows of some tensors as tensors of their own, in place of the whole."""

    def __init__(self, source: TensorSource, divided: Mapping[str, list[slice]]):
        self._source = source
        self._parts: dict[str, tuple[str, slice]] = {}
        infos: dict[str, TensorInfo] = {}
        for name, info in source.infos.items():
            for rows in divided.get(name, ()):
                part = part_name(name, rows)
                if part in source.infos:
                    raise WeightsFormatError(f"the weights hold both {name} and {part}")
                shape = (len(range(*rows.indices(info.shape[0]))), *info.shape[1:]) if info.shape else ()
                infos[part], self._parts[part] = TensorInfo(info.dtype, shape), (name, rows)
            if name not in divided:
                infos[name] = info
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self._parts:
            return self._source.read(name, rows)
        whole, part = self._parts[name]
        values = self._source.read(whole)[part]
        return (values if rows is None else values[rows]).clone()

    def close(self) -> None:
        self._source.close()

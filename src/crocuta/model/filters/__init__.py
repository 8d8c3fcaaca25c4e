"""Filters: what makes the kernel of a long convolution, and how each kind carries its past.

    explicit taps  ->  a Toeplitz product          state: the last k - 1 inputs
       (many taps)     FFT, continued online       state: as many inputs and partial outputs as there are taps
    modal          ->  chunked recurrence          state: n modes a channel
    implicit MLP   ->  FFT, continued online       state: all earlier inputs (no recurrence exists)

Every parameter here stays in float32 (``Float32Module``).
"""

from crocuta.config import (
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    ImplicitFilterConfig,
    RealModalFilterConfig,
)
from crocuta.model.filters.base import Filter, ShortFilter
from crocuta.model.filters.explicit import ExplicitFilter
from crocuta.model.filters.implicit import ImplicitFilter, feature_count, positional_features, window_rates
from crocuta.model.filters.modal import ModalFilter

__all__ = [
    "ExplicitFilter",
    "Filter",
    "ImplicitFilter",
    "ModalFilter",
    "ShortFilter",
    "build_filter",
    "feature_count",
    "positional_features",
    "window_rates",
]


def build_filter(config: FilterConfig, channels: int) -> Filter:
    """The filter module of a configuration."""
    match config:
        case ExplicitFilterConfig():
            return ExplicitFilter(config, channels)
        case ImplicitFilterConfig():
            return ImplicitFilter(config, channels)
        case ComplexModalFilterConfig() | RealModalFilterConfig():
            return ModalFilter(config, channels)

"""Building: meta allocates nothing, values are a function of the seed alone, poles start inside the circle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KINDS, MODAL, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from crocuta.config import ComplexModalFilterConfig, RealModalFilterConfig
from crocuta.errors import InputError
from crocuta.model.build import build_model
from crocuta.model.filters import ModalFilter
from crocuta.model.hyena import HyenaMixer, build_filter
from crocuta.model.init import _initialise_modal
from crocuta.model.lm import Model
from crocuta.presets import preset


class Allocations(TorchDispatchMode):
    """Counts the elements of every tensor that an operation makes anywhere but on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.elements += tensor.numel()
        return result


@pytest.mark.parametrize("name", ["evo2-7b-1m", "hyenadna-large-1m"])
def test_meta_allocates_nothing(name):
    with Allocations() as allocations:
        model = build_model(preset(name), device="meta", dtype=torch.bfloat16)
    assert allocations.elements == 0
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert sum(tensor.numel() for tensor in tensors) > 1e6


def test_allocations_are_seen():
    with Allocations() as allocations:
        build_model(tiny_config("attention"))
    assert allocations.elements > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_a_function_of_the_seed(kind):
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    model = build_model(tiny_config(kind), seed=7)
    assert torch.equal(torch.get_rng_state(), random_state), "building draws from the global generator"
    torch.manual_seed(2)
    again, other = build_model(tiny_config(kind), seed=7), build_model(tiny_config(kind), seed=8)
    for (name, tensor), same, different in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(tensor, same), name
        constant = tensor.unique().numel() == 1 or name.endswith(("filter.features", "log_rates"))
        assert constant or not torch.equal(tensor, different), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_values_do_not_depend_on_the_dtype(dtype):
    wide, other = build_model(tiny_config("stripe"), seed=3), build_model(tiny_config("stripe"), seed=3, dtype=dtype)
    for (name, tensor), rounded in zip(wide.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(tensor.to(rounded.dtype), rounded), name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_as_the_memory_was(kind):
    """Every parameter and buffer is set: finite, of a sensible size, and the same where memory held junk before."""
    junk = torch.full((1 << 20,), math.nan)
    del junk
    for name, tensor in build_model(tiny_config(kind)).state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.abs().max() <= (64 if name.endswith("layers.0.weight") else 12), name  # of sines up to Nyquist's
        assert tensor.any() or name.endswith("bias"), name


def modal_filters(model: Model) -> list[ModalFilter]:
    return [m.mixer.filter for m in model.blocks if isinstance(m.mixer, HyenaMixer)]


@pytest.mark.parametrize("kind", MODAL)
def test_decay_times_are_spread_over_the_configured_timescales(kind):
    for filter_ in modal_filters(build_model(tiny_config(kind))):
        logs = filter_.logs().detach()
        times = -1 / (logs[..., 0] if filter_.is_complex else logs)
        shortest, longest = filter_.config.timescales
        assert times.min() >= 0.99 * shortest
        assert times.max() <= 1.01 * longest
        bins = (torch.log(times / shortest) / math.log(longest / shortest) * filter_.config.modes).floor()
        assert bins.clamp(0, filter_.config.modes - 1).sort(1).values.tolist() == [
            list(range(filter_.config.modes))
        ] * len(times), "one mode a part of the range"


@pytest.mark.parametrize("kind", MODAL)
def test_each_filter_starts_with_about_unit_energy(kind):
    config = {
        True: ComplexModalFilterConfig(modes=8, groups=256, timescales=(1.0, 500.0)),
        False: RealModalFilterConfig(modes=8, groups=256, timescales=(1.0, 500.0)),
    }[kind.startswith("complex")]
    filter_ = build_filter(config, 256)
    assert isinstance(filter_, ModalFilter)
    with torch.no_grad():
        _initialise_modal(filter_, torch.Generator().manual_seed(1))
        energy = filter_.taps(4000).square().sum(1).mean()
    assert 0.5 < energy < 2


@pytest.mark.parametrize("kind", ["complex-stable", "real-stable"])
@given(value=st.floats(-60, 4, width=32), angle=st.floats(-100, 100, width=32))
def test_a_stable_pole_stays_inside_the_circle_whatever_is_learned(kind, value, angle):
    filter_ = modal_filters(build_model(tiny_config(kind)))[0]
    with torch.no_grad():
        filter_.log_decay.fill_(value)
        if filter_.angle is not None:
            filter_.angle.fill_(angle)
        logs = filter_.logs()
    assert ((logs[..., 0] if filter_.is_complex else logs) < 0).all()


def test_the_residual_stream_starts_as_wide_as_the_depth_allows():
    """Projections that write to it start √(2 · blocks) times smaller than the others."""
    model = build_model(preset("tiny-striped"))
    block = model.blocks[0]
    ratio = float(block.mixer.projection.weight.detach().std() / block.mixer.output.weight.detach().std())
    assert ratio == pytest.approx(math.sqrt(2 * len(model.blocks)), rel=0.1)
    ratio = float(block.mlp.up.weight.detach().std() / block.mlp.down.weight.detach().std())
    width = block.mlp.down.in_features / block.mlp.up.in_features
    assert ratio == pytest.approx(math.sqrt(2 * len(model.blocks) * width), rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_knows_nothing(kind):
    """Its first guesses are not far from uniform, so that training starts near log(v) and not by unlearning."""
    model = build_model(tiny_config(kind)).eval()
    ids = torch.randint(0, 16, (8, 51), generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert math.log(16) - 0.1 < loss < math.log(16) + 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_no_model_can_have(dtype):
    with pytest.raises(InputError, match=r"cannot have this dtype: got torch.* expected float32"):
        build_model(tiny_config("attention"), dtype=dtype)

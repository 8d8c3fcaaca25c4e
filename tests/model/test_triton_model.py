"""Models on the Triton kernels are the models in torch: logits, gradients, and sequences continued in ragged chunks."""

import pytest
import torch
from tiny_models import random_ids, tiny_model
from triton_paths import DEVICE, needs_triton, triton_kernels

from crocuta.model.filters.modal import ModalFilter
from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import switched_off

pytestmark = needs_triton


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the Triton functions that ran."""
    from crocuta.ops.kernels.triton import fir_gate, hyena, modal

    names: list[str] = []
    operator = (hyena, "hyena_modal"), (hyena, "hyena_modal_backward")
    for module, name in (*operator, (modal, "scan"), (modal, "scan_backward"), (fir_gate, "fir_gate")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=original, _n=name: names.append(_n) or _f(*a))
    return names


def test_logits_and_gradients_equal_those_of_torch(launches):
    model, ids = tiny_model("real-grouped", torch.float64, seed=1).to(DEVICE), random_ids(1, 70, seed=2).to(DEVICE)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = model(ids)
        (logits * torch.linspace(-1, 1, logits.numel(), device=DEVICE).view(logits.shape)).sum().backward()
        return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}

    with switched_off():
        expected = run()
        assert not launches
        with triton_kernels():
            ours = run()
    assert set(launches) == {"hyena_modal", "hyena_modal_backward"}
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("operator", [True, False], ids=["operator", "parts"])
def test_ragged_chunks_go_on_from_the_state(operator, launches, monkeypatch):
    if not operator:
        monkeypatch.setattr(ModalFilter, "fuses", lambda *a, **k: False)
    model, ids = tiny_model("complex-grouped", torch.float64, seed=1).to(DEVICE), random_ids(2, 80, seed=3).to(DEVICE)
    lengths = torch.tensor([70, 9])
    with switched_off():
        expected = model(ids)
        state = model.init_state(2, 90)
        with triton_kernels():
            first = model.extend(ids[:, :70], state, lengths)
            rest = model.extend(torch.stack([ids[0, 70:80], ids[1, 9:19]]), state)
    assert set(launches) == ({"hyena_modal"} if operator else {"fir_gate", "scan"})
    assert gpu.DEVICE == "cuda"
    for row, end in enumerate(lengths.tolist()):
        ours = torch.cat([first[row, :end], rest[row]])
        torch.testing.assert_close(ours, expected[row, : end + 10], rtol=1e-9, atol=1e-9)

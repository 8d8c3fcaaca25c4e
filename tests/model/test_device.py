"""Everything runs on one device: on meta, where a tensor made on the CPU by mistake is an error."""

from __future__ import annotations

import pytest
import torch

from crocuta.model.build import build_model
from crocuta.presets import PRESETS, preset


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
def test_no_tensor_of_another_device(name):
    model = build_model(preset(name), device="meta")
    ids = torch.zeros(2, 50, dtype=torch.int64, device="meta")
    loss = model(ids).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())
    with torch.no_grad():
        state = model.init_state(2, 100)
        for chunk, lengths in ((ids, None), (ids[:, :1], None), (ids[:, :10], torch.tensor([3, 10]))):
            assert model.extend(chunk, state, lengths).device.type == "meta"
    assert state.lengths.tolist() == [54, 61]

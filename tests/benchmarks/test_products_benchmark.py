"""benchmarks/products.py at a tiny size."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def test_every_product_of_a_step_is_there(module, tmp_path, capsys):
    assert module("products").main(["--smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("products-*.json")
    found = json.loads(path.read_text())["products"]
    assert [each["product"] for each in found[:4]] == ["16 to 48, y", "16 to 48, dx", "16 to 48, dW", "16 to 16, y"]
    assert all(0 < error <= 1e-6 for each in found for error in each["errors"].values())
    assert all(gflops > 0 for each in found for gflops in each["gflops"].values())
    assert "| 64 to 16, dW " in capsys.readouterr().out


def test_silent_about_speed_where_a_product_is_wrong(module, tmp_path, capsys, monkeypatch):
    script = module("products")
    right = script.multiply_by_onednn
    monkeypatch.setattr(script, "multiply_by_onednn", lambda a, b, *, out: right(a, b, out=out).mul_(1.0001))
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert "no speed" in printed.err
    assert not list(tmp_path.iterdir())

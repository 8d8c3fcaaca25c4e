"""``crocuta generate --weights``: narrow copies of the matrices, or a reason why not."""

import pytest

import crocuta
from crocuta.ops.kernels.library import library, switched_off, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=why_not() or "")

OPTIONS = ("--prompt", "Call me", "--max-tokens", 12, "--seed", 7)


@pytest.mark.parametrize("more", [(), ("--format", "jsonl")], ids=["streamed", "listed"])
def test_the_option_is_that_of_generate(run, model, monkeypatch, more) -> None:
    asked = []
    decoder = crocuta.inference.generate.decoder

    def watched(model, tokens, weights):
        asked.append(weights)
        return decoder(model, tokens, weights)

    monkeypatch.setattr("crocuta.inference.generate.decoder", watched)
    assert run("generate", model, *OPTIONS, *more, "--weights", "int8").code == 0
    assert run("generate", model, *OPTIONS, *more).code == 0
    assert asked == ["int8", "float32"]


def test_what_cannot_be_is_said(run, model) -> None:
    with switched_off():
        done = run("generate", model, *OPTIONS, "--weights", "bfloat16")
    assert done.code == 1
    assert "cannot be decoded natively" in done.stderr

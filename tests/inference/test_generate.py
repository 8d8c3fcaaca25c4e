"""Generation: what it writes is what the model would, and it ends when, and as, it should."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, chain_model, random_ids, text_model, tiny_model

from crocuta.errors import InputError, NonFiniteError, TokenizerError
from crocuta.inference.generate import generate, stream
from crocuta.inference.sampling import SamplingConfig
from crocuta.inference.stop import StopText
from crocuta.model.lm import Model
from crocuta.model.step import Stepper
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer

GREEDY = SamplingConfig(temperature=0)
LIVELY = SamplingConfig(temperature=3.0)
BYTES = ByteTokenizer(vocab_size=256)


@pytest.fixture
def extended(monkeypatch) -> list[tuple[int, int]]:
    """(rows, tokens) of every call that reads tokens into a state."""
    calls: list[tuple[int, int]] = []
    original = Model.extend_hidden

    def watched(self, ids, state, lengths=None, layer=None):
        calls.append(tuple(ids.shape))
        return original(self, ids, state, lengths, layer)

    def stepped(self, ids, state):
        calls.append((len(ids), 1))
        return step(self, ids, state)

    step = Stepper.step
    monkeypatch.setattr(Model, "extend_hidden", watched)
    monkeypatch.setattr(Stepper, "step", stepped)
    return calls


# --- which tokens ---


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_the_whole_forward_pass_at_every_step(kind):
    model = tiny_model(kind, torch.float64, seed=1)
    prompts = [random_ids(length, seed=length) for length in (30, 1, 7, 7)]
    results = generate(model, None, prompts, max_tokens=40, sampling=GREEDY)
    assert [r.prompt for r in results] == [0, 1, 2, 3]
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.ids) == 40
        assert result.finish_reason == "length"
        with torch.no_grad():
            logits = model(torch.cat([prompt, torch.tensor(result.ids)])[None, :-1])[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == result.ids
        expected = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(result.log_probs), expected.float(), rtol=0, atol=1e-5)
    assert results[2].log_probs != pytest.approx(results[0].log_probs, rel=1e-3)


def test_the_prompt_is_heard():
    """The control: one changed token at its start changes what follows."""
    model = tiny_model("stripe", seed=1)
    prompt = random_ids(20, seed=1)
    changed = prompt.clone()
    changed[0] = 7 if prompt[0] != 7 else 8
    first, second = generate(model, None, [prompt, changed], max_tokens=20, sampling=GREEDY)
    assert first.log_probs != pytest.approx(second.log_probs, rel=1e-3)


def test_samples_are_drawn_from_the_model():
    """The first token of 2,000 samples of a prompt, against its probabilities (a chi-square of 15 degrees)."""
    model = tiny_model("complex-raw", seed=1)
    prompt = random_ids(5, seed=1)
    results = generate(model, None, [prompt], max_tokens=1, samples=2000, seed=1)
    with torch.no_grad():
        expected = model(prompt[None])[0, -1].double().softmax(-1) * 2000
    counts = torch.bincount(torch.tensor([r.ids[0] for r in results]), minlength=16)
    likely = expected > 5
    assert likely.sum() >= 4
    assert float(((counts - expected)[likely] ** 2 / expected[likely]).sum()) < 40


def test_samples_of_a_prompt_are_its_separate_continuations(extended):
    """Copies of one state: each prompt is read once, and the samples are those of the prompt given three times."""
    model = tiny_model("stripe", torch.float64, seed=1)
    prompts = [random_ids(9, seed=1), random_ids(4, seed=2)]
    together = generate(model, None, prompts, max_tokens=15, sampling=LIVELY, samples=3, seed=5)
    assert extended[0] == (2, 9)
    assert set(extended[1:]) == {(6, 1)}
    assert [r.prompt for r in together] == [0, 0, 0, 1, 1, 1]
    apart = generate(model, None, [p for p in prompts for _ in range(3)], max_tokens=15, sampling=LIVELY, seed=5)
    assert [r.ids for r in together] == [r.ids for r in apart]
    assert len({tuple(r.ids) for r in together}) == 6


def test_a_row_depends_on_its_own_seed_alone():
    model = tiny_model("real-raw", torch.float64, seed=1)
    prompt = random_ids(5, seed=1)

    def draw(count, **seeds):
        return [r.ids for r in generate(model, None, [prompt] * count, max_tokens=20, sampling=LIVELY, **seeds)]

    torch.manual_seed(1)
    by_seed = draw(3, seed=10)
    torch.manual_seed(2)
    assert draw(3, seed=10) == by_seed
    assert draw(3, seeds=[12, 10, 10]) == [by_seed[2], by_seed[0], by_seed[0]]
    assert draw(1, seed=11) == [by_seed[1]]
    assert len(set(map(tuple, by_seed))) == 3


def test_the_repetition_penalty_remembers_prompt_and_output_of_each_row():
    model = text_model("abcd", last=ord("a"))  # a round of four, and x always second
    with torch.no_grad():
        model.head.weight[ord("x")] = 0.5
    prompts = ["a", "d"]
    plain = generate(model, BYTES, prompts, max_tokens=8, sampling=GREEDY)
    assert [r.text for r in plain] == ["bcdabcda", "abcdabcd"]
    penalised = SamplingConfig(temperature=0, repetition_penalty=3.0)
    results = generate(model, BYTES, prompts, max_tokens=4, sampling=penalised)
    assert [r.text for r in results] == ["bcdx", "abcx"]


# --- when a row ends ---


def test_eos_ends_a_row_and_is_no_text():
    model = text_model("abc", last=BYTES.eos_id)
    result = generate(model, BYTES, ["a"], max_tokens=9, sampling=GREEDY)[0]
    assert (result.text, result.ids, result.finish_reason) == ("bc", [*b"bc", 0], "eos")
    assert len(result.log_probs) == 3
    result = generate(model, BYTES, ["a"], max_tokens=5, sampling=GREEDY, ignore_eos=True)[0]
    assert (result.text, result.ids, result.finish_reason) == ("bc\0\0\0", [*b"bc", 0, 0, 0], "length")
    assert generate(model, None, [list(b"a")], max_tokens=4, sampling=GREEDY)[0].ids == [*b"bc", 0, 0]


def test_eos_of_other_tokenizers():
    tokenizer = DNATokenizer()
    model = chain_model({7: 8, 8: 9, 9: tokenizer.eos_id}, vocabulary=16)
    result = generate(model, tokenizer, ["A"], max_tokens=9, sampling=GREEDY)[0]
    assert (result.text, result.ids, result.finish_reason) == ("CG", [8, 9, 1], "eos")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (["c"], "b", 2),
        (["cde"], "b", 4),
        (["de", "cd"], "b", 3),
        (["zz", "e"], "bcd", 4),
        (["b"], "", 1),
        (["bcdef"], "", 5),
        (["f"], "bcde", 5),
    ],
)
def test_stop_strings_end_a_row_and_are_no_text(stop, text, tokens):
    result = generate(text_model("abcdefg"), BYTES, ["a"], max_tokens=20, sampling=GREEDY, stop=stop)[0]
    assert (result.text, len(result.ids), result.finish_reason) == (text, tokens, "stop")


@pytest.mark.parametrize(
    ("stop", "text", "tokens", "reason"),
    [
        (["é"], "a", 3, "stop"),  # two bytes
        (["€"], "aéx", 7, "stop"),  # three
        (["x€"], "aé", 7, "stop"),
        (["𝄞"], "aéx€y", 12, "stop"),  # four
        (["€z"], "aéx€y𝄞", 12, "length"),
    ],
)
def test_stop_strings_of_several_bytes(stop, text, tokens, reason):
    model = text_model("-aéx€y𝄞")
    result = generate(model, BYTES, ["-"], max_tokens=12, sampling=GREEDY, stop=stop)[0]
    assert (result.text, len(result.ids), result.finish_reason) == (text, tokens, reason)


def test_a_stop_string_that_never_completes_is_text():
    model = text_model("abcdefg")
    pieces = list(stream(model, BYTES, ["a"], max_tokens=5, sampling=GREEDY, stop=["cdx", "dez"]))
    assert [p.text for p in pieces] == ["b", "", "", "c", "def"]
    assert [p.finish_reason for p in pieces] == [None, None, None, None, "length"]


def test_half_a_character_at_the_end_is_shown_as_such():
    result = generate(text_model("-x€"), BYTES, ["-"], max_tokens=3, sampling=GREEDY)[0]
    assert result.text == "x\ufffd"


def test_finished_rows_cost_nothing_any_more(extended):
    """Rows end at steps 2, 5 and 9; after that they are read no more, and the others are what they are alone."""
    model = text_model("abcdefghi", last=0)
    prompts = ["h", "e", "a"]
    results = generate(model, BYTES, prompts, max_tokens=30, sampling=GREEDY)
    assert [r.text for r in results] == ["i", "fghi", "bcdefghi"]
    assert [rows for rows, _ in extended] == [3, 3, 2, 2, 2, 1, 1, 1, 1]
    alone = [generate(model, BYTES, [p], max_tokens=30, sampling=GREEDY)[0].ids for p in prompts]
    assert [r.ids for r in results] == alone


@pytest.mark.parametrize("kind", ["stripe", "implicit", "real-grouped"])
def test_rows_that_end_leave_the_others_their_states(kind):
    model = tiny_model(kind, torch.float64, seed=1)
    tokenizer = DNATokenizer()
    prompts = ["ACGT" * n + "A" * (n % 3) for n in range(1, 9)]
    sampling = SamplingConfig(temperature=2.0, repetition_penalty=1.5)  # so that histories count, too
    together = generate(model, tokenizer, prompts, max_tokens=40, sampling=sampling, seed=3)
    assert len({len(r.ids) for r in together}) > 3, "the rows should end at different steps"
    for row, (prompt, result) in enumerate(zip(prompts, together, strict=True)):
        alone = generate(model, tokenizer, [prompt], max_tokens=40, sampling=sampling, seed=3 + row)[0]
        assert (alone.ids, alone.text, alone.finish_reason) == (result.ids, result.text, result.finish_reason)


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_of_a_prompt_of_one_token(kind, extended):
    model = tiny_model(kind, seed=1)
    result = generate(model, None, [[8]], max_tokens=1, sampling=GREEDY)[0]
    with torch.no_grad():
        assert result.ids == [int(model(torch.tensor([[8]]))[0, 0].argmax())]
    assert extended == [(1, 1)], "a token that nobody asked for was computed"


# --- streaming ---


@settings(max_examples=25)
@given(seed=st.integers(0, 50), stop=st.lists(st.text("ACGT", min_size=1, max_size=3), max_size=2))
def test_pieces_join_to_the_result(seed, stop):
    model, tokenizer = tiny_model("explicit", seed=1), DNATokenizer()
    arguments = {"max_tokens": 12, "seed": seed, "stop": stop, "samples": 2}
    results = generate(model, tokenizer, ["ACG", "T"], **arguments)
    rows = {row: [] for row in range(4)}
    for piece in stream(model, tokenizer, ["ACG", "T"], **arguments):
        rows[piece.row].append(piece)
    for result, pieces in zip(results, rows.values(), strict=True):
        assert "".join(p.text for p in pieces) == result.text
        assert [p.id for p in pieces] == result.ids
        assert [p.log_prob for p in pieces] == result.log_probs
        assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + [result.finish_reason]
        assert result.finish_reason is not None
        whole = tokenizer.decode(result.ids)
        found = [whole.find(s) for s in stop if s in whole]
        assert result.text == (whole[: min(found)] if found else whole)
        assert (result.finish_reason == "stop") == bool(found)


def test_the_stream_is_read_step_by_step(extended):
    pieces = stream(text_model("abcdef"), BYTES, ["a"], max_tokens=100, sampling=GREEDY)
    assert extended == []
    assert [next(pieces).text for _ in range(3)] == ["b", "c", "d"]
    assert len(extended) == 3
    assert torch.is_grad_enabled(), "a paused stream switches the caller's gradients off"


texts = st.text("abé€𝄞", max_size=30)


@given(text=texts, stop=st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3))
def test_stop_text_is_the_text_before_the_first_stop_string_to_be_completed(text, stop):
    watcher, shown, stopped = StopText(BYTES, stop), "", False
    for token in BYTES.encode(text).tolist():
        piece, stopped = watcher.feed(token)
        shown += piece
        if stopped:
            break
    shown += watcher.finish()
    for end in range(len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            assert (shown, stopped) == (text[: min(found)], True)
            return
    assert (shown, stopped) == (text, False)


# --- errors ---


@pytest.mark.parametrize(("broken", "steps"), [("c", 0), ("d", 1), ("e", 2)])
def test_nan_logits_raise_and_name_the_row(broken, steps):
    """Row 1 meets the broken embedding first; what was good until then has been shown."""
    model = text_model("abcdefg")
    with torch.no_grad():
        model.embedding.weight[ord(broken)] = math.nan
    pieces, shown = stream(model, BYTES, ["a", "c"], max_tokens=9, sampling=GREEDY), []
    with pytest.raises(NonFiniteError, match=r"no distribution: got a largest logit of nan in row 1"):
        shown.extend(pieces)
    assert [p.text for p in shown if p.row == 0] == list("bcd"[:steps])


WRONG = {
    "no-prompts": ({"prompts": []}, InputError, "at least one prompt: got list; pass"),
    "one-text": ({"prompts": "abc"}, InputError, "prompts must be a list .*: got str"),
    "one-row": ({"prompts": torch.tensor([1, 2])}, InputError, "prompts must be a list .*: got Tensor"),
    "empty-prompt": ({"prompts": ["a", ""]}, InputError, "prompt 1 is empty"),
    "foreign-id": ({"prompts": [[1], [256]]}, InputError, "prompt 1 has an id outside the vocabulary: got .* to 256"),
    "nested-ids": ({"prompts": [[[1, 2]]]}, InputError, "prompt 0 must be one row of ids"),
    "ragged-ids": (
        {"prompts": [[[1, 2], [3]]]},
        InputError,
        "prompt 0 is neither text nor ids: got .* expected text or",
    ),
    "half-ids": ({"prompts": [[1, 2.5]]}, InputError, "prompt 0 must hold ids: got torch.float32; expected whole"),
    "nothing": ({"prompts": ["a", None]}, InputError, "prompt 1 is neither text nor ids: got .*None"),
    "no-tokens": ({"max_tokens": 0}, InputError, "max_tokens must be positive: got 0"),
    "no-samples": ({"samples": 0}, InputError, "samples must be positive: got 0"),
    "stop-text": ({"stop": "ab"}, InputError, "stop must be a list of strings .*: got 'ab'"),
    "empty-stop": ({"stop": ["a", ""]}, InputError, "stop must be a list of strings that are not empty"),
    "few-seeds": ({"prompts": ["a", "b"], "seeds": [1]}, InputError, "seeds must be one a row: got 1; expected 2"),
    "no-seeds": ({"seeds": []}, InputError, "seeds must be one a row: got 0; expected 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    arguments, kind, message = WRONG[name]
    with pytest.raises(kind, match=message) as failure:
        generate(text_model("ab"), BYTES, **{"prompts": ["a"], "max_tokens": 3, **arguments})
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("end", ["finished", "closed", "failed"])
def test_the_model_stays_in_its_mode(training, end):
    """A sample drawn in the middle of training must not switch dropout off for the rest of it."""
    model = text_model("abcdef").train(training)
    if end == "failed":
        with torch.no_grad():
            model.embedding.weight[ord("c")] = math.nan
    pieces = stream(model, BYTES, ["a"], max_tokens=4, sampling=GREEDY)
    next(pieces)
    assert not model.training
    if end == "finished":
        assert len(list(pieces)) == 3
    elif end == "closed":
        pieces.close()
    else:
        with pytest.raises(NonFiniteError):
            list(pieces)
    assert model.training == training


def test_text_needs_a_tokenizer():
    with pytest.raises(TokenizerError, match="prompt 0 is text and there is no tokenizer"):
        generate(text_model("ab"), None, ["a"])
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        generate(text_model("ab"), None, [[1]], stop=["a"])


def test_more_tokens_than_the_filters_are_defined_for():
    model = tiny_model("implicit")
    assert len(generate(model, None, [random_ids(150)], max_tokens=10, seed=1)[0].ids) == 10
    with pytest.raises(
        InputError, match=r"longer than the model's filters are defined for: got 161 tokens; .* at most 160"
    ):
        generate(model, None, [random_ids(150)], max_tokens=11)
    with pytest.raises(
        InputError, match=r"prompt 0 is longer than the model's filters are defined for: got 161 tokens"
    ):
        generate(model, None, [random_ids(161)], max_tokens=1)

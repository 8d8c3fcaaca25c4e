"""Texts that have been read: continued any number of times, kept in files, and gone on from in another process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, loud, random_ids, text_model, tiny_model

import crocuta
from crocuta.config import BlockConfig, HyenaConfig, ImplicitFilterConfig, ModelConfig
from crocuta.errors import InputError, NonFiniteError, StateError, TokenizerError
from crocuta.inference.batches import batches
from crocuta.inference.generate import _drawn, generate, stream
from crocuta.inference.prefix import Prefix, load_prefix, read_prefix
from crocuta.inference.sampling import SamplingConfig
from crocuta.model import memory
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.load import make_tokenizer

GREEDY = SamplingConfig(temperature=0)
LIVELY = SamplingConfig(temperature=3.0, repetition_penalty=1.3)
BYTES = ByteTokenizer(vocab_size=256)


@torch.no_grad()
def same(one: Prefix, other: Prefix) -> bool:
    pairs = zip(one.named_tensors(), other.named_tensors(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# --- reading ---


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_the_text_read_as_a_whole(kind):
    model = tiny_model(kind, torch.float64, seed=1)
    ids = random_ids(50, seed=1)
    prefix = read_prefix(model, None, ids)
    assert (prefix.length, prefix.batch) == (50, 1)
    assert prefix.state.max_length == (64 if model.config.max_length else 50)
    torch.testing.assert_close(prefix.logits, model(ids[None])[:, -1], rtol=0, atol=1e-9)
    assert prefix.seen[0].nonzero()[:, 0].tolist() == sorted(set(ids.tolist()))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stripe", "complex-raw", "explicit-fft"])
def test_a_prefix_is_read_in_chunks_and_makes_one_row_of_logits(kind, monkeypatch):
    model = tiny_model(kind, torch.float64, seed=1)
    ids = random_ids(100, seed=1)
    whole = read_prefix(model, None, ids)
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, chunk=16))
    made: list[tuple[str, int]] = []
    for name in ("extend_hidden", "logits"):
        original = getattr(Model, name)

        def watched(self, x, *rest, original=original, name=name):
            made.append((name, x.shape[1]))
            return original(self, x, *rest)

        monkeypatch.setattr(Model, name, watched)
    chunked = read_prefix(model, None, ids)
    assert made == [*[("extend_hidden", 16)] * 6, ("extend_hidden", 4), ("logits", 1)]
    torch.testing.assert_close(chunked.logits, whole.logits, rtol=0, atol=1e-9)


def test_a_bound_of_memory_makes_the_chunks_shorter(monkeypatch):
    model = tiny_model("complex-raw", torch.float64, seed=1)
    ids = random_ids(4_000, seed=1)
    whole = read_prefix(model, None, ids)
    lengths = []
    original = Model.extend_hidden
    monkeypatch.setattr(Model, "extend_hidden", lambda *a: lengths.append(a[1].shape[1]) or original(*a))
    bound = memory.BASE + (1 << 20)
    bounded = read_prefix(model, None, ids, max_memory=bound)
    assert len(lengths) > 1
    torch.testing.assert_close(bounded.logits, whole.logits, rtol=0, atol=1e-9)


def test_a_bound_of_memory_holds_for_prompts_and_counts_the_states_of_all(monkeypatch):
    """A long prompt beside a short one gets what both states leave."""
    model = tiny_model("attention", torch.float64, seed=1)
    prompts = [random_ids(4_000, seed=1), random_ids(30, seed=2)]
    expected = generate(model, None, prompts, max_tokens=3, sampling=GREEDY)
    row = model.init_state(1, 4_003).nbytes
    lengths: list[int] = []
    original = Model.extend_hidden
    monkeypatch.setattr(Model, "extend_hidden", lambda *a: lengths.append(a[1].shape[1]) or original(*a))
    bound = memory.BASE + 3 * row + (1 << 20)
    results = generate(model, None, prompts, max_tokens=3, sampling=GREEDY, max_memory=bound)
    assert [r.ids for r in results] == [r.ids for r in expected]
    chunk = memory.chunk_length(model, 1, 4_000, bound - 2 * row, room=4_003)
    assert max(lengths) == chunk < memory.chunk_length(model, 1, 4_000, bound, room=4_003)
    with pytest.raises(InputError, match="max_memory is too small"):
        generate(model, None, prompts, max_tokens=3, max_memory=memory.BASE + 2 * row)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((BYTES, ""), InputError, "the prefix is empty"),
        ((None, "abc"), TokenizerError, "the prefix is text and there is no tokenizer"),
        ((BYTES, [1, 256]), InputError, "the prefix has an id outside the vocabulary"),
    ],
)
def test_what_cannot_be_read(arguments, kind, message):
    with pytest.raises(kind, match=message):
        read_prefix(text_model("abc"), *arguments)


def test_room_must_hold_the_text():
    model = tiny_model("stripe")
    assert read_prefix(model, None, random_ids(20), max_length=50).state.max_length == 50
    with pytest.raises(InputError, match="the prefix is longer than max_length: got 20 tokens; expected at most 19"):
        read_prefix(model, None, random_ids(20), max_length=19)


# --- continuing ---


@pytest.mark.parametrize(("kind", "sampling"), [("stripe", GREEDY), *((kind, LIVELY) for kind in KINDS)])
def test_a_prefix_is_continued_as_its_text_is(kind, sampling):
    """Among prompts of other kinds and lengths, from states that must grow, and more than once."""
    model = tiny_model(kind, torch.float64, seed=1)
    prompts = [random_ids(length, seed=length) for length in (5, 30, 12, 44)]
    expected = generate(model, None, prompts, max_tokens=12, sampling=sampling, seed=3, samples=2)
    mixed = [prompts[0], read_prefix(model, None, prompts[1]), prompts[2], read_prefix(model, None, prompts[3])]
    before = [prefix.copy() for prefix in mixed if isinstance(prefix, Prefix)]
    for _ in range(2 if kind == "stripe" else 1):
        results = generate(model, None, mixed, max_tokens=12, sampling=sampling, seed=3, samples=2)
        assert [r.ids for r in results] == [r.ids for r in expected]
        assert [r.prompt for r in results] == [r.prompt for r in expected]
        assert all(map(same, before, [p for p in mixed if isinstance(p, Prefix)])), "a prefix was moved on"


def test_prompts_of_any_lengths_are_read_in_their_order(monkeypatch):
    model = tiny_model("stripe", torch.float64, seed=1)
    monkeypatch.setattr(memory, "FEW", 10)
    lengths = (50, 1, 7, 40, 7, 2, 100)
    prompts = [random_ids(length, seed=length) for length in lengths]
    groups = list(batches(prompts))
    assert [[lengths[i] for i in group] for group in groups] == [[1, 2], [7, 7], [40, 50], [100]]
    together = generate(model, None, prompts, max_tokens=5, sampling=GREEDY)
    alone = [generate(model, None, [prompt], max_tokens=5, sampling=GREEDY)[0] for prompt in prompts]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert len({tuple(r.log_probs) for r in together}) == 6


# --- generations in turns ---


@pytest.mark.parametrize(("kind", "sampling"), [("stripe", GREEDY), *((kind, LIVELY) for kind in KINDS)])
def test_a_generation_in_turns_is_the_one_that_was_never_interrupted(kind, sampling, tmp_path):
    model = tiny_model(kind, seed=1)
    prompt = random_ids(20, seed=2)
    whole = generate(model, None, [prompt], max_tokens=45, sampling=sampling, seed=5)[0]
    first = generate(model, None, [prompt], max_tokens=11, sampling=sampling, seed=5, keep_state=True)[0]
    first.prefix.save(tmp_path / "first.safetensors")
    loaded = load_prefix(model, tmp_path / "first.safetensors")
    assert same(loaded, first.prefix)
    second = generate(model, None, [loaded], max_tokens=24, sampling=sampling, keep_state=True)[0]
    third = generate(model, None, [second.prefix], max_tokens=10, sampling=sampling)[0]
    assert first.ids + second.ids + third.ids == whole.ids
    assert first.log_probs + second.log_probs + third.log_probs == pytest.approx(whole.log_probs, abs=1e-5)
    assert third.prefix is None


@pytest.mark.parametrize("tokens", [1, 100, 129, 300, 511])
def test_long_filters_go_on_from_prefixes_of_any_length(tokens):
    """Implicit filters far longer than the text: their states know of outputs to come, and grow twice."""
    mixer = HyenaConfig(filter=ImplicitFilterConfig(max_length=2_048, width=8))
    config = ModelConfig(vocab_size=16, hidden_size=8, blocks=(BlockConfig(mixer=mixer, mlp=None),) * 2)
    model = loud(build_model(config, seed=1), 1).to(torch.float64).eval()
    prompt = random_ids(tokens, seed=2)
    whole = generate(model, None, [prompt], max_tokens=90, sampling=GREEDY)[0]
    start = read_prefix(model, None, prompt)
    first = generate(model, None, [start], max_tokens=30, sampling=GREEDY, keep_state=True)[0]
    second = generate(model, None, [first.prefix], max_tokens=60, sampling=GREEDY)[0]
    assert first.ids + second.ids == whole.ids
    assert first.log_probs + second.log_probs == pytest.approx(whole.log_probs, abs=1e-6)


@torch.no_grad()
def test_a_long_filter_s_state_that_cannot_grow_says_so():
    mixer = HyenaConfig(filter=ImplicitFilterConfig(max_length=2_048, width=8))
    config = ModelConfig(vocab_size=16, hidden_size=8, blocks=(BlockConfig(mixer=mixer, mlp=None),))
    model = build_model(config, seed=1).eval()
    prefix = read_prefix(model, None, random_ids(140), max_length=150)
    assert model.with_room(prefix.state, 192).max_length == 192
    with pytest.raises(
        StateError, match=r"cannot grow any more: got room for 192 tokens; expected at least 256, where"
    ):
        generate(model, None, [prefix], max_tokens=100)


SCRIPT = """
import sys, crocuta
model, tokenizer = crocuta.load(sys.argv[1])
for path, temperature in zip(sys.argv[2::2], sys.argv[3::2]):
    prefix = crocuta.load_prefix(model, path)
    sampling = crocuta.SamplingConfig(temperature=float(temperature), repetition_penalty=1.2)
    result = crocuta.generate(model, tokenizer, [prefix], max_tokens=30, sampling=sampling, ignore_eos=True)[0]
    print(*result.ids)
"""


def test_another_process_goes_on(tmp_path):
    """Greedy, and drawing on."""
    model, tokenizer = tiny_model("stripe", seed=1), make_tokenizer({"type": "dna"})
    crocuta.save(model, tokenizer, tmp_path / "model")
    arguments, expected = [], []
    for temperature in (0.0, 2.0):
        sampling = SamplingConfig(temperature=temperature, repetition_penalty=1.2)
        options = {"sampling": sampling, "ignore_eos": True, "seed": 9}
        whole = generate(model, tokenizer, ["ACGTTG"], max_tokens=50, **options)[0]
        first = generate(model, tokenizer, ["ACGTTG"], max_tokens=20, keep_state=True, **options)[0]
        first.prefix.save(tmp_path / f"{temperature}.safetensors")
        arguments += [tmp_path / f"{temperature}.safetensors", str(temperature)]
        assert first.ids == whole.ids[:20]
        expected.append(whole.ids[20:])
    command = [sys.executable, "-c", SCRIPT, tmp_path / "model", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert [[int(number) for number in line.split()] for line in done.stdout.splitlines()] == expected


def test_every_row_of_a_batch_keeps_its_own_state():
    """Rows that end at different steps, by EOS and by length."""
    model, tokenizer = tiny_model("stripe", torch.float64, seed=1), make_tokenizer({"type": "dna"})
    prompts = ["ACGT" * n for n in range(1, 9)]
    results = generate(model, tokenizer, prompts, max_tokens=40, sampling=LIVELY, seed=3, keep_state=True)
    assert len({len(r.ids) for r in results}) > 3, "the rows should end at different steps"
    for prompt, result in zip(prompts, results, strict=True):
        ids = [*tokenizer.encode(prompt).tolist(), *result.ids]
        expected = read_prefix(model, None, ids)
        assert result.prefix.length == len(ids)
        torch.testing.assert_close(result.prefix.logits, expected.logits, rtol=0, atol=1e-9)
        assert torch.equal(result.prefix.seen, expected.seen)


def test_the_last_piece_of_a_row_alone_has_its_prefix():
    pieces = list(stream(text_model("abcdef"), BYTES, ["a", "c"], max_tokens=3, sampling=GREEDY, keep_state=True))
    assert [piece.prefix is not None for piece in pieces] == [False] * 4 + [True] * 2
    assert all(piece.prefix is None for piece in stream(text_model("abc"), BYTES, ["a"], max_tokens=3, sampling=GREEDY))


def test_a_seed_or_several_samples_draw_anew():
    model = tiny_model("complex-raw", seed=1)
    options = {"sampling": LIVELY, "max_tokens": 30}
    first = generate(model, None, [random_ids(9, seed=1)], seed=5, keep_state=True, **options)[0].prefix

    def ids(**more):
        return [r.ids for r in generate(model, None, [first], **options, **more)]

    assert ids() == ids() != ids(seed=0)
    assert ids(seed=7) == ids(seeds=[7])
    assert ids(samples=2) == ids(samples=2, seed=0)
    assert ids(samples=2)[0] == ids(seed=0)[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stripe", "attention", "implicit", "explicit-fft"])
def test_a_kept_state_may_be_used_by_hand(kind):
    """It is no tensor of inference mode, which nothing outside of it may write to."""
    model = tiny_model(kind, torch.float64, seed=1)
    prompt = random_ids(9, seed=1)
    result = generate(model, None, [prompt], max_tokens=10, sampling=GREEDY, keep_state=True)[0]
    assert not any(tensor.is_inference() for _, tensor in result.prefix.named_tensors())
    state = model.with_room(result.prefix.state, 40)
    ids = random_ids(1, 20, seed=2)
    whole = torch.cat([prompt, torch.tensor(result.ids), ids[0]])[None]
    torch.testing.assert_close(model.extend(ids, state), model(whole)[:, 19:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["stripe", "complex-stable"])
def test_training_goes_on_after_a_stream(kind):
    """Nothing that inference mode derived from the weights is met again where gradients flow."""
    model = tiny_model(kind, seed=1)
    generate(model, None, [random_ids(9)], max_tokens=3, sampling=GREEDY)
    with torch.no_grad():
        model(random_ids(1, 40))
    model(random_ids(1, 40)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- errors ---


def test_prefixes_that_do_not_fit(tmp_path):
    model, prefix = tiny_model("stripe"), read_prefix(tiny_model("stripe"), None, random_ids(150))
    other = tiny_model("attention")
    with pytest.raises(StateError, match="prompt 1 belongs to a model with another configuration"):
        generate(other, None, [[1], prefix])
    with pytest.raises(StateError, match="prompt 0 has several rows: got 2; expected 1; select one"):
        generate(model, None, [prefix.select([0, 0])])
    with pytest.raises(InputError, match="prompts must be a list with at least one prompt: got Prefix; pass"):
        generate(model, None, prefix)
    with pytest.raises(InputError, match=r"longer than the model's filters .*: got 161 tokens; expected at most 160"):
        generate(model, None, [prefix], max_tokens=11)
    prefix.save(tmp_path / "state.safetensors")
    with pytest.raises(StateError, match=r"state.safetensors belongs to a model with another configuration"):
        load_prefix(other, tmp_path / "state.safetensors")


def rewrite(path, change) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("logits"), "belongs to another model, batch or max_length"),
        (lambda t: t.update(logits=torch.zeros(1, 3)), "belongs to another model, batch or max_length"),
        (lambda t: t.update(junk=torch.zeros(1, 3)), "belongs to another model, batch or max_length"),
        (lambda t: t.update(generator=torch.zeros(1, 7, dtype=torch.uint8)), "belongs to another model, batch"),
        (lambda t: t["generator"].zero_(), "the random numbers in .* are damaged"),
        (lambda t: t["state.lengths"].fill_(99), "is damaged: got 99 tokens; expected at most"),
    ],
)
def test_a_damaged_file(change, message, tmp_path):
    model, path = tiny_model("stripe"), tmp_path / "state.safetensors"
    generate(model, None, [[1, 2]], max_tokens=3, keep_state=True)[0].prefix.save(path)
    load_prefix(model, path)
    rewrite(path, change)
    with pytest.raises(StateError, match=message):
        load_prefix(model, path)


def test_a_state_is_no_prefix_and_the_other_way_round(tmp_path):
    model, path = tiny_model("stripe"), tmp_path / "state.safetensors"
    prefix = read_prefix(model, None, [1, 2])
    prefix.state.save(path)
    with pytest.raises(StateError, match=r"is damaged: got no row of state\.lengths"):
        load_prefix(model, path)
    prefix.save(path)
    with pytest.raises(StateError, match="is damaged: got no row of lengths"):
        model.load_state(path)
    with pytest.raises(StateError, match="is not a saved state"):
        load_prefix(model, tmp_path / "absent")


# --- states that become non-finite ---


@torch.no_grad()
def exploding(block: int) -> Model:
    """One pole of modulus 3 in a block: its state overflows float32 after some 80 tokens."""
    model = tiny_model("complex-raw", seed=1)
    model.blocks[block].mixer.filter.poles[1, 0] = torch.tensor([0.0, 3.0])
    return model


@pytest.mark.parametrize("block", [0, 1])
def test_a_pole_outside_the_circle_is_named(block):
    model = exploding(block)
    message = rf"in row 1; .* the first that is not finite is block {block}, long\.modes, row 1: check the weights"
    pieces = stream(model, None, [[7], random_ids(60, seed=1)], max_tokens=300, sampling=GREEDY)
    with pytest.raises(NonFiniteError, match=message):
        list(pieces)
    with pytest.raises(NonFiniteError, match=rf"not a number; .* block {block}, long.modes, row 0"):
        read_prefix(model, None, random_ids(300))


@torch.no_grad()
def test_the_row_of_the_error_is_the_row_of_the_call():
    """Row 0 has ended when row 1 meets the broken embedding, which no state remembers."""
    model = text_model("abcdefg")
    model.embedding.weight[ord("f")] = torch.nan
    pieces = stream(model, BYTES, ["a", "c"], max_tokens=9, sampling=GREEDY, stop=["b"])
    with pytest.raises(NonFiniteError, match=r"got a largest logit of nan in row 1; .* its state is finite: check the"):
        list(pieces)


@torch.no_grad()
def test_the_state_s_row_is_that_of_the_call_too():
    """The one row that is left is row 5."""
    prefix = read_prefix(tiny_model("complex-raw"), None, random_ids(9))
    prefix.state.layers[1].long.modes[0, 0] = torch.nan
    rows = Prefix(prefix.state, prefix.logits * torch.nan, prefix.seen)
    with pytest.raises(NonFiniteError, match=r"nan in row 5; .* block 1, long\.modes, row 5"):
        _drawn(rows, GREEDY, None, [5])

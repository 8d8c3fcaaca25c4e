"""``crocuta generate``: the library's samples, by seed, in every format."""

import io
import json

import pytest

import crocuta
from crocuta.cli import generate as verb
from crocuta.data.fasta import read_fasta

OPTIONS = ("--max-tokens", 12, "--seed", 7)


def theirs(model, prompts, **options):
    return crocuta.generate(*crocuta.load(model), prompts, max_tokens=12, **{"seed": 7, **options})


def test_one_prompt_is_echoed_and_continued(run, model) -> None:
    done = run("generate", model, "--prompt", "Call me", *OPTIONS)
    assert (done.code, done.stderr) == (0, "")
    assert done.out == "Call me" + theirs(model, ["Call me"])[0].text + "\n"


def test_a_seed_is_a_sample(run, model) -> None:
    def sample(seed: int) -> str:
        return run("generate", model, "-p", "Call me", "-n", 30, "--seed", seed).out

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_pieces_are_shown_as_they_come(model) -> None:
    shown: list[str] = []

    class Screen(io.StringIO):
        def flush(self) -> None:
            shown.append(self.getvalue())

    loaded, tokenizer = crocuta.load(model)
    job = verb.Job(loaded, tokenizer, crocuta.SamplingConfig(temperature=0), 5, 1, 0, (), True)
    job.stream("ab", list(b"ab"), Screen())
    assert len(shown) == 5
    assert shown[0].startswith("ab")
    assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:]))


def test_several_prompts_and_samples(run, model) -> None:
    prompts = ["Call me", "The"]
    done = run("generate", model, "-p", prompts[0], "-p", prompts[1], "--samples", 2, *OPTIONS, "--format", "jsonl")
    lines = [json.loads(line) for line in done.out.splitlines()]
    expected = theirs(model, prompts, samples=2)
    assert [(line["id"], line["sample"]) for line in lines] == [
        ("prompt 1", 1), ("prompt 1", 2), ("prompt 2", 1), ("prompt 2", 2),
    ]  # fmt: skip
    assert [line["text"] for line in lines] == [e.text for e in expected]
    assert [line["prompt"] for line in lines] == ["Call me", "Call me", "The", "The"]
    assert [line["tokens"] for line in lines] == [len(e.ids) for e in expected]
    assert [line["log_prob"] for line in lines] == [pytest.approx(sum(e.log_probs)) for e in expected]
    assert [line["finish_reason"] for line in lines] == [e.finish_reason for e in expected]
    text = run("generate", model, "-p", prompts[0], "-p", prompts[1], *OPTIONS).out
    for number, (prompt, e) in enumerate(zip(prompts, theirs(model, prompts)), 1):
        assert f"==> prompt {number}, sample 1 <==\n{prompt}{e.text}\n" in text


def test_batches_change_nothing(run, model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"Prompt number {i}\n" for i in range(5)))
    arguments = ("generate", model, "--file", path, "--samples", 2, "--format", "jsonl", *OPTIONS)
    whole = [json.loads(line)["text"] for line in run(*arguments).out.splitlines()]
    monkeypatch.setattr(verb, "ROWS", 4)
    assert [json.loads(line)["text"] for line in run(*arguments).out.splitlines()] == whole
    assert len(set(whole)) == 10  # every row has a seed of its own


def test_fasta_in_and_out(run, dna_model, tmp_path) -> None:
    path = tmp_path / "p.fa"
    path.write_text(">a first\nACGTAC\n>b\nGGCC\n")
    done = run("generate", dna_model, "--file", path, "--samples", 2, *OPTIONS, "-o", tmp_path / "out.fa")
    assert done.code == 0, done.stderr
    records = list(read_fasta(tmp_path / "out.fa"))
    assert [record.id for record in records] == ["a_1", "a_2", "b_1", "b_2"]
    expected = theirs(dna_model, ["ACGTAC", "GGCC"], samples=2)
    assert [r.sequence for r in records] == [p + e.text for p, e in zip(["ACGTAC"] * 2 + ["GGCC"] * 2, expected)]
    alone = run("generate", dna_model, *OPTIONS, stdin=b">a\nACGTAC\n").out
    assert alone.startswith(">a prompt=6\nACGTAC")


def test_text_that_is_no_sequence_is_not_written_as_fasta(run, model) -> None:
    done = run("generate", model, "-p", "A B", *OPTIONS, "--format", "fasta")
    assert done.code == 1
    assert "use --format jsonl" in done.stderr


@pytest.mark.parametrize("arguments", [["--file", "-"], []])
def test_prompts_from_standard_input(run, model, arguments) -> None:
    done = run("generate", model, *arguments, *OPTIONS, stdin=b"Call me\n")
    assert done.out == run("generate", model, "-p", "Call me", *OPTIONS).out


def test_no_prompt_starts_a_document(run, model, dna_model) -> None:
    done = run("generate", model, *OPTIONS)
    assert done.out == theirs(model, [[0]])[0].text + "\n"  # after EOS, as between documents in training
    assert run("generate", model, "-p", "", *OPTIONS).out == done.out
    assert run("generate", dna_model, *OPTIONS).out == theirs(dna_model, [[1]])[0].text + "\n"


def test_greedy_and_the_filters_reach_the_sampler(run, model) -> None:
    greedy = run("generate", model, "-p", "Call me", *OPTIONS, "--greedy").out
    assert run("generate", model, "-p", "Call me", *OPTIONS, "--temperature", 0).out == greedy
    assert run("generate", model, "-p", "Call me", *OPTIONS, "--top-k", 1).out == greedy
    assert run("generate", model, "-p", "Call me", *OPTIONS, "--top-p", 1e-9).out == greedy
    assert run("generate", model, "-p", "Call me", *OPTIONS, "--min-p", 1).out == greedy
    assert run("generate", model, "-p", "Call me", *OPTIONS).out != greedy
    assert run("generate", model, "-p", "Call me", *OPTIONS, "--greedy", "--repetition-penalty", 9).out != greedy


def test_stop_text_ends_a_sample(run, model) -> None:
    whole = run("generate", model, "-p", "Call me", *OPTIONS, "--greedy", "--format", "jsonl").out
    text = json.loads(whole)["text"]
    done = run("generate", model, "-p", "Call me", *OPTIONS, "--greedy", "--format", "jsonl", "--stop", text[3:5])
    line = json.loads(done.out)
    assert line["text"] == text[: text.index(text[3:5])]
    assert line["finish_reason"] == "stop"


# --- a generation in turns ---


def text_of(done) -> str:
    assert (done.code, done.stderr) == (0, "")
    return done.out.removesuffix("\n")


@pytest.mark.parametrize(
    ("options", "rest"),
    [(["--seed", 7], ["--temperature", 5]), ([], ["--greedy"]), (["--seed", 3], ["--repetition-penalty", 1.3])],
)
def test_a_saved_state_goes_on_where_it_stopped(run, dna_model, tmp_path, options, rest) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    rest = [*rest, "--ignore-eos"]
    whole = text_of(run("generate", dna_model, "-p", "ACGT", "-n", 30, *options, *rest))
    turns = [
        text_of(run("generate", dna_model, "-p", "ACGT", "-n", 12, "--save-state", first, *options, *rest)),
        text_of(run("generate", dna_model, "--state", first, "-n", 10, "--save-state", second, *rest)),
        text_of(run("generate", dna_model, "--state", second, "-n", 8, *rest)),
    ]
    assert "".join(turns) == whole
    assert "".join(turns[1:]) or "--greedy" in rest


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "AC", "--state", "x"],
        ["--prompt", "AC", "--prompt", "GT", "--save-state", "x"],
        ["--prompt", "AC", "--samples", 2, "--save-state", "x"],
        ["--prompt", "AC", "--format", "jsonl", "--save-state", "x"],
    ],
)
def test_a_state_is_of_one_row(run, dna_model, arguments) -> None:
    done = run("generate", dna_model, *arguments)
    assert done.code == 2
    assert "give one of" in done.stderr or "one prompt, one sample" in " ".join(done.stderr.split())


def test_a_state_that_is_none(run, dna_model, model, tmp_path) -> None:
    path = tmp_path / "state.safetensors"
    done = run("generate", dna_model, "--state", path)
    assert done.code == 1
    assert "is not a saved state" in done.stderr
    assert run("generate", model, "-p", "Call", "-n", 2, "--save-state", path).code == 0
    done = run("generate", dna_model, "--state", path)
    assert done.code == 1
    assert "belongs to a model with another configuration" in done.stderr

"""``crocuta generate``: text that continues prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from crocuta.cli.options import (
    FP8,
    Device,
    Dtype,
    FilterLayout,
    MaxMemory,
    ModelPath,
    Output,
    Precision,
    load_model,
    memory_size,
)

if TYPE_CHECKING:
    from torch import Tensor

    from crocuta.data.text import Document
    from crocuta.inference.generate import Generation
    from crocuta.inference.prefix import Prefix
    from crocuta.inference.sampling import SamplingConfig
    from crocuta.model.lm import Model
    from crocuta.ops.kernels.decode import Weights
    from crocuta.tokenizers.base import Tokenizer

ROWS = 64
"""Most samples that are generated side by side."""


def generate(
    model: ModelPath,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; repeatable.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="FILE", help="Prompts: text lines, FASTA or JSONL; -: standard input."),
    ] = None,
    output: Output = None,
    format: Annotated[
        Literal["text", "jsonl", "fasta"] | None, typer.Option(help="[default: text; fasta for prompts in FASTA]")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", metavar="N", help="New tokens at most.")] = 256,
    samples: Annotated[int, typer.Option(metavar="N", help="Continuations of each prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal samples.  [default: 0]")] = None,
    temperature: Annotated[float, typer.Option(help="Below 1 more likely text, above 1 more varied.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The most likely token each time.")] = False,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Draw from the K most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="From the most likely that reach P.")] = None,
    min_p: Annotated[float | None, typer.Option(metavar="P", help="From those P times as likely as the first.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already there get less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    state: Annotated[
        str | None, typer.Option(metavar="FILE", help="Go on where --save-state left off, instead of a prompt.")
    ] = None,
    save_state: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep what was read and generated, to go on later.")
    ] = None,
    weights: Annotated[
        Literal["float32", "bfloat16", "int8"],
        typer.Option(help="What decoding on a CPU reads: narrow copies are faster for long texts, and less exact."),
    ] = "float32",
    max_memory: MaxMemory = None,
    device: Device = "auto",
    dtype: Dtype = None,
    fp8: FP8 = "auto",
    precision: Precision = None,
    filter_layout: FilterLayout = None,
) -> None:
    """Generate text that continues prompts.

    Without --prompt and --file, standard input is read unless it is a terminal; without any prompt at all the text
    starts as a document does. A single continuation is shown while it grows.
    """
    from crocuta.cli.output import text_output

    if sum(map(bool, (prompt, file, state))) > 1:
        raise typer.BadParameter("give one of --prompt, --file and --state", param_hint="'--prompt'")
    prompts, kind = _prompts(prompt, file) if state is None else ([], "text")
    if (state or save_state) and (len(prompts) > 1 or samples > 1 or format not in (None, "text")):
        raise typer.BadParameter("a state is that of one prompt, one sample and --format text", param_hint="'--state'")
    limit = memory_size(max_memory)
    loaded, tokenizer = load_model(model, device, dtype, fp8, precision, filter_layout)

    from crocuta.inference.sampling import SamplingConfig

    sampling = SamplingConfig(
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    job = Job(loaded, tokenizer, sampling, max_tokens, samples, seed, tuple(stop or ()), ignore_eos, limit, weights)
    style = "text" if save_state else format or ("fasta" if kind == "fasta" else "text")
    if style == "fasta":
        _write_fasta(job.run(prompts), output, samples)
        return
    with text_output(output) as out:
        if style == "jsonl":
            for result in job.run(prompts):
                out.write(result.json())
                out.flush()
        elif state:
            from crocuta.inference.prefix import load_prefix

            job.stream("", load_prefix(loaded, state), out, save_state)
        elif len(prompts) == samples == 1:
            job.stream(prompts[0].text, prompt_ids(loaded, tokenizer, prompts[0]), out, save_state)
        else:
            for result in job.run(prompts):
                out.write(f"==> {result.prompt.id}, sample {result.sample + 1} <==\n{result.text}\n\n")
                out.flush()


@dataclass(frozen=True)
class Result:
    """One sample of one prompt; ``text`` begins with the prompt."""

    prompt: Document
    sample: int
    generation: Generation

    @property
    def text(self) -> str:
        return self.prompt.text + self.generation.text

    def json(self) -> str:
        from crocuta.cli.output import json_line

        done = self.generation
        return json_line(
            {
                "id": self.prompt.id,
                "sample": self.sample + 1,
                "prompt": self.prompt.text,
                "text": done.text,
                "tokens": len(done.ids),
                "log_prob": sum(done.log_probs),
                "finish_reason": done.finish_reason,
            }
        )


@dataclass(frozen=True)
class Job:
    """A model and how to draw from it."""

    model: Model
    tokenizer: Tokenizer
    sampling: SamplingConfig
    max_tokens: int
    samples: int
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    max_memory: int | None = None
    weights: Weights = "float32"

    def run(self, prompts: Sequence[Document]) -> Iterator[Result]:
        """Every sample of every prompt, in order; row r of all has the seed ``seed`` + r, however they are batched."""
        from crocuta.inference.generate import generate

        size = max(1, ROWS // max(1, self.samples))
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            generations = generate(
                self.model,
                self.tokenizer,
                [prompt_ids(self.model, self.tokenizer, document) for document in batch],
                max_tokens=self.max_tokens,
                sampling=self.sampling,
                samples=self.samples,
                seed=(self.seed or 0) + first * self.samples,
                stop=self.stop,
                ignore_eos=self.ignore_eos,
                max_memory=self.max_memory,
                weights=self.weights,
            )
            for row, generation in enumerate(generations):
                yield Result(batch[generation.prompt], row % self.samples, generation)

    def stream(self, text: str, start: Tensor | list[int] | Prefix, out: TextIO, save_state: str | None = None) -> None:
        """``text``, then each piece of what continues ``start`` as it comes, then a line end."""
        from crocuta.inference.generate import stream

        pieces = stream(
            self.model,
            self.tokenizer,
            [start],
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            max_memory=self.max_memory,
            weights=self.weights,
            keep_state=save_state is not None,
        )
        for piece in pieces:
            out.write(text + piece.text)
            out.flush()
            text = ""
            if piece.prefix is not None and save_state is not None:
                piece.prefix.save(save_state)
        out.write("\n")


def prompt_ids(model: Model, tokenizer: Tokenizer, prompt: Document) -> Tensor | list[int]:
    """The ids of a prompt; those of an empty one are what a document starts after. Raises InputError.

    Training puts the end-of-sequence token between documents. Sub-word models come with a token for the beginning.
    """
    from crocuta.cli.records import encode
    from crocuta.errors import InputError

    if prompt.text:
        return encode(model, tokenizer, [prompt])[0]
    start = tokenizer.bos_id if tokenizer.type == "pieces" else None
    start = tokenizer.eos_id if start is None else start
    if start is None:
        raise InputError("the prompt is empty", expected="text, as the tokenizer has no token to start after")
    return [start]


def _prompts(prompt: list[str] | None, file: str | None) -> tuple[list[Document], str]:
    """The prompts, and the format they came in."""
    from crocuta.cli.records import read_records, record_format, stdin_is_empty
    from crocuta.data.text import Document

    if prompt:
        return [Document(f"prompt {number}", text) for number, text in enumerate(prompt, 1)], "text"
    if file is None and (sys.stdin is None or sys.stdin.isatty() or stdin_is_empty()):
        return [Document("prompt 1", "")], "text"
    path = file or "-"
    kind = record_format(path)
    if kind == "auto":
        kind = "jsonl" if ".jsonl" in path.lower() else "fasta"
    return list(read_records([path])), kind


def _write_fasta(results: Iterator[Result], path: str | None, samples: int) -> None:
    from crocuta.data.fasta import Record, write_fasta
    from crocuta.errors import InputError

    def record(result: Result) -> Record:
        name = result.prompt.id.replace(" ", "_") + (f"_{result.sample + 1}" if samples > 1 else "")
        return Record(name, f"prompt={len(result.prompt.text)}", result.text)

    try:
        write_fasta((record(result) for result in results), path or "-")
    except InputError as error:
        raise InputError(error.what, given=error.given, expected=error.expected, fix="use --format jsonl") from error

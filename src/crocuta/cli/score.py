"""``crocuta score``: log-likelihoods of sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crocuta.cli.options import (
    FP8,
    Device,
    Dtype,
    Files,
    FilterLayout,
    KeepCase,
    MaxMemory,
    ModelPath,
    Output,
    Precision,
    load_model,
    memory_size,
)

if TYPE_CHECKING:
    from crocuta.inference.score import Score

_ESCAPES = {ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}


def score(
    model: ModelPath,
    files: Files = None,
    output: Output = None,
    format: Annotated[Literal["tsv", "jsonl"] | None, typer.Option(help="[default: tsv]")] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Add log_probs, one a token; JSONL.")] = False,
    both_strands: Annotated[bool, typer.Option("--both-strands", help="Average with the reverse complement.")] = False,
    bos: Annotated[bool, typer.Option("--bos", help="Score the first token too, after the BOS token.")] = False,
    keep_case: KeepCase = False,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    dtype: Dtype = None,
    fp8: FP8 = "auto",
    precision: Precision = None,
    filter_layout: FilterLayout = None,
) -> None:
    """Score sequences: natural log-likelihood, in total and a token, of each record.

    The first token of a record has nothing before it and is not scored, unless --bos is given. Records are read,
    scored and written in turn, in their order, so that a file may be of any size.
    """
    from crocuta.cli.output import text_output
    from crocuta.cli.records import batched, encode, inputs, naming, read_records

    if per_token and format == "tsv":
        raise typer.BadParameter("per-token scores need jsonl", param_hint="'--format'")
    limit = memory_size(max_memory)
    records = read_records(inputs(files), keep_case=keep_case)
    loaded, tokenizer = load_model(model, device, dtype, fp8, precision, filter_layout)

    from crocuta.inference.score import score as score_sequences

    with text_output(output) as out:
        as_table = format != "jsonl" and not per_token
        if as_table:
            out.write("id\ttokens\ttotal\tmean\n")
        for batch in batched(records):
            rows = encode(loaded, tokenizer, batch)
            with naming(batch):
                scores = score_sequences(loaded, tokenizer, rows, both_strands=both_strands, bos=bos, max_memory=limit)
            for document, result in zip(batch, scores):
                out.write(_row(document.id, result) if as_table else _object(document.id, result, per_token))
            out.flush()


def _row(name: str, score: Score) -> str:
    return f"{name.translate(_ESCAPES)}\t{score.tokens}\t{score.total!r}\t{score.mean!r}\n"


def _object(name: str, score: Score, per_token: bool) -> str:
    from crocuta.cli.output import floats, json_line

    value = {"id": name, "tokens": score.tokens, "total": score.total, "mean": score.mean}
    return json_line(value | ({"log_probs": floats(score.log_probs)} if per_token else {}))

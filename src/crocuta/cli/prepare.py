"""``crocuta prepare``: text and sequences into token files."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from crocuta.cli.options import KeepCase


def prepare(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="FASTA, JSONL or text, also .gz, .bgz, .xz. '-' or none: standard input.",
        ),
    ] = None,
    *,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="PREFIX", help="Write PREFIX.bin, PREFIX.idx and PREFIX.json.")
    ],
    tokenizer: Annotated[str, typer.Option(metavar="NAME", help="bytes, dna, or the path of a tokenizer.json.")],
    format: Annotated[
        Literal["auto", "fasta", "jsonl", "text", "lines"],
        typer.Option(help="text: a document a file; lines: a document a line; auto: by suffix, else text."),
    ] = "auto",
    field: Annotated[str, typer.Option(help="The field of a JSON object that holds the text.")] = "text",
    keep_case: KeepCase = False,
    no_eos: Annotated[bool, typer.Option("--no-eos", help="Put no end-of-sequence token after documents.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier call.")] = False,
) -> None:
    """Tokenise files for training (data.format: tokens)."""
    from crocuta.cli.records import inputs, record_format
    from crocuta.data.prepare import prepare as write_tokens
    from crocuta.tokenizers.load import make_tokenizer

    spec = {"type": tokenizer} if tokenizer in ("bytes", "dna") else {"type": "pieces", "file": tokenizer}
    made = make_tokenizer(spec)
    paths = inputs(files)
    # Standard input has no suffix: its first character tells.
    kind = record_format("-", "text") if format == "auto" and paths == ["-"] else format
    summary = write_tokens(
        paths,
        made,
        output,
        format=kind,
        field=field,
        case="keep" if keep_case else "upper",
        append_eos=False if no_eos else None,
        overwrite=overwrite,
    )
    done = f"{summary.documents:,} documents, {summary.tokens:,} tokens, {summary.bytes:,} bytes"
    typer.echo(f"{output}.bin: {done}", err=True)

"""``crocuta embed``: hidden states of sequences, as arrays."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
    Precision,
    load_model,
    memory_size,
)

if TYPE_CHECKING:
    import zipfile

    import numpy as np
    from numpy.typing import NDArray

    Embedded = Iterator[tuple[list[str], list[NDArray[np.float32]]]]


def embed(
    model: ModelPath,
    files: Files = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write here; stdout if that is no terminal.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="0: the embedding, N: after block N, -1: after the last.  [default: final norm]")
    ] = None,
    pooling: Annotated[
        Literal["mean", "last", "none"], typer.Option(help="Of a record's tokens; none: one vector a token.")
    ] = "mean",
    last: Annotated[int, typer.Option(metavar="N", help="With --pooling last, the mean of the last N tokens.")] = 1,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Put around each record what the publisher does (HyenaDNA: [SEP]).")
    ] = False,
    format: Annotated[Literal["npz", "jsonl"], typer.Option(help="")] = "npz",
    keep_case: KeepCase = False,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    dtype: Dtype = None,
    fp8: FP8 = "auto",
    precision: Precision = None,
    filter_layout: FilterLayout = None,
) -> None:
    """Embed sequences: a vector for each record, float32.

    npz holds ids [n] and embeddings [n d]; with --pooling none, ids [n] and one array [l d] a record, called
    embeddings_0 to embeddings_(n-1) in the order of ids.
    """
    from crocuta.cli.output import binary_output, floats, json_line, text_output
    from crocuta.cli.records import inputs, read_records

    if format == "npz" and output is None and sys.stdout.isatty():
        raise typer.BadParameter("npz is not for a terminal: name a file, or redirect", param_hint="'--output'")
    limit = memory_size(max_memory)
    records = read_records(inputs(files), keep_case=keep_case)
    loaded, tokenizer = load_model(model, device, dtype, fp8, precision, filter_layout)

    from crocuta.cli.records import batched, encode, naming
    from crocuta.inference.embed import embed as embed_sequences

    def embedded() -> Embedded:
        for batch in batched(records):
            rows = encode(loaded, tokenizer, batch)
            with naming(batch):
                vectors = embed_sequences(
                    loaded,
                    tokenizer,
                    rows,
                    layer=layer,
                    pooling=pooling,
                    last=last,
                    special_tokens=special_tokens,
                    max_memory=limit,
                )
            yield [document.id for document in batch], vectors

    if format == "jsonl":
        with text_output(output) as out:
            for ids, vectors in embedded():
                out.writelines(json_line({"id": i, "embedding": floats(v)}) for i, v in zip(ids, vectors))
                out.flush()
        return
    import zipfile

    with binary_output(output) as stream, zipfile.ZipFile(stream, "w") as archive:
        _write_npz(archive, embedded(), stacked=pooling != "none")


def _write_npz(archive: zipfile.ZipFile, batches: Embedded, *, stacked: bool) -> None:
    """What ``numpy.savez`` writes, but array by array, and under names that no record's id can spoil."""
    import numpy as np

    names: list[str] = []
    arrays: list[NDArray[np.float32]] = []
    for ids, vectors in batches:
        if stacked:
            arrays.append(np.stack(vectors))
        else:
            for index, vector in enumerate(vectors, len(names)):
                _write_array(archive, f"embeddings_{index}", vector)
        names += ids
    _write_array(archive, "ids", np.array(names))
    if stacked:
        _write_array(archive, "embeddings", np.concatenate(arrays))


def _write_array(archive: zipfile.ZipFile, name: str, array: NDArray) -> None:
    from numpy.lib.format import write_array

    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        write_array(stream, array, allow_pickle=False)

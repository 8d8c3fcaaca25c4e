"""``crocuta predict``: what an encoder's head says of sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crocuta.cli.options import Device, Dtype, Files, KeepCase, Output, choose_device, torch_dtype
from crocuta.errors import InputError, TokenizerError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crocuta.config import EncoderConfig

    Describe = Callable[[NDArray[np.float32]], dict[str, Any]]

_ESCAPES = {ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}


def predict(
    model: Annotated[Path, typer.Argument(metavar="ENCODER", help="A folder that a fine-tune left.")],
    files: Files = None,
    output: Output = None,
    format: Annotated[
        Literal["tsv", "jsonl"], typer.Option(help="jsonl also has the probability of every label.")
    ] = "tsv",
    keep_case: KeepCase = False,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Predict labels or numbers for sequences, with an encoder that has a head.

    Of each record the most probable label and its probability, the label of every token, or the targets of a
    regression. Records are read, run and written in turn, in their order.
    """
    from crocuta.checkpoints.load import load_encoder
    from crocuta.cli.output import json_line, text_output
    from crocuta.cli.records import batched, encode, inputs, naming, read_records

    records = read_records(inputs(files), keep_case=keep_case)
    encoder, tokenizer = load_encoder(model, device=choose_device(device), dtype=torch_dtype(dtype))
    if tokenizer is None:
        raise TokenizerError(f"the encoder of {model} has no tokenizer", fix="save it again together with one")
    columns, describe = _description(encoder.config, model)

    from crocuta.inference.encode import encode as run

    with text_output(output) as out:
        if format == "tsv":
            out.write("\t".join(["id", *columns]) + "\n")
        for batch in batched(records):
            rows = encode(encoder, tokenizer, batch)
            with naming(batch):
                outputs = run(encoder, tokenizer, rows)
            for document, values in zip(batch, outputs):
                result = describe(values)
                if format == "jsonl":
                    out.write(json_line({"id": document.id} | result))
                else:
                    cells = [document.id.translate(_ESCAPES), *(_cell(result[name]) for name in columns)]
                    out.write("\t".join(cells) + "\n")
            out.flush()


def _description(config: EncoderConfig, folder: Path) -> tuple[list[str], Describe]:
    """The columns of the table, and what one output means. Raises InputError for an encoder without a head."""
    from crocuta.config import ClassificationConfig, RegressionConfig
    from crocuta.data.label_map import LABELS_FILE, LabelMap

    match config.head:
        case ClassificationConfig(labels=count):
            names: tuple[str, ...] = tuple(map(str, range(count)))
            if (folder / LABELS_FILE).exists():
                names = LabelMap.load(folder).names
            if len(names) != count:
                raise InputError(f"{folder / LABELS_FILE} does not fit the head", given=len(names), expected=count)
            if config.pooling is None:
                return ["labels"], lambda logits: {"labels": [names[i] for i in logits.argmax(-1)]}
            return ["label", "probability"], lambda logits: _classified(logits, names)
        case RegressionConfig():
            return ["values"], lambda values: {"values": values.tolist()}
        case None:
            fix = "fine-tune it, or use crocuta.encode for its vectors"
            raise InputError(f"the encoder of {folder} has no head", fix=fix)


def _classified(logits: NDArray[np.float32], names: tuple[str, ...]) -> dict[str, Any]:
    import numpy as np

    weights = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = dict(zip(names, (weights / weights.sum()).tolist()))
    label = names[int(logits.argmax())]
    return {"label": label, "probability": probabilities[label], "probabilities": probabilities}


def _cell(value: object) -> str:
    """A label, a number, or several with spaces between."""
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return value.translate(_ESCAPES) if isinstance(value, str) else repr(value)

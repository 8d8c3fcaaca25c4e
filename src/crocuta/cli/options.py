"""Options and arguments that several verbs share, and the model that they name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from crocuta.errors import InputError, TokenizerError

if TYPE_CHECKING:
    import torch

    from crocuta.model.lm import Model
    from crocuta.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

DtypeName: TypeAlias = Literal["fp32", "bf16", "fp64"]

ModelPath = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="Folder of a model or a finished run, or the name of a published checkpoint."),
]
Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="FASTA, JSONL or text lines, also .gz, .bgz, .xz; told apart by suffix, else by the first character. "
        "'-' or none: standard input.",
    ),
]
Output = Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="Write here, not to stdout.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:N, mps; auto: a GPU if there is one.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Cast the weights.  [default: as stored]")]
FP8 = Annotated[
    Literal["auto", "off"],
    typer.Option("--fp8", help="off: do without the FP8 rounding that some Evo 2 models were trained with."),
]
Precision = Annotated[
    Literal["exact", "upstream"] | None,
    typer.Option(help="upstream: round where the published code rounds.  [default: as saved, else exact]"),
]
FilterLayout = Annotated[
    Literal["interleaved", "by_convolution"] | None,
    typer.Option(
        "--filter-layout",
        help="What trained a HyenaDNA of order 3 or above: interleaved, the training code; by_convolution, the "
        "standalone file.",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Take no more beyond the model itself, such as 2GiB or 500MB.",
        show_default=False,
    ),
]
KeepCase = Annotated[bool, typer.Option("--keep-case", help="Leave lower case in FASTA as it is.")]


def memory_size(text: str | None) -> int | None:
    """Bytes that the option means: 2GiB is 2 · 1024³, 2GB is 2 · 1000³. Raises InputError; before a model is loaded."""
    from crocuta.model.memory import size_in_bytes

    return None if text is None else size_in_bytes(text)


def torch_dtype(name: DtypeName | None) -> torch.dtype | None:
    """The dtype that the option means; None: as stored."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[name] if name else None


def load_model(
    path: Path,
    device: str,
    dtype: DtypeName | None,
    fp8: Literal["auto", "off"] = "auto",
    precision: Literal["exact", "upstream"] | None = None,
    filter_layout: Literal["interleaved", "by_convolution"] | None = None,
) -> tuple[Model, Tokenizer]:
    """The model and its tokenizer, ready to use; a note goes to standard error if its results are unverified.

    Raises:
        InputError: no such model or device. TokenizerError: the model has no tokenizer; and all that ``load`` raises.
    """
    from crocuta.checkpoints.load import load

    model, tokenizer = load(
        path,
        device=choose_device(device),
        dtype=torch_dtype(dtype),
        fp8=fp8,
        precision=precision,
        filter_layout=filter_layout,
    )
    if tokenizer is None:
        raise TokenizerError(
            f"the model of {path} has no tokenizer",
            fix="put its tokenizer.json into the folder, or save it again together with one",
        )
    if model.config.unverified:
        logger.warning("unverified: %s", model.config.unverified)
    return model, tokenizer


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU if there is one. Raises InputError where there is no such device."""
    import torch

    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = "cuda" if counts["cuda"] else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError("unknown device", given=repr(name), expected="cpu, cuda, cuda:N, mps or auto") from error
    if (device.index or 0) >= counts.get(device.type, 0):
        here = [kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}" for kind, count in counts.items() if count]
        raise InputError("there is no such device here", given=repr(name), expected=", ".join(here))
    return device

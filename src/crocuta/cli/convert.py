"""``crocuta convert``: a checkpoint from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crocuta.cli.options import FP8, Dtype, FilterLayout, torch_dtype


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder, weights file or published name of a checkpoint.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    to: Annotated[
        Literal["native", "stripedhyena", "evo1-hf", "evo2", "hyenadna-hf"],
        typer.Option(help="Layout: our own, or one that the published code reads."),
    ] = "native",
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the logits of both on fixed sequences; fail where they differ.")
    ] = False,
    keep_padding: Annotated[
        bool, typer.Option("--keep-padding", help="Keep MLP units that are zero (Evo 2, 1M context).")
    ] = False,
    fp8: FP8 = "auto",
    dtype: Dtype = None,
    filter_layout: FilterLayout = None,
) -> None:
    """Rewrite a checkpoint in another layout; the weights keep their bits, unless --dtype casts them.

    Prints DST, and with --verify the largest difference of the logits.
    """
    from crocuta.checkpoints import convert as conversion

    conversion.convert(
        source,
        destination,
        to,
        dtype=torch_dtype(dtype),
        fp8=fp8,
        keep_padding=keep_padding,
        filter_layout=filter_layout,
    )
    typer.echo(destination)
    if verify:
        difference = conversion.verify(
            source, destination, dtype=torch_dtype(dtype), fp8=fp8, filter_layout=filter_layout
        )
        typer.echo(f"logits differ by at most {difference:.3g}")

"""``crocuta download``: a published checkpoint into the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from crocuta.checkpoints.hub import Download


def download(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", show_default=False, help="A name of --list, or ORG/NAME on the Hugging Face Hub."
        ),
    ] = None,
    *,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", "-r", metavar="R", help="Branch, tag or commit.  [default: that of --list, or main]"
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Print all published checkpoints as TSV, and exit.")] = False,
) -> None:
    """Download a published checkpoint and print its folder.

    Complete files are never fetched twice. The cache is that of huggingface_hub (HF_HOME moves it), so that
    afterwards NAME works wherever a MODEL is asked for, also with HF_HUB_OFFLINE=1.
    """
    if show == (name is not None):
        raise typer.BadParameter("give a NAME or --list, one of the two")
    if name is None:
        _print_table()
        return
    from crocuta.checkpoints.hub import resolve

    typer.echo(resolve(name, revision=revision, announce=_announce))


def _print_table() -> None:
    from crocuta.published import PUBLISHED

    typer.echo("name\trepo\trevision\tpreset\tlayout")
    for entry in PUBLISHED.values():
        typer.echo(f"{entry.name}\t{entry.repo}\t{entry.revision}\t{entry.preset}\t{entry.layout}")


def _announce(plan: Download) -> None:
    files = f"{len(plan.files)} file{'s' if len(plan.files) > 1 else ''}"
    sizes = f"{plan.total_bytes:,} bytes, {plan.missing_bytes:,} of them to download"
    typer.echo(f"{plan.repo} at {plan.revision}: {files}, {sizes}", err=True)

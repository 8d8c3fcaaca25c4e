"""The verbs put together, and how errors become one line and an exit code.

    0  done          1  an error that the message explains          2  wrong usage
    130  stopped by the user          141  nobody reads the output any more

An exception that is not ours is a bug and keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from crocuta import __version__
from crocuta.cli import convert, distill, download, embed, generate, inspect, predict, prepare, score, train
from crocuta.errors import CrocutaError, CrocutaWarning

# Click, or what Typer carries of it, calls this UsageError; Typer has no name for it.
UsageError: Any = typer.BadParameter.__mro__[1]


class _Crocuta(TyperGroup):
    """Every error that bad input can cause is one line on standard error."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse, run and exit, whatever ``standalone_mode`` says."""
        given = list(sys.argv[1:] if args is None else args)
        if len(given) == 2 and given[0] in self.commands and given[1] in ("-h", "--help"):
            self._help(given[0])
            sys.exit(0)
        try:
            code = super().main(given or ["--help"], "crocuta", standalone_mode=False)
        except UsageError as error:
            verb = f" {given[0]}" if given and given[0] in self.commands else ""
            code = _complain(f"{error.format_message()} (see crocuta{verb} --help)", 2)
        except typer.Abort:
            code = 130
        sys.exit(code or 0)

    def _help(self, verb: str) -> None:
        """Print what ``crocuta VERB --help`` does, without parsing: Typer's parser imports pydantic, half the time."""
        root = self.context_class(self, info_name="crocuta", **self.context_settings)
        command = self.commands[verb]
        typer.echo(command.get_help(command.context_class(command, info_name=verb, parent=root)))

    def invoke(self, ctx: Any) -> Any:
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except CrocutaError as error:
            raise typer.Exit(_complain(str(error), 1)) from error
        except BrokenPipeError as error:
            # Else the interpreter would try to flush again at its end, and say so.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from error


def _complain(message: str, code: int) -> int:
    typer.echo(f"crocuta: error: {' '.join(message.split())}", err=True)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001 - of the function that this one replaces
    line: str | None = None,
) -> None:
    """Ours as one line; all others as Python shows them."""
    if issubclass(category, CrocutaWarning):
        logging.getLogger("crocuta").warning(" ".join(str(message).split()))
    else:
        typer.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"crocuta {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Crocuta,
    help="Hyena and StripedHyena sequence models: train, generate, score, embed, predict, convert.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would make --help twice as slow
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(train.train)
app.command()(generate.generate)
app.command()(score.score)
app.command()(embed.embed)
app.command()(predict.predict)
app.command()(inspect.inspect)
app.command()(convert.convert)
app.command()(distill.distill)
app.command()(download.download)
app.command()(prepare.prepare)


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("crocuta: %(message)s"))
    logging.getLogger("crocuta").handlers = [handler]
    warnings.showwarning = _show_warning

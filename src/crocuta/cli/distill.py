"""``crocuta distill``: long filters replaced by a few modes each, with what that costs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crocuta.cli.options import FP8, Device, Dtype, KeepCase, ModelPath, load_model
from crocuta.errors import InputError

if TYPE_CHECKING:
    from crocuta.inference.distill import LayerFit
    from crocuta.inference.drift import Drift
    from crocuta.model.lm import Model
    from crocuta.tokenizers.base import Tokenizer

REPORT = "distillation.json"
"""Name of the report in the new folder."""
_HEADER = ("layer", "filters", "taps", "median error", "worst error", "worst freq.", "bound", "verdict")


def distill(
    model: ModelPath,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    modes: Annotated[int, typer.Option(metavar="N", help="Complex modes a filter.")],
    max_error: Annotated[
        float, typer.Option(metavar="E", help="Largest relative l2 error of any filter of a layer.")
    ] = 1e-2,
    layers: Annotated[
        str | None, typer.Option(metavar="0,2,...", help="Only these.  [default: all with long filters]")
    ] = None,
    keep_bad: Annotated[
        bool, typer.Option("--keep-bad", help="Keep layers above the error exact; no refusal.")
    ] = False,
    horizon: Annotated[
        int | None, typer.Option(metavar="L", help="Fit implicit filters to L taps.  [default: to all]")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Compare both models on these sequences; read as by score; repeatable."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Write the report here, too; DST/{REPORT} is one.")
    ] = None,
    keep_case: KeepCase = False,
    device: Device = "auto",
    dtype: Dtype = None,
    fp8: FP8 = "auto",
) -> None:
    """Replace implicit and long explicit filters by modal ones: an approximation that decodes with constant state.

    Prints the errors of each layer's filters, over all their taps: ‖h - ĥ‖ / ‖h‖, median and worst, the worst
    error at any frequency, and a bound that no filter of N modes is below. A layer with a filter above --max-error is
    refused. The new model remembers that it was distilled.
    """
    from crocuta.cli.records import batched, encode, read_records

    if os.path.lexists(destination):
        raise InputError(f"{destination} exists", expected="a new name", fix="choose another or remove it")
    chosen = None if layers is None else _indices(layers)
    records = read_records(data, keep_case=keep_case) if data else None
    loaded, tokenizer = load_model(model, device, dtype, fp8)
    rows = None if records is None else [row for batch in batched(records) for row in encode(loaded, tokenizer, batch)]

    from crocuta.inference.distill import assemble, fit_layers, judge
    from crocuta.inference.drift import measure_drift

    fits = []
    typer.echo("  ".join(_HEADER))
    for fit in fit_layers(loaded, modes=modes, layers=chosen, horizon=horizon):
        typer.echo(_row(fit, max_error, keep_bad))
        fits.append(fit)
    judged = judge(fits, modes=modes, max_error=max_error, on_excess="keep" if keep_bad else "refuse")
    new = assemble(loaded, judged)
    result: dict[str, Any] = {"source": str(model), **judged.to_json()}
    if rows is not None:
        drift = measure_drift(loaded, new, rows)
        typer.echo(_summary(drift))
        result["drift"] = {"data": data, **drift.to_json()}
    _write(new, tokenizer, destination, result)
    if report is not None:
        _write_report(report, result)
    typer.echo(destination)


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of numbers", param_hint="'--layers'") from error


def _row(fit: LayerFit, max_error: float, keep_bad: bool) -> str:
    above = len(fit.above(max_error))
    verdict = f"{above} above, {'kept exact' if keep_bad else 'refused'}" if above else "modal"
    numbers = (fit.error.median(), fit.error.max(), fit.frequency_error.max(), fit.fit.bound.max())
    cells = [str(fit.layer), str(len(fit.error)), str(fit.horizon), *(f"{float(value):.1e}" for value in numbers)]
    return "  ".join([*(cell.rjust(len(name)) for cell, name in zip(cells, _HEADER)), verdict])


def _summary(drift: Drift) -> str:
    return (
        f"{drift.tokens:,} tokens: logits differ by at most {drift.max_logit:.3g}, {drift.mean_logit:.3g} on average; "
        f"KL {drift.kl:.3g} bits; same top token at {drift.same_top:.2%}\n"
        f"bits a token: {drift.bits_before:.4f} before, {drift.bits_after:.4f} after "
        f"(perplexity {2**drift.bits_before:.4f}, {2**drift.bits_after:.4f})"
    )


def _write(model: Model, tokenizer: Tokenizer, destination: Path, result: dict[str, Any]) -> None:
    """Model and report as one new folder, whole or not at all."""
    from crocuta.checkpoints import commit, native

    def write(folder: Path) -> None:
        native.save(model, tokenizer, folder)
        _write_report(folder / REPORT, result)

    commit.make_folders(destination.absolute().parent)
    commit.write_folder(destination, write, sealed=False)  # native.save seals the model's files


def _write_report(path: Path, result: dict[str, Any]) -> None:
    from crocuta.checkpoints import commit

    commit.replace_file(path, (json.dumps(result, indent=1) + "\n").encode())

"""``crocuta train``: a run from its description to its report."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from crocuta.training.config import TrainConfig
    from crocuta.training.finetune_config import FineTuneConfig
    from crocuta.training.loop import Outcome

logger = logging.getLogger(__name__)

STOPPED = 130
"""Exit code of a run that a signal stopped, after saving."""


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML or JSON file that describes the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", show_default=False, help="Changes, such as steps=500 data.held_out=0.1"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the run, to be made.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run in the folder first.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resulting run and stop.")] = False,
) -> None:
    """Train a model, or fine-tune one with a head on labelled data if CONFIG has a task.

    The folder receives train.json, metrics.jsonl, checkpoints and the model, which the other verbs take. Ctrl-C saves
    and stops. At the end a sample and a comparison with baselines are printed, if CONFIG asks for them.

    Of a fine-tune it receives fine_tune.json, metrics.jsonl, the encoder, its labels and result.json with the figures
    of the validation and the test split, which are printed, too. A fine-tune cannot be resumed.
    """
    from crocuta.training.finetune_config import FineTuneConfig
    from crocuta.training.recipes import read_recipe

    run = read_recipe(config, overrides or ())
    if print_config:
        _print_config(run)
        return
    if output is None:
        raise typer.BadParameter("name the folder of the run", param_hint="'--output'")
    if resume and overwrite:
        raise typer.BadParameter("give one of --resume and --overwrite", param_hint="'--resume'")
    if isinstance(run, FineTuneConfig):
        _fine_tune(run, output, resume, overwrite)
        return
    _check_files([f"{name}.bin" if run.data.format == "tokens" else name for name in run.data.files])
    if overwrite:
        remove_run(output)

    from crocuta.training.loop import train as train_model

    outcome = train_model(run, output, resume=resume)
    if not outcome.finished:
        raise typer.Exit(STOPPED)

    from crocuta.training.finish import finish

    if run.baselines is not None:
        typer.echo("computing the baselines", err=True)
    finish(outcome, run, output, sample=_sample(outcome, run))


def _fine_tune(run: FineTuneConfig, output: Path, resume: bool, overwrite: bool) -> None:
    from crocuta.data.splits import files_of

    if resume:
        raise typer.BadParameter("a fine-tune cannot be resumed", param_hint="'--resume'")
    table = run.data.format.table
    _check_files([*files_of(run.data.splits), *([] if table is None else [table])])
    if overwrite:
        remove_run(output)

    from crocuta.training.finetune import fine_tune
    from crocuta.training.finetune_report import report

    typer.echo(report(fine_tune(run, output)))


def _check_files(names: Sequence[str]) -> None:
    """InputError for a data file that is missing, before an earlier run is removed or a new folder made."""
    from crocuta.errors import InputError

    for name in names:
        if name != "-" and not Path(name).exists():
            raise InputError("there is no such data file", given=name, fix="check the files under data")


def _print_config(run: TrainConfig | FineTuneConfig) -> None:
    from crocuta.schema import encode

    value = encode(run)
    try:
        import yaml
    except ImportError:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    else:
        sys.stdout.write(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def remove_run(folder: Path) -> None:
    """Empty the folder of an earlier run; nothing happens if it is not there or empty.

    Raises:
        InputError: the folder holds anything else than a run of ours. CheckpointError: the run is still going.
    """
    from crocuta.errors import CrocutaError, InputError
    from crocuta.schema import decode
    from crocuta.training.checkpoint import TrainingCheckpoints
    from crocuta.training.config import TrainConfig
    from crocuta.training.finetune import CONFIG_FILE as FINE_TUNE_FILE
    from crocuta.training.finetune_config import FineTuneConfig
    from crocuta.training.loop import CONFIG_FILE

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:  # a train.json alone is no proof: data sets are called that, too
        if (folder / FINE_TUNE_FILE).exists():
            decode(FineTuneConfig, json.loads((folder / FINE_TUNE_FILE).read_bytes()))
        else:
            decode(TrainConfig, json.loads((folder / CONFIG_FILE).read_bytes()))
    except (OSError, ValueError, CrocutaError) as error:
        fix = "remove it yourself, or choose another folder"
        raise InputError(
            f"{folder} will not be overwritten: it is no run", expected=f"a {CONFIG_FILE} of ours in it", fix=fix
        ) from error
    if (folder / CONFIG_FILE).exists():
        TrainingCheckpoints(folder / "checkpoints").close()  # refuses while another trainer works there
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sample(outcome: Outcome, run: TrainConfig) -> str | None:
    """Text from the new model, if the run asks for some. The model is saved by now: a bad prompt is no failure."""
    if run.sample is None:
        return None
    from crocuta.cli.generate import Job, prompt_ids
    from crocuta.data.text import Document
    from crocuta.errors import CrocutaError
    from crocuta.inference.sampling import SamplingConfig

    prompt, limit = Document("sample", run.sample.prompt), outcome.model.config.max_length
    try:
        sampling = SamplingConfig(temperature=run.sample.temperature, top_p=run.sample.top_p)
        taken = len(prompt_ids(outcome.model, outcome.tokenizer, prompt))
        tokens = run.sample.tokens if limit is None else min(run.sample.tokens, limit - taken)
        job = Job(outcome.model, outcome.tokenizer, sampling, tokens, 1, run.seed, (), False)
        return next(job.run([prompt])).text
    except CrocutaError as error:
        logger.warning("no sample was generated: %s", error)
        return None

"""A run in, one page of it out: curves, confusions, calibration, worst mistakes, time, record.

    python tools/report.py logs/baseline                     # logs/baseline/report.html, and its plots in logs/baseline/plots
    python tools/report.py logs/baseline logs/larger         # side by side, what differs marked: logs/report.html
    python tools/report.py logs/folds                        # a folder of runs stands for all of them

The page needs no network and no other file. train.py makes it at the end of each run. Of the splits it looks at valid
alone; scores of test are on it where predict.py has written predictions/test.csv.
"""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tyro.conf import Positional

from batteries.core.command_line import run_command
from batteries.core.config_io import to_json
from batteries.core.errors import UserError
from batteries.core.project import ROOT
from batteries.evaluation.error_analysis import what_is_missing
from batteries.evaluation.predictions import Predictions, read_predictions
from batteries.evaluation.scoring import score
from batteries.report.history import History, common_folder, find_runs, read_histories
from batteries.report.html import Section, check_ours, make_page, plots_of, tag, write_page
from batteries.report.sections import (
    compare_curves,
    show_calibration,
    show_classes,
    show_curves,
    show_knobs,
    show_record,
    show_runs,
    show_samples,
    show_scores,
    show_tiles,
    show_time,
)


@dataclass(frozen=True)
class Options:
    """Make a page of a run, or of several side by side."""

    runs: Positional[tuple[Path, ...]] = (Path("logs/baseline"),)  # folders of runs, or of folders of runs (folds)
    output: Path | None = None  # the page, .html; by default report.html in the run's folder, or in that of all runs

    checkpoint: str = "best"  # of one run, what predicts valid: best, last, swa (made by average.py), or a file
    data_dir: Path | None = None  # by default the run's
    batch_size: int | None = None  # by default the run's valid_batch_size
    num_workers: int | None = None  # loader processes; by default from the machine, 0 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps


class Verdict(NamedTuple):
    """What a checkpoint says of the valid split, its name, and a way to the picture of an id as a PNG file."""

    predictions: Predictions
    checkpoint: str
    look: Callable[[str], bytes | None]


def main(options: Options) -> Path:
    """Make the page; where it is."""
    if not options.runs:
        raise UserError("report.py needs the folder of a run, such as logs/baseline.")
    folders = find_runs(options.runs)
    output = find_output(options, folders)
    check_ours(output)  # before the work
    runs = read_histories(folders)
    page, sections = compare(runs, output) if len(runs) > 1 else describe(runs[0], options)
    write_page(output, page, plots_of(sections))
    print(f"report   {output}")
    return output


def find_output(options: Options, runs: list[Path]) -> Path:
    """Where the page goes. Raises BadInput where several runs have no folder of their own in common."""
    if options.output is not None:
        if options.output.suffix != ".html":
            raise UserError(f"--output {options.output} must end in .html.")
        return options.output
    folder = runs[0] if len(runs) == 1 else common_folder(runs)
    if ROOT.resolve().is_relative_to(folder.resolve()):
        raise UserError("these runs have no folder in common but that of everything: give --output, such as page.html.")
    return folder / "report.html"


def describe(run: History, options: Options) -> tuple[str, list[Section]]:
    """The page of one run."""
    from train import Config  # here, so that several runs are compared without waiting for torch

    verdict, problem = judge(run, options)
    test, damage = read_test(run)
    torn = "" if run.epochs or not run.record.get("best") else "metrics.jsonl holds no whole line of this run."
    notes = [note for note in (torn, problem, damage) if note]
    for note in notes:
        print(f"note     {note}")
    predictions = verdict and verdict.predictions
    valid = {} if verdict is None else {f"valid, by {verdict.checkpoint}": verdict.predictions}
    sections = [show_curves(run), show_scores(run, score_all(run, valid | test))]
    if verdict is not None:
        sections += [show_classes(verdict.predictions), show_calibration(verdict.predictions)]
        sections += [show_samples(verdict.predictions, verdict.look)]
    defaults = {name: value for name, value in to_json(Config()).items() if name != "resume"}  # no run keeps it
    sections += [show_time(run), show_knobs({"this run": run.config, "default": defaults}), show_record(run)]
    lead = [*(tag("p", note, class_="note") for note in notes), show_tiles(run, predictions)]
    return make_page(run.name, run.summary(), lead, sections, foot()), sections


def compare(runs: list[History], output: Path) -> tuple[str, list[Section]]:
    """The page of several runs, side by side."""
    knobs = show_knobs({run.name: run.config for run in runs})
    sections = [show_runs(runs, output.parent), compare_curves(runs), knobs]
    names = ", ".join(run.name for run in runs)
    return make_page(f"{len(runs)} runs", names, [], sections, foot()), sections


def foot() -> str:
    """What made a page, and when."""
    return f"Made by report.py, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."


def judge(run: History, options: Options) -> tuple[Verdict | None, str]:
    """What the run's checkpoint says of the valid split, or why nothing: the rest of the page is made anyway."""
    try:
        return predict_valid(run.folder, options), ""
    except Exception as error:  # a task of another kind, a cut run, other data, a device that is full
        if isinstance(error, UserError) and options.checkpoint != "best":  # it was asked for by name
            raise
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return None, f"Confusions, calibration and samples are left out: {said}"


def predict_valid(folder: Path, options: Options) -> Verdict:
    """The verdict on one run. Raises BadInput where its checkpoint, its data or its kind of target have none."""
    from batteries.data.image_grid import thumbnail
    from batteries.evaluation.inference import Experiment, InferenceOptions, predict_run, run_config
    from batteries.evaluation.run_selection import find_checkpoint
    from batteries.training.setup import setup_training
    from experiment import augmentations, dataset, model, splits
    from train import Config

    experiment = Experiment(
        make_folds=splits.make_folds,
        build_model=model.build_model,
        to_probabilities=model.to_probabilities,
        normalize=augmentations.normalize,
        valid_transform=augmentations.valid_transform,
        channels=len(augmentations.MEAN),
    )
    inference = InferenceOptions(
        checkpoint=options.checkpoint,
        split="valid",
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    config = run_config(folder, Config, options.device, options.data_dir)
    stages = [stage.name for stage in config.stages]
    file = find_checkpoint(folder, stages, None, options.checkpoint, minimize=config.minimize_metric)
    with contextlib.redirect_stdout(io.StringIO()), setup_training(config) as device:
        samples: Any = dataset.load_dataset(config.data_dir)
        predictions = predict_run(folder, config, samples, device, experiment, inference)["valid"]
    if missing := what_is_missing(predictions):
        raise UserError(missing)
    places = {str(name): index for index, name in enumerate(samples.ids)}
    name = f"{file.parent.name}/{file.name}"
    return Verdict(predictions, name, lambda sample: thumbnail(samples[places[sample]][0]))


def read_test(run: History) -> tuple[dict[str, Predictions], str]:
    """The predictions of the test split where they were made already, and what is wrong with them."""
    path = run.folder / "predictions/test.csv"
    try:
        table = read_predictions(path) if path.is_file() else None
    except UserError as error:
        return {}, str(error)
    return ({} if table is None or table.targets is None else {"test, of predictions/test.csv": table}), ""


def score_all(run: History, tables: Mapping[str, Predictions]) -> dict[str, dict[str, float]]:
    """The scores of each table: accuracy, loss, and those that the run asked for."""
    from train import SCORES

    asked = (run.metric, *run.config.get("scores", ()))
    functions = {name: SCORES[name] for name in SCORES if name in asked}
    return {name: score(table, functions) for name, table in tables.items()}


if __name__ == "__main__":
    run_command(main, Options, repeats=False)

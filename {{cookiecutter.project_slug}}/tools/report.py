"""Build an HTML report of a run: curves, analysis of predictions, worst errors, time and metadata.

    python tools/report.py logs/baseline                 # logs/baseline/report.html, with plots in logs/baseline/plots
    python tools/report.py logs/baseline logs/larger     # compare runs, differences highlighted: logs/report.html
    python tools/report.py logs/folds                    # compare all runs in a directory

The report needs no network and no other file. train.py builds it at the end of each run. It predicts the valid split
only; scores on test are included if tools/predict.py has written predictions/test.csv.
"""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tyro.conf import Positional

from batteries.core.command_line import run_command
from batteries.core.config_io import to_json
from batteries.core.errors import UserError
from batteries.core.metric_names import select_scores
from batteries.core.project import ROOT
from batteries.data.masks import read_mask
from batteries.evaluation.error_analysis import check_targets
from batteries.evaluation.label_analysis import choose_threshold
from batteries.evaluation.mask_table import MaskTable, is_mask_table, read_mask_table
from batteries.evaluation.predictions import Predictions, read_predictions
from batteries.evaluation.scoring import score
from batteries.report.class_sections import make_class_tiles, render_class_sections
from batteries.report.history import RunHistory, common_directory, find_runs, read_histories
from batteries.report.html import Section, Tile, check_replaceable, make_report, plots_of, tag, write_report
from batteries.report.label_sections import make_label_tiles, render_label_sections
from batteries.report.mask_sections import make_mask_tiles, render_mask_sections, worst_masks
from batteries.report.number_sections import make_number_tiles, render_number_sections
from batteries.report.sections import (
    render_curves_comparison,
    render_curves_section,
    render_metadata_section,
    render_options_section,
    render_runs_section,
    render_scores_section,
    render_tiles,
    render_time_section,
)


@dataclass(frozen=True)
class Options:
    """Build a report of a run, or compare several runs."""

    runs: Positional[tuple[Path, ...]] = (Path("logs/baseline"),)  # run directories, or directories of runs (folds)
    output: Path | None = None  # an .html file; by default report.html in the run directory, or next to several runs

    checkpoint: str = "best"  # for one run, what predicts valid: best, last, swa (made by tools/average.py), or a file
    data_dir: Path | None = None  # directory of the data set; by default that of the run
    batch_size: int | None = None  # by default the run's valid_batch_size
    num_workers: int | None = None  # loader processes; by default chosen for the machine, 0 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps


class ValidPredictions(NamedTuple):
    """The predictions of the valid split.

    Attributes:
        predictions: The predictions.
        checkpoint: The stage and file of the checkpoint.
        thumbnail_of: Returns the image of an id as a PNG file, of masks also the masks of the target and of the
            prediction; None if the sample is not an image.
    """

    predictions: Predictions | MaskTable
    checkpoint: str
    thumbnail_of: Callable[[str], bytes | None]


def main(options: Options) -> Path:
    """Build and write the report; return its path."""
    if not options.runs:
        raise UserError("report.py needs a run directory, such as logs/baseline.")
    directories = find_runs(options.runs)
    output = find_output(options, directories)
    check_replaceable(output)  # before the work
    runs = read_histories(directories)
    report, sections = compare(runs, output) if len(runs) > 1 else describe(runs[0], options)
    write_report(output, report, plots_of(sections))
    print(f"report   {output}")
    return output


def find_output(options: Options, runs: list[Path]) -> Path:
    """Return the path of the report. Raises UserError if it would be in a directory that contains the project."""
    if options.output is not None:
        if options.output.suffix != ".html":
            raise UserError(f"--output {options.output} must end in .html.")
        return options.output
    directory = runs[0] if len(runs) == 1 else common_directory(runs)
    if ROOT.resolve().is_relative_to(directory.resolve()):
        raise UserError(
            f"the common directory of these runs is {directory}, which contains the project; give --output."
        )
    return directory / "report.html"


def describe(run: RunHistory, options: Options) -> tuple[str, list[Section]]:
    """Build the report of one run; also return its sections."""
    from train import Config  # imported here, because a comparison of runs does not need torch

    valid, problem = predict_valid_or_explain(run, options)
    test, test_problem = read_test_predictions(run)
    has_lost_epochs = not run.epochs and bool(run.metadata.get("best"))
    missing = "metrics.jsonl has no complete line of this run." if has_lost_epochs else ""
    notes = [note for note in (missing, problem, test_problem) if note]
    for note in notes:
        print(f"note     {note}")
    tables: dict[str, Predictions | MaskTable] = {}
    if valid is not None:
        tables[f"valid, by {valid.checkpoint}"] = valid.predictions
    tables |= test
    sections = [render_curves_section(run), render_scores_section(run, score_all(run, tables))]
    tiles: list[Tile] = []
    if valid is not None:
        tiles, sections_of_predictions = render_predictions(valid)
        sections += sections_of_predictions
    defaults = to_json(Config())
    defaults.pop("resume")  # config.json does not have it
    sections.append(render_time_section(run))
    sections.append(render_options_section({"this run": run.config, "default": defaults}))
    sections.append(render_metadata_section(run))
    lead = [tag("p", note, class_="note") for note in notes]
    lead.append(render_tiles(run, tiles))
    return make_report(run.name, run.summary(), lead, sections, footer_text()), sections


def render_predictions(valid: ValidPredictions) -> tuple[list[Tile], list[Section]]:
    """Build the key numbers and the sections that need predictions of the valid split."""
    predictions = valid.predictions
    if isinstance(predictions, MaskTable):
        return make_mask_tiles(predictions), render_mask_sections(predictions, valid.thumbnail_of)
    if predictions.kind == "labels":
        threshold = choose_threshold(predictions, predictions.threshold)
        sections = render_label_sections(predictions, threshold, valid.thumbnail_of)
        return make_label_tiles(predictions, threshold), sections
    if predictions.kind == "numbers":
        return make_number_tiles(predictions), render_number_sections(predictions, valid.thumbnail_of)
    return make_class_tiles(predictions), render_class_sections(predictions, valid.thumbnail_of)


def compare(runs: list[RunHistory], output: Path) -> tuple[str, list[Section]]:
    """Build the report that compares several runs; also return its sections."""
    sections = [
        render_runs_section(runs, output.parent),
        render_curves_comparison(runs),
        render_options_section({run.name: run.config for run in runs}),
    ]
    names = ", ".join(run.name for run in runs)
    return make_report(f"{len(runs)} runs", names, [], sections, footer_text()), sections


def footer_text() -> str:
    """Return which script built the report, and when."""
    return f"Generated by tools/report.py on {datetime.now(UTC):%Y-%m-%d at %H:%M} UTC."


def predict_valid_or_explain(run: RunHistory, options: Options) -> tuple[ValidPredictions | None, str]:
    """Predict the valid split, or explain why this is not possible: the other sections are built in any case.

    Raises:
        UserError: If a checkpoint that --checkpoint selects cannot be used.
    """
    try:
        return predict_valid(run.directory, options), ""
    except UserError as error:
        if options.checkpoint != "best":
            raise
        reason = str(error)
    except Exception as error:  # noqa: BLE001 (such as another kind of task, or a device without free memory)
        reason = f"{type(error).__name__}: {error}"
    return None, f"The sections on predictions are omitted: {reason}"


def predict_valid(directory: Path, options: Options) -> ValidPredictions:
    """Predict the valid split of a run.

    Raises:
        UserError: If there is no checkpoint, the data differ, or the targets are not known.
    """
    from batteries.data.image_grid import thumbnail
    from batteries.evaluation.inference import InferenceOptions, predict_run, run_config
    from batteries.evaluation.run_selection import find_checkpoint
    from batteries.training.setup import setup_training
    from experiment.dataset import load_dataset
    from experiment.task import PREDICTIONS
    from train import Config

    inference = InferenceOptions(
        checkpoint=options.checkpoint,
        split="valid",
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    config = run_config(directory, Config, options.device, options.data_dir)
    stages = [stage.name for stage in config.stages]
    path = find_checkpoint(directory, stages, None, options.checkpoint, minimize=config.minimize_metric)
    checkpoint = f"{path.parent.name}/{path.name}"
    with contextlib.redirect_stdout(io.StringIO()), setup_training(config) as device:
        samples: Any = load_dataset(config.data_dir)
        if PREDICTIONS == "mask":
            masks, panels = predict_valid_masks(directory, config, samples, device, inference)
            return ValidPredictions(masks, checkpoint, panels.get)
        predictions = predict_run(directory, config, samples, device, make_experiment(), inference)["valid"]
    check_targets(predictions)
    index_of = {str(name): index for index, name in enumerate(samples.ids)}

    def thumbnail_of(name: str) -> bytes | None:
        return thumbnail(samples[index_of[name]][0])

    return ValidPredictions(predictions, checkpoint, thumbnail_of)


def make_experiment() -> Any:
    """Collect what inference reads of experiment/."""
    from batteries.evaluation.inference import Experiment
    from experiment import augmentations, model, splits, task

    return Experiment(
        make_folds=splits.make_folds,
        build_model=model.build_model,
        task=task,
        normalize=augmentations.normalize,
        valid_transform=augmentations.valid_transform,
        channels=len(augmentations.MEAN),
    )


def predict_valid_masks(
    directory: Path, config: Any, samples: Any, device: Any, options: Any
) -> tuple[MaskTable, dict[str, bytes]]:
    """Predict the masks of the valid split.

    Returns:
        The table, without files of masks, and for the worst images by id a PNG file: image, target and prediction.
    """
    from batteries.data.image_grid import mask_panels
    from batteries.evaluation.inference import load_model, load_split
    from batteries.evaluation.mask_inference import MaskJob, MaskOptions, Member, write_masks

    experiment = make_experiment()
    split = load_split(samples, config, experiment.make_folds)
    loaded = load_model(directory, config, samples, split, device, experiment, options)
    member = Member(loaded.model, experiment.valid_transform(loaded.image_size), config.precision)
    size = options.batch_size or config.valid_batch_size
    mask_options = MaskOptions(batch_size=size, num_workers=options.num_workers)
    jobs = [MaskJob([member], split.valid)]
    index_of = {str(name): index for index, name in enumerate(samples.ids)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "valid.csv"
        table = write_masks(path, jobs, samples, samples.classes, device, experiment, mask_options)
        panels = {}
        for row in worst_masks(table).tolist():
            image, target = samples[index_of[table.ids[row]]]
            panels[table.ids[row]] = mask_panels(image, target, read_mask(path.parent / table.masks[row]))
    return table, panels


def read_test_predictions(run: RunHistory) -> tuple[Mapping[str, Predictions | MaskTable], str]:
    """Read predictions/test.csv of a run.

    Returns:
        The predictions by their name in the report; empty if the file does not exist, has no targets or is invalid.
        What is wrong with the file; empty if nothing is.
    """
    path = run.directory / "predictions/test.csv"
    if not path.is_file():
        return {}, ""
    try:
        table = read_mask_table(path) if is_mask_table(path) else read_predictions(path)
    except UserError as error:
        return {}, str(error)
    is_known = table.counts is not None if isinstance(table, MaskTable) else table.targets is not None
    return {"test, from predictions/test.csv": table} if is_known else {}, ""


def score_all(run: RunHistory, tables: Mapping[str, Predictions | MaskTable]) -> dict[str, dict[str, float]]:
    """Compute accuracy, log loss and the scores of the run's options for each table."""
    from experiment.task import SCORES

    functions = select_scores(SCORES, (run.main_metric, *run.config.get("scores", ())))
    return {
        name: table.scores() if isinstance(table, MaskTable) else score(table, functions)
        for name, table in tables.items()
    }


if __name__ == "__main__":
    run_command(main, Options, repeats=False)

"""The sections and key numbers of predictions of numbers."""

import math

import numpy as np

from batteries.core.text import list_first
from batteries.evaluation.number_analysis import (
    bin_by_size,
    score_numbers,
    standardized_errors,
    worst_predicted_samples,
)
from batteries.evaluation.predictions import Predictions
from batteries.report.html import Html, Section, Tile, make_table, tag
from batteries.report.plots import Plot
from batteries.report.prediction_plots import draw_errors_by_size, draw_predicted_numbers, draw_residuals
from batteries.report.sample_list import MAX_SAMPLES, SampleText, ThumbnailOf, render_sample_list
from batteries.report.sections import format_number

MAX_TARGETS = 6  # targets with plots
MAX_NAMED = 3  # other targets listed below a sample


def make_number_tiles(predictions: Predictions) -> list[Tile]:
    """Return the key numbers of the predictions of the valid split."""
    scores = [score.r2 for score in score_numbers(predictions) if math.isfinite(score.r2)]
    if not scores:
        return []
    mean = "mean over the targets, " if len(predictions.classes) > 1 else ""
    return [Tile("R2", format_number(float(np.mean(scores))), f"{mean}on valid; 1 is perfect")]


def render_number_sections(predictions: Predictions, thumbnail_of: ThumbnailOf) -> list[Section]:
    """Build all sections of predictions of numbers.

    Args:
        predictions: The predictions, with targets.
        thumbnail_of: Returns the image of an id as a PNG file; None if the sample is not an image.
    """
    return [render_numbers_section(predictions), render_number_samples_section(predictions, thumbnail_of)]


def render_numbers_section(predictions: Predictions) -> Section:
    """Build the section with the scores and plots of each target."""
    scores = score_numbers(predictions)
    several = len(scores) > 1
    content: list[Html | Plot] = [
        tag("h3", "Scores of each target, lowest R2 first" if several else "Scores"),
        _render_number_table(predictions),
    ]
    if len(scores) > MAX_TARGETS:
        text = f"Plots of the {MAX_TARGETS} of {len(scores):,} targets with the lowest R2:"
        content.append(tag("p", text))
    for index, score in enumerate(scores[:MAX_TARGETS]):
        if several:
            content.append(tag("h3", score.name))
        content += _draw_target(predictions, index, score.name)
    return Section("Numbers", content)


def _render_number_table(predictions: Predictions) -> Html:
    rows = [
        [
            score.name,
            f"{score.mae:.4g}",
            f"{score.rmse:.4g}",
            format_number(score.r2),
            f"{score.median_absolute_error:.4g}",
            f"{score.bias:+.4g}",
        ]
        for score in score_numbers(predictions)
    ]
    header = ["target", "MAE", "RMSE", "R2", "median absolute error", "bias (prediction minus target)"]
    return make_table(header, rows)


def _draw_target(predictions: Predictions, index: int, name: str) -> list[Plot]:
    """Draw predictions, errors, and errors by size of one target."""
    assert predictions.targets is not None
    column = predictions.classes.index(name)
    values = predictions.values[:, column]
    targets = predictions.targets[:, column]
    return [
        draw_predicted_numbers(index, name, values, targets),
        draw_errors_by_size(index, name, bin_by_size(values, targets)),
        draw_residuals(index, name, values - targets),
    ]


def render_number_samples_section(predictions: Predictions, thumbnail_of: ThumbnailOf) -> Section:
    """Build the section with the samples of the largest standardised absolute errors.

    Args:
        predictions: The predictions, with targets.
        thumbnail_of: Returns the image of an id as a PNG file; None if the sample is not an image.
    """
    errors = standardized_errors(predictions)
    samples = render_sample_list(
        predictions.ids,
        worst_predicted_samples(predictions, MAX_SAMPLES),
        thumbnail_of,
        lambda row: _describe_sample(predictions, errors, row),
    )
    title = "Worst samples: largest absolute error, in standard deviations of the target"
    return Section("Samples", [tag("h3", title), samples])


def _describe_sample(predictions: Predictions, errors: np.ndarray, row: int) -> SampleText:
    """Describe the target with the largest error of a sample, and the others.

    Args:
        predictions: The predictions, with targets.
        errors: The standardised errors, shape (N, C).
        row: The row of the sample.
    """
    assert predictions.targets is not None
    worst = int(np.abs(errors[row]).argmax())
    error = predictions.values[row, worst] - predictions.targets[row, worst]
    details = [f"error {error:+.4g}, {abs(errors[row, worst]):.2f} standard deviations"]
    others = [column for column in range(len(predictions.classes)) if column != worst]
    if others:
        details.append(list_first((_describe_number(predictions, row, column) for column in others), MAX_NAMED))
    return SampleText(_describe_number(predictions, row, worst), details)


def _describe_number(predictions: Predictions, row: int, column: int) -> str:
    assert predictions.targets is not None
    target = f"{predictions.targets[row, column]:.4g}"
    return f"{predictions.classes[column]} {target} predicted as {predictions.values[row, column]:.4g}"

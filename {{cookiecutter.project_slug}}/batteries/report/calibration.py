"""Calibration of probabilities: a key number and a section."""

from collections.abc import Sequence
from typing import NamedTuple

from batteries.evaluation.error_analysis import ConfidenceBin, expected_calibration_error
from batteries.report.html import Aside, Section, Tile, make_table, tag
from batteries.report.prediction_plots import draw_reliability
from batteries.report.sections import format_number


class CalibrationNames(NamedTuple):
    """What the bins of a reliability diagram count and compare.

    Attributes:
        rule: What is true if a model is calibrated.
        unit: What a bin counts, such as samples.
        axis: The label of the axis of probabilities.
        probability: What the probability is called.
        outcome: What a bin has a fraction of.
    """

    rule: str
    unit: str
    axis: str
    probability: str
    outcome: str


OF_CLASSES = CalibrationNames(
    rule="90% of the predictions with probability 0.9 are correct",
    unit="samples",
    axis="confidence (largest probability)",
    probability="confidence",
    outcome="accuracy",
)
OF_LABELS = CalibrationNames(
    rule="90% of the labels with probability 0.9 are present",
    unit="decisions",
    axis="probability of a label",
    probability="probability",
    outcome="frequency",
)


def make_calibration_tile(bins: Sequence[ConfidenceBin]) -> Tile:
    """Return the expected calibration error as a key number."""
    return Tile("calibration error", format_number(expected_calibration_error(bins)), "on valid; 0 is perfect")


def render_calibration_section(bins: Sequence[ConfidenceBin], names: CalibrationNames, explanation: str) -> Section:
    """Build the section that compares probabilities with outcomes.

    Args:
        bins: The decisions by probability.
        names: What they are called.
        explanation: What the error is a mean over.
    """
    error = expected_calibration_error(bins)
    text = (
        f"If a model is calibrated, {names.rule}. The expected calibration error is {error:.4f}: the mean gap between "
        f"{names.probability} and {names.outcome}, over bins of equal width and {explanation}."
    )
    rows = [
        [
            f"{group.low:.2f} to {group.high:.2f}",
            f"{group.samples:,}",
            f"{group.confidence:.4f}",
            f"{group.accuracy:.4f}",
        ]
        for group in bins
    ]
    table = make_table([names.probability, names.unit, f"mean {names.probability}", names.outcome], rows)
    plot = draw_reliability(bins, error, names.unit, names.axis, names.probability, names.outcome)
    return Section("Calibration", [plot, Aside(tag("div", tag("p", text), table))])

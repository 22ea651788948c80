"""The report of several labels per sample and of numbers: its analysis, sections and plots."""

import itertools
import json
import math
from dataclasses import replace

import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
import pytest
from sklearn import metrics
from test_report import HOSTILE, Report

from batteries.evaluation import label_analysis, number_analysis
from batteries.evaluation.error_analysis import expected_calibration_error
from batteries.evaluation.label_analysis import Threshold, choose_threshold, stored_threshold
from batteries.evaluation.predictions import Predictions
from batteries.metrics.labels import THRESHOLDS
from batteries.report import label_sections, number_sections, plots
from batteries.report.history import read_histories
from batteries.report.html import Section, make_report, plots_of, png_size
from tools.report import ValidPredictions, render_predictions

assert matplotlib.backends.backend_agg, "imported before the first plot, which would be slow otherwise"


@pytest.fixture(autouse=True)
def small_plots(monkeypatch):
    """Draw plots of few pixels."""
    monkeypatch.setattr(plots, "DPI", 20)


def label_predictions(size: int = 60, names: tuple[str, ...] = ("cat", "dog", "owl", "emu")) -> Predictions:
    """Return probabilities that are right more often than not, of labels from frequent to rare."""
    generator = np.random.default_rng(2)
    targets = (generator.random((size, len(names))) < np.linspace(0.6, 0.2, len(names))).astype(np.int64)
    values = np.clip(0.4 * targets + 0.6 * generator.random(targets.shape), 0, 1).round(2)  # with equal values
    return Predictions("x", tuple(f"row {row}" for row in range(size)), names, values, targets, "labels")


def number_predictions(size: int = 60, names: tuple[str, ...] = ("width", "mass")) -> Predictions:
    """Return numbers of different scales with an error of about a tenth of their deviation, and a bias."""
    generator = np.random.default_rng(3)
    scale = 10.0 ** np.arange(len(names))
    targets = (generator.normal(size=(size, len(names))) * scale).round(1)
    values = targets + (0.1 * generator.normal(size=targets.shape) + 0.05) * scale
    return Predictions("x", tuple(f"row {row}" for row in range(size)), names, values, targets, "numbers")


def render(*shown: Section) -> Report:
    return Report(make_report("x", "x", [], shown, "x"))


def items(made: Report) -> list[list[str]]:
    """Return the lines of text of each sample in a list."""
    return [[str(line.text) for line in element if line.tag != "img"] for element in made.root.iter("li")]


# Labels


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.99])
def test_scores_of_labels_equal_scikit_learn_with_the_lowest_f1_first(threshold):
    table = label_predictions()
    predicted = table.values >= threshold
    precision, recall, f1, samples = metrics.precision_recall_fscore_support(table.targets, predicted, zero_division=0)
    found = label_analysis.score_labels(table, threshold)
    assert [score.f1 for score in found] == sorted(score.f1 for score in found)
    assert sorted(score.name for score in found) == sorted(table.classes)
    for score in found:
        index = table.classes.index(score.name)
        average_precision = metrics.average_precision_score(table.targets[:, index], table.values[:, index])
        roc_auc = metrics.roc_auc_score(table.targets[:, index], table.values[:, index])
        wanted = samples[index], average_precision, roc_auc, precision[index], recall[index], f1[index]
        np.testing.assert_allclose(score[1:], wanted, rtol=1e-12)


def test_a_label_without_samples_has_no_average_precision_and_no_curve():
    table = label_predictions()
    table.targets[:, 1] = 0
    [dog] = [score for score in label_analysis.score_labels(table, 0.5) if score.name == "dog"]
    assert (dog.samples, dog.recall, dog.f1) == (0, 0, 0)
    assert math.isnan(dog.average_precision)
    assert math.isnan(dog.roc_auc)
    curves = label_analysis.precision_recall_curves(table, 0.5, 10)
    assert {curve.score.name for curve in curves} == {"cat", "owl", "emu"}
    made = render(*label_sections.render_label_sections(table, Threshold(0.5, True), lambda _: None))
    [row] = [row for row in made.table("Labels", 1) if row[0] == "dog"]
    assert row[1:4] == ["0", "–", "–"]
    table.targets[:] = 0
    made = render(label_sections.render_labels_section(table, Threshold(0.5, True)))
    assert list(made.root.iter("img")) == []


def test_the_curves_are_those_of_the_labels_with_the_lowest_average_precision():
    table = label_predictions(names=tuple(f"label {number}" for number in range(14)))
    scores = {
        name: metrics.average_precision_score(table.targets[:, index], table.values[:, index])
        for index, name in enumerate(table.classes)
    }
    curves = label_analysis.precision_recall_curves(table, 0.5, 10)
    assert [curve.score.name for curve in curves] == sorted(scores, key=lambda name: scores[name])[:10]
    for score, precisions, recalls in curves:
        area = sum(
            (recalls[step] - recalls[step + 1]) * precisions[step] for step in range(len(recalls) - 1)
        )  # of the steps of the plot
        assert area == pytest.approx(scores[score.name])
    section = label_sections.render_labels_section(table, Threshold(0.5, True))
    [plot] = plots_of([section])
    assert plot.alt.startswith("The 10 of 14 labels with the lowest average precision")


def test_a_plot_of_curves_has_a_dot_at_the_threshold(monkeypatch):
    table = label_predictions()
    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda _, x, y, *style, **__: drawn.append((x, y, style)))
    label_sections.draw_precision_recall(label_analysis.precision_recall_curves(table, 0.4, 10), "x")
    dots = {(round(x, 9), round(y, 9)) for x, y, style in drawn if style == ("o",)}
    predicted = table.values >= 0.4
    precision, recall, _, _ = metrics.precision_recall_fscore_support(table.targets, predicted)
    assert dots == {(round(x, 9), round(y, 9)) for x, y in zip(recall, precision, strict=True)}


def test_the_threshold_of_the_scored_weights_is_used_or_else_the_best_one():
    table = label_predictions()
    assert stored_threshold({"train": {}, "valid": {"threshold": 0.3}}) == 0.3
    assert stored_threshold({"valid": {"threshold": 0.3}, "valid_ema": {"threshold": 0.4}}) == 0.4
    for metrics_by_split in ({}, {"valid": {"loss": 1.0}}, {"valid": {"threshold": math.nan}}):
        assert stored_threshold(metrics_by_split) is None
    assert choose_threshold(table, 0.3) == (0.3, True)
    best = choose_threshold(table, None)
    scores = {
        threshold: metrics.f1_score(table.targets, table.values >= threshold, average="macro", zero_division=0)
        for threshold in THRESHOLDS
    }
    assert scores[best.value] == max(scores.values())
    assert not best.is_stored


def test_calibration_of_labels_covers_all_decisions():
    table = label_predictions()
    decisions = list(zip(table.values.ravel(), table.targets.ravel(), strict=True))
    rows = []
    error = 0.0
    for low, high in itertools.pairwise(np.linspace(0, 1, 16)):
        inside = [pair for pair in decisions if low < pair[0] <= high or (low == 0 == pair[0])]
        if inside:
            probability = sum(pair[0] for pair in inside) / len(inside)
            present = sum(pair[1] for pair in inside) / len(inside)
            rows.append([f"{low:.2f} to {high:.2f}", str(len(inside)), f"{probability:.4f}", f"{present:.4f}"])
            error += abs(probability - present) * len(inside) / len(decisions)
    assert expected_calibration_error(label_analysis.bin_decisions(table)) == pytest.approx(error)
    valid = ValidPredictions(replace(table, threshold=0.4), "one/best.pth", lambda _: None)
    tiles, shown = render_predictions(valid)
    assert render(*shown).table("Calibration") == rows
    assert {tile.name: tile.number for tile in tiles} == {"calibration error": f"{error:.4f}", "threshold": "0.40"}


def test_the_worst_samples_have_the_largest_cross_entropy_with_present_predicted_and_missed_labels():
    table = label_predictions()
    losses = []
    for values, targets in zip(table.values.tolist(), table.targets.tolist(), strict=True):
        terms = [math.log(max(p if y else 1 - p, 1e-15)) for p, y in zip(values, targets, strict=True)]
        losses.append(-sum(terms) / len(terms))
    worst = label_analysis.worst_labelled_samples(table, 12).tolist()
    assert worst == sorted(range(len(losses)), key=lambda row: -losses[row])[:12]
    shown = items(render(label_sections.render_label_samples_section(table, Threshold(0.5, True), lambda _: None)))
    assert [lines[-1] for lines in shown] == [f"row {row}" for row in worst]
    for lines, row in zip(shown, worst, strict=True):
        named = dict(zip(table.classes, zip(table.values[row], table.targets[row], strict=True), strict=True))
        assert lines[0] == (", ".join(name for name, (_, present) in named.items() if present) or "no label")
        for name, (value, present) in named.items():
            text = f"{name} ({value:.3f})"
            assert (text in lines[1]) == (value >= 0.5)
            assert (text in "".join(lines[2:-1])) == (present == 1 and value < 0.5)


def test_f1_at_the_threshold_and_the_scores_are_in_the_section_of_labels():
    table = label_predictions()
    made = render(label_sections.render_labels_section(table, Threshold(0.4, False)))
    predicted = table.values >= 0.4
    wanted = [f"{metrics.f1_score(table.targets, predicted, average=name):.4f}" for name in ("macro", "micro")]
    assert [row[1] for row in made.table("Labels")] == wanted
    assert "0.40 or more: the threshold with the highest macro F1 on these predictions" in made.text
    assert [row[0] for row in made.table("Labels", 1)] == [
        score.name for score in label_analysis.score_labels(table, 0.4)
    ]


# Numbers


def test_scores_of_numbers_equal_scikit_learn_with_the_lowest_r2_first():
    table = number_predictions(names=("width", "mass", "age"))
    table.values[:, 2] += 70
    found = number_analysis.score_numbers(table)
    assert found[0].name == "age"
    for score in found:
        index = table.classes.index(score.name)
        pair = table.targets[:, index], table.values[:, index]
        wanted = (
            metrics.mean_absolute_error(*pair),
            metrics.root_mean_squared_error(*pair),
            metrics.r2_score(*pair),
            metrics.median_absolute_error(*pair),
            sum(value - target for target, value in zip(*pair, strict=True)) / len(table.ids),
        )
        np.testing.assert_allclose(score[1:], wanted, rtol=1e-9)
    [row, *_] = render(number_sections.render_numbers_section(table)).table("Numbers")
    assert row == ["age", *[f"{value:.4g}" for value in found[0][1:3]], *row[3:]]
    assert row[3:] == [f"{found[0].r2:.4f}", f"{found[0].median_absolute_error:.4g}", f"{found[0].bias:+.4g}"]


def test_a_constant_target_has_no_r2_and_a_report():
    table = number_predictions()
    table.targets[:, 0] = 5
    assert [(score.name, math.isnan(score.r2)) for score in number_analysis.score_numbers(table)] == [
        ("mass", False),
        ("width", True),
    ]
    tiles, shown = render_predictions(ValidPredictions(table, "x", lambda _: None))
    r2 = metrics.r2_score(table.targets[:, 1], table.values[:, 1])
    assert [(tile.name, tile.number) for tile in tiles] == [("R2", f"{r2:.4f}")]
    assert render(*shown).titles() == ["Numbers", "Samples"]
    table.targets[:] = 5
    assert render_predictions(ValidPredictions(table, "x", lambda _: None))[0] == []


@pytest.mark.parametrize("targets", ["different", "equal", "few"])
def test_errors_by_size_are_means_over_deciles(targets):
    table = number_predictions(size=230, names=("width",))
    columns = {"different": table.values, "equal": np.round(table.targets), "few": table.targets[:4]}
    sizes = columns[targets][:, 0]
    values = table.values[: len(sizes), 0]
    edges = [np.quantile(sizes, tenth / 10) for tenth in range(1, 10)]
    bins: dict[int, list[tuple[float, float]]] = {}
    for size, value in zip(sizes, values, strict=True):
        bins.setdefault(sum(size >= edge for edge in edges), []).append((size, abs(value - size)))
    wanted = [bins[number] for number in sorted(bins)]
    found = number_analysis.bin_by_size(values, sizes)
    assert [group.samples for group in found] == [len(group) for group in wanted]
    assert [(group.low, group.high) for group in found] == [(min(group)[0], max(group)[0]) for group in wanted]
    np.testing.assert_allclose(
        [group.mae for group in found], [np.mean([pair[1] for pair in group]) for group in wanted]
    )
    assert targets != "different" or {group.samples for group in found} == {23}


def test_a_bin_of_one_number_is_named_by_it(monkeypatch):
    named = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_xticks", lambda _, places, names, **__: named.extend(names))
    sizes = np.array([-0.0, 0.0, 2.0, 3.0, 1234.5])
    bins = [number_analysis.SizeBin(low, high, 1, 1.0) for low, high in itertools.pairwise(sizes.tolist())]
    number_sections.draw_errors_by_size(0, "x", bins)
    assert named == ["0", "0 to 2", "2 to 3", "3 to 1.23e+03"]


@pytest.mark.parametrize(("name", "is_wide"), [("cat", False), ("a cat on a mat", True)])
def test_a_plot_with_long_names_of_labels_has_the_full_width(name, is_wide):
    table = label_predictions(names=("dog", name))
    curves = label_analysis.precision_recall_curves(table, 0.5, 10)
    plot = label_sections.draw_precision_recall(curves, "x")
    assert (plot.is_wide, png_size(plot.png)[0] > 150) == (is_wide, is_wide)


def test_the_worst_samples_have_the_largest_error_in_deviations_of_a_target():
    table = number_predictions()
    table.values[7, 0] = table.targets[7, 0] + 3  # three deviations of width; the errors of mass are up to one of 10
    deviations = [np.std(column) for column in table.targets.T]
    sizes = [
        max(abs(value - target) / scale for value, target, scale in zip(*row, deviations, strict=True))
        for row in zip(table.values, table.targets, strict=True)
    ]
    worst = number_analysis.worst_predicted_samples(table, 12).tolist()
    assert worst == sorted(range(len(sizes)), key=lambda row: -sizes[row])[:12]
    shown = items(render(number_sections.render_number_samples_section(table, lambda _: None)))
    assert [lines[-1] for lines in shown] == [f"row {row}" for row in worst]
    values, targets = table.values[7], table.targets[7]
    assert shown[0] == [
        f"width {targets[0]:.4g} predicted as {values[0]:.4g}",
        f"error +3, {3 / deviations[0]:.2f} standard deviations",
        f"mass {targets[1]:.4g} predicted as {values[1]:.4g}",
        "row 7",
    ]


def test_many_targets_have_plots_of_those_with_the_lowest_r2():
    table = number_predictions(names=tuple(f"target {number}" for number in range(8)))
    section = number_sections.render_numbers_section(table)
    made = render(section)
    assert "Plots of the 6 of 8 targets with the lowest R2:" in made.text
    names = [score.name for score in number_analysis.score_numbers(table)]
    assert [row[0] for row in made.table("Numbers")] == names
    assert [element.text for element in made.section("Numbers").iter("h3")][1:] == names[:6]
    drawn = plots_of([section])
    assert len({plot.name for plot in drawn}) == len(drawn) == 18


@pytest.mark.parametrize("make", [label_predictions, number_predictions])
def test_names_from_outside_are_escaped_and_files_of_plots_have_valid_names(make):
    table = make(names=(*HOSTILE, "東京"))  # as a file name, it is the same as another name
    tiles, shown = render_predictions(ValidPredictions(table, "x", lambda _: None))
    made = render(*shown)
    assert "script" not in {element.tag for element in made.root.iter()}
    assert all(plot.name.replace("_", "").isalnum() and plot.name.isascii() for plot in plots_of(shown))
    assert len({plot.name for plot in plots_of(shown)}) == len(plots_of(shown))
    assert len(tiles) == (2 if make is label_predictions else 1)


def test_one_sample_has_a_report():
    for make in (label_predictions, number_predictions):
        _, shown = render_predictions(ValidPredictions(make(size=1), "x", lambda _: None))
        assert len(items(render(*shown))) == 1


@pytest.mark.parametrize(("classes", "shown"), [(8, True), (9, False)])
def test_metrics_of_many_classes_are_not_shown_one_by_one(tmp_path, classes, shown):
    ious = {f"iou/{number}": 0.5 for number in range(classes)}
    line = {"stage": "one", "epoch": 1, "step": 1, "valid": {"mean_iou": 0.5, **ious}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"main_metric": "mean_iou"}))
    (tmp_path / "run.json").write_text("{}")
    [run] = read_histories([tmp_path])
    assert ("iou/3" in run.metrics) == shown
    assert run.metrics[0] == "mean_iou"

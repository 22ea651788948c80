"""Tests of the HTML report and tools/report.py."""

import base64
import csv
import dataclasses
import itertools
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
import pytest
import torch
from marks import CLASSES_ONLY
from models import tiny_network
from processes import End, run_ranks, run_train
from sklearn.metrics import f1_score, precision_recall_fscore_support
from small_data import make_data
from tables import assert_rejected, call_tool, random_predictions

import experiment.dataset
import experiment.model
import train
from batteries.core.config_io import flatten
from batteries.core.errors import UserError
from batteries.data.image_decoding import decode_file
from batteries.data.image_grid import thumbnail, to_rgb
from batteries.evaluation import error_analysis
from batteries.evaluation.predictions import Predictions, read_predictions
from batteries.evaluation.run_selection import read_config
from batteries.report import calibration, class_sections, plots, sections
from batteries.report.history import RunHistory, StageSpan, find_runs, read_history
from batteries.report.html import make_report, make_table, plots_of, png_size, tag, write_report
from batteries.report.plots import Plot
from tools import predict, report
from train import Config, Stage

assert matplotlib.figure, "imported before the processes are forked"
assert matplotlib.backends.backend_agg
HOSTILE = ("<script>'a'</script>", '"><img src=x onerror="alert(1)">', "&amp; $\\alpha$", "_a\x1b[31m\x00b", "日本")


@pytest.fixture(scope="module", autouse=True)
def fast_runs():
    """Use a small network, and plots of few pixels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, predict, experiment.model):
            patch.setattr(module, "build_model", tiny_network)
        patch.setattr(plots, "DPI", 20)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, fast_runs) -> list[Path]:
    """Two runs: one of two stages, and one with averaged weights, other options and more scores."""
    directory = tmp_path_factory.mktemp("runs")
    first = Config(
        stages=(Stage("one", 3, 3e-3), Stage("two", 2, 1e-3)),
        logdir=directory / "first",
        data_dir=make_data(tmp_path_factory.mktemp("data")),
        split_file=directory / "splits.csv",
        tracker=("none",),
        device="cpu",
    )
    second = dataclasses.replace(
        first,
        logdir=directory / "second",
        stages=(Stage("one", 2, 1e-2),),
        ema_decay=0.9,
        seed=3,
        scores=("macro_f1",),
    )
    for config in (first, second):
        run_ranks(1, lambda config=config: train.main(config), join=False)
    return [first.logdir, second.logdir]


def call_report(*flags: object) -> End:
    return run_train(
        report.main, report.Options, "--device", "cpu", *map(str, flags), name="tools/report.py", repeats=False
    )


@pytest.fixture(scope="module")
def first_report(runs) -> "Report":
    end = call_report(runs[0])
    assert (end.code, end.err) == (0, ""), end
    assert end.out == f"report   {runs[0]}/report.html\n"
    return Report((runs[0] / "report.html").read_text())


@pytest.fixture(scope="module")
def predictions(runs, tmp_path_factory) -> Predictions:
    """The predictions of tools/predict.py for the valid split."""
    output = tmp_path_factory.mktemp("predictions")
    options = predict.Options(run=(runs[0],), split="valid", output=output, device="cpu")
    run_ranks(1, lambda: predict.main(options), join=False)
    return read_predictions(output / "valid.csv")


class Report:
    """A report parsed as XML, which fails if it is not well-formed."""

    def __init__(self, text: str) -> None:
        start, _, self.text = text.partition("\n")
        assert start == "<!doctype html>"
        self.root = ElementTree.fromstring(self.text)

    def section(self, title: str) -> ElementTree.Element:
        [found] = [element for element in self.root.iter("section") if element.findtext("h2") == title]
        return found

    def titles(self) -> list[str]:
        return [str(element.findtext("h2")) for element in self.root.iter("section")]

    def table(self, title: str, number: int = 0) -> list[list[str]]:
        """Return the rows of a table in a section, without the header."""
        found = list(self.section(title).iter("tbody"))[number]
        return [["".join(cell.itertext()) for cell in row] for row in found]

    def highlighted(self) -> set[str]:
        """Return the first cell of each highlighted row."""
        return {"".join(row[0].itertext()) for row in self.root.iter("tr") if row.get("class") == "differs"}

    def notes(self) -> list[str]:
        return ["".join(element.itertext()) for element in self.root.iter("p") if element.get("class") == "note"]

    def tiles(self) -> dict[str, str]:
        [tiles] = [element for element in self.root.iter("div") if element.get("class") == "tiles"]
        return {str(tile.findtext("span")): str(tile.findtext("b")) for tile in tiles}


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@CLASSES_ONLY
def test_the_best_epoch_has_the_numbers_of_metrics_jsonl(runs, first_report):
    lines = lines_of(runs[0])
    wanted = []
    for stage in ("one", "two"):
        best = None
        for line in lines:
            if line["stage"] == stage and (best is None or line["valid"]["accuracy"] > best["valid"]["accuracy"]):
                best = line
        for split in ("train", "valid"):
            numbers = (f"{best[split][name]:.4f}" for name in ("accuracy", "loss"))
            wanted.append([stage, split, str(best["epoch"]), *numbers])
    assert first_report.table("Scores") == wanted
    record = json.loads((runs[0] / "run.json").read_text())
    assert first_report.tiles()["best accuracy"] == f"{record['best']['score']:.4f}"
    assert f"valid, {record['best']['stage']} epoch {record['best']['epoch']}" in first_report.text


@CLASSES_ONLY
def test_curves_match_metrics_jsonl_with_the_best_epoch_marked(runs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(sections, "draw_curves", lambda name, *rest, **_: drawn.update({name: rest}))
    sections.render_curves_section(read_history(runs[1], "second"))
    lines = lines_of(runs[1])
    ranked = [line["valid_ema"]["accuracy"] for line in lines]
    for metric in ("accuracy", "loss"):
        _, _, curves, spans = drawn[f"curve_{metric}"]
        values = {curve.label: curve.values for curve in curves}
        assert values == {split: [line[split][metric] for line in lines] for split in ("train", "valid", "valid_ema")}
        assert {curve.label: curve.best for curve in curves if curve.best} == {
            "valid_ema": ranked.index(max(ranked)) + 1
        }
        assert spans == [StageSpan("one", 1, 2)]
    _, label, [rates], _ = drawn["learning_rate"]
    assert (label, rates.values) == ("highest of each epoch", [line["max_lr"] for line in lines])
    assert max(rates.values) > 5e-3 > 100 * lines[-1]["lr"]  # the maximum is 1e-2, and the last step has almost none
    assert [curve.label for curve in drawn["curve_macro_f1"][2]] == ["valid", "valid_ema"]


def test_learning_rates_of_a_run_of_an_earlier_version_are_those_of_the_last_steps(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(sections, "draw_curves", lambda name, *rest, **_: drawn.update({name: rest}))
    run = read_history(write_run(tmp_path, [{"accuracy": 0.5, "loss": 1.0}]), "x")
    for render in (lambda: sections.render_curves_section(run), lambda: sections.render_curves_comparison([run])):
        render()
        _, label, [rates], _ = drawn["learning_rate"]
        assert (label, rates.values) == ("at the end of each epoch", [0.1])


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        ([1.2e-8, 1.2e-9], 2),
        ([3e-3, 3e-4], 2),
        ([1e9, 5e9, 3e9], 3),
        ([0.99995, 0.999951, 0.999952, 0.999953] * 2, 8),
    ],
)
def test_texts_of_a_plot_of_curves_do_not_overlap(monkeypatch, values, stages):
    figure = matplotlib.figure.Figure(figsize=(plots.WIDTH, plots.HEIGHT), layout="constrained")
    monkeypatch.setattr(plots, "draw_plot", lambda name, alt, draw: draw(figure))
    spans = [StageSpan(f"a_long_name_{number}", number, number) for number in range(1, stages + 1)]
    with matplotlib.rc_context(plots.STYLE):
        plots.draw_curves("x", "learning rate", "highest of each epoch", [plots.Line("", values, "black")], spans)
    figure.draw_without_rendering()
    [axes] = figure.axes
    [title] = axes.findobj(lambda artist: getattr(artist, "get_text", str)() == "learning rate")
    texts = [title, axes.yaxis.get_offset_text(), *axes.texts]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) == 1 + stages
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_values_that_are_not_finite_are_gaps_and_never_best(tmp_path):
    lines = [(None, 1.0), (0.5, None), (0.5, 0.1), (0.4, 0.2)]
    write_run(tmp_path, [{"accuracy": accuracy, "loss": loss} for accuracy, loss in lines])
    run = read_history(tmp_path, "x")
    assert run.best_epoch() == 2  # the earlier one of a tie
    assert [math.isnan(value) for value in run.curve("valid", "accuracy")] == [True, False, False, False]
    (tmp_path / "config.json").write_text(json.dumps({"main_metric": "loss", "minimize_metric": True}))
    assert read_history(tmp_path, "x").best_epoch() == 3


def write_run(directory: Path, valid: list[dict], stages: tuple[str, ...] = ("one",), **options) -> Path:
    """Write the files of a run without checkpoints."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"main_metric": "accuracy", "minimize_metric": False, **options}))
    lines = [
        {"stage": stage, "epoch": epoch, "step": epoch, "lr": 0.1, "train": scores, "valid": scores}
        for stage in stages
        for epoch, scores in enumerate(valid, 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return directory


@CLASSES_ONLY
def test_scores_and_classes_match_the_predictions(first_report, predictions):
    predicted = predictions.values.argmax(1)
    targets = predictions.targets
    classes = predictions.classes
    [[name, accuracy, loss]] = first_report.table("Scores", 1)
    assert (name.endswith("/best.pth"), accuracy) == (True, f"{(predicted == targets).mean():.4f}")
    logs = [math.log(row[target]) for row, target in zip(predictions.values, targets, strict=True)]
    assert loss == f"{-sum(logs) / len(logs):.4f}"

    counts = Counter((classes[target], classes[index]) for target, index in zip(targets, predicted, strict=True))
    confused = sorted((count for (target, name), count in counts.items() if target != name), reverse=True)
    rows = first_report.table("Classes")
    assert [int(row[2]) for row in rows] == confused[:10]
    for target, prediction, count, fraction in rows:
        assert counts[target, prediction] == int(count)
        assert fraction == f"{counts[target, prediction] / (targets == classes.index(target)).sum():.1%}"

    precision, recall, f1, samples = precision_recall_fscore_support(
        targets, predicted, labels=range(len(classes)), zero_division=0
    )
    rows = first_report.table("Classes", 1)
    assert [float(row[5]) for row in rows] == sorted(float(row[5]) for row in rows)
    for name, confused_with, *numbers in rows:
        index = classes.index(name)
        scores = [f"{values[index]:.3f}" for values in (recall, precision, f1)]
        assert numbers == [str(int(samples[index])), *scores]
        others = {other: counts[name, other] for other in classes if other != name}
        most = max(others, key=others.__getitem__)
        assert confused_with == (f"{most} ({others[most]})" if others[most] else "")


@CLASSES_ONLY
def test_predictions_have_a_log_loss_and_epochs_the_loss_of_the_run(first_report):
    headers = [
        ["".join(cell.itertext()) for cell in table.iter("th")]
        for table in first_report.section("Scores").iter("thead")
    ]
    assert headers == [["stage", "split", "epoch", "accuracy", "loss"], ["", "accuracy", "log_loss"]]


def inaccurate_predictions(size: int, classes: int) -> Predictions:
    """Return predictions that are mostly wrong, and most often of the first classes."""
    generator = np.random.default_rng(1)
    values = generator.dirichlet(np.linspace(2, 1, classes), size)
    names = tuple(f"c{number}" for number in range(classes))
    return Predictions("x", tuple(map(str, range(size))), names, values, generator.integers(classes, size=size))


@pytest.mark.parametrize(("size", "classes"), [(12, 3), (500, 2), (2000, 40)])
def test_the_confusion_matrix_is_correct(size, classes):
    table = inaccurate_predictions(size, classes)
    counts = error_analysis.compute_confusion_matrix(table)
    by_hand = np.zeros((classes, classes), dtype=int)
    for row, target in zip(table.values, table.targets, strict=True):
        by_hand[target, list(row).index(max(row))] += 1
    assert np.array_equal(counts, by_hand)
    errors = [by_hand[name].sum() + by_hand[:, name].sum() - 2 * by_hand[name, name] for name in range(classes)]
    chosen = error_analysis.most_misclassified(counts, 5).tolist()
    assert chosen == sorted(chosen)
    assert sorted(errors[name] for name in chosen) == sorted(errors)[-5:]


def test_the_classes_with_the_most_errors_are_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(class_sections, "draw_confusion_matrix", lambda *given: drawn.append(given))
    table = inaccurate_predictions(2000, 1000)
    class_sections.render_classes_section(table)
    [(counts, samples, names, title)] = drawn
    assert title == "Confusion matrix of the 24 of 1,000 classes with the most errors"
    assert counts.shape == (24, 24)
    assert samples.tolist() == [np.sum(table.targets == table.classes.index(name)) for name in names]


@CLASSES_ONLY
def test_calibration_matches_a_slow_reference(first_report, predictions):
    edges = np.linspace(0, 1, 16)
    error = 0.0
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = [
            (max(row), list(row).index(max(row)) == target)
            for row, target in zip(predictions.values, predictions.targets, strict=True)
            if low < max(row) <= high
        ]
        if inside:
            confidence = sum(row[0] for row in inside) / len(inside)
            accuracy = sum(row[1] for row in inside) / len(inside)
            error += len(inside) / len(predictions.ids) * abs(confidence - accuracy)
            rows.append([f"{low:.2f} to {high:.2f}", str(len(inside)), f"{confidence:.4f}", f"{accuracy:.4f}"])
    assert first_report.table("Calibration") == rows
    assert first_report.tiles()["calibration error"] == f"{error:.4f}"


def test_bins_include_their_upper_edge():
    values = np.array([[1.0, 0.0], [0.6, 0.4], [0.6, 0.4]])
    bins = error_analysis.bin_by_confidence(Predictions("x", ("a", "b", "c"), ("u", "v"), values, np.array([0, 0, 1])))
    assert [(round(group.high, 4), group.samples, group.accuracy) for group in bins] == [(0.6, 2, 0.5), (1.0, 1, 1.0)]
    assert error_analysis.expected_calibration_error(bins) == pytest.approx(2 / 3 * 0.1)


@CLASSES_ONLY
def test_worst_errors_and_least_confident_samples_are_in_order(runs, first_report, predictions):
    classes = predictions.classes
    rows = list(zip(predictions.ids, predictions.values, predictions.targets, strict=True))
    wrong = sorted((row[target], number) for number, (_, row, target) in enumerate(rows) if row.argmax() != target)
    least_confident = sorted((max(row), number) for number, (_, row, _) in enumerate(rows))
    lists = list(first_report.section("Samples").iter("ul"))
    dataset = train.load_dataset(read_config(runs[0], Config).data_dir)
    for shown, chosen in zip(lists, (wrong, least_confident), strict=True):
        assert len(shown) == min(12, len(chosen))
        for item, (_, number) in zip(shown, chosen, strict=False):
            name, row, target = rows[number]
            predicted = row.argmax()
            label = f"{classes[target]}, correct"
            if predicted != target:
                label = f"{classes[target]} predicted as {classes[predicted]}"
            assert [item.findtext("small"), item.findtext("b")] == [name, label]
            assert f"{row[predicted]:.3f}" in str(item.findtext("span"))
            image = dataset[list(map(str, dataset.ids)).index(name)][0]
            assert torch.equal(decode(item.find("img")), to_rgb(image.float()).to(torch.uint8))


def decode(image: ElementTree.Element | None) -> torch.Tensor:
    """Decode the image of an <img> element, uint8 (3, H, W)."""
    assert image is not None
    data = base64.b64decode(str(image.get("src")).removeprefix("data:image/png;base64,"))
    decoded = decode_file(data, "RGB")
    assert (image.get("width"), image.get("height")) == (str(decoded.shape[2]), str(decoded.shape[1]))
    return decoded


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 600, 200), (5, 3, 700), (3, 192, 1)])
def test_a_thumbnail_is_small_and_keeps_the_aspect_ratio(shape):
    png = thumbnail(torch.randint(256, shape, dtype=torch.uint8))
    width, height = png_size(png)
    assert max(width, height) == min(192, max(shape[1:]))
    assert width / height == pytest.approx(shape[2] / shape[1], rel=0.2)
    assert thumbnail(torch.rand(7)) is None
    assert thumbnail("words") is None


def test_a_thumbnail_of_floats_is_scaled_to_their_range():
    image = torch.tensor([-2.0, 0.0, 2.0]).reshape(1, 1, 3)
    decoded = decode_file(thumbnail(image), "RGB")
    assert decoded[0, 0].tolist() == [0, 128, 255]


@CLASSES_ONLY
def test_the_report_is_self_contained_and_has_no_script(runs, first_report):
    tags = Counter(element.tag for element in first_report.root.iter())
    assert not {"script", "link", "iframe", "object", "base"} & set(tags)
    assert tags["img"] > 15
    for element in first_report.root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on"), value
            if name in ("src", "srcset", "data"):
                assert value.startswith("data:image/png;base64,"), value
            if name == "href":
                assert value.startswith("#"), value
    assert not re.search(r"url\(|@import|https?:", first_report.text)
    assert "default-src 'none'" in first_report.text.replace("&#x27;", "'")
    anchors = {element.get("id") for element in first_report.root.iter("section")}
    assert {element.get("href", "")[1:] for element in first_report.root.iter("a")} == anchors


@CLASSES_ONLY
def test_plots_are_also_written_as_files(runs, first_report):
    files = {path.name: path.read_bytes() for path in (runs[0] / "plots").iterdir()}
    names = ("confusion", "calibration", "curve_accuracy", "curve_loss", "learning_rate", "time", "throughput")
    assert set(files) == {f"{name}.png" for name in names}
    shown = [element.find("img") for element in first_report.root.iter("figure")]
    embedded = {base64.b64decode(str(image.get("src")).partition(",")[2]) for image in shown}
    assert embedded == set(files.values())
    assert all(image.get("alt") for image in shown)


@CLASSES_ONLY
def test_times_are_summed_over_epochs(runs, first_report):
    lines = [json.loads(line) for line in (runs[0] / "timings.jsonl").read_text().splitlines()]
    rows = first_report.table("Time")
    for stage, row in zip(("one", "two"), rows, strict=True):
        own_lines = [line for line in lines if line["stage"] == stage]
        seconds = sum(line["seconds"] for line in own_lines)
        waits = sum(line["data_wait_seconds"] for line in own_lines)
        assert row[:4] == [stage, str(len(own_lines)), f"{seconds:.1f} s", f"{waits / seconds:.1%}"]


@CLASSES_ONLY
def test_metadata_and_options_that_differ_from_the_default_are_shown(runs, first_report):
    record = dict(flatten(json.loads((runs[0] / "run.json").read_text())))
    rows = dict(first_report.table("Run metadata"))
    assert {name: rows[name] for name in record} == {name: text_of(value) for name, value in record.items()}
    config = dict(flatten(options_of(runs[0])))
    default = dict(flatten(to_plain(Config())))
    differing = {name for name in config | default if config.get(name, "absent") != default.get(name, "absent")}
    assert first_report.highlighted() == differing - {"logdir", "resume"}
    assert ["stages.0.epochs", "3", "6"] in first_report.table("Options")
    assert ["batch_size", "32", "32"] in first_report.table("Options", 1)


def to_plain(config: Config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def options_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def text_of(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(text_of, value)) or "–"
    return "–" if value is None else str(value)


@pytest.fixture(scope="module")
def side_by_side(runs) -> Report:
    end = call_tool(report, *runs)
    assert (end.code, end.err) == (0, ""), end
    return Report((runs[0].parent / "report.html").read_text())


def test_a_comparison_highlights_exactly_the_options_that_differ(runs, side_by_side):
    first, second = [dict(flatten(options_of(run))) for run in runs]
    wanted = {name for name in first | second if first.get(name, "absent") != second.get(name, "absent")} - {"logdir"}
    assert {"stages.0.lr", "stages.1.lr", "seed", "ema_decay", "scores"} <= wanted
    assert side_by_side.highlighted() == wanted
    assert ["stages.0.lr", "0.003", "0.01"] in side_by_side.table("Options")
    assert ["stages.1.lr", "0.001", "not set"] in side_by_side.table("Options")
    assert {row[0] for row in side_by_side.table("Options", 1)} == (first | second).keys() - wanted - {"logdir"}


@CLASSES_ONLY
def test_a_comparison_has_the_best_epochs_and_curves_of_all_runs(runs, side_by_side, monkeypatch):
    rows = {row[0]: row for row in side_by_side.table("Runs")}
    for run in runs:
        best = json.loads((run / "run.json").read_text())["best"]
        where = f"{best['stage']} epoch {best['epoch']}"
        assert rows[run.name][1:5] == ["finished", where, "accuracy", f"{best['score']:.4f}"]
    drawn = {}
    monkeypatch.setattr(sections, "draw_curves", lambda name, *rest, **_: drawn.update({name: rest[2]}))
    sections.render_curves_comparison([read_history(run, run.name) for run in runs])
    shown = {curve.label: curve.values for curve in drawn["valid_accuracy"]}
    splits = {"first": "valid", "second": "valid_ema"}  # that rank the epochs of each run
    assert shown == {run.name: [line[splits[run.name]]["accuracy"] for line in lines_of(run)] for run in runs}
    assert [curve.label for curve in drawn["valid_macro_f1"]] == ["second"]
    assert "train_macro_f1" not in drawn
    assert len({(curve.colour, curve.style) for curve in drawn["valid_loss"]}) == 2


@CLASSES_ONLY
def test_a_directory_of_runs_is_compared_with_links_to_their_reports(runs, first_report, side_by_side):
    assert find_runs([runs[0].parent]) == runs
    links = {element.text: element.get("href") for element in side_by_side.section("Runs").iter("a")}
    assert links == {"first": "first/report.html"}  # the other has none yet


def test_runs_that_differ_only_in_fold_or_seed_have_a_mean(tmp_path):
    scores = (0.5, 0.7, 0.9)
    for fold, score in enumerate(scores):
        write_run(tmp_path / f"fold_{fold}", [{"accuracy": score, "loss": 1.0}], fold=fold, logdir=str(fold))
    text = Report(compare(tmp_path)).section("Runs").findtext("p")
    assert text == (
        "These runs differ only in fold or seed: accuracy has mean 0.7000, standard deviation 0.2000 (n - 1)."
    )
    write_run(tmp_path / "fold_0", [{"accuracy": 0.5, "loss": 1.0}], batch_size=3)
    assert Report(compare(tmp_path)).section("Runs").find("p") is None


def compare(directory: Path) -> str:
    end = call_tool(report, directory)
    assert (end.code, end.err) == (0, ""), end
    return (directory / "report.html").read_text()


def test_text_from_outside_is_escaped():
    table = random_predictions(40, classes=HOSTILE)
    table = dataclasses.replace(table, ids=tuple(f"{HOSTILE[index % 5]} {index}" for index in range(40)))
    scores = {"loss": 1.0, "accuracy": 0.5, "</td>&": 0.25}
    epochs = [{"stage": HOSTILE[0], "epoch": 1, "lr": 0.1, "train": scores, "valid": scores}]
    record = {"exit": f"failed: {HOSTILE[1]}", "command": HOSTILE[0]}
    run = RunHistory(HOSTILE[1], Path("nowhere"), {"data_dir": HOSTILE[0]}, record, epochs, [])
    shown = [
        sections.render_curves_section(run),
        sections.render_scores_section(run, {HOSTILE[0]: scores}),
        class_sections.render_classes_section(table),
        class_sections.render_samples_section(table, lambda _: thumbnail(torch.zeros(1, 2, 2))),
        sections.render_metadata_section(run),
        sections.render_options_section({HOSTILE[0]: run.config, HOSTILE[1]: {}}),
    ]
    lead = [tag("p", HOSTILE[1], class_="note"), sections.render_tiles(run, class_sections.make_class_tiles(table))]
    made = Report(make_report(run.name, run.summary(), lead, shown, HOSTILE[0]))
    assert "script" not in {element.tag for element in made.root.iter()}
    assert all(str(element.get("src")).startswith("data:") for element in made.root.iter("img"))
    assert made.root.findtext(".//h1") == HOSTILE[1]
    assert made.notes() == [HOSTILE[1]]
    assert {row[0] for row in made.table("Classes", 1)} == {*HOSTILE[:3], "_a[31mb", HOSTILE[4]}
    ids = {re.sub(r"[\x00\x1b]", "", name) for name in table.ids}
    assert {str(element.findtext("small")) for element in made.root.iter("li")} <= ids
    assert dict(made.table("Run metadata"))["command"] == HOSTILE[0]
    assert made.table("Options") == [["data_dir", HOSTILE[0], "not set"]]
    names = {"curve_accuracy", "curve_loss", "curve___td__", "learning_rate", "confusion"}
    assert {plot.name for plot in plots_of(shown)} == names


@pytest.fixture(scope="module")
def any_plot(fast_runs) -> Plot:
    """A plot that replaces all others in tests of the text."""
    return plots.draw_curves("plot", "x", "y", [plots.Line("", [1.0, 2.0], "black")])


@pytest.fixture
def copied_run(runs, tmp_path, monkeypatch, any_plot) -> Path:
    """A copy of the first run that a test may change; its plots are not drawn again."""
    monkeypatch.setattr(sections, "draw_curves", lambda *_, **__: any_plot)
    monkeypatch.setattr(calibration, "draw_reliability", lambda *_: any_plot)
    monkeypatch.setattr(class_sections, "draw_confusion_matrix", lambda *_: any_plot._replace(name="confusion"))
    monkeypatch.setattr(sections, "draw_times", lambda *_: [any_plot])
    return shutil.copytree(runs[0], tmp_path / "copy", ignore=shutil.ignore_patterns("report.html", "plots"))


def test_a_run_interrupted_in_its_first_epoch_has_a_report(copied_run):
    for name in ("metrics.jsonl", "timings.jsonl", "run.json"):
        (copied_run / name).unlink()
    for directory in ("one", "two"):
        shutil.rmtree(copied_run / directory)
    end = call_report(copied_run)
    assert (end.code, end.err) == (0, ""), end
    made = Report((copied_run / "report.html").read_text())
    [note] = made.notes()
    prefix = "The sections on predictions are omitted: "
    assert note.startswith(f"{prefix}{copied_run} has no best.pth; ")
    assert f"note     {note}\n" in end.out
    assert "not ended: still running, or killed" in made.text
    assert "Curves appear after the first complete epoch." in made.text
    assert made.titles() == ["Curves", "Scores", "Time", "Options", "Run metadata"]
    assert not (copied_run / "plots").exists()


@CLASSES_ONLY
def test_an_interrupted_run_shows_its_complete_epochs(copied_run):
    lines = (copied_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied_run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    record = json.loads((copied_run / "run.json").read_text())
    del record["best"]
    (copied_run / "run.json").write_text(json.dumps(record | {"exit": "failed: no more space", "end": None}))
    shutil.rmtree(copied_run / "two")
    end = call_report(copied_run)
    assert (end.code, end.err) == (0, ""), end
    made = Report((copied_run / "report.html").read_text())
    assert "failed: no more space · started " in made.text
    assert {row[0] for row in made.table("Scores")} == {"one"}
    assert (made.tiles()["time"], made.notes()) == ("–", [])
    assert "Samples" in made.titles()


@CLASSES_ONLY
def test_a_missing_checkpoint_option_leaves_the_report_unchanged(copied_run):
    assert call_report(copied_run).code == 0
    before = (copied_run / "report.html").read_bytes()
    for name in ("nowhere.pth", "swa"):
        end = call_report(copied_run, "--checkpoint", name)
        assert (end.code, end.err.startswith("error: ")) == (2, True)
    assert (copied_run / "report.html").read_bytes() == before


@CLASSES_ONLY
def test_lost_metrics_of_a_finished_run_are_reported(copied_run):
    (copied_run / "metrics.jsonl").write_text('{"stage": "one", "epo')
    assert call_report(copied_run).code == 0
    assert "metrics.jsonl has no complete line of this run." in Report((copied_run / "report.html").read_text()).notes()


@CLASSES_ONLY
def test_a_run_without_a_finite_score_has_a_report(copied_run):
    text = (copied_run / "metrics.jsonl").read_text()
    (copied_run / "metrics.jsonl").write_text(re.sub(r'"(accuracy|loss)": [\d.e-]+', r'"\1": null', text))
    for directory in ("one", "two"):
        (copied_run / directory / "best.pth").unlink()
    end = call_report(copied_run)
    assert (end.code, end.err) == (0, ""), end
    made = Report((copied_run / "report.html").read_text())
    assert made.tiles()["best accuracy"] == "–"
    assert "No valid accuracy is finite." in made.text
    assert "use --checkpoint last" in made.notes()[0]
    assert call_report(copied_run, "--checkpoint", "last").code == 0
    made = Report((copied_run / "report.html").read_text())
    assert made.notes() == []
    assert made.table("Scores")[0][0].endswith("two/last.pth")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown", "the targets of these samples are not known."),
        ("nan", "the outputs of the model are not finite for 1 of 12 samples."),
        ("bug", "The sections on predictions are omitted: ZeroDivisionError: division by zero"),
    ],
)
def test_predictions_that_cannot_be_analysed_are_omitted_with_a_note(copied_run, monkeypatch, kind, message):
    table = random_predictions()
    values = table.values.copy()
    values[3, 1] = math.nan
    others = {
        "unknown": {"targets": None},
        "nan": {"values": values},
        "bug": {},
    }
    made = {"valid": dataclasses.replace(table, **others[kind])}
    monkeypatch.setattr("batteries.evaluation.inference.predict_run", lambda *_: 1 / 0 if kind == "bug" else made)
    end = call_report(copied_run)
    assert (end.code, end.err) == (0, ""), end
    shown = Report((copied_run / "report.html").read_text())
    assert message in shown.notes()[0]
    assert not {"Classes", "Calibration", "Samples"} & set(shown.titles())
    assert {"Curves", "Time", "Run metadata"} < set(shown.titles())


@pytest.mark.parametrize(("kind", "section"), [("labels", "Labels"), ("numbers", "Numbers")])
@pytest.mark.parametrize("stored", [None, 0.37])
def test_predictions_of_other_kinds_have_their_sections(copied_run, monkeypatch, kind, section, stored):
    table = random_predictions()
    targets = (table.values > 0.3).astype(np.int64) if kind == "labels" else table.values.round(1)
    made = {"valid": dataclasses.replace(table, targets=targets, kind=kind, threshold=stored)}
    monkeypatch.setattr("batteries.evaluation.inference.predict_run", lambda *_: made)
    monkeypatch.setattr(report, "predict_valid", without_thumbnails(report.predict_valid))
    end = call_report(copied_run)
    assert (end.code, end.err) == (0, ""), end
    shown = Report((copied_run / "report.html").read_text())
    assert (shown.notes(), section in shown.titles(), "Samples" in shown.titles()) == ([], True, True)
    assert ("Classes" in shown.titles(), "Calibration" in shown.titles()) == (False, kind == "labels")
    assert ("calibration error" in shown.tiles()) == ("threshold" in shown.tiles()) == (kind == "labels")
    assert ("R2" in shown.tiles()) == (kind == "numbers")
    if kind == "labels":
        text = "".join(shown.section("Labels").itertext())
        assert ("the threshold of the checkpoint" in text) == (stored is not None)
        assert ("because the checkpoint has none" in text) == (stored is None)
        assert stored is None or shown.tiles()["threshold"] == "0.37"


def without_thumbnails(predict_valid):
    """Return the same function for predictions of samples that the data set does not have."""
    return lambda *given: predict_valid(*given)._replace(thumbnail_of=lambda _: None)


def test_samples_that_are_not_images_are_listed_without_an_image():
    shown = class_sections.render_samples_section(random_predictions(), lambda _: thumbnail(torch.rand(5)))
    made = Report(make_report("x", "x", [], [shown], "x"))
    assert list(made.root.iter("img")) == []
    assert len(list(made.root.iter("li"))) > 12


def test_a_model_without_errors_has_a_report():
    values = np.eye(3)[[0, 1, 2, 0]]
    table = Predictions("x", tuple("abcd"), ("u", "v", "w"), values, np.array([0, 1, 2, 0]))
    shown = [class_sections.render_classes_section(table), class_sections.render_samples_section(table, lambda _: None)]
    made = Report(make_report("x", "x", [], shown, "x"))
    assert "No errors in 4 samples." in made.text
    assert "No sample is misclassified." in made.text


@CLASSES_ONLY
def test_the_report_reads_no_sample_of_the_test_split(copied_run, monkeypatch, tmp_path):
    log = tmp_path / "read.txt"
    load_dataset = experiment.dataset.load_dataset

    def load_logged_dataset(data_dir):
        dataset = load_dataset(data_dir)
        get_one = type(dataset).__getitem__
        get_batch = getattr(dataset, "get_batch", None)

        def log_ids(indices) -> None:
            with log.open("a") as file:
                file.write("".join(f"{dataset.ids[index]}\n" for index in np.atleast_1d(indices)))

        class LoggedDataset(type(dataset)):
            def __getitem__(self, index):
                log_ids(index)
                return get_one(self, index)

        def get_logged_batch(indices):
            log_ids(indices)
            return get_batch(indices)

        dataset.__class__ = LoggedDataset
        if get_batch is not None:
            dataset.get_batch = get_logged_batch
        return dataset

    monkeypatch.setattr("experiment.dataset.load_dataset", load_logged_dataset)
    assert call_report(copied_run).code == 0
    with Path(options_of(copied_run)["split_file"]).open(newline="") as file:
        folds = {row["id"]: row["fold"] for row in csv.DictReader(file)}
    assert {folds[name] for name in log.read_text().splitlines()} == {"0"}
    assert not (copied_run / "predictions").exists()


@CLASSES_ONLY
def test_scores_on_test_are_shown_if_its_predictions_exist(copied_run):
    table = random_predictions()
    (copied_run / "config.json").write_text(json.dumps(options_of(copied_run) | {"scores": ["macro_f1"]}))
    (copied_run / "predictions").mkdir()
    lines = ["id,cat,dog,0,target"]
    lines += [
        f"{name},{','.join(map(repr, map(float, row)))},{table.classes[target]}"
        for name, row, target in zip(table.ids, table.values, table.targets, strict=True)
    ]
    (copied_run / "predictions/test.csv").write_text("\n".join(lines) + "\n")
    assert call_report(copied_run).code == 0
    row = Report((copied_run / "report.html").read_text()).table("Scores", 1)[1]
    predicted = table.values.argmax(1)
    accuracy = np.mean(predicted == table.targets)
    f1 = f1_score(table.targets, predicted, average="macro")
    assert (row[0], row[1], row[3]) == ("test, from predictions/test.csv", f"{accuracy:.4f}", f"{f1:.4f}")
    (copied_run / "predictions/test.csv").write_text("id,cat\n1,1\n")  # without targets
    assert call_report(copied_run).code == 0
    assert len(Report((copied_run / "report.html").read_text()).table("Scores", 1)) == 1
    (copied_run / "predictions/test.csv").write_text("id,cat\n1,2\n")
    assert call_report(copied_run).code == 0
    assert "has 2.0 for class cat of id 1" in Report((copied_run / "report.html").read_text()).notes()[0]


@CLASSES_ONLY
def test_only_an_earlier_report_is_replaced(copied_run):
    assert call_report(copied_run).code == 0
    before = (copied_run / "report.html").read_bytes()
    assert call_report(copied_run, "--checkpoint", "last").code == 0
    assert (copied_run / "report.html").read_bytes() != before
    (copied_run / "report.html").write_text("a user file")
    message = (
        f"{copied_run}/report.html exists and was not written by tools/report.py; move it, or use another --output."
    )
    assert_rejected(call_report(copied_run), message)
    assert (copied_run / "report.html").read_text() == "a user file"
    assert call_report(copied_run, "--output", copied_run / "reports/other.html").code == 0
    assert (copied_run / "reports/other_plots/confusion.png").is_file()


def test_a_user_file_among_the_plots_prevents_the_report(tmp_path, any_plot):
    path = tmp_path / "report.html"
    plot = tmp_path / "plots/confusion.png"
    text = make_report("x", "x", [], [], "x")
    write_report(path, text, [any_plot._replace(name="confusion")])
    write_report(path, text, [any_plot._replace(name="confusion")])
    plot.write_bytes(b"a user file")
    path.unlink()
    with pytest.raises(UserError, match=r"confusion\.png exists and was not written by tools/report\.py"):
        write_report(path, text, [any_plot._replace(name="confusion")])
    assert (plot.read_bytes(), path.exists()) == (b"a user file", False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["nowhere"],
            "nowhere does not hold a run (config.json is missing); give a run directory, such as logs/baseline.",
        ),
        (["{empty}"], "does not hold a run (config.json is missing)"),
        (["{run}/metrics.jsonl"], "does not hold a run (config.json is missing)"),
        (["{run}", "{run}/../second"], "{run} is given twice; give each run once."),
        (["{run}", "--output", "out.txt"], "--output out.txt must end in .html."),
        (["{run}", "--output", "{run}/run.json/out.html"], "cannot be written (File exists); use another --output."),
        (["--output", "out.html"], "logs/baseline does not hold a run"),
    ],
)
def test_invalid_options_are_rejected_without_side_effects(runs, tmp_path, monkeypatch, flags, message):
    paths = {"empty": tmp_path, "run": runs[1]}
    before = sorted(tmp_path.iterdir()), sorted(runs[1].iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "describe", lambda *_: ("", []))
    assert_rejected(call_tool(report, *(flag.format(**paths) for flag in flags)), message.format(**paths))
    assert (sorted(tmp_path.iterdir()), sorted(runs[1].iterdir())) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[1]", "config.json is damaged (not a JSON object); restore it."),
        ("run.json", "{", "run.json is damaged ("),
        ("metrics.jsonl", "rubbish\n", "metrics.jsonl is damaged in line 1; restore it"),
    ],
)
def test_a_damaged_file_is_reported(copied_run, file, content, message):
    (copied_run / file).write_text(content)
    assert_rejected(call_tool(report, copied_run), message)
    assert not (copied_run / "report.html").exists()


def test_runs_without_a_common_directory_need_an_output(runs, tmp_path):
    outside = write_run(tmp_path / "outside", [{"accuracy": 0.5, "loss": 1.0}])
    inside = write_run(runs[0] / "inside", [{"accuracy": 0.5, "loss": 1.0}])
    here = write_run(Path(report.__file__).parents[1] / "logs/report_test", [{"accuracy": 0.5, "loss": 1.0}])
    try:
        end = call_tool(report, here, outside)
        assert_rejected(end, ", which contains the project; give --output.")
        assert "the common directory of these runs is /" in end.err
        end = call_tool(report, runs[0], inside)  # must not replace the report of the first run
        assert end.out == f"report   {runs[0].parent}/report.html\n"
    finally:
        shutil.rmtree(here)
        shutil.rmtree(inside)


def test_numbers_are_aligned_right_and_text_left():
    table = ElementTree.fromstring(make_table(["a", "b"], [("x", 1)]))
    assert [cell.get("class") for cell in table.iter("td")] == [None, "n"]
    assert table.get("class") == "table"

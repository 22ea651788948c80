"""The page says what the run's files and predictions say, needs nothing else, and replaces nothing of the user's."""

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
from models import tiny_network
from processes import End, run_ranks, run_train
from sklearn.metrics import f1_score, precision_recall_fscore_support
from small_data import make_data
from tables import call, random_table, refused
from torchvision.io import ImageReadMode, decode_image

import experiment.dataset
import experiment.model
import train
from batteries.core.config_io import flatten
from batteries.core.errors import UserError
from batteries.data.image_grid import thumbnail, to_rgb
from batteries.evaluation import error_analysis as mistakes
from batteries.evaluation.predictions import Predictions, read_predictions
from batteries.report import html as pages
from batteries.report import plots, sections
from batteries.report.history import History, Span, find_runs, read_history
from batteries.report.html import make_page, make_table, plots_of, tag
from batteries.report.plots import Plot
from tools import predict, report
from train import Config, Stage

assert matplotlib.figure, "imported once, for all forks"
assert matplotlib.backends.backend_agg
HOSTILE = ("<script>'a'</script>", '"><img src=x onerror="alert(1)">', "&amp; $\\alpha$", "_a\x1b[31m\x00b", "日本")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A small network, and plots of few pixels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, predict, experiment.model):
            patch.setattr(module, "build_model", tiny_network)
        patch.setattr(plots, "DPI", 20)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quick) -> list[Path]:
    """Two runs: one of two stages, and one with averaged weights, other knobs and more scores."""
    folder, data_dir = tmp_path_factory.mktemp("runs"), make_data(tmp_path_factory.mktemp("data"))
    common = {"data_dir": data_dir, "split_file": folder / "splits.csv", "tracker": ("none",), "device": "cpu"}
    first = Config(stages=(Stage("one", 3, 3e-3), Stage("two", 2, 1e-3)), logdir=folder / "first", **common)
    changes = {"stages": (Stage("one", 2, 1e-2),), "ema_decay": 0.9, "seed": 3, "scores": ("macro_f1",)}
    second = dataclasses.replace(first, logdir=folder / "second", **changes)
    for config in (first, second):
        run_ranks(1, lambda config=config: train.main(config), join=False)
    return [first.logdir, second.logdir]


def call_report(*flags: object) -> End:
    return run_train(report.main, report.Options, "--device", "cpu", *map(str, flags), name="tools/report.py")


@pytest.fixture(scope="module")
def page(runs) -> "Page":
    end = call_report(runs[0])
    assert (end.code, end.err) == (0, ""), end
    assert end.out == f"report   {runs[0]}/report.html\n"
    return Page((runs[0] / "report.html").read_text())


@pytest.fixture(scope="module")
def predictions(runs, tmp_path_factory) -> Predictions:
    """What predict.py writes of the valid split."""
    folder = tmp_path_factory.mktemp("predictions")
    options = predict.Options(run=(runs[0],), split="valid", output=folder, device="cpu")
    run_ranks(1, lambda: predict.main(options), join=False)
    return read_predictions(folder / "valid.csv")


class Page:
    """A page as XML: what is not well-formed does not become one."""

    def __init__(self, text: str) -> None:
        start, _, self.text = text.partition("\n")
        assert start == "<!doctype html>"
        self.root = ElementTree.fromstring(self.text)

    def section(self, title: str) -> ElementTree.Element:
        [found] = [one for one in self.root.iter("section") if one.findtext("h2") == title]
        return found

    def titles(self) -> list[str]:
        return [str(one.findtext("h2")) for one in self.root.iter("section")]

    def table(self, title: str, number: int = 0) -> list[list[str]]:
        """The rows of a table of a section, without the header."""
        found = list(self.section(title).iter("tbody"))[number]
        return [["".join(cell.itertext()) for cell in row] for row in found]

    def marked(self) -> set[str]:
        """The first cell of each row that stands out."""
        return {"".join(row[0].itertext()) for row in self.root.iter("tr") if row.get("class") == "differs"}

    def notes(self) -> list[str]:
        return ["".join(one.itertext()) for one in self.root.iter("p") if one.get("class") == "note"]

    def tiles(self) -> dict[str, str]:
        [tiles] = [one for one in self.root.iter("div") if one.get("class") == "tiles"]
        return {str(tile.findtext("span")): str(tile.findtext("b")) for tile in tiles}


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_best_epoch_is_that_of_metrics_jsonl_with_all_its_numbers(runs, page):
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
    assert page.table("Scores") == wanted
    record = json.loads((runs[0] / "run.json").read_text())
    assert page.tiles()["best accuracy"] == f"{record['best']['score']:.4f}"
    assert f"valid, {record['best']['stage']} epoch {record['best']['epoch']}" in page.text


def test_the_curves_are_those_of_metrics_jsonl_and_the_best_epoch_is_marked(runs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(sections, "draw_curves", lambda name, *rest, **_: drawn.update({name: rest}))
    sections.show_curves(read_history(runs[1], "second"))
    lines = lines_of(runs[1])
    ranked = [line["valid_ema"]["accuracy"] for line in lines]
    for metric in ("accuracy", "loss"):
        _, _, curves, spans = drawn[f"curve_{metric}"]
        values = {curve.label: curve.values for curve in curves}
        assert values == {split: [line[split][metric] for line in lines] for split in ("train", "valid", "valid_ema")}
        assert {curve.label: curve.best for curve in curves if curve.best} == {
            "valid_ema": ranked.index(max(ranked)) + 1
        }
        assert spans == [Span("one", 1, 2)]
    assert drawn["learning_rate"][2][0].values == [line["lr"] for line in lines]
    assert [curve.label for curve in drawn["curve_macro_f1"][2]] == ["valid", "valid_ema"]


def test_numbers_that_are_not_finite_are_holes_and_never_best(tmp_path):
    lines = [(None, 1.0), (0.5, None), (0.5, 0.1), (0.4, 0.2)]
    write_run(tmp_path, [{"accuracy": one, "loss": other} for one, other in lines])
    run = read_history(tmp_path, "x")
    assert run.best() == 2  # the earlier of a tie
    assert [math.isnan(value) for value in run.curve("valid", "accuracy")] == [True, False, False, False]
    (tmp_path / "config.json").write_text(json.dumps({"main_metric": "loss", "minimize_metric": True}))
    assert read_history(tmp_path, "x").best() == 3


def write_run(folder: Path, valid: list[dict], stages: tuple[str, ...] = ("one",), **knobs) -> Path:
    """The files of a run without checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"main_metric": "accuracy", "minimize_metric": False, **knobs}))
    lines = [
        {"stage": stage, "epoch": epoch, "step": epoch, "lr": 0.1, "train": scores, "valid": scores}
        for stage in stages
        for epoch, scores in enumerate(valid, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_scores_confusions_and_classes_are_those_of_the_predictions(page, predictions):
    taken, targets, classes = predictions.probabilities.argmax(1), predictions.targets, predictions.classes
    [[name, accuracy, loss]] = page.table("Scores", 1)
    assert (name.endswith("/best.pth"), accuracy) == (True, f"{(taken == targets).mean():.4f}")
    logs = [math.log(row[target]) for row, target in zip(predictions.probabilities, targets, strict=True)]
    assert loss == f"{-sum(logs) / len(logs):.4f}"

    counts = Counter((classes[target], classes[one]) for target, one in zip(targets, taken, strict=True))
    confused = sorted((count for (target, one), count in counts.items() if target != one), reverse=True)
    rows = page.table("Classes")
    assert [int(row[2]) for row in rows] == confused[:10]
    for target, prediction, count, share in rows:
        assert counts[target, prediction] == int(count)
        assert share == f"{counts[target, prediction] / (targets == classes.index(target)).sum():.1%}"

    precision, recall, f1, samples = precision_recall_fscore_support(
        targets, taken, labels=range(len(classes)), zero_division=0
    )
    rows = page.table("Classes", 1)
    assert [float(row[5]) for row in rows] == sorted(float(row[5]) for row in rows)
    for name, taken_for, *numbers in rows:
        place = classes.index(name)
        shares = (f"{values[place]:.3f}" for values in (recall, precision, f1))
        assert numbers == [str(int(samples[place])), *shares]
        others = {one: counts[name, one] for one in classes if one != name}
        most = max(others, key=lambda one: others[one])
        assert taken_for == (f"{most} ({others[most]})" if others[most] else "")


def mixed_up(size: int, classes: int) -> Predictions:
    """Predictions that are mostly wrong, and of which the first classes get the most."""
    generator = np.random.default_rng(1)
    values = generator.dirichlet(np.linspace(2, 1, classes), size)
    names = tuple(f"c{number}" for number in range(classes))
    return Predictions("x", tuple(map(str, range(size))), names, values, generator.integers(classes, size=size))


@pytest.mark.parametrize(("size", "classes"), [(12, 3), (500, 2), (2000, 40)])
def test_the_confusions_that_are_drawn_are_counted_right(size, classes):
    table = mixed_up(size, classes)
    counts = mistakes.count_confusions(table)
    by_hand = np.zeros((classes, classes), dtype=int)
    for row, target in zip(table.probabilities, table.targets, strict=True):
        by_hand[target, list(row).index(max(row))] += 1
    assert np.array_equal(counts, by_hand)
    off = [by_hand[one].sum() + by_hand[:, one].sum() - 2 * by_hand[one, one] for one in range(classes)]
    chosen = mistakes.most_mistaken(counts, 5).tolist()
    assert chosen == sorted(chosen)
    assert sorted(off[one] for one in chosen) == sorted(off)[-5:]


def test_of_many_classes_those_with_the_most_mistakes_are_drawn_with_shares_of_all_their_samples(monkeypatch):
    drawn = []
    monkeypatch.setattr(sections, "draw_confusions", lambda *given: drawn.append(given))
    table = mixed_up(2000, 1000)
    sections.show_classes(table)
    [(counts, samples, names, title)] = drawn
    assert title == "The 24 of 1,000 classes with the most mistakes"
    assert counts.shape == (24, 24)
    assert samples.tolist() == [np.sum(table.targets == table.classes.index(name)) for name in names]


def test_calibration_is_that_of_a_slow_reference(page, predictions):
    edges = np.linspace(0, 1, 16)
    error, rows = 0.0, []
    for low, high in itertools.pairwise(edges):
        inside = [
            (max(row), list(row).index(max(row)) == target)
            for row, target in zip(predictions.probabilities, predictions.targets, strict=True)
            if low < max(row) <= high
        ]
        if inside:
            confidence, right = (sum(one[part] for one in inside) / len(inside) for part in (0, 1))
            error += len(inside) / len(predictions.ids) * abs(confidence - right)
            rows.append([f"{low:.2f} to {high:.2f}", str(len(inside)), f"{confidence:.4f}", f"{right:.4f}"])
    assert page.table("Calibration") == rows
    assert page.tiles()["calibration error"] == f"{error:.4f}"


def test_a_confidence_on_the_edge_of_two_bins_is_in_the_lower_one_and_a_certain_one_is_counted():
    values = np.array([[1.0, 0.0], [0.6, 0.4], [0.6, 0.4]])
    bins = mistakes.bin_by_confidence(Predictions("x", ("a", "b", "c"), ("u", "v"), values, np.array([0, 0, 1])))
    assert [(round(one.high, 4), one.samples, one.accuracy) for one in bins] == [(0.6, 2, 0.5), (1.0, 1, 1.0)]
    assert mistakes.calibration_error(bins) == pytest.approx(2 / 3 * 0.1)


def test_the_worst_mistakes_and_the_least_certain_come_in_order_with_their_pictures(runs, page, predictions):
    classes = predictions.classes
    rows = list(zip(predictions.ids, predictions.probabilities, predictions.targets, strict=True))
    wrong = sorted((row[target], number) for number, (_, row, target) in enumerate(rows) if row.argmax() != target)
    unsure = sorted((max(row), number) for number, (_, row, _) in enumerate(rows))
    strips = list(page.section("Samples").iter("ul"))
    dataset = train.load_dataset(predict.read_config(runs[0], Config).data_dir)
    for strip, chosen in zip(strips, (wrong, unsure), strict=True):
        assert len(strip) == min(12, len(chosen))
        for item, (_, number) in zip(strip, chosen, strict=False):
            name, row, target = rows[number]
            taken = row.argmax()
            said = f"{classes[target]}, right" if taken == target else f"{classes[target]} taken for {classes[taken]}"
            assert [item.findtext("small"), item.findtext("b")] == [name, said]
            assert f"{row[taken]:.3f}" in str(item.findtext("span"))
            image = dataset[list(map(str, dataset.ids)).index(name)][0]
            assert torch.equal(decode(item.find("img")), to_rgb(image.float()).to(torch.uint8))


def decode(image: ElementTree.Element | None) -> torch.Tensor:
    """The picture of an <img>, uint8 (3, H, W)."""
    assert image is not None
    data = base64.b64decode(str(image.get("src")).removeprefix("data:image/png;base64,"))
    picture = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    assert (image.get("width"), image.get("height")) == (str(picture.shape[2]), str(picture.shape[1]))
    return picture


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 600, 200), (5, 3, 700), (3, 192, 1)])
def test_a_thumbnail_keeps_the_sides_in_proportion_and_is_small(shape):
    png = thumbnail(torch.randint(256, shape, dtype=torch.uint8))
    width, height = pages.size_of(png)
    assert max(width, height) == min(192, max(shape[1:]))
    assert width / height == pytest.approx(shape[2] / shape[1], rel=0.2)
    assert thumbnail(torch.rand(7)) is None
    assert thumbnail("words") is None


def test_floats_are_stretched_to_their_range_in_a_thumbnail():
    image = torch.tensor([-2.0, 0.0, 2.0]).reshape(1, 1, 3)
    picture = decode_image(torch.frombuffer(bytearray(thumbnail(image)), dtype=torch.uint8))
    assert picture[0, 0].tolist() == [0, 128, 255]


def test_the_page_needs_nothing_else_and_has_no_script(runs, page):
    tags = Counter(one.tag for one in page.root.iter())
    assert not {"script", "link", "iframe", "object", "base"} & set(tags)
    assert tags["img"] > 15
    for one in page.root.iter():
        for name, value in one.attrib.items():
            assert not name.startswith("on"), value
            if name in ("src", "srcset", "data"):
                assert value.startswith("data:image/png;base64,"), value
            if name == "href":
                assert value.startswith("#"), value
    assert not re.search(r"url\(|@import|https?:", page.text)
    assert "default-src 'none'" in page.text.replace("&#x27;", "'")
    anchors = {one.get("id") for one in page.root.iter("section")}
    assert {one.get("href", "")[1:] for one in page.root.iter("a")} == anchors


def test_the_plots_of_the_page_are_files_too(runs, page):
    there = {path.name: path.read_bytes() for path in (runs[0] / "plots").iterdir()}
    names = ("confusion", "calibration", "curve_accuracy", "curve_loss", "learning_rate", "time", "throughput")
    assert set(there) == {f"{name}.png" for name in names}
    shown = [one.find("img") for one in page.root.iter("figure")]
    embedded = {base64.b64decode(str(image.get("src")).partition(",")[2]) for image in shown}
    assert embedded == set(there.values())
    assert all(image.get("alt") for image in shown)


def test_time_is_summed_over_the_epochs(runs, page):
    lines = [json.loads(line) for line in (runs[0] / "timings.jsonl").read_text().splitlines()]
    rows = page.table("Time")
    for stage, row in zip(("one", "two"), rows, strict=True):
        mine = [line for line in lines if line["stage"] == stage]
        seconds, waits = (sum(line[name] for line in mine) for name in ("seconds", "data_wait_seconds"))
        assert row[:4] == [stage, str(len(mine)), f"{seconds:.1f} s", f"{waits / seconds:.1%}"]


def test_the_record_and_the_knobs_that_are_not_the_default_are_there(runs, page):
    record = dict(flatten(json.loads((runs[0] / "run.json").read_text())))
    rows = dict(page.table("Record"))
    assert {name: rows[name] for name in record} == {name: text_of(value) for name, value in record.items()}
    config, default = (dict(flatten(one)) for one in (knobs_of(runs[0]), json.loads(json.dumps(to_plain(Config())))))
    differing = {name for name in config | default if config.get(name, "absent") != default.get(name, "absent")}
    assert page.marked() == differing - {"logdir", "resume"}
    assert ["stages.0.epochs", "3", "6"] in page.table("Knobs")
    assert ["batch_size", "32", "32"] in page.table("Knobs", 1)


def to_plain(config: Config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def knobs_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def text_of(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(text_of, value)) or "–"
    return "–" if value is None else str(value)


@pytest.fixture(scope="module")
def side_by_side(runs) -> Page:
    end = call(report, *runs)
    assert (end.code, end.err) == (0, ""), end
    return Page((runs[0].parent / "report.html").read_text())


def test_of_several_runs_exactly_the_knobs_that_differ_are_marked(runs, side_by_side):
    first, second = (dict(flatten(knobs_of(run))) for run in runs)
    wanted = {name for name in first | second if first.get(name, "absent") != second.get(name, "absent")} - {"logdir"}
    assert {"stages.0.lr", "stages.1.lr", "seed", "ema_decay", "scores"} <= wanted
    assert side_by_side.marked() == wanted
    assert ["stages.0.lr", "0.003", "0.01"] in side_by_side.table("Knobs")
    assert ["stages.1.lr", "0.001", "not there"] in side_by_side.table("Knobs")
    assert {row[0] for row in side_by_side.table("Knobs", 1)} == (first | second).keys() - wanted - {"logdir"}


def test_several_runs_are_compared_by_their_best_epochs_and_curves(runs, side_by_side, monkeypatch):
    rows = {row[0]: row for row in side_by_side.table("Runs")}
    for run in runs:
        best = json.loads((run / "run.json").read_text())["best"]
        where = f"{best['stage']} epoch {best['epoch']}"
        assert rows[run.name][1:5] == ["finished", where, "accuracy", f"{best['score']:.4f}"]
    drawn = {}
    monkeypatch.setattr(sections, "draw_curves", lambda name, *rest, **_: drawn.update({name: rest[2]}))
    sections.compare_curves([read_history(run, run.name) for run in runs])
    shown = {curve.label: curve.values for curve in drawn["valid_accuracy"]}
    splits = {"first": "valid", "second": "valid_ema"}  # whose scores rank
    assert shown == {run.name: [line[splits[run.name]]["accuracy"] for line in lines_of(run)] for run in runs}
    assert [curve.label for curve in drawn["valid_macro_f1"]] == ["second"]
    assert "train_macro_f1" not in drawn
    assert len({(curve.colour, curve.style) for curve in drawn["valid_loss"]}) == 2


def test_a_folder_of_runs_stands_for_them_and_links_to_their_pages(runs, page, side_by_side):
    assert find_runs([runs[0].parent]) == runs
    links = {one.text: one.get("href") for one in side_by_side.section("Runs").iter("a")}
    assert links == {"first": "first/report.html"}  # the other has none yet


def test_runs_that_differ_in_fold_or_seed_alone_have_a_mean(tmp_path):
    scores = (0.5, 0.7, 0.9)
    for fold, score in enumerate(scores):
        write_run(tmp_path / f"fold_{fold}", [{"accuracy": score, "loss": 1.0}], fold=fold, logdir=str(fold))
    said = Page(compare(tmp_path)).section("Runs").findtext("p")
    assert said == (
        "These runs differ in fold or seed alone: accuracy has mean 0.7000, standard deviation 0.2000 (n - 1)."
    )
    write_run(tmp_path / "fold_0", [{"accuracy": 0.5, "loss": 1.0}], batch_size=3)
    assert Page(compare(tmp_path)).section("Runs").find("p") is None


def compare(folder: Path) -> str:
    end = call(report, folder)
    assert (end.code, end.err) == (0, ""), end
    return (folder / "report.html").read_text()


def test_names_from_outside_are_shown_as_they_are_and_are_no_html():
    table = random_table(40, classes=HOSTILE)
    table = dataclasses.replace(table, ids=tuple(f"{HOSTILE[index % 5]} {index}" for index in range(40)))
    scores = {"loss": 1.0, "accuracy": 0.5, "</td>&": 0.25}
    epochs = [{"stage": HOSTILE[0], "epoch": 1, "lr": 0.1, "train": scores, "valid": scores}]
    record = {"exit": f"failed: {HOSTILE[1]}", "command": HOSTILE[0]}
    run = History(HOSTILE[1], Path("nowhere"), {"data_dir": HOSTILE[0]}, record, epochs, [])
    shown = [sections.show_curves(run), sections.show_scores(run, {HOSTILE[0]: scores}), sections.show_classes(table)]
    shown += [sections.show_samples(table, lambda _: thumbnail(torch.zeros(1, 2, 2))), sections.show_record(run)]
    shown += [sections.show_knobs({HOSTILE[0]: run.config, HOSTILE[1]: {}})]
    lead = [tag("p", HOSTILE[1], class_="note"), sections.show_tiles(run, table)]
    made = Page(make_page(run.name, run.summary(), lead, shown, HOSTILE[0]))
    assert "script" not in {one.tag for one in made.root.iter()}
    assert all(str(one.get("src")).startswith("data:") for one in made.root.iter("img"))
    assert made.root.findtext(".//h1") == HOSTILE[1]
    assert made.notes() == [HOSTILE[1]]
    assert {row[0] for row in made.table("Classes", 1)} == {*HOSTILE[:3], "_a[31mb", HOSTILE[4]}
    ids = {re.sub(r"[\x00\x1b]", "", name) for name in table.ids}
    assert {str(one.findtext("small")) for one in made.root.iter("li")} <= ids
    assert dict(made.table("Record"))["command"] == HOSTILE[0]
    assert made.table("Knobs") == [["data_dir", HOSTILE[0], "not there"]]
    assert {plot.name for plot in plots_of(shown)} == {
        *("curve_accuracy", "curve_loss", "curve___td__", "learning_rate", "confusion")
    }


@pytest.fixture(scope="module")
def drawn_once(quick) -> Plot:
    """A plot in place of all where the words are looked at."""
    return plots.draw_curves("plot", "x", "y", [plots.Line("", [1.0, 2.0], "black")])


@pytest.fixture
def cut(runs, tmp_path, monkeypatch, drawn_once) -> Path:
    """A copy of the first run, to be cut; its plots are not drawn anew."""
    for draw in ("draw_curves", "draw_reliability"):
        monkeypatch.setattr(sections, draw, lambda *_, **__: drawn_once)
    monkeypatch.setattr(sections, "draw_confusions", lambda *_: drawn_once._replace(name="confusion"))
    monkeypatch.setattr(sections, "draw_times", lambda *_: [drawn_once])
    return shutil.copytree(runs[0], tmp_path / "cut", ignore=shutil.ignore_patterns("report.html", "plots"))


def test_a_run_that_was_cut_before_its_first_epoch_has_a_page_of_what_is_there(cut):
    for name in ("metrics.jsonl", "timings.jsonl", "run.json"):
        (cut / name).unlink()
    for folder in ("one", "two"):
        shutil.rmtree(cut / folder)
    end = call_report(cut)
    assert (end.code, end.err) == (0, ""), end
    made = Page((cut / "report.html").read_text())
    [note] = made.notes()
    assert note.startswith("Confusions, calibration and samples are left out: --checkpoint best: no best.pth in ")
    assert f"note     {note}\n" in end.out
    assert "without an end: it still runs, or was killed" in made.text
    assert "No epoch has ended, so there are no curves." in made.text
    assert made.titles() == ["Curves", "Scores", "Time", "Knobs", "Record"]
    assert not (cut / "plots").exists()


def test_of_a_run_that_was_cut_later_the_epochs_that_ended_are_shown(cut):
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    record = json.loads((cut / "run.json").read_text())
    del record["best"]
    (cut / "run.json").write_text(json.dumps(record | {"exit": "failed: the sky fell", "end": None}))
    shutil.rmtree(cut / "two")
    end = call_report(cut)
    assert (end.code, end.err) == (0, ""), end
    made = Page((cut / "report.html").read_text())
    assert "failed: the sky fell · started " in made.text
    assert {row[0] for row in made.table("Scores")} == {"one"}
    assert (made.tiles()["time"], made.notes()) == ("–", [])
    assert "Samples" in made.titles()


def test_a_checkpoint_that_was_asked_for_and_is_not_there_leaves_the_page_as_it_is(cut):
    assert call_report(cut).code == 0
    before = (cut / "report.html").read_bytes()
    for name in ("nowhere.pth", "swa"):
        end = call_report(cut, "--checkpoint", name)
        assert (end.code, end.err.startswith("error: ")) == (2, True)
    assert (cut / "report.html").read_bytes() == before


def test_a_finished_run_whose_epochs_are_lost_says_so(cut):
    (cut / "metrics.jsonl").write_text('{"stage": "one", "epo')
    assert call_report(cut).code == 0
    assert "metrics.jsonl holds no whole line of this run." in Page((cut / "report.html").read_text()).notes()


def test_a_run_without_a_finite_score_has_a_page(cut):
    text = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(re.sub(r'"(accuracy|loss)": [\d.e-]+', r'"\1": null', text))
    for folder in ("one", "two"):
        (cut / folder / "best.pth").unlink()
    end = call_report(cut)
    assert (end.code, end.err) == (0, ""), end
    made = Page((cut / "report.html").read_text())
    assert made.tiles()["best accuracy"] == "–"
    assert "No valid accuracy is finite." in made.text
    assert "use --checkpoint last" in made.notes()[0]
    assert call_report(cut, "--checkpoint", "last").code == 0
    made = Page((cut / "report.html").read_text())
    assert made.notes() == []
    assert made.table("Scores")[0][0].endswith("two/last.pth")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("labels", "Its targets are not one class for each sample"),
        ("numbers", "Its targets are not one class for each sample"),
        ("unknown", "The targets of these samples are not known."),
        ("nan", "The model gives numbers that are not finite for 1 of 12 samples."),
        ("bug", "Confusions, calibration and samples are left out: ZeroDivisionError: division by zero"),
    ],
)
def test_predictions_of_another_kind_are_left_out_with_a_sentence(cut, monkeypatch, kind, sentence):
    table = random_table()
    values = table.probabilities.copy()
    values[3, 1] = math.nan
    others = {
        "labels": {"targets": np.ones((12, 3), dtype=np.int64)},
        "numbers": {"targets": np.linspace(0, 1, 12)},
        "unknown": {"targets": None},
        "nan": {"probabilities": values},
        "bug": {},
    }
    made = {"valid": dataclasses.replace(table, **others[kind])}
    monkeypatch.setattr("batteries.evaluation.inference.predict_run", lambda *_: 1 / 0 if kind == "bug" else made)
    end = call_report(cut)
    assert (end.code, end.err) == (0, ""), end
    page = Page((cut / "report.html").read_text())
    assert sentence in page.notes()[0]
    assert not {"Classes", "Calibration", "Samples"} & set(page.titles())
    assert {"Curves", "Time", "Record"} < set(page.titles())


def test_samples_that_are_no_images_are_named_without_a_picture():
    shown = sections.show_samples(random_table(), lambda _: thumbnail(torch.rand(5)))
    made = Page(make_page("x", "x", [], [shown], "x"))
    assert list(made.root.iter("img")) == []
    assert len(list(made.root.iter("li"))) > 12


def test_a_model_without_mistakes_has_a_page():
    values = np.eye(3)[[0, 1, 2, 0]]
    table = Predictions("x", tuple("abcd"), ("u", "v", "w"), values, np.array([0, 1, 2, 0]))
    made = Page(
        make_page("x", "x", [], [sections.show_classes(table), sections.show_samples(table, lambda _: None)], "x")
    )
    assert "None of 4 samples is taken for another class." in made.text
    assert "There is no mistake." in made.text


def test_the_report_reads_no_sample_of_the_test_split(cut, monkeypatch, tmp_path):
    read, load_dataset = tmp_path / "read.txt", experiment.dataset.load_dataset

    def load_noted(data_dir):
        dataset = load_dataset(data_dir)
        get_one, get_batch = type(dataset).__getitem__, getattr(dataset, "get_batch", None)

        def note(indices) -> None:
            with read.open("a") as file:
                file.write("".join(f"{dataset.ids[index]}\n" for index in np.atleast_1d(indices)))

        class Noted(type(dataset)):
            def __getitem__(self, index):
                note(index)
                return get_one(self, index)

        dataset.__class__ = Noted
        if get_batch is not None:
            dataset.get_batch = lambda indices: (note(indices), get_batch(indices))[1]
        return dataset

    monkeypatch.setattr("experiment.dataset.load_dataset", load_noted)
    assert call_report(cut).code == 0
    with Path(knobs_of(cut)["split_file"]).open(newline="") as file:
        folds = {row["id"]: row["fold"] for row in csv.DictReader(file)}
    assert {folds[name] for name in read.read_text().splitlines()} == {"0"}
    assert not (cut / "predictions").exists()


def test_scores_of_test_are_shown_where_its_predictions_are_there_already(cut):
    table = random_table()
    (cut / "config.json").write_text(json.dumps(knobs_of(cut) | {"scores": ["macro_f1"]}))
    (cut / "predictions").mkdir()
    lines = ["id,cat,dog,0,target"]
    lines += [
        f"{name},{','.join(map(repr, map(float, row)))},{table.classes[target]}"
        for name, row, target in zip(table.ids, table.probabilities, table.targets, strict=True)
    ]
    (cut / "predictions/test.csv").write_text("\n".join(lines) + "\n")
    assert call_report(cut).code == 0
    row = Page((cut / "report.html").read_text()).table("Scores", 1)[1]
    taken = table.probabilities.argmax(1)
    accuracy, f1 = np.mean(taken == table.targets), f1_score(table.targets, taken, average="macro")
    assert (row[0], row[1], row[3]) == ("test, of predictions/test.csv", f"{accuracy:.4f}", f"{f1:.4f}")
    (cut / "predictions/test.csv").write_text("id,cat\n1,1\n")  # without targets
    assert call_report(cut).code == 0
    assert len(Page((cut / "report.html").read_text()).table("Scores", 1)) == 1
    (cut / "predictions/test.csv").write_text("id,cat\n1,2\n")
    assert call_report(cut).code == 0
    assert "has 2.0 for class cat of id 1" in Page((cut / "report.html").read_text()).notes()[0]


def test_an_earlier_report_is_replaced_and_nothing_else_is(cut):
    assert call_report(cut).code == 0
    before = (cut / "report.html").read_bytes()
    assert call_report(cut, "--checkpoint", "last").code == 0
    assert (cut / "report.html").read_bytes() != before
    (cut / "report.html").write_text("mine")
    refused(
        call_report(cut), f"{cut}/report.html is there already and no report; move it away, or use another --output."
    )
    assert (cut / "report.html").read_text() == "mine"
    assert call_report(cut, "--output", cut / "pages/other.html").code == 0
    assert (cut / "pages/other_plots/confusion.png").is_file()


def test_a_plot_that_is_not_ours_keeps_the_page_from_being_written(tmp_path, drawn_once):
    page, picture = tmp_path / "report.html", tmp_path / "plots/confusion.png"
    text, plots = make_page("x", "x", [], [], "x"), [drawn_once._replace(name="confusion")]
    pages.write_page(page, text, plots)
    pages.write_page(page, text, plots)
    picture.write_bytes(b"mine")
    page.unlink()
    with pytest.raises(UserError, match=r"confusion\.png is there already and no report"):
        pages.write_page(page, text, plots)
    assert (picture.read_bytes(), page.exists()) == (b"mine", False)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["nowhere"], "nowhere holds no run: config.json is missing; give a run's folder, such as logs/baseline."),
        (["{empty}"], "holds no run: config.json is missing"),
        (["{run}/metrics.jsonl"], "holds no run: config.json is missing"),
        (["{run}", "{run}/../second"], "{run} is given twice; give each run once."),
        (["{run}", "--output", "page.txt"], "--output page.txt must end in .html."),
        (["{run}", "--output", "{run}/run.json/page.html"], "cannot be written (File exists); use another --output."),
        (["--output", "page.html"], "logs/baseline holds no run"),
    ],
)
def test_what_is_no_run_gets_a_sentence_and_nothing_is_written(runs, tmp_path, monkeypatch, flags, sentence):
    words = {"empty": tmp_path, "run": runs[1]}
    before = sorted(tmp_path.iterdir()), sorted(runs[1].iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "describe", lambda *_: ("", []))
    refused(call(report, *(flag.format(**words) for flag in flags)), sentence.format(**words))
    assert (sorted(tmp_path.iterdir()), sorted(runs[1].iterdir())) == before


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "[1]", "config.json is damaged (it is no object); put it back."),
        ("run.json", "{", "run.json is damaged ("),
        ("metrics.jsonl", "rubbish\n", "metrics.jsonl is damaged in line 1; put it back"),
    ],
)
def test_a_damaged_file_is_named(cut, file, content, sentence):
    (cut / file).write_text(content)
    refused(call(report, cut), sentence)
    assert not (cut / "report.html").exists()


def test_runs_without_a_folder_in_common_need_an_output(runs, tmp_path):
    alone = write_run(tmp_path / "alone", [{"accuracy": 0.5, "loss": 1.0}])
    inside = write_run(runs[0] / "inside", [{"accuracy": 0.5, "loss": 1.0}])
    here = write_run(Path(report.__file__).parent / "logs/report_test", [{"accuracy": 0.5, "loss": 1.0}])
    try:
        refused(call(report, here, alone), "these runs have no folder in common but that of everything: give --output")
        assert call(report, runs[0], inside).out == f"report   {runs[0].parent}/report.html\n"  # not over the run's own
    finally:
        shutil.rmtree(here)
        shutil.rmtree(inside)


def test_numbers_stand_right_and_words_left():
    table = ElementTree.fromstring(make_table(["a", "b"], [("x", 1)]))
    assert [cell.get("class") for cell in table.iter("td")] == [None, "n"]
    assert table.get("class") == "table"

"""Tables, scores, blends and submissions of labels, numbers and masks, compared with scikit-learn and slow loops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from sklearn import metrics
from tables import assert_rejected, call_tool, write_lines

from batteries.core.errors import UserError
from batteries.data.masks import decode_runs, encode_mask, read_mask
from batteries.evaluation.mask_inference import MaskWriter, PredictedMask, make_jobs
from batteries.evaluation.mask_table import read_mask_table
from batteries.evaluation.predictions import (
    Predictions,
    average_by_id,
    match_predictions,
    read_predictions,
    write_predictions,
)
from batteries.evaluation.scoring import score
from batteries.evaluation.tta import make_views, undo_views
from batteries.metrics import labels
from batteries.metrics.masks import IGNORED
from batteries.submission.blending import fit_weights
from tools import blend as blend_tool
from tools import submit as submit_tool

GENERATOR = np.random.default_rng(0)
NAMES = ("red", "ripe")
IDS = tuple(f"row {index:02}" for index in range(30))
LABELS = GENERATOR.integers(2, size=(30, 2))
NUMBERS = GENERATOR.normal(50, 10, size=(30, 2))


def label_table(seed: int = 0, *, known: bool = True, threshold: float | None = 0.35) -> Predictions:
    noise = np.random.default_rng(seed).uniform(size=LABELS.shape)
    return Predictions(
        f"l{seed}.csv", IDS, NAMES, 0.5 * LABELS + 0.5 * noise, LABELS if known else None, "labels", threshold
    )


def number_table(seed: int = 0, *, known: bool = True) -> Predictions:
    noise = np.random.default_rng(seed).normal(0, 3, size=NUMBERS.shape)
    return Predictions(f"n{seed}.csv", IDS, ("age", "size"), NUMBERS + noise, NUMBERS if known else None, "numbers")


def write(folder: Path, table: Predictions) -> Path:
    path = folder / table.name
    write_predictions(path, table)
    return path


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("make", [label_table, number_table])
def test_a_written_table_is_read_with_its_kind_targets_and_threshold(tmp_path, make, known):
    table = make(known=known)
    found = read_predictions(write(tmp_path, table))
    assert (found.kind, found.ids, found.classes, found.threshold) == (table.kind, IDS, table.classes, table.threshold)
    np.testing.assert_array_equal(found.values, table.values)
    if not known:
        assert found.targets is None
        return
    np.testing.assert_array_equal(found.targets, table.targets)
    assert found.targets.dtype == table.targets.dtype


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["id,red,ripe,label_red,label_ripe", "a,0.5,0.5,1,2"],
            "has 2.0 in column label_ripe of id a; a label is 0 or 1.",
        ),
        (["id,red,ripe,label_red,label_ripe", "a,0.5,0.5,1,"], "has '' in column label_ripe of id a; use a number."),
        (["id,red,label_red", "a,1.5,1"], "has 1.5 for class red of id a; a probability is 0 to 1."),
        (["id,age,target_age", "a,nan,1"], "has nan for output age of id a; a value is finite."),
        (["id,age,target_age", "a,1,inf"], "has inf in column target_age of id a; use a finite number."),
    ],
)
def test_invalid_tables_are_rejected(tmp_path, lines, message):
    with pytest.raises(UserError) as error:
        read_predictions(write_lines(tmp_path / "x.csv", *lines))
    assert message in str(error.value)


def test_a_number_can_have_the_name_target(tmp_path):
    table = replace(number_table(), classes=("target", "size"))
    found = read_predictions(write(tmp_path, table))
    assert (found.kind, found.classes) == ("numbers", ("target", "size"))
    np.testing.assert_array_equal(found.values, table.values)
    np.testing.assert_array_equal(found.targets, NUMBERS)


def test_scores_of_labels_use_the_threshold_of_the_table():
    table = label_table()
    decided = table.values >= 0.35
    functions = {
        "map": labels.mean_average_precision,
        "macro_f1": lambda sk, t, p: labels.best_f1_score(t, p, "macro"),
        "micro_f1": lambda sk, t, p: labels.best_f1_score(t, p, "micro"),
        "threshold": lambda sk, t, p: labels.best_threshold(t, p),
        "roc_auc/": labels.roc_aucs,
    }
    expected = {
        "label_accuracy": (decided == LABELS).mean(),
        "log_loss": np.mean([metrics.log_loss(LABELS[:, k], table.values[:, k]) for k in range(2)]),
        "map": np.mean([metrics.average_precision_score(LABELS[:, k], table.values[:, k]) for k in range(2)]),
        "macro_f1": metrics.f1_score(LABELS, decided, average="macro"),
        "micro_f1": metrics.f1_score(LABELS, decided, average="micro"),
        "threshold": 0.35,
        "roc_auc/red": metrics.roc_auc_score(LABELS[:, 0], table.values[:, 0]),
        "roc_auc/ripe": metrics.roc_auc_score(LABELS[:, 1], table.values[:, 1]),
    }
    assert score(table, functions) == pytest.approx(expected)
    best = max(metrics.f1_score(LABELS, table.values >= t, average="macro") for t in np.arange(1, 100) / 100)
    without = score(replace(table, threshold=None), functions)
    assert without["macro_f1"] == pytest.approx(best)
    assert score(replace(table, targets=None), functions) == {}


def test_a_label_without_a_sample_is_left_out_of_the_mean():
    rare = LABELS.copy()
    rare[:, 1] = 0
    values = label_table().values
    one = metrics.average_precision_score(rare[:, 0], values[:, 0])
    assert labels.mean_average_precision(metrics, rare, values) == pytest.approx(one)
    assert np.isnan(labels.average_precisions(metrics, rare, values)[1])
    for function in (labels.mean_average_precision, labels.mean_roc_auc):
        with pytest.raises(ValueError, match=r"no sample|in none"):
            function(metrics, np.zeros_like(rare), values)


def test_means_over_runs_keep_kind_targets_and_the_mean_threshold():
    tables = [label_table(0), label_table(1, threshold=0.45)]
    merged = average_by_id("all", tables, IDS)
    assert (merged.kind, merged.threshold) == ("labels", pytest.approx(0.4))
    np.testing.assert_allclose(merged.values, (tables[0].values + tables[1].values) / 2)
    np.testing.assert_array_equal(merged.targets, LABELS)


def test_rows_and_columns_of_numbers_are_matched():
    first, second = number_table(0), number_table(1)
    rows, columns = np.arange(30)[::-1], [1, 0]
    shuffled = replace(
        second,
        ids=IDS[::-1],
        classes=("size", "age"),
        values=second.values[rows][:, columns],
        targets=NUMBERS[rows][:, columns],
    )
    _, matched = match_predictions([first, shuffled])
    np.testing.assert_array_equal(matched.values, second.values)
    np.testing.assert_array_equal(matched.targets, NUMBERS)
    with pytest.raises(UserError, match="do not match: one predicts numbers, the other several labels"):
        match_predictions([first, label_table()])


@pytest.mark.parametrize("make", [label_table, number_table])
def test_a_blend_is_the_weighted_mean_with_its_scores(tmp_path, make):
    paths = [write(tmp_path, make(seed)) for seed in range(2)]
    end = call_tool(blend_tool, *paths, "--output", tmp_path / "b.csv", "--weights", "3,1")
    assert end.code == 0, end.err
    blended = read_predictions(tmp_path / "b.csv")
    expected = 0.75 * make(0).values + 0.25 * make(1).values
    np.testing.assert_allclose(blended.values, expected)
    if make is number_table:
        assert f"mae {metrics.mean_absolute_error(NUMBERS, expected):.4f}" in end.out
    else:
        assert blended.threshold == labels.best_threshold(LABELS, expected)


def test_a_blend_of_labels_without_targets_has_the_mean_threshold(tmp_path):
    paths = [write(tmp_path, label_table(seed, known=False, threshold=0.2 + 0.4 * seed)) for seed in range(2)]
    assert call_tool(blend_tool, *paths, "--output", tmp_path / "b.csv", "--weights", "3,1").code == 0
    assert read_predictions(tmp_path / "b.csv").threshold == pytest.approx(0.3)


@pytest.mark.parametrize("method", ["power", "geometric", "rank"])
def test_numbers_are_blended_by_their_mean_only(tmp_path, method):
    paths = [write(tmp_path, number_table(seed)) for seed in range(2)]
    end = call_tool(blend_tool, *paths, "--output", tmp_path / "b.csv", "--method", method)
    assert_rejected(end, f"--method {method} is for probabilities, and {paths[0]} has numbers; use mean.")


def slow_loss(kind: str, values: np.ndarray, targets: np.ndarray) -> float:
    if kind == "numbers":
        return metrics.mean_squared_error(targets, values)
    return float(np.mean([metrics.log_loss(targets[:, k], values[:, k], labels=[0, 1]) for k in range(2)]))


@pytest.mark.parametrize("make", [label_table, number_table])
def test_fitted_weights_minimise_the_loss_of_the_kind(make):
    tables = [make(seed) for seed in range(2)]
    stack = np.stack([table.values for table in tables])
    fitted = fit_weights(stack, tables[0].targets, lambda values, w: np.tensordot(w, values, 1), tables[0].kind)

    def loss(weight: np.ndarray) -> float:
        blended = weight[0] * stack[0] + (1 - weight[0]) * stack[1]
        return slow_loss(tables[0].kind, blended, tables[0].targets)

    best = minimize(loss, [0.5], bounds=[(0, 1)], method="L-BFGS-B")
    assert fitted.weights[0] == pytest.approx(best.x[0], abs=0.01)
    assert fitted.equal_loss == pytest.approx(loss(np.array([0.5])))


def submit(tmp_path: Path, table: Predictions, sample: list[str], *flags: str) -> tuple:
    output = tmp_path / "submission.csv"
    output.unlink(missing_ok=True)
    path = tmp_path / table.name
    write_predictions(path, table, overwrite=True)
    end = call_tool(
        submit_tool, path, "--sample", write_lines(tmp_path / "sample.csv", *sample), "--output", output, *flags
    )
    return end, pd.read_csv(output, dtype=str, keep_default_na=False) if output.exists() else None


def test_labels_are_submitted_with_the_threshold_of_the_table(tmp_path):
    table = label_table(threshold=0.6)
    end, written = submit(tmp_path, table, ["id,tags", *(f"{name},x" for name in IDS[::-1])])
    assert end.code == 0, end.err
    assert "the threshold is 0.60, chosen on validation" in end.out
    expected = [" ".join(NAMES[k] for k in range(2) if table.values[row, k] >= 0.6) for row in range(30)]
    assert list(written["tags"]) == expected[::-1]
    assert "" in expected
    end, written = submit(tmp_path, table, ["id,tags", *(f"{name},x" for name in IDS)], "--at-least-one")
    best = [NAMES[column] for column in table.values.argmax(1)]
    assert list(written["tags"]) == [cell or top for cell, top in zip(expected, best, strict=True)]


def test_labels_in_one_column_each_are_0_or_1(tmp_path):
    table = label_table(threshold=None)
    end, written = submit(tmp_path, table, ["id,ripe,red", *(f"{name},0,0" for name in IDS)])
    assert end.code == 0, end.err
    np.testing.assert_array_equal(written[["red", "ripe"]].astype(int), (table.values >= 0.5).astype(int))
    _, written = submit(tmp_path, table, ["id,ripe,red", *(f"{name},0,0" for name in IDS)], "--values", "probability")
    np.testing.assert_allclose(written[["red", "ripe"]].astype(float), table.values)


def test_numbers_are_submitted_in_the_columns_of_the_sample(tmp_path):
    table = number_table()
    end, written = submit(tmp_path, table, ["id,size,age", *(f"{name},0,0" for name in IDS)])
    assert end.code == 0, end.err
    np.testing.assert_allclose(written[["age", "size"]].astype(float), table.values)
    one = replace(table, classes=("age",), values=table.values[:, :1], targets=None)
    _, written = submit(tmp_path, one, ["image,prediction", *(f"{name},0" for name in IDS)])
    np.testing.assert_allclose(written["prediction"].astype(float), one.values[:, 0])


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (number_table, ["--values", "label"], "--values label does not fit {path}, which has numbers; use number."),
        (label_table, ["--values", "number"], "which has several labels; use labels or binary or probability."),
        (number_table, ["--threshold", "0.5"], "--threshold is for --values labels and binary, not number."),
        (number_table, ["--at-least-one"], "--at-least-one is for --values labels, not number."),
        (label_table, ["--values", "rle"], "--values rle does not fit {path}, which has several labels; use labels"),
    ],
)
def test_values_that_do_not_fit_are_rejected(tmp_path, make, flags, message):
    end, written = submit(tmp_path, make(), ["id,age,size", *(f"{name},0,0" for name in IDS)], *flags)
    assert_rejected(end, message.format(path=tmp_path / make().name))
    assert written is None


CLASSES = ("sky", "land", "sea")
SHAPES = ((6, 5), (4, 7), (3, 3))
IMAGES = ("a/1.jpg", "a/2.jpg", "b/3.jpg")


def predicted_masks(seed: int, *, known: bool = True) -> list[PredictedMask]:
    generator = np.random.default_rng(seed)
    made = []
    for position, (height, width) in enumerate(SHAPES):
        probabilities = torch.from_numpy(generator.dirichlet(np.ones(3), (height, width))).permute(2, 0, 1).float()
        target = np.random.default_rng(position).integers(3, size=(height, width)).astype(np.uint8)
        target[0, 0] = IGNORED
        made.append(PredictedMask(position, probabilities, torch.from_numpy(target) if known else None))
    return made


def write_masks(path: Path, seed: int = 0, *, known: bool = True, overwrite: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = MaskWriter(path, IMAGES, CLASSES, probabilities=True, runs=True)
    for predicted in predicted_masks(seed, known=known):
        writer.add(predicted.position, predicted)
    writer.publish(overwrite=overwrite)
    return path


def pixels_of(masks: list[PredictedMask]) -> tuple[np.ndarray, np.ndarray]:
    """Return the targets and predictions of all counted pixels."""
    pairs = [(mask.target.flatten().numpy(), mask.mask.flatten().numpy()) for mask in masks]
    targets, predicted = map(np.concatenate, zip(*pairs, strict=True))
    return targets[targets != IGNORED], predicted[targets != IGNORED]


def test_a_table_of_masks_has_the_scores_of_all_pixels(tmp_path):
    table = read_mask_table(write_masks(tmp_path / "valid.csv"))
    pixels = pixels_of(predicted_masks(0))
    ious = metrics.jaccard_score(*pixels, average=None)
    expected = {f"iou/{name}": iou for name, iou in zip(CLASSES, ious, strict=True)}
    expected |= {"mean_iou": ious.mean(), "mean_dice": metrics.f1_score(*pixels, average="macro")}
    expected |= {"pixel_accuracy": metrics.accuracy_score(*pixels)}
    assert table.scores() == pytest.approx(expected)
    for row, predicted in enumerate(predicted_masks(0)):
        np.testing.assert_array_equal(read_mask(tmp_path / table.masks[row]), predicted.mask)
        image = pixels_of([predicted])
        assert table.image_scores()["image_iou"][row] == pytest.approx(metrics.jaccard_score(*image, average="macro"))


def test_run_lengths_are_written_for_each_class_but_the_first(tmp_path):
    write_masks(tmp_path / "valid.csv")
    rows = pd.read_csv(tmp_path / "valid_rle.csv", keep_default_na=False)
    assert list(rows["class"]) == ["land", "sea"] * 3
    for predicted in predicted_masks(0):
        for number in (1, 2):
            [text] = rows[(rows["id"] == IMAGES[predicted.position]) & (rows["class"] == CLASSES[number])]["rle"]
            np.testing.assert_array_equal(decode_runs(text, *predicted.mask.shape), predicted.mask == number)


def test_equal_masks_can_be_written_again_and_others_only_with_overwrite(tmp_path):
    path = write_masks(tmp_path / "valid.csv")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    write_masks(path)
    with pytest.raises(UserError, match="already exists with other files; give --overwrite"):
        write_masks(path, seed=1)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    write_masks(path, seed=1, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} != before


def test_masks_without_targets_have_no_scores(tmp_path):
    table = read_mask_table(write_masks(tmp_path / "test.csv", known=False))
    assert (table.scores(), table.image_scores(), table.counts) == ({}, {}, None)
    assert table.predicted.sum() == sum(height * width for height, width in SHAPES)


def test_a_blend_of_masks_equals_a_slow_one(tmp_path):
    paths = [write_masks(tmp_path / f"{seed}/test.csv", seed) for seed in range(2)]
    end = call_tool(blend_tool, *paths, "--output", tmp_path / "blend.csv", "--weights", "2,1", "--method", "geometric")
    assert end.code == 0, end.err
    table = read_mask_table(tmp_path / "blend.csv")
    masks = []
    for row, (first, second) in enumerate(zip(predicted_masks(0), predicted_masks(1), strict=True)):
        p, q = (np.maximum(mask.probabilities.half().double().numpy(), 1e-15) for mask in (first, second))
        blended = np.exp((2 * np.log(p) + np.log(q)) / 3).argmax(0)
        np.testing.assert_array_equal(read_mask(tmp_path / table.masks[row]), blended)
        masks.append((first.target.flatten().numpy(), blended.flatten()))
    targets, predicted = map(np.concatenate, zip(*masks, strict=True))
    expected = metrics.jaccard_score(targets[targets != IGNORED], predicted[targets != IGNORED], average="macro")
    assert table.scores()["mean_iou"] == pytest.approx(expected)
    assert f"mean_iou {expected:.4f}" in end.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "rank"], "--method rank is not available for masks; use mean, power or geometric."),
        (["--fit-on", "x.csv", "y.csv"], "--fit-on is not available for masks; give --weights."),
    ],
)
def test_options_that_masks_do_not_have_are_rejected(tmp_path, flags, message):
    paths = [write_masks(tmp_path / f"{seed}/test.csv", seed) for seed in range(2)]
    assert_rejected(call_tool(blend_tool, *paths, "--output", tmp_path / "b.csv", *flags), message)


def submit_masks(tmp_path: Path, sample: list[str], *flags: str) -> tuple:
    path = tmp_path / "p/test.csv"
    if not path.exists():
        write_masks(path)
    output = tmp_path / "submission.csv"
    output.unlink(missing_ok=True)
    end = call_tool(submit_tool, path, "--sample", write_lines(tmp_path / "s.csv", *sample), "--output", output, *flags)
    return end, pd.read_csv(output, dtype=str, keep_default_na=False) if output.exists() else None


def assert_runs(texts: list[str], wanted: list[tuple[int, int]]) -> None:
    """Check encoded masks, given by the image and the class of each."""
    masks = predicted_masks(0)
    for text, (image, number) in zip(texts, wanted, strict=True):
        np.testing.assert_array_equal(decode_runs(text, *masks[image].mask.shape), masks[image].mask == number)


def test_masks_are_submitted_for_one_class_for_ids_with_a_class_or_with_a_column_of_classes(tmp_path):
    _, one = submit_masks(tmp_path, ["id,rle", "3,", "1,", "2,"], "--column-class", "sea")
    assert_runs(list(one["rle"]), [(2, 2), (0, 2), (1, 2)])
    _, joined = submit_masks(tmp_path, ["Id_Class,Pixels", "1_land,", "1_sea,", "3_sea,"])
    assert_runs(list(joined["Pixels"]), [(0, 1), (0, 2), (2, 2)])
    _, column = submit_masks(tmp_path, ["id,class,rle", "a/2.jpg,land,", "a/2.jpg,2,"])
    assert_runs(list(column["rle"]), [(1, 1), (1, 2)])


@pytest.mark.parametrize(
    ("sample", "flags", "message"),
    [
        (["id,rle", "1,"], [], "has 3 classes; choose one with --column-class."),
        (["id,rle", "9,"], ["--column-class", "sea"], "does not fit the sample: id 9 not in the predictions."),
        (
            ["id,rle", "1,"],
            ["--column-class", "see"],
            "class 'see' of the sample is not one of sky, land, sea; did you",
        ),
        (["id,a,b,rle", "1,,,"], [], "the sample has the columns id, a, b, rle; for masks it must have an id"),
        (["id,class,rle", "1,sea,"], ["--column-class", "sea"], "--column-class sea has no effect"),
        (["id,rle", "1,"], ["--values", "label"], "which has masks; use rle."),
        (["id,rle", "1,"], ["--threshold", "0.5"], "--threshold is for --values labels and binary, not rle."),
    ],
)
def test_samples_that_masks_do_not_fit_are_rejected(tmp_path, sample, flags, message):
    end, written = submit_masks(tmp_path, sample, *flags)
    assert_rejected(end, message)
    assert written is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("predicted_", "guessed_"), "is not a table of predicted masks: it has no column"),
        (lambda text: text + text.splitlines()[1] + "\n", "has more than one row of id a/1.jpg."),
        (lambda text: text.replace("a/1.png", "a/9.png"), "that does not exist; predict again."),
        (lambda text: text.splitlines()[0] + "\n", "has no rows."),
    ],
)
def test_invalid_tables_of_masks_are_rejected(tmp_path, change, message):
    path = write_masks(tmp_path / "valid.csv")
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError) as error:
        read_mask_table(path)
    assert message in str(error.value)


@pytest.mark.parametrize("views", ["none", "flip", "crops", "flip-crops"])
def test_views_of_a_network_that_returns_its_input_are_moved_back(views):
    images = torch.rand(2, 3, 17, 24)
    for view in undo_views(make_views(images, views), views):
        assert torch.equal(view, images)


def test_runs_whose_validation_splits_overlap_are_rejected():
    first, second = np.arange(5), np.arange(5, 9)
    assert len(make_jobs(["a", "b"], [first, second])) == 2
    assert [job.members for job in make_jobs(["a", "b"], [first, first])] == [["a", "b"]]
    with pytest.raises(UserError, match="overlap without being equal"):
        make_jobs(["a", "b"], [first, np.arange(4, 9)])


def test_an_encoded_mask_has_no_other_size():
    assert read_mask_size(encode_mask(np.zeros((3, 7), np.uint8))) == (3, 7)


def read_mask_size(data: bytes) -> tuple[int, int]:
    """Return the height and width in the header of a PNG file."""
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    return height, width

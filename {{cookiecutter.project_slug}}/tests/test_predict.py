"""Tests of tools/predict.py, tools/average.py and the selection of checkpoints."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import write_png
from marks import CLASSES_ONLY
from models import CHANNELS, tiny_network
from processes import SECONDS, run_ranks, run_train
from sklearn.metrics import f1_score
from small_data import make_data
from tables import assert_rejected
from test_scripts import environment
from torch import nn

import train
from batteries.core.errors import UserError
from batteries.data.image_files import ImageFiles
from batteries.data.splits import Split
from batteries.distributed import launch
from batteries.evaluation.inference import load_split
from batteries.evaluation.predictions import read_predictions
from batteries.evaluation.run_selection import find_checkpoint, read_config
from batteries.evaluation.tta import make_views
from experiment.augmentations import normalize, valid_transform
from tools import average, predict
from tools.predict import Options
from train import Config, Stage

STAGES = (Stage("one", 2, 3e-3), Stage("two", 1, 1e-3))

UNSIZED = pytest.mark.skipif(valid_transform() is not None, reason="the oracle does not resize images")


def network(num_classes: int) -> nn.Module:
    """Build a network with batch norm, whose statistics averaging has to estimate again."""
    return nn.Sequential(nn.BatchNorm2d(CHANNELS), tiny_network(num_classes))


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, predict, average):
            patch.setattr(module, "build_model", network)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_model):
    """The run directories of two folds."""
    folder, data_dir = tmp_path_factory.mktemp("runs"), make_data(tmp_path_factory.mktemp("data"))
    for fold in (0, 1):
        config = Config(
            stages=STAGES, data_dir=data_dir, logdir=folder / f"fold_{fold}", fold=fold, tracker=("none",), device="cpu"
        )
        run_ranks(1, lambda config=config: train.main(config), join=False)
    return [folder / "fold_0", folder / "fold_1"]


def config_of(run) -> Config:
    return read_config(run, Config)


def split_of(run) -> tuple:
    """Return the data set of a run and its split."""
    dataset = train.load_dataset(config_of(run).data_dir)
    return dataset, load_split(dataset, config_of(run), train.make_folds)._asdict()


def run_predict(*runs, ranks: int = 1, **options):
    """Return the result of predict.main on the first of `ranks` processes."""
    made = Options(run=runs, device="cpu", **options)
    return run_ranks(ranks, lambda: predict.main(made), join=False)[0]


def by_hand(run, name: str, path=None) -> np.ndarray:
    """Compute probabilities (N, C) of the best checkpoint, or of `path`, one sample at a time."""
    dataset, split = split_of(run)
    path = path or find_checkpoint(run, [stage.name for stage in STAGES], None, "best", minimize=False)
    model = network(len(dataset.classes))
    model.load_state_dict(torch.load(path, weights_only=True)["model_state_dict"])
    model.eval()
    with torch.inference_mode():
        rows = [model(normalize(dataset[index][0][None])).double().softmax(1).numpy() for index in split[name]]
    return np.concatenate(rows)


@CLASSES_ONLY
@UNSIZED
def test_every_sample_of_a_split_is_predicted_once_in_order(runs, tmp_path):
    made = run_predict(runs[0], output=tmp_path)
    dataset, split = split_of(runs[0])
    assert set(made) == {name for name in ("valid", "test") if name in split}
    for name, table in made.items():
        written = read_predictions(tmp_path / f"{name}.csv")
        assert list(written.ids) == [dataset.ids[index] for index in split[name]]
        assert written.classes == dataset.classes
        assert written.targets.tolist() == [int(dataset[index][1]) for index in split[name]]
        assert written.values.tobytes() == table.values.tobytes()
        assert written.values == pytest.approx(by_hand(runs[0], name), abs=1e-6)


@CLASSES_ONLY
@UNSIZED
@pytest.mark.parametrize(
    ("selection", "file"),
    [
        ({"checkpoint": "last"}, "two/last.pth"),
        ({"checkpoint": "last", "stage": "one"}, "one/last.pth"),
        ({"checkpoint": "{}/one/epoch_1.pth"}, "one/epoch_1.pth"),
    ],
)
def test_predictions_come_from_the_selected_checkpoint(runs, tmp_path, selection, file):
    selection = {name: value.format(runs[0]) for name, value in selection.items()}
    made = run_predict(runs[0], output=tmp_path, split="valid", **selection)["valid"]
    assert made.values == pytest.approx(by_hand(runs[0], "valid", runs[0] / file), abs=1e-6)


@CLASSES_ONLY
def test_the_score_of_the_best_checkpoint_equals_that_of_training(runs, tmp_path):
    table = run_predict(runs[0], output=tmp_path, split="valid")["valid"]
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert predict.score(table)["accuracy"] == max(line["valid"]["accuracy"] for line in lines)


@pytest.mark.parametrize(("ranks", "num_workers"), [(2, 0), (3, 0), (1, 2)])
def test_predictions_do_not_depend_on_processes_and_workers(runs, tmp_path, ranks, num_workers):
    for folder, count, workers in (("one", 1, 0), ("many", ranks, num_workers)):
        run_predict(runs[0], ranks=count, num_workers=workers, output=tmp_path / folder, batch_size=16)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batch_size_changes_predictions_only_by_rounding(runs, tmp_path, batch_size):
    first = run_predict(runs[0], output=tmp_path / "a", split="valid")["valid"]
    second = run_predict(runs[0], output=tmp_path / "b", split="valid", batch_size=batch_size)["valid"]
    assert second.values == pytest.approx(first.values, abs=1e-6)


def test_several_folds_give_out_of_fold_valid_and_mean_test(runs, tmp_path):
    together = run_predict(*runs, output=tmp_path / "both")
    single = [run_predict(run, output=tmp_path / run.name) for run in runs]
    rows = {}
    for tables in single:
        rows |= dict(zip(tables["valid"].ids, tables["valid"].values, strict=True))
    assert list(together["valid"].ids) == sorted(rows)  # the ids of the data sets are sorted
    assert np.array_equal(together["valid"].values, [rows[name] for name in together["valid"].ids])
    assert set(single[0]["valid"].ids).isdisjoint(single[1]["valid"].ids)
    for name in set(together) - {"valid"}:
        mean = np.mean([tables[name].values for tables in single], axis=0)
        assert together[name].values == pytest.approx(mean, abs=1e-15)


@CLASSES_ONLY
@UNSIZED
def test_tta_averages_the_views(runs, tmp_path):
    made = run_predict(runs[0], output=tmp_path, split="valid", tta="flip")["valid"]
    dataset, split = split_of(runs[0])
    plain = by_hand(runs[0], "valid")
    model = network(len(dataset.classes)).eval()
    path = find_checkpoint(runs[0], ["one", "two"], None, "best", minimize=False)
    model.load_state_dict(torch.load(path, weights_only=True)["model_state_dict"])
    images = torch.stack([dataset[index][0].flip(-1) for index in split["valid"]])
    with torch.inference_mode():
        mirrored = model(normalize(images)).double().softmax(1).numpy()
    assert made.values == pytest.approx((plain + mirrored) / 2, abs=1e-6)
    assert np.abs(plain - mirrored).max() > 1e-3


@pytest.mark.parametrize(("kind", "count"), [("none", 1), ("flip", 2), ("crops", 5), ("flip-crops", 10)])
def test_views_have_the_shape_of_the_images_and_start_with_them(kind, count):
    images = torch.randint(256, (3, 2, 16, 24), dtype=torch.uint8)
    views = make_views(images, kind)
    assert len(views) == count
    assert all(view.shape == images.shape for view in views)
    assert torch.equal(views[0], images)
    if "crops" in kind:
        padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
        assert np.array_equal(views[1].numpy(), padded[:, :, :16, :24])
        assert np.array_equal(views[4].numpy(), padded[:, :, 4:, 4:])
    if "flip" in kind:
        assert torch.equal(views[count // 2], images.flip(-1))


@UNSIZED
@pytest.mark.parametrize("listed", [False, True])
def test_images_of_a_directory_or_table_are_predicted_like_the_split(runs, tmp_path, listed):
    dataset, split = split_of(runs[0])
    folder = tmp_path / "photos"
    folder.mkdir()
    ids = [dataset.ids[index] for index in split["valid"]]
    for name, index in zip(ids, split["valid"], strict=True):
        write_png(dataset[index][0], folder / f"{name}.png")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints/1.png").write_bytes(b"rubbish")
    if listed:
        lines = ["id,path", *(f"{name},photos/{name}.png" for name in ids)]
        (tmp_path / "photos.csv").write_text("\n".join(lines))
    source = tmp_path / "photos.csv" if listed else folder
    made = run_predict(runs[0], images=source, output=tmp_path / "out")["photos"]
    assert list(made.ids) == (ids if listed else [f"{name}.png" for name in ids])
    assert made.targets is None
    wanted = run_predict(runs[0], output=tmp_path / "valid", split="valid")["valid"]
    assert made.values == pytest.approx(wanted.values, abs=1e-6)


def test_a_table_of_images_with_an_empty_id_is_rejected(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "photos.csv").write_text("id,path\none,a.png\n,a.png\n")
    with pytest.raises(UserError, match=r"--images .*photos\.csv has an empty id, in row 2\."):
        ImageFiles(tmp_path / "photos.csv", 3)


@pytest.mark.parametrize("position", [20, 60, -30])
def test_a_damaged_png_is_rejected_with_its_path(tmp_path, position):
    file = tmp_path / "a.png"
    write_png(torch.arange(3 * 64, dtype=torch.uint8).view(3, 8, 8), file)
    assert ImageFiles(tmp_path, 3)[0][0].shape == (3, 8, 8)
    data = bytearray(file.read_bytes())
    data[position] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image: it is empty, damaged or not an image\."):
        ImageFiles(tmp_path, 3)[0]


@UNSIZED
def test_images_of_different_sizes_are_rejected_with_their_names(runs, tmp_path):
    for size in (8, 9):
        write_png(torch.zeros(CHANNELS, size, size, dtype=torch.uint8), tmp_path / f"{size}.png")
    end = call_predict("--run", runs[0], "--images", tmp_path, "--output", tmp_path / "out")
    shapes = f"({CHANNELS}, 8, 8) of 8.png and ({CHANNELS}, 9, 9) of 9.png"
    assert_rejected_after_loading(end, f"images of one batch have different shapes: {shapes}; resize all to one size")
    assert not (tmp_path / "out").exists()


def assert_rejected_after_loading(end, message: str) -> None:
    """Assert exit code 2 and one line on stderr with `message`; stdout has a line about the checkpoint."""
    assert (end.code, end.err.count("\n")) == (2, 1), end
    assert message in end.err


@CLASSES_ONLY
def test_the_scores_of_the_options_of_the_run_are_printed(runs, monkeypatch, tmp_path):
    config = dataclasses.replace(config_of(runs[0]), scores=("macro_f1", "balanced_accuracy"))
    monkeypatch.setattr("batteries.evaluation.inference.read_config", lambda *_: config)
    end = call_predict("--run", runs[0], "--split", "valid", "--output", tmp_path)
    table = read_predictions(tmp_path / "valid.csv")
    macro_f1 = f1_score(table.targets, table.values.argmax(1), average="macro")
    assert f"  macro_f1 {macro_f1:.4f}" in end.out
    assert "  balanced_accuracy 0." in end.out
    assert "roc_auc" not in end.out


def call_predict(*flags: object):
    return run_train(predict.main, Options, "--device", "cpu", *map(str, flags), name="tools/predict.py", repeats=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--run", "nowhere"],
            "--run nowhere does not hold a run (config.json is missing); give a run directory, such as logs/baseline.",
        ),
        (["--run", "{0}/one"], "--run {0}/one does not hold a run (config.json is missing); give the run, {0}."),
        (["--run", "{0}/.."], "(config.json is missing); give one of its runs, such as {0}/../"),
        (["--run", "{0}", "{1}"], "several runs need --output, a directory for their common predictions."),
        (
            ["--run", "{0}", "--stage", "tow"],
            "--stage tow is not a stage of {0}; did you mean 'two'? Its stages: one, two.",
        ),
        (["--run", "{0}", "--checkpoint", "swa"], "{0} has no swa.pth; run tools/average.py first."),
        (["--run", "{0}", "--checkpoint", "no.pth"], "no.pth does not exist; give the path of a checkpoint"),
        (["--run", "{0}", "--checkpoint", "{0}"], " is a directory; give the path of a checkpoint"),
        (["--run", "{0}", "--split", "train"], "--split train is not a valid choice"),
        (["--run", "{0}", "--batch-size", "0"], "--batch-size 0 must be 1 or more."),
        (["--run", "{0}", "--images", "nowhere"], "--images nowhere has no images (.jpg, .jpeg, .png, .webp, .gif)"),
        (["--run"], "--run needs a run directory, such as logs/baseline."),
        (["--run", "{0}", "{0}/", "--output", "x"], "--run {0} is given twice; it would count twice in the mean."),
    ],
)
def test_invalid_options_are_rejected_without_side_effects(runs, flags, message, tmp_path):
    end = call_predict(*(flag.format(*runs) for flag in flags))
    assert (end.code, end.err.count("\n")) == (2, 1), end
    assert message.format(*runs) in end.err
    assert not any((run / "predictions").exists() for run in runs)


def test_launcher_without_a_python_file_is_rejected(capsys):
    for command, given in (([], "no argument"), (["no_such.py", "--seed", "1"], "no_such.py")):
        assert launch.main(command) == 2
        assert capsys.readouterr().err == f"error: the launcher needs a Python file, such as train.py, not {given}.\n"


def test_run_without_a_checkpoint_is_rejected_with_what_to_do(runs, tmp_path):
    for name in ("config.json", "run.json"):
        shutil.copy(runs[0] / name, tmp_path)
    hint = "has no best.pth; it has no checkpoint yet; continue it with --resume."
    assert f"error: {tmp_path} {hint}" in call_predict("--run", tmp_path).err
    assert_rejected(
        call_average("--run", tmp_path),
        f"{tmp_path} has no best.pth, from a complete epoch with a finite score; train it first",
    )
    (tmp_path / "one").mkdir()
    shutil.copy(runs[0] / "one/last.pth", tmp_path / "one/last.pth")
    hint = "has no best.pth; no complete epoch has a finite score; use --checkpoint last."
    assert f"error: {tmp_path} {hint}" in call_predict("--run", tmp_path).err


@pytest.mark.slow
def test_the_launcher_passes_flags_to_predict():
    command = [
        sys.executable,
        "-m",
        "batteries.distributed.launch",
        "tools/predict.py",
        "--run",
        "nowhere",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        command,
        cwd=Path(predict.__file__).parents[1],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "--run nowhere does not hold a run" in done.stderr


def test_predict_prints_that_test_is_the_mean_of_several_models(runs, tmp_path):
    together = call_predict("--run", *runs, "--output", tmp_path)
    single = call_predict("--run", runs[0], "--output", tmp_path / "one")
    assert (together.code, single.code) == (0, 0), together.err + single.err
    has_test = len(split_of(runs[0])[1].get("test", ())) > 0
    assert ("note     test is the mean of 2 models" in together.out) == has_test
    assert "note" not in single.out


@CLASSES_ONLY
def test_the_test_split_is_scored_and_compared_with_valid(runs, tmp_path):
    end = call_predict("--run", runs[0], "--output", tmp_path)
    assert end.code == 0, end.err
    table = read_predictions(tmp_path / "test.csv")
    accuracy = np.mean(table.values.argmax(1) == table.targets)
    assert f"test     {len(table.ids):,} rows  accuracy {accuracy:.4f}" in end.out
    assert "gap      accuracy of test minus valid " in end.out
    log_loss = -np.log(table.values[np.arange(len(table.ids)), table.targets]).mean()
    assert f"  log_loss {log_loss:.4f}  in " in end.out
    assert "gap      log_loss of test minus valid " in end.out
    assert " loss " not in end.out


def test_different_predictions_are_not_overwritten(runs, tmp_path):
    flags = ["--run", runs[0], "--split", "valid", "--output", tmp_path]
    assert call_predict(*flags).code == 0
    before = (tmp_path / "valid.csv").read_bytes()
    assert call_predict(*flags).code == 0
    end = call_predict(*flags, "--tta", "flip")
    assert "already exists with different contents; give --overwrite" in end.err
    assert (end.code, (tmp_path / "valid.csv").read_bytes()) == (2, before)
    assert call_predict(*flags, "--tta", "flip", "--overwrite").code == 0
    assert (tmp_path / "valid.csv").read_bytes() != before


def test_no_file_is_written_if_one_is_rejected(runs, tmp_path):
    (tmp_path / "test.csv").write_text("mine\n")
    end = call_predict("--run", runs[0], "--output", tmp_path)
    assert (end.code, [path.name for path in tmp_path.iterdir()]) == (2, ["test.csv"])
    assert "test.csv already exists with different contents" in end.err


def test_a_different_split_than_that_of_training_is_rejected(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "batteries.evaluation.inference.load_split", lambda *_: Split(np.arange(9), np.arange(5), np.arange(0))
    )
    end = call_predict("--run", runs[0], "--output", tmp_path / "out")
    assert end.code == 2
    assert f"--run {runs[0]} was trained on different data, or on a different split of the data, than" in end.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_swa_json_is_reported(tmp_path):
    write_manifest(tmp_path / "a", 0.5, ("best.pth", "swa.pth"))
    (tmp_path / "a/swa.json").write_text('{"score')
    with pytest.raises(UserError, match=r"swa\.json is damaged \("):
        find_checkpoint(tmp_path, ["a"], None, "swa", minimize=False)


def write_manifest(folder, score, files=("best.pth", "last.pth")) -> None:
    folder.mkdir()
    manifest = {"checkpoints": [], "best": {"epoch": 1, "score": score}}
    (folder / "checkpoints.json").write_text(json.dumps(manifest))
    for name in files:
        (folder / name).touch()


@pytest.mark.parametrize(
    ("scores", "minimize", "stage", "which", "found"),
    [
        ((0.5, 0.9, 0.9), False, None, "best", "b/best.pth"),  # a tie keeps the earlier
        ((0.5, 0.9, 0.9), True, None, "best", "a/best.pth"),
        ((None, 0.9, 0.1), True, None, "best", "c/best.pth"),
        ((0.5, 0.9, 0.9), False, None, "last", "c/last.pth"),
        ((0.5, 0.9, 0.9), False, "a", "best", "a/best.pth"),
        ((0.5, 0.9, 0.9), False, "a", "last", "a/last.pth"),
    ],
)
def test_the_default_stage_is_the_one_with_the_best_score(tmp_path, scores, minimize, stage, which, found):
    for name, score in zip("abc", scores, strict=True):
        write_manifest(tmp_path / name, score, ("last.pth",) if score is None else ("best.pth", "last.pth"))
    assert find_checkpoint(tmp_path, ["a", "b", "c"], stage, which, minimize=minimize) == tmp_path / found


def call_average(*flags: object):
    options = ("--device", "cpu", *map(str, flags))
    return run_train(average.main, average.Options, *options, name="tools/average.py", repeats=False)


@CLASSES_ONLY
def test_an_average_is_scored_saved_and_used_for_prediction(runs, tmp_path):
    end = call_average("--run", runs[1] / "one")
    assert end.code == 0, end.err
    note = json.loads((runs[1] / "one/swa.json").read_text())
    assert set(note["scores"]) == {"epoch_1.pth", "epoch_2.pth", "mean of all", "greedy"}
    assert note["score"] == max(note["scores"].values())
    made = run_predict(runs[1], checkpoint="swa", split="valid", output=tmp_path)["valid"]
    assert predict.score(made)["accuracy"] == note["score"]
    assert_rejected(call_average("--run", runs[1] / "one"), "swa.pth already exists; give --overwrite to replace it.")
    assert call_average("--run", runs[1] / "one", "--overwrite").code == 0
    assert json.loads((runs[1] / "one/swa.json").read_text()) == note
    data = bytearray((runs[1] / "one/swa.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (runs[1] / "one/swa.pth").write_bytes(data)
    end = call_predict("--run", runs[1], "--checkpoint", "swa", "--output", tmp_path / "damaged")
    assert "swa.pth does not match the sha256 in swa.json next to it: it is truncated or was changed" in end.err
    (runs[1] / "one/swa.pth").unlink()
    (runs[1] / "one/swa.json").unlink()


@CLASSES_ONLY
def test_average_saves_the_best_checkpoint_if_averaging_does_not_help(runs, monkeypatch):
    scores = iter([0.9, 0.8, 0.9, 0.9, 0.9, 0.9])  # each checkpoint, the mean, the greedy steps, the choice again
    monkeypatch.setattr(average, "valid_fn", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    end = call_average("--run", runs[1] / "one")
    assert end.code == 0, end.err
    assert "averaging did not help: no average is better than epoch_" in end.out
    note = json.loads((runs[1] / "one/swa.json").read_text())
    single = torch.load(runs[1] / "one" / note["files"][0], weights_only=True)["model_state_dict"]
    kept = torch.load(runs[1] / "one/swa.pth", weights_only=True)["model_state_dict"]
    assert len(note["files"]) == 1
    assert all(torch.equal(single[name], kept[name]) for name in single)
    (runs[1] / "one/swa.pth").unlink()
    (runs[1] / "one/swa.json").unlink()


@CLASSES_ONLY
def test_scores_of_equally_named_checkpoints_are_separate(runs, monkeypatch):
    scores = iter([0.9, 0.8, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr(average, "valid_fn", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    files = [runs[1] / name / "best.pth" for name in ("two", "one")]
    end = call_average("--run", runs[1] / "one", "--checkpoints", *files)
    assert end.code == 0, end.err
    assert "accuracy 0.9000  two/best.pth\naccuracy 0.8000  one/best.pth\n" in end.out
    note = json.loads((runs[1] / "one/swa.json").read_text())
    assert (note["scores"]["two/best.pth"], note["scores"]["one/best.pth"]) == (0.9, 0.8)
    assert note["files"] == ["two/best.pth"]
    (runs[1] / "one/swa.pth").unlink()
    (runs[1] / "one/swa.json").unlink()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--run", "nowhere"],
            "--run nowhere does not hold a run (config.json is missing); give a run directory, such as logs/baseline.",
        ),
        (
            ["--run", "{}/one", "--checkpoints", "best:1"],
            "--checkpoints best:1 selects 1 of {}/one, and an average needs",
        ),
        (
            ["--run", "{}/one", "--checkpoints", "best"],
            "--checkpoints best is not a file; give best:5, last:3, or paths",
        ),
    ],
)
def test_average_rejects_invalid_options(runs, flags, message):
    assert_rejected(call_average(*(flag.format(runs[0]) for flag in flags)), message.format(runs[0]))
    assert not (runs[0] / "one/swa.pth").exists()

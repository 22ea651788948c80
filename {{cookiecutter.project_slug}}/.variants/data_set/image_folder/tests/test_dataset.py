"""Image directories: official splits, invalid data, and test files that training never opens."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import patterned_images, write_jpeg
from models import tiny_network
from processes import End, run_train
from small_runs import assert_rejected, train_on

from batteries.core.errors import UserError
from batteries.data.dataset import UNKNOWN
from batteries.data.splits import TEST, SplitFile
from batteries.evaluation.inference import open_images
from batteries.evaluation.predictions import read_predictions
from experiment.dataset import ImageFolder
from experiment.images import read_image
from experiment.splits import make_folds
from tools import predict

LABELS = [0, 1] * 20


def write_classes(root: Path, labels: list[int] = LABELS) -> Path:
    """Write cats and dogs to `root`, as small JPEG files of two sizes."""
    for index, label in enumerate(labels):
        path = root / ("cats", "dogs")[label] / f"{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(torch.from_numpy(patterned_images([label], 3, 16 + index % 2 * 8)[0]), path)
    return root


def test_classes_are_directories_and_hidden_or_other_files_are_ignored(tmp_path):
    write_classes(tmp_path / "data")
    for name in ("data/.gitkeep", "data/cats/.thumb.jpg", "data/cats/notes.txt", "data/readme.md"):
        (tmp_path / name).touch()
    for name in ("data/.Trash/1.jpg", "data/cats/.ipynb_checkpoints/00.jpg", "data/cats/.a/b/00.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    dataset = ImageFolder(tmp_path / "data")
    assert dataset.classes == ("cats", "dogs")
    assert dataset.ids[:2] == ["cats/00.jpg", "cats/02.jpg"]
    assert np.bincount(dataset.targets).tolist() == [20, 20]


def test_an_official_test_split_is_held_out(tmp_path):
    for name in ("train", "test"):
        write_classes(tmp_path / "data" / name)
    dataset = ImageFolder(tmp_path / "data")
    split = SplitFile(tmp_path / "x.csv", dataset, make_folds).select(0)
    assert {dataset.ids[index].split("/")[0] for index in split.test} == {"test"}
    assert {dataset.ids[index].split("/")[0] for index in [*split.train, *split.valid]} == {"train"}


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_an_official_validation_split_is_fold_0(tmp_path, valid):
    for name in ("train", valid, "test"):
        write_classes(tmp_path / "data" / name)
    dataset = ImageFolder(tmp_path / "data")
    split = SplitFile(tmp_path / "x.csv", dataset, make_folds).select(0)
    for name, indices in zip(("train", valid, "test"), split, strict=True):
        assert {dataset.ids[index].split("/")[0] for index in indices} == {name}


def test_training_does_not_open_official_test_files(tmp_path):
    for name in ("train", "test"):
        write_classes(tmp_path / "data" / name)
    for path in (tmp_path / "data/test").rglob("*.jpg"):
        path.write_bytes(b"invalid")
    end = train_on(tmp_path / "data", tmp_path)
    assert end.code == 0, end.err
    assert "data     train 32, valid 8, test 40" in end.out


def test_training_does_not_open_held_out_files(tmp_path):
    dataset = ImageFolder(write_classes(tmp_path / "data"))
    splits = SplitFile(tmp_path / "x.csv", dataset, make_folds)
    splits.write()
    for index in np.flatnonzero(splits.folds == TEST):
        (tmp_path / "data" / dataset.ids[index]).write_bytes(b"invalid")
    end = train_on(tmp_path / "data", tmp_path)
    assert end.code == 0, end.err


@pytest.mark.parametrize("directories", [[], ["cats"], ["train"]])
def test_an_empty_directory_is_rejected(tmp_path, directories):
    (tmp_path / "data").mkdir()
    for name in directories:
        (tmp_path / "data" / name).mkdir()
    assert_rejected(
        train_on(tmp_path / "data", tmp_path),
        f"--data-dir {tmp_path / 'data'} has no images in directories of classes,",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("directories", "message"),
    [
        (
            ["train", "validation"],
            "has a directory train, so its directories must be splits named train, valid and test in lower case, but "
            "it has validation; rename or move these,",
        ),
        (
            ["Train", "Test"],
            "in lower case, but it has Test, Train; rename or move these, or",
        ),
    ],
)
def test_a_directory_next_to_train_that_is_not_a_split_is_rejected(tmp_path, directories, message):
    for name in directories:
        write_classes(tmp_path / "data" / name)
    (tmp_path / "data/notes").mkdir()
    assert_rejected(train_on(tmp_path / "data", tmp_path), message, tmp_path)


def test_a_class_with_the_name_train_is_rejected(tmp_path):
    write_classes(tmp_path / "data").joinpath("dogs").rename(tmp_path / "data/train")
    end = train_on(tmp_path / "data", tmp_path)
    assert_rejected(end, "in lower case, but it has cats;", tmp_path)
    assert "or rename train if it is a class." in end.err


@pytest.mark.parametrize("directory", ["data", "data/train"])
def test_images_outside_class_directories_are_counted(tmp_path, directory):
    write_classes(tmp_path / "x").joinpath("dogs").rename(tmp_path / "y")
    (tmp_path / directory).parent.mkdir(exist_ok=True)
    (tmp_path / "y").rename(tmp_path / directory)
    message = f"has no images in directories of classes, such as {tmp_path / directory}/cats/1.jpg; left out: 20 in no"
    assert_rejected(train_on(tmp_path / "data", tmp_path), message, tmp_path)


def test_a_single_class_is_rejected_and_its_subdirectories_suggested(tmp_path):
    write_classes(tmp_path / "data/archive")
    message = "has only one class, archive; add directories of other classes, or use --data-dir "
    assert_rejected(train_on(tmp_path / "data", tmp_path), message, tmp_path)


@pytest.mark.parametrize("names", [["Testing", "Training"], ["test", "valid"]])
def test_splits_without_train_are_not_accepted_as_classes(tmp_path, names):
    for name in names:
        write_classes(tmp_path / "data" / name)
    message = f"has the directories {names[0]}, {names[1]}, which are splits and not classes; rename them to train,"
    assert_rejected(train_on(tmp_path / "data", tmp_path), message, tmp_path)


def test_a_link_to_a_directory_is_followed_once(tmp_path):
    write_classes(tmp_path / "data")
    write_classes(tmp_path / "elsewhere", [0] * 3)
    (tmp_path / "data/cats/more").symlink_to(tmp_path / "elsewhere/cats", target_is_directory=True)
    (tmp_path / "data/cats/itself").symlink_to(tmp_path / "data/cats", target_is_directory=True)
    dataset = ImageFolder(tmp_path / "data")
    assert np.bincount(dataset.targets).tolist() == [23, 20]
    assert "cats/more/00.jpg" in dataset.ids


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            b"cats/caf\xe9.jpg",
            r"has a file named 'cats/caf\xe9.jpg', which a table cannot contain because the name is not UTF-8; rename "
            "it, or convert all names, such as with convmv -r -f latin1 -t utf8 --notest.",
        ),
        (b"cats/caf\xe9/1.jpg", r"has a file named 'cats/caf\xe9/1.jpg', which a table cannot contain"),
        (b"caf\xe9/1.jpg", r"has a file named 'caf\xe9/1.jpg', which a table cannot contain"),
        (b"cats/a\rb.jpg", r"has a file named 'cats/a\rb.jpg', which a table cannot contain; rename it."),
    ],
)
def test_a_file_name_that_a_table_cannot_contain_is_rejected(tmp_path, name, message):
    root = write_classes(tmp_path / "data")
    path = root / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    (root / "cats/00.jpg").rename(path)
    assert_rejected(train_on(root, tmp_path), message, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_a_left_out_file_with_a_latin_1_name_is_printed(tmp_path):
    root = write_classes(tmp_path / "data")
    for name in (b"caf\xe9", b"1.caf\xe9"):
        (root / "cats" / os.fsdecode(name)).touch()
    assert ImageFolder(root).left_out == r"1 .caf\xe9, 1 caf\xe9"


def test_files_of_other_types_are_counted(tmp_path):
    write_classes(tmp_path / "data")
    for name in ("cats/1.bmp", "dogs/2.bmp", "dogs/3.TIF"):
        (tmp_path / "data" / name).touch()
    (tmp_path / "data/4.jpg").touch()
    assert ImageFolder(tmp_path / "data").left_out == "2 .bmp, 1 .tif, 1 in no class directory"
    for path in (tmp_path / "data").rglob("*.jpg"):
        path.unlink()
    message = (
        "data has no images in directories of classes, such as {}/cats/1.jpg; left out: 2 .bmp, 1 .tif (supported:"
    )
    assert_rejected(train_on(tmp_path / "data", tmp_path), message.format(tmp_path / "data"), tmp_path)


def test_a_missing_directory_is_rejected(tmp_path):
    assert_rejected(train_on(tmp_path / "nowhere", tmp_path), "nowhere has no images", tmp_path)


def test_a_class_with_one_image_is_rejected(tmp_path):
    write_classes(tmp_path / "data", [0] * 39 + [1])
    assert_rejected(train_on(tmp_path / "data", tmp_path), "class dogs has 1 sample, too few for 6 subsets", tmp_path)


def test_a_class_that_only_the_test_directory_has_is_rejected(tmp_path):
    write_classes(tmp_path / "data/train", [0] * 40)
    write_classes(tmp_path / "data/test")
    message = (
        "has test/dogs, but train has no directory of that name, so the class has 0 samples for training; rename it to "
        "one of cats, or move images whose classes are not known to test/unknown."
    )
    assert_rejected(train_on(tmp_path / "data", tmp_path), message, tmp_path)


def call_predict(tmp_path: Path, *flags: object) -> End:
    flags = ("--run", tmp_path / "run", "--device", "cpu", *flags)
    return run_train(predict.main, predict.Options, *map(str, flags), name="tools/predict.py", repeats=False)


def test_test_images_of_unknown_classes_are_predicted_and_not_trained_on(monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "build_model", tiny_network)
    write_classes(tmp_path / "data/train")
    write_classes(tmp_path / "data/test", [0] * 3)
    write_classes(tmp_path / "elsewhere", [1] * 2)
    (tmp_path / "elsewhere/dogs").rename(tmp_path / "data/test/unknown")
    dataset = ImageFolder(tmp_path / "data")
    assert dataset.classes == ("cats", "dogs")
    assert dataset.targets[dataset.official_test].tolist() == [0, 0, 0, UNKNOWN, UNKNOWN]
    assert dataset.ids[-1] == "test/unknown/01.jpg"
    end = train_on(tmp_path / "data", tmp_path)
    assert end.code == 0, end.err
    end = call_predict(tmp_path)
    assert end.code == 0, end.err
    table = read_predictions(tmp_path / "run/predictions/test.csv")
    assert (list(table.ids), table.targets) == (dataset.ids[-5:], None)


def test_images_are_predicted_as_they_are_trained_on(monkeypatch, tmp_path):
    """The same reader, suffixes and links; other files are counted and named."""
    monkeypatch.setattr(predict, "build_model", tiny_network)
    monkeypatch.setattr("experiment.dataset.read_image", lambda path: read_image(path) >> 4)
    root = write_classes(tmp_path / "data")
    write_classes(tmp_path / "elsewhere", [0] * 3)
    (root / "cats/more").symlink_to(tmp_path / "elsewhere/cats", target_is_directory=True)
    (root / "cats/00.jpg").rename(root / "cats/00.PNG")
    for name in ("cats/scan.tif", "cats/b.bmp", "cats/more/c.jfif", "dogs/.hidden.bmp"):
        (root / name).touch()
    assert train_on(root, tmp_path).code == 0
    assert call_predict(tmp_path, "--split", "valid").code == 0
    end = call_predict(tmp_path, "--images", root, "--output", tmp_path / "out")
    assert end.code == 0, end.err
    assert "left out 3 files (1 .bmp, 1 .jfif, 1 .tif): cats/b.bmp, cats/more/c.jfif, cats/scan.tif\n" in end.out
    table, valid = read_predictions(tmp_path / "out/data.csv"), read_predictions(tmp_path / "run/predictions/valid.csv")
    assert list(table.ids) == ImageFolder(root).ids
    rows = [table.ids.index(name) for name in valid.ids]
    np.testing.assert_allclose(table.values[rows], valid.values, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: (root / "a.jpg").touch(), "a.jpg cannot be read as an image (it is empty)."),
        (lambda root: (root / "a.tif").touch(), "has no images (.jpg, .jpeg, .png, .webp, .gif); left out: 1 file (1 "),
        (lambda root: (root / os.fsdecode(b"caf\xe9.jpg")).touch(), r"has a file named 'caf\xe9.jpg', which a table"),
    ],
)
def test_images_that_cannot_be_predicted_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError) as error:
        open_images(tmp_path, ImageFolder(write_classes(tmp_path / ".data")), 3)[0]
    assert message in str(error.value)


@pytest.mark.parametrize("names", [["unknown"], ["cats", "unknown"]])
def test_an_unknown_class_elsewhere_is_a_class_or_rejected(tmp_path, names):
    write_classes(tmp_path / "data/train")
    write_classes(tmp_path / "data/valid")
    for name in ("cats", "dogs")[-len(names) :]:
        (tmp_path / "data/valid" / name).rename(tmp_path / "data/valid" / names.pop())
    end = train_on(tmp_path / "data", tmp_path)
    assert_rejected(end, "data has valid/unknown, but train has no directory of that name", tmp_path)
    assert "test/unknown" not in end.err


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_numeric_classes_are_in_numeric_order_and_2_0_is_2(tmp_path, prefix):
    names = ["10", "b", "1", "2", "a", "2.0", "11"]
    for name in names:
        write_classes(tmp_path / "x", [0])
        (tmp_path / "data" / prefix).mkdir(parents=True, exist_ok=True)
        (tmp_path / "x/cats").rename(tmp_path / "data" / prefix / name)
    dataset = ImageFolder(tmp_path / "data")
    assert dataset.classes == ("1", "2", "10", "11", "a", "b")
    classes = {name: dataset.classes[target] for name, target in zip(dataset.ids, dataset.targets, strict=True)}
    assert classes == {f"{prefix}{name}/00.jpg": "2" if name == "2.0" else name for name in names}


def validation_file(root: Path, tmp_path: Path) -> str:
    """Return the name of a file of the valid split."""
    dataset = ImageFolder(root)
    return dataset.ids[int(SplitFile(tmp_path / "other.csv", dataset, make_folds).select(0).valid[0])]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"hello",
        lambda data: data[:400],
        lambda data: data[:400] + data[-2:],  # closed again
        lambda data: data[:20] + bytes(len(data) - 40) + data[-20:],
    ],
)
def test_invalid_and_truncated_files_are_reported_before_training(tmp_path, damage):
    name = validation_file(write_classes(tmp_path / "data"), tmp_path)
    path = tmp_path / "data" / name
    path.write_bytes(damage(path.read_bytes()))
    message = (
        f"data has 1 truncated or invalid file: {name}; fix or remove them. The first error: {path} cannot be read"
    )
    assert_rejected(train_on(tmp_path / "data", tmp_path), message, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_ends_the_run_with_its_name(monkeypatch, tmp_path, num_workers):
    monkeypatch.setattr(ImageFolder, "check", lambda *_: None)  # as if it had been damaged since
    name = validation_file(write_classes(tmp_path / "data"), tmp_path)
    path = tmp_path / "data" / name
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes(len(data) - 40) + data[-20:])
    end = train_on(tmp_path / "data", tmp_path, "--num-workers", str(num_workers))
    assert (end.code, end.err.count("\n")) == (2, 1), end.err
    assert f"data/{name} cannot be read as an image (" in end.err

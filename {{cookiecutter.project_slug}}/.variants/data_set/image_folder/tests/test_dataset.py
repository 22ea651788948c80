"""Image directories: official splits, invalid data, and test files that training never opens."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import patterned_images
from small_runs import assert_rejected, train_on
from torchvision.io import write_jpeg

from batteries.data.splits import TEST, SplitFile
from experiment.dataset import ImageFolder
from experiment.splits import make_folds

LABELS = [0, 1] * 20


def write_classes(root: Path, labels: list[int] = LABELS) -> Path:
    """Write cats and dogs to `root`, as small JPEG files of two sizes."""
    for index, label in enumerate(labels):
        path = root / ("cats", "dogs")[label] / f"{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(torch.from_numpy(patterned_images([label], 3, 16 + index % 2 * 8)[0]), str(path))
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
@pytest.mark.parametrize("name", [b"\xff.jpg", b"a\rb.jpg"])
def test_a_file_name_that_a_table_cannot_contain_is_rejected(tmp_path, name):
    root = write_classes(tmp_path / "data")
    (root / "cats/00.jpg").rename(root / "cats" / os.fsdecode(name))
    end = train_on(root, tmp_path)
    shown = repr(f"cats/{os.fsdecode(name)}")
    assert_rejected(end, f"has a file named {shown}, which a table cannot contain; rename it.", tmp_path)


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
    assert_rejected(train_on(tmp_path / "data", tmp_path), "class dogs has 0 samples", tmp_path)


def validation_file(root: Path, tmp_path: Path) -> str:
    """Return the name of a file of the valid split."""
    dataset = ImageFolder(root)
    return dataset.ids[int(SplitFile(tmp_path / "other.csv", dataset, make_folds).select(0).valid[0])]


@pytest.mark.parametrize("damage", [lambda data: b"hello", lambda data: data[:400]])
def test_invalid_and_truncated_files_are_reported_before_training(tmp_path, damage):
    name = validation_file(write_classes(tmp_path / "data"), tmp_path)
    path = tmp_path / "data" / name
    path.write_bytes(damage(path.read_bytes()))
    message = f"data has 1 truncated or invalid file: {name}; fix or remove them."
    assert_rejected(train_on(tmp_path / "data", tmp_path), message, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_ends_the_run_with_its_name(tmp_path, num_workers):
    name = validation_file(write_classes(tmp_path / "data"), tmp_path)
    path = tmp_path / "data" / name
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes(len(data) - 40) + data[-20:])
    end = train_on(tmp_path / "data", tmp_path, "--num-workers", str(num_workers))
    assert (end.code, end.err.count("\n")) == (2, 1), end.err
    assert f"data/{name} cannot be read as an image (" in end.err

"""Folders of images: splits of their own, what is wrong with them, and test files that training never opens."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import patterned
from small_runs import assert_refused, train_on
from torchvision.io import write_jpeg

from batteries.data.splits import TEST, SplitFile
from experiment.dataset import ImageFolder
from experiment.splits import make_folds

LABELS = [0, 1] * 20


def write_classes(root: Path, labels: list[int] = LABELS) -> Path:
    """Cats and dogs in `root`, as small JPEG files of two sizes."""
    for index, label in enumerate(labels):
        path = root / ("cats", "dogs")[label] / f"{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(torch.from_numpy(patterned([label], 3, 16 + index % 2 * 8)[0]), str(path))
    return root


def test_a_folder_for_each_class_is_a_data_set_and_hidden_files_and_others_are_left_out(tmp_path):
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
    for part in ("train", "test"):
        write_classes(tmp_path / "data" / part)
    dataset = ImageFolder(tmp_path / "data")
    split = SplitFile(tmp_path / "x.csv", dataset, make_folds).select(0)
    assert {dataset.ids[index].split("/")[0] for index in split.test} == {"test"}
    assert {dataset.ids[index].split("/")[0] for index in [*split.train, *split.valid]} == {"train"}


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_an_official_validation_split_is_fold_0(tmp_path, valid):
    for part in ("train", valid, "test"):
        write_classes(tmp_path / "data" / part)
    dataset = ImageFolder(tmp_path / "data")
    split = SplitFile(tmp_path / "x.csv", dataset, make_folds).select(0)
    for name, part in zip(("train", valid, "test"), split, strict=True):
        assert {dataset.ids[index].split("/")[0] for index in part} == {name}


def test_training_opens_no_test_file_and_trains_where_they_are_rubbish(tmp_path):
    for part in ("train", "test"):
        write_classes(tmp_path / "data" / part)
    for path in (tmp_path / "data/test").rglob("*.jpg"):
        path.write_bytes(b"rubbish")
    end = train_on(tmp_path / "data", tmp_path)
    assert end.code == 0, end.err
    assert "data     train 32, valid 8, test 40" in end.out


def test_held_out_files_are_not_opened_either(tmp_path):
    dataset = ImageFolder(write_classes(tmp_path / "data"))
    splits = SplitFile(tmp_path / "x.csv", dataset, make_folds)
    splits.write()
    for index in np.flatnonzero(splits.folds == TEST):
        (tmp_path / "data" / dataset.ids[index]).write_bytes(b"rubbish")
    end = train_on(tmp_path / "data", tmp_path)
    assert end.code == 0, end.err


@pytest.mark.parametrize("folders", [[], ["cats"], ["train"]])
def test_an_empty_folder_is_refused(tmp_path, folders):
    (tmp_path / "data").mkdir()
    for name in folders:
        (tmp_path / "data" / name).mkdir()
    assert_refused(
        train_on(tmp_path / "data", tmp_path), f"--data-dir {tmp_path / 'data'} has no images in folders of", tmp_path
    )


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (
            ["train", "validation"],
            "has a folder train and so is cut in parts, but validation is none: these are called",
        ),
        (["Train", "Test"], "but Test, Train are none: these are called train, valid and test, in small letters;"),
    ],
)
def test_a_folder_beside_train_that_is_no_part_is_refused(tmp_path, folders, sentence):
    for name in folders:
        write_classes(tmp_path / "data" / name)
    (tmp_path / "data/notes").mkdir()
    assert_refused(train_on(tmp_path / "data", tmp_path), sentence, tmp_path)


def test_a_class_that_is_called_train_is_refused_and_said_to_be_the_reason(tmp_path):
    write_classes(tmp_path / "data").joinpath("dogs").rename(tmp_path / "data/train")
    end = train_on(tmp_path / "data", tmp_path)
    assert_refused(end, "but cats is none", tmp_path)
    assert "or, where train is a class, call that otherwise." in end.err


@pytest.mark.parametrize("folder", ["data", "data/train"])
def test_images_in_no_folder_of_a_class_are_said_to_be_there(tmp_path, folder):
    write_classes(tmp_path / "x").joinpath("dogs").rename(tmp_path / "y")
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / "y").rename(tmp_path / folder)
    sentence = f"has no images in folders of classes, such as {tmp_path / folder}/cats/1.jpg; left out: 20 in no"
    assert_refused(train_on(tmp_path / "data", tmp_path), sentence, tmp_path)


def test_one_class_is_refused_and_folders_in_it_are_said(tmp_path):
    write_classes(tmp_path / "data/archive")
    sentence = (
        "has one class alone, archive; give a folder for each of two or more, such as those in it, by --data-dir "
    )
    assert_refused(train_on(tmp_path / "data", tmp_path), sentence, tmp_path)


@pytest.mark.parametrize("parts", [["Testing", "Training"], ["test", "valid"]])
def test_parts_of_a_split_without_train_are_no_classes(tmp_path, parts):
    for part in parts:
        write_classes(tmp_path / "data" / part)
    sentence = f"has the folders {parts[0]}, {parts[1]}, which are no classes but parts of a split; call them train,"
    assert_refused(train_on(tmp_path / "data", tmp_path), sentence, tmp_path)


def test_a_link_to_a_folder_is_followed_once(tmp_path):
    write_classes(tmp_path / "data")
    write_classes(tmp_path / "elsewhere", [0] * 3)
    (tmp_path / "data/cats/more").symlink_to(tmp_path / "elsewhere/cats", target_is_directory=True)
    (tmp_path / "data/cats/itself").symlink_to(tmp_path / "data/cats", target_is_directory=True)
    dataset = ImageFolder(tmp_path / "data")
    assert np.bincount(dataset.targets).tolist() == [23, 20]
    assert "cats/more/00.jpg" in dataset.ids


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", [b"\xff.jpg", b"a\rb.jpg"])
def test_a_name_that_no_table_can_hold_is_refused(tmp_path, name):
    root = write_classes(tmp_path / "data")
    (root / "cats/00.jpg").rename(root / "cats" / os.fsdecode(name))
    end = train_on(root, tmp_path)
    said = repr(f"cats/{os.fsdecode(name)}")
    assert_refused(end, f"has a file called {said}, which no table can hold; rename it.", tmp_path)


def test_files_of_other_types_are_counted_and_named_where_there_is_nothing_else(tmp_path):
    write_classes(tmp_path / "data")
    for name in ("cats/1.bmp", "dogs/2.bmp", "dogs/3.TIF"):
        (tmp_path / "data" / name).touch()
    (tmp_path / "data/4.jpg").touch()
    assert ImageFolder(tmp_path / "data").left_out == "2 .bmp, 1 .tif, 1 in no class's folder"
    for path in (tmp_path / "data").rglob("*.jpg"):
        path.unlink()
    sentence = (
        "data has no images in folders of classes, such as {}/cats/1.jpg; left out: 2 .bmp, 1 .tif (these are read:"
    )
    assert_refused(train_on(tmp_path / "data", tmp_path), sentence.format(tmp_path / "data"), tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(train_on(tmp_path / "nowhere", tmp_path), "nowhere has no images", tmp_path)


def test_a_class_with_one_image_is_refused(tmp_path):
    write_classes(tmp_path / "data", [0] * 39 + [1])
    assert_refused(train_on(tmp_path / "data", tmp_path), "class dogs has 1 sample, too few for 6 parts", tmp_path)


def test_a_class_in_the_test_folder_alone_is_refused(tmp_path):
    write_classes(tmp_path / "data/train", [0] * 40)
    write_classes(tmp_path / "data/test")
    assert_refused(train_on(tmp_path / "data", tmp_path), "class dogs has 0 samples", tmp_path)


def a_valid_file(root: Path, tmp_path: Path) -> str:
    """The name of a file that validates."""
    dataset = ImageFolder(root)
    return dataset.ids[int(SplitFile(tmp_path / "other.csv", dataset, make_folds).select(0).valid[0])]


@pytest.mark.parametrize("damage", [lambda data: b"hello", lambda data: data[:400]])
def test_a_file_that_is_no_image_or_cut_short_is_named_before_training(tmp_path, damage):
    name = a_valid_file(write_classes(tmp_path / "data"), tmp_path)
    path = tmp_path / "data" / name
    path.write_bytes(damage(path.read_bytes()))
    sentence = f"data are no images, or cut short: {name}; mend or remove them"
    assert_refused(train_on(tmp_path / "data", tmp_path), sentence, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_is_broken_within_ends_the_run_with_its_name(tmp_path, num_workers):
    name = a_valid_file(write_classes(tmp_path / "data"), tmp_path)
    path = tmp_path / "data" / name
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes(len(data) - 40) + data[-20:])
    end = train_on(tmp_path / "data", tmp_path, "--num-workers", str(num_workers))
    assert (end.code, end.err.count("\n")) == (2, 1), end.err
    assert f"data/{name} cannot be read as an image (" in end.err

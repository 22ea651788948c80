"""Tables of images: groups, folds, invalid rows, and test files that training never opens."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import patterned_images, write_jpeg
from small_runs import assert_rejected, train_on

from batteries.data.splits import TEST, SplitFile
from batteries.data.summary import find_unusual, summary_lines
from experiment.dataset import TABLE, Table
from experiment.splits import make_folds

SIZE = 40


def row_of(index: int) -> dict[str, str]:
    """Return a row: cats and dogs, four per owner."""
    return {"path": f"{index:02d}.jpg", "label": ("cat", "dog")[index % 2], "group": f"owner{index // 4}"}


def write_data(root: Path, change: Callable[[list[dict[str, str]]], object] = lambda rows: None) -> Path:
    """Write a table and its images to `root`, after `change` of the rows."""
    root.mkdir()
    rows = [row_of(index) for index in range(SIZE)]
    for index in range(SIZE):
        write_jpeg(torch.from_numpy(patterned_images([index % 2], 3, 16)[0]), root / f"{index:02d}.jpg")
    change(rows)
    with (root / TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def split_of(root: Path, tmp_path: Path) -> tuple[Table, np.ndarray]:
    dataset = Table(root)
    return dataset, SplitFile(tmp_path / "x.csv", dataset, make_folds).folds


def test_a_group_is_in_one_fold(tmp_path):
    dataset, folds = split_of(write_data(tmp_path / "data"), tmp_path)
    for group in set(dataset.groups or []):
        assert len({int(fold) for fold, other in zip(folds, dataset.groups or [], strict=True) if other == group}) == 1


def test_each_row_without_a_group_is_a_group(tmp_path):
    def clear(rows: list[dict[str, str]]) -> None:
        for row in rows[8:]:
            row["group"] = " "
        rows[1]["group"] = " owner0 "

    dataset, folds = split_of(write_data(tmp_path / "data", clear), tmp_path)
    assert dataset.groups == ["owner0"] * 4 + ["owner1"] * 4 + dataset.ids[8:]
    assert len(set(folds[8:].tolist())) == 6


def test_the_column_fold_is_used(tmp_path):
    def add(rows: list[dict[str, str]]) -> None:
        for index, row in enumerate(rows):
            row["fold"] = str(index // 4 % 4 - 1)

    _, folds = split_of(write_data(tmp_path / "data", add), tmp_path)
    assert folds.tolist() == [index // 4 % 4 - 1 for index in range(SIZE)]


def test_rows_without_a_label_are_the_test_split_and_are_not_opened(tmp_path):
    def hide(rows: list[dict[str, str]]) -> None:
        for row in rows[:8]:
            row["label"] = ""

    root = write_data(tmp_path / "data", hide)
    for index in range(8):
        (root / f"{index:02d}.jpg").write_bytes(b"invalid")
    _, folds = split_of(root, tmp_path)
    assert np.flatnonzero(folds == TEST).tolist() == list(range(8))
    end = train_on(root, tmp_path)
    assert end.code == 0, end.err


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("0", "5", "10", "15"), ("0", "5", "10", "15")),
        (tuple(f"{number}.0" for number in range(12)), tuple(map(str, range(12)))),
        (("10", "9", "10.0", "9.00", "x", "-1", "0.5", "b2", "b10"), ("-1", "0.5", "9", "10", "b10", "b2", "x")),
    ],
)
def test_numeric_classes_are_sorted_by_value_and_2_0_is_2(tmp_path, labels, classes):
    def number(rows: list[dict[str, str]]) -> None:
        for index, row in enumerate(rows):
            row["label"] = labels[index % len(labels)]

    dataset = Table(write_data(tmp_path / "data", number))
    assert dataset.classes == classes
    for target, label in zip(dataset.targets[: len(labels)], labels, strict=True):
        assert dataset.classes[target] == (label.rstrip("0").rstrip(".") if "." in label else label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(path=" "), "line 2 has no path; write the path of an image, or delete the line."),
        (lambda rows: rows.clear() or rows.append({"path": "", "label": ""}), "samples.csv has no rows; add one for"),
        (lambda rows: [row.pop("label") for row in rows], "samples.csv has no column label; it has path, group."),
        (
            lambda rows: rows[3].update(path="nowhere.jpg"),
            "samples.csv lists 1 missing or empty file: nowhere.jpg (line 5); fix these rows.",
        ),
        (lambda rows: rows[3].update(path="empty.jpg"), "lists 1 missing or empty file: empty.jpg (line 5)"),
        (
            lambda rows: rows[3].update(path="text.jpg"),
            "lists 1 truncated or invalid file: text.jpg (line 5); fix these rows.",
        ),
        (
            lambda rows: rows[3].update(path="truncated.jpg"),
            "lists 1 truncated or invalid file: truncated.jpg (line 5); fix these rows.",
        ),
        (lambda rows: rows[3].update(path="00.jpg"), "the data set has repeated ids: 00.jpg"),
        (
            lambda rows: rows[3].update(path="./00.jpg"),
            "lists one file under two paths (lines 2 and 5); keep one of them.",
        ),
        (
            lambda rows: [row.update({" Group": row.pop("group")}) for row in rows],
            "has a column ' Group', which is not read; rename it to 'group', or remove it.",
        ),
        (
            lambda rows: [row.update(fold="one") for row in rows],
            "line 2 has fold 'one'; use an integer from 0, or -1 for test",
        ),
        (lambda rows: [row.update(fold="0") for row in rows], "has the folds 0; number two or more folds from 0 on"),
        (
            lambda rows: [row.update(fold=str(index % 2)) for index, row in enumerate(rows)],
            "samples.csv has group owner0 in folds 0 and 1 (lines 2 and 3); a group must be in one: fix these rows.",
        ),
        (
            lambda rows: rows[6].update(label=""),
            "samples.csv has group owner1 with a label (line 6) and without (line 8); rows without a label are the "
            "test split, and a group must be in one split: label all of its rows or none, or change the group of some.",
        ),
        (lambda rows: [row.update(group="all") for row in rows], "1 group cannot be divided into"),
        (
            lambda rows: [
                row.update(fold=str(index // 4 % 2), label=row["label"] * (index > 0)) for index, row in enumerate(rows)
            ],
            "has samples without a target in folds: 00.jpg",
        ),
        (lambda rows: [row.update(label=" ") for row in rows], "samples.csv has no row with a label; write the class"),
        (lambda rows: [row.update(label="cat") for row in rows], "has only one class, cat; add rows of other classes."),
        (
            lambda rows: [row.update(label="cat" * (index > 8)) for index, row in enumerate(rows)],
            "has only one class, cat; add rows of other classes.",
        ),
        (
            lambda rows: [row.update(path=f"data\\{row['path']}") for row in rows],
            "lists 40 missing or empty files: data\\00.jpg (line 2), data\\01.jpg (line 3)",
        ),
        (
            lambda rows: [row.update(path=f"data\\{row['path']}") for row in rows],
            "; for data\\00.jpg, write 00.jpg (with / for \\, relative to",
        ),
        (
            lambda rows: rows[3].update(path="03.jpg\u200b"),
            "for 03.jpg\u200b, write 03.jpg (without invisible characters at its ends).",
        ),
        (lambda rows: rows[3].update(path="03"), "for 03, write 03.jpg (with its suffix)."),
    ],
)
def test_an_invalid_table_is_rejected_with_the_row(tmp_path, change, message):
    root = write_data(tmp_path / "data", change)
    (root / "empty.jpg").touch()
    (root / "text.jpg").write_text("hello")
    (root / "truncated.jpg").write_bytes((root / "00.jpg").read_bytes()[:300])
    for row in range(SIZE):  # only files that changed rows list are missing
        assert (root / f"{row:02d}.jpg").exists()
    assert_rejected(train_on(root, tmp_path), message, tmp_path)


def test_a_repeated_column_is_rejected(tmp_path):
    table = write_data(tmp_path / "data") / "samples.csv"
    table.write_text(table.read_text().replace("path,label,group", "path,label,label"))
    end = train_on(tmp_path / "data", tmp_path)
    assert_rejected(end, "samples.csv has more than one column label; keep one.", tmp_path)


def test_a_short_row_is_rejected_with_its_line(tmp_path):
    root = write_data(tmp_path / "data")
    with (root / TABLE).open("a") as file:
        file.write("00.jpg\n")
    assert_rejected(train_on(root, tmp_path), "line 42 has 1 cell for 3 columns (path, label, group)", tmp_path)


def test_an_open_quotation_mark_is_rejected_with_its_line(tmp_path):
    root = write_data(tmp_path / "data", lambda rows: [row.update(note="good") for row in rows])
    lines = (root / TABLE).read_text().splitlines()
    lines[21] = lines[21].replace("good", '"5 inch lens')
    (root / TABLE).write_text("\n".join(lines) + "\n")
    message = "samples.csv line 22 has a quotation mark that does not enclose a whole cell; remove it, or enclose"
    assert_rejected(train_on(root, tmp_path), message, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_table_in_another_encoding_is_rejected_with_the_fix(tmp_path, encoding):
    root = write_data(tmp_path / "data", lambda rows: rows[3].update(label="K\u00e4fer"))
    (root / TABLE).write_text((root / TABLE).read_text(), encoding=encoding)
    fix = (
        "is encoded as UTF-16; save it as UTF-8"
        if encoding == "utf-16"
        else "line 5 has the byte 0xe4, which is not UTF-8"
    )
    assert_rejected(train_on(root, tmp_path), f"samples.csv {fix}", tmp_path)


def test_a_table_with_semicolons_is_rejected_with_the_fix(tmp_path):
    root = write_data(tmp_path / "data")
    (root / TABLE).write_text((root / TABLE).read_text().replace(",", ";"))
    message = "which looks like several columns separated by semicolons; save it with commas."
    assert_rejected(train_on(root, tmp_path), message, tmp_path)


def test_what_was_understood_is_summarized(tmp_path):
    def change(rows: list[dict[str, str]]) -> None:
        for index, row in enumerate(rows):
            row["label"] = ("0", "1.0", "0.0", "red green")[index % 4] if index >= 4 else ""
        for row, label in zip(rows[4:8], ("red", "green", "green", "red"), strict=True):
            row["label"] = label
        for row in rows:
            row["fold"] = str(-1 if row["label"] == "" else int(row["group"].removeprefix("owner")) % 2)

    dataset = Table(write_data(tmp_path / "data", change))
    assert dataset.classes == ("0", "1", "green", "red", "red green")
    assert summary_lines(dataset) == [
        "classes  5, with samples: 0: 16, 1: 8, green: 2, red: 2, red green: 8",
        "unknown  4 samples without a label, which can only be in the test split",
        "groups   10 groups; the largest, owner0, has 4 samples",
    ]
    merged, several = find_unusual(dataset, dataset.folds)
    assert merged == "labels '0' (8 samples) and '0.0' (8 samples) are read as one class, 0."
    assert several.startswith(
        "label 'red green' (8 samples) is one class, but looks like several labels, red and green;"
    )


def test_a_missing_table_is_reported_by_its_path(tmp_path):
    assert_rejected(
        train_on(tmp_path / "nowhere", tmp_path), f"{tmp_path / 'nowhere/samples.csv'} cannot be read", tmp_path
    )

"""A submission has the sample's columns, ids and order, or every difference is named and nothing is written."""

import pytest
from tables import call, refused, write_lines

from tools import submit

PREDICTIONS = ["id,cat,dog,0", "a,0.5,0.25,0.25", "b,0.1,0.3,0.6", "c,0.25,0.5,0.25"]


@pytest.fixture
def hand_in(tmp_path):
    """Submits PREDICTIONS by a sample of these lines; gives the end and the submission's lines."""
    predictions = write_lines(tmp_path / "test.csv", *PREDICTIONS)

    def run(sample: list[str], *flags: str):
        write_lines(tmp_path / "sample.csv", *sample)
        output = tmp_path / "submission.csv"
        end = call(submit, predictions, "--sample", tmp_path / "sample.csv", "--output", output, *flags)
        return end, output.read_text().splitlines() if output.exists() else None

    return run


ONE_COLUMN = ["image,what", "c,x", "a,x", "b,x"]
ALL_COLUMNS = ["image,0,cat,dog", "b,9,9,9", "c,9,9,9", "a,9,9,9"]


@pytest.mark.parametrize(
    ("sample", "flags", "wanted"),
    [
        (ONE_COLUMN, [], ["image,what", "c,dog", "a,cat", "b,0"]),
        (ONE_COLUMN, ["--values", "index"], ["image,what", "c,1", "a,0", "b,2"]),
        (
            ONE_COLUMN,
            ["--values", "labels", "--threshold", "0.25"],
            ["image,what", "c,cat dog 0", "a,cat dog 0", "b,dog 0"],
        ),
        (ONE_COLUMN, ["--values", "labels", "--threshold", "0.6"], ["image,what", "c,dog", "a,cat", "b,0"]),
        (
            ONE_COLUMN,
            ["--values", "probability", "--column-class", "dog"],
            ["image,what", "c,0.5", "a,0.25", "b,0.3"],
        ),
        (ONE_COLUMN, ["--values", "binary", "--column-class", "dog"], ["image,what", "c,1", "a,0", "b,0"]),
        (["image,dog", "a,", "b,", "c,"], ["--values", "probability"], ["image,dog", "a,0.25", "b,0.3", "c,0.5"]),
        (
            ALL_COLUMNS,
            ["--values", "probability"],
            ["image,0,cat,dog", "b,0.6,0.1,0.3", "c,0.25,0.25,0.5", "a,0.25,0.5,0.25"],
        ),
        (
            ALL_COLUMNS,
            ["--values", "binary", "--threshold", "0.3"],
            ["image,0,cat,dog", "b,1,0,1", "c,0,0,1", "a,0,1,0"],
        ),
    ],
)
def test_each_kind_of_values_fills_the_sample_in_its_own_order(hand_in, sample, flags, wanted):
    end, lines = hand_in(sample, *flags)
    assert end.code == 0, end.err
    assert lines == wanted


@pytest.mark.parametrize(
    ("sample", "flags", "sentence"),
    [
        ([*ONE_COLUMN, "d,x"], [], "test.csv does not fit the sample: id d of the sample missing."),
        (ONE_COLUMN[:3], [], "test.csv does not fit the sample: id b not in the sample."),
        (
            [*(line.replace("b", "e") for line in ONE_COLUMN), "f,x"],
            [],
            "test.csv does not fit the sample: ids e, f of the sample missing; id b not in the sample.",
        ),
        ([*ONE_COLUMN, "a,x"], [], "has more than one row of id a."),
        (["image", "a", "b", "c"], [], "needs a column of ids, one to fill in, and rows."),
        (
            ["image;what", "a;x", "b;x", "c;x"],
            [],
            "has one column, image;what, which looks like several with ; between them; save it with commas.",
        ),
        (["image,what"], [], "needs a column of ids, one to fill in, and rows."),
        ([], [], "cannot be read as a table"),
        (
            ALL_COLUMNS,
            [],
            "--values label fills one column, but the sample has 3: 0, cat, dog; use --values probability",
        ),
        (
            ["image,cow,cat", "a,,", "b,,", "d,,"],
            ["--values", "probability"],
            "id d of the sample missing; id c not in the sample; column cow of the sample no class; classes dog, 0 "
            "without a column in the sample.",
        ),
        (ONE_COLUMN, ["--values", "probability"], "the sample's column what is no class; say by --column-class whose"),
        (ONE_COLUMN, ["--values", "binary", "--column-class", "cow"], "--column-class cow must be one of cat, dog, 0"),
        (ONE_COLUMN, ["--column-class", "cat"], "--column-class is for --values probability and binary, not label."),
        (ONE_COLUMN, ["--threshold", "2"], "--threshold 2.0 must be 0 to 1."),
        (ONE_COLUMN, ["--threshold", "0.4"], "--threshold is for --values labels and binary, not label."),
        (
            ["image,dog", "a,", "b,", "c,"],
            ["--values", "probability", "--threshold", "0.5"],
            "--threshold is for --values labels and binary, not probability.",
        ),
    ],
)
def test_every_difference_from_the_sample_is_named_and_nothing_is_written(hand_in, sample, flags, sentence):
    end, lines = hand_in(sample, *flags)
    refused(end, sentence)
    assert lines is None


def test_a_submission_that_is_there_is_not_overwritten_by_another(hand_in):
    _, before = hand_in(ONE_COLUMN)
    end, after = hand_in(ONE_COLUMN, "--values", "index")
    refused(end, "is there already, with other contents")
    assert after == before
    assert hand_in(ONE_COLUMN, "--values", "index", "--overwrite")[1] != before


def test_several_names_in_one_cell_can_be_told_apart_again(tmp_path):
    predictions = write_lines(tmp_path / "test.csv", "id,New York,Rome,Los Angeles", "a,1,0,0")
    sample, output = write_lines(tmp_path / "sample.csv", "id,cities", "a,x"), tmp_path / "out.csv"
    files = predictions, "--sample", sample, "--output", output
    refused(
        call(submit, *files, "--values", "labels"),
        "--values labels sets names apart by spaces, which are in classes New York, Los Angeles themselves; "
        "call them otherwise in the predictions, such as New_York.",
    )
    assert not output.exists()
    assert call(submit, *files).code == 0
    assert output.read_text() == "id,cities\na,New York\n"


@pytest.mark.parametrize("name", ["sample", "test"])
def test_neither_the_sample_nor_the_predictions_are_overwritten(tmp_path, name):
    predictions = write_lines(tmp_path / "test.csv", *PREDICTIONS)
    sample, given = write_lines(tmp_path / "sample.csv", *ONE_COLUMN), tmp_path / f"{name}.csv"
    before = given.read_bytes()
    end = call(submit, predictions, "--sample", sample, "--output", tmp_path / "." / f"{name}.csv", "--overwrite")
    refused(end, f"--output {given} is what the submission is made from; give another.")
    assert given.read_bytes() == before


def test_a_sample_that_is_not_there_is_named(tmp_path):
    predictions = write_lines(tmp_path / "test.csv", *PREDICTIONS)
    refused(call(submit, predictions, "--sample", tmp_path / "no.csv"), "no.csv cannot be read as a table")

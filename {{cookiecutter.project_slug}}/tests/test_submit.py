"""Tests of tools/submit.py."""

import pytest
from tables import assert_rejected, call_tool, write_lines

from batteries.evaluation.predictions import Predictions
from batteries.submission.submission_file import match_ids, read_sample
from tools import submit

PREDICTIONS = ["id,cat,dog,0", "a,0.5,0.25,0.25", "b,0.1,0.3,0.6", "c,0.25,0.5,0.25"]


@pytest.fixture
def submit_sample(tmp_path):
    """Return a function that submits PREDICTIONS for a sample, and returns the result and the lines of the output."""
    predictions = write_lines(tmp_path / "test.csv", *PREDICTIONS)

    def run(sample: list[str], *flags: str):
        write_lines(tmp_path / "sample.csv", *sample)
        output = tmp_path / "submission.csv"
        end = call_tool(submit, predictions, "--sample", tmp_path / "sample.csv", "--output", output, *flags)
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
def test_values_fill_the_sample_in_its_order(submit_sample, sample, flags, wanted):
    end, lines = submit_sample(sample, *flags)
    assert end.code == 0, end.err
    assert lines == wanted


@pytest.mark.parametrize(
    ("sample", "flags", "message"),
    [
        ([*ONE_COLUMN, "d,x"], [], "test.csv does not fit the sample: id d missing in the predictions."),
        (ONE_COLUMN[:3], [], "test.csv does not fit the sample: id b not in the sample."),
        (
            [*(line.replace("b", "e") for line in ONE_COLUMN), "f,x"],
            [],
            "test.csv does not fit the sample: ids e, f missing in the predictions; id b not in the sample.",
        ),
        ([*ONE_COLUMN, "a,x"], [], "has more than one row of id a."),
        (["image", "a", "b", "c"], [], "needs a column of ids, a column to fill in, and rows."),
        (
            ["image;what", "a;x", "b;x", "c;x"],
            [],
            "has one column, 'image;what', which looks like several columns separated by semicolons; save it with",
        ),
        (
            ["image,what", "a,x", 'b,"x', "c,x"],
            [],
            "sample.csv line 3 has a quotation mark that does not enclose a whole",
        ),
        (["image,what"], [], "needs a column of ids, a column to fill in, and rows."),
        ([], [], "needs a column of ids, a column to fill in, and rows."),
        (
            ALL_COLUMNS,
            [],
            "--values label fills one column, but the sample has 3: 0, cat, dog; use --values probability",
        ),
        (
            ["image,cow,cat", "a,,", "b,,", "d,,"],
            ["--values", "probability"],
            "id d missing in the predictions; id c not in the sample; column cow of the sample not in the predictions; "
            "classes dog, 0 without a column in the sample.",
        ),
        (ONE_COLUMN, ["--values", "probability"], "the sample's column what is not a class; choose its class with"),
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
def test_every_difference_from_the_sample_is_reported_without_output(submit_sample, sample, flags, message):
    end, lines = submit_sample(sample, *flags)
    assert_rejected(end, message)
    assert lines is None


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (["cat", "dog", "0"], "classes  0 = cat, 1 = dog, 2 = 0\n"),
        (["0", "1", "2"], "classes  0 = 0, 1 = 1, 2 = 2\n"),
        (
            ["1", "2", "11"],
            "classes  0 = 1, 1 = 2, 2 = 11; the indices differ from these numbers, which --values label writes\n",
        ),
    ],
)
def test_the_index_of_each_class_is_printed(tmp_path, classes, line):
    rows = [",".join(["a", *("0.75" if name == classes[-1] else "0.125" for name in classes)])]
    predictions = write_lines(tmp_path / "test.csv", ",".join(["id", *classes]), *rows)
    sample = write_lines(tmp_path / "sample.csv", "id,label", "a,x")
    flags = ["--sample", sample, "--output", tmp_path / "out.csv"]
    end = call_tool(submit, predictions, *flags, "--values", "index")
    assert (end.code, line in end.out) == (0, True), end
    assert (tmp_path / "out.csv").read_text() == f"id,label\na,{len(classes) - 1}\n"
    assert "classes" not in call_tool(submit, predictions, *flags, "--overwrite").out


def test_an_existing_submission_is_not_overwritten(submit_sample):
    _, before = submit_sample(ONE_COLUMN)
    end, after = submit_sample(ONE_COLUMN, "--values", "index")
    assert_rejected(end, "already exists with different contents")
    assert after == before
    assert submit_sample(ONE_COLUMN, "--values", "index", "--overwrite")[1] != before


def test_class_names_with_spaces_are_rejected_for_labels(tmp_path):
    predictions = write_lines(tmp_path / "test.csv", "id,New York,Rome,Los Angeles", "a,1,0,0")
    sample, output = write_lines(tmp_path / "sample.csv", "id,cities", "a,x"), tmp_path / "out.csv"
    files = predictions, "--sample", sample, "--output", output
    assert_rejected(
        call_tool(submit, *files, "--values", "labels"),
        "--values labels joins class names with spaces, so a name cannot contain one: rename classes New York, Los "
        "Angeles in the predictions file, such as New_York.",
    )
    assert not output.exists()
    assert call_tool(submit, *files).code == 0
    assert output.read_text() == "id,cities\na,New York\n"


@pytest.mark.parametrize("name", ["sample", "test"])
def test_the_inputs_are_not_overwritten(tmp_path, name):
    predictions = write_lines(tmp_path / "test.csv", *PREDICTIONS)
    sample, given = write_lines(tmp_path / "sample.csv", *ONE_COLUMN), tmp_path / f"{name}.csv"
    before = given.read_bytes()
    end = call_tool(submit, predictions, "--sample", sample, "--output", tmp_path / "." / f"{name}.csv", "--overwrite")
    assert_rejected(end, f"--output {given} is also an input; use another --output.")
    assert given.read_bytes() == before


def test_a_missing_sample_is_reported(tmp_path):
    predictions = write_lines(tmp_path / "test.csv", *PREDICTIONS)
    assert_rejected(call_tool(submit, predictions, "--sample", tmp_path / "no.csv"), "no.csv cannot be read as a table")


@pytest.mark.parametrize(
    ("predicted", "sample", "matched"),
    [
        (["images/t0.jpg", "images/t1.jpg"], ["t1", "t0"], ["t0", "t1"]),
        (["images/t0.jpg", "images/t1.jpg"], ["t1.jpg", "t0.jpg"], ["t0.jpg", "t1.jpg"]),
        (["a/0.jpg", "b/0.jpg"], ["b/0", "a/0"], ["a/0", "b/0"]),
        (["t0", "t1"], ["t1.png", "t0.png"], ["t0.png", "t1.png"]),
        (["images/t0.jpg", "images/t1.jpg"], ["t0", "t2"], None),
        (["images/t0.jpg", "images/t1.jpg"], ["t0"], None),
        (["a/0.jpg", "b/0.jpg"], ["0", "1"], None),
        (["a/0.jpg", "b/0.jpg"], ["0", "x/0"], None),
    ],
)
def test_ids_are_matched_without_directories_and_suffixes(tmp_path, predicted, sample, matched):
    table = read_sample(write_lines(tmp_path / "x.csv", "id,label", *(f"{name},0" for name in sample)))
    found = match_ids(Predictions("x", tuple(predicted), ("cat",), None), table).ids
    assert list(found) == (matched or predicted)


def test_ids_without_directories_and_suffixes_are_noted(tmp_path):
    predictions = write_lines(tmp_path / "test.csv", "id,cat,dog", "images/t0.jpg,1,0", "images/t1.jpg,0,1")
    sample = write_lines(tmp_path / "sample.csv", "id,label", "t1,", "t0,")
    end = call_tool(submit, predictions, "--sample", sample, "--output", tmp_path / "out.csv")
    assert "ids are matched without directories and suffixes: images/t0.jpg is t0\n" in end.out
    assert (tmp_path / "out.csv").read_text() == "id,label\nt1,dog\nt0,cat\n"

"""The ledger of scores: nothing is entered twice, nothing is lost, a merge stays readable."""

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
from sklearn.metrics import f1_score
from tables import call, random_table, refused

from batteries.evaluation.predictions import write_predictions
from batteries.evaluation.scoring import score
from batteries.submission.score_log import (
    COLUMNS,
    Point,
    ScoreEntry,
    add_entry,
    disagreements,
    read_score_log,
    update_entry,
)
from tools import scores

ROOT = scores.SCORE_LOG.parent


@pytest.fixture
def logdir(tmp_path):
    """A run's folder, as far as the ledger reads it."""
    folder = tmp_path / "logs/first"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"main_metric": "accuracy", "seed": 1, "logdir": "logs/first"}')
    record = {
        "git_commit": "0123456789abcdef",
        "config_hash": "fedcba987654",
        "best": {"metric": "accuracy", "score": 0.75, "stage": "a", "epoch": 1},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "scores.csv"


def entry(name: str, date: str = "2025-01-01T00:00:00+00:00", **values) -> ScoreEntry:
    return ScoreEntry(date, name, f"logs/{name}", "abc", "def", "accuracy", **values)


def test_a_run_is_entered_with_its_commit_its_recipe_and_its_scores(logdir, ledger):
    end = call(scores, "add", logdir, "--leaderboard", "0.5", "--note", "first, light", "--ledger", ledger)
    assert end.code == 0, end.err
    [row] = csv.DictReader(ledger.open())
    assert list(row) == COLUMNS
    assert (row["name"], row["commit"], row["metric"], row["note"]) == (
        "first",
        "0123456789ab",
        "accuracy",
        "first, light",
    )
    assert (row["valid"], row["test"], row["public"], row["private"]) == ("0.75", "", "0.5", "")
    shown = call(scores, "show", "--ledger", ledger).out
    assert "0.7500" in shown
    assert "-0.2500" in shown


def test_scores_of_predictions_win_over_training_and_flags_over_both(logdir, ledger):
    (logdir / "predictions").mkdir()
    valid, test = random_table(30, 1), random_table(20, 2)
    write_predictions(logdir / "predictions/valid.csv", valid)
    write_predictions(logdir / "predictions/test.csv", test)
    assert call(scores, "add", logdir, "--ledger", ledger).code == 0
    assert call(scores, "add", logdir, "--name", "other", "--valid", "0.1", "--ledger", ledger).code == 0
    first, second = read_score_log(ledger)
    assert (first.valid, first.test) == (score(valid)["accuracy"], score(test)["accuracy"])
    assert (second.valid, second.test) == (0.1, first.test)


def test_a_main_metric_of_scikit_learn_is_scored_on_the_predictions_too(logdir, ledger):
    (logdir / "config.json").write_text('{"main_metric": "macro_f1"}')
    (logdir / "predictions").mkdir()
    table = random_table(30, 1)
    write_predictions(logdir / "predictions/test.csv", table)
    assert call(scores, "add", logdir, "--ledger", ledger).code == 0
    [line] = read_score_log(ledger)
    assert line.test == f1_score(table.targets, table.probabilities.argmax(1), average="macro")


def test_a_score_that_has_no_meaning_stays_empty_and_the_ledger_readable(logdir, ledger):
    (logdir / "config.json").write_text('{"main_metric": "roc_auc"}')
    table = random_table(30, 1)
    ranks = replace(table, probabilities=table.probabilities / 2)  # rows that do not sum to one, as of ranks
    (logdir / "predictions").mkdir()
    write_predictions(logdir / "predictions/valid.csv", ranks)
    end = call(scores, "add", logdir, "--leaderboard", "0.9", "--ledger", ledger)
    assert end.code == 0
    assert f"note     roc_auc has no meaning for {logdir}/predictions/valid.csv: valid stays empty" in end.out
    [line] = read_score_log(ledger)
    assert (line.valid, line.public) == (None, 0.9)


def predict_blend(logdir):
    """A folder with predictions alone, as blend.py leaves it."""
    folder = logdir.parent / "blend"
    (folder / "predictions").mkdir(parents=True)
    write_predictions(folder / "predictions/valid.csv", random_table(30, 1))
    return folder


def test_a_blend_is_scored_by_the_metric_of_the_other_lines_or_by_the_one_that_is_named(logdir, ledger):
    folder, table = predict_blend(logdir), random_table(30, 1)
    (logdir / "config.json").write_text('{"main_metric": "macro_f1"}')
    assert call(scores, "add", logdir, "--ledger", ledger).code == 0
    assert call(scores, "add", folder, "--ledger", ledger).code == 0
    lines = {line.name: line for line in read_score_log(ledger)}
    assert lines["blend"].metric == "macro_f1"
    assert lines["blend"].valid == f1_score(table.targets, table.probabilities.argmax(1), average="macro")
    assert call(scores, "add", folder, "--name", "by loss", "--metric", "loss", "--ledger", ledger).code == 0
    assert {line.name: line for line in read_score_log(ledger)}["by loss"].valid == score(table)["loss"]
    end = call(scores, "add", folder, "--name", "third", "--ledger", ledger)
    refused(end, f"{folder} is no run, and {ledger} has loss, macro_f1: say which by --metric.")
    end = call(scores, "add", folder, "--metric", "macro_f2", "--name", "third", "--ledger", ledger)
    refused(end, "--metric macro_f2 is no metric; did you mean 'macro_f1'?")
    assert call(scores, "add", folder, "--leaderboard", "0.5", "--update", "--ledger", ledger).code == 0


def test_an_update_takes_new_predictions_in_says_what_changed_and_needs_no_folder(logdir, ledger):
    assert call(scores, "add", logdir, "--leaderboard", "0.5", "--ledger", ledger).code == 0
    (logdir / "predictions").mkdir()
    valid, test = random_table(30, 1), random_table(20, 2)
    write_predictions(logdir / "predictions/valid.csv", valid)
    write_predictions(logdir / "predictions/test.csv", test)
    end = call(scores, "add", logdir, "--update", "--ledger", ledger)
    assert (end.code, "changed  valid was 0.7500\n" in end.out) == (0, True)
    shutil.rmtree(logdir)
    assert call(scores, "add", logdir, "--private", "0.4", "--update", "--ledger", ledger).code == 0
    [line] = read_score_log(ledger)
    assert (line.valid, line.test) == (score(valid)["accuracy"], score(test)["accuracy"])
    assert (line.public, line.private, line.commit, line.config) == (0.5, 0.4, "0123456789ab", "fedcba987654")


def test_folds_are_entered_by_the_folder_that_holds_them(logdir, ledger):
    folds = logdir.parent
    shutil.copytree(logdir, folds / "second")
    (folds / "predictions").mkdir()
    write_predictions(folds / "predictions/valid.csv", random_table(30, 1))
    assert call(scores, "add", folds, "--ledger", ledger).code == 0
    [line] = read_score_log(ledger)
    assert (line.name, line.commit, line.metric) == ("logs", "0123456789ab", "accuracy")
    assert line.valid == score(random_table(30, 1))["accuracy"]
    assert line.config not in ("", "fedcba987654")  # that of one of them


def test_the_same_submission_is_not_entered_twice_but_can_be_filled_in(logdir, ledger):
    assert call(scores, "add", logdir, "--leaderboard", "0.5", "--ledger", ledger).code == 0
    before = ledger.read_bytes()
    end = call(scores, "add", logdir, "--leaderboard", "0.6", "--ledger", ledger)
    refused(end, f"{ledger} has first of {logdir} already, of ")
    assert ledger.read_bytes() == before
    assert call(scores, "add", logdir, "--private", "0.4", "--update", "--ledger", ledger).code == 0
    [line] = read_score_log(ledger)
    assert (line.valid, line.public, line.private) == (0.75, 0.5, 0.4)
    assert call(scores, "add", logdir, "--name", "second", "--ledger", ledger).code == 0
    assert [line.name for line in read_score_log(ledger)] == ["first", "second"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["add", "nowhere"],
            "nowhere holds neither a run nor predictions; give a run's folder, such as logs/baseline.",
        ),
        (["add", "{logdir}/../..", "--ledger", "{ledger}"], "holds neither a run nor predictions"),
        (["add", "README.md"], "README.md holds neither a run nor predictions"),
        (["show", "--ledger", "tests"], "--ledger tests is a folder; give the name of a file, such as scores.csv."),
        (
            ["add", "{logdir}", "--ledger", "README.md/x.csv"],
            "--ledger README.md/x.csv cannot be: README.md is no folder",
        ),
        (["add", "{logdir}", "--ledger", "nowhere/x.csv"], "--ledger nowhere/x.csv cannot be: nowhere is no folder"),
        (["add"], "scores.py add needs PATH: a run's folder, "),
        (["add", "{logdir}", "--leaderboard", "nan"], "--leaderboard nan must be a finite number."),
        (["add", "{logdir}", "--update", "--ledger", "{ledger}"], "has no first of {logdir}; leave --update out to"),
        (["ad", "{logdir}"], "ad is no command or flag; did you mean 'add'? See python tools/scores.py --help."),
        (["plot", "--ledger", "{ledger}"], "needs two submissions or more that have valid and public of one metric;"),
        (["plot", "--against", "privat"], "--against privat is no choice; did you mean 'private'?"),
    ],
)
def test_what_cannot_be_meant_gets_a_sentence_and_changes_nothing(logdir, ledger, flags, sentence):
    end = call(scores, *(flag.format(logdir=logdir, ledger=ledger) for flag in flags))
    refused(end, sentence.format(logdir=logdir))
    assert not ledger.exists()


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name,score\n", "does not begin with date,name,logdir"),
        (f"{HEADER}\na,b\n", "line 2, has 2 values for 11 columns."),
        (f"{HEADER}\nd,n,l,c,h,accuracy,x,,,,\n", "line 2: valid is 'x', which is no score; empty the cell."),
        ("<<<<<<< ours\n", "does not begin with date,name,logdir"),
    ],
)
def test_a_ledger_that_was_damaged_is_refused_with_the_line(logdir, ledger, text, sentence):
    ledger.write_text(text)
    refused(call(scores, "add", logdir, "--ledger", ledger), sentence)
    refused(call(scores, "show", "--ledger", ledger), sentence)
    assert ledger.read_text() == text


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"date,\xe9\n"])
def test_a_ledger_that_is_no_text_is_refused(logdir, ledger, content):
    ledger.write_bytes(content)
    refused(call(scores, "add", logdir, "--ledger", ledger), f"{ledger} cannot be read as a ledger of scores (")
    assert ledger.read_bytes() == content


@pytest.mark.parametrize("name", ["run.json", "config.json"])
@pytest.mark.parametrize("text", ['{"git_commit": "01', "[]"])
def test_a_record_that_was_cut_is_named(logdir, ledger, name, text):
    (logdir / name).write_text(text)
    refused(call(scores, "add", logdir, "--ledger", ledger), f"{logdir / name} is damaged (")
    assert not ledger.exists()


def test_lines_that_a_merge_has_doubled_count_once(ledger):
    add_entry(ledger, entry("first"))
    ledger.write_text(ledger.read_text() * 2)
    assert [line.name for line in read_score_log(ledger)] == ["first"]


@pytest.fixture
def merge(tmp_path):
    """Merges two branches, one with what `theirs` did and one with what `ours` did, after `start`."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=tests", "-c", "user.email=tests@localhost"]

    def run(*arguments: str) -> None:
        subprocess.run([*git, *arguments], check=True, capture_output=True)

    def merge(start: Callable, theirs: Callable, ours: Callable) -> None:
        run("init", "-q", "-b", "main")
        for name in (".gitattributes", ".gitignore"):  # the ledger is in git, and merged as a list of lines
            shutil.copy(ROOT / name, tmp_path)
        for branch, change in ((None, start), ("other", theirs), ("main", ours)):
            if branch is not None:
                run("checkout", "-q", *(["-b"] if branch == "other" else []), branch)
            change()
            run("add", "."), run("commit", "-q", "-m", "change")
        run("merge", "-q", "-m", "merge", "other")

    return merge


def test_two_branches_that_filled_in_one_line_give_one_line_with_both(ledger, merge):
    key = entry("first").key
    merge(
        lambda: add_entry(ledger, entry("first", valid=0.75)),
        lambda: update_entry(ledger, key, public=0.5),
        lambda: update_entry(ledger, key, private=0.4, note="mine"),
    )
    assert len(ledger.read_text().splitlines()) == 3
    [line] = read_score_log(ledger)
    assert (line.valid, line.public, line.private, line.note) == (0.75, 0.5, 0.4, "mine")
    assert "note" not in call(scores, "show", "--ledger", ledger).out.splitlines()[-1]


def test_branches_that_contradict_each_other_keep_both_lines_until_one_is_said_to_be_right(ledger, merge):
    key = entry("first").key
    merge(
        lambda: add_entry(ledger, entry("first", valid=0.75)),
        lambda: update_entry(ledger, key, public=0.5),
        lambda: update_entry(ledger, key, public=0.6),
    )
    end = call(scores, "show", "--ledger", ledger)
    assert end.code == 0, end.err
    assert "0.5000" in end.out
    assert "0.6000" in end.out
    note = "note     first of logs/first has 2 lines that do not agree: public 0.5 or 0.6; say what is right by"
    assert end.out.splitlines()[-1].startswith(note)
    add_entry(ledger, entry("second"))
    assert [line.name for line in read_score_log(ledger)] == ["first", "first", "second"]
    update_entry(ledger, key, public=0.6)
    assert [line.public for line in read_score_log(ledger)] == [0.6, None]


@pytest.mark.parametrize("begun", [True, False])
def test_a_merge_of_two_branches_keeps_the_lines_of_both(ledger, merge, begun):
    merge(
        lambda: add_entry(ledger, entry("old")) if begun else None,
        lambda: add_entry(ledger, entry("theirs", date="2025-01-02")),
        lambda: add_entry(ledger, entry("ours", date="2025-01-03")),
    )
    names = [line.name for line in read_score_log(ledger)]
    assert sorted(names) == sorted(["theirs", "ours", *(["old"] if begun else [])])
    add_entry(ledger, entry("next", date="2025-01-04"))
    lines = ledger.read_text().splitlines()
    assert len(lines) == len(names) + 2
    assert lines[1:] == sorted(lines[1:])


def _add_some(ledger, number: int) -> None:
    for index in range(10):
        add_entry(ledger, entry(f"{number}_{index}"))


def test_processes_that_add_at_once_lose_no_line_and_leave_no_other_file(tmp_path):
    ledger = tmp_path / "folder/scores.csv"
    ledger.parent.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_some, args=(ledger, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(read_score_log(ledger)) == 30
    assert [path.name for path in ledger.parent.iterdir()] == ["scores.csv"]


def test_the_table_is_sorted_in_the_direction_of_the_metric(ledger):
    for name, metric, valid in (("a", "accuracy", 0.5), ("b", "accuracy", 0.9), ("c", "loss", 0.5), ("d", "loss", 0.1)):
        add_entry(ledger, ScoreEntry(f"2025-{name}", name, name, "", "", metric, valid))
    shown = [line.split()[0] for line in call(scores, "show", "--ledger", ledger).out.splitlines()]
    assert shown == ["name", "b", "a", "d", "c"]


def test_without_a_ledger_the_table_says_how_to_begin(ledger):
    assert "no scores yet: python tools/scores.py add" in call(scores, "show", "--ledger", ledger).out


@pytest.mark.parametrize("flag", ["--ledger", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])  # it is found out at the end, or at once
def test_a_reader_that_has_gone_as_head_does_ends_it_quietly(ledger, flag, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tools.scores", "show", flag, *([str(ledger)] if flag == "--ledger" else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    end = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (end.returncode, end.stderr) == (141, "")


def test_pairs_in_another_order_are_named_the_widest_first():
    points = [Point("a", 0.9, 0.1), Point("b", 0.8, 0.5), Point("c", 0.1, 0.4), Point("d", 0.2, 0.9)]
    assert disagreements(points) == [("a", "d"), ("a", "c"), ("b", "d"), ("a", "b")]
    assert disagreements([Point("a", 1, 1), Point("b", 2, 2), Point("c", 2, 3)]) == []


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("plot", "plot must end in .png, .pdf or .svg."),
        ("plot.xyz", "plot.xyz must end in .png, .pdf or .svg."),
        ("scores.csv/plot.png", "plot.png cannot be written (File exists); use another --output."),
        ("folder.png", "folder.png cannot be written (Is a directory); use another --output."),
    ],
)
def test_a_plot_that_cannot_be_written_gets_a_sentence(tmp_path, ledger, output, sentence):
    (tmp_path / "folder.png").mkdir()
    for index in range(2):
        add_entry(ledger, entry(f"run{index}", valid=index / 2, public=index / 3))
    refused(call(scores, "plot", "--ledger", ledger, "--output", tmp_path / output), sentence)


def test_the_plot_names_the_runs_on_which_validation_and_leaderboard_disagree(tmp_path, ledger):
    for number, (valid, public) in enumerate([(0.9, 0.8), (0.8, 0.9), (0.7, 0.7)]):
        add_entry(ledger, entry(f"run{number}", valid=valid, public=public))
    picture = tmp_path / "plots/scores.png"
    end = call(scores, "plot", "--ledger", ledger, "--output", picture)
    assert end.code == 0, end.err
    assert "0.500 (Spearman, 3 submissions)" in end.out
    assert "disagree run0 has more accuracy than run1 in valid, and less in public" in end.out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_plot_is_of_the_metric_that_most_lines_have_or_of_the_one_that_is_named(tmp_path, ledger):
    for number, metric in enumerate(["loss", "accuracy", "accuracy", "loss", "accuracy", "f1"]):
        line = entry(f"run{number}", valid=number / 9, public=number / 8)
        add_entry(ledger, replace(line, metric=metric))
    flags = "plot", "--ledger", ledger, "--output", tmp_path / "x.png"
    end = call(scores, *flags)
    assert end.code == 0, end.err
    assert "(Spearman, 3 submissions)" in end.out
    assert "left out 2 of loss, 1 of f1; --metric plots another than accuracy\n" in end.out
    assert "(Spearman, 2 submissions)" in call(scores, *flags, "--metric", "loss").out
    sentence = f"valid and public of one metric; {ledger} has 2 of loss, 3 of accuracy, 1 of f1."
    refused(call(scores, *flags, "--metric", "f1"), sentence)
    refused(call(scores, *flags, "--metric", "macro_f1"), sentence)


def test_a_plot_of_equal_leaderboard_scores_says_in_words_that_they_rank_nothing(tmp_path, ledger):
    for number in range(3):
        add_entry(ledger, entry(f"猫 $x^$ {number}", valid=number / 3, public=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        end = call(scores, "plot", "--ledger", ledger, "--output", tmp_path / "x.png")
    assert end.code == 0, end.err
    assert "correlation of valid and public: none, as all public scores are equal (Spearman, 3 sub" in end.out

"""Tests of the score log and tools/scores.py."""

import csv
import errno
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
from marks import CLASSES_ONLY
from processes import SECONDS
from sklearn.metrics import f1_score
from tables import assert_rejected, call_tool, random_predictions

from batteries.core import files
from batteries.evaluation.predictions import write_predictions
from batteries.evaluation.scoring import score
from batteries.submission.score_log import (
    COLUMNS,
    ScoreEntry,
    ScorePair,
    add_entry,
    find_rank_disagreements,
    read_score_log,
    update_entry,
)
from tools import scores

ROOT = scores.SCORE_LOG.parent


@pytest.fixture
def logdir(tmp_path):
    """A run directory with the files that the score log needs."""
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
def score_log(tmp_path):
    return tmp_path / "scores.csv"


def entry(name: str, date: str = "2025-01-01T00:00:00+00:00", **values) -> ScoreEntry:
    return ScoreEntry(date, name, f"logs/{name}", "abc", "def", "accuracy", **values)


def test_a_run_is_added_with_commit_config_and_scores(logdir, score_log):
    end = call_tool(scores, "add", logdir, "--leaderboard", "0.5", "--note", "first, light", "--score-log", score_log)
    assert end.code == 0, end.err
    [row] = csv.DictReader(score_log.open())
    assert list(row) == COLUMNS
    assert (row["name"], row["commit"], row["metric"], row["note"]) == (
        "first",
        "0123456789ab",
        "accuracy",
        "first, light",
    )
    assert (row["valid"], row["test"], row["public"], row["private"]) == ("0.75", "", "0.5", "")
    shown = call_tool(scores, "show", "--score-log", score_log).out
    assert "0.7500" in shown
    assert "-0.2500" in shown


def test_options_override_predictions_and_predictions_override_training(logdir, score_log):
    (logdir / "predictions").mkdir()
    valid, test = random_predictions(30, 1), random_predictions(20, 2)
    write_predictions(logdir / "predictions/valid.csv", valid)
    write_predictions(logdir / "predictions/test.csv", test)
    assert call_tool(scores, "add", logdir, "--score-log", score_log).code == 0
    assert call_tool(scores, "add", logdir, "--name", "other", "--valid", "0.1", "--score-log", score_log).code == 0
    first, second = read_score_log(score_log)
    assert (first.valid, first.test) == (score(valid)["accuracy"], score(test)["accuracy"])
    assert (second.valid, second.test) == (0.1, first.test)


@pytest.mark.parametrize("metric", ["loss", "top2"])
def test_a_metric_of_training_is_not_computed_from_predictions(logdir, score_log, metric):
    (logdir / "config.json").write_text(json.dumps({"main_metric": metric, "minimize_metric": True}))
    (logdir / "run.json").write_text(json.dumps({"best": {"metric": metric, "score": 1.25}}))
    (logdir / "predictions").mkdir()
    for split in ("valid", "test"):
        write_predictions(logdir / f"predictions/{split}.csv", random_predictions(30, 1))
    end = call_tool(scores, "add", logdir, "--score-log", score_log)
    assert end.code == 0, end.err
    assert (
        f"note     {metric} is known of training only, not of {logdir}/predictions/test.csv; --test sets it" in end.out
    )
    [line] = read_score_log(score_log)
    assert (line.metric, line.valid, line.test) == (metric, 1.25, None)
    table = random_predictions(30, 1)
    assert call_tool(scores, "add", logdir, "--metric", "log_loss", "--name", "b", "--score-log", score_log).code == 0
    assert {line.name: line for line in read_score_log(score_log)}["b"].test == score(table)["log_loss"]


@CLASSES_ONLY
def test_a_metric_of_scikit_learn_is_computed_from_predictions(logdir, score_log):
    (logdir / "config.json").write_text('{"main_metric": "macro_f1"}')
    (logdir / "predictions").mkdir()
    table = random_predictions(30, 1)
    write_predictions(logdir / "predictions/test.csv", table)
    assert call_tool(scores, "add", logdir, "--score-log", score_log).code == 0
    [line] = read_score_log(score_log)
    assert line.test == f1_score(table.targets, table.values.argmax(1), average="macro")


@CLASSES_ONLY
def test_an_undefined_score_stays_empty(logdir, score_log):
    (logdir / "config.json").write_text('{"main_metric": "roc_auc"}')
    table = random_predictions(30, 1)
    ranks = replace(table, values=table.values / 2)  # rows that do not sum to one, as of ranks
    (logdir / "predictions").mkdir()
    write_predictions(logdir / "predictions/valid.csv", ranks)
    end = call_tool(scores, "add", logdir, "--leaderboard", "0.9", "--score-log", score_log)
    assert end.code == 0
    assert f"note     roc_auc is undefined for {logdir}/predictions/valid.csv: valid stays empty" in end.out
    [line] = read_score_log(score_log)
    assert (line.valid, line.public) == (None, 0.9)


def predict_blend(logdir):
    """Create a directory that has only predictions, like the output of tools/blend.py."""
    folder = logdir.parent / "blend"
    (folder / "predictions").mkdir(parents=True)
    write_predictions(folder / "predictions/valid.csv", random_predictions(30, 1))
    return folder


@CLASSES_ONLY
def test_a_blend_uses_the_metric_of_the_other_lines_or_of_the_option(logdir, score_log):
    folder, table = predict_blend(logdir), random_predictions(30, 1)
    (logdir / "config.json").write_text('{"main_metric": "macro_f1"}')
    assert call_tool(scores, "add", logdir, "--leaderboard", "0.5", "--score-log", score_log).code == 0
    assert call_tool(scores, "add", folder, "--score-log", score_log).code == 0
    lines = {line.name: line for line in read_score_log(score_log)}
    assert lines["blend"].metric == "macro_f1"
    assert lines["blend"].valid == f1_score(table.targets, table.values.argmax(1), average="macro")
    assert (
        call_tool(scores, "add", folder, "--name", "by loss", "--metric", "log_loss", "--score-log", score_log).code
        == 0
    )
    assert {line.name: line for line in read_score_log(score_log)}["by loss"].valid == score(table)["log_loss"]
    end = call_tool(scores, "add", folder, "--name", "third", "--metric", "loss", "--score-log", score_log)
    assert_rejected(end, "--metric loss is not a known metric; did you mean 'log_loss'?")
    end = call_tool(scores, "add", folder, "--name", "third", "--score-log", score_log)
    assert_rejected(
        end, f"{folder} is not a run and {score_log} has the metrics log_loss, macro_f1; choose one with --metric."
    )
    end = call_tool(scores, "add", folder, "--metric", "macro_f2", "--name", "third", "--score-log", score_log)
    assert_rejected(end, "--metric macro_f2 is not a known metric; did you mean 'macro_f1'?")
    assert call_tool(scores, "add", folder, "--leaderboard", "0.5", "--update", "--score-log", score_log).code == 0


def test_update_reads_new_predictions_and_works_without_the_directory(logdir, score_log):
    assert call_tool(scores, "add", logdir, "--leaderboard", "0.5", "--score-log", score_log).code == 0
    (logdir / "predictions").mkdir()
    valid, test = random_predictions(30, 1), random_predictions(20, 2)
    write_predictions(logdir / "predictions/valid.csv", valid)
    write_predictions(logdir / "predictions/test.csv", test)
    end = call_tool(scores, "add", logdir, "--update", "--score-log", score_log)
    assert (end.code, "changed  valid was 0.7500\n" in end.out) == (0, True)
    shutil.rmtree(logdir)
    assert call_tool(scores, "add", logdir, "--private", "0.4", "--update", "--score-log", score_log).code == 0
    [line] = read_score_log(score_log)
    assert (line.valid, line.test) == (score(valid)["accuracy"], score(test)["accuracy"])
    assert (line.public, line.private, line.commit, line.config) == (0.5, 0.4, "0123456789ab", "fedcba987654")


def test_a_directory_of_folds_is_added_as_one_line(logdir, score_log):
    folds = logdir.parent
    shutil.copytree(logdir, folds / "second")
    (folds / "predictions").mkdir()
    write_predictions(folds / "predictions/valid.csv", random_predictions(30, 1))
    assert call_tool(scores, "add", folds, "--score-log", score_log).code == 0
    [line] = read_score_log(score_log)
    assert (line.name, line.commit, line.metric) == ("logs", "0123456789ab", "accuracy")
    assert line.valid == score(random_predictions(30, 1))["accuracy"]
    assert line.config not in ("", "fedcba987654")  # the hash of a single fold


def test_a_directory_without_scores_is_not_added(logdir, score_log):
    folds = logdir.parent
    end = call_tool(scores, "add", folds, "--score-log", score_log)
    message = f"{folds} has no scores; write its predictions with tools/predict.py, or give --leaderboard."
    assert (end.code, end.err) == (2, f"error: {message}\n")
    assert not score_log.exists()
    assert call_tool(scores, "add", folds, "--score-log", score_log, "--leaderboard", "0.5").code == 0


def test_a_submission_is_not_added_twice_but_can_be_updated(logdir, score_log):
    assert call_tool(scores, "add", logdir, "--leaderboard", "0.5", "--score-log", score_log).code == 0
    before = score_log.read_bytes()
    end = call_tool(scores, "add", logdir, "--leaderboard", "0.6", "--score-log", score_log)
    assert_rejected(end, f"{score_log} already has first of {logdir}, from ")
    assert score_log.read_bytes() == before
    assert call_tool(scores, "add", logdir, "--private", "0.4", "--update", "--score-log", score_log).code == 0
    [line] = read_score_log(score_log)
    assert (line.valid, line.public, line.private) == (0.75, 0.5, 0.4)
    assert call_tool(scores, "add", logdir, "--name", "second", "--score-log", score_log).code == 0
    assert [line.name for line in read_score_log(score_log)] == ["first", "second"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["add", "nowhere"],
            "nowhere has neither a run nor predictions; give a run directory, such as logs/baseline.",
        ),
        (["add", "{logdir}/../..", "--score-log", "{score_log}"], "has neither a run nor predictions"),
        (["add", "README.md"], "README.md has neither a run nor predictions"),
        (
            ["show", "--score-log", "tests"],
            "--score-log tests is a directory; give the path of a file, such as scores.csv.",
        ),
        (
            ["add", "{logdir}", "--score-log", "README.md/x.csv"],
            "--score-log README.md/x.csv cannot be written: README.md is not a directory",
        ),
        (
            ["add", "{logdir}", "--score-log", "nowhere/x.csv"],
            "--score-log nowhere/x.csv cannot be written: nowhere is not a directory",
        ),
        (["add"], "scores.py add needs PATH: a run directory, "),
        (["add", "{logdir}", "--leaderboard", "nan"], "--leaderboard nan must be a finite number."),
        (
            ["add", "{logdir}", "--update", "--score-log", "{score_log}"],
            "does not have first of {logdir}; add it without --update.",
        ),
        (["ad", "{logdir}"], "unknown command or option ad; did you mean 'add'? See python tools/scores.py --help."),
        (
            ["plot", "--score-log", "{score_log}"],
            "needs two or more submissions with valid and public scores of one metric;",
        ),
        (["plot", "--against", "privat"], "--against privat is not a valid choice; did you mean 'private'?"),
    ],
)
def test_invalid_options_are_rejected_without_side_effects(logdir, score_log, flags, message):
    end = call_tool(scores, *(flag.format(logdir=logdir, score_log=score_log) for flag in flags))
    assert_rejected(end, message.format(logdir=logdir))
    assert not score_log.exists()


HEADER = ",".join(COLUMNS)


def test_a_file_system_without_locks_is_reported_and_the_entry_is_added(score_log, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "_reported_missing", set())
    monkeypatch.setattr("fcntl.flock", fail)
    add_entry(score_log, entry("a"))
    add_entry(score_log, entry("b"))
    assert [line.name for line in read_score_log(score_log)] == ["a", "b"]
    assert caplog.text.count("has no locks") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,score\n", "does not begin with date,name,logdir"),
        (f"{HEADER}\na,b\n", "line 2: 2 values for 11 columns; complete the line, or delete it."),
        (f"{HEADER}\nd,n,l,c,h,accuracy,x,,,,\n", "line 2: valid is 'x', but must be a finite number or empty."),
        (
            f'{HEADER}\nd,"n,l,c,h,accuracy,1,,,,\nd,m,l,c,h,accuracy,1,,,,\n',
            "line 2 has a quotation mark that does not",
        ),
        ("<<<<<<< ours\n", "does not begin with date,name,logdir"),
    ],
)
def test_a_damaged_score_log_is_rejected_with_the_line(logdir, score_log, text, message):
    score_log.write_text(text)
    assert_rejected(call_tool(scores, "add", logdir, "--score-log", score_log), message)
    assert_rejected(call_tool(scores, "show", "--score-log", score_log), message)
    assert score_log.read_text() == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "is encoded as UTF-16; save it as UTF-8"),
        (b"date,\xe9\n", "line 1 has the byte 0xe9, which is not UTF-8"),
    ],
)
def test_a_score_log_that_is_not_text_is_rejected(logdir, score_log, content, message):
    score_log.write_bytes(content)
    assert_rejected(call_tool(scores, "add", logdir, "--score-log", score_log), f"{score_log} {message}")
    assert score_log.read_bytes() == content


@pytest.mark.parametrize("name", ["run.json", "config.json"])
@pytest.mark.parametrize("text", ['{"git_commit": "01', "[]"])
def test_a_damaged_run_file_is_reported(logdir, score_log, name, text):
    (logdir / name).write_text(text)
    assert_rejected(call_tool(scores, "add", logdir, "--score-log", score_log), f"{logdir / name} is damaged (")
    assert not score_log.exists()


def test_lines_duplicated_by_a_merge_count_once(score_log):
    add_entry(score_log, entry("first"))
    score_log.write_text(score_log.read_text() * 2)
    assert [line.name for line in read_score_log(score_log)] == ["first"]


@pytest.fixture
def merge(tmp_path):
    """Return a function that merges a branch with the changes of `other` into one with those of `main`."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=tests", "-c", "user.email=tests@localhost"]

    def run(*arguments: str) -> None:
        subprocess.run([*git, *arguments], check=True, capture_output=True)

    def merge(start: Callable, other: Callable, main: Callable) -> None:
        run("init", "-q", "-b", "main")
        for name in (".gitattributes", ".gitignore"):  # the score log is tracked, and merged by union
            shutil.copy(ROOT / name, tmp_path)
        for branch, change in ((None, start), ("other", other), ("main", main)):
            if branch is not None:
                run("checkout", "-q", *(["-b"] if branch == "other" else []), branch)
            change()
            run("add", ".")
            run("commit", "-q", "-m", "change")
        run("merge", "-q", "-m", "merge", "other")

    return merge


def test_a_merge_of_two_updates_of_one_line_keeps_both(score_log, merge):
    key = entry("first").key
    merge(
        lambda: add_entry(score_log, entry("first", valid=0.75)),
        lambda: update_entry(score_log, key, public=0.5),
        lambda: update_entry(score_log, key, private=0.4, note="mine"),
    )
    assert len(score_log.read_text().splitlines()) == 3
    [line] = read_score_log(score_log)
    assert (line.valid, line.public, line.private, line.note) == (0.75, 0.5, 0.4, "mine")
    assert "note" not in call_tool(scores, "show", "--score-log", score_log).out.splitlines()[-1]


def test_conflicting_lines_are_kept_and_reported_until_an_update(score_log, merge):
    key = entry("first").key
    merge(
        lambda: add_entry(score_log, entry("first", valid=0.75)),
        lambda: update_entry(score_log, key, public=0.5),
        lambda: update_entry(score_log, key, public=0.6),
    )
    end = call_tool(scores, "show", "--score-log", score_log)
    assert end.code == 0, end.err
    assert "0.5000" in end.out
    assert "0.6000" in end.out
    note = "note     first of logs/first has 2 conflicting lines: public 0.5 or 0.6; set the correct value with"
    assert end.out.splitlines()[-1].startswith(note)
    add_entry(score_log, entry("second"))
    assert [line.name for line in read_score_log(score_log)] == ["first", "first", "second"]
    update_entry(score_log, key, public=0.6)
    assert [line.public for line in read_score_log(score_log)] == [0.6, None]


@pytest.mark.parametrize("begun", [True, False])
def test_a_merge_keeps_the_lines_of_both_branches(score_log, merge, begun):
    merge(
        lambda: add_entry(score_log, entry("old")) if begun else None,
        lambda: add_entry(score_log, entry("other", date="2025-01-02")),
        lambda: add_entry(score_log, entry("main", date="2025-01-03")),
    )
    names = [line.name for line in read_score_log(score_log)]
    assert sorted(names) == sorted(["other", "main", *(["old"] if begun else [])])
    add_entry(score_log, entry("next", date="2025-01-04"))
    lines = score_log.read_text().splitlines()
    assert len(lines) == len(names) + 2
    assert lines[1:] == sorted(lines[1:])


def _add_some(score_log, number: int) -> None:
    for index in range(10):
        add_entry(score_log, entry(f"{number}_{index}"))


def test_concurrent_adds_lose_no_line_and_leave_no_file(tmp_path):
    score_log = tmp_path / "folder/scores.csv"
    score_log.parent.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_some, args=(score_log, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    assert len(read_score_log(score_log)) == 30
    assert [path.name for path in score_log.parent.iterdir()] == ["scores.csv"]


def test_the_table_is_sorted_by_the_direction_of_each_metric(score_log):
    for name, metric, valid in (("a", "accuracy", 0.5), ("b", "accuracy", 0.9), ("c", "loss", 0.5), ("d", "loss", 0.1)):
        add_entry(score_log, ScoreEntry(f"2025-{name}", name, name, "", "", metric, valid))
    shown = [line.split()[0] for line in call_tool(scores, "show", "--score-log", score_log).out.splitlines()]
    assert shown == ["name", "b", "a", "d", "c"]


def test_the_former_name_of_the_score_log_option_still_works(score_log):
    add_entry(score_log, entry("first", valid=0.75))
    end = call_tool(scores, "show", "--ledger", score_log)  # glossary: allow
    assert end.code == 0, end.err
    assert "0.7500" in end.out


def test_an_empty_score_log_prints_how_to_add_a_score(score_log):
    assert "no scores yet: python tools/scores.py add" in call_tool(scores, "show", "--score-log", score_log).out


@pytest.mark.parametrize("flag", ["--score-log", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])  # the pipe breaks at the end, or at the first print
def test_a_closed_output_pipe_ends_the_command_quietly(score_log, flag, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tools.scores", "show", flag, *([str(score_log)] if flag == "--score-log" else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    end = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (end.returncode, end.stderr) == (141, "")


def test_rank_disagreements_are_listed_largest_first():
    pairs = [ScorePair("a", 0.9, 0.1), ScorePair("b", 0.8, 0.5), ScorePair("c", 0.1, 0.4), ScorePair("d", 0.2, 0.9)]
    assert find_rank_disagreements(pairs) == [("a", "d"), ("a", "c"), ("b", "d"), ("a", "b")]
    assert find_rank_disagreements([ScorePair("a", 1, 1), ScorePair("b", 2, 2), ScorePair("c", 2, 3)]) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("plot", "plot must end in .png, .pdf or .svg."),
        ("plot.xyz", "plot.xyz must end in .png, .pdf or .svg."),
        ("scores.csv/plot.png", "plot.png cannot be written (File exists); use another --output."),
        ("folder.png", "folder.png cannot be written (Is a directory); use another --output."),
    ],
)
def test_an_invalid_plot_output_is_rejected(tmp_path, score_log, output, message):
    (tmp_path / "folder.png").mkdir()
    for index in range(2):
        add_entry(score_log, entry(f"run{index}", valid=index / 2, public=index / 3))
    assert_rejected(call_tool(scores, "plot", "--score-log", score_log, "--output", tmp_path / output), message)


def test_plot_prints_the_runs_that_the_scores_rank_differently(tmp_path, score_log):
    for number, (valid, public) in enumerate([(0.9, 0.8), (0.8, 0.9), (0.7, 0.7)]):
        add_entry(score_log, entry(f"run{number}", valid=valid, public=public))
    image = tmp_path / "plots/scores.png"
    end = call_tool(scores, "plot", "--score-log", score_log, "--output", image)
    assert end.code == 0, end.err
    assert "0.500 (Spearman, 3 submissions)" in end.out
    assert "disagree run0 has higher accuracy than run1 on valid, but lower on public" in end.out
    assert image.read_bytes().startswith(b"\x89PNG")


def test_plot_uses_the_most_frequent_metric_or_that_of_the_option(tmp_path, score_log):
    for number, metric in enumerate(["loss", "accuracy", "accuracy", "loss", "accuracy", "f1"]):
        line = entry(f"run{number}", valid=number / 9, public=number / 8)
        add_entry(score_log, replace(line, metric=metric))
    flags = "plot", "--score-log", score_log, "--output", tmp_path / "x.png"
    end = call_tool(scores, *flags)
    assert end.code == 0, end.err
    assert "(Spearman, 3 submissions)" in end.out
    assert "omitted  2 of loss, 1 of f1; choose another metric than accuracy with --metric\n" in end.out
    assert "(Spearman, 2 submissions)" in call_tool(scores, *flags, "--metric", "loss").out
    message = f"valid and public scores of one metric; {score_log} has 2 of loss, 3 of accuracy, 1 of f1."
    assert_rejected(call_tool(scores, *flags, "--metric", "f1"), message)
    assert_rejected(call_tool(scores, *flags, "--metric", "macro_f1"), message)


def test_equal_leaderboard_scores_have_no_rank_correlation(tmp_path, score_log):
    for number in range(3):
        add_entry(score_log, entry(f"猫 $x^$ {number}", valid=number / 3, public=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        end = call_tool(scores, "plot", "--score-log", score_log, "--output", tmp_path / "x.png")
    assert end.code == 0, end.err
    assert "correlation of valid and public: undefined, because all public scores are equal (Spearman, 3 sub" in end.out

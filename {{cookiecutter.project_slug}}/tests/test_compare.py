"""tools/compare.py: intervals equal scipy's and cover the truth in simulations; equal recipes show no difference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import End, run_train
from scipy import stats

from batteries.core.errors import UserError
from batteries.evaluation.comparison import compare_samples, confidence_interval, pairs_needed
from batteries.evaluation.predictions import Predictions, write_predictions
from batteries.evaluation.repeated_runs import read_recipe
from tools import compare

SPLIT = {"file": "splits/default.csv", "sha256": "1" * 64, "folds": 5}


def write_run(directory: Path, score: float | None, seed: int = 0, fold: int = 0, **changes: Any) -> Path:
    """Write config.json and run.json of a finished run."""
    directory.mkdir(parents=True)
    best = {"metric": changes.pop("metric", "accuracy"), "score": score, "stage": "stage1", "epoch": 2}
    config = {"seed": seed, "fold": fold, "minimize_metric": changes.pop("minimize", False), "stages": []}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "run.json").write_text(json.dumps({"exit": "finished", "best": best, "split": SPLIT, **changes}))
    return directory


def write_recipe(directory: Path, scores: list[float], **changes: Any) -> Path:
    for seed, score in enumerate(scores):
        write_run(directory / f"seed_{seed}", score, seed, **changes)
    return directory


def run_compare(*flags: str | Path) -> End:
    return run_train(compare.main, compare.Options, *map(str, flags), name="tools/compare.py", repeats=False)


A = [0.90, 0.91, 0.89, 0.92, 0.90]
B = [0.93, 0.94, 0.93, 0.94, 0.92]


def test_better_recipe_is_named_with_the_interval_of_scipy(tmp_path):
    first = write_recipe(tmp_path / "a", A)
    second = write_recipe(tmp_path / "b", B)
    end = run_compare(first, second)
    assert end.code == 0, end.err
    differences = np.subtract(B, A)
    interval = stats.ttest_rel(B, A).confidence_interval()
    expected = f"{differences.mean():+.4f} (95 % interval {interval.low:+.4f} to {interval.high:+.4f}), 5 pairs"
    assert f"{second} minus {first}: {expected}" in end.out
    assert f"{second} is better.\n" in end.out
    assert "seed 3 fold 0  accuracy 0.9200 and 0.9400  +0.0200" in end.out


def test_lower_is_better_for_a_metric_that_is_minimised(tmp_path):
    first = write_recipe(tmp_path / "a", A, metric="loss", minimize=True)
    second = write_recipe(tmp_path / "b", B, metric="loss", minimize=True)
    assert f"{first} is better.\n" in run_compare(first, second).out


def test_recipe_does_not_differ_from_itself_and_similar_ones_show_no_difference(tmp_path):
    first = write_recipe(tmp_path / "a", A)
    assert "The runs do not differ: all pairs have equal scores." in run_compare(first, first).out
    second = write_recipe(tmp_path / "b", [0.91, 0.90, 0.90, 0.915, 0.90])
    out = run_compare(first, second).out
    assert "The runs do not show a difference. An effect of this size would need about " in out
    assert "is better" not in out


def test_one_pair_shows_nothing(tmp_path):
    first = write_run(tmp_path / "a", 0.9)
    second = write_run(tmp_path / "b", 0.95)
    out = run_compare(first, second).out
    assert f"{second} minus {first}: +0.0500, 1 pair\n" in out
    assert "One pair does not show how much scores vary" in out


def test_one_recipe_is_summarised(tmp_path):
    out = run_compare(write_recipe(tmp_path / "a", A)).out
    low, high = stats.t.interval(0.95, 4, loc=np.mean(A), scale=stats.sem(A))
    assert f"standard deviation {np.std(A, ddof=1):.4f}  95 % interval {low:.4f} to {high:.4f}\n" in out


def test_interval_over_folds_is_wider_because_their_train_splits_overlap(tmp_path):
    for fold, (a, b) in enumerate(zip(A, B, strict=True)):
        write_run(tmp_path / f"a/fold_{fold}", a, fold=fold)
        write_run(tmp_path / f"b/fold_{fold}", b, fold=fold)
    differences = np.subtract(B, A)
    # Nadeau and Bengio 2003: the variance of the mean has the factor 1 / n + test size / train size.
    error = np.sqrt((1 / 5 + 1 / 4) * differences.var(ddof=1))
    low, high = differences.mean() + np.array([-1, 1]) * stats.t.ppf(0.975, 4) * error
    assert f"(95 % interval {low:+.4f} to {high:+.4f}), 5 pairs" in run_compare(tmp_path / "a", tmp_path / "b").out


@pytest.mark.parametrize(("method", "pairs"), [("t", 3), ("t", 10), ("bootstrap", 30)])
def test_intervals_cover_the_true_difference_as_often_as_they_state(method, pairs):
    generator = np.random.default_rng(0)
    repetitions, truth = 500, 0.3
    covered = 0
    for _ in range(repetitions):
        interval = confidence_interval(generator.normal(truth, 1, size=pairs), method=method)
        covered += interval.low <= truth <= interval.high
    # The bootstrap of 30 values covers a little less; the tolerance is 3.5 binomial standard errors.
    expected = 0.95 if method == "t" else 0.93
    assert abs(covered / repetitions - expected) < 3.5 * np.sqrt(expected * (1 - expected) / repetitions)


def test_no_difference_is_shown_between_equal_recipes_in_95_percent_of_cases():
    generator = np.random.default_rng(1)
    shown = sum(confidence_interval(generator.normal(0, 1, size=5)).excludes_zero for _ in range(500))
    assert stats.binomtest(shown, 500, 0.05).pvalue > 0.001


@pytest.mark.parametrize("effect", [0.3, 1.0, 3.0])
def test_number_of_pairs_that_are_needed_has_the_stated_power_in_a_simulation(effect):
    differences = np.array([-1.0, 1.0]) / np.sqrt(2) + effect  # with a standard deviation of 1
    needed = pairs_needed(differences)
    generator = np.random.default_rng(2)

    def power(count: int) -> float:
        samples = generator.normal(effect, 1, size=(4000, count))
        return float((stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean())

    assert power(needed) > 0.77
    assert needed <= 3 or power(needed - 2) < 0.82


@pytest.mark.parametrize("differences", [[0.0, 0.0], [0.1, 0.1], [0.1], [1e-9, 1.0, -1.0]])
def test_number_of_pairs_is_unknown_without_an_effect_or_a_deviation(differences):
    assert pairs_needed(np.array(differences)) is None


def write_folds(directory: Path, shift: float) -> Path:
    """Write runs of two seeds and five folds."""
    scores = np.random.default_rng(5).normal(0.9, 0.01, size=(2, 5)) + shift
    scores += np.random.default_rng(6 if shift else 7).normal(0, 0.01, size=(2, 5))
    for (seed, fold), score in np.ndenumerate(scores):
        write_run(directory / f"seed_{seed}_fold_{fold}", float(score), seed, fold)
    return directory


def test_pairs_that_are_needed_take_the_overlap_of_folds_into_account():
    differences = np.random.default_rng(3).normal(1, 1, size=10)
    plain = pairs_needed(differences)
    few = pairs_needed(differences, overlap=0.01)
    assert plain is not None
    assert few is not None
    assert few > plain
    # With infinitely many pairs, the variance of the mean is still 0.25 times that of the differences.
    limit = stats.norm.sf(1.96 - abs(differences.mean()) / (0.5 * differences.std(ddof=1)))
    assert limit < 0.8
    assert pairs_needed(differences, overlap=0.25) is None

    def power(count: int) -> float:  # of the interval that is printed, where runs of all pairs have a common part
        generator = np.random.default_rng(4)
        deviation = differences.std(ddof=1)
        common = generator.normal(0, deviation * 0.1, size=(4000, 1))
        samples = generator.normal(differences.mean(), deviation, size=(4000, count)) + common
        error = samples.std(axis=1, ddof=1) * np.sqrt(1 / count + 0.01)
        return float((abs(samples.mean(1)) > stats.t.ppf(0.975, count - 1) * error).mean())

    assert 0.77 < power(few) < 0.83


def test_folds_that_can_show_no_effect_of_this_size_are_named(tmp_path):
    first, second = write_folds(tmp_path / "a", 0.0), write_folds(tmp_path / "b", 0.004)
    end = run_compare(first, second)
    assert end.code == 0, end.err
    line = "The runs do not show a difference. No number of pairs of these folds would show an effect of this size "
    assert line in end.out


def test_bootstrap_is_rejected_for_folds_and_for_few_pairs(tmp_path):
    end = run_compare(write_folds(tmp_path / "a", 0.0), write_folds(tmp_path / "b", 0.004), "--method", "bootstrap")
    assert end.code == 2
    assert end.err.startswith("error: --method bootstrap has no correction for folds, whose train splits overlap; use ")
    end = run_compare(write_recipe(tmp_path / "c", A), write_recipe(tmp_path / "d", B), "--method", "bootstrap")
    assert (end.code, end.out) == (2, "")
    assert end.err == "error: --method bootstrap needs 10 pairs or more, and there are 5; use --method t.\n"


CLASSES = ("cat", "dog")


def write_table(path: Path, correct: list[bool], ids: tuple[str, ...] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.where(np.array(correct)[:, None], [0.9, 0.1], [0.2, 0.8])
    ids = ids or tuple(map(str, range(len(correct))))
    write_predictions(path, Predictions(str(path), ids, CLASSES, values, np.zeros(len(correct), dtype=np.int64)))
    return path


def test_samples_are_compared_by_mcnemars_exact_test(tmp_path):
    first = write_run(tmp_path / "a", 0.5)
    second = write_run(tmp_path / "b", 0.7)
    generator = np.random.default_rng(0)
    a, b = generator.random(200) < 0.6, generator.random(200) < 0.75
    write_table(first / "predictions/valid.csv", a.tolist())
    write_table(second / "predictions/valid.csv", b.tolist())
    out = run_compare(first, second).out
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p_value = stats.binomtest(only_b, only_a + only_b).pvalue
    assert f"only the first is correct for {only_a}, only the second for {only_b}, p = {p_value:.3g} (McNemar)" in out
    [accuracy] = [line for line in out.splitlines() if line.startswith("accuracy of 200 samples: ")]
    assert f"{b.mean() - a.mean():+.4f}" in accuracy
    assert accuracy.endswith("; a difference" if p_value < 0.05 else "; no difference is shown")


def test_samples_of_several_runs_are_compared_by_their_mean_scores(tmp_path):
    firsts = [write_table(tmp_path / f"a{seed}.csv", [True, seed == 0, False, False]) for seed in (0, 1)]
    seconds = [write_table(tmp_path / f"b{seed}.csv", [True, True, seed == 0, False]) for seed in (0, 1)]
    accuracy, log_loss = compare_samples(firsts, seconds)
    assert (accuracy.metric, accuracy.samples, accuracy.p_value) == ("accuracy", 4, None)
    assert accuracy.interval.mean == pytest.approx(np.mean([0, 0.5, 0.5, 0]))
    assert log_loss.metric == "log_loss"


def test_equal_predictions_show_no_difference(tmp_path):
    first = write_run(tmp_path / "a", 0.5)
    second = write_run(tmp_path / "b", 0.5)
    for run in (first, second):
        write_table(run / "predictions/valid.csv", [True, False, True])
    out = run_compare(first, second).out
    assert "accuracy of 3 samples: +0.0000 (95 % interval +0.0000 to +0.0000); only the first is correct for 0" in out
    assert out.count("no difference is shown") == 2


def test_a_split_without_predictions_is_rejected_with_the_nearest_one(tmp_path):
    runs = [write_run(tmp_path / name, 0.5) for name in ("a", "b")]
    for run in runs:
        write_table(run / "predictions/test.csv", [True, False])
    end = run_compare(*runs, "--split", "tset")
    assert end.code == 2
    assert end.err == "error: --split tset: no run has predictions/tset.csv; did you mean 'test'?\n"


def test_invalid_predictions_are_rejected_before_anything_is_printed(tmp_path):
    runs = [write_run(tmp_path / name, 0.5) for name in ("a", "b")]
    for run in runs:
        write_table(run / "predictions/valid.csv", [True, False])
    (runs[1] / "predictions/valid.csv").write_text("nothing")
    end = run_compare(*runs)
    assert (end.code, end.out) == (2, "")


def test_other_samples_are_rejected(tmp_path):
    first = write_table(tmp_path / "a.csv", [True, False])
    second = write_table(tmp_path / "b.csv", [True, False], ids=("0", "7"))
    with pytest.raises(UserError) as error:
        compare_samples([first], [second])
    assert str(error.value) == (
        f"{first} and {second} do not both have the same samples; predict the same split with both runs."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seed": 9},
            "a (seed 0 fold 0) and b (seed 9 fold 0) have no seed and fold in common; train both recipes with",
        ),
        ({"metric": "loss"}, "b has the main metric loss, but a has accuracy; they cannot be compared."),
        ({"minimize": True}, "b has the --minimize-metric True, but a has False; they cannot be compared."),
        (
            {"split": {**SPLIT, "sha256": "2" * 64}},
            "b has the split file with sha256 222222222222…, but a has 111111111111…; they cannot be compared.",
        ),
        ({"exit": "failed: boom"}, "b is not finished (failed: boom); continue it with --resume, or leave it out."),
        ({"score": None}, "b has no finite accuracy; leave it out."),
        ({"score": float("nan")}, "b has no finite accuracy; leave it out."),
        ({"score": "0.9"}, "b has no finite accuracy; leave it out."),
        (
            {"exit": None},
            "b is not finished (it has no run.json with an exit); continue it with --resume, or leave it ",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_rejected(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), 0.5)
    write_run(Path("b"), **{"score": 0.6, **changes})
    end = run_compare("a", "b")
    assert end.code == 2
    assert end.err.startswith(f"error: {message}")
    assert end.err.count("\n") == 1


def test_two_runs_of_one_seed_are_rejected(tmp_path):
    write_run(tmp_path / "a/x", 0.5)
    write_run(tmp_path / "a/y", 0.6)
    with pytest.raises(UserError, match=r"x and .*y both have seed 0 fold 0; give the directories of one recipe"):
        read_recipe("a", [tmp_path / "a/x", tmp_path / "a/y"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "b", "c"], "3 directories are given; give one or two."),
        (["missing"], "missing"),
        (["a", "--confidence", "1"], "--confidence 1 must be greater than 0 and less than 1."),
        (["a", "--confidence", "nan"], "--confidence nan must be greater than 0 and less than 1."),
        (["a", "--confidence", "0"], "--confidence 0 must be greater than 0 and less than 1."),
    ],
)
def test_invalid_options_are_rejected(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), 0.5)
    end = run_compare(*flags)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert message in end.err

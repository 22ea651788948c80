"""Tests of prediction tables, blending, fitted weights and tools/blend.py."""

import decimal
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import log_loss
from tables import CLASSES, assert_rejected, call_tool, random_predictions, write_lines

from batteries.core.errors import UserError
from batteries.evaluation.predictions import Predictions, match_predictions, read_predictions, write_predictions
from batteries.evaluation.scoring import bootstrap_gap, score
from batteries.submission.blending import blend, fit_weights, ranks
from tools import blend as blend_tool

probability = st.floats(0, 1, allow_subnormal=True)
coarse = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # for ties
shapes = st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 4))


@st.composite
def stacks(draw, elements=coarse | probability):
    """Draw tables (M, N, C) and weights (M,)."""
    shape = draw(shapes)
    weights = draw(st.lists(st.floats(0.01, 9), min_size=shape[0], max_size=shape[0]))
    return draw(arrays(np.float64, shape, elements=elements)), weights


def slow_blend(tables, method, weights, power) -> list[list[float]]:
    """Blend one number at a time, by the formula."""
    total = sum(weights)

    def one(row: int, column: int) -> float:
        values = [(weight / total, float(table[row][column])) for weight, table in zip(weights, tables, strict=True)]
        if method == "mean":
            return sum(weight * value for weight, value in values)
        if method == "power":
            return sum(weight * value**power for weight, value in values) ** (1 / power)
        return math.prod(max(value, 1e-15) ** weight for weight, value in values)

    return [[one(row, column) for column in range(tables.shape[2])] for row in range(tables.shape[1])]


@settings(max_examples=60, deadline=None)
@given(stacks(), st.sampled_from(["mean", "power", "geometric"]), st.floats(0.5, 5))
def test_blends_match_their_formulas(stack, method, power):
    tables, weights = stack
    wanted = slow_blend(tables, method, weights, power)
    assert blend(tables, method, weights, power, normalize_rows=False) == pytest.approx(
        np.array(wanted), rel=1e-9, abs=1e-14
    )


@settings(max_examples=60, deadline=None)
@given(stacks(), st.sampled_from(["power", "geometric"]))
def test_rows_of_blended_distributions_sum_to_one(stack, method):
    tables, weights = stack
    tables = tables + 0.01
    tables /= tables.sum(2, keepdims=True)
    assert blend(tables, method, weights, 3.0).sum(1) == pytest.approx(1, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(stacks())
def test_ranks_match_scipy_by_column_on_the_scale_0_to_1(stack):
    tables, weights = stack
    size = tables.shape[1]
    for table in tables:
        for column in range(tables.shape[2]):
            wanted = (scipy.stats.rankdata(table[:, column]) - 1) / (size - 1) if size > 1 else [0.5]
            assert ranks(table)[:, column].tolist() == pytest.approx(wanted, abs=1e-15)
    by_hand = sum(weight * ranks(table) for weight, table in zip(weights, tables, strict=True)) / sum(weights)
    assert blend(tables, "rank", weights) == pytest.approx(by_hand, abs=1e-12)


def exact_power_mean(values: list[float], weights: list[float], power: float) -> float:
    """Compute with decimals of 60 digits and any exponent."""
    with decimal.localcontext(decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)):
        exact = [decimal.Decimal(value) for value in values]
        factors = [decimal.Decimal(weight) for weight in weights]
        exponent = decimal.Decimal(power)
        total = sum(factor * value**exponent for factor, value in zip(factors, exact, strict=True))
        return float((total / sum(factors)) ** (1 / exponent))


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, (3, 1, 1), elements=st.floats(1e-12, 1)),
    st.lists(st.floats(1e-3, 1.7), min_size=3, max_size=3),
    st.sampled_from([1e-300, 1.0, 1e308]),
    st.sampled_from([1e-9, 1e-3, 0.5, 2.0, 300.0, 5000.0, 1e6]),
)
def test_power_mean_is_accurate_for_any_power_and_weights(tables, weights, scale, power):
    weights = [weight * scale for weight in weights]
    wanted = exact_power_mean(tables[:, 0, 0].tolist(), weights, power)
    assert blend(tables, "power", weights, power, normalize_rows=False).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("flags", [["--power", "5000"], ["--power", "1e-12"], ["--weights", "1e308,1.7e308"]])
def test_extreme_powers_and_weights_give_rows_that_sum_to_one(tmp_path, flags):
    for number in (1, 2):
        write_predictions(tmp_path / f"{number}.csv", random_predictions(20, number))
    end = call_tool(
        blend_tool, tmp_path / "1.csv", tmp_path / "2.csv", "--method", "power", "--output", tmp_path / "o.csv", *flags
    )
    assert end.code == 0, end.err
    assert read_predictions(tmp_path / "o.csv").sums_to_one()


def test_ranks_do_not_depend_on_calibration():
    table = random_predictions(50).values
    assert np.array_equal(ranks(table), ranks(table**3))


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, (3, 2), elements=probability))
def test_written_predictions_are_read_back_bit_identically(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("tables") / "x.csv"
    table = Predictions(str(path), ("01", "NA", "a,b"), ("nan", "1"), values, np.array([1, 0, 1]))
    write_predictions(path, table)
    again, text = read_predictions(path), path.read_text()
    assert again.values.tobytes() == values.tobytes()
    assert (again.ids, again.classes, again.targets.tolist()) == (table.ids, table.classes, [1, 0, 1])  # type: ignore[union-attr]
    write_predictions(path, again)
    assert path.read_text() == text


def test_rows_are_matched_by_id_and_columns_by_class(tmp_path):
    table = random_predictions()
    order, columns = np.random.default_rng(1).permutation(12), [2, 0, 1]
    shuffled = Predictions(
        "b.csv",
        tuple(table.ids[index] for index in order),
        tuple(CLASSES[index] for index in columns),
        table.values[order][:, columns],
        np.array([columns.index(target) for target in table.targets[order]]),  # type: ignore[index]
    )
    write_predictions(tmp_path / "a.csv", table)
    write_predictions(tmp_path / "b.csv", shuffled)
    first, second = match_predictions([read_predictions(tmp_path / name) for name in ("a.csv", "b.csv")])
    assert first.values.tobytes() == second.values.tobytes()
    inputs = [tmp_path / "a.csv", tmp_path / "b.csv"]
    end = call_tool(blend_tool, *inputs, "--output", tmp_path / "out.csv", "--weights", "2,6")
    assert end.code == 0, end.err
    assert "weight 0.2500" in end.out
    assert read_predictions(tmp_path / "out.csv").values == pytest.approx(table.values, abs=1e-15)


GOOD = ["id,cat,dog", "a,0.5,0.5", "b,0.25,0.75"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id,cat,dog", "a,0.5,0.5"], "good.csv and {bad} do not match: id b missing in {bad}."),
        ([*GOOD, "c,1,0"], "good.csv and {bad} do not match: id c only in {bad}."),
        ([*GOOD, "b,1,0"], "{bad} has more than one row of id b."),
        (["id,cat,cow", *GOOD[1:]], "do not match: class dog missing in {bad}, class cow only in {bad}."),
        (["id,cat,dog", "a,0.5,nan", GOOD[2]], "{bad} has nan for class dog of id a; a probability is 0 to 1."),
        (["id,cat,dog", "a,0.5,", GOOD[2]], "{bad} has '' in column dog of id a; use a number."),
        (["id,cat,dog", "a,0.5,x", GOOD[2]], "{bad} has 'x' in column dog of id a; use a number."),
        (["id,cat,dog", "a,-0.5,1.5", GOOD[2]], "{bad} has -0.5 for class cat of id a; a probability is 0 to 1."),
        (
            ["id,cat,dog", "a,0.5,0.4", GOOD[2]],
            "{bad}: the probabilities of id a sum to 0.9, not to 1 (in 1 of 2 rows)",
        ),
        (["id,cat,dog", ",0.5,0.5", GOOD[2]], "{bad} has an empty id in row 1."),
        (["id,cat,cat", *GOOD[1:]], "{bad} has more than one column cat; keep one."),
        (
            ["name,cat,dog", *GOOD[1:]],
            "{bad} needs a column id and one column for each output; it has name,",
        ),
        (["id,target", "a,cat"], "{bad} needs a column id and one column for each output"),
        (["id,cat,dog"], "{bad} has no rows."),
        ([], "{bad} needs a column id and one column for each output; it has none."),
        (["x" * 200_000], "{bad} line 1 has a cell of more than 131,072 characters; close its quotation"),
        (
            ["id,cat,dog,target", "a,0.5,0.5,cow", "b,1,0,cat"],
            "{bad} has the target 'cow' for id a, which is not one of its classes.",
        ),
        (["id,cat,dog,target", "a,0.5,0.5,dog", "b,1,0,cat"], "good.csv and {bad} have different targets for id a."),
    ],
)
def test_an_invalid_table_is_rejected_without_output(tmp_path, lines, message):
    good = ["id,cat,dog,target", "a,0.5,0.5,cat", "b,0.25,0.75,cat"] if "different targets" in message else GOOD
    first, bad = write_lines(tmp_path / "good.csv", *good), write_lines(tmp_path / "bad.csv", *lines)
    end = call_tool(blend_tool, first, bad, "--output", tmp_path / "out.csv")
    assert_rejected(end, message.format(bad=bad))
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "1"], "--weights 1 has 1 weight for 2 inputs; give one per input."),
        (["--weights", "1,x"], "--weights 1,x must be numbers separated by commas, such as 2,1."),
        (["--weights", "1,-1"], "--weights 1,-1 must be 0 or more, finite, and not all 0."),
        (["--weights", "0,0"], "--weights 0,0 must be 0 or more, finite, and not all 0."),
        (["--weights", "1,nan"], "--weights 1,nan must be 0 or more"),
        (["--method", "power", "--power", "0"], "--power 0.0 must be over 0 and finite."),
        (["--power", "3"], "--power is for --method power, not mean."),
        (["--power", "2", "--method", "rank"], "--power is for --method power, not rank."),
        (
            ["--method", "median"],
            "--method median is not a valid choice; did you mean 'mean'? Use one of: mean, power, geometric, rank.",
        ),
        (["--fit-on", "x.csv"], "--fit-on has 1 file for 2 inputs; give one per input."),
        (["--fit-on", "x.csv", "x.csv", "--weights", "1,1"], "--weights and --fit-on exclude each other"),
        (["--fit-on", "x.csv", "x.csv", "--method", "rank"], "which --method rank does not have; give --weights."),
        (["--fit-on", "{a}", "{a}"], "--fit-on needs a file with a column target"),
        (["--fit-on", "tests", "tests"], "tests is a directory; give a file of predictions"),
        (["--fit-on", "x.csv", "x.csv"], "x.csv does not exist; give a file of predictions"),
        (["--weights", "1,1", "--weights", "2,1"], "--weights is given twice; give it once, with all its values."),
        (["--wieghts", "1,1"], "unknown option --wieghts; did you mean '--weights'? See python tools/blend.py --help."),
    ],
)
def test_invalid_options_are_rejected_without_output(tmp_path, flags, message):
    good = write_lines(tmp_path / "good.csv", *GOOD)
    given = [flag.format(a=good) for flag in flags]
    assert_rejected(call_tool(blend_tool, good, good, "--output", tmp_path / "out.csv", *given), message)
    assert not (tmp_path / "out.csv").exists()


def test_correlations_of_the_inputs_are_printed(tmp_path):
    tables = [random_predictions(20, number) for number in (1, 2, 3)]
    paths = [tmp_path / f"{number}.csv" for number in (1, 2, 3)]
    for path, table in zip(paths, tables, strict=True):
        write_predictions(path, table)
    end = call_tool(blend_tool, *paths, "--output", tmp_path / "out.csv")
    values = [table.values.ravel() for table in tables]
    lines = end.out.partition("corr     Pearson")[2].splitlines()[1:4]
    for number, line in enumerate(lines):
        wanted = [scipy.stats.pearsonr(values[number], other).statistic for other in values]
        assert line.split() == [str(number + 1), *(f"{value:.4f}" for value in wanted)]


def test_a_constant_table_has_no_correlation_and_no_warning(tmp_path):
    write_lines(tmp_path / "a.csv", "id,cat,dog", "a,0.5,0.5", "b,0.5,0.5")
    write_lines(tmp_path / "b.csv", "id,cat,dog", "a,0.25,0.75", "b,1,0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        end = call_tool(blend_tool, tmp_path / "a.csv", tmp_path / "b.csv", "--output", tmp_path / "out.csv")
    assert (end.code, end.err) == (0, "")
    lines = end.out.partition("corr     Pearson")[2].splitlines()[1:3]
    assert [line.split() for line in lines] == [["1", "none", "none"], ["2", "none", "1.0000"]]


def test_a_single_input_is_rejected(tmp_path):
    end = call_tool(blend_tool, write_lines(tmp_path / "good.csv", *GOOD))
    assert_rejected(end, "blend.py needs two or more predictions files, not 1.")


def test_an_output_with_different_contents_is_not_overwritten(tmp_path):
    first, second = write_lines(tmp_path / "a.csv", *GOOD), write_lines(tmp_path / "b.csv", GOOD[0], "a,1,0", "b,0,1")
    output = tmp_path / "out.csv"
    assert call_tool(blend_tool, first, second, "--output", output).code == 0
    before = output.read_bytes()
    assert call_tool(blend_tool, first, second, "--output", output).code == 0
    message = f"{output} already exists with different contents; give --overwrite, or another --output."
    assert_rejected(call_tool(blend_tool, first, second, "--output", output, "--weights", "2,1"), message)
    assert output.read_bytes() == before
    assert call_tool(blend_tool, first, second, "--output", output, "--weights", "2,1", "--overwrite").code == 0
    assert output.read_bytes() != before


def test_conflicting_targets_are_reported_with_both_files(tmp_path):
    tables = [GOOD, ["id,cat,dog,target", "a,1,0,cat", "b,0,1,dog"], ["id,cat,dog,target", "a,1,0,dog", "b,0,1,dog"]]
    paths = [write_lines(tmp_path / f"{name}.csv", *lines) for name, lines in zip("xyz", tables, strict=True)]
    end = call_tool(blend_tool, *paths, "--output", tmp_path / "out.csv")
    assert_rejected(end, f"{paths[1]} and {paths[2]} have different targets for id a.")


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "excel.csv"
    path.write_text("\ufeffid,cat,dog\na,0.5,0.5\n", encoding="utf-8")
    assert read_predictions(path).ids == ("a",)


def test_rank_and_independent_accept_rows_that_do_not_sum_to_one(tmp_path):
    table = write_lines(tmp_path / "a.csv", "id,cat,dog", "a,0.9,0.9", "b,0.2,0.1")
    for flags in (["--method", "rank"], ["--independent"]):
        assert call_tool(blend_tool, table, table, "--output", tmp_path / f"{flags[0]}.csv", *flags).code == 0
    assert (tmp_path / "--independent.csv").read_text() == table.read_text()
    assert (tmp_path / "--method.csv").read_text() == "id,cat,dog\na,1.0,1.0\nb,0.0,0.0\n"


def some_models(size: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Return three tables (a good one, a worse one, a random one) and their targets."""
    good = random_predictions(size, 1)
    worse = random_predictions(size, 2)
    random = random_predictions(size, 3, targets=False)
    return np.stack([good.values**3, worse.values, random.values]), good.targets  # type: ignore[return-value]


def test_fitted_weights_are_at_least_as_good_as_a_grid_search():
    tables, targets = some_models()
    tables /= tables.sum(2, keepdims=True)
    found = fit_weights(tables, targets, lambda rows, weights: blend(rows, "mean", weights))
    steps = [(a / 20, b / 20, 1 - a / 20 - b / 20) for a in range(21) for b in range(21 - a)]
    losses = [log_loss(targets, blend(tables, "mean", np.clip(step, 0, 1))) for step in steps]
    assert log_loss(targets, blend(tables, "mean", found.weights)) <= min(losses) + 1e-6
    assert found.weights[2] < 0.05
    assert found.weights.sum() == pytest.approx(1)
    assert found.equal_loss == pytest.approx(log_loss(targets, tables.mean(0)))


@pytest.mark.parametrize("confidence", [6, 9, 12, 15])
@pytest.mark.parametrize("method", ["mean", "geometric"])
def test_weights_are_fitted_when_losses_are_small(confidence, method):
    generator = np.random.default_rng(0)
    targets = generator.integers(4, size=2000)

    def model(logit: float) -> np.ndarray:
        return scipy.special.softmax(generator.normal(size=(2000, 4)) + logit * np.eye(4)[targets], axis=1)

    tables = np.stack([model(confidence), model(confidence - 2)])

    def loss(weight: float) -> float:
        return -np.log(blend(tables, method, [weight, 1 - weight])[np.arange(2000), targets]).mean()

    found = fit_weights(tables, targets, lambda rows, weights: blend(rows, method, weights))
    assert loss(found.weights[0]) <= min(map(loss, np.linspace(0, 1, 101))) * (1 + 1e-3)


def test_perfect_models_get_equal_weights():
    targets = np.arange(40) % 3
    tables = np.stack([np.eye(3)[targets]] * 2)
    found = fit_weights(tables, targets, lambda rows, weights: blend(rows, "mean", weights))
    assert found.weights.tolist() == [0.5] * 2


def test_weights_are_scored_on_samples_they_were_not_fitted_on():
    tables, targets = some_models(50)
    sizes = []

    def record_size(rows, weights):
        sizes.append(rows.shape[1])
        return blend(rows, "mean", weights)

    found = fit_weights(tables / tables.sum(2, keepdims=True), targets, record_size)
    assert set(sizes) == {40, 10, 50}
    assert found.loss > 0


def test_fitted_weights_are_applied_to_the_test_predictions(tmp_path):
    for number in (1, 2):
        write_predictions(tmp_path / f"valid{number}.csv", random_predictions(60, number))
        write_predictions(tmp_path / f"test{number}.csv", random_predictions(9, number + 5, targets=False))
    tests, valids = ([tmp_path / f"{kind}{number}.csv" for number in (1, 2)] for kind in ("test", "valid"))
    end = call_tool(blend_tool, *tests, "--fit-on", *valids, "--output", tmp_path / "out.csv")
    assert end.code == 0, end.err
    assert "by cross-validation of the weights" in end.out
    first, second = (read_predictions(path) for path in tests)
    weight = float(end.out.split("weight ")[1].split()[0])
    blended = weight * first.values + (1 - weight) * second.values
    assert read_predictions(tmp_path / "out.csv").values == pytest.approx(blended, abs=1e-4)


def test_fit_on_rejects_predictions_of_other_classes(tmp_path):
    write_predictions(tmp_path / "test.csv", random_predictions(9, targets=False))
    write_predictions(tmp_path / "valid.csv", random_predictions(30, classes=("cat", "dog", "cow")))
    test, valid, output = (tmp_path / f"{name}.csv" for name in ("test", "valid", "out"))
    end = call_tool(blend_tool, test, test, "--fit-on", valid, valid, "--output", output)
    assert_rejected(end, f"{test} and {valid} do not match: class 0 missing in {valid}, class cow only in {valid}.")
    assert not output.exists()


def test_scores_match_scikit_learn():
    table = random_predictions(40)
    scores = score(table)
    assert scores["log_loss"] == pytest.approx(log_loss(table.targets, table.values, labels=[0, 1, 2]))
    assert scores["accuracy"] == np.mean(table.values.argmax(1) == table.targets)
    assert score(replace(table, targets=None)) == {}
    assert "log_loss" not in score(replace(table, values=table.values / 2))


def test_bootstrap_interval_matches_scipy_and_is_reproducible():
    generator = np.random.default_rng(3)
    first, second = (generator.random(300) < 0.9) * 1.0, (generator.random(200) < 0.8) * 1.0
    gap = bootstrap_gap(first, second)
    wanted = scipy.stats.bootstrap(
        (first, second), lambda a, b, axis: b.mean(axis) - a.mean(axis), method="percentile", vectorized=True
    ).confidence_interval
    assert gap == bootstrap_gap(first, second)
    assert (gap.low, gap.high) == pytest.approx((wanted.low, wanted.high), abs=0.01)
    assert gap.difference == second.mean() - first.mean()
    assert "larger than sampling noise" in str(gap)
    assert "within sampling noise" in str(bootstrap_gap(first, first))


def test_a_row_longer_than_the_header_is_rejected(tmp_path):
    (tmp_path / "a.csv").write_text("id,x,y\none,0.5,0.5,0.1\ntwo,0.5,0.5,0.1\n")
    with pytest.raises(UserError, match=r"a\.csv line 2 has 4 cells for 3 columns \(id, x, y\)"):
        read_predictions(tmp_path / "a.csv")

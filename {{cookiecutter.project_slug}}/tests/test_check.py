"""tools/check.py: each check detects what it checks for, none stops the others, and no files are left behind."""

import math
import random
import re
import warnings
from collections import Counter, namedtuple
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from flags import override
from image_data import RandomImages, patterned_images, write_jpeg
from marks import CLASSES_ONLY
from models import CHANNELS, dropout_network
from processes import run_ranks, run_train
from small_data import make_data
from torch import nn

import train
from batteries.checkpoint.io import count_bytes, make_checkpoint, save_checkpoint
from batteries.checkpoint.manager import CheckpointManager
from batteries.core.errors import RunError, UserError
from batteries.core.project import ROOT
from batteries.core.text import format_duration
from batteries.data.image_decoding import decode_file
from batteries.data.loaders import TrainLoader
from batteries.data.splits import SplitFile, to_csv
from batteries.distributed import connectivity
from batteries.preflight import machine_checks
from batteries.preflight.data_checks import (
    check_duplicates,
    check_normalization,
    choose_samples,
    open_samples,
)
from batteries.preflight.machine_checks import (
    LoadingTimes,
    Speed,
    StageLength,
    check_loader_throughput,
    estimate_run_time,
    kept_checkpoints,
    measure_intervals,
)
from batteries.preflight.model_checks import (
    check_checkpoint_roundtrip,
    check_overfit_one_batch,
    check_shards,
    find_differences,
    nearest_directory,
)
from batteries.preflight.results import CheckResult, is_user_code, raise_if_failed, run_checks, run_one_check
from batteries.preflight.target_checks import TargetConstants, check_class_counts, choose_balanced
from batteries.training.setup import FP32_SETTINGS, preserved_settings
from tools import check

SIZE = 160
LABELS = np.arange(SIZE) % 4


class Samples:
    """Images (C, 8, 8) of four classes, in memory, which a linear model learns in a few steps."""

    classes = ("north", "east", "south", "west")
    ids = tuple(f"image{index}" for index in range(SIZE))

    def __init__(self) -> None:
        self.images = torch.from_numpy(patterned_images(LABELS, CHANNELS, 8))
        self.targets = LABELS.copy()

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple:
        return self.images[index], int(self.targets[index])

    def fingerprint(self) -> str:
        return "samples"


def small_model(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 64, 16), nn.BatchNorm1d(16), nn.Linear(16, num_classes))


@pytest.fixture
def make_context(monkeypatch, tmp_path, cpu):
    """Return a function that makes a CheckContext with small data and a small model."""
    defaults = check.Options(
        batch_size=16,
        tracker=("none",),
        device="cpu",
        logdir=tmp_path / "logs/run",
        split_file=tmp_path / "splits/x.csv",
    )

    def make(dataset=None, model=small_model, **options) -> check.CheckContext:
        dataset = dataset or Samples()
        for module in (check, train):
            monkeypatch.setattr(module, "normalize", lambda images: images / 64 - 2)
            monkeypatch.setattr(module, "valid_transform", lambda size=None: None)
        for module in (train, check):
            monkeypatch.setattr(module, "train_transform", lambda size=None: None)
        monkeypatch.setattr(check, "load_dataset", lambda folder: dataset)
        monkeypatch.setattr(check, "build_model", model)
        return check.make_context(replace(defaults, **options), cpu)

    return make


class SimulatedClock:
    """A clock that advances by a little with each reading, and by what a test adds to `now`."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


@pytest.fixture
def clock(monkeypatch) -> SimulatedClock:
    """The clock by which tools/check.py measures speeds."""
    clock = SimulatedClock()
    monkeypatch.setattr(check, "measure_intervals", partial(measure_intervals, clock=clock))
    return clock


@CLASSES_ONLY
def test_valid_data_and_model_pass_all_single_process_checks(make_context, clock, tmp_path):
    class Slow(nn.Sequential):
        def forward(self, images):
            clock.now += 1  # so that the loader is not the bottleneck
            return super().forward(images)

    context = make_context(model=lambda num_classes: Slow(*small_model(num_classes)))
    results = {name: run_one_check(partial(run, context)) for name, run in check.CHECKS if name != "processes"}
    assert {name: result for name, result in results.items() if result.outcome != "pass" or result.hint} == {}
    assert list(tmp_path.iterdir()) == []


# The data


class Files(Samples):
    """The same samples in JPEG files."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.data_dir = folder
        for name, image in zip(self.ids, patterned_images(LABELS, 3, 32), strict=True):
            write_jpeg(torch.from_numpy(image), folder / name)

    def __getitem__(self, index):
        return decode_file(self.data_dir / self.ids[index], "RGB"), int(LABELS[index])


@CLASSES_ONLY
def test_truncated_file_is_reported_with_its_id(make_context, tmp_path):
    dataset = Files(tmp_path)
    path = tmp_path / dataset.ids[77]
    path.write_bytes(path.read_bytes()[:300])
    result = run_one_check(partial(check.check_samples_load, make_context(dataset)))
    assert result.outcome == "fail"
    assert result.details.startswith(f"errors in 1 of {SIZE} samples: image77: RuntimeError: ")


@CLASSES_ONLY
def test_samples_option_limits_the_number_of_opened_samples(make_context):
    context = make_context(samples=40)
    details = f"all 40 samples (chosen at random from {SIZE}) load"
    assert check.check_samples_load(context) == CheckResult("pass", details)
    context.dataset.left_out = "3 .bmp"
    details = f"all 40 samples (chosen at random from {SIZE}) load; left out: 3 .bmp"
    assert check.check_samples_load(context).details == details
    assert len(set(context.opened[0].tolist())) == 40
    assert len(context.opened[1]) == 40


@CLASSES_ONLY
def test_target_that_differs_from_the_targets_of_the_data_set_fails(make_context):
    class Shifted(Samples):
        def __getitem__(self, index):
            return self.images[index], (int(self.targets[index]) + (index == 9)) % 4

    result = run_one_check(partial(check.check_samples_load, make_context(Shifted())))
    assert result.outcome == "fail"
    assert "image9: its target is 2, but dataset.targets[9] is 1." in result.details


@CLASSES_ONLY
def test_non_finite_image_fails(make_context):
    dataset = Samples()
    dataset.images = dataset.images.float()
    dataset.images[3, 0, 2, 2] = torch.nan
    result = run_one_check(partial(check.check_samples_load, make_context(dataset)))
    assert (result.outcome, "image3: not every value is finite" in result.details) == ("fail", True)


@CLASSES_ONLY
def test_check_method_of_the_data_set_is_called(make_context):
    class Checked(Samples):
        def check(self, indices):
            assert len(indices) < SIZE  # the test split is not checked
            raise ValueError("three files are not images")

    result = run_one_check(partial(check.check_samples_load, make_context(Checked())))
    assert result.outcome == "fail"
    assert "three files are not images" in result.details


@CLASSES_ONLY
def test_get_batch_that_differs_from_single_samples_fails(make_context):
    class Scaled(Samples):
        def get_batch(self, indices):
            return self.images[indices] / 255, torch.from_numpy(self.targets[indices])

    result = run_one_check(partial(check.check_samples_load, make_context(Scaled())))
    assert result.outcome == "fail"
    assert "get_batch and __getitem__ of Scaled in tests/test_check.py differ for sample image" in result.details


@CLASSES_ONLY
def test_code_mistake_is_described_with_its_function(make_context):
    def narrow(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(CHANNELS + 4, 2, 1), nn.Flatten(), nn.Linear(128, num_classes))

    result = run_one_check(partial(check.check_overfit_one_batch, make_context(model=narrow)))
    assert result.outcome == "fail"
    assert result.details.startswith(f"what build_model in experiment/model.py returns fails on (8, {CHANNELS}, 8, 8) ")
    assert f"to have {CHANNELS + 4} channels" in result.details


@CLASSES_ONLY
def test_samples_that_are_not_images_load_and_skip_the_duplicate_check(make_context):
    dataset = Samples()
    dataset.images = dataset.images.float().flatten(1)
    context = make_context(dataset)
    assert check.check_samples_load(context).outcome == "pass"
    assert check.check_duplicates(context) == CheckResult(
        "warning", "skipped: no sample could be read as an image of shape (C, H, W)"
    )


def test_class_missing_in_train_fails_and_other_checks_still_run(make_context, tmp_path):
    dataset = Samples()
    folds = np.where(LABELS == 2, 0, np.arange(SIZE) // 4 % 3)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/x.csv").write_text(to_csv(dataset, folds))
    context = make_context(dataset)
    result = run_one_check(partial(check.check_class_counts, context))
    assert result.outcome == "fail"
    path = tmp_path / "splits/x.csv"
    problem = f"the train split of fold 0 has no sample of class south ({path} has 40 samples of south)"
    assert result.details.startswith(problem)
    assert (
        run_one_check(partial(check.check_samples_load, context)).outcome
        == run_one_check(partial(check.check_normalization, context)).outcome
        == "pass"
    )


@pytest.mark.parametrize(("rare_count", "outcome"), [(20, "warning"), (24, "pass")])
def test_rare_class_is_a_warning_and_counts_are_correct(tmp_path, rare_count, outcome):
    class Skewed(Samples):
        targets = np.array([0] * (SIZE - rare_count) + [1] * rare_count)
        classes = ("common", "rare")

        def __init__(self) -> None:
            pass

    folds = np.where(Skewed.targets == 1, np.arange(SIZE) % 4 > 1, np.arange(SIZE) % 4 > 2).astype(int)  # 1 validates
    splits = SplitFile(tmp_path / "x.csv", Skewed(), lambda dataset: folds)
    result = check_class_counts(splits, 1)
    train, valid = (sorted(Counter(Skewed.targets[folds == fold]).values()) for fold in (0, 1))
    assert result.outcome == outcome
    assert (
        f"train {sum(train)} ({train[0]} to {train[1]}), valid {sum(valid)} ({valid[0]} to {valid[1]}), test 0"
        in result.details
    )
    assert max(valid) < 10 * min(valid)
    is_imbalanced = max(train) >= 10 * min(train)
    has_warning = "times as many samples of common as of rare" in result.details
    assert has_warning == is_imbalanced == (outcome == "warning")


def check_counts(tmp_path, targets, names, constants=None) -> CheckResult:
    """Check a data set with these targets, of which every fifth sample is in valid and every fifth in test."""
    dataset = Samples()
    dataset.targets, dataset.classes = targets, names
    folds = np.where(np.arange(SIZE) % 5 == 4, -1, np.arange(SIZE) % 5 % 2)  # 1 validates: two fifths
    return check_class_counts(SplitFile(tmp_path / "x.csv", dataset, lambda _: folds), 1, constants)


def test_targets_of_no_known_kind_are_not_counted(tmp_path):
    assert check_counts(tmp_path, None, None) == CheckResult(
        "pass", "samples: train 64, valid 64, test 32; the targets are not classes, labels or numbers"
    )


@pytest.mark.parametrize("missing", [None, "train", "valid"])
def test_pixels_of_each_class_of_masks_are_counted(tmp_path, missing):
    class Masks(RandomImages):
        targets = None
        classes = ("sky", "bird")
        ids = tuple(map(str, range(SIZE)))

        def __init__(self):
            self.images = RandomImages(SIZE).images

        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            split = "valid" if folds[index] == 1 else "train"
            mask = torch.zeros(4, 5, dtype=torch.uint8)
            mask[0, :2] = int(split != missing)
            mask[1] = 255  # not counted
            return self.images[index], mask

    folds = np.where(np.arange(SIZE) % 5 == 4, -1, np.arange(SIZE) % 5 % 2)
    result = check_class_counts(SplitFile(tmp_path / "x.csv", Masks(), lambda _: folds), 1)
    fractions = "sky 100.0%, bird 0.0%" if missing == "train" else "sky 86.7%, bird 13.3%"
    details = f"2 classes, pixels in 64 train masks: {fractions}"
    if missing is None:
        assert result == CheckResult("pass", details)
    else:
        hint = "add images of that class, or use another split; a class without valid pixels has no score"
        assert result == CheckResult("warning", f"{details}; 64 {missing} masks without a pixel of bird", hint)


def random_labels() -> np.ndarray:
    return np.random.default_rng(0).integers(2, size=(SIZE, 3))


def test_samples_of_each_label_are_counted_in_each_split(tmp_path):
    labels = random_labels()
    labels[4::5][::2] = -1  # unknown targets of test samples
    result = check_counts(tmp_path, labels, ("cat", "dog", "owl"))
    counts = {"train": [0] * 3, "valid": [0] * 3, "test": [0] * 3}
    for index, row in enumerate(labels.tolist()):
        split = "test" if index % 5 == 4 else ("train", "valid")[index % 5 % 2]
        for label, value in enumerate(row):
            counts[split][label] += value == 1
    sizes = {"train": 64, "valid": 64, "test": 32}
    listed = [f"{name} {sizes[name]} ({min(found)} to {max(found)})" for name, found in counts.items()]
    assert result == CheckResult("pass", f"3 labels, samples (per label): {', '.join(listed)}")
    labels[4::5] = -1
    assert check_counts(tmp_path, labels, ("cat", "dog", "owl")).details.endswith("test 32 (targets unknown)")


def test_a_rare_label_is_a_warning_and_one_without_train_samples_is_rejected(tmp_path, monkeypatch):
    names = ("cat", "dog", "owl")
    labels = random_labels()
    labels[:, 1] = 0
    labels[[0, 5], 1] = 1  # two train samples
    result = check_counts(tmp_path, labels, names)
    assert result.outcome == "warning"
    assert result.details.endswith("; rare labels: dog (train 2, valid 0)")
    labels[[1, 3], 1] = 1
    assert check_counts(tmp_path, labels, names).outcome == "pass"
    monkeypatch.setattr("batteries.preflight.target_checks.RARE_FRACTION", 0.05)  # 3.2 of 64
    assert check_counts(tmp_path, labels, names).details.endswith("; rare labels: dog (train 2, valid 2)")
    labels[[0, 5], 1] = 0
    with pytest.raises(UserError, match="the train split of fold 1 has no sample with label dog"):
        check_counts(tmp_path, labels, names)


def test_the_range_mean_and_deviation_of_numbers_are_reported_for_each_split(tmp_path):
    numbers = np.random.default_rng(0).normal(100, 20, size=SIZE)
    numbers[4] = np.nan  # a test sample
    result = check_counts(tmp_path, numbers, ("age",))
    train = [value for index, value in enumerate(numbers.tolist()) if index % 5 in (0, 2)]
    mean = sum(train) / len(train)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in train) / len(train))
    wanted = f"train 64 (age: {min(train):.4g} to {max(train):.4g}, mean {mean:.4g}, deviation {deviation:.4g}); valid"
    assert (result.outcome, result.details[: len(wanted)]) == ("pass", wanted)
    numbers[4::5] = np.nan
    assert check_counts(tmp_path, numbers, ("age",)).details.endswith("; test 32 (targets unknown)")


@pytest.mark.parametrize(
    ("rows", "value", "outcome", "problem"),
    [
        (slice(None), 3.5, "fail", "one value only in the train split: mass = 3.5; "),
        (slice(1, None, 5), 3.5, "pass", "train 64"),  # a half of valid
        (
            [index for index in range(SIZE) if index % 5 in (1, 3)],
            3.5,
            "warning",
            "one value only in the valid split: ",
        ),
        (7, np.inf, "fail", "not every target of the train split is finite: mass"),
        (4, -np.inf, "fail", "not every target of the test split is finite: mass"),
    ],
)
def test_constant_and_infinite_numbers_are_found(tmp_path, rows, value, outcome, problem):
    numbers = np.random.default_rng(0).normal(size=(SIZE, 2))
    numbers[rows, 1] = value
    result = check_counts(tmp_path, numbers, ("age", "mass"))
    assert (result.outcome, result.details[: len(problem)]) == (outcome, problem)


@pytest.mark.parametrize(
    ("mean", "std", "far"),
    [
        ((100.0, -5.0), (20.0, 2.0), ""),
        ((0.0,), (20.0,), "age, mass"),
        ((100.0, 0.0), (20.0, 2.0), "mass"),
        ((92.0, -5.0), (20.0, 2.0), ""),
        ((85.0, -5.0), (20.0, 2.0), "age"),
        ((100.0, -5.0), (11.0, 3.9), "age, mass"),
        (100.0, 20.0, "mass"),
    ],
)
def test_constants_far_from_the_train_split_are_a_warning(tmp_path, mean, std, far):
    numbers = np.random.default_rng(0).normal((100, -5), (20, 2), size=(SIZE, 2))
    result = check_counts(tmp_path, numbers, ("age", "mass"), TargetConstants(mean, std))
    assert result.outcome == ("warning" if far else "pass")
    assert not far or result.details.startswith(f"TARGET_MEAN or TARGET_STD is far from the train split: {far}; train")
    assert ("python tools/split.py --keep --statistics" in result.hint) == bool(far)


def test_the_constants_of_the_task_are_compared_if_it_has_them(make_context, monkeypatch):
    dataset = Samples()
    dataset.targets, dataset.classes = np.random.default_rng(0).normal(100, 20, size=SIZE).astype(np.float32), ("age",)
    monkeypatch.setattr(check, "check_main_metric", lambda *_: None)
    monkeypatch.setattr(check, "make_folds", lambda _: np.arange(SIZE) % 3 - 1)
    context = make_context(dataset)
    constants = {"TARGET_MEAN": (0.0,), "TARGET_STD": (1.0,)}
    for name in constants:
        monkeypatch.delattr(check.task, name, raising=False)
    for name, value in constants.items():
        assert check.check_class_counts(context).outcome == "pass"
        monkeypatch.setattr(check.task, name, value, raising=False)
    assert check.check_class_counts(context).outcome == "warning"


@pytest.mark.parametrize(
    ("targets", "change", "message"),
    [
        (random_labels(), [0, 1, 0], "its target is 0, 1, 0, but dataset.targets[7] is"),
        (np.linspace(0, 1, SIZE), 0.25, "its target is 0.25, but dataset.targets[7] is 0.0440251572"),
        (np.linspace((0, 1), (1, 2), SIZE), [0.25], "its target is 0.25, but dataset.targets[7] is 0.0440251572, 1.04"),
    ],
)
def test_labels_and_numbers_that_differ_from_the_targets_of_the_data_set_fail(targets, change, message):
    class Changed(Samples):
        changed = -1

        def __getitem__(self, index):
            return self.images[index], torch.tensor(change if index == self.changed else self.targets[index])

    dataset = Changed()
    dataset.classes, dataset.targets = None, targets.copy()
    dataset.targets[7] = [1, 0, 1] if targets.dtype == np.int64 else targets[7]
    assert not [found for found in open_samples(dataset, np.arange(SIZE)) if isinstance(found, str)]
    dataset.changed = 7
    [error] = [found for found in open_samples(dataset, np.arange(SIZE)) if isinstance(found, str)]
    assert message in error
    dataset.targets[7] = -1 if targets.dtype == np.int64 else np.nan  # unknown, so there is nothing to compare
    assert not [found for found in open_samples(dataset, np.arange(SIZE)) if isinstance(found, str)]


def test_single_precision_numbers_of_samples_are_equal_to_double_precision_targets():
    class Rounded(Samples):
        def __getitem__(self, index):
            return self.images[index], torch.tensor(self.targets[index], dtype=torch.float32).view(1)

    dataset = Rounded()
    dataset.classes, dataset.targets = ("age",), np.random.default_rng(0).normal(size=SIZE)
    assert not [found for found in open_samples(dataset, np.arange(SIZE)) if isinstance(found, str)]


@CLASSES_ONLY
@pytest.mark.parametrize(("copies", "outcome"), [(0, "pass"), (1, "fail"), (3, "fail")])
def test_image_in_two_splits_is_reported(make_context, copies, outcome):
    dataset = Samples()
    context = make_context(dataset)
    train, test = context.split.train, context.split.test
    for number in range(copies):
        dataset.images[test[number]] = dataset.images[train[number]]
    result = check.check_duplicates(context)
    assert result.outcome == outcome
    if copies:
        assert (
            f"{copies} equal and 0 nearly equal pairs of images in different splits, among {SIZE} images"
            in result.details
        )
        pair = sorted([(train[0], "train"), (test[0], "test")])
        assert " and ".join(f"image{index} ({split})" for index, split in pair) in result.details


@CLASSES_ONLY
def test_duplicates_have_correct_ids_if_another_sample_cannot_be_read(make_context):
    class Broken(Samples):
        def __getitem__(self, index):
            return 1 / 0 if index == 0 else super().__getitem__(index)

    dataset = Broken()
    context = make_context(dataset)
    train, test = context.split.train[-1], context.split.test[-1]
    dataset.images[test] = dataset.images[train]
    result = check.check_duplicates(context)
    assert f"among {SIZE - 1} images: " in result.details
    assert {f"image{train}", f"image{test}"} == set(re.findall(r"image\d+", result.details))


def test_few_duplicates_warn_and_duplicates_within_a_split_pass():
    class Many(Samples):
        ids = tuple(map(str, range(600)))

        def __init__(self) -> None:
            self.images = torch.randint(256, (600, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
            self.targets = np.zeros(600, int)

        def __len__(self) -> int:
            return 600

    dataset = Many()
    dataset.images[1] = dataset.images[0]
    split = check.data_checks.Split(np.arange(200), np.arange(200, 400), np.arange(400, 600))
    everything = np.arange(600)
    assert check_duplicates(dataset, split, everything, open_samples(dataset, everything)).outcome == "pass"
    dataset.images[599] = dataset.images[0]
    result = check_duplicates(dataset, split, everything, open_samples(dataset, everything))
    assert (result.outcome, "0 (train) and 599 (test)" in result.details) == ("warning", True)


@pytest.mark.parametrize(
    ("scale", "shift", "outcome"),
    [
        (1, 0, "pass"),
        (1, 0.6, "warning"),
        (2, 0, "warning"),
        (0.5, 0, "warning"),
        (255, 0, "fail"),
        (1, -2.5, "fail"),
        (0, 0, "fail"),
        (math.nan, 0, "fail"),
    ],
)
def test_normalization_statistics_equal_numpy_and_outliers_are_reported(scale, shift, outcome):
    values = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * scale + shift
    result = check_normalization(values.split(7))
    assert result.outcome == outcome
    array = values.double().numpy()
    mean = " ".join(f"{number:.2f}" for number in array.mean((0, 2, 3)))
    std = " ".join(f"{number:.2f}" for number in array.std((0, 2, 3)))
    if not math.isnan(scale):
        assert result.details.startswith(f"mean {mean}, std {std}, values {values.min():.2f} to ")


@CLASSES_ONLY
def test_normalization_without_division_by_255_fails(make_context, monkeypatch):
    context = make_context()
    monkeypatch.setattr(check, "normalize", lambda images: (images - 0.5) / 0.25)
    result = check.check_normalization(context)
    assert (result.outcome, "python tools/split.py --keep --statistics" in result.hint) == ("fail", True)


def test_balanced_choice_takes_equal_numbers_of_each_class():
    dataset = Samples()
    dataset.targets = np.array([0] * 150 + [1] * 6 + [2] * 4)
    chosen = choose_balanced(dataset, np.arange(SIZE), 8)
    assert Counter(dataset.targets[chosen].tolist()) == {0: 3, 1: 3, 2: 2}
    assert len(set(chosen.tolist())) == 8


def test_balanced_choice_takes_equal_numbers_of_each_label():
    dataset = Samples()
    dataset.classes, dataset.targets = ("cat", "dog", "owl"), np.zeros((SIZE, 3), int)
    dataset.targets[:100, 0] = 1
    dataset.targets[96:110, 1] = 1
    dataset.targets[108:112, 2] = 1
    chosen = choose_balanced(dataset, np.arange(2, SIZE), 8)
    assert len(set(chosen.tolist())) == 8
    assert dataset.targets[chosen].sum(0).tolist() == [3, 3, 3]  # a sample with cat and dog counts for both
    assert (dataset.targets[chosen].sum(1) == 0).sum() == 2  # a quarter has no label
    assert choose_balanced(dataset, np.arange(5), 8).tolist() == list(range(5))


def test_balanced_choice_covers_the_range_of_numbers():
    dataset = Samples()
    dataset.classes, dataset.targets = ("age",), np.random.default_rng(0).permutation(SIZE).astype(float)
    indices = np.arange(10, SIZE)
    chosen = choose_balanced(dataset, indices, 8)
    in_order = sorted(dataset.targets[indices])
    assert dataset.targets[chosen].tolist() == [in_order[round(rank * (len(indices) - 1) / 7)] for rank in range(8)]
    assert sorted(choose_balanced(dataset, indices[:5], 8).tolist()) == indices[:5].tolist()
    dataset.targets = None
    assert choose_balanced(dataset, indices, 8).tolist() == indices[:8].tolist()


# The model


class Constant(nn.Module):
    """A model whose output does not depend on the image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(1, num_classes)

    def forward(self, images):
        return self.head(torch.ones(len(images), 1))


class Shuffled(Samples):
    """Samples with a random label each time, from a generator that is not seeded by the loader."""

    generator = np.random.default_rng(0)

    def __getitem__(self, index):
        return self.images[index], int(self.generator.integers(4))


@CLASSES_ONLY
def test_one_batch_is_overfitted_by_a_correct_model(make_context):
    result = check.check_overfit_one_batch(make_context())
    assert result.outcome == "pass"
    first, last = map(float, re.match(r"loss ([\d.]+) to ([\d.]+) in \d+ steps", result.details).groups())
    assert last <= first / 10


@CLASSES_ONLY
@pytest.mark.parametrize("broken", [{"dataset": Shuffled()}, {"model": Constant}])
def test_one_batch_check_fails_for_random_labels_or_a_constant_model(make_context, broken):
    result = check.check_overfit_one_batch(make_context(**broken))
    assert (result.outcome, "in 60 steps on the same 8 samples" in result.details) == ("fail", True)
    assert "the model does not learn them" in result.details


@CLASSES_ONLY
def test_one_batch_check_passes_with_mixup_label_smoothing_and_dropout(make_context):
    def model(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(CHANNELS * 64, num_classes))

    context = make_context(model=model, mixup=0.5, label_smoothing=0.3, stages=(check.Stage("one", 1, 0.02),))
    assert check.check_overfit_one_batch(context).outcome == "pass"


@pytest.mark.parametrize(
    ("losses", "pretrained", "outcome"),
    [
        ([2.0, 1.0, 0.5, 0.19], False, "pass"),
        ([2.0, 1.0, 0.5, 0.21], False, "warning"),
        ([2.0, 1.5, 1.1], False, "fail"),
        ([0.02, 0.02, 0.019], True, "warning"),
        ([2.0, math.nan], True, "fail"),
        ([math.inf], False, "fail"),
    ],
)
def test_overfit_thresholds(losses, pretrained, outcome):
    assert check_overfit_one_batch(losses, 8, 0.1, pretrained=pretrained).outcome == outcome


def test_overfit_check_stops_once_the_batch_is_learned():
    losses = iter([1.0, 0.09, 0.08])
    assert "in 2 steps" in check_overfit_one_batch(losses, 8, 0.1).details
    assert next(losses) == 0.08


class Branches(nn.Module):
    """A network with a second branch and a gate, which `join` combines with the output of the first."""

    def __init__(self, num_classes: int, join) -> None:
        super().__init__()
        self.trunk, self.branch = small_model(num_classes), small_model(num_classes)
        self.gate = nn.Parameter(torch.zeros(()))
        self.join = join

    def forward(self, images):
        return self.join(self, self.trunk(images), images)


def skip_branch(net, trunk, images):
    return trunk + net.gate


def gate_branch(net, trunk, images):
    return trunk + net.gate * net.branch(images)


def multiply_branch_by_zero(net, trunk, images):
    return trunk + net.gate + 0 * net.branch(images)


def skip_branch_by_chance(net, trunk, images):
    return trunk + net.gate + (net.branch(images) if torch.rand(()) < 0.5 else 0)


def take_root_of_zero(net, trunk, images):
    return trunk + net.branch(images) + net.gate.sqrt()


@CLASSES_ONLY
@pytest.mark.parametrize(
    ("join", "outcome", "details"),
    [
        (skip_branch, "fail", "no gradient for 6 of 13 parameters: branch.1.weight"),
        (skip_branch_by_chance, "warning", "no gradient in some steps for 6 of 13 parameters: branch.1.weight"),
        (gate_branch, "pass", "all 13 parameters"),
        (multiply_branch_by_zero, "warning", "only zero gradients for 6 of 13 parameters"),
        (take_root_of_zero, "fail", "non-finite gradients for 1 of 13 parameters: gate"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # if a step is skipped
def test_parameters_without_usable_gradients_are_listed(make_context, join, outcome, details):
    result = check.check_gradients(make_context(model=lambda num_classes: Branches(num_classes, join)))
    assert result.outcome == outcome
    assert details in result.details


@CLASSES_ONLY
def test_parameters_may_be_unused_with_the_option_for_it(make_context):
    def gradients(join):
        model = partial(Branches, join=join)
        return check.check_gradients(make_context(model=model, find_unused_parameters=True))

    assert gradients(skip_branch_by_chance) == CheckResult("pass", "all 13 parameters get a gradient")
    assert gradients(skip_branch).outcome == "warning"


@CLASSES_ONLY
def test_only_parameters_frozen_in_all_stages_need_no_gradient(make_context):
    def gradients(*frozen):
        stages = tuple(check.Stage(f"s{number}", 1, 0.1, freeze=names) for number, names in enumerate(frozen))
        context = make_context(model=lambda num_classes: Branches(num_classes, skip_branch), stages=stages)
        return check.check_gradients(context)

    assert gradients(("branch",), ("branch", "trunk.1")) == CheckResult(
        "pass", "all 7 parameters get a gradient; 6 are frozen in all stages"
    )
    assert gradients(("branch",), ()).outcome == "fail"


@CLASSES_ONLY
def test_gradients_are_checked_with_nothing_frozen(make_context):
    class Gated(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.trunk, self.branch = small_model(num_classes), small_model(num_classes)
            self.gate = nn.Linear(num_classes, num_classes, bias=False)
            nn.init.zeros_(self.gate.weight)

        def forward(self, images):
            return self.trunk(images) + self.gate(self.branch(images))

    stages = check.Stage("one", 1, 0.1, freeze=("gate",)), check.Stage("two", 1, 0.1)
    assert check.check_gradients(make_context(model=Gated, stages=stages)) == CheckResult(
        "pass", "all 13 parameters get a gradient"
    )


class Forgetful(nn.Sequential):
    """A model that computes with a value which, depending on `how`, is not in its state_dict."""

    def __init__(self, num_classes: int, how: str) -> None:
        super().__init__(*small_model(num_classes))
        self.how, scale = how, torch.rand(num_classes) + 0.5
        if how == "attribute":
            self.scale = scale
        else:
            self.register_buffer("scale", scale, persistent=how == "buffer")

    def forward(self, images):
        if self.how == "only in validation" and self.training:
            return super().forward(images)
        return super().forward(images) * self.scale


class Momentum(torch.optim.SGD):
    """An optimizer whose momentum is not in its state_dict."""

    def __init__(self, parameters, lr) -> None:
        super().__init__(parameters, lr=lr)
        self.velocity: dict = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for value in group["params"]:
                self.velocity[value] = 0.9 * self.velocity.get(value, 0) + value.grad
                value -= group["lr"] * self.velocity[value]


@CLASSES_ONLY
@pytest.mark.parametrize(
    ("how", "outcome"),
    [("buffer", "pass"), ("attribute", "fail"), ("temporary", "fail"), ("only in validation", "fail")],
)
def test_model_state_that_is_not_in_the_checkpoint_fails(make_context, tmp_path, how, outcome):
    result = run_one_check(
        partial(check.check_checkpoint_roundtrip, make_context(model=lambda num_classes: Forgetful(num_classes, how)))
    )
    assert result.outcome == outcome, result
    assert list(tmp_path.iterdir()) == []


@CLASSES_ONLY
def test_value_changed_by_loading_is_listed_without_deterministic_kernels(make_context, tmp_path):
    def forget(model, keys) -> None:
        nn.init.zeros_(model[3].weight)

    def forgetful(num_classes):
        model = small_model(num_classes)
        model.register_load_state_dict_post_hook(forget)
        return model

    context = make_context(model=forgetful)
    result = check_checkpoint_roundtrip(
        tmp_path, lambda stream: context.make_state(context.first_stage, 1, stream), context.make_checkpoint, None
    )
    assert (result.outcome, result.details) == (
        "fail",
        "loading changes these values: model_state_dict.3.weight",
    )


@CLASSES_ONLY
def test_optimizer_state_that_is_not_in_the_checkpoint_fails(make_context, monkeypatch):
    context = make_context(ema_decay=0.9)
    assert check.check_checkpoint_roundtrip(context).outcome == "pass"
    monkeypatch.setattr(train, "build_optimizer", lambda model, stage, config: Momentum(model.parameters(), stage.lr))
    result = check.check_checkpoint_roundtrip(context)
    assert result.outcome == "fail"
    assert result.details.startswith("loading changes no value, but further steps differ in: result.train.")


@CLASSES_ONLY
def test_checkpoint_is_written_to_the_file_system_of_the_logdir(make_context, monkeypatch, tmp_path):
    seen = []

    def save(path, checkpoint):
        seen.append(path)
        return save_checkpoint(path, checkpoint)

    monkeypatch.setattr("batteries.preflight.model_checks.save_checkpoint", save)
    (tmp_path / "disk").mkdir()
    context = make_context(logdir=tmp_path / "disk/not/yet/there")
    assert check.check_checkpoint_roundtrip(context).outcome == "pass"
    assert seen[0].parent.parent == tmp_path / "disk" == nearest_directory(context.options.logdir)
    assert list((tmp_path / "disk").iterdir()) == []


def test_find_differences_compares_bits_and_returns_names():
    one = {"a": [torch.tensor([0.0, math.nan]), 1], "b": {"c": math.nan, "d": "x"}}
    assert find_differences(one, {"a": [torch.tensor([0.0, math.nan]), 1], "b": {"c": math.nan, "d": "x"}}) == []
    assert find_differences(one, {"a": [torch.tensor([-0.0, math.nan]), 1.0], "b": {"c": 0.0}}) == [
        "a.0",
        "a.1",
        "b.d",
        "b.c",
    ]
    assert find_differences(torch.zeros(2), torch.zeros(2, dtype=torch.float64), "x") == ["x"]
    assert find_differences(torch.zeros(2), torch.zeros(2, dtype=torch.int32), "x") == ["x"]
    assert find_differences([1], [1, 2], "y.") == ["y"]


# The machine


@CLASSES_ONLY
def test_slow_data_set_makes_the_loader_the_bottleneck(make_context, clock):
    class Slow(Samples):
        def __getitem__(self, index):
            clock.now += 1
            return super().__getitem__(index)

    result = check.check_loader_throughput(make_context(Slow(), limit_batches=4))
    assert (result.outcome, "the loader is the bottleneck (no workers" in result.details) == ("warning", True)
    assert "mainly decoding: decoding 100%, the transform 0%, collation and transport 0% of its time" in result.details
    assert result.hint.startswith("use --num-workers ")


@CLASSES_ONLY
def test_slow_transform_is_named_as_the_bottleneck(make_context, monkeypatch, clock):
    def transform(image, target):
        clock.now += 1
        return image, target

    context = make_context(limit_batches=4)
    for module in (train, check):
        monkeypatch.setattr(module, "train_transform", lambda size=None: transform)
    result = check.check_loader_throughput(context)
    assert "mainly the transform: decoding 0%, the transform 100%, " in result.details
    assert result.hint.endswith(", or fewer transforms")


@CLASSES_ONLY
def test_pack_is_recommended_for_large_files_with_the_expected_gain(make_context, monkeypatch, clock, tmp_path):
    class Photographs(Files):
        def read_image(self, path):
            clock.now += 8
            return decode_file(path, "RGB")

        def __getitem__(self, index):
            return self.read_image(self.data_dir / self.ids[index]), int(LABELS[index])

    def decode_small(data, mode):
        clock.now += 2
        return decode_file(data, mode)

    monkeypatch.setattr(check, "decode_file", decode_small)

    def linear(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))

    dataset = Photographs(tmp_path)
    result = check.check_loader_throughput(make_context(dataset, limit_batches=4, model=linear))
    assert result.hint.startswith("write a pack with tools/pack.py, which loads about 4.0 times as fast; or use ")
    (tmp_path / "pack.json").touch()
    result = check.check_loader_throughput(make_context(dataset, limit_batches=4, model=linear))
    assert (result.outcome, "tools/pack.py" in result.hint) == ("warning", False)


def test_intervals_leave_out_the_first_event_and_stop_after_a_time_limit():
    ticks = iter([0.0, 3.0, 3.5, 4.5, 5.5, 99.0])
    assert measure_intervals(range(100), clock=lambda: next(ticks)) == [0.5, 1.0, 1.0]  # it stops after 5 s
    ticks = iter([10.0, 17.0, 99.0])
    assert measure_intervals(range(100), clock=lambda: next(ticks)) == [7.0]


@pytest.mark.parametrize(("workers", "loading"), [(0, 0.5), (2, 0.5), (2, 3.0)])
def test_run_time_is_the_sum_of_steps_and_validations(workers, loading):
    stages = [
        StageLength(3, 10, 1, Speed(loading, 1.0, 7.0, workers)),
        StageLength(2, 5, 2, Speed(loading, 4.0, 1.0, workers)),
    ]
    clock = 0.0
    for stage in stages:
        for _ in range(stage.epochs):
            for _ in range(stage.steps):
                clock += max(loading, stage.speed.step) if workers else loading + stage.speed.step
            clock += stage.validations * stage.speed.validation
    assert sum(stage.seconds for stage in stages) == pytest.approx(clock)
    result = estimate_run_time(stages, 5_000_000)
    assert result.details.startswith(f"about {format_duration(clock)} for 5 epochs, 40 steps; ")
    assert result.details.endswith("; peak memory so far 5.0 MB")
    assert estimate_run_time(stages, 0, may_stop_early=True).details.startswith("at most about")


def test_durations_are_formatted_with_a_suitable_unit():
    durations = [format_duration(seconds) for seconds in (0.25, 42.4, 600, 3 * 3600, 30 * 3600, 72 * 3600)]
    assert durations == ["0.2 s", "42 s", "10 min", "3.0 hours", "30 hours", "3.0 days"]


def test_loader_check_reports_the_stage_with_the_slowest_relative_loading():
    fast, slow = Speed(1.0, 4.0, 0.0, 2), Speed(1.0, 0.5, 0.0, 2)

    def measure(name: str) -> LoadingTimes:
        return {"b": LoadingTimes(0.05, 0.15)}[name]  # the parts of a fast loader are not measured

    assert check_loader_throughput({"a": fast, "b": fast}, 8, measure) == CheckResult(
        "pass", "samples per second: loader 8, model 2; the model is the bottleneck (2 workers)"
    )
    result = check_loader_throughput({"a": fast, "b": slow}, 8, measure)
    assert result.details == (
        "samples per second in b: loader 8, model 16; the loader is the bottleneck (2 workers), mainly the transform: "
        "decoding 20%, the transform 60%, collation and transport 20% of its time"
    )


@CLASSES_ONLY
def test_run_time_counts_all_epochs_and_both_validations(make_context, monkeypatch):
    context = make_context(ema_decay=0.9, stages=(check.Stage("a", 3, 0.1), check.Stage("b", 2, 0.1)))
    monkeypatch.setattr(check.CheckContext, "_measure", lambda context, stage: Speed(0.25, 0.75, 2.0, 0))
    steps = len(context.split.train) // 16
    assert (
        f"about {5 * (steps + 2 * 2.0):.0f} s for 5 epochs, {5 * steps} steps; 1 s per step"
        in check.check_run_time(context).details
    )


Disk = namedtuple("Disk", "total used free")  # as in shutil


@CLASSES_ONLY
@pytest.mark.parametrize(("room", "outcome"), [(0.99, "fail"), (1.01, "warning"), (2, "pass")])
def test_disk_too_small_for_the_checkpoints_fails(make_context, monkeypatch, tmp_path, room, outcome):
    context = make_context(save_n_best=2, checkpoint_every_minutes=None)  # stages of 6 and 3 epochs
    state = context.make_state(context.first_stage, 1)
    machine_checks.count_state_bytes(state, context.make_checkpoint)
    needed = (4 + 3 + 1) * count_bytes(context.make_checkpoint(state))
    queried = []

    def disk_usage(directory):
        queried.append(directory)
        return Disk(0, 0, int(room * needed))

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    result = check.check_disk_space(context)
    assert (result.outcome, "4 + 3 + 1 checkpoints" in result.details) == (outcome, True)
    assert queried == [tmp_path]


@CLASSES_ONLY
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_estimated_checkpoint_size_is_close_to_the_file_of_a_run(make_context, monkeypatch, tmp_path, optimizer):
    def model(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 64, 4000), nn.BatchNorm1d(4000), nn.Linear(4000, 4))

    stage = check.Stage("only", 1, 0.01)
    context = make_context(model=model, ema_decay=0.9, limit_batches=2, stages=(stage,), optimizer=optimizer)
    estimate = machine_checks.count_state_bytes(context.make_state(stage, 1), context.make_checkpoint)
    for name in ("load_dataset", "build_model"):
        monkeypatch.setattr(train, name, getattr(check, name))
    run_ranks(1, lambda: train.main(context.options), join=False)
    assert estimate == pytest.approx((context.options.logdir / "only/last.pth").stat().st_size, rel=0.02)


@pytest.mark.parametrize("epochs", [1, 2, 4, 9])
@pytest.mark.parametrize("within_epochs", [False, True])
def test_kept_checkpoints_is_the_maximum_that_a_stage_keeps(tmp_path, epochs, within_epochs):
    def count(scores) -> int:
        directory = tmp_path / str(random.random())
        manager = CheckpointManager(directory, save_n_best=3)
        model = nn.Linear(1, 1)
        most = 0
        for epoch, score in enumerate(scores, start=1):
            for step in (1, 2) if within_epochs else ():
                manager.save(make_checkpoint("s", epoch, model, step=3 * epoch + step - 3))
                most = max(most, len(list(directory.glob("epoch_*.pth"))))
            manager.process(score, epoch, make_checkpoint("s", epoch, model, step=3 * epoch))
            most = max(most, len(list(directory.glob("epoch_*.pth"))))
        return most

    expected = kept_checkpoints(epochs, 3, within_epochs=within_epochs)
    worsening = count(range(epochs, 0, -1))  # the best checkpoints are the oldest
    most = max(worsening, count(range(epochs)))
    assert most <= expected
    assert most == expected or within_epochs


@CLASSES_ONLY
def test_logdir_with_a_run_is_a_warning_and_a_file_fails(make_context, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    assert check.check_logdir(make_context(logdir=tmp_path / "old")).outcome == "warning"
    assert check.check_logdir(make_context(logdir=tmp_path / "old", resume=True)).outcome == "pass"
    assert run_one_check(partial(check.check_logdir, make_context(logdir=tmp_path / "file/run"))).outcome == "fail"
    assert check.check_logdir(make_context(logdir=tmp_path / "new")).outcome == "pass"


@pytest.mark.slow
def test_process_group_check_reports_success_or_the_reason_of_failure(make_context, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    assert check.check_processes(make_context()) == CheckResult("pass", "2 processes (gloo) formed a process group")
    result = check.check_processes(make_context(batch_size=15))
    assert (result.outcome, "--batch-size 15 is not a multiple of 2 processes x" in result.details) == ("warning", True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    result = check.check_processes(make_context())
    assert result.outcome in ("warning", "fail")  # it fails on a machine with several GPUs, where DDP is needed
    assert re.search(r"2 processes \(gloo\) cannot form a process group: .*nosuch0", result.details)


def test_process_group_check_times_out_and_kills_its_processes(monkeypatch):
    started = []
    start = connectivity._start

    def start_and_note(*arguments):
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(connectivity, "_start", start_and_note)
    monkeypatch.setattr(connectivity, "START_TIMEOUT", 0.0)
    assert connectivity.check_process_group(2, "cpu", 60) == "process 0, 1 of 2 did not start in 0 s"
    assert [process.poll() for process in started] == [-9, -9]


class FakeRank:
    """A process that starts at one time and ends at another, on a clock that `connectivity` reads."""

    def __init__(self, clock, start: int, end: int) -> None:
        self._clock = clock
        self._start = start
        self._end = end
        self.process = self

    @property
    def has_started(self) -> bool:
        return self._clock.now >= self._start

    def poll(self) -> int | None:
        return 0 if self._clock.now >= self._end else None


class FakeClock:
    """Time that passes only while `connectivity` sleeps, one second at a time."""

    now = 0

    def monotonic(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((100, 160), (150, 160), None),  # slow imports do not count
        ((1, 200), (100, 200), "no answer from process 0, 1 of 2 in 60 s"),
        ((1, 20), (10, 200), "no answer from process 1 of 2 in 60 s"),
        ((1, 800), (700, 800), "process 1 of 2 did not start in 600 s"),
    ],
)
def test_time_limit_of_the_process_group_counts_from_when_all_have_started(monkeypatch, first, second, expected):
    clock = FakeClock()
    monkeypatch.setattr(connectivity, "time", clock)
    ranks = [FakeRank(clock, *first), FakeRank(clock, *second)]
    assert connectivity._wait(ranks, 60) == expected


@CLASSES_ONLY
def test_processes_that_did_not_start_are_not_blamed_on_the_network(make_context, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(connectivity, "START_TIMEOUT", 0.0)
    result = check.check_processes(make_context())
    assert "did not start" in result.details
    assert "network" not in result.hint


# The table


def test_exception_becomes_a_failed_result_and_other_checks_run(capsys):
    def broken():
        raise KeyError("weight")

    results = run_checks({"a": broken, "b": lambda: CheckResult("warning", "[red]so[/red] so.", "fix it")})
    assert results["a"].outcome == "fail"
    assert "KeyError: 'weight'" in results["a"].details
    assert results["a"].details.endswith(f"line {broken.__code__.co_firstlineno + 1})")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("fail     a  KeyError")
    assert out[1] == "warning  b  [red]so[/red] so. Fix: fix it."
    assert re.fullmatch(r"2 checks in \d+ s: 1 warning, 1 fail\.", out[2])
    with pytest.raises(RunError, match=r"^1 of 2 checks failed: a\.$"):
        raise_if_failed(results)
    raise_if_failed({"b": results["b"]})


def test_error_place_is_the_last_line_of_user_code():
    def broken():
        return choose_samples(None, 1, 0)

    details = run_one_check(broken).details
    assert details.endswith(f"(tests/test_check.py, line {broken.__code__.co_firstlineno + 1})")
    assert not is_user_code(ROOT / ".venv/lib/python3.11/site-packages/torch/random.py")


def test_operation_without_a_deterministic_kernel_has_a_hint():
    def fail() -> CheckResult:
        raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic")

    assert run_one_check(fail).hint == "use --no-deterministic, or replace the operation"


@CLASSES_ONLY
def test_unknown_main_metric_and_lazy_modules_are_rejected_as_in_train_py(make_context, monkeypatch):
    with pytest.raises(UserError, match="--main-metric top2 is not a known metric"):
        make_context(main_metric="top2")
    monkeypatch.setattr(check, "valid_fn", lambda *_: {"top2": 0.5})
    assert make_context(main_metric="top2").options.main_metric == "top2"
    with pytest.raises(UserError, match="build_model returns lazy modules"):
        make_context(model=lambda num_classes: nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes)))


def test_out_of_memory_has_a_hint():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert run_one_check(greedy).hint == "use more --accumulation-steps, or a smaller --batch-size"


def test_terminal_table_fits_80_columns_without_losing_words(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    words = [f"word{number}" for number in range(40)]
    run_checks(
        {
            "a check": lambda: CheckResult("fail", " ".join(words[:20]), " ".join(words[20:])),
            "b": lambda: CheckResult("pass", "[x]"),
        }
    )
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).replace("\r", "\n")
    assert max(map(len, out.splitlines())) <= 80
    assert re.findall(r"word\d+", out) == words
    assert re.search(r"^fail +a check +word0 ", out, re.MULTILINE)
    assert "[x]" in out


# The command


def settings() -> list:
    """Return the global state of the process that a check could change."""
    return [
        torch.are_deterministic_algorithms_enabled(),
        [setting.fp32_precision for setting in FP32_SETTINGS],
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.multiprocessing.get_sharing_strategy(),
        torch.utils.deterministic.fill_uninitialized_memory,
        warnings.filters[:],
        dict(check.machine_checks.os.environ),
        (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    ]


@CLASSES_ONLY
def test_check_leaves_no_files_and_restores_settings(make_context, monkeypatch, tmp_path):
    context = make_context()
    skipped = [
        (name, run if name != "processes" else lambda _: CheckResult("pass", "skipped")) for name, run in check.CHECKS
    ]
    monkeypatch.setattr(check, "CHECKS", skipped)
    with preserved_settings():
        for setting in FP32_SETTINGS:
            setting.fp32_precision = "ieee"
        before = settings()
        check.main(context.options)
        assert settings() == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run_check(data_dir, tmp_path, *flags: str):
    fixed = ["--data-dir", str(data_dir), "--split-file", str(tmp_path / "x.csv"), "--logdir", str(tmp_path / "run")]
    fixed += ["--tracker", "none", "--device", "cpu"]
    return run_train(check.main, check.Options, *override(fixed, flags), name="tools/check.py")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fold", "77"], "--fold 77 does not exist"),
        (["--samples", "0"], "--samples 0 must be 1 or more."),
        (["--batch-size", "9", "--accumulation-steps", "2"], "--batch-size 9 must be a multiple of 2"),
        (["--stages.0.freeze", "nothing"], "freeze 'nothing' is not a module of the model"),
        (["--init-from", "nothing.pth"], "nothing.pth does not exist"),
        (["--config", "nothing.json"], "--config nothing.json cannot be read"),
        (["--samples", "9", "--samples=8"], "--samples is given twice; give it once, with all its values."),
        (["--tf32", "--no-tf32"], "--tf32 and --no-tf32 are both given; give one of them."),
        (["--lr", "1"], "unknown option --lr; did you mean '--stages.0.lr' or '--stages.1.lr'? See python tools/check"),
    ],
)
def test_invalid_options_give_a_one_line_error_as_in_train_py(data_dir, tmp_path, flags, message):
    end = run_check(data_dir, tmp_path, *flags)
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1)
    assert message in end.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_default_model_passes_and_a_constant_model_exits_with_1(monkeypatch, data_dir, tmp_path):
    (tmp_path / "made").mkdir()
    config = tmp_path / "made/config.json"
    config.write_text('{"batch_size": 8, "limit_batches": 3}')
    small = ["--config", str(config), "--samples", "300", "--stages.0.image-size", "32", "--stages.1.image-size", "32"]
    end = run_check(data_dir, tmp_path, *small)
    assert end.code == 0, end.out + end.err
    lines = end.out.splitlines()
    assert [line.split("  ")[0] in ("pass", "warning") for line in lines] == [True] * 12 + [False]
    assert "for 9 epochs, 27 steps; " in lines[-2]
    assert "\x1b" not in end.out

    monkeypatch.setattr(check, "build_model", Constant)
    end = run_check(data_dir, tmp_path, *small)
    assert (end.code, end.err) == (1, "error: 1 of 12 checks failed: one batch.\n"), end.out
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]


@pytest.mark.parametrize(("shards", "outcome"), [(2, "pass"), (4, "warning")])
def test_check_warns_of_small_shards_with_batchnorm(cpu, shards, outcome):
    loader = TrainLoader(RandomImages(64), range(64), None, cpu, seed=0, batch_size=32, shards=shards)
    result = check_shards(dropout_network(4), loader)
    assert (result.outcome, result.details) == (outcome, f"the smallest of {shards} shards has {32 // shards} samples")
    assert check_shards(nn.Linear(1, 1), loader).outcome == "pass"

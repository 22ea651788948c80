"""check.py: each check fails where the thing is really broken, none stops the others, and nothing is left behind."""

import math
import random
import re
import time
import warnings
from collections import Counter, namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from models import CHANNELS
from pictures import patterned
from processes import run_ranks, run_train
from small_data import make_data
from torch import nn
from torchvision.io import ImageReadMode, decode_image, read_file, write_jpeg

import train
from batteries.checkpoint.io import count_bytes, make_checkpoint, save_checkpoint
from batteries.checkpoint.manager import CheckpointManager
from batteries.core.errors import RunError
from batteries.core.text import format_duration
from batteries.data.splits import SplitFile, to_csv
from batteries.distributed import connectivity
from batteries.preflight import machine_checks
from batteries.preflight.data_checks import (
    check_class_counts,
    check_duplicates,
    check_normalization,
    open_samples,
    some_of_each_class,
)
from batteries.preflight.machine_checks import (
    Length,
    Speed,
    check_loader_throughput,
    estimate_run_time,
    kept_checkpoints,
    seconds_each,
)
from batteries.preflight.model_checks import (
    check_checkpoint_roundtrip,
    check_overfit_one_batch,
    differences,
    nearest_folder,
)
from batteries.preflight.results import CheckResult, raise_if_failed, run_checks, run_one_check
from tools import check

SIZE = 160
LABELS = np.arange(SIZE) % 4


class Samples:
    """Pictures of four classes, in memory, that a linear model learns in a few steps; (C, 8, 8)."""

    classes = ("north", "east", "south", "west")
    ids = tuple(f"picture{index}" for index in range(SIZE))

    def __init__(self) -> None:
        self.images = torch.from_numpy(patterned(LABELS, CHANNELS, 8))
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
def make_bench(monkeypatch, tmp_path, cpu):
    """A Bench of small parts in place of this experiment's."""

    def make(dataset=None, model=small_model, **knobs) -> check.CheckContext:
        dataset = dataset or Samples()
        for module in (check, train):
            monkeypatch.setattr(module, "normalize", lambda images: images / 64 - 2)
            monkeypatch.setattr(module, "valid_transform", lambda size=None: None)
        monkeypatch.setattr(train, "train_transform", lambda size=None: None)
        monkeypatch.setattr(check, "load_dataset", lambda folder: dataset)
        monkeypatch.setattr(check, "build_model", model)
        values = {"batch_size": 16, "tracker": ("none",), "device": "cpu", "logdir": tmp_path / "logs/run"}
        return check.make_context(check.Options(**{**values, "split_file": tmp_path / "splits/x.csv", **knobs}), cpu)

    return make


def test_sound_data_and_a_sound_model_pass_all_checks_of_this_process(make_bench, tmp_path):
    class Slow(nn.Sequential):
        def forward(self, images):
            time.sleep(0.02)  # so that the loader is not the limit
            return super().forward(images)

    bench = make_bench(model=lambda num_classes: Slow(*small_model(num_classes)))
    rows = {name: run_one_check(partial(trial, bench)) for name, trial in check.CHECKS if name != "processes"}
    assert {name: row for name, row in rows.items() if row.outcome != "pass" or row.hint} == {}
    assert list(tmp_path.iterdir()) == []


# The data


class Files(Samples):
    """The same in JPEG files."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder
        for name, image in zip(self.ids, patterned(LABELS, 3, 32), strict=True):
            write_jpeg(torch.from_numpy(image), str(folder / name))

    def __getitem__(self, index):
        return decode_image(read_file(str(self.folder / self.ids[index])), ImageReadMode.RGB), int(LABELS[index])


def test_a_truncated_file_is_named_whatever_its_reader_raises(make_bench, tmp_path):
    dataset = Files(tmp_path)
    path = tmp_path / dataset.ids[77]
    path.write_bytes(path.read_bytes()[:300])
    row = run_one_check(partial(check.samples_load, make_bench(dataset)))
    assert row.outcome == "fail"
    assert row.details.startswith(f"tried all {SIZE} samples; of 1 this is wrong: picture77: RuntimeError: ")


def test_of_many_samples_as_many_as_were_asked_for_are_opened(make_bench):
    bench = make_bench(samples=40)
    assert check.samples_load(bench) == CheckResult("pass", f"40 of {SIZE} samples, by chance, open")
    bench.dataset.left_out = "3 .bmp"
    assert check.samples_load(bench).details == f"40 of {SIZE} samples, by chance, open; left out: 3 .bmp"
    assert len(set(bench.opened[0].tolist())) == 40
    assert len(bench.opened[1]) == 40


def test_a_sample_with_another_target_than_the_split_was_made_for_fails(make_bench):
    class Shifted(Samples):
        def __getitem__(self, index):
            return self.images[index], (int(self.targets[index]) + (index == 9)) % 4

    row = run_one_check(partial(check.samples_load, make_bench(Shifted())))
    assert row.outcome == "fail"
    assert "picture9: its target is 2, and 1 in the data set's targets." in row.details


def test_an_image_that_is_not_finite_fails(make_bench):
    dataset = Samples()
    dataset.images = dataset.images.float()
    dataset.images[3, 0, 2, 2] = torch.nan
    row = run_one_check(partial(check.samples_load, make_bench(dataset)))
    assert (row.outcome, "picture3: it has values that are not finite" in row.details) == ("fail", True)


def test_a_data_sets_own_look_at_its_files_counts_too(make_bench):
    class Checked(Samples):
        def check(self, indices):
            assert len(indices) < SIZE  # the test split is left alone
            raise ValueError("three files are no images")

    row = run_one_check(partial(check.samples_load, make_bench(Checked())))
    assert row.outcome == "fail"
    assert "three files are no images" in row.details


def test_samples_that_are_no_images_open_and_have_no_duplicates_to_look_for(make_bench):
    dataset = Samples()
    dataset.images = dataset.images.float().flatten(1)
    bench = make_bench(dataset)
    assert check.samples_load(bench).outcome == "pass"
    assert check.duplicates(bench) == CheckResult("warning", "not tried: no sample is an image (C, H, W) that opens")


def test_a_class_that_is_missing_in_train_fails_and_the_other_checks_go_on(make_bench, tmp_path):
    dataset = Samples()
    folds = np.where(LABELS == 2, 0, np.arange(SIZE) // 4 % 3)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/x.csv").write_text(to_csv(dataset, folds))
    bench = make_bench(dataset)
    row = run_one_check(partial(check.class_counts, bench))
    assert row.outcome == "fail"
    assert row.details.startswith("the train split of fold 0 has no sample of class south (40 of south in all")
    assert (
        run_one_check(partial(check.samples_load, bench)).outcome
        == run_one_check(partial(check.normalization, bench)).outcome
        == "pass"
    )


@pytest.mark.parametrize(("of_rare", "outcome"), [(20, "warning"), (24, "pass")])
def test_a_rare_class_is_a_warning_and_all_counts_are_right(tmp_path, of_rare, outcome):
    class Skewed(Samples):
        targets = np.array([0] * (SIZE - of_rare) + [1] * of_rare)
        classes = ("common", "rare")

        def __init__(self) -> None:
            pass

    folds = np.where(Skewed.targets == 1, np.arange(SIZE) % 4 > 1, np.arange(SIZE) % 4 > 2).astype(int)  # 1 validates
    splits = SplitFile(tmp_path / "x.csv", Skewed(), lambda dataset: folds)
    row = check_class_counts(splits, 1)
    train, valid = (sorted(Counter(Skewed.targets[folds == fold]).values()) for fold in (0, 1))
    assert row.outcome == outcome
    assert (
        f"train {sum(train)} ({train[0]} to {train[1]}), valid {sum(valid)} ({valid[0]} to {valid[1]}), test 0"
        in row.details
    )
    assert max(valid) < 10 * min(valid)
    assert ("times as many common as rare" in row.details) == (max(train) >= 10 * min(train)) == (outcome == "warning")


def test_targets_that_are_no_classes_are_not_counted(tmp_path):
    dataset = Samples()
    dataset.targets, dataset.classes = np.linspace(0, 1, SIZE), None
    row = check_class_counts(SplitFile(tmp_path / "x.csv", dataset, lambda dataset: np.arange(SIZE) % 2), 0)
    assert row == CheckResult(
        "pass", "train 80, valid 80, test 0 samples; their targets are no classes, so none are counted"
    )


@pytest.mark.parametrize(("copies", "outcome"), [(0, "pass"), (1, "fail"), (3, "fail")])
def test_an_image_on_both_sides_of_the_split_is_named(make_bench, copies, outcome):
    dataset = Samples()
    bench = make_bench(dataset)
    train, test = bench.split.train, bench.split.test
    for number in range(copies):
        dataset.images[test[number]] = dataset.images[train[number]]
    row = check.duplicates(bench)
    assert row.outcome == outcome
    if copies:
        assert f"{copies} equal and 0 nearly equal images, of {SIZE}" in row.details
        pair = sorted([(train[0], "train"), (test[0], "test")])
        assert " and ".join(f"picture{index} ({part})" for index, part in pair) in row.details


def test_duplicates_are_named_right_though_another_sample_does_not_open(make_bench):
    class Broken(Samples):
        def __getitem__(self, index):
            return 1 / 0 if index == 0 else super().__getitem__(index)

    dataset = Broken()
    bench = make_bench(dataset)
    train, test = bench.split.train[-1], bench.split.test[-1]
    dataset.images[test] = dataset.images[train]
    row = check.duplicates(bench)
    assert f"of {SIZE - 1}: " in row.details
    assert {f"picture{train}", f"picture{test}"} == set(re.findall(r"picture\d+", row.details))


def test_few_duplicates_are_a_warning_and_those_within_one_part_none():
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
    row = check_duplicates(dataset, split, everything, open_samples(dataset, everything))
    assert (row.outcome, "0 (train) and 599 (test)" in row.details) == ("warning", True)


@pytest.mark.parametrize(
    ("scale", "shift", "outcome"),
    [
        *((1, 0, "pass"), (1, 0.6, "warning"), (2, 0, "warning"), (0.5, 0, "warning"), (255, 0, "fail")),
        *((1, -2.5, "fail"), (0, 0, "fail"), (math.nan, 0, "fail")),
    ],
)
def test_normalised_values_far_from_0_and_1_are_told_with_numpys_numbers(scale, shift, outcome):
    values = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * scale + shift
    row = check_normalization(values.split(7))
    assert row.outcome == outcome
    wanted = [" ".join(f"{number:.2f}" for number in f(values.double().numpy(), (0, 2, 3))) for f in (np.mean, np.std)]
    if scale == scale:
        assert row.details.startswith(f"mean {wanted[0]}, deviation {wanted[1]}, values {values.min():.2f} to ")


def test_a_normalisation_that_forgets_to_divide_fails(make_bench, monkeypatch):
    bench = make_bench()
    monkeypatch.setattr(check, "normalize", lambda images: (images - 0.5) / 0.25)
    row = check.normalization(bench)
    assert (row.outcome, "python tools/split.py --keep --statistics" in row.hint) == ("fail", True)


def test_a_few_samples_are_of_as_many_classes_as_there_are():
    dataset = Samples()
    dataset.targets = np.array([0] * 150 + [1] * 6 + [2] * 4)
    chosen = some_of_each_class(dataset, np.arange(SIZE), 8)
    assert Counter(dataset.targets[chosen].tolist()) == {0: 3, 1: 3, 2: 2}
    assert len(set(chosen.tolist())) == 8


# The model


class Constant(nn.Module):
    """Answers without a look at the image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.answer = nn.Linear(1, num_classes)

    def forward(self, images):
        return self.answer(torch.ones(len(images), 1))


class Shuffled(Samples):
    """Another label each time a sample is read, by a generator that no seed of ours reaches."""

    generator = np.random.default_rng(0)

    def __getitem__(self, index):
        return self.images[index], int(self.generator.integers(4))


def test_one_batch_is_learned_by_a_sound_model_from_sound_labels(make_bench):
    row = check.overfit_one_batch(make_bench())
    assert row.outcome == "pass"
    first, last = map(float, re.match(r"loss ([\d.]+) to ([\d.]+) in \d+ steps", row.details).groups())
    assert last <= first / 10


@pytest.mark.parametrize("broken", [{"dataset": Shuffled()}, {"model": Constant}])
def test_one_batch_is_not_learned_from_shuffled_labels_or_by_a_model_that_cannot(make_bench, broken):
    row = check.overfit_one_batch(make_bench(**broken))
    assert (row.outcome, "in 60 steps on the same 8 samples" in row.details) == ("fail", True)
    assert "it does not learn them" in row.details


def test_one_batch_is_learned_though_training_mixes_smooths_and_drops(make_bench):
    def model(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(CHANNELS * 64, num_classes))

    bench = make_bench(model=model, mixup=0.5, label_smoothing=0.3, stages=(check.Stage("one", 1, 0.02),))
    assert check.overfit_one_batch(bench).outcome == "pass"


@pytest.mark.parametrize(
    ("losses", "knows", "outcome"),
    [
        ([2.0, 1.0, 0.5, 0.19], False, "pass"),
        ([2.0, 1.0, 0.5, 0.21], False, "warning"),
        ([2.0, 1.5, 1.1], False, "fail"),
        ([0.02, 0.02, 0.019], True, "warning"),
        ([2.0, math.nan], True, "fail"),
        ([math.inf], False, "fail"),
    ],
)
def test_how_far_a_loss_has_to_fall(losses, knows, outcome):
    assert check_overfit_one_batch(losses, 8, 0.1, knows=knows).outcome == outcome


def test_no_more_steps_are_taken_than_are_needed():
    losses = iter([1.0, 0.09, 0.08])
    assert "in 2 steps" in check_overfit_one_batch(losses, 8, 0.1).details
    assert next(losses) == 0.08


class Branches(nn.Module):
    """A network with one more branch, by what becomes of it."""

    def __init__(self, num_classes: int, join) -> None:
        super().__init__()
        self.trunk, self.branch = small_model(num_classes), small_model(num_classes)
        self.gate = nn.Parameter(torch.zeros(()))
        self.join = join

    def forward(self, images):
        return self.join(self, self.trunk(images), images)


@pytest.mark.parametrize(
    ("join", "outcome", "words"),
    [
        (lambda net, trunk, images: trunk + net.gate, "fail", "no gradient for 6 of 13 parameters: branch.1.weight"),
        (lambda net, trunk, images: trunk + net.gate * net.branch(images), "pass", "all 13 parameters"),
        (lambda net, trunk, images: trunk + net.gate + 0 * net.branch(images), "warning", "zeros for 6 of 13"),
        (lambda net, trunk, images: trunk + net.branch(images) + net.gate.sqrt(), "fail", "finite, for 1 of 13: gate"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # where a step is skipped
def test_parameters_that_no_gradient_reaches_are_named(make_bench, join, outcome, words):
    row = check.gradients(make_bench(model=lambda num_classes: Branches(num_classes, join)))
    assert row.outcome == outcome
    assert words in row.details


def test_what_is_frozen_in_all_stages_needs_no_gradient_and_what_learns_in_one_does(make_bench):
    def unused(net, trunk, images):
        return trunk + net.gate

    def gradients(*frozen):
        stages = tuple(check.Stage(f"s{number}", 1, 0.1, freeze=names) for number, names in enumerate(frozen))
        return check.gradients(make_bench(model=lambda num_classes: Branches(num_classes, unused), stages=stages))

    assert gradients(("branch",), ("branch", "trunk.1")) == CheckResult(
        "pass", "all 7 parameters have one; 6 are frozen in all stages"
    )
    assert gradients(("branch",), ()).outcome == "fail"


def test_a_branch_behind_a_gate_that_opens_in_a_later_stage_is_reached(make_bench):
    class Gated(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.trunk, self.branch = small_model(num_classes), small_model(num_classes)
            self.gate = nn.Linear(num_classes, num_classes, bias=False)
            nn.init.zeros_(self.gate.weight)

        def forward(self, images):
            return self.trunk(images) + self.gate(self.branch(images))

    stages = check.Stage("one", 1, 0.1, freeze=("gate",)), check.Stage("two", 1, 0.1)
    assert check.gradients(make_bench(model=Gated, stages=stages)) == CheckResult("pass", "all 13 parameters have one")


class Forgetful(nn.Sequential):
    """Computes with numbers that are in no state_dict."""

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
    """Keeps its momentum where no state_dict has it."""

    def __init__(self, parameters, lr) -> None:
        super().__init__(parameters, lr=lr)
        self.moves: dict = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for value in group["params"]:
                self.moves[value] = 0.9 * self.moves.get(value, 0) + value.grad
                value -= group["lr"] * self.moves[value]


@pytest.mark.parametrize(
    ("how", "outcome"),
    [("buffer", "pass"), ("attribute", "fail"), ("temporary", "fail"), ("only in validation", "fail")],
)
def test_a_model_whose_state_does_not_survive_its_checkpoint_fails(make_bench, tmp_path, how, outcome):
    row = run_one_check(
        partial(check.checkpoint_roundtrip, make_bench(model=lambda num_classes: Forgetful(num_classes, how)))
    )
    assert row.outcome == outcome, row
    assert list(tmp_path.iterdir()) == []


def test_what_is_loaded_otherwise_than_it_was_saved_is_named_even_where_no_two_runs_are_equal(make_bench, tmp_path):
    def forget(model, keys) -> None:
        nn.init.zeros_(model[3].weight)

    def forgetful(num_classes):
        model = small_model(num_classes)
        model.register_load_state_dict_post_hook(forget)
        return model

    bench = make_bench(model=forgetful)
    row = check_checkpoint_roundtrip(
        tmp_path, lambda stream: bench.make_state(bench.first_stage, 1, stream), bench.pack, None
    )
    assert (row.outcome, row.details) == ("fail", "loaded otherwise than saved: model_state_dict.3.weight")


def test_an_optimizer_whose_state_does_not_survive_its_checkpoint_fails(make_bench, monkeypatch):
    bench = make_bench(ema_decay=0.9)
    assert check.checkpoint_roundtrip(bench).outcome == "pass"
    monkeypatch.setattr(train, "build_optimizer", lambda model, stage, config: Momentum(model.parameters(), stage.lr))
    row = check.checkpoint_roundtrip(bench)
    assert row.outcome == "fail"
    assert row.details.startswith("it loads, and a step later these differ: result.train.")


def test_the_checkpoint_is_tried_beside_where_the_logdir_will_be(make_bench, monkeypatch, tmp_path):
    seen = []

    def save(path, checkpoint):
        seen.append(path)
        return save_checkpoint(path, checkpoint)

    monkeypatch.setattr("batteries.preflight.model_checks.save_checkpoint", save)
    (tmp_path / "disk").mkdir()
    bench = make_bench(logdir=tmp_path / "disk/not/yet/there")
    assert check.checkpoint_roundtrip(bench).outcome == "pass"
    assert seen[0].parent.parent == tmp_path / "disk" == nearest_folder(bench.options.logdir)
    assert list((tmp_path / "disk").iterdir()) == []


def test_differences_are_found_bit_for_bit_and_by_name():
    one = {"a": [torch.tensor([0.0, math.nan]), 1], "b": {"c": math.nan, "d": "x"}}
    assert differences(one, {"a": [torch.tensor([0.0, math.nan]), 1], "b": {"c": math.nan, "d": "x"}}) == []
    assert differences(one, {"a": [torch.tensor([-0.0, math.nan]), 1.0], "b": {"c": 0.0}}) == [
        "a.0",
        "a.1",
        "b.d",
        "b.c",
    ]
    assert differences(torch.zeros(2), torch.zeros(2, dtype=torch.float64), "x") == ["x"]
    assert differences(torch.zeros(2), torch.zeros(2, dtype=torch.int32), "x") == ["x"]
    assert differences([1], [1, 2], "y.") == ["y"]


# The machine


def test_a_slow_data_set_makes_the_loader_the_limit(make_bench):
    class Slow(Samples):
        def __getitem__(self, index):
            time.sleep(0.005)
            return super().__getitem__(index)

    row = check.loader_throughput(make_bench(Slow(), limit_batches=4))
    assert (row.outcome, "the loader is the limit (no workers" in row.details) == ("warning", True)
    assert row.hint.startswith("--num-workers ")


def test_times_are_those_between_events_but_for_the_first_and_do_not_go_on_for_ever():
    ticks = iter([0.0, 3.0, 3.5, 4.5, 5.5, 99.0])
    assert seconds_each(range(100), clock=lambda: next(ticks)) == [0.5, 1.0, 1.0]  # it has enough after 5 s
    ticks = iter([10.0, 17.0, 99.0])
    assert seconds_each(range(100), clock=lambda: next(ticks)) == [7.0]


@pytest.mark.parametrize(("workers", "loading"), [(0, 0.5), (2, 0.5), (2, 3.0)])
def test_the_time_of_a_run_is_that_of_its_steps_and_validations(workers, loading):
    stages = [Length(3, 10, 1, Speed(loading, 1.0, 7.0, workers)), Length(2, 5, 2, Speed(loading, 4.0, 1.0, workers))]
    clock = 0.0
    for stage in stages:
        for _ in range(stage.epochs):
            for _ in range(stage.steps):
                one, other = stage.speed.loading, stage.speed.step
                clock += max(one, other) if workers else one + other
            clock += stage.validations * stage.speed.validation
    assert sum(stage.seconds for stage in stages) == pytest.approx(clock)
    row = estimate_run_time(stages, 5_000_000)
    assert row.details.startswith(f"about {format_duration(clock)} for 5 epochs, 40 steps; ")
    assert row.details.endswith("; peak memory so far 5.0 MB")
    assert estimate_run_time(stages, 0, patient=False).details.startswith("at most about")


def test_times_are_said_in_the_unit_that_fits():
    said = [format_duration(seconds) for seconds in (0.25, 42.4, 600, 3 * 3600, 30 * 3600, 72 * 3600)]
    assert said == ["0.2 s", "42 s", "10 min", "3.0 hours", "30 hours", "3.0 days"]


def test_the_stage_in_which_loading_is_the_largest_share_of_a_step_is_told():
    fast, slow = Speed(1.0, 4.0, 0.0, 2), Speed(1.0, 0.5, 0.0, 2)
    assert check_loader_throughput({"a": fast, "b": fast}, 8) == CheckResult(
        "pass", "samples a second: loader 8, model 2: the model is the limit (2 workers)"
    )
    assert check_loader_throughput({"a": fast, "b": slow}, 8).details.startswith(
        "samples a second: loader 8, model 16, in b: the l"
    )


def test_the_time_of_a_run_counts_all_its_steps_and_validations(make_bench, monkeypatch):
    bench = make_bench(ema_decay=0.9, stages=(check.Stage("a", 3, 0.1), check.Stage("b", 2, 0.1)))
    monkeypatch.setattr(check.CheckContext, "_measure", lambda bench, stage: Speed(0.25, 0.75, 2.0, 0))
    steps = len(bench.split.train) // 16
    assert (
        f"about {5 * (steps + 2 * 2.0):.0f} s for 5 epochs, {5 * steps} steps; 1 s a step"
        in check.run_time(bench).details
    )


Disk = namedtuple("Disk", "total used free")  # as shutil's


@pytest.mark.parametrize(("room", "outcome"), [(0.99, "fail"), (1.01, "warning"), (2, "pass")])
def test_a_disk_that_is_too_small_for_the_checkpoints_fails(make_bench, monkeypatch, tmp_path, room, outcome):
    bench = make_bench(save_n_best=2, checkpoint_every_minutes=None)  # stages of 6 and 3 epochs
    state = bench.make_state(bench.first_stage, 1)
    machine_checks.count_state_bytes(state, bench.pack)
    needed = (4 + 3 + 1) * count_bytes(bench.pack(state))
    asked = []

    def disk_usage(folder):
        asked.append(folder)
        return Disk(0, 0, int(room * needed))

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    row = check.disk_space(bench)
    assert (row.outcome, "4 + 3 + 1 checkpoints" in row.details) == (outcome, True)
    assert asked == [tmp_path]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_size_of_a_checkpoint_is_nearly_that_of_the_file_that_a_run_writes(
    make_bench, monkeypatch, tmp_path, optimizer
):
    def model(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 64, 4000), nn.BatchNorm1d(4000), nn.Linear(4000, 4))

    stage = check.Stage("only", 1, 0.01)
    bench = make_bench(model=model, ema_decay=0.9, limit_batches=2, stages=(stage,), optimizer=optimizer)
    said = machine_checks.count_state_bytes(bench.make_state(stage, 1), bench.pack)
    for name in ("load_dataset", "build_model"):
        monkeypatch.setattr(train, name, getattr(check, name))
    run_ranks(1, lambda: train.main(bench.options), join=False)
    assert said == pytest.approx((bench.options.logdir / "only/last.pth").stat().st_size, rel=0.02)


@pytest.mark.parametrize("epochs", [1, 2, 4, 9])
@pytest.mark.parametrize("within_epochs", [False, True])
def test_as_many_checkpoints_are_counted_as_a_stage_keeps_at_most(tmp_path, epochs, within_epochs):
    def count(scores) -> int:
        folder = tmp_path / str(random.random())
        manager, model, most = CheckpointManager(folder, save_n_best=3), nn.Linear(1, 1), 0
        for epoch, score in enumerate(scores, start=1):
            for step in (1, 2) if within_epochs else ():
                manager.save(make_checkpoint("s", epoch, model, step=3 * epoch + step - 3))
                most = max(most, len(list(folder.glob("epoch_*.pth"))))
            manager.process(score, epoch, make_checkpoint("s", epoch, model, step=3 * epoch))
            most = max(most, len(list(folder.glob("epoch_*.pth"))))
        return most

    told = kept_checkpoints(epochs, 3, within_epochs=within_epochs)
    seen = max(count(range(epochs, 0, -1)), count(range(epochs)))  # ever worse: the best ones are old
    assert seen <= told
    assert seen == told or within_epochs


def test_a_logdir_with_a_run_is_a_warning_and_one_that_is_a_file_fails(make_bench, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    assert check.logdir(make_bench(logdir=tmp_path / "old")).outcome == "warning"
    assert check.logdir(make_bench(logdir=tmp_path / "old", resume=True)).outcome == "pass"
    assert run_one_check(partial(check.logdir, make_bench(logdir=tmp_path / "file/run"))).outcome == "fail"
    assert check.logdir(make_bench(logdir=tmp_path / "new")).outcome == "pass"


@pytest.mark.slow
def test_processes_meet_here_and_where_they_cannot_the_reason_is_told(make_bench, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    assert check.processes(make_bench()) == CheckResult("pass", "2 processes met (gloo)")
    row = check.processes(make_bench(batch_size=15))
    assert (row.outcome, "--batch-size 15 does not divide over 2 x" in row.details) == ("warning", True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    row = check.processes(make_bench())
    assert row.outcome in ("warning", "fail")  # fail with several GPUs, which wait for DDP
    assert re.search(r"2 processes \(gloo\) cannot meet: .*nosuch0", row.details)


def test_processes_that_never_come_are_not_waited_for_and_none_is_left(monkeypatch):
    started, start = [], connectivity._start

    def start_first_alone(*arguments):
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(connectivity, "_start", start_first_alone)
    assert connectivity.check_process_group(2, "cpu", 0.2) == "no answer from process 0, 1 of 2 in 0.2 s"
    assert [process.poll() for process in started] == [-9, -9]


# The table


def test_what_a_check_raises_is_its_row_and_the_others_go_on(capsys):
    def broken():
        raise KeyError("weight")

    rows = run_checks({"a": broken, "b": lambda: CheckResult("warning", "[red]so[/red] so.", "mend it")})
    assert rows["a"].outcome == "fail"
    assert "KeyError: 'weight'" in rows["a"].details
    assert rows["a"].details.endswith(f"line {broken.__code__.co_firstlineno + 1})")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("fail     a  KeyError")
    assert out[1] == "warning  b  [red]so[/red] so. Mend: mend it."
    assert re.fullmatch(r"2 checks in \d+ s: 1 warning, 1 fail\.", out[2])
    with pytest.raises(RunError, match=r"^1 of 2 checks failed: a\.$"):
        raise_if_failed(rows)
    raise_if_failed({"b": rows["b"]})


def test_out_of_memory_has_a_mend():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert run_one_check(greedy).hint == "more --accumulation-steps, or less --batch-size"


def test_on_a_terminal_the_table_fits_into_80_columns_and_loses_no_word(monkeypatch, capsys):
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
    """What a process may find changed afterwards."""
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.multiprocessing.get_sharing_strategy(),
        torch.utils.deterministic.fill_uninitialized_memory,
        warnings.filters[:],
        dict(check.machine_checks.os.environ),
        (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    ]


def test_nothing_is_left_behind_neither_files_nor_settings(make_bench, monkeypatch, tmp_path):
    bench = make_bench()
    skipped = [
        (name, trial if name != "processes" else lambda _: CheckResult("pass", "not here"))
        for name, trial in check.CHECKS
    ]
    monkeypatch.setattr(check, "CHECKS", skipped)
    torch.set_float32_matmul_precision("medium")
    before = settings()
    check.main(bench.options)
    assert settings() == before
    assert list(tmp_path.iterdir()) == []
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run_check(data_dir, tmp_path, *flags: str):
    places = {"--data-dir": data_dir, "--split-file": tmp_path / "x.csv", "--logdir": tmp_path / "run"}
    fixed = [str(word) for pair in places.items() for word in pair] + ["--tracker", "none", "--device", "cpu"]
    return run_train(check.main, check.Options, *fixed, *flags, name="tools/check.py")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--fold", "77"], "--fold 77 is not there"),
        (["--samples", "0"], "--samples 0 must be 1 or more."),
        (["--batch-size", "9", "--accumulation-steps", "2"], "--batch-size 9 must be a multiple of 2"),
        (["--stages.0.freeze", "nothing"], "freeze 'nothing' is no module of the model"),
        (["--init-from", "nothing.pth"], "nothing.pth is not there"),
        (["--config", "nothing.json"], "--config nothing.json cannot be read"),
    ],
)
def test_bad_input_is_told_in_a_sentence_as_train_py_does(data_dir, tmp_path, flags, sentence):
    end = run_check(data_dir, tmp_path, *flags)
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1)
    assert sentence in end.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_real_network_on_these_data_passes_and_a_broken_one_ends_with_1(monkeypatch, data_dir, tmp_path):
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

"""The data set of this project fulfils the documented interface, and a model learns from it."""

import dataclasses
import json
import re
from urllib.error import URLError

import numpy as np
import pytest
import torch
from marks import CLASSES_ONLY
from models import tiny_network
from processes import run_ranks, run_train
from small_data import TEST_FILES, change_one_sample, make_data

import train
from batteries.core.errors import UserError
from batteries.data.dataset import UNKNOWN, dataset_info
from batteries.data.loaders import EvalLoader
from batteries.data.splits import TEST, SplitFile
from batteries.tracking.manager import default_trackers
from experiment.augmentations import MEAN, STD, normalize, train_transform, valid_transform
from experiment.dataset import load_dataset
from experiment.splits import make_folds
from train import Config, Stage

OFFICIAL = pytest.mark.skipif(not TEST_FILES, reason="this data set has no separate test files")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def dataset(data_dir):
    return load_dataset(data_dir)


def test_samples_are_images_with_targets_and_unique_ids(dataset):
    image, target = dataset[3]
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert image.shape[0] == len(MEAN)
    if dataset.targets is None:
        assert target.shape == image.shape[1:]
        assert int(target.max()) < len(dataset.classes)
    else:
        assert np.array_equal(target, dataset.targets[3])
        assert len(dataset.targets) == len(dataset)
    assert len(set(dataset.ids)) == len(dataset.ids) == len(dataset)


def test_get_batch_equals_single_samples(dataset):
    if not hasattr(dataset, "get_batch"):
        pytest.skip("this data set has no get_batch")
    indices = np.array([5, 0, 5, 100, len(dataset) - 1])
    images, targets = dataset.get_batch(indices)
    for position, index in enumerate(indices.tolist()):
        assert torch.equal(images[position], dataset[index][0])
        assert np.array_equal(targets[position], dataset[index][1])


def test_the_fingerprint_differs_for_other_data(data_dir, tmp_path):
    first = load_dataset(data_dir)
    before = first.fingerprint()
    assert load_dataset(data_dir).fingerprint() == before
    assert change_one_sample(first).fingerprint() != before


def test_an_official_test_split_is_held_out_and_has_targets(dataset, tmp_path):
    splits = SplitFile(tmp_path / "x.csv", dataset, make_folds)
    official_test = dataset_info(dataset).official_test
    if official_test is None:
        assert 0.1 < (splits.folds == TEST).mean() < 0.3
        return
    assert ((splits.folds == TEST) == np.asarray(official_test)).all()
    assert 0 <= int(dataset[int(splits.select(0).test[-1])][1]) < len(dataset.classes)


def test_model_inputs_are_finite_and_have_one_size(dataset, cpu):
    shapes = set()
    for transform in (train_transform(), valid_transform()):
        for images, _ in EvalLoader(dataset, range(12), transform, cpu, batch_size=4):
            shapes.add(tuple(images.shape))
            assert normalize(images).isfinite().all()
            assert normalize(images).abs().max() < 10
    assert len(shapes) == 1


def test_normalize_uses_the_constants_and_keeps_its_input(dataset):
    images = torch.randint(256, (4, len(MEAN), 5, 7), dtype=torch.uint8)
    before = images.clone()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(normalize(images).double(), (images.double() / 255 - mean) / std, rtol=1e-6, atol=1e-6)
    assert torch.equal(normalize(images.float()), normalize(images))
    assert torch.equal(normalize(images.to(memory_format=torch.channels_last)), normalize(images))
    assert torch.equal(images, before)


@CLASSES_ONLY
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.2, "cutmix": 1.0}])
def test_two_epochs_score_far_above_chance(monkeypatch, dataset, data_dir, tmp_path, mixing):
    monkeypatch.setattr(train, "build_model", tiny_network)
    config = Config(
        stages=(Stage("stage0", 2, 3e-2),),
        batch_size=8,
        data_dir=data_dir,
        split_file=tmp_path / "splits.csv",
        logdir=tmp_path / "run",
        tracker=("none",),
        device="cpu",
        num_workers=0,
    )
    [score] = run_ranks(1, lambda: train.main(dataclasses.replace(config, **mixing)), join=False)
    assert score > 3 / len(dataset.classes)


@OFFICIAL
def test_test_samples_have_the_targets_of_their_file(dataset):
    for index in np.flatnonzero(dataset.official_test).tolist():
        number = int(dataset.ids[index].removeprefix("test_"))
        assert (int(dataset[index][1]), int(dataset.targets[index])) == (number % 10, UNKNOWN)


@OFFICIAL
def test_training_does_not_open_test_files(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "build_model", tiny_network)
    data_dir = make_data(tmp_path / "data")
    for name in TEST_FILES:
        (data_dir / name).write_bytes(b"invalid")
    flags = ["--data-dir", str(data_dir), "--split-file", str(tmp_path / "x.csv"), "--logdir", str(tmp_path / "run")]
    flags += ["--stages.0.epochs", "1", "--stages.1.epochs", "1", "--device", "cpu", "--tracker", *default_trackers()]
    end = run_train(train.main, Config, *flags)
    assert end.code == 0, end.err
    dataset = load_dataset(data_dir)
    with pytest.raises(UserError, match=r"--data-dir .* has no valid "):
        dataset[len(dataset) - 1]


@OFFICIAL
def test_no_directory_is_left_if_the_data_cannot_be_downloaded(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    (tmp_path / "data").mkdir()
    for directory in (tmp_path / "data", tmp_path / "new/data"):
        with pytest.raises(UserError) as error:
            load_dataset(directory)
        assert re.fullmatch(
            r"--data-dir .* cannot be downloaded \(.+\); put the directory .* there\.", str(error.value)
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]


@pytest.mark.slow
def test_the_model_of_the_project_trains_on_its_data(data_dir, tmp_path):
    flags = ["--data-dir", str(data_dir), "--split-file", str(tmp_path / "x.csv"), "--logdir", str(tmp_path / "run")]
    flags += ["--stages.0.epochs", "2", "--stages.1.epochs", "1", "--batch-size", "8", "--limit-batches", "4"]
    end = run_train(train.main, Config, *flags, "--device", "cpu", "--tracker", "none")
    assert end.code == 0, end.err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["train"]["loss"]) for line in lines)

"""Tests of averaged weights, estimated batch norm statistics, and the choice of checkpoints."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CHANNELS, batchnorm_model, plain_model
from torch import nn

from batteries.checkpoint.averaging import (
    average_checkpoints,
    estimate_batchnorm,
    greedy_soup,
    round_mean,
    select_checkpoints,
    start_mean,
    update_mean,
)
from batteries.checkpoint.io import make_checkpoint, save_checkpoint
from batteries.checkpoint.manager import CheckpointManager
from batteries.core.errors import UserError
from tools.average import Variant, choose_variant, name_files


def save(path: Path, model: nn.Module) -> Path:
    save_checkpoint(path, make_checkpoint("stage0", 1, model, torch.optim.AdamW(model.parameters())))
    return path


def random_weights(seed: int, model: nn.Module | None = None) -> nn.Module:
    """Return a model whose weights, statistics and counters depend on the seed."""
    model = model or batchnorm_model()
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) * 9)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [2, 3, 7])
def test_average_of_copies_is_bit_identical_to_the_checkpoint(tmp_path, dtype, copies):
    path = save(tmp_path / "a.pth", random_weights(1, batchnorm_model(dtype)))
    expected = torch.load(path, weights_only=True)["model_state_dict"]
    average = average_checkpoints([path] * copies)["model_state_dict"]
    assert list(average) == list(expected)
    for name, value in expected.items():
        assert average[name].dtype == value.dtype
        assert torch.equal(average[name], value), name


def test_weights_are_averaged_and_counters_are_those_of_the_first_file(tmp_path):
    paths = [save(tmp_path / f"{seed}.pth", random_weights(seed)) for seed in (1, 2, 3)]
    states = [torch.load(path, weights_only=True)["model_state_dict"] for path in paths]
    checkpoint = average_checkpoints(paths)
    assert (checkpoint["optimizer_state_dict"], checkpoint["stage"], checkpoint["epoch"]) == (None, "stage0", 1)
    counters = 0
    for name, value in checkpoint["model_state_dict"].items():
        if value.is_floating_point():
            mean = np.mean([state[name].double().numpy() for state in states], axis=0)
            assert value.numpy() == pytest.approx(mean, rel=2**-23)
        else:
            counters += 1
            assert torch.equal(value, states[0][name])
    assert counters == 2


def test_ema_weights_are_averaged_if_checkpoints_have_them(tmp_path):
    for seed in (1, 2):
        checkpoint = make_checkpoint("stage0", 1, random_weights(seed)) | {
            "ema_state_dict": random_weights(seed + 5).state_dict()
        }
        save_checkpoint(tmp_path / f"{seed}.pth", checkpoint)
    average = average_checkpoints([tmp_path / "1.pth", tmp_path / "2.pth"])
    first, second = (random_weights(seed).state_dict()["1.weight"].double() for seed in (6, 7))
    assert torch.equal(average["model_state_dict"]["1.weight"], ((first + second) / 2).float())
    assert average["ema_state_dict"] is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9))
def test_running_mean_equals_the_mean_of_numpy(numbers):
    mean = start_mean({"x": torch.tensor([numbers[0]])})
    for count, number in enumerate(numbers[1:], start=2):
        update_mean(mean, {"x": torch.tensor([number])}, count)
    expected = np.mean(np.array(numbers, dtype=np.float64))
    assert mean["x"].item() == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert round_mean(mean, {"x": torch.zeros(1)})["x"].dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), ": unexpected weights 2.weight, 2.bias."),
        (
            nn.Sequential(nn.ReLU(), nn.Linear(2, 3)),
            ": missing weights 0.weight, 0.bias; unexpected weights 1.weight, 1.bias.",
        ),
        (nn.Sequential(nn.Linear(4, 3)), ": different shape of weight 0.weight."),
        (nn.Sequential(nn.Linear(2, 3)).double(), ": different dtype of weights 0.weight, 0.bias."),
    ],
)
def test_checkpoints_of_different_models_are_rejected(tmp_path, other, difference):
    first = save(tmp_path / "a.pth", nn.Sequential(nn.Linear(2, 3)))
    second = save(tmp_path / "b.pth", other)
    with pytest.raises(UserError) as error:
        average_checkpoints([first, second])
    assert str(error.value) == f"{second} is not a checkpoint of the same model as {first}{difference}"


def test_estimated_batchnorm_statistics_are_means_over_batches():
    model = random_weights(1)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(count, CHANNELS, 8, 8, generator=generator) for count in (8, 8, 4)]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    estimate_batchnorm(model, batches)
    means, variances = [], []
    for batch in batches:
        features = model[1](model[0](batch)).detach().numpy()  # the input of the first batch norm
        means.append(features.mean((0, 2, 3)))
        variances.append(features.transpose(1, 0, 2, 3).reshape(4, -1).var(1, ddof=1))
    batchnorm = model[2]
    assert isinstance(batchnorm, nn.BatchNorm2d)
    assert batchnorm.running_mean.numpy() == pytest.approx(np.mean(means, 0), rel=1e-4, abs=1e-5)  # type: ignore[union-attr]
    assert batchnorm.running_var.numpy() == pytest.approx(np.mean(variances, 0), rel=1e-4)  # type: ignore[union-attr]
    assert batchnorm.momentum == 0.1
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters())


def test_no_batch_is_read_for_a_model_without_batchnorm():
    estimate_batchnorm(plain_model(), (pytest.fail("a batch was read") for _ in range(1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.randoms(use_true_random=False), st.booleans())
def test_greedy_soup_follows_the_algorithm_of_the_paper(count, random, minimize):
    files = [Path(f"{index}.pth") for index in range(count)]
    subsets = [subset for size in range(1, count + 1) for subset in itertools.combinations(files, size)]
    scores = {subset: random.choice([0.1, 0.2, 0.3, 0.4]) for subset in subsets}
    soup = (files[0],)
    for candidate in files[1:]:
        joined = (*soup, candidate)
        if (scores[joined] < scores[soup]) if minimize else (scores[joined] > scores[soup]):
            soup = joined
    chosen, score = greedy_soup(files, lambda paths: scores[tuple(paths)], minimize=minimize)
    assert (tuple(chosen), score) == (soup, scores[soup])


def test_single_checkpoint_is_chosen_on_a_tie_and_over_nan():
    single = Variant("single", {}, 0.5)
    mean = Variant("mean", {}, 0.5)
    undefined = Variant("undefined", {}, float("nan"))
    better = Variant("greedy", {}, 0.6)
    assert choose_variant([single, mean, undefined], minimize=False) == single
    assert choose_variant([single, mean, undefined, better], minimize=False) == better
    assert choose_variant([single, mean, undefined, better], minimize=True) == single


def test_equal_file_names_are_replaced_by_paths_within_the_run(tmp_path):
    run = tmp_path / "run"
    elsewhere = tmp_path / "other/one/best.pth"
    files = [run / "one/best.pth", run / "two/best.pth", run / "two/epoch_3.pth", elsewhere]
    names = ["one/best.pth", "two/best.pth", "epoch_3.pth", str(elsewhere)]
    assert name_files(files, run) == dict(zip(files, names, strict=True))


def save_stage(directory: Path, scores: list[float]) -> CheckpointManager:
    """Save one checkpoint per score, and keep all of them."""
    manager = CheckpointManager(directory, save_n_best=len(scores))
    for epoch, score in enumerate(scores, start=1):
        manager.process(score, epoch, make_checkpoint("stage0", epoch, plain_model(), step=epoch))
    return manager


@pytest.mark.parametrize(
    ("selection", "minimize", "epochs"),
    [
        (["best:2"], False, [2, 3]),
        (["best:9"], False, [2, 3, 1]),  # NaN is never among the best
        (["best:2"], True, [1, 3]),
        (["last:2"], False, [4, 3]),
        (["best:1", "last:2"], False, [2, 4, 3]),
        (["best:2", "{}/epoch_3.pth", "{}/epoch_1.pth"], False, [2, 3, 1]),
    ],
)
def test_checkpoints_are_selected_by_score_age_and_path(tmp_path, selection, minimize, epochs):
    save_stage(tmp_path, [0.1, 0.9, 0.5, float("nan")])
    selected = select_checkpoints(tmp_path, [item.format(tmp_path) for item in selection], minimize=minimize)
    assert [path.name for path in selected] == [f"epoch_{epoch}.pth" for epoch in epochs]


def test_average_is_kept_when_a_stage_is_resumed_or_restarted(tmp_path):
    manager = save_stage(tmp_path, [0.1, 0.9])
    checkpoint = {**make_checkpoint("stage0", 2, plain_model(), step=2), "best": asdict(manager.best)}
    save(tmp_path / "swa.pth", plain_model())
    (tmp_path / "swa.json").write_text(json.dumps({"sha256": "x"}))
    (tmp_path / "epoch_9.pth").touch()
    (tmp_path / "epoch_1.pth.corrupt").touch()
    manager.restore(checkpoint)
    assert not (tmp_path / "epoch_9.pth").exists()
    manager.discard()
    assert {path.name for path in tmp_path.iterdir()} == {"swa.pth", "swa.json", "epoch_1.pth.corrupt"}

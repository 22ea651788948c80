"""An average is the mean of weights, with statistics of batch norm of its own, and is kept only where it is better."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CHANNELS, batchnorm_model, plain_model
from torch import nn

from batteries.checkpoint.averaging import (
    add_to_mean,
    average_checkpoints,
    choose_files,
    greedy,
    narrow,
    renew_batchnorm,
    widen,
)
from batteries.checkpoint.io import make_checkpoint, save_checkpoint
from batteries.checkpoint.manager import CheckpointManager
from batteries.core.errors import UserError
from tools.average import Variant, choose, name_files


def save(path: Path, model: nn.Module) -> Path:
    save_checkpoint(path, make_checkpoint("stage0", 1, model, torch.optim.AdamW(model.parameters())))
    return path


def shaken(seed: int, model: nn.Module | None = None) -> nn.Module:
    """A model with other weights, statistics and counters for each seed."""
    model = model or batchnorm_model()
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) * 9)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [2, 3, 7])
def test_copies_of_one_checkpoint_give_it_back_bit_for_bit(tmp_path, dtype, copies):
    path = save(tmp_path / "a.pth", shaken(1, batchnorm_model(dtype)))
    wanted = torch.load(path, weights_only=True)["model_state_dict"]
    found = average_checkpoints([path] * copies)["model_state_dict"]
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_weights_are_the_mean_rounded_once_and_counters_are_the_firsts(tmp_path):
    paths = [save(tmp_path / f"{seed}.pth", shaken(seed)) for seed in (1, 2, 3)]
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


def test_where_training_kept_a_moving_average_that_is_what_is_averaged(tmp_path):
    for seed in (1, 2):
        checkpoint = make_checkpoint("stage0", 1, shaken(seed)) | {"ema_state_dict": shaken(seed + 5).state_dict()}
        save_checkpoint(tmp_path / f"{seed}.pth", checkpoint)
    found = average_checkpoints([tmp_path / "1.pth", tmp_path / "2.pth"])
    first, second = (shaken(seed).state_dict()["1.weight"].double() for seed in (6, 7))
    assert torch.equal(found["model_state_dict"]["1.weight"], ((first + second) / 2).float())
    assert found["ema_state_dict"] is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9))
def test_the_running_mean_is_the_mean(numbers):
    mean = widen({"x": torch.tensor([numbers[0]])})
    for count, number in enumerate(numbers[1:], start=2):
        add_to_mean(mean, {"x": torch.tensor([number])}, count)
    wanted = np.mean(np.array(numbers, dtype=np.float64))
    assert mean["x"].item() == pytest.approx(wanted, rel=1e-9, abs=1e-6)
    assert narrow(mean, {"x": torch.zeros(1)})["x"].dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), "weights 2.weight, 2.bias only there."),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), "weights 0.weight, 0.bias missing; weights 1.weight, 1.bias only"),
        (nn.Sequential(nn.Linear(4, 3)), "weight 0.weight of another shape."),
        (nn.Sequential(nn.Linear(2, 3)).double(), "weights 0.weight, 0.bias of another type."),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_names(tmp_path, other, sentence):
    first, second = save(tmp_path / "a.pth", nn.Sequential(nn.Linear(2, 3))), save(tmp_path / "b.pth", other)
    with pytest.raises(UserError) as error:
        average_checkpoints([first, second])
    assert str(error.value).startswith(f"{second} is not of the same model as {first}: ")
    assert sentence in str(error.value)


def test_renewed_statistics_are_the_mean_over_batches_of_what_batch_norm_sees():
    model = shaken(1)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(count, CHANNELS, 8, 8, generator=generator) for count in (8, 8, 4)]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    renew_batchnorm(model, batches)
    means, variances = [], []
    for batch in batches:
        seen = model[1](model[0](batch)).detach().numpy()  # what the first batch norm is given
        means.append(seen.mean((0, 2, 3)))
        variances.append(seen.transpose(1, 0, 2, 3).reshape(4, -1).var(1, ddof=1))
    found = model[2]
    assert isinstance(found, nn.BatchNorm2d)
    assert found.running_mean.numpy() == pytest.approx(np.mean(means, 0), rel=1e-4, abs=1e-5)  # type: ignore[union-attr]
    assert found.running_var.numpy() == pytest.approx(np.mean(variances, 0), rel=1e-4)  # type: ignore[union-attr]
    assert found.momentum == 0.1
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters())


def test_a_model_without_batch_norm_reads_no_batch():
    renew_batchnorm(plain_model(), (pytest.fail("a batch was read") for _ in range(1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.randoms(use_true_random=False), st.booleans())
def test_the_greedy_choice_is_that_of_the_papers_algorithm(count, random, minimize):
    files = [Path(f"{index}.pth") for index in range(count)]
    subsets = [subset for size in range(1, count + 1) for subset in itertools.combinations(files, size)]
    scores = {subset: random.choice([0.1, 0.2, 0.3, 0.4]) for subset in subsets}
    soup = (files[0],)
    for candidate in files[1:]:
        joined = (*soup, candidate)
        if (scores[joined] < scores[soup]) if minimize else (scores[joined] > scores[soup]):
            soup = joined
    chosen, score = greedy(files, lambda paths: scores[tuple(paths)], minimize=minimize)
    assert (tuple(chosen), score) == (soup, scores[soup])


def test_a_tie_or_no_number_keeps_the_single_file():
    alone, mean, nothing = (Variant(name, {}, score) for name, score in (("a", 0.5), ("m", 0.5), ("n", float("nan"))))
    better = Variant("greedy", {}, 0.6)
    assert choose([alone, mean, nothing], minimize=False) == alone
    assert choose([alone, mean, nothing, better], minimize=False) == better
    assert choose([alone, mean, nothing, better], minimize=True) == alone


def test_files_that_are_called_the_same_are_told_apart_by_their_path_in_the_run(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "other/one/best.pth"
    files = [run / "one/best.pth", run / "two/best.pth", run / "two/epoch_3.pth", elsewhere]
    names = ["one/best.pth", "two/best.pth", "epoch_3.pth", str(elsewhere)]
    assert name_files(files, run) == dict(zip(files, names, strict=True))


def kept_by(folder: Path, scores: list[float]) -> CheckpointManager:
    manager = CheckpointManager(folder, save_n_best=len(scores))
    for epoch, score in enumerate(scores, start=1):
        manager.process(score, epoch, make_checkpoint("stage0", epoch, plain_model(), step=epoch))
    return manager


@pytest.mark.parametrize(
    ("wanted", "minimize", "epochs"),
    [
        (["best:2"], False, [2, 3]),
        (["best:9"], False, [2, 3, 1]),  # NaN has no place among the best
        (["best:2"], True, [1, 3]),
        (["last:2"], False, [4, 3]),
        (["best:1", "last:2"], False, [2, 4, 3]),
        (["best:2", "{}/epoch_3.pth", "{}/epoch_1.pth"], False, [2, 3, 1]),
    ],
)
def test_checkpoints_are_chosen_by_score_by_age_and_by_path_each_once(tmp_path, wanted, minimize, epochs):
    kept_by(tmp_path, [0.1, 0.9, 0.5, float("nan")])
    found = choose_files(tmp_path, [word.format(tmp_path) for word in wanted], minimize=minimize)
    assert [path.name for path in found] == [f"epoch_{epoch}.pth" for epoch in epochs]


def test_a_stage_that_goes_on_or_begins_again_leaves_the_average_where_it_is(tmp_path):
    manager = kept_by(tmp_path, [0.1, 0.9])
    checkpoint = {**make_checkpoint("stage0", 2, plain_model(), step=2), "best": manager.best()}
    save(tmp_path / "swa.pth", plain_model())
    (tmp_path / "swa.json").write_text(json.dumps({"sha256": "x"}))
    (tmp_path / "epoch_9.pth").touch()
    (tmp_path / "epoch_1.pth.corrupt").touch()
    manager.restore(checkpoint)
    assert not (tmp_path / "epoch_9.pth").exists()
    manager.discard()
    assert {path.name for path in tmp_path.iterdir()} == {"swa.pth", "swa.json", "epoch_1.pth.corrupt"}

"""Checkpoints are whole, best is best, and a file that is not what it should be is named."""

import functools
import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch
from models import CHANNELS, batchnorm_model
from processes import run_ranks

from batteries.checkpoint.io import load_checkpoint, make_checkpoint, save_checkpoint
from batteries.checkpoint.manager import CheckpointManager
from batteries.core.errors import UserError
from batteries.distributed.unwrap import unwrap_model
from batteries.training.wrap import prepare_model, wrap_model


def some_checkpoint(epoch: int = 1) -> dict:
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, float(epoch))
    return make_checkpoint("stage0", epoch, model, step=epoch * 10)


def process(folder, scores, **options) -> CheckpointManager:
    manager = CheckpointManager(logdir=folder, metric="accuracy", **options)
    for epoch, score in enumerate(scores, start=1):
        manager.process(score=score, epoch=epoch, checkpoint=some_checkpoint(epoch))
    return manager


def epoch_in(path) -> int:
    return torch.load(path, weights_only=True)["epoch"]


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize(
    ("scores", "minimize", "n_best", "best", "kept"),
    [
        ([0.1, 0.3, 0.2], False, 1, 2, {2, 3}),
        ([0.1, 0.3, 0.2], False, 3, 2, {1, 2, 3}),
        ([0.1, 0.3, 0.2, 0.25], False, 2, 2, {2, 3, 4}),
        ([0.5, 0.3, 0.2, 0.25], False, 1, 1, {1, 3, 4}),
        ([0.1, 0.3, 0.2], True, 1, 1, {1, 2, 3}),
        ([0.3, 0.3, 0.3], False, 1, 1, {1, 2, 3}),  # a tie keeps the earlier
        ([0.3, 0.3, 0.3, 0.1], False, 2, 1, {1, 2, 3, 4}),
        ([NAN, 0.1, NAN], False, 1, 2, {2, 3}),
        ([0.2, NAN, INFINITE, 0.1], False, 3, 1, {1, 3, 4}),
        ([0.2, -INFINITE, NAN], True, 3, 1, {1, 2, 3}),
        ([np.float32(0.1), torch.tensor(0.5), np.float64(0.2)], False, 1, 2, {2, 3}),
    ],
)
def test_the_n_best_and_the_two_newest_are_kept_and_nothing_else(tmp_path, scores, minimize, n_best, best, kept):
    manager = process(tmp_path, scores, metric_minimization=minimize, save_n_best=n_best)
    assert manager.best_epoch == best
    assert epoch_in(tmp_path / "best.pth") == epoch_in(manager.best_path()) == best
    assert epoch_in(tmp_path / "last.pth") == len(scores)
    expected = {f"epoch_{epoch}.pth" for epoch in kept} | {"best.pth", "last.pth", "checkpoints.json"}
    assert files(tmp_path) == expected


def test_where_no_score_is_finite_there_is_no_best_and_the_last_stands_in(tmp_path):
    manager = process(tmp_path, [NAN, NAN])
    assert manager.best_score is None
    assert manager.best_path() == tmp_path / "last.pth"
    assert not (tmp_path / "best.pth").exists()


def test_the_ledger_lists_each_file_with_its_bytes_and_sha256(tmp_path):
    process(tmp_path, [0.1, NAN, 0.2])
    ledger = json.loads((tmp_path / "checkpoints.json").read_text())
    assert [row["epoch"] for row in ledger["checkpoints"]] == [1, 2, 3]
    for row in ledger["checkpoints"]:
        data = (tmp_path / row["file"]).read_bytes()
        assert row["bytes"] == len(data)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["step"] == row["epoch"] * 10


def test_best_and_last_cost_no_second_write(tmp_path):
    process(tmp_path, [0.1])
    inodes = {(tmp_path / name).stat().st_ino for name in ("epoch_1.pth", "best.pth", "last.pth")}
    assert len(inodes) == 1


def test_where_the_file_system_has_no_links_best_and_last_are_copies(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    process(tmp_path, [0.2, 0.1])
    assert (epoch_in(tmp_path / "best.pth"), epoch_in(tmp_path / "last.pth")) == (1, 2)


def test_a_save_that_fails_halfway_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    save_checkpoint(path, some_checkpoint(1))

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, some_checkpoint(2))
    assert epoch_in(path) == 1
    assert files(tmp_path) == {"x.pth"}


def test_model_optimizer_and_scheduler_come_back_bit_for_bit(tmp_path):
    def build():
        model = batchnorm_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)

    model, optimizer, scheduler = build()
    for _ in range(3):
        model(torch.randn(8, CHANNELS, 8, 8)).sum().backward()
        optimizer.step()
        scheduler.step()
    saved = make_checkpoint("stage0", 1, model, optimizer, scheduler, metrics={"valid": {"accuracy": 0.5}})
    save_checkpoint(tmp_path / "x.pth", saved)
    copies = build()
    loaded = load_checkpoint(tmp_path / "x.pth", *copies)
    assert loaded["metrics"] == {"valid": {"accuracy": 0.5}}
    for ours, theirs in zip((model, optimizer, scheduler), copies, strict=True):
        save_checkpoint(tmp_path / "ours.pth", {"state": ours.state_dict()})
        save_checkpoint(tmp_path / "theirs.pth", {"state": theirs.state_dict()})
        assert (tmp_path / "ours.pth").read_bytes() == (tmp_path / "theirs.pth").read_bytes()


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    process(tmp_path, [0.1])
    path = tmp_path / "epoch_1.pth"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "truncate":
        del data[-100:]
    else:
        data[:512] = bytes(512)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"epoch_1\.pth is not the file that checkpoints\.json beside it lists"):
        load_checkpoint(path, torch.nn.Linear(2, 2))


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"model_state_dict": Attack()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth cannot be read as a checkpoint of tensors and plain values"):
        load_checkpoint(tmp_path / "x.pth", torch.nn.Linear(2, 2))
    assert not (tmp_path / "attacked").exists()


def test_another_architecture_is_refused_with_its_keys_and_nothing_is_loaded(tmp_path):
    save_checkpoint(tmp_path / "x.pth", make_checkpoint("stage0", 1, torch.nn.Linear(2, 3)))
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    before = model[0].weight.clone()
    with pytest.raises(UserError, match=r"missing: 0\.weight, 0\.bias; unexpected: weight, bias"):
        load_checkpoint(tmp_path / "x.pth", model)
    with pytest.raises(UserError, match=r"of another shape: weight \(3, 2\) instead of \(4, 2\)"):
        load_checkpoint(tmp_path / "x.pth", torch.nn.Linear(2, 4))
    assert torch.equal(model[0].weight, before)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth is not there"):
        load_checkpoint(tmp_path / "nowhere.pth", torch.nn.Linear(2, 2))


def shared_model(way: str) -> torch.nn.Module:
    """One model as each launch script has it."""
    device = torch.device("cpu")
    model = prepare_model(batchnorm_model(), device)
    return wrap_model(model, device, data_parallel=way == "dp", compiled=way == "compiled")


def test_checkpoints_of_device_dp_ddp_and_compiled_models_are_the_same_and_load_into_one_another(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no compiler needed

    def save(way: str) -> None:
        model = shared_model(way)
        for number, buffer in enumerate(unwrap_model(model).buffers()):
            buffer.fill_(number)
        save_checkpoint(tmp_path / f"{way}.pth", make_checkpoint("stage0", 1, model))

    def load(way: str) -> list[bool]:
        found = []
        for other in ("device", "dp", "ddp", "compiled"):
            model = shared_model(way)
            saved = load_checkpoint(tmp_path / f"{other}.pth", model)["model_state_dict"]
            state = unwrap_model(model).state_dict()
            found.append(saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in saved))
        return found

    for way in ("device", "dp", "compiled"):
        save(way)
    run_ranks(1, lambda: save("ddp"))
    device, *others = ((tmp_path / f"{name}.pth").read_bytes() for name in ("device", "dp", "ddp", "compiled"))
    assert others == [device] * 3
    assert [load(way) for way in ("device", "dp", "compiled")] == [[True] * 4] * 3
    assert run_ranks(1, lambda: load("ddp")) == [[True] * 4]


def test_a_file_that_rank_0_cannot_read_fails_on_all_ranks_together(tmp_path):
    def fail() -> str:
        with pytest.raises(UserError) as error:
            load_checkpoint(tmp_path / "nowhere.pth", torch.nn.Linear(2, 2))
        return str(error.value)

    messages = run_ranks(3, fail)
    assert len(set(messages)) == 1
    assert "nowhere.pth is not there" in messages[0]

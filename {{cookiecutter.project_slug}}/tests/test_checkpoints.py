"""Tests of retention, the manifest, best and last, atomic writes, and the verification of loaded files."""

import errno
import functools
import hashlib
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from models import CHANNELS, batchnorm_model
from processes import run_ranks

from batteries.checkpoint.io import load_checkpoint, make_checkpoint, save_checkpoint
from batteries.checkpoint.manager import CheckpointManager
from batteries.core import files as core_files
from batteries.core.errors import UserError
from batteries.core.files import sync_directory
from batteries.distributed.unwrap import unwrap_model
from batteries.training.wrap import prepare_model, wrap_model


def make_example(epoch: int = 1) -> dict:
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, float(epoch))
    return make_checkpoint("stage0", epoch, model, step=epoch * 10)


def process(directory, scores, **options) -> CheckpointManager:
    """Process one epoch per score."""
    manager = CheckpointManager(logdir=directory, metric="accuracy", **options)
    for epoch, score in enumerate(scores, start=1):
        manager.process(score=score, epoch=epoch, checkpoint=make_example(epoch))
    return manager


def epoch_in(path) -> int:
    return torch.load(path, weights_only=True)["epoch"]


def files(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


NAN = math.nan
INF = math.inf


@pytest.mark.parametrize(
    ("scores", "minimize", "n_best", "best", "kept"),
    [
        ([0.1, 0.3, 0.2], False, 1, 2, {2, 3}),
        ([0.1, 0.3, 0.2], False, 3, 2, {1, 2, 3}),
        ([0.1, 0.3, 0.2, 0.25], False, 2, 2, {2, 3, 4}),
        ([0.5, 0.3, 0.2, 0.25], False, 1, 1, {1, 3, 4}),
        ([0.1, 0.3, 0.2], True, 1, 1, {1, 2, 3}),
        ([0.3, 0.3, 0.3], False, 1, 1, {1, 2, 3}),  # on a tie the earlier epoch stays best
        ([0.3, 0.3, 0.3, 0.1], False, 2, 1, {1, 2, 3, 4}),
        ([NAN, 0.1, NAN], False, 1, 2, {2, 3}),
        ([0.2, NAN, INF, 0.1], False, 3, 1, {1, 3, 4}),
        ([0.2, -INF, NAN], True, 3, 1, {1, 2, 3}),
        ([np.float32(0.1), torch.tensor(0.5), np.float64(0.2)], False, 1, 2, {2, 3}),
    ],
)
def test_only_the_n_best_and_the_two_newest_checkpoints_are_kept(tmp_path, scores, minimize, n_best, best, kept):
    manager = process(tmp_path, scores, metric_minimization=minimize, save_n_best=n_best)
    assert manager.best_epoch == best
    assert epoch_in(tmp_path / "best.pth") == epoch_in(manager.best_path()) == best
    assert epoch_in(tmp_path / "last.pth") == len(scores)
    expected = {f"epoch_{epoch}.pth" for epoch in kept} | {"best.pth", "last.pth", "checkpoints.json"}
    assert files(tmp_path) == expected


def test_last_replaces_best_if_no_score_is_finite(tmp_path):
    manager = process(tmp_path, [NAN, NAN])
    assert manager.best_score is None
    assert manager.best_path() == tmp_path / "last.pth"
    assert not (tmp_path / "best.pth").exists()


def test_manifest_lists_size_and_sha256_of_each_file(tmp_path):
    process(tmp_path, [0.1, NAN, 0.2])
    manifest = json.loads((tmp_path / "checkpoints.json").read_text())
    assert [entry["epoch"] for entry in manifest["checkpoints"]] == [1, 2, 3]
    for entry in manifest["checkpoints"]:
        data = (tmp_path / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["step"] == entry["epoch"] * 10


def test_best_and_last_are_hard_links(tmp_path):
    process(tmp_path, [0.1])
    inodes = {(tmp_path / name).stat().st_ino for name in ("epoch_1.pth", "best.pth", "last.pth")}
    assert len(inodes) == 1


def test_best_and_last_are_copies_without_hard_links(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", fail)
    process(tmp_path, [0.2, 0.1])
    assert (epoch_in(tmp_path / "best.pth"), epoch_in(tmp_path / "last.pth")) == (1, 2)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_directory_fsync_is_reported_once(tmp_path, monkeypatch, caplog, code):
    fsync = os.fsync

    def fail_for_directories(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(core_files, "_reported_missing", set())
    monkeypatch.setattr(os, "fsync", fail_for_directories)
    process(tmp_path, [0.2, 0.1])
    assert (epoch_in(tmp_path / "best.pth"), epoch_in(tmp_path / "last.pth")) == (1, 2)
    assert caplog.text.count(f"has no fsync ({os.strerror(code)})") == 1


def test_disk_error_in_a_directory_fsync_is_raised(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory(tmp_path)


def test_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    save_checkpoint(path, make_example(1))

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, make_example(2))
    assert epoch_in(path) == 1
    assert files(tmp_path) == {"x.pth"}


def test_model_optimizer_and_scheduler_are_restored_bit_for_bit(tmp_path):
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
    for original, restored in zip((model, optimizer, scheduler), copies, strict=True):
        save_checkpoint(tmp_path / "original.pth", {"state": original.state_dict()})
        save_checkpoint(tmp_path / "restored.pth", {"state": restored.state_dict()})
        assert (tmp_path / "original.pth").read_bytes() == (tmp_path / "restored.pth").read_bytes()


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero"])
def test_damaged_checkpoint_is_rejected(tmp_path, damage):
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
    with pytest.raises(UserError, match=r"epoch_1\.pth does not match the sha256 in checkpoints\.json next to it"):
        load_checkpoint(path, torch.nn.Linear(2, 2))


def test_pickled_code_is_rejected_and_not_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"model_state_dict": Attack()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth cannot be read as a checkpoint of tensors and plain values"):
        load_checkpoint(tmp_path / "x.pth", torch.nn.Linear(2, 2))
    assert not (tmp_path / "attacked").exists()


def test_scalars_of_numpy_become_plain_numbers(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=np.float64(0.25), momentum=0.5)
    optimizer.param_groups[0] |= {"scale": np.float32(0.5), "count": np.int64(3), "flag": np.bool_(True)}
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [np.int64(2), 3])
    model_args = {
        "sizes": [np.int32(8), (np.uint8(1), np.array(2.0))],
        np.str_("name"): np.str_("x"),
        "z": np.longdouble(1),
    }
    checkpoint = make_checkpoint("stage0", 1, torch.nn.Linear(2, 2), optimizer, scheduler, model_args=model_args)
    save_checkpoint(tmp_path / "x.pth", checkpoint)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    group = loaded["optimizer_state_dict"]["param_groups"][0]
    values = [group[name] for name in ("lr", "scale", "count", "flag")]
    assert values == [0.25, 0.5, 3, True]
    assert [type(value) for value in values] == [float, float, int, bool]
    assert loaded["scheduler_state_dict"]["milestones"] == {2: 1, 3: 1}
    assert {type(key) for key in loaded["scheduler_state_dict"]["milestones"]} == {int}
    assert loaded["model_args"] == {"sizes": [8, (1, 2.0)], "name": "x", "z": 1.0}
    assert type(optimizer.param_groups[0]["lr"]) is np.float64  # only the checkpoint is converted
    save_checkpoint(tmp_path / "y.pth", {"model_state_dict": {}, "average": np.float64(0.5)})
    assert torch.load(tmp_path / "y.pth", weights_only=True)["average"] == 0.5


class ExtraState(torch.nn.Linear):
    """Keeps a date in its extra state."""

    def get_extra_state(self) -> dict:
        return {"when": np.datetime64("2025-01-01")}


def test_values_that_cannot_be_read_again_are_rejected_with_their_place():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    optimizer.param_groups[0]["lr"] = np.ones(2)
    model = torch.nn.Sequential(ExtraState(2, 2))
    for arguments, place in (
        ({"optimizer": optimizer}, "optimizer_state_dict.param_groups.0.lr is a numpy.ndarray, which"),
        ({"model_args": {"kind": {"path": torch.nn.ReLU}}}, "model_args.kind.path is a type, which"),
        ({"metrics": {"valid": [object()]}}, "metrics.valid.0 is a object, which"),
        ({"extra": {"frozen": {"x": (1, frozenset())}}}, "frozen.x.1 is a frozenset, which"),
        ({"model": model}, "model_state_dict.0._extra_state.when is a numpy.datetime64, which"),
    ):
        with pytest.raises(UserError) as error:
            make_checkpoint(**{"stage": "stage0", "epoch": 1, "model": torch.nn.Linear(2, 2), **arguments})
        assert str(error.value).startswith(f"{place} a checkpoint cannot hold")


def test_types_that_torch_is_configured_to_allow_are_kept(tmp_path):
    with torch.serialization.safe_globals([Version]):
        save_checkpoint(
            tmp_path / "x.pth", make_checkpoint("stage0", 1, torch.nn.Linear(2, 2), extra={"v": Version(3)})
        )
        assert torch.load(tmp_path / "x.pth", weights_only=True)["v"].number == 3


class Version:
    """A class that torch.load does not allow by default."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_expanded_buffers_can_be_loaded(tmp_path):
    def build() -> torch.nn.Module:
        model = torch.nn.Linear(2, 2)
        model.register_buffer("mask", torch.ones(1, 1).expand(3, 3))
        return model

    save_checkpoint(tmp_path / "x.pth", make_checkpoint("stage0", 1, build()))
    model = build()
    load_checkpoint(tmp_path / "x.pth", model)
    assert model.mask.tolist() == [[1.0] * 3] * 3
    assert model.mask.is_contiguous()


def test_lazy_modules_are_rejected_when_weights_are_loaded(tmp_path):
    save_checkpoint(tmp_path / "x.pth", make_checkpoint("stage0", 1, torch.nn.Linear(2, 2)))
    with pytest.raises(UserError, match="build_model returns lazy modules"):
        load_checkpoint(tmp_path / "x.pth", torch.nn.LazyLinear(2))


def test_different_architecture_is_rejected_before_loading(tmp_path):
    save_checkpoint(tmp_path / "x.pth", make_checkpoint("stage0", 1, torch.nn.Linear(2, 3)))
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    before = model[0].weight.clone()
    with pytest.raises(UserError, match=r"missing: 0\.weight, 0\.bias; unexpected: weight, bias"):
        load_checkpoint(tmp_path / "x.pth", model)
    with pytest.raises(UserError, match=r"different shape: weight \(3, 2\) instead of \(4, 2\)"):
        load_checkpoint(tmp_path / "x.pth", torch.nn.Linear(2, 4))
    assert torch.equal(model[0].weight, before)


def test_missing_checkpoint_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        load_checkpoint(tmp_path / "nowhere.pth", torch.nn.Linear(2, 2))


WRAPPERS = ("device", "dp", "ddp", "compiled")


def wrapped_model(wrapper: str) -> torch.nn.Module:
    """Build the model as a launch script does; `wrapper` is one of WRAPPERS, "ddp" in a process group."""
    device = torch.device("cpu")
    model = prepare_model(batchnorm_model(), device)
    return wrap_model(model, device, data_parallel=wrapper == "dp", compiled=wrapper == "compiled")


def test_wrapped_models_have_the_same_checkpoints_and_load_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # needs no compiler

    def save(wrapper: str) -> None:
        model = wrapped_model(wrapper)
        for number, buffer in enumerate(unwrap_model(model).buffers()):
            buffer.fill_(number)
        save_checkpoint(tmp_path / f"{wrapper}.pth", make_checkpoint("stage0", 1, model))

    def load(wrapper: str) -> list[bool]:
        are_equal = []
        for other in WRAPPERS:
            model = wrapped_model(wrapper)
            saved = load_checkpoint(tmp_path / f"{other}.pth", model)["model_state_dict"]
            state = unwrap_model(model).state_dict()
            are_equal.append(
                saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in saved)
            )
        return are_equal

    for wrapper in ("device", "dp", "compiled"):
        save(wrapper)
    run_ranks(1, lambda: save("ddp"))
    contents = [(tmp_path / f"{wrapper}.pth").read_bytes() for wrapper in WRAPPERS]
    assert contents == [contents[0]] * 4
    assert [load(wrapper) for wrapper in ("device", "dp", "compiled")] == [[True] * 4] * 3
    assert run_ranks(1, lambda: load("ddp")) == [[True] * 4]


def test_missing_checkpoint_is_rejected_on_all_ranks(tmp_path):
    def fail() -> str:
        with pytest.raises(UserError) as error:
            load_checkpoint(tmp_path / "nowhere.pth", torch.nn.Linear(2, 2))
        return str(error.value)

    messages = run_ranks(3, fail)
    assert len(set(messages)) == 1
    assert "nowhere.pth does not exist" in messages[0]


def test_a_checkpoint_is_deleted_only_after_the_manifest_no_longer_lists_it(tmp_path, monkeypatch):
    deleted = []
    unlink = Path.unlink

    def check(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("epoch_"):
            listed = [entry["file"] for entry in json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"]]
            assert path.name not in listed  # else a kill now would leave a manifest of missing files
            deleted.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", check)
    process(tmp_path, [0.5, 0.1, 0.2, 0.3, 0.4], save_n_best=1)
    assert deleted == ["epoch_2.pth", "epoch_3.pth"]


def test_restored_directory_has_no_files_of_later_steps_and_interrupted_writes(tmp_path):
    process(tmp_path, [0.1, 0.2, 0.3], save_n_best=3)
    checkpoint = torch.load(tmp_path / "epoch_2.pth", weights_only=True)
    for name in (".epoch_4.pth.tmp", "epoch_4.pth"):  # not in the manifest: written just before a kill
        (tmp_path / name).write_bytes(b"incomplete")
    (tmp_path / "notes.txt").touch()
    manager = CheckpointManager(logdir=tmp_path, metric="accuracy", save_n_best=3)
    manager.restore(checkpoint)
    kept = {"epoch_1.pth", "epoch_2.pth", "best.pth", "last.pth", "checkpoints.json", "notes.txt"}
    assert files(tmp_path) == kept
    assert epoch_in(tmp_path / "last.pth") == epoch_in(tmp_path / "best.pth") == 2

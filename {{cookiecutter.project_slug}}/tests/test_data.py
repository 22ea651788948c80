"""Loaders: deterministic batches, every sample exactly once, and errors in worker processes."""

import functools
import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import pytest
import torch
from image_data import RandomImages, RandomNoise
from marks import CLASSES_ONLY
from processes import SECONDS, run_ranks, run_train
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from batteries.core.errors import UserError, explain_dead_worker
from batteries.core.seeding import Stream, reseed, stream_seeds
from batteries.data.batch_plan import plan_epoch
from batteries.data.dataset import dataset_info, to_device
from batteries.data.loaders import EvalLoader, TrainLoader
from batteries.data.splits import Split, SplitFile, check_files
from batteries.data.workers import InProcessLoader, _WorkerInit
from experiment.splits import make_folds
from experiment.task import batch_transform

SIZE, BATCH_SIZE, SEED = 53, 16, 7


def augmented_loader(**options) -> TrainLoader:
    """Return a loader of augmented images, in steps of BATCH_SIZE and a short last one."""
    cpu = torch.device("cpu")
    fixed = {"seed": SEED, "batch_size": BATCH_SIZE, "drop_last": False}
    return TrainLoader(RandomImages(SIZE), np.arange(SIZE), RandomNoise(), cpu, **(fixed | options))


def epoch_bytes(num_workers: int, start_method: str | None, accumulation_steps: int, epoch: int) -> list[bytes]:
    """Return the bytes of each micro-batch of this rank."""
    loader = augmented_loader(accumulation_steps=accumulation_steps, num_workers=num_workers, start_method=start_method)
    return [batch.images.numpy().tobytes() + batch.targets.numpy().tobytes() for batch in loader.epoch(0, epoch)]


def step_hashes(num_workers: int, world_size: int, start_method: str | None, accumulation_steps: int) -> list[str]:
    """Return a hash for each optimizer step of two epochs: of its images and targets, in order."""

    def load() -> list[list[bytes]]:
        return [epoch_bytes(num_workers, start_method, accumulation_steps, epoch) for epoch in (1, 2)]

    ranks = run_ranks(world_size, load)
    pixels = RandomImages(1).images.numel()
    hashes = []
    for epoch in range(2):
        plan = plan_epoch(SIZE, BATCH_SIZE, accumulation_steps, 0, world_size, drop_last=False)
        images, targets = [], []
        for number, micro_batch in enumerate(plan):
            for rank in range(world_size):
                data = ranks[rank][epoch][number]
                count = len(data) // (pixels + 8)  # a target takes 8 bytes
                images.append(data[: count * pixels])
                targets.append(data[count * pixels :])
            if micro_batch.ends_step:
                hashes.append(hashlib.sha256(b"".join(images + targets)).hexdigest())
                images, targets = [], []
    return hashes


def oracle_hashes() -> list[str]:
    """Return the same from the specification: an order per epoch, and a random stream per position in it."""
    dataset = RandomImages(SIZE)
    augment = RandomNoise()
    hashes = []
    for epoch in (1, 2):
        key = SEED, 0, epoch
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*key, Stream.ORDER))))
        seeds = stream_seeds(SIZE, *key, Stream.SAMPLE)
        samples = []
        for position, index in enumerate(generator.permutation(SIZE).tolist()):
            reseed(int(seeds[position]))
            samples.append(augment(*dataset[index]))
        for start in range(0, SIZE, BATCH_SIZE):
            step = samples[start : start + BATCH_SIZE]
            data = [image.numpy().tobytes() for image, _ in step] + [target.numpy().tobytes() for _, target in step]
            hashes.append(hashlib.sha256(b"".join(data)).hexdigest())
    return hashes


def keep(image: torch.Tensor, target: int) -> tuple[torch.Tensor, int]:
    return image, target


def make_worker_loader(transform: object, start_method: str, **attributes: object) -> TrainLoader:
    dataset = RandomImages(16)
    vars(dataset).update(attributes)
    cpu = torch.device("cpu")
    return TrainLoader(
        dataset, range(16), transform, cpu, seed=0, batch_size=4, num_workers=1, start_method=start_method
    )


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda image, target: (image, target),
        v2.Compose([v2.Lambda(lambda image: image)]),
        functools.partial(lambda shift, image, target: (image + shift, target), 1),
    ],
    ids=["lambda", "in a transform", "in a partial"],
)
def test_transform_that_workers_cannot_get_is_rejected(transform, start_method):
    with pytest.raises(UserError) as error:
        make_worker_loader(transform, start_method)
    assert str(error.value).startswith("--num-workers 1: the transform cannot be sent to worker processes (")
    assert str(error.value).endswith("or give --num-workers 0.")
    assert "\n" not in str(error.value)


def test_data_set_that_workers_cannot_get_is_rejected():
    with open(os.devnull) as file, pytest.raises(UserError, match="the data set cannot be sent to worker processes"):
        make_worker_loader(keep, "spawn", file=file)


def test_data_that_workers_can_get_is_accepted():
    make_worker_loader(lambda image, target: (image, target), "fork")
    make_worker_loader(keep, "spawn", lock=get_context("spawn").Lock(), values=torch.zeros(3), array=np.zeros(3))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("num_workers", "start_method"),
    [
        (0, None),
        (1, "fork"),
        (3, "fork"),
        pytest.param(1, "spawn", marks=pytest.mark.slow),  # each spawned worker imports torch
        pytest.param(2, "spawn", marks=pytest.mark.slow),
    ],
)
def test_steps_are_bit_identical_for_any_workers_and_world_size(num_workers, start_method, world_size):
    assert step_hashes(num_workers, world_size, start_method, accumulation_steps=1) == oracle_hashes()


def test_accumulation_does_not_change_the_samples_of_a_step():
    assert step_hashes(0, 2, None, accumulation_steps=2) == oracle_hashes()


def test_epochs_differ_in_order_and_augmentation():
    first, second = epoch_bytes(0, None, 1, epoch=1), epoch_bytes(0, None, 1, epoch=2)
    assert not set(first) & set(second)


def test_an_epoch_can_start_at_any_step():
    loader = augmented_loader()
    complete = [batch.images for batch in loader.epoch(0, 1)]
    rest = [batch.images for batch in loader.epoch(0, 1, first_step=2)]
    assert len(rest) == len(complete) - 2
    assert all(torch.equal(*pair) for pair in zip(complete[2:], rest, strict=True))


@pytest.mark.parametrize("size", [1, 16, 31, 32, 33, 101])
@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_micro_batches_cover_each_sample_and_their_weights_give_the_mean(size, accumulation_steps, world_size):
    batch_size = 12 * accumulation_steps
    if 0 < size % batch_size < world_size:
        pytest.skip("rejected: fewer samples than ranks in the last step")
    values = np.random.default_rng(0).normal(size=size)
    ranks = [
        list(plan_epoch(size, batch_size, accumulation_steps, rank, world_size, drop_last=False))
        for rank in range(world_size)
    ]
    micro_batches = [micro_batch for plan in ranks for micro_batch in plan]
    assert sorted(position for part in micro_batches for position in range(part.start, part.stop)) == list(range(size))
    assert all(part.stop > part.start for part in micro_batches)
    means = []
    total = 0.0
    for parts in zip(*ranks, strict=True):
        # DistributedDataParallel averages over ranks.
        total += np.mean([part.loss_weight * values[part.start : part.stop].mean() for part in parts])
        if parts[0].ends_step:
            means.append(total)
            total = 0.0
    steps = [values[start : start + batch_size].mean() for start in range(0, size, batch_size)]
    np.testing.assert_allclose(means, steps, rtol=1e-12)


def count_samples(num_samples: int, batch_size: int) -> list[tuple[int, list[int]]]:
    dataset = RandomImages(num_samples)
    loader = EvalLoader(dataset, np.arange(num_samples), None, torch.device("cpu"), batch_size=batch_size)
    return [(loader.size, targets.tolist()) for _, targets in loader]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [8, 64, 256])
def test_validation_reads_each_sample_once(world_size, batch_size):
    batches = [batch for rank in run_ranks(world_size, lambda: count_samples(101, batch_size)) for batch in rank]
    assert all(size == 101 for size, _ in batches)
    assert sorted(target for _, targets in batches for target in targets) == sorted(RandomImages(101).targets.tolist())


def test_loaders_do_not_change_the_global_random_state():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    epoch_bytes(0, None, 1, epoch=1)
    epoch_bytes(2, "fork", 1, epoch=1)
    list(EvalLoader(RandomImages(20), range(20), RandomNoise(), torch.device("cpu"), batch_size=8))
    assert states() == before


def test_get_batch_is_used_without_a_transform(cpu):
    class Batched(RandomImages):
        def __getitem__(self, index):
            raise AssertionError("read one by one")

        def get_batch(self, indices):
            return self.images[indices], self.targets[indices]

    batches = list(EvalLoader(Batched(20), range(20), None, cpu, batch_size=8))
    assert torch.equal(torch.cat([images for images, _ in batches]), RandomImages(20).images)


class Differing(RandomImages):
    """A data set whose get_batch differs from its __getitem__ in one way."""

    change = staticmethod(lambda images, targets: (images, targets))

    def get_batch(self, indices):
        return self.change(self.images[indices], self.targets[indices])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda images, targets: (images.float() / 255, targets),
            r"get_batch returns a tensor \(8, 1, 8, 8\) of torch.float32 for the image, instead of a tensor "
            r"\(8, 1, 8, 8\) of torch.uint8; return the same from both, or remove get_batch",
        ),
        (lambda images, targets: (images // 2, targets), r"the image is \d+ to 12\d from get_batch and \d+ to 2\d\d "),
        (lambda images, targets: (images.flip(0), targets), "the image is "),
        (lambda images, targets: (images.flip(-1), targets), r"the image is not the same, although both are \d+ to 2"),
        (lambda images, targets: (images[:, 0], targets), r"get_batch returns a tensor \(8, 8, 8\) of torch.uint8 for"),
        (lambda images, targets: (images[:-1], targets[:-1]), r"get_batch returns a tensor \(7, 1, 8, 8\) of torch."),
        (lambda images, targets: (images, targets + 1), "the target is 1 from get_batch and 0 from __getitem__"),
        (lambda images, targets: (images, targets.sort().values), "the target is "),
        (lambda images, targets: (images, targets.int()), "torch.int32 for the target, instead of .* of torch.int64"),
        (
            lambda images, targets: (images, targets[:, None]),
            r"a tensor \(8, 1\) of torch.int64 for the target, instead",
        ),
        (lambda images, targets: (images.numpy(), targets), "get_batch returns ndarray of shape .* for the image, "),
        (lambda images, targets: images, "get_batch returns a tensor .* for the sample, instead of tuple|list"),
    ],
)
def test_get_batch_that_differs_from_single_samples_is_rejected(change, message):
    dataset = Differing(40)
    split = Split(np.arange(10, 40), np.arange(5), np.arange(5, 10))
    check_files(dataset, split)
    dataset.change = change
    differ = r"get_batch and __getitem__ of Differing in tests/test_data.py differ for sample \d+: .*"
    with pytest.raises(UserError, match=differ + message):
        check_files(dataset, split)


def test_get_batch_may_round_differently_and_single_samples_may_be_random():
    class Noisy(RandomImages):
        def __getitem__(self, index):
            return self.images[index] / 255 + torch.rand(()), self.targets[index]

        def get_batch(self, indices):
            return self.images[indices] / 255, self.targets[indices]

    class Rounded(Noisy):
        def __getitem__(self, index):
            return self.images[index] / 255 * (1 + 1e-6), self.targets[index]

    before = torch.get_rng_state()
    for dataset in (Noisy(20), Rounded(20)):
        check_files(dataset, Split(np.arange(10), np.arange(10, 15), np.arange(15, 20)))
    assert torch.equal(torch.get_rng_state(), before)


class Returned(RandomImages):
    """A data set of which one sample is wrong."""

    wrong: object = None

    def __getitem__(self, index):
        return self.wrong if index == 7 else super().__getitem__(index)


IMAGE = torch.zeros(1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            (to_pil_image(IMAGE), 0),
            "returned a PIL Image as image of sample 7; return a uint8 tensor (C, H, W), such as with "
            "torchvision.transforms.v2.functional.pil_to_tensor.",
        ),
        ((IMAGE, None), "returned None as target of sample 7; return a class index, a number or a tensor."),
        ((IMAGE, torch.tensor(4)), "returned target 4 for sample 7; with 4 classes it must be an integer from 0 to 3."),
        (IMAGE, "returned a Tensor for sample 7; return (image, target)."),
        ((IMAGE, 0, 0), "returned 3 values for sample 7; return (image, target)."),
        ({"image": IMAGE}, "returned a dict for sample 7; return (image, target)."),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_of_a_wrong_kind_are_rejected_with_their_names(cpu, wrong, message, num_workers):
    dataset = Returned(16)
    dataset.wrong = wrong
    loader = TrainLoader(dataset, range(16), None, cpu, seed=0, batch_size=8, num_workers=num_workers)
    with pytest.raises(UserError) as error:
        list(loader.epoch(0, 1))
    text = str(error.value)
    del error  # its traceback keeps the worker, which the garbage collector would end only after a time-out of torch
    assert text == f"__getitem__ of Returned in tests/test_data.py {message}"


def make_loader(**changes) -> TrainLoader:
    options = {"seed": 0, "batch_size": 16} | changes
    return TrainLoader(RandomImages(20), range(20), None, torch.device("cpu"), **options)


def test_an_indivisible_batch_size_is_rejected_with_the_nearest_valid_ones():
    with pytest.raises(
        UserError, match=r"--batch-size 16 must be a multiple of 3 \(1 process x 3 accumulation steps\); use 15 or 18\."
    ):
        make_loader(accumulation_steps=3)


def test_a_batch_size_larger_than_the_train_split_is_rejected():
    with pytest.raises(
        UserError, match=r"--batch-size 32 is larger than the train split, which has 20 samples; .*--batch-size 20"
    ):
        make_loader(batch_size=32)
    assert len(make_loader(batch_size=32, drop_last=False)) == 1


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"batch_size": -4}, {"num_workers": -1}])
def test_invalid_loader_arguments_are_rejected(changes):
    with pytest.raises(UserError, match="must be"):
        make_loader(**changes)


MIXERS = {
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.4, "cutmix": 1.0},
}


def mixed_steps(kind: str, world_size: int, num_workers: int, accumulation_steps: int) -> list[bytes]:
    """Return the mixed images and soft targets of each step of an epoch, over all ranks in order."""

    def load() -> list[tuple[bytes, bytes]]:
        mixer = batch_transform(4, **MIXERS[kind])
        loader = augmented_loader(accumulation_steps=accumulation_steps, num_workers=num_workers, mixer=mixer)
        return [(batch.images.numpy().tobytes(), batch.targets.numpy().tobytes()) for batch in loader.epoch(0, 1)]

    ranks = run_ranks(world_size, load)
    steps, images, targets = [], b"", b""
    plan = plan_epoch(SIZE, BATCH_SIZE, accumulation_steps, 0, world_size, drop_last=False)
    for micro_batch, *parts in zip(plan, *ranks, strict=True):
        images += b"".join(part[0] for part in parts)
        targets += b"".join(part[1] for part in parts)
        if micro_batch.ends_step:
            steps.append(images + targets)
            images, targets = b"", b""
    return steps


def mixed_oracle(kind: str) -> list[bytes]:
    """Mix each complete step with torchvision, as one process does without accumulation."""
    loader = augmented_loader()
    seeds = stream_seeds(len(loader), SEED, 0, 1, Stream.MIXING)
    kinds = [
        {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](alpha=alpha, num_classes=4)
        for name, alpha in MIXERS[kind].items()
    ]
    steps = []
    for batch, seed in zip(loader.epoch(0, 1), seeds.tolist(), strict=True):
        reseed(seed)
        images, targets = v2.RandomChoice(kinds)(batch.images.float(), batch.targets)
        assert not torch.equal(images, batch.images.float())
        steps.append(images.numpy().tobytes() + targets.numpy().tobytes())
    return steps


@CLASSES_ONLY
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize(
    ("world_size", "num_workers", "accumulation_steps"),
    [(1, 0, 1), (1, 0, 4), (1, 3, 1), (2, 0, 1), (4, 0, 1), (2, 2, 2)],
)
def test_mixed_steps_are_bit_identical_for_any_workers_ranks_and_accumulation(
    kind, world_size, num_workers, accumulation_steps
):
    assert mixed_steps(kind, world_size, num_workers, accumulation_steps) == mixed_oracle(kind)


@CLASSES_ONLY
def test_peek_returns_what_training_gets_and_leaves_the_epoch_unchanged():
    epoch = augmented_loader(mixer=batch_transform(4, mixup=0.4)).epoch(0, 1)
    originals, images, targets = epoch.peek(8)
    first = next(iter(epoch))
    assert torch.equal(images, first.images[:8])
    assert torch.equal(targets, first.targets[:8])
    assert all(
        torch.equal(image, RandomImages(SIZE).images[index])
        for image, index in zip(originals, epoch.order, strict=False)
    )


KINDS = {
    "several labels": lambda index: torch.eye(5)[index % 5] + torch.eye(5)[(index + 1) % 5],
    "regression": lambda index: torch.tensor(index / 10, dtype=torch.float32),
    "segmentation": lambda index: tv_tensors.Mask(torch.full((8, 8), index % 3, dtype=torch.uint8)),
    "boxes and a name": lambda index: {"boxes": torch.full((2, 4), float(index)), "label": index % 3},
}


class Task(RandomImages):
    """Images with targets of one of these kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__(SIZE)
        self.kind = kind
        self.ids = [str(index) for index in range(SIZE)]
        self.classes = None
        self.targets = {
            "several labels": torch.stack([KINDS[kind](index) for index in range(SIZE)]) if "labels" in kind else None,
            "regression": torch.arange(SIZE) / 10,
        }.get(kind)

    def __getitem__(self, index):
        return tv_tensors.Image(self.images[index]), KINDS[self.kind](index)

    def __len__(self) -> int:
        return SIZE


@CLASSES_ONLY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_split_files_and_loaders_accept_targets_of_any_kind(cpu, tmp_path, kind, num_workers):
    dataset = Task(kind)
    splits = SplitFile(tmp_path / "x.csv", dataset, make_folds)
    splits.write()
    assert (SplitFile(tmp_path / "x.csv", dataset, make_folds).folds == splits.folds).all()
    assert ("target" in splits.text.splitlines()[0]) == (kind in ("regression", "several labels"))
    split = splits.select(0)
    flip = v2.RandomHorizontalFlip(1.0)
    train = TrainLoader(dataset, split.train, flip, cpu, seed=0, batch_size=8, num_workers=num_workers)
    epoch = train.epoch(0, 1)
    for number, batch in enumerate(epoch):
        for row in range(8):
            index = int(epoch.order[number * 8 + row])
            expected = KINDS[kind](index)
            targets = batch.targets["label"] if isinstance(expected, dict) else batch.targets
            assert torch.equal(batch.images[row], dataset.images[index].flip(-1))
            label = expected["label"] if isinstance(expected, dict) else expected
            assert torch.equal(targets[row], torch.as_tensor(label))
    valid = EvalLoader(dataset, split.valid, None, cpu, batch_size=4, num_workers=num_workers)
    assert sum(len(images) for images, _ in valid) == len(split.valid)


def test_a_mask_is_transformed_with_its_image(cpu):
    class Masked(RandomImages):
        def __getitem__(self, index):
            return tv_tensors.Image(self.images[index]), tv_tensors.Mask(self.images[index])

    rotation = v2.RandomAffine(degrees=(-90, 90), translate=(0.2, 0.2))
    loader = TrainLoader(Masked(16), range(16), rotation, cpu, seed=0, batch_size=16)
    [batch] = loader.epoch(0, 1)
    assert torch.equal(batch.images, batch.targets)
    assert not torch.equal(batch.images, RandomImages(16).images[torch.from_numpy(loader.epoch(0, 1).order)])


class Views(NamedTuple):
    """Two images of a sample, as a data set can return them."""

    left: torch.Tensor
    right: torch.Tensor


def test_batches_of_any_container_are_moved_to_the_device():
    images = torch.arange(4.0)
    batch = {"views": Views(images, images + 1), "names": ["a", "b"], "pair": (images, [images])}
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved["views"], Views)
    assert [view.device.type for view in moved["views"]] == ["meta", "meta"]
    assert moved["names"] == ["a", "b"]
    assert isinstance(moved["pair"], tuple)
    assert (moved["pair"][0].device.type, moved["pair"][1][0].device.type) == ("meta", "meta")


def test_named_tuples_of_a_data_set_reach_the_training_loop(cpu):
    class Stereo(RandomImages):
        def __getitem__(self, index):
            return Views(self.images[index], self.images[index].flip(-1)), self.targets[index]

    dataset = Stereo(16)
    loader = TrainLoader(dataset, range(16), None, cpu, seed=0, batch_size=16)
    epoch = loader.epoch(0, 1)
    [batch] = epoch
    assert isinstance(batch.images, Views)
    assert torch.equal(batch.images.left, dataset.images[torch.from_numpy(epoch.order)])
    assert torch.equal(batch.images.right, batch.images.left.flip(-1))


def test_dataset_info_has_defaults_for_missing_attributes():
    info = dataset_info(RandomImages(4))
    assert info.targets.tolist() == [0, 1, 2, 3]
    assert info.classes == RandomImages.classes
    assert (info.ids, info.groups, info.folds, info.official_test) == (None, None, None, None)
    assert info.left_out == ""


@dataclass(frozen=True)
class NoOptions:
    """A Config without options."""


class Killed(RandomImages):
    """A data set whose worker is killed, as by a system that runs out of memory."""

    def __getitem__(self, index):
        if index == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Damaged(RandomImages):
    """A data set with a sample that raises UserError."""

    def __getitem__(self, index):
        if index == 11:
            raise UserError("image 11 is damaged; replace it.")
        return super().__getitem__(index)


def make_eval_loader(dataset: RandomImages | None = None, *, num_workers: int) -> EvalLoader:
    dataset = dataset or RandomImages(20)
    return EvalLoader(dataset, range(20), None, torch.device("cpu"), batch_size=4, num_workers=num_workers)


def read_all(dataset: RandomImages, num_workers: int) -> None:
    list(make_eval_loader(dataset, num_workers=num_workers))


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(64, 1, 8), (16, 4, 4), (4, 8, 1), (1, 1, 1)])
def test_a_gpu_gets_persistent_workers_by_the_cores_of_the_machine(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    loader = EvalLoader(RandomImages(8), range(8), None, torch.device("cuda"), batch_size=4, num_workers=None).batches
    assert (loader.num_workers, loader.persistent_workers, loader.pin_memory) == (workers, True, True)
    assert loader.prefetch_factor >= 2


def test_a_cpu_gets_no_workers_by_default(cpu):
    assert isinstance(
        EvalLoader(RandomImages(8), range(8), None, cpu, batch_size=4, num_workers=None).batches, InProcessLoader
    )


def test_a_killed_worker_ends_the_run_with_an_explanation():
    end = run_train(lambda _: read_all(Killed(20), 2), NoOptions)
    assert (end.code, end.err.count("\n")) == (1, 1)
    assert end.err.startswith("error: DataLoader worker ")
    assert "was ended by signal Killed" in end.err or "exited unexpectedly" in end.err  # torch detects it in two ways
    for word in ("usually because RAM ran out", "--num-workers", "--sharing-strategy"):
        assert word in end.err


def kill_worker() -> None:
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="the system has no waitid")
def test_a_connection_that_a_killed_worker_breaks_is_explained_by_its_death(monkeypatch):
    monkeypatch.setattr("batteries.core.command_line.SECONDS_OF_A_DEATH", SECONDS)  # which the signal interrupts

    def main(_) -> None:
        batches = iter(make_eval_loader(num_workers=2).batches)
        next(batches)
        threading.Timer(0.1, kill_worker).start()
        raise ConnectionResetError("Connection reset by peer")

    end = run_train(main, NoOptions)
    assert (end.code, end.err.count("\n")) == (1, 1)
    assert "was ended by signal Killed" in end.err


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="the system has no waitid")
def test_a_worker_that_dies_after_an_error_does_not_hide_the_error():
    class Damage(UserError):
        def __str__(self) -> str:
            kill_worker()
            return "image 11 is damaged."

    def main(_) -> None:
        batches = iter(make_eval_loader(num_workers=2).batches)
        next(batches)
        raise Damage

    end = run_train(main, NoOptions)
    assert (end.code, end.err) == (2, "error: image 11 is damaged.\n")


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="the system has no alarm signal")
def test_a_remaining_worker_exits_by_alarm_whatever_the_main_process_handles(monkeypatch):
    def remain() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # inherited from the main process
        _WorkerInit()(0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS)

    monkeypatch.setattr("batteries.data.workers.SECONDS_TO_LIVE", 1)
    worker = get_context("fork").Process(target=remain)
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGALRM


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_user_error_in_a_worker_is_a_one_line_error(num_workers):
    end = run_train(lambda _: read_all(Damaged(20), num_workers), NoOptions)
    assert (end.code, end.err) == (2, "error: image 11 is damaged; replace it.\n")


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ... (shm).", "/dev/shm"),
        ("unable to open shared memory object </torch_1> in read-write mode: No space left (28)", "/dev/shm"),
        ("Caught OSError in DataLoader worker process 0. [Errno 24] Too many open files", "ulimit -n"),
        ("received 0 items of ancdata", "--sharing-strategy file_system"),
        (
            "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
            "worker 7, 8 exited unexpectedly, usually because RAM",
        ),
        ("No space left on device", None),
    ],
)
def test_the_death_of_a_worker_is_explained(error, word):
    explanation = explain_dead_worker(RuntimeError(error))
    assert explanation is None if word is None else word in str(explanation)

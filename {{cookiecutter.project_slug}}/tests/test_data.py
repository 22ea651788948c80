"""L0, data-identical, and every sample once."""

import hashlib
import os
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from pictures import Pictures, Shake
from processes import run_ranks, run_train
from torchvision import tv_tensors
from torchvision.transforms import v2

from batteries.core.errors import UserError, explain_dead_worker
from batteries.core.seeding import Stream, reseed, stream_seeds
from batteries.data.batch_plan import plan_epoch
from batteries.data.loaders import EvalLoader, TrainLoader
from batteries.data.splits import SplitFile
from batteries.data.workers import InProcessLoader, _WorkerInit
from experiment.augmentations import batch_transform
from experiment.splits import make_folds

SIZE, BATCH_SIZE, SEED = 53, 16, 7


def shaken_loader(**options) -> TrainLoader:
    """Augmented pictures in steps of BATCH_SIZE and a short last one."""
    cpu = torch.device("cpu")
    fixed = {"seed": SEED, "batch_size": BATCH_SIZE, "drop_last": False}
    return TrainLoader(Pictures(SIZE), np.arange(SIZE), Shake(), cpu, **(fixed | options))


def epoch_bytes(num_workers: int, start_method: str | None, accumulation_steps: int, epoch: int) -> list[bytes]:
    """The bytes of each micro-batch of this rank."""
    loader = shaken_loader(accumulation_steps=accumulation_steps, num_workers=num_workers, start_method=start_method)
    return [batch.images.numpy().tobytes() + batch.targets.numpy().tobytes() for batch in loader.epoch(0, epoch)]


def step_hashes(num_workers: int, world_size: int, start_method: str | None, accumulation_steps: int) -> list[str]:
    """One hash for each optimizer step of two epochs: over its samples in order, images and targets."""

    def load() -> list[list[bytes]]:
        return [epoch_bytes(num_workers, start_method, accumulation_steps, epoch) for epoch in (1, 2)]

    ranks = run_ranks(world_size, load)
    pixels = Pictures(1).images.numel()
    hashes = []
    for epoch in range(2):
        cuts = list(plan_epoch(SIZE, BATCH_SIZE, accumulation_steps, 0, world_size, drop_last=False))
        images, targets = [], []
        for micro_batch, cut in enumerate(cuts):
            for rank in range(world_size):
                data = ranks[rank][epoch][micro_batch]
                count = len(data) // (pixels + 8)  # a target takes 8 bytes
                images.append(data[: count * pixels])
                targets.append(data[count * pixels :])
            if cut.ends_step:
                hashes.append(hashlib.sha256(b"".join(images + targets)).hexdigest())
                images, targets = [], []
    return hashes


def oracle_hashes() -> list[str]:
    """The same from the promise's own words: an order for each epoch, and a random stream for each position in it."""
    pictures, shake, hashes = Pictures(SIZE), Shake(), []
    for epoch in (1, 2):
        key = SEED, 0, epoch
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((*key, Stream.ORDER))))
        seeds = stream_seeds(SIZE, *key, Stream.SAMPLE)
        samples = []
        for position, index in enumerate(generator.permutation(SIZE).tolist()):
            reseed(int(seeds[position]))
            samples.append(shake(*pictures[index]))
        for start in range(0, SIZE, BATCH_SIZE):
            step = samples[start : start + BATCH_SIZE]
            data = [image.numpy().tobytes() for image, _ in step] + [target.numpy().tobytes() for _, target in step]
            hashes.append(hashlib.sha256(b"".join(data)).hexdigest())
    return hashes


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("num_workers", "start_method"),
    [
        (0, None),
        (1, "fork"),
        (3, "fork"),
        pytest.param(1, "spawn", marks=pytest.mark.slow),  # each spawned worker imports torch anew
        pytest.param(2, "spawn", marks=pytest.mark.slow),
    ],
)
def test_the_samples_of_each_step_are_the_same_bytes_for_any_workers_ranks_and_start_method(
    num_workers, start_method, world_size
):
    assert step_hashes(num_workers, world_size, start_method, accumulation_steps=1) == oracle_hashes()


def test_accumulation_changes_no_sample_of_a_step():
    assert step_hashes(0, 2, None, accumulation_steps=2) == oracle_hashes()


def test_two_epochs_differ_in_order_and_in_augmentation():
    first, second = epoch_bytes(0, None, 1, epoch=1), epoch_bytes(0, None, 1, epoch=2)
    assert not set(first) & set(second)


def test_an_epoch_can_start_at_any_step_with_the_batches_that_follow():
    loader = shaken_loader()
    whole = [batch.images for batch in loader.epoch(0, 1)]
    rest = [batch.images for batch in loader.epoch(0, 1, first_step=2)]
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(*pair) for pair in zip(whole[2:], rest, strict=True))


@pytest.mark.parametrize("size", [1, 16, 31, 32, 33, 101])
@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_micro_batches_cover_each_sample_once_and_their_shares_make_the_mean_of_a_step(
    size, accumulation_steps, world_size
):
    batch_size = 12 * accumulation_steps
    if 0 < size % batch_size < world_size:
        pytest.skip("refused: fewer samples than ranks in the last step")
    values = np.random.default_rng(0).normal(size=size)
    ranks = [
        list(plan_epoch(size, batch_size, accumulation_steps, rank, world_size, drop_last=False))
        for rank in range(world_size)
    ]
    covered = sorted(position for cuts in ranks for cut in cuts for position in range(cut.start, cut.stop))
    assert covered == list(range(size))
    assert all(cut.stop > cut.start for cuts in ranks for cut in cuts)
    means, total = [], 0.0
    for cuts in zip(*ranks, strict=True):
        # DistributedDataParallel averages over ranks.
        total += np.mean([cut.loss_weight * values[cut.start : cut.stop].mean() for cut in cuts])
        if cuts[0].ends_step:
            means.append(total)
            total = 0.0
    steps = [values[start : start + batch_size].mean() for start in range(0, size, batch_size)]
    np.testing.assert_allclose(means, steps, rtol=1e-12)


def count_samples(num_samples: int, batch_size: int) -> list[tuple[int, list[int]]]:
    dataset = Pictures(num_samples)
    loader = EvalLoader(dataset, np.arange(num_samples), None, torch.device("cpu"), batch_size=batch_size)
    return [(loader.size, targets.tolist()) for _, targets in loader]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [8, 64, 256])
def test_validation_reads_each_of_101_samples_once(world_size, batch_size):
    batches = [batch for rank in run_ranks(world_size, lambda: count_samples(101, batch_size)) for batch in rank]
    assert all(size == 101 for size, _ in batches)
    assert sorted(target for _, targets in batches for target in targets) == sorted(Pictures(101).targets.tolist())


def test_loaders_never_move_the_global_random_state():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    epoch_bytes(0, None, 1, epoch=1)
    epoch_bytes(2, "fork", 1, epoch=1)
    list(EvalLoader(Pictures(20), range(20), Shake(), torch.device("cpu"), batch_size=8))
    assert states() == before


def test_without_a_transform_the_data_set_gives_whole_batches(cpu):
    class Whole(Pictures):
        def __getitem__(self, index):
            raise AssertionError("one by one")

        def get_batch(self, indices):
            return self.images[indices], self.targets[indices]

    batches = list(EvalLoader(Whole(20), range(20), None, cpu, batch_size=8))
    assert torch.equal(torch.cat([images for images, _ in batches]), Pictures(20).images)


def make_loader(**changes) -> TrainLoader:
    options = {"seed": 0, "batch_size": 16} | changes
    return TrainLoader(Pictures(20), range(20), None, torch.device("cpu"), **options)


def test_a_batch_size_that_does_not_divide_is_refused_with_the_legal_ones():
    with pytest.raises(UserError, match=r"--batch-size 16 must be a multiple of 3 .* nearest: 15 or 18"):
        make_loader(accumulation_steps=3)


def test_a_train_split_smaller_than_one_batch_is_refused():
    with pytest.raises(
        UserError, match=r"--batch-size 32 does not fit: the train split has 20 samples; .*--batch-size 20"
    ):
        make_loader(batch_size=32)
    assert len(make_loader(batch_size=32, drop_last=False)) == 1


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"batch_size": -4}, {"num_workers": -1}])
def test_other_numbers_that_mean_nothing_are_refused(changes):
    with pytest.raises(UserError, match="must be"):
        make_loader(**changes)


MIXERS = {
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.4, "cutmix": 1.0},
}


def mixed_steps(kind: str, world_size: int, num_workers: int, accumulation_steps: int) -> list[bytes]:
    """Mixed images and soft targets of each step of an epoch, those of all ranks in order."""

    def load() -> list[tuple[bytes, bytes]]:
        mixer = batch_transform(4, **MIXERS[kind])
        loader = shaken_loader(accumulation_steps=accumulation_steps, num_workers=num_workers, mixer=mixer)
        return [(batch.images.numpy().tobytes(), batch.targets.numpy().tobytes()) for batch in loader.epoch(0, 1)]

    ranks = run_ranks(world_size, load)
    steps, images, targets = [], b"", b""
    cuts = plan_epoch(SIZE, BATCH_SIZE, accumulation_steps, 0, world_size, drop_last=False)
    for cut, *parts in zip(cuts, *ranks, strict=True):
        images += b"".join(part[0] for part in parts)
        targets += b"".join(part[1] for part in parts)
        if cut.ends_step:
            steps.append(images + targets)
            images, targets = b"", b""
    return steps


def mixed_oracle(kind: str) -> list[bytes]:
    """What torchvision makes of each whole step at once, as one process would see it without accumulation."""
    loader = shaken_loader()
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


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize(
    ("world_size", "num_workers", "accumulation_steps"),
    [(1, 0, 1), (1, 0, 4), (1, 3, 1), (2, 0, 1), (4, 0, 1), (2, 2, 2)],
)
def test_mixed_samples_are_the_same_bytes_for_any_workers_ranks_and_accumulation(
    kind, world_size, num_workers, accumulation_steps
):
    assert mixed_steps(kind, world_size, num_workers, accumulation_steps) == mixed_oracle(kind)


def test_a_look_at_the_first_samples_shows_what_training_gets_and_uses_nothing_up():
    epoch = shaken_loader(mixer=batch_transform(4, mixup=0.4)).epoch(0, 1)
    originals, images, targets = epoch.peek(8)
    first = next(iter(epoch))
    assert torch.equal(images, first.images[:8])
    assert torch.equal(targets, first.targets[:8])
    assert all(
        torch.equal(image, Pictures(SIZE).images[index]) for image, index in zip(originals, epoch.order, strict=False)
    )


KINDS = {
    "several labels": lambda index: torch.eye(5)[index % 5] + torch.eye(5)[(index + 1) % 5],
    "regression": lambda index: torch.tensor(index / 10, dtype=torch.float32),
    "segmentation": lambda index: tv_tensors.Mask(torch.full((8, 8), index % 3, dtype=torch.uint8)),
    "boxes and a name": lambda index: {"boxes": torch.full((2, 4), float(index)), "label": index % 3},
}


class Task(Pictures):
    """Pictures with targets of one of these kinds."""

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_targets_of_any_kind_go_through_split_files_and_loaders(cpu, tmp_path, kind, num_workers):
    dataset = Task(kind)
    splits = SplitFile(tmp_path / "x.csv", dataset, make_folds)
    splits.write()
    assert (SplitFile(tmp_path / "x.csv", dataset, make_folds).folds == splits.folds).all()
    assert ("target" in splits.text.splitlines()[0]) == (kind == "regression")
    split = splits.select(0)
    flip = v2.RandomHorizontalFlip(1.0)
    train = TrainLoader(dataset, split.train, flip, cpu, seed=0, batch_size=8, num_workers=num_workers)
    epoch = train.epoch(0, 1)
    for number, batch in enumerate(epoch):
        for place in range(8):
            index = int(epoch.order[number * 8 + place])
            wanted = KINDS[kind](index)
            got = batch.targets if not isinstance(wanted, dict) else batch.targets["label"]
            assert torch.equal(batch.images[place], dataset.images[index].flip(-1))
            assert torch.equal(got[place], torch.as_tensor(wanted["label"] if isinstance(wanted, dict) else wanted))
    valid = EvalLoader(dataset, split.valid, None, cpu, batch_size=4, num_workers=num_workers)
    assert sum(len(images) for images, _ in valid) == len(split.valid)


def test_a_mask_is_turned_with_its_image(cpu):
    class Masked(Pictures):
        def __getitem__(self, index):
            return tv_tensors.Image(self.images[index]), tv_tensors.Mask(self.images[index])

    turn = v2.RandomAffine(degrees=(-90, 90), translate=(0.2, 0.2))
    loader = TrainLoader(Masked(16), range(16), turn, cpu, seed=0, batch_size=16)
    [batch] = loader.epoch(0, 1)
    assert torch.equal(batch.images, batch.targets)
    assert not torch.equal(batch.images, Pictures(16).images[torch.from_numpy(loader.epoch(0, 1).order)])


@dataclass(frozen=True)
class Nothing:
    """A Config without knobs."""


class Deadly(Pictures):
    """A data set whose worker ends itself, as the system ends one that takes too much memory."""

    def __getitem__(self, index):
        if index == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Picky(Pictures):
    """A data set with a sample that its owner has to mend."""

    def __getitem__(self, index):
        if index == 11:
            raise UserError("picture 11 is broken; bring it again.")
        return super().__getitem__(index)


def read_all(dataset: Pictures, num_workers: int) -> None:
    list(EvalLoader(dataset, range(20), None, torch.device("cpu"), batch_size=4, num_workers=num_workers))


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(64, 1, 8), (16, 4, 4), (4, 8, 1), (1, 1, 1)])
def test_a_gpu_gets_workers_by_the_cores_of_the_machine_that_stay_and_fetch_ahead(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    loader = EvalLoader(Pictures(8), range(8), None, torch.device("cuda"), batch_size=4, num_workers=None).batches
    assert (loader.num_workers, loader.persistent_workers, loader.pin_memory) == (workers, True, True)
    assert loader.prefetch_factor >= 2


def test_a_cpu_gets_no_worker_since_the_model_needs_its_cores(cpu):
    assert isinstance(
        EvalLoader(Pictures(8), range(8), None, cpu, batch_size=4, num_workers=None).batches, InProcessLoader
    )


def test_a_worker_that_dies_ends_the_run_with_one_sentence_that_says_why():
    end = run_train(lambda _: read_all(Deadly(20), 2), Nothing)
    assert (end.code, end.err.count("\n")) == (1, 1)
    assert end.err.startswith("error: a loader's worker (process ")
    assert "was ended by signal Killed" in end.err or "exited unexpectedly" in end.err  # torch notices it in two ways
    for word in ("memory is short", "--num-workers", "--sharing-strategy"):
        assert word in end.err


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="there are no alarms")
def test_a_worker_that_is_left_over_ends_by_its_alarm_whatever_the_main_process_does_at_one(monkeypatch):
    def be_left_over() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as of the main process
        _WorkerInit()(0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("batteries.data.workers.SECONDS_TO_LIVE", 1)
    worker = get_context("fork").Process(target=be_left_over)
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGALRM


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_input_in_a_worker_is_told_as_everywhere(num_workers):
    end = run_train(lambda _: read_all(Picky(20), num_workers), Nothing)
    assert (end.code, end.err) == (2, "error: picture 11 is broken; bring it again.\n")


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ... (shm).", "/dev/shm"),
        ("unable to open shared memory object </torch_1> in read-write mode: No space left (28)", "/dev/shm"),
        ("Caught OSError in DataLoader worker process 0. [Errno 24] Too many open files", "ulimit -n"),
        ("received 0 items of ancdata", "--sharing-strategy file_system"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "process 7, 8) exited unexpectedly: most often memory"),
        ("No space left on device", None),
    ],
)
def test_what_a_lost_worker_lacked_is_named(said, word):
    sentence = explain_dead_worker(RuntimeError(said))
    assert sentence is None if word is None else word in str(sentence)

"""Class weights and balanced sampling, for one class per sample and for several labels."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_data import RandomImages, RandomNoise
from loops import CONFIG, CPU, LOGGER, make_state
from models import CHANNELS, plain_model
from processes import run_ranks
from torch.nn import functional

from batteries.core.errors import UserError
from batteries.data.loaders import TrainLoader
from batteries.data.sampling import balance_classes, epoch_order
from batteries.distributed.unwrap import unwrap_model
from experiment import task
from experiment.augmentations import normalize
from train import Config, train_fn

pytestmark = pytest.mark.skipif(task.PREDICTIONS not in ("class", "labels"), reason="this task weights no classes")
ROOT = Path(__file__).parent.parent
HAS_LABELS = task.PREDICTIONS == "labels"
SIZE, BATCH_SIZE, EPOCHS = 57, 16, 2  # the last step of an epoch has 9 samples
COUNTS = (40, 12, 4, 1)  # samples of each class


class Imbalanced(RandomImages):
    """Images of four classes, or with labels, of which some are rare."""

    def __init__(self) -> None:
        super().__init__(SIZE, CHANNELS)
        classes = np.repeat(np.arange(4), COUNTS)
        labels = np.eye(4, dtype=np.int64)[classes]
        labels[::5, 0] = 1
        labels[3::7] = 0
        self.targets: Any = torch.from_numpy(labels if HAS_LABELS else classes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.targets[index]


DATASET = Imbalanced()
TARGETS = DATASET.targets.numpy()


def make_loader(accumulation_steps: int = 1, class_weights: str | None = "balanced", **options: Any) -> TrainLoader:
    fixed = {"seed": 3, "batch_size": BATCH_SIZE, "drop_last": False} | options
    return TrainLoader(
        DATASET,
        range(SIZE),
        RandomNoise(),
        CPU,
        accumulation_steps=accumulation_steps,
        class_weights=class_weights,
        **fixed,
    )


def balanced() -> np.ndarray:
    """Return the weights of `balanced` from their definition, as float32."""
    if not HAS_LABELS:
        return np.array([SIZE / (4 * count) for count in COUNTS], dtype=np.float32)
    present = TARGETS.sum(0)
    return np.array([SIZE / (2 * (SIZE - present)), SIZE / (2 * present)], dtype=np.float32)


def weighted_sum(logits: torch.Tensor, targets: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
    """Return the sum over samples of the weighted loss, one sample and label at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits, targets, strict=True):
        if not HAS_LABELS:
            total = total - float(weights[target]) * row.log_softmax(0)[target]
            continue
        for column, present in enumerate(target.tolist()):
            sign = 1 if present else -1
            total = total - float(weights[present, column]) * functional.logsigmoid(sign * row[column]) / len(row)
    return total


def train_plainly() -> list[np.ndarray]:
    """Train with the complete batch of each step: the sum of the weighted losses divided by the samples of the step."""
    model = plain_model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(1, EPOCHS + 1):
        for batch in make_loader().epoch(0, epoch):
            optimizer.zero_grad()
            loss = weighted_sum(model(normalize(batch.images)), batch.targets, balanced()) / len(batch.targets)
            loss.backward()
            optimizer.step()
    return [value.detach().numpy() for value in model.parameters()]


def train_as_train_fn(accumulation_steps: int) -> list[np.ndarray]:
    state = make_state(plain_model(torch.float64))
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.05)
    state.scheduler = type(state.scheduler)(state.optimizer, 1.0)
    loader = make_loader(accumulation_steps)
    for epoch in range(1, EPOCHS + 1):
        train_fn(state, loader.epoch(0, epoch), LOGGER, CONFIG)
    return [value.detach().numpy() for value in unwrap_model(state.model).parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_weighted_gradient_of_a_step_does_not_depend_on_its_division(world_size, accumulation_steps, monkeypatch):
    monkeypatch.setattr("batteries.data.loaders.check_batch_size", lambda *_: None)  # 16 samples for 3 ranks
    expected = train_plainly()
    for weights in run_ranks(world_size, partial(train_as_train_fn, accumulation_steps)):
        for value, reference in zip(weights, expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-12, atol=1e-12)


def test_balanced_weights_have_a_mean_of_1_over_the_samples():
    weights = make_loader().class_weights.double().numpy()
    np.testing.assert_allclose(weights, balanced(), rtol=1e-6)
    of_samples = np.take_along_axis(weights, TARGETS, 0) if HAS_LABELS else weights[TARGETS]
    np.testing.assert_allclose(of_samples.mean(0), 1, rtol=1e-6)


def write_weights(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["class,weight", *lines, ""]))
    return str(path)


def test_weights_of_a_file_are_scaled_to_a_mean_of_1(tmp_path):
    path = write_weights(tmp_path / "w.csv", "west,8", "north,1", "east,2", "south,4")
    weights = make_loader(class_weights=path).class_weights.double().numpy()
    ratios = weights[1] / weights[0] if HAS_LABELS else weights / weights[0]
    np.testing.assert_allclose(ratios, [1, 2, 4, 8], rtol=1e-6)
    of_samples = np.take_along_axis(weights, TARGETS, 0) if HAS_LABELS else weights[TARGETS]
    np.testing.assert_allclose(of_samples.mean(0), 1, rtol=1e-6)


ROWS = ("north,1", "east,2", "south,4", "west,8")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*ROWS, "nord,1"], "has a class 'nord', which the data set does not have; did you mean 'north'? Remove or"),
        (ROWS[1:], "has no weight of class north; add a row."),
        ([*ROWS, "north,2"], "has more than one row of class north; keep one."),
        ([*ROWS[1:], "north,x"], "has the weight 'x' for class north; use a number of 0 or more."),
        ([*ROWS[1:], "north,-1"], "has the weight '-1' for class north; use a number of 0 or more."),
        ([*ROWS[1:], "north,nan"], "has the weight 'nan' for class north; use a number of 0 or more."),
    ],
)
def test_invalid_weights_are_rejected(tmp_path, lines, message):
    with pytest.raises(UserError) as error:
        make_loader(class_weights=write_weights(tmp_path / "w.csv", *lines))
    assert message in str(error.value)


def test_a_file_without_its_columns_or_that_does_not_exist_is_rejected(tmp_path):
    (tmp_path / "w.csv").write_text("label,weight\nnorth,1\n")
    with pytest.raises(UserError, match="has the columns label, weight; it needs class and weight"):
        make_loader(class_weights=str(tmp_path / "w.csv"))
    with pytest.raises(UserError, match="--class-weights balance does not exist; use balanced, or a CSV file"):
        make_loader(class_weights="balance")


def test_numbers_have_no_class_weights_and_no_balanced_sampling():
    numbers = Imbalanced()
    numbers.targets, numbers.classes = torch.linspace(0, 1, SIZE), ("angle",)
    for options in ({"class_weights": "balanced"}, {"sampling": "balanced"}):
        with pytest.raises(UserError, match="needs targets that are classes or labels"):
            TrainLoader(numbers, range(SIZE), None, CPU, seed=0, batch_size=8, **options)


def frequencies(order: np.ndarray) -> np.ndarray:
    """Count the samples of each class in an order, and for labels also those without a label."""
    if not HAS_LABELS:
        return np.bincount(TARGETS[order], minlength=4)
    drawn = TARGETS[order]
    return np.append(drawn.sum(0), (drawn.sum(1) == 0).sum())


def test_classes_are_equally_frequent_in_a_balanced_epoch():
    balance = balance_classes(DATASET, np.arange(SIZE))
    orders = [epoch_order(SIZE, balance, 0, 0, epoch) for epoch in range(300)]
    assert all(len(order) == SIZE for order in orders)
    if not HAS_LABELS:  # 57 samples of 4 classes: 14 or 15 of each, in every epoch
        assert all(np.abs(frequencies(order) - SIZE / 4).max() < 1 for order in orders)
    mean = np.mean([np.bincount(order, minlength=SIZE) for order in orders], axis=0)
    np.testing.assert_allclose(mean, balance.weights * SIZE / balance.weights.sum(), atol=0.1)


def test_balanced_weights_of_samples_are_the_mean_of_those_of_their_labels():
    weights = balance_classes(DATASET, np.arange(SIZE)).weights
    for row, weight in zip(TARGETS, weights, strict=True):
        if not HAS_LABELS:
            assert weight == pytest.approx(1 / COUNTS[row])
            continue
        without = (TARGETS.sum(1) == 0).sum()
        parts = [1 / TARGETS[:, label].sum() for label in np.flatnonzero(row)] or [1 / without]
        assert weight == pytest.approx(np.mean(parts))


def test_a_repeated_sample_is_augmented_differently_each_time():
    batches = list(make_loader(sampling="balanced", class_weights=None).epoch(0, 1))
    order = make_loader(sampling="balanced").epoch(0, 1).order
    images = torch.cat([batch.images for batch in batches])
    [(rarest, times)] = Counter(order.tolist()).most_common(1)
    assert times > 1
    versions = {images[position].numpy().tobytes() for position in np.flatnonzero(order == rarest)}
    assert len(versions) == times


def step_bytes(num_workers: int = 0, first_step: int = 0) -> list[list[bytes]]:
    """Return the samples of each step on this rank, in order."""
    loader = make_loader(sampling="balanced", class_weights=None, num_workers=num_workers)
    steps: list[list[bytes]] = [[]]
    for batch in loader.epoch(0, 1, first_step):
        steps[-1] += [
            image.numpy().tobytes() + np.asarray(target).tobytes()
            for image, target in zip(batch.images, batch.targets, strict=True)
        ]
        if batch.ends_step:
            steps.append([])
    return steps[:-1]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_balanced_samples_are_identical_for_any_workers_and_ranks(world_size, num_workers):
    ranks = run_ranks(world_size, partial(step_bytes, num_workers))
    steps = [[sample for part in parts for sample in part] for parts in zip(*ranks, strict=True)]
    assert steps == step_bytes()


def test_a_balanced_epoch_can_start_at_any_step():
    assert step_bytes(first_step=2) == step_bytes()[2:]


def test_the_options_are_those_of_the_run():
    config = Config(class_weights="balanced", sampling="balanced")
    assert (config.class_weights, config.sampling) == ("balanced", "balanced")
    assert Config().class_weights is None


LOSSES = re.compile(r"^ +losses = (?:.*reduction=\"none\"|self\.cross_entropy\(logits, targets)\)\n", re.MULTILINE)


def test_focal_loss_is_the_two_lines_of_the_documents():
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"```python\n(target_probabilities = .*?)```", page, re.DOTALL)
    source = (ROOT / "experiment/task.py").read_text(encoding="utf-8")
    indented = "".join(f"        {line}\n" for line in lines.splitlines())
    changed, count = LOSSES.subn(lambda found: found[0] + indented, source)
    assert (len(lines.splitlines()), count) == (2, 1)
    namespace: dict[str, Any] = {}
    exec(changed, namespace)
    logits = torch.randn(SIZE, 4, dtype=torch.float64)
    total = 0.0
    for row, target in zip(logits, DATASET.targets, strict=True):
        if HAS_LABELS:
            pairs = zip(row.sigmoid().tolist(), target.tolist(), strict=True)
            of_target = [p if present else 1 - p for p, present in pairs]
        else:
            of_target = [float(row.softmax(0)[target])]
        total += np.mean([-((1 - p) ** 2) * np.log(p) for p in of_target])
    assert float(namespace["build_criterion"]()(logits, DATASET.targets)) == pytest.approx(total / SIZE)

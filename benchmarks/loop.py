"""Microseconds per step of train_fn, progress bar and logging on, compared with bare loops and other trainers.

    make bench-loop

A tiny network, batches of 64, data in memory, one thread: the loop is measured, not the arithmetic. Each contender
trains the same network on the same samples with AdamW. A round is three epochs of 1000 steps, of which the first is not
counted; rounds are interleaved, in varied order. Each measurement is a new process, because a step of any loop takes
150 us longer once Lightning is imported. Libraries that are not installed are left out.
"""

import argparse
import importlib.util
import logging
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

TEMPLATE = Path(__file__).parent.parent
sys.path.insert(0, str(TEMPLATE / "{{cookiecutter.project_slug}}"))

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import train as rendered
from batteries.data.loaders import TrainLoader
from batteries.run.run import Run
from batteries.training.state import TrainState
from experiment.augmentations import normalize

STEPS, BATCH_SIZE, EPOCHS = 1000, 64, 3
CPU = torch.device("cpu")


class Images(Dataset):
    """64,000 greyscale images of 8x8 in memory."""

    classes = tuple("0123456789")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (STEPS * BATCH_SIZE, 1, 8, 8), generator=generator, dtype=torch.uint8)
        self.targets = torch.randint(0, 10, (STEPS * BATCH_SIZE,), generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.targets[index]

    def get_batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return several samples at once, as the data sets of the template do."""
        rows = torch.from_numpy(indices)
        return self.images.index_select(0, rows), self.targets.index_select(0, rows)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the network and its optimizer."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def loader() -> DataLoader:
    """Build a plain DataLoader, which reads sample by sample."""
    return DataLoader(Images(), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)


criterion = nn.CrossEntropyLoss()


def template_loop() -> Iterator[None]:
    """Run train_fn of train.py in a Run, with the progress bar of a terminal."""
    from rich.console import Console

    model, optimizer = build()
    with tempfile.TemporaryDirectory() as folder:
        stages = (rendered.Stage("stage0", EPOCHS, 1e-3, "constant"),)
        config = replace(rendered.Config(tracker=("none",)), stages=stages, logdir=Path(folder) / "run", batch_size=64)
        batches = TrainLoader(Images(), range(STEPS * BATCH_SIZE), None, CPU, seed=0, batch_size=BATCH_SIZE)
        schedule = rendered.make_schedule(optimizer, stages[0], STEPS)
        state = TrainState(model, optimizer, schedule)
        with Run(config, CPU, model, model_args={}, data="", split={}, may_change=()) as run:
            run.logger.console.screen = Console(file=Path(os.devnull).open("w"), force_terminal=True, width=120)
            manager = rendered.CheckpointManager(config.logdir / "stage0", writer=run.writer)
            stage = run.begin_stage(0, state, manager)
            for epoch in range(1, EPOCHS + 1):
                rendered.train_fn(state, batches.epoch(0, epoch), stage, config)
                yield


def minimal_loop() -> Iterator[None]:
    """Run the reference: optimizer steps only, without a host sync."""
    model, optimizer = build()
    batches = loader()
    for _ in range(EPOCHS):
        for images, targets in batches:
            criterion(model(normalize(images)), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


def loop_with_tqdm() -> Iterator[None]:
    """Run a common loop: `.item()` and a tqdm bar in each step."""
    from tqdm import tqdm

    model, optimizer = build()
    batches = loader()
    for _ in range(EPOCHS):
        bar = tqdm(batches, file=Path(os.devnull).open("w"))
        losses = 0.0
        correct = 0
        for images, targets in bar:
            logits = model(normalize(images))
            loss = criterion(logits, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += loss.item()
            correct += (logits.argmax(1) == targets).sum().item()
            bar.set_postfix(loss=loss.item())
        yield


def timm_style() -> Iterator[None]:
    """Run a short version of the loop in timm's train.py: AverageMeter, accuracy, a line every 50 steps."""
    from timm.utils import AverageMeter, accuracy

    model, optimizer = build()
    batches = loader()
    for _ in range(EPOCHS):
        losses, top1, times = AverageMeter(), AverageMeter(), AverageMeter()
        end = time.time()
        for step, (images, targets) in enumerate(batches):
            logits = model(normalize(images))
            loss = criterion(logits, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), images.size(0))
            top1.update(accuracy(logits.detach(), targets)[0].item(), images.size(0))
            times.update(time.time() - end)
            end = time.time()
            if step % 50 == 0:
                logging.getLogger("timm").info("loss %.3f acc %.3f", losses.avg, top1.avg)
        yield


def lightning() -> Iterator[None]:
    """Run Lightning's Trainer with its progress bar and two logged metrics."""
    import lightning as pl

    model, _ = build()
    clock = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            logits = self.model(normalize(batch[0]))
            loss = criterion(logits, batch[1])
            accuracy = (logits.argmax(1) == batch[1]).float().mean()
            self.log_dict({"loss": loss, "accuracy": accuracy}, on_step=False, on_epoch=True, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    class Clock(pl.Callback):
        def on_train_epoch_end(self, *_: object) -> None:
            clock.append(time.perf_counter())

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[Clock()],
            default_root_dir=folder,
            enable_checkpointing=False,
            logger=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), loader())
    for end in clock:
        yield end - begin
        begin = end


def fabric() -> Iterator[None]:
    """Run the bare loop with Lightning Fabric."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(*build())
    batches = fabric.setup_dataloaders(loader())
    for _ in range(EPOCHS):
        for images, targets in batches:
            loss = criterion(model(normalize(images)), targets)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        yield


def accelerate() -> Iterator[None]:
    """Run the bare loop with Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(*build(), loader())
    for _ in range(EPOCHS):
        for images, targets in batches:
            loss = criterion(model(normalize(images)), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        yield


def ignite() -> Iterator[None]:
    """Run Ignite's supervised trainer with a running average and its progress bar."""
    from ignite.contrib.handlers import ProgressBar
    from ignite.engine import Events, create_supervised_trainer
    from ignite.metrics import RunningAverage

    model, optimizer = build()
    clock = [time.perf_counter()]
    network = nn.Sequential(Normalize(), model)
    trainer = create_supervised_trainer(network, optimizer, criterion)
    RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
    ProgressBar().attach(trainer, ["loss"])
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: clock.append(time.perf_counter()))
    trainer.run(loader(), max_epochs=EPOCHS)
    for begin, end in pairwise(clock):
        yield end - begin


class Normalize(nn.Module):
    """`normalize` as a module."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return normalize(images)


CONTENDERS: dict[str, tuple[Callable[[], Iterator], str | None]] = {
    "bare loop over a plain DataLoader": (minimal_loop, None),
    "train_fn, progress bar and logging on": (template_loop, None),
    "bare loop with .item() and tqdm": (loop_with_tqdm, "tqdm"),
    "timm-style loop": (timm_style, "timm"),
    "Accelerate": (accelerate, "accelerate"),
    "Lightning Fabric": (fabric, "lightning"),
    "Ignite, progress bar": (ignite, "ignite"),
    "Lightning Trainer, progress bar": (lightning, "lightning"),
}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    found = [name for name, (_, package) in CONTENDERS.items() if package is None or importlib.util.find_spec(package)]
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        for name in random.Random(number).sample(found, len(found)):
            with multiprocessing.get_context("fork").Pool(1) as process:
                seconds[name].append(process.apply(measure, [name]))
    floor = seconds["bare loop over a plain DataLoader"]
    print(f"{rounds} rounds, one thread, torch {torch.__version__}")
    for name, times in seconds.items():
        ratio = statistics.median(value / reference for value, reference in zip(times, floor, strict=True))
        print(f"{name:50} {1e6 * statistics.median(times):8.0f} us per step {ratio:6.2f} x")


def measure(name: str) -> float:
    """Return the seconds per step of one contender."""
    with silence():
        return statistics.mean(time_epochs(CONTENDERS[name][0])[1:]) / STEPS


def time_epochs(epochs: Callable[[], Iterator]) -> list[float]:
    """Return the seconds of each epoch: those that the contender yields, otherwise those between two epochs."""
    seconds = []
    begin = time.perf_counter()
    for measured in epochs():
        end = time.perf_counter()
        seconds.append(end - begin if measured is None else measured)
        begin = time.perf_counter()
    return seconds


@contextmanager
def silence() -> Iterator[None]:
    """Discard the output; progress bars are still drawn."""
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


if __name__ == "__main__":
    main()

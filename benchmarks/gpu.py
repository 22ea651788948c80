"""Images per second of a ResNet-50 at 224 pixels on one GPU: train_fn compared with a bare compiled loop.

    make bench-gpu

bf16, channels_last, compiled, fused AdamW; both use one batch on the device, so that no loader is measured. Needs a
CUDA GPU.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

TEMPLATE = Path(__file__).parent.parent
sys.path.insert(0, str(TEMPLATE / "{{cookiecutter.project_slug}}"))

import torch
from torch import nn
from torchvision.models import resnet50

import train as rendered
from batteries.data.loaders import Batch
from batteries.run.run import Run
from batteries.training.state import TrainState
from batteries.training.wrap import prepare_model, wrap_model


class OnDevice:
    """An epoch that repeats one batch on the device."""

    first_step = 0
    epoch = 1

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, steps: int) -> None:
        self.images, self.targets, self.steps = images, targets, steps
        self.device = images.device

    def samples_of(self, step: int) -> list[str]:
        """Return no ids: the samples have none."""
        return []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            yield Batch(self.images, self.targets, 1.0, ends_step=True, seed=step, step_seed=step)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float32, as `normalize` of an experiment does."""
    return images.float() / 255 - 0.5


def build(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the compiled network and its optimizer."""
    model = prepare_model(resnet50(), device, channels_last=True)
    return wrap_model(model, device, compiled=True), torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def minimal_loop(epoch: OnDevice) -> Callable[[], None]:
    """Return the reference: a loop of optimizer steps only."""
    model, optimizer = build(epoch.images.device)
    criterion = nn.CrossEntropyLoss()

    def run() -> None:
        for _ in range(epoch.steps):
            with torch.autocast("cuda", torch.bfloat16):
                loss = criterion(model(normalize(epoch.images)), epoch.targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def template_loop(epoch: OnDevice, folder: Path) -> Callable[[], None]:
    """Return train_fn of train.py, in a Run."""
    device = epoch.images.device
    model, optimizer = build(device)
    stages = (rendered.Stage("stage0", 1, 1e-3, "constant"),)
    config = replace(
        rendered.Config(tracker=("none",)), stages=stages, logdir=folder / "run", precision="bf16", deterministic=False
    )
    rendered.normalize = normalize
    schedule = rendered.make_schedule(optimizer, stages[0], epoch.steps)
    state = TrainState(model, optimizer, schedule, rendered.make_scaler(device, "bf16"))
    run = Run(config, device, model, model_args={}, data="", split={"sha256": "", "file": ""}, may_change=())
    run.__enter__()
    checkpoints = rendered.CheckpointManager(config.logdir / "stage0", writer=run.writer)
    stage = run.begin_stage(0, state, checkpoints)
    return lambda: rendered.train_fn(state, epoch, stage, config)  # type: ignore[arg-type]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA GPU.")
    device = torch.device("cuda", 0)
    torch.backends.cudnn.benchmark = True
    images = torch.randint(0, 256, (arguments.batch_size, 3, 224, 224), dtype=torch.uint8, device=device)
    targets = torch.randint(0, 1000, (arguments.batch_size,), device=device)
    epoch = OnDevice(images, targets, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {"bare compiled loop": minimal_loop(epoch), "train_fn": template_loop(epoch, Path(folder))}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(arguments.rounds + 1):  # the first round compiles
            for name in random.Random(number).sample(list(contenders), len(contenders)):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                contenders[name]()
                torch.cuda.synchronize()
                if number:
                    rates[name].append(arguments.steps * arguments.batch_size / (time.perf_counter() - begin))
    print(f"{torch.cuda.get_device_name()}, {arguments.rounds} rounds, torch {torch.__version__}")
    for name, values in rates.items():
        floor = rates["bare compiled loop"]
        ratio = statistics.median(value / reference for value, reference in zip(values, floor, strict=True))
        print(f"{name:30} {statistics.median(values):9.0f} images/s {ratio:6.3f} x")


if __name__ == "__main__":
    main()

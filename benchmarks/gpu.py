"""Images per second of a ResNet-50 at 224 on one GPU: the rendered train_fn beside a bare compiled loop.

    make bench-gpu

bf16, channels_last, compiled, fused AdamW, the same batch on the device for both, so that no loader is in the way.
Needs a CUDA GPU. NOT RUN by its authors so far: none was at hand; the script is ready.
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
    """An epoch whose batches are one and the same, on the device."""

    first_step, key = 0, (0, 0, 1)

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, steps: int) -> None:
        self.images, self.targets, self.steps = images, targets, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            yield Batch(self.images, self.targets, 1.0, ends_step=True, seed=step)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 to float32, as an experiment's own does."""
    return images.float() / 255 - 0.5


def build(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The compiled network and its optimizer."""
    model = prepare_model(resnet50(), device, channels_last=True)
    return wrap_model(model, device, compiled=True), torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def unwrap_model(epoch: OnDevice) -> Callable[[], None]:
    """The floor."""
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


def ours(epoch: OnDevice, folder: Path) -> Callable[[], None]:
    """train_fn of the rendered train.py, in a Run."""
    device = epoch.images.device
    model, optimizer = build(device)
    stages = (rendered.Stage("stage0", 1, 1e-3, "constant"),)
    config = replace(
        rendered.Config(tracker=("none",)), stages=stages, logdir=folder / "run", precision="bf16", deterministic=False
    )
    rendered.normalize = normalize
    schedule = rendered.make_schedule(optimizer, stages[0], epoch.steps)
    state = TrainState(model, optimizer, schedule, rendered.make_scaler(device, "bf16"))
    run = Run(config.logdir, config, device, model, model_args={}, data="", split={}, may_change=())
    run.__enter__()
    run.begin_stage(0, state, rendered.CheckpointManager(config.logdir / "stage0", writer=run.writer))
    return lambda: rendered.train_fn(state, epoch, run, config)  # type: ignore[arg-type]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA GPU, and there is none.")
    device = torch.device("cuda", 0)
    torch.backends.cudnn.benchmark = True
    images = torch.randint(0, 256, (arguments.batch_size, 3, 224, 224), dtype=torch.uint8, device=device)
    targets = torch.randint(0, 1000, (arguments.batch_size,), device=device)
    epoch = OnDevice(images, targets, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {"bare compiled loop": unwrap_model(epoch), "rendered train_fn": ours(epoch, Path(folder))}
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
        ratio = statistics.median(own / other for own, other in zip(values, rates["bare compiled loop"], strict=True))
        print(f"{name:30} {statistics.median(values):9.0f} images/s {ratio:6.3f} x")


if __name__ == "__main__":
    main()

"""Time for which a save of a ResNet-50 with AdamW blocks training, compared with torch.save and a copy of the state.

    make bench-checkpoints

Each round runs every contender once, in a different order; the table has medians and ratios over the rounds. The writer
finishes between two saves, as it does in training if the steps between them take longer than the disk.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COPY = "one copy of the state, into allocated memory"
TEMPLATE = Path(__file__).parent.parent
sys.path.insert(0, str(TEMPLATE / "{{cookiecutter.project_slug}}"))

import torch
from torchvision.models import resnet50

from batteries.checkpoint.async_writer import AsyncWriter
from batteries.checkpoint.io import make_checkpoint
from batteries.checkpoint.manager import CheckpointManager


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        contenders = make_contenders(Path(folder), torch.device(arguments.device))
        seconds = measure(contenders, arguments.rounds)
    floor = seconds[COPY]
    print(f"{arguments.device}, one thread, {arguments.rounds} rounds, torch {torch.__version__}")
    for name, times in seconds.items():
        ratio = statistics.median(value / reference for value, reference in zip(times, floor, strict=True))
        print(f"{name:50} {1000 * statistics.median(times):8.1f} ms {ratio:6.2f} x")


def make_contenders(folder: Path, device: torch.device) -> dict[str, Callable[[], None]]:
    """Return the functions to time, by their label. Each returns when the device is idle."""
    model = resnet50().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = make_checkpoint("stage0", 1, model, optimizer)
    tensors = find_tensors(state)
    buffers = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
    print(f"the state: {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors) / 1e6:.0f} MB")
    writer = AsyncWriter()
    background = CheckpointManager(folder / "background", save_n_best=1, writer=writer)
    blocking = CheckpointManager(folder / "blocking", save_n_best=1)
    epochs = iter(range(1, 1_000_000))

    def copy_once() -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def save(manager: CheckpointManager) -> None:
        epoch = next(epochs)
        manager.process(score=1 / epoch, epoch=epoch, checkpoint=make_checkpoint("stage0", epoch, model, optimizer))

    def save_plainly() -> None:
        torch.save(state, folder / "plain.pth")

    return {
        COPY: copy_once,
        "CheckpointManager with a writer, as in train.py": lambda: save(background),
        "CheckpointManager without a writer": lambda: save(blocking),
        "torch.save, one file, no fsync": save_plainly,
        # Not timed as a contender: `measure` calls it after each of the others.
        "finish": background.wait,
    }


def find_tensors(value: object) -> list[torch.Tensor]:
    """Return all tensors in a checkpoint."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in find_tensors(item)]


def measure(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round, after one warm-up round."""
    finish = contenders.pop("finish")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(contenders), len(contenders)):
            begin = time.perf_counter()
            contenders[name]()
            end = time.perf_counter()
            finish()
            if number:
                seconds[name].append(end - begin)
    return seconds


if __name__ == "__main__":
    main()

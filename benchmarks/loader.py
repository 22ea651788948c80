"""Images per second from JPEG files to normalised float batches: this template's loader compared with others.

    uv run --with timm python benchmarks/loader.py            # about three minutes; timm is left out if not installed
    uv run --with timm python benchmarks/loader.py --size 1280x960 --images 200

The script writes 500 JPEG files of 500x375, or of another size; each is read with RandomResizedCrop(224) and a random
flip. The packs are those of tools/pack.py with its default side of 448 pixels. Two workers of one thread, batches of
64. Each contender runs in a separate process, with its usual memory settings. Repeats are interleaved, so that a ratio
compares neighbours in time. CPU time, of a process and its workers, depends less on other load.
"""

import argparse
import importlib.util
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder as PILFolder
from torchvision.transforms import v2

PROJECT = Path(__file__).parent.parent / "{{cookiecutter.project_slug}}"
sys.path.insert(0, str(PROJECT))

from batteries.core.memory import keep_freed_memory, return_freed_memory
from batteries.data.cropping import RandomResizedCrop
from batteries.data.loaders import TrainLoader
from batteries.data.packing import make_record, write_pack
from batteries.data.packs import RawPack

WORKERS, BATCH_SIZE, SIZE = 2, 64, 224
WARM_UP = 5  # passes that are not counted: workers start, memory is allocated

Loop = Callable[[], Iterator[torch.Tensor]]


def load_module(name: str) -> ModuleType:
    """Import a module of the image_folder variant."""
    path = PROJECT / f".variants/data_set/image_folder/experiment/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


images, augmentations = load_module("images"), load_module("augmentations")
MEAN, STD = augmentations.MEAN, augmentations.STD


def make_folder(folder: Path, count: int, width: int, height: int) -> list[str]:
    """Write JPEG files, about as large as photographs at quality 90; return their paths."""
    from torchcodec.encoders import JpegEncoder

    generator = torch.Generator().manual_seed(0)
    (folder / "one").mkdir()
    for index in range(count):
        coarse = torch.rand((1, 3, 47, 63), generator=generator)
        image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
        image = (image + torch.randn((3, height, width), generator=generator) * 0.04).clamp(0, 1) * 255
        JpegEncoder(image.to(torch.uint8)).to_file(folder / f"one/{index:03d}.jpg", quality=90)
    return [str(path) for path in sorted((folder / "one").iterdir())]


class Files(Dataset):
    """The data set of the image_folder variant: a uint8 image and a target for each index."""

    classes = ("one",)

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.data_dir = Path(paths[0]).parent.parent
        self.ids = [f"one/{Path(path).name}" for path in paths]
        self.targets = np.zeros(len(paths), dtype=np.int64)

    def read_image(self, path: Path) -> torch.Tensor:
        return images.read_image(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return images.read_image(self.paths[index]), 0


class DecodedOnly(Files):
    """Read and decode only; the image is discarded."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        super().__getitem__(index)
        return torch.zeros(1), 0


def make_pack(paths: list[str], kind: str) -> Path:
    """Write a pack of the files, next to their directory."""
    dataset = Files(paths)
    output = dataset.data_dir.with_name(kind)
    record = make_record(dataset, 448, 90 if kind == "jpeg" else None)
    output.mkdir()
    write_pack(dataset, output, record, WORKERS, lambda items, count: items)
    return output


def jpeg_pack(paths: list[str]) -> Loop:
    """The same from a JPEG pack."""
    return template_loader(Files([str(path) for path in sorted(make_pack(paths, "jpeg").glob("one/*.jpg"))]))


def raw_pack(paths: list[str]) -> Loop:
    """The same from a raw pack."""
    return template_loader(RawPack(make_pack(paths, "raw"), Files))


def template_loader(dataset: Any) -> Loop:
    """TrainLoader: torchcodec, a crop of uint8 pixels, a random stream per sample, normalisation after collation."""
    keep_freed_memory()  # as train.py does on a CPU
    loader = TrainLoader(
        dataset,
        np.arange(len(dataset)),
        RandomResizedCrop(SIZE),
        torch.device("cpu"),
        seed=0,
        batch_size=BATCH_SIZE,
        drop_last=False,
        num_workers=WORKERS,
    )
    epochs = iter(range(1, 1_000_000))

    def loop() -> Iterator[torch.Tensor]:
        for batch in loader.epoch(0, next(epochs)):
            yield augmentations.normalize(batch.images)
        return_freed_memory()  # as a run does after each epoch

    return loop


def pil_v2(paths: list[str]) -> Loop:
    """The usual loader: v2 crops and resizes PIL images, then normalises float32, all in the workers."""
    steps = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.ToImage()]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    return plain(PILFolder(str(Path(paths[0]).parent.parent), transform))


def pil_v2_float(paths: list[str]) -> Loop:
    """The same with float32 first, as often written: v2 crops and resizes float tensors."""
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.RandomResizedCrop(SIZE, antialias=True)]
    transform = v2.Compose([*steps, v2.RandomHorizontalFlip(), v2.Normalize(MEAN, STD)])
    return plain(PILFolder(str(Path(paths[0]).parent.parent), transform))


def decode_only(paths: list[str]) -> Loop:
    """The lower bound: decode the files only."""
    return plain(DecodedOnly(paths))


def plain(dataset: Dataset) -> Loop:
    """Iterate a DataLoader."""
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return lambda: (batch for batch, _ in loader)


def timm(paths: list[str], prefetcher: bool) -> Loop:
    """The training loader of timm with crop and flip only; its prefetcher normalises after collation, as here."""
    from timm.data import ImageDataset, create_loader

    loader: Any = create_loader(
        ImageDataset(str(Path(paths[0]).parent.parent)),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH_SIZE,
        is_training=True,
        use_prefetcher=prefetcher,
        interpolation="bilinear",
        color_jitter=None,
        num_workers=WORKERS,
        mean=MEAN,
        std=STD,
        pin_memory=False,
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    return lambda: (batch for batch, _ in loader)


CONTENDERS: dict[str, Callable[[list[str]], Loop]] = {
    "this template": lambda paths: template_loader(Files(paths)),
    "this template, JPEG pack": jpeg_pack,
    "this template, raw pack": raw_pack,
    "PIL, v2 on PIL images": pil_v2,
    "PIL, v2 on floats": pil_v2_float,
    "decoding only": decode_only,
    "timm": partial(timm, prefetcher=False),
    "timm, prefetcher": partial(timm, prefetcher=True),
}


def serve(contender: Callable[[list[str]], Loop], paths: list[str], pipe: Connection) -> None:
    """Measure a pass for each request."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    loop = contender(paths)
    while pipe.recv():
        pipe.send(measure(loop))
    end_workers()


def measure(loop: Loop) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of one pass."""
    begin = time.perf_counter()
    work = cpu_seconds()
    for _ in loop():
        pass
    return time.perf_counter() - begin, cpu_seconds() - work


def cpu_seconds() -> float:
    """Return the CPU time of this process and its workers so far, in seconds; Linux only."""
    total = 0.0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(") ")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total + time.process_time()


def end_workers() -> None:
    """Kill the workers, which otherwise wait for the next epoch."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch reports a killed worker as an error
    for worker in multiprocessing.active_children():
        worker.kill()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", default="500x375", help="width x height of the files")
    arguments = parser.parse_args()
    found = [name for name in CONTENDERS if not name.startswith("timm") or importlib.util.find_spec("timm")]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        paths = make_folder(Path(folder) / "data", arguments.images, *map(int, arguments.size.split("x")))
        pipes = {name: start(CONTENDERS[name], paths) for name in found}
        taken = {name: [] for name in found}
        for number in range(arguments.repeats + WARM_UP):
            for name in random.Random(number).sample(found, len(found)):
                pipes[name].send(True)
                taken[name].append(pipes[name].recv())
        for pipe in pipes.values():
            pipe.send(False)
    show({name: np.array(values[WARM_UP:]) / arguments.images for name, values in taken.items()})


def start(contender: Callable[[list[str]], Loop], paths: list[str]) -> Connection:
    """Start the process of a contender and return the pipe to it."""
    parent, child = multiprocessing.Pipe()
    multiprocessing.get_context("fork").Process(target=serve, args=(contender, paths, child)).start()
    return parent


def show(taken: dict[str, np.ndarray]) -> None:
    """Print a table from the seconds and CPU seconds per image, (repeats, 2); ratios are medians over the repeats."""
    reference = taken["this template"]
    print(f"{'':26}{'images/s':>10}{'ratio':>8}{'CPU ms/image':>16}{'ratio':>8}")
    for name, values in taken.items():
        seconds, work = np.median(values, 0)
        ratio, work_ratio = np.median(values / reference, 0)
        print(f"{name:26}{1 / seconds:>10.0f}{ratio:>8.2f}{1000 * work:>16.2f}{work_ratio:>8.2f}")


if __name__ == "__main__":
    main()

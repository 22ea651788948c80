"""Packs: smaller copies of image data sets are exact, survive a kill, and are rejected when they are out of date."""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_data import write_jpeg, write_png
from PIL import Image  # an independent decoder
from processes import SECONDS, End, run_train
from small_data import make_data
from torchvision.transforms.v2 import functional

from batteries.core.errors import UserError
from batteries.data import packing
from batteries.data.image_decoding import decode_file
from batteries.data.loaders import EvalLoader
from batteries.data.packing import (
    check_output,
    encode_jpeg,
    estimate_bytes,
    make_record,
    pack_image,
    prepare_output,
    write_pack,
)
from batteries.data.packs import RawPack, open_data
from experiment.dataset import load_dataset
from tools import pack

SIDE = 16
COUNT = 24


class Files:
    """Image files of the directories a and b, with a table."""

    classes = ("a", "b")
    suffixes = (".jpg", ".png")
    tables = ("notes.csv",)

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        self.ids = sorted(
            path.relative_to(data_dir).as_posix()
            for name in self.classes
            for path in (self.data_dir / name).glob("*.*")
        )
        self.targets = np.array([self.classes.index(name[0]) for name in self.ids])
        self.groups = [f"group{index // 3}" for index in range(len(self.ids))]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.read_image(self.data_dir / self.ids[index]), int(self.targets[index])

    def read_image(self, path: Path) -> torch.Tensor:
        try:
            return decode_file(path, "RGB")
        except ValueError as error:
            raise UserError(f"{path} is damaged.") from error

    def fingerprint(self) -> str:
        sizes = [(self.data_dir / name).stat().st_size for name in self.ids]
        return hashlib.sha256(repr((self.ids, sizes)).encode()).hexdigest()


@pytest.fixture
def source(tmp_path) -> Path:
    """Images of several sizes and formats, every third one smaller than SIDE."""
    return write_source(tmp_path / "data")


def write_source(root: Path, count: int = COUNT) -> Path:
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        height, width = [(40, 30), (23, 51), (12, 90)][index % 3]
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        path = root / f"{'ab'[index % 2]}/{index:02d}.{'png' if index % 4 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (write_png if index % 4 else write_jpeg)(image, path)
    (root / "notes.csv").write_text("a,b\n")
    return root


def make_pack(source: Path, output: Path, *, raw: bool = False, threads: int = 2, track: Any = None) -> Any:
    """Pack the images, and open the pack."""
    dataset = Files(source)
    record = make_record(dataset, SIDE, None if raw else 90)
    check_output(output, record, overwrite=False)
    prepare_output(output, record, overwrite=False)
    write_pack(dataset, output, record, threads, track or (lambda items, count: items))
    return open_data(output, Files)


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def shrunk(path: Path) -> torch.Tensor:
    """Return the image as a raw pack has to hold it."""
    image = decode_file(path, "RGB")
    height, width = image.shape[-2:]
    if min(height, width) <= SIDE:
        return image
    size = [SIDE, round(width * SIDE / height)] if height < width else [round(height * SIDE / width), SIDE]
    return functional.resize(image, size, antialias=True)


def test_a_raw_pack_has_the_pixels_and_attributes_of_its_source(source, tmp_path):
    dataset = Files(source)
    packed = make_pack(source, tmp_path / "pack", raw=True)
    assert isinstance(packed, RawPack)
    assert (list(packed.ids), packed.classes) == (dataset.ids, dataset.classes)
    assert list(packed.groups) == dataset.groups
    assert packed.folds is None
    assert len(packed) == COUNT
    for index, name in enumerate(dataset.ids):
        image, target = packed[index]
        assert torch.equal(image, shrunk(source / name))
        assert image.stride(0) == 1
        assert (image.dtype, target) == (torch.uint8, dataset.targets[index])


def test_a_jpeg_pack_has_the_names_of_its_source_and_small_images_byte_for_byte(source, tmp_path):
    packed = make_pack(source, tmp_path / "pack")
    assert isinstance(packed, Files)
    assert packed.ids == Files(source).ids
    for name in packed.ids:
        expected = shrunk(source / name)
        data = (tmp_path / "pack" / name).read_bytes()
        if expected.shape == decode_file(source / name, "RGB").shape:
            assert data == (source / name).read_bytes()
        else:
            assert data == encode_jpeg(expected, 90)
            assert Image.open(io.BytesIO(data)).format == "JPEG"
            assert np.asarray(Image.open(io.BytesIO(data))).shape[:2] == expected.shape[1:]
    assert (tmp_path / "pack/notes.csv").read_bytes() == b"a,b\n"


@pytest.mark.parametrize("orientation", [3, 6])
def test_the_exif_orientation_is_applied_once(tmp_path, orientation):
    source = write_source(tmp_path / "data")
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(decode_file(source / "a/00.jpg", "RGB").permute(1, 2, 0).numpy()).save(
        source / "a/00.jpg", exif=exif
    )
    packed, raw = make_pack(source, tmp_path / "jpeg"), make_pack(source, tmp_path / "raw", raw=True)
    expected = shrunk(source / "a/00.jpg")
    assert torch.equal(raw[0][0], expected)
    assert packed[0][0].shape == expected.shape
    assert (packed[0][0].float() - expected.float()).abs().mean() < 30  # noise at quality 90; turned, it is 85


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_raw_pack_loads_the_same_bits_in_workers(source, tmp_path, num_workers, start_method):
    packed = make_pack(source, tmp_path / "pack", raw=True)
    packed[0]  # maps the file in this process
    for workers in (0, num_workers):
        loader = EvalLoader(
            packed,
            range(COUNT),
            None,
            torch.device("cpu"),
            batch_size=1,
            num_workers=workers,
            start_method=start_method,
        )
        for index, (images, targets) in enumerate(loader):
            assert torch.equal(images[0], shrunk(source / packed.ids[index]))
            assert targets.tolist() == [packed.targets[index]]


@pytest.mark.parametrize("raw", [False, True])
def test_a_pack_that_was_killed_is_finished_by_the_same_command(source, tmp_path, raw):
    make_pack(source, tmp_path / "whole", raw=raw)
    expected = files_in(tmp_path / "whole")
    rng = random.Random(0)

    def run(stop: int) -> None:
        def track(items, count):
            for number, item in enumerate(items):
                if number == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

        make_pack(source, tmp_path / "pack", raw=raw, threads=rng.choice((1, 3)), track=track)

    exits = []
    for stop in (0, 1, 5, 3, 2):
        process = get_context("fork").Process(target=run, args=(stop,))
        process.start()
        process.join(SECONDS)
        exits.append(process.exitcode)
        with pytest.raises(UserError, match="pack is an unfinished pack; finish it with: "):
            open_data(tmp_path / "pack", Files)
    assert exits == [-signal.SIGKILL] * 5
    make_pack(source, tmp_path / "pack", raw=raw)
    assert files_in(tmp_path / "pack") == expected


@pytest.mark.parametrize("lost", [1, 7, 30, 5000])
def test_a_raw_pack_with_incomplete_data_of_an_image_is_continued_before_it(source, tmp_path, lost):
    make_pack(source, tmp_path / "pack", raw=True)
    expected = files_in(tmp_path / "pack")
    shapes = np.load(tmp_path / "pack/index.npz")["shapes"].astype(np.int64)
    (tmp_path / "pack/pack.json").unlink()
    (tmp_path / "pack/index.npz").unlink()
    os.truncate(tmp_path / "pack/images.bin", len(expected["images.bin"]) - lost)
    (tmp_path / "pack/shapes.bin").write_bytes(shapes.tobytes()[: -lost % 24 or None])
    record = make_record(Files(source), SIDE, None)
    (tmp_path / "pack/pack.unfinished.json").write_text(record.to_json())
    make_pack(source, tmp_path / "pack", raw=True)
    assert files_in(tmp_path / "pack") == expected


def test_attributes_that_a_raw_pack_cannot_hold_are_rejected_before_the_first_image(source, tmp_path):
    dataset = Files(source)
    dataset.groups = [None, *dataset.groups[1:]]
    record = make_record(dataset, SIDE, None)
    prepare_output(tmp_path / "pack", record, overwrite=False)
    with pytest.raises(
        UserError, match="groups of Files cannot be stored in a raw pack; use numbers or texts, or leave"
    ):
        write_pack(dataset, tmp_path / "pack", record, 2, lambda items, count: items)
    assert not (tmp_path / "pack/images.bin").exists()


@pytest.mark.parametrize("targets", [np.arange(COUNT) / 7, np.arange(2 * COUNT).reshape(-1, 2) % 2])
def test_targets_of_any_kind_are_those_of_the_source(source, tmp_path, targets):
    class OtherTargets(Files):
        def __init__(self, data_dir):
            super().__init__(data_dir)
            self.targets = targets

    dataset = OtherTargets(source)
    record = make_record(dataset, SIDE, None)
    prepare_output(tmp_path / "pack", record, overwrite=False)
    write_pack(dataset, tmp_path / "pack", record, 2, lambda items, count: items)
    packed = open_data(tmp_path / "pack", OtherTargets)
    for index in range(COUNT):
        assert np.array_equal(packed[index][1], targets[index])


@pytest.mark.parametrize("raw", [False, True])
def test_a_full_disk_is_a_one_line_error_and_the_pack_can_be_continued(source, tmp_path, monkeypatch, raw):
    make_pack(source, tmp_path / "whole", raw=raw)
    calls = iter(range(100))

    def fail(*_: object) -> Any:
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*_)

    real = packing.pack_image
    monkeypatch.setattr(packing, "pack_image", fail)
    with pytest.raises(
        UserError, match=r"pack cannot be written: the disk is full; make space and continue with: "
    ) as error:
        make_pack(source, tmp_path / "pack", raw=raw)
    assert f"--data-dir {source} --output {tmp_path / 'pack'} --side {SIDE}" in str(error.value)
    make_pack(source, tmp_path / "pack", raw=raw)
    assert files_in(tmp_path / "pack") == files_in(tmp_path / "whole")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda root: touch(root / "a/00.jpg"),
        lambda root: (root / "b/01.png").unlink(),
        lambda root: shutil.copy(root / "a/00.jpg", root / "a/99.jpg"),
        lambda root: (root / "notes.csv").write_text("a,c\n"),
    ],
)
def test_a_pack_whose_source_has_changed_is_rejected(source, tmp_path, raw, change):
    make_pack(source, tmp_path / "pack", raw=raw)
    change(source)
    with pytest.raises(
        UserError, match=r"which has changed since; pack it again with: .*tools/pack\.py .* --overwrite$"
    ):
        open_data(tmp_path / "pack", Files)


@pytest.mark.parametrize("raw", [False, True])
def test_a_pack_is_used_without_its_source_and_in_another_place(source, tmp_path, raw):
    fingerprint = make_pack(source, tmp_path / "pack", raw=raw).fingerprint()
    shutil.rmtree(source)
    shutil.copytree(tmp_path / "pack", tmp_path / "copy", copy_function=shutil.copy)  # new modification times
    assert open_data(tmp_path / "copy", Files).fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("raw", "change"),
    [
        (False, lambda root: (root / "a/02.png").unlink()),
        (False, lambda root: shutil.copy(root / "a/00.jpg", root / "a/99.jpg")),
        (False, lambda root: (root / "a/02.png").write_bytes(b"more")),
        (False, lambda root: (root / "notes.csv").write_text("a,b\nc,d\n")),
        (True, lambda root: os.truncate(root / "images.bin", 100)),
        (True, lambda root: (root / "index.npz").write_bytes(b"no index")),
        (True, lambda root: (root / "index.npz").unlink()),
    ],
)
def test_a_pack_that_was_edited_is_rejected(source, tmp_path, raw, change):
    make_pack(source, tmp_path / "pack", raw=raw)
    change(tmp_path / "pack")
    with pytest.raises(
        UserError, match=r"is a (pack whose files were changed|damaged pack \(.*); make it again with: "
    ):
        open_data(tmp_path / "pack", Files)


@pytest.mark.parametrize("text", ["{", "{}", '{"kind": "jpeg"}', json.dumps({"version": 7})])
def test_a_damaged_record_is_rejected(source, tmp_path, text):
    make_pack(source, tmp_path / "pack")
    (tmp_path / "pack/pack.json").write_text(text)
    with pytest.raises(UserError, match=r"pack\.json "):
        open_data(tmp_path / "pack", Files)


def test_packs_and_their_source_have_different_fingerprints(source, tmp_path):
    datasets = [Files(source), make_pack(source, tmp_path / "jpeg"), make_pack(source, tmp_path / "raw", raw=True)]
    fingerprints = [dataset.fingerprint() for dataset in datasets]
    assert len(set(fingerprints)) == 3


# The tool


@pytest.fixture
def run_pack(source, tmp_path, monkeypatch) -> Callable[..., End]:
    """Run tools/pack.py on the images, with the output directory `pack`."""
    monkeypatch.setattr(pack, "load_dataset", partial(open_data, build=Files))
    monkeypatch.setattr(pack, "SIZE", 8)
    monkeypatch.setattr(pack, "LOSSLESS_SIDE", 16)

    def run(*flags: object, output: Path = tmp_path / "pack", side: int = SIDE) -> End:
        flags = ("--data-dir", source, "--output", output, "--side", side, *flags)
        return run_train(pack.main, pack.Config, *map(str, flags), name="tools/pack.py", repeats=False)

    return run


@pytest.mark.parametrize("flags", [[], ["--raw"]])
def test_the_tool_prints_sizes_and_continues_a_finished_pack(run_pack, source, tmp_path, flags):
    for _ in range(2):
        end = run_pack(*flags)
        assert (end.code, end.err) == (0, "")
        assert f"{tmp_path / 'pack'}: 24 images, {'raw' if flags else 'jpeg'}, PSNR of crops " in end.out
        assert "ms to load an image" in end.out
        assert end.out.endswith(f"Train on it with --data-dir {tmp_path / 'pack'}.\n")
    before = files_in(tmp_path / "pack")
    touch(source / "a/00.jpg")
    assert_rejected(run_pack(*flags), "is a pack with an older state of the data; give another --output, or replace it")
    assert files_in(tmp_path / "pack") == before
    end = run_pack(*flags, "--overwrite")
    assert (end.code, end.err) == (0, "")


def assert_rejected(end: End, message: str) -> None:
    assert (end.code, end.err.count("\n")) == (2, 1), end
    assert message in end.err


def test_a_small_side_is_reported_with_its_quality(run_pack):
    end = run_pack(side=5)
    assert end.code == 0, end.err
    assert "warning: --side 5 is less than 16, so small crops lose detail: the PSNR of crops of 8 pixels is " in end.out
    assert "warning" not in run_pack("--overwrite").out


def test_quality_is_higher_with_a_larger_side(source, monkeypatch):
    monkeypatch.setattr(pack, "SIZE", 8)
    results = []
    for side in (4, 8, 16, 200):
        record = make_record(Files(source), side, None)
        results.append(pack.measure(Files(source), None, record).psnr)
    assert all(low < high for low, high in pairwise(results))
    assert results[-1] == np.inf


def damage_after_packing(data: Path, output: Path) -> None:
    make_pack(data, output)
    (data / "a/00.jpg").write_bytes(b"no")


@pytest.mark.parametrize(
    ("flags", "prepare", "message"),
    [
        (["--side", "0"], None, "--side 0 must be 1 or more."),
        (["--quality", "101"], None, "--quality 101 must be 1 to 100."),
        ([], lambda data, output: output.write_text("x"), "pack exists and is not a pack; give another --output."),
        ([], lambda data, output: (output / "x").mkdir(parents=True), "pack exists and is not a pack; give another"),
        (["--output", "{data}/a/pack"], None, "must not contain one another; give another --output."),
        (["--output", "{data}/.."], None, "must not contain one another; give another --output."),
        (["--output", "{data}"], None, "must not contain one another; give another --output."),
        (
            [],
            lambda data, output: make_pack(data, output, raw=True),
            "is a pack with another kind (raw instead of jpeg)",
        ),
        (["--quality", "80"], lambda data, output: make_pack(data, output), "another --quality (90 instead of 80)"),
        ([], lambda data, output: (data / "pack.json").write_text("{}"), "is a pack itself; pack the original data."),
        ([], lambda data, output: (data / "a/00.jpg").write_bytes(b"no"), "00.jpg is damaged."),
        (
            ["--output", "{data}/../pack/sub"],
            lambda data, output: make_pack(data, output),
            "pack, which must not be edi",
        ),
        (["--overwrite"], damage_after_packing, "00.jpg is damaged."),
    ],
)
def test_invalid_options_are_rejected_without_side_effects(run_pack, source, tmp_path, flags, prepare, message):
    if prepare:
        prepare(source, tmp_path / "pack")
    before = files_in(tmp_path)
    given = [flag.format(data=source) for flag in flags]
    if "--side" in given or "--output" in given:
        name = given[0]
        defaults = {"--side": str(SIDE), "--output": str(tmp_path / "pack")} | {name: given[1]}
        flags = [word for pair in defaults.items() for word in pair]
        end = run_train(pack.main, pack.Config, "--data-dir", str(source), *flags, name="tools/pack.py", repeats=False)
    else:
        end = run_pack(*given)
    assert_rejected(end, message)
    assert files_in(tmp_path) == before


def test_an_unfinished_pack_is_continued_with_overwrite_too(run_pack, source, tmp_path):
    assert run_pack().code == 0
    expected = files_in(tmp_path / "pack")
    shutil.move(tmp_path / "pack/pack.json", tmp_path / "pack/pack.unfinished.json")
    (tmp_path / "pack/pack.unfinished.json").write_text(make_record(Files(source), SIDE, 90).to_json())
    made = (tmp_path / "pack/a/00.jpg").stat().st_mtime_ns
    assert run_pack("--overwrite").code == 0
    assert files_in(tmp_path / "pack") == expected
    assert (tmp_path / "pack/a/00.jpg").stat().st_mtime_ns == made
    assert run_pack("--overwrite").code == 0
    assert files_in(tmp_path / "pack") == expected
    assert (tmp_path / "pack/a/00.jpg").stat().st_mtime_ns != made


def test_too_little_space_is_rejected_before_the_first_image(run_pack, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "estimate_bytes", lambda *_: 10**18)
    assert_rejected(run_pack(), "pack needs about 1.0 EB, and the disk has ")
    assert not (tmp_path / "pack").exists()


def test_the_estimated_size_is_close(source):
    for quality in (None, 90):
        record = make_record(Files(source), SIDE, quality)
        packed = [pack_image(Files(source), index, record) for index in range(COUNT)]
        size = sum(image.nbytes if isinstance(image, np.ndarray) else len(image) for image in packed)
        assert 0.9 * size < estimate_bytes(Files(source), record) < 1.3 * size


def test_a_data_set_without_image_files_is_rejected(tmp_path):
    data_dir = make_data(tmp_path / "data")
    flags = ["--data-dir", str(data_dir), "--output", str(tmp_path / "pack")]
    if hasattr(load_dataset(data_dir), "read_image"):
        pytest.skip("the data set has image files")
    end = run_train(pack.main, pack.Config, *flags, name="tools/pack.py", repeats=False)
    assert_rejected(end, "in experiment/dataset.py cannot be packed: it needs read_image, data_dir, and ids or paths")
    assert not (tmp_path / "pack").exists()

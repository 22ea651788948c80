"""Image files of every kind become the same tensors, and what is no image is named."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import patterned

from batteries.core.errors import UserError
from experiment.images import check_files, read_image

Image = pytest.importorskip("PIL.Image")  # another decoder, as the oracle

HEIGHT, WIDTH = 24, 40


def picture() -> np.ndarray:
    """Colours in blocks, uint8 (HEIGHT, WIDTH, 3), another in each corner."""
    return patterned([0], 3, WIDTH)[0].transpose(1, 2, 0)[:HEIGHT]


def save(path: Path, mode: str = "RGB", **options) -> np.ndarray:
    """Write `picture` with PIL; gives what PIL reads of it as RGB."""
    Image.fromarray(picture()).convert(mode).save(path, **options)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"quality": 90}),
        ("a.jpg", "RGB", {"progressive": True}),
        ("a.jpg", "L", {}),
        ("a.jpg", "CMYK", {}),
        ("a.png", "RGB", {}),
        ("a.png", "L", {}),
        ("a.png", "LA", {}),
        ("a.png", "RGBA", {}),
        ("a.png", "P", {}),
        ("a.png", "1", {}),
        ("a.webp", "RGB", {"quality": 90}),
        ("a.webp", "RGBA", {"lossless": True}),
        ("a.gif", "P", {}),
        ("a.png", "I;16", {}),
    ],
)
def test_any_kind_of_file_becomes_three_channels_of_bytes(tmp_path, name, mode, options):
    if mode == "I;16":
        grey = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 60
        Image.fromarray(grey.astype(np.uint16)).save(tmp_path / name)
        wanted = np.repeat((grey >> 8)[..., None], 3, 2)
    else:
        wanted = save(tmp_path / name, mode, **options)
    image = read_image(tmp_path / name)
    assert (image.dtype, image.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(tmp_path, name, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert np.abs(read_image(tmp_path / name).permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    first = Image.fromarray(picture()).convert("P")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[first.rotate(180)])
    first.save(tmp_path / "b.gif")
    assert torch.equal(read_image(tmp_path / "a.gif"), read_image(tmp_path / "b.gif"))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_file_that_is_cut_short_is_named(tmp_path, name, share):
    save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=rf"{name} cannot be read as an image \("):
        read_image(tmp_path / name)


@pytest.mark.parametrize("byte", [0x01, 0xFF])
def test_a_png_with_a_changed_byte_is_named_wherever_it_is(tmp_path, byte):
    save(tmp_path / "a.png")
    sound = (tmp_path / "a.png").read_bytes()
    for place in range(8, len(sound), max(1, len(sound) // 40)):
        data = bytearray(sound)
        data[place] ^= byte
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.png cannot be read as an image \(it is cut short or damaged\)"):
            read_image(tmp_path / "a.png")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "a.jpg cannot be read as an image (it is not there)."),
        (b"", "a.jpg cannot be read as an image (it is empty)."),
        (b"hello", "a.jpg cannot be read as an image (it is neither JPEG, PNG, WebP nor GIF)."),
        (b"BM" + bytes(60), "a.jpg cannot be read as an image (it is neither JPEG, PNG, WebP nor GIF)."),
        (b"\xff\xd8\xff" + bytes(60), "a.jpg cannot be read as an image ("),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)), "a.jpg cannot be read as an image ("),
    ],
)
def test_what_is_no_image_is_named_with_the_reason(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg") as error:
        read_image(tmp_path / "a.jpg")
    assert sentence in str(error.value)
    assert "/__w/" not in str(error.value)


def test_files_are_checked_before_they_are_needed(tmp_path):
    names = ["a.jpg", "b.png", "c.webp", "d.gif"]
    for name in names:
        save(tmp_path / name)
        (tmp_path / f"cut_{name}").write_bytes((tmp_path / name).read_bytes()[:-20])
        (tmp_path / f"more_{name}").write_bytes((tmp_path / name).read_bytes() + b"a camera's own notes")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    sound = [tmp_path / f"{kind}{name}" for kind in ("", "more_") for name in names]
    broken = [tmp_path / f"cut_{name}" for name in names]
    broken += [tmp_path / name for name in ("text.jpg", "empty.jpg", "folder.jpg", "missing.jpg")]
    assert check_files([*sound, *broken]) == list(range(8, 16))

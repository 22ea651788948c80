"""Image files of every format become equal tensors, and invalid files are reported."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import patterned_images

from batteries.core.errors import UserError
from experiment.images import find_invalid_files, read_image

Image = pytest.importorskip("PIL.Image")  # an independent decoder, as the oracle

HEIGHT, WIDTH = 24, 40


def make_image() -> np.ndarray:
    """Return blocks of colours, shape (HEIGHT, WIDTH, 3), uint8, with a different colour in each corner."""
    return patterned_images([0], 3, WIDTH)[0].transpose(1, 2, 0)[:HEIGHT]


def save(path: Path, mode: str = "RGB", **options) -> np.ndarray:
    """Write the image with PIL, and return what PIL reads from the file, as RGB."""
    Image.fromarray(make_image()).convert(mode).save(path, **options)
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
def test_all_formats_are_read_as_rgb_bytes(tmp_path, name, mode, options):
    if mode == "I;16":
        grey = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 60
        Image.fromarray(grey.astype(np.uint16)).save(tmp_path / name)
        expected = np.repeat(np.round(grey / 257)[..., None], 3, 2)
    else:
        expected = save(tmp_path / name, mode, **options)
    image = read_image(tmp_path / name)
    assert (image.dtype, image.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, name, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.abs(read_image(tmp_path / name).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix):
    first = Image.fromarray(make_image()).convert("P" if suffix == "gif" else "RGB")
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[first.rotate(180)], lossless=True)
    first.save(tmp_path / f"b.{suffix}", lossless=True)
    assert torch.equal(read_image(tmp_path / f"a.{suffix}"), read_image(tmp_path / f"b.{suffix}"))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif"])
@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_a_truncated_file_is_rejected(tmp_path, name, fraction):
    save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(UserError, match=rf"{name} cannot be read as an image \("):
        read_image(tmp_path / name)


@pytest.mark.parametrize("byte", [0x01, 0xFF])
def test_a_png_with_a_changed_byte_is_rejected(tmp_path, byte):
    save(tmp_path / "a.png")
    valid = (tmp_path / "a.png").read_bytes()
    for position in range(8, len(valid), max(1, len(valid) // 40)):
        data = bytearray(valid)
        data[position] ^= byte
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.png cannot be read as an image \("):
            read_image(tmp_path / "a.png")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.jpg cannot be read as an image (it does not exist)."),
        (b"", "a.jpg cannot be read as an image (it is empty)."),
        (b"hello", "a.jpg cannot be read as an image (it is not a JPEG, PNG, WebP or GIF file)."),
        (b"BM" + bytes(60), "a.jpg cannot be read as an image (it is not a JPEG, PNG, WebP or GIF file)."),
        (b"\xff\xd8\xff" + bytes(60), "a.jpg cannot be read as an image ("),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)), "a.jpg cannot be read as an image ("),
    ],
)
def test_invalid_files_are_rejected_with_the_reason(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg") as error:
        read_image(tmp_path / "a.jpg")
    assert message in str(error.value)
    assert "/__w/" not in str(error.value)


def test_files_that_cannot_be_read_are_found_with_their_errors(tmp_path):
    names = ["a.jpg", "b.png", "c.webp", "d.gif"]
    for name in names:
        save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"truncated_{name}").write_bytes(data[:-20])
        (tmp_path / f"closed_{name}").write_bytes(data[: len(data) // 2] + data[-12:])
        (tmp_path / f"extended_{name}").write_bytes(data + b"notes of a camera")
    frames = [Image.fromarray(make_image()).rotate(angle) for angle in (0, 90)]
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "directory.jpg").mkdir()
    valid = [tmp_path / f"{kind}{name}" for kind in ("", "extended_") for name in names]
    invalid = [tmp_path / f"{kind}_{name}" for kind in ("truncated", "closed") for name in names]
    invalid += [tmp_path / f"{name}.jpg" for name in ("text", "empty", "directory", "missing")]
    errors = find_invalid_files([*valid, tmp_path / "animated.webp", *invalid])
    assert list(errors) == list(range(9, 21))
    for position, path in enumerate(invalid, 9):
        with pytest.raises(UserError) as error:
            read_image(path)
        assert errors[position] == str(error.value)


@pytest.mark.parametrize("error", [UserError("no"), OSError("no"), ValueError("no"), RuntimeError()])
def test_errors_of_any_reader_are_found(error):
    def read(path: str) -> torch.Tensor:
        if path == "b":
            raise error
        return torch.zeros(3, 2, 2)

    assert find_invalid_files(["a", "b"], read) == {1: str(error) or "RuntimeError"}

"""Decoding of image files to tensors."""

import zlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torchvision.io import ImageReadMode

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")


def decode_file(data: torch.Tensor, mode: "ImageReadMode") -> torch.Tensor:
    """Decode an image file: apply its EXIF orientation, take the first frame of an animation, and convert 16 to 8 bits.

    Args:
        data: The bytes of the file, shape (N,), uint8.
        mode: GRAY or RGB.

    Returns:
        The image, shape (C, H, W), uint8.

    Raises:
        RuntimeError: If the file is damaged or in another format.
    """
    from torchvision.io import decode_image  # imported here because most commands decode no file

    if not is_safe_to_decode(data):
        raise RuntimeError("it is truncated or damaged")
    image = decode_image(data, mode, apply_exif_orientation=True)
    if image.ndim == 4:
        image = image[0]
    return image if image.dtype == torch.uint8 else (image.int() >> 8).to(torch.uint8)


def is_safe_to_decode(data: torch.Tensor) -> bool:
    """Return whether a file, given as bytes (N,), is not a damaged PNG: torchvision (0.29) crashes on some of these."""
    view = data.numpy().data
    return bytes(view[: len(PNG_SIGNATURE)]) != PNG_SIGNATURE or is_complete_png(view)


def is_complete_png(data: memoryview) -> bool:
    """Return whether a PNG has all chunks, with valid checksums (PNG Specification, third edition, section 5.3)."""
    start = len(PNG_SIGNATURE)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if data[start + 4 : start + 8] == b"IEND":
            return True
        start = end + 4
    return False

"""Decoding and encoding of image files, by torchcodec."""

from pathlib import Path
from typing import Literal

import torch

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")


def decode_file(source: str | Path | bytes, mode: Literal["GRAY", "RGB"]) -> torch.Tensor:
    """Decode an image file: apply its EXIF orientation, take the first frame of an animation, and convert 16 to 8 bits.

    A value v of 16 bits becomes v / 257, rounded, so that 65535 becomes 255.

    Args:
        source: The path of the file, or its bytes.
        mode: GRAY or RGB.

    Returns:
        The image, shape (C, H, W), uint8, with the channels of a pixel side by side in memory (channels last).

    Raises:
        OSError: If the file cannot be opened.
        RuntimeError: If it is damaged.
        ValueError: If it is empty or in another format.
    """
    # Imported here because most commands decode no file.
    from torchcodec.decoders import decode_image  # type: ignore[attr-defined] (it lacks __all__)

    image = decode_image(source, mode=mode)
    return image[0] if image.ndim == 4 else image


def encode_png(image: torch.Tensor) -> bytes:
    """Encode an image (C, H, W), uint8, with one or three channels, as a PNG file."""
    from torchcodec.encoders import PngEncoder  # type: ignore[attr-defined]

    return PngEncoder(image.contiguous()).to_tensor().numpy().tobytes()

"""Lists of samples in a report: an image, what it is and what was predicted, and its id."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from batteries.report.html import Html, make_image, png_size, tag

MAX_SAMPLES = 12  # in a list of samples
SMALL = 64  # pixels on a side: images up to this size are enlarged without smoothing

ThumbnailOf = Callable[[str], bytes | None]  # the image of an id as a PNG file; None if the sample is not an image


class SampleText(NamedTuple):
    """The text below a sample.

    Attributes:
        title: The first line.
        details: More lines.
    """

    title: str
    details: Sequence[str]


def render_sample_list(
    ids: Sequence[str], rows: np.ndarray, thumbnail_of: ThumbnailOf, describe: Callable[[int], SampleText]
) -> Html:
    """Build a list of samples.

    Args:
        ids: The ids of all samples.
        rows: The positions in `ids` of the samples of the list.
        thumbnail_of: Returns the image of an id.
        describe: Returns the text of a row.
    """
    chosen: list[int] = rows.tolist()
    items = [_render_sample(ids[row], thumbnail_of, describe(row)) for row in chosen]
    return tag("ul", *items, class_="samples")


def _render_sample(name: str, thumbnail_of: ThumbnailOf, text: SampleText) -> Html:
    details = [tag("span", line) for line in text.details]
    return tag("li", _render_thumbnail(name, thumbnail_of(name)), tag("b", text.title), *details, tag("small", name))


def _render_thumbnail(name: str, png: bytes | None) -> Html:
    if png is None:
        return Html("")
    return make_image(png, f"sample {name}", "large" if max(png_size(png)) > SMALL else None)

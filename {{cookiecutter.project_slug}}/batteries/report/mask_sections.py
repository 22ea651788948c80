"""The sections and key numbers of predicted masks."""

import numpy as np

from batteries.core.text import list_first
from batteries.evaluation.mask_table import MaskTable
from batteries.metrics.masks import PixelCounts
from batteries.report.html import Html, Section, Tile, make_table, tag
from batteries.report.prediction_plots import draw_image_scores
from batteries.report.sample_list import MAX_SAMPLES, SampleText, ThumbnailOf, render_sample_list
from batteries.report.sections import format_number

MAX_NAMED = 4  # classes listed below an image


def make_mask_tiles(table: MaskTable) -> list[Tile]:
    """Return the key numbers of the masks of the valid split."""
    scores = table.scores()
    tiles = [Tile("mean Dice", format_number(scores["mean_dice"]), "over the classes, on valid")]
    return [*tiles, Tile("pixel accuracy", format_number(scores["pixel_accuracy"]), "on valid")]


def render_mask_sections(table: MaskTable, panels_of: ThumbnailOf) -> list[Section]:
    """Build all sections of predicted masks.

    Args:
        table: The table, with targets.
        panels_of: Returns a PNG file for an id: image, target and prediction.
    """
    return [render_masks_section(table), render_mask_samples_section(table, panels_of)]


def render_masks_section(table: MaskTable) -> Section:
    """Build the section with the scores of each class, and the distribution of those of images."""
    heading = tag("h3", "Scores of each class, over all pixels, lowest IoU first")
    content = [heading, _render_class_table(table), draw_image_scores(table.image_scores()["image_iou"])]
    return Section("Masks", content)


def _render_class_table(table: MaskTable) -> Html:
    assert table.counts is not None
    total = table.counts.total()
    pixels = max(float(total.target.sum()), 1)
    ious, dice = total.iou(), total.dice()
    rows = []
    for index in np.argsort(np.where(np.isnan(ious), 2, ious), kind="stable").tolist():
        images = int((table.counts.target[:, index] > 0).sum())
        recall = total.correct[index] / max(total.target[index], 1)
        precision = total.correct[index] / max(total.predicted[index], 1)
        numbers = [ious[index], dice[index], recall, precision]
        fraction = f"{total.target[index] / pixels:.2%}"
        rows.append([table.classes[index], f"{images:,}", fraction, *map(format_number, numbers)])
    return make_table(["class", "images", "of all pixels", "IoU", "Dice", "recall", "precision"], rows)


def worst_masks(table: MaskTable) -> np.ndarray:
    """Return the rows of up to MAX_SAMPLES images with the lowest mean IoU, the lowest first."""
    scores = table.image_scores().get("image_iou", np.zeros(0))
    order = np.argsort(np.where(np.isnan(scores), 2, scores), kind="stable")
    return order[:MAX_SAMPLES]


def render_mask_samples_section(table: MaskTable, panels_of: ThumbnailOf) -> Section:
    """Build the section with the worst images: image, target and prediction."""
    assert table.counts is not None
    scores = table.image_scores()["image_iou"]
    ious = PixelCounts(*table.counts).iou()

    def describe(row: int) -> SampleText:
        known = np.flatnonzero(~np.isnan(ious[row]))
        listed = [f"{table.classes[index]} {ious[row, index]:.3f}" for index in known]
        return SampleText(f"IoU {format_number(scores[row])}", [list_first(listed, MAX_NAMED)])

    heading = tag("h3", "Lowest mean IoU: image, target, prediction")
    return Section("Samples", [heading, render_sample_list(table.ids, worst_masks(table), panels_of, describe)])

"""Result of an evaluation: as JSON, as Markdown tables and as a grid of images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from evotok_plugin.common.pictures import image_grid

GRID_COLUMNS = 12  # images per row of a grid


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        values: metrics and settings, serializable as JSON.
        pictures: pairs of an original and its reconstruction.
    """

    values: dict[str, Any]
    pictures: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)

    def as_json(self) -> str:
        """`values` as JSON."""
        return json.dumps(self.values, indent=2) + "\n"

    def as_markdown(self) -> str:
        """Format one table of metrics, one of metrics by level, and the metrics that were not measured with reasons."""
        values = self.values
        rows: list[tuple[str, ...]] = [
            ("images", f"{values['images']} of {values['image_size']} x {values['image_size']} pixels")
        ]
        if values["bad_images"]:
            rows.append(("broken images, left out", str(values["bad_images"])))
        rows += [(name, form.format(values[key])) for key, name, form in _ROWS if key in values]
        if "knn_accuracy" in values:
            rows.append(("probed", f"{values['probe_images']} images, {values['probe_classes']} classes"))
        tables = [_table(("metric", "value"), rows)]
        columns = [(name, form, values[key]) for key, name, form in _LEVEL_COLUMNS if key in values]
        if columns:
            levels = range(len(columns[0][2]))
            by_level = [
                (str(level + 1), *(form.format(column[level]) for _, form, column in columns)) for level in levels
            ]
            tables.append(_table(("level", *(name for name, _, _ in columns)), by_level))
        if missing := values.get("not_measured"):
            tables.append("Not measured:\n\n" + "".join(f"* {name}: {reason}\n" for name, reason in missing.items()))
        return "\n".join(tables)

    def grid(self) -> Image.Image:
        """Draw rows of originals, each above the row of their reconstructions."""
        columns = min(GRID_COLUMNS, len(self.pictures))
        rows: list[Image.Image] = []
        for start in range(0, len(self.pictures), columns):
            row = self.pictures[start : start + columns]
            blank = [Image.new("RGB", row[0][0].size, "white")] * (columns - len(row))
            for pictures in zip(*row, strict=True):
                rows += [*pictures, *blank]
        return image_grid(rows, columns, scale=max(1, 96 // rows[0].width))


_ROWS = (
    ("rfid", "rFID", "{:.3f}"),
    ("psnr", "PSNR", "{:.2f} dB"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips", "LPIPS (VGG)", "{:.4f}"),
    ("knn_accuracy", "k-NN accuracy", "{:.1%}"),
    ("semantic_cosine_constant", "cosine of a constant (the mean) to the teacher", "{:.4f}"),
    ("linear_probe_accuracy", "linear probe accuracy", "{:.1%}"),
    ("zero_shot_accuracy", "zero-shot accuracy", "{:.1%}"),
    ("teacher_zero_shot_accuracy", "zero-shot accuracy of the teacher", "{:.1%}"),
    ("zero_shot_classes", "classes, named by folders", "{}"),
)
_LEVEL_COLUMNS = (
    ("code_usage", "codes used", "{:.1%}"),
    ("perplexity", "perplexity", "{:.1f}"),
    ("semantic_cosine", "cosine to the teacher up to this level", "{:.4f}"),
)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "".join(
        f"| {' | '.join(f'{cell:{width}}' for cell, width in zip(line, widths, strict=True))} |\n" for line in lines
    )

"""Pictures for asset metadata: PNGs embedded in Markdown, since Dagster has no plot type."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagster import MarkdownMetadataValue
    from matplotlib.figure import Figure


def loss_curve(history: Sequence[dict[str, Any]], best_epoch: int) -> "MarkdownMetadataValue":
    """Training and validation loss by epoch; the epoch whose weights were kept is marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    epochs = [h["epoch"] for h in history]
    axes.plot(epochs, [h["train_loss"] for h in history], label="training")
    axes.plot(epochs, [h["validation_loss"] for h in history], label="validation (last day of the window)")
    axes.axvline(best_epoch, color="grey", linestyle=":", label="kept")
    axes.set(xlabel="epoch", ylabel="KL to the heavyweight score")
    axes.legend(frameon=False)
    return _markdown(figure)


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float], title: str
) -> "MarkdownMetadataValue":
    """A table of numbers, coloured; a cell without a value stays empty (the task does not exist there)."""
    import numpy as np
    from matplotlib.figure import Figure

    grid = np.array([[values.get((r, c), np.nan) for c in columns] for r in rows])
    width = max(1.1, 0.1 * max(map(len, columns), default=0))
    figure = Figure(figsize=(2.4 + width * len(columns), 1 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis_r", aspect="auto")
    middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)]) if np.isfinite(grid).any() else 0
    for i, j in zip(*np.nonzero(np.isfinite(grid)), strict=True):
        axes.text(
            j,
            i,
            f"{grid[i, j]:.3f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if grid[i, j] > middle else "black",
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes)
    return _markdown(figure)


def _markdown(figure: "Figure") -> "MarkdownMetadataValue":
    from dagster import MetadataValue

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return MetadataValue.md(f"![picture](data:image/png;base64,{base64.b64encode(png.getvalue()).decode()})")

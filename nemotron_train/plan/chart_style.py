"""What do all pictures of a run look like? Colours, axes, and how a picture is written."""

import errno
import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#22262b", "#6b7280", "#e5e7eb"
RATE = "#3a7d5d"  # of the learning rate, in every picture


def style_axes(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def write_png(figure: Figure, path: Path) -> None:
    """Write the picture; one that is there is replaced in one step.

    Raises:
        OSError: it cannot be written, with `path` as its file name.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png", dpi=150)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error

"""A case on paper and as HTML: figures, slices that scroll without a kernel, a page that stands alone."""

from __future__ import annotations

import html
import io
from base64 import b64encode
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke

from .panes import CROSS, PLANES, Case, Pane, State, crosshair, panes

if TYPE_CHECKING:
    from ..scan import Scan

COLUMNS = 5  # panes beside each other, at most
CONTOURS = (0.2, 0.6)  # of the MR's window: outline, and about the limit of grey and white


def figure(scan: Scan, restored: Any = None, n_slices: int = 3) -> Figure:
    """Montage of slices: LPET, SPET, MR, restored, difference, and the SD if there is more than one sample."""
    case = Case.of(scan, restored)
    return montage(case, case.spread(case.start, n_slices))


def montage(case: Case, states: list[State]) -> Figure:
    """Rows: states; columns: panes, each with its colour bar."""
    rows = [panes(case.volumes, state) for state in states]
    height, width = next(iter(rows[0].values())).image.shape
    size = (max(2.1 * len(rows[0]) + 0.4, 4.5), len(rows) * min(2.1 * height / width, 4) + 1.4)
    fig = Figure(size, facecolor="white", layout=ConstrainedLayoutEngine(h_pad=0.07))
    axes = fig.subplots(len(rows), len(rows[0]), squeeze=False)
    for column, (name, pane) in zip(axes.T.tolist(), rows[0].items(), strict=True):
        for ax, row, state in zip(column, rows, states, strict=True):
            drawn = _draw(ax, row[name], case.marks(state), crosshair(case.shape, state))
        column[0].set_title(name, fontsize=11)
        ticks = [pane.low, (pane.low + pane.high) / 2, pane.high]
        bar = fig.colorbar(drawn, ax=column, location="bottom", shrink=0.75, aspect=14, ticks=ticks, format="%.3g")
        bar.set_label(pane.meaning, fontsize=9)
        bar.ax.tick_params(labelsize=8)
    for ax, state in zip(axes[:, 0], states, strict=True):
        ax.set_ylabel(case.place(state), fontsize=9)
    fig.suptitle(f"{case.title}: {states[0].plane}", fontsize=11)
    return fig


def _draw(ax: Any, pane: Pane, marks: tuple[str, str, str, str], lines: np.ndarray | None) -> Any:
    look = {"interpolation": "nearest"}  # voxels as they are; and the file is half as large
    if pane.under is not None:
        ax.imshow(pane.under, "gray", vmin=0, vmax=1, **look)
    drawn = ax.imshow(pane.image, pane.colours, vmin=pane.low, vmax=pane.high, alpha=pane.opacity, **look)
    if lines is not None:
        ax.imshow(lines[..., None] * np.append(CROSS, 255).astype(np.uint8), **look)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    outline = [withStroke(linewidth=2.5, foreground="white")]  # readable on any pane
    places = ((0.02, 0.5, "left", "center"), (0.5, 0.98, "center", "top"), (0.98, 0.5, "right", "center"),
              (0.5, 0.02, "center", "bottom"))  # fmt: skip
    strip = 3 * pane.image.shape[0] < pane.image.shape[1]  # too low for marks above each other
    for (x, y, across, down), mark in zip(places, marks, strict=True):
        if not (strip and x == 0.5):
            place = {"ha": across, "va": down, "transform": ax.transAxes}
            ax.text(x, y, mark, fontsize=10, weight="bold", path_effects=outline, **place)
    return drawn


def registration(pet: np.ndarray, before: np.ndarray, after: np.ndarray, affine: np.ndarray) -> dict[str, Figure]:
    """The contours of an MR over the PET, before and after it was moved: through the middle of the head, a figure for
    each plane that has more than one slice, on no background. All (X, Y, Z) on one grid."""
    from scipy import ndimage

    images = {"PET": ndimage.gaussian_filter(pet, [n > 1 for n in pet.shape]), "MR before": before, "MR after": after}
    case = Case.of_volumes(images, "", "", affine)
    figures = {}
    for plane in [plane for plane, axis in PLANES.items() if min(np.delete(case.shape, axis)) > 1]:
        state = replace(case.start, plane=plane, index=case.shape[PLANES[plane]] // 2)
        shown, figures[plane] = case.panes(state), Figure((5.6, 3.2), facecolor="none", layout="constrained")
        for ax, name in zip(figures[plane].subplots(1, 2), ("MR before", "MR after"), strict=True):
            _draw(ax, shown["PET"], case.marks(state), None)
            mr = ndimage.gaussian_filter(shown[name].scaled(), 1)
            ax.contour(mr, CONTOURS, colors=[np.divide(CROSS, 255)], linewidths=1)
            ax.set_title(f"{name}: {plane}", fontsize=11, color="0.5")
    return figures


def panel(
    ax: Any, image: np.ndarray, title: str, meaning: str | None = None, window: tuple[float, float] | None = None,
    cmap: str = "gray_r", voxel: float = 2.0,
) -> Any:  # fmt: skip
    """One axial slice (X, Y), RAS+, in radiological display on axes in mm, for figures that draw on top of it.

    meaning: label of the colour bar, with its unit; None for no bar. window: (low, high), by default 0 to the 99.8th
    percentile. voxel: mm. Returns the drawn image.
    """
    half_x, half_y = (n * voxel / 2 for n in image.shape)
    low, high = window or (0, float(np.percentile(image, 99.8)))
    extent = (-half_x, half_x, -half_y, half_y)
    drawn = ax.imshow(image.T, cmap, vmin=low, vmax=high, origin="lower", extent=extent, interpolation="nearest")
    outside = np.nan if np.isnan(image).any() else 0
    ax.set(
        title=title, xlim=(88, -88), ylim=(-104, 104), xticks=[], yticks=[], facecolor=drawn.cmap(drawn.norm(outside))
    )
    ax.spines[:].set_visible(False)
    for side, x in (("R", 0.02), ("L", 0.93)):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text(x, 0.5, side, transform=ax.transAxes, fontsize=8, va="center", bbox=box)
    if meaning:
        ax.figure.colorbar(drawn, ax=ax, location="bottom", shrink=0.8).set_label(meaning, fontsize=8)
    return drawn


def show(fig: Figure, alt: str) -> None:
    """Show a figure in a notebook, with the text that a screen reader reads out in its place, and close it.

    Of a figure that a cell leaves open, Jupyter makes a picture without any text.
    """
    display({"text/html": still(fig, alt), "text/plain": alt}, raw=True)
    plt.close(fig)


def still(fig: Figure, alt: str) -> str:
    """A figure as an <img> of its own, with its alternative text."""
    out = io.BytesIO()
    if engine := fig.get_layout_engine():
        engine.execute(fig)  # the layout settles: laid out once, a title can lie on those of the panels
    fig.savefig(out, format="png", dpi=90, facecolor="auto", bbox_inches="tight")  # labels that it left no room too
    return img(alt, 'style="max-width:100%"', "png", out.getvalue())


def img(alt: str, look: str, kind: str, content: bytes) -> str:
    """A picture inside the HTML, with the text that stands for it."""
    data = b64encode(content).decode()
    return f'<img alt="{html.escape(alt)}" {look} src="data:image/{kind};base64,{data}">'


def document(title: str, body: str) -> str:
    """A page that stands alone: light or dark as the reader's screen is, from a phone to a wide screen."""
    return _PAGE.format(title=html.escape(title), body=body)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1em auto; padding: 0 1em; max-width: 1800px;
  background: light-dark(#fff, #15171a); color: light-dark(#111, #e6e6e6) }}
h1 {{ font-size: 1.3em; margin: 0 0 .3em }}
h2 {{ font-size: 1.1em; margin: 1.2em 0 .3em }}
table {{ border-collapse: collapse }}
th, td {{ text-align: left; vertical-align: top; padding: .15em 1.5em .15em 0 }}
th {{ font-weight: normal }}
th[scope=row] {{ white-space: nowrap }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

"""A case on paper and as HTML: figures, slices that scroll without a kernel, a page that stands alone."""

from __future__ import annotations

import html
import io
import math
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from PIL import Image

from .panes import CROSS, GAP, Case, Pane, State, crosshair, panes, side_by_side, table

if TYPE_CHECKING:
    from ..scan import Scan

COLUMNS = 5  # panes beside each other, at most
STILLS = 40  # slices that a page without a kernel holds, at most
Row = tuple[str, np.ndarray, str, str]  # HTML above a picture, the picture, HTML below it, share of the full width


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
    ax.set(title=title, xlim=(88, -88), ylim=(-104, 104), xticks=[], yticks=[], facecolor=drawn.cmap(drawn.norm(0)))
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
    display({"text/html": _still(fig, alt), "text/plain": alt}, raw=True)
    plt.close(fig)


def _still(fig: Figure, alt: str) -> str:
    out = io.BytesIO()
    fig.draw_without_rendering()  # the layout settles: drawn once, a title can lie on those of the panels
    fig.savefig(out, format="png", dpi=90, facecolor="white", bbox_inches="tight")  # labels that it left no room too
    return _img(alt, 'style="max-width:100%"', "png", out.getvalue())


def _img(alt: str, look: str, kind: str, content: bytes) -> str:
    data = b64encode(content).decode()
    return f'<img alt="{html.escape(alt)}" {look} src="data:image/{kind};base64,{data}">'


def encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    """RGB, (H, W, 3) uint8, as a PNG or JPEG file."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind, compress_level=1, quality=90, subsampling=0)  # the last two: of a JPEG
    return out.getvalue()


def screen(case: Case, state: State) -> tuple[list[Row], str, str]:
    """Rows of at most `COLUMNS` panes, evenly filled, their colour bars as HTML, the largest sensible width as CSS."""
    shown, lines = panes(case.volumes, state), crosshair(case.shape, state)
    names, columns = list(shown), math.ceil(len(shown) / math.ceil(len(shown) / COLUMNS))
    groups = [names[k : k + columns] for k in range(0, len(names), columns)]
    pictures = [side_by_side((shown[name] for name in group), lines) for group in groups]
    full = pictures[0].shape[1]
    rows = [_row(group, picture, case.marks(state), full) for group, picture in zip(groups, pictures, strict=True)]
    bars = f'<div style="line-height:1.4">{"".join(dict.fromkeys(_bar(pane) for pane in shown.values()))}</div>'
    most = 1200 if len(rows) == 1 else 225 * columns  # two rows should fit on a laptop
    return rows, bars, f"{min(most, 4 * full)}px"


def _row(names: list[str], picture: np.ndarray, marks: tuple[str, str, str, str], full: int) -> Row:
    left, top, right, bottom = (f"<span>{mark}</span>" for mark in marks)
    line = f'<div style="display:flex;justify-content:space-between">{left}{top}{right}</div>'
    width = picture.shape[1]
    grid = f"grid-template-columns:repeat({len(names)},minmax(0,1fr));column-gap:{100 * GAP / width:.3f}%"
    style = f"display:grid;align-items:end;text-align:center;line-height:1.3;{grid}"
    above, below = [f"<div><b>{html.escape(name)}</b>{line}</div>" for name in names], [bottom] * len(names)
    titles, feet = (f'<div style="{style}">{"".join(cells)}</div>' for cells in (above, below))
    pixels = "<style>.mfdiff-slices{image-rendering:pixelated}</style>"
    return pixels + titles, picture, feet, f"{100 * width / full:.2f}%"


def _bar(pane: Pane) -> str:
    colours = ",".join(f"#{bytes(colour).hex()}" for colour in table(pane.colours)[::16])
    style = f"display:inline-block;width:7em;height:.8em;background:linear-gradient(90deg,{colours})"
    strip = f'{pane.low:.3g} <span style="{style};border:1px solid grey"></span> {pane.high:.3g}'
    return f'<span style="display:inline-block;margin-right:2em">{strip} {html.escape(pane.meaning)}</span>'


def caption(case: Case, state: State) -> str:
    """The sentence for the reader; with a crosshair, the values where it stands."""
    lines = [case.sentence(state)]
    if state.cross is not None:
        values = (f"{name} {value:.4g} {unit}" for name, (value, unit) in case.at(state.cross, state).items())
        place = ", ".join(f"{v:.1f}" for v in case.mm(state.cross))
        lines.append(f"crosshair at ({place}) mm: {', '.join(values)}")
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def scroll(case: Case, state: State, group: str) -> str:
    """All slices (of many, `STILLS`) as HTML that needs no kernel and no script: a bar of radio buttons, one per
    slice. group: a name for them that no other bar of the page has."""
    states = {s.index: s for s in [*case.spread(state, STILLS), state]}
    items, look = [], 'class="mfdiff-slices" style="width:100%"'
    for shown in sorted(states.values(), key=lambda s: s.index):
        rows, bars, width = screen(case, shown)
        alt, label = case.description(shown), html.escape(case.sentence(shown))
        checked = " checked" * (shown.index == state.index)
        items.append(f'<input type="radio" name="{group}" aria-label="{label}"{checked}><div>')
        for titles, picture, feet, share in rows:
            image = _img(alt, look, "jpeg", encoded(picture, "JPEG"))
            items.append(f'<div style="width:{share}">{titles}{image}{feet}</div>')
        items.append(f"{bars}{caption(case, shown)}</div>")
    style = f"grid-template-columns:repeat({len(states)},1fr);max-width:{width}"
    return f'{_SCROLL}<div class="mfdiff-scroll" style="{style}">{"".join(items)}</div>'


def report_html(scan: Scan, restored: Any, lines: dict[str, str]) -> str:
    """A page that stands alone: the figure, `lines` (what -> value) as a table, all axial slices behind a bar. No
    scripts, nothing loaded."""
    case = Case.of(scan, restored)
    states = case.spread(case.start, 3)
    cells = [(html.escape(str(what)), html.escape(str(value))) for what, value in lines.items()]
    rows = "\n".join(f'<tr><th scope="row">{what}</th><td>{value}</td></tr>' for what, value in cells)
    picture, slices = _still(montage(case, states), case.description(*states)), scroll(case, case.start, "slices")
    return _PAGE.format(title=html.escape(f"{scan.name}: PET restoration"), picture=picture, rows=rows, slices=slices)


# The chosen slice is displayed; the one under the mouse instead, so that moving along the bar scrolls.
_SCROLL = """<style>
.mfdiff-scroll { display: grid }
.mfdiff-scroll > input { appearance: none; grid-row: 1; height: 1.2em; margin: 0; background: #888; opacity: .35 }
.mfdiff-scroll > input:checked, .mfdiff-scroll > input:hover { opacity: 1 }
.mfdiff-scroll > input:focus-visible { outline: 3px solid #08c }
.mfdiff-scroll > div { grid-area: 2 / 1 / 3 / -1; display: none }
.mfdiff-scroll > input:checked + div, .mfdiff-scroll > input:hover + div { display: block }
.mfdiff-scroll:has(> input:hover) > input:not(:hover) + div { display: none }
</style>"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; background: #fff; color: #111 }}
th {{ text-align: left; padding-right: 2em; font-weight: normal }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><strong>Teaching and research only; not a medical device.</strong></p>
<p>{picture}</p>
<table>
{rows}
</table>
<h2>Slices</h2>
<p>Move along the bar, or click into it and use the arrow keys.</p>
{slices}
</body>
</html>
"""

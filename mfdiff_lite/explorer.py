"""Look at a case: linked panes with sliders (`explore`), figures (`figure`, `panel`), a page to send (`report_html`).

    volumes --panes--> {name: Pane}, upright, square pixels --> render: (H, W, 3) uint8 | montage: matplotlib Figure

Volumes are (X, Y, Z) on one RAS+ grid. All PET panes share one window in activity units over all slices; the
difference is centred on 0. Radiological display has the patient's left (sagittal: posterior) on the right of the
picture, neurological display the other way round.
"""

from __future__ import annotations

import html
import io
import math
import traceback
from base64 import b64encode
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import ipywidgets as widgets
import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from .scan import Scan

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # plane -> the axis its slices are counted along
SIDES = {"R": "right", "L": "left", "A": "anterior", "P": "posterior"}
OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A"}
PET_MAPS = {"inverted grey": "gray_r", "grey": "gray", "hot": "hot", "inferno": "inferno", "magma": "magma"}
OWN_MAPS = {"MR": "gray", "SD": "magma", "gate": "viridis"}  # panes that are no activity image; all others are PET
GAP, GAP_GREY = 4, 150  # between panes: pixels, and a grey that shows beside white and beside black


@dataclass(frozen=True)
class State:
    """What is on display: slice `index`, from 0, of a plane. window: (low, high) of every PET pane; difference: its
    pane goes from -difference to +difference; both in activity `unit`. own_windows: of the panes in `OWN_MAPS`.
    voxel_size: mm."""

    plane: str = "axial"
    index: int = 0
    window: tuple[float, float] = (0.0, 1.0)
    difference: float = 1.0
    own_windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    pet_map: str = "gray_r"
    difference_map: str = "RdBu_r"
    radiological: bool = True
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    unit: str = "kBq/mL"


class Pane(NamedTuple):
    """One upright slice (H, W) with its colour map, window and the meaning of its values."""

    image: np.ndarray
    colours: str
    low: float
    high: float
    meaning: str


def panes(volumes: dict[str, np.ndarray], state: State) -> dict[str, Pane]:
    """The slice of every volume; after "restored" its difference from the SPET or, without one, from the LPET."""
    cuts = {name: _upright(volume, state) for name, volume in volumes.items()}
    shown = {}
    for name, cut in cuts.items():
        if name in OWN_MAPS:
            meaning = {"MR": "MR signal [arbitrary]", "SD": f"SD [{state.unit}]"}.get(name, name)
            shown[name] = Pane(cut, OWN_MAPS[name], *state.own_windows.get(name, (0.0, 1.0)), meaning)
        else:
            shown[name] = Pane(cut, state.pet_map, *state.window, f"activity [{state.unit}]")
        if name == "restored" and (reference := _reference(cuts)):
            change, size = cut - cuts[reference], state.difference
            label = f"difference [{state.unit}]"
            shown[f"restored - {reference}"] = Pane(change, state.difference_map, -size, size, label)
    return shown


def _reference(volumes: dict[str, np.ndarray]) -> str | None:
    return next((name for name in ("SPET", "LPET") if name in volumes), None)


def _upright(volume: np.ndarray, state: State) -> np.ndarray:
    """(X, Y, Z) -> (H, W): anterior (axial) or superior up; square pixels, of the smaller voxel side."""
    axis = PLANES[state.plane]
    cut = volume.take(state.index, axis).T[::-1, :: -1 if state.radiological else 1]
    sides = [state.voxel_size[a] for a in (2, 1, 0) if a != axis]  # down, across
    for direction, side in enumerate(sides):
        if side > 1.001 * min(sides):
            count = round(cut.shape[direction] * side / min(sides))
            cut = cut.take(((np.arange(count) + 0.5) * cut.shape[direction] / count).astype(int), direction)
    return cut


@lru_cache
def _table(colours: str) -> np.ndarray:
    """(255, 3) uint8: an odd number of entries, so that a diverging map has a centre."""
    return np.round(matplotlib.colormaps[colours](np.linspace(0, 1, 255))[:, :3] * 255).astype(np.uint8)


def render(volumes: dict[str, np.ndarray], state: State) -> np.ndarray:
    """Panes side by side as RGB, (H, W, 3) uint8. volumes: name -> (X, Y, Z) on one RAS+ grid."""
    pictures = []
    for pane in panes(volumes, state).values():
        scaled = (pane.image - pane.low) / max(pane.high - pane.low, 1e-30)
        pictures.append(_table(pane.colours)[np.round(254 * scaled.clip(0, 1)).astype(np.uint8)])
        pictures.append(np.full((pane.image.shape[0], GAP, 3), GAP_GREY, np.uint8))
    return np.concatenate(pictures[:-1], axis=1)


@dataclass(frozen=True, eq=False)
class _Case:
    """RAS+ volumes with the words for them, and the state to start from."""

    volumes: dict[str, np.ndarray]
    affine: np.ndarray
    title: str
    start: State

    @classmethod
    def of(cls, scan: Scan, restored: Any, arrays: dict[str, Any]) -> _Case:
        mean = getattr(restored, "mean", None)  # of an array, a method
        given = {"LPET": scan.lpet, "SPET": scan.spet, "MR": scan.mr, "restored": restored if callable(mean) else mean}
        images = {name: _image(name, value, scan) for name, value in (given | arrays).items() if value is not None}
        box = _head_box([np.asarray(image.dataobj) for name, image in images.items() if name in ("LPET", "MR")])
        images = {name: image.slicer[box] for name, image in images.items()}
        volumes, affine = {name: np.asarray(image.dataobj) for name, image in images.items()}, images["LPET"].affine
        pet = next(volumes[name] for name in ("SPET", "restored", "LPET") if name in volumes)
        high = _bound(pet, 99.9, 1.0)
        change = volumes["restored"] - volumes[_reference(volumes)] if "restored" in volumes else pet
        own = {n: (min(0.0, float(v.min())), _bound(v, 99.5, 1.0)) for n, v in volumes.items() if n in OWN_MAPS}
        plane = next((p for p, axis in PLANES.items() if pet.shape[axis] == 1), "axial")
        voxel_size = tuple(nib.affines.voxel_sizes(affine).tolist())
        middle, difference = pet.shape[PLANES[plane]] // 2, _bound(change, 99.5, high / 10)
        start = State(plane, middle, (0.0, high), difference, own, voxel_size=voxel_size, unit=scan.unit)
        return cls(volumes, affine, f"{scan.name}, DRF {scan.dose_reduction:g}", start)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.volumes["LPET"].shape

    def marks(self, state: State) -> tuple[str, str]:
        """The patient's side at the left and at the right of a pane, as letters."""
        right = nib.aff2axcodes(self.affine)[1 if state.plane == "sagittal" else 0]
        return (right, OPPOSITE[right]) if state.radiological else (OPPOSITE[right], right)

    def place(self, state: State) -> str:
        axis = PLANES[state.plane]
        voxel = (np.array(self.shape) - 1) / 2
        voxel[axis] = state.index
        return f"{'xyz'[axis]} = {nib.affines.apply_affine(self.affine, voxel)[axis]:.1f} mm"

    def sentence(self, *states: State) -> str:
        """Plane, slice, position, window and side; of further states the position."""
        state, left = states[0], SIDES[self.marks(states[0])[0]]
        places = " and ".join(self.place(s) for s in states)
        return (
            f"{state.plane} slice {state.index + 1} of {self.shape[PLANES[state.plane]]}, {places}; PET window "
            f"{state.window[0]:.4g} to {state.window[1]:.4g} {state.unit}; patient's {left} on the left"
        )

    def description(self, *states: State) -> str:
        return f"{self.title}: {', '.join(panes(self.volumes, states[0]))}; {self.sentence(*states)}."

    def spread(self, state: State, n_slices: int) -> list[State]:
        """The same view of slices spread evenly over the volume; for one slice, the state itself."""
        count = self.shape[PLANES[state.plane]]
        inner = np.linspace(count - 1, 0, n_slices + 2)[1:-1].round() if n_slices < count else np.arange(count)[::-1]
        return [state] if n_slices == 1 else [replace(state, index=int(k)) for k in inner]

    def montage(self, states: list[State]) -> Figure:
        """Rows: states; columns: panes, each with its colour bar."""
        rows = [panes(self.volumes, state) for state in states]
        names, (height, width) = list(rows[0]), rows[0]["LPET"].image.shape
        size = (max(2.1 * len(names) + 0.4, 4.5), len(rows) * min(2.1 * height / width, 4) + 1.4)
        fig = Figure(size, facecolor="white", layout="constrained")
        fig.get_layout_engine().set(h_pad=0.07)
        axes = fig.subplots(len(rows), len(names), squeeze=False)
        for j, name in enumerate(names):
            for i, row in enumerate(rows):
                drawn = _draw(axes[i, j], row[name], self.marks(states[i]))
            axes[0, j].set_title(name, fontsize=11)
            pane, column = rows[0][name], list(axes[:, j])
            ticks = [pane.low, (pane.low + pane.high) / 2, pane.high]
            bar = fig.colorbar(drawn, ax=column, location="bottom", shrink=0.75, aspect=14, ticks=ticks, format="%.3g")
            bar.set_label(pane.meaning, fontsize=9)
            bar.ax.tick_params(labelsize=8)
        for i, state in enumerate(states):
            axes[i, 0].set_ylabel(self.place(state), fontsize=9)
        fig.suptitle(f"{self.title}: {states[0].plane}", fontsize=11)
        return fig


def _draw(ax: Any, pane: Pane, marks: tuple[str, str]) -> Any:
    drawn = ax.imshow(pane.image, matplotlib.colormaps[pane.colours], vmin=pane.low, vmax=pane.high)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    outline = [withStroke(linewidth=2.5, foreground="white")]  # readable on any pane
    for x, mark, side in zip((0.02, 0.98), marks, ("left", "right"), strict=True):
        ax.text(x, 0.5, mark, ha=side, va="center", transform=ax.transAxes, fontsize=9, path_effects=outline)
    return drawn


def _image(name: str, value: Any, scan: Scan) -> nib.Nifti1Image:
    """An array or tensor on the scan's grid as a float32 RAS+ image."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, np.float32)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape != scan.lpet.shape:
        expected = f"expected the LPET's grid {scan.lpet.shape}, found {array.shape}"
        raise ValueError(f"{name}: {expected}; resample it to the PET first")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, found NaN or infinite voxels; find out where they come from")
    return nib.as_closest_canonical(nib.Nifti1Image(array, scan.affine))


def _head_box(volumes: list[np.ndarray], margin: int = 4) -> tuple[slice, slice, slice]:
    """The box in X and Y outside which there is only air, with a margin; all slices keep their numbers."""
    head = np.any([v > 0.1 * np.percentile(v, 99.5) for v in volumes], axis=0)
    box = []
    for axis in (0, 1):
        where = np.flatnonzero(head.any(axis=(1 - axis, 2))) if head.any() else np.array([0, head.shape[axis]])
        box.append(slice(max(0, int(where[0]) - margin), int(where[-1]) + 1 + margin))
    return (*box, slice(None))


def _bound(volume: np.ndarray, percentile: float, otherwise: float) -> float:
    """A percentile of |volume| rounded up to two digits; the maximum if that is 0, and `otherwise` if all is 0."""
    size = np.abs(volume)
    bound = float(np.percentile(size, percentile)) or float(size.max()) or otherwise
    step = 10.0 ** (math.floor(math.log10(bound)) - 1)
    return float(f"{math.ceil(bound / step - 1e-6) * step:.2g}")


class SliceExplorer(widgets.VBox):
    """Linked panes with controls for plane, slice (from 1), window, colours and side. Made by `explore`.

    Controls: `plane`, `slice`, `window`, `pet_map`, `radiological`; `state` is what they say.
    Where no front end runs, a picture with a text alternative stands in.
    """

    def __init__(self, case: _Case):
        start, self._case, self._shown = case.start, case, None
        flat, high = 1 in case.shape, start.window[1]
        top = max(2 * high, _bound(case.volumes["LPET"], 100, high))
        digits = f".{max(0, 2 - math.floor(math.log10(high)))}f"
        wide = {"style": {"description_width": "initial"}, "layout": {"width": "26em"}}
        self.plane = widgets.ToggleButtons(options=list(PLANES), value=start.plane, description="Plane", disabled=flat)
        self.slice = widgets.IntSlider(start.index + 1, 1, self._count(), description="Slice", disabled=flat, **wide)
        self.window = widgets.FloatRangeSlider(
            value=start.window, min=0, max=top, step=high / 100, readout_format=digits,
            description=f"Window [{start.unit}]", **wide,
        )  # fmt: skip
        self.pet_map = widgets.Dropdown(options=PET_MAPS, value=start.pet_map, description="PET colours")
        self.radiological = widgets.Checkbox(start.radiological, description="radiological", indent=False)
        self.image = widgets.Image(layout={"width": "100%", "height": "auto", "margin": "0"}).add_class("mfdiff-slices")
        self.titles, self.bars, self.caption, self.error = (widgets.HTML(layout={"margin": "0"}) for _ in range(4))
        self._view = widgets.VBox([self.titles, self.image, self.bars, self.caption])
        rows = ([self.plane, self.radiological], [self.slice, self.window, self.pet_map])
        controls = [widgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows]
        super().__init__([*controls, self._view, self.error])
        self._update()
        self.plane.observe(self._turn, "value")
        for control in (self.plane, self.slice, self.window, self.pet_map, self.radiological):
            control.observe(self._update, "value")

    @property
    def state(self) -> State:
        """What the controls say."""
        index = min(self.slice.value, self._count()) - 1
        look = {name: getattr(self, name).value for name in ("plane", "window", "pet_map", "radiological")}
        return replace(self._case.start, index=index, **look)

    def figure(self, n_slices: int = 3) -> Figure:
        """A montage in the present plane, window and colours; `n_slices=1` is the present slice."""
        return self._case.montage(self._case.spread(self.state, n_slices))

    def _count(self) -> int:
        return self._case.shape[PLANES[self.plane.value]]

    def _turn(self, change: Any) -> None:
        """To the middle slice of another plane."""
        self.slice.max = self._count()
        self.slice.value = self._count() // 2 + 1

    def _update(self, change: Any = None) -> None:
        """Controls -> picture. Whatever goes wrong is shown below it and raised."""
        try:
            state = self.state
            if state != self._shown:
                self._show(state)
            self._shown, self.error.value = state, ""
        except Exception:
            self.error.value = f'<pre role="alert" style="color:#b00020">{html.escape(traceback.format_exc())}</pre>'
            raise

    def _show(self, state: State) -> None:
        picture, shown = render(self._case.volumes, state), panes(self._case.volumes, state)
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG", compress_level=1)
        self.image.value = out.getvalue()
        self._view.layout.max_width = f"{min(1200, 4 * picture.shape[1])}px"
        self.titles.value = _titles(list(shown), self._case.marks(state), GAP / picture.shape[1])
        self.bars.value = "".join(dict.fromkeys(_bar(pane) for pane in shown.values()))
        words = html.escape(self._case.sentence(state), quote=False)
        self.caption.value = f'<span role="status" aria-live="polite">{words}</span>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        alt = self._case.description(self.state)
        still = {"text/html": _still(self.figure(1), alt), "text/plain": f"Slice explorer. {alt}"}
        return super()._repr_mimebundle_(**kwargs) | still


def _titles(names: list[str], marks: tuple[str, str], gap: float) -> str:
    """One row over the picture: mark, name, mark for every pane; gap: share of the width between panes."""
    cells = "".join(
        '<div style="display:flex;justify-content:space-between;line-height:1.4">'
        f"<span>{marks[0]}</span><b>{html.escape(name)}</b><span>{marks[1]}</span></div>"
        for name in names
    )
    columns = f"repeat({len(names)},minmax(0,1fr));column-gap:{100 * gap:.3f}%"
    grid = f'<div style="display:grid;align-items:end;grid-template-columns:{columns}">{cells}</div>'
    return f"<style>.mfdiff-slices{{image-rendering:pixelated}}</style>{grid}"


def _bar(pane: Pane) -> str:
    colours = ",".join(f"#{bytes(colour).hex()}" for colour in _table(pane.colours)[::16])
    style = f"display:inline-block;width:7em;height:.8em;background:linear-gradient(90deg,{colours})"
    strip = f'{pane.low:.3g} <span style="{style};border:1px solid grey"></span> {pane.high:.3g}'
    return f'<span style="display:inline-block;margin-right:2em">{strip} {html.escape(pane.meaning)}</span>'


def _still(fig: Figure, alt: str) -> str:
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=90, facecolor="white")
    data = b64encode(out.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def explore(scan: Scan, restored: Any = None, **arrays: Any) -> SliceExplorer:
    """Look through a case with sliders; show it as the last line of a notebook cell.

    restored: a `Restoration`, or an array or tensor in the shape of the scan's LPET. arrays: more of those by name, in
    the scan's unit and with the PET window; "MR", "SD" and "gate" have windows of their own. A 2-D scan has one slice:
    no plane or slice to choose. Raises ValueError for another shape than the LPET's and for NaN.
    """
    return SliceExplorer(_Case.of(scan, restored, arrays))


def figure(scan: Scan, restored: Any = None, n_slices: int = 3) -> Figure:
    """Montage of slices: LPET, SPET, MR, restored, difference, and the SD if there is more than one sample."""
    case, states = _for_print(scan, restored, n_slices)
    return case.montage(states)


def panel(
    ax: Any,
    image: np.ndarray,
    title: str,
    meaning: str | None = None,
    window: tuple[float, float] | None = None,
    cmap: str = "gray_r",
    voxel: float = 2.0,
) -> Any:
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


def report_html(scan: Scan, restored: Any, lines: dict[str, str]) -> str:
    """A page that stands alone: the figure, and `lines` (what -> value) as a table. No scripts, nothing loaded."""
    case, states = _for_print(scan, restored, 3)
    title = html.escape(f"{scan.name}: PET restoration")
    cells = [(html.escape(str(what)), html.escape(str(value))) for what, value in lines.items()]
    rows = "\n".join(f'<tr><th scope="row">{what}</th><td>{value}</td></tr>' for what, value in cells)
    return _PAGE.format(title=title, picture=_still(case.montage(states), case.description(*states)), rows=rows)


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
</body>
</html>
"""


def _for_print(scan: Scan, restored: Any, n_slices: int) -> tuple[_Case, list[State]]:
    several = getattr(restored, "settings", {}).get("n_samples", 1) > 1
    case = _Case.of(scan, restored, {"SD": restored.std} if several else {})
    return case, case.spread(case.start, n_slices)

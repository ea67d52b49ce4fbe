"""Look at a case: linked panes with sliders (`explore`), figures (`figure`, `panel`), a page to send (`report_html`).

    volumes --panes--> {name: Pane}, upright, square pixels --> render: (H, W, 3) uint8 | montage: matplotlib Figure

Volumes are (X, Y, Z) on one RAS+ grid. All PET panes share one window in activity units over all slices; the
difference is centred on 0. Radiological display has the patient's left (sagittal: posterior) on the right of the
picture, neurological display the other way round. Every colour map keeps its order in grey and for colour-blind eyes.
"""

from __future__ import annotations

import html
import io
import math
import traceback
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from os import PathLike, fspath
from typing import Any, NamedTuple

import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from nibabel.processing import resample_from_to
from PIL import Image

from .scan import Scan, load_volume

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # plane -> the axis its slices are counted along
SIDES = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
PET_MAPS = {"inverted grey": "gray_r", "grey": "gray"} | {name: name for name in ("hot", "inferno", "magma", "cividis")}
# Panes that are no activity image, by the first word of their name ("MR", "MR of another"); all others are PET.
OWN_MAPS = {"MR": "gray", "SD": "magma", "gate": "viridis"}
GAP, GAP_GREY = 4, 150  # between panes: pixels, and a grey that shows beside white and beside black
COLUMNS = 5  # panes beside each other, at most
CROSS = (0, 160, 215)  # a blue that shows on white, on grey and on every PET map
CROSS_GAP = 3  # voxels at each side of the crosshair's centre that it leaves free
NO_MARGIN = {"margin": "0"}
STILLS = 40  # slices that a page without a kernel holds, at most


@dataclass(frozen=True)
class State:
    """What is on display: slice `index`, from 0, of a plane. window: (low, high) of every PET pane; difference: its
    pane goes from -difference to +difference; both in activity `unit`. own_windows: of the panes in `OWN_MAPS`.
    blend: of the MR under the PET, whose opacity is uptake^blend (uptake: 0 to 1 through the window); 0 is PET alone.
    cross: voxel of the crosshair, drawn if there is one. voxel_size: mm."""

    plane: str = "axial"
    index: int = 0
    window: tuple[float, float] = (0.0, 1.0)
    difference: float = 1.0
    own_windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    pet_map: str = "gray_r"
    difference_map: str = "RdBu_r"
    radiological: bool = True
    blend: float = 0.0
    cross: tuple[int, int, int] | None = None
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    unit: str = "kBq/mL"


class Pane(NamedTuple):
    """One upright slice (H, W) with its colour map, window and the meaning of its values. With an MR under it: that
    MR, 0 to 1, and the opacity of what lies over it."""

    image: np.ndarray
    colours: str
    low: float
    high: float
    meaning: str
    under: np.ndarray | None = None
    opacity: np.ndarray | None = None

    def scaled(self) -> np.ndarray:
        """The image with its window at 0 to 1, clipped."""
        return ((self.image - self.low) / max(self.high - self.low, 1e-30)).clip(0, 1)


def panes(volumes: dict[str, np.ndarray], state: State) -> dict[str, Pane]:
    """The slice of every volume; after "restored" its difference from the SPET or, without one, from the LPET."""
    cuts = {name: _upright(volume.take(state.index, PLANES[state.plane]), state) for name, volume in volumes.items()}
    shown = {}
    for name, cut in cuts.items():
        if kind := _own(name):
            meaning = {"MR": "MR signal [arbitrary]", "SD": f"SD [{state.unit}]"}.get(kind, kind)
            shown[name] = Pane(cut, OWN_MAPS[kind], *state.own_windows.get(name, (0.0, 1.0)), meaning)
        else:
            shown[name] = Pane(cut, state.pet_map, *state.window, f"activity [{state.unit}]")
        if name == "restored" and (reference := _reference(cuts)):
            change, size = cut - cuts[reference], state.difference
            label = f"difference [{state.unit}]"
            shown[f"restored - {reference}"] = Pane(change, state.difference_map, -size, size, label)
    if state.blend and "MR" in shown:
        over, mr = "hot" if state.pet_map in ("gray", "gray_r") else state.pet_map, shown["MR"].scaled()
        for name in (name for name in cuts if not _own(name)):
            opacity = shown[name].scaled() ** state.blend
            shown[name] = shown[name]._replace(colours=over, under=mr, opacity=opacity)
    return shown


def _own(name: str) -> str | None:
    """Key of a pane in `OWN_MAPS`; None for PET."""
    return next((kind for kind in OWN_MAPS if kind in name.split()[:1]), None)


def _reference(volumes: dict[str, np.ndarray]) -> str | None:
    return next((name for name in ("SPET", "LPET") if name in volumes), None)


def _upright(cut: np.ndarray, state: State) -> np.ndarray:
    """A slice of an (X, Y, Z) volume -> (H, W): anterior (axial) or superior up; square pixels, of the smaller side."""
    cut = cut.T[::-1, :: -1 if state.radiological else 1]
    sides = [state.voxel_size[a] for a in (2, 1, 0) if a != PLANES[state.plane]]  # down, across
    for direction, side in enumerate(sides):
        if side > 1.001 * min(sides):
            count = round(cut.shape[direction] * side / min(sides))
            cut = cut.take(((np.arange(count) + 0.5) * cut.shape[direction] / count).astype(int), direction)
    return cut


def _crosshair(shape: tuple[int, ...], state: State) -> np.ndarray | None:
    """(H, W) bool: where its lines are, for volumes of this shape."""
    if state.cross is None:
        return None
    across, down = (a for a in range(3) if a != PLANES[state.plane])
    lines = np.zeros((shape[across], shape[down]), bool)
    i, j = state.cross[across], state.cross[down]
    lines[i], lines[:, j] = True, True
    lines[max(0, i - CROSS_GAP) : i + CROSS_GAP + 1, max(0, j - CROSS_GAP) : j + CROSS_GAP + 1] = False
    return _upright(lines, state)


@lru_cache
def _table(colours: str) -> np.ndarray:
    """(255, 3) uint8: an odd number of entries, so that a diverging map has a centre."""
    return np.round(matplotlib.colormaps[colours](np.linspace(0, 1, 255))[:, :3] * 255).astype(np.uint8)


def render(volumes: dict[str, np.ndarray], state: State) -> np.ndarray:
    """Panes side by side as RGB, (H, W, 3) uint8. volumes: name -> (X, Y, Z) on one RAS+ grid."""
    lines = _crosshair(next(iter(volumes.values())).shape, state)
    return _side_by_side(panes(volumes, state), lines)


def _side_by_side(shown: dict[str, Pane], lines: np.ndarray | None) -> np.ndarray:
    pictures = []
    for pane in shown.values():
        picture = _table(pane.colours)[np.round(254 * pane.scaled()).astype(np.uint8)]
        if pane.under is not None:
            mr = 255 * pane.under[..., None]
            picture = np.round(mr + pane.opacity[..., None] * (picture - mr)).astype(np.uint8)
        if lines is not None:
            picture[lines] = CROSS
        pictures += [picture, np.full((len(picture), GAP, 3), GAP_GREY, np.uint8)]
    return np.concatenate(pictures[:-1], axis=1)


def _in_rows(shown: dict[str, Pane]) -> list[dict[str, Pane]]:
    """At most `COLUMNS` panes beside each other, spread evenly over the rows."""
    names = list(shown)
    columns = math.ceil(len(names) / math.ceil(len(names) / COLUMNS))
    return [{name: shown[name] for name in names[k : k + columns]} for k in range(0, len(names), columns)]


@dataclass(frozen=True, eq=False)
class _Case:
    """RAS+ volumes with the words for them, and the state to start from."""

    volumes: dict[str, np.ndarray]
    affine: np.ndarray
    title: str
    start: State

    @classmethod
    def of(cls, scan: Scan, restored: Any, arrays: Mapping[str, Any]) -> _Case:
        mean = getattr(restored, "mean", None)  # of an array, a method
        mean = restored if mean is None or callable(mean) else mean
        given = {"LPET": scan.lpet, "SPET": scan.spet, "MR": scan.mr, "restored": mean}
        if getattr(restored, "settings", {}).get("n_samples", 1) > 1:
            given["SD"] = restored.std
        title = f"{scan.name}, DRF {scan.dose_reduction:g}"
        return cls.of_volumes(given | arrays, title, scan.unit, scan.affine)

    @classmethod
    def of_volumes(cls, given: Mapping[str, Any], title: str, unit: str, affine: np.ndarray) -> _Case:
        """The first volume sets the grid: a NIfTI file by its own affine, an array by `affine`."""
        images, first = {}, None
        for name, value in given.items():
            if value is not None:
                images[name] = _image(name, value, affine, first)
                first = first or (name, images[name])
        if not images:
            raise ValueError("explore: expected at least one volume, found none; pass name -> array or NIfTI path")
        images = {name: nib.as_closest_canonical(image) for name, image in images.items()}
        heads = [image for name, image in images.items() if name in ("LPET", "MR")] or list(images.values())
        box = _head_box([np.asarray(image.dataobj) for image in heads])
        images = {name: image.slicer[box] for name, image in images.items()}
        volumes, affine = {n: np.asarray(i.dataobj) for n, i in images.items()}, next(iter(images.values())).affine
        pet = next(volumes[name] for name in ("SPET", "restored", "LPET", *volumes) if name in volumes)
        high = _bound(pet.clip(min=0), 99.9, 1.0)
        reference = _reference(volumes)
        change = volumes["restored"] - volumes[reference] if "restored" in volumes and reference else pet
        own = {n: (min(0.0, float(v.min())), _bound(v, 99.5, 1.0)) for n, v in volumes.items() if _own(n)}
        plane = next((p for p, axis in PLANES.items() if pet.shape[axis] == 1), "axial")
        voxel_size = tuple(nib.affines.voxel_sizes(affine).tolist())
        middle, difference = pet.shape[PLANES[plane]] // 2, _bound(change, 99.5, high / 10)
        start = State(plane, middle, (0.0, high), difference, own, voxel_size=voxel_size, unit=unit)
        return cls(volumes, affine, title, start)

    @property
    def shape(self) -> tuple[int, ...]:
        return next(iter(self.volumes.values())).shape

    def marks(self, state: State) -> tuple[str, str, str, str]:
        """The patient's sides at the left, top, right and bottom of a pane, as letters."""
        codes = nib.aff2axcodes(self.affine)
        right, top = codes[1 if state.plane == "sagittal" else 0], codes[1 if state.plane == "axial" else 2]
        left, right = (right, OPPOSITE[right]) if state.radiological else (OPPOSITE[right], right)
        return left, top, right, OPPOSITE[top]

    def mm(self, voxel: Any) -> np.ndarray:
        return nib.affines.apply_affine(self.affine, voxel)

    def place(self, state: State) -> str:
        axis = PLANES[state.plane]
        voxel = (np.array(self.shape) - 1) / 2
        voxel[axis] = state.index
        return f"{'xyz'[axis]} = {self.mm(voxel)[axis]:.1f} mm"

    def sentence(self, *states: State) -> str:
        """Plane, slice, position, window and side; of further states the position."""
        state, (left, top, *_) = states[0], (SIDES[mark] for mark in self.marks(states[0]))
        places = " and ".join(self.place(s) for s in states)
        return (
            f"{state.plane} slice {state.index + 1} of {self.shape[PLANES[state.plane]]}, {places}; PET window "
            f"{state.window[0]:.4g} to {state.window[1]:.4g} {state.unit}{', MR under PET' * (state.blend > 0)}; "
            f"patient's {left} on the left, {top} up"
        )

    def description(self, *states: State) -> str:
        return f"{self.title}: {', '.join(panes(self.volumes, states[0]))}; {self.sentence(*states)}."

    def at(self, voxel: tuple[int, int, int], state: State) -> dict[str, tuple[float, str]]:
        """Pane -> (value, [unit]) at a voxel."""
        one = {name: volume[tuple(slice(k, k + 1) for k in voxel)] for name, volume in self.volumes.items()}
        shown = panes(one, replace(state, index=0))
        return {n: (float(p.image[0, 0]), "".join(p.meaning.partition("[")[1:])) for n, p in shown.items()}

    def caption(self, state: State) -> str:
        """The sentence for the reader, as HTML; with a crosshair, the values where it stands."""
        lines = [self.sentence(state)]
        if state.cross is not None:
            values = (f"{name} {value:.4g} {unit}" for name, (value, unit) in self.at(state.cross, state).items())
            place = ", ".join(f"{v:.1f}" for v in self.mm(state.cross))
            lines.append(f"crosshair at ({place}) mm: {', '.join(values)}")
        return "<br>".join(html.escape(line, quote=False) for line in lines)

    def screen(self, state: State) -> tuple[list[_Row], str, str]:
        """Rows of panes, their colour bars as HTML, and the largest sensible width as CSS."""
        shown, marks, lines = panes(self.volumes, state), self.marks(state), _crosshair(self.shape, state)
        pictures = [(list(row), _side_by_side(row, lines)) for row in _in_rows(shown)]
        full = pictures[0][1].shape[1]
        rows = [_Row.of(names, picture, marks, full) for names, picture in pictures]
        bars = f'<div style="line-height:1.4">{"".join(dict.fromkeys(_bar(pane) for pane in shown.values()))}</div>'
        most = 1200 if len(rows) == 1 else 225 * len(pictures[0][0])  # two rows should fit on a laptop
        return rows, bars, f"{min(most, 4 * full)}px"

    def scroll(self, state: State, group: str) -> str:
        """All slices (of many, `STILLS`) as HTML that needs no kernel and no script: a bar of radio buttons, one per
        slice. group: a name for them that no other bar of the page has."""
        states = {s.index: s for s in [*self.spread(state, STILLS), state]}
        items = []
        for shown in sorted(states.values(), key=lambda s: s.index):
            rows, bars, width = self.screen(shown)
            panels = "".join(row.page(html.escape(self.description(shown))) for row in rows)
            checked = " checked" * (shown.index == state.index)
            label = html.escape(self.sentence(shown))
            items.append(f'<input type="radio" name="{group}" aria-label="{label}"{checked}>')
            items.append(f"<div>{panels}{bars}{self.caption(shown)}</div>")
        style = f"grid-template-columns:repeat({len(states)},1fr);max-width:{width}"
        return f'{_SCROLL}<div class="mfdiff-scroll" style="{style}">{"".join(items)}</div>'

    def spread(self, state: State, n_slices: int) -> list[State]:
        """The same view of slices spread evenly over the volume; for one slice, the state itself."""
        count = self.shape[PLANES[state.plane]]
        inner = np.linspace(count - 1, 0, n_slices + 2)[1:-1].round() if n_slices < count else np.arange(count)[::-1]
        return [state] if n_slices == 1 else [replace(state, index=int(k)) for k in inner]

    def montage(self, states: list[State]) -> Figure:
        """Rows: states; columns: panes, each with its colour bar."""
        rows = [panes(self.volumes, state) for state in states]
        names, (height, width) = list(rows[0]), next(iter(rows[0].values())).image.shape
        size = (max(2.1 * len(names) + 0.4, 4.5), len(rows) * min(2.1 * height / width, 4) + 1.4)
        fig = Figure(size, facecolor="white", layout="constrained")
        fig.get_layout_engine().set(h_pad=0.07)
        axes = fig.subplots(len(rows), len(names), squeeze=False)
        for j, name in enumerate(names):
            for i, row in enumerate(rows):
                drawn = _draw(axes[i, j], row[name], self.marks(states[i]), _crosshair(self.shape, states[i]))
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


class _Row(NamedTuple):
    """Panes beside each other on a screen: HTML above and below the picture, and their share of the full width."""

    titles: str
    picture: np.ndarray
    feet: str
    width: str

    @classmethod
    def of(cls, names: list[str], picture: np.ndarray, marks: tuple[str, ...], full: int) -> _Row:
        left, top, right, bottom = (f"<span>{mark}</span>" for mark in marks)
        line = f'<div style="display:flex;justify-content:space-between">{left}{top}{right}</div>'
        width = picture.shape[1]
        style = (
            "display:grid;align-items:end;text-align:center;line-height:1.3;"
            f"grid-template-columns:repeat({len(names)},minmax(0,1fr));column-gap:{100 * GAP / width:.3f}%"
        )
        above, below = [f"<div><b>{html.escape(name)}</b>{line}</div>" for name in names], [bottom] * len(names)
        titles, feet = (f'<div style="{style}">{"".join(cells)}</div>' for cells in (above, below))
        pixels = "<style>.mfdiff-slices{image-rendering:pixelated}</style>"
        return cls(pixels + titles, picture, feet, f"{100 * width / full:.2f}%")

    def page(self, alt: str) -> str:
        data = b64encode(_encoded(self.picture, "JPEG")).decode()
        image = f'<img alt="{alt}" class="mfdiff-slices" style="width:100%" src="data:image/jpeg;base64,{data}">'
        return f'<div style="width:{self.width}">{self.titles}{image}{self.feet}</div>'


def _draw(ax: Any, pane: Pane, marks: tuple[str, str, str, str], lines: np.ndarray | None) -> Any:
    show = partial(ax.imshow, interpolation="nearest")  # voxels as they are; and the file is half as large
    if pane.under is not None:
        show(pane.under, "gray", vmin=0, vmax=1)
    colours = matplotlib.colormaps[pane.colours]
    drawn = show(pane.image, colours, vmin=pane.low, vmax=pane.high, alpha=pane.opacity)
    if lines is not None:
        show(lines[..., None] * np.append(CROSS, 255).astype(np.uint8))
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    outline = [withStroke(linewidth=2.5, foreground="white")]  # readable on any pane
    places = ((0.02, 0.5, "left", "center"), (0.5, 0.98, "center", "top"), (0.98, 0.5, "right", "center"),
              (0.5, 0.02, "center", "bottom"))  # fmt: skip
    strip = 3 * pane.image.shape[0] < pane.image.shape[1]  # too low for marks above each other
    for (x, y, across, down), mark in zip(places, marks, strict=True):
        if strip and x == 0.5:
            continue
        ax.text(
            x, y, mark, ha=across, va=down, transform=ax.transAxes, fontsize=10, weight="bold", path_effects=outline
        )
    return drawn


def _image(name: str, value: Any, affine: np.ndarray, first: tuple[str, nib.Nifti1Image] | None) -> nib.Nifti1Image:
    """An array or tensor (on `affine`, or the grid of the first volume), or a NIfTI path, as a float32 image."""
    if isinstance(value, str | PathLike):
        image = nib.Nifti1Image(*load_volume(fspath(value)))
        if first and not (image.shape == first[1].shape and np.allclose(image.affine, first[1].affine, atol=1e-3)):
            image = resample_from_to(image, first[1], order=1)
    else:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, np.float32)
        array = array[..., None] if array.ndim == 2 else array
        if array.ndim != 3:
            raise ValueError(f"{name}: expected one 3-D volume or a 2-D slice, found shape {array.shape}")
        if first and array.shape != first[1].shape:
            expected = f"expected the {first[0]}'s grid {first[1].shape}, found {array.shape}"
            raise ValueError(f"{name}: {expected}; resample it first")
        image = nib.Nifti1Image(array, first[1].affine if first else affine)
    if not np.isfinite(np.asarray(image.dataobj)).all():
        raise ValueError(f"{name}: expected finite values, found NaN or infinite voxels; find out where they come from")
    return image


def _head_box(volumes: list[np.ndarray], margin: int = 4) -> tuple[slice, slice, slice]:
    """The box in X and Y outside which there is only air, with a margin; all slices keep their numbers."""
    head = np.any([v > 0.2 * np.percentile(v, 99.5) for v in volumes], axis=0)
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
    """Linked panes with controls for plane, slice, window, colours and side. Made by `explore`.

    Controls: `plane`, `slice` (of that plane, from 1), `window`, `blend`, `pet_map`, `radiological`, `crosshair`;
    `state` is what they say, `values` what the panes say at the crosshair. The crosshair stands where the slices of
    the three planes meet. Where no front end runs, all slices of the plane stand in, with a text alternative each.
    """

    def __init__(self, case: _Case):
        start, self._case, self._shown = case.start, case, None
        flat, high = 1 in case.shape, start.window[1]
        extremes = [f(v) for n, v in case.volumes.items() if not _own(n) for f in (np.min, np.max)] or [0.0]
        bottom, top = min(0.0, *extremes), max(2 * high, *extremes)
        digits = f".{max(0, 2 - math.floor(math.log10(high)))}f"
        short = {"description_width": "initial"}
        wide, free = {"style": short, "layout": {"width": "28em"}}, {"indent": False, "layout": {"width": "auto"}}
        self.plane = widgets.ToggleButtons(
            options=list(PLANES),
            value=start.plane,
            description="Plane",
            disabled=flat,
            style=short | {"button_width": "6em"},
        )
        self._positions, self._position_rows = {}, {}
        for plane, axis in PLANES.items():
            span = {"value": case.shape[axis] // 2 + 1, "min": 1, "max": case.shape[axis], "disabled": flat}
            slider, play = widgets.IntSlider(description=f"{plane} slice", **span, **wide), widgets.Play(**span)
            widgets.jslink((slider, "value"), (play, "value"))
            self._positions[plane], self._position_rows[plane] = slider, widgets.HBox([slider, play])
        self.window = widgets.FloatRangeSlider(
            value=start.window, min=bottom, max=top, step=high / 100, readout_format=digits,
            description=f"Window [{start.unit}]", **wide,
        )  # fmt: skip
        self.blend = widgets.FloatSlider(0, min=0, max=2, step=0.1, description="MR under PET", **wide)
        self.pet_map = widgets.Dropdown(options=PET_MAPS, value=start.pet_map, description="PET colours", style=short)
        self.radiological = widgets.Checkbox(start.radiological, description="radiological", **free)
        self.crosshair = widgets.Checkbox(False, description="crosshair and values", **free)
        self._rows = [_row_of_widgets() for _ in case.screen(start)[0]]
        self.titles, self.image, _ = self._rows[0].children
        self.bars, self.caption, self.error = (widgets.HTML(layout=NO_MARGIN) for _ in range(3))
        self._view = widgets.VBox([*self._rows, self.bars, self.caption])
        rows = (
            [self.plane, self.radiological, self.crosshair],
            list(self._position_rows.values()),
            [self.window, self.pet_map, *([self.blend] if "MR" in case.volumes and len(case.volumes) > 1 else [])],
        )
        controls = [widgets.HBox(row, layout={"flex_flow": "row wrap", "grid_gap": "0 1em"}) for row in rows]
        super().__init__([*controls, self._view, self.error])
        self._update()
        looks = (self.plane, self.window, self.blend, self.pet_map, self.radiological, self.crosshair)
        for control in (*looks, *self._positions.values()):
            control.observe(self._update, "value")

    @property
    def slice(self) -> widgets.IntSlider:
        """The slider of the present plane."""
        return self._positions[self.plane.value]

    @property
    def state(self) -> State:
        """What the controls say."""
        names = ("plane", "window", "blend", "pet_map", "radiological")
        look = {name: getattr(self, name).value for name in names} | {"index": self.slice.value - 1}
        return replace(self._case.start, cross=self._voxel if self.crosshair.value else None, **look)

    @property
    def _voxel(self) -> tuple[int, int, int]:
        return tuple(self._positions[plane].value - 1 for plane in sorted(PLANES, key=PLANES.get))

    @property
    def position(self) -> tuple[float, float, float]:
        """Where the slices of the three planes meet, (x, y, z) in mm, RAS+."""
        return tuple(self._case.mm(self._voxel).tolist())

    @property
    def values(self) -> dict[str, float]:
        """Pane -> value of the voxel at `position`, in the pane's unit."""
        return {name: value for name, (value, _) in self._case.at(self._voxel, self.state).items()}

    def go_to(self, mm: tuple[float, float, float]) -> None:
        """Put the crosshair into the voxel nearest to (x, y, z) [mm]. Raises ValueError outside the volume."""
        voxel = np.round(nib.affines.apply_affine(np.linalg.inv(self._case.affine), mm)).astype(int)
        if not all(0 <= k < n for k, n in zip(voxel, self._case.shape, strict=True)):
            corners = [np.round(self._case.mm(k), 1).tolist() for k in ((0, 0, 0), np.array(self._case.shape) - 1)]
            raise ValueError(f"go_to: expected a place between {corners[0]} and {corners[1]} mm, found {list(mm)}")
        for plane, axis in PLANES.items():
            self._positions[plane].value = int(voxel[axis]) + 1
        self.crosshair.value = True

    def figure(self, n_slices: int = 3) -> Figure:
        """A montage in the present plane, window and colours; `n_slices=1` is the present slice."""
        return self._case.montage(self._case.spread(self.state, n_slices))

    def _update(self, change: Any = None) -> None:
        """Controls -> picture. Whatever goes wrong is shown below it and raised."""
        try:
            state = self.state
            if state != self._shown:
                self._show(state)
            self._shown, self.error.value = state, ""
        except Exception:
            style = "border-left:4px solid #d33;padding-left:.5em"  # the theme's own colours for the text
            self.error.value = f'<pre role="alert" style="{style}">{html.escape(traceback.format_exc())}</pre>'
            raise

    def _show(self, state: State) -> None:
        rows, self.bars.value, self._view.layout.max_width = self._case.screen(state)
        for box, row in zip(self._rows, rows, strict=True):
            titles, image, feet = box.children
            titles.value, image.value, feet.value = row.titles, _encoded(row.picture), row.feet
            box.layout.width = row.width
        for plane, box in self._position_rows.items():
            box.layout.display = None if plane == state.plane or state.cross else "none"
        words = self._case.caption(state)
        self.caption.value = f'<div role="status" aria-live="polite" style="line-height:1.4">{words}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        still = {
            "text/html": self._case.scroll(self.state, f"mfdiff-{self.model_id}"),
            "text/plain": f"Slice explorer. {self._case.description(self.state)}",
        }
        return super()._repr_mimebundle_(**kwargs) | still


def _bar(pane: Pane) -> str:
    colours = ",".join(f"#{bytes(colour).hex()}" for colour in _table(pane.colours)[::16])
    style = f"display:inline-block;width:7em;height:.8em;background:linear-gradient(90deg,{colours})"
    strip = f'{pane.low:.3g} <span style="{style};border:1px solid grey"></span> {pane.high:.3g}'
    return f'<span style="display:inline-block;margin-right:2em">{strip} {html.escape(pane.meaning)}</span>'


def _row_of_widgets() -> widgets.VBox:
    image = widgets.Image(layout=NO_MARGIN | {"width": "100%", "height": "auto"}).add_class("mfdiff-slices")
    return widgets.VBox([widgets.HTML(layout=NO_MARGIN), image, widgets.HTML(layout=NO_MARGIN)])


def _encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind, compress_level=1, quality=90, subsampling=0)  # the last two: of a JPEG
    return out.getvalue()


def _still(fig: Figure, alt: str) -> str:
    out = io.BytesIO()
    fig.draw_without_rendering()  # the layout settles: drawn once, a title can lie on those of the panels
    fig.savefig(out, format="png", dpi=90, facecolor="white", bbox_inches="tight")  # labels that it left no room too
    data = b64encode(out.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" style="max-width:100%" src="data:image/png;base64,{data}">'


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


def explore(
    scan: Scan | Mapping[str, Any],
    restored: Any = None,
    voxel_size: float | tuple[float, float, float] = 2.0,
    unit: str = "input unit",
    **arrays: Any,
) -> SliceExplorer:
    """Look through a case with sliders; show it as the last line of a notebook cell.

    scan: a `Scan`, or any volumes as name -> array, tensor or NIfTI path. The first sets the grid; files on another one
    are resampled to it, arrays must have its shape. restored: a `Restoration`, or one such volume. arrays: more of them
    by name, with the PET window; names that begin with "MR", "SD" or "gate" have windows of their own. voxel_size [mm],
    unit: of volumes that are not in a `Scan`. A 2-D slice leaves no plane or slice to choose. Raises ValueError for
    another shape and for NaN, OSError for a file that cannot be read.
    """
    if isinstance(scan, Mapping):
        affine = np.diag([*np.broadcast_to(np.asarray(voxel_size, float), 3), 1.0])
        given = {**scan, **({} if restored is None else {"restored": restored}), **arrays}
        return SliceExplorer(_Case.of_volumes(given, "volumes", unit, affine))
    gate = getattr(restored, "gate", None) if scan.mr is not None else None
    return SliceExplorer(_Case.of(scan, restored, {**arrays, "gate": arrays.get("gate", gate)}))


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


def show(fig: Figure, alt: str) -> None:
    """Show a figure in a notebook, with the text that a screen reader reads out in its place, and close it.

    Of a figure that a cell leaves open, Jupyter makes a picture without any text.
    """
    display({"text/html": _still(fig, alt), "text/plain": alt}, raw=True)
    plt.close(fig)


def report_html(scan: Scan, restored: Any, lines: dict[str, str]) -> str:
    """A page that stands alone: the figure, `lines` (what -> value) as a table, all axial slices behind a bar. No
    scripts, nothing loaded."""
    case, states = _for_print(scan, restored, 3)
    title = html.escape(f"{scan.name}: PET restoration")
    cells = [(html.escape(str(what)), html.escape(str(value))) for what, value in lines.items()]
    rows = "\n".join(f'<tr><th scope="row">{what}</th><td>{value}</td></tr>' for what, value in cells)
    picture, slices = _still(case.montage(states), case.description(*states)), case.scroll(case.start, "slices")
    return _PAGE.format(title=title, picture=picture, rows=rows, slices=slices)


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


def _for_print(scan: Scan, restored: Any, n_slices: int) -> tuple[_Case, list[State]]:
    case = _Case.of(scan, restored, {})
    return case, case.spread(case.start, n_slices)

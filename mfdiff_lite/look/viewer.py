"""The viewer of a notebook, a page and a report: Python's side of `viewer.js`, which draws it.

A `Viewer` is a widget that any other widget can be linked to. What a notebook holds of it is HTML: a still picture and
the data; where scripts run, the viewer takes the picture's place, with or without a kernel.
"""

from __future__ import annotations

import gzip
import html
import io
import itertools
import json
import secrets
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import nibabel as nib
import numpy as np
import traitlets as t
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from .page import document, img, montage
from .panes import LABELS, PET_MAPS, PLANES, Case, Pane, State, own_kind, side_by_side, table

if TYPE_CHECKING:
    from ..scan import Scan

SCRIPT = Path(__file__).with_name("viewer.js")
LEVELS = {None: 255, "MR": 255, "SD": 127, "gate": 100, "change": 127}  # steps inside the window of a kind; None is PET
COMPARE = ("side", "flicker", "curtain", "checker")
ENDS = {"gate": ["0: PET alone", "", "1: MR in full"]}
DARK = "difference in the dark"


class Viewer(anywidget.AnyWidget):
    """Linked panes of a case, made by `explore` and `knobs`. Every control is a trait: read it, set it, link it.

    plane: axial, coronal, sagittal, or ortho for all three. cross: voxel (x, y, z) where the planes meet, RAS+, from 0,
    of the box shown. slice: of the present plane, from 1. window: (low, high) of all PET panes; windows: of the others
    by name; difference: its panes go from - to + that. pet_map; radiological; smooth: interpolate; crosshair: lines and
    values; blend: of the MR under the PET. compare: side, flicker, curtain or checker of the `pair`; swap: flicker's
    other image; split: where the curtain is, 0 to 1. contours: of the truth's lesions, tissues. roi, line: what was
    drawn, or None. zoom, centre: voxel in the middle. show: names of the panes, none for all. pick: the choice of each
    knob, from 0. hunt, marks: the lesion hunt, and where it was clicked.
    """

    _esm = SCRIPT
    key = t.Unicode().tag(sync=True)
    plane = t.Enum([*PLANES, "ortho"], "axial").tag(sync=True)
    cross = t.List(t.Int(), [0, 0, 0]).tag(sync=True)
    slice = t.Int(1).tag(sync=True)
    window = t.List(t.Float(), [0.0, 1.0]).tag(sync=True)
    windows = t.Dict().tag(sync=True)
    difference = t.Float(1.0).tag(sync=True)
    pet_map = t.Enum(list(PET_MAPS.values()), "gray_r").tag(sync=True)
    radiological = t.Bool(True).tag(sync=True)
    blend = t.Float(0.0, min=0, max=2).tag(sync=True)
    smooth = t.Bool(False).tag(sync=True)
    crosshair = t.Bool(False).tag(sync=True)
    compare = t.Enum(COMPARE, "side").tag(sync=True)
    pair = t.List(t.Unicode()).tag(sync=True)
    swap = t.Bool(False).tag(sync=True)
    split = t.Float(0.5, min=0, max=1).tag(sync=True)
    contours = t.List(t.Enum(LABELS)).tag(sync=True)
    roi = t.Dict(allow_none=True, default_value=None).tag(sync=True)
    line = t.Dict(allow_none=True, default_value=None).tag(sync=True)
    zoom = t.Float(1.0, min=1, max=16).tag(sync=True)
    centre = t.List(t.Float()).tag(sync=True)
    show = t.List(t.Unicode()).tag(sync=True)
    pick = t.List(t.Int()).tag(sync=True)
    hunt = t.Bool(False).tag(sync=True)
    marks: t.List = t.List().tag(sync=True)

    def __init__(self, case: Case, choices: Mapping[str, Sequence[Any]] | None = None, numbers: Any = None,
                 curve: tuple[str, str] | None = None):  # fmt: skip
        self._case, start = case, case.start
        self._choices = {name: [str(one) for one in some] for name, some in (choices or {}).items()}
        self._numbers, self._curve, names = numbers or {}, curve, list(case.panes(start))
        cross = [n // 2 for n in case.shape]
        super().__init__(
            key=secrets.token_hex(8), plane=start.plane, cross=cross, slice=cross[PLANES[start.plane]] + 1,
            window=list(start.window), windows={n: list(w) for n, w in start.own_windows.items()},
            difference=start.difference, pair=_pair(names), centre=[(n - 1) / 2 for n in case.shape],
            pick=[len(some) // 2 for some in self._choices.values()],
        )  # fmt: skip
        self.on_msg(self._answer)

    # --- what it shows -------------------------------------------------------------------------------------------

    @t.validate("cross")
    def _inside(self, proposal: Any) -> list[int]:
        voxel = [int(k) for k in proposal["value"]]
        if len(voxel) != 3 or not all(0 <= k < n for k, n in zip(voxel, self._case.shape, strict=False)):
            raise ValueError(f"cross: expected a voxel inside {self._case.shape}, found {voxel}")
        return voxel

    @t.observe("plane", "cross")
    def _follow_cross(self, change: Any) -> None:
        self.slice = self.cross[self._through] + 1

    @t.observe("slice")
    def _follow_slice(self, change: Any) -> None:
        if self.cross[self._through] != self.slice - 1:
            self.cross = [self.slice - 1 if axis == self._through else k for axis, k in enumerate(self.cross)]

    @property
    def _through(self) -> int:
        return PLANES.get(self.plane, PLANES["axial"])

    @property
    def _voxel(self) -> tuple[int, int, int]:
        x, y, z = self.cross
        return x, y, z

    @property
    def look(self) -> dict[str, Any]:
        """Every control's value, as `set` takes them."""
        own = [name for name in self.traits(sync=True) if name in Viewer.__dict__ and name not in ("key", "_esm")]
        return {name: getattr(self, name) for name in own}

    @property
    def _shown(self) -> Case:
        index = int(np.ravel_multi_index(self.pick, [len(c) for c in self._choices.values()])) if self._choices else 0
        return self._case.picked(index)

    @property
    def state(self) -> State:
        """What a figure of the present slice needs."""
        own = {name: tuple(window) for name, window in self.windows.items()}
        return State(
            "axial" if self.plane == "ortho" else self.plane, self.cross[self._through],
            (self.window[0], self.window[1]), self.difference, own, self.pet_map, self.radiological, self.blend,
            self._voxel if self.crosshair else None, self._case.start.voxel_size, self._case.start.unit,
        )  # fmt: skip

    @property
    def position(self) -> tuple[float, float, float]:
        """Where the planes meet, (x, y, z) in mm, RAS+."""
        return tuple(self._case.mm(self.cross).tolist())

    @property
    def values(self) -> dict[str, float]:
        """Pane -> value of the voxel at `position`, in the pane's unit."""
        return {name: value for name, (value, _) in self._shown.at(self._voxel, self.state).items()}

    def set(self, **state: Any) -> Viewer:
        """Set some traits and return the viewer: `explore(scan).set(plane="ortho", smooth=True)`; its button "copy"
        makes such a call. Raises ValueError for a name that is none, TraitError for a value that does not fit."""
        unknown = sorted(set(state) - set(self.look))
        if unknown:
            raise ValueError(f"set: expected some of {', '.join(self.look)}, found {', '.join(unknown)}")
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        return self

    def go_to(self, mm: tuple[float, float, float]) -> Viewer:
        """Put the crosshair into the voxel nearest to (x, y, z) [mm]. Raises ValueError outside the volume."""
        voxel = np.round(nib.affines.apply_affine(np.linalg.inv(self._case.affine), mm)).astype(int)
        if not all(0 <= k < n for k, n in zip(voxel, self._case.shape, strict=True)):
            corners = [np.round(self._case.mm(k), 1).tolist() for k in ((0, 0, 0), np.array(self._case.shape) - 1)]
            raise ValueError(f"go_to: expected a place between {corners[0]} and {corners[1]} mm, found {list(mm)}")
        self.cross, self.crosshair = voxel.tolist(), True
        return self

    def figure(self, n_slices: int = 3) -> Figure:
        """A montage in the present plane, window and colours; `n_slices=1` is the present slice."""
        return montage(self._shown, self._shown.spread(self.state, n_slices))

    # --- its homes -----------------------------------------------------------------------------------------------

    def html(self) -> str:
        """The viewer as a piece of HTML that needs no kernel and no network: a still with a text alternative, and the
        data and the script that take its place where scripts run."""
        meta, blob = self._packed
        data = json.dumps({"meta": meta | {"state": self.look}, "data": b64encode(blob).decode()})
        data, script = data.replace("</", "<\\/"), SCRIPT.read_text("utf-8").replace("export default", "return")
        start = f'(() => {{ "use strict";\n{script}}})().mount(document.currentScript.parentElement);'
        block = f'<script type="application/json">{data}</script>'
        return f'<div class="mfdiff-viewer"><div>{self._still()}</div>{block}<script>{start}</script></div>'

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write a page that stands alone; it opens from disk in any browser. Raises OSError if the file exists and
        `force` is off."""
        from ..files import whole_file

        with whole_file(Path(path), force) as partial:
            partial.write_text(document(self._case.title, self.html()), "utf-8")
        return Path(path)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, str], dict[str, Any]]:
        # HTML alone: a view of a widget that is reopened without its kernel is an error message. The widget's model is
        # in the page all the same, and the viewer in the HTML finds it by `key`.
        return {"text/html": self.html(), "text/plain": f"Viewer. {self._words}"}, {}

    @property
    def _words(self) -> str:
        turned = [f"{name}: {some[k]}" for (name, some), k in zip(self._choices.items(), self.pick, strict=True)]
        return "; ".join([*([self._case.description(self.state)] if self._case.volumes else []), *turned])

    def _still(self) -> str:
        rows = _rows(self._choices, self._numbers)
        if not self._case.volumes:
            return rows
        picture, shown = _drawn(self._shown, self.state, self.show), io.BytesIO()
        picture.save(shown, "JPEG", quality=88)
        look = 'style="max-width:100%"'
        return img(self._words, look, "jpeg", shown.getvalue()) + rows

    def _answer(self, widget: Any, content: Any, buffers: Any) -> None:
        if content.get("kind") == "volumes":  # of a widget among widgets: it asks for what no trait holds
            meta, blob = self._packed
            self.send({"kind": "volumes", "meta": meta | {"state": self.look}}, [blob])

    @cached_property
    def _packed(self) -> tuple[dict[str, Any], bytes]:
        """What the script needs to know, and the volumes, quantised and compressed."""
        case, blob, start = self._case, bytearray(), self._case.start
        volumes = {name: [_add(blob, one) for one in case.quantised(name, LEVELS)] for name in case.volumes}
        labels = {name: _add(blob, {"labels": True}, v) for name, v in case.labels.items() if name in LABELS}
        kinds = case.panes(start)
        maps = {one: table(one) for one in {*PET_MAPS.values(), "gray", *(pane.colours for pane in kinds.values())}}
        maps[DARK] = _dark()
        meta = {
            "key": self.key, "title": case.title, "shape": case.shape, "affine": case.affine.tolist(),
            "voxel_size": start.voxel_size, "unit": start.unit, "volumes": volumes, "labels": labels,
            "panes": [_described(name, pane, case.volumes) for name, pane in kinds.items()],
            "lesions": case.visible, "pet_maps": PET_MAPS,
            "maps": {name: b64encode(colours.tobytes()).decode() for name, colours in maps.items()},
            "knobs": [{"name": name, "choices": some} for name, some in self._choices.items()],
            "numbers": {name: list(map(_number, values)) for name, values in self._numbers.items()},
            "curve": self._curve,
        }  # fmt: skip
        return meta, bytes(blob)


def _pair(names: list[str]) -> list[str]:
    first = [name for name in names if name in ("LPET", "restored", "SPET")][-2:]
    return first if len(first) == 2 else (names * 2)[:2]


def _number(value: Any) -> Any:
    return value if isinstance(value, str) else float(value) if np.isfinite(value) else None


def _dark() -> np.ndarray:
    """A diverging map whose centre is black, for pages in the dark: blue below, red above."""
    v = np.linspace(-1, 1, 255)[:, None]
    ends = np.where(v < 0, [90, 170, 255], [255, 120, 90])
    return np.round(20 + abs(v) * (ends - 20)).astype(np.uint8)


def _described(name: str, pane: Pane, volumes: Mapping[str, Any]) -> dict[str, Any]:
    kind = (own_kind(name) or "PET") if name in volumes else "difference"
    unit = pane.meaning.partition("[")[2].rstrip("]")
    found: dict[str, Any] = {"name": name, "kind": kind, "map": pane.colours, "unit": "" if kind == "MR" else unit}
    if kind == "difference":
        found["of"] = name.split(" - ")
    return found | ({"ends": ENDS[kind]} if kind in ENDS else {})


def _add(blob: bytearray, part: dict[str, Any], volume: np.ndarray | None = None) -> dict[str, Any]:
    """Append a volume, x fastest, gzipped; of 16 bits as two planes of bytes of its differences from voxel to voxel."""
    part = dict(part)
    q = part.pop("q") if volume is None else volume.astype(np.uint8)
    flat = np.ascontiguousarray(q.transpose(2, 1, 0)).ravel()
    if volume is None:
        steps = np.diff(flat.astype(np.int32), prepend=0).astype(np.int16)
        zigzag = ((steps << 1) ^ (steps >> 15)).view(np.uint16)
        flat = np.concatenate([zigzag & 255, zigzag >> 8]).astype(np.uint8)
    packed = gzip.compress(flat.tobytes(), 6, mtime=0)
    start = blob.find(packed)  # the same image of another alternative is stored once
    if start < 0:
        start = len(blob)
        blob += packed
    return part | {"start": start, "bytes": len(packed)}


def _rows(choices: Mapping[str, Sequence[str]], numbers: Mapping[str, Sequence[Any]]) -> str:
    """The numbers of all choices as an HTML table, for pages without scripts."""
    if not numbers:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (*choices, *numbers))
    body = []
    for k, chosen in enumerate(itertools.product(*choices.values())):
        cells = [*chosen, *(v[k] if isinstance(v[k], str) else f"{v[k]:.4g}" for v in numbers.values())]
        body.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    opened = " open" * (len(body) <= 8)
    return f"<details{opened}><summary>numbers</summary><table><tr>{head}</tr>{''.join(body)}</table></details>"


def _drawn(case: Case, state: State, show: Sequence[str] = ()) -> Image.Image:
    """The present slice of all panes as one picture, with their names, for places without scripts."""
    shown = {name: pane for name, pane in case.panes(state).items() if not show or name in show}
    columns = min(len(shown), 4)
    height, width = next(iter(shown.values())).image.shape
    scale = max(1, round(220 / width))
    cell = width * scale, height * scale
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", ((cell[0] + 6) * columns, (cell[1] + 20) * rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    left, top, right, _ = case.marks(state)
    for k, (name, pane) in enumerate(shown.items()):
        x, y = k % columns * (cell[0] + 6), k // columns * (cell[1] + 20)
        picture = Image.fromarray(side_by_side([pane], None)).resize(cell, Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y + 16))
        pen.text((x, y + 2), f"{name}   {left} | {right}", "black", font=font)
    return sheet


# --- what makes one ----------------------------------------------------------------------------------------------


def explore(
    scan: Scan | Mapping[str, Any], restored: Any = None, voxel_size: float | tuple[float, float, float] = 2.0,
    unit: str = "input unit", suv: tuple[float, float] | None = None, **arrays: Any,
) -> Viewer:  # fmt: skip
    """Look through a case with the mouse; show it as the last line of a notebook cell.

    scan: a `Scan`, or any volumes as name -> array, tensor or NIfTI path. The first sets the grid; files on another one
    are resampled to it, arrays must have its shape. restored: a `Restoration`, one such volume, or a dict of them, as
    `compare` takes it. arrays: more of them by name, with the PET window; names that begin with "MR", "SD", "gate"
    or "change" have windows of their own. voxel_size [mm], unit: of volumes that are not in a `Scan`. suv: (injected
    dose [MBq], weight [kg]) shows kBq/mL as SUV. A 2-D slice leaves no plane or slice to choose. Raises ValueError for
    another shape and for NaN, OSError for a file that cannot be read.
    """
    if isinstance(scan, Mapping):
        affine = np.diag([*np.broadcast_to(np.asarray(voxel_size, float), 3), 1.0])
        given = {**scan, **({} if restored is None else {"restored": restored}), **arrays}
        case = Case.of_volumes(given, "volumes", unit, affine)
    else:
        gate = getattr(restored, "gate", None) if scan.mr is not None else None
        case = Case.of(scan, restored, **{**arrays, "gate": arrays.get("gate", gate)})
    return Viewer(case if suv is None else case.in_suv(*suv))


def knobs(
    choices: Mapping[str, Sequence[Any]], images: Mapping[str, Any] | None = None,
    numbers: Mapping[str, Sequence[Any]] | None = None, curve: tuple[str, str] | None = None,
    scan: Scan | None = None, voxel_size: float | tuple[float, float, float] = 2.0, unit: str = "input unit",
) -> Viewer:  # fmt: skip
    """A viewer with knobs to turn: alternatives that are computed beforehand, so that it works without a kernel.

        mf.knobs({"dose reduction": [4, 20, 100]}, {"LPET": [low, lower, lowest], "SPET": spet}, scan=scan,
                 numbers={"noise [%]": [8, 18, 40], "bias [%]": [0, -1, -3]}, curve=("bias [%]", "noise [%]"))

    choices: knob -> its K choices; several knobs make K1 x K2 x ... alternatives, the last knob fastest. images: pane
    -> one volume (X, Y, Z) or slice (X, Y) for all, or a list of one per alternative. numbers: what -> one number or
    text per alternative, shown beside. curve: names of two numbers, drawn as points of which the present one is marked.
    scan: gives unit, voxel size and, for images of its shape, affine and the truth's contours; without it voxel_size
    [mm] and unit do. Without images the numbers stand alone. Raises ValueError for a list of another length.
    """
    count = int(np.prod([len(some) for some in choices.values()]))
    for name, some in (numbers or {}).items():
        if len(some) != count:
            raise ValueError(f"{name}: expected one value per alternative, {count}, found {len(some)}")
    if curve is not None and not set(curve) <= set(numbers or {}):
        raise ValueError(f"curve: expected two of {', '.join(numbers or {})}, found {curve}")
    size = voxel_size if scan is None else scan.voxel_size
    affine, truth, title = np.diag([*np.broadcast_to(np.asarray(size, float), 3), 1.0]), {}, "alternatives"
    if scan is not None:
        unit, title = scan.unit, scan.name
        image: Any = next(iter((images or {}).values()), None)
        if np.shape(image[0] if isinstance(image, list | tuple) else image) == scan.lpet.shape:  # or a part of the scan
            affine, truth = scan.affine, Case.truth(scan)
    case = Case.of_volumes(images or {}, title, unit, affine, count=count, **truth)
    return Viewer(case, choices, numbers, curve)

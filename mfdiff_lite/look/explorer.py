"""Linked panes with sliders in a notebook."""

from __future__ import annotations

import html
import math
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from .page import caption, encoded, montage, screen, scroll
from .panes import PET_MAPS, PLANES, Case, State, own_kind

if TYPE_CHECKING:
    from ..scan import Scan

NO_MARGIN = {"margin": "0"}
SHORT = {"description_width": "initial"}
WIDE, FREE = {"style": SHORT, "layout": {"width": "28em"}}, {"indent": False, "layout": {"width": "auto"}}


class SliceExplorer(widgets.VBox):
    """Linked panes with controls for plane, slice, window, colours and side. Made by `explore`.

    Controls: `plane`, `slice` (of that plane, from 1), `window`, `blend`, `pet_map`, `radiological`, `crosshair`;
    `state` is what they say, `values` what the panes say at the crosshair. The crosshair stands where the slices of
    the three planes meet. Where no front end runs, all slices of the plane stand in, with a text alternative each.
    """

    def __init__(self, case: Case):
        self._case, start, flat = case, case.start, 1 in case.shape
        self._shown: State | None = None
        self.plane = widgets.ToggleButtons(options=list(PLANES), value=start.plane, description="Plane", disabled=flat)
        self.plane.style = SHORT | {"button_width": "6em"}
        self._positions, self._position_rows = {}, {}
        for plane, axis in PLANES.items():
            span = {"value": case.shape[axis] // 2 + 1, "min": 1, "max": case.shape[axis], "disabled": flat}
            slider, play = widgets.IntSlider(description=f"{plane} slice", **span, **WIDE), widgets.Play(**span)
            widgets.jslink((slider, "value"), (play, "value"))
            self._positions[plane], self._position_rows[plane] = slider, widgets.HBox([slider, play])
        high, pet = start.window[1], [volume for name, volume in case.volumes.items() if not own_kind(name)]
        bottom, top = min([0.0, *map(np.min, pet)]), max([2 * high, *map(np.max, pet)])
        self.window = widgets.FloatRangeSlider(
            value=start.window, min=bottom, max=top, step=high / 100, description=f"Window [{start.unit}]",
            readout_format=f".{max(0, 2 - math.floor(math.log10(high)))}f", **WIDE,
        )  # fmt: skip
        self.blend = widgets.FloatSlider(0, min=0, max=2, step=0.1, description="MR under PET", **WIDE)
        self.pet_map = widgets.Dropdown(options=PET_MAPS, value=start.pet_map, description="PET colours", style=SHORT)
        self.radiological = widgets.Checkbox(start.radiological, description="radiological", **FREE)
        self.crosshair = widgets.Checkbox(False, description="crosshair and values", **FREE)
        self._rows = [_row_of_widgets() for _ in screen(case, start)[0]]
        self.titles, self.image, _ = self._rows[0].children
        self.bars, self.caption, self.error = (widgets.HTML(layout=NO_MARGIN) for _ in range(3))
        self._view = widgets.VBox([*self._rows, self.bars, self.caption])
        positions = list(self._position_rows.values())
        fusion = [self.blend] if "MR" in case.volumes and len(case.volumes) > 1 else []
        rows = [self.plane, self.radiological, self.crosshair], positions, [self.window, self.pet_map, *fusion]
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
        return tuple(self._positions[plane].value - 1 for plane in ("sagittal", "coronal", "axial"))

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
        return montage(self._case, self._case.spread(self.state, n_slices))

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
        rows, self.bars.value, self._view.layout.max_width = screen(self._case, state)
        for box, (above, picture, below, width) in zip(self._rows, rows, strict=True):
            titles, image, feet = box.children
            titles.value, image.value, feet.value, box.layout.width = above, encoded(picture), below, width
        for plane, box in self._position_rows.items():
            box.layout.display = None if plane == state.plane or state.cross else "none"
        words = caption(self._case, state)
        self.caption.value = f'<div role="status" aria-live="polite" style="line-height:1.4">{words}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        slices = scroll(self._case, self.state, f"mfdiff-{self.model_id}")
        text = f"Slice explorer. {self._case.description(self.state)}"
        return super()._repr_mimebundle_(**kwargs) | {"text/html": slices, "text/plain": text}


def _row_of_widgets() -> widgets.VBox:
    image = widgets.Image(layout=NO_MARGIN | {"width": "100%", "height": "auto"}).add_class("mfdiff-slices")
    return widgets.VBox([widgets.HTML(layout=NO_MARGIN), image, widgets.HTML(layout=NO_MARGIN)])


def explore(
    scan: Scan | Mapping[str, Any], restored: Any = None, voxel_size: float | tuple[float, float, float] = 2.0,
    unit: str = "input unit", **arrays: Any,
) -> SliceExplorer:  # fmt: skip
    """Look through a case with sliders; show it as the last line of a notebook cell.

    scan: a `Scan`, or any volumes as name -> array, tensor or NIfTI path. The first sets the grid; files on another one
    are resampled to it, arrays must have its shape. restored: a `Restoration`, one such volume, or a dict of them, as
    `compare` takes it. arrays: more of them by name, with the PET window; names that begin with "MR", "SD" or "gate"
    have windows of their own. voxel_size [mm], unit: of volumes that are not in a `Scan`. A 2-D slice leaves no plane
    or slice to choose. Raises ValueError for another shape and for NaN, OSError for a file that cannot be read.
    """
    if isinstance(scan, Mapping):
        affine = np.diag([*np.broadcast_to(np.asarray(voxel_size, float), 3), 1.0])
        given = {**scan, **({} if restored is None else {"restored": restored}), **arrays}
        return SliceExplorer(Case.of_volumes(given, "volumes", unit, affine))
    if isinstance(restored, Mapping):
        restored, arrays = None, {**restored, **arrays}
    gate = getattr(restored, "gate", None) if scan.mr is not None else None
    return SliceExplorer(Case.of(scan, restored, **{**arrays, "gate": arrays.get("gate", gate)}))

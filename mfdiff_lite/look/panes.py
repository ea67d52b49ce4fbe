"""What is on display: a case as volumes on one grid with the words for them, a state, the panes of a slice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import nibabel as nib
import numpy as np

if TYPE_CHECKING:
    from ..scan import Scan

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # plane -> the axis its slices are counted along
SIDES = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
OPPOSITE = {"R": "L", "A": "P", "S": "I"}
PET_MAPS = {"inverted grey": "gray_r", "grey": "gray"} | {name: name for name in ("hot", "inferno", "magma", "cividis")}
# Panes that are no activity image, by the first word of their name ("MR", "MR of another"); all others are PET.
OWN_MAPS = {"MR": "gray", "SD": "magma", "gate": "viridis", "change": "RdBu_r"}
LABELS = ("tissues", "lesions")  # of the truth, drawn as contours
GAP, GAP_GREY = 4, 150  # between panes: pixels, and a grey that shows beside white and beside black
CROSS = (0, 160, 215)  # a blue that shows on white, on grey and on every PET map
CROSS_GAP = 3  # voxels at each side of the crosshair's centre that it leaves free


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
        return np.nan_to_num((self.image - self.low) / max(self.high - self.low, 1e-30)).clip(0, 1)


def panes(volumes: dict[str, np.ndarray], state: State) -> dict[str, Pane]:
    """The slice of every volume; after "restored" its difference from the SPET or, without one, from the LPET."""
    cuts = {name: _upright(volume.take(state.index, PLANES[state.plane]), state) for name, volume in volumes.items()}
    reference, shown = _reference(cuts), {}
    for name, cut in cuts.items():
        if kind := own_kind(name):
            units = {"MR": "MR signal [arbitrary]", "SD": f"SD [{state.unit}]", "change": f"change [{state.unit}]"}
            meaning = units.get(kind, kind)
            shown[name] = Pane(cut, OWN_MAPS[kind], *state.own_windows.get(name, (0.0, 1.0)), meaning)
        else:
            shown[name] = Pane(cut, state.pet_map, *state.window, f"activity [{state.unit}]")
        if name == "restored" and reference:
            change, label = cut - cuts[reference], f"difference [{state.unit}]"
            shown[f"restored - {reference}"] = Pane(change, "RdBu_r", -state.difference, state.difference, label)
    if state.blend and "MR" in shown:
        mr, over = shown["MR"].scaled(), {"gray": "hot", "gray_r": "hot"}.get(state.pet_map, state.pet_map)
        for name in cuts:
            if not own_kind(name):
                shown[name] = shown[name]._replace(colours=over, under=mr, opacity=shown[name].scaled() ** state.blend)
    return shown


def own_kind(name: str) -> str | None:
    """Key of a pane in `OWN_MAPS`; None for PET."""
    return next((kind for kind in OWN_MAPS if kind in name.split()[:1]), None)


def _reference(volumes: dict[str, np.ndarray]) -> str | None:
    return next((name for name in ("SPET", "LPET") if name in volumes and "restored" in volumes), None)


def _upright(cut: np.ndarray, state: State) -> np.ndarray:
    """A slice of an (X, Y, Z) volume -> (H, W): anterior (axial) or superior up; square pixels, of the smaller side."""
    cut = cut.T[::-1, :: -1 if state.radiological else 1]
    sides = [state.voxel_size[a] for a in (2, 1, 0) if a != PLANES[state.plane]]  # down, across
    for direction, side in enumerate(sides):
        if side > 1.001 * min(sides):
            count = round(cut.shape[direction] * side / min(sides))
            cut = cut.take(((np.arange(count) + 0.5) * cut.shape[direction] / count).astype(int), direction)
    return cut


def crosshair(shape: tuple[int, ...], state: State) -> np.ndarray | None:
    """(H, W) bool: where its lines are, for volumes of this shape."""
    if state.cross is None:
        return None
    away = [abs(np.arange(n) - k) for n, k in zip(shape, state.cross, strict=True)]  # from its centre
    x, y = np.meshgrid(*(d for a, d in enumerate(away) if a != PLANES[state.plane]), indexing="ij")
    return _upright((np.minimum(x, y) == 0) & (np.maximum(x, y) > CROSS_GAP), state)


@lru_cache
def table(colours: str) -> np.ndarray:
    """A colour map, (255, 3) uint8: an odd number of entries, so that a diverging map has a centre."""
    return np.round(matplotlib.colormaps[colours](np.linspace(0, 1, 255))[:, :3] * 255).astype(np.uint8)


def render(volumes: dict[str, np.ndarray], state: State) -> np.ndarray:
    """Panes side by side as RGB, (H, W, 3) uint8. volumes: name -> (X, Y, Z) on one RAS+ grid."""
    return side_by_side(panes(volumes, state).values(), crosshair(next(iter(volumes.values())).shape, state))


def side_by_side(shown: Iterable[Pane], lines: np.ndarray | None) -> np.ndarray:
    """Panes of one height as RGB, (H, W, 3) uint8, with the lines of the crosshair in each."""
    pictures = []
    for pane in shown:
        picture = table(pane.colours)[np.round(254 * pane.scaled()).astype(np.uint8)]
        picture[np.isnan(pane.image)] = 255
        if pane.under is not None and pane.opacity is not None:
            mr = 255 * pane.under[..., None]
            picture = np.round(mr + pane.opacity[..., None] * (picture - mr)).astype(np.uint8)
        if lines is not None:
            picture[lines] = CROSS
        pictures += [picture, np.full((len(picture), GAP, 3), GAP_GREY, np.uint8)]
    return np.concatenate(pictures[:-1], axis=1)


@dataclass(frozen=True, eq=False)
class Case:
    """RAS+ volumes with the words for them, and the state to start from. alternatives: name -> K volumes, of those that
    a knob changes; `volumes` holds the first. labels: the truth's, uint8. visible: labels of lesions that PET sees."""

    volumes: dict[str, np.ndarray]
    affine: np.ndarray
    title: str
    start: State
    alternatives: dict[str, list[np.ndarray]] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    visible: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, scan: Scan, restored: Any, /, **arrays: Any) -> Case:
        """A scan and what was restored from it: a `Restoration`, one volume, or a dict of them."""
        if isinstance(restored, Mapping):
            restored, arrays = None, restored | {k: v for k, v in arrays.items() if v is not None}
        mean = getattr(restored, "mean", None)  # of an array, a method
        mean = restored if mean is None or callable(mean) else mean
        given = {"LPET": scan.lpet, "SPET": scan.spet, "MR": scan.mr, "restored": mean}
        if getattr(restored, "settings", {}).get("n_samples", 1) > 1:
            given["SD"] = restored.std
        title = f"{scan.name}, DRF {scan.dose_reduction:g}"
        return cls.of_volumes(given | arrays, title, scan.unit, np.asarray(scan.affine), **cls.truth(scan))

    @staticmethod
    def truth(scan: Scan) -> dict[str, Any]:
        """Of a scan: its labels, and the lesions that the PET sees."""
        labels = {name: getattr(scan, name) for name in (*LABELS, "mask")}
        return {"labels": labels, "visible": [one.label for one in scan.lesion_table if one.kind != "mr-only"]}

    @classmethod
    def of_volumes(
        cls, given: Mapping[str, Any], title: str, unit: str, affine: np.ndarray, count: int = 1,
        labels: Mapping[str, Any] | None = None, visible: Sequence[int] = (),
    ) -> Case:  # fmt: skip
        """The first volume sets the grid: a NIfTI file by its own affine, an array by `affine`. With `count`
        alternatives, a volume of theirs is a list."""
        flat = {name: value for name, value in given.items() if not _listed(value)}
        for name, values in ((name, value) for name, value in given.items() if _listed(value)):
            if len(values) != count:
                raise ValueError(f"{name}: expected one image per alternative, {count}, found {len(values)}")
            flat |= {_alternative(name, k): value for k, value in enumerate(values)}
        if not flat and count > 1:
            return cls({}, np.eye(4), title, State(unit=unit))
        known = {f"truth: {name}": value for name, value in (labels or {}).items() if value is not None}
        images = _without_air(_on_one_grid(flat | known, affine))
        affine = next(iter(images.values())).affine
        arrays = {name: np.asarray(image.dataobj) for name, image in images.items()}
        truth = {
            name: arrays.pop(f"truth: {name}").astype(np.uint8) for name in labels or {} if f"truth: {name}" in known
        }
        arrays = _gates_in_the_head(arrays)
        several = {n: [arrays[_alternative(n, k)] for k in range(count)] for n, v in given.items() if _listed(v)}
        volumes = {n: several[n][0] if n in several else arrays[n] for n, v in given.items() if v is not None}
        start = _start(volumes, several, affine, unit, truth.pop("mask", None))
        return cls(volumes, affine, title, start, several, truth, list(visible))

    def panes(self, state: State) -> dict[str, Pane]:
        """See `panes`."""
        return panes(self.volumes, state)

    def picked(self, k: int) -> Case:
        """With alternative `k` of every volume that has any."""
        return replace(self, volumes=self.volumes | {name: some[k] for name, some in self.alternatives.items()})

    def in_suv(self, dose: float, weight: float) -> Case:
        """Activity as SUV [g/mL]: kBq/mL x weight [kg] / injected dose [MBq]."""
        if self.start.unit != "kBq/mL" or not (dose > 0 and weight > 0):
            found = f"found {self.start.unit}, {dose}, {weight}"
            raise ValueError(f"suv: expected images in kBq/mL, a dose [MBq] and a weight [kg], {found}; leave it out")
        of = {name: weight / dose if own_kind(name) in (None, "SD", "change") else 1.0 for name in self.volumes}
        start, factor = self.start, weight / dose
        own = {n: (low * of[n], high * of[n]) for n, (low, high) in start.own_windows.items()}
        window = start.window[0] * factor, start.window[1] * factor
        start = replace(start, window=window, own_windows=own, difference=start.difference * factor, unit="SUV")
        several = {name: [v * of[name] for v in some] for name, some in self.alternatives.items()}
        volumes = {name: v * of[name] for name, v in self.volumes.items()}
        return replace(self, volumes=volumes, alternatives=several, start=start)

    def quantised(self, name: str, levels: Mapping[str | None, int]) -> list[dict[str, Any]]:
        """Every alternative of a volume as 16 bits, "q", with its "offset" and "step": value = offset + step q. So many
        steps as `levels` says reach through the window of its kind. NaN is 0, and "hole" says so."""
        kind = own_kind(name)
        low, high = self.start.own_windows[name] if kind else self.start.window
        parts = []
        for volume in self.alternatives.get(name, [self.volumes[name]]):
            bottom, top = float(np.nanmin(volume)), float(np.nanmax(volume))
            step = max((high - low) / levels[kind], (top - bottom) / 65000) or 1.0
            hole = bool(np.isnan(volume).any())
            q = np.nan_to_num(np.round((volume - bottom) / step) + hole).astype(np.uint16)
            parts.append({"q": q, "offset": bottom - hole * step, "step": step, "hole": hole})
        return parts

    @property
    def shape(self) -> tuple[int, ...]:
        return next((volume.shape for volume in self.volumes.values()), (1, 1, 1))

    def marks(self, state: State) -> tuple[str, str, str, str]:
        """The patient's sides at the left, top, right and bottom of a pane, as letters."""
        right, top = "A" if state.plane == "sagittal" else "R", "A" if state.plane == "axial" else "S"
        left, right = (right, OPPOSITE[right]) if state.radiological else (OPPOSITE[right], right)
        return left, top, right, OPPOSITE[top]

    def mm(self, voxel: Any) -> np.ndarray:
        return nib.affines.apply_affine(self.affine, voxel)

    def place(self, state: State) -> str:
        axis = PLANES[state.plane]
        voxel = [state.index if a == axis else (n - 1) / 2 for a, n in enumerate(self.shape)]
        return f"{'xyz'[axis]} = {self.mm(voxel)[axis]:.1f} mm"

    def sentence(self, *states: State) -> str:
        """Plane, slice, position, window and side; of further states the position."""
        state, (left, top, *_) = states[0], (SIDES[mark] for mark in self.marks(states[0]))
        number = f"slice {state.index + 1} of {self.shape[PLANES[state.plane]]}"
        places, (low, high) = " and ".join(self.place(s) for s in states), state.window
        window = f"PET window {low:.4g} to {high:.4g} {state.unit}{', MR under PET' * (state.blend > 0)}"
        return f"{state.plane} {number}, {places}; {window}; patient's {left} on the left, {top} up"

    def description(self, *states: State) -> str:
        return f"{self.title}: {', '.join(panes(self.volumes, states[0]))}; {self.sentence(*states)}."

    def at(self, voxel: tuple[int, int, int], state: State) -> dict[str, tuple[float, str]]:
        """Pane -> (value, [unit]) at a voxel."""
        one = {name: volume[tuple(slice(k, k + 1) for k in voxel)] for name, volume in self.volumes.items()}
        shown = panes(one, replace(state, index=0))
        return {n: (float(p.image[0, 0]), "".join(p.meaning.partition("[")[1:])) for n, p in shown.items()}

    def spread(self, state: State, n_slices: int) -> list[State]:
        """The same view of slices spread evenly over the volume; for one slice, the state itself."""
        count = self.shape[PLANES[state.plane]]
        inner = np.linspace(count - 1, 0, n_slices + 2)[1:-1].round() if n_slices < count else np.arange(count)[::-1]
        return [state] if n_slices == 1 else [replace(state, index=int(k)) for k in inner]


def _on_one_grid(given: Mapping[str, Any], affine: np.ndarray) -> dict[str, nib.Nifti1Image]:
    """The volumes that are there, RAS+; files that are on another grid than the first volume are resampled to it."""
    images: dict[str, nib.Nifti1Image] = {}
    for name, value in ((name, value) for name, value in given.items() if value is not None):
        image = _image(name, value, affine)
        first, grid = next(iter(images.items()), (name, image))
        if image.shape != grid.shape or not np.allclose(image.affine, grid.affine, atol=1e-3):
            if not isinstance(value, str | PathLike):
                expected = f"expected the {first}'s grid {grid.shape}, found {image.shape}"
                raise ValueError(f"{name}: {expected}; resample it first")
            from nibabel.processing import resample_from_to  # and with it much of SciPy

            image = resample_from_to(image, grid, order=1)
        if not np.isfinite(np.asarray(image.dataobj)).all():
            expected = "expected finite values, found NaN or infinite voxels"
            raise ValueError(f"{name}: {expected}; find out where they come from")
        images[name], affine = image, grid.affine
    if not images:
        raise ValueError("explore: expected at least one volume, found none; pass name -> array or NIfTI path")
    return {name: nib.as_closest_canonical(image) for name, image in images.items()}


def _image(name: str, value: Any, affine: np.ndarray) -> nib.Nifti1Image:
    """A NIfTI path, or an array or tensor on `affine`, as a float32 image."""
    if isinstance(value, str | PathLike):
        from ..files import load_volume

        return nib.Nifti1Image(*load_volume(fspath(value)))
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, np.float32)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ValueError(f"{name}: expected one 3-D volume or a 2-D slice, found shape {array.shape}")
    return nib.Nifti1Image(array, affine)


def _without_air(images: dict[str, nib.Nifti1Image], margin: int = 4) -> dict[str, nib.Nifti1Image]:
    """The box in X and Y that holds the head, with a margin; all slices keep their numbers."""
    shown = [name for name in images if not name.startswith("truth: ")]
    outline = {"LPET", "MR"} & images.keys() or [name for name in shown if own_kind(name) in (None, "MR")] or shown
    heads = [np.asarray(images[name].dataobj) for name in outline]
    head = np.any([volume > 0.2 * np.percentile(volume, 99.5) for volume in heads], axis=(0, 3))
    inside = np.nonzero(head if head.any() else ~head)
    box = tuple(slice(max(0, int(k.min()) - margin), int(k.max()) + 1 + margin) for k in inside)
    return {name: image.slicer[box] for name, image in images.items()}


def _listed(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _alternative(name: str, k: int) -> str:
    return f"{name} [{k}]"


def _gates_in_the_head(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gates without the air, where they say nothing: NaN there."""
    gates = [name for name in arrays if own_kind(name) == "gate"]
    others = [volume for name, volume in arrays.items() if name not in gates and own_kind(name) not in ("SD", "change")]
    if not gates or not others:
        return arrays
    from scipy import ndimage

    smooth = [ndimage.gaussian_filter(volume, 1.5) for volume in others[:3]]
    head = np.any([one > 0.1 * np.percentile(one, 99) for one in smooth], axis=0)
    for z in range(head.shape[2]):
        head[..., z] = ndimage.binary_fill_holes(head[..., z])
    return arrays | {name: np.where(head, arrays[name], np.nan).astype(np.float32) for name in gates}


def _start(
    volumes: dict[str, np.ndarray], several: dict[str, list[np.ndarray]], affine: np.ndarray, unit: str,
    mask: np.ndarray | None,
) -> State:  # fmt: skip
    """The middle slice, with windows that fit: of the PET, what the brain holds, so that a lesion is beyond its end."""
    pet = next(volumes[name] for name in ("SPET", "restored", "LPET", *volumes) if name in volumes)
    brain = pet[mask > 0] if mask is not None and mask.any() else _hot(pet)
    high, reference = _bound(brain.clip(min=0), 98, 1.0), _reference(volumes)
    change = np.stack(several.get("restored", [volumes["restored"]])) - volumes[reference] if reference else pet
    own = {n: _own_window(n, np.stack(several.get(n, [v]))) for n, v in volumes.items() if own_kind(n)}
    plane = next((p for p, axis in PLANES.items() if pet.shape[axis] == 1), "axial")
    middle, voxel_size = pet.shape[PLANES[plane]] // 2, tuple(nib.affines.voxel_sizes(affine).tolist())
    return State(plane, middle, (0.0, high), _bound(change, 99.5, high / 10), own, voxel_size=voxel_size, unit=unit)


def _hot(pet: np.ndarray) -> np.ndarray:
    """The voxels of a rough brain."""
    top = pet > 0.1 * pet.max()
    return pet[pet > 0.4 * np.percentile(pet[top], 95)] if top.any() else pet


def _own_window(name: str, volumes: np.ndarray) -> tuple[float, float]:
    if own_kind(name) == "gate":
        return 0.0, 1.0
    high = _bound(volumes, 99.5, 1.0)
    return -high if own_kind(name) == "change" else min(0.0, float(volumes.min())), high


def _bound(volume: np.ndarray, percentile: float, otherwise: float) -> float:
    """A percentile of |volume| rounded up to two digits; the maximum if that is 0, and `otherwise` if all is 0."""
    bound = float(np.percentile(abs(volume), percentile)) or float(abs(volume).max()) or otherwise
    step = 10.0 ** (math.floor(math.log10(bound)) - 1)
    return float(f"{math.ceil(bound / step - 1e-6) * step:.2g}")

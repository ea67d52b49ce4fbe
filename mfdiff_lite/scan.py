"""One case on one grid: low-dose PET, MR, and whatever truth is known.

Contract: volumes are float32 (X, Y, Z) on one voxel grid with one affine (voxel -> mm, RAS+), activity in `unit`.
A `Scan` keeps the orientation that it came in; only `view.ModelView` turns it into what the model sees.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from .phantom import Lesion

ArrayLike = Any  # a NumPy array or a torch tensor, a slice (X, Y) or a volume (X, Y, Z)
VOXEL_LIMITS = (0.4, 10.0)  # mm; outside them the header is more likely wrong than the scanner
DOSE_LIMITS = (1.0, 200.0)  # beyond, somebody gave counts for a ratio (training: 4 to 100)
MOST_NEGATIVE = 0.2  # share of the activity below 0 that noise and ringing reach; offsets and z-scores reach more
HOLES = 0.005  # of the voxels with a value: NaN in the head that a mask of low values left


class Given(NamedTuple):
    """In which kind the LPET came: results go back in the same one."""

    torch: bool
    ndim: int


@dataclass(frozen=True, eq=False)
class Scan:
    """One case: `Scan(lpet, mr, voxel_size=2.0, dose_reduction=20)` from NumPy or torch, a 2-D slice or a 3-D volume.

    lpet, mr, spet, activity: (X, Y, Z) float32; `mr=None` restores from PET alone. mask: brain, bool. tissues: uint8, 1
    grey, 2 white, 3 CSF. lesions: uint8, 0 or `Lesion.label`. affine: (4, 4) voxel -> mm; without one, RAS axes of
    `voxel_size` [mm], one number or three. dose_reduction: SPET counts / LPET counts, NaN where it is not known. A 2-D
    slice becomes (X, Y, 1); `like_input` gives results back in the shape and kind that came in (`given`). halves: two
    images (X, Y, Z), each from its own half of the LPET's counts, or None: what self-supervised stage 2 learns from.
    sinogram: the LPET's acquisition, where it is known. header: of the file that it came from. sources: image -> what
    messages call it. background: (X, Y, Z) bool or None, where the LPET came as NaN, as some tools write air; results
    are NaN there too. Activity a little below 0, as filters leave it, is clipped with a warning. Raises ValueError in
    one sentence for a wrong shape, infinite or mostly negative activity, NaN inside the head, an empty image, an absurd
    voxel size or dose.
    """

    lpet: np.ndarray
    mr: np.ndarray | None = None
    spet: np.ndarray | None = None
    activity: np.ndarray | None = None
    mask: np.ndarray | None = None
    tissues: np.ndarray | None = None
    lesions: np.ndarray | None = None
    lesion_table: tuple[Lesion, ...] = ()
    halves: tuple[np.ndarray, np.ndarray] | None = None
    sinogram: Any = None
    affine: np.ndarray = None  # type: ignore[assignment]  # made from voxel_size
    voxel_size: tuple[float, float, float] = (2.0, 2.0, 2.0)
    dose_reduction: float = 20.0
    unit: str = "kBq/mL"
    name: str = "scan"
    header: Any = None
    sources: dict[str, str] = field(default_factory=dict)
    given: Given = None  # type: ignore[assignment]  # read off the LPET
    background: np.ndarray | None = None

    def __post_init__(self) -> None:
        names = {"lpet": "LPET", "spet": "SPET", "mr": "MR"} | self.sources
        given = self.given or Given(hasattr(self.lpet, "detach"), np.ndim(self.lpet))
        first = _volume(self.lpet, names["lpet"])
        images: dict[str, Any] = {}
        air = np.isnan(first) if first.dtype.kind == "f" else np.zeros(0, bool)
        background = air if air.any() else self.background
        for key, checked in CHECKED.items():
            if getattr(self, key) is not None:
                called = names.get(key, key)
                images[key] = checked(_on_grid(getattr(self, key), called, first), called)
        if self.halves is not None:
            if len(self.halves) != 2:
                raise ValueError(f"halves: expected two images of half the counts each, found {len(self.halves)}")
            called = names.get("halves", "halves")
            images["halves"] = tuple(activity_of(_on_grid(half, called, first), called) for half in self.halves)
        by_size = np.diag([*np.broadcast_to(np.asarray(self.voxel_size, float), 3), 1.0])
        affine = np.asarray(by_size if self.affine is None else self.affine, float)
        size = _voxel_size(affine, given.ndim, names["lpet"])
        if not math.isnan(self.dose_reduction):
            check_dose(self.dose_reduction)
        self.__dict__.update(images, affine=affine, voxel_size=size, given=given, background=background)

    def like_input(self, volume: np.ndarray) -> Any:
        """(..., X, Y, Z) -> the kind (NumPy or torch) and dimension of the `lpet` that this scan was made from."""
        if self.background is not None:
            volume = np.where(self.background, np.float32(np.nan), volume)
        volume = volume[..., 0] if self.given.ndim == 2 else volume
        if not self.given.torch:
            return volume
        import torch  # whoever gave a tensor has it already; nobody else waits for it

        return torch.from_numpy(np.ascontiguousarray(volume))

    def on_grid(self, image: ArrayLike, called: str) -> np.ndarray:
        """Any image of this scan's grid, NumPy or torch, slice or volume, as (X, Y, Z) float32. Raises ValueError for
        another shape and for NaN or infinite values; NaN is 0 where the LPET came as NaN. called: its name in the
        message."""
        array = _on_grid(image, called, self.lpet)
        if self.background is not None:
            array = np.where(self.background & np.isnan(array), 0, array)
        return _finite(array, called)


def check_dose(dose_reduction: float) -> None:
    """Raise ValueError for what cannot be a dose-reduction factor."""
    low, high = DOSE_LIMITS
    if not low <= dose_reduction <= high:
        raise ValueError(
            f"dose_reduction: expected SPET counts / LPET counts, {low:g} to {high:g} (learned: 4 to 100), found "
            f"{dose_reduction:g}"
        )


def as_array(image: ArrayLike) -> np.ndarray:
    """NumPy of an array or a tensor."""
    return image.detach().cpu().numpy() if hasattr(image, "detach") else np.asarray(image)


def _volume(image: ArrayLike, called: str) -> np.ndarray:
    array = as_array(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ValueError(
            f"{called}: expected one 3-D volume, found shape {array.shape}; extract one time frame or channel first"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{called}: expected real numbers, found {array.dtype}; save one real-valued channel")
    return array


def _on_grid(image: ArrayLike, called: str, first: np.ndarray) -> np.ndarray:
    array = _volume(image, called)
    if array.shape != first.shape:
        raise ValueError(
            f"{called}: expected the LPET's grid {first.shape}, found {array.shape}; resample it to the PET first"
        )
    return array


def _finite(array: np.ndarray, called: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ValueError(
            f"{called}: expected finite values, found {bad} NaN or infinite voxels; replace them (background: 0) first"
        )
    return array


def without_nan(array: np.ndarray, called: str) -> np.ndarray:
    """NaN round the head, in one piece with a corner of the volume, becomes 0; so do holes of a few voxels that the
    same mask left in the head. Raises ValueError for other NaN, with place and share."""
    air = np.isnan(array) if array.dtype.kind == "f" else np.zeros(1, bool)
    if not air.any():
        return array
    pieces, _ = ndimage.label(air)
    inside = air & ~np.isin(pieces, np.setdiff1d(pieces[tuple(slice(None, None, max(n - 1, 1)) for n in air.shape)], 0))
    if inside.any() and (inside.sum() > HOLES * (~air).sum() or not (air & ~inside).any()):
        place = np.round(np.argwhere(inside).mean(0)).astype(int).tolist()
        raise ValueError(
            f"{called}: expected finite values, found {inside.sum()} NaN voxels ({inside.mean():.2%}) near voxel "
            f"{place} that are not the air round the head; replace them first"
        )
    return np.where(air, 0, array)


def _signal(array: np.ndarray, called: str) -> np.ndarray:
    array = _finite(without_nan(array, called), called)
    if not array.any():
        raise ValueError(
            f"{called}: expected an image, found only zeros; check the export (an MR may be left out: mr=None)"
        )
    return array


def activity_of(array: np.ndarray, called: str) -> np.ndarray:
    """(X, Y, Z) float32 activity of at least 0, by the one rule about what is below it and about NaN (see `Scan`)."""
    array = _signal(array, called)
    below = array < 0
    if not below.any():
        return array
    share = -float(array[below].sum(dtype=float)) / max(float(array[~below].sum(dtype=float)), 1e-30)
    if share > MOST_NEGATIVE:
        raise ValueError(
            f"{called}: expected activity of at least 0, found {array.min():.4g} and {share:.0%} of the activity below "
            "0; undo any offset or z-scoring, or set the background to 0"
        )
    if array.min() < -1e-4 * array.max():  # else the rounding of scaled integers
        warnings.warn(
            f"{called}: expected activity of at least 0, found {below.sum()} negative voxels, {share:.2%} of the "
            "activity; they are clipped at 0",
            stacklevel=5,
        )
    return array.clip(min=0)


CHECKED = {"lpet": activity_of, "spet": activity_of, "activity": activity_of, "mr": _signal} | {
    "mask": lambda labels, _: labels.astype(bool),
    "tissues": lambda labels, _: labels.astype(np.uint8),
    "lesions": lambda labels, _: labels.astype(np.uint8),
}


def _voxel_size(affine: np.ndarray, ndim: int, called: str) -> tuple[float, float, float]:
    if not maps_to_mm(affine):
        raise ValueError(
            f"{called}: expected an affine (4, 4) that maps voxels to mm, found a singular or damaged one; repair the "
            "header"
        )
    x, y, z = (float(v) for v in nib.affines.voxel_sizes(affine))
    low, high = VOXEL_LIMITS
    if not all(low <= v <= high for v in (x, y, z)[:ndim]):
        raise ValueError(
            f"{called}: expected voxels of {low} to {high} mm, found {np.round([x, y, z], 3).tolist()} mm; "
            "correct the affine in the header (units must be mm)"
        )
    return x, y, z


def maps_to_mm(affine: np.ndarray) -> bool:
    """Whether it is (4, 4), finite, and its three axes span space."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3])) > 1e-3 * np.prod(nib.affines.voxel_sizes(affine)))

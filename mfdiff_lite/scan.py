"""One case on one grid: low-dose PET, MR, and whatever truth is known; from files, to files, to the model's grid and
back.

Contract: volumes are float32 (X, Y, Z) on one voxel grid with one affine (voxel -> mm, RAS+), activity in `unit`.
A `Scan` keeps the orientation of its file; only `WorkingGrid` turns it into what the model sees (RAS+, 2 mm, a box
round the head).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_from_to
from scipy import ndimage

WORKING_VOXEL = 2.0  # mm
VOXEL_LIMITS = (0.4, 10.0)  # mm; outside them the header is more likely wrong than the scanner
SMOOTH_MM = 7.0  # Gaussian FWHM of the low-dose image before anything is read off it


@dataclass(frozen=True)
class Lesion:
    """One lesion of a virtual patient. label: its value in `Scan.lesions`; kind: "pet-only", "mr-only" or "matched";
    radius in mm; hot: whether its activity lies above its surroundings (for MR-only lesions: its MR signal)."""

    label: int
    kind: str
    hot: bool
    radius: float


@dataclass(eq=False)
class Scan:
    """One case: `Scan(lpet, mr, voxel_size=2.0, dose_reduction=20)` from NumPy or torch, a 2-D slice or a 3-D volume.

    lpet, mr, spet, activity: (X, Y, Z) float32; `mr=None` restores from PET alone. mask: brain, bool. tissues: uint8, 1
    grey, 2 white, 3 CSF. lesions: uint8, 0 or `Lesion.label`. affine: (4, 4) voxel -> mm; without one, RAS axes of
    `voxel_size` [mm]. A 2-D slice becomes (X, Y, 1); `like_input` gives results back in the shape and kind that came
    in. halves: two images (X, Y, Z), each from its own half of the LPET's counts, or None: what self-supervised stage 2
    learns from. sinogram: the LPET's acquisition, where it is known. Raises ValueError in one sentence for a wrong
    shape, NaN, infinite or negative activity, an empty image, an absurd voxel size or dose.
    """

    lpet: Any
    mr: Any = None
    spet: Any = None
    activity: Any = None
    mask: Any = None
    tissues: Any = None
    lesions: Any = None
    lesion_table: tuple[Lesion, ...] = ()
    halves: Any = None
    sinogram: Any = None
    affine: np.ndarray | None = None
    voxel_size: float | tuple[float, float, float] = 2.0
    dose_reduction: float = 20.0
    unit: str = "kBq/mL"
    name: str = "scan"
    header: Any = None
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._given_torch, self._given_ndim = isinstance(self.lpet, torch.Tensor), np.ndim(self.lpet)
        if self.affine is None:
            self.affine = np.diag([*np.broadcast_to(np.asarray(self.voxel_size, float), 3), 1.0])
        self.affine = np.asarray(self.affine, float)
        self.lpet = self._checked("lpet", np.float32)
        for name in ("spet", "activity", "mr"):
            if getattr(self, name) is not None:
                setattr(self, name, self._checked(name, np.float32))
        for name, kind in (("mask", bool), ("tissues", np.uint8), ("lesions", np.uint8)):
            if getattr(self, name) is not None:
                setattr(self, name, self._checked(name, kind))
        if self.halves is not None:
            if len(self.halves) != 2:
                raise ValueError(f"halves: expected two images of half the counts each, found {len(self.halves)}")
            self.halves = tuple(self._checked("halves", np.float32, half) for half in self.halves)
        if not _maps_to_mm(self.affine):
            raise ValueError(
                f"{self._called('lpet')}: expected an affine (4, 4) that maps voxels to mm, found a singular or "
                "damaged one; repair the header"
            )
        self.voxel_size = tuple(float(v) for v in nib.affines.voxel_sizes(self.affine))
        low, high = VOXEL_LIMITS
        if not all(low <= v <= high for v in self.voxel_size[: self._given_ndim]):
            raise ValueError(
                f"{self._called('lpet')}: expected voxels of {low} to {high} mm, found "
                f"{np.round(self.voxel_size, 3).tolist()} mm; "
                "correct the affine in the header (units must be mm)"
            )
        if not (np.isfinite(self.dose_reduction) and self.dose_reduction >= 1):
            raise ValueError(
                "dose_reduction: expected SPET counts / LPET counts, a number of at least 1, found "
                f"{self.dose_reduction}"
            )

    def _called(self, name: str) -> str:
        return self.sources.get(name, {"lpet": "LPET", "spet": "SPET", "mr": "MR"}.get(name, name))

    def _checked(self, name: str, kind: type, value: Any = None) -> np.ndarray:
        value, called = getattr(self, name) if value is None else value, self._called(name)
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3:
            raise ValueError(
                f"{called}: expected one 3-D volume, found shape {array.shape}; extract one time frame or channel first"
            )
        if name != "lpet" and array.shape != self.lpet.shape:
            raise ValueError(
                f"{called}: expected the LPET's grid {self.lpet.shape}, found {array.shape}; "
                "resample it to the PET first"
            )
        if np.iscomplexobj(array) or array.dtype.kind not in "biuf":
            raise ValueError(f"{called}: expected real numbers, found {array.dtype}; save one real-valued channel")
        if kind is not np.float32:
            return array.astype(kind)
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ValueError(
                f"{called}: expected finite values, found {bad} NaN or infinite voxels; "
                "replace them (background: 0) first"
            )
        if not array.any():
            raise ValueError(
                f"{called}: expected an image, found only zeros; check the export"
                + (", or pass mr=None" if name == "mr" else "")
            )
        if name != "mr" and array.min() < 0:
            if array.min() < -1e-4 * array.max():
                raise ValueError(
                    f"{called}: expected activity of at least 0, found {array.min():.4g}; "
                    "undo any offset or z-scoring, or clip at 0 if this is ringing"
                )
            array = array.clip(min=0)  # rounding of scaled integers
        return array

    def like_input(self, volume: np.ndarray) -> Any:
        """(..., X, Y, Z) -> the kind (NumPy or torch) and dimension of the `lpet` that this scan was made from."""
        volume = volume[..., 0] if self._given_ndim == 2 else volume
        return torch.from_numpy(np.ascontiguousarray(volume)) if self._given_torch else volume


class ActivityScale:
    """The intensity scale of the model, from the LPET alone: its mean inside the brain becomes 1.

    Never from the SPET (not there at test time), never from a maximum (grows with the noise).
    mask: (X, Y, Z) bool, a rough brain; value: kBq/mL (or the unit of the scan).
    """

    def __init__(self, lpet: np.ndarray, voxel_size: tuple[float, ...]):
        sigma = [SMOOTH_MM / 2.355 / v for v in voxel_size]
        self.smooth = ndimage.gaussian_filter(lpet, sigma, mode="nearest")
        self.mask = self.smooth > 0.4 * np.percentile(self.smooth[self.smooth > 0.1 * self.smooth.max()], 95)
        self.value = float(lpet[self.mask].mean())

    def apply(self, activity: np.ndarray) -> np.ndarray:
        return activity / self.value

    def invert(self, scaled: np.ndarray) -> np.ndarray:
        return np.clip(scaled, 0, None) * self.value


def scale_mr(mr: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """MR -> zero mean, unit SD inside `brain`, clipped to [-3, 4]; 0 where there is no signal, so that no MR at all is
    all zeros."""
    inside = mr[brain]
    spread = float(inside.std())
    if spread <= 1e-6 * max(float(np.abs(mr).max()), 1e-12):
        return np.zeros_like(mr)
    return np.where(mr != 0, np.clip((mr - inside.mean()) / spread, -3, 4), 0).astype(np.float32)


class WorkingGrid:
    """The grid the model works on: RAS+, 2 mm, cut to a box round the head whose sides X and Y are multiples of 16.

    to(volume): (X, Y, Z) of the scan -> (x, y, z) of the box. back(volume, outside): the way back, `outside` (scan
    grid) beyond the box and on its rim of air, where a convolution sees the edge. Reorientation is lossless;
    interpolation (cubic, after a low-pass when the voxels grow) happens only if voxels differ from 2 mm.
    """

    RIM = 2  # voxels of air at each side of the box in X and Y

    def __init__(self, scan: Scan):
        self.scan = scan
        canonical = self._canonical(scan.lpet)
        zooms = np.array(canonical.header.get_zooms()[:3])
        flat = canonical.shape[2] == 1
        wanted = np.array([WORKING_VOXEL, WORKING_VOXEL, zooms[2] if flat else WORKING_VOXEL])
        self.resampled = bool(np.any(np.abs(zooms / wanted - 1) > 0.02))
        shape = (
            np.maximum(np.round(np.array(canonical.shape) * zooms / wanted).astype(int), 1)
            if self.resampled
            else canonical.shape
        )
        self.shape = tuple(int(n) for n in shape)
        self.affine = (
            nib.affines.rescale_affine(canonical.affine, canonical.shape, wanted, self.shape)
            if self.resampled
            else canonical.affine
        )
        self.voxel_size = tuple(float(v) for v in wanted)
        self._low_pass = np.sqrt(np.maximum(wanted**2 - zooms**2, 0)) / 2.355 / zooms  # voxels of the scan
        self.box = (slice(None),) * 3
        self.pad = ((0, 0),) * 3
        self._fit_box(ActivityScale(self.to(scan.lpet), self.voxel_size).smooth)

    def _canonical(self, volume: np.ndarray) -> nib.Nifti1Image:
        return nib.as_closest_canonical(nib.Nifti1Image(np.asarray(volume, np.float32), self.scan.affine))

    def _fit_box(self, smooth: np.ndarray) -> None:
        head = smooth > 0.08 * np.percentile(smooth, 99.5)
        spans, pads = [], []
        for axis, size in enumerate(self.shape[:2]):
            where = np.flatnonzero(head.any(axis=(1 - axis, 2)))
            want = int(np.ceil((where[-1] - where[0] + 1 + 2 * self.RIM) / 16) * 16)
            start = (where[0] + where[-1] + 1 - want) // 2
            spans.append(slice(max(start, 0), min(start + want, size)))
            pads.append((max(-start, 0), max(start + want - size, 0)))
        self.box, self.pad = (*spans, slice(None)), (*pads, (0, 0))

    def to(self, volume: np.ndarray) -> np.ndarray:
        image = self._canonical(volume)
        if self.resampled:
            smooth = ndimage.gaussian_filter(image.get_fdata(dtype=np.float32), self._low_pass, mode="nearest")
            image = resample_from_to(
                nib.Nifti1Image(smooth, image.affine), (self.shape, self.affine), order=3, mode="nearest"
            )
        data = np.asarray(image.dataobj, np.float32)[self.box]
        return np.pad(data.clip(min=min(0.0, float(np.min(volume)))), self.pad)

    def back(self, volume: np.ndarray, outside: np.ndarray) -> np.ndarray:
        unpad = tuple(slice(low, size - high) for (low, high), size in zip(self.pad, volume.shape, strict=True))
        kept = np.zeros(volume.shape, bool)
        kept[self.RIM : -self.RIM, self.RIM : -self.RIM] = True
        if not self.resampled:
            full = np.asarray(self._canonical(outside).dataobj, np.float32).copy()
            full[self.box] = np.where(kept[unpad], volume[unpad], full[self.box])
            return self._reoriented(full)
        inside, weight = np.zeros(self.shape, np.float32), np.zeros(self.shape, np.float32)
        inside[self.box], weight[self.box] = volume[unpad], kept[unpad]
        target = (self.scan.lpet.shape, self.scan.affine)
        inside, weight = (
            np.asarray(resample_from_to(nib.Nifti1Image(v, self.affine), target, order=order, mode="nearest").dataobj)
            for v, order in ((inside, 3), (weight, 0))
        )
        return np.where(weight > 0, inside.clip(min=0), outside).astype(np.float32)

    def _reoriented(self, canonical: np.ndarray) -> np.ndarray:
        """Undo `as_closest_canonical`."""
        theirs = nib.io_orientation(self.scan.affine)
        turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), theirs)
        return np.ascontiguousarray(nib.apply_orientation(canonical, turn))


def load_scan(
    lpet_path: str | Path,
    mr_path: str | Path | None = None,
    spet_path: str | Path | None = None,
    dose_reduction: float = 20.0,
    mask_path: str | Path | None = None,
    half_paths: tuple[str | Path, str | Path] | None = None,
) -> Scan:
    """Read a case from NIfTI files. The MR may lie on any grid: it is resampled to the PET by the affines; all else
    must lie on the PET's.

    Raises OSError when a file cannot be read, ValueError when its content will not do; each in one sentence that says
    what to do.
    """
    lpet = read_image(lpet_path)
    Scan(
        lpet=lpet.dataobj, affine=lpet.affine, sources={"lpet": str(lpet_path)}
    )  # a bad PET is refused before its MR is blamed
    mr = None if mr_path is None else on_grid_of(lpet, read_image(mr_path), lpet_path, mr_path)
    spet, mask = (
        None if path is None else _if_grid_of(lpet, read_image(path), lpet_path, path)
        for path in (spet_path, mask_path)
    )
    halves = None if half_paths is None else [_if_grid_of(lpet, read_image(p), lpet_path, p) for p in half_paths]
    sources = {"lpet": lpet_path, "mr": mr_path, "spet": spet_path, "mask": mask_path}
    return Scan(
        lpet=np.asarray(lpet.dataobj, np.float32),
        mr=mr,
        spet=spet,
        mask=None if mask is None else mask > 0.5,
        halves=halves,
        affine=lpet.affine,
        dose_reduction=dose_reduction,
        unit="input unit",
        name=Path(lpet_path).name.split(".")[0],
        header=lpet.header,
        sources={k: str(v) for k, v in sources.items() if v is not None},
    )


def load_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """One 3-D NIfTI volume and its affine, with the same checks and sentences as `load_scan`."""
    image = read_image(path)
    return np.asarray(image.dataobj, np.float32), image.affine


def read_image(path: str | Path) -> nib.spatialimages.SpatialImage:
    """A 3-D image, its data read whole so that a truncated file is found here."""
    if not Path(path).is_file():
        raise OSError(
            f"{path}: expected a NIfTI file, found {'a folder' if Path(path).is_dir() else 'nothing'}; check the path"
        )
    try:
        with quiet_nibabel():
            image = nib.load(path)
        data = np.asanyarray(image.dataobj)
    except nib.filebasedimages.ImageFileError:
        raise OSError(
            f"{path}: expected a NIfTI file (.nii or .nii.gz), found something else; "
            "convert it first, e.g. with dcm2niix"
        ) from None
    except (OSError, EOFError, zlib.error, ValueError, nib.spatialimages.HeaderDataError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{path}: expected a whole NIfTI file, found a truncated or damaged one ({reason}); copy or export it again"
        ) from None
    if data.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected real numbers, found {data.dtype}; save one real-valued channel")
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise ValueError(
            f"{path}: expected one 3-D volume, found shape {data.shape}; extract one time frame or channel first"
        )
    if not _maps_to_mm(image.affine):
        raise ValueError(f"{path}: expected an affine that maps voxels to mm, found a singular one; repair the header")
    return nib.Nifti1Image(data, image.affine, image.header if isinstance(image, nib.Nifti1Image) else None)


@contextmanager
def quiet_nibabel() -> Iterator[None]:
    """Nibabel logs a line of its own about a header that it then raises about."""
    logger = nib.imageglobals.logger
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _maps_to_mm(affine: np.ndarray) -> bool:
    """Whether it is (4, 4), finite, and its three axes span space."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3])) > 1e-3 * np.prod(nib.affines.voxel_sizes(affine)))


def _if_grid_of(pet: nib.Nifti1Image, image: nib.Nifti1Image, pet_path: object, path: object) -> np.ndarray:
    """The data of an image that must lie on the PET grid already; a mirrored one of the same shape would pass
    unnoticed."""
    if image.shape != pet.shape or not np.allclose(image.affine, pet.affine, atol=1e-2):
        raise ValueError(
            f"{path}: expected the grid of {pet_path}, {pet.shape}, found {image.shape} or another affine; "
            "resample it to the PET first"
        )
    return np.asarray(image.dataobj, np.float32)


def on_grid_of(pet: nib.Nifti1Image, mr: nib.Nifti1Image, pet_path: object, mr_path: object) -> np.ndarray:
    """MR resampled to the PET grid: low-pass to the PET's voxels, then linear."""
    active = np.argwhere(np.asarray(pet.dataobj) > 0.2 * np.max(pet.dataobj))
    points = nib.affines.apply_affine(np.linalg.inv(mr.affine) @ pet.affine, active[:: max(1, len(active) // 20000)])
    overlap = np.mean(np.all((points > -1) & (points < np.array(mr.shape)), axis=1)) if len(points) else 1.0
    if overlap < 0.5:
        raise ValueError(
            f"{mr_path}: expected an MR that covers the head in {pet_path}, found {overlap:.0%} of the active "
            "voxels inside it; "
            "register the MR to the PET, or check both affines"
        )
    if mr.shape == pet.shape and np.allclose(mr.affine, pet.affine, atol=1e-3):
        return np.asarray(mr.dataobj, np.float32)
    data = np.asarray(mr.dataobj, np.float32)
    if not np.isfinite(data).all():  # before interpolation spreads them
        raise ValueError(
            f"{mr_path}: expected finite values, found NaN or infinite voxels; replace them (background: 0) first"
        )
    fine, coarse = nib.affines.voxel_sizes(mr.affine), nib.affines.voxel_sizes(pet.affine)
    sigma = np.sqrt(np.maximum(coarse.min() ** 2 - fine**2, 0)) / 2.355 / fine
    smooth = ndimage.gaussian_filter(data, sigma, mode="nearest")
    return np.asarray(resample_from_to(nib.Nifti1Image(smooth, mr.affine), pet, order=1, cval=0).dataobj, np.float32)


def save_volume(path: str | Path, volume: np.ndarray, scan: Scan, force: bool = False) -> Path:
    """Write a volume on the scan's grid as float32 NIfTI: whole or not at all, and never over an existing file unless
    `force`."""
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name that ends in .nii.gz or .nii; rename the output")
    volume = np.asarray(volume, np.float32)
    image = nib.Nifti1Image(volume[..., None] if volume.ndim == 2 else volume, scan.affine, scan.header)
    image.set_data_dtype(np.float32)
    image.header.set_slope_inter(1, 0)
    with whole_file(path, force) as partial:
        image.to_filename(partial)
    return path


class whole_file:
    """`with whole_file(path, force) as partial:` write to `partial`; it becomes `path` only if the block succeeds."""

    def __init__(self, path: str | Path, force: bool = True):
        self.path, self.force = Path(path), force
        self.partial = self.path.with_name(f".{os.getpid()}-part-{self.path.name}")

    def __enter__(self) -> Path:
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path}: expected a file to write, found a folder; choose another name")
        if self.path.exists() and not self.force:
            raise FileExistsError(f"{self.path}: exists already; choose another name or pass --force to replace it")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"{self.path.parent}: expected a folder to write {self.path.name} into, found none; create it first"
            )
        return self.partial

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            umask = os.umask(0)
            os.umask(umask)
            self.partial.chmod(0o666 & ~umask)  # some writers make files that only their owner can read
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(
                    f"{self.path}: could not be written ({error.strerror or error}); check space and permissions"
                ) from None

"""The scan as the model sees it: one grid, one activity scale, one MR scale, slices with their neighbours; and back.

    Scan --ModelView--> lpet, mr (x, y, z), RAS+, 2 mm, scaled --slices(z)--> (B, context, H, W)
    Scan <----back----- restored (x, y, z)                     <---cut(...)-- (..., H, W)

Restoring, stage 2, the simulated cohort and the MR-guided baselines all prepare their images here and nowhere else.
"""

from __future__ import annotations

import math
import warnings
from functools import cached_property

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage

from .config import FWHM_TO_SD, SIDE
from .scan import Scan

WORKING_VOXEL = 2.0  # mm
SMOOTH_MM = 7.0  # Gaussian FWHM of the low-dose image before anything is read off it
HOT = 4.0  # times the brain's upper level, smoothed: more than any uptake in training (2.9)
BRIGHT = 3.0  # ... and more than any in a brain
ABSURD = 40.0  # the same of a single voxel (training: 17, at the highest noise)
CUT_OUT = 0.3  # of the bright voxels: the edge of a head is darker (air: 0.002), of a cut-out brain brighter (0.5)
POCKETS = 0.02  # of the voxels with activity (a mask of tissues: 0.01)
MARGIN = 6.0  # mm round what is hot that its blur reaches
REACH = (1.0, 5.0)  # mm beyond what is known: up to here as bright as its edge, from there dark
FIDELITY_SD = 1.5  # voxels of 2 mm; also what lies outside the box is smoothed with it


def sd_voxels(shape: tuple[int, ...], fwhm: float, voxel_size: tuple[float, ...]) -> list[float]:
    """FWHM [mm] -> SD in voxels along each axis; no filter along an axis of one slice."""
    return [0 if n == 1 else fwhm * FWHM_TO_SD / v for n, v in zip(shape, voxel_size, strict=True)]


def neighbours(z: np.ndarray | int, context: int, first: int, last: int) -> np.ndarray:
    """The slices (..., context) that the model sees round slice z: beyond `first` and `last` the end slice repeats, in
    restoring and in training."""
    return np.clip(np.asarray(z)[..., None] + np.arange(context) - context // 2, first, last)


class ActivityScale:
    """The intensity scale of the model, from the LPET alone: its mean inside the brain becomes 1.

    Never from the SPET (not there at test time), never from a maximum (grows with the noise), never from what is no
    brain: things `HOT` or `ABSURD`, and what was `cut_away`, are unknown to it.
    known: (X, Y, Z) bool, where the LPET speaks of the head; filled: the LPET with its unknown voxels filled in from
    there; smooth: that, smoothed; mask: a rough brain; value: kBq/mL (or the unit of the scan).
    """

    def __init__(self, lpet: np.ndarray, voxel_size: tuple[float, ...]):
        foreign = foreign_to_brain(lpet, voxel_size)
        self.known = ~(foreign | cut_away(lpet))
        self.foreign = foreign
        self.filled = filled(lpet, self.known, voxel_size)
        self.smooth = _smoothed(self.filled, voxel_size)
        brightest = min(float(self.smooth.max()), BRIGHT * upper_level(self.smooth))
        level = np.percentile(self.smooth[self.smooth > 0.1 * brightest], 95)
        self.mask = (self.smooth > 0.4 * level) & self.known
        self.value = float(lpet[self.mask].mean())

    def apply(self, activity: np.ndarray) -> np.ndarray:
        """Activity -> scaled activity."""
        return activity / self.value

    def invert(self, scaled: np.ndarray) -> np.ndarray:
        """Scaled activity -> activity, not below 0."""
        return np.clip(scaled, 0, None) * self.value


def _smoothed(image: np.ndarray, voxel_size: tuple[float, ...]) -> np.ndarray:
    return ndimage.gaussian_filter(image, [SMOOTH_MM * FWHM_TO_SD / v for v in voxel_size], mode="nearest")


def upper_level(smooth: np.ndarray) -> float:
    """About the 95th percentile of the smoothed activity in the head: however bright something small is, and however
    much air is round it. It climbs from a percentile of the whole volume and never looks `HOT` times above itself."""
    level = float(np.percentile(smooth, 98)) or float(np.median(smooth[smooth > 0]))
    for _ in range(10):
        before, near = level, smooth[(smooth > 0.1 * level) & (smooth < HOT * level)]
        level = float(np.percentile(near, 95))
        if abs(level / before - 1) < 1e-3:
            break
    return level


def foreign_to_brain(lpet: np.ndarray, voxel_size: tuple[float, ...]) -> np.ndarray:
    """(X, Y, Z) bool: what is too bright for a brain (a bladder, a marker, a damaged voxel), and its surroundings."""
    limit = 20 * float(np.percentile(lpet[lpet > 0], 99))  # keeps single voxels out of the smoothed image
    smooth = _smoothed(np.minimum(lpet, limit), voxel_size)
    level = upper_level(smooth)
    hot = (smooth > HOT * level) | (lpet > ABSURD * level)
    return ndimage.distance_transform_edt(~hot, voxel_size) <= MARGIN if hot.any() else hot


def cut_away(lpet: np.ndarray) -> np.ndarray:
    """(X, Y, Z) bool: a block of zeros, more than noise clipped at 0 leaves; where it ends at a bright edge a brain was
    cut out, and the few zeros elsewhere are pockets of the mask that did it."""
    zeros = lpet == 0
    block = ndimage.binary_opening(zeros, np.ones([min(3, n) for n in lpet.shape]))
    away = ndimage.binary_propagation(block, mask=zeros)
    edge = lpet[ndimage.binary_dilation(away) & ~away]
    cut_out = edge.size > 0 and edge.mean() > CUT_OUT * np.percentile(lpet[lpet > 0], 90)
    return zeros if cut_out and (zeros & ~away).sum() < POCKETS * (~zeros).sum() else away


def filled(image: np.ndarray, known: np.ndarray, voxel_size: tuple[float, ...]) -> np.ndarray:
    """(X, Y, Z): what is not known as bright as the known activity next to it, and dark from `REACH` on."""
    if known.all():
        return image
    weight = _smoothed(known.astype(np.float32), voxel_size)
    smooth = _smoothed(np.where(known, image, 0), voxel_size) / np.maximum(weight, 1e-9)
    far = ndimage.distance_transform_edt(~known, voxel_size)
    fade = np.clip((REACH[1] - far) / (REACH[1] - REACH[0]), 0, 1)
    return np.where(known, image, smooth * fade).astype(np.float32)


def scale_mr(mr: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """MR -> zero mean, unit SD inside `brain`, clipped to [-3, 4]; 0 where there is no signal, so that no MR at all is
    all zeros."""
    inside = mr[brain]
    spread = float(inside.std())
    if spread <= 1e-6 * max(float(np.abs(mr).max()), 1e-12):
        return np.zeros_like(mr)
    return np.where(mr != 0, np.clip((mr - inside.mean()) / spread, -3, 4), 0).astype(np.float32)


def brain_mask(scan: Scan) -> np.ndarray:
    """The scan's own mask, or a rough one from its LPET (never from the SPET or the result)."""
    return scan.mask if scan.mask is not None else ActivityScale(scan.lpet, scan.voxel_size).mask


class WorkingGrid:
    """The grid the model works on: RAS+, 2 mm, cut to a box round the head whose sides X and Y are multiples of 16.

    to(volume): (X, Y, Z) of the scan -> (x, y, z) of the box. back(volume, outside): the way back, `outside` (scan
    grid) beyond the box and on its rim of air, where a convolution sees the edge. Reorientation is lossless;
    interpolation (cubic, after a low-pass when the voxels grow) happens only if voxels differ from 2 mm.
    """

    RIM = 2  # voxels of air at each side of the box in X and Y
    BEYOND = 12  # ... and beyond a side of the field of view that cuts the head: what lies farther changes it no more

    def __init__(self, scan: Scan):
        self.scan = scan
        canonical = self.canonical(scan.lpet)
        zooms = np.array(canonical.header.get_zooms()[:3])
        flat = canonical.shape[2] == 1
        wanted = np.array([WORKING_VOXEL, WORKING_VOXEL, zooms[2] if flat else WORKING_VOXEL])
        self.resampled = bool(np.any(np.abs(zooms / wanted - 1) > 0.02))
        self.shape, self.affine = canonical.shape, canonical.affine
        if self.resampled:
            counts = np.maximum(np.round(np.array(canonical.shape) * zooms / wanted).astype(int), 1)
            self.shape = tuple(int(n) for n in counts)
            self.affine = nib.affines.rescale_affine(canonical.affine, canonical.shape, wanted, self.shape)
        self.voxel_size = tuple(float(v) for v in wanted)
        self._low_pass = np.sqrt(np.maximum(wanted**2 - zooms**2, 0)) * FWHM_TO_SD / zooms  # voxels of the scan
        self.box: tuple[slice, ...] = (slice(None),) * 3
        self.pad: tuple[tuple[int, int], ...] = ((0, 0),) * 3
        self._fit_box(ActivityScale(self.to(scan.lpet), self.voxel_size))

    def canonical(self, volume: np.ndarray) -> nib.Nifti1Image:
        """(X, Y, Z) of the scan with its axes turned to RAS+, as near as turning gets."""
        return nib.as_closest_canonical(nib.Nifti1Image(np.asarray(volume, np.float32), self.scan.affine))

    def _fit_box(self, scale: ActivityScale) -> None:
        head = (scale.smooth > 0.08 * np.percentile(scale.smooth, 99.5)) & scale.known
        spans, pads = [], []
        for axis, size in enumerate(self.shape[:2]):
            where = np.flatnonzero(head.any(axis=(1 - axis, 2)))
            low, high = (self.BEYOND if cut else self.RIM for cut in (where[0] == 0, where[-1] == size - 1))
            first, last = where[0] - low, where[-1] + 1 + high
            want = int(np.ceil((last - first) / 16) * 16)
            start = (first + last - want) // 2
            spans.append(slice(max(start, 0), min(start + want, size)))
            pads.append((max(-start, 0), max(start + want - size, 0)))
        self.box, self.pad = (*spans, slice(None)), (*pads, (0, 0))

    def to(self, volume: np.ndarray) -> np.ndarray:
        """(X, Y, Z) of the scan -> (x, y, z) of the box, which goes on beyond the field of view as its edge is."""
        image = self.canonical(volume)
        if self.resampled:
            smooth = ndimage.gaussian_filter(image.get_fdata(dtype=np.float32), self._low_pass, mode="nearest")
            image = resample_from_to(
                nib.Nifti1Image(smooth, image.affine), (self.shape, self.affine), order=3, mode="nearest"
            )
        data = np.asarray(image.dataobj, np.float32)[self.box]
        return np.pad(data.clip(min=min(0.0, float(np.min(volume)))), self.pad, mode="edge")

    def back(self, volume: np.ndarray, outside: np.ndarray) -> np.ndarray:
        """(x, y, z) of the box -> (X, Y, Z) of the scan, `outside` beyond it."""
        unpad = tuple(slice(low, size - high) for (low, high), size in zip(self.pad, volume.shape, strict=True))
        kept = np.zeros(volume.shape, bool)
        kept[self.RIM : -self.RIM, self.RIM : -self.RIM] = True
        if not self.resampled:
            full = np.asarray(self.canonical(outside).dataobj, np.float32).copy()
            full[self.box] = np.where(kept[unpad], volume[unpad], full[self.box])
            return self.turned_back(full)
        inside, weight = np.zeros(self.shape, np.float32), np.zeros(self.shape, np.float32)
        inside[self.box], weight[self.box] = volume[unpad], kept[unpad]
        target = (self.scan.lpet.shape, self.scan.affine)
        inside, weight = (
            np.asarray(resample_from_to(nib.Nifti1Image(v, self.affine), target, order=order, mode="nearest").dataobj)
            for v, order in ((inside, 3), (weight, 0))
        )
        return np.where(weight > 0, inside.clip(min=0), outside).astype(np.float32)

    def turned_back(self, canonical: np.ndarray) -> np.ndarray:
        """Undo `as_closest_canonical`."""
        theirs = nib.io_orientation(self.scan.affine)
        turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), theirs)
        return np.ascontiguousarray(nib.apply_orientation(canonical, turn))


class ModelView:
    """A scan as a model of `context` neighbouring slices sees it.

    grid: of another scan on the same voxels, to keep its box; by default the scan's own. lpet, mr: (x, y, z) float32 on
    the box of the working grid, scaled, the LPET filled in where its scale knows nothing of the head; mr is all zeros
    without one. mask: (x, y, z) bool, a rough brain. known, filled: those of the scale, on the scan's grid. Raises
    ValueError for a scan whose dose reduction is not known.
    """

    def __init__(self, scan: Scan, context: int, grid: WorkingGrid | None = None):
        if math.isnan(scan.dose_reduction):
            raise ValueError(f"{scan.name}: expected its dose-reduction factor, found it unknown; give dose_reduction")
        self.scan, self.context = scan, context
        self.grid = grid or WorkingGrid(scan)
        canonical = self.grid.canonical(scan.lpet)  # a scan gets the same scale however its file is turned
        self.scale = ActivityScale(np.asarray(canonical.dataobj), canonical.header.get_zooms())
        self.known, self.filled, mask = (
            self.grid.turned_back(volume) for volume in (self.scale.known, self.scale.filled, self.scale.mask)
        )
        if self.scale.foreign.any():
            warnings.warn(
                f"{scan.name}: expected nothing much brighter than a brain, found {self.scale.foreign.sum()} voxels in "
                f"or next to something over {HOT:g} times its upper level; they are left as they came",
                stacklevel=4,
            )
        self.lpet = self.scale.apply(self.grid.to(self.filled))
        self.mask = self.grid.to(mask) > 0.5
        self.mr = np.zeros_like(self.lpet) if scan.mr is None else scale_mr(self.grid.to(scan.mr), self.mask)

    @property
    def shape(self) -> tuple[int, ...]:
        """(x, y, z) of the box."""
        return self.lpet.shape

    def activity(self, image: np.ndarray) -> np.ndarray:
        """Another activity image of the scan (a half, the SPET) on the box, in the LPET's scale."""
        return self.scale.apply(self.grid.to(image))

    def stack(self, volume: np.ndarray) -> np.ndarray:
        """(x, y, z) -> slices (Z, H, W) float32, their sides padded as their edges are to multiples of SIDE."""
        x, y = volume.shape[:2]
        more = ((0, 0), (0, -x % SIDE), (0, -y % SIDE))
        return np.pad(np.moveaxis(volume, -1, 0), more, mode="edge").astype(np.float32)

    def near(self, z: np.ndarray | int) -> np.ndarray:
        """The slices (..., context) round slices z, see `neighbours`."""
        return neighbours(z, self.context, 0, self.shape[2] - 1)

    def slices(self, z: np.ndarray) -> dict[str, np.ndarray]:
        """What the model gets of slices z (B,): "lpet" and "mr" (B, context, H, W), "dose" (B,); all float32."""
        near = self.near(z)
        images = {"lpet": self._stacked[0][near], "mr": self._stacked[1][near]}
        return images | {"dose": np.full(len(near), self.scan.dose_reduction, np.float32)}

    @cached_property
    def _stacked(self) -> tuple[np.ndarray, np.ndarray]:
        return self.stack(self.lpet), self.stack(self.mr)

    def cut(self, slices: np.ndarray) -> np.ndarray:
        """(..., H, W) -> (..., x, y): without the padding of `stack`."""
        return slices[..., : self.shape[0], : self.shape[1]]

    def restored(self, volume: np.ndarray) -> np.ndarray:
        """Scaled activity (x, y, z) -> the scan's grid, unit, kind and shape; beyond the box the smoothed LPET; what is
        foreign to a brain or was cut away as it came."""
        inside = self.grid.back(self.scale.invert(volume), self._outside)
        return self.scan.like_input(np.where(self.known, inside, self.scan.lpet))

    @cached_property
    def _outside(self) -> np.ndarray:
        sd = [FIDELITY_SD * WORKING_VOXEL / v for v in self.scan.voxel_size]
        return ndimage.gaussian_filter(self.filled, sd, mode="nearest")

    def back(self, volume: np.ndarray) -> np.ndarray:
        """(x, y, z) of any other unit -> the scan's grid, kind and shape; 0 beyond the box."""
        return self.scan.like_input(self.grid.back(volume, np.zeros_like(self.scan.lpet)))

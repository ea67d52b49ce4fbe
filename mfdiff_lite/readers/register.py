"""Rigid registration of an MR to a PET (extra `register`, SimpleITK): a search, then mutual information.

    T_0 = argmax R^2(LPET, MR(T .))     over rotations, and all shifts at once; R^2 as in `checks`
    T   = argmax MI(LPET, MR(T .))      T: rotation about the head's centre and translation, world mm
                                        Mattes et al., IEEE TMI 2003; from T_0 and both its starts, the best end

SimpleITK (Apache-2.0) needs NumPy alone; antspyx (Apache-2.0) brings what only deformations need.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ..checks import COARSE, Seen, classes, explained
from ..config import FWHM_TO_SD
from ..files import on_grid_of, read_image
from ..scan import Scan, without_nan

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world
SMOOTH = 6.0  # mm FWHM of the low-dose image before it is compared
FARTHEST, WIDEST = 80.0, 45.0  # mm and degrees: beyond them a header is wrong, not a head


@dataclass(frozen=True, eq=False)
class Registered:
    """scan: with the MR moved to the PET's grid. before: (X, Y, Z), the MR on that grid as its header has it. motion:
    (4, 4), what was applied to the MR's affine from the left, mm; distance [mm] of the head's centre and angle
    [degrees] of it."""

    scan: Scan
    before: np.ndarray
    motion: np.ndarray
    distance: float
    angle: float


def register(scan: Scan, mr: str | Path | nib.Nifti1Image) -> Registered:
    """Move an MR, a path or an image of any grid, rigidly to the LPET of a scan.

    Raises ImportError without the extra `register`, ValueError for a motion that no head makes or an MR that covers
    less than half of the head after it; whether the two then look like one head, `check_scan` says.
    """
    read = mr if isinstance(mr, nib.Nifti1Image) else read_image(mr)
    called = "MR" if isinstance(mr, nib.Nifti1Image) else str(mr)
    image = nib.Nifti1Image(without_nan(np.asarray(read.dataobj, np.float32), called), read.affine)
    motion, centre = rigid_motion(scan, image)
    moved = nib.affines.apply_affine(motion, centre)
    distance = float(np.linalg.norm(moved - centre))
    angle = float(np.degrees(np.arccos(np.clip((np.trace(motion[:3, :3]) - 1) / 2, -1, 1))))
    if distance > FARTHEST or angle > WIDEST:
        raise ValueError(
            f"{called}: expected an MR within {FARTHEST:g} mm and {WIDEST:g} degrees of the PET, found {distance:.0f} "
            f"mm and {angle:.0f} degrees; check that it is the same head, and both headers"
        )
    pet = nib.Nifti1Image(scan.lpet, scan.affine)
    there = nib.Nifti1Image(image.dataobj, motion @ image.affine)
    on_grid = on_grid_of(pet, there, scan.sources.get("lpet", "LPET"), called)
    sources = scan.sources | {"mr": called}
    before = np.asarray(resample_from_to(image, pet, order=1).dataobj)
    return Registered(replace(scan, mr=on_grid, sources=sources), before, motion, distance, angle)


def rigid_motion(scan: Scan, mr: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """The motion (4, 4) that brings the MR to the PET, world RAS mm, and the centre of the head in the PET."""
    try:
        import SimpleITK as sitk
    except ImportError:
        raise ImportError(
            "register: expected SimpleITK, found it not installed; run: pip install 'mfdiff_lite[register]'"
        ) from None
    sd = [SMOOTH * FWHM_TO_SD / v if n > 1 else 0 for n, v in zip(scan.lpet.shape, scan.voxel_size, strict=True)]
    smooth = ndimage.gaussian_filter(scan.lpet, sd)
    head = smooth > 0.1 * np.percentile(smooth, 99)
    smooth = np.minimum(smooth, np.percentile(smooth[head], 99.5))
    centre = nib.affines.apply_affine(scan.affine, np.argwhere(head).mean(0))
    fixed = _image(sitk, smooth, scan.affine)
    moving = _image(sitk, *_with_margin(mr))
    near = ndimage.binary_dilation(head, iterations=int(round(10 / min(scan.voxel_size))))
    images = fixed, moving, _image(sitk, near.astype(np.uint8), scan.affine)
    centred = nib.affines.from_matvec(np.eye(3), _centre_of(mr) - centre)
    ends = [_descended(sitk, images, centre, one, [4, 2, 1]) for one in (np.eye(4), centred)]
    ends.append(_descended(sitk, images, centre, _searched(scan, mr, centre), [2, 1]))
    _, transform = min(ends, key=lambda end: end[0])
    to_mr = np.eye(4)
    turn = np.array(transform.GetMatrix()).reshape(3, 3)
    about, shift = (np.array(v) for v in (transform.GetCenter(), transform.GetTranslation()))
    to_mr[:3, :3], to_mr[:3, 3] = turn, shift + about - turn @ about
    return TO_LPS @ np.linalg.inv(to_mr) @ TO_LPS, centre


def _searched(scan: Scan, mr: nib.Nifti1Image, centre: np.ndarray) -> np.ndarray:
    """World of the PET -> world of the MR (4, 4): the best of rotations in steps of 12, then 6 and 3 degrees, and of
    all shifts within reach of the headers' position or of centre on centre."""
    seen, data = Seen(replace(scan, mr=None, mask=None, halves=None)), np.asarray(mr.dataobj, np.float32)
    corner = [(s.start or 0) - low for s, (low, _) in zip(seen.grid.box, seen.grid.pad, strict=True)]
    affine = seen.grid.affine @ nib.affines.from_matvec(np.eye(3), corner)

    def tried(start: np.ndarray, turns: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        motion = np.eye(4)
        motion[:3, :3] = Rotation.from_rotvec(turns, degrees=True).as_matrix()
        motion[:3, 3] = centre + start - motion[:3, :3] @ centre
        to_voxel = np.linalg.inv(mr.affine) @ motion @ affine
        there = ndimage.affine_transform(data, to_voxel[:3, :3], to_voxel[:3, 3], seen.lpet.shape, order=1)
        fit, _ = explained(*seen.compared, classes(there))
        steps = np.subtract(np.unravel_index(fit.argmax(), fit.shape), np.array(fit.shape) // 2)
        shift = np.eye(4)
        shift[:3, 3] = affine[:3, :3] @ steps * COARSE
        return float(fit.max()), start, turns, motion @ shift

    around = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
    starts = np.zeros(3), _centre_of(mr) - centre
    best = max((tried(start, 12.0 * turn) for start in starts for turn in around), key=lambda one: one[0])
    for step in (12.0, 6.0, 3.0):
        best = max((tried(best[1], best[2] + step * turn) for turn in around), key=lambda one: one[0])
    return best[3]


def _with_margin(mr: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """The MR with 30 mm of air round it, and its affine: what leaves the image must cost, not drop out."""
    margin, affine = [int(30 / v) for v in nib.affines.voxel_sizes(mr.affine)], mr.affine.copy()
    affine[:3, 3] = nib.affines.apply_affine(affine, [-n for n in margin])
    data = np.asarray(mr.dataobj, np.float32)
    return np.pad(data, [(n, n) for n in margin], constant_values=data.min()), affine


def _centre_of(mr: nib.Nifti1Image) -> np.ndarray:
    """World centre of what gives signal."""
    data = np.asarray(mr.dataobj, np.float32)[::2, ::2, ::2]
    signal = np.argwhere(data > 0.1 * np.percentile(data, 99)) * 2
    return nib.affines.apply_affine(mr.affine, signal.mean(0))


def _image(sitk: Any, data: np.ndarray, affine: np.ndarray) -> Any:
    """An array (X, Y, Z) in ITK's world."""
    image, lps = sitk.GetImageFromArray(np.ascontiguousarray(data.T)), TO_LPS @ affine
    spacing = nib.affines.voxel_sizes(affine)
    turn, _, back = np.linalg.svd(lps[:3, :3] / spacing)  # the nearest rotation: ITK takes no shear
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((turn @ back).ravel().tolist())
    return image


def _descended(sitk: Any, images: tuple, centre: np.ndarray, start: np.ndarray, levels: list) -> tuple[float, Any]:
    """(minus the mutual information, the transform) at the end of the way down from a start (4, 4), RAS."""
    transform, start = sitk.Euler3DTransform(), TO_LPS @ start @ TO_LPS
    middle = TO_LPS[:3, :3] @ centre
    transform.SetCenter(middle.tolist())
    transform.SetMatrix(start[:3, :3].ravel().tolist(), 1e-6)
    transform.SetTranslation((start[:3, 3] + start[:3, :3] @ middle - middle).tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(images[2])
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentagePerLevel([0.5, 0.4, 0.2][-len(levels) :], 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(levels[0] ** 2 / 4, 0.02, 120, 0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(levels)
    method.SetSmoothingSigmasPerLevel([float(level) for level in levels])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetNumberOfThreads(1)  # the same result on every machine
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(*images[:2])
    return method.GetMetricValue(), transform

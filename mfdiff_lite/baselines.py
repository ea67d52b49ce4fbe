"""What a restoration has to beat: classical filters, each a function of the scan and of its own few settings.

None of them looks at the SPET. `tune` chooses their settings on validation patients, never on test patients; the
defaults are what it chose there for the default scanner at dose reduction 20 (`make results`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.restoration import denoise_nl_means

from .metrics import psnr
from .scan import Scan
from .scanner import Kernel, Scanner
from .view import ActivityScale, brain_mask, scale_mr, sd_voxels


def gaussian(scan: Scan, fwhm: float = 4.5) -> np.ndarray:
    """The classic: a 3-D Gaussian filter of `fwhm` [mm]."""
    return ndimage.gaussian_filter(scan.lpet, sd_voxels(scan.lpet.shape, fwhm, scan.voxel_size), mode="nearest")


def non_local_means(scan: Scan, strength: float = 0.1, fwhm: float = 3.0) -> np.ndarray:
    """Non-local means (Buades 2005) in 3-D after a light Gaussian of `fwhm` [mm]: averages voxels whose neighbourhoods
    look alike. strength: how much they may differ, as a share of the mean activity in the brain."""
    image, tolerance = gaussian(scan, fwhm), strength * ActivityScale(scan.lpet, scan.voxel_size).value
    plain = image[..., 0] if image.shape[2] == 1 else image
    return denoise_nl_means(plain, patch_size=3, patch_distance=3, h=tolerance).reshape(image.shape)


def mr_guided(scan: Scan, fwhm: float = 6.0, contrast: float = 0.7) -> np.ndarray:
    """An MR-guided (joint bilateral) filter: a 3-D Gaussian of `fwhm` [mm] whose weights fall where the MR differs.

    contrast: SD of the weight over MR difference, in SDs of the MR inside the brain. Petschnig et al. 2004; in PET the
    Bowsher prior is its relative. Raises ValueError for a scan without MR.
    """
    return mr_kernel(scan, fwhm, contrast)[0](scan.lpet)


def kernel_em(scan: Scan, scanner: Scanner | None = None, fwhm: float = 4.0, contrast: float = 0.5) -> np.ndarray:
    """Kernel EM (Wang & Qi 2015): OSEM of the LPET's own counts for an image that is an MR-guided filter of something.

    scanner: the one that made `scan.sinogram` (None: the default one); fwhm, contrast: of `mr_kernel`. Raises
    ValueError for a scan without sinogram or MR.
    """
    if scan.sinogram is None:
        raise ValueError(f"{scan.name}: expected a scan with its sinogram for kernel EM, found none; simulate one")
    return (scanner or Scanner()).reconstruct(scan.sinogram, mr_kernel(scan, fwhm, contrast))


def mr_kernel(scan: Scan, fwhm: float, contrast: float) -> Kernel:
    """The MR-guided filter as a matrix whose rows sum to 1: functions of an image (X, Y, Z) that apply it, and its
    exact transpose. Raises ValueError for a scan without MR."""
    if scan.mr is None:
        raise ValueError(f"{scan.name}: expected a scan with MR for an MR-guided method, found none")
    mr = scale_mr(scan.mr, ActivityScale(scan.lpet, scan.voxel_size).mask)
    sd = np.array(sd_voxels(scan.lpet.shape, fwhm, scan.voxel_size))
    reach = np.where(sd > 0, np.maximum(np.ceil(2 * sd), 1), 0).astype(int)
    margin, far = [(r, r) for r in reach], 1e3  # far: an MR value that nothing resembles, beyond the volume
    mr_near, weights = np.pad(mr, margin, constant_values=far), []
    for offset in itertools.product(*(range(-r, r + 1) for r in reach)):
        distance = sum((o / s) ** 2 for o, s in zip(offset, sd, strict=True) if s > 0)
        if distance <= 9:
            near = tuple(slice(r + o, r + o + n) for r, o, n in zip(reach, offset, mr.shape, strict=True))
            weights.append((near, np.exp(-0.5 * (distance + ((mr_near[near] - mr) / contrast) ** 2))))
    total = sum(weight for _, weight in weights)
    inner = tuple(slice(r, r + n) for r, n in zip(reach, mr.shape, strict=True))

    def spread(image: np.ndarray) -> np.ndarray:
        padded = np.pad(image, margin)
        return sum(weight * padded[near] for near, weight in weights) / total

    def gather(image: np.ndarray) -> np.ndarray:
        padded, share = np.zeros_like(mr_near), image / total
        for near, weight in weights:
            padded[near] += weight * share
        return padded[inner]

    return spread, gather


def tune(method: Callable[..., np.ndarray], scans: Iterable[Scan], **grid: Iterable[float]) -> dict[str, Any]:
    """The settings out of `grid` (name -> values to try) with the highest mean PSNR against the SPET over the scans."""
    scans = list(scans)
    lacking = [scan.name for scan in scans if scan.spet is None]
    if lacking or not scans:
        raise ValueError(f"tune: expected scans with their SPET, found none of {lacking[0] if lacking else 'any'}")
    trials = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    judged = [(scan, scan.spet, brain_mask(scan)) for scan in scans if scan.spet is not None]
    scores = [np.mean([psnr(method(s, **trial), spet, mask) for s, spet, mask in judged]) for trial in trials]
    return trials[int(np.argmax(scores))]

"""What a restoration has to beat. Each baseline is tuned on validation patients by `tune_gaussian` or the like, never
on test patients."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .metrics import psnr
from .scan import Scan

GAUSSIAN_FWHM = 4.5  # mm; best on validation patients at the default scanner and dose reduction 20 (`make results`)


def gaussian(lpet: np.ndarray, voxel_size: tuple[float, ...], fwhm: float = GAUSSIAN_FWHM) -> np.ndarray:
    """The classic: a 3-D Gaussian filter of `fwhm` [mm]. lpet: (X, Y, Z) activity."""
    return ndimage.gaussian_filter(
        lpet, [0 if n == 1 else fwhm / 2.355 / v for n, v in zip(lpet.shape, voxel_size, strict=True)], mode="nearest"
    )


def tune_gaussian(scans: list[Scan], widths: np.ndarray | None = None) -> float:
    """The FWHM [mm] with the highest mean PSNR against the SPET over the scans."""
    widths = np.arange(2.0, 10.01, 0.5) if widths is None else widths
    scores = [np.mean([psnr(gaussian(s.lpet, s.voxel_size, w), s.spet, s.mask) for s in scans]) for w in widths]
    return float(widths[int(np.argmax(scores))])

"""What the numbers mean. Every function takes activity in units (never rescaled) and an explicit reference; nothing is
fitted to the target.

x: the image under test, reference: SPET or truth, both (X, Y, Z); mask: bool, the brain.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

from .scan import Lesion


def peak(reference: np.ndarray, mask: np.ndarray) -> float:
    """The fixed peak of one subject: the 99.9th percentile of the reference in the mask (not a maximum, and never of
    the tested image)."""
    return float(np.percentile(reference[mask], 99.9))


def psnr(x: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """20 log10(peak / RMSE) in the mask [dB]; infinite for equal images."""
    error = float(np.sqrt(np.mean((x[mask].astype(float) - reference[mask]) ** 2)))
    return float("inf") if error == 0 else 20 * np.log10(peak(reference, mask) / error)


def nrmse(x: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """||x - r|| / ||r|| in the mask."""
    return float(
        np.linalg.norm(x[mask].astype(float) - reference[mask]) / np.linalg.norm(reference[mask].astype(float))
    )


def ssim(x: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Structural similarity, Gaussian window of SD 1.5 pixels, data range = peak, on whole axial slices, averaged in
    the mask (Wang 2004)."""
    total, data_range = 0.0, peak(reference, mask)
    for z in np.flatnonzero(mask.any((0, 1))):
        _, image = structural_similarity(
            x[..., z].astype(float),
            reference[..., z].astype(float),
            data_range=data_range,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        total += float(image[mask[..., z]].sum())
    return total / float(mask.sum())


def activity_bias(x: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Relative difference of the total activity in the mask: 0.02 is 2 % too much."""
    return float(x[mask].sum(dtype=float) / reference[mask].sum(dtype=float) - 1)


def lesion_contrast(x: np.ndarray, lesions: np.ndarray, label: int, brain: np.ndarray) -> float:
    """a / b - 1: mean in the lesion over mean in the ring round it (2 to 8 mm away at 2 mm voxels, brain only, other
    lesions left out). NaN if the volume shows no such lesion or no ring."""
    where = np.argwhere(lesions == label)
    if not len(where):
        return float("nan")
    low, high = np.maximum(where.min(0) - 6, 0), where.max(0) + 7
    near = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inside = lesions[near] == label
    distance = ndimage.distance_transform_edt(~inside)
    ring = (distance > 1.5) & (distance <= 4.5) & brain[near] & (lesions[near] == 0)
    if not ring.any():
        return float("nan")
    return float(x[near][inside].mean() / max(float(x[near][ring].mean()), 1e-6) - 1)


def contrast_kept(
    x: np.ndarray,
    reference: np.ndarray,
    lesions: np.ndarray,
    table: tuple[Lesion, ...],
    brain: np.ndarray,
    kind: str = "pet-only",
    across: tuple[float, float] = (0.0, np.inf),
) -> float:
    """How much of the reference's lesion contrast x shows: slope of contrast in x on contrast in the reference, over
    the lesions of a kind whose diameter [mm] lies in `across`.

    1 keeps all, 0 none. A slope through the origin, because single ratios explode for lesions of almost no contrast.
    NaN without lesions.
    """
    pairs = [
        [lesion_contrast(image, lesions, one.label, brain) for image in (x, reference)]
        for one in table
        if one.kind == kind and across[0] <= 2 * one.radius < across[1]
    ]
    pairs = np.array([p for p in pairs if np.isfinite(p).all()]).reshape(-1, 2)
    return float(pairs.prod(1).sum() / (pairs[:, 1] ** 2).sum()) if len(pairs) else float("nan")


def mr_leak(
    x: np.ndarray, reference: np.ndarray, lesions: np.ndarray, table: tuple[Lesion, ...], brain: np.ndarray
) -> float:
    """False contrast at MR-only lesions: mean |contrast in x - contrast in the reference|. NaN without such lesions."""
    differences = [
        lesion_contrast(x, lesions, one.label, brain) - lesion_contrast(reference, lesions, one.label, brain)
        for one in table
        if one.kind == "mr-only"
    ]
    differences = np.abs([d for d in differences if np.isfinite(d)])
    return float(differences.mean()) if len(differences) else float("nan")


def coverage(
    mean: np.ndarray, sd: np.ndarray, reference: np.ndarray, mask: np.ndarray, level: float = 0.9, scale: float = 1.0
) -> float:
    """Share of the voxels in the mask whose reference lies in the central normal interval of `level`, mean +- z sd.

    Right when it equals `level`. scale: a recalibration of the sd, see `calibration`.
    """
    z = stats.norm.ppf((1 + level) / 2)
    return float(np.mean(np.abs(reference - mean)[mask] <= z * scale * sd[mask]))


def calibration(mean: np.ndarray, sd: np.ndarray, reference: np.ndarray, mask: np.ndarray, level: float = 0.9) -> float:
    """The factor on the sd with which the interval of `level` would cover exactly; fit it on validation patients."""
    z = np.abs(reference - mean)[mask] / np.maximum(sd[mask], 1e-12)
    return float(np.quantile(z, level) / stats.norm.ppf((1 + level) / 2))


def texture(x: np.ndarray, region: np.ndarray, voxels: float = 2.0) -> float:
    """SD of the fine structure in a region of even activity (eroded white matter, say): x minus a Gaussian of SD
    `voxels` in the axial plane. In a SPET this is its noise."""
    fine = x - ndimage.gaussian_filter(x, (voxels, voxels, 0), mode="nearest")
    return float(fine[region].std())


def mean_ci(values: np.ndarray | list[float], seed: int = 0, draws: int = 10_000) -> tuple[float, tuple[float, float]]:
    """Mean over subjects and its 95 % bootstrap interval (percentile, resampling subjects). NaN values are left out."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(values.mean()), (float(low), float(high))

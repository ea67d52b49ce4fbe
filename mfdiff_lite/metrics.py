"""What the numbers mean. Every function takes activity in units (never rescaled) and an explicit reference; nothing is
fitted to the target.

x: the image under test, reference: SPET or truth, both (X, Y, Z); mask: bool, the brain.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

from .phantom import Lesion

Voxel = tuple[float, float, float]
RING = (3.0, 9.0)  # mm from a lesion to the inner and outer edge of the ring that it is compared with
SSIM_WINDOW = 11  # pixels: a Gaussian of SD 1.5, cut at 3.5 SD


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
    the mask (Wang 2004). NaN for slices smaller than its window."""
    if min(x.shape[:2]) < SSIM_WINDOW:
        return float("nan")
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


def lesion_contrast(
    x: np.ndarray, lesions: np.ndarray, label: int, brain: np.ndarray, voxel_size: Voxel = (2.0, 2.0, 2.0)
) -> float:
    """a / b - 1: mean in the lesion over mean in the ring round it (centres of voxels more than 3 and at most 9 mm from
    the nearest one of the lesion, brain only, other lesions left out). voxel_size: mm. NaN if the volume shows no such
    lesion or no ring."""
    where = np.argwhere(lesions == label)
    if not len(where):
        return float("nan")
    reach = np.ceil(RING[1] / np.array(voxel_size)).astype(int) + 1
    low, high = np.maximum(where.min(0) - reach, 0), where.max(0) + reach + 1
    near = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inside = lesions[near] == label
    distance = ndimage.distance_transform_edt(~inside, sampling=voxel_size)
    ring = (distance > RING[0]) & (distance <= RING[1]) & brain[near] & (lesions[near] == 0)
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
    voxel_size: Voxel = (2.0, 2.0, 2.0),
) -> float:
    """How much of the reference's lesion contrast x shows: slope of contrast in x on contrast in the reference, over
    the lesions of a kind whose diameter [mm] lies in `across`.

    1 keeps all, 0 none. A slope through the origin, because single ratios explode for lesions of almost no contrast.
    NaN without lesions.
    """
    chosen = [one for one in table if one.kind == kind and across[0] <= 2 * one.radius < across[1]]
    found = _contrasts(x, reference, lesions, chosen, brain, voxel_size)
    return float(found.prod(1).sum() / (found[:, 1] ** 2).sum()) if len(found) else float("nan")


def contrast_error(
    x: np.ndarray,
    reference: np.ndarray,
    lesions: np.ndarray,
    table: tuple[Lesion, ...],
    brain: np.ndarray,
    kind: str = "pet-only",
    across: tuple[float, float] = (0.0, np.inf),
    voxel_size: Voxel = (2.0, 2.0, 2.0),
) -> dict[str, float]:
    """How wrong a single lesion's contrast is, over the lesions that `contrast_kept` takes: "bias" (negative: contrast
    lost, of hot and of cold lesions), "sd" beside it, and both together as "rms". A slope does not see the spread, and
    noise can only raise it. NaN without lesions, "sd" with one.
    """
    chosen = [one for one in table if one.kind == kind and across[0] <= 2 * one.radius < across[1]]
    found = _contrasts(x, reference, lesions, chosen, brain, voxel_size)
    error = (found[:, 0] - found[:, 1]) * np.sign(found[:, 1])
    if not len(error):
        return dict.fromkeys(("bias", "sd", "rms"), float("nan"))
    sd = float(error.std(ddof=1)) if len(error) > 1 else float("nan")
    return {"bias": float(error.mean()), "sd": sd, "rms": float(np.sqrt((error**2).mean()))}


def mr_leak(
    x: np.ndarray,
    reference: np.ndarray,
    lesions: np.ndarray,
    table: tuple[Lesion, ...],
    brain: np.ndarray,
    voxel_size: Voxel = (2.0, 2.0, 2.0),
) -> float:
    """False contrast at MR-only lesions: mean |contrast in x - contrast in the reference|. NaN without such lesions."""
    found = _contrasts(x, reference, lesions, [one for one in table if one.kind == "mr-only"], brain, voxel_size)
    return float(np.abs(found[:, 0] - found[:, 1]).mean()) if len(found) else float("nan")


def _contrasts(x, reference, lesions, chosen: list[Lesion], brain, voxel_size: Voxel) -> np.ndarray:
    """Contrast in x and in the reference of the chosen lesions that both show, (n, 2)."""
    pairs = [
        [lesion_contrast(image, lesions, one.label, brain, voxel_size) for image in (x, reference)] for one in chosen
    ]
    return np.array([pair for pair in pairs if np.isfinite(pair).all()]).reshape(-1, 2)


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


def channels(side: int) -> np.ndarray:
    """Ten dense difference-of-Gaussian channels, which see what human readers see: (side^2, 10), rotationally
    symmetric, none of them the mean (Abbey & Barrett 2001, table 1; frequencies in cycles per pixel)."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    widths = 0.005 * 1.4 ** np.arange(10)
    bands = [np.exp(-0.5 * (frequency / (1.67 * w)) ** 2) - np.exp(-0.5 * (frequency / w) ** 2) for w in widths]
    maps = np.fft.fftshift(np.fft.ifft2(bands).real, axes=(1, 2)).reshape(len(widths), -1).T
    return maps / np.linalg.norm(maps, axis=0)


def forced_choice(differences: np.ndarray, groups: np.ndarray, hotelling: bool = True) -> np.ndarray:
    """Two-alternative forced choice with a known signal: is the patch that holds it rated higher than its twin?

    differences: (n, c), patch with the signal minus the same background without it, with independent noise, seen
    through c `channels` or as c pixels. groups: (n,), e.g. patients: each is rated with the template of all others.
    The template is Hotelling's, cov(d)^-1 mean(d); without `hotelling` mean(d), an observer that does not prewhiten.

    Returns (n,) 1 right, 0 wrong, 1/2 undecided; the mean is the area under the ROC curve (Green & Swets 1966). Raises
    ValueError for fewer than two groups.
    """
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError(f"forced_choice: expected at least 2 groups, found {len(names)}; rate more patients")
    right = np.empty(len(differences))
    for name in names:
        out = groups == name
        template = differences[~out].mean(0)
        if hotelling:
            spread = np.atleast_2d(np.cov(differences[~out], rowvar=False))
            template = np.linalg.lstsq(spread, template, rcond=1e-6)[0]
        right[out] = (np.sign(differences[out] @ template) + 1) / 2
    return right


def mean_ci(values: np.ndarray | list[float], seed: int = 0, draws: int = 10_000) -> tuple[float, tuple[float, float]]:
    """Mean over subjects and its 95 % bootstrap interval (percentile, resampling subjects). NaN values are left out."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    picks = np.random.default_rng(seed).integers(0, len(known), (draws, len(known)))
    low, high = np.percentile(known[picks].mean(1), [2.5, 97.5])
    return float(known.mean()), (float(low), float(high))

"""What looks wrong with a scan before it is restored, and with the result after it: findings, each with its number.

noise      true counts per mm^3 of the LPET, from second differences of its slices in three in-plane bands: a regression
           on training scans. counts * DRF is the standard dose, which has a usual size: DRF itself leaves no trace.
texture    noise of counts and one filter looks alike at every scale; what was filtered and mixed since does not
field      a brain that the sides of the field of view cut
MR         R^2(s): share of the band-passed LPET near the brain that a linear mix of band-passed MR classes explains
           when the MR is shifted by s. Any MR contrast will do, and neither level nor gain of either image matters.
               registered: highest near s = 0 | shifted: highest elsewhere | mirrored: higher for the mirrored MR
               another head: low everywhere
halves     identical noise, or a mean that is not the LPET

A finding is "fine", a "warn"ing, or a "refuse"al that `--force` overrules. Limits are set on training anatomies and
measured on the test anatomy by `make checks`; results/checks.json has how often each is right.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from scipy import fft, ndimage

from .noise import SLICES, second_difference
from .scan import Scan, as_array
from .view import ActivityScale, WorkingGrid, brain_mask

COARSE = 2  # voxels of the working grid, 4 mm: the LPET's noise leaves nothing finer to compare
BAND = (2.5, 8.0)  # mm, SD of the two Gaussians whose difference is the band
CLASSES = 5  # of MR signal, equally many voxels each
REACH = 24.0  # mm, how far the MR is moved
NEAR = 4.5  # mm, what counts as registered
MIDDLE = 24  # slices that the noise is read off
SMOOTHER = (0.8, 1.6, 3.2)  # voxels, SD of the Gaussians between which the bands lie
# log(counts) = COUNTS . (1, log variance in three bands, how much it falls short of that four slices apart, smoothness)
COUNTS = np.array([-3.422, 0.003, -0.316, -0.777, 2.171, 0.469, -0.867, -0.404])


@dataclass(frozen=True)
class Finding:
    """What one check found. severity: "fine", "warn" or "refuse"; sentence: expected, found, what to do; value: the
    measured number; threshold: the limit that it was held against."""

    name: str
    severity: str
    sentence: str
    value: float
    threshold: float


class Seen:
    """A scan as the checks look at it: on the working grid, in its own scale; every measure is made once."""

    def __init__(self, scan: Scan):
        self.scan, self.grid = scan, WorkingGrid(scan)
        raw = self.grid.to(scan.lpet)
        scale = ActivityScale(raw, self.grid.voxel_size)
        self.lpet, self.mask = raw / scale.value, scale.mask
        self.mr = None if scan.mr is None else self.grid.to(scan.mr)

    @cached_property
    def counts(self) -> float | None:
        """True counts per mm^3 that the noise of the LPET tells of; None if it has too few slices."""
        return counts(self.noise)

    @cached_property
    def noise(self) -> np.ndarray | None:
        """`variances` of the LPET."""
        return variances(self.lpet, self.mask)

    @cached_property
    def fit(self) -> dict[str, float] | None:
        """R^2 near no shift, the highest and its distance [mm], and that of the mirrored MR; None without an MR that
        has contrast."""
        if self.mr is None or not np.ptp(self.mr[self.mask]) > 1e-6 * np.abs(self.mr).max():
            return None
        straight, distance = explained(*self.compared, classes(self.mr))
        mirrored, _ = explained(*self.compared, classes(self.mr[::-1]))
        best = np.unravel_index(straight.argmax(), straight.shape)
        return {
            "here": float(straight[distance < NEAR].max()),
            "best": float(straight.max()),
            "distance": float(distance[best]),
            "mirrored": float(mirrored.max()),
            "voxels": float(self.compared[1].sum()),
        }

    @cached_property
    def compared(self) -> tuple[np.ndarray, np.ndarray]:
        """The band of the LPET, and where it is compared: bool, the brain and 8 mm round it."""
        near = ndimage.binary_dilation(self.mask, iterations=4)
        return band(coarse(self.lpet)), coarse(near.astype(np.float32)) > 0.5

    @cached_property
    def same_noise(self) -> float:
        """Correlation of the finest detail of LPET and MR: near 1 if one was made from the other."""
        return 0.0 if self.mr is None else detail_correlation(self.lpet, self.mr, self.mask)


def variances(image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Log variances (distance, band) of second differences 1, 2 and 4 slices apart in three bands, fine to coarse, of
    an image (x, y, z) of 2 mm in units of its mean; None if it is too thin for it."""
    first = max(0, (image.shape[2] - MIDDLE) // 2)
    image, mask = image[..., first : first + MIDDLE], mask[..., first : first + MIDDLE]
    if image.shape[2] < SLICES or not image[mask].sum() > 0:
        return None
    level = float(image[mask].mean())
    smooth = [image, *(ndimage.gaussian_filter(image, (sd, sd, 0), mode="nearest") for sd in SMOOTHER)]
    bands = [a - b for a, b in zip(smooth, smooth[1:], strict=False)]
    found = [[float((second_difference(b, d)[mask] ** 2).mean()) / level**2 for b in bands] for d in (1, 2, 4)]
    return np.log(np.maximum(found, 1e-8))


def counts(noise: np.ndarray | None) -> float | None:
    """True counts per mm^3 that `variances` tell of."""
    if noise is None:
        return None
    near, _, far = noise
    smoothness = max(0.0, -0.8 - near[0] + near[2])
    return float(np.exp(COUNTS @ [1.0, *near, *(near - far), smoothness]))


def coarse_under_fine(noise: np.ndarray) -> float:
    """How much more coarse noise `variances` tell of than counts and one filter leave; anatomy counts as such."""
    near, middle, far = noise
    return float(1.1 * (far[2] - near[2]) - (middle[0] - near[0]) + 0.25 * min(near[2], -3.0))


def coarse(image: np.ndarray) -> np.ndarray:
    """Means over COARSE voxels along each axis, the ends repeated."""
    padded = np.pad(image, [(0, -n % COARSE) for n in image.shape], mode="edge")
    x, y, z = (n // COARSE for n in padded.shape)
    return padded.reshape(x, COARSE, y, COARSE, z, COARSE).mean((1, 3, 5))


def band(image: np.ndarray) -> np.ndarray:
    """The band of BAND of an image of the coarse grid."""
    fine, smooth = (ndimage.gaussian_filter(image, sd / (2.0 * COARSE), mode="nearest") for sd in BAND)
    return fine - smooth


def classes(mr: np.ndarray) -> list[np.ndarray]:
    """The MR as band-passed images of "brighter than", one for each limit between its CLASSES."""
    signal = mr[mr > 0.05 * np.percentile(mr, 99.5)]
    limits = np.quantile(signal if signal.size else mr, np.linspace(0, 1, CLASSES + 1)[1:-1])
    return [band(coarse((mr > limit).astype(np.float32))) for limit in limits]


def explained(pet: np.ndarray, inside: np.ndarray, features: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """R^2 of the linear regression of `pet` inside a mask on features that are moved by every shift up to REACH, all by
    FFT; and the length [mm] of each shift. Features are 0 beyond their grid."""
    weight = inside.astype(np.float32)
    pet = weight * (pet - pet[inside].mean())
    reach = [min(int(REACH / (2.0 * COARSE)), n - 1) for n in pet.shape]
    size = [fft.next_fast_len(n + r, real=True) for n, r in zip(pet.shape, reach, strict=True)]
    window = np.ix_(*(np.arange(-r, r + 1) for r in reach))

    def moved(kernel: np.ndarray, image: np.ndarray) -> np.ndarray:
        return fft.irfftn(kernel * fft.rfftn(image, size), size)[window]

    by_mask, by_pet = (np.conj(fft.rfftn(image, size)) for image in (weight, pet))
    sums = [moved(by_mask, one) for one in features]
    products = np.stack([moved(by_pet, one) for one in features], -1)
    gram = np.empty((*products.shape, len(features)))
    for i, a in enumerate(features):
        for j, b in enumerate(features[: i + 1]):
            gram[..., i, j] = gram[..., j, i] = moved(by_mask, a * b) - sums[i] * sums[j] / weight.sum()
    gram += 1e-4 * np.trace(gram, axis1=-2, axis2=-1)[..., None, None] / len(features) * np.eye(len(features))
    solved = np.linalg.solve(gram, products[..., None])[..., 0]
    shifts = np.sqrt(sum((2.0 * COARSE * axis) ** 2 for axis in window))
    return (products * solved).sum(-1) / float((pet**2).sum()), np.broadcast_to(shifts, products.shape[:-1])


def detail_correlation(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Correlation inside a mask of what a Gaussian of 1.5 voxels takes away from two images."""
    a, b = ((v - ndimage.gaussian_filter(v, [1.5 if n > 1 else 0 for n in v.shape]))[mask] for v in (one, other))
    norm = float(np.sqrt((a**2).mean() * (b**2).mean()))
    return float((a * b).mean()) / norm if norm > 0 else 0.0


# --- before ------------------------------------------------------------------------------------------------------

USUAL = (20.0, 130.0)  # true counts per mm^3 of a standard dose
LEARNT = (0.08, 25.0)  # the same of the low-dose images that the shipped weights learnt on: 8 / 100 to 100 / 4
MIXED = -0.2  # coarse noise under fine: the highest of training scans, of filters up to 8 mm and of very few counts
SMOOTHEST = -3.05  # log variance of the finest band over the coarsest: the lowest with filters up to 8 mm
CUT = 400.0  # mm^2 of the brain that the sides of the field of view cut
CLEANER = 5.0  # counts of the LPET over those of the MR, as if that were a PET (registered MRs of training heads: 2.5)
ROUGHER = 0.4  # ... `coarse_under_fine` of the LPET less that of the MR (likewise: 0.35)
SIDES = 0.045  # R^2 that a head's MR explains more of the PET than its mirror image does
MOVED = 6.0  # mm
COPIED = 0.9  # correlation of finest detail, above which it is one noise and not one anatomy
TOO_COARSE = 4.5  # mm, voxel side beyond the training's
RIM_TO_DEEP = 0.8  # activity of the brain's rim over that of its depth, the lowest in training
HALVES = 0.05  # relative difference of the halves' mean from the LPET
ENOUGH = 300  # voxels of 4 mm round the brain that an MR is judged by
TRUSTED = 0.5  # `Restoration.fit`
MOST_MOVED = 0.03  # of the brain's activity, between LPET and result

_SEEN: WeakKeyDictionary[Scan, list[Finding]] = WeakKeyDictionary()


def check_scan(scan: Scan) -> list[Finding]:
    """All findings about a scan before it is restored, in at most two seconds for 64 slices; made once for each scan. A
    check that cannot be made (too few slices, no MR, no halves) gives none."""
    if scan not in _SEEN:
        _SEEN[scan] = findings(Seen(scan))
    return _SEEN[scan]


def findings(seen: Seen) -> list[Finding]:
    """What `check_scan` finds, of a scan that is prepared already."""
    found = [_standard_dose(seen), _noise_level(seen), _texture(seen), _field(seen), _exchanged(seen)]
    found += [_mr(seen), _voxels(seen), _contrast(seen), _halves(seen.scan)]
    return [one for one in found if one is not None]


def _finding(name: str, wrong: bool, value: float, threshold: float, sentence: str, severity: str = "warn") -> Finding:
    return Finding(name, severity if wrong else "fine", sentence if wrong else "", float(value), float(threshold))


def _between(name: str, value: float, limits: tuple[float, float], sentence: str) -> Finding:
    low, high = limits
    return _finding(name, not low <= value <= high, value, low if value**2 < low * high else high, sentence)


def _called(seen: Seen, kind: str) -> str:
    return seen.scan.sources.get(kind, kind.upper())


def _standard_dose(seen: Seen) -> Finding | None:
    dose = seen.scan.dose_reduction
    if seen.counts is None or math.isnan(dose):
        return None
    standard = seen.counts * dose
    sentence = (
        f"{_called(seen, 'lpet')}: expected the noise of a dose-reduction factor of {dose:g}, found about that of "
        f"{max(math.sqrt(math.prod(USUAL)) / seen.counts, 1):.2g}, if the standard dose is a usual one; check "
        "--dose-reduction, and that this is the low-dose PET, neither a standard-dose nor a smoothed one"
        f"{'; if both are right, adapt to this scan (restore --adapt)' if standard < USUAL[0] else ''}"
    )
    return _between("dose", standard, USUAL, sentence)


def _noise_level(seen: Seen) -> Finding | None:
    if seen.counts is None:
        return None
    sentence = (
        f"{_called(seen, 'lpet')}: expected noise of {LEARNT[0]:g} to {LEARNT[1]:g} true counts per mm^3, what the "
        f"weights learnt on, found that of about {seen.counts:.2g}; compare with a Gaussian before you trust the result"
    )
    return _between("noise", seen.counts, LEARNT, sentence)


def _texture(seen: Seen) -> Finding | None:
    if seen.noise is None:
        return None
    near, mixed = seen.noise[0], coarse_under_fine(seen.noise)
    steep = near[0] - near[2] < SMOOTHEST
    sentence = (
        f"{_called(seen, 'lpet')}: expected noise as counts and one filter leave it, found "
        f"{'an image smoothed by more than 8 mm' if steep else 'coarse noise under fine'}; give the image as it was "
        "reconstructed, or compare with a Gaussian before you trust the result"
    )
    return _finding("texture", steep or mixed > MIXED, mixed, MIXED, sentence)


def _field(seen: Seen) -> Finding:
    sides = (seen.mask[0], seen.mask[-1], seen.mask[:, 0], seen.mask[:, -1])
    area = 2 * seen.grid.voxel_size[2] * sum(int(side.sum()) for side in sides)
    sentence = (
        f"{_called(seen, 'lpet')}: expected whole axial slices, found {area / 100:.0f} cm^2 of the brain at the sides "
        "of the field of view, which cut it; do not trust the outermost centimetre"
    )
    return _finding("field", area > CUT, area, CUT, sentence)


def _exchanged(seen: Seen) -> Finding | None:
    as_pet = None if seen.mr is None or seen.same_noise > COPIED else variances(seen.mr, seen.mask)
    if seen.counts is None or seen.noise is None or as_pet is None:
        return None
    cleaner = seen.counts / (counts(as_pet) or math.inf)
    rougher = coarse_under_fine(seen.noise) - coarse_under_fine(as_pet)
    sentence = (
        f"{_called(seen, 'lpet')}: expected the noise of a PET, found less like it than {_called(seen, 'mr')}; the two "
        "look exchanged: give the PET as LPET and the MR as MR"
    )
    score = max(cleaner / CLEANER, rougher / ROUGHER if cleaner > 1 / CLEANER else 0.0)
    return _finding("exchanged", score > 1, score, 1, sentence, "refuse")


def _mr(seen: Seen) -> Finding | None:
    """Whether the MR is of this head and lies on it."""
    if seen.mr is None:
        return None
    called = _called(seen, "mr")
    if seen.same_noise > COPIED:
        sentence = f"{called}: expected an MR, found the noise of the LPET itself; give the MR, or leave it out"
        return _finding("mr-copy", True, seen.same_noise, COPIED, sentence)
    if seen.fit is None:
        sentence = f"{called}: expected an MR, found no contrast inside the brain; check the file, or leave it out"
        return _finding("mr-contrast", True, 0.0, 0.0, sentence)
    if seen.fit["voxels"] < ENOUGH:
        return None
    best, mirrored, distance = (seen.fit[key] for key in ("best", "mirrored", "distance"))
    if mirrored - best > SIDES:
        sentence = (
            f"{called}: expected an MR that fits the PET, found that its mirror image fits better; left and right look "
            "exchanged: check the orientation in both headers"
        )
        return _finding("mr-mirrored", True, best - mirrored, SIDES, sentence)
    if best - mirrored < SIDES:
        sentence = (
            f"{called}: expected an MR of the head in the PET, found that it fits no better than its mirror image; it "
            "may be another head or lie elsewhere: check the file, or register it (--register)"
        )
        return _finding("mr-head", True, best - mirrored, SIDES, sentence)
    sentence = (
        f"{called}: expected an MR registered to the PET, found that it fits best {distance:.0f} mm away; register it "
        "first (--register)"
    )
    return _finding("mr-position", distance > MOVED and best > 1.3 * seen.fit["here"], distance, MOVED, sentence)


def _voxels(seen: Seen) -> Finding:
    largest = max(v for v, n in zip(seen.scan.voxel_size, seen.scan.lpet.shape, strict=True) if n > 1)
    sentence = (
        f"{_called(seen, 'lpet')}: expected voxels of at most {TOO_COARSE:g} mm, found {largest:.2g} mm; detail that "
        "the weights expect is not there: reconstruct on a finer grid if you can"
    )
    return _finding("voxels", largest > TOO_COARSE, largest, TOO_COARSE, sentence)


def _contrast(seen: Seen) -> Finding | None:
    """Grey matter lies at the rim of the brain: a rim darker than the depth is a contrast unlike training's."""
    padded = np.pad(seen.mask, ((0, 0), (0, 0), (1, 1)), mode="edge")
    depth = ndimage.distance_transform_edt(padded, sampling=[2, 2, 1e3])[..., 1:-1]
    rim, deep = seen.lpet[(depth > 3) & (depth < 10)], seen.lpet[depth > 16]
    if seen.lpet.shape[2] < SLICES or min(rim.size, deep.size) < 1000:
        return None
    ratio = float(rim.mean() / deep.mean())
    sentence = (
        f"{_called(seen, 'lpet')}: expected more activity in grey matter than in white, found the rim of the brain at "
        f"{ratio:.2g} of its depth, as amyloid tracers have it; adapt to this scan (mfdiff adapt, or restore --adapt)"
    )
    return _finding("contrast", ratio < RIM_TO_DEEP, ratio, RIM_TO_DEEP, sentence)


def _halves(scan: Scan) -> Finding | None:
    if scan.halves is None:
        return None
    mask = brain_mask(scan)
    (a, b), called = scan.halves, scan.sources.get("halves", "halves")
    alike = max(detail_correlation(a, other, mask) for other in (b, 2 * scan.lpet - a))
    if alike > COPIED:
        sentence = (
            f"{called}: expected two images with noise of their own, found the same noise in both; give the images of "
            "two halves of the counts"
        )
        return _finding("halves-same", True, alike, COPIED, sentence, "refuse")
    off = abs(float((a + b)[mask].sum() / (2 * scan.lpet[mask].sum())) - 1)
    sentence = (
        f"{called}: expected halves whose mean is the LPET, found {off:.0%} between their activities; give the "
        "halves of this LPET, in its unit"
    )
    return _finding("halves-sum", off > HALVES, off, HALVES, sentence, "refuse")


# --- after -------------------------------------------------------------------------------------------------------


def check_result(scan: Scan, restored: Any) -> list[Finding]:
    """The findings about a restored image (the scan's grid, NumPy or torch, or a `Restoration`): activity moved, and an
    MR that the model did not trust."""
    image = as_array(getattr(restored, "mean", restored) if not isinstance(restored, np.ndarray) else restored)
    image = image.reshape(scan.lpet.shape)
    mask = brain_mask(scan)
    if scan.background is not None:
        mask = mask & ~scan.background
    moved = abs(float(image[mask].sum() / scan.lpet[mask].sum()) - 1)
    sentence = (
        f"result: expected the brain's activity to stay within {MOST_MOVED:.0%}, found it moved by {moved:.1%}; do not "
        "read numbers off it, and look where it differs from the LPET"
    )
    found = [_finding("activity", not moved <= MOST_MOVED, moved, MOST_MOVED, sentence)]
    if (fit := getattr(restored, "fit", None)) is not None:
        sentence = (
            f"{scan.sources.get('mr', 'MR')}: expected an MR of the head in the PET, found that the model trusts it at "
            f"{fit:.2f} of 1, so that the result is about that of the PET alone; check the file, or register it "
            "(--register)"
        )
        found.append(_finding("mr-trusted", fit < TRUSTED, fit, TRUSTED, sentence))
    return found


def speak(findings: list[Finding], force: bool = False) -> None:
    """Warn of what was found. Raises ValueError for the first refusal, unless `force`, which makes it a warning."""
    for one in findings:
        if one.severity == "refuse" and not force:
            raise ValueError(f"{one.sentence}; --force goes on all the same")
        if one.severity != "fine":
            warnings.warn(one.sentence, stacklevel=3)

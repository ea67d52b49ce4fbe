"""The noise of one image, for want of count halves: its covariance is measured, and probes that have it are drawn.

    n(x, y, z) = sd(x, y, z) u(x, y, z)          u: stationary, covariance C(in-plane lag) rho(axial lag)

rho    correlation of slices d apart after an in-plane high-pass, which leaves little anatomy. What is left of it many
       slices apart is anatomy, `floor`, and is taken off.
C      covariance of y_z - (y_z-d + y_z+d) / 2, over 3/2 - 2 rho_d + rho_2d / 2. Anatomy adds to it about as d does, so
       it is extrapolated from d = 1, 2, 3 to 0.
sd     local root mean square of the differences at d = 1.

Every number is read off the low-dose image alone. Where anatomy and noise cannot be told apart, `doubt` says so.
"""

from __future__ import annotations

import numpy as np
from scipy import fft, ndimage

DISTANCES = (1, 2, 3)  # slices between those whose differences are taken
FAR = (5, 6, 7)  # slices apart at which only anatomy correlates
SLICES = 12  # an image needs at least
SHRUNK = 0.04  # of a correlation: what anatomy that the floor misses feigns
REACH = 8.0  # voxels, SD of the taper on C: longer correlations are anatomy
MOST_ANATOMY, MOST_CORRELATED = 0.15, 0.85  # limits of `doubt`, set on scans whose halves are known


class NoiseModel:
    """The noise of an image (X, Y, Z), read off it inside `mask` (X, Y, Z) bool. rho: (7,) axial correlation at 0 to 6
    slices; floor: share of anatomy in the high-passed image; level: variance of u. Raises ValueError for fewer than
    `SLICES` slices."""

    def __init__(self, image: np.ndarray, mask: np.ndarray):
        if image.shape[2] < SLICES:
            raise ValueError(f"noise: expected at least {SLICES} slices to measure it, found {image.shape[2]}")
        self.rho, self.floor = _axial_correlation(image, mask)
        self.padded = tuple(fft.next_fast_len(2 * n, real=True) for n in image.shape[:2])
        self.sd, covariance = self._in_plane(image, mask)
        self.level = float(covariance[0, 0])
        power = np.maximum(fft.rfft2(covariance).real, 0)
        power *= max(self.level, 1e-6) / fft.irfft2(power, self.padded)[0, 0]
        self.colour = np.sqrt(power)
        known = np.sign(self.rho) * np.maximum(np.abs(self.rho) - SHRUNK, 0) * (np.arange(len(self.rho)) <= 3)
        known[0] = 1.0
        lags = np.zeros(2 * image.shape[2] + 16)
        lags[: len(known)], lags[-len(known) + 1 :] = known, known[:0:-1]
        axial = np.maximum(fft.rfft(lags).real, 0)
        self.axial = np.sqrt(axial / fft.irfft(axial, len(lags))[0])

    def _in_plane(self, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Local SD, and covariance of u over in-plane lags, wrapped round as FFTs have it."""
        differences = []
        for d in DISTANCES:
            factor = max(1.5 - 2 * self.rho[d] + self.rho[2 * d] / 2, 0.03)
            differences.append((second_difference(image, d) / np.sqrt(factor), np.sqrt(factor / d)))
        sd = _local_sd(image, differences[0][0], mask)
        seen = fft.rfft2(mask.astype(np.float32), self.padded, axes=(0, 1))
        pairs = fft.irfft2((np.abs(seen) ** 2).sum(-1), self.padded)
        found = []
        for difference, _ in differences:
            spectrum = fft.rfft2(np.where(mask, difference / sd, 0), self.padded, axes=(0, 1))
            products = fft.irfft2((np.abs(spectrum) ** 2).sum(-1), self.padded)
            found.append(products / np.maximum(pairs, 1e-3 * pairs.max()))
        trust = np.array([weight for _, weight in differences])[:, None]
        line = np.stack([np.ones(len(DISTANCES)), np.array(DISTANCES, float)], 1)
        values = np.stack(found).reshape(len(DISTANCES), -1)
        covariance = np.linalg.lstsq(trust * line, trust * values, rcond=None)[0][0].reshape(self.padded)
        x, y = (fft.fftfreq(n, 1 / n) for n in self.padded)
        return sd, covariance * np.exp(-0.5 * (x[:, None] ** 2 + y[None, :] ** 2) / REACH**2)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A probe (X, Y, Z) float32 with the noise's covariance, independent of the noise itself."""
        x, y, z = self.sd.shape
        white = fft.rfft(rng.standard_normal((*self.padded, 2 * z + 16), dtype=np.float32), axis=-1)
        along = fft.irfft(white * self.axial, 2 * z + 16, axis=-1)[..., :z]
        coloured = fft.irfft2(fft.rfft2(along, axes=(0, 1)) * self.colour[..., None], self.padded, axes=(0, 1))
        return (coloured[:x, :y] * self.sd).astype(np.float32)

    @property
    def summary(self) -> dict[str, float | list[float]]:
        """What was measured, for a card: axial correlation at 1 to 3 slices, share of anatomy."""
        return {"axial_correlation": [round(float(r), 3) for r in self.rho[1:4]], "anatomy": round(self.floor, 3)}

    @property
    def doubt(self) -> str | None:
        """Why the estimate is not to be trusted, None if it is."""
        if self.rho[1] > MOST_CORRELATED:
            return f"the noise of neighbouring slices is too alike (correlation {self.rho[1]:.2f})"
        if self.floor > MOST_ANATOMY:
            return f"anatomy and noise cannot be told apart (share of anatomy {self.floor:.2f})"
        return None


def _local_sd(image: np.ndarray, difference: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Counting noise grows with activity: its variance as a function of the smoothed image, times a slow field."""
    guide = ndimage.gaussian_filter(image, (1.5, 1.5, 0.8), mode="nearest")
    steps = np.quantile(guide[mask], np.linspace(0, 1, 21))
    level = np.clip(np.searchsorted(steps, guide) - 1, 0, 19)
    centre, variance = (np.array([v[mask & (level == i)].mean() for i in range(20)]) for v in (guide, difference**2))
    expected = np.interp(guide, centre, variance) * np.clip(guide / centre[0], 0.01, 1)
    inside = mask.astype(np.float32)
    slow = _local(difference**2 / expected * inside) / np.maximum(_local(inside), 1e-3)
    return np.sqrt(expected * np.where(_local(inside) > 0.1, slow, 1.0)).astype(np.float32)


def second_difference(image: np.ndarray, d: int) -> np.ndarray:
    """y_z - (y_z-d + y_z+d) / 2, with the image mirrored at its ends."""
    z = np.arange(image.shape[2])
    below, above = np.abs(z - d), len(z) - 1 - np.abs(len(z) - 1 - z - d)
    return image - (image[..., below] + image[..., above]) / 2


def _local(volume: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(volume, (4, 4, 1.5), mode="nearest")


def _axial_correlation(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float]:
    fine = image - ndimage.gaussian_filter(image, (1.5, 1.5, 0), mode="nearest")
    fine = fine / np.sqrt(_local(fine**2) + 1e-12)

    def apart(d: int) -> float:
        both = mask[..., d:] & mask[..., :-d]
        a, b = fine[..., d:][both], fine[..., :-d][both]
        return float((a * b).mean() / np.sqrt((a**2).mean() * (b**2).mean()))

    floor = max(0.0, float(np.mean([apart(d) for d in FAR])))
    rho = [(apart(d) - floor) / (1 - floor) for d in range(1, 2 * DISTANCES[-1] + 1)]
    return np.clip([1.0, *rho], -0.3, 1.0), floor

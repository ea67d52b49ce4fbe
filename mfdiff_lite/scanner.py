"""The PET scanner: how activity becomes counts, and counts an image.

The model, slice by slice (2-D; docs/method.md gives the values and their sources):

    trues       = attenuation * P(G(activity)) * sensitivity
    prompts     ~ Poisson(trues + background)            background = randoms + scatter

    G           Gaussian point-spread function (PSF), symmetric, hence its own adjoint
    P           Joseph projector, a sparse matrix; its transpose is the *exact* adjoint
    attenuation exp(-line integral of the attenuation map)
    sensitivity counts per activity and millimetre; sets how many counts the standard dose collects

Shapes: an image stack is (X, Y, N), N slices; a sinogram stack is (angles, bins, N). float32 throughout.
Units: activity in kBq/mL, attenuation in 1/cm, lengths in mm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from einops import rearrange
from scipy import ndimage, sparse

from .config import FWHM_TO_SD, check, within
from .phantom import VirtualPatient, shift_settings
from .scan import Scan, check_dose

Kernel = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]


@dataclass(frozen=True)
class Sinogram:
    """Counts of one acquisition with everything a reconstruction needs to know about them.

    counts, background, sensitivity: (angles, bins, N) float32. `background` is the expected number of randoms +
    scatter, `sensitivity` the counts per unit of line integral (attenuation included), both for the dose of these
    counts.
    """

    counts: np.ndarray
    background: np.ndarray
    sensitivity: np.ndarray

    def thin(self, dose_reduction: float, seed: int) -> Sinogram:
        """Keep each count with probability 1 / dose_reduction, as list-mode decimation does: again Poisson."""
        check_dose(dose_reduction)
        rng = np.random.default_rng(seed)
        kept = rng.binomial(self.counts.astype(np.int64), 1 / dose_reduction).astype(np.float32)
        return Sinogram(kept, self.background / dose_reduction, self.sensitivity / dose_reduction)

    def split(self, seed: int) -> tuple[Sinogram, Sinogram]:
        """Two halves whose Poisson noise is independent; their counts add up to `counts` exactly."""
        half = self.thin(2, seed)
        return half, dataclasses.replace(half, counts=self.counts - half.counts)


@dataclass(frozen=True)
class Scanner:
    """A 2-D PET scanner and its reconstruction. Defaults: a brain scanner at the usual standard dose.

    psf_fwhm [mm]; contamination = (randoms + scatter) / prompts; trues_per_mm3 = standard dose; iterations x subsets of
    OSEM; post_filter [mm FWHM, 3-D], 0 = none; model_psf = resolution recovery inside OSEM.
    """

    psf_fwhm: float = within(4.5, 0, 50)
    contamination: float = within(0.4, 0, 0.95)
    trues_per_mm3: float = within(50.0, 1e-3, 1e5)
    iterations: int = within(3, 1, 1000)
    subsets: int = within(21, 1, 2000)
    post_filter: float = within(0.0, 0, 50)
    model_psf: bool = True
    matrix: int = within(128, 8, 1024)
    pixel_size: float = within(2.0, 0.1, 20)
    angles: int = within(168, 1, 2000)
    scatter_fwhm: float = within(25.0, 1, 1000)  # mm; scatter has the shape of heavily blurred trues

    def __post_init__(self) -> None:
        check(self)
        if self.subsets > self.angles:
            raise ValueError(
                f"subsets: expected at most one for each of the {self.angles} angles, found {self.subsets}"
            )

    @classmethod
    def shifted(cls, shift: str | None) -> Scanner:
        """The scanner of a named OOD emulation (`None`: the default one)."""
        return cls(**shift_settings(shift)["scanner"])

    # --- the linear model and its adjoint ------------------------------------------------------------------------

    def forward(self, image: np.ndarray, subset: slice = slice(None), psf: bool = True) -> np.ndarray:
        """Line integrals [activity * mm] of the blurred image: (X, Y, N) -> (angles, bins, N)."""
        system = self._subset_matrix(subset)
        blurred = self._blur(image) if psf else image
        lines = system @ rearrange(blurred, "x y n -> (x y) n")
        return rearrange(lines, "(a b) n -> a b n", b=self.matrix)

    def adjoint(self, sinogram: np.ndarray, subset: slice = slice(None), psf: bool = True) -> np.ndarray:
        """The exact transpose of `forward`: (angles, bins, N) -> (X, Y, N)."""
        system = self._subset_matrix(subset)
        image = system.T @ rearrange(sinogram, "a b n -> (a b) n")
        image = rearrange(image, "(x y) n -> x y n", y=self.matrix)
        return self._blur(image) if psf else image

    def _subset_matrix(self, subset: slice) -> sparse.csr_matrix:
        return subset_matrix(self.matrix, self.pixel_size, self.angles, subset.start, subset.step)

    def _blur(self, image: np.ndarray) -> np.ndarray:
        blur = blur_matrix(self.matrix, self.psf_fwhm / self.pixel_size)
        along_x = rearrange(blur @ rearrange(image, "x y n -> x (y n)"), "x (y n) -> y (x n)", y=self.matrix)
        return rearrange(blur @ along_x, "y (x n) -> x y n", x=self.matrix)

    # --- counts --------------------------------------------------------------------------------------------------

    def expected(self, activity: np.ndarray, attenuation: np.ndarray, injected: float = 1.0) -> Sinogram:
        """The noise-free acquisition of a standard dose; `counts` then holds the mean of the Poisson law.

        activity [kBq/mL] and attenuation [1/cm]: (X, Y, N). The whole stack collects `trues_per_mm3` times the volume
        of the head. injected: share of the tracer; trues and scatter follow it, randoms its square (a thinned scan has
        fewer counts of all three alike).
        """
        head_mm3 = np.count_nonzero(attenuation > 0.01) * self.pixel_size**3
        survival = np.exp(-self.forward(attenuation, psf=False) / 10)  # 1/cm * mm / 10
        trues = survival * self.forward(activity)
        gain = self.trues_per_mm3 * head_mm3 / max(trues.sum(), 1e-9)
        trues *= gain
        background = self._background(trues, injected)
        return Sinogram(injected * trues + background, background, (injected * gain * survival).astype(np.float32))

    def _background(self, trues: np.ndarray, injected: float = 1.0) -> np.ndarray:
        """Randoms (flat) and scatter (blurred trues), half of the contamination each; every slice keeps its own
        share."""
        total = trues.sum((0, 1), keepdims=True) * self.contamination / (1 - self.contamination)
        sigma = self.scatter_fwhm * FWHM_TO_SD / self.pixel_size
        scatter = ndimage.gaussian_filter(trues, (0, sigma, 0), mode="constant")
        scatter /= np.maximum(scatter.sum((0, 1), keepdims=True), 1e-9)
        flat = 1 / (self.angles * self.matrix)
        return (total * (injected * scatter + injected**2 * flat) / 2).astype(np.float32)

    def acquire(self, activity: np.ndarray, attenuation: np.ndarray, seed: int) -> Sinogram:
        """One standard-dose acquisition: Poisson counts of `expected`."""
        mean = self.expected(activity, attenuation)
        counts = np.random.default_rng(seed).poisson(mean.counts).astype(np.float32)
        return dataclasses.replace(mean, counts=counts)

    # --- image ---------------------------------------------------------------------------------------------------

    def reconstruct(self, sinogram: Sinogram, kernel: Kernel = (np.asarray, np.asarray)) -> np.ndarray:
        """OSEM with the background in the model; returns activity [kBq/mL], (X, Y, N), non-negative.

        x <- x / (A_s' 1) * A_s' (y_s / (A_s x + b_s))        (Hudson & Larkin 1994), one subset s after the other

        kernel: (K, its transpose), functions of an image (X, Y, N), for an image that is K x and a model A_s K instead
        (the kernel method, Wang & Qi 2015); by default nothing.
        """
        spread, gather = kernel
        image = np.ones((self.matrix, self.matrix, sinogram.counts.shape[-1]), np.float32)
        image *= field_of_view(self.matrix)[..., None]
        subsets = [slice(first, None, self.subsets) for first in subset_order(self.subsets)]
        norms = [gather(self.adjoint(sinogram.sensitivity[s], s, self.model_psf)) for s in subsets]
        floor = 1e-6 * max(float(norm.max()) for norm in norms)
        for _ in range(self.iterations):
            for subset, norm in zip(subsets, norms, strict=True):
                gain, background = sinogram.sensitivity[subset], sinogram.background[subset]
                expected = gain * self.forward(spread(image), subset, self.model_psf) + background
                ratio = gain * sinogram.counts[subset] / np.maximum(expected, 1e-9)
                image *= gather(self.adjoint(ratio, subset, self.model_psf)) / np.maximum(norm, floor)
        image = spread(image)
        if self.post_filter:
            image = ndimage.gaussian_filter(image, self.post_filter * FWHM_TO_SD / self.pixel_size, mode="nearest")
        return image

    def scan(
        self,
        patient: VirtualPatient,
        dose_reduction: float = 20,
        seed: int | None = None,
        independent: bool = False,
        halves: bool = False,
    ) -> Scan:
        """Scan a virtual patient once at standard dose and return LPET, SPET and MR on one grid.

        The LPET is the SPET's acquisition thinned by `dose_reduction`, so the two share 1 / dose_reduction of their
        counts, as real list-mode pairs do; `independent=True` draws a second acquisition for it instead. `halves=True`
        also reconstructs two halves of the LPET's counts, what stage 2 learns from. `seed` defaults to the patient's.
        """
        seed = patient.seed if seed is None else seed
        self._check_grid(patient)
        standard = self.acquire(patient.activity, patient.attenuation, seed)
        source = self.acquire(patient.activity, patient.attenuation, seed + 1_000_003) if independent else standard
        low = source.thin(dose_reduction, seed + 2_000_003)
        a, b = low.split(seed + 3_000_003)
        return Scan(
            lpet=self.reconstruct(low),
            mr=patient.mr,
            spet=self.reconstruct(standard),
            activity=patient.activity,
            mask=patient.mask,
            tissues=patient.tissues,
            lesions=patient.lesions,
            lesion_table=patient.lesion_table,
            halves=(self.reconstruct(a), self.reconstruct(b)) if halves else None,
            sinogram=low,
            affine=patient.affine,
            dose_reduction=dose_reduction,
            name=patient.name,
        )

    def _check_grid(self, patient: VirtualPatient) -> None:
        size, voxel = patient.activity.shape[:2], abs(np.diag(patient.affine)[:2])
        if size != (self.matrix, self.matrix) or not np.allclose(voxel, self.pixel_size):
            raise ValueError(
                f"{patient.name}: expected the scanner's grid, {self.matrix} x {self.matrix} pixels of "
                f"{self.pixel_size:g} mm, found {size[0]} x {size[1]} of {voxel[0]:g} mm; leave matrix and pixel_size "
                "at the patient's"
            )


def subset_order(subsets: int) -> list[int]:
    """Subsets in an order that keeps successive angles far apart (golden-ratio step)."""
    step = next(s for s in range(max(1, round(subsets * 0.382)), subsets + 1) if np.gcd(s, subsets) == 1)
    return [(i * step) % subsets for i in range(subsets)]


@lru_cache(maxsize=8)
def field_of_view(matrix: int) -> np.ndarray:
    """1 in the circle that every angle sees, (X, Y) float32."""
    axis = np.arange(matrix) - (matrix - 1) / 2
    return (axis[:, None] ** 2 + axis[None, :] ** 2 <= (matrix / 2) ** 2).astype(np.float32)


@lru_cache(maxsize=32)
def blur_matrix(matrix: int, fwhm: float) -> sparse.csr_matrix:
    """Gaussian blur along one axis as a symmetric Toeplitz matrix (zero outside the field of view).

    Sparse, because the multi-threaded product of dense matrices as small as these takes many times longer on a busy
    machine.
    """
    distance = np.subtract.outer(np.arange(matrix), np.arange(matrix))
    sigma = max(fwhm * FWHM_TO_SD, 1e-3)
    taps = np.exp(-0.5 * (np.arange(-matrix, matrix + 1) / sigma) ** 2)
    weights = np.exp(-0.5 * (distance / sigma) ** 2) / taps.sum()
    return sparse.csr_matrix(np.where(weights > 1e-8, weights, 0).astype(np.float32))


@lru_cache(maxsize=256)
def subset_matrix(
    matrix: int, pixel_size: float, angles: int, first: int | None, step: int | None
) -> sparse.csr_matrix:
    """The rows of the system matrix that belong to every `step`-th angle from `first`."""
    full = _system_matrix(matrix, pixel_size, angles)
    rows = rearrange(np.arange(angles * matrix), "(a b) -> a b", b=matrix)[first::step].ravel() if step else slice(None)
    return full[rows]


@lru_cache(maxsize=4)
def _system_matrix(matrix: int, pixel_size: float, angles: int) -> sparse.csr_matrix:
    """Joseph's method: step through the image along the ray's main axis, interpolate linearly across it.

    Rows are (angle, bin), columns (x, y), entries millimetres of ray. Joseph, IEEE TMI 1982.
    """
    centre = (matrix - 1) / 2
    bins = np.arange(matrix) - centre  # distance of each ray from the centre, in pixels
    steps = np.arange(matrix)
    rows, columns, lengths = [], [], []
    for index, angle in enumerate(np.pi * np.arange(angles) / angles):
        cos, sin = np.cos(angle), np.sin(angle)
        x_is_main = abs(sin) >= abs(cos)  # the ray s = x cos + y sin runs along (-sin, cos)
        main, cross = (sin, cos) if x_is_main else (cos, sin)
        # On the ray, cross coordinate = (s - main coordinate * cross) / main.
        position = (bins[:, None] - (steps - centre)[None, :] * cross) / main + centre  # (bins, steps)
        low = np.floor(position).astype(np.int64)
        for neighbour, weight in ((low, 1 - (position - low)), (low + 1, position - low)):
            b, k = np.nonzero((neighbour >= 0) & (neighbour < matrix) & (weight > 0))
            x, y = (k, neighbour[b, k]) if x_is_main else (neighbour[b, k], k)
            rows.append(index * matrix + b)
            columns.append(x * matrix + y)
            lengths.append(weight[b, k] * pixel_size / abs(main))
    entries = (np.concatenate(lengths).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_matrix(entries, shape=(angles * matrix, matrix * matrix))

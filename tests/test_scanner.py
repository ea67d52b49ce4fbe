"""The scanner: exact adjoint, an independent projector, counting statistics, and images in the unit they claim."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from mfdiff_lite.phantom import SHIFTS, virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scanner import Scanner, Sinogram, subset_order

SMALL = Scanner(matrix=64, pixel_size=4.0, angles=84, psf_fwhm=6.0)  # same field of view, a quarter of the work


def pixels(scanner):
    """Pixel centres [mm] along one axis, 0 in the middle."""
    return (np.arange(scanner.matrix) - (scanner.matrix - 1) / 2) * scanner.pixel_size


def disk(scanner, radius, centre=(0.0, 0.0), fine=9):
    """(X, Y, 1) float32: the share of each pixel that lies in a disk [mm], from fine x fine samples."""
    offset = ((np.arange(fine) + 0.5) / fine - 0.5) * scanner.pixel_size
    axis = pixels(scanner)[:, None] + offset[None, :]
    inside = (axis[:, :, None, None] - centre[0]) ** 2 + (axis[None, None] - centre[1]) ** 2 <= radius**2
    return inside.mean((1, 3))[..., None].astype(np.float32)


def dot(a, b):
    """Inner product in float64."""
    return float(np.sum(a.astype(float) * b.astype(float)))


def correlation(a, b):
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.fixture(scope="module")
def patient():
    return virtual_patient(load_anatomy("icbm152"), seed=3, slices=2)


@pytest.fixture(scope="module")
def standard(patient):
    """Expected counts and one acquisition of the default scanner."""
    scanner = Scanner()
    return scanner.expected(patient.activity, patient.attenuation), scanner.acquire(
        patient.activity, patient.attenuation, seed=1
    )


# ---- the linear model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("psf", [True, False])
@pytest.mark.parametrize(
    "subset", [slice(None), slice(0, None, 21), slice(13, None, 21)], ids=["whole", "subset 0", "subset 13"]
)
def test_adjoint(subset, psf):
    scanner, rng = Scanner(), np.random.default_rng(0)
    image = rng.random((128, 128, 2), np.float32)
    sinogram = rng.random((len(range(168)[subset]), 128, 2), np.float32)
    left = dot(scanner.forward(image, subset, psf), sinogram)
    right = dot(image, scanner.adjoint(sinogram, subset, psf))
    assert abs(left - right) <= 1e-6 * abs(left)


def test_adjoint_of_signed_data():
    # Dot products of positive data hide an error behind their size; these have no mean, so the norms are the yardstick.
    scanner, rng = Scanner(), np.random.default_rng(1)
    image = rng.standard_normal((128, 128, 1)).astype(np.float32)
    sinogram = rng.standard_normal((168, 128, 1)).astype(np.float32)
    lines = scanner.forward(image)
    difference = dot(lines, sinogram) - dot(image, scanner.adjoint(sinogram))
    assert abs(difference) <= 1e-6 * np.linalg.norm(lines) * np.linalg.norm(sinogram)


def test_subsets_are_rows_of_the_whole_operator():
    image = np.random.default_rng(2).random((64, 64, 1), np.float32)
    whole = SMALL.forward(image)
    for first in range(4):
        np.testing.assert_array_equal(SMALL.forward(image, slice(first, None, 4)), whole[first::4])


@pytest.mark.parametrize("subsets", [1, 2, 3, 7, 21, 34])
def test_each_subset_is_visited_once(subsets):
    assert sorted(subset_order(subsets)) == list(range(subsets))


@pytest.mark.parametrize("centre", [(0.0, 0.0), (31.0, -44.0)])
def test_line_integrals_of_a_disk(centre):
    """Against 2 sqrt(r^2 - s^2): within 1 % of the diameter RMS, and 3 % for each ray a pixel off the edge."""
    scanner, radius = Scanner(), 60.0
    lines = scanner.forward(disk(scanner, radius, centre), psf=False)[..., 0]
    angles = np.pi * np.arange(scanner.angles) / scanner.angles
    s = pixels(scanner)[None, :] - (centre[0] * np.cos(angles) + centre[1] * np.sin(angles))[:, None]
    analytic = 2 * np.sqrt(np.maximum(radius**2 - s**2, 0))
    error = (lines - analytic) / (2 * radius)
    assert np.sqrt(np.mean(error**2)) < 0.01
    assert np.abs(error[np.abs(np.abs(s) - radius) > scanner.pixel_size]).max() < 0.03
    assert np.abs(lines[np.abs(s) > radius + 2 * scanner.pixel_size]).max() == 0  # nothing outside


def test_angle_zero_and_ninety_are_the_sums_along_the_axes():
    image = np.random.default_rng(3).random((64, 64, 1), np.float32)
    image *= disk(SMALL, 110.0) == 1
    lines = SMALL.forward(image, psf=False)[..., 0]
    np.testing.assert_allclose(lines[0], image[..., 0].sum(1) * SMALL.pixel_size, rtol=1e-5, atol=1e-4)  # s = x
    np.testing.assert_allclose(lines[42], image[..., 0].sum(0) * SMALL.pixel_size, rtol=1e-4, atol=1e-3)  # s = y


def test_every_angle_sees_the_total_activity():
    scanner = Scanner()
    image = disk(scanner, 45.0, (20.0, -35.0)) + 2 * disk(scanner, 12.0, (-50.0, 10.0))
    totals = scanner.forward(image)[..., 0].sum(1) * scanner.pixel_size  # activity * mm^2
    np.testing.assert_allclose(totals, image.sum() * scanner.pixel_size**2, rtol=2e-3)


@pytest.mark.parametrize("fwhm", [3.0, 4.5, 6.5])
def test_psf_keeps_the_sum_and_has_its_width(fwhm):
    scanner = Scanner(psf_fwhm=fwhm)
    point = np.zeros((128, 128, 1), np.float32)
    point[60, 70] = 1
    blurred = scanner._blur(point)[..., 0].astype(float)
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    for profile, centre in ((blurred.sum(1), 60), (blurred.sum(0), 70)):
        distance = (np.arange(128) - centre) * scanner.pixel_size
        assert (profile * distance).sum() == pytest.approx(0, abs=1e-4)
        # A Gaussian sampled at 2 mm keeps its second moment to 1e-4 from 3 mm FWHM on.
        assert np.sqrt((profile * distance**2).sum() * 8 * np.log(2)) == pytest.approx(fwhm, rel=0.01)


def test_no_psf_is_the_identity():
    image = np.random.default_rng(4).random((64, 64, 1), np.float32)
    np.testing.assert_allclose(dataclasses.replace(SMALL, psf_fwhm=0.0)._blur(image), image, rtol=1e-6)


# ---- counts --------------------------------------------------------------------------------------------------------


def test_trues_per_mm3_and_contamination(patient):
    for trues_per_mm3, contamination in ((50.0, 0.4), (12.5, 0.25)):
        scanner = Scanner(trues_per_mm3=trues_per_mm3, contamination=contamination)
        mean = scanner.expected(patient.activity, patient.attenuation)
        trues = mean.counts.astype(float) - mean.background
        head_mm3 = np.count_nonzero(patient.attenuation > 0.01) * 8.0
        assert trues.sum() / head_mm3 == pytest.approx(trues_per_mm3, rel=1e-4)
        # contamination = (randoms + scatter) / prompts, in each slice
        np.testing.assert_allclose(mean.background.sum((0, 1)) / mean.counts.sum((0, 1)), contamination, rtol=1e-4)


def test_less_tracer_lowers_randoms_by_its_square(patient):
    """Trues and scatter follow the tracer; of a half, a quarter of the randoms is left. Thinning divides all alike."""
    scanner = Scanner()
    full, half = (scanner.expected(patient.activity, patient.attenuation, injected) for injected in (1.0, 0.5))
    trues, fewer = (m.counts.astype(float) - m.background for m in (full, half))
    np.testing.assert_allclose(fewer, trues / 2, atol=1e-4 * trues.max())
    corner = full.background[0, 0].astype(float)  # half scatter, half randoms, over all bins
    total = full.background.astype(float).sum((0, 1))
    np.testing.assert_allclose(half.background.sum((0, 1)), total * (0.5 + 0.25) / 2, rtol=1e-4)
    assert (half.background[0, 0] < corner / 2).all()


def test_expected_is_the_attenuated_projection(patient):
    scanner = Scanner()
    mean = scanner.expected(patient.activity, patient.attenuation)
    trues = mean.sensitivity * scanner.forward(patient.activity) + mean.background
    np.testing.assert_allclose(trues, mean.counts, rtol=1e-4, atol=1e-4)
    # A ray through a disk of water keeps exp(-mu L) of its counts; a ray through air keeps all of them.
    water = 0.0975 * disk(scanner, 80.0)
    sensitivity = scanner.expected(disk(scanner, 80.0), water).sensitivity[..., 0]
    assert sensitivity[0, 64] / sensitivity[0, 2] == pytest.approx(np.exp(-0.0975 * 16.0), rel=0.01)


def test_acquire_is_poisson(standard):
    """Standardised residuals over 43 008 bins: mean 0 and variance 1 within five of their own standard errors."""
    mean, acquired = standard
    z = (acquired.counts - mean.counts).astype(float) / np.sqrt(mean.counts)
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    # Var(z^2) = 2 + 1/mean for Poisson
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(np.mean(2 + 1 / mean.counts) / z.size)
    np.testing.assert_array_equal(acquired.counts, np.rint(acquired.counts))
    np.testing.assert_array_equal(acquired.background, mean.background)
    np.testing.assert_array_equal(acquired.sensitivity, mean.sensitivity)


@pytest.mark.parametrize("dose_reduction", [4, 20, 100])
def test_thinning(standard, dose_reduction):
    mean, acquired = standard
    low = acquired.thin(dose_reduction, seed=5)
    assert (low.counts <= acquired.counts).all() and (low.counts >= 0).all()
    np.testing.assert_allclose(low.background, acquired.background / dose_reduction, rtol=1e-6)
    np.testing.assert_allclose(low.sensitivity, acquired.sensitivity / dose_reduction, rtol=1e-6)
    p = 1 / dose_reduction
    hit = acquired.counts > 0
    # Given the counts n: binomial, mean n p, variance n p (1 - p).
    z = (low.counts - p * acquired.counts)[hit] / np.sqrt(p * (1 - p) * acquired.counts[hit].astype(float))
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    kurtosis = np.mean(2 + (1 - 6 * p * (1 - p)) / (acquired.counts[hit] * p * (1 - p)))
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(kurtosis / z.size)
    # Over both draws: Poisson again, and it shares 1 / sqrt(DRF) of its noise with the source.
    whole = (acquired.counts - mean.counts) / np.sqrt(mean.counts)
    part = (low.counts - p * mean.counts) / np.sqrt(p * mean.counts)
    assert abs(np.mean(part**2) - 1) < 5 * np.sqrt(np.mean(2 + 1 / (p * mean.counts)) / part.size)
    assert correlation(whole, part) == pytest.approx(np.sqrt(p), abs=5 / np.sqrt(whole.size))


@pytest.mark.parametrize("dose_reduction", [0.5, 0.0, -3.0, float("nan"), float("inf")])
def test_thinning_refuses_a_dose_that_is_none(standard, patient, dose_reduction):
    with pytest.raises(ValueError, match="dose_reduction"):
        standard[1].thin(dose_reduction, seed=0)
    with pytest.raises(ValueError, match="dose_reduction"):
        Scanner().scan(patient, dose_reduction)


def test_thinning_by_one_keeps_every_count(standard):
    np.testing.assert_array_equal(standard[1].thin(1, seed=0).counts, standard[1].counts)


def test_halves_add_up_and_are_independent(standard):
    mean, acquired = standard
    a, b = acquired.split(seed=2)
    np.testing.assert_array_equal(a.counts + b.counts, acquired.counts)
    for half in (a, b):
        np.testing.assert_allclose(half.background, acquired.background / 2, rtol=1e-6)
        np.testing.assert_allclose(half.sensitivity, acquired.sensitivity / 2, rtol=1e-6)
    noise_a, noise_b = ((half.counts - mean.counts / 2) / np.sqrt(mean.counts / 2) for half in (a, b))
    assert abs(correlation(noise_a, noise_b)) < 5 / np.sqrt(noise_a.size)
    # Halves of *known* counts are perfectly anticorrelated: independence comes from the Poisson law of the sum.
    assert correlation(a.counts - acquired.counts / 2, b.counts - acquired.counts / 2) == pytest.approx(-1, abs=1e-6)


# ---- images --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def water_disk():
    """A disk of 5 kBq/mL with a hot spot of 15 in water, and its noise-free OSEM after many iterations."""
    scanner = dataclasses.replace(SMALL, iterations=20, subsets=12)
    activity = 5 * disk(scanner, 70.0) + 10 * disk(scanner, 20.0, (30.0, 10.0))
    attenuation = 0.0975 * disk(scanner, 80.0)
    return scanner, activity, attenuation, scanner.reconstruct(scanner.expected(activity, attenuation))


def test_osem_recovers_kbq_per_ml(water_disk):
    scanner, activity, _, image = water_disk
    x, y = pixels(scanner)[:, None], pixels(scanner)[None, :]
    hot = (x - 30) ** 2 + (y - 10) ** 2
    radius = np.hypot(x, y)
    assert image[hot < 10**2].mean() == pytest.approx(15, rel=0.02)
    flat = (radius < 55) & (hot > 35**2)
    assert image[flat].mean() == pytest.approx(5, rel=0.01)
    assert image[flat].std() < 0.1 * 5
    assert image[radius > 90].max() < 0.05 * 5
    assert image.sum() == pytest.approx(activity.sum(), rel=0.01)


def test_osem_reproduces_the_counts(water_disk):
    scanner, activity, attenuation, image = water_disk
    mean = scanner.expected(activity, attenuation)
    again = mean.sensitivity * scanner.forward(image) + mean.background
    assert np.linalg.norm(again - mean.counts) < 0.005 * np.linalg.norm(mean.counts)


def test_osem_without_the_background_would_be_wrong(water_disk):
    # The background belongs into the model: left out, its counts end up as activity.
    scanner, activity, attenuation, image = water_disk
    mean = scanner.expected(activity, attenuation)
    naive = scanner.reconstruct(dataclasses.replace(mean, background=np.zeros_like(mean.background)))
    assert naive.sum() > 1.5 * image.sum()


def test_gain_invariance(water_disk):
    """Ten times the activity: the same counts (the dose is fixed), ten times the image."""
    scanner, activity, attenuation, image = water_disk
    a, b = scanner.expected(activity, attenuation), scanner.expected(10 * activity, attenuation)
    np.testing.assert_allclose(b.counts, a.counts, rtol=1e-4)
    np.testing.assert_allclose(b.sensitivity, a.sensitivity / 10, rtol=1e-4)
    np.testing.assert_allclose(scanner.reconstruct(b), 10 * image, rtol=0.02, atol=0.02)


def test_dose_does_not_change_the_unit(patient, standard):
    """Thinned counts give the same mean activity in the brain, up to their noise."""
    scanner, acquired = Scanner(), standard[1]
    full = scanner.reconstruct(acquired)[patient.mask].mean()
    assert full == pytest.approx(patient.activity[patient.mask].mean(), rel=0.08)  # partial volume at the cortex
    assert scanner.reconstruct(acquired.thin(20, 0))[patient.mask].mean() == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("model_psf", [True, False])
@pytest.mark.parametrize("post_filter", [0.0, 4.0])
def test_osem_is_non_negative_and_finite_at_any_dose(patient, standard, model_psf, post_filter):
    scanner = Scanner(iterations=1, model_psf=model_psf, post_filter=post_filter)
    image = scanner.reconstruct(standard[1].thin(200, 1))
    assert np.isfinite(image).all() and image.min() >= 0
    assert image[patient.mask].mean() == pytest.approx(patient.activity[patient.mask].mean(), rel=0.3)


def test_no_counts_give_no_activity():
    nothing = np.zeros((84, 64, 1), np.float32)
    image = SMALL.reconstruct(Sinogram(nothing, nothing + 0.1, nothing + 1))
    assert np.array_equal(image, np.zeros_like(image))


def test_resolution_recovery_sharpens():
    """A hot spot as small as the PSF: without the PSF in the model it stays as blurred as the scanner made it."""
    scanner = Scanner(iterations=8, psf_fwhm=6.0)
    activity = 5 * disk(scanner, 70.0) + 10 * disk(scanner, 5.0, (31.0, 11.0))
    mean = scanner.expected(activity, 0.0975 * disk(scanner, 80.0))
    x, y = pixels(scanner)[:, None], pixels(scanner)[None, :]
    inside = (x - 31) ** 2 + (y - 11) ** 2 < 5**2
    blurred = scanner._blur(activity)[inside].mean()
    plain, sharp = (dataclasses.replace(scanner, model_psf=m).reconstruct(mean)[inside].mean() for m in (False, True))
    assert plain == pytest.approx(blurred, rel=0.05)
    assert blurred + 0.4 * (activity[inside].mean() - blurred) < sharp < 15


def test_post_filter_is_a_3d_gaussian_of_the_stated_width(patient, standard):
    plain = Scanner().reconstruct(standard[1])
    filtered = Scanner(post_filter=5.0).reconstruct(standard[1])
    np.testing.assert_allclose(
        filtered, ndimage.gaussian_filter(plain, 5.0 / 2.3548 / 2.0, mode="nearest"), rtol=1e-3, atol=1e-3
    )


# ---- scans ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_scan(patient):
    a, b, c = (Scanner(iterations=1).scan(patient, 20, seed) for seed in (4, 4, 5))
    np.testing.assert_array_equal(a.lpet, b.lpet)
    np.testing.assert_array_equal(a.spet, b.spet)
    assert np.abs(a.lpet - c.lpet)[patient.mask].mean() > 0.1 * a.lpet[patient.mask].mean()
    np.testing.assert_array_equal(a.activity, patient.activity)
    np.testing.assert_array_equal(a.mr, patient.mr)


def test_default_seed_is_the_patients(patient):
    np.testing.assert_array_equal(
        Scanner(iterations=1).scan(patient, 10).spet, Scanner(iterations=1).scan(patient, 10, patient.seed).spet
    )


def test_thinned_pairs_share_noise_and_independent_ones_do_not(patient):
    """Correlation of image noise in LPET and SPET: 1 / sqrt(DRF) when thinned, 0 for an acquisition of its own.

    DRF 4, one iteration (nearly linear) and 24 scans: the noise is the difference from the mean over scans.
    """
    scanner = Scanner(iterations=1, subsets=12, matrix=64, pixel_size=4.0, angles=84)
    small = dataclasses.replace(
        patient,
        affine=np.diag([4.0, 4.0, 2.0, 1.0]),
        **{
            k: getattr(patient, k)[::2, ::2, :1]
            for k in ("activity", "attenuation", "mr", "mask", "tissues", "lesions")
        },
    )
    found = {}
    for independent in (False, True):
        scans = [scanner.scan(small, 4, seed, independent) for seed in range(24)]
        lpet, spet = (np.stack([getattr(s, k) for s in scans])[:, small.mask] for k in ("lpet", "spet"))
        found[independent] = correlation(lpet - lpet.mean(0), spet - spet.mean(0))
    assert found[False] == pytest.approx(0.5, abs=0.06)
    assert abs(found[True]) < 0.05


def test_low_dose_noise_grows_as_it_must(patient, standard):
    """Image noise follows 1 / sqrt(counts): DRF 16 against 4, about twice the SD (positivity bends it a little)."""
    scanner = Scanner(iterations=1)
    clean = scanner.reconstruct(standard[0])[patient.mask]
    sd = {dose: np.std(scanner.reconstruct(standard[1].thin(dose, 3))[patient.mask] - clean) for dose in (4, 16)}
    assert sd[16] / sd[4] == pytest.approx(2, rel=0.1)


def test_shifted_scanners():
    assert Scanner.shifted(None) == Scanner()
    for name, settings in SHIFTS.items():
        scanner = Scanner.shifted(name)
        changed = {
            f.name for f in dataclasses.fields(Scanner) if getattr(scanner, f.name) != getattr(Scanner(), f.name)
        }
        assert changed == set(settings["scanner"])
        assert {key: getattr(scanner, key) for key in changed} == settings["scanner"]
    assert Scanner.shifted("edge-scanner").psf_fwhm == 6.2


def test_unknown_shift():
    with pytest.raises(ValueError, match="'wet-scanner'.*choose a listed name") as error:
        Scanner.shifted("wet-scanner")
    assert all(name in str(error.value) for name in SHIFTS)

"""Baselines against closed forms and against sums by hand: a weak baseline would flatter everything else."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from mfdiff_lite.baselines import gaussian, kernel_em, mr_guided, mr_kernel, non_local_means, tune
from mfdiff_lite.config import FWHM_TO_SD
from mfdiff_lite.metrics import psnr
from mfdiff_lite.phantom import virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner
from mfdiff_lite.view import ActivityScale, scale_mr

SHAPE = (36, 40, 10)
HALVES = np.where(np.arange(SHAPE[0]) < 18, 10.0, 4.0)[:, None, None] * np.ones(SHAPE)


def noisy(seed=0, sd=2.0, mr=True):
    """Two halves of even activity under noise, and an MR that shows the same edge."""
    rng = np.random.default_rng(seed)
    lpet = np.clip(HALVES + sd * rng.standard_normal(SHAPE), 0, None)
    edge = np.where(HALVES > 5, 100.0, 40.0) + rng.standard_normal(SHAPE)
    return Scan(lpet, edge if mr else None, spet=HALVES, mask=np.ones(SHAPE, bool), name=f"halves-{seed}")


def test_gaussian_has_its_width_in_mm():
    point = np.zeros((41, 41, 41), np.float32)
    point[20, 20, 20] = 1
    blurred = gaussian(Scan(point, voxel_size=(2.0, 2.0, 1.0)), fwhm=6.0).astype(float)
    assert blurred.sum() == pytest.approx(1, abs=1e-4)
    for axis, voxel in enumerate((2.0, 2.0, 1.0)):
        profile = blurred.sum(tuple({0, 1, 2} - {axis}))
        width = np.sqrt((profile * ((np.arange(41) - 20) * voxel) ** 2).sum()) * 2.3548
        assert width == pytest.approx(6.0, rel=0.02)


def test_gaussian_leaves_the_axis_of_a_slice_alone():
    image = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    expected = ndimage.gaussian_filter(image, 4.5 * FWHM_TO_SD / 2, mode="nearest")
    np.testing.assert_allclose(gaussian(Scan(image))[..., 0], expected, rtol=1e-5)


def test_tune_finds_the_best_settings():
    """The reference is the noisy image filtered with 5 mm: that width is the best, of one setting or of two."""
    scan = noisy()
    scan = dataclasses.replace(scan, spet=gaussian(scan, 5.0) * np.float32(1.0001))
    assert tune(gaussian, [scan], fwhm=np.arange(2.0, 10.01, 0.5)) == {"fwhm": 5.0}
    assert tune(gaussian, [scan], fwhm=[3.0, 7.0])["fwhm"] in (3.0, 7.0)
    blend = lambda s, fwhm, share: share * gaussian(s, fwhm)  # noqa: E731
    assert tune(blend, [scan], fwhm=[4.0, 5.0, 6.0], share=[0.5, 1.0]) == {"fwhm": 5.0, "share": 1.0}


def test_a_wider_filter_for_more_noise():
    widths = [tune(gaussian, [noisy(sd=sd)], fwhm=np.arange(1.0, 12.01, 0.5))["fwhm"] for sd in (0.5, 2.0, 4.0)]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_mr_guided_with_an_even_mr_is_the_gaussian():
    scan = noisy()
    scan = dataclasses.replace(scan, mr=np.full(SHAPE, 7.0, np.float32))
    inside = (slice(8, -8), slice(8, -8), slice(4, -4))
    wide = mr_guided(scan, fwhm=4.0)  # cut at 2 SD, so only nearly the same
    np.testing.assert_allclose(wide[inside], gaussian(scan, 4.0)[inside], rtol=0.05)


def test_mr_guided_equals_the_plain_sum_over_neighbours():
    """One voxel by hand, straight from the definition."""
    scan, at = noisy(), (17, 20, 5)
    mr = scale_mr(scan.mr, ActivityScale(scan.lpet, scan.voxel_size).mask)
    sd = 6.0 * FWHM_TO_SD / 2
    total = weights = 0.0
    reach = int(np.ceil(2 * sd))
    for x in range(at[0] - reach, at[0] + reach + 1):
        for y in range(at[1] - reach, at[1] + reach + 1):
            for z in range(at[2] - reach, at[2] + reach + 1):
                apart = (x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2
                weight = (apart <= 9 * sd**2) * np.exp(-0.5 * (apart / sd**2 + ((mr[x, y, z] - mr[at]) / 0.7) ** 2))
                total, weights = total + weight * scan.lpet[x, y, z], weights + weight
    assert mr_guided(scan, 6.0, 0.7)[at] == pytest.approx(total / weights, rel=1e-5)


def test_the_mr_keeps_an_edge_that_a_gaussian_blurs():
    scan = noisy()
    edge = (slice(16, 20), slice(6, -6), slice(2, -2))
    error = {name: np.abs(f(scan, 8.0) - HALVES)[edge].mean() for name, f in (("mr", mr_guided), ("g", gaussian))}
    assert error["mr"] < 0.4 * error["g"]


def test_mr_guided_without_mr_says_so():
    with pytest.raises(ValueError, match="halves-0: expected a scan with MR"):
        mr_guided(noisy(mr=False))


def test_the_mr_kernel_averages_and_its_transpose_is_exact():
    spread, gather = mr_kernel(noisy(), 5.0, 0.5)
    rng = np.random.default_rng(0)
    x, y = rng.random((2, *SHAPE))
    np.testing.assert_allclose(spread(np.ones(SHAPE)), 1, rtol=1e-5)
    assert np.vdot(spread(x), y) == pytest.approx(np.vdot(x, gather(y)), rel=1e-5)


@pytest.fixture(scope="module")
def acquired():
    patient = virtual_patient(load_anatomy("ahba-15496"), 2, slices=4)
    return Scanner().scan(patient, 20)


def test_kernel_em_with_a_kernel_of_one_voxel_is_osem(acquired):
    alone = kernel_em(acquired, fwhm=0.5)
    np.testing.assert_allclose(alone, acquired.lpet, rtol=1e-3, atol=1e-3 * acquired.lpet.max())


def test_kernel_em_denoises_and_keeps_the_activity(acquired):
    restored, mask = kernel_em(acquired), acquired.mask
    assert psnr(restored, acquired.spet, mask) > psnr(acquired.lpet, acquired.spet, mask) + 2
    assert restored[mask].sum() == pytest.approx(acquired.spet[mask].sum(), rel=0.05)


def test_kernel_em_without_counts_says_so():
    with pytest.raises(ValueError, match="expected a scan with its sinogram"):
        kernel_em(noisy())


def test_non_local_means_averages_what_looks_alike():
    """Better than the Gaussian it starts from, on even halves; hardly tolerant, it is that Gaussian."""
    scan = noisy()
    strict = non_local_means(scan, strength=1e-3, fwhm=3.0)
    np.testing.assert_allclose(strict, gaussian(scan, 3.0), rtol=0.02)
    gains = [psnr(x, HALVES, scan.mask) for x in (gaussian(scan, 3.0), non_local_means(scan, 0.15, 3.0))]
    assert gains[1] > gains[0] + 2


def test_every_baseline_takes_a_slice_and_scales_with_the_unit():
    scan = noisy()
    slice_ = Scan(scan.lpet[..., 4], scan.mr[..., 4])
    for method in (gaussian, non_local_means, mr_guided):
        assert method(slice_).shape == (*SHAPE[:2], 1)
        double = Scan(2 * scan.lpet, scan.mr)
        np.testing.assert_allclose(method(double), 2 * method(scan), rtol=1e-4)

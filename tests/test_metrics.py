"""Metrics against closed forms, and against the mistakes that published code has made (field notes, section 6)."""

import inspect

import numpy as np
import pytest
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

from mfdiff_lite import evaluation, metrics
from mfdiff_lite.baselines import gaussian
from mfdiff_lite.evaluation import compare, evaluate, score
from mfdiff_lite.metrics import (
    activity_bias,
    calibration,
    contrast_kept,
    coverage,
    lesion_contrast,
    mean_ci,
    mr_leak,
    nrmse,
    peak,
    psnr,
    ssim,
    texture,
)
from mfdiff_lite.phantom import Lesion
from mfdiff_lite.scan import Scan
from mfdiff_lite.view import ActivityScale, brain_mask

SHAPE = (40, 40, 12)
X, Y, Z = np.indices(SHAPE).astype(float)


def ball(centre, radius):
    return (X - centre[0]) ** 2 + (Y - centre[1]) ** 2 + (Z - centre[2]) ** 2 <= radius**2


@pytest.fixture
def mask():
    return (X - 19.5) ** 2 + (Y - 19.5) ** 2 < 17**2


@pytest.fixture
def reference(mask):
    rng = np.random.default_rng(0)
    return (
        (np.where(mask, 4, 0.2) + ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.5) * 8)
        .clip(0)
        .astype(np.float32)
    )


@pytest.fixture
def lesion_case():
    """Even activity 4 with PET-only lesions of contrast +1 and -0.5 and an MR-only lesion, well apart."""
    lesions = np.zeros(SHAPE, np.uint8)
    for label, centre in ((1, (10, 10, 6)), (2, (28, 12, 6)), (3, (20, 29, 6))):
        lesions[ball(centre, 2.6)] = label
    table = (Lesion(1, "pet-only", True, 5.0), Lesion(2, "pet-only", False, 5.0), Lesion(3, "mr-only", True, 5.0))
    truth = np.full(SHAPE, 4.0, np.float32)
    truth[lesions == 1], truth[lesions == 2] = 8.0, 2.0
    return truth, lesions, table, np.ones(SHAPE, bool)


# ---- whole image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.5, -0.125])
def test_constant_offset(reference, mask, offset):
    x = reference + np.float32(offset)
    assert psnr(x, reference, mask) == pytest.approx(
        20 * np.log10(np.percentile(reference[mask], 99.9) / abs(offset)), abs=1e-3
    )
    assert nrmse(x, reference, mask) == pytest.approx(
        abs(offset) / np.sqrt(np.mean(reference[mask].astype(float) ** 2)), rel=1e-5
    )
    assert activity_bias(x, reference, mask) == pytest.approx(offset / reference[mask].astype(float).mean(), rel=1e-5)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.02, 3.0])
def test_scaling(reference, mask, factor):
    x = (factor * reference).astype(np.float32)
    assert nrmse(x, reference, mask) == pytest.approx(abs(factor - 1), rel=1e-4)
    assert activity_bias(x, reference, mask) == pytest.approx(factor - 1, rel=1e-4)


def test_equal_images(reference, mask):
    assert psnr(reference, reference, mask) == float("inf")
    assert nrmse(reference, reference, mask) == 0
    assert ssim(reference, reference, mask) == pytest.approx(1, abs=1e-9)
    assert activity_bias(reference, reference, mask) == pytest.approx(0, abs=1e-9)


def test_psnr_does_not_depend_on_the_unit(reference, mask):
    x = reference + np.random.default_rng(1).normal(0, 0.3, SHAPE)
    assert psnr(1000 * x, 1000 * reference, mask) == pytest.approx(psnr(x, reference, mask), abs=1e-4)
    assert ssim(1000 * x, 1000 * reference, mask) == pytest.approx(ssim(x, reference, mask), abs=1e-6)


def test_white_noise_has_its_psnr(reference, mask):
    x = reference + np.random.default_rng(1).normal(0, 0.2, SHAPE)
    assert psnr(x, reference, mask) == pytest.approx(20 * np.log10(peak(reference, mask) / 0.2), abs=0.15)


def test_ssim_is_skimage_on_whole_slices_averaged_in_the_mask(reference, mask):
    mask[..., 0] = False
    x = ndimage.gaussian_filter(reference, 1.0)
    maps = [
        structural_similarity(
            x[..., z].astype(float),
            reference[..., z].astype(float),
            win_size=11,
            gaussian_weights=True,
            sigma=1.5,
            full=True,
            use_sample_covariance=False,
            data_range=np.percentile(reference[mask], 99.9),
        )[1]
        for z in range(SHAPE[2])
    ]
    assert ssim(x, reference, mask) == pytest.approx(np.stack(maps, -1)[mask].mean(), abs=1e-7)
    assert 0.3 < ssim(x, reference, mask) < 0.99


def test_nothing_outside_the_mask_counts(reference, mask):
    far = ~ndimage.binary_dilation(mask, np.ones((3, 3, 1)), iterations=6)  # beyond the square window of SSIM
    assert far.any()
    rng = np.random.default_rng(2)
    x = reference + rng.normal(0, 0.3, SHAPE)
    y = np.where(far, 99.0, x)
    for metric in (psnr, nrmse, ssim, activity_bias):
        assert metric(y, reference, mask) == pytest.approx(metric(x, reference, mask), abs=1e-9)


# ---- lesions -------------------------------------------------------------------------------------------------------


def test_contrast_of_a_ball(lesion_case):
    truth, lesions, _, brain = lesion_case
    assert lesion_contrast(truth, lesions, 1, brain) == pytest.approx(1.0, abs=1e-6)
    assert lesion_contrast(truth, lesions, 2, brain) == pytest.approx(-0.5, abs=1e-6)
    assert lesion_contrast(truth, lesions, 3, brain) == pytest.approx(0.0, abs=1e-6)
    assert lesion_contrast(7 * truth, lesions, 1, brain) == pytest.approx(1.0, abs=1e-6)  # whatever the unit


def test_contrast_looks_at_the_ring_only(lesion_case):
    """The ring: brain, between 1.5 and 4.5 voxels from the lesion, no other lesion."""
    truth, lesions, _, brain = lesion_case
    distance = ndimage.distance_transform_edt(lesions != 1)
    disturbed = np.where((distance > 0) & (distance <= 1.5) | (distance > 4.5), 50.0, truth)
    assert lesion_contrast(disturbed, lesions, 1, brain) == pytest.approx(1.0, abs=1e-6)
    brain = X < 13  # half of the ring is not brain
    assert lesion_contrast(np.where(brain, truth, 50.0), lesions, 1, brain) == pytest.approx(1.0, abs=1e-6)
    neighbour = lesions.copy()
    neighbour[ball((16, 10, 6), 1.5)] = 9
    assert lesion_contrast(np.where(neighbour == 9, 50.0, truth), neighbour, 1, np.ones(SHAPE, bool)) == pytest.approx(
        1.0, abs=1e-6
    )


def test_a_lesion_that_the_volume_does_not_show_has_no_contrast():
    image, lesions = np.ones((12, 12, 12)), np.zeros((12, 12, 12), np.uint8)
    assert np.isnan(metrics.lesion_contrast(image, lesions, 1, np.ones(image.shape, bool)))


def test_contrast_at_the_edge_of_the_volume_and_without_a_ring(lesion_case):
    truth, _, _, brain = lesion_case
    lesions = np.zeros(SHAPE, np.uint8)
    lesions[ball((0, 0, 0), 2.6)] = 1
    image = np.where(lesions == 1, 6.0, 4.0)
    assert lesion_contrast(image, lesions, 1, brain) == pytest.approx(0.5, abs=1e-6)
    assert np.isnan(lesion_contrast(image, lesions, 1, lesions > 0))


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0, 1.3])
def test_contrast_kept_is_the_share(lesion_case, kept):
    truth, lesions, table, brain = lesion_case
    x = 4 + kept * (truth - 4)
    assert contrast_kept(x, truth, lesions, table, brain) == pytest.approx(kept, abs=1e-6)
    assert contrast_kept(3 * x, truth, lesions, table, brain) == pytest.approx(kept, abs=1e-6)


def test_contrast_kept_is_a_slope_that_no_faint_lesion_can_ruin(lesion_case):
    """One lesion of almost no contrast in the reference: its ratio is 100, the slope hardly moves."""
    truth, lesions, table, brain = lesion_case
    faint = truth.copy()
    faint[lesions == 2] = 4 * 1.001
    x = np.where(lesions == 2, 4 * 1.1, faint)
    expected = (1 * 1 + 0.1 * 0.001) / (1 + 0.001**2)
    assert contrast_kept(x, faint, lesions, table, brain) == pytest.approx(expected, abs=1e-5)


def test_mr_leak_of_a_planted_false_lesion(lesion_case):
    truth, lesions, table, brain = lesion_case
    assert mr_leak(truth, truth, lesions, table, brain) == 0
    for shown, leak in ((1.2, 0.2), (0.7, 0.3)):  # the sign must not cancel over lesions: absolute
        x = np.where(lesions == 3, 4 * shown, truth)
        assert mr_leak(x, truth, lesions, table, brain) == pytest.approx(leak, abs=1e-6)
    second = lesions.copy()
    second[ball((32, 30, 6), 2.6)] = 4
    both = (*table, Lesion(4, "mr-only", False, 5.0))
    x = np.where(second == 3, 4 * 1.2, np.where(second == 4, 4 * 0.8, truth))
    assert mr_leak(x, truth, second, both, brain) == pytest.approx(0.2, abs=1e-6)


def test_no_lesions_of_a_kind_is_nan(lesion_case):
    truth, lesions, table, brain = lesion_case
    assert np.isnan(contrast_kept(truth, truth, lesions, table, brain, kind="matched"))
    assert np.isnan(mr_leak(truth, truth, lesions, table[:2], brain))


# ---- many subjects -------------------------------------------------------------------------------------------------


def test_mean_ci_of_known_data():
    mean, (low, high) = mean_ci([2.0] * 5)
    assert (mean, low, high) == (2.0, 2.0, 2.0)
    values = np.random.default_rng(0).normal(10, 2, 200)
    mean, (low, high) = mean_ci(values)
    half = 1.96 * values.std() / np.sqrt(200)
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))
    assert mean_ci(values) == mean_ci(values)  # seeded


def test_mean_ci_covers():
    """Of 300 samples of 30 subjects, the 95 % interval holds the true mean in about 94 % (binomial SD 1.3 %)."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        _, (low, high) = mean_ci(rng.exponential(1.0, 30) + 2, draws=500)
        hits += low <= 3 <= high
    assert 0.87 <= hits / 300 <= 0.985


def test_mean_ci_leaves_out_what_is_not_a_number():
    assert mean_ci([1.0, float("nan"), 3.0, float("inf")])[0] == 2.0


def scan_of(lpet, spet, **kwargs):
    return Scan(lpet, spet=spet, **kwargs)


def test_evaluate_averages_over_patients(reference, mask):
    scans = [
        scan_of(reference + np.float32(noise), reference, mask=mask, activity=2 * reference, name=f"p{i}")
        for i, noise in enumerate((0.1, 0.2, 0.4))
    ]
    result = evaluate({"half": lambda scan: scan.spet + (scan.lpet - scan.spet) / 2}, scans)
    summary = result["summary"]["spet"]
    gain = np.array([p["spet"]["half"]["psnr"] - p["spet"]["LPET"]["psnr"] for p in result["patients"]])
    np.testing.assert_allclose(gain, 20 * np.log10(2), atol=1e-3)
    top = peak(reference, mask)
    assert summary["LPET"]["psnr"]["mean"] == pytest.approx(
        np.mean([20 * np.log10(top / n) for n in (0.1, 0.2, 0.4)]), abs=1e-3
    )
    assert summary["LPET"]["psnr"]["n"] == 3
    low, high = summary["LPET"]["psnr"]["ci95"]
    assert low < summary["LPET"]["psnr"]["mean"] < high
    # Against the truth, twice the SPET: about -50 % activity. The two references are never mixed.
    assert result["summary"]["truth"]["half"]["activity_bias"]["mean"] == pytest.approx(-0.5, abs=0.04)
    assert summary["half"]["activity_bias"]["mean"] > 0


def test_compare_tables(reference, mask):
    scan = scan_of(reference + np.float32(0.2), reference, mask=mask, activity=2 * reference, name="case")
    table = compare(scan, {"mine": reference[..., :]})
    assert list(table.rows) == ["LPET", "Gaussian", "mine"]
    assert table.rows["mine"]["psnr"] == float("inf") and table.rows["LPET"] == score(scan.lpet, reference, mask)
    smooth = gaussian(scan)
    assert table.rows["Gaussian"]["psnr"] == psnr(smooth, reference, mask)
    text = str(table)
    assert "against SPET" in text and "inf" in text and f"{table.rows['LPET']['psnr']:.2f}" in text
    assert compare(scan, {"mine": reference}, "truth").rows["mine"]["activity_bias"] == pytest.approx(-0.5, abs=1e-6)
    assert "<b>" not in table._repr_html_() and table._repr_html_().count("<tr>") == 4


def test_compare_needs_its_reference(reference):
    for against in ("spet", "truth"):
        with pytest.raises(ValueError, match=f"expected a scan with its {against}"):
            compare(Scan(reference), {"x": reference}, against)


# ---- uncertainty and texture -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_coverage_of_a_true_normal_is_its_level(level):
    rng = np.random.default_rng(0)
    sd = rng.uniform(0.5, 2, (60, 60, 30))
    drawn, everywhere = sd * rng.standard_normal(sd.shape), np.ones(sd.shape, bool)
    n = sd.size
    bound = 4 * np.sqrt(level * (1 - level) / n)  # four standard errors of a share
    assert coverage(np.zeros_like(sd), sd, drawn, everywhere, level) == pytest.approx(level, abs=bound)
    assert coverage(np.zeros_like(sd), sd, drawn, everywhere, level, scale=0.5) < level - 0.1


def test_calibration_finds_the_factor_that_was_forgotten():
    rng = np.random.default_rng(1)
    drawn, inside = 3 * rng.standard_normal((60, 60, 30)), np.ones((60, 60, 30), bool)
    inside[:, :, :10] = False
    drawn[~inside] = 1e6  # the mask is obeyed
    factor = calibration(np.zeros_like(drawn), np.ones_like(drawn), drawn, inside)
    assert factor == pytest.approx(3, rel=0.02)
    covered = coverage(np.zeros_like(drawn), np.ones_like(drawn), drawn, inside, 0.9, factor)
    assert covered == pytest.approx(0.9, abs=1e-3)


def test_texture_is_the_noise_and_not_the_slope():
    """White noise of SD 2 on a ramp: the filter takes the ramp away and leaves sqrt(1 - 2 h(0) + sum h^2) of it."""
    shape = (80, 80, 8)
    noise = 2 * np.random.default_rng(0).standard_normal(shape)
    region = np.zeros(shape, bool)
    region[10:-10, 10:-10] = True
    taps = np.exp(-0.5 * (np.arange(-8, 9) / 2.0) ** 2)
    taps = np.outer(taps, taps) / taps.sum() ** 2
    expected = 2 * np.sqrt(1 - 2 * taps[8, 8] + (taps**2).sum())
    ramp = np.linspace(0, 50, 80)[:, None, None]
    assert texture(noise + ramp, region) == pytest.approx(expected, rel=0.02)
    assert texture(0 * noise + ramp, region) == pytest.approx(0, abs=1e-6)


def test_contrast_kept_can_be_asked_by_size(lesion_case):
    truth, lesions, table, brain = lesion_case
    table = (table[0], Lesion(2, "pet-only", False, 2.0), table[2])
    flat = truth.copy()
    flat[lesions == 2] = 4.0  # the small one is gone
    assert contrast_kept(flat, truth, lesions, table, brain, across=(8.0, 12.0)) == pytest.approx(1)
    assert contrast_kept(flat, truth, lesions, table, brain, across=(2.0, 8.0)) == pytest.approx(0, abs=1e-6)
    assert np.isnan(contrast_kept(flat, truth, lesions, table, brain, across=(20.0, 30.0)))


# ---- mistakes seen in published code -------------------------------------------------------------------------------


def test_peak_is_of_the_reference_not_of_the_tested_image(reference, mask):
    """One absurd voxel in the tested image costs PSNR; with a peak taken from that image it would gain."""
    x = reference + np.float32(0.2)
    hot = x.copy()
    hot[20, 20, 6] = 1000.0
    assert psnr(hot, reference, mask) < psnr(x, reference, mask) - 10
    voxels = np.count_nonzero(mask)
    error = np.sqrt((0.2**2 * (voxels - 1) + (1000 - float(reference[20, 20, 6])) ** 2) / voxels)
    assert psnr(hot, reference, mask) == pytest.approx(20 * np.log10(peak(reference, mask) / error), abs=1e-2)


def test_peak_is_no_maximum(reference, mask):
    # The maximum of a noisy reference grows with its noise; the percentile ignores one outlier.
    outlier = reference.copy()
    outlier[20, 20, 6] = 1000.0
    assert peak(outlier, mask) == pytest.approx(peak(reference, mask), rel=0.02)


def test_data_range_is_of_the_reference_alone(reference, mask):
    # A bright voxel far from the mask's voxels enlarges a range taken from both images, and with it SSIM.
    x = ndimage.gaussian_filter(reference, 1.0)
    far = x.copy()
    far[0, 0, 0] = 1e4
    assert ssim(far, reference, mask) == pytest.approx(ssim(x, reference, mask), abs=1e-9)


def test_mask_is_never_from_the_target(reference):
    """Without a mask the LPET gives one; changing SPET and truth beyond recognition does not move it."""
    lpet = ndimage.gaussian_filter(reference, 1.0)
    a = brain_mask(Scan(lpet, spet=reference, activity=reference))
    b = brain_mask(Scan(lpet, spet=np.flip(reference**2), activity=np.ones(SHAPE)))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, ActivityScale(lpet, (2.0, 2.0, 2.0)).mask)
    given = np.zeros(SHAPE, bool)
    given[5:9] = True
    np.testing.assert_array_equal(brain_mask(Scan(lpet, mask=given)), given)


def test_prediction_is_not_masked_by_the_truth(reference, mask):
    # A false activity where the reference is zero, inside the mask, is an error like any other.
    empty = reference.copy()
    empty[18:22, 18:22] = 0
    x = empty.copy()
    x[18:22, 18:22] = 3.0
    assert nrmse(x, empty, mask) == pytest.approx(np.sqrt(9 * 16 * 12) / np.linalg.norm(empty[mask]), rel=1e-5)


def test_scale_does_not_grow_with_the_noise(reference, mask):
    """The OSEM maximum grows with the noise; the scale does not."""
    clean = ndimage.gaussian_filter(np.where(mask, 4.0, 0.0), 1.0).astype(np.float32)
    noisy = np.random.default_rng(0).gamma(2.0, clean / 2 + 1e-6).astype(np.float32)  # mean kept, 70 % noise
    assert noisy.max() > 4 * clean.max()
    assert ActivityScale(noisy, (2.0, 2.0, 2.0)).value == pytest.approx(
        ActivityScale(clean, (2.0, 2.0, 2.0)).value, rel=0.03
    )


def test_no_metric_rescales_its_input():
    # Normalising the target by its own minimum and maximum hides bias: a global gain must show in every metric.
    source = inspect.getsource(metrics) + inspect.getsource(evaluation)
    for call in (".min()", ".max()", "ptp("):
        assert call not in source


def test_the_ring_of_a_lesion_is_in_mm():
    """Today's fault: in voxels, so that another grid gave another ring. The ring of one voxel at 2 and at 1 mm."""
    for voxel in (1.0, 2.0):
        n = int(40 / voxel)
        lesions = np.zeros((n + 1,) * 3, np.uint8)
        lesions[(n // 2,) * 3] = 1
        distance = voxel * np.linalg.norm(np.indices(lesions.shape) - n // 2, axis=0)
        image = np.where((distance > 3) & (distance <= 9), 2.0, 100.0)
        image[lesions == 1] = 3.0
        size = (voxel, voxel, voxel)
        assert metrics.lesion_contrast(image, lesions, 1, np.ones(lesions.shape, bool), size) == pytest.approx(0.5)


def test_ssim_of_slices_smaller_than_its_window_is_not_a_number():
    """Today's fault: scikit-image's "win_size exceeds image extent"."""
    image, mask = np.random.default_rng(0).random((10, 30, 2)), np.ones((10, 30, 2), bool)
    assert np.isnan(metrics.ssim(image, image, mask)) and metrics.psnr(image, image, mask) == np.inf


def test_contrast_error_is_bias_and_spread_of_single_lesions(lesion_case):
    """Half of every contrast lost: the mean loss is the bias, whatever the sign of the lesion, and nothing of it
    spread beyond how contrasts differ."""
    truth, lesions, table, brain = lesion_case
    x = 4 + (truth - 4) * 0.5
    real = np.array(
        [metrics.lesion_contrast(truth, lesions, one.label, brain) for one in table if one.kind == "pet-only"]
    )
    found = metrics.contrast_error(x, truth, lesions, table, brain)
    assert found["bias"] == pytest.approx(-0.5 * np.abs(real).mean(), abs=1e-5)
    assert found["sd"] == pytest.approx(0.5 * np.abs(real).std(ddof=1), abs=1e-5)
    assert found["rms"] == pytest.approx(0.5 * np.sqrt((real**2).mean()), abs=1e-5)
    assert metrics.contrast_error(truth, truth, lesions, table, brain)["rms"] == 0
    assert all(np.isnan(v) for v in metrics.contrast_error(x, truth, lesions, table, brain, kind="matched").values())


def test_forced_choice_in_white_noise_is_the_closed_form():
    """Difference of two patches with independent noise of SD 1: right with Phi(|s| / sqrt 2), for both observers."""
    rng, n = np.random.default_rng(0), 6000
    signal = np.array([0.9, -0.4, 0.0, 0.3])
    seen = signal + np.sqrt(2) * rng.standard_normal((n, 4))
    expected = stats.norm.cdf(np.linalg.norm(signal) / np.sqrt(2))
    for hotelling in (True, False):
        right = metrics.forced_choice(seen, np.arange(n) % 10, hotelling).mean()
        assert abs(right - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_the_hotelling_observer_prewhitens():
    """Correlated noise: its closed form, with the covariance K of the difference, is Phi(sqrt(s' K^-1 s)); the observer
    that takes the signal for its template gets s's / sqrt(s' K s)."""
    rng, n = np.random.default_rng(1), 6000
    mix, signal = np.array([[1.0, 0.0, 0.0], [0.95, 0.3, 0.0], [0.0, 0.0, 1.5]]), np.array([1.0, 0.8, 0.3])
    seen, spread = signal + rng.standard_normal((n, 3)) @ mix.T, mix @ mix.T
    best = stats.norm.cdf(np.sqrt(signal @ np.linalg.solve(spread, signal)))
    plain = stats.norm.cdf(signal @ signal / np.sqrt(signal @ spread @ signal))
    assert metrics.forced_choice(seen, np.arange(n) % 10).mean() == pytest.approx(best, abs=0.02)
    assert metrics.forced_choice(seen, np.arange(n) % 10, hotelling=False).mean() == pytest.approx(plain, abs=0.02)
    assert best > plain + 0.03


def test_no_patient_is_rated_with_its_own_template():
    """Two groups with opposite signals: each is wrong about the other; one group alone cannot be rated."""
    rng = np.random.default_rng(2)
    groups, signal = np.repeat([0, 1], 200), np.array([2.0, 1.0])
    seen = np.where(groups[:, None] == 0, signal, -signal) + 0.1 * rng.standard_normal((400, 2))
    assert metrics.forced_choice(seen, groups).mean() == 0
    assert metrics.forced_choice(np.zeros((4, 2)), np.arange(4), hotelling=False).tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="at least 2 groups"):
        metrics.forced_choice(seen, np.zeros(400))


def test_channels_are_normed_round_and_blind_to_the_mean():
    side = 33
    maps = metrics.channels(side).T.reshape(-1, side, side)
    np.testing.assert_allclose((maps**2).sum((1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose(maps.sum((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(maps, np.rot90(maps, axes=(1, 2)), atol=1e-9)
    power = np.abs(np.fft.fft2(maps)) ** 2
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    centre = (power * frequency).sum((1, 2)) / power.sum((1, 2))
    assert (np.diff(centre) > 0).all()  # each finer than the last

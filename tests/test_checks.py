"""What the checks say about made-up heads whose fault is known; rates on simulated scans: benchmarks/checks.py."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

import mfdiff_lite as mf
from mfdiff_lite import checks
from mfdiff_lite.checks import Seen, check_result, check_scan, speak
from mfdiff_lite.scan import Scan

SHAPE = (72, 80, 28)


@pytest.fixture(scope="module")
def head():
    """A head of two tissues that fold at random, so that no two halves are alike; its LPET has the noise of counts. The
    MR is another function of the same tissues."""
    rng = np.random.default_rng(0)
    x, y = (np.indices(SHAPE[:2]).T - (np.array(SHAPE[:2]) - 1) / 2).T
    brain = np.broadcast_to(((x / 30) ** 2 + (y / 34) ** 2 < 1)[..., None], SHAPE)
    grey = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 2.5) > 0
    activity = np.where(brain, np.where(grey, 20.0, 6.0), 0.0)
    mr = np.where(brain, np.where(grey, 60.0, 100.0), 0.0) + rng.normal(0, 2, SHAPE).clip(0)
    halves = [ndimage.gaussian_filter(rng.poisson(activity).astype(np.float32), 0.6) for _ in range(2)]
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    return Scan((halves[0] + halves[1]) / 2, mr.astype(np.float32), halves=tuple(halves), affine=affine)


def said(scan):
    return {one.name for one in check_scan(scan) if one.severity != "fine"} - {"dose", "noise", "contrast", "texture"}


def test_a_good_scan_is_good(head):
    assert said(head) == set()
    assert mf.check_scan is check_scan and check_scan(head) is check_scan(head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speak([one for one in check_scan(head) if one.severity == "fine"])


@pytest.mark.parametrize("shift", [(6, 0, 0), (-4, 5, 0), (0, -8, 1)])
def test_the_way_to_a_shifted_mr_is_measured(head, shift):
    fit = Seen(replace(head, mr=np.roll(head.mr, shift, (0, 1, 2)))).fit
    assert fit["distance"] == pytest.approx(2 * np.linalg.norm(shift), abs=2.5)  # mm; the grid is of 4 mm
    assert fit["best"] > 2 * fit["here"]


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda s: {"mr": np.roll(s.mr, 6, 0)}, "mr-position"),
        (lambda s: {"mr": s.mr[::-1]}, "mr-mirrored"),
        (lambda s: {"mr": s.mr[:, ::-1, ::-1]}, "mr-head"),
        (lambda s: {"mr": np.full_like(s.mr, 7)}, "mr-contrast"),
        (lambda s: {"mr": 3 * s.lpet}, "mr-copy"),
        (lambda s: {"halves": (s.halves[0],) * 2}, "halves-same"),
        (lambda s: {"halves": (s.lpet, s.halves[0])}, "halves-same"),
        (lambda s: {"halves": tuple(2 * half for half in s.halves)}, "halves-sum"),
        (lambda s: {"lpet": s.mr, "mr": s.lpet, "halves": None}, "exchanged"),
    ],
)
def test_one_thing_wrong_is_named(head, fault, name):
    assert name in said(replace(head, **fault(head)))


@pytest.mark.parametrize(("dose", "noisier"), [(1, True), (200, False)])
def test_more_noise_than_the_dose_says_is_a_reason_to_adapt_and_less_is_none(head, dose, noisier):
    (found,) = (one for one in check_scan(replace(head, dose_reduction=dose)) if one.name == "dose")
    assert found.severity == "warn" and ("--adapt" in found.sentence) == noisier


def test_contrast_of_the_mr_does_not_matter(head):
    turned = replace(head, mr=np.where(head.mr > 0, 200 - head.mr, 0))
    assert said(turned) == set() and Seen(turned).fit["best"] == pytest.approx(Seen(head).fit["best"], rel=0.3)


def test_r2_is_that_of_a_regression(head):
    """At no shift: against least squares by NumPy."""
    rng = np.random.default_rng(1)
    inside = rng.random((12, 13, 9)) > 0.3
    pet, features = rng.random(inside.shape), [rng.random(inside.shape) for _ in range(3)]
    found, distance = checks.explained(pet, inside, features)
    design = np.stack([one[inside] - one[inside].mean() for one in features], 1)
    y = pet[inside] - pet[inside].mean()
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert found[distance == 0].item() == pytest.approx(1 - (rest**2).sum() / (y**2).sum(), abs=1e-4)


def test_more_noise_means_fewer_counts(head):
    rng, mask = np.random.default_rng(2), head.lpet > 2
    truth = ndimage.gaussian_filter(head.lpet, 1.5)
    noisy = (truth + sd * truth * rng.standard_normal(SHAPE) for sd in (0.1, 0.3, 0.9))
    found = [checks.counts(checks.variances(image, mask)) for image in noisy]
    assert found[0] > 2 * found[1] > 4 * found[2]


def test_too_little_to_judge_by_is_not_judged(head):
    thin = Scan(head.lpet[..., :3], affine=head.affine)
    assert {one.name for one in check_scan(thin)} == {"voxels", "field"}
    coarse = Scan(head.lpet[30:50, 30:50, :3], affine=np.diag([5.0, 5.0, 2.0, 1.0]))
    assert {one.name for one in check_scan(coarse) if one.severity == "warn"} == {"voxels", "field"}


def test_a_head_cut_by_the_field_of_view():
    """The cut is that of the brain in the outermost layers; what is missing above and below does not count."""
    brain = np.zeros(SHAPE)
    brain[16:56, 16:64] = 1
    found = [
        {one.name: one for one in check_scan(Scan(b, affine=np.diag([2.0, 2, 2, 1])))} for b in (brain, brain[:36])
    ]
    assert found[0]["field"].value == 0 and found[1]["field"].severity == "warn"
    assert found[1]["field"].value == pytest.approx(96 * 56, rel=0.1)  # mm^2


@pytest.mark.parametrize(
    ("fwhm", "coarse", "words"),
    [(0, 0, ""), (5, 0, ""), (12, 0, "smoothed by more"), (0, 0.8, "coarse noise under fine")],
)
def test_noise_that_no_reconstruction_leaves_is_named(fwhm, coarse, words):
    """Noise of one filter in an even cylinder; the same with noise of 12 mm under it."""
    rng, brain = np.random.default_rng(3), np.zeros(SHAPE)
    brain[16:56, 16:64] = 1
    under = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 6 / 2.355)
    lpet = (brain + 0.4 * rng.standard_normal(SHAPE) + coarse * under / under.std()).clip(0)
    lpet = ndimage.gaussian_filter(lpet, fwhm / 2 / 2.355)
    texture = {one.name: one for one in check_scan(Scan(lpet, affine=np.diag([2.0, 2, 2, 1])))}["texture"]
    assert words in texture.sentence and (texture.severity == "warn") == bool(words)


def test_a_result_keeps_its_activity(head):
    fine, moved = (check_result(head, factor * head.lpet)[0] for factor in (1.02, 0.95))
    assert (fine.severity, moved.severity) == ("fine", "warn") and moved.value == pytest.approx(0.05, abs=1e-5)
    assert "moved by 5.0%" in moved.sentence
    assert check_result(head, np.full_like(head.lpet, np.nan))[0].severity == "warn"


def test_a_refusal_says_how_to_go_on(head):
    findings = [one for one in check_scan(replace(head, halves=(head.halves[0],) * 2)) if one.name == "halves-same"]
    with pytest.raises(ValueError, match="halves: expected two images with noise of their own, .*--force"):
        speak(findings)
    with pytest.warns(UserWarning, match="halves: expected two images"):
        speak(findings, force=True)

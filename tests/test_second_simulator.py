"""The second simulator measures what it says it measures, and shares nothing with the scanner it stands in for."""

import ast
import dataclasses
import importlib
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from mfdiff_lite import metrics
from mfdiff_lite.anatomy import embedded_anatomy
from mfdiff_lite.scan import Scan

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
second = importlib.import_module("second_simulator")
patients = importlib.import_module("second_head")
sys.path.remove(str(BENCHMARKS))

SMALL = second.SecondScanner(matrix=60, bins=66, bin_width=4.1, angles=36, subsets=6)
TEST = "ahba-15697"


def cylinder(radius=80.0, slices=24):
    """A Head of uniform activity 1 kBq/mL in soft tissue, from end to end."""
    x = np.arange(second.FIELD) - (second.FIELD - 1) / 2
    depth = int(np.ceil(slices * second.SLICE))
    inside = np.repeat((np.hypot(x[:, None], x) < radius)[..., None], depth, axis=2)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = -x[0], -x[0], -(depth - 1) / 2
    image = inside.astype(np.float32)
    empty = np.zeros(inside.shape, np.uint8)
    return patients.Head(image, 0.0975 * image, image, 100 * inside.astype(np.uint8), empty, (), affine, "cylinder")


@pytest.fixture(scope="module")
def head():
    return patients.second_head(TEST, 3, "fdg", slices=8)


@pytest.fixture(scope="module")
def scan():
    return second.second_scan(TEST, 3, slices=6, halves=True)


# --- the scanner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "step"), [(0, 1), (2, 6)])
def test_back_projection_is_the_adjoint(first, step):
    rng = np.random.default_rng(0)
    image, sinogram = rng.random((60, 60, 3)), rng.random((len(range(first, 36, step)), 66, 3))
    ahead = np.vdot(SMALL.forward(image, first, step), sinogram)
    assert ahead == pytest.approx(np.vdot(image, SMALL.adjoint(sinogram, first, step)), rel=1e-5)


def test_line_integrals_of_a_disc_are_its_chords():
    """Mean chord over a bin [s, t]: (F(t) - F(s)) / width, F(s) = s sqrt(r^2 - s^2) + r^2 asin(s / r).

    Only where the two edges of a strip cross the rim, four times, can a pixel's share go to the wrong bin: at most a
    quarter of the pixel (f (1 - f) for a filled share f) in at most four pixels per crossing, for |s| < 0.8 r.
    """
    radius, fine, scanner = 90.0, 1.0, dataclasses.replace(SMALL, bins=120, bin_width=2.25)
    x = (np.arange(second.FIELD * 8) - (second.FIELD * 8 - 1) / 2) / 8
    filled = (np.hypot(x[:, None] - 12, x + 7) < radius).reshape(second.FIELD, 8, second.FIELD, 8).mean((1, 3))
    found = scanner.forward(filled[..., None])[..., 0]
    angle = np.pi * np.arange(36) / 36
    edges = (np.arange(121) - 60) * 2.25 - (12 * np.cos(angle) - 7 * np.sin(angle))[:, None]
    s = np.clip(edges, -radius, radius)
    chords = np.diff(s * np.sqrt(radius**2 - s**2) + radius**2 * np.arcsin(s / radius)) / 2.25
    central = np.abs(edges[:, :-1] + 1.125) < 0.8 * radius
    assert np.abs(found - chords)[central].max() < 4 * 4 * fine**2 / 4 / 2.25
    assert np.allclose(found.sum(1) * 2.25, filled.sum(), rtol=1e-5)  # every view holds the whole disc


def test_a_uniform_object_comes_back_at_its_activity():
    scanner = dataclasses.replace(SMALL, counts_per_slice=1e7, scatter_error=0.0)
    image = scanner.reconstruct(scanner.acquire(cylinder(slices=12), np.random.default_rng(0)))
    assert image[25:35, 25:35].mean() == pytest.approx(1, abs=0.02)


def test_thinned_counts_are_poisson_and_independent_of_the_rest():
    rng, size = np.random.default_rng(1), 200_000
    full = second.Acquisition(rng.poisson(50.0, size).astype(np.float32), np.full(size, 20.0), np.full(size, 2.0))
    kept = full.thin(0.1, rng)
    rest = full.counts - kept.counts
    assert kept.counts.mean() == pytest.approx(5, abs=4 * np.sqrt(5 / size))
    assert kept.counts.var() == pytest.approx(5, abs=4 * np.sqrt((5 + 2 * 5**2) / size))
    assert np.cov(kept.counts, rest)[0, 1] == pytest.approx(0, abs=4 * np.sqrt(5 * 45 / size))
    assert kept.background[0] == pytest.approx(2) and kept.gain[0] == pytest.approx(0.2)


def test_halves_add_up():
    rng = np.random.default_rng(2)
    full = SMALL.acquire(cylinder(slices=6), rng)
    one, other = full.split(rng)
    assert np.array_equal(one.counts + other.counts, full.counts)
    assert np.allclose(one.gain + other.gain, full.gain) and np.allclose(one.background * 2, full.background)


def test_counts_follow_the_setting_and_the_axial_triangle():
    data = dataclasses.replace(SMALL, counts_per_slice=2e5).acquire(cylinder(slices=20), np.random.default_rng(3))
    total = data.counts.sum(dtype=float)
    assert total == pytest.approx(20 * 2e5, abs=4 * np.sqrt(20 * 2e5))
    profile = data.gain.sum((0, 1))
    height = second.SLICE * (np.arange(20) - 9.5)
    assert np.allclose(profile / profile.max(), (1 - np.abs(height) / 129) / (1 - 1.2 / 129), rtol=1e-4)


def test_noise_is_correlated_along_the_axis_as_a_gaussian_filter_makes_it():
    """White noise after a Gaussian of SD s: correlation exp(-d^2 / (4 s^2)) at distance d."""
    scanner = dataclasses.replace(SMALL, post_filter=6.0, axial_field=1e9, psf_fwhm=0.1, counts_per_slice=2e5)
    images = []
    for seed in range(6):
        data = scanner.acquire(cylinder(), np.random.default_rng(0))  # the same detectors
        counts = np.random.default_rng(seed).poisson(data.counts).astype(np.float32)
        images.append(scanner.reconstruct(dataclasses.replace(data, counts=counts))[20:40, 20:40])
    noise = (np.array(images) - np.mean(images, axis=0))[..., 3:-3]
    sigma = 6.0 * patients.FWHM_TO_SIGMA
    for step in (1, 2, 3):
        pairs = [(n[..., :-step] * n[..., step:]).mean() / (n**2).mean() for n in noise]
        error = np.std(pairs, ddof=1) / np.sqrt(len(pairs))
        expected = np.exp(-((step * second.SLICE) ** 2) / (4 * sigma**2))
        assert np.mean(pairs) == pytest.approx(expected, abs=4 * error), step


def test_no_filter_leaves_slices_independent():
    scanner = dataclasses.replace(SMALL, post_filter=0.0)
    data = scanner.acquire(cylinder(slices=4), np.random.default_rng(0))
    other = dataclasses.replace(data, counts=data.counts * np.array([1, 1, 1, 0], np.float32))
    assert np.array_equal(scanner.reconstruct(data)[..., :3], scanner.reconstruct(other)[..., :3])


# --- the scan --------------------------------------------------------------------------------------------------------


def test_the_left_of_the_head_ends_up_left(head):
    """Activity in the regions named "L" only; their MR signal is doubled."""
    left = np.isin(head.labels, [i for i, region in embedded_anatomy(TEST).regions.items() if region.startswith("L ")])
    marked = dataclasses.replace(head, activity=left.astype(np.float32), signal=head.signal * (1 + left))
    scan = SMALL.scan(marked, 3, dose_reduction=1)
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    plain = SMALL.scan(head, 3, dose_reduction=1)
    for image in (scan.spet, scan.activity, np.clip(scan.mr - 1.2 * plain.mr, 0, None)):
        centre = nib.affines.apply_affine(scan.affine, ndimage.center_of_mass(image))
        assert -60 < centre[0] < -15  # mm RAS: left


def test_pet_and_mr_show_the_same_head(head):
    """The MR against the signal it was made from, both without their slow variation (bias field), and mirrored."""
    scan = SMALL.scan(head, 3)
    truth = SMALL.to_grid(head.signal)[..., second.GUARD : -second.GUARD]
    fine, plain = (v / (ndimage.gaussian_filter(v, (4, 4, 0)) + 1e-3) for v in (scan.mr, truth))
    assert np.corrcoef(fine[scan.mask], plain[scan.mask])[0, 1] > 0.9
    assert np.corrcoef(fine[scan.mask], plain[::-1][scan.mask])[0, 1] < 0.5
    assert np.abs(scan.affine[:2, 3] + scan.affine[:2, :2] @ [29.5, 29.5]).max() < 1e-9  # centred on the scanner's axis


def test_a_scan_holds_what_an_evaluation_needs(scan):
    assert scan.name == f"second-fdg-{TEST}-3" and scan.unit == "kBq/mL" and scan.lpet.shape == (120, 120, 6)
    assert np.allclose(scan.voxel_size, (2.2, 2.2, 2.4))
    assert {one.kind for one in scan.lesion_table} == {"pet-only", "mr-only", "matched"}
    assert set(np.unique(scan.lesions)) == {0, *(one.label for one in scan.lesion_table)}
    assert set(np.unique(scan.tissues)) == {0, 1, 2, 3} and len(scan.halves) == 2
    assert abs(metrics.activity_bias(np.mean(scan.halves, axis=0), scan.lpet, scan.mask)) < 0.03
    assert 18 < metrics.psnr(scan.lpet, scan.spet, scan.mask) < 26


def test_the_same_arguments_give_the_same_scan(scan):
    again, other_dose = (second.second_scan(TEST, 3, slices=6, dose_reduction=dose) for dose in (20, 5))
    for name in ("lpet", "spet", "mr", "activity", "lesions"):
        assert np.array_equal(getattr(scan, name), getattr(again, name)), name
    assert np.array_equal(scan.spet, other_dose.spet) and not np.array_equal(scan.lpet, other_dose.lpet)


def test_tracers_differ_as_they_should(head):
    means = {}
    for tracer in patients.TRACERS:
        made = head if tracer == "fdg" else patients.second_head(TEST, 3, tracer, slices=8)
        names = embedded_anatomy(TEST).regions
        putamen = np.isin(made.labels, [i for i, name in names.items() if name.endswith("putamen")])
        grey = (made.labels > 0) & (made.labels < 100) & ~putamen
        means[tracer] = [made.activity[where].mean() for where in (grey, made.labels == 100, putamen)]
    assert means["fdg"][0] > 2 * means["fdg"][1]
    assert means["amyloid"][0] < 1.3 * means["amyloid"][1]
    assert means["fdopa"][2] > 1.8 * means["fdopa"][0]
    with pytest.raises(ValueError, match="tracer: expected one of fdg, amyloid, fdopa"):
        patients.second_head(TEST, 3, "water")


@pytest.mark.parametrize("name", ["second_simulator", "second_head"])
def test_it_shares_neither_scanner_nor_phantom_with_the_library(name):
    tree = ast.parse((BENCHMARKS / f"{name}.py").read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    library = {module for module in found if module.startswith("mfdiff_lite")}
    assert library <= {"mfdiff_lite.anatomy", "mfdiff_lite.scan"}


# --- noise of any kind -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def any_noise():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        others = {name: sys.modules.pop(name, None) for name in ("any_noise", "results")}  # of the same names
        yield importlib.import_module("any_noise")
        sys.modules.update({name: module for name, module in others.items() if module})


@pytest.mark.parametrize("fwhm", [5.0, 8.0])
def test_noise_laid_over_an_spet_has_its_size_and_its_width(any_noise, fwhm):
    even = Scan(np.ones((60, 60, 40), np.float32), spet=np.ones((60, 60, 40), np.float32), voxel_size=2.0)
    noise = any_noise.laid_over(even, fwhm).lpet - 1
    assert noise.std() == pytest.approx(any_noise.SHARE, rel=0.02)
    for axis in range(3):  # a Gaussian's autocorrelation: exp(-d^2 / 4 sd^2)
        alike = (noise * np.roll(noise, 1, axis)).mean() / (noise**2).mean()
        assert alike == pytest.approx(np.exp(-((2 / (fwhm / 2.355)) ** 2) / 4), abs=0.03)


def test_a_slice_alone_is_the_middle_one_and_a_row_names_every_count(any_noise, scan):
    cut = any_noise.alone(scan)
    assert cut.lpet.shape == (*scan.lpet.shape[:2], 1) and (cut.spet[..., 0] == scan.spet[..., 3]).all()
    row = {"LPET": 1.0, "Gaussian": 2.0, "restored": 3.0}
    cases = [f"{t}, {w:g} mm, {c}" for t in any_noise.TRACERS for w in any_noise.FILTERS for c in any_noise.COUNTS]
    table = any_noise.block({"scans": dict.fromkeys(cases, row), "laid over": {"noise": row}})
    assert table.count("1.0 / 2.0 / 3.0") == len(cases) + 1
    assert len({line.count("|") for line in table.splitlines()}) == 1

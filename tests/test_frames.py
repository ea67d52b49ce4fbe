"""Short-frame pairs from a made-up dynamic PET in the layout of OpenNeuro ds003382; no real file was read here."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest

import mfdiff_lite as mf
from mfdiff_lite.readers.frames import short_frame_scan

SHAPE, COUNT = (20, 24, 16), 12
PET_NAME = "sub-02/pet/sub-02_task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet"
MR_NAME = "sub-02/anat/sub-02_run-001_T1w"
AFFINE = nib.affines.from_matvec(np.diag([-2.0, 2.0, 2.0]), [19.0, -23.0, -15.0])  # LAS, as dcm2niix writes it
MR_AFFINE = nib.affines.from_matvec(np.diag([1.0, 1.0, 1.5]), [-25.0, -28.0, -20.0])


def head(affine, shape):
    """1 inside an ellipsoid about the origin of space, 0 outside."""
    x, y, z = np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
    return ((x / 14) ** 2 + (y / 18) ** 2 + (z / 12) ** 2 < 1).astype(np.float64)


class Case:
    """A folder of the data set's layout; frames (X, Y, Z, T) are known."""

    def __init__(self, folder, frames, durations=60):
        self.frames = frames.astype(np.float32)
        self.pet, self.mr = folder / f"{PET_NAME}.nii.gz", folder / f"{MR_NAME}.nii.gz"
        self.sidecar = folder / f"{PET_NAME}.json"
        for path in (self.pet, self.mr):
            path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(self.frames, AFFINE), self.pet)
        nib.save(nib.Nifti1Image(100 * head(MR_AFFINE, (50, 56, 28)).astype(np.float32), MR_AFFINE), self.mr)
        durations = np.broadcast_to(durations, self.frames.shape[3]).tolist()
        starts = np.cumsum([0, *durations[:-1]]).tolist()
        self.write({"Units": "Bq/ml", "FrameTimesStart": starts, "FrameDuration": durations})

    def write(self, content):
        self.sidecar.write_text(json.dumps(content), encoding="utf-8")

    def scan(self, **options):
        return short_frame_scan(self.pet, self.mr, **{"frames": range(4, 12)} | options)

    def mean(self, *numbers):
        return self.frames[..., numbers].astype(np.float64).mean(-1)


def poisson_frames(seed=0, mean=50.0):
    return np.random.default_rng(seed).poisson(mean * head(AFFINE, SHAPE)[..., None], (*SHAPE, COUNT))


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path, poisson_frames())


# ---- known answers -------------------------------------------------------------------------------------------------


def test_means_of_the_right_frames(case):
    scan = case.scan()  # window 4 to 11, so 7 and 8 are its middle
    np.testing.assert_allclose(scan.spet, case.mean(*range(4, 12)), rtol=1e-6)
    np.testing.assert_array_equal(scan.halves[0], case.frames[..., 7])
    np.testing.assert_array_equal(scan.halves[1], case.frames[..., 8])
    np.testing.assert_allclose(scan.lpet, case.mean(7, 8), rtol=1e-6)
    assert scan.dose_reduction == 4


def test_more_low_frames(case):
    scan = case.scan(frames=range(1, 11), low=4)
    np.testing.assert_allclose(scan.halves[0], case.mean(4, 6), rtol=1e-6)
    np.testing.assert_allclose(scan.halves[1], case.mean(5, 7), rtol=1e-6)
    np.testing.assert_allclose(scan.lpet, case.mean(4, 5, 6, 7), rtol=1e-6)
    assert scan.dose_reduction == 2.5


@pytest.mark.parametrize("low", [2, 4, 6])
def test_halves_average_to_the_lpet_exactly_and_share_no_frame(tmp_path, low):
    """Frame t adds 4^t at one voxel, so every mean says which frames are in it."""
    frames = head(AFFINE, SHAPE)[..., None] * np.ones(COUNT)
    frames[10, 12, 8] = 4.0 ** np.arange(COUNT)
    scan = Case(tmp_path, frames).scan(low=low)
    a, b = scan.halves
    np.testing.assert_array_equal((a + b) / 2, scan.lpet)
    inside = [{t for t in range(COUNT) if int(h[10, 12, 8] * low / 2) // 4**t % 4} for h in (a, b)]
    assert not inside[0] & inside[1] and len(inside[0]) == len(inside[1]) == low // 2
    assert inside[0] | inside[1] <= set(range(4, 12))


def test_a_steady_rise_cancels(tmp_path):
    """LPET and SPET show the same activity although it rises by 5 % a frame; an LPET of the first frames would not."""
    frames = 100 * head(AFFINE, SHAPE)[..., None] * (1 + 0.05 * np.arange(COUNT))
    scan = Case(tmp_path, frames).scan()
    np.testing.assert_allclose(scan.lpet, scan.spet, rtol=1e-6)


def test_noise_of_the_halves_is_independent(case):
    """Poisson frames of mean 50: the halves have SD sqrt(50), their noise does not correlate, and the SPET's does with
    the LPET's as 1 / sqrt(DRF)."""
    scan, inside = case.scan(), head(AFFINE, SHAPE) > 0
    a, b, lpet, spet = (image[inside] - 50 for image in (*scan.halves, scan.lpet, scan.spet))
    tolerance = 4 / np.sqrt(inside.sum())  # four standard errors of a correlation
    assert inside.sum() > 1000
    assert abs(np.corrcoef(a, b)[0, 1]) < tolerance
    assert np.corrcoef(lpet, spet)[0, 1] == pytest.approx(1 / np.sqrt(4), abs=tolerance)
    assert a.std() == pytest.approx(np.sqrt(50), rel=tolerance)
    assert lpet.std() == pytest.approx(np.sqrt(50 / 2), rel=tolerance)
    assert spet.std() == pytest.approx(np.sqrt(50 / 8), rel=tolerance)


def test_scaled_integers_are_read_in_their_unit(case):
    image = nib.Nifti1Image(case.frames.astype(np.int16), AFFINE)
    image.header.set_slope_inter(2.5, 0)
    nib.save(image, case.pet)
    scan = case.scan()
    assert scan.unit == "Bq/ml"
    np.testing.assert_allclose(scan.spet, 2.5 * case.mean(*range(4, 12)), rtol=1e-6)


def test_negative_voxels_become_0_after_averaging(tmp_path):
    frames = poisson_frames().astype(float)
    frames[3, 3, 3, 4:] = -5
    frames[10, 12, 8, 4:] = [9, 9, 9, -3, 7, 9, 9, 9]
    with pytest.warns(UserWarning, match="found 2 negative voxels, .*clipped at 0"):
        scan = Case(tmp_path, frames).scan()
    assert scan.spet[3, 3, 3] == scan.lpet[3, 3, 3] == 0
    assert scan.spet[10, 12, 8] == pytest.approx((6 * 9 - 3 + 7) / 8)
    assert [half[10, 12, 8] for half in scan.halves] == [0, 7] and scan.lpet[10, 12, 8] == 3.5


# ---- the scan ------------------------------------------------------------------------------------------------------


def test_the_mr_comes_to_the_grid_of_the_pet(case):
    scan = case.scan()
    assert scan.mr.shape == scan.lpet.shape == SHAPE
    np.testing.assert_array_equal(scan.affine, AFFINE)
    brain = head(AFFINE, SHAPE)
    assert np.corrcoef(scan.mr.ravel(), brain.ravel())[0, 1] > 0.9
    assert case.scan().name == "sub-02_task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet"


def test_without_mr(case):
    assert short_frame_scan(case.pet, None, frames=range(4, 12)).mr is None


def test_it_is_the_same_as_load_scan_of_the_means(case, tmp_path):
    """The MR goes through the resampling of `load_scan`, and what is saved from the scan is one 3-D volume."""
    scan = case.scan()
    path = mf.save_volume(tmp_path / "lpet.nii.gz", scan.lpet, scan)
    assert nib.load(path).shape == SHAPE
    np.testing.assert_allclose(mf.load_scan(path, case.mr, dose_reduction=10).mr, scan.mr, atol=1e-3)


def test_public_name_plain_nifti_and_a_list_of_frames(case):
    plain = case.pet.with_suffix("")  # .nii
    plain.write_bytes(gzip.decompress(case.pet.read_bytes()))
    scan = mf.short_frame_scan(str(plain), str(case.mr), frames=[5, 6, 7, 8], low=2)
    np.testing.assert_allclose(scan.lpet, case.mean(6, 7), rtol=1e-6)
    assert scan.dose_reduction == 2


# ---- bad input -----------------------------------------------------------------------------------------------------


def refused(error, case, *words, **options):
    """It raises `error` in one sentence that has `words`."""
    with pytest.raises(error) as caught:
        case.scan(**options)
    sentence = str(caught.value)
    assert "\n" not in sentence and "expected" in sentence and "found" in sentence and ";" in sentence
    for word in words:
        assert word in sentence, sentence


def test_a_static_pet(case):
    nib.save(nib.Nifti1Image(case.frames[..., 0], AFFINE), case.pet)
    refused(ValueError, case, str(case.pet), "(X, Y, Z, frames)", str(SHAPE), "load_scan")


@pytest.mark.parametrize("frames", [range(-2, 6), range(6, 13), range(70, 90)])
def test_window_outside(case, frames):
    refused(ValueError, case, str(case.pet), "frames 0 to 11", f"{frames[0]} to {frames[-1]}", frames=frames)


@pytest.mark.parametrize("frames", [[], [5, 6], [4, 6, 8, 10], [8, 7, 6, 5]])
def test_too_few_frames_or_gaps(case, frames):
    refused(ValueError, case, "consecutive", str(frames), frames=frames)


@pytest.mark.parametrize("low", [0, 1, 3, 8, 10, -2])
def test_low_that_cannot_be_halved_or_is_all(case, low):
    refused(ValueError, case, "even number", "8 frames", f"found {low};", low=low)


def test_unequal_durations_matter_only_in_the_window(tmp_path):
    case = Case(tmp_path, poisson_frames(), durations=[30] * 5 + [60] * 7)
    refused(ValueError, case, "from 4 to 11", "found 30, 60 s")
    assert case.scan(frames=range(5, 12)).dose_reduction == 3.5


def test_sidecar_missing(case):
    case.sidecar.unlink()
    refused(OSError, case, str(case.sidecar), "no such file", "beside the image")


@pytest.mark.parametrize("content", [{"Units": "Bq/ml"}, ["FrameDuration"], 7])
def test_sidecar_without_frame_duration(case, content):
    case.write(content)
    refused(ValueError, case, str(case.sidecar), "FrameDuration", "no such entry")


@pytest.mark.parametrize(
    ("durations", "found"), [([60] * 11, "11 numbers"), (60, "found 60"), ([], "0 numbers"), (["60"] * 12, "'60'")]
)
def test_sidecar_of_another_pet(case, durations, found):
    case.write({"FrameDuration": durations})
    refused(ValueError, case, str(case.sidecar), "12 frames", found)


def test_sidecar_that_is_no_json(case):
    case.sidecar.write_bytes(b"<html>\xff")
    refused(ValueError, case, str(case.sidecar), "expected JSON")


def test_pet_missing_truncated_or_foreign(case):
    whole = case.pet.read_bytes()
    for content in (whole[: len(whole) // 2], b"not an image", None):
        case.pet.unlink()
        if content is not None:
            case.pet.write_bytes(content)
        refused(OSError, case, str(case.pet), "whole NIfTI file")


def test_an_image_of_colours(case):
    colours = np.zeros((*SHAPE, COUNT), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, AFFINE), case.pet)
    refused(OSError, case, str(case.pet))


def test_nan_is_blamed_on_the_pet(tmp_path):
    frames = poisson_frames().astype(float)
    frames[3, 3, 3, 9] = np.nan
    case = Case(tmp_path, frames)
    refused(ValueError, case, str(case.pet), "NaN")


def test_mr_elsewhere(case):
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.float32), nib.affines.from_matvec(np.eye(3), [500] * 3)), case.mr)
    refused(ValueError, case, str(case.mr), "covers the head")

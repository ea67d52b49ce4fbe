"""What strangers bring in: things that are no brain, edges, NaN, contradicting headers, files that are something else,
absurd numbers, damaged weights, mutated bytes and kills."""

import gzip
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import mfdiff_lite as mf
from mfdiff_lite.config import PROFILES
from mfdiff_lite.files import load_scan, save_volume
from mfdiff_lite.model import MFdiff, load_model, save_model
from mfdiff_lite.phantom import SHIFTS, virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.readers.frames import short_frame_scan
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner
from mfdiff_lite.view import SMOOTH_MM, ActivityScale, ModelView, WorkingGrid, cut_away

ROOT = Path(__file__).resolve().parents[1]
VOXEL = (2.0, 2.0, 2.0)
A = np.diag([2.0, 2, 2, 1])


@pytest.fixture(scope="module")
def slab():
    """Six slices of a head at DRF 20."""
    return Scanner().scan(virtual_patient(load_anatomy("ahba-15697"), 11, slices=6), 20)


def plain_scale(lpet):
    """The formula that the shipped weights were trained with, for a scan with nothing strange in it."""
    smooth = ndimage.gaussian_filter(lpet, SMOOTH_MM / np.sqrt(8 * np.log(2)) / 2, mode="nearest")
    mask = smooth > 0.4 * np.percentile(smooth[smooth > 0.1 * smooth.max()], 95)
    return float(lpet[mask].mean()), mask


def ball(shape, centre, radius=5):
    return sum((a - c) ** 2 for a, c in zip(np.ogrid[tuple(map(slice, shape))], centre, strict=True)) < radius**2


# ---- scale, mask, box ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [None, "few-counts", "large-lesions", "amyloid"])
def test_an_ordinary_head_keeps_its_scale(shift):
    """At the highest noise too: the weights were trained with it."""
    assert shift is None or shift in SHIFTS
    patient = virtual_patient(load_anatomy("ahba-12876"), 3, shift, slices=6)
    lpet = Scanner.shifted(shift).scan(patient, 60 if shift == "few-counts" else 100).lpet
    value, mask = plain_scale(lpet)
    scale = ActivityScale(lpet, VOXEL)
    assert scale.value == pytest.approx(value, rel=5e-3) and not scale.foreign.any()
    assert 2 * (scale.mask & mask).sum() > 0.995 * (scale.mask.sum() + mask.sum())


@pytest.mark.parametrize("factor", [10, 40, 1000])
@pytest.mark.parametrize("centre", [(64, 30, 3), (10, 60, 3)])
def test_nothing_bright_moves_scale_mask_and_box(slab, factor, centre):
    plain, hot = ActivityScale(slab.lpet, VOXEL), ball(slab.lpet.shape, centre)
    lpet = np.where(hot, np.float32(factor * plain.value), slab.lpet)
    scale = ActivityScale(lpet, VOXEL)
    assert scale.value == pytest.approx(plain.value, rel=0.015)
    assert scale.foreign[hot].all() and not (scale.mask & hot).any()
    far = ndimage.distance_transform_edt(~hot, VOXEL) > 20
    assert (scale.mask == plain.mask)[far].mean() > 0.999
    assert WorkingGrid(Scan(lpet)).box == WorkingGrid(slab).box


@pytest.mark.parametrize("value", [1e4, 1e9, 1e30])
def test_no_single_value_moves_the_scale(slab, value):
    plain, lpet = ActivityScale(slab.lpet, VOXEL), slab.lpet.copy()
    lpet[5, 64, 2], lpet[64, 64, 3] = value, value
    assert ActivityScale(lpet, VOXEL).value == pytest.approx(plain.value, rel=0.01)


@pytest.fixture(scope="module")
def shipped():
    return mf.load_pretrained("cpu")


def test_the_brain_stays_what_it_was_and_the_rest_comes_back_as_it_came(slab, shipped):
    part = np.s_[..., 1:4]
    scan = Scan(slab.lpet[part], slab.mr[part])
    mask, level = slab.mask[part], float(slab.spet[slab.mask].mean())
    plain = shipped.restore(scan, 2).mean
    hot = ball(scan.lpet.shape, (64, 30, 1))
    with pytest.warns(UserWarning, match="much brighter than a brain"):
        image = shipped.restore(Scan(np.where(hot, np.float32(40 * level), scan.lpet), scan.mr), 2).mean
    assert image[hot] == pytest.approx(40 * level, rel=1e-6)
    far = mask & (ndimage.distance_transform_edt(~hot, VOXEL) > 14)
    assert image[far].sum() == pytest.approx(plain[far].sum(), rel=0.01)
    stripped = shipped.restore(Scan(scan.lpet * mask, scan.mr * mask), 2).mean
    assert stripped[mask].sum() == pytest.approx(plain[mask].sum(), rel=0.02)
    assert not stripped[~mask].any()


def test_the_edge_of_the_field_of_view_keeps_its_activity(slab, shipped):
    whole = shipped.restore(Scan(slab.lpet[..., 1:4], slab.mr[..., 1:4]), 2).mean
    for where, layer in ((np.s_[:64], np.s_[-1]), (np.s_[:, 60:], np.s_[:, 0])):
        part = shipped.restore(Scan(slab.lpet[..., 1:4][where], slab.mr[..., 1:4][where]), 2).mean
        brain = slab.mask[..., 1:4][where][layer]
        # one row of voxels of three slices, noise and all; padded with air it kept 67 %
        assert part[layer][brain].sum() == pytest.approx(whole[where][layer][brain].sum(), rel=0.08)


def test_beyond_a_side_that_cuts_the_head_the_box_goes_on(slab):
    """As far as the network looks; of a whole head the box stays what the weights learnt on."""
    for where, cut in ((np.s_[:64], "0>"), (np.s_[64:], "0<"), (np.s_[56:64], "0<>"), (np.s_[:, 60:64], "1<>")):
        grid = WorkingGrid(Scan(slab.lpet[where]))
        assert all(grid.pad[int(cut[0])]["<>".index(side)] >= WorkingGrid.BEYOND for side in cut[1:])
    whole = WorkingGrid(slab)
    smooth = ActivityScale(slab.lpet, VOXEL).smooth
    for axis, span in enumerate(whole.box[:2]):
        where = np.flatnonzero((smooth > 0.08 * np.percentile(smooth, 99.5)).any(axis=(1 - axis, 2)))
        assert whole.pad[axis] == (0, 0) and 2 * whole.RIM <= span.stop - span.start - np.ptp(where) - 1 < 16 + 4
        assert span.start + span.stop == pytest.approx(where[0] + where[-1] + 1, abs=1)


def test_a_thin_slab_gains_nothing_at_its_sides(slab, shipped):
    """8 of 128 columns: with 4 columns of padding the first one gained 7 %."""
    scans = [Scanner().scan(virtual_patient(load_anatomy("ahba-15697"), seed, slices=3), 20) for seed in (12, 13)]
    kept = []
    for scan in (slab, *scans):
        whole, part = (shipped.restore(Scan(scan.lpet[w], scan.mr[w]), 0).mean for w in (np.s_[:], np.s_[56:64]))
        brain = scan.mask[56]
        kept.append([part[0][brain].sum(), whole[56][brain].sum()])
    part, whole = np.sum(kept, 0)
    assert part == pytest.approx(whole, rel=0.04)


def test_pockets_of_a_mask_were_cut_away_and_zeros_of_noise_were_not():
    distance = np.linalg.norm(np.indices((30, 30, 30)) - 15, axis=0)
    rng = np.random.default_rng(0)
    head, air = rng.uniform(5, 15, distance.shape), distance > 12
    holes = (rng.random(head.shape) < 0.01) & ~air
    cut_out = np.where(air | holes, 0, head).astype(np.float32)
    np.testing.assert_array_equal(cut_away(cut_out), cut_out == 0)
    inside = distance < 10  # of a cut-out brain, a fifth of which noise pushed below 0: the most of it is known
    noisy = np.where(inside & (rng.random(head.shape) < 0.2), 0, cut_out)
    assert cut_away(noisy)[inside].mean() < 0.02
    whole = np.where(holes, 0, head * np.exp(-np.maximum(distance - 8, 0) / 1.5)).astype(np.float32)  # a dark edge
    whole[distance > 14] = 0
    assert cut_away(whole)[distance > 14].all() and not cut_away(whole)[inside].any()


@pytest.mark.parametrize("shape", [(1, 60, 12), (60, 2, 12), (9, 9, 1)])
def test_a_constant_goes_on_beyond_a_thin_field_of_view(shape):
    view = ModelView(Scan(np.full(shape, 5, np.float32)), 3)
    np.testing.assert_allclose(view.stack(view.lpet), 1, rtol=1e-5)
    np.testing.assert_allclose(view.restored(view.lpet), 5, rtol=1e-5)


# ---- NaN and negative values ---------------------------------------------------------------------------------------


def test_nan_round_the_head_is_air_and_comes_back(tmp_path, slab):
    air = slab.lpet < 0.02 * slab.lpet.max()
    air &= ndimage.label(air)[0] == ndimage.label(air)[0][0, 0, 0]
    path = tmp_path / "nan.nii.gz"
    nib.save(nib.Nifti1Image(np.where(air, np.nan, slab.lpet), A), path)
    nib.save(nib.Nifti1Image(np.where(air, np.nan, slab.mr), A), tmp_path / "mr.nii.gz")
    scan = load_scan(path, tmp_path / "mr.nii.gz", spet_path=path, dose_reduction=20)
    assert np.isfinite(scan.lpet).all() and np.isfinite(scan.mr).all() and not scan.lpet[air].any()
    np.testing.assert_array_equal(scan.background, air)
    view = ModelView(scan, 3)
    image = view.restored(view.lpet)
    np.testing.assert_array_equal(np.isnan(image), air)
    assert np.isfinite(scan.on_grid(image, "restored")).all()
    assert mf.compare(scan, {"restored": image}).rows["restored"]["activity_bias"] == pytest.approx(0, abs=0.02)
    written = nib.load(save_volume(tmp_path / "out.nii.gz", image, scan)).get_fdata()
    np.testing.assert_array_equal(np.isnan(written), air)


def test_nan_holes_of_a_mask_of_low_values_are_air_too(slab):
    """Beside NaN round the head; more of them, or any without, are refused."""
    air = slab.lpet < 0.02 * slab.lpet.max()
    outside = ndimage.label(air)[0] == ndimage.label(air)[0][0, 0, 0]
    holes, many = np.zeros((2, *air.shape), bool)
    holes[60:64, 70:72, 3], many[50:70, 50:70, 3] = True, True
    scan = Scan(np.where(outside | holes, np.nan, slab.lpet), dose_reduction=20)
    np.testing.assert_array_equal(scan.background, outside | holes)
    for image in (np.where(outside | many, np.nan, slab.lpet), np.where(holes, np.nan, slab.lpet)):
        with pytest.raises(ValueError, match="NaN voxels .* that are not the air"):
            Scan(image, dose_reduction=20)


@pytest.mark.parametrize("role", ["lpet", "mr"])
def test_nan_in_the_head_is_refused_with_place_and_share(slab, role):
    images = {"lpet": slab.lpet.copy(), "mr": slab.mr.copy()}
    images[role][60:62, 70, 3:] = np.nan  # up to the end slice
    with pytest.raises(ValueError, match=r"found 6 NaN voxels \(0.01%\) near voxel \[60, 70, 4\]"):
        Scan(**images)


def test_small_negatives_are_clipped_and_counted_alike_by_all_readers(tmp_path, slab):
    noisy = slab.lpet + np.random.default_rng(0).normal(0, 0.003 * slab.lpet.max(), slab.lpet.shape).astype(np.float32)
    below = int((noisy < 0).sum())
    with pytest.warns(
        UserWarning, match=f"found {below} negative voxels, .*% of the activity; they are clipped"
    ) as said:
        scan = Scan(noisy)
    assert len(said) == 1 and scan.lpet.min() == 0
    np.testing.assert_array_equal(scan.lpet, noisy.clip(min=0))
    path = tmp_path / "a_pet.nii.gz"
    nib.save(nib.Nifti1Image(noisy, A), path)
    with pytest.warns(UserWarning, match=f"a_pet.nii.gz: .*found {below} negative"):
        load_scan(path, dose_reduction=20)
    nib.save(nib.Nifti1Image(np.stack([noisy] * 3, -1), A), path)
    (tmp_path / "a_pet.json").write_text(json.dumps({"FrameDuration": [60] * 3}))
    with pytest.warns(UserWarning, match=f"a_pet.nii.gz: .*found {below} negative"):
        short_frame_scan(path, None, frames=range(3))


@pytest.mark.parametrize("spoil", [lambda v: v - 0.1 * v.max(), lambda v: (v - v.mean()) / v.std(), lambda v: -v])
def test_offsets_and_z_scores_are_refused(slab, spoil):
    with pytest.raises(
        ValueError, match="LPET: expected activity of at least 0, found .* undo any offset or z-scoring"
    ):
        Scan(spoil(slab.lpet))


# ---- headers and files that are something else ---------------------------------------------------------------------


def turned(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s, 5], [0, 1, 0, -3], [-s, 0, c, 2], [0, 0, 0, 1.0]])


def test_two_orientations_are_told_and_one_is_written(tmp_path, slab):
    image = nib.Nifti1Image(slab.lpet, A)
    image.set_sform(turned(0.35) @ A, 1)
    image.set_qform(A, 1)
    nib.save(image, tmp_path / "sq.nii.gz")
    with pytest.warns(UserWarning, match=r"sform \(code 1\) and a qform \(code 1\) that are up to \d+ mm apart"):
        scan = load_scan(tmp_path / "sq.nii.gz", dose_reduction=20)
    np.testing.assert_allclose(scan.affine, turned(0.35) @ A, atol=1e-4)
    written = nib.load(save_volume(tmp_path / "out.nii.gz", scan.lpet, scan))
    np.testing.assert_allclose(written.get_sform(), written.get_qform(), atol=1e-3)


def test_no_orientation_is_told_and_one_is_not(tmp_path, slab):
    image = nib.Nifti1Image(slab.lpet, None)
    image.header.set_zooms(VOXEL)
    nib.save(image, tmp_path / "none.nii.gz")
    with pytest.warns(UserWarning, match="none.nii.gz: expected an orientation in the header .* found none"):
        load_scan(tmp_path / "none.nii.gz", dose_reduction=20)
    for code in (0, 1):
        image = nib.Nifti1Image(slab.lpet, turned(0.1) @ A)
        image.set_qform(turned(0.1) @ A, code)
        nib.save(image, tmp_path / "one.nii.gz")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_scan(tmp_path / "one.nii.gz", dose_reduction=20)


NIFTI = nib.Nifti1Image(np.ones((9, 9, 9), np.float32), A).to_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("raw.nii.gz", NIFTI, "unpacked NIfTI data under another name; rename it so that it ends in .nii"),
        ("packed.nii", gzip.compress(NIFTI, mtime=0), "gzip data under another name; rename it"),
        ("noending", NIFTI, "unpacked NIfTI data under another name; rename it"),
        ("empty.nii.gz", b"", "an empty file; copy or fetch it again"),
        ("lfs.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "a git-lfs pointer"),
        ("page.nii.gz", b"<!DOCTYPE html><html>login</html>", "a web page or XML text; download it again"),
        ("archive.nii", b"PK\x03\x04" + bytes(600), "a ZIP archive; unpack it"),
    ],
    ids=["raw", "packed", "no ending", "empty", "pointer", "page", "archive"],
)
def test_a_file_that_is_something_else_is_called_by_its_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{name}: expected a NIfTI file.*, found {words}"):
        load_scan(tmp_path / name, dose_reduction=20)


def test_links_folders_and_addresses_are_called_by_their_names(tmp_path):
    (tmp_path / "annex.nii.gz").symlink_to("../.git/annex/objects/aa/bb/MD5E-s1--x.nii.gz")
    for path, words in (
        (tmp_path / "annex.nii.gz", "a git-annex link whose content is not here"),
        (Path("https://example.org/l.nii.gz"), "an address of the network; download it"),
    ):
        with pytest.raises(OSError, match=f"expected a NIfTI file, found {words}"):
            load_scan(path, dose_reduction=20)
    with pytest.raises(OSError, match=r"^https://example\.org/l\.nii\.gz: "):
        load_scan(path, dose_reduction=20)
    (tmp_path / "dcm").mkdir()
    (tmp_path / "dcm" / "IM1").write_bytes(bytes(128) + b"DICM")
    for path in (tmp_path / "dcm", tmp_path / "dcm" / "IM1"):
        with pytest.raises(ValueError, match="expected the DICOM files of one series, found none that dcm2niix can"):
            load_scan(path, dose_reduction=20)


def test_nifti_2_is_read_without_a_word(tmp_path, slab, capfd):
    nib.save(nib.Nifti2Image(slab.lpet, A), tmp_path / "n2.nii.gz")
    load_scan(tmp_path / "n2.nii.gz", dose_reduction=20)
    assert capfd.readouterr() == ("", "")


# The PET entries of the sidecars of OpenNeuro ds003382 (sub-02, dynamic) and ds004513 (sub-s003), as published.
MONASH = {
    "ConversionSoftware": "dcm2niix",
    "DoseCalibrationFactor": 1.0,
    "Units": "Bq/ml",
    "TracerRadionuclide": "F18",
    "ModeOfAdministration": "infusion",
    "InjectedRadioactivity": 39.0,
    "InjectedRadioactivityUnits": "Mbq",
    "ImageDecayCorrected": True,
    "ReconFilterSize": [2],
    "FrameTimesStart": list(range(0, 5400, 60)),
    "FrameDuration": [60] * 90,
}
MUNICH = {
    "Units": "Bq/mL",
    "InjectedRadioactivity": 169,
    "InjectedMass": "n/a",
    "ModeOfAdministration": "bolus",
    "ImageDecayCorrected": True,
    "ReconFilterSize": 0,
    "FrameDuration": [36] + [12] * 7 + [30] * 8 + [60] * 8 + [180] * 2 + [300] * 5,
}


@pytest.mark.parametrize(("content", "frames"), [(MONASH, range(70, 90)), (MUNICH, range(26, 31))])
def test_the_sidecars_of_real_studies_are_understood(tmp_path, content, frames):
    count = len(content["FrameDuration"])
    data = np.random.default_rng(0).poisson(50, (6, 7, 5, count)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, A), tmp_path / "sub-02_pet.nii.gz")
    (tmp_path / "sub-02_pet.json").write_text(json.dumps(content))
    scan = short_frame_scan(tmp_path / "sub-02_pet.nii.gz", None, frames=frames)
    assert scan.unit == content["Units"] and scan.dose_reduction == len(frames) / 2
    np.testing.assert_allclose(scan.spet, data[..., frames].mean(-1), rtol=1e-5)


# ---- weights and numbers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    return save_model(MFdiff.from_profile(PROFILES["smoke"]), path, {"steps": 0})


def test_one_flipped_bit_of_the_weights_is_found(small, tmp_path):
    content = bytearray(small.read_bytes())
    load_model(small, "cpu")
    for place, value in ((len(content) - 1000, content[-1000] ^ 1), (len(content) * 3 // 4, 0xFF)):
        spoiled = bytearray(content)
        spoiled[place] = value if spoiled[place] != value else 0
        (tmp_path / "flip.safetensors").write_bytes(spoiled)
        with pytest.raises(
            ValueError, match="flip.safetensors: expected weights saved by this package, found .*damaged"
        ):
            load_model(tmp_path / "flip.safetensors", "cpu")


def test_weights_that_are_not_finite_are_refused_and_restore_writes_no_nan(small, tmp_path, slab):
    model = load_model(small, "cpu")
    next(model.fusion.head.parameters()).data[:] = np.inf
    with pytest.raises(ValueError, match="expected a finite result, found NaN"):
        model.restore(Scan(slab.lpet[..., :1]), 1)
    save_model(model, tmp_path / "inf.safetensors", {})
    with pytest.raises(ValueError, match="inf.safetensors: .*NaN or infinite"):
        load_model(tmp_path / "inf.safetensors", "cpu")


def test_numbers_have_an_upper_bound(small, slab):
    for dose in (0.5, 1e9, float("inf")):
        with pytest.raises(ValueError, match=r"dose_reduction: expected .* 1 to 200 \(learned: 4 to 100\)"):
            Scan(slab.lpet, dose_reduction=dose)
        with pytest.raises(ValueError, match="dose_reduction: expected"):
            slab.sinogram.thin(dose, 0)
    with pytest.raises(ValueError, match="n_samples: expected 0 to"):
        load_model(small, "cpu").restore(slab, 100_000)
    for settings in ({"steps": 10**12}, {"patients": 10**9}, {"batch": 10**6}, {"seed": 10**30}, {"doses": 10**6}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
            mf.load_profile("cpu", **settings)


# ---- mutations and kills -------------------------------------------------------------------------------------------


def test_a_hundred_mutated_inputs_go_through_or_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    fuzz = importlib.import_module("fuzz")
    wrong = [one for one in fuzz.run(100, seed=1) if one.status not in (0, 2)]
    assert not wrong


@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_a_kill_leaves_no_half_file_under_a_final_name(tmp_path, small, slab, seconds):
    """Whatever moment SIGKILL comes at: what has its final name is whole."""
    for name, image in (("lpet", slab.lpet), ("mr", slab.mr)):
        nib.save(nib.Nifti1Image(image, A), tmp_path / f"{name}.nii.gz")
    command = [sys.executable, "-m", "mfdiff_lite", "restore", "--lpet", "lpet.nii.gz", "--mr", "mr.nii.gz"]
    command += ["--out", "out.nii.gz", "--dose-reduction", "20", "--weights", str(small)]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        command,
        **quiet,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "out.nii.gz").exists():
        assert np.isfinite(nib.load(tmp_path / "out.nii.gz").get_fdata()).all()
    assert {p.name for p in tmp_path.glob("[!.]*")} <= {"lpet.nii.gz", "mr.nii.gz", "out.nii.gz"}

"""Roads in and out: DICOM, sidecars, frames, SUV, other formats, registration, the record beside an image."""

import base64
import io
import json
import re
import sys

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, PositronEmissionTomographyImageStorage, generate_uid
from typer.testing import CliRunner

from mfdiff_lite.__main__ import app
from mfdiff_lite.checks import Finding
from mfdiff_lite.files import load_scan, read_image, save_volume
from mfdiff_lite.look.page import registration, still
from mfdiff_lite.readers.register import register, rigid_motion
from mfdiff_lite.record import sha256, write_record
from mfdiff_lite.scan import Scan
from mfdiff_lite.sidecar import suv_factor

SECONDS = [60, 60, 120]
SHAPE = (16, 20, 6)  # x, y, z
DOSE, WEIGHT, HALF_LIFE, WAITED = 3.7e8, 70.0, 6586.2, 3600.0  # Bq, kg, s, s


@pytest.fixture(scope="module")
def frames():
    """(T, X, Y, Z) in Bq/mL; its slices differ in scale as those of a real series do."""
    rng = np.random.default_rng(0)
    return rng.random((3, *SHAPE)) * np.arange(1, 7) * 1000


def dicom(folder, frames):
    """A made-up PET series: units BQML, a rescale slope of its own for every slice, decay corrected to its start."""
    folder.mkdir(parents=True)
    uids = {key: generate_uid() for key in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    for t, volume in enumerate(frames):
        start = sum(SECONDS[:t])
        for z in range(volume.shape[2]):
            one, number = Dataset(), t * volume.shape[2] + z + 1
            one.file_meta = FileMetaDataset()
            one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = PositronEmissionTomographyImageStorage
            one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
            one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            drug = Dataset()
            drug.RadiopharmaceuticalStartTime, drug.RadionuclideTotalDose = "093000", DOSE
            drug.RadionuclideHalfLife = HALF_LIFE
            slope = volume[..., z].max() / 32000
            fields = uids | {
                "Modality": "PT", "Manufacturer": "none", "PatientName": "a", "PatientID": "b", "PatientWeight": WEIGHT,
                "StudyDate": "20200101", "SeriesDate": "20200101", "AcquisitionDate": "20200101",
                "StudyTime": "100000", "SeriesTime": "103000",
                "AcquisitionTime": f"10{30 + start // 60:02d}{start % 60:02d}", "SeriesNumber": 3,
                "InstanceNumber": number, "ImageIndex": number, "SeriesDescription": "PET",
                "ImageType": ["ORIGINAL", "PRIMARY"], "SeriesType": ["DYNAMIC", "IMAGE"],
                "Units": "BQML", "DecayCorrection": "START", "CorrectedImage": ["DECY", "ATTN"],
                "NumberOfSlices": volume.shape[2], "NumberOfTimeSlices": len(frames),
                "ActualFrameDuration": SECONDS[t] * 1000, "FrameReferenceTime": 1000.0 * (start + SECONDS[t] / 2),
                "RadiopharmaceuticalInformationSequence": [drug], "Rows": volume.shape[1], "Columns": volume.shape[0],
                "PixelSpacing": [2.0, 2.0], "SliceThickness": 3.0, "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "ImagePositionPatient": [-100.0, -90.0, 10.0 + 3 * z], "RescaleSlope": f"{slope:.9g}",
                "RescaleIntercept": 0, "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1,
                "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
                "PixelData": np.round(volume[..., z].T / slope).astype("<i2").tobytes(),
            }  # fmt: skip
            for key, value in fields.items():
                setattr(one, key, value)
            one.save_as(folder / f"IM{number:05d}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="module")
def series(tmp_path_factory, frames):
    return dicom(tmp_path_factory.mktemp("dicom") / "series", frames)


def bids(folder, frames, **fields):
    """The same frames as BIDS has them: a NIfTI of 4-D and its sidecar."""
    path = folder / "pet.nii.gz"
    nib.save(nib.Nifti1Image(np.moveaxis(frames, 0, -1).astype(np.float32), np.diag([2.0, 2, 3, 1])), path)
    content = {"Units": "Bq/mL", "FrameDuration": SECONDS, "FrameTimesStart": [0, 60, 120]} | fields
    (folder / "pet.json").write_text(json.dumps(content), encoding="utf-8")
    return path


# ---- in ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [0, 2, "mean"])
def test_a_dicom_series_is_read_with_its_slopes_units_and_place(series, frames, chosen):
    scan = load_scan(series, dose_reduction=20, frames=chosen)
    wanted = np.average(frames, axis=0, weights=SECONDS) if chosen == "mean" else frames[chosen]
    near = frames.max() / 32000
    there = (
        nib.affines.apply_affine(np.linalg.inv(scan.affine), [100.0 - 2 * 3, 90.0 - 2 * 5, 10 + 3 * 4])
        .round()
        .astype(int)
    )
    assert scan.unit == "Bq/mL" and scan.lpet[tuple(there)] == pytest.approx(wanted[3, 5, 4], abs=near)
    np.testing.assert_allclose(np.sort(scan.lpet.ravel()), np.sort(wanted.ravel()), atol=near)


def test_suv_of_a_dicom_series_is_the_closed_form(series, frames):
    scan = load_scan(series, dose_reduction=20, frames=0, suv=True)
    left = DOSE * 2 ** (-WAITED / HALF_LIFE)
    assert scan.unit == "SUV"
    assert scan.lpet.max() == pytest.approx(frames[0].max() * WEIGHT * 1e3 / left, rel=1e-4)


def test_a_folder_of_two_series_is_refused(series, frames, tmp_path):
    both = dicom(tmp_path / "both", frames[:1])
    for path in dicom(tmp_path / "more", frames[:1]).iterdir():
        path.rename(both / f"second-{path.name}")
    with pytest.raises(ValueError, match="both: expected the DICOM files of one series, found 2: .*folder of its own"):
        read_image(both)


def test_dicom_without_the_extra_says_what_to_install(series, monkeypatch):
    monkeypatch.setitem(sys.modules, "dcm2niix", None)
    with pytest.raises(ImportError, match=r"expected dcm2niix .*pip install 'mfdiff_lite\[dicom\]'"):
        read_image(series)


def test_frames_of_a_bids_image(tmp_path, frames):
    path = bids(tmp_path, frames)
    np.testing.assert_allclose(load_scan(path, dose_reduction=4, frames=1).lpet, frames[1], rtol=1e-5)
    mean = load_scan(path, dose_reduction=4, frames="mean")
    np.testing.assert_allclose(mean.lpet, np.average(frames, axis=0, weights=SECONDS), rtol=1e-5)
    with pytest.raises(ValueError, match=r"pet.nii.gz: expected one 3-D volume, found shape .*choose \(--frame\)"):
        load_scan(path, dose_reduction=4)
    with pytest.raises(ValueError, match="expected a frame from 0 to 2, or 'mean', found 3"):
        load_scan(path, dose_reduction=4, frames=3)
    (tmp_path / "pet.json").unlink()
    with pytest.raises(ValueError, match="expected the seconds of each of its 3 frames .*FrameDuration"):
        load_scan(path, dose_reduction=4, frames="mean")


def test_a_truncated_frame_is_said(tmp_path, frames):
    path = bids(tmp_path, frames)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(OSError, match="pet.nii.gz: expected a whole NIfTI file, found a truncated"):
        load_scan(path, dose_reduction=4, frames=2)


def test_suv_needs_its_fields_and_names_those_that_lack():
    known = {"Units": "kBq/mL", "InjectedRadioactivity": 10, "InjectedRadioactivityUnits": "mCi", "BodyWeight": 80}
    times = {"ImageDecayCorrected": True, "ImageDecayCorrectionTime": 0, "InjectionStart": -6586.2}
    factor, missing = suv_factor(known | times | {"TracerRadionuclide": "F18"})
    assert missing == [] and factor == pytest.approx(1e3 * 80e3 / (10 * 3.7e7 / 2))
    assert suv_factor({"Units": "SUV"}) == (1.0, [])
    factor, missing = suv_factor(known)
    assert np.isnan(factor)
    assert missing == [
        "RadionuclideHalfLife",
        "ImageDecayCorrectionTime",
        "InjectionStart",
        "ImageDecayCorrected (true)",
    ]


def test_slices_mgz_and_a_home_folder(tmp_path, monkeypatch):
    image = np.random.default_rng(0).random((12, 14, 5)).astype(np.float32)
    affine = np.diag([2.0, 2, 2, 1])
    monkeypatch.setenv("HOME", str(tmp_path))
    nib.save(nib.MGHImage(image, affine), tmp_path / "mr.mgz")
    nib.save(nib.Nifti1Image(image[..., 2], affine), tmp_path / "slice.nii.gz")
    np.testing.assert_array_equal(read_image("~/mr.mgz").get_fdata(dtype=np.float32), image)
    np.testing.assert_array_equal(load_scan("~/slice.nii.gz", dose_reduction=2).lpet, image[..., 2:3])


# ---- out -----------------------------------------------------------------------------------------------------------


def test_the_header_is_kept_and_says_what_was_done(tmp_path):
    sform, qform = (nib.affines.from_matvec(np.diag([-2.0, 2, 2]), [20, -15, k]) for k in (3, 3))
    image = nib.Nifti1Image(np.ones((6, 7, 8), np.float32), sform)
    image.set_sform(sform, 4)
    image.set_qform(qform, 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "in.nii.gz")
    scan = load_scan(tmp_path / "in.nii.gz", dose_reduction=4)
    saved = nib.load(save_volume(tmp_path / "out.nii.gz", scan.lpet, scan, description="mean of 8 samples"))
    assert (int(saved.header["sform_code"]), int(saved.header["qform_code"])) == (4, 1)
    np.testing.assert_allclose(saved.get_qform(), qform, atol=1e-5)
    assert saved.header.get_xyzt_units()[0] == "mm" and bytes(saved.header["descrip"]).startswith(b"mean of 8 samples")


def test_a_record_names_files_by_their_hash_and_holds_no_nan(tmp_path):
    image, source = tmp_path / "out.nii.gz", tmp_path / "in.nii.gz"
    image.write_bytes(b"abc"), source.write_bytes(b"")
    finding = Finding("dose", "warn", "a sentence", float("nan"), 1.0)
    path = write_record(image, "said", {"lpet": source, "mr": None}, [finding], {"Units": "SUV"}, "0", ["restore"])
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert path.name == "out.json" and content["Checks"][0]["value"] is None
    assert content["Image"]["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content["Sources"] == {"lpet": {"file": str(source), "sha256": sha256(source)}} and content["Units"] == "SUV"
    with pytest.raises(FileExistsError):
        write_record(image, "said", {}, [], {}, "0", [])


# ---- registration --------------------------------------------------------------------------------------------------


def two_modalities(turn=0.0, shift=(0.0, 0.0, 0.0)):
    """A made-up head without symmetry in two contrasts: an LPET, and an MR whose affine is turned about z and moved."""
    rng = np.random.default_rng(0)
    affine = nib.affines.from_matvec(np.diag([4.0] * 3), [-78, -78, -46])
    points = nib.affines.apply_affine(affine, np.moveaxis(np.indices((40, 40, 24)), 0, -1))
    pet, mr = np.zeros(points.shape[:3]), np.zeros(points.shape[:3])
    parts = [
        ((0, 0, 0), (60, 70, 44), 10, 100),
        ((20, 25, 8), (18, 25, 20), 4, 160),
        ((-25, -20, -5), (15, 30, 25), 16, 60),
        ((25, -30, 10), (20, 12, 15), 20, 40),
    ]
    for centre, size, a, b in parts:
        inside = (((points - centre) / size) ** 2).sum(-1) < 1
        pet[inside], mr[inside] = a, b
    motion = nib.affines.from_matvec(nib.eulerangles.euler2mat(z=np.radians(turn)), shift)
    lpet = rng.poisson(pet).astype(np.float32)
    return Scan(lpet, affine=affine), nib.Nifti1Image(mr.astype(np.float32), motion @ affine), motion


def test_a_moved_mr_is_brought_back():
    scan, mr, motion = two_modalities(12.0, (9.0, -6.0, 4.0))
    back, centre = rigid_motion(scan, mr)
    points = centre + 40 * np.concatenate([np.eye(3), -np.eye(3)])
    there = nib.affines.apply_affine(back @ motion, points)
    assert np.linalg.norm(there - points, axis=1).mean() < 2.0  # half a voxel of this coarse grid


def test_the_report_shows_where_the_mr_lies(tmp_path):
    """A picture of before and after; without `--register` there is none."""
    scan, mr, _ = two_modalities(12.0, (9.0, -6.0, 4.0))
    data = np.where(mr.get_fdata() > 0, mr.get_fdata(), np.nan)  # as some tools write air
    for name, image in {"l": nib.Nifti1Image(scan.lpet, scan.affine), "m": nib.Nifti1Image(data, mr.affine)}.items():
        nib.save(image, tmp_path / f"{name}.nii")
    files = ["--lpet", tmp_path / "l.nii", "--mr", tmp_path / "m.nii", "--dose-reduction", 20, "--quality", "fast"]
    pages = []
    for number, more in enumerate([["--register"], []]):
        page = tmp_path / f"{number}.html"
        arguments = ["restore", *files, *more, "--out", tmp_path / f"{number}.nii", "--report", page]
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.stderr
        pages.append(page.read_text("utf-8"))
    moved = re.search(r"moved by (\d+\.\d) mm and (\d+\.\d) degrees", result.stdout + pages[0])
    assert float(moved[1]) == pytest.approx(np.linalg.norm([9, -6, 4]), abs=3) and 9 < float(moved[2]) < 15
    assert 'alt="Contours of the MR over the low-dose PET' in pages[0] and "Where the MR lies" in pages[0]
    assert "Where the MR lies" not in pages[1]


def test_contours_lie_where_the_mr_does():
    """Of a moved MR they cross the head, of the right one they follow it; a plane of one slice is left out."""
    scan, mr, _ = two_modalities()
    right = np.asarray(mr.dataobj)
    figures = registration(scan.lpet, np.roll(right, 4, 0), right, scan.affine)
    for plane in ("axial", "coronal", "sagittal"):
        assert [ax.get_title() for ax in figures[plane].axes] == [f"MR before: {plane}", f"MR after: {plane}"]
    edges = [ax.collections[0].get_paths()[0].vertices for ax in figures["axial"].axes]
    before, after = (edge[:, 0].max() for edge in edges)
    assert before - after == pytest.approx(-4, abs=1)  # voxels; the patient's right is on the left
    drawn = re.search(r"base64,([^\"]+)", still(figures["axial"], "")).group(1)
    assert plt.imread(io.BytesIO(base64.b64decode(drawn)))[0, 0, 3] == 0, "it must lie on the page's own background"
    flat = registration(scan.lpet[..., 12:13], right[..., 12:13], right[..., 12:13], scan.affine)
    assert list(flat) == ["axial"]


def test_registration_refuses_what_no_head_does(monkeypatch):
    scan, mr, _ = two_modalities()
    far = nib.affines.from_matvec(np.eye(3), [90.0, 0, 0])
    monkeypatch.setattr("mfdiff_lite.readers.register.rigid_motion", lambda *_: (far, np.zeros(3)))
    with pytest.raises(ValueError, match="MR: expected an MR within 80 mm and 45 degrees .*found 90 mm"):
        register(scan, mr)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match=r"pip install 'mfdiff_lite\[register\]'"):
        register(scan, mr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--register"], "--register: expected an MR to move"),
        (["--frames", "all"], "--frames: expected 'mean'"),
        (["--frames", "mean", "--frame", "0"], "--frames: expected 'mean'"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    nib.save(nib.Nifti1Image(np.ones((8, 8, 4), np.float32), np.diag([2.0, 2, 2, 1])), tmp_path / "l.nii")
    arguments = ["restore", "--lpet", str(tmp_path / "l.nii"), "--out", str(tmp_path / "o.nii"), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in result.stderr

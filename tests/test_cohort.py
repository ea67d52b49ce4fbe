"""Cohorts: split by anatomy, cached under a key of all that made them, and the same batch for the same step."""

import dataclasses
import os

import numpy as np
import pytest

from mfdiff_lite import cohort as module
from mfdiff_lite.anatomy import load_anatomy
from mfdiff_lite.cohort import SCANNER_RANGES, Cohort, SliceDataset, cache_folder, make_cohort, random_scanner
from mfdiff_lite.config import TRAIN_ANATOMIES, VALIDATION_ANATOMIES, load_profile
from mfdiff_lite.scan import ActivityScale
from mfdiff_lite.scanner import Scanner

TINY = load_profile("smoke", patients=2, slab=3, doses=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder of this module's own."""
    folder = tmp_path_factory.mktemp("cohorts")
    before = os.environ.get("MFDIFF_CACHE")
    os.environ["MFDIFF_CACHE"] = str(folder)
    yield folder
    os.environ.pop("MFDIFF_CACHE") if before is None else os.environ.update(MFDIFF_CACHE=before)


@pytest.fixture(scope="module")
def tiny(cache):
    return make_cohort(TINY)


def same(a, b):
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Cohort) if f.name != "folder"
    )


def painted(patients=7, slices=9):
    """A cohort in which every voxel says where it comes from: patient + slice / 100; no simulation."""
    where = np.arange(patients)[:, None] + np.arange(slices)[None, :] / 128 + 1
    volume = np.broadcast_to(where[..., None, None], (patients, slices, 128, 128)).astype(np.float16)
    weight = np.zeros(volume.shape, np.uint8)
    weight[..., 40:90, 40:90], weight[..., 60:64, 60:64] = 1, 2
    doses = np.stack([np.full(patients, 4.0), np.full(patients, 64.0)], 1).astype(np.float32)
    return Cohort(np.stack([volume, volume], 1), -volume, np.stack([volume, volume], 1) * 2, weight, doses, None)


# ---- what is made --------------------------------------------------------------------------------------------------


def test_parts_never_share_an_anatomy(cache, monkeypatch):
    """Not only by name: the jobs that make the cohorts are looked at."""
    made = {"train": set(), "validation": set()}
    monkeypatch.setattr(module, "_make_patient", lambda job: made[job[3]["part"]].add(job[1]))
    monkeypatch.setattr(module, "_together", lambda folder, jobs: [None] * 5)
    profile = dataclasses.replace(TINY, seed=77, patients=7, validation_patients=2)
    make_cohort(profile, "train", workers=1)
    make_cohort(profile, "validation")
    assert made == {"train": set(TRAIN_ANATOMIES), "validation": set(VALIDATION_ANATOMIES)}
    assert not made["train"] & made["validation"]


def test_content_is_in_units_of_the_lpets_brain_mean(tiny):
    assert (
        tiny.lpet.shape == (2, 2, 3, 128, 128)
        and tiny.spet.shape == tiny.lpet.shape
        and tiny.mr.shape == (2, 3, 128, 128)
    )
    assert tiny.lpet.dtype == np.float16 and tiny.weight.dtype == np.uint8
    low, high = TINY.dose_range
    assert (tiny.dose >= low).all() and (tiny.dose <= high).all() and len(set(tiny.dose.ravel().tolist())) == 4
    assert set(np.unique(tiny.weight)) <= {0, 1, 2}
    for patient in range(2):
        for dose in range(2):
            volume = np.moveaxis(tiny.lpet[patient, dose].astype(np.float32), 0, -1)
            assert ActivityScale(volume, (2.0, 2.0, 2.0)).value == pytest.approx(1, abs=0.002)
            brain = tiny.weight[patient] > 0
            lpet, spet = (getattr(tiny, k)[patient, dose].astype(float)[brain] for k in ("lpet", "spet"))
            assert lpet.mean() == pytest.approx(spet.mean(), rel=0.03)  # the same activity, in the same unit
            assert np.corrcoef(lpet, spet)[0, 1] > 0.3
    # One SPET in two units: their ratio is one number.
    a, b = (tiny.spet[0, d].astype(float) for d in (0, 1))
    bright = a > 0.5
    np.testing.assert_allclose(a[bright] / b[bright], np.median(a[bright] / b[bright]), rtol=2e-3)


def test_random_scanners_stay_in_their_ranges():
    scanners = [random_scanner(np.random.default_rng(s)) for s in range(300)]
    for key, (low, high) in SCANNER_RANGES.items():
        values = np.array([getattr(s, key) for s in scanners])
        if key == "post_filter":
            assert np.mean(values == 0) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(300))
            values = values[values > 0]
        assert values.min() >= (low if key != "iterations" else 2) and values.max() <= (
            high if key != "iterations" else 6
        )
        assert np.ptp(values) > 0.8 * (high - low) - (1 if key == "iterations" else 0)
    assert np.mean([not s.model_psf for s in scanners]) == pytest.approx(0.2, abs=5 * 0.4 / np.sqrt(300))
    shifted = Scanner.shifted("edge-scanner")  # at the edge of the ranges, not beyond
    for key, (low, high) in SCANNER_RANGES.items():
        assert low <= getattr(shifted, key) <= high


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_files_are_reused(tiny):
    before = {path.name: path.stat().st_mtime_ns for path in tiny.folder.iterdir() if path.suffix == ".npz"}
    assert sorted(before) == ["patient-00000.npz", "patient-00001.npz"]
    again = make_cohort(TINY)
    assert again.folder == tiny.folder and same(again, tiny)
    assert {path.name: path.stat().st_mtime_ns for path in tiny.folder.iterdir() if path.suffix == ".npz"} == before


def test_images_stay_on_disk(tiny):
    """Training maps them: a cohort may be larger than the memory."""
    again = make_cohort(TINY)
    for name in module.ARRAYS:
        array = getattr(again, name)
        assert isinstance(array, np.memmap) and not array.flags.writeable
    assert again.lpet.shape[:3] == (2, 2, 3) and again.lpet.dtype == np.float16


def test_a_full_disk_leaves_no_half_of_the_images(tiny, monkeypatch):
    """While the images are put together: one sentence, nothing half-written, and the next call goes on."""
    for path in tiny.folder.glob("*-2.npy"):
        path.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(OSError, match="could not be written .No space left on device.; check space"):
            make_cohort(TINY)
    assert not [path.name for path in tiny.folder.iterdir() if path.suffix == ".npy"]
    assert same(make_cohort(TINY), tiny)


def test_more_patients_reuse_the_first_ones(tiny):
    before = [(tiny.folder / f"patient-0000{i}.npz").stat().st_mtime_ns for i in range(2)]
    more = make_cohort(dataclasses.replace(TINY, patients=3))
    assert more.folder == tiny.folder and len(more.lpet) == 3
    assert [(tiny.folder / f"patient-0000{i}.npz").stat().st_mtime_ns for i in range(2)] == before
    np.testing.assert_array_equal(more.lpet[:2], tiny.lpet)


def key(monkeypatch, cache, part="train", **changes):
    """The folder that a profile leads to, without making anything."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_mapped", lambda jobs, workers: iter(()))
        patch.setattr(module, "_together", lambda folder, jobs: [None] * 5)
        return make_cohort(dataclasses.replace(TINY, **changes), part).folder


def test_every_setting_that_makes_data_is_in_the_key(monkeypatch, cache):
    plain = key(monkeypatch, cache)
    changes = [dict(slab=5), dict(doses=1), dict(dose_range=(4.0, 50.0)), dict(seed=1)]
    folders = [key(monkeypatch, cache, **c) for c in changes] + [key(monkeypatch, cache, "validation")]
    assert len({plain, *folders}) == len(folders) + 1
    # What does not change the data keeps the key: a longer training needs no new patients.
    for harmless in (
        dict(steps=7),
        dict(batch=2),
        dict(learning_rate=0.1),
        dict(no_mr=0.5),
        dict(fusion_widths=(4, 8, 16)),
        dict(patients=9),
    ):
        assert key(monkeypatch, cache, **harmless) == plain


def test_other_anatomies_are_another_key(monkeypatch, cache):
    plain = key(monkeypatch, cache)
    monkeypatch.setattr(module, "TRAIN_ANATOMIES", TRAIN_ANATOMIES[1:])
    assert key(monkeypatch, cache) != plain


@pytest.mark.parametrize("changed", ["phantom", "scanner", "scan", "anatomy", "cohort"])
def test_the_source_of_what_makes_data_is_in_the_key(monkeypatch, cache, changed):
    plain, original = key(monkeypatch, cache), module.inspect.getsource
    monkeypatch.setattr(
        module.inspect, "getsource", lambda m: original(m) + ("# edited" if m.__name__.endswith("." + changed) else "")
    )
    assert key(monkeypatch, cache) != plain


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_made_again(tiny, damage):
    """A patient's, and that of all patients together: while the latter is whole, nobody needs the former."""
    path = tiny.folder / "patient-00001.npz"
    before = [np.array(array) for array in (tiny.lpet, tiny.mr)]
    for damaged in (path, tiny.folder / "mr-2.npy"):
        whole = damaged.read_bytes()
        damaged.unlink()  # the mapped file stays what it was
        damaged.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an archive"}[damage])
    again = make_cohort(TINY)
    assert same(again, tiny)
    np.testing.assert_array_equal(again.lpet, before[0])
    np.testing.assert_array_equal(again.mr, before[1])
    with np.load(path) as stored:
        np.testing.assert_array_equal(stored["lpet"], tiny.lpet[1])
    # ... and the other was left alone, and no partial file lies about.
    assert sorted(p.name for p in tiny.folder.iterdir() if "part-" in p.name) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_whole_files_and_goes_on(cache, monkeypatch, fault):
    """The second patient is cut off in the middle of its file."""
    profile = dataclasses.replace(TINY, seed=5 if fault is KeyboardInterrupt else 6, doses=1)
    original, calls = np.savez_compressed, []

    def second_fails(stream, **arrays):
        calls.append(1)
        if len(calls) == 2:
            stream.write(b"half of an archive")
            raise fault
        original(stream, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", second_fails)
        with pytest.raises((KeyboardInterrupt, OSError)):
            make_cohort(profile)
    folder = key(monkeypatch, cache, seed=profile.seed, doses=1)
    assert sorted(p.name for p in folder.iterdir()) == ["patient-00000.npz", "settings.json"]
    first = (folder / "patient-00000.npz").stat().st_mtime_ns
    assert len(make_cohort(profile).lpet) == 2
    assert (folder / "patient-00000.npz").stat().st_mtime_ns == first


def test_an_unwritable_cache_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        OSError, match="expected a writable cache, found .*; set MFDIFF_CACHE to a folder you can write"
    ) as error:
        make_cohort(TINY)
    assert str(tmp_path / "file" / "cache") in str(error.value) and "\n" not in str(error.value)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MFDIFF_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "mfdiff_lite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "mfdiff_lite")


def test_patients_do_not_depend_on_who_makes_them(cache, tiny):
    """The same files from worker processes as from this one: nothing depends on order or on a shared random state."""
    job = (
        cache / "again.npz",
        TRAIN_ANATOMIES[1],
        1,
        {"part": "train", "slab": 3, "doses": 2, "dose_range": TINY.dose_range, "seed": 0},
    )
    load_anatomy(TRAIN_ANATOMIES[1])
    np.random.seed(1234)  # a global state that must not matter
    module._make_patient(job)
    with np.load(job[0]) as stored:
        for name in ("lpet", "mr", "spet", "weight", "dose"):
            np.testing.assert_array_equal(stored[name], getattr(tiny, name)[1])


# ---- batches -------------------------------------------------------------------------------------------------------


def batches_equal(a, b):
    return all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a)


def test_batches_depend_on_seed_and_step_alone(tiny):
    data = SliceDataset(tiny, TINY)
    first = data.batch(3)
    data.batch(0), data.batch(8)  # what was drawn before does not matter
    assert batches_equal(data.batch(3), first) and batches_equal(SliceDataset(tiny, TINY).batch(3), first)
    assert not batches_equal(data.batch(4), first)
    assert not batches_equal(SliceDataset(tiny, dataclasses.replace(TINY, seed=1)).batch(3), first)


def test_batch_layout(tiny):
    batch = SliceDataset(tiny, TINY).batch(0)
    crop, context = TINY.crop, TINY.context
    shapes = {k: tuple(v.shape) for k, v in batch.items()}
    assert shapes == {
        "lpet": (4, context, crop, crop),
        "mr": (4, context, crop, crop),
        "spet": (4, 1, crop, crop),
        "weight": (4, 1, crop, crop),
        "dose": (4,),
    }
    assert {str(v.dtype) for v in batch.values()} == {"torch.float32"}


def test_slices_belong_together():
    """Without augmentation: the target is the middle slice, its neighbours beside it, MR of the same patient."""
    cohort = painted()
    batch = SliceDataset(cohort, dataclasses.replace(TINY, slab=9), augment=False).batch(0, 64)
    lpet, mr, spet = (batch[k][..., 50, 50].numpy() for k in ("lpet", "mr", "spet"))
    np.testing.assert_allclose(spet[:, 0], 2 * lpet[:, 1], rtol=2e-3)
    np.testing.assert_array_equal(mr, -lpet)
    np.testing.assert_allclose(np.diff(lpet, axis=1), 1 / 128, atol=5e-3)
    assert set(batch["dose"].tolist()) == {4.0, 64.0}
    middle = np.unique(np.round((lpet[:, 1] % 1) * 128))
    assert middle.min() >= 1 and middle.max() <= 7  # never without a neighbour


def test_augmentation_moves_all_images_together(tiny):
    """Gain, flip and crop act on LPET and SPET alike: a target equal to its input stays equal."""
    twin = dataclasses.replace(tiny, spet=tiny.lpet)
    batch = SliceDataset(twin, TINY).batch(1, 32)
    np.testing.assert_array_equal(batch["spet"][:, 0].numpy(), batch["lpet"][:, 1].numpy())
    plain = SliceDataset(twin, TINY, augment=False).batch(1, 32)
    assert not batches_equal(batch, plain)


def test_shares_of_missing_and_wrong_mr():
    """Within five binomial SD: no MR, and another patient's (of 7, so 1 in 7 is right by chance)."""
    profile = dataclasses.replace(TINY, slab=9, no_mr=0.08, wrong_mr=0.06, crop=32)
    data, cohort = SliceDataset(painted(), profile), painted()
    rng, n = np.random.default_rng(0), 4000
    own = cohort.mr[2, 3:6, :4, :4].astype(np.float32)
    missing = wrong = 0
    small = dataclasses.replace(cohort, mr=cohort.mr[..., :4, :4])
    data = SliceDataset(small, profile)
    for _ in range(n):
        mr = data._disturbed(own, rng)
        assert mr.shape == own.shape
        missing += not mr.any()
        wrong += bool(mr.any() and int(-mr[1, 0, 0]) != int(-own[1, 0, 0]))
    for count, share in ((missing, 0.08), (wrong, 0.06 * 6 / 7)):
        assert abs(count / n - share) < 5 * np.sqrt(share * (1 - share) / n)


def test_shifted_mr_moves_by_at_most_two_voxels():
    profile = dataclasses.replace(TINY, slab=9, no_mr=0.0, wrong_mr=0.0)
    data, rng = SliceDataset(painted(), profile), np.random.default_rng(0)
    point = np.zeros((3, 32, 32), np.float32)
    point[:, 16, 16] = 1
    places = np.array([np.argwhere(data._disturbed(point, rng)[1])[0] - 16 for _ in range(2000)])
    moved = np.any(places != 0, axis=1).mean()
    share = 0.1 * 24 / 25
    assert abs(moved - share) < 5 * np.sqrt(share * (1 - share) / 2000)
    assert np.abs(places).max() == 2


def test_no_disturbance_without_augmentation():
    profile = dataclasses.replace(TINY, slab=9, no_mr=1.0)
    assert SliceDataset(painted(), profile, augment=False).batch(0)["mr"].abs().min() > 0
    assert SliceDataset(painted(), profile).batch(0)["mr"].abs().max() == 0


@pytest.mark.parametrize("lesion_weight", [0.0, 4.0])
def test_loss_weights(lesion_weight):
    """Air 0.2, brain 1, lesions 1 + lesion_weight."""
    data = SliceDataset(
        painted(), dataclasses.replace(TINY, slab=9, lesion_weight=lesion_weight, crop=128), augment=False
    )
    weight = data.batch(0, 1)["weight"][0, 0].numpy()
    found = (weight[0, 0], weight[50, 50], weight[61, 61])
    assert found == (pytest.approx(0.2), 1.0, 1.0 + lesion_weight)
    assert np.count_nonzero(weight == weight[0, 0]) == 128**2 - 50**2


def test_lesions_of_every_kind_weigh_more(cache):
    """Also those in MR alone, or leaving them out would be as cheap as any other error."""
    index, settings = 1, {"part": "train", "slab": 6, "doses": 1, "dose_range": (20.0, 20.0), "seed": 2}
    seed = int(np.random.default_rng([2, index, True]).integers(2**31))
    patient = module.virtual_patient(load_anatomy("ahba-12876"), seed, slices=6)
    path = cache / "weights.npz"
    module._make_patient((path, "ahba-12876", index, settings))
    with np.load(path) as stored:
        weight = np.moveaxis(stored["weight"], 0, -1).astype(int)
    lesions = patient.lesions > 0
    assert {one.kind for one in patient.lesion_table} >= {"mr-only", "pet-only"}
    assert (weight[lesions] == 2).all() and (weight[patient.mask & ~lesions] == 1).all()
    assert not weight[~patient.mask & ~lesions].any()

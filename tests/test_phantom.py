"""Virtual patients: reproducible, with the uptake they say, and with lesions that PET and MR really do not share."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from mfdiff_lite import phantom
from mfdiff_lite.anatomy import CSF, WHITE
from mfdiff_lite.metrics import lesion_contrast
from mfdiff_lite.phantom import LESION_KINDS, SHIFTS, Randomisation, shift_settings, smooth_field, virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scanner import Scanner

STILL = dict(rotation=(0.0, 0.0), size=(1.0, 1.0), bend=(0.0, 0.0), folding=(0.0, 0.0))
EVEN = dict(regional_sd=(0.0, 0.0), field_sd=(0.0, 0.0), lesions_per_100ml=(0.0, 0.0))
CLEAN_MR = dict(mr_noise=(0.0, 0.0), mr_bias_sd=(0.0, 0.0), mr_blur=(0.0, 0.0), mr_offset=0.0, skull_stripped=0.0)
ARRAYS = ("activity", "attenuation", "mr", "mask", "tissues", "lesions")


@pytest.fixture(scope="module")
def icbm():
    return load_anatomy("icbm152")


@pytest.fixture(scope="module")
def donor():
    return load_anatomy("ahba-9861")


@pytest.fixture(scope="module")
def patients(icbm, donor):
    return [
        virtual_patient(anatomy, seed, slices=8) for anatomy, seed in ((icbm, 1), (icbm, 2), (donor, 1), (donor, 2))
    ]


# ---- the same patient, always --------------------------------------------------------------------------------------


def test_same_arguments_same_patient(donor, patients):
    again = virtual_patient(donor, 1, slices=8)
    for name in (*ARRAYS, "affine"):
        np.testing.assert_array_equal(getattr(again, name), getattr(patients[2], name))
    assert (
        again.lesion_table == patients[2].lesion_table
        and again.truth == patients[2].truth
        and again.name == "ahba-9861-1"
    )


def test_other_seed_or_anatomy_other_patient(patients):
    for a, b in itertools.combinations(patients, 2):
        assert np.mean(a.mask != b.mask) > 0.01  # of all voxels, air included
        assert a.truth != b.truth
        assert np.abs(a.activity - b.activity).mean() > 0.1 * a.activity.mean()


def test_kinds_and_units(patients):
    for one in patients:
        assert {getattr(one, name).shape for name in ARRAYS} == {(128, 128, 8)}
        assert [getattr(one, name).dtype for name in ARRAYS] == [
            np.float32,
            np.float32,
            np.float32,
            bool,
            np.uint8,
            np.uint8,
        ]
        for name in ("activity", "attenuation", "mr"):
            volume = getattr(one, name)
            assert np.isfinite(volume).all() and volume.min() >= 0
        low, high = Randomisation().white_activity
        assert low <= one.truth["white"] <= high
        low, high = Randomisation().grey_to_white
        assert low <= one.truth["grey"] / one.truth["white"] <= high


# ---- anatomy -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(donor):
    """A whole head, not deformed and of even uptake."""
    return virtual_patient(donor, 5, randomisation=Randomisation(**STILL, **EVEN))


def test_slab_is_a_piece_of_the_whole_head(donor, whole):
    """Without deformation a slab is cut out of the head at the height that its affine says."""
    slab = virtual_patient(donor, 5, slices=6, randomisation=Randomisation(**STILL, **EVEN))
    first = round((slab.affine[2, 3] - whole.affine[2, 3]) / 2)
    assert slab.affine[2, 3] == pytest.approx(whole.affine[2, 3] + 2 * first, abs=1e-4)  # mm
    assert slab.tissues.shape[2] == 6 < whole.tissues.shape[2]
    np.testing.assert_array_equal(slab.tissues, whole.tissues[..., first : first + 6])
    np.testing.assert_array_equal(slab.mask, whole.mask[..., first : first + 6])
    # The whole head is the anatomy above its lowest fifth: same volume of grey and white matter.
    inside = np.flatnonzero((donor.labels > 0).any((0, 1)))
    cut = int(inside[0] + phantom.LOWEST * (inside[-1] - inside[0]))
    matter = (donor.labels > 0) & (donor.labels != CSF)
    assert np.count_nonzero(whole.mask) * 8 == pytest.approx(np.count_nonzero(matter[..., cut:]), rel=0.06)
    # ... and the same place: the centre of gravity relative to the middle of the anatomy, in mm.
    spans = [np.flatnonzero((donor.labels > 0).any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    middle = [(span[0] + span[-1]) / 2 for span in spans]
    expected = np.array(ndimage.center_of_mass(matter[..., cut:])) + [0, 0, cut] - middle
    voxel = np.array(ndimage.center_of_mass(whole.mask))
    np.testing.assert_allclose((whole.affine @ [*voxel, 1])[:2], expected[:2], atol=1.0)


def test_more_slices_than_the_head_has(donor, whole):
    most = virtual_patient(donor, 5, slices=10_000, randomisation=Randomisation(**STILL, **EVEN))
    np.testing.assert_array_equal(most.tissues, whole.tissues)


def test_mask_and_tissues_agree(patients):
    for one in patients:
        assert not (one.mask & (one.tissues == 0)).any()
        matter = np.isin(one.tissues, (1, 2))
        assert np.count_nonzero(one.mask & ~matter) < 0.03 * np.count_nonzero(
            one.mask
        )  # grey + white against CSF: a plurality
        extra = matter & ~one.mask  # grey ahead of fluid, yet less than half of the voxel
        assert np.count_nonzero(extra) < 0.1 * np.count_nonzero(one.mask)
        assert set(np.unique(one.tissues)) == {0, 1, 2, 3}
        assert one.activity[one.attenuation == 0].max() == 0  # nothing glows in air


def test_attenuation_values(patients):
    for one in patients:
        soft = ndimage.binary_erosion(one.tissues > 0, iterations=2)
        np.testing.assert_allclose(one.attenuation[soft], 0.0975, rtol=1e-4)
        assert one.attenuation.max() == pytest.approx(0.13, rel=1e-4)  # bone, and nothing denser
        bone = one.attenuation > 0.129
        assert 50 < np.count_nonzero(bone) / one.tissues.shape[2] < 2500  # a ring in each slice, voxels
        assert not (bone & (one.tissues > 0)).any()
        assert np.all(np.isin(one.attenuation[[0, -1]], 0)) and np.all(
            one.attenuation[:, [0, -1]] == 0
        )  # air at the edge


# ---- uptake --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["icbm152", "ahba-9861"])
def test_uptake_is_as_stated(name):
    """Without variation, voxels of one tissue have exactly the stated activity: grey, white, 0.05 x white."""
    one = virtual_patient(load_anatomy(name), 3, slices=8, randomisation=Randomisation(**STILL, **EVEN))
    white = one.activity[ndimage.binary_erosion(one.tissues == 2, iterations=2)]
    assert np.median(white) == pytest.approx(one.truth["white"], rel=1e-5)
    assert np.mean(np.abs(white / one.truth["white"] - 1) < 1e-4) > 0.95
    grey = one.activity[ndimage.binary_erosion(one.tissues == 1)]
    assert np.median(grey) == pytest.approx(one.truth["grey"], rel=1e-5)
    fluid = one.activity[ndimage.binary_erosion(one.tissues == 3)]
    assert fluid.min() == pytest.approx(0.05 * one.truth["white"], rel=1e-4)
    assert one.activity[one.tissues > 0].max() <= one.truth["grey"] * 1.0001


def test_uptake_with_all_its_variation_keeps_the_ratio(patients):
    """Away from borders and lesions: the ratio of `truth` within 25 % (few regions lie that deep; SD 4-14 % each)."""
    for one in patients:
        grey, white = (one.activity[ndimage.binary_erosion(one.tissues == t) & (one.lesions == 0)] for t in (1, 2))
        assert np.median(grey) / np.median(white) == pytest.approx(one.truth["grey"] / one.truth["white"], rel=0.25)
        assert 0.03 < np.std(white) / np.mean(white) < 0.35


def test_partial_volume_is_the_mean_of_the_fine_samples():
    fine = np.random.default_rng(0).random((8, 6, 4)) < 0.5
    mean = sum(fine[i::2, j::2, k::2].astype(float) for i, j, k in itertools.product((0, 1), repeat=3)) / 8
    np.testing.assert_allclose(phantom._to_voxels(fine), mean, atol=1e-6)


def test_regions_vary_and_hemispheres_share_half(donor):
    """Level = grey (1 + sd (shared + own) / sqrt 2): SD `sd`, correlation 1/2 between left and right, else 0."""
    names = {label: name for label, name in donor.regions.items() if label < 90}
    labels = np.zeros((2 * len(names), 2, 2), np.uint8)
    for row, label in enumerate(sorted(names)):
        labels[2 * row : 2 * row + 2] = label
    nothing = np.zeros((len(names), 1, 1), np.float32)
    ranges = Randomisation(regional_sd=(0.1, 0.1), field_sd=(0.0, 0.0))
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(80):
        level, truth = phantom._uptake(
            labels, donor, {"scalp": nothing, "bone": nothing, "outer_csf": nothing}, ranges, rng
        )
        draws.append(level.ravel() / truth["grey"] - 1)
    z = np.array(draws) / 0.1  # (draws, regions)
    rows = {names[label]: row for row, label in enumerate(sorted(names))}
    pairs = np.array(
        [(rows[name], rows["R" + name[1:]]) for name in rows if name.startswith("L ") and "R" + name[1:] in rows]
    )
    assert len(pairs) >= 30
    n = len(pairs) * len(z)
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert np.mean(z**2) == pytest.approx(
        1, abs=5 * np.sqrt(3 / n)
    )  # variance of z^2, with correlated hemispheres: below 3
    assert np.mean(z[:, pairs[:, 0]] * z[:, pairs[:, 1]]) == pytest.approx(0.5, abs=5 / np.sqrt(n) * 1.2)
    assert np.mean(z[:, pairs[:, 0]] * z[:, np.roll(pairs[:, 1], 1)]) == pytest.approx(0, abs=5 / np.sqrt(n) * 1.2)


@pytest.mark.parametrize(("length", "voxel"), [(30.0, 2.0), (12.0, 2.0), (14.0, 1.0)])
def test_smooth_field(length, voxel):
    """Mean 0; SD about 1 (1.0 to 1.25); correlated inside `length`, hardly beyond twice of it."""
    fields = np.stack(
        [smooth_field(np.random.default_rng(s), (48, 48, 16), length, voxel).astype(float) for s in range(80)]
    )
    independent = fields.size / (length / voxel) ** 3
    assert abs(fields.mean()) < 5 * 1.5 / np.sqrt(independent)
    assert 1.0 < np.sqrt(np.mean(fields**2)) < 1.25

    def correlation(lag):
        return np.mean(fields[:, :-lag] * fields[:, lag:]) / np.mean(fields**2)

    assert correlation(max(1, round(0.2 * length / voxel))) > 0.9
    assert correlation(round(length / voxel)) == pytest.approx(
        0.17, abs=0.12
    )  # cubic B-spline of white knots: 0.17 at one knot
    assert abs(correlation(round(2.2 * length / voxel))) < 0.12


# ---- lesions -------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for `_add_lesions`: the same random numbers, the images before and after, lesions only if `keep`."""

    def __init__(self, keep):
        self.keep, self.original = keep, phantom._add_lesions

    def __call__(self, mask, uptake, mr, levels, ranges, rng):
        self.before = uptake.copy(), mr.copy()
        lesions, table = self.original(mask, uptake, mr, levels, ranges, rng)
        self.after = uptake.copy(), mr.copy()
        if not self.keep:
            uptake[...], mr[...] = self.before
        return lesions, table


def with_and_without(monkeypatch, anatomy, kinds, **kwargs):
    """The same patient with the lesions and without, all other random numbers equal; and the recorder."""
    monkeypatch.setattr(phantom, "LESION_KINDS", kinds)
    found = []
    for keep in (True, False):
        recorder = Recorder(keep)
        with monkeypatch.context() as patch:
            patch.setattr(phantom, "_add_lesions", recorder)
            found.append(
                virtual_patient(
                    anatomy, 11, slices=10, randomisation=Randomisation(lesions_per_100ml=(6.0, 6.0), **kwargs)
                )
            )
    return *found, recorder


@pytest.mark.parametrize("kind", LESION_KINDS)
def test_each_kind_changes_its_own_images_only(monkeypatch, donor, kind):
    ill, well, _ = with_and_without(monkeypatch, donor, (kind,))
    assert len(ill.lesion_table) >= 4 and {one.kind for one in ill.lesion_table} == {kind}
    changed = {
        name: np.any(getattr(ill, name) != getattr(well, name))
        for name in ("activity", "mr", "attenuation", "mask", "tissues")
    }
    assert changed == {
        "activity": kind != "mr-only",
        "mr": kind != "pet-only",
        "attenuation": False,
        "mask": False,
        "tissues": False,
    }
    # No change beyond a voxel's rim of the lesions (activity), or the MR's own blur and shift.
    near = {"activity": 2, "mr": 6}
    for name, reach in near.items():
        outside = ~ndimage.binary_dilation(ill.lesions > 0, iterations=reach)
        np.testing.assert_allclose(getattr(ill, name)[outside], getattr(well, name)[outside], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["icbm152", "ahba-9861"])
def test_lesions_have_the_stated_values(monkeypatch, name):
    _, _, recorder = with_and_without(monkeypatch, load_anatomy(name), LESION_KINDS, lesion_radius=(4.0, 8.0))
    ill = virtual_patient(
        load_anatomy(name),
        11,
        slices=10,
        randomisation=Randomisation(lesions_per_100ml=(6.0, 6.0), lesion_radius=(4.0, 8.0)),
    )
    grey, white = ill.truth["grey"], ill.truth["white"]
    (uptake, mr), (uptake_after, mr_after) = recorder.before, recorder.after
    seen = set()
    for one in ill.lesion_table:
        core = ndimage.binary_erosion(ill.lesions == one.label)
        if np.count_nonzero(core) < 3:
            continue
        seen.add((one.kind, one.hot))
        if one.kind == "mr-only":
            np.testing.assert_array_equal(uptake_after[core], uptake[core])
        else:
            value = np.median(uptake_after[core])
            np.testing.assert_allclose(uptake_after[core], value, rtol=1e-4)
            low, high = (1.2 * grey, 2.2 * grey) if one.hot else (0.2 * white, 0.8 * white)
            assert low <= value <= high
        if one.kind == "pet-only":
            np.testing.assert_array_equal(mr_after[core], mr[core])
        else:
            factor = mr_after[core][mr[core] > 1] / mr[core][mr[core] > 1]
            np.testing.assert_allclose(factor, np.median(factor), rtol=1e-4)
            low, high = (1.15, 1.6) if one.hot else (0.5, 0.85)
            assert low <= np.median(factor) <= high
    assert len(seen) >= 5  # of six


def test_hot_is_hot_and_cold_is_cold_in_the_truth(donor):
    many = Randomisation(lesions_per_100ml=(4.0, 4.0), lesion_radius=(3.0, 7.0))
    contrasts = {True: [], False: []}
    for seed in range(6):
        one = virtual_patient(donor, seed, slices=10, randomisation=many)
        for lesion in one.lesion_table:
            if lesion.kind != "mr-only":
                contrasts[lesion.hot].append(lesion_contrast(one.activity, one.lesions, lesion.label, one.tissues > 0))
    hot, cold = (np.array(contrasts[k]) for k in (True, False))
    assert len(hot) > 20 and len(cold) > 20
    assert np.nanmin(hot) > 0.1
    # A cold lesion in the ventricles' wall may be ringed by fluid that is colder still.
    assert np.mean(cold[np.isfinite(cold)] < -0.1) > 0.95
    assert abs(len(hot) - len(cold)) < 5 * np.sqrt(len(hot) + len(cold))  # half of them hot


def test_lesions_keep_clear_of_each_other_and_match_their_table(donor):
    for seed in range(3):
        one = virtual_patient(donor, seed, slices=10, randomisation=Randomisation(lesions_per_100ml=(6.0, 6.0)))
        labels = [lesion.label for lesion in one.lesion_table]
        assert labels == list(range(1, len(labels) + 1)) and set(np.unique(one.lesions)) == {0, *labels}
        places = {label: 2.0 * np.argwhere(one.lesions == label) for label in labels}  # mm
        for a, b in itertools.combinations(labels, 2):
            assert cdist(places[a], places[b]).min() > 3.0
        for lesion in one.lesion_table:
            reach = np.ptp(places[lesion.label], axis=0).max() / 2
            assert reach <= lesion.radius / 0.85 + 1e-6  # the longest half-axis


def test_no_lesions(donor):
    one = virtual_patient(donor, 1, slices=4, randomisation=Randomisation(lesions_per_100ml=(0.0, 0.0)))
    assert one.lesion_table == () and not one.lesions.any()


# ---- MR ------------------------------------------------------------------------------------------------------------


def tissue_means(one):
    return [float(one.mr[ndimage.binary_erosion(one.tissues == t)].mean()) for t in (1, 2, 3)]


def test_mr_contrasts(donor):
    """The donors have no T1 of their own: tissue signals within 15 % of the table, textured by 4 %."""
    for contrast, table in (("t1", phantom.T1_SIGNAL), ("t2", phantom.T2_SIGNAL)):
        ranges = Randomisation(mr_contrast=contrast, lesions_per_100ml=(0.0, 0.0), **CLEAN_MR)
        for seed in range(3):
            one = virtual_patient(donor, seed, slices=8, randomisation=ranges)
            grey, white, fluid = tissue_means(one)
            assert white == pytest.approx(table["white"], rel=0.2)
            assert grey == pytest.approx(table["grey"], rel=0.25)  # thin cortex: some partial volume
            assert (white > grey > fluid) if contrast == "t1" else (fluid > grey > white)


def test_icbm_uses_its_own_t1_for_half_of_the_patients(icbm):
    ranges = Randomisation(mr_contrast="t1", lesions_per_100ml=(0.0, 0.0), **CLEAN_MR)
    sharp = []
    for seed in range(12):
        one = virtual_patient(icbm, seed, slices=4, randomisation=ranges)
        sharp.append(
            one.mr[one.attenuation > 0.129].max() == 0
        )  # the real T1 is skull-stripped, the painted one has a skull
    assert 2 <= sum(sharp) <= 10


def test_rician_noise_has_its_size(donor):
    """In air the noise is Rayleigh: mean sd sqrt(pi/2), second moment 2 sd^2, with sd = 0.05 x 150."""
    noisy = Randomisation(**{**CLEAN_MR, "mr_noise": (0.05, 0.05)})
    one = virtual_patient(donor, 1, slices=4, randomisation=noisy)
    air = one.mr[one.attenuation == 0].astype(float)
    assert air.mean() == pytest.approx(7.5 * np.sqrt(np.pi / 2), rel=0.02)
    assert (air**2).mean() == pytest.approx(2 * 7.5**2, rel=0.03)


def test_skull_stripping(donor):
    bare = virtual_patient(donor, 1, slices=4, randomisation=Randomisation(skull_stripped=1.0))
    assert bare.mr[~ndimage.binary_dilation(bare.tissues > 0, iterations=2)].max() == 0
    assert bare.mr[bare.mask].mean() > 20


# ---- shifts --------------------------------------------------------------------------------------------------------


def test_every_shift_names_real_settings():
    for name in SHIFTS:
        settings = shift_settings(name)
        dataclasses.replace(Randomisation(), **settings["patient"])
        dataclasses.replace(Scanner(), **settings["scanner"])
        assert settings["patient"] or settings["scanner"]


def test_low_contrast_shift(donor):
    for seed in range(4):
        truth = virtual_patient(donor, seed, "low-contrast", slices=2).truth
        assert 1.6 <= truth["grey"] / truth["white"] <= 2.0


def test_amyloid_shift_takes_up_more_in_white_matter(donor):
    for seed in range(4):
        truth = virtual_patient(donor, seed, "amyloid", slices=2).truth
        assert 0.55 <= truth["grey"] / truth["white"] <= 0.8


def test_atrophy_turns_the_rim_of_the_tissue_into_csf(donor):
    # The same head: outside nothing moves; grey matter goes, CSF comes in its place.
    plain, shrunk = (virtual_patient(donor, 1, shift, slices=8) for shift in (None, "atrophy"))
    np.testing.assert_array_equal(plain.tissues > 0, shrunk.tissues > 0)
    np.testing.assert_array_equal(plain.attenuation, shrunk.attenuation)
    grey, csf = ([(patient.tissues == value).sum() for patient in (plain, shrunk)] for value in (1, 3))
    assert 0.5 * grey[0] < grey[1] < 0.9 * grey[0]
    assert csf[1] > 1.3 * csf[0]
    # What lies deeper than a voxel and a half inside the tissue stays what it was.
    deep = ndimage.distance_transform_edt((plain.tissues == 1) | (plain.tissues == 2)) >= 2
    assert (plain.tissues == shrunk.tissues)[deep].mean() > 0.97


def test_shifts_can_be_joined():
    joined = shift_settings("wide-psf+t2-mr+scatter")
    assert joined["patient"] == SHIFTS["t2-mr"]["patient"]
    assert joined["scanner"] == SHIFTS["wide-psf"]["scanner"] | SHIFTS["scatter"]["scanner"]
    with pytest.raises(ValueError, match="found 'fog'"):
        shift_settings("t2-mr+fog")


def test_t2_shift(donor):
    for seed in range(4):
        grey, white, fluid = tissue_means(virtual_patient(donor, seed, "t2-mr", slices=8))
        assert fluid > 1.3 * white and fluid > 1.3 * grey


def test_edge_scanner_shift_leaves_the_patient_alone(donor, patients):
    shifted = virtual_patient(donor, 1, "edge-scanner", slices=8)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(shifted, name), getattr(patients[2], name))


def test_a_shift_goes_before_the_randomisation(donor):
    # A named shift is what it says, whatever else is randomised.
    truth = virtual_patient(donor, 0, "low-contrast", 2, Randomisation(grey_to_white=(5.0, 5.0))).truth
    assert truth["grey"] / truth["white"] <= 2.0


def test_unknown_shift(donor):
    with pytest.raises(ValueError, match="'winter'.*choose a listed name"):
        virtual_patient(donor, 0, "winter", slices=2)


def test_labels_agree_with_the_anatomy_module():
    assert (WHITE, CSF) == (100, 101)


def test_hot_lesions_are_hotter_than_their_ring_and_cold_ones_colder():
    """What `Lesion.hot` promises, also for a tracer that white matter takes up more than grey (today: 15 of 228)."""
    wrong = {}
    for shift in (None, "amyloid"):
        many = Randomisation(lesions_per_100ml=(6.0, 6.0), lesion_radius=(4.0, 8.0))
        for seed in range(3):
            patient = virtual_patient(load_anatomy("ahba-9861"), seed, shift, 20, many)
            for one in patient.lesion_table:
                if one.kind != "mr-only":
                    contrast = lesion_contrast(patient.activity, patient.lesions, one.label, patient.tissues > 0)
                    total, bad = wrong.get(shift, (0, 0))
                    wrong[shift] = total + 1, bad + ((contrast > 0) != one.hot)
    assert all(total > 30 and bad == 0 for total, bad in wrong.values()), wrong

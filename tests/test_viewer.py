"""The viewer's Python side: what it holds and says, what a page of it carries. The browser's is test_browser.py."""

import base64
import gzip
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
import traitlets
from PIL import Image

import mfdiff_lite as mf
from mfdiff_lite.look import State, explore, figure, knobs, panel, panes, render, report_html, show
from mfdiff_lite.look.panes import GAP, GAP_GREY, OWN_MAPS, PET_MAPS
from mfdiff_lite.phantom import Lesion
from mfdiff_lite.scan import Scan

SHAPE = (5, 7, 9)


def volume(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).uniform(1, 10, shape).astype(np.float32)


def result(mean, n_samples=2):
    settings = {"n_samples": n_samples}
    return SimpleNamespace(mean=mean, std=0.1 * mean, coarse=mean, gate=0 * mean, unit="kBq/mL", settings=settings)


@pytest.fixture
def scan():
    return Scan(volume(0), volume(1), spet=volume(2), name="case", voxel_size=2.0)


# --- render ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPI", "PIR"])
@pytest.mark.parametrize("radiological", [True, False])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_left_anterior_superior_lands_where_it_should(orientation, radiological, plane):
    ras = np.full(SHAPE, 0.5, np.float32)
    ras[0, 6, 8] = 10
    image = nib.Nifti1Image(ras, np.diag([2.0, 2.0, 2.0, 1.0]))
    codes = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(*codes))
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    view = explore(Scan(np.asarray(image.dataobj), affine=image.affine)).go_to((0, 12, 16))
    view.set(plane=plane, radiological=radiological, crosshair=False)
    picture = render(view._case.volumes, view.state)[..., 0]
    height, width = {"axial": (7, 5), "coronal": (9, 5), "sagittal": (9, 7)}[plane]
    assert picture.shape == (height, width)
    dark_on_right = radiological != (plane == "sagittal")  # left of the patient; in the sagittal plane, anterior
    assert np.argwhere(picture == picture.min()).tolist() == [[0, width - 1 if dark_on_right else 0]]
    left, top, right, _ = view._case.marks(view.state)
    assert (right if dark_on_right else left) == ("A" if plane == "sagittal" else "L")
    assert top == ("A" if plane == "axial" else "S")


def test_one_window_for_all_pet_panes_and_all_slices():
    same = np.zeros((4, 4, 3), np.float32)
    same[1, 1, 0], same[1, 1, 2] = 5, 5
    volumes = {"LPET": same, "SPET": same + (same == 0) * 7, "restored": same * 1.0}
    for plane_slice in (0, 2):  # slices with different company: no autoscale
        state = State(index=plane_slice, window=(0, 20), radiological=False)
        picture = render(volumes, state)
        colours = [picture[2, 1 + pane * (4 + GAP)] for pane in range(3)]
        expected = round(255 * (1 - 5 / 20))
        assert all(np.all(np.abs(c.astype(int) - expected) <= 1) for c in colours)
        assert np.array_equal(colours[0], colours[1]) and np.array_equal(colours[0], colours[2])


def test_panes_stand_side_by_side_with_a_gap(scan):
    volumes = {"LPET": scan.lpet, "SPET": scan.spet, "MR": scan.mr, "restored": scan.lpet}
    assert list(panes(volumes, State())) == ["LPET", "SPET", "MR", "restored", "restored - SPET"]
    picture = render(volumes, State())
    assert picture.dtype == np.uint8 and picture.shape == (7, 5 * 5 + 4 * GAP, 3)
    assert np.all(picture[:, 5 : 5 + GAP] == GAP_GREY)
    assert list(panes({"LPET": scan.lpet, "restored": scan.lpet}, State()))[-1] == "restored - LPET"


def test_difference_is_centred_on_zero():
    spet = volume()
    restored = spet.copy()
    restored[0, 0, 0] += 3
    restored[1, 0, 0] -= 3
    state = State(difference=3.0, radiological=False)
    picture = render({"SPET": spet, "restored": restored}, state)[:, -5:].astype(int)
    centre, high, low = (255 * np.array(matplotlib.colormaps["RdBu_r"](v)[:3]) for v in (0.5, 1.0, 0.0))
    assert np.allclose(picture[-1, 0], high, atol=1) and np.allclose(picture[-1, 1], low, atol=1)
    assert np.allclose(picture[:-1], centre, atol=1)


def test_thick_slices_keep_their_proportions():
    lpet = np.zeros((4, 4, 3), np.float32)
    lpet[1, 2, 1] = 1
    state = State("coronal", 2, voxel_size=(2.0, 2.0, 6.0), radiological=False)
    picture = render({"LPET": lpet}, state)[..., 0]
    assert picture.shape == (9, 4)
    assert np.argwhere(picture == 0).tolist() == [[3, 1], [4, 1], [5, 1]]
    assert render({"LPET": lpet}, State("axial", 1, voxel_size=(2.0, 2.0, 6.0))).shape == (4, 4, 3)


def test_an_empty_window_is_a_threshold():
    lpet = np.arange(4, dtype=np.float32).reshape(4, 1, 1)
    picture = render({"LPET": lpet}, State(window=(2.0, 2.0), radiological=False))
    assert picture[0, :, 0].tolist() == [255, 255, 255, 0]


@pytest.mark.parametrize("name", [*PET_MAPS.values(), *OWN_MAPS.values()])
def test_colour_maps_read_in_grey_and_for_colour_blind_eyes(name):
    """Lightness never turns back: every order that colour shows, lightness shows too. (Diverging: in each half.)"""
    colours = matplotlib.colormaps[name](np.linspace(0, 1, 128))[:, :3]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    lightness = np.cbrt(linear @ [0.2126, 0.7152, 0.0722])
    halves = np.split(lightness, 2) if name == "RdBu_r" else [lightness]
    for half in halves:
        steps = np.diff(half)
        assert np.all(steps > -1e-3) or np.all(steps < 1e-3)
        assert abs(half[-1] - half[0]) > 0.4


def test_air_is_cut_off_and_places_stay_right():
    """A head of 10 x 12 voxels in a wide field of view: shown with a margin of 4, at the same place in mm."""
    lpet = np.zeros((60, 64, 6), np.float32)
    lpet[30:40, 20:32] = volume(shape=(10, 12, 6))
    view = explore(Scan(lpet, affine=np.array([[2.0, 0, 0, -50], [0, 2, 0, -40], [0, 0, 2, 7], [0, 0, 0, 1]])))
    assert view._case.shape == (18, 20, 6)
    view.cross = [4, 4, 3]  # the first voxel of the head: 30, 20, 3
    assert np.allclose(view.position, (10, 0, 13)) and np.isclose(view.values["LPET"], lpet[30, 20, 3])


# --- the widget -----------------------------------------------------------------------------------------------------


def test_slice_cross_and_plane_follow_each_other(scan):
    view = explore(scan, result(volume(3)))
    assert (view.plane, view.slice, view.cross) == ("axial", 5, [2, 3, 4])
    view.slice = 2
    assert view.cross == [2, 3, 1]
    view.plane = "coronal"
    assert view.slice == 4
    view.cross = [0, 6, 8]
    assert view.slice == 7 and view.state.index == 6
    view.plane = "ortho"
    assert view.slice == 9 and view.state.plane == "axial"
    for wrong in ([5, 0, 0], [0, 0], [-1, 0, 0]):
        with pytest.raises(ValueError, match=r"cross: expected a voxel inside \(5, 7, 9\)"):
            view.cross = wrong
    assert view.cross == [0, 6, 8]


def test_set_takes_what_look_gives_and_refuses_the_rest(scan):
    view = explore(scan).set(plane="sagittal", window=(1, 4), smooth=True, compare="curtain", pair=("LPET", "MR"))
    other = explore(scan).set(**view.look)
    assert other.look == view.look and other.state == view.state and other.key != view.key
    assert view.state.window == (1, 4) and view.look["pair"] == ["LPET", "MR"]
    with pytest.raises(ValueError, match="set: expected some of .*plane.*, found planes"):
        view.set(planes="axial")
    with pytest.raises(traitlets.TraitError, match="plane"):
        view.set(plane="oblique")


def test_it_links_to_other_widgets(scan):
    ipywidgets = pytest.importorskip("ipywidgets")
    view, slider = explore(scan), ipywidgets.IntSlider(3, 1, 9)
    ipywidgets.link((slider, "value"), (view, "slice"))
    assert view.slice == 3
    view.go_to((0, 0, 10))
    assert slider.value == 6
    seen = []
    view.observe(lambda change: seen.append(change.new), "cross")
    slider.value = 1
    assert seen == [[0, 0, 0]]


def test_the_window_ends_where_the_brain_does_not_where_a_lesion_does():
    spet = np.full((20, 20, 20), 10, np.float32)
    spet[3:6, 3:6, 3:6] = 80  # 0.3 % of the brain
    spet[:, :, :2] = 0
    assert explore(Scan(spet)).window == [0, 10]
    assert explore(Scan(spet, mask=spet > 0)).window == [0, 10]
    spet[0, 0] = 1000  # not of the brain
    assert explore(Scan(spet, mask=(spet > 0) & (spet < 100))).window == [0, 10]


def test_the_gate_ends_at_the_head(scan):
    lpet = np.zeros((30, 30, 6), np.float32)
    lpet[8:22, 8:22] = 10
    lpet[14:16, 14:16] = 0  # a hole inside the head is head
    gate = np.full(lpet.shape, 0.7, np.float32)
    view = explore(Scan(lpet), gate=gate)
    shown = view._case.volumes["gate"]
    assert np.isnan(shown[0, 0]).all() and np.all(shown[10, 11] == np.float32(0.7))  # 14 + 8 voxels remain across
    assert view.windows["gate"] == [0, 1]
    (part,) = view._case.quantised("gate", {"gate": 100})
    assert part["hole"] and np.array_equal(part["q"] == 0, np.isnan(shown))


def test_suv(scan):
    view, plain = explore(scan, result(volume(3)), suv=(200, 70)), explore(scan, result(volume(3)))
    for name, value in plain.values.items():
        assert np.isclose(view.values[name], value * (1 if name in ("MR", "gate") else 70 / 200), equal_nan=True)
    assert view.state.unit == "SUV" and np.isclose(view.window[1], plain.window[1] * 0.35)
    with pytest.raises(ValueError, match="suv: expected images in kBq/mL, a dose"):
        explore({"PET": volume()}, suv=(200, 70))


# --- what a page carries --------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [dict(attrs)] if tag == "img" else []

    def handle_data(self, data):
        self.scripts += [data] if self.tags and self.tags[-1] == "script" else []


def payload(text):
    """What the page's script gets, and name -> the volumes as it should decode them."""
    held = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.S).group(1))
    meta, blob, found = held["meta"], base64.b64decode(held["data"]), {}
    for name, parts in meta["volumes"].items():
        found[name] = []
        for part in parts:
            raw = np.frombuffer(gzip.decompress(blob[part["start"] : part["start"] + part["bytes"]]), np.uint8)
            zigzag = raw[: len(raw) // 2].astype(int) + 256 * raw[len(raw) // 2 :].astype(int)
            q = np.cumsum((zigzag >> 1) ^ -(zigzag & 1)) % 2**16
            values = part["offset"] + part["step"] * q.reshape(meta["shape"][::-1]).T
            found[name].append(np.where((q == 0).reshape(meta["shape"][::-1]).T & part["hole"], np.nan, values))
    return meta, found


def test_the_page_holds_the_volumes_to_half_a_step(scan):
    view = explore(scan, result(volume(3)))
    meta, found = payload(view.html())
    assert list(found) == ["LPET", "SPET", "MR", "restored", "SD", "gate"]
    assert [pane["name"] for pane in meta["panes"]] == [
        "LPET",
        "SPET",
        "MR",
        "restored",
        "restored - SPET",
        "SD",
        "gate",
    ]
    for name, (values,) in found.items():
        step = meta["volumes"][name][0]["step"]
        assert np.allclose(values, view._case.volumes[name], atol=0.51 * step, equal_nan=True)
    assert 200 < view.window[1] / meta["volumes"]["LPET"][0]["step"] < 260
    assert meta["state"]["plane"] == "axial" and meta["key"] == view.key


@pytest.mark.parametrize("low, high", [(-3e4, 3e4), (0, 1e-7), (5, 5)])
def test_extreme_values_fit_into_sixteen_bits(low, high):
    image = np.linspace(low, high, 4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    view = explore({"a": image})
    _, found = payload(view.set(window=(low, high)).html())
    assert np.allclose(found["a"][0], image, atol=(high - low) / 100 + 1e-12)


def test_without_scripts_one_picture_stands_with_its_text(scan):
    view = explore(scan, result(volume(3))).set(slice=3)
    bundle, _ = view._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}  # a widget's view would be an error when reopened
    page = _Page(bundle["text/html"])
    assert page.tags.count("img") == 1 and set(page.tags) == {"div", "img", "script"}
    for word in ("LPET", "restored - SPET", "gate", "axial slice 3 of 9", "kBq/mL"):
        assert word in page.images[0]["alt"] and word in bundle["text/plain"]
    data = page.images[0]["src"].partition("base64,")[2]
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.width > 400 and np.ptp(np.asarray(picture)) > 100
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", bundle["text/html"])


def test_names_cannot_break_out_of_the_page():
    bad = "</script><script>alert(1)</script>"
    text = explore({bad: volume()}).html()
    page = _Page(text)
    assert page.tags.count("script") == 2 and bad in page.images[0]["alt"]


def test_saved_page(scan, tmp_path):
    path = explore(scan).save(tmp_path / "view.html")
    text = path.read_text("utf-8")
    assert '<meta name="viewport"' in text and "color-scheme: light dark" in text and text.count("<title>") == 1
    with pytest.raises(FileExistsError, match="exists already"):
        explore(scan).save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["view.html"]


def test_a_widget_among_widgets_sends_its_volumes_when_asked(scan, monkeypatch):
    view, sent = explore(scan), []
    monkeypatch.setattr(view, "send", lambda content, buffers: sent.append((content, buffers)))
    view._answer(view, {"kind": "other"}, [])
    view._answer(view, {"kind": "volumes"}, [])
    ((content, (blob,)),) = sent
    assert content["meta"]["key"] == view.key and len(blob) > 100


def test_report_stands_alone_and_is_escaped(scan):
    bad = 'a"><script>alert(1)</script>'
    scan = mf.Scan(scan.lpet, scan.mr, spet=scan.spet, name=bad, voxel_size=2.0)
    text = report_html(scan, result(volume(3)), {"<b>PSNR": "30 < 40 & {more}", "weights": "é"})
    page = _Page(text)
    assert page.tags.count("script") == 2 and "<b>PSNR" not in text
    assert "&lt;b&gt;PSNR" in text and "30 &lt; 40 &amp; {more}" in text and "é" in text
    assert "not a medical device" in text and page.tags.count("tr") == 2
    text = report_html(scan, result(volume(3)), {"seed": 3}, mf.compare(scan, scan.lpet), ["a <hint>"])
    assert "Gaussian" in text and "a &lt;hint&gt;" in text and "the same seed gives the same image" in text


# --- knobs ----------------------------------------------------------------------------------------------------------


def test_a_knob_turns_through_its_alternatives():
    doses = [volume(k) for k in range(3)]
    view = knobs(
        {"dose": [4, 20, 100]},
        {"LPET": doses, "SPET": volume(9), "gate": [volume(k) / 10 for k in range(3)]},
        numbers={"noise": [1, 2, 3], "word": ["a", "b", "c"]},
        curve=("noise", "noise"),
        unit="kBq/mL",
    )
    assert view.pick == [1]
    for k in range(3):
        view.pick = [k]
        assert np.isclose(view.values["LPET"], doses[k][tuple(view.cross)])
        assert view.values["SPET"] == volume(9)[tuple(view.cross)]
    assert "dose: 100" in view._repr_mimebundle_()[0]["text/plain"]
    meta, found = payload(view.html())
    assert [len(some) for some in found.values()] == [3, 1, 3] and meta["knobs"][0]["choices"] == ["4", "20", "100"]
    for values, dose in zip(found["LPET"], doses, strict=True):
        assert np.allclose(values, dose, atol=0.05)
    assert meta["numbers"] == {"noise": [1, 2, 3], "word": ["a", "b", "c"]}


def test_the_state_is_small_and_holds_no_script():
    look = explore({"LPET": volume()}).look
    assert {"plane", "cross", "pick"} <= set(look) and len(json.dumps(look)) < 2000


def test_two_knobs_the_last_one_is_the_fastest():
    images = [np.full(SHAPE, 10.0 * i + j, np.float32) + volume() for i in range(2) for j in range(3)]
    view = knobs({"i": "ab", "j": "xyz"}, {"image": images})
    view.pick = [1, 2]
    assert np.isclose(view.values["image"], 12 + volume()[2, 3, 4])
    assert knobs({"i": "ab"}, {"image": [volume()[..., 0], volume(1)[..., 0]]}).slice == 1  # slices alone


def test_a_change_is_centred_on_zero_and_an_image_that_returns_is_stored_once():
    same, moved = volume(), [volume(k) - 5 for k in (1, 2, 1)]
    view = knobs({"k": "abc"}, {"LPET": [same] * 3, "change from a": moved}, unit="kBq/mL")
    low, high = view.windows["change from a"]
    assert low == -high and np.isclose(high, np.percentile(np.abs(moved), 99.5), rtol=0.1)
    meta, found = payload(view.html())
    starts = {name: [part["start"] for part in parts] for name, parts in meta["volumes"].items()}
    assert len(set(starts["LPET"])) == 1 and len(set(starts["change from a"])) == 2
    for values, change in zip(found["change from a"], moved, strict=True):
        assert np.allclose(values, change, atol=0.05)
    assert meta["panes"][1] | {"map": "RdBu_r", "kind": "change", "unit": "kBq/mL"} == meta["panes"][1]


def test_what_a_gate_or_a_change_has_in_the_air_widens_no_box():
    head = np.zeros((60, 64), np.float32)
    head[30:40, 20:32] = volume(shape=(10, 12, 1))[..., 0]
    air = volume(shape=(60, 64, 1))[..., 0]
    view = knobs({"k": "ab"}, {"coarse": [head, head], "gate": [air / 10] * 2, "change": air})
    assert view._case.shape == (18, 20, 1)
    assert knobs({"k": "ab"}, {"gate": [air / 10] * 2})._case.shape == (60, 64, 1)


def test_numbers_alone_need_no_image():
    view = knobs({"batch": [1, 2], "device": ["cpu", "gpu"]}, numbers={"hours": [4, 3, 2, float("nan")]})
    page = _Page(view.html())
    assert "img" not in page.tags and page.tags.count("tr") == 5  # a table stands in
    assert "batch: 2; device: gpu" in view._repr_mimebundle_()[0]["text/plain"]
    assert payload(view.html())[0]["numbers"] == {"hours": [4, 3, 2, None]}


@pytest.mark.parametrize(
    "more, words",
    [
        ({"numbers": {"noise": [1]}}, "noise: expected one value per alternative, 2, found 1"),
        ({"images": {"a": [volume()]}}, "a: expected one image per alternative, 2, found 1"),
        ({"numbers": {"x": [1, 2]}, "curve": ("x", "y")}, "curve: expected two of x"),
    ],
)
def test_lists_of_another_length_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        knobs({"dose": [1, 2]}, **more)


def test_the_truth_of_a_scan_comes_along(scan):
    lesions = np.zeros(SHAPE, np.uint8)
    lesions[1, 2, 3], lesions[3, 3, 3] = 1, 2
    table = (Lesion(1, "pet-only", True, 3.0), Lesion(2, "mr-only", True, 3.0))
    known = Scan(scan.lpet, scan.mr, lesions=lesions, tissues=lesions, lesion_table=table, voxel_size=2.0)
    for view in (explore(known), knobs({"k": [1, 2]}, {"LPET": [scan.lpet] * 2}, scan=known)):
        meta, _ = payload(view.html())
        assert set(meta["labels"]) == {"tissues", "lesions"} and meta["lesions"] == [
            1
        ]  # the PET does not see the other
        assert np.array_equal(view._case.labels["lesions"], lesions)
    part = knobs({"k": [1, 2]}, {"LPET": [scan.lpet[..., 3:5]] * 2}, scan=known)
    assert not part._case.labels and part.state.unit == "kBq/mL"


def test_the_example_opens_with_its_truth():
    scan, restored = mf.load_example()
    assert min(scan.lpet.shape) >= 60 and scan.lesion_table and set(restored) == {"restored", "SD", "gate"}
    images = {"LPET": scan.lpet} | restored
    error = {name: np.abs(image - scan.spet)[scan.mask].mean() for name, image in images.items()}
    assert error["restored"] < 0.6 * error["LPET"]
    assert list(explore(scan, restored).values)[-1] == "gate"


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PIR"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_crosshair_reads_the_voxel_that_it_points_at(orientation, plane):
    image = nib.Nifti1Image(volume(), np.array([[2.0, 0, 0, -3], [0, 2, 0, 5], [0, 0, 2, 7], [0, 0, 0, 1]]))
    codes = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(*codes))
    lpet = np.asarray(image.dataobj)
    scan = Scan(lpet, spet=2 * lpet, affine=image.affine)
    view = explore(scan, 3 * lpet)
    view.plane = plane
    for voxel in ((0, 0, 0), (1, 2, 3), tuple(np.array(lpet.shape) - 1)):
        mm = nib.affines.apply_affine(image.affine, voxel)
        view.go_to(mm + 0.4)  # to the nearest voxel
        assert np.allclose(view.position, mm, atol=1e-4)
        value = float(lpet[voxel])
        assert np.allclose(list(view.values.values()), [value, 2 * value, 3 * value, value])
        assert list(view.values) == ["LPET", "SPET", "restored", "restored - SPET"]
        assert view.crosshair
    with pytest.raises(ValueError, match=r"expected a place between \[-3.0, 5.0, 7.0\] and \[5.0, 17.0, 23.0\] mm"):
        view.go_to((0, 10, 30))


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_slice_without_mr_and_spet(convert):
    array = volume(shape=(6, 8))
    restored = result(convert(array * 0.5), n_samples=1)
    view = explore(Scan(convert(array)), restored)
    assert list(view.values) == ["LPET", "restored", "restored - LPET"]
    assert (view.plane, view.slice, view._case.shape) == ("axial", 1, (6, 8, 1))
    assert len(view.figure().axes) == 3 * 2  # panes and colour bars


def test_lpet_alone_and_more_arrays(scan):
    assert list(explore(Scan(scan.lpet)).values) == ["LPET"]
    more = explore(scan, coarse=volume(4), gate=volume(5) / 10)
    assert list(more.values) == ["LPET", "SPET", "MR", "coarse", "gate"]
    assert list(explore(scan, **{"MR of another": scan.mr}).state.own_windows) == ["MR", "MR of another"]
    wrong = r"coarse: expected the LPET's grid \(5, 7, 9\), found \(5, 7, 8\)"
    with pytest.raises(ValueError, match=wrong):
        explore(scan, coarse=volume()[..., :8])
    with pytest.raises(ValueError, match="restored: expected finite"):
        explore(scan, scan.lpet * np.nan)


def test_any_volumes_by_name():
    view = explore({"CT": volume() - 5, "PET": torch.from_numpy(volume(1))}, MR=volume(2), voxel_size=3.0, unit="HU")
    assert list(view.values) == ["CT", "PET", "MR"] and view.state.unit == "HU"
    assert "z = 12.0 mm" in view._case.sentence(view.state)
    assert len([ax for ax in view.figure(1).axes if ax.images]) == 3
    two = explore({"LPET": volume(), "restored": volume(1)})
    assert list(two.values) == ["LPET", "restored", "restored - LPET"]
    assert list(explore({"a": volume()[..., 0]}).values) == ["a"]
    for given, words in (
        ({}, "expected at least one volume"),
        ({"a": volume(), "b": volume()[1:]}, r"b: expected the a's grid \(5, 7, 9\), found \(4, 7, 9\)"),
        ({"a": np.zeros(3)}, r"a: expected one 3-D volume or a 2-D slice, found shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            explore(given)


def test_nifti_files_by_path_are_brought_to_the_grid_of_the_first(tmp_path):
    x, y, z = np.indices((12, 14, 16)) * 2.0
    ramp = (x + 10 * y + 100 * z).astype(np.float32)  # linear: interpolation is exact
    first = nib.Nifti1Image(ramp, np.diag([2.0, 2, 2, 1]))
    codes = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("LPI")
    turned = first.as_reoriented(nib.orientations.ornt_transform(*codes))
    x, y, z = np.indices((20, 20, 24)) * 1.5 - 1
    fine = nib.Nifti1Image((x + 10 * y + 100 * z).astype(np.float32), np.diag([1.5, 1.5, 1.5, 1]))
    fine.affine[:3, 3] = -1
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("LPET", "turned", "MR")}
    for image, path in zip((first, turned, fine), paths.values(), strict=True):
        nib.save(image, path)
    view = explore({**paths, "array": ramp, "text": str(paths["LPET"])})
    view.go_to((12, 8, 20))
    assert np.allclose(list(view.values.values()), 12 + 80 + 2000, rtol=1e-5)
    assert list(explore(Scan(ramp), paths["LPET"]).values) == ["LPET", "restored", "restored - LPET"]
    with pytest.raises(OSError, match="expected a NIfTI file, found nothing"):
        explore({"LPET": tmp_path / "missing.nii"})


def test_explore_takes_what_compare_takes(scan):
    """A dict of images beside a scan: the same door."""
    image = scan.spet * 0.5
    found = explore(scan, {"halved": image, "SPET again": scan.spet}).values
    assert {"LPET", "halved", "SPET again"} <= set(found)


@pytest.mark.parametrize("factor", [1e-4, 1.0, 3e4])
def test_window_fits_the_unit(factor):
    view = explore(Scan(volume() * factor))
    low, high = view.window
    assert low == 0 and np.isclose(high / factor, 10, rtol=0.02)
    assert len(np.unique(render(view._case.volumes, view.state))) > 20


# --- paper ----------------------------------------------------------------------------------------------------------


def test_figure_columns_windows_and_rows(scan):
    fig = figure(scan, result(volume(3)), n_slices=2)
    shown = [ax for ax in fig.axes if ax.images]
    titles = ["LPET", "SPET", "MR", "restored", "restored - SPET", "SD"]
    assert [ax.get_title() for ax in shown] == titles + [""] * 6
    limits = [ax.images[0].get_clim() for ax in shown]
    assert limits[0] == limits[1] == limits[3] == limits[6] and limits[4][0] == -limits[4][1]
    assert all([t.get_text() for t in ax.texts] == ["R", "A", "L", "P"] for ax in shown)
    labels = [ax.get_xlabel() for ax in fig.axes if ax not in shown]
    assert labels.count("activity [kBq/mL]") == 3 and "SD [kBq/mL]" in labels and "difference [kBq/mL]" in labels
    assert fig.get_facecolor() == (1, 1, 1, 1)
    single = figure(scan, result(volume(3), n_samples=1), n_slices=2)
    assert "SD" not in [ax.get_title() for ax in single.axes]
    assert np.array_equal(shown[0].images[0].get_array(), scan.lpet[::-1, ::-1, 5].T)


def test_figure_follows_the_viewer(scan):
    view = explore(scan)
    view.set(plane="coronal", slice=2, window=(1.0, 3.0))
    (ax, *_) = (ax for ax in view.figure(1).axes if ax.images)
    assert np.array_equal(ax.images[0].get_array(), scan.lpet[::-1, 1, ::-1].T)
    assert ax.images[0].get_clim() == (1.0, 3.0)
    assert len([ax for ax in view.figure(99).axes if ax.images]) == 7 * 3
    view.set(blend=1, crosshair=True)
    (ax, *_) = (ax for ax in view.figure(1).axes if ax.images)
    mr, pet, lines = ax.images
    assert mr.get_cmap().name == "gray" and pet.get_cmap().name == "hot" and pet.get_alpha().shape == (9, 5)
    assert lines.get_array().shape == (9, 5, 4)


def test_panel_puts_the_patients_right_on_the_left_and_centres_mm():
    from matplotlib.figure import Figure

    image = np.zeros((64, 64))
    image[40, 50] = 5.0  # right (+x) and anterior (+y) of the centre
    ax = Figure().subplots()
    drawn = panel(ax, image, "t", "activity [kBq/mL]", window=(0, 5))
    left, right = ax.get_xlim()
    assert left > right  # x runs from the patient's right to the left, radiological
    x0, x1, y0, y1 = drawn.get_extent()
    assert (x0, x1, y0, y1) == (-64, 64, -64, 64)
    assert drawn.get_array()[50, 40] == 5.0 and drawn.origin == "lower"
    assert [text.get_text() for text in ax.texts] == ["R", "L"]
    assert ax.texts[0].get_position()[0] < ax.texts[1].get_position()[0]


def test_show_displays_a_picture_with_its_text_and_closes_it(monkeypatch):
    shown = []
    monkeypatch.setattr("mfdiff_lite.look.page.display", lambda data, raw: shown.append(data))
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    show(fig, 'a line that rises from 1 to 2 "kBq/mL"')
    assert shown[0]["text/html"].startswith('<img alt="a line that rises from 1 to 2 &quot;kBq/mL&quot;" ')
    assert "data:image/png;base64," in shown[0]["text/html"] and shown[0]["text/plain"].startswith("a line")
    assert not plt.fignum_exists(fig.number)


def test_show_cuts_nothing_off_and_covers_nothing(monkeypatch):
    """Images keep their shape, so that a layout knows where they and their labels end only when they are drawn."""
    shown = []
    monkeypatch.setattr("mfdiff_lite.look.page.display", lambda data, raw: shown.append(data["text/html"]))
    fig, ax = plt.subplots(figsize=(5, 3.9), layout="constrained")
    ax.imshow(np.eye(3))
    ax.set_yticks(range(3), ["a rather long name"] * 3)
    ax.set_ylabel("a label at the edge")
    fig.text(1.01, 0.5, "beyond the edge")
    show(fig, "a square with a diagonal of ones")
    png = re.search('base64,([^"]+)', shown[0]).group(1)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"))
    assert picture.shape[1] > 90 * 5 and all((edge == 255).all() for edge in (*picture[[0, -1]], *picture.T[[0, -1]]))

    fig, axes = plt.subplots(1, 5, figsize=(13, 4.2), layout="constrained")
    for ax in axes:
        drawn = panel(ax, np.eye(128), "a title\nof two lines", None, (-1, 1))
    fig.colorbar(drawn, ax=axes[:4], location="bottom", shrink=0.5)
    above = fig.suptitle("the title of all")
    show(fig, "five squares with a diagonal of ones each")
    assert above.get_window_extent().y0 > axes[0].title.get_window_extent().y1


def test_looking_and_loading_do_not_wait_for_torch():
    code = "import sys, mfdiff_lite as mf; mf.explore, mf.load_scan, mf.Scan, mf.compare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

"""The viewer in a real browser: headless Chromium; pages from disk, and JupyterLab on the loopback address.

One browser and one server serve all tests of this file (of a worker; they are few and stand together, so that one
worker of pytest-xdist gets them). Screenshots are kept in runs/browser/.
"""

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter
from PIL import Image

from mfdiff_lite.evaluation import compare
from mfdiff_lite.look import State, explore, knobs, render, report_html
from mfdiff_lite.phantom import Lesion
from mfdiff_lite.scan import Scan

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "runs" / "browser"
PATIENCE = 60  # seconds; what works takes less than one, unless the machine is busy
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # what is asked for elsewhere is not found
]  # fmt: skip
SETTINGS = {  # of JupyterLab: no news from elsewhere, and all cells in the page whether they are in view or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
TOY = """
import ipywidgets, numpy as np
import mfdiff_lite as mf
volumes = {name: np.random.default_rng(k).uniform(1, 10, (40, 40, 20)) for k, name in enumerate(("LPET", "SPET", "MR"))}
view = mf.explore(volumes)
view
"""
LINKED = """
slider = ipywidgets.IntSlider(3, 1, 20)
ipywidgets.jslink((slider, "value"), (view, "slice"))
ipywidgets.VBox([slider, view])
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no browser test: Playwright is missing; install it: pip install playwright"
    )
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no browser test: Chromium is missing; install it (Debian, Ubuntu: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


def wait(condition, what, seconds=PATIENCE):
    """Poll until `condition()`; `what` is the complaint."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(what)
        time.sleep(0.05)


# --- pages from disk ------------------------------------------------------------------------------------------------


def head(shape=(40, 44, 30)):
    """A ball in two tissues with three lesions, of which the MR alone has the last, in 2 x 2 x 3 mm."""
    rng = np.random.default_rng(0)
    radius = np.sqrt(
        sum((axis - (n - 1) / 2) ** 2 for axis, n in zip(np.ogrid[tuple(map(slice, shape))], shape, strict=True))
    )
    tissues = (1 * (radius < 18) + (radius < 9)).astype(np.uint8)
    lesions = np.zeros(shape, np.uint8)
    for label, place in enumerate(((10, 20, 15), (28, 24, 15), (20, 30, 10)), start=1):
        lesions[tuple(slice(k - 1, k + 2) for k in place)] = label
    activity = np.array([0.0, 20, 8])[tissues] + 15 * np.isin(lesions, (1, 2))
    noise = rng.normal(0, 1, (2, *shape))
    lpet, spet = (np.clip(activity * (1 + s * n), 0, None) for s, n in zip((0.3, 0.1), noise, strict=True))
    mr = np.array([0.0, 60, 90])[tissues] + 50 * (lesions == 3)
    table = tuple(Lesion(k, kind, True, 3.0) for k, kind in enumerate(("pet-only", "matched", "mr-only"), start=1))
    size = {"voxel_size": (2.0, 2.0, 3.0), "name": "ball"}
    return Scan(lpet, mr, spet=spet, mask=tissues > 0, tissues=tissues, lesions=lesions, lesion_table=table, **size)


class Page:
    """A viewer on a page from disk. `run` evaluates JavaScript with `v`, the viewer of `viewer.js`."""

    def __init__(self, browser, path, **look):
        self.page = browser.new_page(**({"viewport": {"width": 1280, "height": 720}} | look))
        self.errors, self.outside = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith("http") and self.outside.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("[data-ready]", timeout=PATIENCE * 1000)
        self.keyboard, self.mouse = self.page.keyboard, self.page.mouse

    def run(self, code, argument=None):
        first = "const v = [...globalThis.mfdiffViewers.waiting.values()][0][0];"
        frame = "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));"
        return self.page.evaluate(
            f"async (argument) => {{ {first} const result = {code}; {frame} return result; }}", argument
        )

    def set(self, **state):
        self.run("v.set(argument)", state)

    @property
    def state(self):
        return self.run("v.state")

    def at(self, cell, voxel):
        """Where on the screen a voxel stands in a cell, in pixels."""
        box = self.page.locator("canvas").nth(cell).bounding_box()
        x, y = self.run(
            "(g => [g.x(argument[1][g.across]), g.y(argument[1][g.up])])(v.geometry(v.cells[argument[0]]))",
            [cell, voxel],
        )
        return box["x"] + x, box["y"] + y

    def pixels(self, pane, plane):
        """One slice of a pane voxel by voxel as it is painted, (H, W, 4) uint8."""
        code = "v.paint(v.meta.panes.find(pane => pane.name === argument[0]), argument[1]).toDataURL()"
        return np.asarray(Image.open(urllib.request.urlopen(self.run(code, [pane, plane]))).convert("RGBA"))

    def screen(self, cell=0):
        """What a cell shows, (H, W, 3)."""
        shot = self.page.locator("canvas").nth(cell).screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

    def check(self):
        assert not self.errors and not self.outside


@pytest.fixture(scope="module")
def case():
    scan = head()
    restored = 0.5 * (scan.lpet + scan.spet)
    return scan, explore(scan, {"restored": restored, "SD": 0.1 * restored, "gate": np.full(scan.lpet.shape, 0.4)})


@pytest.fixture
def page(browser, case, tmp_path):
    _, view = case
    opened = Page(browser, view.save(tmp_path / "view.html"))
    yield opened
    opened.check()
    opened.page.close()


def test_every_pixel_is_the_one_that_python_renders(page, case):
    """Two programs, one picture: planes, sides, windows, maps, MR under PET; the slower one is the oracle."""
    scan, view = case
    own = {name: tuple(window) for name, window in view.windows.items()}
    for plane, index, radiological, blend, pet_map in (
        ("axial", 15, True, 0.0, "gray_r"),
        ("coronal", 20, False, 0.0, "inferno"),
        ("sagittal", 12, True, 1.0, "gray_r"),
        ("axial", 11, False, 0.5, "magma"),
    ):
        state = State(plane, index, (2.0, 22.0), 5.0, own, pet_map, radiological, blend)
        page.set(
            plane=plane,
            slice=index + 1,
            window=[2, 22],
            difference=5,
            radiological=radiological,
            blend=blend,
            pet_map=pet_map,
        )
        for name in view.values:
            volumes = {n: view._case.volumes[n] for n in (*view._case.volumes,)}
            wanted = render(volumes, replace(state, voxel_size=(1.0, 1.0, 1.0)))
            width = page.pixels(name, plane).shape[1]
            k = list(view.values).index(name)
            wanted = wanted[:, k * (width + 4) : k * (width + 4) + width]
            shown = page.pixels(name, plane)
            inside = shown[..., 3] == 255
            assert inside.all() == (name != "gate")
            difference = np.abs(shown[..., :3].astype(int) - wanted)[inside]
            assert difference.mean() < 2 and np.percentile(difference, 99) < 14, (name, plane)
    page.set(slice=3)  # and the test sees another slice
    assert np.abs(page.pixels("SPET", "axial")[..., :3].astype(int) - wanted).mean() > 5


def click_sets_the_crosshair(page):
    page.set(plane="axial", cross=[20, 22, 15], crosshair=False)
    for cell, voxel in ((0, [12, 30, 15]), (2, [25, 9, 15])):
        page.mouse.click(*page.at(cell, voxel))
        assert page.state["cross"] == voxel and page.state["crosshair"]


def wheel_goes_through_slices(page):
    page.set(plane="coronal", cross=[20, 22, 15])
    page.mouse.move(*page.at(1, [20, 22, 15]))
    for turn, slice_ in ((-100, 24), (-100, 25), (100, 24)):
        page.mouse.wheel(0, turn)
        wait(lambda s=slice_: page.state["slice"] == s, f"the wheel does not lead to slice {slice_}", 3)
    page.mouse.wheel(0, 20)  # a touch pad's small steps add up
    assert page.state["slice"] == 24


def right_drag_moves_the_window(page):
    page.set(plane="axial", window=[0, 20])
    x, y = page.at(0, [20, 22, 15])
    for button, keys in (("right", ()), ("left", ("Shift",))):
        page.set(window=[0, 20])
        mr = page.state["windows"]["MR"]
        for key in keys:
            page.keyboard.down(key)
        page.mouse.move(x, y)
        page.mouse.down(button=button)
        page.mouse.move(x + 60, y, steps=3)
        page.mouse.up(button=button)
        for key in keys:
            page.keyboard.up(key)
        low, high = page.state["window"]
        assert high - low > 25 and page.state["windows"]["MR"] == mr


def keys_move(page):
    page.page.locator("section").focus()
    page.set(plane="axial", cross=[20, 22, 15], compare="side")
    for key, name, value in (
        ("ArrowRight", "slice", 17), ("ArrowLeft", "slice", 16), ("PageDown", "slice", 21), ("Home", "slice", 1),
        ("End", "slice", 30), ("2", "plane", "coronal"), ("4", "plane", "ortho"), ("1", "plane", "axial"),
        ("Shift+ArrowLeft", "cross", [21, 22, 29]), ("r", "radiological", False), ("r", "radiological", True),
        ("s", "smooth", True), ("s", "smooth", False), ("x", "crosshair", False), ("m", "blend", 1), ("m", "blend", 0),
        ("c", "compare", "flicker"), (" ", "swap", True), ("c", "compare", "curtain"), ("c", "compare", "checker"),
        ("c", "compare", "side"), ("t", "contours", ["lesions"]), ("t", "contours", []),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert page.state[name] == value, f"{key}: {name} is {page.state[name]}"


def circle_measures(page, scan):
    page.set(plane="axial", tool="roi", cross=[20, 22, 15])
    x, y = page.at(0, [20, 22, 15])
    far, _ = page.at(0, [25, 22, 15])
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(far, y, steps=4)
    page.mouse.up()
    page.set(tool="cross")
    roi = page.state["roi"]
    assert abs(roi["radius"] - 10) < 0.8
    i, j = np.indices(scan.lpet.shape[:2])
    inside = np.hypot(2 * (i - roi["centre"][0]), 2 * (j - roi["centre"][1])) <= roi["radius"]
    rows = [r.split("\t") for r in page.page.locator("aside table").first.inner_text().splitlines()]
    said = {row[0]: [float(v) for v in row[1:3]] for row in rows if row[0] in ("LPET", "SPET", "MR")}
    for name, image in (("LPET", scan.lpet), ("SPET", scan.spet), ("MR", scan.mr)):
        values = image[:, :, 15][inside]
        assert np.allclose(said[name], [values.mean(), values.std(ddof=1)], rtol=0.02, atol=0.02), name
    assert f"{inside.sum()} voxels" in page.page.locator("aside caption").inner_text()


def curtain_shows_both(page):
    page.set(
        plane="axial", compare="curtain", pair=["LPET", "MR"], split=0.5, crosshair=False, roi=None, cross=[20, 22, 15]
    )
    both = page.screen()
    page.set(compare="flicker", swap=False)
    a = page.screen()
    page.set(swap=True)
    b, width = page.screen(), both.shape[1]
    left, right = slice(20, width // 2 - 20), slice(width // 2 + 20, width - 20)
    assert np.array_equal(both[:, left], a[:, left]) and np.array_equal(both[:, right], b[:, right])
    assert np.abs(a - b).mean() > 20
    page.set(compare="curtain")
    x, y = page.at(0, [20, 22, 15])
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + width / 4, y, steps=3)
    page.mouse.up()
    assert page.state["split"] > 0.7
    page.set(compare="checker", swap=False)
    fields = page.screen()
    share = np.mean(np.all(fields == a, axis=-1)), np.mean(np.all(fields == b, axis=-1))
    assert min(share) > 0.4
    page.set(compare="side")


def ortho_shows_three_planes(page):
    page.set(plane="ortho", show=["LPET", "SPET"], cross=[20, 22, 15], compare="side")
    assert page.run("v.cells.map(cell => cell.plane)") == ["axial", "coronal", "sagittal"] * 2
    page.mouse.click(*page.at(2, [20, 30, 9]))
    assert page.state["cross"] == [20, 30, 9]
    page.set(show=[], plane="axial")


def test_mouse(page):
    click_sets_the_crosshair(page)
    wheel_goes_through_slices(page)
    right_drag_moves_the_window(page)
    page.set(plane="axial", cross=[20, 22, 15])
    here = page.at(0, [12, 30, 15])
    page.mouse.move(*here)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    wait(lambda: page.state["zoom"] == 1.25, "no zoom", 3)
    assert np.allclose(page.at(0, [12, 30, 15]), here, atol=0.5)  # what is under the pointer stays there
    page.mouse.down()
    page.mouse.move(here[0] + 30, here[1] + 10, steps=3)
    page.mouse.up()
    assert np.allclose(page.at(0, [12, 30, 15]), (here[0] + 30, here[1] + 10), atol=0.5)
    page.mouse.dblclick(*here)
    assert page.state["zoom"] == 1


def test_keys_and_spoken_words(page, case):
    _, view = case
    keys_move(page)
    page.set(plane="axial", cross=[12, 30, 9], crosshair=True)
    said = page.page.get_by_role("status").inner_text()
    assert "axial slice 10 of 30" in said and "patient's right on the left, anterior up" in said
    view.set(cross=[12, 30, 9])
    for name, value in view.values.items():
        number = float(re.search(rf"{re.escape(name)} (-?[\d.]*\d)", said.partition("Crosshair")[2]).group(1))
        assert abs(number - value) < 0.12 * max(1, abs(value)), name
    names = page.run("""[...v.root.querySelectorAll("button, select, input, summary")].map(e => [
        e.getAttribute("aria-label") || e.textContent || e.parentElement.textContent,
        e.title || e.parentElement.textContent])""")
    assert len(names) > 25 and all(name and help_ and help_ != "null" for name, help_ in names)


def test_compare_measure_and_ortho(page, case):
    curtain_shows_both(page)
    circle_measures(page, case[0])
    ortho_shows_three_planes(page)
    page.set(line={"plane": "axial", "from": [2, 22, 15], "to": [38, 22, 15]})
    points = page.run("v.profile(v.meta.panes[1])")
    i = np.floor(np.linspace(2, 38, len(points)) + 0.5).astype(int)
    assert np.allclose([v for _, v in points], case[0].spet[i, 22, 15], atol=0.1) and abs(points[-1][0] - 72) < 1e-6


@pytest.mark.parametrize(
    "broken, check",
    [
        ("v.inside = voxel => [voxel[1], voxel[0], voxel[2]]", click_sets_the_crosshair),
        ("v.step = () => 0", wheel_goes_through_slices),
        ("v.setWindow = () => 0", right_drag_moves_the_window),
        ("v.act = () => null", keys_move),
        ("v.region = () => [[0, 0, 0]]", lambda page: circle_measures(page, head())),
        ("v.paint = (a, plane) => v.constructor.prototype.paint.call(v, v.meta.panes[0], plane)", curtain_shows_both),
        ("v.inside = () => [0, 0, 0]", ortho_shows_three_planes),
    ],
)  # fmt: skip
def test_the_checks_notice_what_is_broken(page, broken, check):
    page.run(broken)
    with pytest.raises(AssertionError):
        check(page)


def test_lesion_hunt(page):
    page.set(plane="axial", hunt=True, show=["LPET"], cross=[20, 22, 15])
    for voxel in ([10, 20, 15], [28, 24, 15], [20, 10, 15]):  # two lesions, and a place where none is
        page.mouse.click(*page.at(0, voxel))
        page.keyboard.press("Enter")
    assert page.state["contours"] == [] and len(page.state["marks"]) == 3
    page.page.get_by_role("button", name="score").click()
    assert page.run("v.score()") == {"found": 2, "lesions": 2, "wrong": 1}
    assert "2 of 2" in page.page.locator("aside").inner_text() and page.state["contours"] == ["lesions"]


def test_copy_save_and_call(page):
    page.set(plane="coronal", window=[0, 12], smooth=True)
    call = page.run("v.call()")
    assert call.startswith('view.set(plane="coronal"') and "smooth=True" in call and "window=[0, 12]" in call
    with page.page.expect_download() as saved:
        page.page.get_by_role("button", name="save").click()
    picture = np.asarray(Image.open(saved.value.path()).convert("RGB"))
    assert picture.shape[1] > 400 and np.ptp(picture) > 200


def test_knob(browser, tmp_path):
    scan, scales = head(), [1, 2, 3]
    view = knobs({"scale": scales}, {"LPET": [scan.lpet * s for s in scales], "SPET": scan.spet},
                 numbers={"x": scales, "y": [3, 1, 2]}, curve=("x", "y"), scan=scan)  # fmt: skip
    page = Page(browser, view.save(tmp_path / "knob.html"))
    still = page.pixels("SPET", "axial")
    before, point = page.pixels("LPET", "axial"), page.page.locator("aside circle").last.get_attribute("cx")
    knob = page.page.get_by_role("slider", name="scale")
    knob.focus()
    page.keyboard.press("ArrowRight")
    assert page.state["pick"] == [2] and knob.get_attribute("aria-valuetext") == "3"
    assert not np.array_equal(page.pixels("LPET", "axial"), before) and np.array_equal(
        page.pixels("SPET", "axial"), still
    )
    assert page.page.locator("aside circle").last.get_attribute("cx") != point
    assert "scale: 3" in page.page.get_by_role("status").inner_text()
    page.check()
    page.page.close()


@pytest.mark.parametrize(
    "width, height, scheme", [(1280, 720, "light"), (1920, 1080, "dark"), (420, 800, "light"), (853, 480, "dark")]
)
def test_it_fits(browser, case, tmp_path, width, height, scheme):
    look = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    page = Page(browser, case[1].save(tmp_path / "view.html"), **look)
    box = page.page.locator("section").bounding_box()
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.page.screenshot(path=SHOTS / f"page-{width}-{scheme}.png")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    if width >= 1280:
        assert box["height"] <= {1280: 640, 1920: 980}[width]
    page.page.close()


def test_report_from_disk(browser, case, tmp_path):
    scan, view = case
    path = tmp_path / "report.html"
    path.write_text(report_html(scan, 0.5 * scan.spet, {"LPET": "lpet.nii.gz"}), "utf-8")
    page = Page(browser, path)
    click_sets_the_crosshair(page)
    assert page.page.locator("img").count() == 0 and "not a medical device" in page.page.inner_text("body")
    page.check()
    page.page.close()


def test_reports_and_knobs_fit_a_phone(browser, case, tmp_path):
    scan, phone = case[0], {"viewport": {"width": 390, "height": 800}}
    (tmp_path / "report.html").write_text(
        report_html(scan, scan.spet, {"LPET": "folder/" * 20, "seed": 0}, compare(scan, {"a long name": scan.lpet})),
        "utf-8",
    )
    dials = {"dose reduction (DRF)": [4, 20], "post-filter, FWHM [mm]": ["none", "some"]}
    dialled = knobs(dials, {"LPET": [scan.lpet] * 4}, scan=scan).save(tmp_path / "knobs.html")
    for path in (tmp_path / "report.html", dialled):
        page = Page(browser, path, **phone)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
        said = page.page.locator(".knob .said, .knob button").all()
        assert len(said) == (4 if path == dialled else 0)
        assert all(one.bounding_box()["x"] + one.bounding_box()["width"] <= 390 for one in said)
        page.page.close()


def test_a_page_without_scripts_shows_one_picture(browser, case, tmp_path):
    path = case[1].save(tmp_path / "view.html")
    page = browser.new_page(java_script_enabled=False)
    page.goto(path.as_uri())
    assert page.locator("img").count() == 1 and page.locator("img").is_visible() and page.locator("canvas").count() == 0
    page.close()


# --- JupyterLab -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """A JupyterLab with private folders: (its address, its token, the folder of notebooks)."""
    folder = tmp_path_factory.mktemp("lab")
    notebooks = folder / "root" / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.html"))
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    private = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
    }  # fmt: skip
    environment = os.environ | {name: str(folder / sub) for name, sub in private.items()}
    environment |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment.pop("MPLBACKEND", None)  # figures go into the notebook
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--LabApp.expose_app_in_browser=True", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={notebooks.parent}"]
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        started = lambda: server.poll() is not None or answers(f"{address}/api?token={token}")  # noqa: E731
        wait(started, "JupyterLab did not start", 3 * PATIENCE)
        assert server.poll() is None, f"JupyterLab did not start:\n{log.read_text()[-3000:]}"
        yield address, token, notebooks, environment
    finally:
        server.terminate()  # it ends its kernels before itself
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


class Notebook:
    """A notebook that is open in JupyterLab. `kernel`: wait for one."""

    def __init__(self, page, lab, name, kernel=True):
        address, token, *_ = lab
        self.page, self.errors, self.outside = page, [], set()
        page.set_default_timeout(3 * PATIENCE * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._note(request.url, address))
        page.on("websocket", lambda socket: self._note(socket.url.replace("ws", "http", 1), address))
        page.goto(f"{address}/lab/tree/notebooks/{name}?token={token}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        if kernel:
            context = "window.jupyterapp?.shell.currentWidget?.sessionContext"
            page.wait_for_function(f"() => {context}?.session?.kernel?.connectionStatus === 'connected'")
        page.set_default_timeout(PATIENCE * 1000)

    def _note(self, url, address):
        if url.startswith("http") and not url.startswith(address):
            self.outside.add(url)

    def run_all(self):
        """Fails for a cell that raised or did not run; read from the model, as the page shows errors in many ways."""
        done = self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        model = self.page.evaluate("() => window.jupyterapp.shell.currentWidget.model.toJSON()")
        for cell in model["cells"]:
            source = "".join(cell["source"]).strip()
            if cell["cell_type"] == "code" and source:
                raised = [f"{o['ename']}: {o['evalue']}" for o in cell["outputs"] if o["output_type"] == "error"]
                assert not raised, f"cell '{source.splitlines()[0]}' raised {raised[0]}"
                assert cell["execution_count"], f"cell '{source.splitlines()[0]}' did not run"
        assert done, "run-all-cells returned false"

    def kernel(self, code):
        """Run code in the notebook's kernel and return what it prints."""
        script = """async (code) => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const future = kernel.requestExecute({code, store_history: false});
            let text = '', error = null;
            future.onIOPub = message => {
                if (message.header.msg_type === 'stream') text += message.content.text;
                if (message.header.msg_type === 'error') error = message.content.ename + ': ' + message.content.evalue;
            };
            await future.done;
            if (error) throw new Error(error);
            return text;
        }"""
        return self.page.evaluate(script, code)

    def pictures(self):
        """(living viewers, still pictures, words of errors) in the outputs."""
        outputs = self.page.locator(".jp-OutputArea-output")
        stills = self.page.locator(".mfdiff-viewer img, .jp-OutputArea-output img")
        return self.page.locator("[data-ready]").count(), stills.count(), "rror" in "".join(outputs.all_inner_texts())

    def check_page(self):
        assert not self.errors, f"errors of the page: {self.errors[:3]}"
        assert not self.outside, f"the page asked for {sorted(self.outside)[:5]}"


@pytest.fixture
def open_notebook(browser, lab):
    opened = []

    def opening(name, *sources, **more):
        if sources:
            cells = [nbformat.v4.new_code_cell(source) for source in sources]
            notebook = nbformat.v4.new_notebook(cells=cells)
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(notebook, lab[2] / name)
        opened.append(Notebook(browser.new_page(viewport={"width": 1280, "height": 720}), lab, name, **more))
        return opened[-1]

    yield opening
    for notebook in opened:
        with contextlib.suppress(Exception):  # the server ends what is left
            notebook.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        notebook.page.close()


def test_alive_linked_and_reopened(open_notebook, lab, browser, tmp_path):
    notebook = open_notebook("toy.ipynb", TOY, LINKED)
    notebook.run_all()
    page, status = notebook.page, notebook.page.get_by_role("status")
    wait(lambda: notebook.pictures() == (2, 0, False), "two viewers, none of them a still")
    for where, code in (("in HTML", "view.slice = 7"), ("of the slider", "slider.value = 5")):
        notebook.kernel(code)
        wait(
            lambda n=code[-1]: all(f"slice {n} of" in text for text in status.all_inner_texts()), f"not linked {where}"
        )
    page.locator("canvas").first.click(position={"x": 20, "y": 30})
    page.keyboard.press("2")
    for _ in range(2):
        page.keyboard.press("x")  # cuts a cell, if JupyterLab gets it
    wait(lambda: notebook.kernel("print(view.plane)").strip() == "coronal", "Python does not hear the keys")
    assert page.locator(".jp-Cell").count() == 2
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "lab.png")
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    path = lab[2] / "toy.ipynb"
    wait(lambda: "mfdiff-viewer" in path.read_text("utf-8"), "not saved")
    notebook.check_page()

    held = nbformat.read(path, as_version=4)
    del held.cells[1]  # a box of widgets has no stand-in
    held.metadata.pop("widgets", None)
    for trusted in (False, True):
        name = f"reopened-{trusted}.ipynb"
        nbformat.write(held, lab[2] / name)
        if trusted:
            command = [sys.executable, "-m", "jupyter", "trust", str(lab[2] / name)]
            subprocess.run(command, check=True, capture_output=True, env=lab[3])
        again = open_notebook(name, kernel=False)
        wanted = (1, 0, False) if trusted else (0, 1, False)
        wait(lambda again=again, wanted=wanted: again.pictures() == wanted, f"trusted {trusted}: {again.pictures()}")
        again.check_page()

    held.cells[0].outputs[0].data["application/vnd.jupyter.widget-view+json"] = {"model_id": "0" * 32}
    nbformat.write(held, lab[2] / "widget.ipynb")  # what other widgets store: the check sees its error
    subprocess.run([sys.executable, "-m", "jupyter", "trust", str(lab[2] / "widget.ipynb")], check=True, env=lab[3])
    again = open_notebook("widget.ipynb", kernel=False)
    wait(lambda: again.pictures()[2], "the error is not seen")

    exporter = HTMLExporter(require_js_url="", jquery_url="")
    (tmp_path / "toy.html").write_text(exporter.from_notebook_node(held)[0], "utf-8")
    Page(browser, tmp_path / "toy.html").page.close()  # alive in a page without a kernel


def test_quickstart(open_notebook):
    notebook = open_notebook("00_quickstart.ipynb")
    notebook.run_all()
    wait(lambda: notebook.pictures()[0] >= 1, "no viewer in 00")
    notebook.page.locator("[data-ready]").first.scroll_into_view_if_needed()
    notebook.page.screenshot(path=SHOTS / "quickstart.png")
    notebook.check_page()


def test_a_cell_that_raises_is_noticed(open_notebook):
    with pytest.raises(AssertionError, match="cell '1 / 0' raised ZeroDivisionError: division by zero"):
        open_notebook("raises.ipynb", "1 / 0").run_all()

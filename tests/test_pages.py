"""What README, docs/ and notebooks say about results is what results/ holds, and turns round when the value does."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from mfdiff_lite.evaluation import beside

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("pages")
    for name in ("pages", "results", "evidence", "ablations", "adaptation", "any_noise", "detection", "bench", "osem"):
        sys.modules.pop(name, None)  # other tests load these under the same names


@pytest.fixture(scope="module")
def found(pages):
    return pages.measured()


def test_every_page_is_what_the_results_make_it(pages):
    stale = [str(path.relative_to(ROOT)) for path, text in pages.pages().items() if path.read_text() != text]
    assert not stale, f"run 'make pages': {', '.join(stale)}"


def test_every_block_stands_somewhere_and_every_mark_has_its_end(pages):
    texts = [path.read_text() for path in pages.pages()]
    texts = ["".join(map("".join, (c["source"] for c in json.loads(t)["cells"]))) if t[0] == "{" else t for t in texts]
    whole = "\n".join(texts)
    assert set(re.findall(r"<!-- (\w+):start -->", whole)) == set(pages.BLOCKS)
    assert len(re.findall(r"<!-- \w+:(?:start|end) -->", whole)) == 2 * len(pages.MARK.findall(whole))
    with pytest.raises(KeyError, match="unheard"):
        pages.filled("<!-- unheard:start -->\n<!-- unheard:end -->", {})


def test_the_claims_are_the_second_section_of_a_short_readme():
    readme = (ROOT / "README.md").read_text()
    sections = readme.split("\n## ")
    assert "<!-- claims:start -->" in sections[2] and len(readme.splitlines()) <= 150


def test_docs_link_to_files_that_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_a_claim_names_the_line_on_which_its_code_begins(pages, found):
    for _, (module, name), notebook, *_ in pages.claims(found):
        line = (ROOT / "mfdiff_lite" / module).read_text().splitlines()[pages.line_of(module, name) - 1]
        assert re.match(rf"\s*(class|def) {name}\b", line)
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").exists()


def number(pages, *values):
    return pages.Number(*values)


@pytest.mark.parametrize(
    ("rule", "values", "arguments", "verdict"),
    [
        ("of_gain", (0.6, 0.3, 0.9), (), "reproduced, small"),
        ("of_gain", (1.6, 1.3, 1.9), (), "reproduced"),
        ("of_gain", (0.6, 0.3, 0.9), ("in emulation only",), "reproduced in emulation only"),
        ("of_gain", (0.3, -0.1, 0.7), (), "open"),
        ("of_gain", (0.01, 0.0, 0.02), (), "not reproduced"),
        ("of_gain", (-0.4, -0.6, -0.2), ("in emulation only",), "not reproduced"),
        ("of_limit", (0.2, 0.1, 0.29), (0.3,), "reproduced"),
        ("of_limit", (0.3, 0.2, 0.4), (0.3,), "open"),
        ("of_limit", (0.5, 0.4, 0.6), (0.3,), "not reproduced"),
        ("of_range", (1.1, 1.05, 1.2), (0.8, 1.25), "reproduced"),
        ("of_range", (1.2, 1.05, 1.3), (0.8, 1.25), "open"),
        ("of_range", (0.6, 0.5, 0.7), (0.8, 1.25), "not reproduced"),
    ],
)
def test_a_verdict_follows_the_number(pages, rule, values, arguments, verdict):
    assert getattr(pages, rule)(number(pages, *values), *arguments) == verdict


def test_ahead_of_everybody_is_never_more_than_open_without_a_published_network(pages):
    ahead, behind = number(pages, 1.0, 0.8, 1.2), number(pages, -0.5, -0.8, -0.2)
    assert pages.of_rivals([ahead, ahead]) == "open" and pages.of_rivals([ahead, behind]) == "not reproduced"
    assert pages.of_rivals([ahead], published=1) == "reproduced"


def test_few_values_have_no_interval_and_decide_nothing(pages):
    few, enough = pages.Number.of([1.0, 1.2]), pages.Number.of([1.0, 1.1, 1.2, 1.0, 1.1])
    assert few.text() == "+1.10 dB (too few for an interval)" and enough.text().startswith("+1.08 dB [+1.0")
    assert pages.of_gain(few) == "open" == pages.of_limit(few, 0.3) and pages.of_gain(enough) == "reproduced"


def test_the_claims_turn_round_with_the_numbers(pages, found):
    verdicts = [row[-1] for row in pages.claims(found)]
    loses = {key: pages.Number(-1.0, -1.2, -0.8) for key in found}
    harms = loses | {"wrong MR costs": pages.Number(1.0, 0.9, 1.1)}
    assert set(row[-1] for row in pages.claims(harms)) == {"not reproduced"} != set(verdicts)
    wins = {key: pages.Number(1.1, 1.05, 1.15) for key in found} | {"wrong MR costs": pages.Number(0.1, 0.0, 0.2)}
    emulated = "reproduced in emulation only"
    assert [row[-1] for row in pages.claims(wins)] == ["reproduced"] * 4 + [emulated] * 2 + ["open"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean over coarse": (0.01, 0.0, 0.02)}, "you need no diffusion"),
        ({"mean over coarse": (0.5, 0.3, 0.7)}, "also makes the best single image better"),
        ({"mean over coarse": (0.2, -0.1, 0.5)}, "is open"),
        ({"texture of a sample": (1.1, 1.0, 1.2)}, "(close to 1;"),
        ({"texture of a sample": (1.6, 1.5, 1.7)}, "not close to 1"),
        ({"covered": (0.7, 0.69, 0.71)}, "too small as it comes"),
        ({"covered": (0.9, 0.89, 0.91)}, "nearly as it comes"),
    ],
)
def test_what_the_diffusion_is_worth_follows_the_numbers(pages, found, change, says):
    changed = found | {key: pages.Number(*value) for key, value in change.items()}
    assert says in pages.worth(changed)


@pytest.mark.parametrize(
    ("reading", "key", "high", "low"),
    [
        ("read_restore", "mean over gaussian", "1.00 dB above the tuned Gaussian", "1.00 dB below the tuned Gaussian"),
        ("read_headline", "alike over PET only", "1.00 dB above *PET only*", "1.00 dB below *PET only*"),
        ("read_continued", "wrong MR costs, continued", "**not** kept", ": kept"),
        ("read_continued", "false contrast, continued", "adds 1.000", "takes 1.000"),
        ("read_adaptation", "sure at home", "1.00 dB above stage 1", "1.00 dB below stage 1"),
        ("read_evidence", "kept small", "not the price", "are the price"),
        ("read_fast", "mean over coarse", "lies 1.00 dB above the coarse", "lies 1.00 dB below the coarse"),
        ("read_detection", "detected over kernel EM", "above that of kernel EM", "**below** that of kernel EM"),
    ],
)
def test_sentences_under_the_tables_follow_the_numbers(pages, found, reading, key, high, low):
    for value, words in ((1.0, high), (-1.0, low)):
        assert words in getattr(pages, reading)(found | {key: pages.Number(value, value, value)})


def test_who_detects_better_follows_the_doses(pages, found):
    for ours, gaussian, words in ((3.0, 2.0, "too, it is better"), (2.0, 3.0, "no better than a Gaussian")):
        doses = {"equivalent dose, restored": ours, "equivalent dose, Gaussian": gaussian}
        changed = found | {k: pages.Number(v, v, v) for k, v in doses.items()}
        assert words in pages.read_detection(changed)
        assert ("no better than with a Gaussian" in pages.limits(changed)) == (ours < gaussian)


def test_a_missed_goal_of_speed_says_so(pages, monkeypatch):
    goals, deeper = {"restore": 9, "fast": 30, "training": 2.2, "osem": 2}, "diffusers UNet2DModel, deeper, float32"
    rates = {"ours, float32": 8.0, "diffusers UNet2DModel, float32": 2.0, deeper: 5.0}
    for value, met in ((1.6, False), (40.0, True)):
        rows = [{"id": f"speed.{name}", "value": value, "must": must, "met": met} for name, must in goals.items()]
        rows.append({"id": "speed.equal_time", "value": -0.4, "must": 0.5, "met": False})
        trained = {"minutes": 15.0, "psnr_db": {"ours": 20.0, "another": 20.4}, "steps": {"ours": 1320, "another": 7}}
        files = {"targets": rows, "bench": {"restoring": {"slices_a_second": rates}, "equal_time": trained}}
        monkeypatch.setattr(pages, "stored", files.__getitem__)
        text = pages.read_bench({})
        assert f"restoring is {deeper};" in text and "widths it is 4.0 times. " in text
        assert f"{value:.1f} times" in text and ("**missed**" in text) != met
        assert "ours 20.0 dB (1,320 steps), another 20.4 dB (7 steps). That is 0.40 dB below the best peer" in text


def test_a_difference_in_words():
    assert (beside(0.311), beside(-1.2, "%"), beside(0.01)) == ("0.31 dB above", "1.20 % below", "within 0.05 dB of")

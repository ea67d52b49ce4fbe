"""What the repository promises about itself: requirements, commands, and who may import whom."""

import ast
import importlib
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import mfdiff_lite

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "mfdiff_lite"

# The house, ground floor first: a module imports only from modules that stand above it here. A new module is put in,
# which is a decision about the design and not a way to silence the test. A package stands after its own modules.
ORDER = [
    "_revision",
    "revision",
    "config",
    "anatomy",
    "phantom",
    "scan",
    "sidecar",
    "files",
    "view",
    "noise",
    "checks",
    "record",
    "scanner",
    "cohort",
    "layers",
    "fusion",
    "denoiser",
    "diffusion",
    "metrics",
    "model",
    "loop",
    "stage1",
    "stage2",
    "baselines",
    "evaluation",
    "readers",
    "readers.brainweb",
    "readers.cases",
    "readers.frames",
    "readers.register",
    "look.panes",
    "look.page",
    "look.viewer",
    "look.report",
    "look",
    "notebook",
    "__main__",
]
CONDA_NAMES = {"pytorch": "torch"}
IMPORT_NAMES = {  # where the import is not the distribution's name with _ for -
    "astra-toolbox": "astra",
    "ipython": "IPython",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "simpleitk": "SimpleITK",
}


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """Requirements of the package with these extras, and with the extras that they name, by canonical name."""
    found = {}
    for text in [*PROJECT["dependencies"], *(t for e in extras for t in PROJECT["optional-dependencies"][e])]:
        one = Requirement(text)
        found |= requirements(*one.extras) if one.name == "mfdiff_lite" else {canonicalize_name(one.name): one}
    return found


def needed_here(requirement: Requirement) -> bool:
    """Whether a requirement applies to the Python that runs this."""
    return requirement.marker is None or requirement.marker.evaluate()


def import_name(distribution: str) -> str:
    """The top-level module of a distribution."""
    return IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))


def imports_of(tree) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a syntax tree; relative ones start with a dot."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level
            # "from . import scan" names modules, "from .scan import Scan" names one.
            found += [(node.lineno, start + (node.module or alias.name)) for alias in node.names]
    return sorted(set(found))


def tree_of(path: Path):
    """Syntax tree of a Python file, or of all code cells of a notebook."""
    if path.suffix == ".py":
        return ast.parse(path.read_text(encoding="utf-8"))
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return ast.parse("\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%")))


def sources(folder: Path) -> list[Path]:
    """Python files and notebooks of a folder."""
    hidden = {".ipynb_checkpoints", "__pycache__"}
    return sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".ipynb") and not hidden & set(p.parts))


# The functions and classes of a syntax tree, which importing a module does not enter.
DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def dotted(path: Path) -> str:
    """A library module by its name in `ORDER`: look/panes.py is "look.panes", look/__init__.py is "look"."""
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__")


MODULES = sorted(LIBRARY.rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=dotted)


# Requirements


def test_environment_and_pyproject_agree():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert listed["name"] == "mfdiff_lite"
    plain = [Requirement(text) for text in listed["dependencies"] if isinstance(text, str)]
    conda = {CONDA_NAMES.get(r.name, canonicalize_name(r.name)): r.specifier for r in plain}
    assert str(conda.pop("python")) == PROJECT["requires-python"]
    conda.pop("pip")
    assert conda == {name: r.specifier for name, r in requirements("course", "train").items()}
    assert {"pip": ["-e .[dev]"]} in listed["dependencies"]


@pytest.mark.parametrize("name", sorted(n for n, r in requirements("dev").items() if needed_here(r)))
def test_every_requirement_can_be_imported(name):
    importlib.import_module(import_name(name))


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("mfdiff_lite", ["train", "register", "dicom"]),
        ("notebooks", ["book"]),
        ("data", ["course"]),
        ("benchmarks", ["bench", "dev"]),
        ("web", ["web"]),
        ("tests", ["dev"]),
    ],
)
def test_every_import_is_a_declared_requirement(folder, extras):
    files = sources(ROOT / folder)
    allowed = {import_name(name) for name in requirements(*extras)} | {"mfdiff_lite"} | {path.stem for path in files}
    allowed |= set(sys.stdlib_module_names)
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports_of(tree_of(path))
        if not name.startswith(".") and name.split(".")[0] not in allowed
    ]
    assert not found, f"not in pyproject.toml: {found}"


def test_a_plain_install_holds_what_the_library_imports():
    used = {name.split(".")[0] for path in sources(LIBRARY) for _, name in imports_of(tree_of(path))}
    unused = {name for name in requirements() if import_name(name) not in used}
    assert not unused, f"belongs into an extra: {unused}"
    extras = requirements("train", "register", "dicom")
    extra = {import_name(name) for name in set(extras) - set(requirements())}
    for path in sources(LIBRARY):
        at_import = ast.Module([node for node in tree_of(path).body if not isinstance(node, DEFINED)], [])
        found = {name.split(".")[0] for _, name in imports_of(at_import)} & extra
        assert not found or path.name == "loop.py", f"{path.name}: import {found} where it is used"


# Commands and papers


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == mfdiff_lite.__version__
    # The package's own licence; those of the embedded anatomies are in the metadata too.
    assert citation["license"] == PROJECT["license"].split(" AND ")[0] == "MIT"
    paper = citation["preferred-citation"]
    assert paper["doi"] == "10.26599/TST.2026.90100027"
    assert [a["family-names"] for a in paper["authors"]] == ["Zhang", "Chen", "Tian", "Gao", "Jiang", "Fu"]


def test_ci_runs_the_command_of_the_readme():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK), ".ci/run is not executable"
    last = script.read_text(encoding="utf-8").strip().splitlines()[-1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    commands = {line.split("#")[0].strip() for block in blocks for line in block.splitlines()}
    assert last == "make test"
    assert {"make demo", "make test"} <= commands


def test_readme_and_help_name_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", "\n".join(texts), flags=re.MULTILINE))
    assert named <= targets, f"no such target: {named - targets}"


def test_version_is_in_the_changelog():
    release = Version(mfdiff_lite.__version__).base_version
    versions = re.findall(r"^## \[(.*?)]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == release and versions == sorted(versions, key=Version, reverse=True)


def test_licences_have_their_files():
    files = {path.relative_to(ROOT) for pattern in PROJECT["license-files"] for path in ROOT.glob(pattern)}
    names = PROJECT["license"].split(" AND ")
    assert {Path("LICENSES", f"{name}.txt") for name in names if name != "MIT"} | {Path("LICENSE")} <= files
    assert {Path("NOTICE"), Path("mfdiff_lite/anatomies/NOTICE.md")} <= files


def test_package_data_is_listed():
    """Everything in the library's data folders ships, and nothing there is out of reach of package-data."""
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["*"]
    shipped = {path for pattern in patterns for path in LIBRARY.rglob(pattern)}
    stored = {p for p in LIBRARY.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert shipped == stored


# Continuous integration


def commands_of(workflow: dict) -> str:
    """All that a workflow runs, one command a line."""
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    return re.sub(r"\\\n\s*", " ", "\n".join(runs))


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflow_runs_what_exists(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "jobs", True} <= set(workflow)  # YAML reads the key "on" as true
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] and job["timeout-minutes"] <= 120, name
        assert all(("uses" in step) != ("run" in step) for step in job["steps"]), f"{name}: a step does one thing"
        assert set(job.get("needs", [])) <= set(workflow["jobs"]), name
    commands = commands_of(workflow)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets
    missing = [name for name in re.findall(r"\b(?:tests|\.ci)/[\w./]+", commands) if not (ROOT / name).exists()]
    assert not missing
    marks = {line.split(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    for chosen in re.findall(r"(?:pytest|ARGS)\b.*-m \"([^\"]*)\"", commands):
        assert set(re.findall(r"\w+", chosen)) - {"not", "and", "or"} <= marks
    extras = {name for group in re.findall(r"\.\[([\w,]+)]", commands) for name in group.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])


def test_ci_covers_the_versions_that_are_promised():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    promised = {c.split()[-1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    matrix = jobs["test"]["strategy"]["matrix"]
    assert {str(version) for version in matrix["python"]} == promised
    assert min(promised, key=Version) == PROJECT["requires-python"].removeprefix(">=")
    assert {entry["os"].split("-")[0] for entry in matrix["include"]} == {"macos", "windows"}
    assert {"lint", "minimum", "build"} <= set(jobs)


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_github_settings_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_pre_commit_checks_with_the_tools_of_the_dev_extra():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    local = {hook["id"]: hook for repo in hooks["repos"] if repo["repo"] == "local" for hook in repo["hooks"]}
    dev = PROJECT["optional-dependencies"]["dev"]
    for name in ("ruff", "ruff-format"):
        assert set(local[name]["additional_dependencies"]) <= set(dev)
    stored = re.compile(local["notebook-outputs"]["entry"])
    assert stored.search('   "execution_count": 3,') and stored.search('   "outputs": [')
    files = [path for path in sources(ROOT / "notebooks") if path.suffix == ".ipynb"]
    assert not [p.name for p in files if any(map(stored.search, p.read_text(encoding="utf-8").splitlines()))]


# Architecture


def above(importer: str) -> set[str]:
    """Modules that `importer` may import from."""
    return set(ORDER[: ORDER.index(importer)])


def library_imports(path: Path, package: tuple[str, ...] = ("mfdiff_lite",)) -> list[tuple[int, str]]:
    """(line, module of this library by its name in `ORDER`, '' for the package itself) for every import of our own in
    a library module of `package`."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*start, *filter(None, [node.module])])
            # "from . import name": a module if there is one of that name, else something of the package itself
            names = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if own_name(name) in ORDER else base) for name in names]
    return [(line, own_name(name)) for line, name in found if name.split(".")[0] == "mfdiff_lite"]


def own_name(name: str) -> str:
    """mfdiff_lite.look.panes -> look.panes."""
    return name.removeprefix("mfdiff_lite").removeprefix(".")


@each_module
def test_module_imports_only_from_above(path):
    name, package = dotted(path), path.relative_to(ROOT).parent.parts
    if name == "__init__":
        return  # the shop window: it gathers names from all floors
    assert name in ORDER, f"{name} has no place in ORDER (tests/test_packaging.py)"
    allowed = above(name) | ({""} if name == "__main__" else set())
    found = [(line, used) for line, used in library_imports(path, package) if used not in allowed]
    assert not found, f"{name} imports what does not stand above it (line, module, '' for the package itself): {found}"


@each_module
def test_module_imports_nothing_out_of_place(path):
    owners = {"anywidget": "look.viewer", "typer": "__main__", "argparse": "__main__", "click": "__main__"}
    for line, name in imports_of(tree_of(path)):
        top = name.split(".")[0]
        assert owners.get(top, dotted(path)) == dotted(path), f"{path.name}:{line}: only {owners[top]} imports {top}"
        assert top != "torch" or not dotted(path).startswith("look"), f"{path.name}:{line}: looking needs no torch"
        assert top not in {"tests", "notebooks", "data", "benchmarks", "pytest"}, f"{path.name}:{line} imports {name}"
        assert top not in {"pickle", "cloudpickle", "joblib", "diffusers"}, f"{path.name}:{line} imports {name}"


@each_module
def test_public_names_have_docstrings(path):
    tree = tree_of(path)
    bare = [n.name for n in tree.body if isinstance(n, DEFINED) and n.name[0] != "_" and not ast.get_docstring(n)]
    assert not bare, f"{path.name}: no docstring: {bare}"
    assert ast.get_docstring(tree), f"{path.name} does not say what it is about"


def test_architecture_rules_notice(tmp_path):
    """Negative control of the import scan."""
    path = tmp_path / "scan.py"
    lines = ["from . import cohort", "from .model import MFdiff", "import mfdiff_lite.config", "def f():"]
    path.write_text("\n".join([*lines, "    import mfdiff_lite"]), encoding="utf-8")
    assert {name for _, name in library_imports(path)} == {"cohort", "model", "config", ""}
    assert {"cohort", "model", ""} & above("scan") == set()
    assert "config" in above("scan")
    lines = [
        "from . import page, name",
        "from .viewer import explore",
        "from ..scan import Scan",
        "from .. import model",
    ]
    path.write_text("\n".join([*lines, "from mfdiff_lite import look", "import json"]), encoding="utf-8")
    found = [name for _, name in library_imports(path, ("mfdiff_lite", "look"))]
    assert found == ["look.page", "look", "look.viewer", "scan", "model", "look"]
    assert {"look.page", "look.viewer", "look"} & above("look.panes") == set() and "look.page" in above("look")


# Measures


def bodies(path: Path) -> list[tuple[int, str]]:
    """(lines of the body without docstring, name) of every function."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found += [(body[-1].end_lineno - body[0].lineno + 1, node.name)] if body else []
    return found


@each_module
def test_a_function_is_read_at_a_glance(path):
    """At most 40 lines; ruff holds the cyclomatic complexity to 10 (pyproject.toml)."""
    assert not [(lines, name) for lines, name in bodies(path) if lines > 40]


def test_the_library_does_not_grow_unnoticed():
    """All lines; and lines of code without looking, command line and foreign formats. Raising a bound is a decision."""
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES)
    core = [p for p in MODULES if p.parent == LIBRARY and p.stem != "__main__"]
    assert lines <= 7900 and sum(map(code_lines, core)) <= 3870


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor a comment alone, nor part of a docstring."""
    text = path.read_text(encoding="utf-8")
    tree, hidden = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *DEFINED)) and ast.get_docstring(node):
            hidden |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in hidden)

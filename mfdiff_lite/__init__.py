"""mfdiff_lite: restore a standard-dose PET image from low-dose PET and MR by fusion and conditional diffusion.

    patient  = mf.virtual_patient(mf.load_anatomy("icbm152"), seed=7)
    scan     = mf.Scanner().scan(patient, dose_reduction=20)
    restored = mf.load_pretrained().restore(scan, n_samples=8)
    print(mf.compare(scan, restored))
    mf.explore(scan, restored)

For teaching and research; not a medical device.
"""

import importlib

_PUBLIC = {
    "config": ["Adaptation", "Profile", "load_profile"],
    "anatomy": ["Anatomy"],
    "readers.brainweb": ["list_anatomies", "load_anatomy"],
    "phantom": ["Lesion", "Randomisation", "VirtualPatient", "virtual_patient"],
    "scan": ["Scan"],
    "files": ["load_example", "load_scan", "save_volume"],
    "readers.frames": ["short_frame_scan"],
    "readers.register": ["register"],
    "view": ["ModelView"],
    "checks": ["Finding", "check_result", "check_scan"],
    "scanner": ["Scanner", "Sinogram"],
    "cohort": ["make_cohort"],
    "diffusion": ["NoiseSchedule", "diffuse", "sample"],
    "model": ["MFdiff", "Restoration", "load_model", "load_pretrained"],
    "loop": ["TrainingState"],
    "stage1": ["train_stage1"],
    "stage2": ["adapt", "train_stage2"],
    "evaluation": ["compare", "evaluate"],
    "look": ["explore", "knobs"],
    "notebook": ["start_notebook"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)  # noqa: PLE0605
__version__ = "0.2.0.dev0"  # the one place: pyproject.toml reads it here


def __getattr__(name: str):
    """Load the module of a public name when it is first used: `mf.load_anatomy` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""The finished run that ships with an embedded model: everybody can open it, nobody changes it."""

import hashlib
import shutil
from pathlib import Path

from ..catalog import EMBEDDED, MODELS


def _id(model: str) -> str:
    return hashlib.sha256(f"ecodiff example {model}".encode()).hexdigest()[:32]


# {id: folder}; `recipes/example.py` makes them.
EXAMPLES = {
    _id(name): EMBEDDED / name / "example"
    for name in MODELS
    if (EMBEDDED / name / "example" / "run.json").is_file()
}


def example_of(model: str) -> str | None:
    """The id of a model's example; None without one."""
    return _id(model) if _id(model) in EXAMPLES else None


def put(run_id: str, root: Path) -> None:
    """Copy an example into the folder of all runs, where variants of it can be kept beside it."""
    folder, partial = root / run_id, root / f".{run_id}.partial"
    root.mkdir(parents=True, exist_ok=True)
    if run_id in EXAMPLES and not (folder / "run.json").is_file():
        shutil.copytree(EXAMPLES[run_id], partial, dirs_exist_ok=True)
        folder.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "run.json"):  # it comes last
            file.replace(folder / file.name)
        shutil.rmtree(partial, ignore_errors=True)

"""What the conformance suite vouches for: `python -m tests.support` writes it down.

It goes into ecodiff/supported.json, which `info` and the page read, and into docs/. A test fails
while either says something else than the suite.
"""

import json
from pathlib import Path

from ecodiff.architectures import find_groups
from ecodiff.pipelines import denoiser_of
from ecodiff.units import ALL_KINDS, KINDS
from tests import conftest, files, loras, stacking
from tests.denoisers import ROWS
from tests.pipelines import BUILDERS

HOME = Path(__file__).parent.parent
FILE = HOME / "ecodiff" / "supported.json"
ARCHITECTURES, CHECKPOINTS = HOME / "docs" / "architectures.md", HOME / "docs" / "checkpoints.md"
MEASURED = HOME / "ecodiff" / "measured.json"
BEGIN, END = "<!-- supported: python -m tests.support -->\n", "<!-- end -->\n"
STACKED = "<!-- stacked: python -m tests.support -->\n"
FILES = "<!-- files: python -m tests.support -->\n"
LORAS = "<!-- loras: python -m tests.support -->\n"
LABELS = {
    "sdxl": "Stable Diffusion XL, Turbo",
    "sd-1.5": "Stable Diffusion 1.5",
    "sd-2": "Stable Diffusion 2",
    "sd3.5": "Stable Diffusion 3, 3.5",
    "flux-dev": "FLUX.1 dev",
    "flux-schnell": "FLUX.1 schnell",
}


def rows() -> list[dict]:
    """One dict an architecture: {"name", "denoiser", "kinds", "pipeline"}."""
    found = []
    for name, build in conftest.PIPELINES.items():
        denoiser = denoiser_of(build())
        kinds = {group.kind for group in find_groups(denoiser, ALL_KINDS)}
        found.append((LABELS[name], type(denoiser).__name__, kinds, True))
    found += [(name, row.cls, row.kinds, name in BUILDERS) for name, row in ROWS.items()]
    found.sort(key=lambda row: not row[3])
    return [
        {"name": name, "denoiser": cls, "kinds": [k for k in ALL_KINDS if k in kinds], "pipeline": whole}
        for name, cls, kinds, whole in found
    ]


def table(found: list[dict]) -> str:
    """The table in docs/architectures.md."""
    lines = ["| architecture | diffusers' class | units | tried |", "|---|---|---|---|"]
    for row in found:
        kinds = ", ".join(KINDS[kind].word for kind in row["kinds"])
        tried = "whole pipeline" if row["pipeline"] else "denoiser, in a loop"
        lines.append(f"| {row['name']} | `{row['denoiser']}` | {kinds} | {tried} |")
    return "\n".join(lines) + "\n"


def section(readme: str, begin: str = BEGIN) -> str:
    """What a page says now."""
    return readme.partition(begin)[2].partition(END)[0]


def measured() -> list[dict]:
    """What benchmarks/fidelity.py measured of each embedded model, the rows that the page shows."""
    files = sorted((HOME / "benchmarks").glob("fidelity*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


if __name__ == "__main__":
    MEASURED.write_text(json.dumps(measured()) + "\n", encoding="utf-8")
    made = rows()
    FILE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for page, begin, text in (
        (ARCHITECTURES, BEGIN, table(made)),
        (CHECKPOINTS, STACKED, stacking.table()),
        (CHECKPOINTS, FILES, files.table()),
        (CHECKPOINTS, LORAS, loras.table()),
    ):
        now = page.read_text(encoding="utf-8")
        page.write_text(now.replace(begin + section(now, begin) + END, begin + text + END), encoding="utf-8")

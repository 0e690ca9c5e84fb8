"""What is claimed is what the benchmarks wrote."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables
from ecodiff.app.ui import show
from tests import loras, stacking, support, wording
from tests.denoisers import MISSING

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
CHECKPOINTS = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
FIDELITY = json.loads((ROOT / "benchmarks" / "fidelity.json").read_text())


def test_the_table_is_as_measured():
    for file in (ROOT / "benchmarks").glob("fidelity*.json"):
        assert show.benchmark(json.loads(file.read_text())) in BENCHMARKS
    measured = show.benchmark(FIDELITY).splitlines()
    names = tuple(f"| {row['method']} |" for row in FIDELITY["rows"])
    shown = [line for line in README.splitlines() if line.startswith(names)]
    assert len(shown) == 7 and set(shown) <= set(measured) and measured[0] in README
    for table in tables.every():
        assert table in BENCHMARKS, "see python benchmarks/tables.py"
    for row in json.loads((ROOT / "benchmarks" / "ablation.json").read_text())["parts"]:
        assert f"| {row['part']} | {row['error']:.4f} |" in BENCHMARKS


@pytest.mark.parametrize("file", ["fidelity", "fidelity-emoji-turbo", "fidelity-emoji-flux"])
def test_the_presets_win_their_table(file):
    rows = json.loads((ROOT / "benchmarks" / f"{file}.json").read_text())["rows"]
    errors = {(row["method"], row["ratio"]): row["latent_error"][0] for row in rows}
    ours = ("fast", "balanced", "paper", "gauss-newton", "surgeon", "thorough")
    baselines = {method for method, _ in errors if method.removesuffix(" +") not in ours}
    for ratio in (0.1, 0.2, 0.3, 0.4):
        best = min(errors[method, ratio] for method in baselines)
        every = [e for (name, size), e in errors.items() if size == ratio and name != "thorough +"]
        flux = file == "fidelity-emoji-flux"
        assert errors["surgeon +", ratio] == min(every), "not what is said to be the best"
        # At 30 % of emoji-flux its mean is 4 % higher; its medians are the lowest.
        assert errors["thorough +", ratio] <= (1.05 if flux else 0.95) * errors["surgeon +", ratio]
        if flux:  # with directions
            assert errors["surgeon +", ratio] <= 0.2 * best
            medians = {r["method"]: r["latent_error_median"][0] for r in rows if r["ratio"] == ratio}
            assert medians["thorough +"] == min(medians.values()), "as benchmarks/README.md says"
            first = "gauss-newton +" if ratio == 0.1 else "surgeon +"
            rest = [error for name, error in medians.items() if name != "thorough +"]
            assert medians[first] == min(rest), "as docs/method.md says"
            assert medians["surgeon +"] <= 0.07 * min(medians[method] for method in baselines)
        for preset in ("fast +", "balanced +"):
            # Heads and neurons alone have less to give in emoji-flux; at 20 % balanced is hardly below Wanda.
            floor = 0.96 if (preset, ratio) == ("balanced +", 0.2) else 0.85
            assert errors[preset, ratio] <= (floor if flux else 0.8) * best
            assert errors[preset, ratio] <= (0.85 if flux else 0.5) * errors["ecodiff +", ratio]


@pytest.mark.skipif(bool(MISSING), reason=f"this diffusers has not {MISSING}")
def test_the_table_of_loras_has_every_naming():
    rows = support.section(CHECKPOINTS, support.LORAS).splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(loras.NAMINGS)
    assert all(float(row.split(" | ")[2].removesuffix(" |")) <= 2e-6 for row in rows)


def test_supported_is_what_the_conformance_suite_passes():
    found = support.rows()
    assert json.loads(support.FILE.read_text()) == found, "run python -m tests.support"
    assert support.section(support.ARCHITECTURES.read_text(encoding="utf-8")) == support.table(found)


def test_what_stacks_is_what_is_tried():
    assert support.section(CHECKPOINTS, support.STACKED) == stacking.table(), "run python -m tests.support"


def test_what_it_costs_is_as_measured():
    read = lambda name: json.loads((ROOT / "benchmarks" / name).read_text())  # noqa: E731
    learning, speed = (read(f"{name}.json")["emoji-sdxl, x86_64"] for name in ("learning", "speed"))
    times, peaks = learning["times"], learning["peak_mb"]["all recomputed"]
    assert f"| {times['all recomputed']:.2f} dense trajectories |" in MEASUREMENTS
    assert f"| {times['all but the last']:.2f} |" in MEASUREMENTS
    assert f"| {times['half kept']:.2f} |" in MEASUREMENTS and f"| {times['all kept']:.2f} |" in MEASUREMENTS
    assert f"| {', '.join(f'{peak:.0f}' for peak in peaks.values())} MB |" in MEASUREMENTS
    assert times["all recomputed"] <= 3.2 and times["all kept"] <= 2.3
    # A time step leaves its latents behind, not what its call kept.
    assert (peaks["50"] - peaks["5"]) / 45 <= 0.002 * learning["activations_mb"], "memory grows with steps"
    for ratio in (0.2, 0.4):
        one, four = (row["aligned"] for row in speed["rows"] if row["ratio"] == ratio)
        assert f"| {one:.2f}×, {four:.2f}× faster |" in MEASUREMENTS
    load = read("load.json")
    assert load["same_scores"] and set(load["outcomes"]) == {"drawn", "Queue is full! Please try again."}
    assert f"{load['outcomes']['drawn']} pairs drawn" in MEASUREMENTS
    page = read("page.json")
    assert f"first paint {page['paint']:.2f} s, {page['bytes'] / 1e6:.2f} MB" in MEASUREMENTS
    assert f"pictures after {page['pictures']:.1f} s" in MEASUREMENTS
    assert f"to the first answer {page['click']:.2f} s" in MEASUREMENTS


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        if page == wording.FILE:
            continue  # links of texts, not of its own
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


def test_the_page_shows_what_the_benchmarks_wrote():
    assert json.loads(support.MEASURED.read_text()) == support.measured(), "run python -m tests.support"


def test_all_wording_is_in_one_file():
    assert wording.FILE.read_text(encoding="utf-8") == wording.document(), "python -m tests.wording"

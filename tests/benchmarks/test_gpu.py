"""What is to be measured on a GPU runs here too, on the embedded models."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_all_that_a_gpu_is_to_measure_runs_dry_and_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    parts = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    parts = {name: found for name, found in parts.items() if "part" in found}  # others keep results too
    ended = {name: (found["ended"], found.get("errors", "")[-500:]) for name, found in parts.items()}
    assert done.returncode == 0 and len(parts) >= 6, (ended, done.stderr[-1000:])
    for name in ("ordering", "memory-sdxl", "memory-flux", "streaming-flux"):
        assert parts[name]["figures"], name
    assert parts["streaming-flux"]["figures"][0]["same"], "streamed, it finds something else"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, ""), "what is done is not done again"

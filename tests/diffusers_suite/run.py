"""diffusers' own tests of pipelines and LoRAs, dense and on pruned components: what fails only when pruned.

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    pip install parameterized
    python -m tests.diffusers_suite.run diffusers            the pipelines of PIPELINES, about half an hour

A wheel of diffusers has no tests, so they come from its repository. Prints a table (file, passed dense, of
those passed pruned, failed pruned), and exits with 1 if one fails that is not in KNOWN. Tests that compare
with pixels of the dense model are skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
PIPELINES = (
    "pipelines/stable_diffusion/test_stable_diffusion.py",
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py",
    "pipelines/stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
    "pipelines/flux/test_pipeline_flux.py",
    "pipelines/pixart_sigma/test_pixart.py",
    "lora/test_lora_layers_sd.py",
    "lora/test_lora_layers_sdxl.py",
    "lora/test_lora_layers_sd3.py",
    "lora/test_lora_layers_flux.py",
)
# What a pruned model does otherwise on purpose: {a part of a test's name: why}.
KNOWN = {
    "ip_adapter": "refused in words: an IP-Adapter has keys and values for heads that are gone",
    "parameter_expanded_shapes": "makes a dense model of the pruned one's config, for its weights",
}


def outcomes(folder: Path, file: str, dense: bool, workers: str) -> dict[str, str]:
    """{test: "passed", "skipped" or what it failed with}."""
    with tempfile.TemporaryDirectory() as home:
        report = Path(home) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"tests/{file}", "-q", "-n", workers]
        command += ["-p", "pruned_components", "-p", "no:cacheprovider", f"--junitxml={report}"]
        paths = [str(HERE), str(HERE.parent.parent), *os.environ.get("PYTHONPATH", "").split(":")]
        environment = os.environ | {"PYTHONPATH": ":".join(paths), "HF_HUB_OFFLINE": "1"}
        environment |= {"DENSE": "1"} if dense else {}
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"{file}: {ran.stderr or ran.stdout}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            words = "skipped" if case.find("skipped") is not None else "passed"
            found[f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"] = (
                words if bad is None else (bad.get("message") or "failed").splitlines()[0][:160]
            )
        if not found:
            raise SystemExit(f"{file}: {ran.stdout[-2000:]}")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="a clone of diffusers")
    parser.add_argument("--only", nargs="+", default=PIPELINES, metavar="FILE", help="of its tests")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--out", type=Path, help="a JSON file of what failed")
    options = parser.parse_args()
    worse: dict[str, dict] = {}
    for file in options.only:
        dense, pruned = (outcomes(options.folder, file, d, options.workers) for d in (True, False))
        both = [name for name, word in dense.items() if word == "passed"]
        wrong = [name for name in both if pruned.get(name) not in ("passed", "skipped")]
        failed = {name: pruned.get(name, "gone") for name in wrong}
        worse[file] = {"passed dense": len(both), "failed pruned": failed}
        passed = sum(pruned.get(name) == "passed" for name in both)
        print(f"| {file} | {len(both)} | {passed} | {len(failed)} |", flush=True)
        for name, why in failed.items():
            print(f"    {name}: {why}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(worse, indent=1) + "\n")
    unknown = [n for row in worse.values() for n in row["failed pruned"] if not any(k in n for k in KNOWN)]
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())

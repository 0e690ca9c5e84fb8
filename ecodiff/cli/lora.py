"""`lora`: cut LoRAs of the dense model to fit a pruned one."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import EcodiffError
from ._common import table

HELP = "cut LoRAs of the dense model to fit a pruned one"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="a pruned folder")
    parser.add_argument("lora", nargs="+", help=".safetensors files in any common naming, or folders of them")
    parser.add_argument("--dense", help="the dense model (default: the one that the plan names)")
    parser.add_argument(
        "--naming", default="diffusers", help="diffusers (default) or kohya, which ComfyUI reads"
    )
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="the translated LoRA, .safetensors; of several, a folder"
    )


def run(options: argparse.Namespace) -> int:
    """LoRAs of the dense model, cut to fit a pruned folder; one that fails does not keep the others."""
    from ..checkpoints.dora import is_dora
    from ..checkpoints.loading import empty_denoiser, load
    from ..checkpoints.lora import translate_lora
    from ..checkpoints.lora_saving import save_lora
    from ..pipelines import denoiser_of
    from ..pruning.components import plan_of_pipeline

    small = load(options.model)
    cut_by = plan_of_pipeline(small)
    named = options.dense or (cut_by.metadata.get("model", "") if cut_by else "")
    dense = empty_denoiser(named) if cut_by else None
    files, results, failed = found(options.lora), [], 0
    several = len(files) > 1 or Path(options.lora[0]).is_dir()
    for file in files:
        try:
            if dense is not None and is_dora(file) and next(dense.parameters()).is_meta:
                dense = denoiser_of(load(named))  # its weights are needed, from here on
            tensors, made = translate_lora(file, small, dense=dense)
            assert cut_by is not None  # or nothing would have been translated
            target = Path(options.out) / file.name if several else Path(options.out)
            out = save_lora(tensors, target, cut_by, options.naming, dense)
        except EcodiffError as error:
            if not several:
                raise
            failed += 1
            print(f"ecodiff: {file.name}: {error}", file=sys.stderr)
            continue
        rows = [("translated", made.words()), ("saved in", str(out))]
        print(table(rows + [("dropped", f"{name}: {why}") for name, why in made.dropped.items()]))
        results.append(vars(made) | {"file": str(file), "out": str(out)})
    if options.json:
        print(json.dumps({"files": results, "failed": failed} if several else results[0]))
    return 1 if failed else 0


def found(given: Sequence[str]) -> list[Path]:
    """The files that are given, and those of the folders. Raises EcodiffError if there are none."""
    files: list[Path] = []
    for path in map(Path, given):
        files += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise EcodiffError(f"There is no .safetensors file in {', '.join(given)}.")
    names = [path.name for path in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EcodiffError(f"{', '.join(twice)} is given twice; results are named as their files.")
    return files

"""`prune`: learn which units matter, remove the rest, save the model."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import HEAL_REPAIR, CompensateConfig
from ..errors import EcodiffError
from ..units import ALL_KINDS

if TYPE_CHECKING:
    from ..pruning.plan import PrunePlan
    from ..runs import Run

from ._common import lean_argument, report, sampling_arguments, without_unused

HELP = "learn which units matter, remove the rest, save the model"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="MODEL, or the folder of a finished run")
    parser.add_argument(
        "--ratio",
        type=float,
        help="fraction of the denoiser's parameters to remove (default: 0.2, or the run's)",
    )
    parser.add_argument(
        "--cost",
        choices=("params", "macs", "ms"),
        help="what the ratio is of: parameters (default), MACs of a call, or its milliseconds here",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="fast, balanced, paper, ecodiff or thorough (surgeon on four times the trajectories); or a "
        "scoring method: surgeon, wanda, taylor, ... (default: the best as measured: surgeon if its "
        "statistics take less than 20 GB, else gauss-newton where modulation has directions, else balanced)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the pruned pipeline")
    parser.add_argument("--run", metavar="DIR", help="the run's folder; an unfinished one is resumed")
    parser.add_argument(
        "--kinds", nargs="+", choices=ALL_KINDS, help="units to prune (default: those of the preset)"
    )
    parser.add_argument(
        "--units",
        nargs="+",
        type=share,
        metavar="KIND=SHARE",
        help="instead of a ratio, the share of units of each kind to remove: heads=0.32 ffn=0.12",
    )
    parser.add_argument(
        "--align",
        type=int,
        metavar="N",
        help="widths that remain in wide layers are multiples of N (default: 64; 128 for 4-bit kernels)",
    )
    parser.add_argument(
        "--text-encoders",
        type=float,
        metavar="SHARE",
        help="fraction of the parameters of the text encoders to remove as well (default: none)",
    )
    parser.add_argument(
        "--learn-in",
        choices=("float8",),
        help="rank units on weights in 8 bits: half the memory; the full ones are cut and repaired",
    )
    parser.add_argument("--seed", type=int, help="of prompts, noise and gates")
    sampling_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _repair_arguments(parser)
    lean_argument(parser)
    parser.add_argument("--layers", action="store_true", help="list what every layer became")


def _repair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-compensate",
        dest="compensate",
        action="store_false",
        help="leave the weights that stay as they are",
    )
    parser.add_argument(
        "--repair",
        type=int,
        metavar="N",
        help=f"dense trajectories to repair weights by (default: {CompensateConfig.trajectories}, thorough: "
        f"{HEAL_REPAIR})",
    )


def share(text: str) -> tuple[str, float]:
    """A kind of units and the share of them, of `--units`."""
    kind, _, number = text.partition("=")
    if kind not in ALL_KINDS:
        raise argparse.ArgumentTypeError(f"{kind!r} is not one of {', '.join(ALL_KINDS)}")
    try:
        return kind, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=SHARE, as heads=0.32") from None


def run(options: argparse.Namespace) -> int:
    """Learn (or resume, or take a finished run), cut, save."""
    from ..checkpoints.loading import disk_dtype, load
    from ..checkpoints.saving import folder_bytes, save
    from ..learning import distributed
    from ..learning.compensate import compensate_
    from ..learning.streaming import is_rounded
    from ..metrics.cost import parameters
    from ..pipelines import denoiser_of
    from ..pruning.plan import PLAN_FILE
    from ..pruning.slicing import variant

    started = time.monotonic()
    source, rounded = Path(options.model), bool(options.learn_in)
    if (source / "run.json").is_file():
        run = _opened(source, options)
        pipe = load(run.known, rounded=rounded and not run.finished)
    else:
        pipe = load(options.model, rounded=rounded)
        run = _open_or_create(options, pipe)
    repair = run.compensation.on(options.repair) if options.repair is not None else run.compensation
    if not run.finished and not _learn(run, pipe, options):
        return 130
    if distributed.rank():
        return 0  # the first process cuts and saves
    if is_rounded(denoiser_of(pipe)):
        del pipe
        pipe = load(run.known)
    shares = dict(options.units) if options.units else None
    align = True if options.align is None else options.align
    made = run.plan(options.ratio, shares, run.config.cost, align, _milliseconds(run, pipe))
    small = variant(pipe, made)
    updated = {}
    if options.compensate:
        print("compensating", file=sys.stderr)
        updated = compensate_(small, pipe, run.learned_on, repair)
    if options.drop_unused:
        small = without_unused(small, run.known)
    out = save(small, options.out, disk_dtype(run.known))
    dense, pruned = parameters(denoiser_of(pipe)), parameters(denoiser_of(small))
    result = {
        "run": str(run.folder),
        "out": str(out),
        "plan": str(out / PLAN_FILE),
        "digest": made.digest,
        "compensated": sum(updated.values()),
        "params_dense": dense,
        "params_pruned": pruned,
        "text_encoders": made.metadata.get("text_encoders", {}),
        "bytes": folder_bytes(out),
        "seconds": round(time.monotonic() - started, 2),
    }
    rows = _rows(result, made, updated)
    if options.layers:
        rows += [(name, f"{int(keep.sum())} of {len(keep)}") for name, keep in made.items()]
    report(options, rows, result)
    return 0


def _milliseconds(run: "Run", pipe) -> tuple[dict[str, float], float] | None:
    """What a unit of each ranked group takes of a call here, and a whole call; of a run that counts that."""
    from ..architectures import find_groups
    from ..metrics.cost import unit_milliseconds
    from ..pipelines import call_options, denoiser_of, prompt_rows
    from ..units import ALL_KINDS

    config = run.config
    if config.cost != "ms":
        return None
    ranked = run.scores().values
    options = call_options(pipe, config.inference_steps, config.guidance_scale, config.size, config.extra)
    groups = [group for group in find_groups(denoiser_of(pipe), ALL_KINDS) if group.name in ranked]
    return unit_milliseconds(pipe, prompt_rows(run.learned_on, [0], 0, options), groups)


def _rows(result: dict, made: "PrunePlan", updated: dict[str, bool]) -> list[tuple[str, str]]:
    """What was done, for people."""
    from ..checkpoints.card import compared
    from ..machine import megabytes

    tried = compared(made.metadata.get("orders", {}))
    units = sum(int((~keep).sum()) for keep in made.values()), sum(len(k) for k in made.values())
    encoders = result["text_encoders"]
    return [
        ("parameters", f"{_fewer(result)} of the denoiser removed)"),
        *([("text encoders", f"{_fewer(encoders)} removed)")] if encoders else []),
        ("units", f"{units[0]:,} of {units[1]:,} removed ({units[0] / units[1]:.1%})"),
        ("compensated", f"{sum(updated.values())} of {len(updated)} layers that lost units"),
        *([("orders", f"{tried}: latent error, held out, repaired; the first was taken")] if tried else []),
        ("size on disk", megabytes(result["bytes"])),
        ("saved in", result["out"]),
        ("run", f"{result['run']}  (prune it again for another size)"),
        ("time", f"{result['seconds']:.0f} s"),
    ]


def _fewer(facts: dict) -> str:
    """What a part had and has, open at its end for "of" what."""
    dense, pruned = facts["params_dense"], facts["params_pruned"]
    return f"{dense:,} -> {pruned:,} ({1 - pruned / dense:.1%}"


def _opened(folder: Path, options: argparse.Namespace) -> "Run":
    """A run that is given by its folder: what it was learned with cannot be asked for again."""
    from ..runs import Run

    asked = ("cost", "preset", "kinds", "seed", "steps", "guidance", "size", "prompts", "run")
    names = [name for name in (*asked, "text_encoders") if getattr(options, name) is not None]
    given = [f"--{name.replace('_', '-')}" for name in names]
    if given:
        raise EcodiffError(
            f"{folder} is a run, which has its settings already; {', '.join(given)} cannot be changed. Leave "
            "them out, or give the model to start a new run."
        )
    return Run.open(folder)


def _open_or_create(options: argparse.Namespace, pipe) -> "Run":
    """The run that is asked for: a new one, or one that is resumed."""
    from .. import catalog
    from ..checks import check_class
    from ..learning import distributed, methods
    from ..pipelines import denoiser_of
    from ..pruning.scores import Scores
    from ..runs import Run, RunStore
    from ..runs.prompts import read, set_aside

    check_class(type(pipe))
    model = catalog.find(options.model)
    asked = {"seed": options.seed, "kinds": tuple(options.kinds) if options.kinds else None}
    asked |= {
        "cost": options.cost,
        "text_encoders": options.text_encoders,
        "inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "size": options.size,
    }
    ratio = 0.2 if options.ratio is None else options.ratio
    best = "balanced" if distributed.count() > 1 else methods.measured_best(denoiser_of(pipe), "balanced")
    preset = options.preset or best
    config = model.learn_config(preset, ratio, **{n: v for n, v in asked.items() if v is not None})
    prompts, heldout = set_aside(read(options.prompts)) if options.prompts else (None, ())
    prompts = prompts or model.prompts("calibration")
    # Refuse an impossible size before learning, not after.
    if config.cost == "params":
        Scores.unranked(denoiser_of(pipe), config.kinds).plan(ratio=ratio)
    folder = distributed.agreed(Path(options.run) if options.run else RunStore().new_folder())
    if distributed.agreed(not (folder / "run.json").is_file()) and distributed.rank() == 0:
        Run.create(folder, options.model, config, prompts, preset, heldout)
    distributed.agreed(None)  # wait for it
    run = Run.open(folder)
    if run.config != config or run.model != options.model:
        raise EcodiffError(
            f"The run in {folder} was started for {run.model} at ratio {run.config.ratio:g}, "
            f"preset {run.preset}. Give the same options to resume it, `prune {folder} "
            "--ratio ...` to cut another size from it, or another --run."
        )
    return run


def _learn(run: "Run", pipe, options: argparse.Namespace) -> bool:
    """Learn with a progress bar; False if it was stopped."""
    from tqdm import tqdm

    from ..learning import distributed
    from ..runs.loop import advance

    state = run.state()
    done = state.step if state else 0
    quiet = options.quiet or distributed.rank() > 0
    if distributed.rank() == 0:
        print(f"run: {run.folder}" + (f" (resumed at step {done})" if done else ""), file=sys.stderr)
    with tqdm(total=run.config.total_steps, initial=done, unit="step", disable=quiet) as bar:

        def show(state, seconds):
            row = state.history[-1]
            bar.set_description("learning" if "loss" in row else "warm start")
            if "loss" in row:
                bar.set_postfix(loss=f"{row['loss']:.4f}", removed=f"{row['expected']:.1%}")
            bar.update()

        try:
            finished = advance(run, pipe, show)
        except KeyboardInterrupt:
            finished = False
    if not finished:
        print(f"Stopped. The same command with --run {run.folder} resumes.", file=sys.stderr)
    return finished

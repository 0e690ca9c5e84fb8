"""The command line: prune, bring, generate, compare, heal, lora, fill, push, info."""

import argparse
import json
import sys
import time
from pathlib import Path

from .. import catalog
from ..architectures import find_groups, unit_parameters, unrecognised
from ..checkpoints import card, hub, loading, saving
from ..checkpoints.formats import save_filled
from ..checkpoints.lora import save_lora, translate_lora
from ..errors import EcodiffError, UnsupportedModelError, memory_advice
from ..learning import distributed, memory
from ..learning.compensate import compensate_
from ..learning.heal import facts, heal
from ..machine import be_quiet, megabytes
from ..metrics.cost import parameters
from ..metrics.fidelity import compare, fidelity, generate
from ..pipelines import denoiser_of
from ..pruning import plan
from ..pruning.plan import PrunePlan
from ..pruning.scores import Scores
from ..pruning.slicing import plan_of, variant
from ..runs.folder import Run
from ..runs.importing import import_run
from ..runs.loop import advance
from ..runs.store import RunStore
from ..units import ALL_KINDS, WORDS
from .arguments import parser


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def prune(options: argparse.Namespace) -> int:
    """Learn (or resume, or take a finished run), cut, save."""
    started = time.monotonic()
    source = Path(options.model)
    if (source / "run.json").is_file():
        run = Run.open(source)
        pipe = loading.load(run.model)
    else:
        pipe = loading.load(options.model)
        run = _open_or_create(options, pipe)
        if not _learn(run, pipe, options):
            return 130
        if distributed.rank():
            return 0  # the first process cuts and saves
    plan = run.plan(options.ratio)
    small = variant(pipe, plan)
    updated = {}
    if options.compensate:
        print("compensating", file=sys.stderr)
        known = catalog.find(run.model)
        updated = compensate_(small, pipe, known.prompts("calibration"), known.compensation())
    dtype = loading.disk_dtype(run.model)
    out = saving.save(small, options.out, dtype)
    dense, pruned = parameters(denoiser_of(pipe)), parameters(denoiser_of(small))
    result = {
        "run": str(run.folder),
        "out": str(out),
        "plan": str(out / plan.PLAN_FILE),
        "digest": plan.digest,
        "compensated": sum(updated.values()),
        "params_dense": dense,
        "params_pruned": pruned,
        "bytes": saving.folder_bytes(out),
        "seconds": round(time.monotonic() - started, 2),
    }
    units = sum(int((~keep).sum()) for keep in plan.values()), sum(len(k) for k in plan.values())
    rows = [
        ("parameters", f"{dense:,} -> {pruned:,} ({1 - pruned / dense:.1%} of the denoiser removed)"),
        ("units", f"{units[0]:,} of {units[1]:,} removed ({units[0] / units[1]:.1%})"),
        ("compensated", f"{sum(updated.values())} of {len(updated)} layers that lost units"),
        ("size on disk", megabytes(result["bytes"])),
        ("saved in", result["out"]),
        ("run", f"{result['run']}  (prune it again for another size)"),
        ("time", f"{result['seconds']:.0f} s"),
    ]
    if options.layers:
        rows += [(name, f"{int(keep.sum())} of {len(keep)}") for name, keep in plan.items()]
    print(table(rows))
    if options.json:
        print(json.dumps(result))
    return 0


def bring(options: argparse.Namespace) -> int:
    """Make a run of what was learned elsewhere."""
    known = catalog.find(options.model)
    files = [hub.pull_plan(file) if hub.is_repo(file) else file for file in options.files]
    run = import_run(Path(options.run), known.name, known.learn_config("fast", 0.2), files)
    print(f"  run  {run.folder}  (python -m ecodiff prune {run.folder} --out DIR)")
    if options.json:
        print(json.dumps({"run": str(run.folder)}))
    return 0


def _open_or_create(options: argparse.Namespace, pipe) -> Run:
    model = catalog.find(options.model)
    changes = {} if options.seed is None else {"seed": options.seed}
    if options.kinds:
        changes["kinds"] = tuple(options.kinds)
    config = model.learn_config(options.preset, options.ratio, **changes)
    # Refuse an impossible size before learning, not after.
    Scores.unranked(denoiser_of(pipe), config.kinds).plan(ratio=options.ratio)
    folder = distributed.agreed(Path(options.run) if options.run else RunStore().new_folder())
    if distributed.agreed(not (folder / "run.json").is_file()) and distributed.rank() == 0:
        Run.create(folder, options.model, config, model.prompts("calibration"), options.preset)
    distributed.agreed(None)  # wait for it
    run = Run.open(folder)
    if run.config != config or run.model != options.model:
        raise EcodiffError(
            f"The run in {folder} was started for {run.model} at ratio {run.config.ratio:g}, "
            f"preset {run.preset}. Give the same options to resume it, `prune {folder} "
            "--ratio ...` to cut another size from it, or another --run."
        )
    return run


def _learn(run: Run, pipe, options: argparse.Namespace) -> bool:
    from tqdm import tqdm

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


def generate_command(options: argparse.Namespace) -> int:
    """One image from a dense or a pruned model."""
    pipe = loading.load(options.model, offload=True)
    sample = generate(pipe, options.prompt, options.seed, **_defaults(options.model, options))
    out = Path(options.out or f"ecodiff-{options.seed}.png")
    _save_image(sample.image, out)
    print(table([("saved in", str(out)), ("time", f"{sample.milliseconds:.0f} ms")]))
    return 0


def compare_command(options: argparse.Namespace) -> int:
    """Dense beside pruned: one prompt, or the held-out prompts of the model."""
    small, base = _pruned(options)
    pipe = loading.load(base)
    defaults = _defaults(base, options)
    if options.prompt:
        dense, pruned = (generate(p, options.prompt, options.seed, **defaults) for p in (pipe, small))
        out = Path(options.out or f"ecodiff-compare-{options.seed}.png")
        pair = dense.image.copy().resize((2 * dense.image.width, dense.image.height))
        pair.paste(dense.image, (0, 0))
        pair.paste(pruned.image, (dense.image.width, 0))
        _save_image(pair, out)
        values, extra = vars(fidelity(dense, pruned)), [("dense | pruned", str(out))]
        report = {"mean": values, "prompt": options.prompt, "seed": options.seed}
    else:
        prompts = catalog.find(base).prompts("heldout")[: options.count]
        report = compare(pipe, small, prompts, [options.seed], **defaults)
        values, extra = report["mean"], [("prompts", str(len(prompts)))]
    rows = [
        *extra,
        ("latent error", f"{values['latent_error']:.4f}"),
        ("PSNR", f"{values['psnr']:.1f} dB"),
        ("SSIM", f"{values['ssim']:.3f}"),
    ]
    print(table(rows))
    if options.json:
        print(json.dumps(report))
    return 0


def _pruned(options: argparse.Namespace):
    """A pruned folder's pipeline, and the name of its dense model."""
    small = loading.load(options.model)
    plan = plan_of(denoiser_of(small))
    if plan is None:
        raise UnsupportedModelError(
            f"{options.model} is not pruned; {options.command} takes a pruned folder."
        )
    base = options.dense or plan.metadata.get("model")
    if not base:
        raise EcodiffError("The plan does not name its dense model. Give it with --dense.")
    return small, base


def heal_command(options: argparse.Namespace) -> int:
    """Distil a pruned model for a while; fidelity before and after."""
    from tqdm import tqdm

    small, base = _pruned(options)
    pipe, known = loading.load(base), catalog.find(base)
    folder = Path(options.run or f"{options.out}.heal")
    config = known.heal_config(steps=options.steps, rank=options.rank, rate=options.rate)
    prompts = known.prompts("heldout")[: options.count]
    before = compare(pipe, small, prompts, **known.drawing())["mean"]
    with tqdm(total=config.steps, unit="step", disable=options.quiet) as bar:
        try:
            for step, loss in heal(small, pipe, known.prompts("calibration"), config, folder):
                bar.update(step - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}")
        except KeyboardInterrupt:
            print(f"Stopped. The same command goes on from {folder}.", file=sys.stderr)
            return 130
    after = compare(pipe, small, prompts, **known.drawing())["mean"]
    text = card.model_card(small, facts(config, before, after, len(prompts)))
    out = saving.save(small, options.out, loading.disk_dtype(base), text)
    rows = [
        ("latent error", f"{before['latent_error']:.4f} -> {after['latent_error']:.4f}"),
        ("PSNR", f"{before['psnr']:.1f} -> {after['psnr']:.1f} dB"),
        ("prompts", f"{len(prompts)} that nothing was learned on"),
        ("saved in", str(out)),
    ]
    print(table(rows))
    if options.json:
        print(json.dumps({"out": str(out), "before": before, "after": after}))
    return 0


def _defaults(model: str, options: argparse.Namespace) -> dict:
    """Steps, guidance and size: as asked, else as the catalogue says (of the dense model)."""
    folder = Path(model)
    if (folder / plan.PLAN_FILE).is_file():
        model = PrunePlan.load(folder / plan.PLAN_FILE).metadata.get("model", model)
    return catalog.find(model).drawing(options.steps, options.guidance)


def _save_image(image, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out)
    except (OSError, ValueError) as error:
        raise EcodiffError(f"Could not write the image to {out}: {error}.") from None


def lora(options: argparse.Namespace) -> int:
    """A LoRA of the dense model, cut to fit a pruned folder."""
    small = loading.load(options.model)
    plan = plan_of(denoiser_of(small))
    tensors, report = translate_lora(options.lora, small)
    out = save_lora(tensors, options.out, plan)
    rows = [("translated", report.words()), ("saved in", str(out))]
    rows += [("dropped", f"{name}: {why}") for name, why in report.dropped.items()]
    print(table(rows))
    if options.json:
        print(json.dumps(vars(report) | {"out": str(out)}))
    return 0


def fill(options: argparse.Namespace) -> int:
    """A pruned folder in the dense model's shapes, zeros where units were."""
    small = loading.load(options.model)
    out = save_filled(small, options.out, loading.disk_dtype(options.model))
    rows = [
        ("saved in", str(out)),
        ("note", "as large and as slow as the dense model: zeros are computed too"),
    ]
    print(table(rows))
    if options.json:
        print(json.dumps({"out": str(out)}))
    return 0


def push(options: argparse.Namespace) -> int:
    """Upload a pruned folder, or its plan."""
    asked = (options.repo, options.token, not options.public)
    if options.plan:
        url = hub.push_plan(PrunePlan.load(Path(options.model) / plan.PLAN_FILE), *asked)
    else:
        url = hub.push(options.model, *asked)
    print(f"  uploaded to  {url}")
    if options.json:
        print(json.dumps({"url": url}))
    return 0


def info(options: argparse.Namespace) -> int:
    """What a model is made of and what of it can be pruned, from its configuration alone."""
    denoiser = loading.empty_denoiser(options.model)
    groups = find_groups(denoiser, ALL_KINDS)
    total = parameters(denoiser)
    plan = plan_of(denoiser)
    scores = Scores.unranked(denoiser)
    count = {kind: sum(g.size for g in groups if g.kind == kind) for kind in ALL_KINDS}
    share = {
        kind: sum(g.size * unit_parameters(denoiser, g) for g in groups if g.kind == kind) / total
        for kind in ALL_KINDS
    }
    facts = {
        "model": options.model,
        "denoiser": type(denoiser).__name__,
        "params": total,
        "heads": count["heads"],
        "neurons": count["ffn"],
        "resnet_groups": count["resnet"],
        "share_heads": share["heads"],
        "share_ffn": share["ffn"],
        "share_resnet": share["resnet"],
        "share_modulation": share["modulation"],
        "ceiling": scores.ceiling,
        "left_alone": unrecognised(denoiser, groups),
        "pruned": plan is not None,
        "conformance": catalog.supported(type(denoiser).__name__),
    }
    words = WORDS | {"resnet": "ResNet channel groups"}
    rows = [
        ("denoiser", facts["denoiser"]),
        ("conformance suite", _conformance(facts["denoiser"])),
        ("parameters", f"{total:,}"),
        *((words[k], f"{count[k]:,} ({share[k]:.1%} of the parameters)") for k in ALL_KINDS if count[k]),
        ("can be removed", f"at most {scores.ceiling:.1%}"),
        ("left alone", ", ".join(f"{k} {v / total:.1%}" for k, v in facts["left_alone"].items())),
    ]
    known = catalog.find(options.model)
    if known.denoiser:
        needs = memory.estimate(denoiser, known)
        facts |= {"memory_draw": needs["draw"], "memory_learn": needs["learn"]}
        facts |= {"licence": known.licence, "gated": known.gated}
        rows.append(
            ("memory (estimate)", f"{megabytes(needs['draw'])} to draw, {megabytes(needs['learn'])} to learn")
        )
        rows.append(
            ("licence", known.licence + (", gated: accept it on the Hub first" if known.gated else ""))
        )
    if plan is not None:
        rows.append(("pruned by plan", plan.digest))
    if scores.ceiling >= 0.2:
        facts["params_at_20"] = total - scores.removed(scores.plan(ratio=0.2))
        rows.append(("after a 20 % plan", f"{facts['params_at_20']:,} parameters"))
    print(table(rows))
    if options.json:
        print(json.dumps(facts))
    return 0


def _conformance(denoiser: str) -> str:
    rows = catalog.supported(denoiser)
    if not rows:
        return "this class is not in it; what is found is found by structure"
    whole = "passed, whole pipeline" if any(row["pipeline"] for row in rows) else "passed, denoiser alone"
    return f"{whole} ({', '.join(row['name'] for row in rows)})"


COMMANDS = {
    "prune": prune,
    "bring": bring,
    "generate": generate_command,
    "compare": compare_command,
    "heal": heal_command,
    "lora": lora,
    "fill": fill,
    "push": push,
    "info": info,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = parser(COMMANDS).parse_args(arguments)
    be_quiet()
    try:
        distributed.join()
        with memory_advice("Take a smaller model or image, or a device with more memory."):
            return options.function(options)
    except EcodiffError as error:
        print(f"ecodiff: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        distributed.leave()

"""What can be had of a run: sizes, images, how close they are."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from statistics import fmean

from ...architectures import find_groups
from ...config import HEAL_REPAIR
from ...errors import BudgetError, RunError
from ...metrics.fidelity import Sample, fidelity
from ...pruning.plan import PrunePlan
from ...runs.healing import heal_settings
from ...runs.pictures import load
from ...units import ALL_KINDS
from ..server import server
from ..tasks import DrawImages, DrawPictures, HealRun, results
from .learning import changeable
from .prediction import empty_denoiser, unit_costs

MAX_SIZES, MAX_PROMPTS = 4, 32  # of one call of `sizes`

MAX_HEALING, MAX_REPAIR = 2000, 2048  # steps, trajectories
MAX_STEPS = 100  # time steps of an image


def plan(run: str, ratio: float) -> PrunePlan:
    """The plan of a run at a size. Milliseconds: nothing is learned again."""
    return server().store.open(run).plan(ratio)


def cut(run: str, ratio: float) -> dict:
    """Cut a run's ranking at a size.

    Returns:
        {"digest", "ratio", "params_dense", "params_pruned", "bytes_dense", "bytes_pruned",
        "text_encoders": {"params_dense", "params_pruned"}, zeros where they are left as they are,
        "units_removed", "units", "kept": {group: fraction kept}, "kinds": {group: kind of its units}}
    """
    whole = plan(run, ratio)
    made, model = whole.part(), whole.metadata["model"]
    _, itemsize, dense_bytes = unit_costs(model)
    encoders = whole.metadata.get("text_encoders", {"params_dense": 0, "params_pruned": 0})
    also = encoders["params_dense"] - encoders["params_pruned"]
    kinds = {group.name: group.kind for group in find_groups(empty_denoiser(model), ALL_KINDS)}
    dense, pruned = made.metadata["params_dense"], made.metadata["params_pruned"]
    return {
        "digest": whole.digest,
        "ratio": 1 - pruned / dense,
        "params_dense": dense,
        "params_pruned": pruned,
        "bytes_dense": dense_bytes,
        "bytes_pruned": dense_bytes - (dense - pruned + also) * itemsize,
        "text_encoders": encoders,
        "units_removed": sum(int((~keep).sum()) for keep in made.values()),
        "units": sum(len(keep) for keep in made.values()),
        "kept": {name: float(keep.float().mean()) for name, keep in made.items()},
        "kinds": {name: kinds[name] for name in made},
    }


def heal(run: str, ratio: float, steps: int = 100, repair: int = HEAL_REPAIR) -> Iterator[dict]:
    """Repair what is left of a run at a size on more trajectories, then train it for a while (LoRA, merged).

    If that brings it closer on held-out prompts, images and downloads of that size are the healed model's
    from then on. On ZeroGPU a call goes on for about a minute: call it again while the stage is
    "interrupted". Stopped (see `stop`), it goes on from there too.

    Args:
        steps: of training, towards the dense model's images; no others are needed. 0: none.
        repair: dense trajectories that weights are repaired by first, in closed form; 0: none, and as many
            as the run was repaired by already: none.

    Yields:
        {"stage": healing, interrupted, stopped, healed or unchanged, "step", "steps" (batches that are
        recorded for the repair, and steps), "loss" and "seconds_left" (None while recording or checking)},
        and at the end "before" and "after", geometric means of latent errors
    """
    if not (0 <= steps <= MAX_HEALING and 0 <= repair <= MAX_REPAIR):
        raise BudgetError(
            f"Healing takes up to {MAX_REPAIR} trajectories to repair by and {MAX_HEALING} steps."
        )
    opened, made = changeable(run), plan(run, ratio)
    if not opened.finished:
        raise RunError("The run is not finished. Healing is for what is cut in the end.")
    opened.permit()
    steps_in_all = heal_settings(opened, steps, repair).total_steps
    found = {"stage": "healing", "step": 0, "steps": steps_in_all, "loss": None, "seconds_left": None}
    for done in results(HealRun(str(opened.folder), made, steps, repair)):
        if "after" in done:
            stage = "healed" if done["after"] < done["before"] else "unchanged"
            judged = {name: done[name] for name in ("before", "after")}
            yield found | {"stage": stage, "step": steps_in_all} | judged
            return
        trained = done["loss"] is not None  # batches that are recorded or checked take another time
        left = (steps_in_all - done["step"]) * done["seconds"] if trained else None
        found = found | {"step": done["step"], "loss": done["loss"], "seconds_left": left}
        yield found
    yield found | {"stage": "stopped" if opened.stop_requested else "interrupted", "seconds_left": None}


def compare(
    run: str,
    ratio: float,
    prompt: str,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    compensate: bool = True,
) -> Iterator[tuple[Sample, Sample | None, dict]]:
    """Draw one prompt with the dense and the pruned model, from the same noise, and measure.

    Args:
        compensate: let the weights that remain take over from those that went (closed form).

    Yields:
        once the dense image is there: it, None and {}; then, and this is the answer:
        dense sample, pruned sample, and `cut`'s result with latent_error, psnr, ssim; ms_dense, ms_pruned:
        milliseconds for this image, after a warm-up; step_ms_dense, step_ms_pruned: for a time step of it, a
        median; speedup: of a denoiser call, (low, ratio, high), 95 %, measured in turn, or None where the
        machine is too busy to say; peak_dense, peak_pruned: bytes on the GPU at most, weights and all,
        or None
    """
    made, facts = plan(run, ratio), cut(run, ratio)
    opened = server().store.open(run)
    known = opened.known
    if not prompt.strip():
        raise BudgetError("Write a prompt first: what should be drawn?")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise BudgetError(f"An image takes 1 to {MAX_STEPS} time steps here, not {steps}.")
    options = known.drawing(steps, guidance_scale)
    asked = [(prompt, int(seed))]
    task = DrawImages(str(opened.folder), [made], asked, options, compensate, timed=True)
    samples = []
    for sample in results(task):
        samples.append(sample)
        if len(samples) == 1:
            yield sample, None, {}
    facts |= asdict(fidelity(*samples)) | {"speedup": samples[1].speedup}
    for name, sample in zip(("dense", "pruned"), samples, strict=True):
        facts |= {f"ms_{name}": sample.milliseconds, f"step_ms_{name}": sample.step_milliseconds}
        facts |= {f"peak_{name}": sample.peak_bytes}
    yield samples[0], samples[1], facts


def sizes(
    run: str, ratios: Sequence[float], count: int = 8, compensate: bool = True
) -> Iterator[tuple[tuple[Sample, ...], dict]]:
    """Draw held-out prompts with the dense model and at several sizes, from the same noise.

    Args:
        ratios: fractions of the denoiser's parameters removed, up to four.
        count: how many prompts, 1 to 32; prompt i is drawn with seed i.

    Yields:
        for each prompt: the samples, dense first, and {"prompt", "seed", "ratios", "latent_error",
        "psnr", "ssim": a number a size}
    """
    if not 1 <= len(ratios) <= MAX_SIZES or not 1 <= int(count) <= MAX_PROMPTS:
        raise BudgetError(f"Choose 1 to {MAX_SIZES} sizes and 1 to {MAX_PROMPTS} prompts.")
    plans = [plan(run, ratio) for ratio in sorted(ratios)]
    opened = server().store.open(run)
    asked = list(zip(opened.judged_on[: int(count)], range(int(count)), strict=False))
    task = DrawImages(str(opened.folder), plans, asked, opened.known.drawing(), compensate)
    drawn = results(task)
    for (prompt, seed), *samples in zip(asked, *[drawn] * (1 + len(plans)), strict=False):
        measured = [asdict(fidelity(samples[0], pruned)) for pruned in samples[1:]]
        found = {name: [row[name] for row in measured] for name in measured[0]}
        yield tuple(samples), {"prompt": prompt, "seed": seed, "ratios": sorted(ratios), **found}


def pictures(run: str) -> dict:
    """What was drawn of a run so far: a few prompts that nothing is learned on, at some sizes.

    Returns:
        {"prompts", "dense": images, "sizes": [{"asked", "ratio", "step": of learning, "repaired", "images",
        "latent_error", "psnr": one a prompt}]}, or {}; an image is a data URI
    """
    return load(server().store.open(run).folder)


def picture(run: str) -> str:
    """One image of a run, for a list of runs: a data URI, or "" where nothing is drawn yet."""
    found = pictures(run)
    if not found:
        return ""
    if not found["sizes"]:
        return found["dense"][0]
    wanted = server().store.open(run).config.ratio
    nearest = min(found["sizes"], key=lambda size: abs(size["ratio"] - wanted))
    return nearest["images"][0]


def draw_pictures(run: str, ratio: float) -> dict:
    """Draw those prompts at another size, with repaired weights. Returns what `pictures` does."""
    opened = changeable(run)
    opened.plan(ratio)  # an impossible size is told before anything is loaded
    (found,) = results(DrawPictures(str(opened.folder), ratio))
    return found


def suggestions(run: str, prompt: str) -> list[str]:
    """Prompts that an embedded model knows, if it knows no word of this one: it was trained on such alone."""
    known = server().store.open(run).known
    if not known.embedded:
        return []
    captions = known.prompts("calibration") + known.prompts("heldout")
    if _words(prompt) & set().union(*map(_words, captions)):
        return []
    near = get_close_matches(prompt.lower(), captions, n=3, cutoff=0.0)
    return list(dict.fromkeys([*near, *captions[:3]]))[:4]


def _words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}", prompt.lower())) - {"the", "and", "with"}


def defaults(run: str) -> dict:
    """How a run's model draws by default: {"steps", "guidance_scale": 0 without guidance}."""
    known = server().store.open(run).known
    return {"steps": known.steps, "guidance_scale": known.guidance_scale or 0}


def survey(run: str, ratios: list[float], count: int = 8, compensate: bool = True) -> Iterator[dict]:
    """What `sizes` measures, so far.

    Yields:
        {"means": a row a size, "rows": a row a prompt}, after each prompt
    """
    rows: list[dict] = []
    for _, row in sizes(run, ratios, count, compensate):
        rows.append(row)
        yield {"means": means(rows), "rows": list(rows)}


def means(rows: Sequence[dict]) -> list[dict]:
    """Of `sizes`' rows, the mean of each measure at each size, as {"ratio", "latent_error", ...}."""
    ratios = rows[0]["ratios"] if rows else []
    return [
        {"ratio": ratio} | {m: fmean(row[m][at] for row in rows) for m in ("latent_error", "psnr", "ssim")}
        for at, ratio in enumerate(ratios)
    ]

"""Healing what was cut from a run: its state and its result are kept in the run's folder."""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout

from ..config import HealConfig
from ..errors import BudgetError, RunError
from ..learning.heal import facts, heal, judged
from ..metrics.fidelity import compare
from ..pruning.components import weights_of
from ..pruning.plan import PrunePlan
from ..pruning.slicing import variant
from ..storage import write_json, write_tensors
from .folder import Run

HEALED_PROMPTS = 8  # held out, to judge healing by


def heal_settings(run: Run, steps: int, repair: int) -> HealConfig:
    """How a run's variant is healed: what was asked of learning holds for that too.

    What compensation read already is not repaired by again: it would give the same weights.

    Raises:
        BudgetError: nothing is left to do.
    """
    config = HealConfig(**run.compensation.sampling(), steps=steps, repair=repair)
    if not repair or config.compensation != run.compensation:
        return config
    if not steps:
        raise BudgetError(
            f"Weights of this run are repaired by {repair} trajectories already, so that changes nothing. "
            "Ask for more, or for steps of training."
        )
    return replace(config, repair=0)


def heal_run(
    run: Run,
    plan: PrunePlan,
    steps: int,
    repair: int,
    dense: DiffusionPipeline,
    before: DiffusionPipeline,
    device_lock: AbstractContextManager,
    budget: float | None = None,
) -> Iterator[dict]:
    """Heal a run's variant; if it got closer, its weights take the place of the compensated ones.

    Args:
        steps, repair: see `heal_settings`.
        dense, before: the dense pipeline, and the compensated one that `plan` cut.
        device_lock: held during each step.
        budget: seconds; at least one step is made.

    Yields:
        {"step", "loss", "seconds"} after every batch that is recorded and every step, and last what `healed`
        reads. The state is on disk.

    Raises:
        BudgetError: see `heal_settings`.
        RunError: another process is working on the run.
    """
    begun, slowest = time.monotonic(), 0.0
    config = heal_settings(run, steps, repair)
    state = run.folder / "healing" / f"{plan.digest}-{config.repair}"
    try:
        with FileLock(run.folder / ".lock", timeout=0):
            small = copy.copy(before)  # it gets a denoiser of its own
            healing = heal(small, dense, run.learned_on, config, state)
            while True:
                started = time.monotonic()
                with device_lock:  # others draw between steps
                    done = next(healing, None)
                if done is None:
                    break
                slowest = max(slowest, time.monotonic() - started)
                yield {"step": done[0], "loss": done[1], "seconds": time.monotonic() - started}
                over = time.monotonic() - begun + 1.5 * slowest > (budget or float("inf"))
                if run.stop_requested or (over and (done[1] is None or done[0] < config.total_steps)):
                    healing.close()
                    return
            with device_lock:
                yield _judged(run, plan, config, dense, before, small)
    except Timeout:
        raise RunError("The run is being worked on already.") from None


def _judged(
    run: Run,
    plan: PrunePlan,
    config: HealConfig,
    dense: DiffusionPipeline,
    before: DiffusionPipeline,
    small: DiffusionPipeline,
) -> dict:
    """Compare before and after on held-out prompts; keep the healed weights if they are closer."""
    known, kept = run.known, run.folder / "variants"
    prompts = run.judged_on[:HEALED_PROMPTS]
    was, now = (judged(compare(dense, pipe, prompts, **known.drawing())) for pipe in (before, small))
    result = {"before": was["latent_error"], "after": now["latent_error"]}
    result |= {"steps": config.steps, "repair": config.repair}
    if result["after"] < result["before"]:
        plain = weights_of(variant(dense, plan))
        weights = {n: w for n, w in weights_of(small).items() if not w.equal(plain[n])}
        file = kept / f"{plan.digest}.healed.safetensors"
        write_tensors(file, weights, {})
        about = result | {"facts": facts(config, was, now, len(prompts))}
        write_json(kept / f"{plan.digest}.json", about)
    return result


def healed(folder: Path, plan: PrunePlan) -> dict | None:
    """{"before", "after": latent error, "steps", "facts"} of a run's variant that was healed; else None."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "variants" / f"{plan.digest}.json").read_text(encoding="utf-8"))
    return None

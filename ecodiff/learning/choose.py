"""The best of several orders, measured: no order of removal wins on every model and at every size.

Orders that share their statistics cost nothing more to make. Each is cut at the size that was asked for,
repaired, and compared with the dense model on trajectories that neither ranking nor repair has seen.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import CompensateConfig
from ..errors import exhausted
from ..pruning.plan import PrunePlan
from ..pruning.slicing import variant
from .calibration import Calibration, missing, record
from .compensate import compensate_
from .objective import Objective
from .progress import Progress
from .trajectory import trajectory

BATCHES = 4  # of held-out trajectories
REPAIR, CHECK = 24, 4  # trajectories that weights are repaired by, and of them those that only check


def measured(
    objective: Objective, plans: Mapping[str, PrunePlan], kept: Progress | None = None
) -> dict[str, float]:
    """{order: latent error of its plan, repaired}; nothing if there is no memory for a pruned model too.

    The geometric mean over trajectories of ||z_0 - z_0'||^2 over the dense latents' variance: one trajectory
    that turns off into another image outweighs all others in a plain mean.

    Args:
        kept: where recorded calls and errors of batches are kept.

    Raises:
        Paused: the time of this call is up.
    """
    kept = kept or Progress()
    config, pipe = objective.config, objective.pipe
    sampling = {n: getattr(config, n) for n in ("inference_steps", "guidance_scale", "size", "extra", "seed")}
    repair = CompensateConfig(trajectories=REPAIR, heldout=CHECK, batch=config.batch, **sampling)
    batches = range(config.warm_steps, config.warm_steps + BATCHES)
    try:
        folder = kept.folder / "repair" if kept.folder and kept.pauses else None
        for rows in missing(repair, folder):
            list(record(pipe, objective.prompts, repair, folder, objective.count, [rows]))
            if rows in missing(repair, folder):  # it cannot be kept: a pause would lose it again and again
                break
            kept.pause()
        calibration, errors = None, {}
        for name, plan in plans.items():
            done, part = kept.load(f"error-{name}")
            logs = part.get("logs", torch.empty(0))
            if done < BATCHES:
                calibration = calibration or Calibration(pipe, objective.prompts, repair, folder)
                small = variant(pipe, plan)
                compensate_(small, pipe, calibration=calibration)
                with trajectory(small, False, objective.count) as run, torch.no_grad():
                    for number, batch in enumerate(batches[done:], done + 1):
                        z0 = run(**objective.call(batch))
                        logs = torch.cat([logs, _log_errors(objective, batch, z0)])
                        kept.keep(f"error-{name}", {"logs": logs}, number)
            errors[name] = float(logs.mean().exp())
        return errors
    except (RuntimeError, MemoryError) as error:
        if not exhausted(error):
            raise
        return {}


def _log_errors(objective: Objective, batch: int, z0: Tensor) -> Tensor:
    """Logarithm of the relative error of each trajectory, (rows,)."""
    target = objective.target(batch)[0].flatten(1)
    error = (z0.float().flatten(1) - target).square().mean(1) / target.var(1)
    return error.clamp_min(1e-12).log().cpu()

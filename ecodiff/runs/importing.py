"""Runs that need no learning: of what somebody else learned."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoints.importers import import_files
from ..checkpoints.loading import empty_denoiser
from ..checkpoints.text_encoders import counted
from ..config import LearnConfig
from ..pruning.plan import PrunePlan
from .folder import Run


def import_run(folder: Path, model: str, config: LearnConfig, files: Sequence[str | Path]) -> Run:
    """A run made of a plan, a pruned folder's zip, or EcoDiff's masks (see `checkpoints.importers`).

    Raises:
        CheckpointError, PlanError: the files hold nothing that fits the model.
    """
    found = import_files(files, empty_denoiser(model))
    facts = found.metadata | {"model": model}
    if isinstance(found, PrunePlan) and found.text_encoders:
        facts["text_encoders"] = counted(found, model)
    run = Run.create(folder, model, config, [], "imported")
    run.imported = True
    if isinstance(found, PrunePlan):
        PrunePlan(found, facts).save(run.folder / "plan.safetensors")
    else:
        replace(found, metadata=facts).save(run.folder / "scores.safetensors")
    run.save()
    return run

"""What was cut of a pipeline: of its denoiser, and of its text encoders."""

from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..pipelines import denoiser_of
from .plan import PrunePlan
from .slicing import description_of, plan_of


def plan_of_pipeline(pipe: DiffusionPipeline) -> PrunePlan | None:
    """The plan that a pipeline's denoiser and text encoders were cut by; None if the denoiser is dense."""
    plan = plan_of(denoiser_of(pipe))
    if plan is None:
        return None
    cut = {n: plan_of(part) for n, part in pipe.components.items() if n.startswith("text_encoder") and part}
    keep = {f"{n}.{group}": units for n, part in cut.items() if part for group, units in part.items()}
    return PrunePlan({**plan, **keep}, plan.metadata, plan.bases) if keep else plan


def weights_of(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights of what was cut of a pipeline, those of text encoders under their component's name."""
    weights = dict(denoiser_of(pipe).state_dict())
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None and plan_of(part):
            weights |= {f"{name}.{path}": weight for path, weight in part.state_dict().items()}
    return weights


def forget_layers_(encoder: nn.Module) -> None:
    """Let a pruned text encoder that lost whole layers say nothing of them: its config describes the rest."""
    description: Any = description_of(encoder)
    if not description:
        return
    there = {name for name, _ in encoder.named_modules()}
    for part in ("shapes", "attributes", "scattered", "ropes", "biases"):
        found = description.get(part, {})
        description[part] = {path: facts for path, facts in found.items() if path in there}

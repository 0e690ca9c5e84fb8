"""Healing: a pruned denoiser is repaired on many more trajectories, then distilled towards its dense one.

For sizes beyond what pruning and compensation alone keep close: the paper's light retraining, without
images. First every layer that lost inputs is solved for once more, call by call as in `compensate`, on
hundreds of dense trajectories. Then low-rank updates (LoRA, arXiv 2106.09685) of the layers that lost units
are trained: the data are prompts and noise, the loss is the mean of log(e + 0.01), e the relative error of a
trajectory's final latents; trajectories are checkpointed step by step like those of learning masks.
Before the first step, after the last and three times between, the weights are measured on prompts and noise
that no step is trained on; the best are merged. Everything that a step draws comes from its number, so it
goes on anywhere, like a run.
"""

import copy
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import cos, exp, isfinite, pi
from pathlib import Path
from statistics import fmean, geometric_mean

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..config import HealConfig
from ..errors import BudgetError, LearningError, OutOfMemoryError, PlanError
from ..pipelines import call_options, denoiser_name, denoiser_of, prompt_rows
from ..pruning.plan import PrunePlan
from ..pruning.slicing import check, kept_features, plan_of, variant
from ..storage import write_tensors
from .calibration import Calibration, Call, fewer_passes, missing, record
from .checkpointing import gradients
from .compensate import repair_
from .heal_state import STATE_FORMAT, Best, load, read, save
from .streaming import streamed
from .trajectory import trajectory

REPAIRED = "repaired.safetensors"
ADAPTER = "heal"
CHECKS = 4  # of the weights while they are trained, besides one before
SEEN = 0.01  # a relative error far below it counts for little in the loss


@dataclass(frozen=True)
class _Healing:
    """What the parts of a healing are given: the arguments of `heal`, the plan, and whose state it is."""

    plan: PrunePlan
    pipe: DiffusionPipeline
    prompts: Sequence[str]
    config: HealConfig
    folder: Path | None
    key: str
    on_step: Callable[[], None] | None
    targets: dict[int, Tensor] = field(default_factory=dict)

    def call(self, batch: int) -> dict:
        """The pipeline's arguments for one batch of trajectories; generators in it are used up by one run.

        An eighth of the prompts, if there are as many, are those of the batches that weights are checked on.
        """
        config, trained = self.config, len(self.prompts) - len(self.prompts) // 8
        prompts = self.prompts[trained:] if batch in config.checked else self.prompts[:trained]
        rows = range(batch * config.batch, (batch + 1) * config.batch)
        options = call_options(
            self.pipe, config.inference_steps, config.guidance_scale, config.size, config.extra
        )
        return prompt_rows(prompts or self.prompts, rows, config.seed, options)

    def target(self, batch: int) -> Tensor:
        """Final latents of the dense model for that batch, in float32; computed once."""
        if batch not in self.targets:
            with trajectory(self.pipe, False, self.on_step) as run, torch.no_grad():
                self.targets[batch] = run(**self.call(batch)).float()
        return self.targets[batch]


def heal(
    small: DiffusionPipeline,
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    config: HealConfig | None = None,
    folder: Path | None = None,
    on_step: Callable[[], None] | None = None,
) -> Generator[tuple[int, float | None], None, None]:
    """Heal a pruned pipeline; yields (done, loss): batches recorded for the repair, then steps.

    The loss is the e for which log(e + 0.01) is the mean of those of a batch's relative errors. Batches of
    the repair have none, nor has a batch of a check, which is no step. Weights change with the last batch of
    the repair, and at the end.

    Args:
        small: a pruned pipeline; it gets a denoiser of its own, so a variant's dense model is not touched.
        pipe: its dense pipeline.
        prompts: for the trajectories; no images are needed.
        folder: where the state is kept; what is there is gone on from.
        on_step: called before every denoiser call; raise in it to stop. The step is then lost.

    Raises:
        BudgetError: there are no prompts.
        PlanError: `small` is not pruned, or is of another model.
        CheckpointError: the state in `folder` is of another cut or of settings that differ in more than
            steps.
        LearningError, OutOfMemoryError: the loss is not a number; weights of `small` are streamed.

    Example:
        >>> for step, loss in heal(small, pipe, prompts, HealConfig(steps=200)):
        ...     print(step, loss)
        >>> ecodiff.save(small, "healed")
    """
    config = config or HealConfig()
    plan = _checked(prompts, denoiser_of(small), denoiser_of(pipe))
    student = copy.deepcopy(denoiser_of(small)).requires_grad_(False).eval()
    small.register_modules(**{denoiser_name(small): student})
    # More steps go on from fewer; anything else that changes is another healing.
    key = json.dumps([plan.digest, repr(replace(config, steps=1))])
    healing = _Healing(plan, pipe, prompts, config, folder, key, on_step)
    for batch in _repair(student, healing) if config.repair else ():
        yield batch, None
    for step, loss in _train(small, healing) if config.steps else ():
        yield config.batches + step, loss


def _train(small: DiffusionPipeline, healing: _Healing) -> Generator[tuple[int, float | None], None, None]:
    """Distil low-rank updates, and merge the best; yields (steps done, loss)."""
    student, best = denoiser_of(small), Best()
    lora, parameters = _add_lora(student, denoiser_of(healing.pipe), healing.plan, healing.config)
    try:
        yield from _steps(small, healing, parameters, best)
        for name, weight in best.weights.items():
            parameters[name].data.copy_(weight)
        lora.merge_adapter()
    finally:
        lora.unload()
        student.__dict__.pop("peft_config", None)  # older versions of peft leave it
        student.requires_grad_(False)


def _steps(
    small: DiffusionPipeline, healing: _Healing, parameters: dict[str, nn.Parameter], best: Best
) -> Generator[tuple[int, float | None], None, None]:
    """Train `parameters`, and check them meanwhile; yields (steps done, loss). Its state is kept."""
    config, file, step = healing.config, healing.folder and healing.folder / "state.safetensors", 0
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.rate, weight_decay=0.0)
    checks = {config.steps * part // CHECKS for part in range(CHECKS + 1)}
    if file and file.exists():
        step = load(file, healing.key, parameters, optimizer, best)
    try:
        while True:
            for _ in _check(small, healing, parameters, best) if step in checks else ():
                yield step, None
            if step >= config.steps:
                return
            batch = step % (config.trajectories // config.batch)
            target = healing.target(batch)
            optimizer.param_groups[0]["lr"] = config.rate * 0.5 * (1 + cos(pi * step / config.steps))
            loss = _step(small, healing.call(batch), target, optimizer, healing.on_step)
            step, best.losses = step + 1, []
            if file and step % max(1, config.steps // 20) == 0:
                save(file, healing.key, step, parameters, optimizer, best)
            yield step, loss
    finally:
        if file and (step or best.losses):
            save(file, healing.key, step, parameters, optimizer, best)


def _check(
    small: DiffusionPipeline, healing: _Healing, parameters: Mapping[str, nn.Parameter], best: Best
) -> Iterator[None]:
    """Measure the weights as they are, and keep them if they are the best; yields after each batch."""
    for batch in healing.config.checked[len(best.losses) :]:
        target = healing.target(batch)
        with trajectory(small, False, healing.on_step) as run, torch.no_grad():
            best.losses.append(float(_loss(run(**healing.call(batch)), target)))
        yield
    if (loss := fmean(best.losses)) < best.loss:
        best.loss = loss
        best.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _repair(student: nn.Module, healing: _Healing) -> Iterator[int]:
    """Solve for the layers that were cut; yields the number of each batch that is newly recorded.

    From the weights that slicing left: pulled towards those that fewer trajectories gave, layers keep what
    they owe to those. Recorded calls are kept in `folder` until the last is there, and then what they gave.
    """
    folder, dense = healing.folder, denoiser_of(healing.pipe)
    file, kept = (folder / REPAIRED, folder / "calls") if folder else (None, None)
    settings = fewer_passes(healing.config.compensation, dense.device)
    if file and file.exists():
        _put(student, read(file, healing.key)[1])
        return
    calls = list[Call]()
    for number, rows in enumerate(settings.batches, 1):
        new = kept is None or rows in missing(settings, kept)
        for made in record(healing.pipe, healing.prompts, settings, kept, healing.on_step, [rows]):
            calls += made
        if number == healing.config.batches:
            calibration = Calibration.of_calls(dense, calls, settings)
            sliced = denoiser_of(variant(healing.pipe, healing.plan))
            better = {layer for layer, better in repair_(sliced, calibration).items() if better}
            found = {n: p for n, p in sliced.named_parameters() if n.rpartition(".")[0] in better}
            _put(student, found)
            if file and kept:
                write_tensors(file, found, {"format": STATE_FORMAT, "key": healing.key})
                shutil.rmtree(kept, ignore_errors=True)
        if new or number == healing.config.batches:
            yield number


def _put(student: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        like = student.get_parameter(name)
        parameter = nn.Parameter(weight.detach().to(like.device, like.dtype), requires_grad=False)
        setattr(student.get_submodule(path), leaf, parameter)


def _checked(prompts: Sequence[str], pruned: nn.Module, teacher: nn.Module) -> PrunePlan:
    plan = plan_of(pruned)
    if not prompts:
        raise BudgetError("Healing needs at least one prompt.")
    if plan is None:
        raise PlanError("This model is not pruned, so there is nothing to heal.")
    if streamed(pruned):
        raise OutOfMemoryError(
            "Healing needs all weights of the pruned model on the device, and they do not fit. Heal it on a "
            "larger device, or on a CPU."
        )
    check(plan, teacher)
    return plan


def judged(found: Mapping) -> dict[str, float]:
    """Means of what `fidelity.compare` found; of latent errors the geometric one."""
    errors = [max(row["latent_error"], 1e-12) for row in found["rows"]]
    return found["mean"] | {"latent_error": geometric_mean(errors)}


def facts(config: HealConfig, before: Mapping[str, float], after: Mapping[str, float], count: int) -> dict:
    """What a healed model's card says: {what: in words}, from what `judged` gives."""
    errors = f"{before['latent_error']:.4f} → {after['latent_error']:.4f}"
    done = [f"repaired by {config.repair} trajectories"] if config.repair else []
    steps = "1 step" if config.steps == 1 else f"{config.steps} steps"
    lora = f"{steps}, LoRA of rank {config.rank}, merged as it was best on trajectories held out"
    done += [lora] if config.steps else []
    return {
        "healed": "; ".join(done),
        f"latent error, geometric mean of {count} prompts, before → after": errors,
        "PSNR, before → after": f"{before['psnr']:.1f} → {after['psnr']:.1f} dB",
    }


def _add_lora(student: nn.Module, teacher: nn.Module, plan: Mapping[str, Tensor], config: HealConfig):
    """LoRA on every layer that lost units and has some left; returns it, and what is trained, by name."""
    from peft import LoraConfig, LoraModel

    cut = {name for (name, _), rows in kept_features(teacher, plan).items() if not rows.all()}
    modules = {name: module for name, module in student.named_modules() if name in cut}
    plain = {  # convolutions of groups: peft cannot merge them
        name
        for name, m in modules.items()
        if type(m) in (nn.Linear, nn.Conv2d) and min(m.weight.shape) and getattr(m, "groups", 1) == 1
    }
    if not plain:
        raise PlanError("No layer that lost units has some left, so there is nothing to train.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        layers = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=sorted(plain))
        lora = LoraModel(student, layers, ADAPTER)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    for parameter in trained.values():  # Adam's steps are lost in 16 bits, and its epsilon is 0 in float16
        parameter.data = parameter.data.float()
    return lora, trained


def _loss(z0: Tensor, target: Tensor) -> Tensor:
    """Mean of log(e + 0.01), e the relative error of the final latents (batch, ...) of each trajectory.

    A few trajectories turn off into another image: their error is hundreds of times that of others, and would
    be all that a plain mean sees. With the logarithm their gradients weigh no more than those of others.
    """
    z0, target = z0.float().flatten(1), target.flatten(1)
    errors = (z0 - target).square().mean(1) / target.var(1)
    return (errors + SEEN).log().mean()


def _step(small: DiffusionPipeline, call: dict, target: Tensor, optimizer, on_step) -> float:
    """One step of AdamW on a batch of trajectories; returns their typical error (see `_loss`)."""
    parameters = optimizer.param_groups[0]["params"]
    with trajectory(small, True, on_step, trained=parameters) as run:
        z0 = run(**call)
        loss = _loss(z0, target)
        found = gradients(loss, z0, parameters)
    if not isfinite(float(loss.detach())):
        raise LearningError("Healing gave a loss that is not a number. Try a lower rate.")
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return exp(float(loss.detach())) - SEEN

"""Healing: a pruned denoiser is repaired on many more trajectories, then distilled towards its dense one.

For sizes beyond what pruning and compensation alone keep close: the paper's light retraining, without
images. First every layer that lost inputs is solved for once more, call by call as in `compensate`, on
hundreds of dense trajectories. Then low-rank updates (LoRA, arXiv 2106.09685) of the layers that lost units
are trained, and merged at the end: the data are prompts and noise, the loss is that of learning masks, the
relative error of the final latents over whole trajectories, checkpointed step by step like those.
Everything that a step draws comes from its number, so it goes on anywhere, like a run.
"""

import copy
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import cos, isfinite, pi
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import HealConfig
from ..errors import BudgetError, CheckpointError, LearningError, OutOfMemoryError, PlanError
from ..pipelines import call_options, denoiser_name, denoiser_of, prompt_rows
from ..pruning.plan import PrunePlan
from ..pruning.slicing import check, kept_features, plan_of, variant
from ..storage import write_tensors
from .calibration import Calibration, Call, fewer_passes, missing, record
from .checkpointing import gradients
from .compensate import repair_
from .streaming import streamed
from .trajectory import trajectory

STATE_FORMAT = "ecodiff.heal.1"
REPAIRED = "repaired.safetensors"
ADAPTER = "heal"


@dataclass(frozen=True)
class _Healing:
    """What both parts of a healing are given: the arguments of `heal`, the plan, and whose state it is."""

    plan: PrunePlan
    pipe: DiffusionPipeline
    prompts: Sequence[str]
    config: HealConfig
    folder: Path | None
    key: str
    on_step: Callable[[], None] | None


def heal(
    small: DiffusionPipeline,
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    config: HealConfig | None = None,
    folder: Path | None = None,
    on_step: Callable[[], None] | None = None,
) -> Generator[tuple[int, float | None], None, None]:
    """Heal a pruned pipeline; yields (done, loss): batches recorded for the repair, then steps.

    Batches have no loss. Weights change with the last of them, and with the last step.

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


def _train(small: DiffusionPipeline, healing: _Healing) -> Generator[tuple[int, float], None, None]:
    """Distil low-rank updates, and merge them at the end; yields (steps done, loss)."""
    student, targets, config = denoiser_of(small), dict[int, Tensor](), healing.config
    lora, parameters = _add_lora(student, denoiser_of(healing.pipe), healing.plan, config)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.rate, weight_decay=0.0)
    file, step = healing.folder and healing.folder / "state.safetensors", 0
    try:
        if file and file.exists():
            step = _load(file, healing.key, parameters, optimizer)
        while step < config.steps:
            batch = step % (config.trajectories // config.batch)
            call = partial(_call, healing.pipe, healing.prompts, batch, config)
            if batch not in targets:
                targets[batch] = _target(healing.pipe, call(), healing.on_step)
            optimizer.param_groups[0]["lr"] = config.rate * 0.5 * (1 + cos(pi * step / config.steps))
            loss = _step(small, call(), targets[batch], optimizer, healing.on_step)
            step += 1
            if file and (step == config.steps or step % max(1, config.steps // 20) == 0):
                _save(file, healing.key, step, parameters, optimizer)
            yield step, loss
        lora.merge_adapter()
    finally:
        if file and 0 < step < config.steps:
            _save(file, healing.key, step, parameters, optimizer)
        lora.unload()
        student.__dict__.pop("peft_config", None)  # older versions of peft leave it
        student.requires_grad_(False)


def _repair(student: nn.Module, healing: _Healing) -> Iterator[int]:
    """Solve for the layers that were cut; yields the number of each batch that is newly recorded.

    From the weights that slicing left: pulled towards those that fewer trajectories gave, layers keep what
    they owe to those. Recorded calls are kept in `folder` until the last is there, and then what they gave.
    """
    folder, dense = healing.folder, denoiser_of(healing.pipe)
    file, kept = (folder / REPAIRED, folder / "calls") if folder else (None, None)
    settings = fewer_passes(healing.config.compensation, dense.device)
    if file and file.exists():
        _put(student, _read(file, healing.key)[1])
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


def _target(pipe: DiffusionPipeline, call: dict, on_step) -> Tensor:
    with trajectory(pipe, False, on_step) as run, torch.no_grad():
        return run(**call).float()


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


def facts(config: HealConfig, before: Mapping[str, float], after: Mapping[str, float], count: int) -> dict:
    """What a healed model's card says: {what: in words}, from the means of `fidelity.compare`."""
    errors = f"{before['latent_error']:.4f} → {after['latent_error']:.4f}"
    done = [f"repaired by {config.repair} trajectories"] if config.repair else []
    steps = "1 step" if config.steps == 1 else f"{config.steps} steps"
    done += [f"{steps}, LoRA of rank {config.rank}, merged"] if config.steps else []
    return {
        "healed": "; ".join(done),
        f"latent error, mean of {count} prompts, before → after": errors,
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


def _call(pipe: DiffusionPipeline, prompts: Sequence[str], batch: int, config: HealConfig) -> dict:
    """The pipeline's arguments for one batch of trajectories; generators in it are used up by one run."""
    rows = range(batch * config.batch, (batch + 1) * config.batch)
    options = call_options(pipe, config.inference_steps, config.guidance_scale, config.size, config.extra)
    return prompt_rows(prompts, rows, config.seed, options)


def _step(small: DiffusionPipeline, call: dict, target: Tensor, optimizer, on_step) -> float:
    """One step of AdamW on a batch of trajectories; returns its loss."""
    parameters = optimizer.param_groups[0]["params"]
    with trajectory(small, True, on_step, trained=parameters) as run:
        z0 = run(**call)
        loss = (z0.float() - target).square().mean() / target.var()
        found = gradients(loss, z0, parameters)
    if not isfinite(float(loss.detach())):
        raise LearningError("Healing gave a loss that is not a number. Try a lower rate.")
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return float(loss.detach())


def _save(file: Path, key: str, step: int, parameters: dict[str, nn.Parameter], optimizer) -> None:
    """LoRA weights and Adam's moments, replaced atomically."""
    tensors = {f"weight|{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{what}|{name}": value for what, value in moments.items()}
    write_tensors(file, tensors, {"format": STATE_FORMAT, "key": key, "step": str(step)})


def _load(file: Path, key: str, parameters: dict[str, nn.Parameter], optimizer) -> int:
    """Put the state back; returns the steps that are done."""
    header, stored = _read(file, key)
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(stored[f"weight|{name}"])
            if f"step|{name}" not in stored:  # it never had a gradient
                continue
            optimizer.state[parameter] = {"step": stored[f"step|{name}"]} | {
                what: stored[f"{what}|{name}"].to(parameter.device) for what in ("exp_avg", "exp_avg_sq")
            }
        return int(header["step"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The healing state in {file} cannot be read: {error}") from None


def _read(file: Path, key: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file of this healing; CheckpointError if it is another's."""
    try:
        with safe_open(file, "pt") as stored:
            header, names = stored.metadata() or {}, list(stored.keys())
            if (header.get("format"), header.get("key")) != (STATE_FORMAT, key):
                raise CheckpointError(
                    f"{file} is of another model or other settings. Give another folder, or the same "
                    "settings."
                )
            return header, {name: stored.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The healing state in {file} cannot be read: {error}") from None

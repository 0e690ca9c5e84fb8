"""Healing: exact gradients through the trajectory, resumable, merged, the dense model untouched."""

import sys
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import fmean

import pytest
import torch

import ecodiff
from ecodiff import catalog
from ecodiff.app import server, service
from ecodiff.config import HEAL_REPAIR, HealConfig
from ecodiff.errors import BudgetError, CheckpointError, PlanError, RunError
from ecodiff.learning.heal import _add_lora, _Healing, heal
from ecodiff.learning.trajectory import trajectory
from ecodiff.metrics.fidelity import generate
from ecodiff.pipelines import denoiser_of, prompt_rows
from ecodiff.pruning.slicing import plan_of
from ecodiff.runs import healing
from ecodiff.runs.folder import Run
from tests.checkpoints.test_folders import drawn_by_diffusers_alone, some_plan
from tests.conftest import PROMPT, latents, short

pytest.importorskip("peft")
CONFIG = HealConfig(repair=0, steps=4, batch=2, trajectories=4, rank=2, rate=1e-3, inference_steps=3)
PROMPTS = [PROMPT, "cat"]


def test_gradients_of_weights_do_not_depend_on_recomputation(pipe):
    small = ecodiff.variant(pipe, some_plan(pipe))
    small.to(torch.float64)
    student = denoiser_of(small)
    parameters = list(_add_lora(student, denoiser_of(pipe), plan_of(student), CONFIG)[1].values())
    for parameter in parameters:
        parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.05
    call = {"num_inference_steps": 3} | short(pipe)
    found = []
    for checkpoint in (True, False):
        with trajectory(small, checkpoint, trained=parameters) as run:
            loss = run(**prompt_rows(PROMPTS, range(2), 0, call)).square().mean()
            found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found[0])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_a_layer_that_nothing_reads_does_not_stop_it_from_going_on(tiny_sdxl, tmp_path, monkeypatch):
    """Some layers never get a gradient, so Adam has no moments of theirs."""
    real = torch.autograd.grad

    def without_the_first(outputs, inputs, *args, **kwargs):
        found = real(outputs, inputs, *args, **kwargs)
        healing = isinstance(inputs, list) and all(isinstance(i, torch.nn.Parameter) for i in inputs)
        return (None, *found[1:]) if healing else found

    monkeypatch.setattr(torch.autograd, "grad", without_the_first)
    plan = some_plan(tiny_sdxl)
    for step, _ in heal(ecodiff.variant(tiny_sdxl, plan), tiny_sdxl, PROMPTS, CONFIG, tmp_path):
        if step == 2:
            break
    rest = list(heal(ecodiff.variant(tiny_sdxl, plan), tiny_sdxl, PROMPTS, CONFIG, tmp_path))
    assert [step for step, loss in rest if loss is not None] == [3, 4]


def test_it_comes_closer_goes_on_anywhere_and_leaves_the_dense_model_alone(tiny_sdxl, tmp_path):
    plan, before = some_plan(tiny_sdxl), latents(tiny_sdxl)
    config = replace(CONFIG, steps=8)

    def healed(folder=None, stop=None):
        small = ecodiff.variant(tiny_sdxl, plan)
        losses = []
        for step, loss in heal(small, tiny_sdxl, PROMPTS, config, folder):
            losses += [loss] if loss is not None else []
            if step == stop:
                break
        return small, losses

    whole, losses = healed()
    assert min(losses[-2:]) < losses[0], "it did not come closer"
    assert torch.equal(latents(tiny_sdxl), before), "the dense model was changed"
    stopped, _ = healed(tmp_path, stop=3)
    assert torch.equal(latents(stopped), latents(ecodiff.variant(tiny_sdxl, plan))), "half healed"
    resumed, rest = healed(tmp_path)
    assert len(rest) == 5 and rest == losses[3:]
    assert torch.equal(latents(resumed), latents(whole))
    assert not any("lora" in name for name, _ in denoiser_of(whole).named_modules())
    folder = ecodiff.save(whole, tmp_path / "healed")
    torch.testing.assert_close(latents(ecodiff.load(folder)), latents(whole), rtol=1e-4, atol=5e-4)
    with pytest.raises(CheckpointError, match="other settings"):
        next(heal(ecodiff.variant(tiny_sdxl, plan), tiny_sdxl, PROMPTS, replace(config, rank=3), tmp_path))
    more = ecodiff.variant(tiny_sdxl, plan)
    done = [step for step, _ in heal(more, tiny_sdxl, PROMPTS, replace(config, steps=10), tmp_path)]
    assert done == [9, 10, 10], "and a check"
    (tmp_path / "state.safetensors").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        next(heal(ecodiff.variant(tiny_sdxl, plan), tiny_sdxl, PROMPTS, config, tmp_path))
    with pytest.raises(PlanError, match="not pruned"):
        next(heal(tiny_sdxl, tiny_sdxl, PROMPTS, config))


def test_it_is_repaired_first_on_trajectories_that_are_recorded_as_it_goes(tiny_sdxl, tmp_path):
    plan, before = some_plan(tiny_sdxl), latents(tiny_sdxl)
    config = replace(CONFIG, repair=8, steps=0)

    def healed(config, folder=None, stop=None):
        small = ecodiff.variant(tiny_sdxl, plan)
        done = []
        for step, loss in heal(small, tiny_sdxl, PROMPTS, config, folder):
            if not done or step != done[-1][0]:  # batches of a check are no steps
                done.append((step, loss is None))
            if step == stop:
                break
        return small, done

    def error(small):
        return float((latents(small) - before).square().mean() / before.var())

    whole, done = healed(config)
    assert done == [(1, True), (2, True), (3, True), (4, True)]
    assert error(whole) < error(ecodiff.variant(tiny_sdxl, plan)), "it did not come closer"
    assert torch.equal(latents(tiny_sdxl), before), "the dense model was changed"
    closed = ecodiff.variant(tiny_sdxl, plan)
    ecodiff.compensate_(closed, tiny_sdxl, PROMPTS, config.compensation)
    assert torch.equal(latents(whole), latents(closed)), "the closed form of compensation"
    few = ecodiff.variant(tiny_sdxl, plan)
    ecodiff.compensate_(few, tiny_sdxl, PROMPTS, replace(config, repair=4).compensation)
    list(heal(few, tiny_sdxl, PROMPTS, config))
    assert torch.equal(latents(few), latents(closed)), "pulled towards what fewer trajectories gave"

    stopped, _ = healed(config, tmp_path, stop=2)
    assert torch.equal(latents(stopped), latents(ecodiff.variant(tiny_sdxl, plan))), "half repaired"
    resumed, rest = healed(config, tmp_path)
    assert rest == [(3, True), (4, True)] and torch.equal(latents(resumed), latents(whole))
    assert not (tmp_path / "calls").exists(), "calls are large, and not needed any more"
    again, rest = healed(config, tmp_path)
    assert not rest and torch.equal(latents(again), latents(whole))

    trained, done = healed(replace(config, steps=2), tmp_path)
    assert done == [(4, True), (5, False), (6, False)], "steps go on from what was repaired"
    at_once, done = healed(replace(config, steps=2))
    assert len(done) == 6 and torch.equal(latents(trained), latents(at_once))
    with pytest.raises(CheckpointError, match="other settings"):
        healed(replace(config, repair=12), tmp_path)


def test_the_best_weights_are_merged_not_the_last(tiny_sdxl, tmp_path, monkeypatch):
    """Checked on trajectories that nothing is trained on; the same wherever it is stopped."""
    plan, config = some_plan(tiny_sdxl), replace(CONFIG, steps=8, rate=0.1, trajectories=32, seed=1)
    module, seen, losses = sys.modules[heal.__module__], set(), []

    def healed(folder=None, stop=None):
        small = ecodiff.variant(tiny_sdxl, plan)
        for done, _ in enumerate(heal(small, tiny_sdxl, PROMPTS, config, folder), 1):
            if done == stop:
                break
        return small

    def rows_of(prompts, rows, *rest):
        seen.update(rows)
        return prompt_rows(prompts, rows, *rest)

    def mean(found):
        losses.append(fmean(found))
        return losses[-1]

    monkeypatch.setattr(module, "prompt_rows", rows_of)
    monkeypatch.setattr(module, "fmean", mean)
    monkeypatch.setattr(module, "cos", lambda _: 1.0)  # a rate that does not fall goes too far
    small = healed()
    assert list(config.checked) == [16, 17] and seen == {*range(16), *range(32, 36)}, "batches of two"
    assert len(losses) == 5 and losses[-1] != min(losses) != losses[0], "of no use here"
    found = []
    for batch in config.checked:
        made = (_Healing(plan, p, PROMPTS, config, None, "", None) for p in (tiny_sdxl, small))
        dense, cut = (healing.target(batch) for healing in made)
        errors = [float((a - b).square().mean() / b.var()) for a, b in zip(cut, dense, strict=True)]
        found += [log(error + 0.01) for error in errors]
    assert fmean(found) == pytest.approx(min(losses), abs=1e-3)
    for stop in range(1, 18, 3):  # of 8 steps and 5 checks of two batches
        healed(tmp_path / str(stop), stop)
        assert latents(healed(tmp_path / str(stop))).equal(latents(small)), stop


def test_an_eighth_of_the_prompts_only_checks(tiny_sdxl):
    config, prompts = replace(CONFIG, trajectories=32), [f"{number} cats" for number in range(17)]
    healing_ = _Healing(some_plan(tiny_sdxl), tiny_sdxl, prompts, config, None, "", None)
    trained = {prompt for batch in range(16) for prompt in healing_.call(batch)["prompt"]}
    checked = {prompt for batch in config.checked for prompt in healing_.call(batch)["prompt"]}
    assert trained == set(prompts[:15]) and checked == set(prompts[15:])


@pytest.mark.parametrize("changes", [{"repair": 0, "steps": 0}, {"repair": 3, "batch": 2}, {"steps": -1}])
def test_settings_that_heal_nothing_are_refused(changes):
    with pytest.raises(BudgetError, match="Healing needs"):
        HealConfig(**changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_healed_in_float32(tiny_sdxl, dtype):
    tiny_sdxl.to(dtype)
    plan = some_plan(tiny_sdxl)
    small = ecodiff.variant(tiny_sdxl, plan)
    losses = [loss for _, loss in heal(small, tiny_sdxl, PROMPTS, replace(CONFIG, steps=8)) if loss]
    assert len(losses) == 8 and min(losses[-2:]) < losses[0]
    healed, cut = denoiser_of(small), denoiser_of(ecodiff.variant(tiny_sdxl, plan))
    assert {p.dtype for p in healed.parameters()} == {dtype}
    changed = [n for n, p in cut.named_parameters() if not p.equal(healed.get_parameter(n))]
    assert len(changed) > 10


def test_a_run_is_healed_stopped_and_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "HEALED_PROMPTS", 2)
    server.use(server.Server(tmp_path))
    generator = torch.Generator().manual_seed(0)
    groups = ecodiff.find_groups(ecodiff.load("emoji-turbo").unet)
    plan = ecodiff.PrunePlan({g.name: torch.rand(g.size, generator=generator) > 0.5 for g in groups})
    run = service.import_("emoji-turbo", [plan.save(tmp_path / "plan.safetensors")])["run"]
    size = service.status(run)["size"]
    with pytest.raises(BudgetError, match="has one size"):
        service.cut(run, 0.9)
    *_, compensated = service.compare(run, size, "red apple")
    before = service.export(run, size)["name"]

    going = service.heal(run, size, 4, 8)
    steps = [0]
    while steps[-1] < 4:
        steps.append(next(going)["step"])
    assert set(steps) == {0, 1, 2, 3, 4} and steps == sorted(steps)
    with pytest.raises(RunError, match="being worked on"):
        list(service.heal(run, size, 4, 8))
    service.stop(run)
    assert [found["stage"] for found in going] == ["stopped"]
    found = list(service.heal(run, size, 4, 8))
    assert {f["step"] for f in found} == {4, 5, 6}, "it goes on where it was stopped, with a check"

    assert found[-1]["stage"] == "healed" and found[-1]["after"] < found[-1]["before"]
    *_, drawn = service.compare(run, size, "red apple")
    assert not drawn[1].latents.equal(compensated[1].latents), "images are the healed model's now"
    assert drawn[0].latents.equal(compensated[0].latents)
    made = service.export(run, size)
    assert made["name"] != before and "healed4" in made["name"]
    folder = Path(made["path"]).with_suffix("")
    assert (
        "repaired by 8 trajectories; 4 steps, LoRA of rank 16, merged" in (folder / "README.md").read_text()
    )
    assert drawn_by_diffusers_alone(folder, ecodiff.load("emoji-turbo"))["latents"].isfinite().all()
    again = ecodiff.load(folder)
    latents_ = generate(again, "red apple", 0, **catalog.find("emoji-turbo").drawing()).latents
    torch.testing.assert_close(latents_, drawn[1].latents, atol=0.05, rtol=0.05)  # saved as float16

    assert [f["stage"] for f in service.heal(run, size, 4, 8)][-1] in ("healed", "unchanged"), "once more"
    assert list(service.compare(run, size, "red apple"))[-1][1].latents.equal(drawn[1].latents), "merged once"
    assert [f["step"] for f in service.heal(run, size, 5, 8)][:1] == [7], "more steps go on"


def test_a_run_is_healed_as_it_was_learned_and_not_repaired_twice(tmp_path):
    known = catalog.find("emoji-turbo")

    def asked(steps, trajectories, **changes):
        config = replace(known.learn_config("thorough", 0.2), **changes)
        return healing.heal_settings(Run(tmp_path, known.name, config, []), steps, trajectories)

    assert asked(100, HEAL_REPAIR) == known.heal_config(steps=100, repair=0), "compensation did that"
    assert asked(100, 64) == known.heal_config(steps=100, repair=64)
    with pytest.raises(BudgetError, match="repaired by 256 trajectories already"):
        asked(0, HEAL_REPAIR)
    few = {"repair": None, "inference_steps": 2, "size": 32}
    expected = known.heal_config(steps=100, repair=HEAL_REPAIR, inference_steps=2, size=32)
    assert asked(100, HEAL_REPAIR, **few) == expected

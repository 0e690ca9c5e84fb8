"""How a pipeline is called: streams, seeds, prompts that are too long."""

import pytest
import torch

import ecodiff
from ecodiff import catalog
from ecodiff.errors import BudgetError
from ecodiff.metrics.fidelity import generate
from ecodiff.pipelines import cut_off, prompt_rows, stream


def test_streams_of_different_purposes_have_nothing_to_do_with_each_other():
    draws = {
        (purpose, seed, number): torch.randn(64, generator=stream(purpose, seed, number))
        for purpose in ("latents", "probe", "gates", "order")
        for seed in (0, 1, 1_000_003)
        for number in (0, 1, 1_000_003)
    }
    found = torch.stack(list(draws.values()))
    closeness = torch.corrcoef(found) - torch.eye(len(found))
    assert closeness.abs().max() < 0.6
    latents = prompt_rows(["cat"], [0], 0, {})["generator"][0]
    assert not torch.equal(torch.randn(64, generator=latents), draws["probe", 0, 0])
    assert torch.equal(torch.randn(64, generator=stream("probe", 0, 0)), draws["probe", 0, 0])


@pytest.mark.parametrize("seed", [0, 1 << 50, (1 << 64) - 1])
def test_every_seed_that_draws_also_learns(tiny_sdxl, seed):
    generate(tiny_sdxl, "cat", seed, steps=1, size=16)
    settings = {"warm_steps": 1, "steps": 1, "batch": 1, "trajectories": 1, "inference_steps": 1, "size": 16}
    scores = ecodiff.learn_masks(tiny_sdxl, ["cat"], ecodiff.LearnConfig(seed=seed, **settings))
    assert scores.metadata["learn"]["seed"] == seed


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.5])
def test_seeds_that_torch_does_not_take(tiny_sdxl, seed):
    with pytest.raises(BudgetError, match="0 to 2"):
        ecodiff.LearnConfig(seed=seed)
    with pytest.raises(BudgetError, match="0 to 2"):
        generate(tiny_sdxl, "cat", seed, steps=1, size=16)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_no_default(tiny_sdxl, steps):
    with pytest.raises(BudgetError, match="time steps"):
        generate(tiny_sdxl, "cat", 0, steps=steps, size=16)
    with pytest.raises(BudgetError, match="at least 1"):
        ecodiff.LearnConfig(inference_steps=steps)


def test_the_end_of_a_long_prompt_is_told(tiny_sdxl):
    long = "a very big and shiny round red apple that lies on an old wooden table in the light " * 2
    rest = cut_off(tiny_sdxl, long + "next to a rocket")
    assert rest.endswith("rocket") and long.startswith("a very") and not rest.startswith("a very")
    assert cut_off(tiny_sdxl, "red apple") == ""


def test_nothing_to_compare(tiny_sdxl):
    for prompts, seeds in (([], (0,)), (["cat"], ())):
        with pytest.raises(BudgetError, match="at least one prompt"):
            ecodiff.compare(tiny_sdxl, tiny_sdxl, prompts, seeds)


def a_third_less(unet) -> ecodiff.PrunePlan:
    groups = ecodiff.find_groups(unet)
    return ecodiff.PrunePlan({g.name: torch.arange(g.size) >= g.size // 3 for g in groups})


def test_settings_of_a_folder(tmp_path, monkeypatch):
    import shutil

    turbo = catalog.find("emoji-turbo")
    shutil.copytree(turbo.source, tmp_path / "mine")
    mine = catalog.find(tmp_path / "mine")
    same = ("learn_steps", "steps", "guidance_scale", "size", "licence")
    assert all(getattr(mine, name) == getattr(turbo, name) for name in same)
    assert mine.prompts("calibration") == turbo.prompts("calibration") and mine.name == str(tmp_path / "mine")

    pipe = ecodiff.load("emoji-turbo")
    plan = a_third_less(pipe.unet)
    first = ecodiff.save(ecodiff.variant(pipe, plan), tmp_path / "emoji-flux")
    pruned = catalog.find(first)
    assert pruned.base == "emoji-turbo" and all(getattr(pruned, n) == getattr(turbo, n) for n in same)
    monkeypatch.chdir(tmp_path)
    assert catalog.find("emoji-flux").base == "emoji-turbo", "the folder is meant, not the catalogue's model"

    again = ecodiff.load(first)
    plan = a_third_less(again.unet)
    plan.metadata["model"] = str(first)  # as a run on that folder says
    from ecodiff.pruning.slicing import check, plan_of

    second = plan_of(ecodiff.variant(again, plan).unet)
    assert second.metadata["model"] == "emoji-turbo"
    check(second, pipe.unet)


@pytest.mark.parametrize(
    ("scheduler", "transformer", "index", "guidance"),
    [
        ({"_class_name": "LCMScheduler"}, {}, {}, 0.0),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, {}, {}, 0.0),
        ({}, {"_class_name": "FluxTransformer2DModel", "guidance_embeds": False}, {}, 0.0),
        ({}, {}, {"is_distilled": True}, 1.0),
    ],
)
def test_a_distilled_folder_is_known_by_its_own_files(tmp_path, scheduler, transformer, index, guidance):
    import json

    for place, found in (
        ("scheduler/scheduler_config.json", scheduler),
        ("transformer/config.json", transformer),
    ):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text(json.dumps(found))
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "Some"}))
    found = catalog.find(tmp_path)
    assert (found.steps, found.learn_steps, found.guidance_scale) == (4, 4, guidance)


CALL = """---
license: mit
---
```python
image = pipe(
    "a cat (red)", {}
    generator=torch.Generator("cpu").manual_seed(0)
).images[0]
```
"""


@pytest.mark.parametrize(
    ("name", "arguments", "steps", "learned_with", "guidance"),
    [
        ("tuned", "num_inference_steps=8, guidance_scale=1.5,", 8, 8, 1.5),
        ("tuned", "guidance_scale = 3.5, num_inference_steps = 40,", 40, 12, 3.5),
        ("some-turbo", "num_inference_steps=2, guidance_scale=0.0,", 2, 2, 0.0),
        ("some-turbo", "num_inference_steps=30, guidance_scale=7.5,", 4, 4, 0.0),  # its teacher's example
        ("tuned", "num_inference_steps=steps, guidance_scale=7.5,", 30, 12, 5.0),
        ("tuned", "num_inference_steps=5000, guidance_scale=7.5,", 30, 12, 5.0),
        ("tuned", "num_inference_steps=20,", 30, 12, 5.0),
        ("tuned", f"num_inference_steps={'9' * 400}, guidance_scale={'9' * 400},", 30, 12, 5.0),
    ],
)
def test_an_unknown_model_is_drawn_as_its_card_does(tmp_path, name, arguments, steps, learned_with, guidance):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "Some"}')
    (folder / "README.md").write_text(CALL.format(arguments))
    found = catalog.find(folder)
    assert (found.steps, found.learn_steps, found.guidance_scale) == (steps, learned_with, guidance)
    assert found.licence == "mit"

"""Text encoders are ranked, cut, repaired and saved together with the denoiser."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

import ecodiff
from ecodiff import catalog
from ecodiff.checkpoints.dense import save_filled
from ecodiff.checkpoints.unused import without_unused
from ecodiff.config import CompensateConfig, LearnConfig, Sampling
from ecodiff.errors import BudgetError, PlanError
from ecodiff.learning.conditioning import conditioning, prompt_call
from ecodiff.learning.text_encoders import rank_text_encoders
from ecodiff.metrics.cost import parameters
from ecodiff.pipelines import denoiser_calls
from ecodiff.pruning.plan import PrunePlan
from ecodiff.pruning.scores import Scores
from ecodiff.runs import Run
from ecodiff.runs.importing import import_run
from ecodiff.runs.loop import advance
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PIPELINES, PROMPT, latents, randomise, short
from tests.pipelines import TEXT, klein

PROMPTS = [PROMPT, "cat", "rocket", "green tree", "old house", "fish"]
CONFIG = CompensateConfig(trajectories=6, heldout=2, batch=2, calls=2, inference_steps=3)


def ranked(pipe):
    return rank_text_encoders(pipe, PROMPTS, Sampling(inference_steps=2, extra=short(pipe)))


def embeddings(pipe, prompt, config):
    return torch.cat([e.detach().flatten() for e in given(pipe, prompt, config)])


def given(pipe, prompt, config):
    parts = [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    for part in parts:  # a gradient to follow, where no gate is
        part.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_())
    return conditioning(pipe, prompt_call(pipe, prompt, config))


@pytest.fixture(scope="module")
def emoji_flux():
    known = catalog.find("emoji-flux")
    pipe = ecodiff.load("emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    config = replace(known.compensation(), trajectories=8, heldout=2, calls=2)
    return pipe, rank_text_encoders(pipe, known.prompts("calibration"), config), config, known


def test_thirty_per_cent_of_emoji_flux_keep_its_embeddings(emoji_flux):
    """Ranked far better than at random, and better again repaired, on prompts that nothing was fitted to."""
    pipe, scores, config, known = emoji_flux
    shuffled = copy.deepcopy(scores)
    generator = torch.Generator().manual_seed(0)
    shuffled.values = {n: torch.rand(len(v), generator=generator) for n, v in scores.values.items()}
    prompts, errors = known.prompts("heldout")[:6], {}
    dense = [embeddings(pipe, prompt, config) for prompt in prompts]
    for name, order in (("random", shuffled), ("ranked", scores)):
        small = ecodiff.variant(pipe, PrunePlan(order.plan(ratio=0.3)))
        for state in ("cut", "repaired"):
            if state == "repaired":
                assert all(key.startswith("text_encoder") for key in repaired(small, pipe, known, config))
            found = [embeddings(small, prompt, config) for prompt in prompts]
            both = zip(found, dense, strict=True)
            errors[name, state] = sum(float((a - b).square().mean() / b.var()) for a, b in both) / len(
                prompts
            )
    assert errors["ranked", "cut"] < errors["random", "cut"] / 3
    assert errors["ranked", "repaired"] < errors["ranked", "cut"] / 1.2
    removed = sum(parameters(getattr(pipe, n)) - parameters(getattr(small, n)) for n in small_names(scores))
    assert 0.3 <= removed / scores.total < 0.36


def small_names(scores):
    return scores.plan(ratio=0.3).text_encoders


def repaired(small, pipe, known, config):
    return ecodiff.compensate_(small, pipe, known.prompts("calibration"), config)


@pytest.mark.parametrize("build", ["sdxl", "flux-dev", "sd3.5"])
def test_a_pipeline_cut_in_all_parts_opens_everywhere(build, tmp_path):
    pipe = PIPELINES[build]()
    pipe.set_progress_bar_config(disable=True)
    scores = ranked(pipe)
    encoders = scores.plan(ratio=0.6 * scores.ceiling)
    assert encoders.text_encoders
    plan = PrunePlan({**some_plan(pipe), **encoders}, bases=some_plan(pipe).bases)
    assert plan.digest != plan.part().digest
    dense = latents(pipe)
    small = ecodiff.variant(pipe, plan)
    assert torch.equal(latents(pipe), dense), "the dense pipeline was touched"
    removed = sum(parameters(getattr(pipe, n)) - parameters(getattr(small, n)) for n in plan.text_encoders)
    assert removed >= 0.5 * scores.removable
    ecodiff.compensate_(small, pipe, PROMPTS, replace(CONFIG, extra=short(pipe)))
    drawn = latents(small)
    folder = ecodiff.save(small, tmp_path / "small")
    torch.testing.assert_close(latents(ecodiff.load(folder)), drawn, rtol=1e-3, atol=1e-3)
    stock = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(latents(stock), drawn, rtol=1e-3, atol=1e-3)
    brought = PrunePlan.load(folder / "ecodiff_plan.safetensors")
    assert {n: k.tolist() for n, k in brought.items()} == {n: k.tolist() for n, k in plan.items()}


def test_dense_shapes_give_the_same(tiny_sdxl, tmp_path):
    plan = PrunePlan({**some_plan(tiny_sdxl), **ranked(tiny_sdxl).plan(ratio=0.03)})
    small = ecodiff.variant(tiny_sdxl, plan)
    whole = DiffusionPipeline.from_pretrained(save_filled(small, tmp_path / "whole"))
    assert type(whole.text_encoder_2) is type(tiny_sdxl.text_encoder_2)
    torch.testing.assert_close(latents(whole), latents(small), rtol=1e-3, atol=1e-3)


def test_layers_that_nothing_is_read_of_stay_and_can_be_left_out(tmp_path):
    """FLUX.2 klein reads the states behind the third layer of these six."""
    pipe = klein()
    config = Qwen3Config(**TEXT | {"num_hidden_layers": 6})
    pipe.register_modules(text_encoder=randomise(Qwen3ForCausalLM(config)))
    pipe.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": 16, "text_encoder_out_layers": (3,), "height": 32, "width": 32}
    scores = rank_text_encoders(pipe, PROMPTS, Sampling(inference_steps=1, extra=options))
    assert {name.split("layers.")[1][0] for name in scores.values} == set("012")
    plan = PrunePlan({**some_plan(pipe), **scores.plan(ratio=0.6 * scores.ceiling)})
    small = ecodiff.variant(pipe, plan)
    calls = [options | {"prompt": prompt, "num_inference_steps": 1} for prompt in (PROMPT, "")]
    lean, saved = without_unused(small, calls)
    assert saved["text_encoder"] > 0 and len(lean.text_encoder.model.layers) == 4
    opened = ecodiff.load(ecodiff.save(lean, tmp_path / "lean"))
    before, after = (conditioning_of(each, calls[0]) for each in (small, opened))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def conditioning_of(pipe, call):
    made = denoiser_calls(pipe, call | {"generator": torch.Generator().manual_seed(0)}, limit=1)
    return torch.cat([leaf.flatten().float() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)])


def test_a_run_cuts_text_encoders_too(tiny_sdxl, tmp_path):
    config = LearnConfig(warm_steps=1, steps=0, batch=1, inference_steps=2, text_encoders=0.03)
    run = Run.create(tmp_path / "run", "emoji-sdxl", config, PROMPTS)
    assert advance(run, tiny_sdxl)
    facts = run.plan(0.1).metadata["text_encoders"]
    small = ecodiff.variant(tiny_sdxl, run.plan(0.1))
    for which, pipe in (("params_dense", tiny_sdxl), ("params_pruned", small)):
        assert facts[which] == parameters(pipe.text_encoder) + parameters(pipe.text_encoder_2)
    assert run.plan(0.1).part("text_encoder_2") and run.plan(0.2).text_encoders == run.plan(0.1).text_encoders
    too_much = Run.create(tmp_path / "other", "emoji-sdxl", replace(config, text_encoders=0.95), PROMPTS)
    with pytest.raises(BudgetError, match="Text encoders: At most"):
        advance(too_much, tiny_sdxl)
    assert too_much.state() is None, "it learned first"


def test_a_plan_for_other_text_encoders_is_refused(tiny_sdxl):
    plan = PrunePlan({"text_encoder_3.encoder.block.0": torch.tensor([True, False])})
    with pytest.raises(PlanError, match="text_encoder_3"):
        ecodiff.variant(tiny_sdxl, plan)


def test_a_plan_that_is_brought_is_checked_and_counted(emoji_flux, tmp_path):
    pipe, scores = emoji_flux[:2]
    plan = Scores.unranked(pipe.transformer).plan(ratio=0.1).joined(scores.plan(ratio=0.2))
    wanted = plan.metadata["text_encoders"]
    lying = PrunePlan(plan, {"text_encoders": {"params_dense": 7, "params_pruned": 1}})
    run = import_run(
        tmp_path / "run", "emoji-flux", LearnConfig(), [lying.save(tmp_path / "plan.safetensors")]
    )
    assert run.plan().metadata["text_encoders"] == wanted
    assert run.plan().digest == plan.digest
    other = dict(plan)
    other["text_encoder.encoder.layers.9.mlp"] = torch.tensor([True, False])
    file = PrunePlan(other).save(tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match="no such group"):
        import_run(tmp_path / "other", "emoji-flux", LearnConfig(), [file])
    assert not (tmp_path / "other").exists()

"""Pipelines with two denoisers (Wan 2.2 A14B): either is pruned, the other takes part in the trajectories."""

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

import ecodiff
from ecodiff import catalog
from ecodiff.cli import main
from ecodiff.errors import UnsupportedModelError
from ecodiff.learning.checkpointing import gradients
from ecodiff.learning.learn import learn
from ecodiff.learning.trajectory import trajectory
from ecodiff.metrics.cost import parameters
from ecodiff.pipelines import choose_denoiser, denoiser_name, denoiser_of
from ecodiff.pruning.scores import Scores
from ecodiff.pruning.slicing import plan_of
from tests.pipelines import BUILDERS, wan

SIZE, EXTRA = BUILDERS["Wan 2.1"][1:]
PROMPTS = ["red apple", "blue whale"]
FIRST, SECOND = "transformer", "transformer_2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pipe = wan(two=True)
    pipe.save_pretrained(where := tmp_path_factory.mktemp("wan") / "dense")
    return where


def call(pipe):
    options = {"num_inference_steps": 4, "height": SIZE, "width": SIZE, **EXTRA}
    return {"prompt": PROMPTS, "generator": torch.Generator().manual_seed(0)} | options


def opened(folder, name):
    pipe = ecodiff.load(f"{folder}#{name}")
    assert denoiser_name(pipe) == name
    return pipe


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_gradients_are_those_of_the_whole_trajectory(folder, name):
    pipe = opened(folder, name)
    groups = ecodiff.find_groups(denoiser_of(pipe))
    gates = {g.name: torch.ones(g.size, requires_grad=True) for g in groups}
    made = {FIRST: 0, SECOND: 0}
    for part in made:

        def seen(*given, part=part):
            made[part] += 1

        getattr(pipe, part).blocks[0].register_forward_pre_hook(seen)
    found = {}
    for checkpoint in (False, True):
        with ecodiff.masked(denoiser_of(pipe), gates), trajectory(pipe, checkpoint) as run:
            z0 = run(**call(pipe))
            found[checkpoint] = z0, gradients(z0.square().mean(), z0, list(gates.values()))
        if not checkpoint:
            once = dict(made)
    assert min(once.values()) > 0, "both take part"
    torch.testing.assert_close(found[True][0], found[False][0])
    for one, other in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert max(float(g.abs().max()) for g in found[True][1]) > 0
    # Recomputed is what gradients flow through: both if the first is pruned, the second alone otherwise.
    again = {part: made[part] - 2 * once[part] for part in made}
    assert again == {FIRST: once[FIRST] if name == FIRST else 0, SECOND: once[SECOND]}


def test_one_after_the_other_is_pruned_and_plain_diffusers_draws_with_both(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learned = {"inference_steps": 4, "size": SIZE, "extra": EXTRA}
    source, sizes = folder, {}
    for name in (SECOND, FIRST):
        pipe = opened(source, name)
        other = getattr(pipe, FIRST if name == SECOND else SECOND)
        before, dense = other.state_dict(), parameters(denoiser_of(pipe))
        config = ecodiff.LearnConfig(ratio=0.1, warm_steps=1, steps=1, batch=2, trajectories=4, **learned)
        _, scores = list(learn(pipe, PROMPTS, config))[-1]
        plan = scores.plan(ratio=0.2)
        small = ecodiff.variant(pipe, plan)
        with torch.no_grad(), ecodiff.masked(denoiser_of(pipe), plan), trajectory(pipe) as run:
            masked = run(**call(pipe)).detach()
        with torch.no_grad(), trajectory(small) as run:
            torch.testing.assert_close(run(**call(small)).detach(), masked, rtol=1e-3, atol=1e-4)
        source = ecodiff.save(small, tmp_path / name)
        again = ecodiff.load(source)
        assert denoiser_name(again) == name, "what was pruned last is what is compared and healed"
        assert plan_of(denoiser_of(again)).metadata["model"] == f"{folder}#{name}"
        rest = getattr(again, FIRST if name == SECOND else SECOND).state_dict()
        assert all(torch.equal(weight, before[key]) for key, weight in rest.items())
        sizes[name] = parameters(denoiser_of(again)) / dense
    assert all(0.75 < size < 0.85 for size in sizes.values())
    card = (source / "README.md").read_text()
    assert f"parameters of the {FIRST} |" in card
    shown = card.split("```python")[1].split("```")[0].replace("THIS FOLDER", str(source))
    small_clip = f"num_inference_steps=2, height={SIZE}, width={SIZE}, max_sequence_length=16"
    exec(shown.replace("num_inference_steps=30", small_clip), {})  # ecodiff's own text, of the card
    assert (tmp_path / "image.png").is_file()
    plain = WanPipeline.from_pretrained(source, trust_remote_code=True)
    kinds = {type(plain.transformer).__name__, type(plain.transformer_2).__name__}
    assert kinds == {"SlicedWanTransformer3DModel"}
    plain.set_progress_bar_config(disable=True)
    with torch.no_grad():
        drawn = plain(**call(plain), output_type="latent").frames
    torch.testing.assert_close(drawn, masked, rtol=1e-3, atol=1e-4)


def test_a_lora_is_cut_for_the_second_and_loaded_into_it(folder, tmp_path):
    pipe = opened(folder, SECOND)
    generator, lora = torch.Generator().manual_seed(1), {}
    for name, module in pipe.transformer_2.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_v", "to_out.0", "ffn.net.2")):
            rows, columns = module.weight.shape
            lora[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            lora[f"transformer.{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    save_file(lora, tmp_path / "lora.safetensors")
    plan = Scores.unranked(pipe.transformer_2).plan(ratio=0.2)
    small = ecodiff.variant(pipe, plan)
    tensors, report = ecodiff.translate_lora(tmp_path / "lora.safetensors", small, plan, pipe.transformer_2)
    assert report.cut and set(report.dropped.values()) <= {"nothing of the layer is left"}
    small.load_lora_weights(tensors, load_into_transformer_2=True)
    pipe = opened(folder, SECOND)  # what is fused is not to reach weights that the variant shares
    pipe.load_lora_weights(lora, load_into_transformer_2=True)
    pipe.fuse_lora(components=[SECOND])
    pipe.unload_lora_weights()
    options = {"output_type": "latent"}
    with torch.no_grad(), ecodiff.masked(pipe.transformer_2, plan):
        masked = pipe(**call(pipe), **options).frames
    with torch.no_grad():
        torch.testing.assert_close(small(**call(small), **options).frames, masked, rtol=1e-3, atol=1e-4)


def test_the_command_line_takes_the_name_behind_a_folder(folder, tmp_path, capsys):
    assert main(["info", f"{folder}#{SECOND}"]) == 0
    shown = capsys.readouterr().out
    assert f" {parameters(wan(two=True).transformer_2):,}\n" in shown
    assert main(["info", f"{folder}#unconditional_transformer"]) != 0
    assert "unconditional_transformer" in capsys.readouterr().err


def test_both_are_in_the_catalogue_and_found_by_either_name():
    late = catalog.find("wan-2.2-a14b-low-noise")
    assert late.component == SECOND and not catalog.find("wan-2.2-a14b").component
    assert catalog.find(late.source).name == "wan-2.2-a14b"
    assert catalog.find(f"{late.source}#{SECOND}") == catalog.find(f"wan-2.2-a14b#{SECOND}") == late
    assert catalog.find("owner/name#a-heading").name == "owner/name#a-heading"


def test_a_denoiser_that_is_not_there_is_named(folder):
    with pytest.raises(UnsupportedModelError, match="unconditional_transformer"):
        choose_denoiser(ecodiff.load(folder), "unconditional_transformer")
    with pytest.raises(UnsupportedModelError, match="text_encoder"):
        choose_denoiser(ecodiff.load(folder), "text_encoder")

"""What is never read of text encoders is left out, and what is read is not."""

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, QwenImagePipeline
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

import ecodiff
from ecodiff.app import server, service
from ecodiff.checkpoints.unused import without_unused
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PIPELINES, latents, randomise, short
from tests.pipelines import TEXT, klein, qwen

PROMPTS = ("a cat", "", "red apple on a table")


def calls(pipe, **more):
    return [{"prompt": prompt, "num_inference_steps": 1} | short(pipe) | more for prompt in PROMPTS]


@pytest.fixture
def middle() -> Flux2KleinPipeline:
    """FLUX.2 klein whose text encoder has six layers and is read behind the third."""
    pipe = klein()
    config = Qwen3Config(**TEXT | {"num_hidden_layers": 6, "tie_word_embeddings": False})
    pipe.register_modules(text_encoder=randomise(Qwen3ForCausalLM(config)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_language_model_that_is_read_in_its_middle(middle, tmp_path):
    read = {"text_encoder_out_layers": (3,)}
    made, saved = without_unused(middle, calls(middle, **read))
    # One layer more than is read: transformers norms what is behind the last one.
    assert len(made.text_encoder.model.layers) == made.text_encoder.config.num_hidden_layers == 4
    assert len(middle.text_encoder.model.layers) == middle.text_encoder.config.num_hidden_layers == 6
    assert len(made.text_encoder.config.layer_types) == 4
    layer = sum(p.numel() for p in middle.text_encoder.model.layers[0].parameters())
    assert saved == {"text_encoder": 2 * layer + middle.text_encoder.lm_head.weight.numel()}
    assert made.text_encoder.model.layers[0].mlp.up_proj.weight is (
        middle.text_encoder.model.layers[0].mlp.up_proj.weight
    )
    small = ecodiff.variant(made, some_plan(made))
    ecodiff.save(small, tmp_path / "small")
    again = DiffusionPipeline.from_pretrained(tmp_path / "small", trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert len(again.text_encoder.model.layers) == 4
    plain = ecodiff.variant(middle, some_plan(middle))
    for call in calls(middle, output_type="latent", **read):
        asked = call | {"generator": torch.Generator().manual_seed(1)}
        expected = plain(**asked).images
        asked = call | {"generator": torch.Generator().manual_seed(1)}
        torch.testing.assert_close(again(**asked).images, expected, rtol=1e-4, atol=1e-5)


def with_a_head() -> QwenImagePipeline:
    """Qwen-Image whose text encoder has a head of its own, and a vision tower."""
    pipe = qwen()
    config = Qwen2_5_VLConfig.from_dict(pipe.text_encoder.config.to_dict())
    for part in (config, config.text_config):
        part.tie_word_embeddings = False
    pipe.register_modules(text_encoder=randomise(Qwen2_5_VLForConditionalGeneration(config)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_download_says_what_was_left_out_of_it(tmp_path):
    server.use(server.Server(tmp_path / "home"))
    pipe = with_a_head()
    pipe.save_pretrained(tmp_path / "dense")
    plan = some_plan(pipe).save(tmp_path / "plan.safetensors")
    run = service.import_(str(tmp_path / "dense"), [plan])["run"]
    size = service.status(run)["size"]
    plain, made, again = (service.export(run, size, False, lean=lean) for lean in (False, True, True))
    assert plain["left_out"] == {} and made["left_out"]["text_encoder"] > 3_000
    assert again == made and made["bytes"] < plain["bytes"]
    assert "from_pretrained" in plain["code"] and made["code"], "a folder is opened by diffusers"
    assert service.export(run, size, False, "comfyui")["code"] == "", "and this file is not"
    assert service.left_out(made["left_out"]).startswith("left out, never read: ")


def test_a_vision_tower_and_a_head_that_writes_words(tmp_path):
    pipe = with_a_head()
    blocks = len(pipe.text_encoder.model.visual.blocks)
    made, saved = without_unused(pipe, calls(pipe))
    assert blocks and len(made.text_encoder.model.visual.blocks) == 0
    assert saved["text_encoder"] > pipe.text_encoder.lm_head.weight.numel()
    layers = made.text_encoder.model.language_model.layers
    assert len(layers) == len(pipe.text_encoder.model.language_model.layers), "the last one is read"
    made.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents(again), latents(pipe), rtol=1e-4, atol=1e-5)
    assert (
        sum(p.numel() for p in again.text_encoder.parameters())
        == sum(p.numel() for p in pipe.text_encoder.parameters()) - saved["text_encoder"]
    )


@pytest.mark.parametrize("build", ["sdxl", "sd3.5", "flux-dev"])
def test_what_is_read_by_its_place_from_the_end_stays(build):
    pipe = PIPELINES[build]()
    pipe.set_progress_bar_config(disable=True)
    made, saved = without_unused(pipe, calls(pipe))
    assert torch.equal(latents(made), latents(pipe))
    for name, left_out in saved.items():
        before = sum(p.numel() for p in pipe.components[name].parameters())
        assert sum(p.numel() for p in made.components[name].parameters()) == before - left_out

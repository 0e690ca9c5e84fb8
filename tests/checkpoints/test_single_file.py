"""Checkpoints in one file, in the layout of the original authors."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import ecodiff
from ecodiff import catalog
from ecodiff.checkpoints import loading, single_file
from ecodiff.errors import CheckpointError
from tests import files, support
from tests.checkpoints.test_hub import header_of
from tests.conftest import latents

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}


def original_names(unet) -> dict[str, str]:
    """Stability's names of a UNet's modules, by diffusers' prefixes."""
    names, each = dict(TOP), unet.config.layers_per_block + 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            at = f"input_blocks.{level * each + layer + 1}"
            names[f"down_blocks.{level}.resnets.{layer}."] = f"{at}.0."
            names[f"down_blocks.{level}.attentions.{layer}."] = f"{at}.1."
        names[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{(level + 1) * each}.0.op."
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            at = f"output_blocks.{level * each + layer}"
            names[f"up_blocks.{level}.resnets.{layer}."] = f"{at}.0."
            names[f"up_blocks.{level}.attentions.{layer}."] = f"{at}.1."
        place = 2 if hasattr(block, "attentions") else 1
        names[f"up_blocks.{level}.upsamplers.0."] = f"output_blocks.{level * each + each - 1}.{place}."
    return names


def original(unet) -> dict[str, torch.Tensor]:
    tensors = {}
    for key, value in unet.state_dict().items():
        old, new = next(pair for pair in original_names(unet).items() if key.startswith(pair[0]))
        rest = key.removeprefix(old)
        if ".resnets." in old:
            head, _, tail = rest.partition(".")
            rest = f"{RESNET[head]}.{tail}"
        tensors[f"model.diffusion_model.{new}{rest}"] = value.contiguous()
    return tensors


@pytest.fixture
def single(tiny_sdxl, tmp_path, monkeypatch):
    """A fine-tune of the tiny SDXL in one file, whose base is a folder: the Hub is not at hand."""
    tiny_sdxl.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(loading, "base_of", lambda source: str(tmp_path / "base"))
    with torch.no_grad():
        for parameter in tiny_sdxl.unet.parameters():
            parameter.add_(0.01)
    save_file(original(tiny_sdxl.unet), tmp_path / "fine-tune.safetensors")
    return tmp_path / "fine-tune.safetensors"


def test_a_fine_tune_in_one_file_works_like_a_folder(single, tiny_sdxl, tmp_path):
    pipe = ecodiff.load(single)
    torch.testing.assert_close(latents(pipe), latents(tiny_sdxl), rtol=1e-4, atol=1e-3)
    assert loading.empty_denoiser(str(single)).config.cross_attention_dim == 32
    config = catalog.find(str(single)).learn_config("fast", 0.2, warm_steps=1, steps=1)
    config = ecodiff.LearnConfig(**vars(config) | {"batch": 1, "inference_steps": 2})
    plan = ecodiff.learn_masks(pipe, ["red apple"], config).plan(ratio=0.2)
    folder = ecodiff.save(ecodiff.variant(pipe, plan), tmp_path / "small")
    assert ecodiff.load(folder).unet.num_parameters() == plan.metadata["params_pruned"]


@pytest.mark.parametrize("what", files.FILES)
def test_every_file_of_the_table_is_opened_or_refused_as_it_says(what, tmp_path):
    rows = support.section(support.CHECKPOINTS.read_text(encoding="utf-8"), support.FILES).splitlines()
    outcome = files.happens(what, tmp_path)
    assert files.row(what, outcome) in rows, "run python -m tests.support"
    assert (outcome == "opened") == bool(files.FILES[what][0]), outcome


def test_a_checkpoint_of_true_size_has_the_parameters_of_its_model(tmp_path):
    for name in ("sdxl", "flux-dev"):
        file = files.written(files.AUTHORS[name], tmp_path)
        assert loading.empty_denoiser(file).num_parameters() == loading.empty_denoiser(name).num_parameters()


VAE = {"first_stage_model.encoder.conv_in.weight": torch.empty(128, 3, 3, 3)}


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_fp8_with_scales_is_multiplied_in(single, tiny_sdxl, tmp_path, ending):
    tensors = original(tiny_sdxl.unet)
    scaled = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, value in tensors.items():
        if name.endswith(".weight") and value.ndim == 2:
            scale = value.abs().max() / 448
            scaled[name] = (value / scale).to(torch.float8_e4m3fn)
            scaled[f"{name.removesuffix('.weight')}.{ending}"] = scale.float()
        else:
            scaled[name] = value
    save_file(scaled, tmp_path / "fp8.safetensors")
    found = ecodiff.load(tmp_path / "fp8.safetensors").unet.state_dict()
    for name, value in tiny_sdxl.unet.state_dict().items():
        assert torch.allclose(found[name], value, rtol=0.07, atol=float(value.abs().max()) / 200), name


def test_the_autoencoder_of_a_file_is_taken_and_the_rest_is_the_base_models(single, tiny_sdxl, monkeypatch):
    opened = []

    def kept(source, **options):
        opened.append(options["subfolder"])
        return tiny_sdxl.vae

    monkeypatch.setattr("diffusers.AutoencoderKL.from_single_file", kept)
    save_file(load_file(single) | VAE, single)
    pipe = ecodiff.load(single)
    assert opened == ["vae"] and pipe.vae is tiny_sdxl.vae and pipe.text_encoder is not None


def test_a_file_says_how_it_is_drawn(single, tmp_path):
    markers = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(load_file(single) | markers, tmp_path / "noob.safetensors")
    config = ecodiff.load(tmp_path / "noob.safetensors").scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    few = tmp_path / "sdxl_lightning_4step_unet.safetensors"
    save_file(load_file(single), few)
    assert ecodiff.load(few).scheduler.config.timestep_spacing == "trailing"
    known = catalog.find(str(few))
    assert (known.steps, known.guidance_scale, known.learn_steps) == (4, 0.0, 4)
    plain = catalog.find(str(single))
    assert (plain.steps, plain.guidance_scale) == (30, 5.0)


def test_a_name_does_not_lead_out_of_a_repository():
    assert single_file.on_hub("ann/mine/a/b.safetensors") == ("ann/mine", "a/b.safetensors")
    for name in ("ann/mine/../../x.safetensors", "/ann/mine/x.safetensors", "./ann/mine/x.safetensors"):
        assert single_file.on_hub(name) is None, name


def test_a_file_of_a_repository_is_opened_like_one_that_is_here(single, monkeypatch):
    here = ecodiff.load(single).unet.state_dict()
    monkeypatch.setattr(single_file, "try_to_load_from_cache", lambda repository, file: str(single))
    asked = []

    def download(repository, file, token=None):
        asked.append((repository, file))
        return str(single)

    monkeypatch.setattr(single_file, "hf_hub_download", download)
    found = ecodiff.load("ann/mine/deep/fine-tune_4step.safetensors")
    assert asked == [("ann/mine", "deep/fine-tune_4step.safetensors")]
    assert all(torch.equal(tensor, here[name]) for name, tensor in found.unet.state_dict().items())
    assert found.scheduler.config.timestep_spacing == "trailing", "what it is called counts"
    assert catalog.find("ann/mine/deep/fine-tune_4step.safetensors").steps == 4


@pytest.mark.parametrize(
    ("model", "file", "steps", "guidance", "size"),
    [
        ("flux-schnell", "mine", 4, 0.0, 1024),
        ("flux-dev", "mine", 28, 3.5, 1024),
        ("sd-1.5", "mine", 30, 7.5, 512),
        ("sdxl", "mine_lightning_8step", 8, 0.0, 1024),
    ],
)
def test_a_file_is_used_like_the_model_that_it_is_a_variant_of(model, file, steps, guidance, size, tmp_path):
    path = tmp_path / f"{file}.safetensors"
    path.write_bytes(header_of(model))
    known = catalog.find(path)
    assert (known.steps, known.guidance_scale, known.size) == (steps, guidance, size)
    assert (known.source, known.licence, known.gated) == (str(path), "other", False)
    assert loading.working_dtype(path) == getattr(torch, catalog.MODELS[model].dtype)
    (tmp_path / "other.safetensors").write_bytes(b"none")
    assert catalog.find(tmp_path / "other.safetensors").steps == 30


def test_settings_of_a_hub_model_come_from_its_own_files(tmp_path, monkeypatch):
    ecodiff.load("emoji-turbo").save_pretrained(tmp_path)
    found = {"ann/mine": str(tmp_path / "model_index.json")}
    monkeypatch.setattr(catalog, "try_to_load_from_cache", lambda repo, file: found.get(repo))
    known = catalog.find("ann/mine")
    assert (known.source, known.steps, known.guidance_scale) == ("ann/mine", 4, 0.0)
    assert catalog.find("bob/other").steps == 30
    assert catalog.find("ByteDance/SDXL-Lightning-8step").steps == 8
    assert catalog.find("ann/sdxl_4_steps").steps == 4 and catalog.find("ann/Hyper-SD").steps == 4
    for plain in ("ann/hyperrealism-xl", "ann/checkpoint-1500steps", "ann/lcmnot"):
        assert catalog.find(plain).steps == 30, plain


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        ecodiff.load(tmp_path / "noise.safetensors")

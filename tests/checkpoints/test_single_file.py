"""Checkpoints in one file, in the layout of the original authors."""

import pytest
import torch
from safetensors.torch import save_file

import ecodiff
from ecodiff import catalog
from ecodiff.checkpoints import loading
from ecodiff.errors import CheckpointError
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


def test_the_architecture_is_told_by_the_tensors(tmp_path):
    key = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    save_file({key: torch.zeros(4)}, tmp_path / "xl.safetensors")
    base = loading.base_of(str(tmp_path / "xl.safetensors"))
    assert base == catalog.MODELS["sdxl"].source
    assert loading.empty_denoiser(str(tmp_path / "xl.safetensors")).num_parameters() == 2_567_463_684


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        ecodiff.load(tmp_path / "noise.safetensors")

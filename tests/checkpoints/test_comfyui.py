"""What is exported for ComfyUI draws there what it draws in diffusers, pruned, emptied, projected.

ComfyUI cannot be installed by pip: its models are stood in for by tests/original_layout.py. Against the real
one: integrations/comfyui/check.py, whose output is in docs/comfyui.md.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from safetensors import safe_open
from safetensors.torch import load_file

import ecodiff
from ecodiff.checkpoints import comfyui
from ecodiff.errors import CheckpointError, UnsupportedModelError
from ecodiff.pipelines import denoiser_calls, prompt_rows
from tests import original_layout, original_transformers
from tests.conftest import PIPELINES
from tests.pipelines import chroma

HERE = Path(__file__).parents[2] / "integrations" / "comfyui"


def imported(name):
    spec = importlib.util.spec_from_file_location(f"comfyui_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layers, check = imported("layers"), imported("check")
MODELS = {
    "SDXL": original_layout.UNet,
    "Flux": original_layout.Flux,
    "FluxSchnell": original_layout.Flux,
    "SD3": original_transformers.MMDiT,
    "QwenImage": original_transformers.QwenImage,
    "ZImage": original_transformers.NextDiT,
}


CUTS = pytest.mark.parametrize(
    ("ratio", "kind", "inside"),
    [
        (0.4, "modulation_directions", False),
        (0.8, "modulation_directions", False),
        (0.4, "modulation", False),
        (0.8, "modulation", False),
        (0.4, "modulation_directions", True),
    ],
)


def loaded(file):
    """As the node does it."""
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()[comfyui.HEADER])
    operations = layers.shaped(original_layout.Operations, about.get("norm_groups", 32))
    tensors = load_file(file)
    tensors.pop("v_pred", None)
    model = MODELS[about["model"]](about["config"], operations)
    if about.get("basis"):
        rank, features = tensors[f"{layers.BASIS}.weight"].shape
        layers.project(model, operations, features, rank, torch.float32, "cpu")
    result = model.load_state_dict(tensors, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    layers.fit(model, about["heads"])
    return model.eval()


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("ratio", "inside"), [(0.4, False), (0.8, False), (0.4, True)])
def test_a_unet(ratio, inside, tmp_path):
    pipe = ecodiff.load("emoji-sdxl")
    small = check.pruned(pipe, ratio, inside=inside)
    model = loaded(comfyui.save_comfyui(small, tmp_path / "unet.safetensors"))
    close(*drawn(model, small))
    count = sum(p.numel() for p in model.parameters())
    pruned = sum(p.numel() for p in small.unet.parameters())
    assert count > pruned if inside else count == pruned, "directions inside heads are zeros there"


@torch.no_grad()
def test_a_unet_that_is_not_symmetric(tmp_path):
    """Laid out as SSD-1B: other depths up than down, other ones within a block, none in the middle."""
    pipe = ecodiff.load("emoji-sdxl")
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    config |= {
        "transformer_layers_per_block": [1, 2],
        "reverse_transformer_layers_per_block": [[1, 3], 1],
        "mid_block_type": "UNetMidBlock2D",
    }
    torch.manual_seed(0)
    pipe.register_modules(unet=UNet2DConditionModel(**config).eval())
    found = comfyui.unet.configuration(pipe.unet)
    assert (found["transformer_depth"], found["transformer_depth_middle"]) == ([0, 2], -1)
    assert found["transformer_depth_output"] == [0, 0, 3, 1], "from its end"
    small = check.pruned(pipe, 0.4)
    close(*drawn(loaded(comfyui.save_comfyui(small, tmp_path / "unet.safetensors")), small))


def drawn(model, small):
    """One call of the model in the original layout, and of the pruned UNet."""
    rows = prompt_rows(["red apple", "cat face"], range(2), 0, check.SHORT)
    args, kwargs = denoiser_calls(small, rows, limit=1)[0]
    theirs = small.unet(*args, **kwargs | {"return_dict": False})[0]
    added = kwargs["added_cond_kwargs"]
    ids = get_timestep_embedding(added["time_ids"].flatten(), 16, True, 0).reshape(len(args[0]), -1)
    y = torch.cat([added["text_embeds"], ids], dim=1)
    return model(args[0], args[1].expand(len(args[0])), kwargs["encoder_hidden_states"], y), theirs


@torch.no_grad()
@CUTS
def test_flux(ratio, kind, inside, tmp_path):
    pipe = ecodiff.load("emoji-flux")
    small = check.pruned(pipe, ratio, kind, inside)
    model = loaded(comfyui.save_comfyui(small, tmp_path / "out"))
    rows = prompt_rows(["red apple", "cat face"], range(2), 0, check.SHORT)
    _, kwargs = denoiser_calls(small, rows, limit=1)[0]
    theirs = small.transformer(**kwargs | {"return_dict": False})[0]
    ours = model(
        kwargs["hidden_states"],
        kwargs["img_ids"],
        kwargs["encoder_hidden_states"],
        kwargs["txt_ids"],
        kwargs["timestep"],
        kwargs["pooled_projections"],
        kwargs["guidance"],
    )
    close(ours, theirs)
    if kind == "modulation_directions" and not inside:  # the projection stays one, and small
        count = sum(p.numel() for p in model.parameters())
        assert count == sum(p.numel() for p in small.transformer.parameters())


@torch.no_grad()
@CUTS
@pytest.mark.parametrize("name", check.RANDOM)
def test_other_transformers(name, ratio, kind, inside, tmp_path):
    pipe = check.random_pipeline(name)
    small = check.pruned(pipe, ratio, kind, inside)
    model = loaded(comfyui.save_comfyui(small, tmp_path / "out"))
    given = check.inputs(small)
    theirs = check.theirs_of(small.transformer, **given)
    close(model(**given), theirs)
    assert (check.theirs_of(pipe.transformer, **given) - theirs).abs().max() > 0.1 * theirs.abs().max()
    dense = sum(p.numel() for p in pipe.transformer.parameters())
    assert sum(p.numel() for p in model.parameters()) < (1 - ratio / 2) * dense


def test_the_file(tmp_path):
    small = check.pruned(ecodiff.load("emoji-sdxl"), 0.3)
    file = comfyui.save_comfyui(small, tmp_path / "small", torch.float16)
    assert file == tmp_path / "small" / "small.safetensors"
    assert {t.dtype for t in load_file(file).values() if t.numel()} == {torch.float16}
    with pytest.raises(CheckpointError, match="exists"):
        comfyui.save_comfyui(small, tmp_path / "small")


def test_true_sizes():
    """SDXL, SD 1.5 and FLUX.1 as ComfyUI describes them itself."""
    from ecodiff.checkpoints.loading import empty_denoiser

    sdxl = comfyui.unet.configuration(empty_denoiser("sdxl"))
    assert sdxl["transformer_depth"] == [0, 0, 2, 2, 10, 10] and sdxl["num_head_channels"] == 64
    assert sdxl["transformer_depth_output"] == [0, 0, 0, 2, 2, 2, 10, 10, 10]
    assert (sdxl["channel_mult"], sdxl["adm_in_channels"]) == ([1, 2, 4], 2816)
    older = comfyui.unet.configuration(empty_denoiser("sd-1.5"))
    assert older["num_heads"] == 8 and older["transformer_depth"] == [1, 1, 1, 1, 1, 1, 0, 0]
    assert "num_classes" not in older and not older["use_linear_in_transformer"]
    flux = comfyui.flux.configuration(empty_denoiser("flux-dev"))
    assert (flux["hidden_size"], flux["depth"], flux["depth_single_blocks"]) == (3072, 19, 38)
    for name in ("sdxl", "sd-1.5"):
        tensors = comfyui.unet.tensors(empty_denoiser(name))
        assert "input_blocks.1.0.in_layers.2.weight" in tensors and "out.2.bias" in tensors


def test_others_are_refused_in_words(tiny_sdxl):
    with pytest.raises(UnsupportedModelError, match="not pruned"):
        comfyui.described(tiny_sdxl)
    with pytest.raises(UnsupportedModelError, match="heads of 64 features"):
        comfyui.described(check.pruned(PIPELINES["sd3.5"](), 0.6))
    with pytest.raises(UnsupportedModelError, match="not this ChromaTransformer2DModel"):
        comfyui.described(check.pruned(chroma(), 0.6))


def test_a_tensor_that_is_larger_is_refused(tmp_path):
    linear = layers.shaped(original_layout.Operations).Linear(4, 4)
    with pytest.raises(ValueError, match="when dense"):
        linear.load_state_dict({"weight": torch.ones(5, 4), "bias": torch.ones(5)})


@pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI= names no folder of ComfyUI")
def test_in_the_real_comfyui(tmp_path):
    nodes = check.start(Path(os.environ["COMFYUI"]))
    for name in ("emoji-sdxl", "emoji-flux"):
        assert max(check.compare(nodes, name, 0.4, tmp_path).values()) < 1e-5

"""Zeros in the dense shapes give what the sliced model gives, in an ordinary diffusers folder."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import ecodiff
from ecodiff.app.service import prediction
from ecodiff.checkpoints import formats
from ecodiff.checkpoints.int8 import left_alone
from ecodiff.checkpoints.saving import folder_bytes
from ecodiff.errors import CheckpointError, PlanError
from ecodiff.metrics.report import in_int8
from ecodiff.pipelines import denoiser_name, denoiser_of
from tests.checkpoints.test_folders import drawn_by_diffusers_alone, some_plan
from tests.conftest import latents


def test_filled_gives_what_sliced_gives(pipe, tmp_path):
    small = ecodiff.variant(pipe, some_plan(pipe))
    few = ecodiff.CompensateConfig(trajectories=4, heldout=2, batch=2, inference_steps=2)
    if denoiser_name(pipe) == "unet":
        ecodiff.compensate_(small, pipe, ["red apple"], few)
    out = formats.save_filled(small, tmp_path / "filled")
    plain = DiffusionPipeline.from_pretrained(out)  # no remote code, no ecodiff
    plain.set_progress_bar_config(disable=True)
    assert type(denoiser_of(plain)) is type(denoiser_of(pipe))
    expected = latents(small)
    scale = float(expected.abs().max())
    torch.testing.assert_close(latents(plain) / scale, expected / scale, atol=2e-5, rtol=0)
    file = formats.save_filled(small, tmp_path / "one.safetensors", torch.float16)
    assert load_file(file).keys() == denoiser_of(pipe).state_dict().keys()


def test_what_cannot_be_filled(tiny_sdxl, tmp_path):
    with pytest.raises(PlanError, match="is not pruned"):
        formats.filled(tiny_sdxl.unet)
    (tmp_path / "taken").mkdir()
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    with pytest.raises(CheckpointError, match="exists"):
        formats.save_filled(small, tmp_path / "taken")


@pytest.mark.parametrize("model", ["emoji-turbo", "emoji-flux"])
def test_float8_is_what_layerwise_casting_draws(model, tmp_path):
    dense = ecodiff.load(model)
    small = ecodiff.variant(dense, some_plan(dense, empty=False))
    folder = formats.find_format("fp8").write(small, tmp_path / "fp8")
    half = ecodiff.save(small, tmp_path / "half", torch.bfloat16)
    name = denoiser_name(small)
    sizes = [folder_bytes(path / name) for path in (folder, half)]
    assert 0.45 < sizes[0] / sizes[1] < 0.65
    assert "enable_layerwise_casting" in (folder / "README.md").read_text()
    drawn_by_diffusers_alone(folder, dense)  # it opens where ecodiff is not
    found = denoiser_of(ecodiff.load(folder)).state_dict()
    eights = 0
    for key, weight in denoiser_of(small).state_dict().items():
        largest = weight.abs().max() if weight.numel() else 0
        torch.testing.assert_close(found[key], weight, rtol=0.08, atol=0.003 * float(largest) + 1e-3)
        eights += bool((found[key] != weight.bfloat16().float()).any())
    assert eights > len(found) / 3, "nothing was rounded to 8 bits"


def test_linears_that_torchao_fails_on_are_left_alone():
    torchao = pytest.importorskip("torchao.quantization")
    shapes = ((1, 128), (0, 4), (2, 4), (4, 0), (1, 1), (3, 1))
    layers = torch.nn.Sequential(*(torch.nn.Linear(*shape) for shape in shapes))
    assert left_alone(layers) == ["0", "1", "3", "4"]
    torchao.quantize_(layers, torchao.Int8WeightOnlyConfig(), lambda module, _: in_int8(module))
    assert layers[2](torch.ones(1, 2)).isfinite().all() and layers[0].weight.dtype == torch.float32


# Convolutions stay in 16 bits: nearly half of emoji-turbo.
@pytest.mark.parametrize(("model", "most"), [("emoji-turbo", 0.8), ("emoji-flux", 0.75)])
def test_int8_is_opened_by_diffusers_in_fewer_bytes(model, most, tmp_path):
    pytest.importorskip("torchao")
    dense = ecodiff.load(model)
    small = ecodiff.variant(dense, some_plan(dense))  # some layers are emptied
    folder = formats.find_format("int8").write(small, tmp_path / "int8")
    half = ecodiff.save(small, tmp_path / "half", torch.bfloat16)
    name = denoiser_name(small)
    sizes = [folder_bytes(path / name) for path in (folder, half)]
    assert 0.45 < sizes[0] / sizes[1] < most
    wanted, found = (drawn_by_diffusers_alone(path, dense, "bfloat16")["latents"] for path in (half, folder))
    error = float((found - wanted).float().square().mean() / wanted.float().var())
    assert 0 < error < 0.05
    card = (folder / "README.md").read_text()
    assert "torch.bfloat16" in card and "torchao" in card and "else torch.float32" not in card
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    with pytest.raises(CheckpointError, match="exists"):
        formats.find_format("int8").write(small, tmp_path)


def test_what_is_not_installed_is_not_offered(monkeypatch):
    monkeypatch.setattr("ecodiff.checkpoints.export.find_spec", lambda name: None)
    offered = [name for _, name in prediction.formats()]
    assert "comfyui" in offered and not {"int8", "gguf-q4_0"} & set(offered)
    for name, package in {"int8": "torchao", "gguf-q4_0": "gguf"}.items():
        with pytest.raises(CheckpointError, match=f"pip install {package}"):
            formats.find_format(name)

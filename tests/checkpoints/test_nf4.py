"""A pruned model in NF4: the bits of bitsandbytes, and what diffusers makes of them."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

import ecodiff
from ecodiff.checkpoints import formats, nf4
from ecodiff.checkpoints.saving import folder_bytes
from ecodiff.errors import CheckpointError, UnsupportedModelError
from ecodiff.pipelines import denoiser_calls, denoiser_name, denoiser_of, prompt_rows
from tests.checkpoints.test_folders import some_plan
from tests.conftest import latents

REAL = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not here")


def unpacked(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight, decoded as QLoRA describes it."""
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    both = tensors[name].flatten().int()
    numbers = torch.stack([both >> 4, both & 15], 1).flatten()
    count = torch.Size(state["shape"]).numel()
    scales = tensors[f"{name}.absmax"].repeat_interleave(state["blocksize"])[:count]
    return (tensors[f"{name}.quant_map"][numbers][:count] * scales).view(state["shape"])


@pytest.mark.parametrize("shape", [(64, 96), (3, 5), (1, 1), (7, 65)])
def test_a_weight_is_as_near_as_its_steps_allow(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors = {f"w{more}": part for more, part in nf4.packed(weight).items()}
    assert tensors["w"].shape == ((weight.numel() + 1) // 2, 1) and tensors["w"].dtype == torch.uint8
    apart = max(b - a for a, b in zip(nf4.CODE, nf4.CODE[1:], strict=False)) / 2
    blocks = -(-weight.numel() // nf4.BLOCK)
    assert tensors["w.absmax"].shape == (blocks,)
    most = tensors["w.absmax"].repeat_interleave(nf4.BLOCK)[: weight.numel()].view(shape) * apart
    assert ((unpacked(tensors, "w") - weight).abs() <= most * 1.001).all()
    assert (unpacked({"w" + k: v for k, v in nf4.packed(0 * weight).items()}, "w") == 0).all()


# Convolutions stay in 16 bits: nearly half of emoji-turbo.
@pytest.mark.parametrize(("model", "most"), [("emoji-turbo", 0.7), ("emoji-flux", 0.65)])
def test_a_folder(model, most, tmp_path):
    small = ecodiff.variant(dense := ecodiff.load(model), some_plan(dense))  # some layers are emptied
    folder = formats.find_format("nf4").write(small, tmp_path / "nf4")
    half, name = ecodiff.save(small, tmp_path / "half", torch.bfloat16), denoiser_name(small)
    sizes = [folder_bytes(path / name) for path in (folder, half)]
    assert sizes[0] / sizes[1] < most
    tensors, apart = load_file(folder / name / "diffusion_pytorch_model.safetensors"), set()
    for key, weight in denoiser_of(small).state_dict().items():
        if f"{key}.absmax" in tensors:
            error = (unpacked(tensors, key) - weight).square().mean() / weight.square().mean()
            assert 0 < error < 0.02, key
        else:
            assert torch.equal(tensors[key], weight.bfloat16()), key
            apart.add(key.removesuffix(".weight"))
    config = json.loads((folder / name / "config.json").read_text())["quantization_config"]
    assert set(config["llm_int8_skip_modules"]) <= apart and config["llm_int8_skip_modules"]
    assert "bitsandbytes and a GPU" in (folder / "README.md").read_text()
    with pytest.raises(CheckpointError, match="quantised"):
        ecodiff.load(folder)
    with pytest.raises(UnsupportedModelError, match="has not been pruned"):
        nf4.save_nf4(dense, tmp_path / "dense")


@REAL
def test_the_bits_are_those_of_bitsandbytes():
    import bitsandbytes.functional as real

    for shape in ((64, 96), (33, 7), (1280, 320)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        theirs, state = real.quantize_4bit(weight, blocksize=nf4.BLOCK, quant_type="nf4")
        ours = nf4.packed(weight)
        assert torch.equal(ours[""], theirs) and torch.equal(ours[".absmax"], state.absmax)
        stored = state.as_dict(packed=True)
        assert set(stored) == {key.removeprefix(".") for key in ours if key}
        assert torch.equal(ours[".quant_map"], stored["quant_map"])


@REAL
@pytest.mark.parametrize("model", ["emoji-turbo", "emoji-flux"])
def test_diffusers_opens_it(model, tmp_path, monkeypatch):
    """On this machine's CPU, of which diffusers' check for a GPU must not know."""
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantiser

    if not torch.cuda.is_available():
        monkeypatch.setattr(Quantiser, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(Quantiser, "update_device_map", lambda self, where: where or {"": "cpu"})
    dense = ecodiff.load(model)
    small = ecodiff.variant(dense, some_plan(dense))
    folder = formats.find_format("nf4").write(small, tmp_path / "nf4")
    opened = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
    opened.set_progress_bar_config(disable=True)
    quantised = [m for m in denoiser_of(opened).modules() if type(m).__name__ == "Linear4bit"]
    assert len(quantised) > 20
    for module in quantised:  # that way of a CPU knows rows of whole blocks only
        module.support_avx512bf16_for_cpu = False
    assert latents(opened).isfinite().all()
    name = denoiser_name(small)
    tensors = load_file(folder / name / "diffusion_pytorch_model.safetensors")
    rounded = copy.deepcopy(denoiser_of(small)).bfloat16()
    for key, weight in rounded.named_parameters():
        if f"{key}.absmax" in tensors:
            weight.data = unpacked(tensors, key).bfloat16()
    rows = prompt_rows(
        ["red apple", "cat face"], range(2), 0, {"num_inference_steps": 2, "height": 64, "width": 64}
    )
    args, kwargs = tree_map(
        lambda leaf: leaf.bfloat16() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf,
        denoiser_calls(small, rows, limit=1)[0],
    )
    with torch.no_grad():
        ours, theirs = (
            model(*args, **kwargs | {"return_dict": False})[0].float()
            for model in (rounded, denoiser_of(opened))
        )
    # Of rows of 96 weights bitsandbytes 0.50 does not get back on a CPU what it packed itself.
    assert (ours - theirs).square().mean() < 5e-3 * ours.var()

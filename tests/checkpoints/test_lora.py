"""A LoRA of the dense model, translated, is that LoRA fused and then pruned."""

import pytest
import torch
from safetensors.torch import save_file

import ecodiff
from ecodiff.checkpoints.lora import save_lora, trained_lora, translate_lora
from ecodiff.errors import CheckpointError, PlanError
from ecodiff.pipelines import denoiser_name, denoiser_of
from tests.checkpoints.test_folders import some_plan
from tests.conftest import latents

pytest.importorskip("peft")
TARGETS = ("to_q", "to_v", "to_out.0", "proj", "net.2", "proj_mlp", "proj_out", "conv1", "time_emb_proj")


def layers(pipe):
    """Linears and convolutions that LoRAs are usually made for, also such that no unit runs through."""
    for name, module in denoiser_of(pipe).named_modules():
        if name.endswith(TARGETS) and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "." in name:
            yield name, module


def matrices(pipe, rank=3):
    generator = torch.Generator().manual_seed(0)
    for name, module in layers(pipe):
        kernel = module.weight.shape[2:]
        down = torch.randn(rank, module.weight.shape[1], *kernel, generator=generator)
        up = torch.randn(len(module.weight), rank, *(1 for _ in kernel), generator=generator)
        yield name, 0.3 * down / down[0].numel() ** 0.5, 0.3 * up


def peft_file(pipe, path, alpha=None):
    prefix, tensors = denoiser_name(pipe), {}
    for name, down, up in matrices(pipe):
        tensors[f"{prefix}.{name}.lora_A.weight"], tensors[f"{prefix}.{name}.lora_B.weight"] = down, up
    save_file(tensors, path)
    return path


def kohya_file(pipe, path, alpha=1.5):
    tensors = {}
    for name, down, up in matrices(pipe):
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def check(pipe, file):
    plan = some_plan(pipe)
    small = ecodiff.variant(pipe, plan)
    plain = latents(small)
    tensors, report = translate_lora(file, small, dense=denoiser_of(pipe))
    assert report.cut and report.unchanged
    small.load_lora_weights(tensors)
    translated = latents(small)
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = latents(ecodiff.variant(pipe, plan))
    scale = float(expected.abs().max())
    torch.testing.assert_close(translated / scale, expected / scale, atol=2e-5, rtol=0)
    assert (plain - expected).abs().max() > 1e-3 * scale, "the LoRA did nothing"
    return report


@pytest.mark.parametrize("kind", ["sdxl", "sd-1.5", "flux-dev", "sd3.5"])
def test_translated_equals_fused_and_pruned(kind, tmp_path):
    from tests.conftest import PIPELINES

    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    report = check(pipe, peft_file(pipe, tmp_path / "lora.safetensors"))
    assert "layers cut to fit" in report.words()


def test_kohyas_naming_and_scale(tiny_sdxl, tmp_path):
    report = check(tiny_sdxl, kohya_file(tiny_sdxl, tmp_path / "kohya.safetensors"))
    assert "layers cut to fit" in report.words()


def test_an_emptied_layer_is_dropped_and_said(tiny_sdxl, tmp_path):
    group = next(g for g in ecodiff.find_groups(tiny_sdxl.unet) if g.kind == "heads")
    plan = ecodiff.PrunePlan({group.name: torch.zeros(group.size, dtype=torch.bool)})
    file = peft_file(tiny_sdxl, tmp_path / "lora.safetensors")
    tensors, report = translate_lora(file, tiny_sdxl, plan)
    assert f"{group.name}.to_q" in report.dropped and "nothing of the layer is left" in report.words()
    small = ecodiff.variant(tiny_sdxl, plan)
    small.load_lora_weights(tensors)
    assert latents(small).isfinite().all()


def test_a_lora_that_was_trained_on_the_pruned_model_says_so(tiny_sdxl, tmp_path):
    from peft import LoraConfig

    plan = some_plan(tiny_sdxl)
    small = ecodiff.variant(tiny_sdxl, plan)
    small.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    before = latents(small)
    file = save_lora(trained_lora(small), tmp_path / "trained.safetensors", plan)
    again = ecodiff.variant(tiny_sdxl, plan)
    again.load_lora_weights(str(file))
    torch.testing.assert_close(latents(again), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(PlanError, match="fits this model as it is"):
        translate_lora(file, tiny_sdxl, plan)
    other = some_plan(tiny_sdxl, seed=1)
    with pytest.raises(PlanError, match="no other size"):
        translate_lora(file, tiny_sdxl, other)


def test_files_that_are_no_loras(tiny_sdxl, tmp_path):
    plan = some_plan(tiny_sdxl)
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a LoRA"):
        translate_lora(noise, tiny_sdxl, plan)
    with pytest.raises(CheckpointError, match="not a LoRA"):
        translate_lora(tmp_path / "pickle.bin", tiny_sdxl, plan)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for rows, text in ((7, "another model"), (32, "another model")):
        wrong = {f"{layer}.lora_A.weight": torch.ones(2, 9), f"{layer}.lora_B.weight": torch.ones(rows, 2)}
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(PlanError, match=text):
            translate_lora(tmp_path / "wrong.safetensors", tiny_sdxl, plan)
    with pytest.raises(PlanError, match="not pruned"):
        translate_lora(noise, tiny_sdxl)

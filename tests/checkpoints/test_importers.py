"""EcoDiff's masks in the order in which its authors' hooks write them; plans from zips."""

import zipfile

import pytest
import torch

import ecodiff
from ecodiff.checkpoints import importers
from ecodiff.checkpoints.loading import empty_denoiser
from ecodiff.errors import CheckpointError, PlanError
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning.plan import PLAN_FILE
from ecodiff.pruning.slicing import check
from tests.checkpoints.test_folders import some_plan


def test_masks_of_sdxl_are_in_the_order_in_which_layers_run():
    """In the authors' demo, attentions 61 and 63 of the forward pass are mid_block's 6 and 7, attn2."""
    unet = empty_denoiser("sdxl")
    groups = importers._in_order(ecodiff.find_groups(unet))
    heads = [group for group in groups if group.kind == "heads"]
    neurons = [group for group in groups if group.kind == "ffn"]
    block = "mid_block.attentions.0.transformer_blocks"
    assert (heads[61].name, heads[63].name) == (f"{block}.6.attn2", f"{block}.7.attn2")
    assert (len(heads), sum(g.size for g in heads)) == (140, 2600)
    assert (len(neurons), sum(g.size for g in neurons)) == (70, 332_800)


def test_masks_become_scores(tiny_sdxl, tmp_path):
    groups = importers._in_order(ecodiff.find_groups(tiny_sdxl.unet))
    masks = {kind: [torch.randn(1, g.size) for g in groups if g.kind == kind] for kind in ("heads", "ffn")}
    files = []
    for kind, tensors in masks.items():
        files.append(tmp_path / f"{kind}.pt")
        torch.save([tensor.bfloat16() for tensor in tensors], files[-1])
    scores = importers.import_files(files, tiny_sdxl.unet)
    for kind, tensors in masks.items():
        named = [group.name for group in groups if group.kind == kind]
        for name, tensor in zip(named, tensors, strict=True):
            assert torch.equal(scores.values[name].argsort(), tensor.bfloat16().float().flatten().argsort())
    check(scores.plan(ratio=0.1), tiny_sdxl.unet)
    torch.save(masks["heads"][:-1], files[0])
    with pytest.raises(PlanError, match="another model"):
        importers.import_files(files, tiny_sdxl.unet)
    torch.save({"lr": "not a tensor"}, files[0])
    with pytest.raises(CheckpointError, match="list of tensors"):
        importers.import_files(files, tiny_sdxl.unet)


def test_a_damaged_plan_in_a_zip(tiny_sdxl, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr(f"model/{PLAN_FILE}", b"half a plan")
    with pytest.raises(CheckpointError, match="truncated"):
        importers.import_files([tmp_path / "model.zip"], denoiser_of(tiny_sdxl))
    with pytest.raises(CheckpointError, match="one plan file"):
        plan = some_plan(tiny_sdxl).save(tmp_path / "plan.safetensors")
        importers.import_files([plan, tmp_path / "model.zip"], denoiser_of(tiny_sdxl))

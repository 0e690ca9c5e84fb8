"""EcoDiff's masks in the order in which its authors' hooks write them; plans from zips."""

import zipfile

import pytest
import torch

import ecodiff
from ecodiff.checkpoints import importers
from ecodiff.checkpoints.loading import empty_denoiser
from ecodiff.errors import BudgetError, CheckpointError, PlanError
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning.plan import PLAN_FILE
from ecodiff.pruning.slicing import check
from ecodiff.units import ALL_KINDS
from tests.checkpoints.test_folders import some_plan
from tests.conftest import flux


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


def test_ecodiffs_own_sizes_are_cut_exactly(tmp_path):
    """Its SDXL mask keeps 68 % of 2,600 heads and 88 % of 332,800 neurons."""
    unet = empty_denoiser("sdxl")
    groups = importers._in_order(ecodiff.find_groups(unet))
    generator, files = torch.Generator().manual_seed(0), []
    for kind in ("heads", "ffn"):
        files.append(tmp_path / f"{kind}.pt")
        masks = [torch.randn(g.size, generator=generator) for g in groups if g.kind == kind]
        torch.save(masks, files[-1])
    scores = importers.import_files(files, unet)
    plan = scores.plan(units={"heads": 0.32, "ffn": 0.12})
    kinds = {group.name: group.kind for group in groups}
    gone = {
        kind: sum(int((~keep).sum()) for name, keep in plan.items() if kinds[name] == kind)
        for kind in ("heads", "ffn")
    }
    assert gone == {"heads": 832, "ffn": 39_936}
    kept = torch.cat([scores.values[name][keep] for name, keep in plan.items() if kinds[name] == "heads"])
    cut = torch.cat([scores.values[name][~keep] for name, keep in plan.items() if kinds[name] == "heads"])
    assert cut.max() <= kept.min(), "the lowest log-alphas of all layers together"
    assert plan.metadata["params_pruned"] == scores.total - scores.removed(plan)
    for wrong in ({"heads": 1.2}, {"heads": -0.1}, {"resnet": 0.1}):
        with pytest.raises(BudgetError, match="cannot be removed"):
            scores.plan(units=wrong)
    with pytest.raises(BudgetError, match="one size"):
        scores.plan(ratio=0.1, units={"heads": 0.1})


def test_the_third_file_of_flux_is_of_its_modulation(tmp_path):
    transformer = flux().transformer
    groups = ecodiff.find_groups(transformer, ("modulation",))
    rows = [g for g in groups if "blocks" in g.name]
    assert [g.name for g in rows[:2]] == ["transformer_blocks.0.norm1", "transformer_blocks.0.norm1_context"]
    torch.save([torch.randn(g.size) for g in rows], tmp_path / "norm.pt")
    scores = importers.import_files([tmp_path / "norm.pt"], transformer)
    assert set(scores.kinds.values()) == {"modulation"} and len(scores.values) == len(rows)
    check(scores.plan(units={"modulation": 0.25}), transformer)


@pytest.mark.parametrize("kinds", [("modulation",), ("modulation_directions", "heads"), ALL_KINDS])
def test_a_plan_of_any_kinds_is_counted(kinds, tmp_path):
    transformer = flux(guidance_embeds=True).transformer
    named = {group.name: group.kind for group in ecodiff.find_groups(transformer, ALL_KINDS)}
    whole = some_plan(flux(guidance_embeds=True))
    keep = {name: units for name, units in whole.items() if named[name] in kinds}
    bases = {name: basis for name, basis in whole.bases.items() if name in keep}
    plan = ecodiff.PrunePlan(keep, whole.metadata if bases else {}, bases)
    found = importers.import_files([plan.save(tmp_path / "plan.safetensors")], transformer)
    small = ecodiff.slice_(flux(guidance_embeds=True).transformer, plan)
    assert found.metadata["params_pruned"] == sum(p.numel() for p in small.parameters())

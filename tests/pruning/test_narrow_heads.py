"""Heads that lost directions of queries, keys and values: as narrow as what is left, by any processor."""

import pytest
import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from torch import nn

import ecodiff
from ecodiff.pruning.heads import fill_heads_
from ecodiff.pruning.slicing import shared_copy
from tests.conftest import randomise, tiny_unet

HEADS, WIDTH = 4, 24
COMPARED = ("value_directions", "query_directions")

TEXT = {"cross_attention_dim": 32}
JOINT = {"added_kv_proj_dim": 32, "context_pre_only": False}
ADDED = {"added_kv_proj_dim": 32, "norm_num_groups": 8}
PROCESSORS = {
    "torch": (processors.AttnProcessor2_0(), TEXT),
    "written out": (processors.AttnProcessor(), TEXT),
    "sliced": (processors.SlicedAttnProcessor(2), TEXT),
    "joint": (processors.JointAttnProcessor2_0(), JOINT),
    "added, torch": (processors.AttnAddedKVProcessor2_0(), ADDED),
    "added": (processors.AttnAddedKVProcessor(), ADDED),
}


class Model(nn.Module):
    """One attention, of images and text."""

    def __init__(self, processor, options):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(96, heads=HEADS, dim_head=WIDTH, bias=True, **options)])
        self.blocks[0].set_processor(processor)

    def forward(self, x, text):
        return self.blocks[0](x, encoder_hidden_states=text)


def kept(model, most):
    """A plan that keeps 1 to `most` directions of each head, in bases of their own."""
    generator, plan, bases = torch.Generator().manual_seed(0), {}, {}
    for group in ecodiff.find_groups(model, COMPARED):
        count = torch.randint(1, most + 1, (HEADS, 1), generator=generator)
        count[0] = most
        order = torch.rand(HEADS, WIDTH, generator=generator).argsort(1).argsort(1)
        keep = plan[group.name] = (order < count).flatten()
        turn = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, generator=generator))[0]
        bases[group.name] = turn.flatten(0, 1)[keep], turn.flatten(0, 1)[keep].T.contiguous()
    return ecodiff.PrunePlan(plan, {}, bases)


@torch.no_grad()
@pytest.mark.parametrize(("most", "width"), [(5, 8), (11, 16), (20, 24)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_narrow_heads_give_what_masked_ones_give(name, most, width):
    model = randomise(Model(*PROCESSORS[name])).eval()
    plan = kept(model, most)
    assert len(plan) == 2, "the values' and the queries'"
    small = ecodiff.slice_(shared_copy(model), plan)
    assert small.blocks[0].head_widths == (WIDTH, width)
    x = torch.randn(2, 96, 3, 3) if name.startswith("added") else torch.randn(2, 9, 96)
    given, seen = (x, torch.randn(2, 5, 32)), []
    with ecodiff.masked(model, plan):
        masked = model(*given)
    small.blocks[0].to_out[0].register_forward_pre_hook(lambda _, read: seen.append(read[0].shape[-1]))
    for found, wanted in zip(_all(small(*given)), _all(masked), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert seen == [int(plan["blocks.0.values"].sum())]
    filled = fill_heads_(small)
    assert filled.blocks[0].scale == WIDTH**-0.5
    for found, wanted in zip(_all(filled(*given)), _all(masked), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def _all(output):
    return output if isinstance(output, tuple) else (output,)


@torch.no_grad()
def test_heads_of_which_one_projection_is_whole_stay_as_wide_as_they_are():
    model = randomise(Model(*PROCESSORS["torch"])).eval()
    plan = kept(model, 5)
    given = torch.randn(2, 9, 96), torch.randn(2, 5, 32)
    for name in plan:
        alone = ecodiff.PrunePlan({name: plan[name]}, {}, {name: plan.bases[name]})
        small = ecodiff.slice_(shared_copy(model), alone)
        assert small.blocks[0].head_widths == (1, 1)
        with ecodiff.masked(model, alone):
            masked = model(*given)
        torch.testing.assert_close(small(*given), masked, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_saved_model_has_narrow_heads_again(tmp_path):
    unet = randomise(tiny_unet(attention_head_dim=2, block_out_channels=(32, 64), norm_num_groups=16)).eval()
    groups = ecodiff.find_groups(unet, COMPARED)
    small = ecodiff.slice_(shared_copy(unet), {g.name: torch.arange(g.size) % 5 < 2 for g in groups})
    widths = {n: m.head_widths for n, m in small.named_modules() if hasattr(m, "head_widths")}
    assert set(widths.values()) == {(32, 16)} and widths
    small.save_pretrained(tmp_path / "small")
    loaded = type(small).from_pretrained(tmp_path / "small")
    assert {n: m.head_widths for n, m in loaded.named_modules() if hasattr(m, "head_widths")} == widths
    with torch.device("meta"):
        empty = type(small).from_config(type(small).load_config(tmp_path / "small"))
    assert {n: m.head_widths for n, m in empty.named_modules() if hasattr(m, "head_widths")} == widths
    on_meta = (torch.empty(*shape, device="meta") for shape in ((1, 4, 8, 8), (1,), (1, 3, 32)))
    assert empty(*on_meta)[0].shape == (1, 4, 8, 8), "and can be counted there"
    given = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 32)
    torch.testing.assert_close(loaded(*given)[0], small(*given)[0])

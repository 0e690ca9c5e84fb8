"""What is asked of every class of text encoder that the catalogue's models use, on tiny random ones."""

import copy

import pytest
import torch
import transformers

import ecodiff
from ecodiff.metrics.cost import parameters
from ecodiff.pruning import ecodiff_sliced_v1
from tests.conftest import randomise

COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = transformers.CLIPTextConfig(
    **COMMON, vocab_size=50, max_position_embeddings=16, projection_dim=16, bos_token_id=0, eos_token_id=1
)
LANGUAGE = COMMON | {"vocab_size": 50, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0}
LANGUAGE |= {"eos_token_id": 1, "pad_token_id": 2}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 3, "vocab_size": 50}
T5 |= {"feed_forward_proj": "gated-gelu"}
ROWS = {
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP,
    "T5EncoderModel": transformers.T5Config(**T5),
    "UMT5EncoderModel": transformers.UMT5Config(**T5),
    "Gemma2Model": transformers.Gemma2Config(**LANGUAGE),
    "LlamaModel": transformers.LlamaConfig(**LANGUAGE),
    "MistralModel": transformers.MistralConfig(**LANGUAGE),
    "Qwen2Model": transformers.Qwen2Config(**LANGUAGE),
    "Qwen3Model": transformers.Qwen3Config(**LANGUAGE),
    "Qwen3ForCausalLM": transformers.Qwen3Config(**LANGUAGE),
}


@pytest.fixture(params=ROWS)
def encoder(request):
    return randomise(getattr(transformers, request.param)(copy.deepcopy(ROWS[request.param])))


def run(encoder) -> torch.Tensor:
    ids = torch.arange(3, 17).view(2, 7)
    found = encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return torch.cat([state.flatten() for state in found.hidden_states])


def some(encoder, least=False) -> ecodiff.PrunePlan:
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in ecodiff.find_groups(encoder):
        keep[group.name] = torch.rand(group.size, generator=generator) > 0.4
        keep[group.name][0] = True
        if least:
            keep[group.name] = torch.arange(group.size) < group.floor
    return ecodiff.PrunePlan(keep)


@torch.no_grad()
def test_masked_equals_sliced_and_reloaded(encoder, tmp_path):
    """Partly, and then again down to the least that may stay."""
    assert {group.kind for group in ecodiff.find_groups(encoder)} == {"heads", "ffn"}
    for number, least in enumerate((False, True)):
        plan, before, dense = some(encoder, least), parameters(encoder), run(encoder)
        with ecodiff.masked(encoder, plan):
            masked = run(encoder)
        ecodiff.slice_(encoder, plan)
        torch.testing.assert_close(run(encoder), masked, rtol=1e-4, atol=1e-4)
        assert (dense - masked).abs().max() > 1e-2 and parameters(encoder) < before
        encoder.save_pretrained(tmp_path / str(number))
        opened = getattr(ecodiff_sliced_v1, type(encoder).__name__).from_pretrained(tmp_path / str(number))
        assert torch.equal(run(opened), run(encoder))
    assert ecodiff.pruning.slicing.plan_of(encoder)


def test_dead_parameters_are_exactly_the_removed_ones(encoder):
    plan = some(encoder)
    groups = {group.name: group for group in ecodiff.find_groups(encoder)}
    gone = {}
    for name, keep in plan.items():
        for slot in groups[name].slots:
            gone.setdefault((slot.module, slot.dim), []).append(slot.index[~keep].flatten())
    with ecodiff.masked(encoder, plan):
        run(encoder).square().sum().backward()
    for (module, dim), rows in gone.items():
        gradient = encoder.get_submodule(module).weight.grad.transpose(0, dim).flatten(1).abs().sum(1)
        dead = torch.zeros(len(gradient), dtype=torch.bool)
        dead[torch.cat(rows)] = True
        assert torch.equal(gradient == 0, dead), module

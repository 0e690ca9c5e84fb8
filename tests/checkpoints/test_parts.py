"""HiDream reads a text encoder that is in another repository: opened there, saved with the rest."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, HiDreamImagePipeline, HiDreamImageTransformer2DModel
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

import ecodiff
from ecodiff import catalog
from ecodiff.architectures.inputs import evenly_routed
from ecodiff.errors import ModelNotFoundError
from ecodiff.learning.memory import activation_bytes
from ecodiff.metrics.cost import module_macs
from ecodiff.metrics.fidelity import generate
from ecodiff.pruning.scores import Scores
from tests.conftest import randomise, t5, text_config, tiny_vae, tokenizer, tokenizer_5
from tests.denoisers import ROWS
from tests.pipelines import TEXT, flow, tiny

ROW = "HiDream-I1 (experts)"


@pytest.fixture
def known(tmp_path, monkeypatch):
    """The catalogue's entry, of tiny random parts: what it reads of Llama lies in another folder."""
    clip = [randomise(CLIPTextModelWithProjection(text_config(8))) for _ in range(2)]
    pipe = HiDreamImagePipeline(
        scheduler=flow(),
        vae=randomise(tiny_vae(shift_factor=0.0)),
        text_encoder=clip[0],
        tokenizer=tokenizer(),
        text_encoder_2=clip[1],
        tokenizer_2=tokenizer(),
        text_encoder_3=randomise(t5()),
        tokenizer_3=tokenizer_5(),
        text_encoder_4=randomise(LlamaForCausalLM(LlamaConfig(**TEXT))),
        tokenizer_4=tokenizer_5(),
        transformer=tiny(HiDreamImageTransformer2DModel, ROW, text_emb_dim=32),
    )
    pipe.save_pretrained(tmp_path / "dense")
    llama = tmp_path / "llama"
    shutil.move(tmp_path / "dense" / "text_encoder_4", llama)
    shutil.copytree(tmp_path / "dense" / "tokenizer_4", llama, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "dense" / "tokenizer_4")
    entry = replace(
        catalog.MODELS["hidream-i1"],
        source=str(tmp_path / "dense"),
        parts=dict.fromkeys(("text_encoder_4", "tokenizer_4"), str(llama)),
        denoiser=None,
    )
    monkeypatch.setitem(catalog.MODELS, "hidream-i1", entry)
    return entry


def drawn(pipe):
    pipe.default_sample_size = 8  # it draws a million pixels otherwise, whatever is asked for
    extra = {"max_sequence_length": 16}
    return generate(pipe, "red apple", seed=0, steps=2, guidance_scale=2.0, size=16, extra=extra).latents


@torch.no_grad()
def test_it_is_opened_from_there_pruned_and_saved_whole(known, tmp_path):
    pipe = ecodiff.load("hidream-i1")
    assert type(pipe.text_encoder_4) is LlamaForCausalLM
    plan = Scores.unranked(pipe.transformer).plan(ratio=0.2)
    small = ecodiff.variant(pipe, plan)
    with ecodiff.masked(pipe.transformer, plan):
        masked = drawn(pipe)
    torch.testing.assert_close(drawn(small), masked, rtol=1e-3, atol=1e-4)
    folder = ecodiff.save(small, tmp_path / "small")
    shutil.rmtree(tmp_path / "llama")
    torch.testing.assert_close(drawn(ecodiff.load(folder)), masked, rtol=1e-3, atol=1e-4)
    plain = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(plain), masked, rtol=1e-3, atol=1e-4)


def test_what_is_missing_is_named(known, tmp_path):
    shutil.rmtree(tmp_path / "llama")
    with pytest.raises(ModelNotFoundError, match=r"llama as its t.*accept its licence"):
        ecodiff.load("hidream-i1")


def test_experts_are_counted_as_if_each_got_as_much(known):
    """On the meta device, where nobody knows which expert a token goes to: the sum is right all the same."""
    row = ROWS[ROW]
    given = {n: v.float() if v.is_floating_point() else v for n, v in row.given().items()}
    real = module_macs(tiny(HiDreamImageTransformer2DModel, ROW, force_inference_output=False), (), given)[""]
    meta = tiny(HiDreamImageTransformer2DModel, ROW, force_inference_output=False).to("meta")
    found = module_macs(meta, (), {name: value.to("meta") for name, value in given.items()})[""]
    assert found == pytest.approx(real, rel=0.01)
    assert (
        activation_bytes(
            tiny(HiDreamImageTransformer2DModel, ROW, force_inference_output=False), (), given
        ).by_block
        > 0
    )
    with evenly_routed(meta):
        pass
    assert not any("forward" in vars(module) for module in meta.modules())

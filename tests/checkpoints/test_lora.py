"""A LoRA of the dense model, translated, is that LoRA fused and then pruned."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import ecodiff
from ecodiff import catalog
from ecodiff.checkpoints import lora_names
from ecodiff.checkpoints.lora import translate, translate_lora
from ecodiff.checkpoints.lora_saving import save_lora, trained_lora
from ecodiff.checkpoints.single_file import on_hub
from ecodiff.cli import main
from ecodiff.errors import CheckpointError, PlanError
from ecodiff.metrics.fidelity import generate
from ecodiff.pipelines import denoiser_name, denoiser_of
from ecodiff.pruning.heads import fill_heads_
from ecodiff.pruning.slicing import plan_of
from tests import loras
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PIPELINES, latents
from tests.loras import dora_file, kohya_file, layers, peft_file

pytest.importorskip("peft")


def check(pipe, file):
    plan = some_plan(pipe)
    if hasattr(pipe, "_maybe_expand_transformer_param_shape_or_error_"):  # FLUX: no LoRA on scattered rows
        rows = {g.name for g in ecodiff.find_groups(denoiser_of(pipe), ["modulation"])}
        kept = {name: keep for name, keep in plan.items() if name not in rows}
        plan = ecodiff.PrunePlan(kept, plan.metadata, plan.bases)
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
    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    report = check(pipe, peft_file(pipe, tmp_path / "lora.safetensors"))
    assert "layers cut to fit" in report.words()


def test_flux_says_that_it_takes_none_on_scattered_rows(tmp_path):
    from tests.conftest import flux

    pipe = flux()
    file = peft_file(pipe, tmp_path / "lora.safetensors")
    _, report = translate_lora(file, pipe, some_plan(pipe))
    assert report.dropped["transformer_blocks.0.norm1.linear"] == "FLUX takes none on rows of modulation"


def test_kohyas_naming_and_scale(tiny_sdxl, tmp_path):
    report = check(tiny_sdxl, kohya_file(tiny_sdxl, tmp_path / "kohya.safetensors"))
    assert "layers cut to fit" in report.words()


@pytest.mark.parametrize(("kind", "naming"), [("sdxl", "peft"), ("sdxl", "kohya"), ("flux-dev", "peft")])
def test_a_dora_equals_fused_and_pruned(kind, naming, tmp_path):
    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    groups = [g for g in ecodiff.find_groups(denoiser_of(pipe)) if g.kind != "modulation"]
    plan = ecodiff.PrunePlan({g.name: torch.arange(g.size) < (g.size + 1) // 2 for g in groups})
    small = ecodiff.variant(pipe, plan)
    plain = latents(small)
    file = dora_file(pipe, tmp_path / "dora.safetensors", naming)
    tensors, report = translate_lora(file, small, dense=denoiser_of(pipe))
    assert report.cut and report.unchanged and not report.dropped
    small.load_lora_weights(tensors)
    translated = latents(small)
    pipe.load_lora_weights(str(dora_file(pipe, tmp_path / "peft.safetensors", "peft")))
    pipe.fuse_lora()  # PEFT's own arithmetic
    pipe.unload_lora_weights()
    expected = latents(ecodiff.variant(pipe, plan))
    scale = float(expected.abs().max())
    torch.testing.assert_close(translated / scale, expected / scale, atol=2e-5, rtol=0)
    assert (plain - expected).abs().max() > 1e-3 * scale, "the DoRA did nothing"
    file = save_lora(tensors, tmp_path / "small.safetensors", plan)
    assert any(key.endswith("lora_magnitude_vector") for key in load_file(file))
    with pytest.raises(CheckpointError, match="do not agree"):
        save_lora(tensors, tmp_path / "kohya.safetensors", plan, "kohya", denoiser_of(pipe))


def test_the_command_takes_a_doras_norms_from_the_dense_model_that_it_is_given(tiny_sdxl, tmp_path, capsys):
    tiny_sdxl.save_pretrained(tmp_path / "dense")
    groups = ecodiff.find_groups(tiny_sdxl.unet)
    keep = {g.name: torch.arange(g.size) < (g.size + 1) // 2 for g in groups}
    plan = ecodiff.PrunePlan(keep, {"model": "nobody/knows-it"})
    small = ecodiff.variant(tiny_sdxl, plan)
    folder = ecodiff.save(small, tmp_path / "small")
    file, out = dora_file(tiny_sdxl, tmp_path / "dora.safetensors", "peft"), tmp_path / "out.safetensors"
    assert main(["lora", str(folder), str(file), "--dense", str(tmp_path / "dense"), "--out", str(out)]) == 0
    wanted, _ = translate_lora(file, small, dense=tiny_sdxl.unet)
    found = load_file(out)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor)


def test_where_a_dora_cannot_be_cut_it_is_said(tiny_sdxl, tmp_path):
    file = dora_file(tiny_sdxl, tmp_path / "dora.safetensors", "peft")
    tensors = load_file(file) | {
        f"text_encoder.text_model.encoder.layers.0.mlp.fc1.{part}": torch.ones(4, 4)
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }
    save_file(tensors, file)
    plan = some_plan(tiny_sdxl)  # with directions inside heads
    found, report = translate_lora(file, ecodiff.variant(tiny_sdxl, plan), dense=tiny_sdxl.unet)
    reasons = " ".join(report.dropped.values())
    assert "no rows of this pruned layer" in reasons and "on the denoiser only" in reasons
    assert not any(key.startswith("text_encoder") for key in found)
    with pytest.raises(CheckpointError, match="weights of both models"):
        translate(file, type(tiny_sdxl), "unet", plan, tiny_sdxl.unet)


@pytest.mark.parametrize("name", ["sdxl-dmd2", "sdxl-hyper"])
def test_a_model_that_is_a_lora_is_fused_into_its_base(name, tiny_sdxl, tmp_path, monkeypatch):
    """With its own schedule; from the stand-in of a repository to a pruned folder that needs neither."""
    known = catalog.MODELS[name]
    repository, file = on_hub(known.source)
    peft_file(tiny_sdxl, tmp_path / file)
    tiny_sdxl.save_pretrained(tmp_path / "base")
    base = replace(catalog.find("sdxl"), name="base", source=str(tmp_path / "base"), denoiser=None)
    monkeypatch.setitem(catalog.MODELS, "sdxl", base)
    load_lora = type(tiny_sdxl).load_lora_weights

    def from_folder(pipe, asked, **options):
        assert (asked, options["weight_name"]) == (repository, file)
        load_lora(pipe, str(tmp_path / file))

    monkeypatch.setattr(type(tiny_sdxl), "load_lora_weights", from_folder)
    pipe = ecodiff.load(replace(known, denoiser=None))
    assert type(pipe.scheduler).__name__ == known.scheduler["_class_name"]
    drawn = generate(pipe, "red apple", 0, steps=4, guidance_scale=0.0, size=64, extra=known.extra).latents
    load_lora(tiny_sdxl, str(tmp_path / file))
    tiny_sdxl.fuse_lora()
    tiny_sdxl.unload_lora_weights()
    for key, value in tiny_sdxl.unet.state_dict().items():
        torch.testing.assert_close(pipe.unet.state_dict()[key], value)
    small = ecodiff.save(ecodiff.variant(pipe, some_plan(pipe)), tmp_path / "small")
    assert type(ecodiff.load(small).scheduler) is type(pipe.scheduler) and drawn.isfinite().all()


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
    with pytest.raises(CheckpointError, match="not a safetensors file"):
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


def text_encoder_layers(pipe):
    for prefix, encoder in (("lora_te1", pipe.text_encoder), ("lora_te2", pipe.text_encoder_2)):
        for name, module in encoder.named_modules():
            if name.endswith(("self_attn.q_proj", "mlp.fc1")):
                yield f"{prefix}_text_model_{name.removeprefix('text_model.').replace('.', '_')}", module


def test_layers_of_pruned_text_encoders_are_cut_like_them(tiny_sdxl, tmp_path):
    """The LoRA fused into the dense text encoders, which are then cut, gives the same embeddings."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for prefix in ("text_encoder", "text_encoder_2"):
        for name, module in getattr(tiny_sdxl, prefix).named_modules():
            if name.endswith(("q_proj", "v_proj", "out_proj", "fc1", "fc2")):
                outs, ins = module.weight.shape
                path = f"{prefix}.text_model.{name.removeprefix('text_model.')}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(3, ins, generator=generator) / ins**0.5
                tensors[f"{path}.lora_B.weight"] = torch.randn(outs, 3, generator=generator)
    unet = load_file(peft_file(tiny_sdxl, tmp_path / "unet.safetensors"))
    save_file(unet | tensors, tmp_path / "both.safetensors")
    keep = dict(some_plan(tiny_sdxl))
    for prefix in ("text_encoder", "text_encoder_2"):
        for group in ecodiff.find_groups(getattr(tiny_sdxl, prefix)):
            keep[f"{prefix}.{group.name}"] = torch.arange(group.size) >= group.size // 2
    plan = ecodiff.PrunePlan(keep, bases=some_plan(tiny_sdxl).bases)

    def embedding(pipe):
        with torch.no_grad():
            return pipe.encode_prompt("red apple", device="cpu", do_classifier_free_guidance=False)[0]

    small = ecodiff.variant(tiny_sdxl, plan)
    before = embedding(small)
    translated, report = translate_lora(tmp_path / "both.safetensors", small, dense=tiny_sdxl.unet)
    assert sum(layer.startswith("text_encoder") for layer in report.cut) == len(tensors) // 2
    small.load_lora_weights(str(save_lora(translated, tmp_path / "small.safetensors", plan)))
    found = embedding(small)
    tiny_sdxl.load_lora_weights(str(tmp_path / "both.safetensors"))
    tiny_sdxl.fuse_lora(components=["text_encoder", "text_encoder_2"])
    tiny_sdxl.unload_lora_weights()
    wanted = embedding(ecodiff.variant(tiny_sdxl, plan))
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_alpha_counts_on_text_encoders_too(tiny_sdxl, tmp_path):
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in text_encoder_layers(tiny_sdxl):
        outs, ins = module.weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.randn(8, ins, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outs, 8, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    kohya = load_file(kohya_file(tiny_sdxl, tmp_path / "unet.safetensors"))
    save_file(kohya | tensors, tmp_path / "both.safetensors")
    plan = some_plan(tiny_sdxl)
    small = ecodiff.variant(tiny_sdxl, plan)

    def embedding(pipe):
        with torch.no_grad():
            return pipe.encode_prompt("red apple", device="cpu", do_classifier_free_guidance=False)[0]

    plain = embedding(tiny_sdxl)
    tensors, report = translate_lora(tmp_path / "both.safetensors", small, dense=tiny_sdxl.unet)
    assert report.others
    tiny_sdxl.load_lora_weights(str(tmp_path / "both.safetensors"))
    wanted = embedding(tiny_sdxl)
    tiny_sdxl.unload_lora_weights()
    small.load_lora_weights(str(save_lora(tensors, tmp_path / "small.safetensors", plan)))
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(embedding(small), wanted, rtol=1e-4, atol=1e-4)
    encoders = {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder")}
    file = save_lora(encoders, tmp_path / "kohya.safetensors", plan, "kohya", tiny_sdxl.unet)
    assert all(
        key.startswith(("lora_te1_text_model_enc", "lora_te2_text_model_enc")) for key in load_file(file)
    )
    tiny_sdxl.load_lora_weights(str(file))
    torch.testing.assert_close(embedding(tiny_sdxl), wanted, rtol=1e-4, atol=1e-4)


def test_float8_bfloat16_and_pefts_own_names(tiny_sdxl, tmp_path):
    plan = some_plan(tiny_sdxl)
    kohya = load_file(kohya_file(tiny_sdxl, tmp_path / "a.safetensors"))
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        low = {n: v.to(dtype) if v.ndim else v for n, v in kohya.items()}
        save_file(low, tmp_path / "low.safetensors")
        save_file({n: v.float() for n, v in low.items()}, tmp_path / "same.safetensors")
        found, same = (
            translate_lora(tmp_path / f"{n}.safetensors", tiny_sdxl, plan)[0] for n in ("low", "same")
        )
        assert all(torch.equal(found[name], same[name]) for name in same), "computed in float32"
    plain = load_file(peft_file(tiny_sdxl, tmp_path / "b.safetensors"))
    save_file(
        {f"base_model.model.{n.removeprefix('unet.')}": v for n, v in plain.items()},
        tmp_path / "c.safetensors",
    )
    found, same = (translate_lora(tmp_path / f"{n}.safetensors", tiny_sdxl, plan)[0] for n in "cb")
    assert found.keys() == same.keys() and all(torch.equal(found[name], same[name]) for name in same)


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({f"{LAYER}.lora_A.weight": torch.full((2, 32), float("nan"))}, CheckpointError, "not numbers"),
        ({f"{LAYER}.lora_B.weight": torch.full((32, 2), float("inf"))}, CheckpointError, "not numbers"),
        (
            {f"lora_unet_{LAYER[5:].replace('.', '_')}.dora_scale": torch.ones(1, 32)},
            CheckpointError,
            "columns",
        ),
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(9)}, CheckpointError, "9 rows, and 32"),
        (
            {
                "unet.mid_block.lora_A.weight": torch.ones(2, 9),
                "unet.mid_block.lora_B.weight": torch.ones(9, 2),
            },
            PlanError,
            "no layer with a matrix",
        ),
        (
            {
                "unet.mid_block.resnets.0.norm1.lora_A.weight": torch.ones(2, 32),
                "unet.mid_block.resnets.0.norm1.lora_B.weight": torch.ones(32, 2),
            },
            PlanError,
            "no layer with a matrix",
        ),
    ],
)
def test_what_cannot_be_translated_is_refused_in_words(tiny_sdxl, tmp_path, tensors, error, words):
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(error, match=words):
        translate_lora(tmp_path / "lora.safetensors", tiny_sdxl, some_plan(tiny_sdxl))


@pytest.mark.parametrize("alpha", ["[1, 2]", '"many"', "{}"])
def test_settings_that_are_no_numbers(tiny_sdxl, tmp_path, alpha):
    tensors = load_file(peft_file(tiny_sdxl, tmp_path / "a.safetensors"))
    header = {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'}
    save_file(tensors, tmp_path / "b.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match="cannot be read"):
        translate_lora(tmp_path / "b.safetensors", tiny_sdxl, some_plan(tiny_sdxl))


@pytest.mark.parametrize(
    ("naming", "kind"), [(n, k) for n, (kinds, _) in loras.NAMINGS.items() for k in kinds]
)
def test_a_naming_is_translated_exactly(naming, kind, tmp_path):
    """Each layer's update is the same rows and columns of the file's own; docs/checkpoints.md has a table."""
    checked, error = loras.measured(naming, kind, tmp_path)
    assert checked > 5 and error <= 2e-6


def test_half_a_factorisation_is_refused(tiny_sdxl, tmp_path):
    name, module = next(iter(layers(tiny_sdxl)))
    flat = f"lora_unet_{name.replace('.', '_')}"
    save_file({f"{flat}.hada_w1_a": torch.ones(len(module.weight), 2)}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="is not whole"):
        translate_lora(tmp_path / "half.safetensors", tiny_sdxl, some_plan(tiny_sdxl))


@pytest.mark.parametrize("kind", ["sdxl", "flux-dev"])
def test_written_in_kohyas_naming_it_is_the_same(kind, tmp_path):
    """Read back by ecodiff for an unpruned model of the same shapes: the pruned one itself."""
    pipe = PIPELINES[kind]()
    plan, dense = some_plan(pipe), denoiser_of(pipe)
    inside = (".values", ".queries")
    plan = ecodiff.PrunePlan({name: keep for name, keep in plan.items() if not name.endswith(inside)})
    small = ecodiff.variant(pipe, plan)
    tensors, _ = translate_lora(peft_file(pipe, tmp_path / "lora.safetensors"), small, plan, dense=dense)
    encoder = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    tensors[encoder] = torch.ones(2, 4)
    file = save_lora(tensors, tmp_path / "kohya.safetensors", plan, "kohya", dense)
    stored = {key: value.float() for key, value in load_file(file).items()}
    assert torch.equal(stored.pop(encoder), tensors.pop(encoder)), "what kohya has no name for is kept"
    assert all(key.startswith("lora_unet_") for key in stored)
    pairs, rest = lora_names.translated(stored, lora_names.Names(denoiser_name(pipe), denoiser_of(small)))
    assert not rest
    for key, up in tensors.items():
        path = key.removesuffix(".lora_B.weight")
        if path != key and not path.endswith(("norm1.linear", "norm.linear")):
            was = up.flatten(1) @ tensors[f"{path}.lora_A.weight"].flatten(1)
            now = pairs[key].flatten(1) @ pairs[f"{path}.lora_A.weight"].flatten(1)
            torch.testing.assert_close(now, was, atol=1e-6, rtol=1e-5)
    with pytest.raises(CheckpointError, match="There is no naming"):
        save_lora(tensors, tmp_path / "other.safetensors", plan, "other", dense)


def test_what_is_for_the_third_text_encoder_is_listed(tmp_path):
    pipe = PIPELINES["sd3.5"]()
    stored = load_file(peft_file(pipe, tmp_path / "lora.safetensors"))
    layer = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    stored |= {f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    save_file(stored, tmp_path / "three.safetensors")
    _, report = translate_lora(tmp_path / "three.safetensors", pipe, some_plan(pipe))
    assert "third text encoder" in report.dropped[layer] and "third text encoder" in report.words()


@pytest.mark.parametrize("kind", ["sdxl", "flux-dev"])
def test_kohyas_naming_fits_the_file_for_comfyui_where_heads_are_whole(kind, tmp_path):
    """Directions inside heads that are gone are zeros there, in the weights and in the LoRA."""
    pipe = PIPELINES[kind]()
    plan, dense = some_plan(pipe, empty=False), denoiser_of(pipe)
    plan = ecodiff.PrunePlan({n: k for n, k in plan.items() if ".norm" not in n}, {}, plan.bases)
    file = peft_file(pipe, tmp_path / "lora.safetensors")
    small = ecodiff.variant(pipe, plan)
    tensors, _ = translate_lora(file, small, dense=dense)
    cut_by = plan_of(denoiser_of(small))
    found = load_file(save_lora(tensors, tmp_path / "kohya.safetensors", cut_by, "kohya", dense))
    before = fill_heads_(copy.deepcopy(denoiser_of(small)))
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = dict(fill_heads_(denoiser_of(ecodiff.variant(pipe, plan))).named_modules())
    checked = 0
    for layer, module in before.named_modules():
        flat = f"lora_unet_{layer.replace('.', '_')}"
        if (down := found.get(f"{flat}.lora_down.weight")) is None:
            continue
        update = found[f"{flat}.lora_up.weight"].flatten(1) @ down.flatten(1)
        wanted = (after[layer].weight - module.weight).flatten(1)
        torch.testing.assert_close(update, wanted, atol=2e-5, rtol=0)
        checked += 1
    assert checked > 20 or kind == "flux-dev"
    if kind == "flux-dev":  # q, k and v are one layer there
        attention = before.transformer_blocks[0].attn
        rows = [getattr(attention, name).out_features for name in ("to_q", "to_k", "to_v")]
        assert len(found["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]) == sum(rows)

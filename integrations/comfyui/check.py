"""Pruned models in the real ComfyUI against diffusers: `python integrations/comfyui/check.py COMFYUI`.

With `--gguf COMFYUI_GGUF`, the folder of ComfyUI-GGUF, quantised ones are loaded too, and compared with the
same file's values in full precision.

Needs what ComfyUI needs (torchvision, torchaudio, av, ... are replaced by nothing where they are missing: a
denoiser does not use them). Prints, for every model and size, the largest difference of one denoiser call
and of the latents that ComfyUI's sampler gives, relative to the largest value; and memory and time beside
the dense model.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ecodiff
from ecodiff.checkpoints.comfyui import save_comfyui
from ecodiff.checkpoints.gguf import KINDS, save_gguf
from ecodiff.checkpoints.loading import empty_denoiser
from ecodiff.checkpoints.lora import translate_lora
from ecodiff.checkpoints.lora_saving import save_lora
from ecodiff.pipelines import denoiser_calls, denoiser_name, denoiser_of, prompt_rows
from ecodiff.pruning.scores import Scores
from ecodiff.pruning.slicing import plan_of

LAYERS = ("attn", "ff", "proj_mlp", "attention", "feed_forward")  # that the LoRA is on
RANDOM = ("sd3", "qwen", "z-image")  # small models of random weights
SHORT = {"num_inference_steps": 2, "height": 64, "width": 64}  # a run of a pipeline
OPTIONAL = ("torchvision", "torchaudio", "av", "kornia", "spandrel", "alembic", "scipy")


class _Nothing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of those that are missing."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
        return module

    def exec_module(self, module):
        pass


def start(comfyui: Path):
    """ComfyUI's modules, without a server, on the CPU unless there is a GPU; and the node's own."""
    sys.meta_path.append(_Nothing())
    sys.path.insert(0, str(comfyui))
    arguments, sys.argv = sys.argv, ["check"] + ([] if torch.cuda.is_available() else ["--cpu"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.samplers

    sys.argv = arguments
    here = Path(__file__).parent
    where = [str(here)]
    spec = importlib.util.spec_from_file_location(
        "ecodiff_comfyui", here / "__init__.py", submodule_search_locations=where
    )
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["ecodiff_comfyui"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return sys.modules["ecodiff_comfyui.nodes"]


def pruned(pipe, ratio: float, modulation: str = "modulation_directions", inside: bool = False):
    """A pipeline without a random part of its units, its first and last attention without any head.

    Args:
        modulation: the kind of its units that goes: directions, or rows ("modulation").
        inside: directions inside heads go as well.
    """
    within = ("value_directions", "query_directions") if inside else ()
    kinds = ("heads", "ffn", "resnet", modulation, *within)
    noise, denoiser = torch.Generator().manual_seed(0), denoiser_of(pipe)
    groups = [group for group in ecodiff.find_groups(denoiser, kinds) if group.kind in kinds]
    values = {group.name: torch.rand(group.size, generator=noise) for group in groups}
    bases = {}
    for group in groups:
        if group.activations or group.inside:
            width = group.width if group.inside else group.size
            z = torch.linalg.qr(torch.randn(group.size // width, width, width, generator=noise)).Q.flatten(
                0, 1
            )
            bases[group.name] = (z, z.mT.contiguous())
    heads = [group.name for group in groups if group.kind == "heads"]
    second = [name for name in heads if name.endswith("attn2")][-1:]  # of SD 3.5, of an UNet
    for emptied in (heads[0], heads[-1], *second):
        values[emptied] = torch.full_like(values[emptied], -1.0)
    plan = Scores.of(denoiser, values, bases=bases).plan(ratio=ratio)
    assert not plan[heads[0]].any() and not plan[heads[-1]].any()
    return ecodiff.variant(pipe, plan)


def random_pipeline(name: str):
    """A small model of random weights, of a class of which no trained one is small enough."""
    if name == "sd3":
        transformer: Any = SD3Transformer2DModel(
            sample_size=16,
            num_layers=4,
            num_attention_heads=4,
            attention_head_dim=64,
            joint_attention_dim=64,
            caption_projection_dim=256,
            pooled_projection_dim=64,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
            dual_attention_layers=(0, 1),
        )
        pipeline: Any = partial(StableDiffusion3Pipeline, text_encoder_3=None, tokenizer_3=None)
        pipeline = partial(pipeline, text_encoder_2=None, tokenizer_2=None)
    elif name == "z-image":
        transformer = ZImageTransformer2DModel(
            dim=1024, n_heads=8, n_kv_heads=8, n_layers=3, n_refiner_layers=1, cap_feat_dim=64
        )
        pipeline = ZImagePipeline
    else:
        transformer = QwenImageTransformer2DModel(
            num_layers=4,
            num_attention_heads=4,
            attention_head_dim=32,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
        )
        pipeline = QwenImagePipeline
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            values = torch.randn(parameter.shape, generator=noise)
            parameter.copy_(values / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * values)
    return pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


def compare(nodes, name: str, ratio: float, folder: Path) -> dict:
    """Largest relative differences of one call and of sampled latents."""
    pipe = random_pipeline(name) if name in RANDOM else ecodiff.load(name)
    small = pruned(pipe, ratio)
    file = folder / f"{name}-{ratio}.safetensors"
    nodes_file = save_comfyui(small, file)
    patcher = nodes.load(str(nodes_file))
    model = patcher.model.diffusion_model
    found = {"call": _call(small, model), "sampled": _sampled(small, patcher)}
    return found | {"with a LoRA": _with_lora(pipe, small, patcher, folder)}


def _with_lora(pipe, small, patcher, folder: Path) -> float:
    """A LoRA of the dense model on every attention and feed-forward layer, cut to fit, in both."""
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    denoiser, noise = denoiser_of(pipe), torch.Generator().manual_seed(1)
    tensors, name = {}, denoiser_name(pipe)
    for path, module in denoiser.named_modules():
        if isinstance(module, torch.nn.Linear) and any(part in path for part in LAYERS):
            out, features = module.weight.shape
            for side, shape in (("A", (4, features)), ("B", (out, 4))):
                values = torch.randn(shape, generator=noise)
                tensors[f"{name}.{path}.lora_{side}.weight"] = 0.3 * values / shape[1] ** 0.5
    save_file(tensors, folder / "lora.safetensors")
    fitting, _ = translate_lora(folder / "lora.safetensors", small, dense=denoiser)
    file = folder / "fitting.safetensors"
    save_lora(fitting, file, plan_of(denoiser_of(small)), "kohya", denoiser)
    small.load_lora_weights(fitting)
    lora = comfy.utils.load_torch_file(str(file))
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([patched], force_patch_weights=True)
    try:
        return _call(small, patched.model.diffusion_model)
    finally:
        comfy.model_management.unload_all_models()
        small.unload_lora_weights()


def inputs(small) -> dict:
    """Inputs of ComfyUI's denoiser: latents, and two prompts; random ones where there is no text encoder."""
    denoiser = denoiser_of(small)
    noise, config = torch.Generator().manual_seed(2), denoiser.config
    unet, qwen = hasattr(denoiser, "down_blocks"), "Qwen" in type(denoiser).__name__
    channels = {"Qwe": getattr(config, "out_channels", 0), "Flu": config.in_channels // 4}
    shape = (channels.get(type(denoiser).__name__.removeprefix("Sliced")[:3], config.in_channels),)
    shape += (1, 16, 16) if qwen else (16, 16)
    given = {
        "x": torch.randn(2, *shape, generator=noise),
        "timestep": torch.tensor([0.7, 0.2]) * (1000 if unet or "SD3" in type(denoiser).__name__ else 1),
    }
    z_image = "ZImage" in type(denoiser).__name__
    width = "cross_attention_dim" if unet else "cap_feat_dim" if z_image else "joint_attention_dim"
    width = config[width]
    given["context"] = torch.randn(2, 8, width, generator=noise)
    if not qwen and not z_image:
        pooled = config.projection_class_embeddings_input_dim if unet else config.pooled_projection_dim
        given["y"] = torch.randn(2, pooled, generator=noise)
    if small.text_encoder is not None:
        rows = prompt_rows(["red apple", "cat face"], range(2), 0, SHORT)
        _, named = denoiser_calls(small, rows, limit=1)[0]
        given["context"] = named["encoder_hidden_states"][-2:]
        pooled = named["added_cond_kwargs"]["text_embeds"] if unet else named["pooled_projections"]
        given["y"] = torch.cat([pooled[-2:], given["y"][:, pooled.shape[1] :]], dim=1)
    return given | ({"guidance": torch.tensor([3.0, 3.0])} if getattr(config, "guidance_embeds", 0) else {})


@torch.no_grad()
def _call(small, model) -> float:
    given = inputs(small)
    theirs = theirs_of(denoiser_of(small), **given)
    return float((theirs - _output(small, model)).abs().max() / theirs.abs().max())


@torch.no_grad()
def _output(small, model) -> torch.Tensor:
    """What ComfyUI's model makes of `inputs`."""
    given = inputs(small)
    if hasattr(model, "noise_refiner"):
        given["num_tokens"] = given["context"].shape[1]
    return model(given.pop("x"), given.pop("timestep"), **given)


@torch.no_grad()
def _sampled(small, patcher) -> float:
    """ComfyUI's Euler sampler with guidance on its own model, and on diffusers' in its place."""
    import comfy.sample
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

    denoiser = denoiser_of(small)
    given = inputs(small)
    pooled, text = given.get("y", torch.zeros(2, 1)), given["context"]
    if hasattr(small, "unet"):  # ComfyUI embeds the sizes itself
        width = denoiser.config.addition_time_embed_dim
        patcher.model.embedder, pooled = Timestep(width), pooled[:, : -6 * width]
    known: dict[str, Any] = {"guidance": 3.0}
    if hasattr(patcher.model.diffusion_model, "noise_refiner"):  # Z-Image counts its text's tokens by it
        known["attention_mask"] = torch.ones(text[:1].shape[:2])
    conds = [[[text[i, None], {"pooled_output": pooled[i, None], **known}]] for i in (1, 0)]
    cfg = 1.0 if "guidance" in given else 3.0  # FLUX.1 dev is told its guidance
    latent = torch.zeros_like(given["x"][:1])
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    found, own = [], patcher.model.diffusion_model
    for model in (own, _Theirs(denoiser, own)):
        patcher.model.diffusion_model = model
        found.append(comfy.sample.sample(patcher, noise, 6, cfg, "euler", "normal", *conds, latent, seed=0))
    patcher.model.diffusion_model = own
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


class _Theirs(torch.nn.Module):
    """diffusers' denoiser in the place of ComfyUI's."""

    def __init__(self, denoiser, own):
        super().__init__()
        self.denoiser, self.own, self.dtype = (denoiser,), (own,), own.dtype
        if hasattr(own, "patch_size"):
            self.patch_size = own.patch_size
        if hasattr(own, "img_in"):
            self.img_in = own.img_in

    def forward(self, x, timestep, context=None, *args, y=None, guidance=None, **kwargs):
        return theirs_of(self.denoiser[0], x, timestep, context, y, guidance)


def theirs_of(denoiser, x, timestep, context, y=None, guidance=None):
    """diffusers' denoiser, called as ComfyUI calls its own."""
    name = type(denoiser).__name__.removeprefix("Sliced")
    call = {"FluxTransformer2DModel": _flux, "SD3Transformer2DModel": _sd3, "UNet2DConditionModel": _unet}
    call["ZImageTransformer2DModel"] = _z_image
    return call.get(name, _qwen)(denoiser, x, timestep, context, y, guidance)


def _packed(x):
    """(N, C, 2h, 2w) as (N, h w, 4 C)."""
    (*_, height, width), count = x.shape, len(x)
    x = x.reshape(count, -1, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(count, height * width // 4, -1)


def _unpacked(output, shape):
    *_, height, width = shape
    output = output.view(len(output), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return output.reshape(shape)


def _flux(denoiser, x, timestep, context, y, guidance):
    ids = torch.zeros(x.shape[-2] // 2, x.shape[-1] // 2, 3)
    ids[..., 1], ids[..., 2] = torch.arange(ids.shape[0])[:, None], torch.arange(ids.shape[1])[None]
    output = denoiser(
        hidden_states=_packed(x),
        timestep=timestep,
        encoder_hidden_states=context,
        pooled_projections=y,
        guidance=guidance,
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(context.shape[1], 3),
        return_dict=False,
    )[0]
    return _unpacked(output, x.shape)


def _sd3(denoiser, x, timestep, context, y, guidance):
    return denoiser(x, context, y, timestep, return_dict=False)[0]


def _z_image(denoiser, x, timestep, context, y, guidance):
    images = denoiser(list(x[:, :, None]), 1 - timestep, list(context), return_dict=False)[0]
    return -torch.stack(list(images)).squeeze(2)


def _qwen(denoiser, x, timestep, context, y, guidance):
    output = denoiser(
        hidden_states=_packed(x),
        encoder_hidden_states=context,
        encoder_hidden_states_mask=torch.ones(context.shape[:2], dtype=torch.bool),
        timestep=timestep,
        img_shapes=[[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x),
        return_dict=False,
    )[0]
    return _unpacked(output, x.shape)


def _unet(denoiser, x, timestep, context, y, guidance):
    """`y` is the pooled text and embedded sizes, which diffusers' UNet would embed itself."""
    width = 6 * denoiser.config.addition_time_embed_dim

    class Embedded(torch.nn.Module):
        def forward(self, ids):
            return y[:, -width:].reshape(len(ids), -1)

    original, denoiser.add_time_proj = denoiser.add_time_proj, Embedded()
    try:
        added = {"text_embeds": y[:, :-width], "time_ids": torch.zeros(len(x), 6)}
        # One row for each id, as diffusers flattens them.
        denoiser.add_time_proj.forward = lambda ids: y[:, -width:].reshape(len(ids), width // 6)
        return denoiser(x, timestep, context, added_cond_kwargs=added, return_dict=False)[0]
    finally:
        denoiser.add_time_proj = original


def gguf_nodes(folder: Path) -> None:
    """Load ComfyUI-GGUF as ComfyUI loads it."""
    import nodes

    spec = importlib.util.spec_from_file_location(
        "comfyui_gguf", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["comfyui_gguf"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    nodes.NODE_CLASS_MAPPINGS.update(module.NODE_CLASS_MAPPINGS)


def compare_quantised(nodes, name: str, ratio: float, kind: str, folder: Path) -> dict:
    """Largest relative difference of one call to the same values in full precision; the file's size."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    small = pruned(random_pipeline(name) if name in RANDOM else ecodiff.load(name), ratio)
    plain = save_comfyui(small, folder / f"{name}-{ratio}-{kind}.safetensors")
    file = save_gguf(small, folder / f"{name}-{ratio}-{kind}.gguf", kind=kind)
    with safe_open(plain, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(plain)
    for entry in GGUFReader(file).tensors:
        values = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        tensors[entry.name] = values.reshape(tensors[entry.name].shape)
    save_file(tensors, folder / "values.safetensors", metadata)
    outputs = []
    for path in (file, folder / "values.safetensors"):
        model = nodes.load(str(path)).model.diffusion_model
        outputs.append(_output(small, model))
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
    return {"call": difference, "bytes": file.stat().st_size / plain.stat().st_size}


def weighed(nodes, folder: Path, ratios=(0.0, 0.2, 0.4)) -> None:
    """Print bytes and time of a call of SD 1.5 in ComfyUI, at true size, by what was removed."""
    unet: Any = empty_denoiser("sd-1.5").to_empty(device="cpu").eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=unet, scheduler=EulerDiscreteScheduler(), requires_safety_checker=False, **parts
    )
    scores = Scores.unranked(unet, ("heads", "ffn", "resnet"))
    models = {}
    for ratio in ratios:
        file = save_comfyui(ecodiff.variant(pipe, scores.plan(ratio=ratio)), folder / f"{ratio}.safetensors")
        models[ratio] = nodes.load(str(file))
    given = {"x": torch.randn(2, 4, 32, 32), "timestep": torch.tensor([500.0, 500.0])}
    given["context"] = torch.randn(2, 77, 768)
    seconds: dict[float, list[float]] = {ratio: [] for ratio in ratios}
    with torch.no_grad():
        for _ in range(5):  # in turns: what else the machine does hits all alike
            for ratio, patcher in models.items():
                begun = time.monotonic()
                patcher.model.diffusion_model(given["x"], given["timestep"], context=given["context"])
                seconds[ratio].append(time.monotonic() - begun)
    dense = models[0.0].model_size(), min(seconds[0.0])
    for ratio, patcher in models.items():
        found = {"bytes": patcher.model_size() / dense[0], "seconds": min(seconds[ratio]) / dense[1]}
        words = {name: round(value, 3) for name, value in found.items()}
        print(json.dumps({"model": "sd-1.5, random", "ratio": ratio} | words), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--models", nargs="+", default=["emoji-sdxl", "emoji-flux", *RANDOM])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.4, 0.8])
    parser.add_argument(
        "--weigh", action="store_true", help="bytes and time beside dense, SD 1.5 at true size"
    )
    parser.add_argument("--gguf", type=Path, help="the folder of ComfyUI-GGUF")
    options = parser.parse_args()
    nodes = start(options.comfyui)
    if options.gguf:
        gguf_nodes(options.gguf)
    with tempfile.TemporaryDirectory() as folder:
        if options.weigh:
            weighed(nodes, Path(folder))
            return
        import comfy.supported_models

        for name in options.models:
            if name == "z-image" and not hasattr(comfy.supported_models, "ZImage"):
                print("z-image: this ComfyUI is older than it")
                continue
            for ratio in options.ratios:
                begun = time.monotonic()
                found = compare(nodes, name, ratio, Path(folder))
                words = {what: f"{value:.1e}" for what, value in found.items()}
                print(
                    json.dumps({"model": name, "ratio": ratio} | words),
                    f"{time.monotonic() - begun:.0f} s",
                    flush=True,
                )
                for kind in KINDS if options.gguf else ():
                    found = compare_quantised(nodes, name, ratio, kind, Path(folder))
                    words = {what: f"{value:.1e}" for what, value in found.items()}
                    print(json.dumps({"model": name, "ratio": ratio, "kind": kind} | words), flush=True)


if __name__ == "__main__":
    main()

"""The node: loads a model that ecodiff exported (`python -m ecodiff export SMALL --format comfyui`, or
`gguf-q8_0`, `gguf-q5_0`, `gguf-q4_0`: those are read by ComfyUI-GGUF, which must be installed beside it).
"""

import json
import logging
import sys
from functools import partial

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import folder_paths
import torch

from .layers import BASIS, fit, project, shaped

HEADER = "ecodiff_comfyui"
FOLDERS = ("diffusion_models", "unet_gguf")  # of folder_paths
KNOWN = ("SD15", "SDXL", "SD3", "Flux", "FluxSchnell", "QwenImage", "ZImage")  # of comfy.supported_models


def described(metadata: dict | None, file: str) -> dict:
    """What the header of a file says about its model. Raises ValueError if ecodiff did not write it."""
    text = (metadata or {}).get(HEADER)
    about = json.loads(text) if text else {}
    if about.get("format") != 1 or about.get("model") not in KNOWN:
        raise ValueError(
            f"{file} is not a pruned model for ComfyUI. Write one with: "
            "python -m ecodiff export SMALL --format comfyui --out model.safetensors"
        )
    return about


def gguf_nodes():
    """ComfyUI-GGUF's module of nodes. Raises ValueError if it is not installed."""
    import nodes

    loader = nodes.NODE_CLASS_MAPPINGS.get("UnetLoaderGGUF")
    if loader is None:
        raise ValueError("GGUF is read by ComfyUI-GGUF: install it (github.com/city96/ComfyUI-GGUF).")
    return sys.modules[loader.__module__]


def read_gguf(file: str) -> tuple[dict, dict]:
    """(tensors as ComfyUI-GGUF keeps them, metadata) of a GGUF file."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(HEADER)
    metadata = {HEADER: str(field.parts[field.data[-1]], encoding="utf-8")} if field else {}
    empty = json.loads(metadata.get(HEADER, "{}")).get("empty", {})
    none_left = {name: torch.zeros(shape) for name, shape in empty.items()}  # layers without any unit
    return gguf_nodes().gguf_sd_loader(file) | none_left, metadata


def load(file: str):
    """A pruned diffusion model as a ModelPatcher, as ComfyUI's own loaders give it."""
    quantised = file.endswith(".gguf")
    read = read_gguf if quantised else partial(comfy.utils.load_torch_file, return_metadata=True)
    tensors, metadata = read(file)
    about = described(metadata, file)
    known = getattr(comfy.supported_models, about["model"], None)
    if known is None:
        raise ValueError(f"This ComfyUI does not know {about['model']} yet: update it.")
    config = known(dict(about["config"]))

    management = comfy.model_management
    device, parameters = management.get_torch_device(), comfy.utils.calculate_parameters(tensors)
    supported = list(config.supported_inference_dtypes)
    stored = comfy.utils.weight_dtype(tensors)
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    cast = management.unet_manual_cast(dtype, device, supported)
    config.set_inference_dtype(dtype, cast)
    layers = gguf_nodes().GGMLOps if quantised else comfy.ops.pick_operations(dtype, cast)
    operations = shaped(layers, about.get("norm_groups", 32))
    config.custom_operations = operations

    model = config.get_model(tensors, "")
    tensors.pop("v_pred", None)  # a mark that ComfyUI has read by now
    if about.get("basis"):
        rank, features = tensors[f"{BASIS}.weight"].shape
        project(model.diffusion_model, operations, features, rank, dtype, management.unet_offload_device())
    model = model.to(management.unet_offload_device())
    model.load_model_weights(tensors, "")
    fit(model.diffusion_model, about["heads"])
    logging.info("ecodiff: %s, %.2f G parameters", about["model"], parameters / 1e9)
    offload = management.unet_offload_device()
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    return gguf_nodes().GGUFModelPatcher.clone(patcher) if quantised else patcher


class LoadPruned:
    """A node like ComfyUI's "Load Diffusion Model", for models that ecodiff pruned."""

    CATEGORY = "loaders"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    DESCRIPTION = (
        "Loads a diffusion model that ecodiff pruned and exported for ComfyUI. Text encoders and VAE are "
        "those of the dense model. A LoRA of the dense model does not fit: translate it with "
        "'python -m ecodiff lora'."
    )

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        # ComfyUI-GGUF lists its files under a name of its own.
        keys = [key for key in FOLDERS if key in folder_paths.folder_names_and_paths]
        names = [name for key in keys for name in folder_paths.get_filename_list(key)]
        return {"required": {"unet_name": (names,)}}

    def load(self, unet_name):
        key = FOLDERS[unet_name.endswith(".gguf")]
        return (load(folder_paths.get_full_path_or_raise(key, unet_name)),)


NODE_CLASS_MAPPINGS = {"EcodiffLoadPruned": LoadPruned}
NODE_DISPLAY_NAME_MAPPINGS = {"EcodiffLoadPruned": "Load pruned model (ecodiff)"}

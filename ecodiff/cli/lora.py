"""`lora`: cut a LoRA of the dense model to fit a pruned one."""

import argparse

from ._common import report

HELP = "cut a LoRA of the dense model to fit a pruned one"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="a pruned folder")
    parser.add_argument("lora", help="a .safetensors file in any common naming")
    parser.add_argument("--dense", help="the dense model (default: the one that the plan names)")
    parser.add_argument(
        "--naming", default="diffusers", help="diffusers (default) or kohya, which ComfyUI reads"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the translated LoRA, .safetensors")


def run(options: argparse.Namespace) -> int:
    """A LoRA of the dense model, cut to fit a pruned folder."""
    from ..checkpoints.loading import empty_denoiser, load
    from ..checkpoints.lora import save_lora, translate_lora
    from ..pipelines import denoiser_of
    from ..pruning.slicing import plan_of

    small = load(options.model)
    cut_by = plan_of(denoiser_of(small))
    named = options.dense or (cut_by.metadata.get("model", "") if cut_by else "")
    dense = empty_denoiser(named) if cut_by else None
    tensors, made = translate_lora(options.lora, small, dense=dense)
    assert cut_by is not None  # or nothing would have been translated
    out = save_lora(tensors, options.out, cut_by, options.naming, dense)
    rows = [("translated", made.words()), ("saved in", str(out))]
    rows += [("dropped", f"{name}: {why}") for name, why in made.dropped.items()]
    report(options, rows, vars(made) | {"out": str(out)})
    return 0

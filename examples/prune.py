"""Prune a model by a fifth, from Python: rank its units, remove the least important, repair the rest.

python examples/prune.py
"""

import ecodiff
from ecodiff import catalog

model = catalog.find("emoji-sdxl")  # its defaults: steps, guidance, prompts
pipe = ecodiff.load(model.source)
prompts = model.prompts("calibration")

scores = ecodiff.learn_masks(pipe, prompts, model.learn_config("fast", ratio=0.2))
small = ecodiff.variant(pipe, scores.plan(ratio=0.2))
ecodiff.compensate_(small, pipe, prompts, model.compensation())

folder = ecodiff.save(small, "emoji-sdxl-eco20")
report = ecodiff.compare(pipe, small, model.prompts("heldout")[:4], **model.drawing())
print(f"{report['params_dense']:,} -> {report['params_pruned']:,} parameters, saved in {folder}")
print(f"latent error {report['mean']['latent_error']:.5f}, PSNR {report['mean']['psnr']:.1f} dB")

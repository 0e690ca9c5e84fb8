"""One ranking serves every size: cut it at several and measure each on held-out prompts.

python examples/compare_sizes.py
"""

import ecodiff
from ecodiff import catalog
from ecodiff.learning.calibration import Calibration

model = catalog.find("emoji-turbo")
pipe = ecodiff.load(model.source)
prompts, heldout = model.prompts("calibration"), model.prompts("heldout")[:4]

scores = ecodiff.learn_masks(pipe, prompts, model.learn_config("fast", ratio=0.3))
calibration = Calibration(pipe, prompts, model.compensation())  # gathered once, for all sizes
print("removed  latent error     PSNR")
for ratio in (0.1, 0.2, 0.3, 0.4):
    small = ecodiff.variant(pipe, scores.plan(ratio=ratio))
    ecodiff.compensate_(small, pipe, calibration=calibration)
    mean = ecodiff.compare(pipe, small, heldout, **model.drawing())["mean"]
    print(f"{ratio:>7.0%}  {mean['latent_error']:>12.5f}  {mean['psnr']:>4.1f} dB")

"""Open a pruned folder with plain diffusers, where ecodiff is not installed.

python examples/load_with_diffusers.py emoji-sdxl-eco20 "red apple" red-apple.png
"""

import sys

import torch
from diffusers import DiffusionPipeline

folder, prompt, file = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
image = pipe(prompt, num_inference_steps=20, generator=torch.Generator().manual_seed(7)).images[0]
image.save(file)

"""emoji-sdxl: a small Stable Diffusion XL, trained from scratch on captioned emoji.

Everything that makes SDXL itself is here at a smaller size: two CLIP text encoders whose
penultimate states are concatenated, the pooled state and the size conditioning added to the time
embedding, a UNet whose lower level is mostly transformer, an Euler scheduler.
"""

import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from . import data, state

BATCH = 32
PEAK_RATE = 1e-3
TOKENS = 24  # the longest caption has 22 with its start and end
SIZES = (data.SIZE, data.SIZE, 0, 0, data.SIZE, data.SIZE)  # SDXL's size and crop conditioning


def tokenizer(emojis: list[data.Emoji], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs are learned on the captions, kept in `folder`.

    The trainer breaks ties at random, so a training that is resumed must find its own again.
    """
    if (folder / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    captions = sorted({text for e in emojis for text in (e.caption, e.alias)})
    learned = CLIPTokenizer(model_max_length=TOKENS).train_new_from_iterator(
        captions, vocab_size=3000, end_of_word_suffix="</w>"
    )
    learned.save_pretrained(folder)
    return learned


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=128,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """The untrained pipeline: 8.3 M parameters in the UNet, 66 % of them in heads and FFN."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        transformer_layers_per_block=[1, 4],
        attention_head_dim=[4, 8],  # heads, despite its name
        cross_attention_dim=64 + 128,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=128 + 6 * 16,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, 64, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, 128, layers=3)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        ),
        add_watermarker=False,
    )


class Denoiser(nn.Module):
    """What is trained together: the UNet and both text encoders of a pipeline."""

    def __init__(self, pipe: StableDiffusionXLPipeline):
        super().__init__()
        self.unet = pipe.unet
        self.text_encoder = pipe.text_encoder
        self.text_encoder_2 = pipe.text_encoder_2

    def forward(self, noisy, times, tokens, captioned):
        """Predicted v, (n, 4, 16, 16); where `captioned` is 0 the text is SDXL's empty prompt."""
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        sizes = torch.tensor(SIZES, device=noisy.device, dtype=torch.float32)
        added = {
            "text_embeds": second.text_embeds * captioned[:, None],
            "time_ids": sizes.expand(len(noisy), -1),
        }
        text = text * captioned[:, None, None]
        return self.unet(noisy, times, text, added_cond_kwargs=added).sample


def rate(step: int, steps: int) -> float:
    """Learning rate: a short warm-up, constant, and down to zero over the last 40 %."""
    return PEAK_RATE * min((step + 1) / 200, 1.0, (steps - step) / (0.4 * steps))


def train(pipe, latents, emojis, folder: Path, steps: int, device: str, seed: int = 0):
    """Fit UNet and text encoders to scaled `latents` (n, 4, 16, 16); resumes from `folder`.

    v-prediction, uniform time steps, captions dropped one time in ten for guidance. Every step
    draws from a generator of its own, so a resumed training sees what an unbroken one would.
    Returns the exponential moving average of the weights.
    """
    torch.manual_seed(seed)
    model = Denoiser(pipe).to(device).train()
    model.unet.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    # On a CPU the fused kernel's backward pass costs more than all the rest of the network.
    model.unet.set_attn_processor(AttnProcessor() if device == "cpu" else AttnProcessor2_0())
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    modules = {"model": model, "average": average}
    start = state.load(folder / "denoiser.safetensors", modules, optimizer)

    alphas = pipe.scheduler.alphas_cumprod
    weights = data.sampling_weights(emojis)
    tokens = [
        pipe.tokenizer(
            [getattr(e, field) for e in emojis],
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for field in ("caption", "alias")
    ]
    clock, total = time.monotonic(), 0.0
    for step in range(start, steps):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.multinomial(weights, BATCH, replacement=True, generator=draw)
        aliased = (torch.rand(BATCH, generator=draw) < 0.25)[:, None]
        captioned = (torch.rand(BATCH, generator=draw) >= 0.1).float()
        times = torch.randint(len(alphas), (BATCH,), generator=draw)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=draw)
        signal = alphas[times].sqrt().view(-1, 1, 1, 1)
        spread = (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
        clean = latents[rows]
        noisy, target = signal * clean + spread * noise, signal * noise - spread * clean
        texts = torch.where(aliased, tokens[1][rows], tokens[0][rows])

        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        with torch.autocast(device, torch.bfloat16):
            batch = (t.to(device) for t in (noisy, times, texts, captioned))
            predicted = model(*batch)
        loss = F.mse_loss(predicted.float(), target.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)
        total += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - clock
            state.log(folder / "denoiser.jsonl", step=step + 1, loss=total / 100, seconds=seconds)
            total = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state.save(folder / "denoiser.safetensors", step + 1, modules, optimizer)
    return average.eval()


def finished(pipe: StableDiffusionXLPipeline, trained: Denoiser) -> StableDiffusionXLPipeline:
    """The pipeline with the trained (averaged) weights, in float16 as it ships."""
    pipe.unet.load_state_dict(trained.unet.state_dict())
    pipe.text_encoder.load_state_dict(trained.text_encoder.state_dict())
    pipe.text_encoder_2.load_state_dict(trained.text_encoder_2.state_dict())
    return pipe.to("cpu", torch.float16)

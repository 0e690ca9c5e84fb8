"""SDXL's UNet and FLUX.1 in the layout of their original authors, as ComfyUI builds them: what its layers are
called and what their `forward` takes, written here so that the node can be tested without ComfyUI.

The same checks against the real ComfyUI: integrations/comfyui/check.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Operations:
    Linear, Conv2d, GroupNorm = nn.Linear, nn.Conv2d, nn.GroupNorm


def sinusoid(t, width, factor=1.0):
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = factor * t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q, k, v):
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self, width, context, heads, op):
        super().__init__()
        self.heads = heads
        self.to_q = op.Linear(width, width, bias=False)
        self.to_k, self.to_v = (op.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(op.Linear(width, width), nn.Identity())

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        parts = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attend(*(p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)))


class GEGLU(nn.Module):
    def __init__(self, width, op):
        super().__init__()
        self.proj = op.Linear(width, 8 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width, context, heads, op):
        super().__init__()
        self.attn1, self.attn2 = (
            CrossAttention(width, width, heads, op),
            CrossAttention(width, context, heads, op),
        )
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(GEGLU(width, op), nn.Identity(), op.Linear(4 * width, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context):
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff.net(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, width, context, heads, depth, op):
        super().__init__()
        self.norm = op.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = op.Linear(width, width), op.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, context, heads, op) for _ in range(depth)
        )

    def forward(self, x, context):
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, context)
        return self.proj_out(h).transpose(1, 2).reshape(x.shape) + x


class ResBlock(nn.Module):
    def __init__(self, width, embedding, out, op):
        super().__init__()
        self.in_layers = nn.Sequential(
            op.GroupNorm(32, width), nn.SiLU(), op.Conv2d(width, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), op.Linear(embedding, out))
        last = op.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(op.GroupNorm(32, out), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if width == out else op.Conv2d(width, out, 1)

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Resized(nn.Module):
    def __init__(self, width, up, op):
        super().__init__()
        self.add_module("conv" if up else "op", op.Conv2d(width, width, 3, 1 if up else 2, padding=1))

    def forward(self, x):
        return self.op(x) if hasattr(self, "op") else self.conv(F.interpolate(x, scale_factor=2))


class UNet(nn.Module):
    """Of a configuration as ComfyUI takes it."""

    def __init__(self, config, op):
        super().__init__()
        self.width, levels = config["model_channels"], len(config["channel_mult"])
        widths, embedding = [self.width * m for m in config["channel_mult"]], 4 * self.width
        per_head, context = config["num_head_channels"], config["context_dim"]

        def two(features):
            return nn.Sequential(op.Linear(features, embedding), nn.SiLU(), op.Linear(embedding, embedding))

        def attention(width, depth):
            return [SpatialTransformer(width, context, width // per_head, depth, op)] if depth else []

        self.time_embed, self.label_emb = two(self.width), nn.Sequential(two(config["adm_in_channels"]))
        blocks, skips, now = (
            [[op.Conv2d(config["in_channels"], self.width, 3, padding=1)]],
            [self.width],
            self.width,
        )
        depths, deep = list(config["transformer_depth"]), list(config["transformer_depth_output"])
        for level, width in enumerate(widths):
            for _ in range(config["num_res_blocks"][level]):
                blocks.append([ResBlock(now, embedding, width, op), *attention(width, depths.pop(0))])
                now = width
                skips.append(now)
            if level < levels - 1:
                blocks.append([Resized(now, False, op)])
                skips.append(now)
        self.input_blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        middle, depth = [ResBlock(now, embedding, now, op)], config["transformer_depth_middle"]
        if depth >= 0:  # -1: one ResNet, as SSD-1B
            middle += [*attention(now, depth), ResBlock(now, embedding, now, op)]
        self.middle_block = nn.ModuleList(middle)
        blocks = []
        for level, width in reversed(list(enumerate(widths))):
            for index in range(config["num_res_blocks"][level] + 1):
                block = [ResBlock(now + skips.pop(), embedding, width, op), *attention(width, deep.pop())]
                now = width
                if level and index == config["num_res_blocks"][level]:
                    block.append(Resized(now, True, op))
                blocks.append(block)
        self.output_blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        last = op.Conv2d(now, config["out_channels"], 3, padding=1)
        self.out = nn.Sequential(op.GroupNorm(32, now), nn.SiLU(), last)

    def forward(self, x, timesteps, context, y):
        emb = self.time_embed(sinusoid(timesteps, self.width)) + self.label_emb(y)

        def through(block, h):
            for layer in block:
                more = {ResBlock: [emb], SpatialTransformer: [context]}.get(type(layer), [])
                h = layer(h, *more)
            return h

        skips, h = [], x
        for block in self.input_blocks:
            h = through(block, h)
            skips.append(h)
        h = through(self.middle_block, h)
        for block in self.output_blocks:
            h = through(block, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.scale, 1e-6)


class QKNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query_norm, self.key_norm = Scale(width), Scale(width)


class Change:
    def __init__(self, shift, scale, gate):
        self.shift, self.scale, self.gate = shift, scale, gate


class Modulation(nn.Module):
    def __init__(self, width, double, op):
        super().__init__()
        self.lin = op.Linear(width, (6 if double else 3) * width)

    def forward(self, vec):
        parts = self.lin(F.silu(vec))[:, None].chunk(self.lin.out_features // vec.shape[1], dim=-1)
        return Change(*parts[:3]), Change(*parts[3:]) if len(parts) > 3 else None


def qkv_of(fused, heads, norm):
    q, k, v = fused.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def turned(x, pe):
    x = x.unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * x[..., 0] + pe[..., 1] * x[..., 1]).flatten(-2)


class DoubleStreamBlock(nn.Module):
    def __init__(self, width, heads, op):
        super().__init__()
        self.num_heads = heads
        for name in ("img", "txt"):
            attention = nn.Module()
            attention.qkv, attention.norm = op.Linear(width, 3 * width), QKNorm(width // heads)
            attention.proj = op.Linear(width, width)
            mlp = nn.Sequential(op.Linear(width, 4 * width), nn.GELU("tanh"), op.Linear(4 * width, width))
            parts = {"mod": Modulation(width, True, op), "attn": attention, "mlp": mlp}
            parts |= {f"norm{n}": nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for n in (1, 2)}
            for part, module in parts.items():
                self.add_module(f"{name}_{part}", module)

    def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options=None):
        qkv, changes = [], []
        for x, name in ((txt, "txt"), (img, "img")):
            first, second = getattr(self, f"{name}_mod")(vec)
            attention = getattr(self, f"{name}_attn")
            given = (1 + first.scale) * getattr(self, f"{name}_norm1")(x) + first.shift
            qkv.append(qkv_of(attention.qkv(given), self.num_heads, attention.norm))
            changes.append((first, second))
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*qkv, strict=True))
        out, done = attend(turned(q, pe), turned(k, pe), v), []
        parts = out[:, : txt.shape[1]], out[:, txt.shape[1] :]
        for x, name, own, (first, second) in zip((txt, img), ("txt", "img"), parts, changes, strict=True):
            x = x + first.gate * getattr(self, f"{name}_attn").proj(own)
            given = (1 + second.scale) * getattr(self, f"{name}_norm2")(x) + second.shift
            done.append(x + second.gate * getattr(self, f"{name}_mlp")(given))
        return done[1], done[0]


class SingleStreamBlock(nn.Module):
    def __init__(self, width, heads, op):
        super().__init__()
        self.num_heads, self.hidden_size, self.mlp_hidden_dim = heads, width, 4 * width
        self.linear1, self.linear2 = op.Linear(width, 7 * width), op.Linear(5 * width, width)
        self.norm, self.mlp_act = QKNorm(width // heads), nn.GELU("tanh")
        self.pre_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(width, False, op)

    def forward(self, x, vec, pe, attn_mask=None, transformer_options=None):
        mod, _ = self.modulation(vec)
        both = self.linear1((1 + mod.scale) * self.pre_norm(x) + mod.shift)
        qkv, mlp = both.split([3 * self.hidden_size, self.mlp_hidden_dim], dim=-1)
        q, k, v = qkv_of(qkv, self.num_heads, self.norm)
        out = torch.cat([attend(turned(q, pe), turned(k, pe), v), self.mlp_act(mlp)], dim=-1)
        return x + mod.gate * self.linear2(out)


class Embedder(nn.Module):
    def __init__(self, features, width, op):
        super().__init__()
        self.in_layer, self.out_layer = op.Linear(features, width), op.Linear(width, width)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class Flux(nn.Module):
    """Of a configuration as ComfyUI takes it; called with tokens, not with latents."""

    def __init__(self, config, op):
        super().__init__()
        width, heads, self.axes = config["hidden_size"], config["num_heads"], config["axes_dim"]
        features = 4 * config["in_channels"]
        self.img_in, self.txt_in = op.Linear(features, width), op.Linear(config["context_in_dim"], width)
        self.time_in, self.vector_in = Embedder(256, width, op), Embedder(config["vec_in_dim"], width, op)
        self.guidance_in = Embedder(256, width, op) if config["guidance_embed"] else None
        depth = config["depth"], config["depth_single_blocks"]
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(width, heads, op) for _ in range(depth[0]))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(width, heads, op) for _ in range(depth[1]))
        self.final_layer = nn.Module()
        self.final_layer.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_layer.linear = op.Linear(width, features)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), op.Linear(width, 2 * width))

    def rotations(self, ids):
        parts = []
        for axis, width in enumerate(self.axes):
            omega = 1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
            angle = ids[:, axis, None].double() * omega
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
            parts.append(turn.unflatten(-1, (2, 2)))
        return torch.cat(parts, dim=-3).float()[None, None]

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.time_in(sinusoid(timesteps, 256, 1000.0)) + self.vector_in(y)
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(sinusoid(guidance, 256, 1000.0))
        pe = self.rotations(torch.cat([txt_ids, img_ids]))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, vec=vec, pe=pe)
        shift, scale = self.final_layer.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        x = (1 + scale) * self.final_layer.norm_final(x[:, txt.shape[1] :]) + shift
        return self.final_layer.linear(x)

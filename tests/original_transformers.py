"""SD 3 and Qwen-Image as ComfyUI builds them, written here so that the node can be tested without ComfyUI.

The same checks against the real ComfyUI: integrations/comfyui/check.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.original_layout import attend, sinusoid

HEAD = 64


class RMS(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def two(first, second, op):
    return nn.Sequential(op.Linear(first, second), nn.SiLU(), op.Linear(second, second))


class Mlp(nn.Module):
    def __init__(self, width, op):
        super().__init__()
        self.fc1, self.fc2 = op.Linear(width, 4 * width), op.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    def __init__(self, width, last, op):
        super().__init__()
        self.num_heads = width // HEAD
        self.qkv = op.Linear(width, 3 * width)
        self.ln_q, self.ln_k = RMS(HEAD), RMS(HEAD)
        if not last:
            self.proj = op.Linear(width, width)

    def before(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD)).unbind(2)
        return self.ln_q(q), self.ln_k(k), v


def attended(parts):
    return attend(*(part.transpose(1, 2) for part in parts))


class Stream(nn.Module):
    def __init__(self, width, op, last=False, second=False):
        super().__init__()
        self.last, self.second = last, second
        self.attn = SelfAttention(width, last, op)
        if second:
            self.attn2 = SelfAttention(width, False, op)
        if not last:
            self.mlp = Mlp(width, op)
        self.count = 2 if last else 9 if second else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), op.Linear(width, self.count * width))

    def after(self, x, attended, parts, other):
        x = x + parts[2][:, None] * self.attn.proj(attended) + other
        return x + parts[5][:, None] * self.mlp(modulate(x, *parts[3:5]))


class JointBlock(nn.Module):
    def __init__(self, width, op, last, second):
        super().__init__()
        self.context_block = Stream(width, op, last)
        self.x_block = Stream(width, op, second=second)

    def forward(self, context, x, c):
        streams, values = (self.context_block, self.x_block), (context, x)
        parts = [stream.adaLN_modulation(c).chunk(stream.count, dim=1) for stream in streams]
        qkv = [s.attn.before(modulate(v, *p[:2])) for s, v, p in zip(streams, values, parts, strict=True)]
        text, image = attended([torch.cat(pair, 1) for pair in zip(*qkv, strict=True)]).split(
            [context.shape[1], x.shape[1]], 1
        )
        other = torch.zeros(())
        if self.x_block.second:
            second = self.x_block.attn2
            other = parts[1][8][:, None] * second.proj(attended(second.before(modulate(x, *parts[1][6:8]))))
        if not self.context_block.last:
            context = self.context_block.after(context, text, parts[0], torch.zeros(()))
        return context, self.x_block.after(x, image, parts[1], other)


class MMDiT(nn.Module):
    def __init__(self, config, op):
        super().__init__()
        width, count = HEAD * config["depth"], config["num_blocks"]
        self.patch, self.side = config["patch_size"], config["pos_embed_max_size"]
        self.x_embedder = nn.Module()
        self.x_embedder.proj = op.Conv2d(config["in_channels"], width, self.patch, self.patch)
        self.t_embedder, self.y_embedder = nn.Module(), nn.Module()
        self.t_embedder.mlp = two(256, width, op)
        self.y_embedder.mlp = two(config["adm_in_channels"], width, op)
        self.context_embedder = op.Linear(**config["context_embedder_config"]["params"])
        self.register_buffer("pos_embed", torch.empty(1, config["num_patches"], width))
        second = config["x_block_self_attn_layers"]
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, op, i == count - 1, i in second) for i in range(count)
        )
        self.final_layer = nn.Module()
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), op.Linear(width, 2 * width))
        self.final_layer.linear = op.Linear(width, self.patch**2 * config["out_channels"])

    def forward(self, x, timestep, context, y):
        x = self.x_embedder.proj(x)
        height, width = x.shape[-2:]
        top, left = (self.side - height) // 2, (self.side - width) // 2
        places = self.pos_embed.unflatten(1, (self.side, self.side))[:, top : top + height]
        x = x.flatten(2).mT + places[:, :, left : left + width].flatten(1, 2)
        c = self.t_embedder.mlp(sinusoid(timestep, 256)) + self.y_embedder.mlp(y)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, x = block(context, x, c)
        x = self.final_layer.linear(modulate(x, *self.final_layer.adaLN_modulation(c).chunk(2, dim=1)))
        x = x.view(len(x), height, width, self.patch, self.patch, -1)
        return torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)


class Attention(nn.Module):
    def __init__(self, width, heads, op):
        super().__init__()
        self.heads = heads
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(self, name, op.Linear(width, width))
        self.to_out = nn.ModuleList([op.Linear(width, width)])
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, RMS(width // heads))

    def forward(self, hidden_states, encoder_hidden_states, image_rotary_emb):
        parts = []
        for x, names, norms in (
            (
                encoder_hidden_states,
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
            ),
            (hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
        ):
            q, k, v = (getattr(self, name)(x).unflatten(-1, (self.heads, -1)) for name in names)
            parts.append((getattr(self, norms[0])(q), getattr(self, norms[1])(k), v))
        q, k, v = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
        cos, sin = image_rotary_emb

        def turned(x):
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        out = attended([turned(q), turned(k), v])
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return self.to_out[0](image), self.to_add_out(text)


class GELU(nn.Module):
    def __init__(self, width, op):
        super().__init__()
        self.proj = op.Linear(width, 4 * width)

    def forward(self, x):
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width, op):
        super().__init__()
        self.net = nn.Sequential(GELU(width, op), nn.Identity(), op.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class QwenBlock(nn.Module):
    def __init__(self, width, heads, op):
        super().__init__()
        for name in ("img", "txt"):
            setattr(self, f"{name}_mod", nn.Sequential(nn.SiLU(), op.Linear(width, 6 * width)))
            setattr(self, f"{name}_mlp", FeedForward(width, op))
        self.attn = Attention(width, heads, op)

    def forward(self, image, text, c, rotary):
        parts = [mod(c).chunk(6, dim=-1) for mod in (self.img_mod, self.txt_mod)]
        streams = (image, text)
        given = [modulate(x, *p[:2]) for x, p in zip(streams, parts, strict=True)]
        attended = self.attn(hidden_states=given[0], encoder_hidden_states=given[1], image_rotary_emb=rotary)
        done = []
        for x, out, p, mlp in zip(streams, attended, parts, (self.img_mlp, self.txt_mlp), strict=True):
            x = x + p[2][:, None] * out
            done.append(x + p[5][:, None] * mlp(modulate(x, *p[3:5])))
        return done


class QwenImage(nn.Module):
    def __init__(self, config, op):
        super().__init__()
        width = config["num_attention_heads"] * config["attention_head_dim"]
        self.axes = config["axes_dims_rope"]
        self.time_text_embed = nn.Module()
        embedder = nn.Module()
        embedder.linear_1, embedder.linear_2 = op.Linear(256, width), op.Linear(width, width)
        self.time_text_embed.timestep_embedder = embedder
        self.txt_norm = RMS(config["joint_attention_dim"])
        self.img_in = op.Linear(config["in_channels"], width)
        self.txt_in = op.Linear(config["joint_attention_dim"], width)
        heads = config["num_attention_heads"]
        self.transformer_blocks = nn.ModuleList(
            QwenBlock(width, heads, op) for _ in range(config["num_layers"])
        )
        self.norm_out = nn.Module()
        self.norm_out.linear = op.Linear(width, 2 * width)
        self.proj_out = op.Linear(width, 4 * config["out_channels"])

    def rotary(self, height, width, tokens):
        start = max(height // 2, width // 2)
        rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
        image = torch.stack([torch.zeros(height, width), *torch.meshgrid(rows, columns, indexing="ij")], -1)
        text = torch.arange(start, start + tokens)[:, None].expand(-1, 3)
        places = torch.cat([text, image.flatten(0, 1)]).float()
        angles = [
            places[:, i, None] / 10000 ** (torch.arange(0, axis, 2) / axis)
            for i, axis in enumerate(self.axes)
        ]
        angles = torch.cat(angles, 1)[None, :, None]
        return angles.cos(), angles.sin()

    def forward(self, x, timestep, context):
        (count, channels, _, height, width), shape = x.shape, x.shape
        x = x.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        image = self.img_in(x.reshape(count, height * width // 4, -1))
        text = self.txt_in(self.txt_norm(context))
        embedder = self.time_text_embed.timestep_embedder
        c = embedder.linear_2(F.silu(embedder.linear_1(sinusoid(timestep, 256, 1000.0))))
        rotary = self.rotary(height // 2, width // 2, context.shape[1])
        for block in self.transformer_blocks:
            image, text = block(image, text, c, rotary)
        scale, shift = self.norm_out.linear(F.silu(c)).chunk(2, dim=1)
        out = self.proj_out(modulate(image, shift, scale))
        out = out.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(shape)

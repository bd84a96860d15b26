"""Vision Transformer, written by hand with einops; parameter names and shapes are timm's.

An image is cut into patches of p x p pixels, each a token; a [CLS] token joins them; `depth` pre-norm blocks of attention
and MLP follow (Dosovitskiy et al., 2010.11929). As in DINO (Caron et al., 2104.14294): LayerNorm eps 1e-6, qkv bias,
trunc-normal .02, positions interpolated (bicubic) for crops of other sizes, drop path rising linearly with depth.

Letters in shapes:  b images  n tokens  d width  h heads  c width of a head  y x patch grid  p q sides of a patch
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common import UserError, batch_rand, check_size


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x):
        """x [b n d] -> queries, keys, values, each [b h n c]."""
        return rearrange(self.qkv(x), "b n (qkv h c) -> qkv b h n c", qkv=3, h=self.heads).unbind(0)

    def weights(self, x):
        """x [b n d] -> the attention itself [b h n n], rows sum to 1: softmax(q k^T / sqrt(c))."""
        q, k, _ = self.project(x)
        return (torch.einsum("b h i c, b h j c -> b h i j", q, k) / q.shape[-1] ** 0.5).softmax(-1)

    def forward(self, x, explicit=False):
        q, k, v = self.project(x)
        out = torch.einsum("b h i j, b h j c -> b h i c", self.weights(x), v) if explicit else F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h n c -> b n (h c)"))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Leaves a residual branch out for a whole image with probability `rate` (Huang et al., 1603.09382)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = batch_rand(len(x), x.device)[:, None, None] >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, explicit=False):
        x = x + self.drop_path(self.attn(self.norm1(x), explicit))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images [b 3 H W] -> tokens [b n d]. A convolution by name and shape, as in timm, but patches do not overlap: it is one product."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size, self.proj = patch_size, nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x):
        patches = rearrange(x, "b rgb (y p) (x q) -> b (y x) (rgb p q)", p=self.patch_size, q=self.patch_size)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """ViT-Ti/4 for 32-pixel images by default: 192 wide, 12 deep, 3 heads, 5.4 M parameters.

    Raises UserError when `patch_size` does not divide an image's side, or `heads` does not divide `dim`.
    """

    def __init__(self, image_size=32, patch_size=4, dim=192, depth=12, heads=3, drop_path=0.0):
        super().__init__()
        if dim % heads:
            raise UserError(f"dim={dim} cannot be split into heads={heads} equal parts")
        check_size(image_size, patch_size)
        self.patch_size, self.dim = patch_size, dim
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, y, x):
        """Position embeddings for a grid of y x x patches, [1 1+y*x d]."""
        side = int((self.pos_embed.shape[1] - 1) ** 0.5)
        if (y, x) == (side, side):
            return self.pos_embed
        grid = rearrange(self.pos_embed[:, 1:], "1 (y x) d -> 1 d y x", y=side)
        grid = F.interpolate(grid, size=(y, x), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], rearrange(grid, "1 d y x -> 1 (y x) d")], dim=1)

    def tokens(self, images):
        """Images [b 3 H W] -> the first block's input [b 1+n d], [CLS] first."""
        for side in images.shape[-2:]:
            check_size(side, self.patch_size)
        cls = repeat(self.cls_token, "1 1 d -> b 1 d", b=len(images))
        y, x = (side // self.patch_size for side in images.shape[-2:])
        return torch.cat([cls, self.patch_embed(images)], dim=1) + self.positions(y, x)

    def layers(self, images, last=1, explicit=False):
        """Normalised outputs [b 1+n d] of the last `last` blocks, in order."""
        x, kept = self.tokens(images), []
        for i, block in enumerate(self.blocks):
            x = block(x, explicit)
            if i >= len(self.blocks) - last:
                kept.append(self.norm(x))
        return kept

    def forward(self, images):
        """Images [b 3 H W] -> [CLS] features of the last block [b d]."""
        return self.layers(images)[-1][:, 0]

    def attention(self, images, block=-1):
        """Attention of one block [b h 1+n 1+n]; `[:, :, 0, 1:]` is where [CLS] looks."""
        x = self.tokens(images)
        block = range(len(self.blocks))[block]
        for before in self.blocks[:block]:
            x = before(x)
        return self.blocks[block].attn.weights(self.blocks[block].norm1(x))


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)

"""Attention maps of [CLS], what they hold, and how far apart two of them are.

Letters in shapes:  n images  h heads  y x patch grid  k patches  s image side
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange

from twins.datasets import from_bytes, normalise
from twins.errors import UserError
from twins.processes import gather, shard


@torch.no_grad()
def attend(backbone, images, device, autocast, block=-1):
    """Images uint8 [n 3 s s] -> maps [n h y x], each of sum 1, and the mean attention distance of each head [h] in pixels.

    The distance is between the middles of two patches, weighted by the attention of the one to the other (2010.11929, D.8).
    """
    side, heads = images.shape[-1] // backbone.patch_size, backbone.blocks[0].attn.heads
    at = backbone.patch_size * torch.cartesian_prod(*[torch.arange(side, device=device).float()] * 2)
    far, maps, distance, n = torch.cdist(at, at), [], torch.zeros(1, heads), len(images)
    for chunk in shard(images).split(max(2**24 // (heads * (side**2 + backbone.num_prefix_tokens) ** 2), 1)):  # 64 MiB of attention
        with autocast:
            a = backbone.attention(normalise(from_bytes(chunk.to(device))), block)[..., backbone.num_prefix_tokens :].float()
        a = a / a.sum(-1, keepdim=True)
        maps.append(a[:, :, 0].cpu())
        distance += ((a[:, :, backbone.num_prefix_tokens :] * far).sum((0, 2, 3)) / side**2).cpu()
    return rearrange(gather(torch.cat(maps)), "n h (y x) -> n h y x", y=side), gather(distance).sum(0) / n


def keep_mass(maps, share):
    """The largest patches of each map [... y x] that together hold `share` of it: bool [... y x]. As DINO's visualize_attention."""
    flat = maps.flatten(-2)
    ordered, order = flat.sort(-1)
    kept = ordered.cumsum(-1) / flat.sum(-1, keepdim=True) > 1 - share
    return torch.zeros_like(kept).scatter(-1, order, kept).view(maps.shape)


def entropy(p):
    """Entropy in bits of distributions p [... k] -> [...]."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def divergence(p, q):
    """Jensen-Shannon divergence in bits of distributions p, q [... k] -> [...]: 0 where equal, 1 where nothing is shared."""
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp(min=0)


def jaccard(kept, masks):
    """DINO's VOC protocol: patches kept by each head, bool [n h y x], against masks int16 [n s s] -> (best head, per head [h]).

    For each class of an image except background, intersection over union of its pixels and the kept ones, what does not
    count left out of both; the mean over an image's classes, then over images that have any. The best head is chosen for each
    image and class. Raises UserError when no mask has an object.
    """
    kept = F.interpolate(kept.float(), size=masks.shape[-2:], mode="nearest").bool()
    total, objects = torch.zeros(len(masks), 1 + kept.shape[1]), torch.zeros(len(masks))
    for c in masks[masks > 0].unique():
        has = (masks == c).flatten(1).any(1)
        truth, counts = (masks[has] == c)[:, None], (masks[has] >= 0)[:, None]
        both, either = ((x & counts).sum((2, 3)) for x in (kept[has] & truth, kept[has] | truth))
        iou = both / either
        total[has] += torch.cat([iou.amax(1, keepdim=True), iou], 1)
        objects[has] += 1
    if not objects.any():
        raise UserError("no mask has an object: there is nothing to compare attention with")
    best, *each = (total / objects[:, None])[objects > 0].mean(0).tolist()
    return best, each

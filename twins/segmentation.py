"""Segmentation from patch tokens: heads, scores of predictions, and the ceiling of a patch grid.

Letters in shapes:  b n images  s image side  y x patch grid  d width  c classes
"""

import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from twins.datasets import from_bytes, normalise
from twins.errors import UserError
from twins.processes import to_float32

PIXELS = 2**25  # class scores computed at a time in evaluation


class Head(nn.Module):
    """Patch features [b d y x] -> class scores [b c s s]."""

    def __init__(self, dim, classes, size):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, classes, 1)
        self.size = size

    def forward(self, x):
        scores = self.conv(self.norm(to_float32(x)))
        return F.interpolate(scores, size=(self.size, self.size), mode="bilinear")


class Finetuned(nn.Module):
    """A copy of a backbone and a new head(). Images uint8 [b 3 s s] -> class scores [b c s s]."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.head = head()

    def forward(self, x):
        return self.head(patch_tokens(self.backbone, x))


def patch_tokens(backbone, images):
    """Images uint8 [b 3 s s] -> normalised patch tokens of the last block [b d y x]."""
    x = backbone.layers(normalise(from_bytes(images)))[-1][:, backbone.num_prefix_tokens :]
    return rearrange(x, "b (y x) d -> b d y x", y=images.shape[-1] // backbone.patch_size)


def score(prediction, masks, classes):
    """Prediction and truth, int16 [n s s] -> {miou, pixel_accuracy, iou [classes]}.

    The iou of a class that occurs in neither is None. Pixels with truth -1 are ignored; UserError if all are.
    """
    counts = masks >= 0
    if not counts.any():
        raise UserError("the masks mark every pixel as ignored")
    pairs = masks[counts].long() * classes + prediction[counts].long()
    confusion = pairs.bincount(minlength=classes**2).view(classes, classes).double()  # truth, prediction
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    iou = intersection / union
    return {
        "miou": iou[union > 0].mean().item(),
        "pixel_accuracy": (intersection.sum() / counts.sum()).item(),
        "iou": [None if math.isnan(value) else value for value in iou.tolist()],
    }


def best_of_grid(masks, patch_size, classes):
    """The ceiling, int16 [n s s] -> same: each patch's class shares, upsampled like scores.

    Scores optimised for the upsampling can be slightly better (98 instead of 96 on `shapes`).
    """
    chunks = []
    for chunk in masks.split(max(PIXELS // (classes * masks[0].numel()), 1)):
        one_hot = torch.stack([(chunk == c).float() for c in range(classes)], 1)
        shares = F.avg_pool2d(one_hot, patch_size)
        chunks.append(F.interpolate(shares, size=chunk.shape[-2:], mode="bilinear").argmax(1).short())
    return torch.cat(chunks)

"""The ViT: explicit attention is fused attention, timm's ViT is ours, positions and sizes."""

import pytest
import torch
from common import UserError

from vit import ViT


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = ViT(32, 4, 48, 3, 3)
    for p in model.parameters():  # initial weights are so small that errors would not show
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_explicit_attention_is_fused_attention(vit, images):
    fused, explicit = vit.layers(images, 3), vit.layers(images, 3, explicit=True)
    for a, b in zip(fused, explicit, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_attention_of_any_block_are_distributions(vit, images):
    for block in (0, 1, -1):
        a = vit.attention(images, block)
        assert a.shape == (4, 3, 65, 65)
        torch.testing.assert_close(a.sum(-1), torch.ones(4, 3, 65))
    assert torch.equal(vit.attention(images, 2), vit.attention(images))
    assert not torch.equal(vit.attention(images, 0), vit.attention(images))


def test_timm_gives_our_output(vit, images):
    timm = pytest.importorskip("timm", reason="timm is not installed (.ci/run installs it)")
    model = timm.models.vision_transformer.VisionTransformer(32, 4, embed_dim=48, depth=3, num_heads=3, num_classes=0).eval()
    model.load_state_dict(vit.state_dict())
    assert (model(images) - vit(images)).abs().max() < 1e-5
    assert (model.forward_features(images) - vit.layers(images)[-1]).abs().max() < 1e-5


def test_positions_are_interpolated_for_other_sizes(vit, images):
    assert torch.equal(vit.positions(8, 8), vit.pos_embed)
    assert vit.positions(4, 6).shape == (1, 25, 48)
    assert torch.equal(vit.positions(4, 4)[:, :1], vit.pos_embed[:, :1])
    with torch.no_grad():
        vit.pos_embed[:, 1:] = torch.arange(8.0).repeat(8)[:, None]  # a ramp along x stays a ramp
    row = vit.positions(4, 4)[0, 1:5, 0]
    assert (row.diff() > 1.5).all() and row[0] < 1 and row[-1] > 6
    assert vit(images[..., :16, :24]).shape == (4, 48)


@pytest.mark.parametrize("size, near", [(30, "28 or 32"), (33, "32 or 36"), (3, "try 4")])
def test_a_size_that_the_patch_does_not_divide(vit, size, near):
    with pytest.raises(UserError, match=near):
        vit(torch.zeros(1, 3, size, size))
    with pytest.raises(UserError, match=near):
        ViT(size, 4, 48, 3, 3)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = ViT(32, 4, 48, 3, 3, drop_path=0.4).blocks[-1].drop_path
    x = drop(torch.ones(5000, 2, 3))
    assert x.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert x.mean().item() == pytest.approx(1, abs=0.05) and (x.amax((1, 2)) == x.amin((1, 2))).all()
    assert torch.equal(drop.eval()(x), x)
    assert [b.drop_path.rate for b in ViT(32, 4, 48, 3, 3, drop_path=0.4).blocks] == [0.0, 0.2, 0.4]

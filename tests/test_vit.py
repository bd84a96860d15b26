"""The ViT: explicit attention is fused attention, timm's ViT is ours, positions and sizes."""

import pytest
import torch

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


def test_explicit_attention_is_fused_attention(vit, images, monkeypatch):
    """Whatever form a device and length take, and [CLS] alone in the last block is [CLS] of all tokens."""
    outputs = []
    for few in (0, 1000):
        monkeypatch.setattr("vit.FEW_TOKENS", {torch.float32: few})
        outputs.append(torch.stack(vit.layers(images, 3)))
        assert (vit(images) - outputs[-1][-1][:, 0]).abs().max() < 1e-5
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_attention_of_any_block_are_distributions(vit, images):
    for block in (0, 1, -1):
        a = vit.attention(images, block)
        assert a.shape == (4, 3, 65, 65)
        torch.testing.assert_close(a.sum(-1), torch.ones(4, 3, 65))
    assert torch.equal(vit.attention(images, 2), vit.attention(images))
    assert not torch.equal(vit.attention(images, 0), vit.attention(images))


def test_timm_gives_our_output(vit, images):
    timm = pytest.importorskip("timm", reason="timm is not installed (.ci/run installs it)")
    model = timm.models.vision_transformer.VisionTransformer(
        32, 4, embed_dim=48, depth=3, num_heads=3, num_classes=0
    ).eval()
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
    with pytest.raises(ValueError, match=near):
        vit(torch.zeros(1, 3, size, size))
    with pytest.raises(ValueError, match=near):
        ViT(size, 4, 48, 3, 3)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    vit = ViT(32, 4, 48, 3, 3, drop_path=0.4)
    keep = vit.blocks[-1].keep(torch.rand(5000))
    assert keep.shape == (5000, 1, 1) and keep.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert keep.mean().item() == pytest.approx(1, abs=0.05)
    assert [block.drop_path for block in vit.blocks] == pytest.approx([0.0, 0.2, 0.4])
    x = torch.randn(4, 3, 32, 32)
    whole, (kept, dropped) = vit.eval()(x), (vit.train()(x, torch.full((6, 4), u)) for u in (0.999, 0.0))
    for i in range(4):  # each image alone, nothing hidden: the numbers decide
        alone = torch.full((6, 4), 0.999)
        alone[:, i] = 0.0
        mixed = vit(x, alone)
        torch.testing.assert_close(mixed[i], dropped[i])
        torch.testing.assert_close(mixed[i - 1], kept[i - 1])
    assert not torch.equal(kept, whole) and torch.equal(vit.eval()(x, torch.zeros(6, 4)), whole)


def test_positions_are_official_dinos(vit):
    """interpolate_pos_encoding of facebookresearch/dino: scale (n + 0.1) / N, bicubic."""
    grid = vit.pos_embed[:, 1:].reshape(1, 8, 8, 48).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, scale_factor=(6.1 / 8, 5.1 / 8), mode="bicubic")
    assert torch.equal(vit.positions(6, 5)[0, 1:], theirs.permute(0, 2, 3, 1).reshape(30, 48))


def test_registers_are_timms(images):
    timm = pytest.importorskip("timm", reason="timm is not installed (.ci/run installs it)")
    vit = ViT(32, 4, 48, 2, 3, registers=4).eval()
    model = timm.models.vision_transformer.VisionTransformer(**vit.timm_args()).eval()
    model.load_state_dict(vit.state_dict())
    assert vit.num_prefix_tokens == model.num_prefix_tokens == 5
    assert (model(images) - vit(images)).abs().max() < 1e-5
    assert (model.forward_features(images) - vit.layers(images)[-1]).abs().max() < 1e-5

"""Every mechanism of DINO can be switched off alone: with its key it is gone, without it is there."""

import pytest
import torch
from torch import nn

from conftest import SCRIPTS
from test_figures import trail
from twins import datasets
from twins.datasets import shapes
from twins.processes import BatchNorm1d

pytestmark = pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "barlow.py"])


def watch(train, script, look, **keys):
    """What look(globals) returns at every step of a run."""
    seen = []
    train(script, lambda g: seen.append(look(g)), **keys)
    return seen


def test_centering(train, script):
    on, _ = trail(train, script)
    off, _ = trail(train, script, centering=False)
    assert on[-1][2].abs().max() > 0 and off[-1][2].abs().max() == 0


def test_sharpening(train, script):
    assert (
        watch(train, script, lambda g: g["tau"], tau_t=0.1, tau_t_warmup_epochs=1.0) == [0.1] * 3
    )  # no warm-up from .04 either
    assert all(tau < 0.1 for tau in watch(train, script, lambda g: g["tau"], tau_t_warmup_epochs=1.0))


def test_teacher_temperature_warmup(train, script, monkeypatch):
    few = shapes("train")
    few = few._replace(images=few.images[:36], labels=few.labels[:36], masks=None)  # two steps an epoch
    monkeypatch.setattr(datasets, "shapes", lambda split: few)
    tau = watch(train, script, lambda g: g["tau"], max_steps=8, tau_t=0.07, tau_t_warmup_epochs=3.0)
    assert tau == pytest.approx([0.04, 0.04, 0.055, 0.055, 0.07, 0.07, 0.07, 0.07])  # np.linspace by epoch
    assert watch(train, script, lambda g: g["tau"], tau_t=0.07, tau_t_warmup_epochs=0) == [0.07] * 3
    tau = watch(train, script, lambda g: g["tau"], max_steps=8, tau_t=0.07, tau_t_warmup_epochs=2.5)
    assert tau == pytest.approx([0.04, 0.04, 0.06, 0.06, 0.07, 0.07, 0.07, 0.07])


@pytest.mark.parametrize("end", [0.9, 0.5])
def test_ema_schedule(train, script, end):
    """The last of 4 steps: the momentum that explains the teacher is `ema` without a schedule, nearly
    `ema_end` with one.
    """
    steps, _ = trail(train, script, ema=0.5, ema_end=end, max_steps=4)
    before, student, after = steps[3][1], steps[4][0], steps[4][1]
    momentum = ((after - student) @ (before - student) / (before - student).square().sum()).item()
    assert momentum == pytest.approx(0.5 if end == 0.5 else 0.841, abs=0.001)


def test_ema(train, script):
    steps, g = trail(train, script, ema=0, drop_path=0.0)
    assert all(torch.equal(student, teacher) for student, teacher, *_ in steps)
    assert not g["z_t"].requires_grad and not any(p.requires_grad for p in g["teacher"].parameters())
    steps, _ = trail(train, script)
    assert not torch.equal(steps[-1][0], steps[-1][1])


def scaled(g, layer):
    """How much longer z gets when the weights of one of the head's layers are doubled."""
    head, x = g["student"].head, torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = head(x)
        for p in layer(head):
            p.mul_(2)
        return (head(x) / z).median().item()


def test_weight_normed_last_layer(train, script):
    """As in official code: the direction alone counts; without the option prototypes learn their lengths,
    from 1.
    """
    fixed, free = (
        train(script, norm_last_layer=norm, warmup_epochs=0, freeze_last_layer_epochs=0)
        for norm in (True, False)
    )
    for g in (fixed, free):
        assert scaled(g, lambda head: [head.last.weight]) == pytest.approx(1)
    assert fixed["student"].head.length.eq(1).all() and free["student"].head.length.ne(1).all()


def test_batchnorm_in_the_head(train, script):
    """Official DINO has none with a ViT, which is the default."""
    for head_bn in (False, True):
        found = [
            m
            for m in train(script, head_bn=head_bn)["student"].head.modules()
            if isinstance(m, nn.BatchNorm1d)
        ]
        assert len(found) == 2 * head_bn and all(isinstance(m, BatchNorm1d) for m in found)
    assert not [m for m in train(script)["student"].head.modules() if isinstance(m, nn.BatchNorm1d)]


def test_l2_bottleneck(train, script):
    assert scaled(train(script), lambda head: head.mlp[-1].parameters()) == pytest.approx(1)
    assert scaled(
        train(script, l2_bottleneck=False), lambda head: head.mlp[-1].parameters()
    ) == pytest.approx(2)


def test_frozen_last_layer(train, script):
    def weight(g):
        return g["student"].head.last.weight.detach().clone()

    frozen = watch(train, script, weight, max_steps=5, freeze_last_layer_epochs=2 / 675, warmup_epochs=0.0)
    assert torch.equal(frozen[0], frozen[2]) and not torch.equal(frozen[2], frozen[3])
    free = watch(train, script, weight, freeze_last_layer_epochs=0, warmup_epochs=0.0)
    assert not torch.equal(free[0], free[1])


def test_learning_rate_warmup(train, script):
    def lr(g):
        return g["optimizer"].param_groups[0]["lr"], g["optimizer"].param_groups[1]["lr"]

    assert watch(train, script, lr, warmup_epochs=0)[0] == pytest.approx(
        (2e-3 / 16, 2e-3 / 16)
    )  # base_lr x 16 / 256
    assert [a for a, _ in watch(train, script, lr, warmup_epochs=3.5 / 675)] == pytest.approx(
        [0, 2e-3 / 32, 2e-3 / 16]
    )  # 3 steps


def test_weight_decay_schedule(train, script):
    def wd(g):
        return [group["weight_decay"] for group in g["optimizer"].param_groups]

    assert watch(train, script, wd, wd_end=0.04) == [[0.04, 0.0]] * 3
    assert [a for a, _ in watch(train, script, wd)] == pytest.approx([0.04, 0.13, 0.31])


def test_gradient_clipping(train, script):
    def norms(**keys):
        g = train(script, max_steps=1, **keys)
        return torch.stack([p.grad.norm() for p in g["student"].parameters() if p.grad is not None])

    free, clipped = norms(grad_clip=0), norms(grad_clip=0.01)
    assert free.max() > 0.02
    torch.testing.assert_close(clipped, free.clamp(max=0.01), rtol=1e-3, atol=1e-8)  # each tensor alone

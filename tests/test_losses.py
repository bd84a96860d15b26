"""Losses against naive double loops in float64 and against lightly's, values and gradients; cases that break
others.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import SCRIPTS

EXACT = dict(rtol=1e-6, atol=1e-12)
LAMBD = 0.005


@pytest.fixture(params=[s for s in SCRIPTS if s != "dino.py"])
def cc_loss(request, functions):
    return functions[request.param]["cross_correlation_loss"]


@pytest.fixture(params=[s for s in SCRIPTS if s != "barlow.py"])
def ce_loss(request, functions):
    return functions[request.param]["cross_entropy"]


def projections(b, d, seed=0, scale=100.0):
    """Two related projections [b d] in float64, so large that no epsilon shows."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(b, d, generator=g, dtype=torch.float64)
    return [
        (scale * (shared + torch.randn(b, d, generator=g, dtype=torch.float64)) + 7).requires_grad_()
        for _ in range(2)
    ]


def same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, **EXACT)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


def naive_cross_correlation(z1, z2, lambd):
    b, d = z1.shape
    total = 0
    for i in range(d):
        for j in range(d):
            x, y = z1[:, i], z2[:, j]
            x, y = (x - x.mean()) / x.std(correction=0), (y - y.mean()) / y.std(correction=0)
            c = (x * y).sum() / b
            total = total + ((1 - c) ** 2 if i == j else lambd * c**2)
    return total / d


def test_cross_correlation_is_the_double_loop(cc_loss):
    z = projections(12, 5)
    same(cc_loss(*z, LAMBD), naive_cross_correlation(*z, LAMBD), z)


def test_cross_correlation_is_lightlys(cc_loss):
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed (.ci/run installs it)")
    z = projections(64, 16, scale=1e4)  # lightly's epsilon is larger
    same(cc_loss(*z, LAMBD), lightly.BarlowTwinsLoss(LAMBD)(*z) / 16, z)


def naive_cross_entropy(pt, zs, tau_s):
    out = torch.zeros(len(pt), len(zs), dtype=torch.float64)
    for u in range(len(pt)):
        for v in range(len(zs)):
            for i in range(pt.shape[1]):
                ps = (zs[v, i] / tau_s).exp() / (zs[v, i] / tau_s).exp().sum()
                out[u, v] -= sum(pt[u, i, k] * ps[k].log() for k in range(pt.shape[2])) / pt.shape[1]
    return out


def test_cross_entropy_is_the_double_loop(ce_loss):
    g = torch.Generator().manual_seed(0)
    pt = torch.randn(2, 3, 5, generator=g, dtype=torch.float64).softmax(-1)
    zs = torch.randn(4, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 4, generator=g, dtype=torch.float64)  # every pair counts, each differently
    same((ce_loss(pt, zs, 0.1) * weights).sum(), (naive_cross_entropy(pt, zs, 0.1) * weights).sum(), [zs])


@pytest.mark.parametrize("script", ["dino.py", "hybrid_a.py"])
def test_dinos_loss_in_the_loop_is_lightlys(train, script):
    """Pairs, centre and temperatures as the loop has them, over three steps."""
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed (.ci/run installs it)")
    oracle = lightly.DINOLoss(output_dim=32, teacher_temp=0.07, student_temp=0.1, center_momentum=0.9)

    def spy(g):
        torch.testing.assert_close(g["center"], oracle.center[0, 0], rtol=1e-5, atol=1e-7)
        z = [z.detach().requires_grad_() for z in g["z_s"]]
        theirs = oracle(list(g["z_t"]), z, teacher_temp=g["tau"])
        torch.testing.assert_close(g["ce"], theirs, rtol=1e-6, atol=1e-6)
        ours = torch.autograd.grad(g["ce"], g["z_s"], retain_graph=True)[0]
        torch.testing.assert_close(ours, torch.stack(torch.autograd.grad(theirs, z)), rtol=1e-4, atol=1e-9)
        seen.append(g["step"])

    seen = []
    train(script, spy, n_local=2, tau_t_warmup_epochs=0.005)
    assert seen == [0, 1, 2]


def test_identity_gives_zero(cc_loss):
    """Columns of a Hadamard matrix are uncorrelated: C = I, exactly."""
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    z = 1000 * h[:, 1:].double()  # without the constant column
    assert cc_loss(z, z, 1.0).item() < 1e-9
    assert cc_loss(z, -z, 1.0).item() == pytest.approx(4)
    assert cc_loss(z, z.roll(1, 1), 0.5).item() == pytest.approx(1 + 0.5)


@pytest.mark.parametrize(
    "b, d, kind",
    [(8, 4, "constant"), (8, 4, "identical"), (2, 4, "random"), (8, 1, "random"), (2, 1, "constant")],
)
def test_hard_batches_give_finite_losses_and_gradients(cc_loss, b, d, kind):
    torch.manual_seed(0)
    z1 = torch.ones(b, d) if kind == "constant" else torch.randn(b, d)
    z2 = z1.clone() if kind != "random" else torch.randn(b, d)
    z1.requires_grad_(), z2.requires_grad_()
    loss = cc_loss(z1, z2, LAMBD)
    loss.backward()
    for t in (loss, z1.grad, z2.grad):
        assert t.isfinite().all() and t.abs().max() < 1e3


@pytest.mark.parametrize("script", ["dino.py", "hybrid_a.py", "hybrid_b.py"])
def test_a_head_at_zero_has_a_finite_gradient(functions, script):
    head = functions[script]["Head"](16)
    x = torch.zeros(
        4, 16, requires_grad=True
    )  # every bottleneck is exactly 0: F.normalize alone gives 1e12 here
    head(x).sum().backward()
    assert all(
        p.grad.isfinite().all() and p.grad.abs().max() < 1e8 for p in head.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("keys", [dict(batch_size=2), dict(out_dim=1), dict(batch_size=2, n_local=0)])
def test_a_run_with_a_tiny_batch_or_one_column_stays_finite(train, script, keys):
    if script == "barlow.py" and "out_dim" in keys:
        keys = dict(proj_dim=1)
    g = train(script, **keys)
    assert math.isfinite(g["loss"].item()) and all(p.isfinite().all() for p in g["student"].parameters())


def test_entropy():
    from twins.monitor import entropy

    assert entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert entropy(F.one_hot(torch.arange(3), 8).float()).item() == 0


def test_the_teachers_information_is_0_in_both_trivial_solutions():
    from twins.monitor import teacher_meters

    one_each = torch.eye(8).expand(2, 8, 8)  # every image on a prototype of its own
    meters = teacher_meters(one_each, torch.tensor(0.5))
    assert meters["teacher_information"].item() == pytest.approx(math.log(8))
    assert meters["teacher_entropy"].item() == 0 and meters["kl"].item() == 0.5
    for p_t in (torch.full((2, 8, 8), 1 / 8), one_each[:, :1].expand(2, 8, 8)):  # uniform, constant
        assert teacher_meters(p_t, torch.tensor(2.5))["teacher_information"].item() == pytest.approx(0)
    half = torch.cat([one_each, torch.full((2, 8, 8), 1 / 8)], 1)  # half of the images are told apart
    assert teacher_meters(half, torch.tensor(2.5))["teacher_information"].item() == pytest.approx(
        math.log(8) / 2
    )

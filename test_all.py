"""Every test: closed forms and identities in float64 first, then whole runs.

    python -m pytest -q test_all.py

What asserts exactness runs on the CPU, whatever else there is. On a GPU there are more runs."""
import argparse
import ast
import copy
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close

import ddpm_conditional_cfg as cfg
import ddpm_ho_2020 as ddpm
import schedules
import sohl_dickstein_2015 as sohl
from schedules import SCHEDULES, Schedule, extract, make_schedule

torch.set_num_threads(1)  # the networks are small, and threads would wait for each other
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = (HERE / "assets" / "results.md").read_text(encoding="utf-8")
every_schedule = pytest.mark.parametrize("name", list(SCHEDULES))
every_prediction = pytest.mark.parametrize("predict", ["eps", "x0", "mu"])

both = pytest.mark.parametrize("script", [ddpm, cfg])

def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def agree(draws, mean):
    """The mean of the draws is within four standard errors of what it should be."""
    return abs(draws.mean() - mean) < 4 * draws.std() / len(draws) ** 0.5 + 1e-12

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

# ---------------------------------------------------------------------------------- schedules.py

@every_schedule
@pytest.mark.parametrize("T", [10, 50, 1000])
@pytest.mark.filterwarnings("error")  # none of ours leaves too much signal
def test_schedule_table(name, T):
    s = make_schedule(name, T).to("cpu")
    assert s.beta.shape == (T + 1,) and s.beta.dtype == torch.float64
    assert s.beta[0] == 0 and ((s.beta[1:] > 0) & (s.beta[1:] <= 0.999)).all()
    assert s.alpha_bar[0] == 1 and (s.alpha_bar.diff() < 0).all()

@pytest.mark.parametrize("name, alpha_bar", [
    ("linear", lambda u, v: (1 - 10 * (1e-4 + 0.0199 * v)).cumprod(0)),
    ("quadratic", lambda u, v: (1 - 10 * (0.01 + (0.02 ** 0.5 - 0.01) * v) ** 2).cumprod(0)),
    ("constant", lambda u, v: (-10 * u).exp()),
    ("cosine", lambda u, v: (torch.cos((u + 0.008) / 1.008 * math.pi / 2)
                             / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2),
    ("sigmoid", lambda u, v: 0.5 - (3 * u - 1.5).tanh() / (2 * math.tanh(1.5))),
    ("geometric", lambda u, v: 1 / (1 + (0.01 * 5000 ** v) ** 2)),
    ("inverse", lambda u, v: 1 - u)])
def test_schedules_as_published(name, alpha_bar):
    """At t = 1..99 of T = 100; u is t / T, and v goes from 0 at t = 1 to 1 at t = T."""
    t = torch.arange(1, 100).double()
    assert make_schedule(name, 100).alpha_bar[1:100].allclose(alpha_bar(t / 100, (t - 1) / 99))

@every_schedule
def test_T_single_steps_are_one_jump(name):
    """Mean and variance of T steps of Eq. (2) against Eq. (4), at every t."""
    s, x0, mean, variance = make_schedule(name, 50), randn(3, 2), randn(3, 2), 0.0
    for t in range(1, 51):
        mean = (1 - s.beta[t]).sqrt() * mean
        variance = (1 - s.beta[t]) * variance + s.beta[t]
        assert s.q_sample(x0, t, torch.zeros_like(x0)).allclose(mean, rtol=1e-10, atol=1e-12)
        noise = s.q_sample(0 * x0, torch.tensor([t] * 3), torch.ones_like(x0))
        assert (noise.square() - variance).abs().max() < 1e-10
        noise = s.q_sample(torch.zeros(1), t, torch.ones(1))  # float32: rounded after the root
        assert noise.item() == pytest.approx(variance.sqrt().item(), rel=1e-6)

def test_posterior_is_bayes():
    """Eqs. (6), (7) against the product of the Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    s, t, x0, xt = make_schedule("linear", 20), torch.arange(1, 21), *randn(2, 20, 3)
    mu_tilde, beta_tilde = s.q_posterior(x0, xt, t)
    beta, ab, ab_prev = (v[:, None] for v in (s.beta[1:], s.alpha_bar[1:], s.alpha_bar[:-1]))
    p1, p2 = (1 - beta) / beta, 1 / (1 - ab_prev)  # the two precisions; at t = 1 p2 is infinite
    product = (p1 * xt / (1 - beta).sqrt() + p2 * ab_prev.sqrt() * x0) / (p1 + p2)
    assert beta_tilde.allclose(1 / (p1 + p2)) and mu_tilde[1:].allclose(product[1:])
    assert mu_tilde[0].allclose(x0[0], atol=1e-12) and beta_tilde[0] == 0

def test_the_usual_off_by_one_ends_at_the_image():
    """A loop over T-1..0 instead of T..1 is wrong, but its last step returns x_0, not x_0 / 2."""
    s, (x0, x) = make_schedule("linear", 20), randn(2, 4, 3).tanh()
    mu_tilde, beta_tilde = s.q_posterior(x0, x, 0)
    assert torch.equal(mu_tilde, x0) and beta_tilde == 0
    mu_theta, sigma2, _ = ddpm.p_theta(lambda x, t: 9 * x, s, x0, torch.zeros(4).long())
    assert torch.equal(mu_theta, x0) and (sigma2 == 0).all()

@pytest.mark.parametrize("make, message", [
    (lambda: Schedule([0.1, 0.2]), "beta"), (lambda: Schedule([0, 0.5, 1]), "between 0 and 1"),
    (lambda: Schedule([0, 0]), "between 0 and 1"), (lambda: Schedule([0]), "T \\+ 1 entries"),
    (lambda: Schedule([[0, 0.5]]), "beta"), (lambda: make_schedule("liner", 9), "names: linear, "),
    (lambda: make_schedule("linear", 0), "T starts at 1"),
    (lambda: ddpm.UNet((1, 30, 28), 8, (1, 2, 2)), "30x28 cannot be halved 2 times"),
    (lambda: ddpm.UNet((1, 30, 28), 8, (1, 2), 1, (7,)), r"\[7\].*\[28, 14\]"),
    (lambda: ddpm.UNet((1, 30, 28), 6, (1,), 1, ()), "6 channels.* multiple of 4"),
    (lambda: cfg.guided(None, torch.tensor([0, 10]), 10, 1), r"labels must lie in 0\.\.9"),
    (lambda: cfg.classifier_guided(None, None, None, torch.tensor([-1, 0]), 10, 1), "not -1..0")])
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

def test_a_schedule_that_leaves_the_image_warns():
    with pytest.warns(UserWarning, match="0.88"):  # betas made for T = 1000 with T = 50
        Schedule(torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.01, 50)]))

def test_readable_share():
    """The last 500 are held out, and the neighbour is the one of largest likelihood."""
    s, x = make_schedule("cosine", 20), torch.arange(600).double()[:, None]
    eps = torch.zeros(500, 1)
    assert schedules.readable_share(s, 0, x, x[:, 0] > 99, eps) == 0
    x = x % 10  # at t = 13 an x_0 of 9 is at 3.7, and the nearest of the means is its own
    assert schedules.readable_share(s, 13, x, x[:, 0].long(), eps) == 1
    assert schedules.readable_share(s, 13, x, x[:, 0].long(), eps + 3) < 0.8

def test_first_practical_with_a_schedule_of_ones_own(monkeypatch):
    """The README's example, pasted into schedules.py, is a schedule of that name."""
    few = {name: SCHEDULES[name] for name in ("constant", "cosine")}
    monkeypatch.setattr(schedules, "SCHEDULES", few)
    exec(re.search(r"```python\n(@register\n.*?)```", README, re.S)[1], vars(schedules).copy())
    expected = (1 - torch.arange(10) / 10) ** 3
    assert make_schedule("cubic", 10).alpha_bar[:10].float().allclose(expected)
    m = run(schedules, "--T=20 --out=new")
    assert 0 < m["constant"]["structure_share"] < m["cosine"]["structure_share"] <= 1
    assert files("new") == {"destruction.png", "metrics.json", "schedules.png"}
    saved = json.loads(Path("new/metrics.json").read_text(encoding="utf-8"))
    assert saved == {"config": {"T": 20, "seed": 0, "out": "new"}, **m} and "cubic" in m

# ------------------------------------------------------------ ddpm_ho_2020.py: loss and samplers

def exact_eps(s, m, variance):
    """E[ε | x_t] for x_0 ~ N(m, variance I): the best that any network could say."""
    def eps_theta(x, t):
        ab = extract(s.alpha_bar, t, x)
        return (1 - ab).sqrt() * (x - ab.sqrt() * m) / (ab * variance + 1 - ab)
    return eps_theta

@every_prediction
def test_a_network_that_is_right_has_no_loss_and_tells_all_the_rest(predict):
    """x_0, Eq. (11) = Eq. (7), and the score ∇ log q(x_t | x_0): denoising score matching."""
    s, x0, eps = make_schedule("linear", 1000), *randn(2, 6, 2, 3)
    t = torch.tensor([1, 2, 9, 99, 500, 1000])
    beta, ab = s.beta[t][:, None, None], s.alpha_bar[t][:, None, None]
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps  # Eq. (4)
    target = {"eps": eps, "x0": x0, "mu": s.q_posterior(x0, xt, t)[0]}[predict]
    def net(x, u, *y):  # right where it is shown x_t and the t that belongs to it
        return target + (x - xt) + (u - t)[:, None, None]
    l_cfg = partial(cfg.l_cfg, y=t, predict=predict)
    losses = {"eps": [ddpm.l_simple, l_cfg], "x0": [ddpm.l_x0, l_cfg], "mu": [ddpm.l_mu]}[predict]
    for loss in losses:
        assert loss(net, s, x0, t, eps) < 1e-20
        assert loss(lambda x, *_: 0 * x, s, x0, t, eps).allclose(target.square().mean())
    eps_theta = ddpm.as_eps_theta(net, s, predict)
    assert eps_theta(xt, t).allclose(eps, atol=1e-9)
    assert ddpm.score(eps_theta, s, xt, t).allclose((ab.sqrt() * x0 - xt) / (1 - ab))
    mu_theta, _, x0_hat = ddpm.p_theta(eps_theta, s, xt, t, clip=False)
    assert x0_hat.allclose(x0) and ddpm.predict_x0(s, xt, t, eps).allclose(x0.clamp(-1, 1))
    assert mu_theta.allclose((xt - beta / (1 - ab).sqrt() * eps) / (1 - beta).sqrt())

@every_schedule
def test_ddpm_samples_are_distributed_as_q(name):
    """σ² = β is exact for N(0, I) data and σ² = β̃ for one point (Sec. 3.2): x_t ~ q(x_t)."""
    torch.manual_seed(1)  # not the 0 of x
    s, m, x = make_schedule(name, 50), randn(1, 3).tanh(), randn(40_000, 3)
    def path(variance, mean, v):
        return list(ddpm.ddpm_sample(exact_eps(s, mean, v), s, x, variance, clip=v == 0))
    unit, point = path("beta", 0, 1), path("beta_tilde", m, 0)
    assert [t for t, _, _ in unit] == list(range(49, -1, -1))
    for (t, xt, _), (_, yt, _) in zip(unit, point):
        assert xt.var(0).allclose(1 - s.beta[1] * (t == 0), atol=0.03)  # no noise in the last step
        assert yt.var(0).allclose(1 - s.alpha_bar[t], rtol=0.04, atol=1e-12)
    assert all((p[-1][1] - m).abs().max() < 1e-9 for p in (point, path("beta", m, 0)))

@pytest.mark.parametrize("size", [1, 3])  # of which the second is clipped
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_moves_between_x0_hat_and_its_epsilon(steps, size):
    """x_t and x_{t-1} are made of x̂_0 and the same ε, clipped or not; the true ε leads to x_0."""
    s, x0, eps = make_schedule("cosine", 50), size * randn(4, 2).tanh(), randn(4, 2, seed=1)
    eps_theta, short = ddpm.subchain(lambda x, t: eps, s, steps)
    x_T = x = s.q_sample(x0, 50, eps)
    for t, x_prev, x0_hat in ddpm.ddim_sample(eps_theta, short, x_T):
        ab, ab_prev = short.alpha_bar[t + 1], short.alpha_bar[t]
        eps_hat = (x - ab.sqrt() * x0_hat) / (1 - ab).sqrt()
        assert x_prev.allclose(ab_prev.sqrt() * x0_hat + (1 - ab_prev).sqrt() * eps_hat)
        assert x0_hat.abs().max() <= 1 and (size > 1 or x0_hat.allclose(x0, atol=1e-6))
        x = x_prev
    assert t == 0
    x = ddpm.last_image(ddpm.ddim_sample(eps_theta, short, x_T, clip=False))
    assert x.allclose(x0, atol=1e-6)

@every_schedule
@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_subchain(name, steps):
    s = make_schedule(name, 50)
    seen_t, short = ddpm.subchain(lambda x, t: t, s, steps)
    grid = torch.cat([torch.zeros(1).long(), seen_t(None, torch.arange(1, steps + 1))])
    assert short.T == steps
    assert grid.tolist() == [round(i * 50 / steps) for i in range(steps + 1)]
    assert short.alpha_bar.allclose(s.alpha_bar[grid], rtol=1e-3, atol=1e-12)
    seen_t, short = ddpm.subchain(lambda x, t: t, s, 4, last=40)
    assert seen_t(None, torch.arange(5)).tolist() == [0, 10, 20, 30, 40]
    assert short.alpha_bar[-1].item() == pytest.approx(s.alpha_bar[40].item())

# --------------------------------------------------- the networks, and one step of training

kinds = pytest.mark.parametrize("kind", [ddpm.UNet, cfg.ConditionalUNet, cfg.NoisyClassifier])

def network(kind, shape=(1, 8, 8), multipliers=(1, 2), attention=(4,), **options):
    """A small one, with 10 classes if it has any. Its weights are random, none of them at 0."""
    torch.manual_seed(0)
    classes = [] if kind is ddpm.UNet else [10]
    net = kind(*classes, shape, 8, multipliers, 1, attention, **options)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net

X, TIMES = randn(4, 1, 8, 8).float(), torch.tensor([1, 10, 500, 1000])
INPUTS = {ddpm.UNet: (X, TIMES), cfg.NoisyClassifier: (X, TIMES),
          cfg.ConditionalUNet: (X, TIMES, torch.tensor([0, 3, 9, 10]))}

@pytest.mark.parametrize("shape, multipliers, attention, timed", [
    ((1, 8, 8), (1, 2), (4,), True), ((1, 28, 28), (1, 2, 2), (7,), True),
    ((3, 12, 20), (1, 2), (6,), True), ((1, 7, 9), (1,), (), True),
    ((1, 8, 8), (1, 2), (4,), False)])
def test_network_shapes_and_gradients(shape, multipliers, attention, timed):
    net = ddpm.UNet(shape, 8, multipliers, 1, attention, dropout=0.0, timed=timed)
    x, t = torch.randn(3, *shape), torch.tensor([1, 500, 1000])
    assert torch.equal(net(x, t), torch.zeros_like(x))  # starts at 0
    net = network(ddpm.UNet, shape, multipliers, attention, dropout=0.0, timed=timed)
    (net(x, t) - x).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    assert torch.equal(net(x[:1], t[:1]), net(x[:1], t[2:])) != timed

@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_in_other_precisions(kind, dtype):
    net, (x, *t_and_y) = network(kind).eval(), INPUTS[kind]
    expected = net(x, *t_and_y)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, *t_and_y).dtype == torch.float32
    out = net.to(dtype)(x.to(dtype), *t_and_y)
    assert out.dtype == dtype
    assert_close(out.float(), expected, rtol=0, atol={8: 1e-4, 2: 0.1}[dtype.itemsize])

@kinds
def test_dropout_is_for_training_alone(kind):
    net, given = network(kind, dropout=0.5), INPUTS[kind]
    assert not torch.equal(net(*given), net(*given))
    assert torch.equal(net.eval()(*given), net(*given))

def test_layers_of_the_network():
    torch.manual_seed(0)
    layer, h = ddpm.Attention(8), torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(h)).flatten(2).chunk(3, 1)  # (B, C, H W)
    r = v @ (q.mT @ k / 8 ** 0.5).softmax(2).mT
    assert layer(h).allclose(h + layer.out(r.reshape(h.shape)), atol=1e-5)
    assert [ddpm.norm(C).num_groups for C in (128, 32, 96, 8)] == [32, 8, 8, 2]
    block = ddpm.UNet((1, 8, 8), 64, (1,), 1, ()).middle[0]
    h = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(h, torch.randn(2, 256)), h)  # a new block, attention and all
    assert block.attention.qkv.weight.var().item() == pytest.approx(1 / 64, rel=0.1)
    with torch.device("meta"):
        nets = ddpm.UNet((3, 32, 32)), ddpm.make_network(ddpm.PRESETS["paper"], (3, 32, 32), None)
    for net in nets:
        assert sum(p.numel() for p in net.parameters()) == 35_746_307  # the authors' 35.7 M

def test_time_embedding():
    t = torch.randperm(1000) + 1
    e = ddpm.time_embedding(t, 32)
    assert e.shape == (1000, 32) and len(e.unique(dim=0)) == 1000
    assert e[:, 0].allclose(t.sin(), atol=1e-5) and e[:, 31].allclose((t * 1e-4).cos(), atol=1e-5)

def test_conditional_network_and_noisy_classifier():
    """The U-Net moved by labels, and its way down with a linear layer."""
    net, classifier = network(cfg.ConditionalUNet).eval(), network(cfg.NoisyClassifier).eval()
    x, t, y = INPUTS[cfg.ConditionalUNet]
    assert (net(x, t, y) - net(x, t, (y + 1) % 11)).abs().amax((1, 2, 3)).min() > 1e-3
    nn.init.zeros_(net.label.weight)
    assert torch.equal(net(x, t, y), cfg.UNet.forward(net, x, t))
    h, _ = classifier.go_down(x, classifier.embed_time(t))
    assert classifier(x, t).allclose(classifier.head(h.mean((2, 3))))
    s, y = make_schedule("linear", 1000), y % 10
    log_p = classifier(s.q_sample(x, t, x), t).log_softmax(1)
    assert cfg.l_classifier(classifier, s, x, t, x, y).allclose(-log_p[range(4), y].mean())

@pytest.mark.parametrize("kind, loss, p_uncond", [
    (ddpm.UNet, ddpm.l_simple, None), (ddpm.UNet, ddpm.l_x0, None),
    (cfg.ConditionalUNet, cfg.l_cfg, 0.5), (cfg.NoisyClassifier, cfg.l_classifier, 0)])
def test_training_is_algorithm_1(kind, loss, p_uncond):
    """Four steps written out leave the same losses, weights and averages, bit for bit."""
    s, x0, y = make_schedule("linear", 5), randn(16, 1, 8, 8).float(), torch.arange(16) % 10
    norms, runs = [], []
    def of_script(net, ema, opt, step):
        if kind is ddpm.UNet:
            return ddpm.train_step(net, ema, opt, s, x0, step, loss, decay=0.28)
        return cfg.cfg_train_step(net, ema, opt, s, x0, y, step, 10, p_uncond, loss, decay=0.28)
    def by_hand(net, ema, opt, step):
        labels = []
        if kind is not ddpm.UNet:
            labels = [torch.where(torch.rand(16) < p_uncond, 10, y)]  # each by itself
        t, eps = torch.randint(1, 6, (16,)), torch.randn_like(x0)  # t from 1 to T, both included
        value = loss(net, s, x0, t, eps, *labels)
        opt.zero_grad()
        value.backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 1.0))
        opt.step()
        for average, weight in zip(ema.parameters(), net.parameters()):
            average.data.lerp_(weight.data, 1 - min(0.28, step / (9 + step)))
        return value.detach()
    for take in (of_script, by_hand):
        net = network(kind)
        ema, opt = copy.deepcopy(net), torch.optim.Adam(net.parameters(), 0.05)
        torch.manual_seed(1)
        losses = [take(net, ema, opt, step) for step in range(1, 5)]
        runs.append((losses, net.state_dict(), ema.state_dict()))
    assert_close(*runs, rtol=0, atol=0)
    assert max(norms) > 1  # so that the clip is seen

# -------------------------------------------- ddpm_ho_2020.py: the paper's other experiments

def test_langevin_on_an_exact_gaussian_score():
    """N(0.3, 0.2²) data: the samples have its moments; of one point, each level has its noise."""
    torch.manual_seed(0)
    s = make_schedule("geometric", 300)
    exact = exact_eps(s, 0.3, 0.04)
    x = ddpm.last_image(ddpm.langevin_sample(exact, s, randn(4000, 1, 1, 1)))
    assert abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.2) < 0.02
    for t, x, _ in ddpm.langevin_sample(exact_eps(s, 0.3, 0), s, randn(4000, 1)):
        noise = (x / s.alpha_bar[t + 1].sqrt() - 0.3).std() * s.snr[t + 1].sqrt()
        assert t == 0 or t > 290 or 1 < noise < 1.1  # steps of a finite size add a little
    s = make_schedule("cosine", 300)
    def network(x, t):  # like one, it cannot bring back an x that has run far away
        return exact_eps(s, 0.3, 0.04)(x, t).clamp(-3, 3)
    for _, x, _ in ddpm.langevin_sample(*ddpm.subchain(network, s, 30), randn(4000, 1)):
        assert x.std() < 1.1

def test_discrete_decoder():
    """Eq. (13) is a distribution over the grey levels; density times width if σ is large."""
    levels = ddpm.to_float(torch.arange(256)).double()
    mean = torch.tensor(0.2).double()
    for sigma in torch.tensor([0.003, 0.1, 3.0]).double():
        log_p = ddpm.discrete_log_likelihood(levels, mean, sigma)
        assert log_p.exp().sum() == pytest.approx(1, abs=1e-6)
    density = Normal(mean, sigma).log_prob(levels) + math.log(2 / 255)
    assert log_p[1:-1].allclose(density[1:-1], atol=1e-5)

@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_bits_per_dim_of_a_known_model(variance):
    """N(0, v) data, where Eq. (5) is closed form: x̂_0 errs with variance 1 / (1 / v + SNR_t)."""
    torch.manual_seed(0)
    s, v, x0 = make_schedule("linear", 50), 0.04, 0.2 * randn(20000, 1, 1, 1)
    t, ab, error = torch.arange(50, 1, -1), s.alpha_bar[-1:], 1 / (1 / v + s.snr)
    L_T = (ab * v - ab - (1 - ab).log()) / 2
    sigma2, beta_tilde = getattr(s, variance)[t], s.beta_tilde[t]
    distance = beta_tilde * (s.snr[t - 1] - s.snr[t]) * error[t]
    kl = ((sigma2 / beta_tilde).log() - 1 + (beta_tilde + distance) / sigma2) / 2
    expected = torch.cat([L_T, kl]).cumsum(0) / math.log(2)
    result = ddpm.rate_distortion(exact_eps(s, 0.0, v), s, x0, variance, clip=False)
    rates, rmse = (torch.tensor(numbers).double() for numbers in result)
    assert len(rates) == 51 and rates[:-1].allclose(expected, rtol=0.02, atol=1e-3)
    assert rates[0].allclose(expected[0], rtol=0.05)  # it is small, but not 0
    assert len(rmse) == 50 and rmse.allclose(127.5 * error[1:].flip(0).sqrt(), rtol=0.03)
    entropy = math.log2(0.2 * math.sqrt(2 * math.pi * math.e) * 127.5)  # of the grey levels, nearly
    assert entropy - 0.02 < rates[-1] < entropy + (0.5 if variance == "beta" else 5)

@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_bound_at_t_1_is_the_decoder(variance):
    s, t, x0, eps = make_schedule("linear", 50), torch.ones(9).long(), *randn(2, 9, 2)
    factor = torch.ones(1, dtype=torch.float64, requires_grad=True)
    def eps_theta(x, t):
        return factor * x
    mu, _, x0_hat = ddpm.p_theta(eps_theta, s, s.q_sample(x0, 1, eps), t, clip=False)
    log_p = ddpm.discrete_log_likelihood(x0, mu, s.beta_tilde[2].sqrt()).mean(1)
    bits, error = ddpm.bound_term(eps_theta, s, x0, t, eps, variance, clip=False)
    assert bits.allclose(-log_p / math.log(2)) and error.allclose((x0 - x0_hat).square().mean(1))
    bits.mean().backward()
    assert factor.grad.isfinite() and factor.grad != 0  # the KL, which is infinite, does no harm

@every_prediction
def test_l_is_the_mean_of_its_terms(predict):
    """Table 2's L: in bits/dim, not times T, and unclipped, so that x̂_0 far outside can learn."""
    s, t, x0, eps = make_schedule("linear", 9), torch.arange(1, 10), *randn(2, 9, 2, 3)
    def net(x, t):
        return 3 * x
    theta = ddpm.as_eps_theta(net, s, predict)
    terms, _ = ddpm.bound_term(theta, s, x0, t, eps, "beta_tilde", clip=False)
    assert ddpm.l_bound(net, s, x0, t, eps, predict, "beta_tilde") == terms.mean()

def test_interpolation_ends_at_the_noised_endpoints():
    s, (a, b) = make_schedule("linear", 20), randn(2, 1, 1, 50, 50)
    torch.manual_seed(2)
    x = ddpm.interpolate(s, a, b, 3, [0, 0.25, 1])
    noises = (x[[0, 2]] - s.alpha_bar[3].sqrt() * torch.cat([a, b])) / (1 - s.alpha_bar[3]).sqrt()
    assert noises.flatten(1).cov().allclose(torch.eye(2).double(), atol=0.1)  # each has its own
    assert noises.mean().abs() < 0.1 and x[1].allclose(0.75 * x[0] + 0.25 * x[2])
    assert [t for t, _, _ in ddpm.ddpm_sample(lambda x, t: x, s, x, start=3)] == [2, 1, 0]

def test_inpainting_of_an_exact_gaussian():
    """Two pixels of correlation ρ, of which the first is known: the other is N(ρ a, 1 - ρ²). With
    one draw at each t its mean would be 0.7, and not ρ a = 1.2."""
    rho, a, known = 0.8, 1.5, torch.tensor([True, False])
    S, x0 = torch.tensor([[1, rho], [rho, 1]]).double(), torch.tensor([a, 0]).double()
    s = make_schedule("linear", 50)
    def eps_theta(x, t):  # -√(1 - ᾱ) ∇ log q(x_t)
        ab = s.alpha_bar[t[0]]
        return (1 - ab).sqrt() * x @ torch.linalg.inv(ab * S + (1 - ab) * torch.eye(2))
    torch.manual_seed(0)
    x = ddpm.last_image(ddpm.repaint_sample(eps_theta, s, randn(4000, 2), x0.expand(4000, 2),
                                            known, clip=False, draws=20))
    assert (x[:, 0] == a).all() and x[:, 1].mean() == pytest.approx(rho * a, abs=0.08)
    assert x[:, 1].var() == pytest.approx(1 - rho ** 2, rel=0.1)

@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_inpainting_where_all_or_nothing_is_known(variance):
    s, x0, seen = make_schedule("linear", 8), torch.tensor([[1.5, 0]]).double().expand(4000, 2), []
    def watch(x, t):
        seen.append((t[0].item(), x))
        return x
    x, known = s.q_sample(x0, 8, randn(4000, 2, seed=1)), torch.tensor(True)
    ddpm.last_image(ddpm.repaint_sample(watch, s, x, x0, known, variance, draws=3))
    assert [t for t, _ in seen] == [t for t in range(8, 1, -1) for _ in range(3)] + [1]
    for t, xt in seen:  # where all is known, every x that the network is shown is q(x_t | x_0)
        assert xt.mean(0).allclose(s.alpha_bar[t].sqrt() * x0[0], atol=0.07)
        assert xt.var(0).allclose(1 - s.alpha_bar[t], rtol=0.1)
    nothing = partial(ddpm.repaint_sample, x0=x0, known=~known, draws=1)
    draws = []
    for sampler in (nothing, ddpm.ddpm_sample):  # where nothing is known, a draw is ddpm_sample's
        torch.manual_seed(0)
        draws.append(next(sampler(watch, s, x, variance=variance))[1])
    assert torch.equal(*draws)

@pytest.mark.parametrize("scale", [0, 1])
def test_frechet_distance(scale):
    """Of x and M x, M positive: for Gaussians M x is the nearest of those distributed so."""
    a = randn(5000, 3) * torch.tensor([1, 2, 3]).double()
    root = randn(3, 3, seed=1)
    difference = scale * (a @ root @ root.T + 1)
    exact = difference.mean(0).square().sum() + difference.var(0).sum()
    assert ddpm.frechet_distance(a, a + difference) == pytest.approx(exact.item(), abs=1e-6)

def test_pixels():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ddpm.to_uint8(ddpm.to_float(x)), x)
    assert ddpm.to_float(x)[[0, 255]].tolist() == [-1, 1]
    x = torch.tensor([-9, -1 + 1.4 / 255, -1 + 0.9 / 255, 9])
    assert ddpm.to_uint8(x).tolist() == [0, 1, 0, 255]

# ---------------------------------------------------- ddpm_conditional_cfg.py: labels, guidance

MEANS, VARIANCE = randn(3, 2, seed=1), 0.3

def log_joint(s, x, t):
    """log p(x_t, y) + constant, for three classes N(m_y, 0.3 I) of equal probability.  (B, 3)"""
    ab = s.alpha_bar[t][:, None]
    away = x[:, None] - ab[..., None].sqrt() * MEANS  # (B, 3, 2)
    return -away.square().sum(2) / (2 * (ab * VARIANCE + 1 - ab))

def exact_guided(s, x, t, y, w):
    """The noise that belongs to the score of p(x_t | y) p(y | x_t)^w, by autograd."""
    x = x.clone().requires_grad_()
    log_p = log_joint(s, x, t)
    log_tilted = (1 + w) * log_p[range(len(y)), y] - w * log_p.logsumexp(1)
    log_tilted.sum().backward()
    return -(1 - s.alpha_bar[t]).sqrt()[:, None] * x.grad

@pytest.mark.parametrize("w", [-1, -0.5, 0, 1, 4])
def test_guided_score_of_gaussian_classes(w):
    """Each guidance gives the score of p(x_t | y) p(y | x_t)^w; at w = -1 the label is ∅."""
    s, x = make_schedule("linear", 100), randn(60, 2)
    t, y = torch.arange(1, 61), torch.arange(60) % 3
    exact, shown = cfg.gaussians_eps_theta(s, MEANS, VARIANCE), []
    def eps_theta(x, t, y):
        shown.append(y)
        return exact(x, t, y)
    expected = exact_guided(s, x, t, y, w)
    assert cfg.guided(eps_theta, y, 3, w)(x, t).allclose(expected, rtol=1e-10, atol=1e-12)
    assert len(shown[0]) == (60 if w in (-1, 0) else 120)  # once per example where that is enough
    for conditional, label in ((True, y), (False, torch.full_like(y, 3))):
        guide = cfg.classifier_guided(eps_theta, partial(log_joint, s), s, y, 3, w, conditional)
        with torch.no_grad():  # as in a sampler
            assert guide(x, t).allclose(expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(shown[-1], label)

@pytest.mark.parametrize("w", [-1, 0, 3])
def test_guidance_only_up_to_t_max(w):
    """Example by example, and w = -1 too: the others are drawn by the conditional model."""
    s, x, y = make_schedule("linear", 100), randn(4, 2), torch.tensor([0, 1, 2, 0])
    t, exact = torch.tensor([1, 50, 51, 100]), cfg.gaussians_eps_theta(s, MEANS, VARIANCE)
    eps_tilde = cfg.guided(exact, y, 3, w, t_max=50)(x, t)
    assert eps_tilde[:2].allclose(exact_guided(s, x, t, y, w)[:2])
    assert eps_tilde[2:].allclose(exact_guided(s, x, t, y, 0)[2:])

@every_prediction
def test_labels_pass_through_subchain_and_prediction(predict):
    s, x, y = make_schedule("linear", 100), randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    i, exact = torch.arange(1, 6), cfg.gaussians_eps_theta(s, MEANS, VARIANCE)
    def net(x, t, *y):
        if predict == "eps":
            return exact(x, t, *y)
        x0_hat = cfg.predict_x0(s, x, t, exact(x, t, *y), clip=False)
        return x0_hat if predict == "x0" else s.q_posterior(x0_hat, x, t)[0]
    theta, _ = cfg.subchain(cfg.as_eps_theta(net, s, predict), s, 5)
    theta = cfg.guided(theta, y, 3, 2)
    expected = exact_guided(s, x, 20 * i, y, 2)
    assert theta(x, i).allclose(expected)

def test_labels():
    """Each is dropped by itself."""
    torch.manual_seed(0)
    y = torch.arange(10).repeat(10_000)
    dropped = cfg.drop_labels(y, 10, 0.3)
    assert ((dropped == y) | (dropped == 10)).all() and agree((dropped == 10).double(), 0.3)
    assert (cfg.drop_labels(y, 10, 1) == 10).all() and torch.equal(cfg.drop_labels(y, 10, 0), y)

def test_class_scores_of_known_probabilities():
    """exp E KL(p(y | x) || p(y)), where p(y), the mean, is 0.75 and 0.25."""
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    score, accuracy = cfg.class_scores(p.log(), torch.tensor([0, 1]))
    kl = (p * (p / p.new_tensor([0.75, 0.25])).log()).sum() / 2
    assert math.log(score) == pytest.approx(kl.item(), rel=1e-5) and accuracy == 0.5

# ----------------------------- the first acts: pasted, on another device, in other precisions

def before_the_end(script):
    return inspect.getsource(script).split("# The paper ends here")[0]

def definitions(text):
    """The functions and classes of a file.  -> {name: (text, docstring)}"""
    nodes = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {n.name: (ast.get_source_segment(text, n), ast.get_docstring(n) or "") for n in nodes}

@both
def test_first_act_uses_no_name_of_the_second(script):
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "-"]
    done = subprocess.run(command, input=before_the_end(script), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr

def test_first_acts_and_examples_run_in_one_namespace():
    zeros, examples = torch.zeros(1, 1, 28, 28), []
    names = {"device": "cpu", "t": 1, "a": zeros, "b": zeros}
    for script in (ddpm, cfg):
        exec(before_the_end(script), names)
    for script in (ddpm, cfg, schedules):
        for name, (_, docstring) in definitions(before_the_end(script)).items():
            example = "\n".join(re.findall(r"^ {4}(.*)$", docstring, re.M))
            examples.append(example.replace("64", "2"))  # a batch of 64 would take long
            exec(examples[-1], names.copy() if name == "UNet" else names)
            names["ema"] = lambda x, t, *y: 0.1 * x  # faster than the examples' network
    assert sum(map(bool, examples)) >= 11 and len(names["rates"]) == 1001
    assert names["filled"].shape == (16, 1, 28, 28) and names["filled"].abs().max() <= 1

def first_act(script, s, x, y, net, classifier):
    """Trains and samples with all that the first act has.  -> the tensors that come out"""
    torch.manual_seed(0)
    ema, opt, t = copy.deepcopy(net), torch.optim.SGD(net.parameters(), 0.0), torch.full_like(y, 2)
    if script is ddpm:
        losses = ddpm.l_simple, ddpm.l_x0, ddpm.l_mu, ddpm.l_bound
        out = [ddpm.train_step(net, ema, opt, s, x, 1, loss) for loss in losses]
        ddpm.rate_distortion(ema, s, x)
        out.append(ddpm.interpolate(s, x[:1], x[1:2], 1, [0, 0.5]))
        out.append(ddpm.score(ema, s, x, t).detach())
        repaint = partial(ddpm.repaint_sample, x0=x, known=x[0, 0] > 0, draws=2)
        samplers = ddpm.ddpm_sample, ddpm.ddim_sample, ddpm.langevin_sample, repaint
        thetas = [ddpm.as_eps_theta(ema, s, predict) for predict in ("eps", "x0", "mu", "eps")]
    else:
        loss = cfg.l_classifier
        out = [cfg.cfg_train_step(net, ema, opt, s, x, y, 1, 10),
               cfg.cfg_train_step(classifier, classifier, opt, s, x, y, 1, 10, 0, loss)]
        samplers = [cfg.ddpm_sample, cfg.ddim_sample] * 3
        guided = partial(cfg.guided, ema, y, 10)
        thetas = [guided(w=-1), guided(w=0), guided(w=2, t_max=1)]
        guided = partial(cfg.classifier_guided, ema, classifier, s, y, 10, 2)
        thetas += [guided(conditional=True), guided(conditional=False)]
    for theta, sampler in zip(thetas, samplers):
        out += [v for _, *tensors in sampler(theta, s, x) for v in tensors]
    return out

@both
def test_first_act_on_another_device(script):
    """All of these tensors are on the CPU. In the block, a tensor that is made without saying where
    is on "meta": it has no numbers, and PyTorch refuses to compute with it and one of the CPU."""
    s, x, y = make_schedule("linear", 2), torch.randn(4, 1, 8, 8), torch.arange(4)
    net = network(ddpm.UNet if script is ddpm else cfg.ConditionalUNet)
    classifier = network(cfg.NoisyClassifier)
    with torch.device("meta"):
        out = first_act(script, s, x, y, net, classifier)
    for v in out:  # no gradient is kept, though nothing around the samplers says no_grad
        assert v.device.type == "cpu" and v.dtype == torch.float32 and not v.requires_grad

class Scale(nn.Module):
    """A network without matrices, for x (B, 10). It serves as the classifier too."""
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x, t, *y):
        return self.factor * x

@both
def test_autocast_reaches_the_network_alone(script):
    """With networks that have nothing to be cast, all else is the same in bfloat16, bit for bit."""
    s, x, y = make_schedule("linear", 2), randn(4, 10).float(), torch.arange(4)
    expected = first_act(script, s, x, y, Scale(), Scale())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(first_act(script, s, x, y, Scale(), Scale()), expected, rtol=0, atol=0)

def test_subchain_on_another_device(monkeypatch):
    """Its β are computed on the CPU, from the numbers that cpu() gives."""
    s, i = make_schedule("linear", 2).to("meta"), torch.ones(4, dtype=torch.long, device="meta")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.tensor([1, 0.5, 0.1]))
    theta, short = ddpm.subchain(lambda x, t: t, s, 2)
    assert theta(None, i).device == short.beta.device == i.device

# ---------------------------------------------------------------------- sohl_dickstein_2015.py

def gaussian_moments(xt, alpha_bar, v=1.0):
    """The moments of x_0 given x_t for x_0 ~ N(0, diag(v))."""
    gain = alpha_bar.sqrt() * v / (alpha_bar * v + 1 - alpha_bar) + 0 * xt
    return gain * xt, torch.diag_embed(v * (1 - alpha_bar.sqrt() * gain))

def steps(t, x):
    return torch.full((len(x),), t)

@every_schedule
def test_K_of_an_isotropic_gaussian_is_its_log_likelihood(name):
    """As the authors' code notes: the gain over L_null is 0. One KL, written out:
    KL(N(μ, σ² I) || N(m, σ² M I)) = ½ [D / M + |m - μ|² / (σ² M) - D + D log M], of which the
    first three cancel in expectation."""
    s, D, K, x0 = make_schedule(name, 40), 3, 0, randn(4000, 3)
    for t in range(2, 41):
        torch.manual_seed(t)
        kl, entropies = sohl.kl_and_entropies(sohl.GAUSSIAN, s, gaussian_moments, x0, steps(t, x0))
        torch.manual_seed(t)
        xt = sohl.gaussian_q(x0, s.alpha_bar[t]).rsample()
        M = 1 + (s.snr[t - 1] - s.snr[t]) * (1 - s.alpha_bar[t])
        m, _ = s.q_posterior(s.alpha_bar[t].sqrt() * xt, xt, t)
        mu, sigma2 = s.q_posterior(x0, xt, t)
        delta = ((m - mu) ** 2 / sigma2).sum(1)
        assert (2 * math.log(2) * kl).allclose((D + delta) / M - D + D * M.log(), atol=1e-9)
        K -= D * M.log2() / 2
    L_null = -D / 2 * math.log2(2 * math.pi * math.e)
    assert (K + entropies).tolist() == pytest.approx([L_null] * len(x0), rel=1e-9)

def test_p_has_the_moments_of_two_draws():
    """f_mu and f_sigma are the mean and covariance of x_{t-1}, drawn by way of x_0."""
    s, t, n = make_schedule("cosine", 40), 7, 200_000
    S, xt = torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double(), torch.tensor([[1.0, -2.0]]).double()
    x0 = torch.tensor([0.7, 0.1]) + randn(n, 2) @ torch.linalg.cholesky(S).T
    mu, beta_tilde = s.q_posterior(x0, xt, t)
    x_prev = mu + beta_tilde.sqrt() * randn(n, 2, seed=1)
    p = sohl.gaussian_p(s, xt, torch.tensor([t]), (torch.tensor([[0.7, 0.1]]).double(), S[None]))
    assert p.mean[0].allclose(x_prev.mean(0), atol=0.005)
    assert p.covariance_matrix[0].allclose(x_prev.T.cov(), rtol=0.02)

def test_a_new_network_is_the_null_model():
    net = sohl.RollNet(sohl.start_beta("learned", 40), width=16)
    xt, alpha_bar = randn(5, 2), torch.rand(5, 1).double()
    for ours, null in zip(net(xt, alpha_bar), gaussian_moments(xt, alpha_bar)):
        assert ours.allclose(null, atol=1e-12)
    torch.nn.init.constant_(net.layers[-1].bias, 0.5)  # g = 0.5, and S is the square of a triangle
    x0_hat, S = net(xt[:1], torch.tensor([[0.3]]).double())
    L = torch.tensor([[math.exp(0.5), 0], [0.5, math.exp(0.5)]])
    assert S[0].float().allclose(0.7 * L @ L.T)
    assert x0_hat.allclose(math.sqrt(0.3) * xt[:1] + math.sqrt(0.7) * 0.5)

def log_q(m, v, x, alpha_bar=1.0):
    """log q(x_t), nats: a mixture of Gaussians about √ᾱ m_j of variances ᾱ v + 1 - ᾱ.  (B,)"""
    m, v = m * alpha_bar ** 0.5, v * alpha_bar + 1 - alpha_bar
    parts = -((x[:, None] - m) ** 2 / (2 * v)).sum(2)
    return parts.logsumexp(1) - math.log(len(m) * 2 * math.pi) - v.log().sum() / 2

def test_exact_moments_and_score_are_tweedies():
    """x̂_0 and S against the gradient and Hessian of log q(x_t)."""
    s, (m, v, _, _) = make_schedule("geometric", 40), sohl.roll_density(0.5)
    x0 = m[::90]
    for t in (3, 20, 35):
        x = s.q_sample(x0, t, randn(len(x0), 2)).requires_grad_()
        ab = s.alpha_bar[t].expand(len(x0), 1)
        gradient, = torch.autograd.grad(log_q(m, v, x, ab[0]).sum(), x, create_graph=True)
        rows = [torch.autograd.grad(g.sum(), x, retain_graph=True)[0] for g in gradient.unbind(1)]
        x0_hat, S = sohl.moments_of_mixture(m, v, x, ab)
        assert sohl.score_of_x0_hat(x0_hat, x, ab).allclose(gradient, rtol=1e-6, atol=1e-6)
        hessian = torch.stack(rows, 1)
        exact = (1 - ab[0]) / ab[0] * (torch.eye(2) + (1 - ab[0]) * hessian)
        assert S.allclose(exact, rtol=1e-5, atol=1e-8)

def test_roll_density_is_that_of_the_draws():
    m, v, _, _ = sohl.roll_density(0.3)
    x0 = sohl.draw_roll(5000, 0.3, 0)
    assert x0.mean(0).abs().max() < 0.05 and (x0.var(0) - 1).abs().max() < 0.05
    assert agree(log_q(m, v, x0) / math.log(2), sohl.ceiling_of_curve(m, v) - 0.008)  # of its ends

def test_ceiling_in_closed_form():
    """A straight line along the diagonal: log(its length) and the entropy of the noise across it.
    The unit is changed by v. And the roll's, which the README has."""
    line = torch.linspace(0, 300, 30_001).double()[:, None] * torch.tensor([0.6, 0.8]).double()
    bits = math.log2(300) + math.log2(2 * math.pi * math.e) / 2
    for v in torch.tensor([[1.0, 1.0], [4.0, 0.25]]).double():
        assert sohl.ceiling_of_curve(line * v.sqrt(), v) == pytest.approx(-bits, abs=1e-4)
    assert sohl.ceiling_of_curve(*sohl.roll_density(0.02)[:2]) == pytest.approx(2.703, abs=0.001)

def test_evaluate_is_a_bound():
    """With the exact moments K is below the log-likelihood, and near it if T is large."""
    m, v, _, _ = sohl.roll_density(0.5)
    x0, exact = sohl.draw_roll(500, 0.5, 0), partial(sohl.moments_of_mixture, m, v)
    for beta, least in ((sohl.start_beta("learned", 200), -0.2), (SCHEDULES["cosine"](40)[1:], -9)):
        s = Schedule(torch.cat([torch.zeros(1), beta]))
        K, kl = sohl.evaluate(sohl.GAUSSIAN, s, exact, x0, 1)
        torch.manual_seed(9)
        state = torch.get_rng_state()
        assert sohl.evaluate(sohl.GAUSSIAN, s, exact, x0.float(), 1)[0].allclose(K, atol=1e-3)
        assert torch.get_rng_state().equal(state)  # it seeds itself, and disturbs no training
        gain = K - log_q(m, v, x0) / math.log(2)  # each K estimates a bound on its own log q(x_0)
        assert least < gain.mean() < 4 * gain.std() / 500 ** 0.5
        assert len(kl) == s.T - 1 and kl.min() > -0.01

def test_our_posterior_of_a_gaussian():
    """p = N(0, I), r = N(y; x_0, 1 / c): p r / Z = N(a y, 1 - a) with a = c / (1 + c)."""
    torch.manual_seed(0)
    y, precision = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])
    moments = partial(sohl.given, gaussian_moments, y, precision)
    chain = sohl.reverse(sohl.GAUSSIAN, make_schedule("cosine", 100), moments, randn(20000, 2))
    x = sohl.end_of(chain)
    assert ((x.mean(0) - torch.tensor([0.75, 0.0])).abs() < 0.03).all()
    assert ((x.var(0) - torch.tensor([0.25, 1.0])).abs() < 0.04).all()

def test_multiply_by_r():
    C, x = torch.tensor([[2, 0.9], [0.9, 1]]).double(), randn(3, 2)
    y, precision = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])
    wanted = torch.linalg.inv(torch.linalg.inv(C) + precision.diag())
    mean, covariance = sohl.multiply_by_r(x, C.expand(3, 2, 2), y, precision)
    assert covariance.allclose(wanted) and mean.allclose(x + (precision * (y - x)) @ wanted)
    p = torch.distributions.MultivariateNormal(x[:1], C)  # and p r / Z, on points x
    r = torch.exp(-precision / 2 * (y - x) ** 2).prod(1)
    ratio = (p.log_prob(x) - sohl.times_r(p, y, precision).log_prob(x)).exp() * r
    assert ratio.allclose(ratio[:1])

def test_papers_posterior_of_a_gaussian():
    """Eqs. (22), (23) for p = N(0, 1): x_{t-1} given x_t is N(k x_t, f) times N(y; x_{t-1}, 1 / c).
    So the mean m and the variance v of x_t follow a recursion, from those of π r to x_0's."""
    s, y, precision, x0 = make_schedule("constant", 10), 1.5, 2.0, randn(40000, 1)
    modify = partial(sohl.times_r, y=torch.tensor([y]), precision=torch.tensor([precision]))
    torch.manual_seed(0)
    xT = modify(sohl.prior(sohl.GAUSSIAN, x0)).sample()
    chain = {10: xT} | dict(sohl.reverse(sohl.GAUSSIAN, s, gaussian_moments, xT, modify))
    m, v = precision * y / (1 + precision), 1 / (1 + precision)
    for t in range(10, 0, -1):
        k, f = s.alpha[t].sqrt(), s.beta[t]  # of N(0, 1), reversed; at t = 1 it is the forward step
        w = 1 / (1 / f + precision)
        covariance, dx = w * k / f * v, chain[t] - m
        m, v = w * (k * m / f + precision * y), w + (w * k / f) ** 2 * v
        assert agree(chain[t - 1], m) and agree((chain[t - 1] - m) * dx, covariance)
        assert agree((chain[t - 1] - m) ** 2, v)

def B(x, rate):
    """The probability of bits."""
    return torch.where(x == 1, rate, 1 - rate).prod(-1)

def test_binomial_bound_by_enumeration(monkeypatch):
    """Eq. (14) against its definition, K = E_q log p(x_T) Π p(x_{t-1} | x_t) / q(x_t | x_{t-1}),
    over the states of two bits; q(x_{t-1} | x_t, x_0) against Bayes' rule.

    The tables are [x_t, x_{t-1}, x_0]."""
    monkeypatch.setattr(sohl, "RHO", rho := 0.5)  # the rate of these data
    s, bit = make_schedule("inverse", 3), torch.tensor([0.0, 1.0]).double()
    states = torch.cartesian_prod(bit, bit)
    data = states[1:3]  # (0, 1) and (1, 0)
    exact = partial(sohl.rates_of_sequences, data)
    def table(p):  # probabilities of the states, rows, by each of a batch of distributions
        return p.log_prob(states[:, None]).exp()
    x0 = data.repeat(20000, 1)
    K, sum_of_kl, bands = 0, 0, []
    jump = torch.eye(4)[:, 1:3].double()  # q(x_t | x_0), from t = 0
    for t in (1, 2, 3):
        q = B(states[:, None], (1 - s.beta[t]) * states + s.beta[t] * rho)
        joint = q[..., None] * jump  # q(x_t, x_{t-1} | x_0)
        p = q  # under the noise, the step t = 1 is its own reverse
        if t > 1:
            bayes = joint / joint.sum(1, keepdim=True)
            for k in (0, 1):
                for f in (sohl.binomial_posterior, sohl.binomial_p):
                    ours = table(f(s, states, steps(t, states), data[[k] * 4]))
                    assert ours.allclose(bayes[..., k].T)
            w = B(states[:, None], s.alpha_bar[t] * (data - rho) + rho)
            rates = exact(states, s.alpha_bar[t].expand(4, 1))
            assert rates.allclose(w / w.sum(1, keepdim=True) @ data)
            p = table(sohl.binomial_p(s, states, steps(t, states), rates))
            sum_of_kl += (joint * (bayes / p.T[..., None]).log2()).sum() / 2
            both = joint.mean(2)  # q(x_t, x_{t-1})
            known = -(both * (both / both.sum(1, keepdim=True)).log2()).sum()
            ours = -(both.sum(1) * (p.T * p.T.log2()).sum(1)).sum()
            H = [-(v * v.log2()).sum(0).mean() for v in (q, jump, q @ jump)]
            torch.manual_seed(0)
            left, middle, right = sohl.entropy_of_step(sohl.BINOMIAL, s, exact, x0, steps(t, x0))
            assert agree(middle, ours) and agree(right, H[0]) and agree(left, H[0] + H[1] - H[2])
            bands.append((left.mean(), known, ours, right.mean() + 1e-9))
        K += (joint * (p.T / q).log2()[..., None]).sum() / 2
        jump = q @ jump
        assert table(sohl.binomial_q(data, s.alpha_bar[t])).allclose(jump)
    assert all(list(band) == sorted(band) for band in bands)
    K += (jump.mean(1) * B(states, torch.full_like(states, rho)).log2()).sum()
    _, entropies = sohl.kl_and_entropies(sohl.BINOMIAL, s, exact, data, torch.tensor([3, 3]))
    assert (entropies.mean() - sum_of_kl).item() == pytest.approx(K.item(), rel=1e-9)
    assert agree(sohl.evaluate(sohl.BINOMIAL, s, exact, x0)[0], K)

@every_schedule
def test_entropies_of_steps_of_a_gaussian(name):
    """Eq. (24) where all is known: x_0 ~ N(0, diag(v)), so x_{t-1} given x_t is Gaussian."""
    s, v = make_schedule(name, 30), torch.tensor([1.0, 0.3, 0.01]).double()
    moments, x0 = partial(gaussian_moments, v=v), randn(2000, 3) * v.sqrt()
    def H(variance):
        return (2 * math.pi * math.e * variance * torch.ones(3).double()).log2().sum() / 2
    for t in range(2, 31):
        left, ours, right = sohl.entropy_of_step(sohl.GAUSSIAN, s, moments, x0, steps(t, x0))
        before = s.alpha_bar[t - 1] * v + 1 - s.alpha_bar[t - 1]  # the variance of x_{t-1}
        known = H(s.beta[t] * before / (s.alpha_bar[t] * v + 1 - s.alpha_bar[t]))  # given x_t
        assert ours.allclose(known, atol=1e-9)
        assert right.allclose(H(s.beta[t]), atol=1e-9)
        assert left.allclose(H(s.beta_tilde[t]), atol=1e-9)
        kl, _ = sohl.kl_and_entropies(sohl.GAUSSIAN, s, moments, x0, steps(t, x0))
        assert agree(kl, (known - left[0]).item())  # the distance from the left, as p is exact

def test_valid_share():
    x = torch.cat([sohl.HEARTBEATS, torch.zeros(1, 20), torch.ones(1, 20), sohl.HEARTBEATS[[1]]])
    assert x[:5].sum(1).eq(4).all() and x[:5, :15].equal(x[:5, 5:])
    x[-1, 7] = 1 - x[-1, 7]
    assert sohl.valid_share(x) == 5 / 8

def test_wasserstein():
    a = randn(500, 2)
    assert sohl.wasserstein(a, a + torch.tensor([0.1, -0.7])) == pytest.approx(0.7)

def test_beta_learns_while_the_noise_is_frozen():
    """dK / dβ by finite differences under one seed: it passes through x_t too. β_1 is fixed."""
    x0, t, logits = randn(9, 2), torch.arange(9) % 5 + 2, torch.linspace(-2, 3, 6).double()
    def K(logits):
        torch.manual_seed(0)
        s, moments = sohl.learned_schedule(logits), partial(gaussian_moments, v=0.3)
        return sohl.K_estimate(s, *sohl.kl_and_entropies(sohl.GAUSSIAN, s, moments, x0, t)).mean()
    gradient, = torch.autograd.grad(K(logits.requires_grad_()), logits)
    h = 1e-6 * torch.eye(6).double()
    numeric = torch.stack([(K(logits + row) - K(logits - row)) / 2e-6 for row in h])
    assert gradient[0] == 0 and gradient[1:].allclose(numeric[1:], rtol=1e-5, atol=1e-7)

@pytest.mark.parametrize("scale", [1, 100])  # 100: data so wide that the gradient is clipped
def test_sohls_train_step_written_out(scale):
    """Two equal networks, one trained by the script, one by hand."""
    def start():
        torch.manual_seed(0)
        net = sohl.RollNet(sohl.start_beta("learned", 10), True, 8)
        return net, torch.optim.Adam(net.parameters(), 0.01)
    (net, opt), (other, other_opt) = start(), start()
    x0 = scale * sohl.draw_roll(64, 0.1, 0).float()  # which it casts
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)  # of another step
    torch.manual_seed(1)
    K = sohl.train_step(sohl.GAUSSIAN, net, opt, x0)
    torch.manual_seed(1)
    t = torch.randint(2, 11, (64,))
    s = Schedule(torch.cat([torch.zeros(1).double(), other.beta_logits.sigmoid()]))
    kl, entropies = sohl.kl_and_entropies(sohl.GAUSSIAN, s, other, x0.double(), t)
    K_other = entropies.mean() - 9 * kl.mean()
    (-K_other).backward()
    other.beta_logits.grad[0] = 0  # β_1 is fixed
    norm = nn.utils.clip_grad_norm_(other.parameters(), 100)
    assert (norm > 100) == (scale == 100)
    other_opt.step()
    assert K.item() == pytest.approx(K_other.item(), rel=1e-12) and not K.requires_grad
    assert_close(opt.state_dict()["state"], other_opt.state_dict()["state"])  # clipped gradients
    assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=1e-6)
    with pytest.raises(FloatingPointError):
        sohl.train_step(sohl.GAUSSIAN, net, opt, math.nan * x0)
    assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=1e-6)  # as it was

@pytest.mark.parametrize("kind, make, D", [(sohl.GAUSSIAN, sohl.RollNet, 2),
                                           (sohl.BINOMIAL, sohl.HeartbeatNet, 20)])
def test_sohls_first_act_on_another_device(kind, make, D):
    """No tensor of the CPU stands in the middle of a formula. All that comes out is float64, and
    what is drawn or measured has no graph."""
    s = make_schedule("cosine", 6).to("meta")
    with torch.device("meta"):
        net, x0, t = make(s.beta[1:]), torch.rand(4, D).round().double(), torch.randint(2, 6, (4,))
        y, precision = torch.zeros(2).double(), torch.ones(2).double()
    drawn = []
    for _, xt in sohl.reverse(kind, s, net, sohl.prior(kind, x0).sample()):
        assert torch.is_grad_enabled()
        drawn.append(xt)
    drawn += sohl.evaluate(kind, s, net, x0)
    assert not any(x.requires_grad for x in drawn)
    kl, entropies = sohl.kl_and_entropies(kind, s, net, x0, t)
    sohl.K_estimate(s, kl, entropies).mean().backward()
    outputs = [*drawn, kl, entropies, *sohl.entropy_of_step(kind, s, net, x0, t)]
    if kind is sohl.GAUSSIAN:
        outputs += sohl.given(net, y, precision, x0, extract(s.alpha_bar, t, x0))
        outputs.append(sohl.times_r(sohl.prior(kind, x0), y, precision).mean)
    assert all(x.device.type == "meta" and x.dtype == torch.float64 for x in outputs)

# ------------------------------------------------------- second acts: data, and people's mistakes

def args_of(script, flags=""):
    cpu = [] if script is schedules or "--device" in flags else ["--device=cpu"]
    return script.get_args(shlex.split(flags) + cpu)

def run(script, flags):
    return script.main(args_of(script, flags))

def read(path):
    return torch.load(path, weights_only=True)

def files(folder):
    return {path.name for path in Path(folder).iterdir()}

def write_images(*paths, size=(40, 30)):
    """One grey level each, 0, 20, 40, ...; PNGs in several modes."""
    for i, path in enumerate(map(Path, paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = ["RGB", "L", "P"][i % 3] if path.suffix.lower() == ".png" else "RGB"
        Image.fromarray(np.full((*size, 3), 20 * i % 256, np.uint8)).convert(mode).save(path)

def load(flags):
    """The data of some flags -> {grey level: class name} of all images, and the names."""
    data = cfg.load_data(args_of(cfg, f"--image-size=16 {flags}"))
    greys = torch.cat([data.images, data.held_out]).float().mean((1, 2, 3)).tolist()
    labels = torch.cat([data.labels, data.held_labels]).tolist()
    return {round(grey / 20): data.names[k] for grey, k in zip(greys, labels)}, data.names

@pytest.fixture
def fails(capsys):
    """fails(script, flags, pattern): a run ends with status 2, one such line, and no new folder."""
    def check(script, flags, pattern):
        before = sorted(Path().rglob("*"))
        with pytest.raises(SystemExit) as e:
            run(script, flags)
        err = capsys.readouterr().err
        line, = [line for line in err.splitlines() if "error: " in line]
        assert e.value.code == 2 and re.search(pattern, line), line
        assert "usage" not in err and sorted(Path().rglob("*")) == before
    return check

def test_digits():
    data = ddpm.load_data(args_of(ddpm))
    assert data.images.shape == (1347, 1, 8, 8) and data.held_out.shape == (450, 1, 8, 8)
    assert data.images.dtype == torch.uint8 and data.images.max() == 255
    assert data.names == list("0123456789") and data.labels.bincount().min() > 120
    assert len(torch.cat([data.images, data.held_out]).unique(dim=0)) == 1797  # all are there

@pytest.mark.parametrize("dataset, shape", [("MNIST", (2, 28, 28)), ("CIFAR10", (2, 32, 32, 3))])
def test_what_torchvision_gives(monkeypatch, dataset, shape):
    """MNIST's images are without a channel, and CIFAR-10's colours come last."""
    pixels = np.random.default_rng(0).integers(256, size=(2, *shape), dtype=np.uint8)
    def stand_in(self, root, train, download):
        vars(self).update(data=pixels[int(train)], targets=[1, 0], classes=["0 - zero", "1 - one"])
    monkeypatch.setattr(getattr(ddpm, dataset), "__init__", stand_in)
    data = ddpm.load_data(args_of(ddpm, f"--dataset={dataset.lower()}"))
    for images, given in ((data.held_out, pixels[0]), (data.images, pixels[1])):
        assert np.array_equal(images.permute(0, 2, 3, 1).reshape(shape), given)
    assert data.names == ["0", "1"] and data.labels.tolist() == [1, 0]

@pytest.mark.parametrize("folder", [
    "stanford_cars/cars_train", "stanford_cars/cars_train/cars_train", "cars_train",
    "cars_train/cars_train"])
@pytest.mark.parametrize("devkit", ["devkit", "stanford_cars/devkit"])
def test_cars_in_every_layout(folder, devkit, capsys):
    """First without annotations. With them the class is the body type or the model, and of each
    image only the box is left: around it these are white."""
    paths = [f"{folder}/{i}.jpg" for i in range(4)]
    write_images(*paths, "cars_test/cars_test/1.jpg")
    found, names = load("--dataset=cars --data-dir=.")
    assert names == ["car"] and len(found) == 4 and "7545" in capsys.readouterr().out
    for i, path in enumerate(paths):
        picture = Image.new("RGB", (30, 40), "white")
        picture.paste((20 * i,) * 3, (5, 5, 25, 35))
        picture.save(path, quality=95)
    models = ["Audi TT RS Coupe 2012", "Dodge Caravan Minivan 1997", "Ford Ranger SuperCab 2011",
              "GMC Canyon Extended Cab 2012"]
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class",
                                          "fname")]
    rows = [(6, 6, 25, 35, i + 1, f"{i}.jpg") for i in range(4)]
    Path(devkit).mkdir(parents=True)
    savemat(f"{devkit}/cars_train_annos.mat", {"annotations": np.array(rows, fields)})
    savemat(f"{devkit}/cars_meta.mat", {"class_names": np.array(models, object)})
    found, _ = load("--dataset=cars --data-dir=.")
    assert found == {0: "Coupe", 1: "Van", 2: "other", 3: "Cab"}
    found, names = load("--dataset=cars --data-dir=. --labels=model")
    assert names == models and found == dict(enumerate(models))

def test_folders_are_classes():
    """The first level is the class, in natural order; hidden names and links are left out."""
    write_images("pets/10/images/0.JPEG", "pets/10/1.png", "pets/2/a/b/2.png", "pets/2/3.Png",
                 "pets/.ipynb_checkpoints/4.png", "pets/2/@eaDir/5.png", "pets/__MACOSX/6.png")
    Path("pets/2/up").symlink_to(Path("pets").absolute())
    Path("pets/empty").mkdir()
    found, names = load("--dataset=pets")
    assert names == ["2", "10"] and found == {0: "10", 1: "10", 2: "2", 3: "2"}
    write_images("flat/0.png", "flat/1.png")
    assert load("--dataset=flat") == ({0: "flat", 1: "flat"}, ["flat"])

def test_pixels_that_a_library_would_clip(capsys):
    """16 bits are scaled, what has no range is named and skipped, what is clear becomes white."""
    write_images("images/4.jpg")
    Path("images/4.jpg").write_bytes(Path("images/4.jpg").read_bytes()[:300])  # it is cut off
    grey = np.full((20, 20), 100.0)
    Image.fromarray((257 * grey).astype(np.uint16)).save("images/0.png")
    Image.fromarray(grey.astype(np.int32) * 1000).save("images/1.tif")
    Image.fromarray(grey.astype(np.float32)).save("images/2.tif")
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save("images/3.png")
    data = ddpm.load_data(args_of(ddpm, "--dataset=images --image-size=8"))
    shades = torch.cat([data.images, data.held_out]).float().mean((1, 2, 3)).tolist()
    assert sorted(shades) == [100, 255]
    err = capsys.readouterr().err
    assert all(f"images/{name}: " in err for name in ("1.tif", "2.tif", "4.jpg"))

def test_photographs_stand_upright():
    """A camera that was turned says so in its file."""
    stored = Image.fromarray(np.arange(50 * 40, dtype=np.uint32).reshape(50, 40) // 8 % 256)
    exif = Image.Exif()
    exif[0x112] = 6  # turned a quarter
    stored.convert("L").save("photo.png", exif=exif)
    x = ddpm.read_image("photo.png", None, 40)[:, :, 0]
    assert np.array_equal(x, np.rot90(np.asarray(stored.convert("L")), -1)[:, 5:45])

MISTAKES_OF_BOTH = {  # flags -> what the line says. RUN is a finished run, FILE its checkpoint
    "--T=0": "--T", "--steps=-1": "--steps", "--batch=0": "--batch", "--T=x": "--T.*positive",
    "--num-samples=0": "--num-samples.*less than 1", "--lr=x": "--lr.*float",
    "--multipliers 1 0": "--multipliers", "--schedule=liner": "liner.*cosine",
    "--sampler=x": "--sampler.*ddim", "--bogus=1": "bogus", "--step=3": "--step=3",
    "--device=tpu": "--device tpu", "--device=cuda:7": "--device cuda:7",
    "--preset=large": "--preset.*paper", "--sampling-steps=2000": "only 1000 steps",
    "--channels=10": "10 channels", "--multipliers 1 1 1 1 1": "8x8 cannot be halved 4 times",
    # empty is not a default
    "--dataset=": "--dataset: .*empty", "--checkpoint=": "--checkpoint: .*empty",
    "--out=": "--out: .*empty", "--resume=": "--resume: .*empty",
    # data
    "--dataset=mnits": "mnits: no such folder, and not digits", "--dataset=one": "only 1 of 1",
    "--dataset=empty": "only 0 of 0 images", "--dataset=images --image-size=30": "30x30",
    "--dataset=cars --data-dir=images": "no Stanford Cars in images.*7545",
    "--dataset=mnist --data-dir=file": "mnist can neither be read from file nor",
    "--dataset=mnist --data-dir=damaged": "mnist can neither.*damaged",
    "--dataset=mnist --image-size=32": "--image-size: mnist",
    # folders and checkpoints
    "--out=RUN": "RUN is there already",
    "--checkpoint=nowhere.pt": "nowhere.pt: there is no such file",
    "--checkpoint=file": "file is damaged", "--resume=nowhere": "nowhere/checkpoint.pt: there",
    "--checkpoint=FILE --schedule=linear": "--schedule linear.*was trained with",
    "--checkpoint=FILE --T=50": "--T 50.*was trained with",
    "--checkpoint=FILE --dataset=images": "images does not go.*digits",
    "--checkpoint=FILE --steps=9": "--steps", "--checkpoint=FILE --channels=32": "--channels 32",
    "--resume=RUN --lr=1 --batch=7": "--batch 7", "--resume=RUN --out=b": "--out b",
    "--resume=RUN --checkpoint=FILE": "--resume RUN", "--resume=RUN --preset=mnist": "--preset",
    "--resume=other": "digits has other classes than the checkpoint.*cat, dog",
    "--resume=RUN --steps=40 --lr=1e30": "no longer finite.*smaller --lr"}
MISTAKES = {
    ddpm: MISTAKES_OF_BOTH | {
        "--w=2": "--w", "--attention=5": r"attention at \[5\].*\[8, 4\]",
        "--predict=v": "--predict.*mu",
        "--checkpoint=FILE --no-time-embedding": "--time-embedding False",
        "--checkpoint=assets/mnist_cfg.pt": "checkpoint of ddpm_conditional_cfg.py"},
    sohl: {
        "--dataset=rolls": "swiss_roll", "--dataset=": "--dataset", "--out=": "empty",
        "--out=RUN": "there already", "--st=5": "unrecognized", "--steps=0": "less than 1",
        "--T=1": "--T from 2", "--lr=-1": "--lr above 0", "--noise=nan": "--noise from",
        "--noise=0": "--noise from", "--seed=-1": "--seed from",
        "--dataset=heartbeat --schedule=learned": "learned",
        "--dataset=heartbeat --noise=0.1": "noise",
        "--checkpoint=": "empty", "--checkpoint=none": "could not be read",
        "--checkpoint=file": "could not be read", "--checkpoint=assets/mnist.pt": "not of sohl",
        "--checkpoint=FILE --quick": "not allowed", "--checkpoint=FILE --T=9": "--T: .* is 5",
        "--checkpoint=FILE --dataset=heartbeat": "--dataset: .* swiss_roll",
        "--checkpoint=FILE --schedule=linear": "--schedule: .* learned",
        "--checkpoint=FILE --noise=1": "--noise: .* 0.02"},
    cfg: MISTAKES_OF_BOTH | {
        "--p-uncond=1.5": "--p-uncond 1.5", "--classes 3 12": "--classes 12: the classes are 0, 1",
        "--guidance=x": "--guidance.*both", "--dataset=images": "guidance needs two classes",
        "--w=x": "--w", "--sampler=langevin": "ddim",
        "--checkpoint=assets/mnist_cfg.pt --guidance=both": "classifier.pt: there",
        "--checkpoint=assets/mnist.pt": "checkpoint of ddpm_ho_2020.py"}}
EVERY_MISTAKE = [(script, flags) for script, own in MISTAKES.items() for flags in own]

@pytest.mark.parametrize("script, flags", EVERY_MISTAKE)
def test_users_mistakes(quick, fails, script, flags):
    """Each ends as the fixture says, and the run that some of them name is left as it was."""
    out, _ = quick(script)
    shutil.copytree(out, "RUN")
    for folder in ("empty", "other", "damaged/MNIST/raw"):
        Path(folder).mkdir(parents=True)
    torch.save(read("RUN/checkpoint.pt") | {"names": ["cat", "dog"]}, "other/checkpoint.pt")
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        Path(f"damaged/MNIST/raw/{part}-ubyte").write_bytes(bytes(9))
    Path("file").write_text("text")
    Path("assets").symlink_to(HERE / "assets")
    write_images("one/0.png", "images/0.png", "images/1.png")
    fails(script, flags.replace("FILE", "RUN/checkpoint.pt"), MISTAKES[script][flags])
    assert Path("RUN/checkpoint.pt").read_bytes() == (out / "checkpoint.pt").read_bytes()

@pytest.mark.parametrize("flag", [
    "--T=1", "--T=x", "--seed=-1", "--out=", f"--out={__file__}"])
def test_schedules_flags(flag, fails):
    fails(schedules, flag, flag.partition("=")[0])

@pytest.mark.parametrize("error, line", [
    (torch.cuda.OutOfMemoryError(), "memory is full.*--batch"), (OSError(28, "No room"), "No room"),
    (KeyboardInterrupt(), "stopped by Ctrl-C. No checkpoint was made"), (KeyError("ema"), None)])
@both
def test_from_the_shell(script, error, line, monkeypatch, capsys):
    """What a user can cause is one line; a bug keeps its traceback."""
    def main(args):
        raise error
    monkeypatch.setattr(script, "main", main)
    monkeypatch.setattr(sys, "argv", ["script", "--device=cpu"])
    with pytest.raises(SystemExit if line else type(error)) as e:
        script.run_from_shell()
    if line:
        assert e.value.code == 2 and re.fullmatch(f"error: .*{line}.*\n", capsys.readouterr().err)

# ----------------------------------------------------------- second acts: training and whole runs

FEW = {ddpm: "--num-samples=20", cfg: "--num-samples=10 --sampling-steps=2 --w=1"}

@pytest.fixture
def no_pictures(monkeypatch):
    """Where they are not what is tested: nothing is drawn, in a tenth of the time."""
    for script, name in itertools.product((ddpm, cfg), ("draw_table", "draw_curve")):
        monkeypatch.setattr(script, name, lambda *_: None)
    monkeypatch.setattr(cfg, "draw_film", lambda *_: None)

QUICK = {ddpm: "--predict=x0", cfg: "--guidance free classifier --w 1 0",
         sohl: "--T=5 --steps=6 --num-samples=300"}
HEARTBEAT = "--dataset=heartbeat --T=50"

@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """quick(script): the folder that --quick has filled, and its numbers. Each runs once."""
    @cache
    def once(script, *flags):
        out = tmp_path_factory.mktemp("quick") / "out"
        return out, run(script, " ".join([f"--quick --out={out}", QUICK[script], *flags]))
    return once

@pytest.mark.parametrize("script, flags, written", [
    (ddpm, [], "samples.npz samples.png loss.png training.png progressive.png"),
    (cfg, [], "samples.npz samples.png loss.png training.png reverse.png reverse.gif"
              " classifier.pt"),
    (sohl, [], "bound.png posteriors.png reverse.gif swiss_roll.png"),
    (sohl, [HEARTBEAT], "bound.png")])
def test_what_a_quick_run_leaves(quick, script, flags, written):
    out, m = quick(script, *flags)
    assert files(out) == {"checkpoint.pt", "metrics.json", *written.split()}
    assert m == json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    keys = "dataset seed device torch steps params seconds_train config"
    assert set(keys.split()) <= m.keys()

@both
def test_samples_of_a_checkpoint_are_those_of_its_run(quick, script):
    """Of a sweep, samples.npz has w = 0. The first portion of 50 is the same, whatever follows."""
    out, m = quick(script)
    guidance = "--guidance free --w 0" if script is cfg else ""
    again = run(script, f"--checkpoint={out}/checkpoint.pt {guidance}")
    assert "seconds_train" not in again and again["steps"] == 30 and 0 < m["loss"] < 0.9
    arrays = np.load(out / "samples.npz")
    others = np.load(f"runs/{script.__name__}-digits-samples/samples.npz")
    assert all(np.array_equal(arrays[k][:50], others[k][:50]) for k in arrays)
    assert arrays["arr_0"].shape == (100, 8, 8, 1) and arrays["arr_0"].std() > 0
    assert script is ddpm or arrays["arr_1"].tolist() == list(range(10)) * 10

@both
def test_load_gives_what_a_notebook_needs(quick, script):
    """ε_θ by the average, whatever the network predicts: here ddpm_ho_2020.py's predicts x_0. The
    last row of its training.png is what it draws."""
    path = quick(script)[0] / "checkpoint.pt"
    state, (eps_theta, s, shape, names) = read(path), script.load(path)
    net = script.make_network(state["config"], shape, names).eval()
    net.load_state_dict(state["ema"])
    by_hand = script.as_eps_theta(net, s, "x0" if script is ddpm else "eps")
    inputs = torch.randn(2, *shape), torch.tensor([500, 900]), torch.tensor([3, 10])
    inputs = inputs[:2 if script is ddpm else 3]
    assert eps_theta(*inputs).allclose(by_hand(*inputs), atol=1e-4)
    assert names == list("0123456789") and s.T == 1000 and list(shape) == [1, 8, 8]
    if script is ddpm:
        args = args_of(ddpm, f"--checkpoint={path}")
        images, _ = ddpm.sample(args, s, shape, lambda *_: eps_theta, 16)
        assert torch.equal(images, state["snapshots"][30])

@pytest.mark.parametrize("flags", [[], [HEARTBEAT]])
def test_sohls_numbers_of_a_checkpoint_are_those_of_its_run(quick, capsys, flags):
    out, m = quick(sohl, *flags)
    again = run(sohl, f"--checkpoint={out}/checkpoint.pt")
    assert all(again[key] == m[key] for key in m if key != "config")
    told = capsys.readouterr().out
    first = [f"{m[key]:.3f}" for key in ("K_bits", "ceiling_bits", "paper_K_bits")]
    assert re.findall(r" (-?\d+\.\d{3})\n", told)[:3] == first
    assert Path(told.split("Look at ")[1].strip()).exists()

def test_what_sohl_measures_of_known_data(quick):
    roll, heartbeat = quick(sohl)[1], quick(sohl, HEARTBEAT)[1]
    for m in (roll, heartbeat):
        assert m["K_bits"] < m["K_exact_bits"] < m["ceiling_bits"]
    assert roll["L_null_bits"] == pytest.approx(-math.log2(2 * math.pi * math.e))
    assert heartbeat["valid_share"] < 0.1 < 0.5 < heartbeat["valid_share_exact"] <= 1
    assert roll["denoise_distance_exact"] < 0.1 < roll["denoise_distance_paper"]
    assert {f"K_exact_bits_{name}" for name in SCHEDULES} <= roll.keys()

def test_sohl_trains_by_train_step(quick):
    """A run written out: the seed of every step, the rate, the data; and K, of fresh data."""
    out, m = quick(sohl)
    torch.manual_seed(0)
    net = sohl.RollNet(sohl.start_beta("learned", 5), True, m["config"]["width"])
    data = sohl.draw_roll(400_000, 0.02, 1)
    opt = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    for step in range(6):
        torch.manual_seed(step + 1)
        opt.param_groups[0]["lr"] = 4e-3 * (1 + math.cos(math.pi * step / 6)) / 2
        sohl.train_step(sohl.GAUSSIAN, net, opt, data[torch.randint(len(data), (256,))])
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["net"]
    assert_close(saved, net.state_dict(), rtol=0, atol=0)
    s, held_out = sohl.learned_schedule(net.beta_logits), sohl.draw_roll(300, 0.02, 2)
    K, _ = sohl.evaluate(sohl.GAUSSIAN, s, net, held_out)
    assert m["K_bits"] == pytest.approx(K.mean().item())
    assert m["K_stderr_bits"] == pytest.approx(K.std().item() / 300 ** 0.5)

@pytest.mark.parametrize("script, flags, name, loss, p_uncond", [
    (ddpm, "--flip", "checkpoint.pt", ddpm.l_simple, None),
    (ddpm, "--no-flip --predict=x0", "checkpoint.pt", ddpm.l_x0, None),
    (cfg, "--p-uncond=0.5", "checkpoint.pt", cfg.l_cfg, 0.5),
    (cfg, "--guidance=classifier", "classifier.pt", cfg.l_classifier, 0)])
def test_training_is_the_step_repeated(no_pictures, script, flags, name, loss, p_uncond):
    """Four steps written out, each from its own seed, leave the same weights, bit for bit."""
    few = "--quick --channels=8 --steps=4 --batch=16 --num-samples=10 --sampling-steps=2 --seed=5"
    args = args_of(script, f"{few} --lr=0.05 {flags}")
    args.bf16, args.out, args.warmup = False, "a", 3
    script.main(args)
    data, s = script.load_data(args), make_schedule("cosine", 1000)
    torch.manual_seed(5)
    make = script.make_network if name == "checkpoint.pt" else script.make_classifier
    net = script.in_fast_format(make(vars(args), [1, 8, 8], data.names), "cpu")
    ema, opt = copy.deepcopy(net), torch.optim.Adam(net.parameters())
    for step in (1, 2, 3, 4):
        torch.manual_seed(10 ** 9 * 5 + step)
        opt.param_groups[0]["lr"] = 0.05 * (5 - step) / 4  # one step of warm-up, a fall to 0
        i = torch.randint(len(data.images), (16,))
        x0, y = data.images[i].float() / 127.5 - 1, data.labels[i]
        if "--flip" in flags:
            x0 = torch.where(torch.rand(16, 1, 1, 1) < 0.5, x0.flip(3), x0)
        if script is ddpm:
            ddpm.train_step(net, ema, opt, s, x0, step, loss, 0.998)
        else:
            cfg.cfg_train_step(net, ema, opt, s, x0, y, step, 10, p_uncond, loss, 0.998)
    saved = read(f"a/{name}")
    assert_close(saved["net"], dict(net.state_dict()), rtol=0, atol=0)
    assert_close(saved["ema"], dict(ema.state_dict()), rtol=0, atol=0)

@pytest.mark.parametrize("script, at, flags", [
    (ddpm, 4, "--predict=x0"), (cfg, 8, "--guidance=both")])
def test_a_run_killed_while_saving_and_resumed_is_the_uninterrupted_run(
        no_pictures, monkeypatch, script, at, flags):
    """Bit for bit. cfg's is killed while its classifier is trained."""
    flags = f"--quick --channels=8 --steps=5 --batch=8 --flip {FEW[script]} {flags}"
    run(script, f"{flags} --out=whole")
    clock, saves, replace = itertools.count(0, 100), itertools.count(1), os.replace
    def replace_or_die(a, b):
        if next(saves) == at:
            raise KeyboardInterrupt
        replace(a, b)
    with monkeypatch.context() as patch:  # a minute passes in every step
        patch.setattr(script, "time", argparse.Namespace(monotonic=lambda: next(clock)))
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(script, f"{flags} --out=killed")
    run(script, "--resume=killed")
    for name in files("killed") & {"checkpoint.pt", "classifier.pt"}:
        whole, resumed = read(f"whole/{name}"), read(f"killed/{name}")
        for key in ("net", "ema", "optimizer", "losses", "step"):
            assert_close(resumed[key], whole[key], rtol=0, atol=0)
        assert resumed["seconds"] > 100  # what the killed run had trained is not trained again

def test_torchrun_trains():
    flags = f"--quick --channels=8 --steps=2 --batch=8 {FEW[cfg]} --guidance=both --out=two"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node=2", cfg.__file__, "--device=cpu", *flags.split()],
                   check=True, timeout=200)
    assert read("two/checkpoint.pt")["step"] == read("two/classifier.pt")["step"] == 2

def test_each_process_draws_its_own_share(monkeypatch, fails):
    args, shares = args_of(ddpm, "--quick --steps=2 --batch=8"), []
    data, new = ddpm.open_run(args)
    def one_step(net, ema, opt, x0, y, step):
        shares.append(y)
        return torch.zeros(())
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda net: net)
    monkeypatch.setattr(ddpm, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(ddpm, "RANK", rank)
        run, path = dict(new), Path("checkpoint.pt")
        ddpm.train(args, run, lambda *_: nn.Linear(1, 1), data, path, one_step)
    assert torch.stack(shares).unique(dim=0).shape == (4, 4)  # 2 steps of 2 processes: 4 labels
    fails(ddpm, "--batch=63", "cannot be shared evenly by 2 processes")

def test_a_run_claims_a_new_folder():
    claimed = [str(ddpm.claim_folder(None, "runs/new")) for _ in range(3)]
    assert claimed == ["runs/new", "runs/new-2", "runs/new-3"]

@both
def test_sampling_by_hand(script):
    """Portions of 50 from the seed's noise; the frames are those of the first images."""
    args = args_of(script, "--sampling-steps=3 --T=9 --seed=4 --sampler=ddpm")
    args.variance, args.bf16 = "beta", False
    s, eps_theta = make_schedule("linear", 9), lambda x, t: -2 * x
    images, frames = script.sample(args, s, (1, 2, 2), lambda *_: eps_theta, 53)
    torch.manual_seed(4)
    chains = [list(script.ddpm_sample(*script.subchain(eps_theta, s, 3), torch.randn(n, 1, 2, 2)))
              for n in (50, 3)]
    assert torch.equal(images, torch.cat([script.to_uint8(chain[-1][1]) for chain in chains]))
    assert list(frames) == [6, 3, 0]
    for (_, xt, x0_hat), (xt_kept, x0_kept) in zip(chains[0], frames.values()):
        assert torch.equal(script.to_uint8(xt[:16]), xt_kept)
        assert torch.equal(script.to_uint8(x0_hat[:16]), x0_kept)

@both
def test_bfloat16_is_for_the_network_alone(no_pictures, script, monkeypatch):
    dtypes, forward = set(), script.Attention.forward
    def watching(self, h):
        dtypes.add(h.dtype)
        return forward(self, h)
    monkeypatch.setattr(script.Attention, "forward", watching)
    args = args_of(script, f"--quick --steps=2 --channels=8 {FEW[script]}")
    args.bf16, args.out = True, "a"
    script.main(args)
    assert dtypes == {torch.bfloat16}
    assert all(v.dtype == torch.float32 for v in read("a/checkpoint.pt")["net"].values())

# ------------------------------------------------------------- second acts: judge and experiments

def test_judge(monkeypatch):
    """The classifier is trained as written here, and is the same for every run."""
    data = ddpm.load_data(args_of(ddpm))
    judge = ddpm.train_judge(data)
    right = judge(ddpm.to_float(data.held_out)).argmax(1) == data.held_labels
    assert right.double().mean() > 0.95
    real = ddpm.some_of(data.images, 200, seed=3)
    assert not torch.equal(real, ddpm.some_of(data.images, 200, seed=4))
    m = ddpm.evaluate(real, judge, data, seed=3)  # real images are at the floor
    assert m["frechet"] == pytest.approx(m["frechet_floor"]) and m["confident_share"] > 0.9
    y = torch.arange(300) % 10
    real, f_held = cfg.real_like(data, y, 0), ddpm.features_of(judge, data.held_out)
    m = cfg.evaluate(real, y, judge, f_held)
    assert m["label_accuracy"] > 0.95 and 8 < m["classifier_score"] <= 10
    monkeypatch.setattr(ddpm, "JUDGE_STEPS", 1)
    assert torch.equal(*(ddpm.train_judge(data)[1].weight for _ in range(2)))

def test_real_images_of_a_class():
    data = argparse.Namespace(
        images=torch.arange(5)[:, None], labels=torch.tensor([0, 2, 0, 2, 2]),
        held_out=torch.tensor([[8], [9]]), held_labels=torch.tensor([1, 0]))
    y = torch.tensor([2, 0, 0, 1, 0, 2, 1])
    picked = cfg.real_like(data, y, seed=0).flatten().tolist()
    assert {picked[1], picked[2]} == {0, 2} and picked[4] in (0, 2) and picked[3] == picked[6] == 8
    assert {picked[0], picked[5]} < {1, 3, 4} and picked[0] != picked[5]

def test_experiments(monkeypatch, capsys):
    """Every experiment on a folder of images, and what inpainting measures; then guidance."""
    drawn, draw = {}, ddpm.draw_table
    def recorded(path, rows, columns=()):
        drawn[path.name] = dict(rows)
        return draw(path, rows, columns)
    monkeypatch.setattr(ddpm, "draw_table", recorded)
    monkeypatch.setattr(ddpm, "JUDGE_STEPS", 5)
    write_images(*(f"images/{name}/{i}.png" for name in "abc" for i in range(13)))
    small = "--dataset=images --image-size=8 --multipliers 1 2 --channels=8 --steps=3 --batch=8"
    m = run(ddpm, f"{small} --experiments --T=20 --sampling-steps=4 --num-samples=20 --out=a")
    assert files("a") >= {"rate_distortion.png", "interpolation.png", "inpainting.png"}
    told = capsys.readouterr().out
    assert "36 images of the classes a, b, c" in told and "--resume a --steps 6" in told
    assert told.endswith("look at:    a/samples.png\n")
    assert m["bits_per_dim"] > m["bits_per_dim_rate"] > m["bits_per_dim_L_T"] > 0
    rows, hidden = drawn["inpainting.png"], torch.zeros(8, 8, dtype=torch.bool)
    hidden[2:6, 2:6] = True
    error = rows["RePaint"].float() - rows["real"].float()
    rmse = error[:, :, hidden].square().mean().sqrt().item()
    assert (error[:, :, ~hidden] == 0).all() and m["inpainting_rmse"] == pytest.approx(rmse)
    assert 0 <= m["inpainting_kept"] <= 1 and (rows["known"][:, :, hidden] == 128).all()
    run(cfg, f"{small} --w 0 1 --num-samples=8 --sampling-steps=2 --out=b")

def test_histogram_code(monkeypatch):
    """The yardstick of bits/dim: where three of four images are black, black costs log2(4/3)."""
    monkeypatch.setattr(ddpm, "rate_distortion", lambda *_: ([1.0, 2.0], [3.0]))
    images = torch.tensor([0, 0, 0, 200], dtype=torch.uint8).repeat(1000)[:, None, None, None]
    data = argparse.Namespace(images=images, held_out=images[:4])
    args = argparse.Namespace(seed=0, variance="beta", clip=True)
    m = ddpm.likelihood(args, None, None, data, Path())
    entropy = 0.75 * math.log2(4 / 3) + 0.25 * math.log2(4)
    assert m["bits_per_dim_histogram"] == pytest.approx(entropy, abs=0.01)

def test_cfg_draws_what_it_has_learned():
    """Without ∅ no ε(x, ∅), without labels no ε(x, y): what is left has one w."""
    for p_uncond, w in ((0, 0), (1, -1)):
        args = args_of(cfg, f"--p-uncond={p_uncond} --w 1 2 --guidance both")
        assert (args.guidance, args.w) == (["free"], [w])

def test_cfg_sweep(quick, monkeypatch):
    """A row for each kind and w, with its numbers; w = -1 is one model, whatever guides it."""
    monkeypatch.setattr(cfg, "JUDGE_STEPS", 20)
    flags = f"--checkpoint={quick(cfg)[0]}/checkpoint.pt --evaluate --sampling-steps=2"
    m = run(cfg, f"{flags} --num-samples=100 --guidance free classifier --w -1 0 1 --out=a")
    for sweep in (m["sweep"], m["sweep_classifier"]):
        assert [row["w"] for row in sweep] == [-1, 0, 1]
    assert m["sweep"][0] == m["sweep_classifier"][0] and m["sweep"][2] != m["sweep_classifier"][2]
    assert m["frechet_floor"] > 0 and files("a") >= {"tradeoff.png", "samples.png"}
    assert Image.open("a/reverse.gif").n_frames == 2  # one for each step
    asked, guide = [], cfg.guide
    def recorded(kind, eps_theta, classifier, s, y, K, w, t_max):
        asked.append(y)
        assert (K, w, t_max) == (10, 1, 1)
        return guide(kind, eps_theta, classifier, s, y, K, w, t_max)
    monkeypatch.setattr(cfg, "guide", recorded)
    run(cfg, f"{flags} --w 1 --t-max 1 --classes 3 7 1 --num-samples=60 --guidance free --out=b")
    assert torch.cat(asked).tolist() == np.load("b/samples.npz")["arr_1"].tolist() == [3, 7, 1] * 20

# --------------------------------------------------------------------------------- flags, hygiene

def test_presets_and_checkpoints_decide_the_defaults(quick):
    for script in (ddpm, cfg):
        assert script.PRESETS == ddpm.PRESETS
        get = partial(args_of, script)
        assert (get("--dataset=mnist").steps, get("--dataset=mnist").image_size) == (7000, 28)
        assert (get("--dataset=cars").image_size, get("--dataset=cars").flip) == (64, True)
        assert not get("--dataset=.").flip and get("--dataset=.").predict == "x0"
        assert get("--preset=paper").steps == 800_000 and get("--preset=paper").schedule == "linear"
        assert get("--T=20").sampling_steps == 20 and get("--quick").steps == 30
        assert get("--multipliers 1").attention == [] and get("").attention == [4]
        path = quick(script)[0] / "checkpoint.pt"
        args = get(f"--checkpoint={path} --sampling-steps=7")
        assert (args.channels, args.num_samples, args.sampling_steps) == (16, 64, 7)
        _, run = script.open_run(get(f"--resume={path.parent} --steps=60 --lr=1e-4"))
        assert (run["config"]["steps"], run["config"]["lr"]) == (60, 1e-4)  # remembered

@pytest.mark.parametrize("script, flags, default", [
    (ddpm, "--dataset mnist --help", 7000), (cfg, "--dataset mnist --help", 7000),
    (sohl, "--dataset heartbeat --help", 8000)])
def test_help_shows_the_defaults_in_force(script, flags, default, capsys):
    with pytest.raises(SystemExit, match="0"):
        args_of(script, flags)
    assert f"(default: {default})" in capsys.readouterr().out

@pytest.mark.parametrize("script, own", [
    (cfg, "evaluate get_args load main make_network"),
    (sohl, "draw_table evaluate get_args load_checkpoint main train train_step")])
def test_copies_are_equal(script, own):
    """What two scripts define by the same name is the same, to the letter, but for these names."""
    copies, originals = (definitions(inspect.getsource(part)) for part in (script, ddpm))
    common = copies.keys() & originals.keys()
    assert {name for name in common if copies[name] != originals[name]} == set(own.split())

def test_readme_commands_parse(monkeypatch):
    """The scripts take every `python script.py ...` of the README, results.md and docstrings."""
    texts = [README, RESULTS, *(script.__doc__ for script in (ddpm, cfg, sohl, schedules))]
    commands = re.findall(r"python ((\w+)\.py[^\n`#&;]*)", "\n".join(texts))
    found = re.findall(r"for (\w+) in ([^;\n]+);", README + RESULTS)
    loops = {f"${name}": values.split() for name, values in found}
    for script in (ddpm, cfg, sohl):
        state = {"script": script.__name__, "config": vars(script.get_args([])), "net": 1,
                 "image_shape": [1, 8, 8]}
        monkeypatch.setattr(script, "load_checkpoint", lambda path, state=state: state)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    assert len(commands) > 6
    for command, module in commands:
        words = [loops.get(word, [word]) for word in shlex.split(command.split("    ")[0])]
        for _, *flags in itertools.product(*words):
            __import__(module).get_args(flags)

def test_code_in_the_readme_is_the_scripts():
    def code(function):  # without its docstring and comments
        body = function.body[1:] if ast.get_docstring(function) else function.body
        return [ast.dump(part) for part in [*function.decorator_list, function.args, *body]]
    def functions(text):
        return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    sources = [inspect.getsource(script) for script in (schedules, cfg, ddpm)]
    there = {f.name: code(f) for source in sources for f in functions(source)}
    shown = functions("\n".join(re.findall(r"```python\n(.*?)```", README, re.S)))
    assert {f.name for f in shown} >= {"l_simple", "ddpm_sample", "eps_tilde", "cubic"}
    assert all(code(f) == there[f.name] for f in shown if f.name != "cubic")  # the reader's own

SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", README + RESULTS, re.S)
            if code.startswith("import")]

@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_of_the_readme_run(code):
    Path("assets").symlink_to(HERE / "assets")
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})

def test_every_checker_of_the_readme_selects_a_test():
    tests = re.findall(r"^def (test_\w+)", inspect.getsource(sys.modules[__name__]), re.M)
    words = re.findall(r"-k (\w+)`", README)
    assert len(words) > 10 and [w for w in words if not any(w in test for test in tests)] == []

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("script, flags", [
    (ddpm, "--experiments"), (ddpm, "--sampler=langevin"), (ddpm, "--predict=mu --loss=bound"),
    (cfg, "--guidance free classifier both"), (sohl, ""), (sohl, "--dataset=heartbeat --T=200")])
def test_on_a_gpu(script, flags):
    run(script, f"--quick --device=cuda --out=a --steps=10 {flags}")
    if script is not sohl:
        run(script, "--device=cuda --resume=a --steps=12")
    m = run(script, f"--device=cuda --checkpoint=a/checkpoint.pt --out=b {FEW.get(script, '')}")
    assert m["device"].startswith("cuda")

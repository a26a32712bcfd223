"""Every test: closed forms and identities in float64 first, then whole runs.      pytest -q test_all.py

What asserts exactness runs on the CPU, whatever else there is; on a GPU there are runs beside it."""
import argparse
import ast
import builtins
import contextlib
import copy
import dis
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import warnings
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddpm_conditional_cfg as cfg
import ddpm_ho_2020 as ddpm
import schedules
import sohl_dickstein_2015 as sohl
from schedules import SCHEDULES, Schedule, extract, make_schedule

torch.set_num_threads(1)  # the networks are small, and threads would wait for each other
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
every_schedule = pytest.mark.parametrize("name", list(SCHEDULES))
both = pytest.mark.parametrize("script", [ddpm, cfg])
every = pytest.mark.parametrize("script", [ddpm, cfg, sohl])
FEW = {ddpm: "--num-samples=20", cfg: "--num-samples=10 --sampling-steps=2 --w=1 --guidance=free",
       sohl: "--num-samples=2000"}
HEARTBEAT = "--dataset=heartbeat --T=200"

def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def agree(draws, mean):
    """The mean of the draws is within four standard errors of what it should be."""
    return abs(draws.mean() - mean) < 4 * draws.std() / len(draws) ** 0.5 + 1e-12

def args_of(script, flags=""):
    cpu = [] if script is schedules or "--device" in flags else ["--device=cpu"]
    return script.get_args(shlex.split(flags) + cpu)

def run(script, flags):
    return script.main(args_of(script, flags))

def read(path):
    return torch.load(path, weights_only=True)

def files(folder):
    return {path.name for path in Path(folder).iterdir()}

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)

# ----------------------------------------------------------------------------------------------- schedules.py

@every_schedule
@pytest.mark.parametrize("T", [10, 50, 1000])
def test_schedule_table(name, T):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of ours leaves too much signal
        s = make_schedule(name, T)
    assert s.beta.shape == (T + 1,) and s.beta.dtype == torch.float64
    assert s.beta[0] == 0 and ((s.beta[1:] > 0) & (s.beta[1:] < 1)).all()
    assert s.alpha_bar[0] == 1 and (s.alpha_bar.diff() < 0).all() and s.alpha_bar[T].sqrt() < 0.1

def test_schedules_as_published():
    beta = SCHEDULES["linear"](1000)
    assert beta[1] == pytest.approx(1e-4) and beta[1000] == pytest.approx(0.02)  # Ho et al. 2020, Sec. 4
    assert beta.diff(n=2)[1:].abs().max() < 1e-15
    assert SCHEDULES["quadratic"](1000)[1:].sqrt().diff(n=2).abs().max() < 1e-15
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    assert make_schedule("cosine", 1000).alpha_bar[500] == pytest.approx(f[500] / f[0])
    assert SCHEDULES["inverse"](40)[1:40].allclose(1 / torch.arange(40, 1, -1, dtype=torch.float64))
    sigma = (1 / make_schedule("geometric", 100).snr[1:100]).sqrt()
    assert sigma[0] == pytest.approx(0.01) and (sigma[1:] / sigma[:-1]).std() < 1e-9
    assert SCHEDULES["constant"](50)[1:].std() < 1e-12
    assert make_schedule("sigmoid", 1000).alpha_bar[500] == pytest.approx(0.5)
    low, quarter, high = (1 / (1 + math.exp(-v)) for v in (-3, -1.5, 3))
    assert make_schedule("sigmoid", 1000).alpha_bar[250] == pytest.approx((high - quarter) / (high - low))
    assert SCHEDULES["quadratic"](1000)[[1, 1000]].tolist() == pytest.approx([1e-4, 0.02])
    assert make_schedule("geometric", 100).snr[100] == pytest.approx(50 ** -2)
    assert make_schedule("constant", 50).alpha_bar[50] == pytest.approx(math.exp(-10))
    assert SCHEDULES["cosine"](1000)[1000] == SCHEDULES["inverse"](40)[40] == 0.999
    log_snr = Schedule(F.pad(sohl.start_beta("learned", 40), (1, 0))).snr[1:].log()
    assert log_snr.allclose(torch.linspace(16, -6, 40).double(), atol=1e-5)

@every_schedule
def test_T_single_steps_are_one_jump(name):
    """Mean and variance of T steps of Eq. (2) against Eq. (4), at every t."""
    s, x0 = make_schedule(name, 50), randn(3, 2)
    mean, variance = x0, 0.0
    for t in range(1, 51):
        mean, variance = (1 - s.beta[t]).sqrt() * mean, (1 - s.beta[t]) * variance + s.beta[t]
        assert s.q_sample(x0, t, torch.zeros_like(x0)).allclose(mean, rtol=1e-10, atol=1e-12)
        noise = s.q_sample(0 * x0, torch.tensor([t] * 3), torch.ones_like(x0))
        assert (noise.square() - variance).abs().max() < 1e-10
        noise = s.q_sample(torch.zeros(1), t, torch.ones(1))  # float32: rounded after the root
        assert noise.item() == pytest.approx(variance.sqrt().item(), rel=1e-6)

def test_posterior_is_bayes():
    """Eqs. (6), (7) against the product of the Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    s, x0, xt = make_schedule("linear", 20), randn(4, 3), randn(4, 3, seed=1)
    for t in range(2, 21):
        ab, p1, p2 = s.alpha_bar[t - 1], s.alpha[t] / s.beta[t], 1 / (1 - s.alpha_bar[t - 1])
        mu_tilde, beta_tilde = s.q_posterior(x0, xt, torch.full((4,), t))
        assert beta_tilde.allclose(1 / (p1 + p2))
        assert mu_tilde.allclose((p1 * xt / s.alpha[t].sqrt() + p2 * ab.sqrt() * x0) / (p1 + p2))
    mu_tilde, beta_tilde = s.q_posterior(x0, xt, 1)  # at t = 1 nothing is left open
    assert mu_tilde.allclose(x0, atol=1e-12) and beta_tilde.item() == 0
    t, ab, beta = torch.arange(1, 21), s.alpha_bar, s.beta[1:]
    a, b = s.posterior_coefficients(t, xt[:, 0].new_zeros(20, 1))  # the two factors of Eq. (7)
    assert a.shape == (20, 1) and a[:, 0].allclose(ab[:-1].sqrt() * beta / (1 - ab[1:]), rtol=1e-12)
    assert b[:, 0].allclose((1 - beta).sqrt() * (1 - ab[:-1]) / (1 - ab[1:]), rtol=1e-12)
    assert a[0].item() == pytest.approx(1) and b[0].item() == 0

def test_schedule_refuses_and_warns():
    for beta in ([0.1, 0.2], [0, 0.5, 1], [0, 0], [0], [[0, 0.5]]):
        with pytest.raises(ValueError):
            Schedule(beta)
    for name, T in (("liner", 10), ("linear", 0)):
        with pytest.raises(ValueError, match="linear"):
            make_schedule(name, T)
    with pytest.warns(UserWarning, match="0.88"):  # betas made for T = 1000 with T = 50
        Schedule(torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.01, 50)]))

def test_first_practical(monkeypatch, fails):
    few = {name: SCHEDULES[name] for name in ("constant", "cosine")}
    monkeypatch.setattr(schedules, "SCHEDULES", few)
    @schedules.schedule
    def mine(T):
        return schedules.from_alpha_bar((1 - schedules.time(T)) ** 3)
    x, s = torch.arange(600).double()[:, None], make_schedule("cosine", 20)
    assert schedules.accuracy_at(s, 0, x, (x[:, 0] > 99).long(), 0 * x[-500:]) == 0  # which are held out
    x = x % 10
    assert schedules.accuracy_at(s, 13, x, x[:, 0].long(), 0 * x[-500:]) == 1  # by the largest likelihood
    m = run(schedules, "--T=20 --out=new")
    assert "mine" in m and 0 < m["constant"]["structure_share"] < m["cosine"]["structure_share"] <= 1
    assert files("new") == {"schedules.png", "destruction.png", "metrics.json"}
    for flag in ("--T=1", "--T=x", "--seed=-1", "--out=new/metrics.json"):
        fails(schedules, flag, flag.partition("=")[0])

# ------------------------------------------------------------------------- ddpm_ho_2020.py: loss and samplers

def exact_eps(s, m, variance):
    """E[ε | x_t] for x_0 ~ N(m, variance I): the best that any network could say."""
    def eps_theta(x, t):
        ab = extract(s.alpha_bar, t, x)
        return (1 - ab).sqrt() * (x - ab.sqrt() * m) / (ab * variance + 1 - ab)
    return eps_theta

@pytest.mark.parametrize("predict", ["eps", "x0", "mu"])
def test_a_network_that_is_right_has_no_loss_and_tells_all_the_rest(predict):
    """x_0, Eq. (11) = Eq. (7), and the score, ∇ log q(x_t | x_0): denoising score matching (Vincent 2011)."""
    s, x0, eps = make_schedule("linear", 1000), randn(6, 2, 3), randn(6, 2, 3, seed=1)
    t = torch.tensor([1, 2, 9, 99, 500, 1000])
    beta, ab = s.beta[t][:, None, None], s.alpha_bar[t][:, None, None]
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps  # Eq. (4)
    target = {"eps": eps, "x0": x0, "mu": s.q_posterior(x0, xt, t)[0]}[predict]
    def net(x, u):  # right where it is shown x_t and the t that belongs to it
        return target + (x - xt) + (u - t)[:, None, None]
    loss = {"eps": ddpm.l_simple, "x0": ddpm.l_x0, "mu": ddpm.l_mu}[predict]
    assert loss(net, s, x0, t, eps) < 1e-20
    power = target.square().mean().item()
    assert loss(lambda x, t: 0 * x, s, x0, t, eps) == pytest.approx(power)
    assert ddpm.loss_of(args_of(ddpm, f"--predict={predict}")) is loss
    eps_theta = ddpm.as_eps_theta(net, s, predict)
    assert eps_theta(xt, t).allclose(eps, atol=1e-9)
    assert ddpm.score(eps_theta, s, xt, t).allclose((ab.sqrt() * x0 - xt) / (1 - ab))
    mu_theta, _, x0_hat = ddpm.p_theta(eps_theta, s, xt, t, clip=False)
    assert x0_hat.allclose(x0) and mu_theta.allclose((xt - beta / (1 - ab).sqrt() * eps) / (1 - beta).sqrt())
    assert ddpm.predict_x0(s, xt, t, eps).allclose(x0.clamp(-1, 1))

@every_schedule
def test_ddpm_samples_are_distributed_as_q(name):
    """σ² = β is exact for N(0, I) data and σ² = β̃ for one point (Sec. 3.2): x_t ~ q(x_t) all the way."""
    torch.manual_seed(1)  # not the 0 of x
    s, m, x = make_schedule(name, 50), randn(1, 3).tanh(), randn(40_000, 3)
    def path(variance, mean, v):
        return list(ddpm.ddpm_sample(exact_eps(s, mean, v), s, x, variance, clip=v == 0))
    unit, point = path("beta", 0, 1), path("beta_tilde", m, 0)
    assert [t for t, _, _ in unit] == list(range(49, -1, -1))
    for (t, xt, _), (_, yt, _) in zip(unit, point):
        assert xt.var(0).allclose(1 - s.beta[1] * (t == 0), atol=0.03)  # the last step adds no noise
        assert yt.var(0).allclose(1 - s.alpha_bar[t], rtol=0.04, atol=1e-12)
    assert all((p[-1][1] - m).abs().max() < 1e-9 for p in (point, path("beta", m, 0)))
    if name == "linear":  # the lower bound of the two variances is too small for N(0, I)
        assert path("beta_tilde", 0, 1)[-1][1].var() < 0.9

@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_moves_between_x0_hat_and_its_epsilon(steps):
    """x_t and x_{t-1} are made of x̂_0 and the same ε, clipped or not; the true ε leads back to x_0."""
    s, eps = make_schedule("cosine", 50), randn(4, 2, seed=1)
    eps_theta, short = ddpm.subchain(lambda x, t: eps, s, steps)
    for x0 in (randn(4, 2).tanh(), 3 * randn(4, 2)):  # of which the second is clipped
        x = s.q_sample(x0, 50, eps)
        for t, x_prev, x0_hat in ddpm.ddim_sample(eps_theta, short, x):
            ab, ab_prev = short.alpha_bar[t + 1], short.alpha_bar[t]
            eps_hat = (x - ab.sqrt() * x0_hat) / (1 - ab).sqrt()
            assert x_prev.allclose(ab_prev.sqrt() * x0_hat + (1 - ab_prev).sqrt() * eps_hat)
            assert x0_hat.abs().max() <= 1 and (x0_hat.allclose(x0, atol=1e-6) or x0.abs().max() > 1)
            x = x_prev
        assert t == 0
        *_, (_, x, _) = ddpm.ddim_sample(eps_theta, short, s.q_sample(x0, 50, eps), clip=False)
        assert x.allclose(x0, atol=1e-6)

@every_schedule
@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_subchain(name, steps):
    s, seen = make_schedule(name, 50), []
    eps_theta, short = ddpm.subchain(lambda x, t: seen.append(t) or x, s, steps)
    for i in range(1, steps + 1):
        eps_theta(randn(1, 1), torch.tensor([i]))
    grid = torch.cat([torch.zeros(1).long(), *seen])
    assert short.T == steps and grid.tolist() == [round(i * 50 / steps) for i in range(steps + 1)]
    assert short.alpha_bar.allclose(s.alpha_bar[grid], rtol=1e-3, atol=1e-12)
    assert steps < 50 or short.beta.allclose(s.beta)

# ----------------------------------------------------------------------------------- ddpm_ho_2020.py: network

def net_of(flags, shape):
    return ddpm.make_eps_theta(args_of(ddpm, flags), shape)

@pytest.mark.parametrize("flags, shape", [
    ("", (1, 8, 8)), ("--dataset mnist", (1, 28, 28)), ("--attention 6", (3, 12, 20)),
    ("--multipliers 1 --attention", (1, 7, 9)), ("--no-time-embedding", (1, 8, 8))])
def test_network_shapes_and_gradients(flags, shape):
    torch.manual_seed(0)
    net, x = net_of(flags + " --channels 8", shape), torch.randn(3, *shape)
    assert torch.equal(net(x, torch.tensor([1, 2, 1000])), torch.zeros_like(x))  # starts at 0
    opt = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(3):
        opt.zero_grad()
        (net(x, torch.tensor([1, 500, 1000])) - x).square().mean().backward()
        opt.step()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    y = [net(x[:1], torch.tensor([t])) for t in (1, 1000)]
    assert torch.equal(*y) == ("--no-time" in flags)

def test_network_refuses_sizes():
    for flags, message in (("", "30x28.* 4 divides"),
                           ("--multipliers 1 2 --attention 7", r"\[7\].*\[28, 14\]")):
        with pytest.raises(ValueError, match=message):
            net_of(f"--dataset mnist {flags}", (1, 30, 28))

@both
def test_dropout_is_for_training_alone(script):
    args = args_of(script, "--dropout=0.5 --channels=8")
    inputs = [torch.randn(2, 1, 8, 8), torch.tensor([1, 9]), torch.tensor([0, 3])][:3 if script is cfg else 2]
    net, ema = script.networks(lambda: script.make_eps_theta(args, (1, 8, 8)), {"step": 0}, args)
    for model in (net, ema):
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        assert torch.equal(model(*inputs), model(*inputs)) == (model is ema)

def test_layers_of_the_network():
    torch.manual_seed(0)
    layer, h = ddpm.Attention(8), torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(h)).flatten(2).chunk(3, 1)  # (B, C, H W)
    r = v @ (q.mT @ k / 8 ** 0.5).softmax(2).mT
    assert layer(h).allclose(h + layer.out(r.reshape(h.shape)), atol=1e-5)
    assert [ddpm.norm(C).num_groups for C in (128, 32, 96, 8)] == [32, 8, 8, 2]
    block, h = net_of("--channels 8", (1, 8, 8)).middle[0], torch.randn(2, 16, 4, 4)
    assert torch.equal(block(h, torch.randn(2, 32)), h)  # a new block of one width, attention and all

def test_time_embedding():
    t = torch.randperm(1000) + 1
    e = ddpm.time_embedding(t, 32)
    assert len(e.unique(dim=0)) == 1000 and torch.equal(e[10:11], ddpm.time_embedding(t[10:11], 32))
    assert e[:, 0].allclose(t.sin(), atol=1e-5) and e[:, 31].allclose((t * 1e-4).cos(), atol=1e-5)
    assert e.std(0).min() > 1e-3  # no channel is constant

# ------------------------------------------------------------ ddpm_ho_2020.py: the paper's other experiments

def test_langevin_on_an_exact_gaussian_score():
    """N(0.3, 0.2²) data: the samples have its moments; of one point, each level has its own noise."""
    torch.manual_seed(0)
    s = make_schedule("geometric", 300)
    *_, (t, x, _) = ddpm.langevin_sample(exact_eps(s, 0.3, 0.04), s, randn(4000, 1, 1, 1))
    assert t == 0 and abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.2) < 0.02
    for t, x, _ in ddpm.langevin_sample(exact_eps(s, 0.3, 0), s, randn(4000, 1)):
        noise = (x / s.alpha_bar[t + 1].sqrt() - 0.3).std() * s.snr[t + 1].sqrt()
        assert t == 0 or t > 290 or 1 < noise < 1.1  # steps of a finite size add a little
    x_T = randn(4, 1)
    _, x, _ = next(ddpm.langevin_sample(exact_eps(s, 0.3, 0.04), s, x_T, each=0))
    assert torch.equal(x, x_T)
    s, exact = make_schedule("cosine", 300), exact_eps(make_schedule("cosine", 300), 0.3, 0.04)
    def network(x, t):  # like one, it cannot bring back an x that has run far away
        return exact(x, t).clamp(-3, 3)
    for _, x, _ in ddpm.langevin_sample(*ddpm.subchain(network, s, 30), randn(4000, 1)):
        assert x.std() < 1.1

def test_discrete_decoder():
    """Eq. (13) is a distribution over the 256 grey levels, and density times width if the kernel is wide."""
    levels, mean = ddpm.to_float(torch.arange(256)).double(), torch.tensor(0.2).double()
    for sigma in torch.tensor([0.003, 0.1, 3.0]).double():
        log_p = ddpm.discrete_log_likelihood(levels, mean, sigma)
        assert log_p.exp().sum() == pytest.approx(1, abs=1e-6)
    density = torch.distributions.Normal(mean, sigma).log_prob(levels) + math.log(2 / 255)
    assert log_p[1:-1].allclose(density[1:-1], atol=1e-5)

@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_bits_per_dim_of_a_known_model(variance):
    """N(0, v) data, where Eq. (5) is closed form: x̂_0 errs with variance 1 / (1 / v + SNR_t)."""
    torch.manual_seed(0)
    s, v, x0, t = make_schedule("linear", 50), 0.04, 0.2 * randn(20000, 1, 1, 1), torch.arange(50, 1, -1)
    error, sigma2, beta_tilde, ab = 1 / (1 / v + s.snr), getattr(s, variance)[t], s.beta_tilde[t], s.alpha_bar
    L_T = (ab[-1:] * v - ab[-1:] - (1 - ab[-1:]).log()) / 2
    distance = beta_tilde * (s.snr[t - 1] - s.snr[t]) * error[t]
    kl = ((sigma2 / beta_tilde).log() - 1 + (beta_tilde + distance) / sigma2) / 2
    rates, rmse = map(torch.tensor, ddpm.rate_distortion(exact_eps(s, 0.0, v), s, x0, variance, clip=False))
    expected = torch.cat([L_T, kl]).cumsum(0).float() / math.log(2)
    assert len(rates) == 51 and rates[:-1].allclose(expected, rtol=0.02, atol=1e-3)
    assert rates[0].item() == pytest.approx(expected[0].item(), rel=0.05)  # L_T is small, but not 0
    assert len(rmse) == 50 and rmse.allclose(127.5 * error[1:].flip(0).sqrt().float(), rtol=0.03)
    assert rates.diff().min() > 0 and rmse.diff().max() < 0.1  # monotone
    first, eps = torch.ones(20000).long(), randn(20000, 1, 1, 1, seed=1)
    mu, _, _ = ddpm.p_theta(exact_eps(s, 0.0, v), s, s.q_sample(x0, 1, eps), first, clip=False)
    L_0 = -ddpm.discrete_log_likelihood(x0, mu, s.beta_tilde[2].sqrt()).flatten() / math.log(2)
    assert ddpm.vlb_term(exact_eps(s, 0.0, v), s, x0, first, eps, variance, clip=False)[0].allclose(L_0)
    entropy = math.log2(0.2 * math.sqrt(2 * math.pi * math.e) * 127.5)  # of the grey levels, nearly
    assert entropy - 0.02 < rates[-1] < entropy + (0.5 if variance == "beta" else 5)

def test_interpolation_ends_at_the_noised_endpoints():
    s, a, b = make_schedule("linear", 20), randn(1, 1, 50, 50), randn(1, 1, 50, 50, seed=1)
    x = ddpm.interpolate(s, a, b, 3, [0, 0.5, 1])
    noises = [(end - s.alpha_bar[3].sqrt() * image[0]) / (1 - s.alpha_bar[3]).sqrt()
              for end, image in ((x[0], a), (x[2], b))]
    for noise in noises:
        assert noise.std() == pytest.approx(1, abs=0.1) and abs(noise.mean()) < 0.1
    assert abs((noises[0] * noises[1]).mean()) < 0.1  # each end has its own
    assert [t for t, _, _ in ddpm.ddpm_sample(lambda x, t: x, s, x, start=3)] == [2, 1, 0]
    assert x[1].allclose((x[0] + x[2]) / 2)

def test_inpainting_of_an_exact_gaussian():
    """Two pixels of correlation ρ, the first is known: the other is N(ρ a, 1 - ρ²), if they are let adapt."""
    rho, a, known = 0.8, 1.5, torch.tensor([True, False])
    S, x0 = torch.tensor([[1, rho], [rho, 1]]).double(), torch.tensor([[a, 0]]).double().expand(4000, 2)
    def eps_theta(x, t):  # -√(1 - ᾱ) ∇ log q(x_t)
        ab = s.alpha_bar[t[0]]
        return (1 - ab).sqrt() * x @ torch.linalg.inv(ab * S + (1 - ab) * torch.eye(2))
    torch.manual_seed(0)
    means = {}
    for T, times in ((50, 1), (200, 2), (25, 16), (50, 20)):
        s = make_schedule("linear", T)
        *_, (t, x, _) = ddpm.repaint_sample(eps_theta, s, randn(4000, 2), x0, known, clip=False, times=times)
        means[T, times] = x[:, 1].mean().item()
        assert t == 0 and (x[:, 0] == a).all()
    assert means[50, 20] == pytest.approx(rho * a, abs=0.08) and means[50, 1] < 0.8
    assert means[25, 16] > means[200, 2] + 0.1  # in equal time larger steps adapt more
    assert x[:, 1].var() == pytest.approx(1 - rho ** 2, rel=0.1)
    seen = []  # where all is known, every x that the network is shown is q(x_t | x_0)
    def watch(x, t):
        seen.append((t[0].item(), x))
        return x
    s = make_schedule("linear", 8)
    x = s.q_sample(x0, 8, randn(4000, 2, seed=1))
    assert len(list(ddpm.repaint_sample(watch, s, x, x0, torch.tensor(True), times=3))) == 8
    assert [t for t, _ in seen] == [8] * 3 + [7] * 3 + [6] * 3 + [5] * 3 + [4] * 3 + [3] * 3 + [2] * 3 + [1]
    for t, x in seen:
        assert x.mean(0).allclose(s.alpha_bar[t].sqrt() * x0[0], atol=0.07)
        assert x.var(0).allclose(1 - s.alpha_bar[t], rtol=0.1)
    nothing = partial(ddpm.repaint_sample, x0=x0, known=torch.tensor(False), times=1)
    for variance in ("beta", "beta_tilde"):  # where nothing is known, a draw is ddpm_sample's
        draws = []
        for sampler in (nothing, ddpm.ddpm_sample):
            torch.manual_seed(0)
            draws.append(next(sampler(watch, s, x, variance=variance))[1])
        assert torch.equal(*draws)

def test_what_inpainting_measures(monkeypatch):
    """By hand: the pixels filled in, from what is known alone, and the judge's view of them."""
    (train, held_out, _), drawn = ddpm.load_data("digits", ""), {}
    monkeypatch.setattr(ddpm, "draw_rows", lambda path, rows: drawn.update(rows))
    x, y = (part[:16] for part in held_out)
    judge, s = ddpm.train_judge(*train, 10, 40), make_schedule("linear", 9)
    args = args_of(ddpm, "--sampling-steps=2 --no-bf16")
    m = ddpm.inpainting(args, lambda x, t: 0 * x, s, judge, (x, y), Path())
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[2:6, 2:6] = True
    for name in ("RePaint", "nearest"):
        error = drawn[name].float() - x.float()
        assert (error[:, :, ~hidden] == 0).all()
        rmse = error[:, :, hidden].square().mean().sqrt().item()
        assert m[f"inpainting_rmse_{name}"] == pytest.approx(rmse)
        kept = (judge(ddpm.to_float(drawn[name])).argmax(1) == y).float().mean().item()
        assert m[f"inpainting_kept_{name}"] == kept < (judge(ddpm.to_float(x)).argmax(1) == y).float().mean()
    i, j = torch.tensor([2, 5, 3, 4]), torch.tensor([3, 4, 2, 5])  # and the nearest pixels that are known
    assert torch.equal(drawn["nearest"][..., i, j], x[..., [1, 6, 3, 4], [3, 4, 1, 6]])

# ------------------------------------------------------- the first acts: as pasted, on a GPU, without no_grad

def before_the_end(script):
    return inspect.getsource(script).split("# The paper ends here")[0]

@every
def test_first_act_works_pasted(script):
    """By itself, with its imports: no name comes from the second act, and every example runs."""
    pasted = types.ModuleType("pasted")
    exec(compile(before_the_end(script), "pasted", "exec"), vars(pasted))
    own = [f for f in vars(pasted).values() if inspect.isroutine(f) or inspect.isclass(f)]
    own = [f for f in own if f.__module__ == "pasted"]
    codes = [f.__code__ for f in own if inspect.isroutine(f)]
    codes += [m.__code__ for f in own if inspect.isclass(f) for m in vars(f).values() if inspect.isroutine(m)]
    codes += [inspect.unwrap(f).__code__ for f in own if hasattr(f, "__wrapped__")]
    codes += [const for code in codes for const in code.co_consts if inspect.iscode(const)]  # inside
    for code in [code for code in codes if code.co_filename == "pasted"]:
        used = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        assert used <= vars(pasted).keys() | vars(builtins).keys(), code
    if script is sohl:  # whose examples are of the second act's data
        return
    x0 = torch.zeros(2, 1, 28, 28)
    batches = [x0] if script is ddpm else [(x0, torch.tensor([3, 7]))]
    names = vars(pasted) | {"x0": x0, "a": x0[:1], "b": x0[1:], "batches": batches}
    Path("assets").symlink_to(HERE / "assets")
    examples = 0
    for f in sorted(own, key=lambda f: f.__name__ != "train_step"):  # which makes s, net and ema
        example = re.findall(r"^ {8}(.*)$", f.__doc__ or "", re.M)
        if example:
            exec("\n".join(example), names if f.__name__ != "UNet" else names.copy())
            chain = names.pop("chain", [])
            assert all(len(step) == 3 for step in itertools.islice(chain, 3))
            examples += 1
            names["ema"] = lambda x, t, y=None: 0.1 * x  # a faster one
    assert examples >= (6 if script is ddpm else 5)

def fakes_cuda():
    """Whether this torch moves fake tensors to a card that is not there. 2.4 does not."""
    try:
        with FakeTensorMode():
            torch.zeros(1).to("cuda")
        return True
    except RuntimeError:
        return False

needs_fake_cuda = pytest.mark.skipif(not fakes_cuda(), reason="this torch has no fake CUDA without a driver")

class OneDevice(TorchDispatchMode):
    """Refuses what FakeTensorMode lets pass: a CPU tensor as an index into a CUDA one."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor) and v.dim() > 0]
        assert len({v.device.type for v in tensors}) < 2, func
        return func(*args, **kwargs or {})

@needs_fake_cuda
@pytest.mark.parametrize("bf16", [False, True])
@both
def test_first_act_on_fake_cuda(script, bf16, monkeypatch):
    """No CPU tensor stands in a formula of CUDA ones, float32 comes out, and no output needs a gradient."""
    cuda, s, watched = torch.device("cuda"), copy.copy(make_schedule("linear", 9)), []
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.5)  # what needs numbers
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: False)
    monkeypatch.setattr(torch.autograd, "grad", lambda y, x: [torch.zeros_like(x)])  # what needs a driver
    def backward(loss):
        assert loss.device == torch.device("cuda:0") and loss.dtype == torch.float32
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(script, "Schedule", lambda beta: copy.copy(s))  # whose checks need numbers
    def checked(*outputs):
        for v in tree_leaves(outputs):
            if isinstance(v, torch.Tensor):
                assert v.device.type == "cuda" and v.dtype == torch.float32
    shape, labels = [(1, 8, 8), 8, (1, 2), 1, (4,)], [] if script is ddpm else [10]
    with FakeTensorMode(), OneDevice():
        for name in ("beta", "alpha", "alpha_bar", "snr", "beta_tilde"):
            setattr(s, name, torch.rand(3, dtype=torch.float64, device=cuda))
        s.T = 2
        with cuda:
            kind = ddpm.UNet if script is ddpm else cfg.ConditionalUNet
            net, ema = kind(*labels, *shape), kind(*labels, *shape)
            x, t, y = torch.randn(4, 1, 8, 8), torch.randint(1, 3, (4,)), torch.randint(10, (4,))
            known = torch.rand(8, 8) < 0.5
            classifier = None if script is ddpm else cfg.NoisyClassifier(10, *shape)
        torch.set_autocast_enabled("cuda", bf16)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            opt = torch.optim.Adam(net.parameters())
            if script is ddpm:
                thetas = [ddpm.as_eps_theta(ema, s, predict) for predict in ("eps", "x0", "mu")]
                for loss in (ddpm.l_simple, ddpm.l_x0, ddpm.l_mu, ddpm.l_vlb):
                    checked(ddpm.train_step(net, ema, opt, s, x, y, loss=loss))
                for predict in ("x0", "mu"):
                    checked(ddpm.l_vlb(net, s, x, t, x, None, predict, "beta_tilde"))
                ddpm.rate_distortion(watch_grad(ema, watched), s, x)
                checked(ddpm.interpolate(s, x[:1], x[1:2], 2, [0, 0.5]), ddpm.score(ema, s, x, t))
            else:
                checked(cfg.train_step(net, ema, opt, s, x, y, 10))
                checked(classifier(x, t), cfg.l_classifier(classifier, s, x, t, x, y))
                thetas = [cfg.guided(ema, y, 10, w) for w in (-1, 0, 2)]
                thetas += [cfg.classifier_guided(ema, classifier, s, y, 10, 2, c) for c in (False, True)]
            for theta in thetas:
                checked(theta(x, t), script.p_theta(theta, s, x, t, "beta_tilde"))
            for theta in (thetas[0], thetas[-1]):
                theta, short = script.subchain(watch_grad(theta, watched), s, 2)
                checked(*script.ddpm_sample(theta, short, x), *script.ddim_sample(theta, short, x))
                if script is ddpm:
                    checked(*ddpm.langevin_sample(theta, short, x, each=1))
                    checked(*ddpm.repaint_sample(theta, short, x, x, known, times=2))
        finally:
            torch.set_autocast_enabled("cuda", False)
        with pytest.raises((RuntimeError, AssertionError)):  # as it would if one were there
            x[torch.arange(len(y))]
    assert watched and not any(watched)  # under no_grad, though nothing around them says so

def watch_grad(eps_theta, watched):
    def watching(x, t):
        watched.append(torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
        return eps_theta(x, t)
    return watching

@pytest.mark.parametrize("predict", ["eps", "x0", "mu"])
def test_l_is_the_mean_of_its_terms(predict):
    """Table 2's L: in bits/dim, not times T, and without a clip, so that x̂_0 far outside has a gradient."""
    s, x0, eps, t = make_schedule("linear", 9), randn(9, 2, 3), randn(9, 2, 3, seed=1), torch.arange(1, 10)
    net = lambda x, t: 3 * x  # noqa: E731
    args = args_of(ddpm, f"--loss=vlb --predict={predict} --variance=beta_tilde --T=9 --bf16 --clip")
    assert (args.clip, args.bf16) == (predict != "mu",) * 2  # a network that is μ_θ is not clipped
    terms, _ = ddpm.vlb_term(ddpm.as_eps_theta(net, s, predict), s, x0, t, eps, "beta_tilde", clip=False)
    assert ddpm.loss_of(args)(net, s, x0, t, eps, None) == terms.mean()
    if predict == "mu":
        theta = ddpm.as_eps_theta(net, s, "mu")
        assert ddpm.p_theta(theta, s, x0, t, clip=args.clip)[0].allclose(net(x0, t))

# -------------------------------------------------------------------------------------- the training, by hand

@pytest.mark.parametrize("script, flags", [(ddpm, ""), (cfg, "--guidance classifier --w=0 --p-uncond=0.5"),
                                           (ddpm, "--no-flip --no-decay-lr --predict=x0"),
                                           (cfg, "--guidance free --w=0 --p-uncond=0.5 --no-flip")])
def test_training_is_algorithm_1(script, flags):
    """Four steps written out leave the same weights, averages, moments and random state, bit for bit."""
    given = "--quick --channels=8 --steps=4 --batch=16 --lr=0.05 --warmup=3 --ema=0.28 --no-bf16"
    given += " --num-samples=20 --schedule=linear"
    run(script, f"{given} --sampling-steps=2 --seed=5 --flip --decay-lr --out=. {flags}")
    s, (x, y), nets, norms = make_schedule("linear", 1000), script.load_data("digits", "")[0], {}, []
    args = args_of(script, f"{given} {flags}")
    for make in [cfg.make_classifier] * ("classifier" in flags) + [script.make_eps_theta]:
        torch.manual_seed(5)
        nets[make.__name__] = make(args, (1, 8, 8))
    for name, net in reversed(nets.items()):
        ema, opt, losses = copy.deepcopy(net), torch.optim.Adam(net.parameters()), []
        for n in range(1, 5):
            i = torch.randint(len(x), (16,))
            x0 = x[i].float() / 127.5 - 1
            if "--no-flip" not in flags:
                x0 = torch.where(torch.rand(16, 1, 1, 1) < 0.5, x0.flip(3), x0)  # half of them
            label = y[i]
            if script is cfg:
                label = torch.where(torch.rand(16) < 0.5 * (name == "make_eps_theta"), 10, label)
            t, eps = torch.randint(1, 1001, (16,)), torch.randn_like(x0)  # t from 1 to T, both included
            xt = s.q_sample(x0, t, eps)
            if name == "make_classifier":
                loss = F.cross_entropy(net(xt, t), label)
            else:
                out = net(xt, t) if script is ddpm else net(xt, t, label)
                loss = F.mse_loss(out, x0 if "x0" in flags else eps)
            opt.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 1.0))
            fall = 1 if "--no-decay" in flags else (5 - n) / 4
            opt.param_groups[0]["lr"] = 0.05 * min(1, n / 3) * fall
            opt.step()
            for average, weight in zip(ema.parameters(), net.parameters()):
                average.data.lerp_(weight.data, 1 - min(0.28, n / (9 + n)))
            losses.append(loss.detach())
        saved = read("checkpoint.pt" if name == "make_eps_theta" else "classifier.pt")
        mine = {"net": net.state_dict(), "ema": ema.state_dict(), "losses": torch.stack(losses), "step": 4,
                "optimizer": opt.state_dict()}
        assert_close({key: saved[key] for key in mine}, mine, rtol=0, atol=0)
        assert saved["optimizer"]["param_groups"][0]["lr"] == opt.param_groups[0]["lr"]
        assert torch.equal(saved["random"]["cpu"], torch.get_rng_state())
    assert max(norms) > 1 and min(norms) < max(norms)

@both
def test_random_state(script, monkeypatch):
    """The CPU's and the device's, saved and restored; sampling leaves both as they were."""
    device, of_gpu = torch.device("cuda"), [torch.tensor([7])]
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: of_gpu[-1])
    monkeypatch.setattr(torch.cuda, "set_rng_state", of_gpu.append)
    state = script.random_state(device)
    drawn = torch.rand(3)
    of_gpu.append(torch.tensor([8]))
    script.set_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn) and of_gpu[-1] == 8
    script.set_random_state(state, device)
    assert torch.equal(torch.rand(3), drawn) and of_gpu[-1] == 7
    script.set_random_state(script.random_state(torch.device("cpu")), device)  # from a run on a CPU

@pytest.mark.parametrize("flags", ["", "--no-clip", "--variance=beta_tilde", "--sampler=ddim",
                                   "--sampler=langevin"])
@both
def test_sampling_by_hand(script, flags):
    if script is cfg and "langevin" in flags:
        pytest.skip("which is not there")
    args = args_of(script, f"--sampling-steps=3 --T=9 --seed=4 --sampler=ddpm --variance=beta {flags}")
    s, eps_theta, before = make_schedule("linear", 9), lambda x, t: -2 * x, torch.get_rng_state()
    images, frames = script.sample([(eps_theta, 20), (eps_theta, 3)], s, args, (1, 2, 2))
    assert torch.equal(torch.get_rng_state(), before) and images.shape == (23, 1, 2, 2)
    torch.manual_seed(4)
    sampler = getattr(script, f"{args.sampler}_sample")
    options = {"clip": "no-clip" not in flags} | ({"variance": "beta_tilde"} if "tilde" in flags else {})
    by_hand = [list(sampler(*script.subchain(eps_theta, s, 3), torch.randn(n, 1, 2, 2), **options))
               for n in (20, 3)]
    assert torch.equal(images, torch.cat([script.to_uint8(chain[-1][1]) for chain in by_hand]))
    assert [t for t, _, _ in frames] == [6, 3, 0]
    for (_, xt, x0_hat), (_, x, x0) in zip(frames, by_hand[0]):
        assert torch.equal(xt, x[:16]) and torch.equal(x0_hat, x0[:16])

# --------------------------------------------------------------------------------------- data and the judge

def test_frechet_distance():
    a = randn(5000, 3) * torch.tensor([1, 2, 3]).double()
    b = randn(4000, 3, seed=1) + torch.tensor([0, 0, 2]).double()
    assert ddpm.frechet_distance(a, b) == pytest.approx(4 + 0 + 1 + 4, rel=0.05)  # |Δm|² + Σ (s_a - s_b)²
    for k, c in ((0, 0), (2, 1)):
        exact = (k * a.mean(0) + c).square().sum() + k ** 2 * a.var(0).sum()
        assert ddpm.frechet_distance(a, a + k * a + c) == pytest.approx(exact.item(), abs=1e-6)

def test_judges_scores_of_known_probabilities():
    p = torch.tensor([[0.95, 0.05, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0.05, 0.95, 0]])
    assert ddpm.confidence(p) == {"confident_share": 0.5, "rarest_class_share": 0}
    assert ddpm.confidence(p[:3, :2])["rarest_class_share"] == pytest.approx(1 / 3)
    y = torch.arange(12) % 4
    uniform, sure = torch.zeros(12, 4).log_softmax(1), (100.0 * torch.eye(4)[y]).log_softmax(1)
    assert cfg.class_scores(uniform, y)["classifier_score"] == pytest.approx(1)
    assert cfg.class_scores(sure, y) == {"classifier_score": pytest.approx(4), "label_accuracy": 1}
    two = cfg.class_scores(torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log(), torch.zeros(2))
    assert math.log(two["classifier_score"]) == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    assert two["label_accuracy"] == 0.5

def test_judges_see_what_they_should(monkeypatch):
    """Distance and floor by hand: real ones are n training images, of the classes asked for if any are."""
    grey = torch.Generator().manual_seed(0)
    def data(n):  # three classes of images of two pixels, each with its own grey
        y = torch.arange(n) % 3
        return (60 * y[:, None] + torch.randint(50, (n, 2), generator=grey)).to(torch.uint8)[:, None, None], y
    real, judge = (data(600), data(300), list("abc")), nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    judge.requires_grad_(False)[1].weight.mul_(30)
    (x, y), (held, y_held), _ = real
    f = partial(ddpm.features_of, judge)
    assert torch.equal(f(held), ddpm.to_float(held).flatten(1)) and len(ddpm.features_of(None, held)) == 300
    i = ddpm.some_of(torch.arange(600), 90, 3)
    assert len(i.unique()) == 90 and torch.equal(i, cfg.some_of(torch.arange(600), 90, 3))
    assert not torch.equal(i, ddpm.some_of(torch.arange(600), 90, 4)) and len(ddpm.some_of(x, 9000, 0)) == 600
    samples = data(90)[0]
    for one in (judge, None):
        f = partial(ddpm.features_of, one)
        m = ddpm.evaluate(samples, one, real, 3)
        assert m["frechet"] == ddpm.frechet_distance(f(samples), f(held))
        assert m["frechet_floor"] == ddpm.frechet_distance(f(ddpm.some_of(x, 90, 3)), f(held)) > 0
    f, p = partial(ddpm.features_of, judge), judge(ddpm.to_float(held)).softmax(1)
    p_samples = judge(ddpm.to_float(samples)).softmax(1)
    m = ddpm.evaluate(samples, judge, real, 3)
    assert m["confident_share"] == ddpm.confidence(p_samples)["confident_share"]
    assert m["confident_share_real"] == ddpm.confidence(p)["confident_share"] != m["confident_share"]
    accuracy = (p.argmax(1) == y_held).double()
    assert m["classifier_accuracy"] == pytest.approx(accuracy.mean().item()) and 0 < accuracy.mean() < 1
    monkeypatch.setattr(cfg, "train_judge", lambda *args: asked.append(args) or judge)
    asked, args = [], types.SimpleNamespace(steps=20, seed=3)
    drawn = torch.tensor([0, 2] * 45)
    shown, of_held = torch.cat([cfg.some_of(x[y == k], 45, 3) for k in (0, 2)]), held[y_held != 1]
    one, f_held, m = cfg.judge_of(real, drawn, 3, args)
    assert one is judge and torch.equal(f_held, f(of_held)) and asked[0][2:] == (3, 20)
    floor = cfg.frechet_distance(f(shown), f_held)
    assert m["frechet_floor"] == pytest.approx(floor) and floor > 0
    assert m["label_accuracy_real"] == pytest.approx(accuracy[y_held != 1].mean().item())
    assert cfg.judge_of(real, drawn[:64], 3, args) == (None, None, {})  # too few for a covariance
    m, log_p = cfg.evaluate(samples, drawn, judge, f_held), p_samples.log()
    assert m == {"frechet": cfg.frechet_distance(f(samples), f_held)} | {
        name: pytest.approx(value, rel=1e-4) for name, value in cfg.class_scores(log_p, drawn).items()}

def test_real_images_of_a_class():
    x, y = torch.arange(5)[:, None], torch.tensor([0, 2, 0, 2, 2])
    held_out, classes = (torch.tensor([[8], [9]]), torch.tensor([1, 0])), torch.tensor([2, 0, 0, 1, 0, 2, 1])
    assert cfg.examples(((x, y), held_out, "abc"), classes).flatten().tolist() == [1, 0, 2, 8, 0, 3, 8]

def test_judge_by_hand():
    (x, y), (held, y_held), _ = ddpm.load_data("digits", "")
    trained = ddpm.train_judge(x, y, 10, 40)
    judge = ddpm.train_judge(x, y, 10, 0).train().requires_grad_(True)  # its first weights
    opt = torch.optim.Adam(judge.parameters())
    for step in range(40):
        i = torch.randint(len(x), (128,))
        opt.param_groups[0]["lr"] = 0.002 * (40 - step) / 40
        opt.zero_grad()
        F.cross_entropy(judge(ddpm.to_float(x[i])), y[i]).backward()
        opt.step()
    assert_close(dict(trained.state_dict()), dict(judge.state_dict()), rtol=1e-4, atol=1e-5)
    assert (trained(ddpm.to_float(held)).argmax(1) == y_held).double().mean() > 0.8
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())
    assert ddpm.features_of(trained, held).shape == (450, 64) and ddpm.train_judge(x, y, 1, 9) is None

def test_pixels():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ddpm.to_uint8(ddpm.to_float(x)), x) and ddpm.to_float(x)[[0, 255]].tolist() == [-1, 1]
    assert ddpm.to_uint8(torch.tensor([-9, -1 + 1.4 / 255, -1 + 0.9 / 255, 9])).tolist() == [0, 1, 0, 255]

def test_digits():
    (x, y), (x_held, y_held), names = ddpm.load_data("digits", "nowhere")
    assert x.shape == (1347, 1, 8, 8) and x_held.shape == (450, 1, 8, 8) and names == list("0123456789")
    assert x.dtype == torch.uint8 and x.max() == 255
    assert y.bincount().min() > 120 and y_held.bincount().min() > 30
    assert len(torch.cat([x, x_held]).unique(dim=0)) == 1797  # all are there

def write_mnist():
    """MNIST's four files with 150 noise images each, in the folder mnist."""
    raw = Path("mnist/MNIST/raw")
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels, labels = np.random.default_rng(len(part)).bytes(150 * 28 * 28), bytes(range(10)) * 15
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 150, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 150) + labels)

def test_mnist_files():
    write_mnist()
    (x, y), held_out, names = ddpm.load_data("mnist", "mnist")
    assert x.shape == (150, 1, 28, 28) and y[:3].tolist() == [0, 1, 2] and len(held_out[1]) == 150
    assert names == list("0123456789")
    for images, part in ((x, "train"), (held_out[0], "t10k")):
        raw = Path(f"mnist/MNIST/raw/{part}-images-idx3-ubyte").read_bytes()
        assert images.numpy().tobytes() == raw[16:]
    file = Path("mnist/MNIST/raw/t10k-images-idx3-ubyte")
    file.write_bytes(file.read_bytes()[:1000])
    for folder in ("mnist", "empty"):
        with pytest.raises(OSError, match="train-images-idx3-ubyte.*t10k-labels.*--dataset digits"):
            ddpm.load_data("mnist", folder, download=False)

def test_cifar10_has_its_colours_first(monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    def there(self, *_, **__):
        vars(self).update(data=pixels, targets=[3, 7], classes=["cat", "horse"])
    monkeypatch.setattr(ddpm.CIFAR10, "__init__", there)
    (x, y), _, _ = ddpm.load_data("cifar10", "")
    assert all(np.array_equal(x[:, c], pixels[..., c]) for c in range(3)) and y.tolist() == [3, 7]

def write_images(*paths):
    for i, path in enumerate(map(Path, paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = ["RGB", "L", "P"][i % 3] if path.suffix.lower() == ".png" else "RGB"
        Image.fromarray(np.full((40, 30, 3), 20 * i % 256, np.uint8)).convert(mode).save(path)

def load(dataset, size=(16, 24)):
    """-> the images and labels of load_folder, held-out ones last, and the names."""
    (x, y), (x_held, y_held), names = ddpm.load_folder(dataset, ".", list(size))
    assert len(x_held) == max(1, (len(x) + len(x_held)) // 10) and x.shape[1:] == (3, *size)
    return torch.cat([x, x_held]), torch.cat([y, y_held]), names

@pytest.mark.parametrize("folder, names, mat, labels, classes", [
    ("stanford_cars", "cars_train/0.jpg cars_train/1.jpg cars_test/0.jpg", "", [0, 0], ["cars_train"]),
    ("stanford_cars", "cars_train/0.jpg cars_train/1.jpg cars_test/0.jpg", "annos", [1, 0],
     ["model 003", "model 007"]),
    ("stanford_cars", "cars_train/0.jpg cars_train/1.jpg", "annos meta", [0, 1], ["BMW M3", "Zonda"]),
    ("cars_train", "cars_train/0.jpg cars_train/1.JPG cars_test/0.jpg", "", [0, 0], ["cars_train"]),
    ("stanford_cars", "Audi/0.jpg BMW/1.jpg", "", [0, 1], ["Audi", "BMW"]),
    ("cars_train", "0.jpg 1.jpg", "annos meta beside", [0, 1], ["BMW M3", "Zonda"]),
    (".", "0.jpg 1.jpg", "", [0, 0], [""])])
def test_cars_in_every_layout(folder, names, mat, labels, classes):
    write_images(*(f"{folder}/{name}" for name in names.split()))
    if "beside" in mat:
        folder = "devkit"
        Path(folder).mkdir()
    if mat:  # which counts from 1
        annotations = np.array([("0.jpg", 7), ("1.jpg", 3)], dtype=[("fname", object), ("class", object)])
        savemat(f"{folder}/cars_train_annos.mat", {"annotations": annotations})
    if "meta" in mat:
        models = np.array(["a", "b", "Zonda", "d", "e", "f", "BMW M3"], dtype=object)
        savemat(f"{folder}/cars_meta.mat", {"class_names": models})
    x, y, found = load("cars")
    assert len(x) == 2 and x.dtype == torch.uint8 and found == classes  # and no test image
    assert dict(zip(x[:, 0, 0, 0].tolist(), y.tolist())) == dict(zip((0, 20), labels))  # by grey level

def test_body_types_of_cars():
    for model, body in (("Audi TT RS Coupe 2012", "Coupe"), ("Dodge Caravan Minivan 1997", "Van"),
                        ("GMC Savana Van 2012", "Van"), ("Ford Ranger SuperCab 2011", "other"),
                        ("GMC Canyon Extended Cab 2012", "Cab"), ("Bentley Continental Supersports Conv. "
                        "Convertible 2012", "Convertible"), ("model 007", "other"), ("Audi", "other")):
        assert ddpm.body_of(model) == body
    folders = "Acura TL Sedan 2012", "BMW M3 Coupe 2012", "BMW Z4 Convertible 2012", "Audi A5 Coupe 2012"
    write_images(*(f"stanford_cars/{folder}/{i}.jpg" for i, folder in enumerate(folders)))
    found = {}
    for labels in ("model", "body"):
        (_, y), (_, y_held), names = ddpm.load_folder("cars", ".", [16, 16], labels)
        found[labels] = sorted(names[k] for k in [*y, *y_held])
    assert found == {"model": sorted(folders), "body": ["Convertible", "Coupe", "Coupe", "Sedan"]}
    write_images("images/BMW M3 Coupe 2012/0.jpg", "images/Audi/1.jpg")  # no cars: the folders' names
    assert ddpm.load_folder("images", ".", [16, 16], "body")[2] == ["Audi", "BMW M3 Coupe 2012"]

def test_folders(capsys, monkeypatch):
    """Any extension and mode; broken files named and skipped; a slow image keeps its place and its label."""
    write_images("cars_test/0.jpg", "cars_test/1.jpg", "linked/a/0.jpg")
    assert len(load("cars_test")[0]) == 2  # only within a copy of the cars is this a part to leave out
    Path("linked/b").symlink_to(Path("cars_test").absolute())
    Image.fromarray(np.full((20, 20), 25_700, np.uint16)).save("linked/a/1.png")  # in 16 bits
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save("linked/a/2.png")  # clear: what is behind it is white
    x, y, names = load("linked")
    assert names == ["a", "b"] and sorted(x[y == 0][:, 1, 0, 0].tolist())[1:] == [100, 255] and len(x) == 5
    write_images(*(f"images/{name}" for name in ("a/0.JPG", "b/1.png", "b/2.png", "b/3.Png", "a/4.jpeg")))
    whole = Path("images/a/0.JPG").read_bytes()
    Path("images/a/broken.jpg").write_bytes(whole[:len(whole) // 2])
    Path("images/a/text.png").write_text("not an image")
    original = Image.open
    def slow_at_first(path):
        time.sleep(0.3 * (path.name == "0.JPG"))
        return original(path)
    monkeypatch.setattr(Image, "open", slow_at_first)
    x, y, names = load("images")
    assert names == ["a", "b"]
    shades = (x[:, 0, 0, 0] / 20).round().tolist()
    assert sorted(zip(shades, y.tolist())) == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 0)]
    err = capsys.readouterr().err
    assert "skipped images/a/broken.jpg" in err and "skipped images/a/text.png" in err

def test_a_photograph_keeps_its_colours_and_orientation():
    """Decoded small (draft), turned as EXIF says, cropped in the middle: as without any haste."""
    Path("images").mkdir()
    v, u = np.mgrid[:600, :400]
    photo = Image.fromarray(np.stack([255 * u / 400, 255 * v / 600, 0 * u + 90], 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    for name, mode in (("1", "RGB"), ("2", "CMYK")):
        photo.convert(mode).save(f"images/{name}.jpg", quality=95)
    photo.rotate(90, expand=True).save("images/3.jpg", quality=95, exif=exif)
    x, _, _ = load("images", (24, 24))
    exact = torch.tensor(np.array(photo.crop((0, 100, 400, 500)).resize((24, 24), Image.BICUBIC)))
    assert (x.float() - exact.permute(2, 0, 1).float()).abs().max() < 8

# ------------------------------------------------------------------------------------ ddpm_conditional_cfg.py

@pytest.mark.parametrize("w", [-1, -0.5, 0, 1, 4])
def test_cfg_guided_score_of_gaussian_classes(w):
    """Each guidance gives the score of p(x_t | y) p(y | x_t)^w; N(m_y, v I) data, three classes alike."""
    s, m, v, evaluated = make_schedule("linear", 100), randn(3, 2, seed=1), 0.3, []
    labelled = []
    x, t, y = randn(60, 2), torch.arange(1, 61), torch.arange(60) % 3
    def log_p(x, t):  # log p(x_t, y) + c, (B, 3)
        ab = s.alpha_bar[t][:, None]
        away = x[:, None] - ab[..., None].sqrt() * m  # (B, 3, 2)
        return -away.square().sum(2) / (2 * (ab * v + 1 - ab))
    def exact(x, t, y, w):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_joint = log_p(x, t)
            log_tilted = (1 + w) * log_joint[range(len(y)), y] - w * log_joint.logsumexp(1)
            return -(1 - s.alpha_bar[t]).sqrt()[:, None] * torch.autograd.grad(log_tilted.sum(), x)[0]
    def eps_theta(x, t, y):  # y = 3 is no class: w = -1
        evaluated.append(len(x))
        labelled.append((y < 3).all().item())
        return exact(x, t, y % 3, -(y == 3).double())
    expected = exact(x, t, y, w)
    assert cfg.guided(eps_theta, y, 3, w)(x, t).allclose(expected, rtol=1e-10, atol=1e-12)
    assert evaluated == [60 if w in (-1, 0) else 120]  # one evaluation per example where one is enough
    for kind, conditional in (("classifier", False), ("both", True)):  # from ε_θ(x, ∅), or from ε_θ(x, y)
        for steer in (partial(cfg.classifier_guided, conditional=conditional), partial(cfg.guide, kind)):
            with torch.no_grad():  # as in a sampler
                steered = steer(eps_theta, log_p, s, y, 3, w)(x, t)
            assert steered.allclose(expected, rtol=1e-10, atol=1e-12) and not steered.requires_grad
            assert labelled[-1] == conditional
    assert set(evaluated[1:]) == {60}
    assert cfg.guide("free", eps_theta, None, s, y, 3, w)(x, t).allclose(expected, rtol=1e-10, atol=1e-12)

def test_cfg_network_is_the_unet_moved_by_labels():
    torch.manual_seed(0)
    net = cfg.make_eps_theta(args_of(cfg, "--quick"), (1, 8, 8)).requires_grad_(False)
    for p in net.parameters():  # none at 0, where the last layer starts
        p.add_(0.1 * torch.randn_like(p))
    x, t, y = randn(4, 1, 8, 8).float(), torch.tensor([1, 10, 500, 1000]), torch.tensor([0, 3, 9, 3])
    eps_y, eps_null = net(x, t, y), net(x, t, torch.full((4,), 10))
    assert (eps_y - eps_null).abs().amax((1, 2, 3)).min() > 1e-3
    eps = {w: cfg.guided(net, y, 10, w)(x, t) for w in (-1, 0, 0.5, 1, 4)}
    assert torch.equal(eps[0], eps_y) and torch.equal(eps[-1], eps_null)
    assert all(eps[w].allclose((1 + w) * eps_y - w * eps_null, rtol=1e-4, atol=1e-4) for w in eps)
    net.label.weight.zero_()
    assert torch.equal(net(x, t, y), cfg.UNet.forward(net, x, t))
    classifier = cfg.make_classifier(args_of(cfg, "--quick"), (1, 8, 8))  # starts at the mean of the middle
    h, _ = classifier.encode(x, classifier.embedding(t))
    assert classifier(x, t).allclose(classifier.head(h.mean((2, 3)))) and classifier(x, t).shape == (4, 10)
    assert classifier.conv_in.out_channels == 8  # half as wide

def test_cfg_labels():
    """Out of range is refused; each is dropped by itself; every row is trained, the null token's too."""
    for y in (torch.tensor([0, 10]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
            cfg.classifier_guided(None, None, None, y, 10, 1)  # which leaves it to guided
    torch.manual_seed(0)
    y = torch.arange(10).repeat(10_000)
    dropped = cfg.drop_labels(y, 10, 0.3)
    assert torch.equal(dropped[dropped != 10], y[dropped != 10]) and agree((dropped == 10).double(), 0.3)
    assert (cfg.drop_labels(y, 10, 1) == 10).all() and torch.equal(cfg.drop_labels(y, 10, 0), y)
    run(cfg, f"--quick --p-uncond=0.2 --steps=4 --out=. {FEW[cfg]}")
    torch.manual_seed(0)
    before = cfg.make_eps_theta(args_of(cfg, "--quick"), (1, 8, 8)).state_dict()["label.weight"]
    assert (read("checkpoint.pt")["net"]["label.weight"] - before).abs().amax(1).min() > 1e-4

@pytest.mark.parametrize("p_uncond, kept", [
    (0, {"free": [0], "both": [-1, 0, 2]}), (1, {"free": [-1], "classifier": [-1, 0, 2]})])
def test_cfg_draws_what_it_has_learned(p_uncond, kept, capsys, monkeypatch):
    """Without ∅ no ε(x, ∅), without labels no ε(x, y); and each row is drawn by its own kind and w."""
    drawn, left = {}, []
    monkeypatch.setattr(cfg, "draw_rows", lambda path, *table: drawn.update({path.name: table}))
    monkeypatch.setattr(cfg, "leave_torchrun", lambda: left.append(files(".")))
    flags = "--w -1 0 2 --guidance free classifier both --num-samples=70 --sampling-steps=2"
    m = run(cfg, f"--quick --channels=8 --steps=2 --p-uncond={p_uncond} --out=. {flags}")
    rows, columns = drawn["samples.png"]
    titles = [f"{kind}, w = {w}" for kind in kept for w in kept[kind]]
    assert [title for title, _ in rows] == ["data", *titles] and columns == list("0123456789") * 2
    (x, y), _, _ = cfg.load_data("digits", "")
    assert len(rows[0][1].unique(dim=0)) == 20  # two of each class
    assert all(y[(x == image).flatten(1).all(1)] == k % 10 for k, image in enumerate(rows[0][1]))
    assert left == [{"checkpoint.pt", "classifier.pt"}]  # after all training, before the weights
    assert [row["w"] for row in m["sweep"]] == kept.pop("free")
    for kind, w in kept.items():
        assert [row["w"] for row in m[f"sweep_{kind}"]] == w
    assert "only these can be drawn: ('free', " in capsys.readouterr().out
    assert m.keys() & {"sweep_both", "sweep_classifier"} == {f"sweep_{kind}" for kind in kept}

def test_cfg_is_the_same_without_its_classifier(fails, no_pictures, capsys):
    """The U-Net of a seed does not depend on --guidance; --checkpoint draws what it can, by rising w."""
    few = "--w 1 -1 --num-samples=10 --sampling-steps=2"
    for out, kinds in (("a", "free"), ("b", "classifier free")):
        run(cfg, f"--quick --channels=4 --steps=4 --out={out} {few} --guidance {kinds}")
    assert_one_run("a/checkpoint.pt", "b/checkpoint.pt")
    fails(cfg, "--checkpoint=a/checkpoint.pt --guidance both", "both needs a/classifier.pt, which --resume")
    Path("b/classifier.pt").unlink()  # as after Ctrl-C, or if weights.pt was copied
    m = run(cfg, f"--checkpoint=b/weights.pt --out=c {few}")
    assert [row["w"] for row in m["sweep"]] == [-1, 1] and "sweep_classifier" not in m
    assert "only these can be drawn: ('free', -1" in capsys.readouterr().out

def test_cfg_refuses_other_classes(fails, no_pictures):
    write_images("images/cat/0.png", "images/cat/1.png", "images/dog/2.png", "images/dog/3.png")
    run(cfg, f"--dataset=images --quick --channels=8 --steps=2 --out=a {FEW[cfg]}")
    write_images("images/ant/4.png")
    for flags in ("--resume --out=a --steps=4", "--checkpoint=a/checkpoint.pt"):
        fails(cfg, flags, "images has other classes than the checkpoint: cat, dog")

# ------------------------------------------------------------------------------------- sohl_dickstein_2015.py

def gaussian_moments(xt, alpha_bar):
    """The moments for x_0 ~ N(0, I)."""
    return alpha_bar.sqrt() * xt, (1 - alpha_bar)[..., None] * torch.eye(xt.shape[1]).to(xt)

@every_schedule
def test_K_of_an_isotropic_gaussian_is_its_log_likelihood(name):
    """As the authors' code notes: the gain over L_null is 0. One KL, written out:
    KL(N(μ, σ² I) || N(m, σ² M I)) = ½ [D / M + |m - μ|² / (σ² M) - D + D log M], of which the first three
    cancel in expectation."""
    s, D, K, x0 = make_schedule(name, 40), 3, 0, randn(4000, 3)
    for t in range(2, 41):
        ts = torch.full((len(x0),), t)
        torch.manual_seed(t)
        kl, entropies = sohl.bound(sohl.GAUSSIAN, s, gaussian_moments, x0, ts)
        torch.manual_seed(t)
        xt = sohl.gaussian_q(x0, extract(s.alpha_bar, ts, x0)).rsample()
        M = 1 + (s.snr[t - 1] - s.snr[t]) * (1 - s.alpha_bar[t])
        (m, sigma2), (mu, _) = (s.q_posterior(x, xt, ts) for x in (s.alpha_bar[t].sqrt() * xt, x0))
        delta = ((m - mu) ** 2 / sigma2).sum(1)
        assert (2 * math.log(2) * kl).allclose((D + delta) / M - D + D * M.log(), atol=1e-9)
        assert agree(kl, D * M.log2() / 2)
        K -= D * M.log2() / 2
    L_null = -D / 2 * math.log2(2 * math.pi * math.e)
    assert entropies.unique() == entropies[0] and (K + entropies[0]).item() == pytest.approx(L_null, rel=1e-9)

def test_gaussian_p_is_the_posterior_and_a_new_network_the_null_model():
    s, t = make_schedule("cosine", 40), torch.tensor([2, 3, 20, 39, 40])
    x0, xt = randn(5, 2), randn(5, 2, seed=1)
    mu, beta_tilde = s.q_posterior(x0, xt, t)
    known = x0, torch.zeros(5, 2, 2).double()
    for p in (sohl.gaussian_posterior(s, xt, t, x0), sohl.gaussian_p(s, xt, t, known)):
        assert p.mean.allclose(mu)
        assert p.covariance_matrix.allclose(beta_tilde[:, None] * torch.eye(2).double())
    net, alpha_bar = sohl.RollNet(sohl.start_beta("learned", 40), width=16), torch.rand(5, 1).double()
    for ours, null in zip(net(xt, alpha_bar), gaussian_moments(xt, alpha_bar)):
        assert ours.allclose(null, atol=1e-12)
    nn.init.constant_(net.layers[-1].bias, 0.5)  # g = 0.5, and S is the square of a triangle
    x0_hat, S = net(xt[:1], torch.tensor([[0.3]]).double())
    L = torch.tensor([[math.exp(0.5), 0], [0.5, math.exp(0.5)]])
    assert S[0].float().allclose(0.7 * L @ L.T)
    assert x0_hat.allclose(math.sqrt(0.3) * xt[:1] + math.sqrt(0.7) * 0.5)

def log_q(density, x, alpha_bar=1.0):
    """log q(x_t), nats: a mixture of Gaussians about √ᾱ m_j of variances ᾱ v + 1 - ᾱ.  (B, 2) -> (B,)"""
    m, v = density[0] * alpha_bar ** 0.5, density[1] * alpha_bar + 1 - alpha_bar
    parts = -((x[:, None] - m) ** 2 / (2 * v)).sum(2)
    return parts.logsumexp(1) - math.log(len(m) * 2 * math.pi) - v.log().sum() / 2

def test_exact_moments_are_tweedies():
    """x̂_0 and S against the gradient and Hessian of log q(x_t), and so the score that is made of x̂_0."""
    s, density = make_schedule("geometric", 40), sohl.roll_density(0.5)
    x0 = density[0][::90]
    for t in (3, 20, 35):
        x, ab = s.q_sample(x0, t, randn(len(x0), 2)).requires_grad_(), s.alpha_bar[t]
        gradient, = torch.autograd.grad(log_q(density, x, ab).sum(), x, create_graph=True)
        rows = (torch.autograd.grad(g.sum(), x, retain_graph=True)[0] for g in gradient.unbind(1))
        hessian = torch.stack(list(rows), 1)
        x0_hat, S = sohl.exact_moments(density, x, ab.expand(len(x), 1))
        assert sohl.score(x0_hat, x, ab.expand(len(x), 1)).allclose(gradient, rtol=1e-6, atol=1e-6)
        assert S.allclose((1 - ab) / ab * (torch.eye(2) + (1 - ab) * hessian), rtol=1e-5, atol=1e-8)

def test_roll_density_and_its_bound():
    """The density is scikit-learn's; with the true moments K is below -H(X), and near it if T is large."""
    density, x0 = sohl.roll_density(0.5), sohl.draw_roll(20000, 0.5, 0)
    assert x0.mean(0).abs().max() < 0.03 and (x0.var(0) - 1).abs().max() < 0.03
    bits = log_q(density, x0[:2000]) / math.log(2)
    assert agree(bits, sohl.negative_entropy(density))
    for beta, least in ((sohl.start_beta("learned", 200), -0.2), (SCHEDULES["cosine"](40)[1:], -9)):
        s = Schedule(torch.cat([torch.zeros(1), beta]))
        K_of = partial(sohl.evaluate, sohl.GAUSSIAN, s, moments := partial(sohl.exact_moments, density))
        K, taken = K_of(x0[:500])
        _, entropies = sohl.bound(sohl.GAUSSIAN, s, moments, x0[:1], torch.tensor([2]))
        assert K.mean().item() == pytest.approx((entropies - taken.sum()).item(), rel=1e-9)
        assert K_of(x0[:500])[0].equal(K) and not K_of(x0[:500], 2)[0].equal(K)  # its own seed
        gain = K - bits[:500]  # each K estimates a bound on its own log q(x_0)
        assert least < gain.mean() < 4 * gain.std() / 500 ** 0.5
        assert len(taken) == s.T - 1 and taken.min() > -0.01

def test_posterior_sampler_on_a_gaussian():
    """p = N(0, I), r = N(y; x_0, 1 / precision): p r / Z = N(a y, 1 - a), a = precision / (1 + precision)."""
    torch.manual_seed(0)
    s, y, precision = make_schedule("cosine", 100), torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])
    moments = partial(sohl.given, gaussian_moments, y, precision)
    *_, (t, x) = sohl.reverse(sohl.GAUSSIAN, s, moments, randn(20000, 2))
    assert t == 0 and ((x.mean(0) - torch.tensor([0.75, 0.0])).abs() < 0.03).all()
    assert ((x.var(0) - torch.tensor([0.25, 1.0])).abs() < 0.04).all()
    S, x = torch.tensor([[2, 0.9], [0.9, 1]]).double(), randn(3, 2)
    mean, covariance = sohl.given(lambda xt, _: (xt, S.expand(3, 2, 2)), y, precision, x, None)  # correlated
    C = torch.linalg.inv(torch.linalg.inv(S) + precision.diag())
    assert covariance.allclose(C) and mean.allclose(x + (precision * (y - x)) @ C)
    s = make_schedule("constant", 5)  # the last step is a forward step: x_0 keeps √α_1 of x_1
    *_, (_, x_1), (_, x) = sohl.reverse(sohl.GAUSSIAN, s, gaussian_moments, randn(20000, 2))
    assert (x * x_1).mean() == pytest.approx(s.alpha[1].sqrt().item(), abs=0.03) and abs(x.var() - 1) < 0.03

def test_samplers_keep_no_graph():
    graphs, net = [], sohl.RollNet(sohl.start_beta("learned", 5), True, 8)
    def moments(xt, alpha_bar):
        graphs.append(net(xt, alpha_bar)[0].requires_grad)
        return net(xt, alpha_bar)
    s = sohl.schedule_of(net)
    for _ in sohl.reverse(sohl.GAUSSIAN, s, moments, randn(3, 2)):
        assert torch.is_grad_enabled()
    assert graphs == [False] * 4
    sohl.evaluate(sohl.GAUSSIAN, s, moments, randn(3, 2))
    sohl.entropy_of_step(sohl.GAUSSIAN, s, moments, randn(3, 2), torch.tensor([2, 3, 4]))
    assert not any(graphs)

def test_binomial_bound_by_enumeration(monkeypatch):
    """Eq. (14) against its definition, K = E_q log p(x_T) Π p(x_{t-1} | x_t) / q(x_t | x_{t-1}), over the
    states of two bits, and q(x_{t-1} | x_t, x_0) against Bayes' rule.  Tables: [x_t, x_{t-1}, x_0]"""
    monkeypatch.setattr(sohl, "RHO", rho := 0.5)  # the rate of these data, as 0.2 is the heartbeats'
    s, bit = make_schedule("inverse", 3), torch.tensor([0.0, 1.0]).double()
    states = torch.cartesian_prod(bit, bit)
    data = states[1:3]  # (0, 1) and (1, 0)
    def B(x, rate):
        return torch.where(x == 1, rate, 1 - rate).prod(-1)
    def table(p):  # probabilities of the states, rows, by each of a batch of distributions
        return p.log_prob(states[:, None]).exp()
    def predict(xt, alpha_bar):
        w = B(xt[:, None], alpha_bar[0] * (data - rho) + rho)
        return w / w.sum(1, keepdim=True) @ data
    K, eq14, bands = 0, 0, []
    jump = torch.eye(4)[:, 1:3].double()  # q(x_t | x_0), from t = 0
    for t in (1, 2, 3):
        ts, q = torch.full((4,), t), B(states[:, None], (1 - s.beta[t]) * states + s.beta[t] * rho)
        joint = q[..., None] * jump  # q(x_t, x_{t-1} | x_0)
        p = q  # under the noise, the step t = 1 is its own reverse
        if t > 1:
            bayes = joint / joint.sum(1, keepdim=True)
            for k in (0, 1):
                for f in (sohl.binomial_posterior, sohl.binomial_p):
                    assert table(f(s, states, ts, data[[k] * 4])).allclose(bayes[..., k].T)
            p = table(sohl.binomial_p(s, states, ts, predict(states, extract(s.alpha_bar, ts, states))))
            eq14 -= (joint * (bayes / p.T[..., None]).log()).sum() / 2
            both = joint.mean(2)  # q(x_t, x_{t-1})
            known = -(both * (both / both.sum(1, keepdim=True)).log2()).sum()
            x0 = data.repeat(20000, 1)
            torch.manual_seed(0)
            many = torch.full((len(x0),), t)
            left, middle, right = sohl.entropy_of_step(sohl.BINOMIAL, s, predict, x0, many)
            ours = -(both.sum(1) * (p.T * p.T.log2()).sum(1)).sum()
            bands.append((left.mean(), known, ours, right.mean()))
            H = [-(v * v.log2()).sum(0).mean() for v in (q[..., None] * torch.ones(2), jump, q @ jump)]
            assert agree(middle, ours) and agree(right, H[0]) and agree(left, H[0] + H[1] - H[2])
        K += (joint * (p.T / q).log()[..., None]).sum() / 2
        jump = q @ jump
        assert table(sohl.binomial_q(data, s.alpha_bar[torch.tensor([[t]])])).allclose(jump)
    assert all(left < known < ours < right + 1e-9 for left, known, ours, right in bands)
    K += (jump.mean(1) * B(states, torch.full_like(states, rho)).log()).sum()
    entropies = sohl.bound(sohl.BINOMIAL, s, predict, data, torch.tensor([3, 3]))[1].mean() * math.log(2)
    assert (eq14 + entropies).item() == pytest.approx(K.item(), rel=1e-9) and K <= -math.log(2) + 1e-12
    torch.manual_seed(0)
    estimate, _ = sohl.evaluate(sohl.BINOMIAL, s, predict, data.repeat(20000, 1))
    assert agree(estimate * math.log(2), K)

@every_schedule
def test_entropies_of_steps_of_a_gaussian(name):
    """Eq. (24) where all is known: x_0 ~ N(0, diag(v)), so x_{t-1} given x_t is Gaussian."""
    s, v = make_schedule(name, 30), torch.tensor([1.0, 0.3, 0.01]).double()
    def moments(xt, alpha_bar):
        gain = alpha_bar.sqrt() * v / (alpha_bar * v + 1 - alpha_bar)
        return gain * xt, torch.diag_embed(v * (1 - alpha_bar.sqrt() * gain))
    def H(variance):
        return (2 * math.pi * math.e * variance * torch.ones(3).double()).log2().sum() / 2
    x0 = randn(50, 3) * v.sqrt()
    for t in range(2, 31):
        ts = torch.full((50,), t)
        left, ours, right = (h.double() for h in sohl.entropy_of_step(sohl.GAUSSIAN, s, moments, x0, ts))
        before = s.alpha_bar[t - 1] * v + 1 - s.alpha_bar[t - 1]  # the variance of x_{t-1}
        now = s.alpha_bar[t] * v + 1 - s.alpha_bar[t]
        known = H(s.beta[t] * before / now)  # the variance of x_{t-1} given x_t
        assert ours.allclose(known, atol=1e-9)
        assert right.allclose(H(s.beta[t]), atol=1e-9) and left.allclose(H(s.beta_tilde[t]), atol=1e-9)
        assert (left <= known).all() and (known <= right).all()
        drawn = randn(5000, 3, seed=t) * v.sqrt()
        kl, _ = sohl.bound(sohl.GAUSSIAN, s, moments, drawn, torch.full((5000,), t))
        assert agree(kl, (known - left[0]).item())  # the KL is the distance from the left, as p is exact

def test_valid_share():
    good = sohl.HEARTBEATS[[0, 1, 4, 4]]
    assert sohl.valid_share(good) == 1
    for i in (0, 7, 19):  # one wrong bit, either way
        bad = good.clone()
        bad[1, i] = 1 - bad[1, i]
        assert sohl.valid_share(bad) == 0.75
    assert sohl.valid_share(torch.zeros(3, 20).double()) == sohl.valid_share(torch.ones(3, 20).double()) == 0
    assert sohl.valid_share(torch.cat([good, bad])) == 7 / 8
    assert sohl.HEARTBEATS.sum(1).eq(4).all() and sohl.HEARTBEATS[:, :15].equal(sohl.HEARTBEATS[:, 5:])

def test_wasserstein():
    a = randn(500, 2)
    assert sohl.wasserstein(a, a[torch.randperm(500)]) == 0
    assert sohl.wasserstein(a, a + torch.tensor([0.1, -0.7])) == pytest.approx(0.7)

def test_sohl_trains_by_train_step(no_pictures):
    flags = "--quick --steps=6 --T=5 --num-samples=2000 --out=a"
    run(sohl, flags)
    args = args_of(sohl, flags)
    torch.manual_seed(args.seed)
    net = sohl.RollNet(sohl.start_beta(args.schedule, args.T), True, args.width)
    data = sohl.draw_roll(400_000, args.noise, args.seed + 1)
    opt = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), maximize=True)
    for step in range(6):
        opt.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * step / 6)) / 2
        sohl.train_step(sohl.GAUSSIAN, net, opt, data[torch.randint(len(data), (args.batch,))])
    assert_close(read("a/checkpoint.pt")["net"], net.state_dict(), rtol=0, atol=0)

@pytest.mark.parametrize("scale", [1, 100])  # 100: data so wide that the gradient is clipped
def test_train_step_written_out(scale):
    def start():
        torch.manual_seed(0)
        net, x0 = sohl.RollNet(sohl.start_beta("learned", 10), True, 8), scale * sohl.draw_roll(64, 0.1, 0)
        return net, torch.optim.Adam(net.parameters(), 0.01, maximize=True), x0
    net, opt, x0 = start()
    K = sohl.train_step(sohl.GAUSSIAN, net, opt, x0)
    other, _, x0 = start()
    t = torch.randint(2, 11, (64,))
    assert t.min() == 2 and t.max() == 10
    s = Schedule(torch.cat([torch.zeros(1).double(), other.logits.sigmoid()]))
    kl, entropies = sohl.bound(sohl.GAUSSIAN, s, other, x0, t)
    K_other = entropies.mean() - 9 * kl.mean()
    assert K.item() == pytest.approx(K_other.item(), rel=1e-12) and not K.requires_grad
    names, parameters = zip(*other.named_parameters())
    gradients = list(torch.autograd.grad(K_other, parameters))
    gradients[names.index("logits")][0] = 0  # β_1 is fixed
    norm = sum(g.double().square().sum() for g in gradients).sqrt()
    assert (norm > 100) == (scale == 100)
    for name, before, g in zip(names, parameters, gradients):
        g = g * min(1, 100 / (norm.item() + 1e-6))
        after = before + 0.01 * g / (g.abs() + 1e-8)  # Adam's first step; up: gradient ascent
        assert net.get_parameter(name).allclose(after, atol=1e-6), name
        assert net.get_parameter(name).grad.allclose(g, rtol=1e-4, atol=1e-7), name
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(FloatingPointError):
        sohl.train_step(sohl.GAUSSIAN, net, opt, math.nan * x0)
    assert_close(net.state_dict(), before, rtol=0, atol=0)

def sohls_first_act_on(kind, s, make, device):
    """Every function of the first act, on a device: nothing of another in the middle of a formula."""
    s.to(device)
    with torch.device(device):
        net, x0 = make(s.beta[1:]), (torch.rand(4, 20 if kind is sohl.BINOMIAL else 2) > 0.5).double()
        t = torch.randint(2, 6, (4,))
    kl, entropies = sohl.bound(kind, s, net, x0, t)
    if device == "meta":  # autograd asks a driver about fake ones
        (entropies - kl).mean().backward()
    outputs = [kl, entropies, *sohl.entropy_of_step(kind, s, net, x0, t)]
    outputs += [x for _, x in sohl.reverse(kind, s, net, x0)]
    ab = extract(s.alpha_bar, t, x0)
    if kind is sohl.GAUSSIAN:
        y, precision = torch.zeros(2).to(x0), torch.ones(2).to(x0)
        outputs += [*sohl.given(net, y, precision, x0, ab), sohl.score(net(x0, ab)[0], x0, ab)]
    assert all(x.device.type == device and x.dtype == torch.float64 for x in outputs)

@needs_fake_cuda
@pytest.mark.parametrize("kind, make", [(sohl.GAUSSIAN, partial(sohl.RollNet, width=8)),
                                        (sohl.BINOMIAL, partial(sohl.HeartbeatNet, width=8))])
def test_no_device_is_mixed(kind, make):
    sohls_first_act_on(kind, make_schedule("cosine", 6), make, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        s = Schedule.__new__(Schedule)
        s.T = 6
        for name in ("beta", "alpha", "alpha_bar", "snr", "beta_tilde"):
            setattr(s, name, torch.rand(7, dtype=torch.float64))
        sohls_first_act_on(kind, s, make, "cuda")

def test_sohl_quick(quick):
    (out, roll, _), (_, heartbeat, _) = quick(sohl), quick(sohl, HEARTBEAT)
    assert -6 < roll["K_bits"] < roll["ceiling_bits"] == pytest.approx(2.703, abs=0.001)
    assert roll["K_minus_L_null_bits"] == pytest.approx(roll["K_bits"] + 4.094, abs=0.001)
    assert heartbeat["K_bits_per_sequence"] < heartbeat["true_bits_per_sequence"]
    assert heartbeat["L_null_bits"] == pytest.approx(20 * (0.2 * math.log2(0.2) + 0.8 * math.log2(0.8)))
    assert 0 <= heartbeat["valid_share"] <= 1
    told = {f"score_error_t{t}" for t in (2, 10, 20, 30, 40)} | {f"K_ideal_bits_{s}" for s in SCHEDULES}
    assert told <= roll.keys()
    moved = read(out / "checkpoint.pt")["net"]["logits"] - sohl.start_beta("learned", 40).logit()
    assert moved[0] == 0 and (moved[1:] != 0).all()  # every β learns, but the first

def test_what_sohl_measures(monkeypatch):
    """K's mean and standard error over fresh data, on which the network is not trained."""
    seeds, evaluated, draw, evaluate = [], [], sohl.draw_roll, sohl.evaluate
    monkeypatch.setattr(sohl, "FuncAnimation", lambda *_: types.SimpleNamespace(save=lambda *_: None))
    monkeypatch.setattr(sohl, "draw_roll", lambda *args: seeds.append(args[::2]) or draw(*args))
    def record(*args):
        evaluated.append(evaluate(*args)[0])
        return evaluate(*args)
    monkeypatch.setattr(sohl, "evaluate", record)
    m = run(sohl, "--quick --steps=2 --T=5 --seed=3 --num-samples=2000 --out=a")
    assert seeds == [(400_000, 4), (2000, 5), (2_000_000, 1)]
    K = evaluated[0]
    assert len(K) == 2000 and m["K_bits"] == K.mean()
    assert m["K_stderr_bits"] == pytest.approx(K.std().item() / 2000 ** 0.5)
    assert m["network_loses_bits"] == pytest.approx((evaluated[1] - evaluated[2]).mean().item())

# --------------------------------------------------------------------------------- whole runs of every script

@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """quick(script, flags): the folder that --quick has filled, its numbers, its words. Each is run once."""
    @cache
    def once(script, flags):
        if "mnist" in flags:
            write_mnist()
        out = tmp_path_factory.mktemp("quick") / "out"
        with contextlib.redirect_stdout(io.StringIO()) as told:
            return out, run(script, f"--quick --out={out} {flags}"), told
    return lambda script, flags="": once(script, flags)  # of which cache sees two arguments

@pytest.fixture
def fails(capsys):
    """fails(script, flags, pattern): a run ends with status 2, one such line, no usage, and no folder."""
    def check(script, flags, pattern):
        before = sorted(Path().rglob("*"))
        with pytest.raises(SystemExit) as e:
            run(script, flags)
        err = capsys.readouterr().err
        line, = [line for line in err.splitlines() if "error: " in line]
        assert e.value.code == 2 and line.startswith("error: ") and re.search(pattern, line), line
        assert "usage" not in err and sorted(Path().rglob("*")) == before
    return check

@pytest.fixture
def no_pictures(monkeypatch):
    """Where they are not what is tested: empty files in their place, in a tenth of the time."""
    for script in (ddpm, cfg):
        monkeypatch.setattr(script, "draw_rows", lambda path, *_: path.touch())
    monkeypatch.setattr(ddpm, "draw_all", lambda *_: None)
    monkeypatch.setattr(sohl, "roll_experiments", lambda *_: {})

MNIST = "--dataset=mnist --data-dir=mnist --steps=3"
SMALL_MNIST = f"{MNIST} --channels=8 --num-samples=70"
TWO_CLASSES = "--num-samples=5 --sampling-steps=2 --w=2 --classes=3,7"
ANY_KEYS = "script dataset seed device torch steps params seconds_train seconds_total "
DDPM_KEYS = ANY_KEYS + "loss frechet frechet_floor confident_share rarest_class_share images_per_second"
DDPM_FILES = "samples.npz samples.png progressive.png reverse.gif loss.png weights.pt training.png"
CFG_KEYS = ANY_KEYS + "frechet_floor label_accuracy_real"
CFG_FILES = "samples.npz samples.png weights.pt classifier.pt training.png"
SOHL_KEYS = ANY_KEYS + "L_null_bits K_stderr_bits "

@pytest.mark.parametrize("script, flags, keys, written, again", [
    (ddpm, "", DDPM_KEYS, DDPM_FILES, "--num-samples=100"),
    (ddpm, SMALL_MNIST, DDPM_KEYS, DDPM_FILES, "--num-samples=70"),
    (cfg, "", CFG_KEYS, CFG_FILES + " tradeoff.png", "--num-samples=100"),
    (cfg, f"{MNIST} {TWO_CLASSES}", ANY_KEYS, CFG_FILES, TWO_CLASSES),
    (sohl, "", SOHL_KEYS + "ceiling_bits", "bound.png swiss_roll.png posteriors.png reverse.gif", ""),
    (sohl, HEARTBEAT, SOHL_KEYS + "valid_share", "", "")])
def test_quick_run_and_the_same_from_its_checkpoint(quick, script, flags, keys, written, again, capsys):
    out, m, told = quick(script, flags)
    config, told = m["config"], told.getvalue()
    assert m == json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert set(keys.split()) <= m.keys() and files(out) == {"metrics.json", "checkpoint.pt", *written.split()}
    assert f"--checkpoint {out}/checkpoint.pt\n" in told
    assert f"{script.__name__}.py --resume --out {out} --steps {2 * config['steps']}\n" in told
    # From the file alone, where no data are, the same numbers and images come back.
    shutil.rmtree("mnist", ignore_errors=True)
    again = run(script, f"--checkpoint={out}/checkpoint.pt --out=again {again}")
    assert ("nothing to compare samples with" in capsys.readouterr().out) == ("mnist" in flags)
    def untimed(value):
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if "second" not in k}
        return [untimed(v) for v in value] if isinstance(value, list) else value
    same = untimed(again).keys() - {"config"}
    assert all(untimed(again)[k] == untimed(m)[k] for k in same)
    assert ("frechet_floor" in same) == (script is not sohl and not flags)
    of_training = {"checkpoint.pt", "weights.pt", "training.png", "classifier.pt"}
    assert files(out) - files("again") == files(out) & of_training
    drawn = args_of(script, f"--checkpoint={out}/{'checkpoint' if script is sohl else 'weights'}.pt")
    assert drawn.out == f"runs/{script.__name__}-{m['dataset']}-samples" and not drawn.quick
    resumed = vars(args_of(script, f"--resume --out={out}"))  # what a run was told is told once
    kept = {"T", "steps", "schedule", "lr", "batch", "dataset", "data_dir", "noise", "attention"}
    assert all(resumed[k] == config[k] for k in config.keys() & kept)
    if script is sohl:
        assert f"T = {config['T']}, schedule {config['schedule']}\n" in told and f"results in {out}\n" in told
        return
    assert re.search(r"(1347|150) images of 10 classes, (450|150) held out; .* cpu, (b?float)(32|16)\n", told)
    epochs = config["steps"] * config["batch"] / (150 if flags else 1347)
    assert f"{config['steps']} steps of {config['batch']} ({epochs:.1f} epochs)" in told
    arrays, others = (np.load(folder / "samples.npz") for folder in (out, Path("again")))
    assert all(np.array_equal(arrays[k], others[k]) for k in arrays) and drawn.num_samples == 64
    n, side, images = config["num_samples"], 28 if flags else 8, arrays["arr_0"]
    assert images.shape == (n, side, side, 1) and images.dtype == np.uint8 and images.std() > 0
    assert script is ddpm or arrays["arr_1"].tolist() == ([3, 7] * n if flags else list(range(10)) * n)[:n]
    assert (out / "weights.pt").stat().st_size < (out / "checkpoint.pt").stat().st_size / 5

@both
def test_numbers_of_a_quick_run(quick, script):
    """Computed once more from what it has left: judge, samples and checkpoint."""
    (out, m, _), (train, held_out, _) = quick(script), ddpm.load_data("digits", "")
    losses, loaded = read(out / "checkpoint.pt")["losses"], np.load(out / "samples.npz")
    images, judge = torch.tensor(loaded["arr_0"]).permute(0, 3, 1, 2), ddpm.train_judge(*train, 10, 30)
    args, ema = args_of(script, f"--checkpoint={out}/checkpoint.pt"), read(out / "checkpoint.pt")["ema"]
    net = script.make_eps_theta(args, (1, 8, 8)).eval()
    net.load_state_dict(ema)  # the average draws, not the last weights, and is what weights.pt keeps
    theta = net if script is ddpm else cfg.guided(net, torch.arange(50) % 10, 10, 0)
    drawn, _ = script.sample([(theta, 50)] * 2, make_schedule(args.schedule, args.T), args, (1, 8, 8))
    assert torch.equal(drawn, images)
    assert all(torch.equal(v, ema[name].half()) for name, v in read(out / "weights.pt")["ema"].items())
    f, f_held = ddpm.features_of(judge, images), ddpm.features_of(judge, held_out[0])
    shown = ddpm.some_of(train[0], 100, 0)
    if script is cfg:
        shown = cfg.examples((train, held_out, None), torch.tensor(loaded["arr_1"]), 0)
    floor = ddpm.frechet_distance(ddpm.features_of(judge, shown), f_held)
    assert len(losses) == 30 and (losses > 0).all() and m["frechet_floor"] == pytest.approx(floor, rel=1e-4)
    kept = m if script is ddpm else m["sweep"][1]  # the samples of w = 0
    assert kept["frechet"] == pytest.approx(ddpm.frechet_distance(f, f_held), rel=1e-4)
    if script is ddpm:
        assert m["loss"] == losses[-1].item() < 0.9
        assert m["images_per_second"] == pytest.approx(30 * 128 / m["seconds_train"])
        return
    scores = cfg.class_scores(judge[1](f).double().log_softmax(1), torch.tensor(loaded["arr_1"]))
    assert {key: kept[key] for key in scores} == {key: pytest.approx(scores[key], rel=1e-4) for key in scores}
    for sweep in (m["sweep"], m["sweep_classifier"]):
        assert [row["w"] for row in sweep] == [-1, 0, 0.1, 0.3, 1, 4]
        keys = {"w", "seconds", "frechet", "classifier_score", "label_accuracy"}
        assert all(row.keys() == keys and row["seconds"] > 0 for row in sweep)
        assert all(1 <= row["classifier_score"] <= 10 for row in sweep)
    free, classifier = ([row["frechet"] for row in m[name]] for name in ("sweep", "sweep_classifier"))
    assert free[0] == classifier[0]  # w = -1: the unconditional model, twice
    assert free[5] != classifier[5]

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("script, flags", [
    (ddpm, "--experiments"), (ddpm, "--sampler=langevin --no-bf16"), (ddpm, "--predict=mu --loss=vlb"),
    (ddpm, "--compile"), (cfg, "--guidance free classifier both"), (sohl, ""), (sohl, HEARTBEAT)])
def test_on_a_gpu(script, flags):
    run(script, f"--quick --device=cuda --out=a --steps=10 {flags}")
    run(script, "--device=cuda --out=a --resume --steps=12")
    m = run(script, f"--device=cuda --checkpoint=a/checkpoint.pt --out=b {FEW[script]}")
    assert m["steps"] == 12 and m["device"].startswith("cuda")

@both
def test_bfloat16_and_compile(no_pictures, script, monkeypatch):
    """--bf16 on a CPU: from the first loss on other numbers; --compile: both nets."""
    dtypes, compiled = [], []
    forward = script.Attention.forward
    monkeypatch.setattr(script.Attention, "forward",
                        lambda self, h: dtypes.append(h.dtype) or forward(self, h))
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    for flag in ("--bf16", "--no-bf16"):
        run(script, f"--quick --steps=3 --channels=8 {FEW[script]} {flag} --compile --out=a{flag}")
        assert set(dtypes) == {torch.bfloat16 if flag == "--bf16" else torch.float32}
        dtypes.clear()
    assert len(compiled) == 4 and len({id(net) for net in compiled}) == 4
    a, b = read("a--no-bf16/checkpoint.pt"), read("a--bf16/checkpoint.pt")
    assert a["losses"].allclose(b["losses"], rtol=0.05) and not torch.equal(a["losses"], b["losses"])
    assert all(v.dtype == torch.float32 for v in b["net"].values())

def assert_one_run(a, b):
    """Two checkpoints are the same, bit for bit, but for the clock."""
    a, b = read(a), read(b)
    for key in {"net", "ema", "optimizer", "random", "losses", "step"} & a.keys():
        assert_close(a[key], b[key], rtol=0, atol=0)

@pytest.mark.parametrize("script, loss, flags, planned, name", [
    (ddpm, "l_simple", "--channels=8 --dropout=0.1 --flip", 32, "checkpoint.pt"),
    (cfg, "l_cfg", "--channels=8", 32, "checkpoint.pt"),
    (cfg, "l_classifier", "--channels=8 --guidance both", 12, "classifier.pt"),
    (ddpm, "vlb_term", "--channels=8 --loss=vlb --predict=mu", 32, "checkpoint.pt"),
    (sohl, "bound", "--T=5", 12, "checkpoint.pt"),
    (sohl, "bound", "--dataset=heartbeat --T=5", 12, "checkpoint.pt")])
def test_stopped_and_resumed_is_one_run_and_never_lost(monkeypatch, capsys, fails, no_pictures, script, loss,
                                                       flags, planned, name):
    """Ctrl-C in step 5 ends in pictures and a checkpoint, from which the rest is bitwise the same."""
    own = "" if script is sohl else "--warmup=4 --no-decay-lr"
    flags = f"--quick {own} {FEW[script]} {flags}"
    m = run(script, f"{flags} --steps=12 --out=a")
    assert "frechet" not in m  # of so few samples
    calls, original = [], getattr(script, loss)
    def interrupted(*args, **named):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **named)
    monkeypatch.setattr(script, loss, interrupted)
    m = run(script, f"{flags} --steps={planned} --out=b")
    assert read(f"b/{name}")["step"] == 5 and m["steps"] == read("b/checkpoint.pt")["step"]
    said = capsys.readouterr().out
    assert f"stopped at step 5 of {planned}; --resume" in said and files("a") == files("b")
    assert f"--resume --out b --steps {2 * planned if name == 'classifier.pt' else planned}" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert getattr(args_of(script, "--resume --out=b --steps=12"), "warmup", 4) == 4
    torch.save(read(f"b/{name}") | {"seconds": 1000.0}, f"b/{name}")
    few = FEW[script].replace("--guidance=free", "")  # which the checkpoint knows
    m = run(script, f"--resume --steps=12 --out=b {few}")
    assert (m["seconds_train"] > 1000) == (name == "checkpoint.pt") and read(f"b/{name}")["seconds"] > 1000
    assert_one_run(f"a/{name}", f"b/{name}")
    trained = Path("b/checkpoint.pt").read_bytes()
    if "heartbeat" not in flags:  # its sigmoids keep everything finite
        fails(script, "--resume --steps=30 --lr=1e30 --out=b", "no longer finite.*smaller --lr")
    for _ in range(2):  # nothing is overwritten: it is kept as b-1, two runs later too
        run(script, f"{flags} --steps=1 --out=b")
    assert Path("b-1/checkpoint.pt").read_bytes() == trained and read("b-2/checkpoint.pt")["step"] == 1
    assert len(list(Path().glob("b*"))) == 3 and not list(Path().rglob("*.tmp"))

KILLED = """
import importlib, itertools, os, sys, types
script = importlib.import_module(sys.argv[1])
clock, replace, saves = itertools.count(0, 100), os.replace, []
script.time = types.SimpleNamespace(time=lambda: next(clock))  # more than a minute passes in every step
def replace_or_die(a, b):
    saves.append(b)
    if len(saves) == 4:
        os.kill(os.getpid(), 9)
    replace(a, b)
os.replace = replace_or_die
script.main(script.get_args(sys.argv[2:]))"""

def test_processes(monkeypatch, fails, no_pictures):
    """torchrun's two train as one does, in a console of Windows; kill -9 while saving loses one step."""
    flags = "--quick --channels=8 --flip --steps=5 --batch=8 --num-samples=4 --device=cpu --no-bf16"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    shell = partial(subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    of = {ddpm: flags, cfg: f"{flags} --w=1", sohl: f"--quick --steps=5 --T=5 {FEW[sohl]}"}
    jobs = {script: shell([*torchrun, script.__file__, *of[script].split(), f"--out={script.__name__}"])
            for script in (ddpm, cfg)}
    killed = {script: shell([sys.executable, "-c", KILLED, script.__name__, *of[script].split(),
                             f"--out=killed-{script.__name__}"]) for script in (ddpm, sohl)}
    for script in (ddpm, cfg, sohl):
        run(script, f"{of[script]} --out=one-{script.__name__}")
    for script, job in jobs.items():
        out, _ = job.communicate(timeout=200)
        assert job.returncode == 0, out
        trained = ["checkpoint.pt", "classifier.pt"] if script is cfg else ["checkpoint.pt"]
        for file, key in itertools.product(trained, ("net", "ema")):
            one, two = (read(f"{folder}{script.__name__}/{file}")[key] for folder in ("one-", ""))
            assert all(one[name].allclose(two[name], atol=1e-4) for name in one)
    for script, job in killed.items():
        out, _ = job.communicate(timeout=200)
        file = f"killed-{script.__name__}/checkpoint.pt"
        assert job.returncode == -9 and read(file)["step"] == 3, out
        precision = "" if script is sohl else "--no-bf16"
        run(script, f"--resume --out=killed-{script.__name__} {precision} {FEW[script]}")
        assert_one_run(f"one-{script.__name__}/checkpoint.pt", file)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for script in (ddpm, cfg):
        fails(script, "--batch=64", "3, the number of processes")

def test_a_folder_of_images_with_every_experiment_then_guidance(monkeypatch):
    given, experiments = [], ddpm.experiments
    monkeypatch.setattr(ddpm, "experiments", lambda *args: given.append(args[4]) or experiments(*args))
    write_images(*(f"images/{name}/{i}.png" for name in "abc" for i in range(13)))
    size = "--quick --dataset=images --image-size=8x16 --multipliers 1 2 --attention 4 --channels=8"
    m = run(ddpm, f"{size} --experiments --T=20 --predict=x0 --sampling-steps=4")
    out = Path("runs/ddpm_ho_2020-images-quick")
    for name in ("rate_distortion", "interpolation", "inpainting", "samples"):
        assert (out / f"{name}.png").stat().st_size > 1000
    assert m["bits_per_dim"] > m["bits_per_dim_rate"] > m["bits_per_dim_L_T"] > 0
    assert m["inpainting_rmse_nearest"] < 10 < m["inpainting_rmse_RePaint"]  # an image has nearly one grey
    assert {f"inpainting_kept_{name}" for name in ("RePaint", "nearest")} <= m.keys()
    assert "frechet" not in m  # with three images held out
    assert len(given[0][0]) == len(given[0][1]) == 3  # of which the bits are
    flags = "--sampler=langevin --sampling-steps=3 --num-samples=4 --out=langevin"
    assert run(ddpm, f"--checkpoint={out}/weights.pt {flags}")["dataset"] == "images"
    run(cfg, f"{size} --steps=3 {FEW[cfg]}")
    arrays = np.load("runs/ddpm_conditional_cfg-images-quick/samples.npz")
    assert arrays["arr_0"].shape == (10, 8, 16, 3) and arrays["arr_1"].tolist() == [0, 1, 2] * 3 + [0]
    assert read("runs/ddpm_conditional_cfg-images-quick/checkpoint.pt")["names"] == ["a", "b", "c"]

# ---------------------------------------------------------------------------------------- flags, and mistakes

@both
def test_flags(script, monkeypatch):
    monkeypatch.setattr(script, "open_device", torch.device)  # nothing is opened
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    def get(flags):
        return script.get_args(flags.split())
    for card, able, device, flag, bf16 in (  # noqa: B007
            ((7, 5), "amx_bf16", "cuda", "", False), ((8, 0), "avx2", "cuda", "", True),
            ((9, 0), "avx2", "cuda", "", True), ((9, 0), "avx2", "cuda", "--no-bf16", False),
            ((9, 0), "avx512_f", "cpu", "", False), ((7, 5), "avx512_bf16", "cpu", "", True),
            ((7, 5), "amx_bf16", "cpu", "", True), ((7, 5), "amx_bf16", "cpu", "--no-bf16", False),
            ((9, 0), "amx_bf16", "mps", "", False), ((7, 5), "avx2", "cpu", "--bf16", True)):
        assert get(f"--device={device} {flag}").bf16 == bf16
    for flags, steps, warmup in (
            ("--dataset=mnist --device=cpu", 7000, 200), ("--dataset=mnist --device=cuda", 20_000, 200),
            ("--dataset=mnist --device=mps", 7000, 200), ("--dataset=mnist --device=mps --steps=7", 7, 1),
            ("--dataset=cars --device=cpu", 4000, 200), ("--dataset=cars --device=cuda", 100_000, 5000),
            ("--dataset=cars --steps=60", 60, 6), ("--dataset=cars --steps=60 --warmup=5000", 60, 5000),
            ("--dataset=cifar10", 800_000, 5000), ("--quick --device=cuda --dataset=mnist", 30, 3)):
        args = get(flags)
        assert (args.steps, args.warmup) == (steps, warmup), flags
    for flags, attention in (  # the preset's, where a level has it
            ("", [4]), ("--multipliers 1", []), ("--multipliers 1 --attention 4", [4]),
            ("--dataset=mnist", [7]), ("--dataset=cars --device=cpu", [8]),
            ("--dataset=cars --device=cuda", [16]), ("--dataset=cars --device=cuda --image-size=48x64", [])):
        assert get(flags).attention == attention, flags
    assert get("--image-size=48x64").image_size == [48, 64] and get("--image-size=32").image_size == [32, 32]
    for dataset, shape in (("digits", (1, 8, 8)), ("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32)),
                           ("cars", (3, 64, 64))):
        with torch.device("meta"):
            net = script.make_eps_theta(get(f"--dataset={dataset} --device=cuda"), shape)
        params = sum(p.numel() for name, p in net.named_parameters() if name != "label.weight")
        assert dataset != "cifar10" or params == 35_746_307  # the paper's network

@pytest.mark.parametrize("script, flags, defaults", [
    (ddpm, "--dataset=mnist", "7000 200 100 64 cosine"), (cfg, "--dataset=mnist", "7000 200 100 64 cosine"),
    (sohl, "", "6000 0.004 100000 40 learned"), (sohl, "--dataset=heartbeat", "8000 0.01 2000 inverse")])
def test_help_and_default_folders(script, flags, defaults, monkeypatch, capsys):
    texts, add = {}, argparse._ActionsContainer.add_argument
    def recorded(self, *names, **options):
        texts[names[-1]] = options.get("help")
        return add(self, *names, **options)
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", recorded)
    with pytest.raises(SystemExit, match="0"):
        args_of(script, f"{flags} --help")
    shown = " ".join(capsys.readouterr().out.split())
    assert len(texts) > 13 and all(texts.values()) and (script is sohl or "(paper: 800000)" in shown)
    assert all(f"(default: {value})" in shown for value in defaults.split())
    first = "swiss_roll" if script is sohl else "digits"
    out = f"runs/{script.__name__}-{flags.partition('=')[2] or first}"
    assert args_of(script, flags).out == out and args_of(script, f"{flags} --quick").out == out + "-quick"
    assert args_of(script, f"{flags} --quick --out=x").out == "x"

class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)

@every
def test_checkpoints_that_are_none_are_named(quick, fails, script):
    out, file = quick(script)[0], Path("checkpoint.pt")
    whole, state = (out / "checkpoint.pt").read_bytes(), read(out / "checkpoint.pt")
    none = rf"no checkpoint of {script.__name__}\.py at .*checkpoint\.pt: "
    foreign = cfg if script is ddpm else ddpm
    lacking = {key: {k: v for k, v in state.items() if k != key} for key in state}
    parts = ("net", "config") if script is sohl else ("ema", "names")
    for content, pattern in ((None, "missing"), (b"", "truncated"), (b"text", "truncated"),
                             ([1], "another script"), (whole[:20_000], "truncated"),
                             (state | {"script": foreign.__name__}, "another script"),
                             (state | {"step": Evil()}, "missing, truncated or another"),
                             (state | {"config": state["config"] | {"schedule": "my"}}, "no schedule my"),
                             *((lacking[part], "lacks a part") for part in parts)):
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content:
            torch.save(content, file)
        for flags in ("--checkpoint=checkpoint.pt", "--resume --out=."):
            fails(script, flags, none + ".*" + pattern)
    assert not Path("pwned").exists()
    if script is not sohl:
        for weights in (lacking["optimizer"], read(out / "weights.pt")):
            torch.save(weights, file)
            fails(script, "--resume --out=.", "not a run to resume")
    fails(script, f"--checkpoint={quick(foreign)[0]}/checkpoint.pt", "another script")

def named(flags):
    """For mistakes of which the message has to say no more than the flag."""
    return {flag: flag.partition("=")[0] for flag in flags.split()}

OF_ALL = named("--T=1 --seed=-2 --seed=5000000000 --lr=-1 --lr=nan --lr=inf --batch=0 --num-samples=0") | {
    "--schedule=liner": "liner.*cosine", "--device=tpu": "tpu", "--device=cuda:7": "--device cuda:7: ",
    "--device=cuda": "--device cuda: ", "--device=mps": "--device mps: ", "--T=1.5": "--T.*invalid int",
    "--steps=0": "--steps.*0 is not between 1", "--lr=x": "--lr.*float", "--out=file": "--out file",
    "--out=file/a": "--out file/a", "--checkpoint=FILE --resume": "not allowed with",
    "--resume --out=empty": "missing", "--bogus": "bogus"}
OF_IMAGES = named("--image-size=0 --ema=2 --dropout=-0.1 --channels=10 --learning=1") | {
    "--dataset=mnits": "mnits.*digits.*cifar10", "--dataset=empty": "0 readable images.*nothing",
    "--dataset=one": "1 readable images", "--dataset=broken": "0 readable images.*a.jpg",
    "--dataset=cars --data-dir=empty": "in empty.*nothing.*stanford_cars", "--sampler=x": "--sampler.*ddim",
    "--dataset=mnist --data-dir=file": "needs MNIST.*--dataset digits", "--image-size=abc": "-size.*abc",
    "--image-size=8x9x10": "--image-size: 8x9x10 is not a size",
    "--attention=5": r"attention at \[5\].*\[8, 4\]", "--multipliers 1 1 1 1 1": "8x8.*16 divides",
    "--checkpoint=FILE --channels=32": "size mismatch", "--checkpoint=FILE --schedule=linear": "is cosine",
    "--checkpoint=FILE --T=50": "is 1000; for fewer steps, --sampling-steps",
    "--checkpoint=FILE --dataset=images": "draws.*8, 8.*has"}
MISTAKES = {
    ddpm: OF_ALL | OF_IMAGES | named("--p-uncond=0.1") | {
        "--predict=v": "--predict.*mu", "--experiments --checkpoint=MNIST": "held-out images: --data-dir"},
    cfg: OF_ALL | OF_IMAGES | named("--p-uncond=1.5 --classes=a --sampler=langevin --w=x --w=nan") | {
        "--classes=3,12": r"labels must lie in 0\.\.9", "--guidance=x": "both",
        "--dataset=images": "two classes.*cars_train_annos.mat.*devkit",
        "--p-uncond=0 --w -1 2 --guidance classifier": "--p-uncond 0 has no"},
    sohl: OF_ALL | named("--noise=0 --noise=nan --num-samples=1999") | {
        "--dataset=rolls": "swiss_roll", "--dataset=heartbeat --schedule=learned": "learned",
        "--checkpoint=FILE --schedule=linear": "learned", "--checkpoint=FILE --T=9": "size mismatch",
        "--checkpoint=FILE --dataset=heartbeat": "not of this network|learned"}}

@pytest.mark.parametrize("script, flags", [(key, flags) for key, own in MISTAKES.items() for flags in own])
def test_users_mistakes(quick, fails, monkeypatch, script, flags):
    if flags == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    message = MISTAKES[script][flags]
    for word, of_run in (("FILE", ""), ("MNIST", SMALL_MNIST)):
        if word in flags:
            flags = flags.replace(word, str(quick(script, of_run)[0] / "checkpoint.pt"))
            shutil.rmtree("mnist", ignore_errors=True)
    Path("empty").mkdir()
    Path("file").write_text("text")
    write_images("one/0.png", "images/0.png", "images/1.png", "broken/a.jpg", "broken/b.jpg")
    for name in "ab":
        Path(f"broken/{name}.jpg").write_text("not an image")
    monkeypatch.setattr(script, "train", None)  # none of them gets so far
    fails(script, flags, message)

def test_a_full_disk_leaves_the_last_checkpoint(no_pictures, monkeypatch, capsys):
    run(ddpm, f"--quick --channels=8 --steps=2 --out=a {FEW[ddpm]}")
    whole, original = Path("a/checkpoint.pt").read_bytes(), torch.save
    for error in (OSError("No space left"), RuntimeError("PytorchStreamWriter failed: file write failed")):
        def full(state, path, error=error):
            Path(path).write_bytes(b"half of it")
            raise error
        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(SystemExit):
            run(ddpm, f"--resume --steps=4 --out=a {FEW[ddpm]}")
        assert re.search("error: a/checkpoint.pt could not be written.*fail|space", capsys.readouterr().err)
        assert Path("a/checkpoint.pt").read_bytes() == whole
    monkeypatch.setattr(torch, "save", original)
    assert run(ddpm, f"--resume --steps=4 --out=a {FEW[ddpm]}")["steps"] == 4
    assert not list(Path().rglob("*.tmp"))

@pytest.mark.parametrize("error, status, line", [
    (MemoryError(), 2, "out of memory.*--batch"), (RuntimeError("CUDA out of memory."), 2, "memory.*--batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--batch"),
    (KeyboardInterrupt(), 2, "stopped by Ctrl-C"),
    (OSError(28, "No space left on device"), 2, "No space left"), (RuntimeError("shapes"), None, ""),
    (KeyError("ema"), None, ""), (SystemExit(2), 2, None), (None, 0, None)])
@every
def test_from_the_shell(script, error, status, line, monkeypatch):
    """What a user can cause is one line, a bug keeps its traceback, and a console of Windows is enough."""
    def main(args):
        print("█ ε ∅ 写真")
        if error:
            raise error
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2))
    for module, name, value in ((script, "main", main), (script, "get_args", lambda: None),
                                (sys, "stdout", out), (sys, "stderr", err)):
        monkeypatch.setattr(module, name, value)
    if status is None:
        with pytest.raises(type(error)):
            script.run_from_shell()
    elif status == 0:
        script.run_from_shell()
    else:
        with pytest.raises(SystemExit) as e:
            script.run_from_shell()
        err.flush()
        told = err.buffer.getvalue().decode("cp1252")
        assert e.value.code == 2
        assert (told == "") if line is None else re.fullmatch(rf"error: .*{line}.*\n", told)

@pytest.mark.parametrize("where", ["decoding", "sampling"])
def test_ctrl_c(where, monkeypatch, capsys):
    write_images(*(f"images/{i}.png" for i in range(30)))
    flags = "--quick --dataset=images --image-size=8 --multipliers 1 --attention --steps=1 --out=a"
    monkeypatch.setattr(sys, "argv", ["ddpm_ho_2020.py", "--device=cpu", *flags.split()])
    module, name = (Image, "open") if where == "decoding" else (ddpm, "subchain")
    original, calls = getattr(module, name), itertools.count()
    def interrupt(*args):
        if next(calls) == 0:  # once: threads that go on reading must not stop pytest as well
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)
    if where == "decoding":
        monkeypatch.setattr(module, name, interrupt)
    else:  # only after training, which has its own answer to it
        monkeypatch.setattr(ddpm, "save_weights", lambda *_: monkeypatch.setattr(module, name, interrupt))
    with pytest.raises(SystemExit) as e:
        ddpm.run_from_shell()
    assert e.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith("error: stopped by Ctrl-C")
    assert Path("a/checkpoint.pt").exists() == (where == "sampling")

# ---------------------------------------------------------------------------------------------------- hygiene

@pytest.mark.parametrize("script, least", [(cfg, 40), (sohl, 1)])
def test_copies_are_equal(script, least):
    marked = r"^# Copied from ddpm_ho_2020\.py\n(.*?)^(?:# ---|# Only here|def start)"
    blocks = re.findall(marked, inspect.getsource(script), re.M | re.S)
    names = re.findall(r"^(?:class|def) (\w+)", "".join(blocks), re.M)
    assert len(names) >= least
    for name in names:
        assert inspect.getsource(getattr(script, name)) == inspect.getsource(getattr(ddpm, name)), name

def test_conditional_and_unconditional_models_are_trained_alike():
    assert (cfg.SMALL, cfg.PRESETS, cfg.ON_CUDA) == (ddpm.SMALL, ddpm.PRESETS, ddpm.ON_CUDA)

def test_readme_commands_parse(monkeypatch):
    """Every `python script.py ...` of the README and the docstrings is a command that the script takes."""
    for script in (ddpm, cfg, sohl):
        checkpoint = {"config": vars(script.get_args([]))}
        monkeypatch.setattr(script, "load_checkpoint", lambda path, checkpoint=checkpoint: checkpoint)
    texts = [README, ddpm.__doc__, cfg.__doc__, sohl.__doc__, schedules.__doc__]
    commands = re.findall(r"python ((\w+)\.py[^\n`#&]*)", "\n".join(texts))
    loops = {name: shlex.split(values) for name, values in re.findall(r"for (\w+) in ([^;\n]+);", README)}
    assert len(commands) > 6 and len(loops) > 2
    for command, module in commands:
        used = re.findall(r"\$(\w+)", command)
        for values in itertools.product(*(loops[name] for name in used)):
            one = command
            for name, value in zip(used, values):
                one = one.replace(f"${name}", value)
            __import__(module).get_args(shlex.split(one)[1:])

def test_code_in_the_readme_is_the_scripts():
    def code(function):  # without its docstring and comments
        body = function.body[1:] if ast.get_docstring(function) else function.body
        return [ast.dump(part) for part in [*function.decorator_list, function.args, *body]]
    def functions(text):
        return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    sources = [inspect.getsource(script) for script in (schedules, cfg, ddpm)]
    there = {f.name: code(f) for source in sources for f in functions(source)}
    shown = functions("\n".join(re.findall(r"```python\n(.*?)```", README, re.S)))
    assert {f.name for f in shown} == {"l_simple", "ddpm_sample", "eps_tilde", "cubic"}
    assert all(code(f) == there[f.name] for f in shown if f.name != "cubic")  # the reader's own

def test_a_schedule_of_ones_own(monkeypatch):
    """The README's example, pasted into schedules.py, is a --schedule of that name."""
    monkeypatch.setattr(schedules, "SCHEDULES", dict(SCHEDULES))
    exec(re.search(r"```python\n(@schedule\n.*?)```", README, re.S)[1], vars(schedules).copy())
    expected = (1 - torch.arange(10) / 10) ** 3
    assert make_schedule("cubic", 10).alpha_bar[:10].float().allclose(expected)

def test_equations_in_the_readme_exist():
    named = re.findall(r"`(\w+)\.py`: (`\w+`(?:, `\w+`)*)", README)
    assert len(named) > 10
    for module, names in named:
        for name in re.findall(r"\w+", names):
            assert hasattr(__import__(module), name) or hasattr(schedules.Schedule, name), name

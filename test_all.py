"""Every test: closed forms and identities in float64 first, then whole runs.      pytest -q test_all.py"""
import inspect
import json
import math
import re
import shlex
import signal
import struct
import subprocess
import sys
import warnings
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.testing import assert_close

import ddpm_conditional_cfg as cfg
import ddpm_ho_2020 as ddpm
import schedules
import sohl_dickstein_2015 as sohl
from schedules import SCHEDULES, Schedule, like, make_schedule

README = Path(__file__).with_name("README.md").read_text()
every_schedule = pytest.mark.parametrize("name", list(SCHEDULES))
FEW = {ddpm: "--num-samples=20", cfg: "--num-samples=10 --sampling-steps=2 --w=1", sohl: "--num-samples=2000"}

def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def agree(draws, mean):
    """The mean of the draws is within four standard errors of what it should be."""
    return abs(draws.mean() - mean) < 4 * draws.std() / len(draws) ** 0.5 + 1e-12

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

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

def test_schedule_refuses_and_warns():
    for beta in ([0.1, 0.2], [0, 0.5, 1], [0, 0], [0], [[0, 0.5]]):
        with pytest.raises(ValueError):
            Schedule(beta)
    for name, T in (("liner", 10), ("linear", 0)):
        with pytest.raises(ValueError, match="linear"):
            make_schedule(name, T)
    with pytest.warns(UserWarning, match="0.88"):  # betas made for T = 1000 with T = 50
        Schedule(torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.01, 50)]))

def test_first_practical(monkeypatch):
    monkeypatch.setattr(schedules, "SCHEDULES", dict(SCHEDULES))

    @schedules.schedule
    def mine(T):
        return schedules.from_alpha_bar((1 - schedules.time(T)) ** 3)
    m = run(schedules, "--T=20 --out=new")
    assert "mine" in m and 0 < m["constant"]["structure_share"] < m["cosine"]["structure_share"] <= 1
    assert files("new") == {"schedules.png", "destruction.png", "metrics.json"}

# ------------------------------------------------------------------------- ddpm_ho_2020.py: loss and samplers

def exact_eps(s, m, variance):
    """E[ε | x_t] for x_0 ~ N(m, variance I): the best that any network could say."""
    def eps_theta(x, t):
        ab = like(s.alpha_bar[t], x)
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
    assert ddpm.l_simple(net, s, x0, t, eps, predict) < 1e-20
    power = target.square().mean().item()
    assert ddpm.l_simple(lambda x, t: 0 * x, s, x0, t, eps, predict) == pytest.approx(power)
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

@every_schedule
@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_subchain(name, steps):
    s, seen = make_schedule(name, 50), []
    eps_theta, short = ddpm.subchain(lambda x, t: seen.append(t) or x, s, steps)
    for i in range(1, steps + 1):
        eps_theta(randn(1, 1), torch.tensor([i]))
    grid = torch.cat([torch.zeros(1).long(), *seen])
    assert short.T == steps and grid[-1] == 50 and (grid.diff() > 0).all()
    assert short.alpha_bar.allclose(s.alpha_bar[grid], rtol=1e-3, atol=1e-12)
    assert steps < 50 or short.beta.allclose(s.beta)

# ----------------------------------------------------------------------------------- ddpm_ho_2020.py: network

def net_of(flags, shape):
    return ddpm.make_eps_theta(ddpm.get_args(flags.split()), shape)

def test_paper_network():
    paper = "--channels 128 --multipliers 1 2 2 2 --blocks 2 --attention 16 --dropout 0.1"
    assert sum(p.numel() for p in net_of(paper, (3, 32, 32)).parameters()) == 35_746_307

@pytest.mark.parametrize("flags, shape", [
    ("", (1, 8, 8)), ("--dataset mnist", (1, 28, 28)), ("", (3, 12, 20)),
    ("--multipliers 1", (1, 7, 9)), ("--no-time-embedding", (1, 8, 8))])
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
    with pytest.raises(ValueError, match="30x28.* 4 divides"):
        net_of("--dataset mnist", (1, 30, 28))

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
        noise = (x / s.alpha_bar[t].sqrt() - 0.3).std() * s.snr[t + 1].sqrt()
        assert t == 0 or t > 290 or 1 < noise < 1.1  # steps of a finite size add a little
    _, x, _ = next(ddpm.langevin_sample(exact_eps(s, 0.3, 0.04), s, randn(4, 1), each=0))  # moves no x,
    assert x.allclose((s.alpha_bar[299] / s.alpha_bar[300]).sqrt() * randn(4, 1))  # but rescales it

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
    entropy = math.log2(0.2 * math.sqrt(2 * math.pi * math.e) * 127.5)  # of the grey levels, nearly
    assert entropy - 0.02 < rates[-1] < entropy + (0.5 if variance == "beta" else 5)

def test_interpolation_ends_at_the_noised_endpoints():
    s, a, b = make_schedule("linear", 20), randn(1, 1, 50, 50), randn(1, 1, 50, 50, seed=1)
    x = ddpm.interpolate(s, a, b, 3, [0, 0.5, 1])
    for end, image in ((x[0], a), (x[2], b)):
        noise = (end - s.alpha_bar[3].sqrt() * image[0]) / (1 - s.alpha_bar[3]).sqrt()
        assert noise.std() == pytest.approx(1, abs=0.1) and abs(noise.mean()) < 0.1
    assert x[1].allclose((x[0] + x[2]) / 2)

@pytest.mark.parametrize("sampler", [ddpm.ddpm_sample, ddpm.ddim_sample])
def test_inpainting_keeps_what_is_known(sampler):
    s, x0, known = make_schedule("linear", 30), randn(1, 1, 4, 4).clamp(-1, 1), torch.rand(4, 4) < 0.5
    chain = sampler(ddpm.inpaint(exact_eps(s, 0.7, 1e-6), s, x0, known), s, randn(3, 1, 4, 4, seed=1))
    *_, (_, _, x0_hat) = chain
    assert x0_hat.allclose(torch.where(known, x0, 0.7), atol=1e-3)

# --------------------------------------------------------------------------- ddpm_ho_2020.py: data and metric

def test_frechet_distance():
    a = randn(5000, 3) * torch.tensor([1, 2, 3]).double()
    b = randn(4000, 3, seed=1) + torch.tensor([0, 0, 2]).double()
    assert ddpm.frechet_distance(a, b) == pytest.approx(4 + 0 + 1 + 4, rel=0.05)  # |Δm|² + Σ (s_a - s_b)²
    for k, c in ((0, 0), (2, 1)):
        exact = (k * a.mean(0) + c).square().sum() + k ** 2 * a.var(0).sum()
        assert ddpm.frechet_distance(a, a + k * a + c) == pytest.approx(exact.item(), abs=1e-6)

def test_pixels():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ddpm.to_uint8(ddpm.to_float(x)), x) and ddpm.to_float(x)[[0, 255]].tolist() == [-1, 1]

def test_digits():
    (x, y), (x_held, y_held) = ddpm.load_data("digits", "nowhere")
    assert x.shape == (1347, 1, 8, 8) and x_held.shape == (450, 1, 8, 8)
    assert x.dtype == torch.uint8 and x.max() == 255
    assert y.bincount().min() > 120 and y_held.bincount().min() > 30

def write_mnist():
    """MNIST's four files with 150 noise images each, in the folder mnist."""
    raw = Path("mnist/MNIST/raw")
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels, labels = np.random.default_rng(0).bytes(150 * 28 * 28), bytes(range(10)) * 15
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 150, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 150) + labels)

def test_mnist_files():
    write_mnist()
    (x, y), held_out = ddpm.load_data("mnist", "mnist")
    assert x.shape == (150, 1, 28, 28) and y[:3].tolist() == [0, 1, 2] and len(held_out[1]) == 150
    file = Path("mnist/MNIST/raw/t10k-images-idx3-ubyte")
    file.write_bytes(file.read_bytes()[:1000])
    for folder in ("mnist", "empty"):
        with pytest.raises(OSError, match="train-images-idx3-ubyte.*t10k-labels.*--dataset digits"):
            ddpm.load_data("mnist", folder, download=False)

def write_images(*paths):
    for i, path in enumerate(map(Path, paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = ["RGB", "L", "P"][i % 3] if path.suffix.lower() == ".png" else "RGB"
        Image.fromarray(np.full((40, 30, 3), 20 * i % 256, np.uint8)).convert(mode).save(path)

def load(dataset, size=(16, 24)):
    return ddpm.load_folder(dataset, Path("."), size, Path("cache.pt"))

@pytest.mark.parametrize("folder, names, mat, labels", [
    ("stanford_cars", "cars_train/0.jpg cars_train/1.jpg cars_test/0.jpg", False, [0, 0]),
    ("stanford_cars", "cars_train/0.jpg cars_train/1.jpg cars_test/0.jpg", True, [1, 0]),
    ("cars_train", "cars_train/0.jpg cars_train/1.JPG cars_test/0.jpg", False, [0, 0]),
    ("stanford_cars", "Audi/0.jpg BMW/1.jpg", False, [0, 1]), (".", "0.jpg 1.jpg", False, [0, 0])])
def test_cars_in_every_layout(folder, names, mat, labels):
    write_images(*(f"{folder}/{name}" for name in names.split()))
    if mat:  # which counts from 1
        annotations = np.array([("0.jpg", 7), ("1.jpg", 3)], dtype=[("fname", object), ("class", object)])
        savemat(f"{folder}/cars_train_annos.mat", {"annotations": annotations})
    sets = load("cars")
    assert all(x.shape == (1, 3, 16, 24) and x.dtype == torch.uint8 for x, _ in sets)  # and no test image
    assert {x[0, 0, 0, 0].item(): y.item() for x, y in sets} == dict(zip((0, 20), labels))  # by grey level

def test_folders(capsys):
    """Any extension and mode; broken files named and skipped; the cache is used, and remade on a change."""
    write_images(*(f"images/{name}" for name in ("a/0.JPG", "b/1.png", "b/2.png", "b/3.Png", "a/4.jpeg")))
    whole = Path("images/a/0.JPG").read_bytes()
    Path("images/a/broken.jpg").write_bytes(whole[:len(whole) // 2])
    Path("images/a/text.png").write_text("not an image")
    (x, y), held_out = load("images")
    assert x.shape == (4, 3, 16, 24) and sorted(torch.cat([y, held_out[1]]).tolist()) == [0, 0, 1, 1, 1]
    err = capsys.readouterr().err
    assert "skipped images/a/broken.jpg" in err and "skipped images/a/text.png" in err
    torch.save(torch.load("cache.pt") | {"sets": [(x + 1, y), held_out]}, "cache.pt")
    assert torch.equal(load("images")[0][0], x + 1)  # from the cache
    write_images("images/c/5.png")
    assert load("images")[0][0].shape == (5, 3, 16, 24)
    assert load("images", (8, 12))[0][0].shape == (5, 3, 8, 12)
    Path("cache.pt").write_bytes(b"broken")
    assert load("images", (8, 12))[0][0].shape == (5, 3, 8, 12)

# --------------------------------------------------------------------------------- whole runs of every script

def run(script, flags):
    return script.main(script.get_args(shlex.split(flags)))

def files(folder):
    return {path.name for path in Path(folder).iterdir()}

@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """quick(script, flags): the folder that --quick has filled, and its numbers. Each is run once."""
    @cache
    def once(script, flags=""):
        if "mnist" in flags:
            write_mnist()
        out = tmp_path_factory.mktemp("quick") / "out"
        return out, run(script, f"--quick --out={out} {flags}")
    return once

@pytest.fixture
def fails(capsys):
    """fails(script, flags, pattern): a run ends with status 2 and, after argparse's usage, one such line."""
    def check(script, flags, pattern):
        with pytest.raises(SystemExit) as e:
            run(script, flags)
        line, = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert e.value.code == 2 and re.search(pattern, line), line
    return check

MNIST, HEARTBEAT = "--dataset=mnist --data-dir=mnist", "--data=heartbeat --T=200"
TWO_CLASSES = "--num-samples=5 --sampling-steps=2 --w=2 --classes=3,7"
DDPM_KEYS = "loss frechet frechet_floor confident_share rarest_class_share images_per_second"
DDPM_FILES = "samples.npz samples.png progressive.png reverse.gif loss.png weights.pt training.png .lock"

@pytest.mark.parametrize("script, flags, keys, written, told", [
    (ddpm, "", DDPM_KEYS, DDPM_FILES, "--num-samples=100"),
    (ddpm, MNIST, DDPM_KEYS, DDPM_FILES, "--num-samples=100"),
    (cfg, "", "frechet_floor", "samples.npz samples.png tradeoff.png", "--num-samples=100 --guidance=free"),
    (cfg, f"{MNIST} --steps=3 {TWO_CLASSES}", "", "samples.npz samples.png", TWO_CLASSES),
    (sohl, "", "ceiling_bits", "bound.png swiss_roll.png posteriors.png reverse.gif", ""),
    (sohl, HEARTBEAT, "valid_share", "", "")])
def test_quick_run_and_the_same_from_its_checkpoint(quick, script, flags, keys, written, told):
    out, m = quick(script, flags)
    config = m["config"]
    assert m == json.loads((out / "metrics.json").read_text())
    keys += " script dataset seed device torch steps params seconds_train seconds_total"
    assert set(keys.split()) <= m.keys() and files(out) == {"metrics.json", "checkpoint.pt", *written.split()}
    # From the file alone, where no data are, the same numbers and images come back.
    again = run(script, f"--checkpoint={out}/checkpoint.pt --out=again {told}")
    assert all(again[k] == m[k] for k in again if k != "config" and "second" not in k)
    assert files(out) - files("again") == files(out) & {"checkpoint.pt", "weights.pt", "training.png"}
    if script is not sohl:
        arrays, others = (np.load(folder / "samples.npz") for folder in (out, Path("again")))
        assert all(np.array_equal(arrays[k], others[k]) for k in arrays)
        n, side, images = config["num_samples"], 28 if "mnist" in flags else 8, arrays["arr_0"]
        assert images.shape == (n, side, side, 1) and images.dtype == np.uint8 and images.std() > 0
        assert script is ddpm or arrays["arr_1"].tolist() == (config["classes"] * n)[:n]
        assert script.get_args([f"--checkpoint={out}/checkpoint.pt"]).num_samples == 64
    resumed = vars(script.get_args(["--resume", f"--out={out}"]))  # what a run was told is told once
    assert all(resumed[k] == config[k] for k in config.keys() & {"T", "steps", "schedule", "lr", "data_dir"})

def test_cfg_quick(quick):
    m = quick(cfg)[1]
    for sweep in (m["sweep"], m["sweep_classifier"]):
        assert [row["w"] for row in sweep] == [-1, 0, 0.5, 1, 2, 4]
        assert all({"w", "frechet", "classifier_score", "label_accuracy"} == row.keys() for row in sweep)
        assert all(1 <= row["classifier_score"] <= 10 for row in sweep)
    assert m["sweep"][0] == m["sweep_classifier"][0]  # w = -1: the unconditional model, twice

def test_sohl_quick(quick):
    (out, roll), (_, heartbeat) = quick(sohl), quick(sohl, HEARTBEAT)
    assert -6 < roll["K_bits"] < roll["ceiling_bits"] == pytest.approx(2.703, abs=0.001)
    assert roll["K_minus_L_null_bits"] == pytest.approx(roll["K_bits"] + 4.094, abs=0.001)
    assert heartbeat["K_bits_per_sequence"] < heartbeat["true_bits_per_sequence"]
    assert 0 <= heartbeat["valid_share"] <= 1
    moved = torch.load(out / "checkpoint.pt")["net"]["logits"] - sohl.start_beta("learned", 40).logit()
    assert moved[0] == 0 and (moved[1:] != 0).all()  # every β learns, but the first

@pytest.mark.parametrize("script, loss, flags", [
    (ddpm, "l_simple", "--channels=8 --dropout=0.1 --flip"), (cfg, "l_cfg", ""), (sohl, "bound", ""),
    (ddpm, "vlb_term", "--channels=8 --loss=vlb --predict=mu")])
def test_stopped_and_resumed_is_one_run_and_never_lost(monkeypatch, capsys, fails, script, loss, flags):
    """Ctrl-C in step 5 ends in pictures and a checkpoint, from which the rest is bitwise the same."""
    run(script, f"--quick --steps=12 --out=a {flags} {FEW[script]}")
    calls, original = [], getattr(script, loss)
    def interrupted(*args, **named):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **named)
    monkeypatch.setattr(script, loss, interrupted)
    planned = 12 if script is sohl else 32  # whose learning rate decays; the others' milestones differ
    m = run(script, f"--quick --steps={planned} --out=b {flags} {FEW[script]}")
    assert m["steps"] == torch.load("b/checkpoint.pt", weights_only=True)["step"] == 5
    assert f"stopped at step 5 of {planned}; --resume" in capsys.readouterr().out and files("a") == files("b")
    run(script, f"--resume --steps=12 --out=b {FEW[script]}")
    a, b = (torch.load(f"{folder}/checkpoint.pt", weights_only=True) for folder in "ab")
    for key in a.keys() & {"net", "ema", "optimizer", "rng", "losses", "step"}:
        assert_close(a[key], b[key], rtol=0, atol=0)
    trained = Path("b/checkpoint.pt").read_bytes()
    fails(script, "--resume --steps=30 --lr=1e30 --out=b", "no longer finite")
    run(script, f"--quick --steps=1 --out=b {FEW[script]}")
    assert next(Path("b").glob("checkpoint-*.pt")).read_bytes() == trained  # two runs later

@pytest.mark.parametrize("script", FEW)
def test_checkpoints_that_are_none_are_named(quick, fails, script):
    whole, file = (quick(script)[0] / "checkpoint.pt").read_bytes(), Path("checkpoint.pt")
    for content in (None, b"", b"text", whole[:20_000], {"script": "x"}, [1]):
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content:
            torch.save(content, file)
        for flags in ("--checkpoint=checkpoint.pt", "--resume --out=."):
            fails(script, flags, rf"no checkpoint of {script.__name__}\.py at .*checkpoint\.pt: .*truncated")

def test_weights_alone_are_no_run_to_resume(quick, fails):
    Path("checkpoint.pt").write_bytes((quick(ddpm)[0] / "weights.pt").read_bytes())
    fails(ddpm, "--resume --out=.", "not a run to resume")

MISTAKES = {
    ddpm: {"--dataset=mnits": "mnits.*digits.*cifar10", "--dataset=empty": "0 readable images in",
           "--dataset=cars --data-dir=empty": "found nothing", "--schedule=liner": "liner.*cosine",
           "--device=tpu": "device string: tpu", "--steps=0": "--steps", "--channels=10": "--channels",
           "--multipliers 1 1 1 1 1": "8x8.*16 divides", "--checkpoint=FILE --channels=32": "size mismatch",
           "--checkpoint=FILE --ablation": "not allowed with"},
    cfg: {"--dataset=empty": "ddpm_ho_2020.py --dataset empty", "--device=tpu": "device string: tpu",
          "--classes=3,12": r"labels must lie in 0\.\.9", "--p-uncond=0": "--p-uncond"},
    sohl: {"--data=rolls": "swiss_roll", "--noise=0": "--noise", "--seed=-2": "--seed", "--T=1": "--T",
           "--device=tpu": "tpu", "--data=heartbeat --schedule=learned": "learned",
           "--checkpoint=FILE --schedule=linear": "learned", "--checkpoint=FILE --T=9": "size mismatch"}}

@pytest.mark.parametrize("script, flags", [(script, flags) for script in MISTAKES
                                           for flags in MISTAKES[script]])
def test_users_mistakes(quick, fails, script, flags):
    Path("empty").mkdir()
    file = quick(script)[0] / "checkpoint.pt" if "FILE" in flags else ""
    fails(script, flags.replace("FILE", str(file)), MISTAKES[script][flags])

def test_a_folder_of_images_with_every_experiment_then_guidance():
    write_images(*(f"images/{name}/{i}.png" for name in "abc" for i in range(13)))
    m = run(ddpm, "--quick --experiments --dataset=images --T=20 --image-size=8x16 --predict=x0")
    out = Path("runs/ddpm_ho_2020-images")
    for name in ("rate_distortion", "interpolation", "inpainting", "samples"):
        assert (out / f"{name}.png").stat().st_size > 1000
    assert m["bits_per_dim"] > m["bits_per_dim_rate"] > m["bits_per_dim_L_T"] > 0 and m["inpainting_rmse"] > 0
    flags = "--sampler=langevin --sampling-steps=3 --num-samples=4 --out=langevin"
    assert run(ddpm, f"--checkpoint={out}/weights.pt {flags}")["dataset"] == "images"
    run(cfg, f"--quick --channels=8 --dataset=images --steps=3 {FEW[cfg]}")  # reads what ddpm has decoded
    arrays = np.load("runs/ddpm_conditional_cfg-images/samples.npz")
    assert arrays["arr_0"].shape == (10, 8, 16, 3) and arrays["arr_1"].tolist() == [0, 1, 2] * 3 + [0]

def test_two_processes_train_as_one(monkeypatch, fails):
    flags = "--quick --channels=8 --flip --steps=5 --batch=8 --num-samples=4 --device=cpu"
    run(ddpm, f"{flags} --out=one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, ddpm.__file__, *flags.split(), "--out=two"], check=True, capture_output=True)
    one, two = (torch.load(f"{folder}/checkpoint.pt")["ema"] for folder in ("one", "two"))
    assert all(one[name].allclose(two[name], atol=1e-4) for name in one)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for flags in ("--batch=64", "--batch=3 --ablation"):
        fails(ddpm, flags, "3 processes")

def test_ablation(capsys):
    rows = run(ddpm, "--ablation --quick --channels=8 --num-samples=70 --T=8 --steps=2 --out=out")
    assert list(rows) == ["mu-vlb", "mu-simple", "eps-vlb", "eps-simple"]
    assert list(rows) == ["{predict}-{loss}".format(**m["config"]) for m in rows.values()]
    assert all(Path(f"out/{name}/metrics.json").exists() for name in rows) and "ablation.png" in files("out")
    table = capsys.readouterr().out.split("predicts, loss")[1].splitlines()
    frechet, bits = (rows["eps-simple"][key] for key in ("frechet", "bits_per_dim"))
    assert table[4].split() == ["eps-simple", f"{frechet:.1f}", f"{bits:.2f}", "3.17"]

# ------------------------------------------------------------------------------------ ddpm_conditional_cfg.py

@pytest.mark.parametrize("w", [-1, -0.5, 0, 1, 4])
def test_cfg_guided_score_of_gaussian_classes(w):
    """Either guidance gives the score of p(x_t | y) p(y | x_t)^w; N(m_y, v I) data, three classes alike."""
    s, m, v, evaluated = make_schedule("linear", 100), randn(3, 2, seed=1), 0.3, []
    x, t, y = randn(60, 2), torch.arange(1, 61), torch.arange(60) % 3
    def log_p(x, t):  # log p(x_t, y) + c, (B, 3)
        ab = s.alpha_bar[t][:, None]
        away = x[:, None] - ab[..., None].sqrt() * m  # (B, 3, 2)
        return -away.square().sum(2) / (2 * (ab * v + 1 - ab))
    def exact(x, t, y, w):
        x = x.detach().requires_grad_()
        log_joint = log_p(x, t)
        log_tilted = (1 + w) * log_joint[range(len(y)), y] - w * log_joint.logsumexp(1)
        return -(1 - s.alpha_bar[t]).sqrt()[:, None] * torch.autograd.grad(log_tilted.sum(), x)[0]
    def eps_theta(x, t, y):  # y = 3 is no class: w = -1
        evaluated.append(len(x))
        return exact(x, t, y % 3, -(y == 3).double())
    expected = exact(x, t, y, w)
    assert cfg.guided(eps_theta, y, 3, w)(x, t).allclose(expected, rtol=1e-10, atol=1e-12)
    assert evaluated == [60 if w in (-1, 0) else 120]  # one evaluation an example where one is enough
    steered = cfg.classifier_guided(eps_theta, log_p, s, y, 3, w)(x, t)
    assert steered.allclose(expected, rtol=1e-10, atol=1e-12)

def test_cfg_network_is_the_unet_moved_by_labels():
    torch.manual_seed(0)
    net = cfg.make_eps_theta(cfg.get_args(["--quick"]), (1, 8, 8)).requires_grad_(False)
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

def test_cfg_labels_out_of_range():
    for y in (torch.tensor([0, 10]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
            cfg.classifier_guided(None, None, None, y, 10, 1)  # which leaves it to guided

def test_cfg_labels_are_dropped_one_by_one(monkeypatch):
    torch.manual_seed(0)
    y = torch.arange(10).repeat(10_000)
    dropped = cfg.drop_labels(y, 10, 0.3)
    assert torch.equal(dropped[dropped != 10], y[dropped != 10]) and agree((dropped == 10).double(), 0.3)
    batches, l_cfg = [], cfg.l_cfg
    monkeypatch.setattr(cfg, "l_cfg", lambda *args: batches.append(args[3]) or l_cfg(*args))
    run(cfg, f"--quick --p-uncond=0.2 --steps=12 --out=. {FEW[cfg]}")
    share = (torch.stack(batches) == 10).double().mean(1)  # of each training batch
    assert 0 < share.min() and share.max() < 0.5 and share.mean() == pytest.approx(0.2, abs=0.05)
    torch.manual_seed(0)
    before = cfg.make_eps_theta(cfg.get_args(["--quick"]), (1, 8, 8)).state_dict()["label.weight"]
    trained = torch.load("checkpoint.pt", weights_only=True)["net"]["eps_theta.label.weight"]
    assert (trained - before).abs().amax(1).min() > 1e-4  # every row, the null token's too

# ------------------------------------------------------------------------------------- sohl_dickstein_2015.py

def gaussian_moments(xt, alpha_bar):
    """The moments for x_0 ~ N(0, I)."""
    return alpha_bar.sqrt()[:, None] * xt, (1 - alpha_bar)[:, None, None] * torch.eye(xt.shape[1]).to(xt)

@every_schedule
def test_K_of_an_isotropic_gaussian_is_its_log_likelihood(name):
    """As the authors' code notes: the gain over L_null is 0. One KL, written out:
    KL(N(μ, σ² I) || N(m, σ² M I)) = ½ [D / M + |m - μ|² / (σ² M) - D + D log M], of which the first three
    cancel in expectation."""
    s, D = make_schedule(name, 40), 3
    K, x0 = 0, randn(4000, D)
    for t in range(2, 41):
        ts = torch.full((len(x0),), t)
        torch.manual_seed(t)
        kl, entropies = sohl.bound(sohl.GAUSSIAN, s, gaussian_moments, x0, ts)
        torch.manual_seed(t)
        xt = sohl.gaussian_q(x0, s.alpha_bar[ts]).rsample()
        M = 1 + (s.snr[t - 1] - s.snr[t]) * (1 - s.alpha_bar[t])
        (m, sigma2), (mu, _) = (s.q_posterior(x, xt, ts) for x in (s.alpha_bar[t].sqrt() * xt, x0))
        delta = ((m - mu) ** 2 / sigma2).sum(1)
        assert (2 * math.log(2) * kl).allclose((D + delta) / M - D + D * M.log(), atol=1e-9)
        assert agree(kl, D * M.log2() / 2)
        K -= D * M.log2() / 2
    L_null = -D / 2 * math.log2(2 * math.pi * math.e)
    assert entropies.unique() == entropies[0] and (K + entropies[0]).item() == pytest.approx(L_null, rel=1e-9)

def test_a_new_network_is_the_null_model():
    net, xt, alpha_bar = sohl.RollNet(67, [16, 5]), randn(5, 2), torch.rand(5).double()
    for parameter in net[-2].parameters():  # as main does
        torch.nn.init.zeros_(parameter)
    for ours, null in zip(net(xt.float(), alpha_bar), gaussian_moments(xt, alpha_bar)):
        assert ours.double().allclose(null, atol=1e-6)

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
        x0_hat, S = sohl.exact_moments(density, x, ab.expand(len(x)))
        assert sohl.score(x0_hat, x, ab.expand(len(x))).allclose(gradient, rtol=1e-6, atol=1e-6)
        assert S.allclose((1 - ab) / ab * (torch.eye(2) + (1 - ab) * hessian), rtol=1e-5, atol=1e-8)

def test_roll_density_and_its_bound():
    """The density is scikit-learn's; with the true moments K is below -H(X), and near it if T is large."""
    density, x0 = sohl.roll_density(0.5), sohl.draw_roll(20000, 0.5, 0)
    assert x0.mean(0).abs().max() < 0.03 and (x0.var(0) - 1).abs().max() < 0.03
    bits = log_q(density, x0[:2000]) / math.log(2)
    assert agree(bits, sohl.negative_entropy(density))
    for beta, least in ((sohl.start_beta("learned", 200), -0.2), (SCHEDULES["cosine"](40)[1:], -9)):
        s = Schedule(torch.cat([torch.zeros(1), beta]))
        K, steps = sohl.evaluate(sohl.GAUSSIAN, s, partial(sohl.exact_moments, density), x0[:1000])
        gain = K - bits[:1000]  # each K estimates a bound on its own log q(x_0)
        assert least < gain.mean() < 4 * gain.std() / 1000 ** 0.5
        assert len(steps) == s.T - 1 and min(steps) > -0.01

def test_posterior_sampler_on_a_gaussian():
    """p = N(0, I), r = N(y; x_0, 1 / precision): p r / Z = N(a y, 1 - a), a = precision / (1 + precision)."""
    torch.manual_seed(0)
    s, y, precision = make_schedule("cosine", 100), torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])
    moments = partial(sohl.given, gaussian_moments, y, precision)
    *_, (t, x) = sohl.reverse(sohl.GAUSSIAN, s, moments, randn(20000, 2))
    assert t == 0 and ((x.mean(0) - torch.tensor([0.75, 0.0])).abs() < 0.03).all()
    assert ((x.var(0) - torch.tensor([0.25, 1.0])).abs() < 0.04).all()
    s = make_schedule("constant", 5)  # the last step is a forward step: x_0 keeps √α_1 of x_1
    *_, (_, x_1), (_, x) = sohl.reverse(sohl.GAUSSIAN, s, gaussian_moments, randn(20000, 2))
    assert (x * x_1).mean() == pytest.approx(s.alpha[1].sqrt().item(), abs=0.03) and abs(x.var() - 1) < 0.03

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
        return w / w.sum(1, keepdim=True) @ data,
    K, eq14, jump = 0, 0, torch.eye(4)[:, 1:3].double()  # jump: q(x_t | x_0), from t = 0
    for t in (1, 2, 3):
        ts, q = torch.full((4,), t), B(states[:, None], (1 - s.beta[t]) * states + s.beta[t] * rho)
        joint = q[..., None] * jump  # q(x_t, x_{t-1} | x_0)
        p = q  # under the noise, the step t = 1 is its own reverse
        if t > 1:
            bayes = joint / joint.sum(1, keepdim=True)
            for k in (0, 1):
                assert table(sohl.binomial_p(s, states, ts, data[[k] * 4])).allclose(bayes[..., k].T)
            p = table(sohl.binomial_p(s, states, ts, *predict(states, s.alpha_bar[ts])))
            eq14 -= (joint * (bayes / p.T[..., None]).log()).sum() / 2
        K += (joint * (p.T / q).log()[..., None]).sum() / 2
        jump = q @ jump
        assert table(sohl.binomial_q(data, s.alpha_bar[[t]])).allclose(jump)
    K += (jump.mean(1) * B(states, torch.full_like(states, rho)).log()).sum()
    entropies = sohl.bound(sohl.BINOMIAL, s, predict, data, torch.tensor([3, 3]))[1].mean() * math.log(2)
    assert (eq14 + entropies).item() == pytest.approx(K.item(), rel=1e-9) and K <= -math.log(2) + 1e-12
    torch.manual_seed(0)
    estimate, _ = sohl.evaluate(sohl.BINOMIAL, s, predict, data.repeat(20000, 1))
    assert agree(estimate * math.log(2), K)

# ---------------------------------------------------------------------------------------------------- hygiene

@pytest.mark.parametrize("script, least", [(cfg, 15), (sohl, 1)])
def test_copies_are_equal(script, least):
    marked = r"^# Copied from ddpm_ho_2020\.py\n(.*?)^(?:# ---|# Own|def start)"
    blocks = re.findall(marked, inspect.getsource(script), re.M | re.S)
    names = re.findall(r"^(?:class|def) (\w+)", "".join(blocks), re.M)
    assert len(names) > least
    for name in names:
        assert inspect.getsource(getattr(script, name)) == inspect.getsource(getattr(ddpm, name)), name

def test_readme_commands_parse(monkeypatch):
    """Every `python script.py ...` of the README and the docstrings is a command that the script takes."""
    for script in (ddpm, cfg, sohl):
        checkpoint = {"config": vars(script.get_args([]))}
        monkeypatch.setattr(script, "load_checkpoint", lambda path, checkpoint=checkpoint: checkpoint)
    texts = [README, ddpm.__doc__, cfg.__doc__, sohl.__doc__, schedules.__doc__]
    commands = re.findall(r"python ((\w+)\.py[^\n`#&]*)", "\n".join(texts))
    assert len(commands) > 6
    for command, module in commands:
        __import__(module).get_args(shlex.split(command)[1:])

def test_equations_in_the_readme_exist():
    for module, name in re.findall(r"`(\w+)\.py`: `(\w+)`", README):
        assert hasattr(__import__(module), name) or hasattr(schedules.Schedule, name), name

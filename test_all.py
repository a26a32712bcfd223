"""Every test: closed forms and identities in float64 first, then whole runs.      pytest -q test_all.py"""
import inspect
import json
import math
import re
import shlex
import signal
import struct
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_conditional_cfg as cfg
import ddpm_ho_2020 as ddpm
import schedules
import sohl_dickstein_2015 as sohl
from schedules import SCHEDULES, Schedule, make_schedule

every_schedule = pytest.mark.parametrize("name", list(SCHEDULES))

def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def expect_exit(capsys, function, *words):
    """function ends with exit status 2 and one line on stderr (after argparse's usage) that has the words."""
    with pytest.raises(SystemExit) as e:
        function()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert e.value.code == 2 and len(lines) == 1 and all(w in lines[0] for w in words), lines

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
    with pytest.raises(ValueError, match="linear"):
        make_schedule("liner", 10)
    with pytest.raises(ValueError):
        make_schedule("linear", 0)
    with pytest.warns(UserWarning, match="0.88"):  # betas made for T = 1000 with T = 50
        Schedule(torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.01, 50)]))

def test_first_practical(tmp_path, monkeypatch):
    monkeypatch.setattr(schedules, "SCHEDULES", dict(SCHEDULES))

    @schedules.schedule
    def mine(T):
        return schedules.from_alpha_bar((1 - schedules.time(T)) ** 3)
    m = schedules.main(schedules.get_args(["--T", "20", "--out", str(tmp_path)]))
    assert "mine" in m and 0 < m["constant"]["structure_share"] < m["cosine"]["structure_share"] <= 1
    assert {p.name for p in tmp_path.iterdir()} == {"schedules.png", "destruction.png", "metrics.json"}

# ------------------------------------------------------------------------- ddpm_ho_2020.py: loss and samplers

def exact_eps(s, m, variance):
    """E[ε | x_t] for x_0 ~ N(m, variance I): the best that any network could say."""
    def eps_theta(x, t):
        ab = s.alpha_bar[t].reshape(-1, *[1] * (x.dim() - 1))
        return (1 - ab).sqrt() * (x - ab.sqrt() * m) / (ab * variance + 1 - ab)
    return eps_theta

def test_eq7_is_eq11_without_clipping():
    s, eps_hat, x = make_schedule("linear", 1000), randn(5, 2, seed=1), randn(5, 2)
    for t in (1, 2, 500, 1000):
        mu_theta, _ = s.q_posterior(ddpm.predict_x0(s, x, t, eps_hat, clip=False), x, t)
        eq11 = (x - s.beta[t] / (1 - s.alpha_bar[t]).sqrt() * eps_hat) / s.alpha[t].sqrt()
        assert mu_theta.allclose(eq11, rtol=1e-9)

def test_loss():
    s, x0, eps = make_schedule("linear", 1000), randn(6, 2), randn(6, 2, seed=1)
    t = torch.tensor([1, 2, 9, 99, 500, 1000])
    assert ddpm.l_simple(lambda x, t: eps, s, x0, t, eps) == 0
    assert ddpm.l_simple(lambda x, t: 0 * x, s, x0, t, eps) == pytest.approx(eps.square().mean().item())
    ab = s.alpha_bar[t][:, None]  # the network is shown x_t of Eq. (4) and the t that belongs to it
    recover = lambda x, u: (x - ab.sqrt() * x0) / (1 - ab).sqrt() + (u - t)[:, None]  # noqa: E731
    assert ddpm.l_simple(recover, s, x0, t, eps) < 1e-20
    assert ddpm.predict_x0(s, s.q_sample(x0, t, eps), t, eps, clip=False).allclose(x0)
    assert ddpm.predict_x0(s, s.q_sample(9 * x0, t, eps), t, eps).abs().max() <= 1

@every_schedule
def test_one_point_is_returned(name):
    s, m = make_schedule(name, 50), randn(1, 3).tanh()
    for variance in ("beta", "beta_tilde"):  # whatever the noise on the way, the last step adds none
        *_, (t, x, _) = ddpm.ddpm_sample(exact_eps(s, m, 0), s, randn(8, 3), variance)
        assert t == 0 and (x - m).abs().max() < 1e-9
    path = list(ddpm.ddpm_sample(exact_eps(s, m, 0), s, randn(4000, 3), "beta_tilde"))
    assert [t for t, _, _ in path] == list(range(49, -1, -1))
    t, x, _ = path[24]  # and on the way it is distributed as q(x_t | x_0 = m)
    assert (x.var(0) / (1 - s.alpha_bar[t]) - 1).abs().max() < 0.15

def test_unit_variance_is_kept():
    """For N(0, I) data, σ² = β is exact (Sec. 3.2): every x_t is N(0, I)."""
    s = make_schedule("linear", 50)
    for _, x, _ in ddpm.ddpm_sample(exact_eps(s, 0, 1), s, randn(100_000, 1), "beta", clip=False):
        assert x.var().item() == pytest.approx(1, abs=0.03)
    torch.manual_seed(0)
    *_, (_, x, _) = ddpm.ddpm_sample(exact_eps(s, 0, 1), s, randn(100_000, 1), "beta_tilde", clip=False)
    assert x.var() < 0.9  # the lower bound of the two is too small here

@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_returns_x0(steps):
    s, x0, eps = make_schedule("cosine", 50), randn(4, 2).tanh(), randn(4, 2, seed=1)
    eps_theta, short = ddpm.subchain(lambda x, t: eps, s, steps)
    *_, (t, x, x0_hat) = ddpm.ddim_sample(eps_theta, short, s.q_sample(x0, 50, eps))
    assert t == 0 and x.allclose(x0, atol=1e-6) and torch.equal(x, x0_hat) or x.allclose(x0_hat)

def test_ddim_rederives_eps_after_clipping():
    s, x = make_schedule("linear", 20), randn(4, 2)
    for t, x_prev, x0_hat in ddpm.ddim_sample(lambda x, t: 0 * x, s, x):
        eps = [(v - s.alpha_bar[u].sqrt() * x0_hat) / (1 - s.alpha_bar[u]).sqrt()
               for v, u in ((x, t + 1), (x_prev, t))]
        assert x0_hat.abs().max() <= 1 and (t == 0 or eps[0].allclose(eps[1]))
        x = x_prev

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
    if steps == 50:
        assert short.beta.allclose(s.beta)

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

# ----------------------------------------------------------------------------- ddpm_ho_2020.py: data and runs

def test_frechet_distance():
    a = randn(5000, 3) * torch.tensor([1, 2, 3]).double()
    b = randn(4000, 3, seed=1) + torch.tensor([0, 0, 2]).double()
    assert ddpm.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert ddpm.frechet_distance(a, b) == pytest.approx(4 + 0 + 1 + 4, rel=0.05)  # |Δm|² + Σ (s_a - s_b)²
    assert ddpm.frechet_distance(a, 3 * a + 1) == pytest.approx(
        (2 * a.mean(0) + 1).square().sum().item() + 4 * a.var(0).sum().item())

def test_pixels():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ddpm.to_uint8(ddpm.to_float(x)), x) and ddpm.to_float(x)[[0, 255]].tolist() == [-1, 1]

def test_digits():
    (x, y), (x_held, y_held) = ddpm.load_data("digits", "nowhere")
    assert x.shape == (1347, 1, 8, 8) and x_held.shape == (450, 1, 8, 8)
    assert x.dtype == torch.uint8 and x.max() == 255
    assert y.bincount().min() > 120 and y_held.bincount().min() > 30

def write_mnist(folder, n=150):
    """MNIST's four files with n noise images each."""
    raw = Path(folder, "MNIST", "raw")
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.random.default_rng(0).integers(0, 256, n * 28 * 28, np.uint8).tobytes()
        labels = (np.arange(n) % 10).astype(np.uint8).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels)
    return raw

def test_mnist_files(tmp_path):
    raw = write_mnist(tmp_path)
    (x, y), held_out = ddpm.load_data("mnist", tmp_path)
    assert x.shape == (150, 1, 28, 28) and y[:3].tolist() == [0, 1, 2] and len(held_out[1]) == 150
    file = raw / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    for folder in (tmp_path, tmp_path / "empty"):
        with pytest.raises(OSError, match="train-images-idx3-ubyte.*t10k-labels.*--dataset digits"):
            ddpm.load_data("mnist", folder, download=False)

def run(*flags, script=ddpm, **extra):
    flags = [*map(str, flags), *(f"--{k.replace('_', '-')}={v}" for k, v in extra.items())]
    return script.main(script.get_args(flags))

@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_ddpm_quick(tmp_path, dataset):
    if dataset == "mnist":
        write_mnist(tmp_path)
    m = run("--quick", dataset=dataset, data_dir=tmp_path, out=tmp_path / "out")
    assert m == json.loads((tmp_path / "out" / "metrics.json").read_text())
    keys = "script dataset seed device torch steps params seconds_train seconds_total config loss frechet"
    keys += " frechet_floor confident_share rarest_class_share images_per_second"
    assert set(keys.split()) <= m.keys()
    written = set("metrics.json checkpoint.pt weights.pt samples.npz samples.png progressive.png reverse.gif"
                  " loss.png training.png .lock".split())
    assert written == {p.name for p in (tmp_path / "out").iterdir()}
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    side = 8 if dataset == "digits" else 28
    assert images.shape == (100, side, side, 1) and images.dtype == np.uint8 and images.std() > 0
    args = ddpm.get_args(["--resume", f"--out={tmp_path}/out", f"--dataset={dataset}"])
    assert args.data_dir == str(tmp_path) and args.steps == 30  # what a run was told need not be told again
    # From the file alone, with no data and no other flag, the same images come back.
    run(checkpoint=tmp_path / "out" / "checkpoint.pt", data_dir=tmp_path / "none", out=tmp_path / "again")
    again = np.load(tmp_path / "again" / "samples.npz")["arr_0"]
    assert again.shape == (64, side, side, 1)
    written -= {p.name for p in (tmp_path / "again").iterdir()}
    assert written == {"checkpoint.pt", "weights.pt", "training.png"}

TINY = ("--quick", "--num-samples=20", "--channels=8", "--dropout=0.1", "--flip")

def test_resume_is_exact(tmp_path):
    run(*TINY, steps=12, out=tmp_path / "a")
    run(*TINY, steps=5, out=tmp_path / "b")
    run("--resume", "--num-samples=20", steps=12, out=tmp_path / "b")
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    for key in ("net", "ema"):
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])
    assert torch.equal(a["losses"], b["losses"]) and torch.equal(a["rng"], b["rng"]) and b["step"] == 12

def test_ctrl_c_saves_and_draws(tmp_path, monkeypatch, capsys):
    calls, l_simple = [], ddpm.l_simple

    def interrupted(*a):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return l_simple(*a)
    monkeypatch.setattr(ddpm, "l_simple", interrupted)
    m = run(*TINY, out=tmp_path)
    assert m["steps"] == 4 and (tmp_path / "samples.png").exists() and "--resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4

def test_nothing_trained_is_lost(tmp_path, capsys):
    run(*TINY, steps=2, out=tmp_path)
    first = (tmp_path / "checkpoint.pt").read_bytes()
    run(*TINY, steps=3, out=tmp_path)
    assert next(tmp_path.glob("checkpoint-*.pt")).read_bytes() == first
    good = (tmp_path / "checkpoint.pt").read_bytes()
    expect_exit(capsys, lambda: run("--resume", steps=60, lr=1e30, warmup=1, out=tmp_path), "longer finite")
    assert (tmp_path / "checkpoint.pt").read_bytes() == good

def test_users_mistakes(tmp_path, capsys, monkeypatch):
    run(*TINY, steps=2, out=tmp_path)
    file, bad = tmp_path / "checkpoint.pt", tmp_path / "bad.pt"
    expect_exit(capsys, lambda: run(dataset="mnits"), "mnits", "digits")
    expect_exit(capsys, lambda: run(schedule="liner"), "liner", "cosine")
    expect_exit(capsys, lambda: run(device="tpu", out=tmp_path / "x"), "device string: tpu")
    expect_exit(capsys, lambda: run(steps=0), "--steps")
    expect_exit(capsys, lambda: run(channels=10), "--channels")
    expect_exit(capsys, lambda: run("--multipliers", 1, 1, 1, 1, 1, out=tmp_path / "x"), "8x8", "16 divides")
    expect_exit(capsys, lambda: run(checkpoint=bad), "no checkpoint", "bad.pt")
    expect_exit(capsys, lambda: run("--resume", out=tmp_path / "none"), "no checkpoint", "none")
    expect_exit(capsys, lambda: run(checkpoint=file, channels=16, out=tmp_path / "x"), "size mismatch")
    for content in (b"", b"text", file.read_bytes()[:20_000]):
        bad.write_bytes(content)
        expect_exit(capsys, lambda: run(checkpoint=bad), "truncated")
    for content in ({"script": "x"}, [1]):
        torch.save(content, bad)
        expect_exit(capsys, lambda: run(checkpoint=bad), "no checkpoint of ddpm_ho_2020.py")
    expect_exit(capsys, lambda: run("--ablation", checkpoint=file), "not allowed with")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for flags in (["--batch=64"], ["--batch=3", "--ablation"]):
        expect_exit(capsys, lambda flags=flags: run(*flags), "3 processes")

# ------------------------------------------------------------ ddpm_ho_2020.py: the paper's other experiments

def test_score_and_denoising_score_matching():
    """L_simple is E (1 - ᾱ_t) |s - ∇ log q(x_t | x_0)|²; the exact ε gives the score of N(m, 1) data."""
    s, x0, eps = make_schedule("linear", 30), randn(30, 2, 3, 3), randn(30, 2, 3, 3, seed=1)
    t, xt = torch.arange(1, 31), s.q_sample(x0, torch.arange(1, 31), eps)
    def net(x, t):
        return torch.sin(3 * x) + t[:, None, None, None]
    weight = (1 - s.alpha_bar[t])[:, None, None, None]
    matched = weight * (ddpm.score(net, s, xt, t) + eps / weight.sqrt()) ** 2
    assert ddpm.l_simple(net, s, x0, t, eps) == pytest.approx(matched.mean().item())
    exact = ddpm.score(exact_eps(s, 0.5, 1.0), s, xt, t)
    assert exact.allclose(s.alpha_bar[t].sqrt()[:, None, None, None] * 0.5 - xt)

def test_langevin_on_an_exact_gaussian_score():
    """N(0.3, 0.2²) data: the samples have their mean and deviation."""
    torch.manual_seed(0)
    s = make_schedule("geometric", 300)
    *_, (t, x, _) = ddpm.langevin_sample(exact_eps(s, 0.3, 0.04), s, randn(4000, 1, 1, 1))
    assert t == 0 and abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.2) < 0.02

@pytest.mark.parametrize("predict", ["x0", "mu"])
def test_other_predictions_are_the_same_epsilon(predict):
    s, x0, eps, t = make_schedule("cosine", 20), randn(19, 1, 2), randn(19, 1, 2, seed=1), torch.arange(1, 20)
    xt = s.q_sample(x0, t, eps)
    target = {"x0": x0, "mu": s.q_posterior(x0, xt, t)[0]}[predict]
    assert ddpm.as_eps_theta(lambda x, t: target, s, predict)(xt, t).allclose(eps, atol=1e-9)
    assert ddpm.l_simple(lambda x, t: target, s, x0, t, eps, predict) == 0

def test_discrete_decoder():
    """Eq. (13) is a distribution over the 256 grey levels, and density times width if the kernel is wide."""
    levels, mean = ddpm.to_float(torch.arange(256)).double(), torch.tensor(0.2).double()
    for sigma in (0.003, 0.1, 3.0):
        log_p = ddpm.discrete_log_likelihood(levels, mean, torch.tensor(sigma).double())
        assert log_p.exp().sum() == pytest.approx(1, abs=1e-6)
    density = torch.distributions.Normal(mean, 3.0).log_prob(levels) + math.log(2 / 255)
    assert log_p[1:-1].allclose(density[1:-1], atol=1e-5)

@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_bits_per_dim_of_a_known_model(variance):
    """N(0, v) data, where Eq. (5) is closed form: x̂_0 errs with variance 1 / (1 / v + SNR_t)."""
    torch.manual_seed(0)
    s, v = make_schedule("linear", 50), 0.04
    ab, x0 = s.alpha_bar, 0.2 * randn(20000, 1, 1, 1)
    expected = [(ab[-1] * v - ab[-1] - (1 - ab[-1]).log()) / 2]
    for t in range(50, 1, -1):
        sigma2 = (s.beta if variance == "beta" else s.beta_tilde)[t]
        distance = s.beta_tilde[t] * (s.snr[t - 1] - s.snr[t]) / (1 / v + s.snr[t])
        expected.append(((sigma2 / s.beta_tilde[t]).log() - 1 + (s.beta_tilde[t] + distance) / sigma2) / 2)
    rate, rmse = ddpm.rate_distortion(exact_eps(s, 0.0, v), s, x0, variance, clip=False)
    assert len(rate) == 51 and len(rmse) == 50
    expected = torch.stack(expected).cumsum(0).float() / math.log(2)
    assert torch.tensor(rate[:-1]).allclose(expected, rtol=0.02, atol=1e-3)
    assert torch.tensor(rate).diff().min() > 0 and torch.tensor(rmse).diff().max() < 0.1  # monotone
    errors = 127.5 * (1 / (1 / v + s.snr[1:].flip(0))).sqrt()
    assert torch.tensor(rmse).allclose(errors.float(), rtol=0.03)
    entropy = math.log2(0.2 * math.sqrt(2 * math.pi * math.e) * 127.5)  # of the grey levels, nearly
    assert entropy - 0.02 < rate[-1] < entropy + (0.5 if variance == "beta" else 5)

def test_interpolation_ends_at_the_noised_endpoints():
    s, a, b = make_schedule("linear", 20), randn(1, 1, 50, 50), randn(1, 1, 50, 50, seed=1)
    x = ddpm.interpolate(s, a, b, 10, [0, 0.5, 1])
    for end, image in ((x[0], a), (x[2], b)):
        noise = (end - s.alpha_bar[10].sqrt() * image[0]) / (1 - s.alpha_bar[10]).sqrt()
        assert noise.std() == pytest.approx(1, abs=0.1) and abs(noise.mean()) < 0.1
    assert x[1].allclose((x[0] + x[2]) / 2)

@pytest.mark.parametrize("sampler", [ddpm.ddpm_sample, ddpm.ddim_sample])
def test_inpainting_keeps_what_is_known(sampler):
    s, x0, known = make_schedule("linear", 30), randn(1, 1, 4, 4).clamp(-1, 1), torch.rand(4, 4) < 0.5
    chain = sampler(ddpm.inpaint(exact_eps(s, 0.7, 1e-6), s, x0, known), s, randn(3, 1, 4, 4, seed=1))
    *_, (_, _, x0_hat) = chain
    assert x0_hat.allclose(torch.where(known, x0, 0.7), atol=1e-3)

def write_images(folder, names, size=(40, 30)):
    from PIL import Image
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = ["RGB", "L", "P"][i % 3] if path.suffix.lower() == ".png" else "RGB"
        Image.fromarray(np.full((*size, 3), 20 * i % 256, np.uint8)).convert(mode).save(path)

@pytest.mark.parametrize("names", [
    ["stanford_cars/cars_train/0.jpg", "stanford_cars/cars_train/1.jpg"],
    ["cars_train/cars_train/0.jpg", "cars_train/cars_train/1.JPG"],
    ["stanford_cars/Audi/0.jpg", "stanford_cars/BMW/1.jpg"], ["0.jpg", "1.jpg"]])
def test_cars_in_every_layout(tmp_path, names):
    write_images(tmp_path, names)
    (x, y), (x_held, _) = ddpm.load_folder("cars", tmp_path, (16, 24), tmp_path / "cache.pt")
    assert x.shape == x_held.shape == (1, 3, 16, 24) and x.dtype == torch.uint8

def test_cars_labels_from_the_mat(tmp_path):
    from scipy.io import savemat
    write_images(tmp_path / "stanford_cars", ["cars_train/0.jpg", "cars_train/1.jpg", "cars_test/0.jpg"])
    annotations = np.array([("0.jpg", 7), ("1.jpg", 3)], dtype=[("fname", object), ("class", object)])
    savemat(tmp_path / "stanford_cars" / "cars_train_annos.mat", {"annotations": annotations})
    sets = ddpm.load_folder("cars", tmp_path, (8, 8), tmp_path / "cache.pt")
    labels = {x.flatten()[0].item(): y.item() for x, y in sets}  # write_images: grey level 0 and 20
    assert labels == {0: 1, 20: 0}  # the classes 3 and 7, counted from 0; no test image

def test_folders(tmp_path, capsys):
    """Any extension and mode; broken files named and skipped; the cache is used, and remade on a change."""
    folder, cache = tmp_path / "images", tmp_path / "cache.pt"
    write_images(folder, ["a/0.JPG", "b/1.png", "b/2.png", "b/3.Png", "a/4.jpeg"])
    whole = (folder / "a/0.JPG").read_bytes()
    (folder / "a/broken.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "a/text.png").write_text("not an image")
    (x, y), (x_held, y_held) = sets = ddpm.load_folder(folder, tmp_path, (16, 16), cache)
    assert x.shape == (4, 3, 16, 16) and sorted(torch.cat([y, y_held]).tolist()) == [0, 0, 1, 1, 1]
    err = capsys.readouterr().err
    assert all(f"skipped {folder}/a/{name}" in err for name in ("broken.jpg", "text.png"))
    torch.save(torch.load(cache) | {"sets": [(x + 1, y), sets[1]]}, cache)
    assert torch.equal(ddpm.load_folder(folder, tmp_path, (16, 16), cache)[0][0], x + 1)  # from the cache
    write_images(folder, ["c/5.png"])
    assert len(ddpm.load_folder(folder, tmp_path, (16, 16), cache)[0][0]) == 5
    cache.write_bytes(b"broken")
    assert ddpm.load_folder(folder, tmp_path, (8, 12), cache)[0][0].shape == (5, 3, 8, 12)
    (tmp_path / "none").mkdir()
    none = tmp_path / "none"
    for dataset, word in ((none, "0 readable images in"), ("cars", "found nothing"), ("car", "cifar10")):
        expect_exit(capsys, lambda dataset=dataset: run(dataset=dataset, data_dir=none, out=tmp_path), word)

def test_experiments_on_a_folder(tmp_path):
    write_images(tmp_path / "images", [f"{i}.png" for i in range(40)])
    flags = dict(T=20, image_size="8x16", out=tmp_path / "out")
    m = run("--quick", "--experiments", dataset=tmp_path / "images", **flags)
    for name in ("rate_distortion", "interpolation", "inpainting", "samples"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 1000
    assert m["bits_per_dim"] > m["bits_per_dim_rate"] > m["bits_per_dim_L_T"] > 0 and m["inpainting_rmse"] > 0
    flags = dict(sampler="langevin", sampling_steps=3, num_samples=4, out=tmp_path / "b")
    m = run(checkpoint=tmp_path / "out/weights.pt", **flags)
    assert m["dataset"] == str(tmp_path / "images")

def test_two_processes_train_as_one(tmp_path):
    import subprocess
    import sys
    flags = [*TINY, "--steps=5", "--batch=8", "--num-samples=4", "--dropout=0", "--device=cpu"]
    run(*flags, out=tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, ddpm.__file__, *flags, f"--out={tmp_path}/two"]
    subprocess.run(command, check=True, capture_output=True)
    one, two = (torch.load(tmp_path / k / "checkpoint.pt")["ema"] for k in ("one", "two"))
    assert all(one[name].allclose(two[name], atol=1e-4) for name in one)

def test_ablation(tmp_path, capsys):
    rows = run("--ablation", *TINY, "--num-samples=70", "--T=8", "--steps=2", out=tmp_path)
    assert list(rows) == ["mu-vlb", "mu-simple", "eps-vlb", "eps-simple"]
    assert all((tmp_path / name / "metrics.json").exists() for name in rows)
    assert (tmp_path / "ablation.png").exists()
    table = capsys.readouterr().out.split("predicts, loss")[1].splitlines()
    assert table[4].split() == ["eps-simple", f"{rows['eps-simple']['frechet']:.1f}",
                                f"{rows['eps-simple']['bits_per_dim']:.2f}", "3.17"]

@pytest.mark.parametrize("loss, predict", [("vlb", "mu"), ("vlb", "eps"), ("simple", "x0")])
def test_table_2_trains(tmp_path, loss, predict):
    m = run(*TINY, loss=loss, predict=predict, steps=8, num_samples=4, out=tmp_path)
    assert math.isfinite(m["loss"])

# ------------------------------------------------------------------------------------ ddpm_conditional_cfg.py

K, MEANS, VARIANCE = 3, randn(3, 2, seed=1), 0.3  # three Gaussian classes in the plane, equally likely

def gaussian_classes(s):
    """Exact ε(x, t, y), where y = K is all classes together, and exact log p(x_t, y) + c of N(m_y, v I)."""
    def parts(x, t):
        alpha_bar = s.alpha_bar[t][:, None]
        away = x[:, None] - alpha_bar[..., None].sqrt() * MEANS  # (B, K, 2)
        return alpha_bar, away, alpha_bar * VARIANCE + 1 - alpha_bar

    def log_p(x, t):
        return -parts(x, t)[1].square().sum(2) / (2 * parts(x, t)[2])

    def eps_theta(x, t, y):
        alpha_bar, away, variance = parts(x, t)
        p = torch.where((y == K)[:, None], log_p(x, t).softmax(1), torch.eye(K + 1).double()[y][:, :K])
        return (1 - alpha_bar).sqrt() * (p[..., None] * away).sum(1) / variance
    return eps_theta, log_p

@pytest.mark.parametrize("w", [-1, -0.5, 0, 1, 4])
@pytest.mark.parametrize("kind", ["free", "classifier"])
def test_cfg_guided_score_of_gaussian_classes(kind, w):
    """Score of p(x_t | y) p(y | x_t)^w: -(x - √ᾱ m_y) / v_t + w √ᾱ (m_y - Σ p(k | x_t) m_k) / v_t."""
    s = make_schedule("linear", 100)
    x, t, y = randn(60, 2), torch.arange(1, 61), torch.arange(60) % K
    eps_theta, log_p = gaussian_classes(s)
    got = (cfg.guided(eps_theta, y, K, w) if kind == "free" else
           cfg.classifier_guided(eps_theta, log_p, s, y, K, w))(x, t)
    root = s.alpha_bar[t].sqrt()[:, None]
    p = torch.softmax(log_p(x, t), 1)
    score = -(x - root * MEANS[y]) + w * root * (MEANS[y] - p @ MEANS)
    score = score / (root ** 2 * VARIANCE + 1 - root ** 2)
    assert got.allclose(-(1 - root ** 2).sqrt() * score, rtol=1e-10, atol=1e-12)

def test_cfg_classifier_guidance_shifts_the_mean():
    """An unclipped DDPM step moves by (1 + w) β_t / √α_t ∇ log p: their Algorithm 1, divided by √α_t."""
    s, x, y, w = make_schedule("cosine", 20), randn(30, 2).requires_grad_(), torch.arange(30) % K, 1.5
    eps_theta, log_p = gaussian_classes(s)
    guides = cfg.guided(eps_theta, y, K, -1), cfg.classifier_guided(eps_theta, log_p, s, y, K, w)
    plain, steered = (next(cfg.ddpm_sample(e, s, x, clip=False, variance="beta_tilde"))[1]
                      for e in guides if torch.manual_seed(0))
    log_p_y = log_p(x, torch.full((30,), 20)).log_softmax(1)[range(30), y]
    gradient, = torch.autograd.grad(log_p_y.sum(), x)
    shift = (1 + w) * s.beta[20] / s.alpha[20].sqrt() * gradient
    assert (steered - plain).allclose(shift, rtol=1e-9, atol=1e-12) and shift.abs().max() > 1e-3

def network():
    """A conditional U-Net with no weight at 0, where its last layer starts."""
    torch.manual_seed(0)
    net = cfg.make_eps_theta(cfg.get_args(["--quick"]), (1, 8, 8)).requires_grad_(False)
    for p in net.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return net

def test_cfg_w_is_the_papers():
    net, calls = network(), []

    def eps_theta(x, t, y):
        calls.append(len(x))
        return net(x, t, y)
    x, t, y = randn(4, 1, 8, 8).float(), torch.tensor([1, 10, 500, 1000]), torch.tensor([0, 3, 9, 3])
    eps = {w: cfg.guided(eps_theta, y, 10, w)(x, t) for w in (-1, 0, 0.5, 1, 4)}
    assert calls == [4, 4, 8, 8, 8]  # one evaluation at w = -1 and w = 0, else both in one batch
    assert torch.equal(eps[0], net(x, t, y)) and torch.equal(eps[-1], net(x, t, torch.full((4,), 10)))
    assert (eps[0] - eps[-1]).abs().amax((1, 2, 3)).min() > 1e-3  # labels matter
    for w in (0.5, 1, 4):  # linear in w, so two points tell the rest
        assert eps[w].allclose(eps[0] + w * (eps[0] - eps[-1]), rtol=1e-4, atol=1e-4)

def test_cfg_unet_is_unchanged():
    """With label embeddings of 0 the network is the U-Net that it was made from."""
    net, x, t = network(), randn(3, 1, 8, 8).float(), torch.tensor([1, 9, 99])
    net.label.weight.zero_()
    assert torch.equal(net(x, t, torch.tensor([0, 5, 10])), cfg.UNet.forward(net, x, t))

def test_cfg_labels_out_of_range():
    for y in ([0, 10], [-1, 0]):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
            cfg.guided(None, torch.tensor(y), 10, 1)
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
            cfg.classifier_guided(None, None, None, torch.tensor(y), 10, 1)

def test_cfg_labels_are_dropped_one_by_one(tmp_path, monkeypatch):
    torch.manual_seed(0)
    y = torch.arange(10).repeat(10_000)
    dropped = cfg.drop_labels(y, 10, 0.3)
    assert set((dropped - y)[dropped != 10].tolist()) == {0}
    assert (dropped == 10).double().mean() == pytest.approx(0.3, abs=5 * (0.21 / 1e5) ** 0.5)
    batches, l_cfg = [], cfg.l_cfg
    monkeypatch.setattr(cfg, "l_cfg", lambda *a: batches.append(a[3]) or l_cfg(*a))
    run("--quick", "--p-uncond=0.2", "--num-samples=20", "--w=0", out=tmp_path, steps=12, script=cfg)
    share = (torch.stack(batches) == 10).double().mean(1)  # of each training batch
    assert 0 < share.min() and share.max() < 0.5 and share.mean() == pytest.approx(0.2, abs=0.05)
    torch.manual_seed(0)
    before = cfg.make_eps_theta(cfg.get_args(["--quick"]), (1, 8, 8)).state_dict()["label.weight"]
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["net"]["eps_theta.label.weight"]
    assert (trained - before).abs().amax(1).min() > 1e-4  # every row, the null token's too

def test_cfg_quick(tmp_path):
    m = run("--quick", out=tmp_path, script=cfg)
    assert m == json.loads((tmp_path / "metrics.json").read_text())
    keys = "script dataset seed device torch steps params seconds_train seconds_total config frechet_floor"
    assert set(keys.split()) <= m.keys()
    for sweep in (m["sweep"], m["sweep_classifier"]):
        assert [row["w"] for row in sweep] == [-1, 0, 0.5, 1, 2, 4]
        assert all({"w", "frechet", "classifier_score", "label_accuracy"} == row.keys() for row in sweep)
        assert all(1 <= row["classifier_score"] <= 10 for row in sweep)
    assert m["sweep"][0] == m["sweep_classifier"][0]  # w = -1: the unconditional model, twice
    written = {"metrics.json", "checkpoint.pt", "samples.npz", "samples.png", "tradeoff.png"}
    assert written == {p.name for p in tmp_path.iterdir()}
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays["arr_0"].shape == (100, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == list(range(10)) * 10

def test_cfg_mnist_from_its_checkpoint(tmp_path):
    write_mnist(tmp_path)
    run(*TINY_CFG, dataset="mnist", data_dir=tmp_path, out=tmp_path, steps=3, script=cfg)
    run("--classes=3,7", "--w=2", checkpoint=tmp_path / "checkpoint.pt", num_samples=5,
        data_dir=tmp_path / "none", out=tmp_path / "again", script=cfg)  # no data
    arrays = np.load(tmp_path / "again" / "samples.npz")
    assert arrays["arr_0"].shape == (5, 28, 28, 1) and arrays["arr_1"].tolist() == [3, 7, 3, 7, 3]

TINY_CFG = ("--quick", "--num-samples=10", "--sampling-steps=2", "--w=1")

def test_cfg_on_a_folder_with_one_folder_a_class(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "pictures", [f"{name}/{i}.png" for name in "abc" for i in range(8)])
    flags = (*TINY_CFG, "--channels=8", "--steps=3", "--dataset=pictures")
    expect_exit(capsys, lambda: run(*flags, script=cfg), "ddpm_ho_2020.py --dataset pictures")
    run(*TINY, "--dataset=pictures", "--image-size=8", "--steps=2")
    run(*flags, script=cfg)
    arrays = np.load("runs/ddpm_conditional_cfg-pictures/samples.npz")
    assert arrays["arr_0"].shape == (10, 8, 8, 3) and arrays["arr_1"].tolist() == [0, 1, 2] * 3 + [0]

def test_cfg_resume_is_exact(tmp_path):
    run(*TINY_CFG, steps=8, out=tmp_path / "a", script=cfg)
    run(*TINY_CFG, steps=5, out=tmp_path / "b", script=cfg)
    run("--resume", *TINY_CFG[1:], steps=8, out=tmp_path / "b", script=cfg)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(a[key][k], b[key][k]) for key in ("net", "ema") for k in a[key])
    assert torch.equal(a["losses"], b["losses"]) and torch.equal(a["rng"], b["rng"]) and b["step"] == 8

def test_cfg_users_mistakes(tmp_path, capsys):
    expect_exit(capsys, lambda: run(classes="3,12", out=tmp_path, script=cfg), "labels must lie in 0..9")
    expect_exit(capsys, lambda: run(device="tpu", out=tmp_path, script=cfg), "device string: tpu")
    expect_exit(capsys, lambda: run(p_uncond=0, script=cfg), "--p-uncond")
    torch.save({"script": "ddpm_ho_2020"}, tmp_path / "checkpoint.pt")
    expect_exit(capsys, lambda: run("--resume", out=tmp_path, script=cfg), "no checkpoint of")

# ------------------------------------------------------------------------------------- sohl_dickstein_2015.py

def gaussian_moments(xt, alpha_bar):
    """The moments for x_0 ~ N(0, I)."""
    return alpha_bar.sqrt()[:, None] * xt, (1 - alpha_bar)[:, None, None] * torch.eye(xt.shape[1]).to(xt)

@every_schedule
def test_K_of_an_isotropic_gaussian_is_its_log_likelihood(name):
    """As the authors' code notes: the gain over L_null is 0. One KL, written out:
    KL(N(μ, σ² I) || N(m, σ² M)) = ½ [tr M⁻¹ + (m - μ)ᵀ M⁻¹ (m - μ) / σ² - D + log det M], of which the first
    three cancel in expectation."""
    s, D = make_schedule(name, 40), 3
    K, x0 = 0, randn(4000, D)
    for t in range(2, 41):
        ts = torch.full((len(x0),), t)
        torch.manual_seed(t)
        kl, entropies = sohl.bound(sohl.GAUSSIAN, s, gaussian_moments, x0, ts)
        torch.manual_seed(t)
        xt = sohl.gaussian_q(x0, s.alpha_bar[ts]).rsample()
        p = sohl.gaussian_p(s, xt, ts, *gaussian_moments(xt, s.alpha_bar[ts]))
        mu_tilde, beta_tilde = s.q_posterior(x0, xt, ts)
        M, delta = p.covariance_matrix[0, 0, 0] / s.beta_tilde[t], (p.mean - mu_tilde) ** 2 / beta_tilde
        assert (2 * math.log(2) * kl).allclose(D / M + delta.sum(1) / M - D + D * M.log(), atol=1e-9)
        assert (kl.mean() - D * M.log2() / 2).abs() < 5 * kl.std() / 4000 ** 0.5 + 1e-12
        K -= D * M.log2() / 2
    L_null = -D / 2 * math.log2(2 * math.pi * math.e)
    assert entropies.unique() == entropies[0] and (K + entropies[0]).item() == pytest.approx(L_null, rel=1e-9)

def test_a_new_network_is_the_null_model():
    net, xt, alpha_bar = sohl.RollNet(67, [16, 5]), randn(5, 2), torch.rand(5).double()
    for parameter in net[-2].parameters():  # as main does
        torch.nn.init.zeros_(parameter)
    for ours, null in zip(net(xt.float(), alpha_bar), gaussian_moments(xt, alpha_bar)):
        assert ours.double().allclose(null, atol=1e-6)

def test_exact_moments_are_tweedies():
    """x̂_0 and S against the gradient and Hessian of log q(x_t), and so the score that is made of x̂_0."""
    s, density = make_schedule("geometric", 40), sohl.roll_density(0.5)
    m, v = density[:2]
    for t in (3, 20, 35):
        ab = s.alpha_bar[t]
        def log_q(x, ab=ab):
            return (-((x - ab.sqrt() * m) ** 2 / (2 * (ab * v + 1 - ab))).sum(1)).logsumexp(0)
        for x in s.q_sample(m[::90], t, randn(len(m[::90]), 2)):
            x0_hat, S = sohl.exact_moments(density, x[None], ab[None])
            gradient = torch.autograd.functional.jacobian(log_q, x)
            hessian = torch.autograd.functional.hessian(log_q, x)
            assert sohl.score(x0_hat, x[None], ab[None])[0].allclose(gradient, rtol=1e-6, atol=1e-6)
            assert S[0].allclose((1 - ab) / ab * (torch.eye(2) + (1 - ab) * hessian), rtol=1e-5, atol=1e-8)

def test_roll_density_and_its_bound():
    """The density is scikit-learn's; with the true moments K is below -H(X), and near it if T is large."""
    density, x0 = sohl.roll_density(0.5), sohl.draw_roll(20000, 0.5, 0)
    assert x0.mean(0).abs().max() < 0.03 and (x0.var(0) - 1).abs().max() < 0.03
    log_q = -((x0[:2000, None] - density[0]) ** 2 / (2 * density[1])).sum(2)
    log_q = log_q.logsumexp(1) - math.log(len(density[0]) * 2 * math.pi) - density[1].log().sum() / 2
    ceiling = sohl.negative_entropy(density)
    assert abs(log_q.mean() / math.log(2) - ceiling) < 4 * log_q.std() / 2000 ** 0.5
    for beta, least in ((sohl.start_beta("learned", 200), -0.2), (SCHEDULES["cosine"](40)[1:], -9)):
        s = Schedule(torch.cat([torch.zeros(1), beta]))
        K, steps = sohl.evaluate(sohl.GAUSSIAN, s, partial(sohl.exact_moments, density), x0[:1000])
        log_q_of_them = log_q[:1000] / math.log(2)  # each K estimates a bound on its own log q(x_0)
        assert least < (K - log_q_of_them).mean() < 4 * (K - log_q_of_them).std() / 1000 ** 0.5
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
    """Eq. (14) against its definition, E_q log p(x_T) Π p(x_{t-1} | x_t) / q(x_t | x_{t-1}), over all
    trajectories of two bits, and q(x_{t-1} | x_t, x_0) against Bayes' rule."""
    monkeypatch.setattr(sohl, "RHO", rho := 0.5)  # the rate of these data, as 0.2 is the heartbeats'
    s = make_schedule("inverse", 3)
    states, data = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 2), [1, 2]  # (0, 1) and (1, 0)
    def B(x, rate):
        return torch.where(x == 1, rate, 1 - rate).prod(-1)
    def q_step(t):  # q(x_t = row | x_{t-1} = column)
        return B(states[:, None], (1 - s.beta[t]) * states + s.beta[t] * rho)
    def q_jump(t):
        return sohl.binomial_q(states, s.alpha_bar[t]).log_prob(states[:, None]).exp()
    def predict(xt, alpha_bar):
        w = B(xt[:, None], alpha_bar[0] * (states[data] - rho) + rho)
        return w / w.sum(1, keepdim=True) @ states[data],
    def p_step(t):  # p(x_{t-1} = row | x_t = column)
        rate, = predict(states, s.alpha_bar[[t]])
        return sohl.binomial_p(s, states, torch.full((4,), t), rate).log_prob(states[:, None]).exp()
    assert q_jump(2).allclose(q_step(2) @ q_step(1))
    q = torch.einsum("ba,cb,dc->abcd", q_step(1), q_step(2), q_step(3))[data]
    noise = B(states, torch.tensor(rho).double())  # p(x_T), under which the step t = 1 is its own reverse
    p = torch.einsum("ab,bc,cd,d->abcd", q_step(1), p_step(2), p_step(3), noise)[data]
    K = sohl.bound(sohl.BINOMIAL, s, predict, states[data], torch.tensor([3, 3]))[1].mean() * math.log(2)
    for t in (2, 3):
        for k in data:
            x0, ts = states[[k] * 4], torch.full((4,), t)
            posterior = sohl.binomial_p(s, states, ts, x0)
            bayes = q_step(t).T * q_jump(t - 1)[:, [k]]  # rows x_{t-1}, columns x_t
            bayes = bayes / bayes.sum(0)
            assert posterior.log_prob(states[:, None]).exp().allclose(bayes)
            K -= 0.5 * (q_jump(t)[:, k] * (bayes * (bayes / p_step(t)).log()).sum(0)).sum()
    assert K == pytest.approx((0.5 * q * (p / q).log()).sum().item(), rel=1e-9)
    assert K <= -math.log(2) + 1e-12
    torch.manual_seed(0)
    estimate, _ = sohl.evaluate(sohl.BINOMIAL, s, predict, states[data * 20000])
    assert abs(estimate.mean() * math.log(2) - K) < 4 * estimate.std() / 200

@pytest.mark.parametrize("data", ["swiss_roll", "heartbeat"])
def test_sohl_quick(tmp_path, data):
    run("--quick", data=data, script=sohl, out=tmp_path)
    m = json.loads((tmp_path / "metrics.json").read_text())
    assert {"script", "dataset", "seed", "device", "torch", "steps", "params", "seconds_total"} <= set(m)
    if data == "heartbeat":
        assert m["K_bits_per_sequence"] < m["true_bits_per_sequence"] and 0 <= m["valid_share"] <= 1
    else:
        assert m["ceiling_bits"] == pytest.approx(2.703, abs=0.001) and -6 < m["K_bits"] < m["ceiling_bits"]
        assert m["K_minus_L_null_bits"] == pytest.approx(m["K_bits"] + 4.094, abs=0.001)
    again = run(num_samples=2000, checkpoint=tmp_path / "checkpoint.pt", script=sohl, out=tmp_path / "b")
    assert again["K_stderr_bits"] == m["K_stderr_bits"]

def test_sohl_learns_beta_and_resumes_exactly(tmp_path, monkeypatch, capsys):
    """Stopped by Ctrl-C in its 10th of 20 steps and resumed, a run ends as one that was not."""
    flags, bound, calls = ["--quick", "--steps", "20"], sohl.bound, []
    run(*flags, script=sohl, out=tmp_path / "a")
    def interrupted(*a):
        calls.append(1)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
        return bound(*a)
    monkeypatch.setattr(sohl, "bound", interrupted)
    run(*flags, script=sohl, out=tmp_path / "b")
    assert "stopped at step 10 of 20" in capsys.readouterr().out
    run("--resume", "--num-samples", "2000", script=sohl, out=tmp_path / "b")
    a, b = (torch.load(tmp_path / k / "checkpoint.pt") for k in "ab")
    assert b["step"] == 20 and all(torch.equal(a["net"][name], b["net"][name]) for name in a["net"])
    start = sohl.start_beta("learned", 40).logit()
    assert a["net"]["logits"][0] == start[0] and ((a["net"]["logits"] - start)[1:] != 0).all()

def test_sohl_users_mistakes(tmp_path, capsys):
    run("--quick", "--steps=1", script=sohl, out=tmp_path / "run")
    checkpoint = f"--checkpoint={tmp_path}/run/checkpoint.pt"
    for flags, word in (("--data=rolls", "swiss_roll"), ("--noise=0", "--noise"),
                        ("--seed=-2", "--seed"), ("--T=1", "--T"),
                        ("--quick --lr=1e9 --steps=30", "no longer finite"), ("--quick --device=tpu", "tpu"),
                        ("--data=heartbeat --schedule=learned", "learned"),
                        ("--checkpoint=none.pt", "no checkpoint"),
                        (f"{checkpoint} --schedule=linear", "learned"),
                        (f"{checkpoint} --T=9", "size mismatch")):
        expect_exit(capsys, lambda flags=flags: run(*flags.split(), script=sohl, out=tmp_path), word)

# ---------------------------------------------------------------------------------------------------- hygiene

@pytest.mark.parametrize("script, least", [(cfg, 15), (sohl, 1)])
def test_copies_are_equal(script, least):
    blocks = inspect.getsource(script).split("# Copied from ddpm_ho_2020.py\n")[1:]
    blocks = [re.split(r"^(?:# ---|# Own|def start)", block, flags=re.M)[0] for block in blocks]
    names = [name for block in blocks for name in re.findall(r"^(?:class|def) (\w+)", block, re.M)]
    assert len(names) > least
    for name in names:
        assert inspect.getsource(getattr(script, name)) == inspect.getsource(getattr(ddpm, name)), name

def test_readme_commands_parse(monkeypatch):
    """Every `python script.py ...` of the README and the docstrings is a command that the script takes."""
    here = Path(__file__).parent
    for script in (ddpm, cfg, sohl):
        checkpoint = {"config": vars(script.get_args([]))}
        monkeypatch.setattr(script, "load_checkpoint", lambda path, checkpoint=checkpoint: checkpoint)
    texts = [(here / "README.md").read_text(), ddpm.__doc__, cfg.__doc__, sohl.__doc__, schedules.__doc__]
    commands = re.findall(r"python ((\w+)\.py[^\n`#&]*)", "\n".join(texts))
    assert len(commands) > 6
    for command, module in commands:
        __import__(module).get_args(shlex.split(command)[1:])

def test_equations_in_the_readme_exist():
    text = (Path(__file__).parent / "README.md").read_text()
    for module, name in re.findall(r"`(\w+)\.py`: `(\w+)`", text):
        assert hasattr(__import__(module), name) or hasattr(schedules.Schedule, name), name

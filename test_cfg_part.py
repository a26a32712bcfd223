import inspect
import json
import re

import numpy as np
import pytest
import torch

import ddpm_conditional_cfg as cfg
import ddpm_ho_2020 as ddpm
from schedules import make_schedule
from test_all import expect_exit, randn, run, write_mnist  # not needed inside test_all.py

# ------------------------------------------------------------------------------------ ddpm_conditional_cfg.py

K, MEANS, VARIANCE = 3, randn(3, 2, seed=1), 0.3  # three Gaussian classes in the plane, as likely as each other

def gaussian_classes(s):
    """Exact ε(x, t, y), where y = K is all classes together, and exact log p(x_t, y) + const of N(m_y, v I)."""
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
    """An unclipped DDPM step moves by (1 + w) β_t / √α_t ∇ log p: Algorithm 1 of Dhariwal & Nichol, but for √α_t."""
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

def test_cfg_resume_is_exact(tmp_path):
    run(*TINY_CFG, steps=8, out=tmp_path / "a", script=cfg)
    run(*TINY_CFG, steps=5, out=tmp_path / "b", script=cfg)
    run("--resume", *TINY_CFG[1:], steps=8, out=tmp_path / "b", script=cfg)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(a[key][k], b[key][k]) for key in ("net", "ema") for k in a[key])
    assert torch.equal(a["losses"], b["losses"]) and torch.equal(a["rng"], b["rng"]) and b["step"] == 8

def test_cfg_users_mistakes(tmp_path, capsys):
    expect_exit(capsys, lambda: run(classes="3,12", script=cfg), "labels must lie in 0..9")
    expect_exit(capsys, lambda: run(device="cuda:99", script=cfg), "cuda:99")
    expect_exit(capsys, lambda: run(p_uncond=0, script=cfg), "--p-uncond")
    torch.save({"script": "ddpm_ho_2020"}, tmp_path / "checkpoint.pt")
    expect_exit(capsys, lambda: run("--resume", out=tmp_path, script=cfg), "not a checkpoint of")

def test_cfg_copies_are_equal():
    blocks = inspect.getsource(cfg).split("# Copied from ddpm_ho_2020.py\n")[1:]
    names = [name for block in blocks for name in
             re.findall(r"^(?:class|def) (\w+)", re.split(r"^(?:# ---|CLASSES)", block, flags=re.M)[0], re.M)]
    assert len(names) > 15
    for name in names:
        assert inspect.getsource(getattr(cfg, name)) == inspect.getsource(getattr(ddpm, name)), name

"""Classifier-Free Diffusion Guidance.  Ho & Salimans 2022, arXiv 2207.12598.

One idea: train one network with the label y and, by dropping labels, without it; the difference of its two
predictions points towards "more like class y", and w says how far to go. (Equations in copies are Ho's.)

    python ddpm_conditional_cfg.py                  # 8x8 digits, sweep over w: 4 min 42 s on two CPU cores
    python ddpm_conditional_cfg.py --dataset mnist --guidance free       # 28x28 digits, one kind of guidance
    python ddpm_conditional_cfg.py --dataset cars   # or a folder, once ddpm_ho_2020.py has decoded it
    python ddpm_conditional_cfg.py --checkpoint runs/ddpm_conditional_cfg-digits/checkpoint.pt --w 2

Seed 0, label accuracy and Fréchet distance (floor 21): w = -1 0.10, 68; w = 0 0.984, 25; w = 2 1.000, 96;
w = 4 1.000, 123; classifier guidance at its best, w = 1: 0.928, 36.
Differs from the paper:
  - Ho et al. 2020's T steps and schedule, not a continuous log-SNR; the sweep draws by DDIM in 50 steps.
  - x̂_0 is clipped to [-1, 1] in sampling and the EMA is warmed up, for the reasons in ddpm_ho_2020.py.
  - No FID or Inception Score, which need a downloaded network: the Fréchet distance and exp E KL are from a
    small classifier trained here. Compare them across w and with the floor, not with the paper's.
Shapes: B batch, C channels, H height, W width, D embedding, K classes.
"""
import argparse
import copy
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from schedules import SCHEDULES, Schedule, like, make_schedule

# ------------------------------------------------ Sec. 3: the loss, the two kinds of guidance, the samplers

def drop_labels(y, null, p_uncond):
    """y becomes ∅ with probability p_uncond, for each example on its own.  Algorithm 1.  (B,) -> (B,)"""
    return torch.where(torch.rand(len(y), device=y.device) < p_uncond, null, y)

def l_cfg(eps_theta, s, x0, y, t, eps):
    """E |ε - ε_θ(√ᾱ_t x_0 + √(1 - ᾱ_t) ε, t, y)|², per dimension, some of the y being ∅.  Algorithm 1.
    x0 (B, C, H, W) in [-1, 1];  y, t (B,), t from 1..T;  eps like x0, drawn from N(0, I).  -> ()"""
    return F.mse_loss(eps_theta(s.q_sample(x0, t, eps), t, y), eps)

def guided(eps_theta, y, null, w):
    """ε̃(x_t, t) = (1 + w) ε_θ(x_t, t, y) - w ε_θ(x_t, t, ∅).  Eq. (6).  -> callable (x, t), for a sampler
    w = 0 is the conditional model and w = -1 the unconditional one, with one evaluation instead of two. Much
    other code calls 1 + w the scale.   y (B,) in 0..null-1, else ValueError."""
    if y.min() < 0 or y.max() >= null:  # such a label in an embedding would take the GPU down
        raise ValueError(f"labels must lie in 0..{null - 1}, not {y.min()}..{y.max()}")
    none = torch.full_like(y, null)
    if w in (0, -1):
        return lambda x, t: eps_theta(x, t, none if w else y)
    def eps_tilde(x, t):  # both branches in one batch of 2B
        eps_y, eps_null = eps_theta(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, none])).chunk(2)
        return (1 + w) * eps_y - w * eps_null
    return eps_tilde

def classifier_guided(eps_theta, classifier, s, y, null, w):
    """ε̂(x_t, t) = ε_θ(x_t, t, ∅) - (1 + w) √(1 - ᾱ_t) ∇ log p(y|x_t).  Dhariwal & Nichol 2021, Algorithm 2.
    ∇ log p(x_t) = -ε / √(1 - ᾱ_t): the score is ∇ log p(x_t) + (1 + w) ∇ log p(y|x_t), by Bayes' rule that of
    Eq. (6) if all are exact. Their scale is 1 + w; w = -1 asks no classifier. In ddpm_sample, unclipped, it
    shifts μ_θ by (1 + w) β_t / √α_t ∇ log p(y|x_t): their Algorithm 1's s Σ ∇ log p(y|x_t), but for √α_t.
    classifier: any callable (x, t) -> logits (B, K) with a gradient in x.   -> callable (x, t)"""
    unconditional = guided(eps_theta, y, null, -1)
    def eps_tilde(x, t):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_()
            log_p = classifier(x_in, t).log_softmax(1)[torch.arange(len(y)), y]  # (B,)
            gradient, = torch.autograd.grad(log_p.sum(), x_in)
        return unconditional(x, t) - (1 + w) * like((1 - s.alpha_bar[t]).sqrt(), x) * gradient
    return unconditional if w == -1 else eps_tilde

# Copied from ddpm_ho_2020.py
def predict_x0(s, xt, t, eps_hat, clip=True):
    """x̂_0 = (x_t - √(1 - ᾱ_t) ε̂) / √ᾱ_t.  Eq. (15).  Near t = T this divides by almost 0, so a small error
    of ε̂ throws x̂_0 far out of the data's range, and sampling does not come back: hence the clip."""
    x0_hat = (xt - like((1 - s.alpha_bar[t]).sqrt(), xt) * eps_hat) / like(s.alpha_bar[t].sqrt(), xt)
    return x0_hat.clamp(-1, 1) if clip else x0_hat

def eps_of(s, xt, t, x0):
    """The ε that takes x_0 to x_t, (x_t - √ᾱ_t x_0) / √(1 - ᾱ_t): Eq. (4) solved for ε."""
    return (xt - like(s.alpha_bar[t].sqrt(), xt) * x0) / like((1 - s.alpha_bar[t]).sqrt(), xt)

def p_theta(eps_theta, s, xt, t, variance="beta", clip=True):
    """p_θ(x_{t-1} | x_t) = N(μ_θ, σ_t² I), Eq. (1).  t (B,) in 1..T -> μ_θ (B, ...), σ_t² (B, 1, ...), x̂_0

    μ_θ is μ̃_t of Eq. (7) at x̂_0. Without clipping it is Eq. (11), (x_t - β_t / √(1 - ᾱ_t) ε_θ) / √α_t.
    σ_t² = β_t is right if x_0 ~ N(0, I), σ_t² = β̃_t if x_0 is one point (Sec. 3.2); real data lie between.
    eps_theta: any callable (x (B, ...), t (B,)) -> (B, ...)."""
    x0_hat = predict_x0(s, xt, t, eps_theta(xt, t), clip)
    mu_theta, beta_tilde = s.q_posterior(x0_hat, xt, t)
    return mu_theta, like(s.beta[t], xt) if variance == "beta" else beta_tilde, x0_hat

def ddpm_sample(eps_theta, s, x, variance="beta", clip=True, first=None):
    """Algorithm 2, ancestral sampling from x = x_T ~ N(0, I) or x_first.  Yields (t, x_t, x̂_0) down to 0."""
    for t in range(s.T if first is None else first, 0, -1):
        ts = torch.full((len(x),), t, device=x.device)
        mu_theta, sigma2, x0_hat = p_theta(eps_theta, s, x, ts, variance, clip)
        z = torch.randn_like(x) if t > 1 else torch.zeros_like(x)  # the last step adds no noise
        x = mu_theta + sigma2.sqrt() * z
        yield t - 1, x, x0_hat

def ddim_sample(eps_theta, s, x, clip=True):
    """DDIM: the same ε_θ, no noise.  Song, Meng & Ermon 2020, Eq. (12), σ = 0.  Yields as ddpm_sample does.

    x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1}) ε̂"""
    for t in range(s.T, 0, -1):
        x0_hat = predict_x0(s, x, t, eps_theta(x, torch.full((len(x),), t, device=x.device)), clip)
        x = s.q_sample(x0_hat, t - 1, eps_of(s, x, t, x0_hat))  # the ε̂ that goes with the clipped x̂_0
        yield t - 1, x, x0_hat

def subchain(eps_theta, s, steps):
    """The forward process seen at only `steps` of its T times: a chain of its own, for any sampler, whose
    i = 1..steps stand for t = grid[i], the last of them T.  -> (its eps_theta, its Schedule)"""
    grid = torch.linspace(0, s.T, steps + 1).round().long().to(s.beta.device)
    alpha_bar = s.alpha_bar[grid]
    beta = torch.cat([alpha_bar[:1] * 0, (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=1 - 1e-12)])
    return (lambda x, i: eps_theta(x, grid[i])), Schedule(beta.cpu()).to(s.beta.device)

# -------------------------------------------------------------------------------------------------- the U-Net

# Copied from ddpm_ho_2020.py
def norm(C):
    """GroupNorm; 32 groups, as in the authors' code, if 128 divides C, else fewer, of at least 4 channels."""
    return nn.GroupNorm(math.gcd(32, C // 4), C)

def conv3(C_in, C_out, stride=1):
    return nn.Conv2d(C_in, C_out, 3, stride, padding=1)

def time_embedding(t, D):
    """sin and cos of t at D/2 frequencies, 1 down to 1/10000, evenly spaced in the exponent (Vaswani et al.
    2017).  (B,) -> (B, D)"""
    frequency = 10000 ** -torch.linspace(0, 1, D // 2, device=t.device)
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)

class ResBlock(nn.Module):
    """h + conv(conv(h) + embedding of t), where each conv means GroupNorm, Swish, 3x3 convolution;
    then the layer last.  h (B, C_in, H, W), emb (B, D) -> (B, C_out, H, W)"""

    def __init__(self, C_in, C_out, D, dropout, last):
        super().__init__()
        self.norm1, self.conv1 = norm(C_in), conv3(C_in, C_out)
        self.embed = nn.Linear(D, C_out)
        self.norm2, self.dropout, self.out = norm(C_out), nn.Dropout(dropout), conv3(C_out, C_out)
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()
        self.last = last

    def forward(self, h, emb):
        r = self.conv1(F.silu(self.norm1(h))) + self.embed(F.silu(emb))[:, :, None, None]
        return self.last(self.skip(h) + self.out(self.dropout(F.silu(self.norm2(r)))))

class Attention(nn.Module):
    """Self-attention among the pixels of a feature map, one head, a residual.  (B, C, H, W) -> the same"""

    def __init__(self, C):
        super().__init__()
        self.norm, self.qkv, self.out = norm(C), nn.Conv2d(C, 3 * C, 1), nn.Conv2d(C, C, 1)

    def forward(self, h):
        q, k, v = self.qkv(self.norm(h)).flatten(2).transpose(1, 2).chunk(3, -1)  # each (B, H W, C)
        r = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √C) v
        return h + self.out(r.transpose(1, 2).reshape(h.shape))

class UNet(nn.Module):
    """ε_θ(x_t, t).  (B, C, H, W), (B,) -> (B, C, H, W).  ValueError if image_shape cannot be halved so often.

    Level i works at 1/2^i of the image's size with channels * multipliers[i] channels. It has `blocks`
    residual blocks on the way down and one more on the way up, each of which is also given a map of the way
    down (the skip connections). Attention follows every block of the levels whose shorter side it names."""

    def __init__(self, image_shape, channels, multipliers, blocks, attention, dropout, timed=True):
        super().__init__()
        C, H, W = image_shape
        factor = 2 ** (len(multipliers) - 1)
        if H % factor or W % factor:
            raise ValueError(f"{H}x{W}: {len(multipliers)} --multipliers need sides that {factor} divides")
        D, self.channels, self.timed = 4 * channels, channels, timed
        widths = [channels * m for m in multipliers]
        self.embed = nn.Sequential(nn.Linear(channels, D), nn.SiLU(), nn.Linear(D, D))

        def block(C_in, C_out, level):
            attend = Attention(C_out)  # made in any case: the same random numbers wherever attention is
            last = attend if min(H, W) >> level in attention else nn.Identity()
            return ResBlock(C_in, C_out, D, dropout, last)

        self.conv_in, h, skips = conv3(C, channels), channels, [channels]  # h: channels so far
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                self.down.append(conv3(h, h, stride=2))
                skips.append(h)
            for _ in range(blocks):
                self.down.append(block(h, width, level))
                skips.append(h := width)
        middle = Attention(h), nn.Identity()
        self.middle = nn.ModuleList(ResBlock(h, h, D, dropout, last) for last in middle)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(h + skips.pop(), width, level))
                h = width
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv3(h, h)))
        self.out = nn.Sequential(norm(h), nn.SiLU(), conv3(h, C))

        for name, p in self.named_parameters():  # the authors' initialisation: biases 0, weights of variance
            if name.endswith("bias"):  # 2 / (fan_in + fan_out), but 0 at the end of each residual branch
                nn.init.zeros_(p)
            elif p.dim() > 1:  # GroupNorm's weights stay 1
                nn.init.xavier_uniform_(p, 0 if name.endswith(("out.weight", "out.2.weight")) else 1)

    def forward(self, x, t):
        emb = self.embed(time_embedding(t * self.timed, self.channels))  # (B, D); not timed: always t = 0
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), emb) if isinstance(layer, ResBlock) else layer(h)
        return self.out(h).to(x.dtype)  # bfloat16 under autocast, where the process stays in float32

# Own: what guidance adds to the U-Net.
class ConditionalUNet(UNet):
    """ε_θ(x_t, t, y): the U-Net as it is; the embedding of y is added to that of t and goes wherever it goes.
    (B, C, H, W), (B,), (B,) in 0..K -> (B, C, H, W).  Row K of the table is the null token ∅."""

    def __init__(self, K, *shape):
        super().__init__(*shape)
        self.null, self.label = K, nn.Embedding(K + 1, self.embed[-1].out_features)

    def forward(self, x, t, y):
        with self.embed.register_forward_hook(lambda module, inputs, emb: emb + self.label(y)):
            return super().forward(x, t)

def make_eps_theta(args, image_shape, K=10):
    """The network that args describe, for images (C, H, W) of K classes.  ValueError if they do not fit."""
    net = ConditionalUNet(K, image_shape, args.channels, args.multipliers, args.blocks, args.attention, 0.0)
    return net.to(memory_format=torch.channels_last)  # a quarter faster on a CPU, more on a GPU

def make_classifier(args, image_shape, K=10):
    """log p(y | x_t) + const, told t: the U-Net's way down at half the width, then the mean over pixels and a
    linear layer.  Dhariwal & Nichol 2021, Sec. 4.  (B, C, H, W), (B,) -> logits (B, K)"""
    net = UNet(image_shape, args.channels // 2, args.multipliers, args.blocks, args.attention, 0.0)
    head = nn.Linear(args.channels // 2 * args.multipliers[-1], K)
    net.up, net.out = nn.ModuleList(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return net.to(memory_format=torch.channels_last)

# ------------------------------------------------------------------- data, and evaluation without downloads

def evaluate(images, y, judge, f_held):
    """Samples drawn for labels y, by a classifier of clean images.  uint8 (N, C, H, W), (N,), (M, 64) -> dict
    classifier_score = exp E KL(p(y | x) || p(y)), the Inception Score's formula: from 1 to K."""
    f = torch.cat([judge[0](to_float(x)) for x in images.split(500)])  # features (N, 64)
    log_p = judge[1](f).cpu().double().log_softmax(1)
    kl = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean()
    return {"frechet": frechet_distance(f, f_held), "classifier_score": kl.exp().item(),
            "label_accuracy": (log_p.argmax(1) == y.cpu()).float().mean().item()}

# Copied from ddpm_ho_2020.py
def fail(message):
    """End the run on a user's mistake: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def load_checkpoint(path):
    """The dict that train saved. Exits with a message if it is not there, truncated, or of another script."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert state["script"] == Path(__file__).stem, f"written by {state['script']}.py"
        return state
    except Exception as e:
        fail(f"no checkpoint of {Path(__file__).name} at {path}: missing, truncated or another ({e!r:.60})")

def load_data(dataset, data_dir, download=True):
    """-> (images, labels) to train on and (images, labels) held out, uint8 (N, C, H, W) and int64 (N,).
    OSError if not to be had. The set is one tensor, so that a batch is an index and needs no loader."""
    if dataset == "digits":
        from sklearn.datasets import load_digits
        x, y = load_digits(return_X_y=True)
        x, y = torch.tensor(x * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8), torch.tensor(y)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # comes writer by writer
        return tuple((x[i], y[i]) for i in order.split(1347))  # a quarter is held out
    from torchvision.datasets import CIFAR10, MNIST
    kind, files = {"mnist": (MNIST, [f"MNIST/raw/{name[:-3]}, or .gz" for name, _ in MNIST.resources]),
                   "cifar10": (CIFAR10, [CIFAR10.base_folder])}[dataset]
    try:
        sets = [kind(data_dir, train, download=download) for train in (True, False)]  # what is there stays
    except Exception as e:  # no network, no room, a truncated file: whatever it was, the remedy is the same
        raise OSError(f"{dataset} was neither read nor downloaded ({type(e).__name__}): --data-dir {data_dir}"
                      f" needs {'; '.join(files)}. --dataset digits needs no download") from e
    sets = [(torch.as_tensor(d.data), torch.as_tensor(d.targets)) for d in sets]
    return tuple((x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2), y) for x, y in sets)

def to_float(images):
    """uint8 0..255 -> float32 [-1, 1].  Sec. 3.3."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """[-1, 1] -> uint8 0..255, rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def train_classifier(images, labels, steps, batch=128):
    """A small classifier of real images, in whose 64 features samples and real images are compared.
    uint8 (N, C, H, W), int64 (N,) -> Sequential(features, head)"""
    features = nn.Sequential(conv3(images.shape[1], 32), nn.ReLU(), conv3(32, 64, 2), nn.ReLU(),
                             conv3(64, 64, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                             nn.Dropout(0.2), nn.Linear(1024, 64), nn.ReLU())
    net = nn.Sequential(features, nn.Linear(64, int(labels.max()) + 1)).to(images.device)
    opt = torch.optim.Adam(net.parameters())
    for step in range(steps):
        opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        i = torch.randint(len(images), (batch,), device=images.device)
        loss = F.cross_entropy(net(to_float(images[i])), labels[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net.eval().requires_grad_(False)

def frechet_distance(a, b):
    """|m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½) for the means m and covariances S of two sets of features.
    (N, D), (M, D) -> float"""
    a, b = a.double().cpu(), b.double().cpu()
    S_a, S_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()  # the trace of the root
    return ((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * root).item()

# Own: what ddpm_ho_2020.py has decoded needs no second reader here.
def load_images(dataset, data_dir, download):
    """load_data; of cars or a folder, what `python ddpm_ho_2020.py --dataset ...` keeps in its cache."""
    if dataset in ("digits", "mnist", "cifar10"):
        return load_data(dataset, data_dir, download)
    cache = Path(f"runs/ddpm_ho_2020-{Path(dataset).resolve().name}/cache.pt")
    if not cache.exists():
        raise OSError(f"no {cache}, into which ddpm_ho_2020.py --dataset {dataset} --quick decodes images")
    return torch.load(cache, weights_only=True)["sets"]

# ------------------------------------------------------------------------------ sampling, training, figures

@torch.no_grad()
def sample(nets, kind, s, args, y, w, image_shape):
    """Algorithm 2: an image for each label of y by guidance of a kind (free, classifier), uint8 (N, C, H, W).
    The seed's noise for every kind and w, so that images can be held side by side."""
    images, steps, eps_theta = [], min(args.sampling_steps, s.T), nets["eps_theta"]
    torch.manual_seed(args.seed)
    for part in y.split(250):
        eps_tilde = (guided(eps_theta, part, eps_theta.null, w) if kind == "free" else
                     classifier_guided(eps_theta, nets["classifier"], s, part, eps_theta.null, w))
        eps_tilde, short = subchain(eps_tilde, s, steps)
        x = torch.randn(len(part), *image_shape, device=y.device)
        chain = (ddim_sample if args.sampler == "ddim" else ddpm_sample)(eps_tilde, short, x)
        for step in tqdm(chain, f"{kind}, w = {w:g}", steps, leave=False):
            x = step[1]  # of (t, x_t, x̂_0)
        images.append(to_uint8(x))
    return torch.cat(images)

def train(args, nets, ema, s, images, labels, path, state):
    """Algorithm 1 and, beside it, the classifier of x_t, from state (a checkpoint, or None) to args.steps.
    Ctrl-C stops it after the step at hand. Saves to path each minute and at the end; returns that state."""
    device, opt = images.device, torch.optim.Adam(nets.parameters(), args.lr)
    if state:  # which holds all that the next step depends on
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    state = state or {"step": 0, "seconds": 0.0, "losses": torch.zeros(0)}
    first, seconds, eps_theta = state["step"], state["seconds"], nets["eps_theta"]
    losses = torch.cat([state["losses"], torch.zeros(max(0, args.steps - first))]).to(device)
    stop, start, saved = [], time.time(), time.time()
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    bar = tqdm(range(first, args.steps), "training", args.steps, initial=first)
    for step in bar:
        opt.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 100)
        i = torch.randint(len(images), (args.batch,), device=device)
        t = torch.randint(1, s.T + 1, (args.batch,), device=device)
        x0, y, eps = to_float(images[i]), labels[i], torch.randn(args.batch, *images.shape[1:], device=device)
        loss = l_cfg(eps_theta, s, x0, drop_labels(y, eps_theta.null, args.p_uncond), t, eps)
        logits = nets["classifier"](s.q_sample(x0, t, eps), t)  # shares only the noised images with ε_θ
        opt.zero_grad()
        (loss + F.cross_entropy(logits, y)).backward()
        size = sum(nn.utils.clip_grad_norm_(net.parameters(), 1.0) for net in nets.values())
        opt.step()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in nets.parameters()], 1 - decay)
        losses[step] = loss.detach() + 0 * size  # so that it is not finite if a gradient is not
        if step % 50 == 49:
            bar.set_postfix(loss=f"{losses[step - 49:step + 1].mean():.4f}")
        if stop or step + 1 == args.steps or time.time() - saved > 60:
            if not losses[:step + 1].isfinite().all():
                fail(f"the loss is no longer finite at step {step}: try a smaller --lr. {path} is untouched")
            saved = time.time()
            state = {"script": Path(__file__).stem, "config": vars(args), "image_shape": images.shape[1:],
                     "K": eps_theta.null, "step": step + 1, "seconds": seconds + saved - start,
                     "losses": losses[:step + 1].cpu(), "rng": torch.get_rng_state(),
                     "net": nets.state_dict(), "ema": ema.state_dict(), "optimizer": opt.state_dict()}
            torch.save(state, f"{path}.tmp")  # a run killed while saving leaves the last checkpoint whole
            Path(f"{path}.tmp").replace(path)
        if stop:
            print(f"stopped at step {step + 1} of {args.steps}; --resume goes on from here")
            break
    signal.signal(signal.SIGINT, handler)
    return state

def draw(out, rows, columns, sweeps, floor):
    """samples.png: rows {name: uint8 (n, C, H, W)}, columns n labels. tradeoff.png, like the paper's figures:
    Fréchet distance against classifier score along sweeps {kind: [{"w", ...}]}, if floor is not None."""
    from matplotlib.figure import Figure
    x = F.pad(torch.stack(list(rows.values())).cpu(), (1, 1, 1, 1), value=255)  # (rows, n, C, H + 2, W + 2)
    R, n, C, H, W = x.shape
    ax = Figure(figsize=(2.2 + 0.6 * n, 0.3 + 0.6 * R * H / W), layout="constrained").subplots()
    ax.imshow(x.permute(0, 3, 1, 4, 2).reshape(R * H, n * W, C).expand(-1, -1, 3).numpy())
    ax.set_xticks([(i + 0.5) * W for i in range(n)], columns)
    ax.set_yticks([(i + 0.5) * H for i in range(R)], rows)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.figure.savefig(out / "samples.png", dpi=100, bbox_inches="tight")
    if floor is not None:
        ax = Figure(figsize=(6, 4), layout="constrained").subplots()
        ax.set(xlabel="classifier score, exp E KL(p(y|x) || p(y))", ylabel="Fréchet distance", xmargin=0.1)
        for kind, sweep in sweeps.items():
            x, y = ([row[key] for row in sweep] for key in ("classifier_score", "frechet"))
            ax.plot(x, y, "o-", label=f"guidance: {kind}")
            for row, *point in zip(sweep, x, y):
                ax.annotate(f"w={row['w']:g}", point, (4, 4), textcoords="offset points", fontsize=7)
        ax.axhline(floor, color="gray", linestyle=":", label="real images")
        ax.legend()
        ax.figure.savefig(out / "tradeoff.png", dpi=100)

# ------------------------------------------------------------------------------------------------------- main

PRESETS = {
    "digits": dict(channels=32, multipliers=[1, 2], blocks=1, attention=[4], steps=2000, lr=2e-3, batch=128),
    "mnist": dict(channels=32, multipliers=[1, 2, 3], blocks=1, attention=[7], steps=4200, lr=2e-3, batch=64),
    "cars": dict(channels=64, multipliers=[1, 2, 3], blocks=1, attention=[16], steps=50000, lr=1e-3, batch=64)
}
QUICK = dict(channels=16, steps=30, num_samples=100, sampling_steps=5)
OF_THE_RUN = "checkpoint resume out device seed quick num_samples classes w".split()

def get_args(argv=None):
    """Flags, over the config in a checkpoint or else the dataset's preset."""
    p = argparse.ArgumentParser(description="Classifier-free guidance (Ho & Salimans 2022).")
    p.add_argument("--dataset", default="digits", help="digits, mnist, cifar10, cars, or a folder")
    p.add_argument("--data-dir", default="data", help="the folder that holds MNIST, or will")
    p.add_argument("--out", default="runs/ddpm_conditional_cfg-DATASET", help="folder for the results")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else
                   "mps" if torch.backends.mps.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="the whole way in seconds, to see that it works")
    p.add_argument("--checkpoint", help="sample from this file instead of training; needs no other flag")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--T", type=int, default=1000, help="diffusion steps (paper: continuous time)")
    p.add_argument("--schedule", choices=SCHEDULES, default="linear", help="noise schedule (paper: cosine)")
    p.add_argument("--p-uncond", type=float, default=0.1, help="share of labels dropped (paper: 0.1, 0.2)")
    p.add_argument("--steps", type=int, help="training steps; default by --dataset")
    p.add_argument("--channels", type=int, help="width of the U-Net's first level; default by --dataset")
    p.add_argument("--lr", type=float, help="Adam's learning rate; default by --dataset")
    p.add_argument("--guidance", nargs="+", choices=["free", "classifier"], default=["free", "classifier"])
    p.add_argument("--w", type=float, nargs="+", default=[-1, 0, 0.5, 1, 2, 4], help="weights w of Eq. (6)")
    p.add_argument("--classes", help="labels to draw, in equal shares, as 3,7; default: all")
    p.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddim")
    p.add_argument("--sampling-steps", type=int, default=50, help="steps of the sampler (paper: 128 to 1024)")
    p.add_argument("--num-samples", type=int, default=1000, help="per w (paper: 50000); 64 with --checkpoint")
    args = p.parse_args(argv)  # a first look, to see whose defaults to take
    quick = QUICK if args.quick else {"num_samples": 64} if args.checkpoint else {}
    p.set_defaults(**PRESETS.get(args.dataset, PRESETS["cars"]) | quick)
    if args.checkpoint or args.resume:
        out = args.out.replace("DATASET", Path(args.dataset).resolve().name)
        config = load_checkpoint(args.checkpoint or f"{out}/checkpoint.pt")["config"]
        p.set_defaults(**{k: v for k, v in config.items() if k not in OF_THE_RUN})
    args = p.parse_args(argv)
    args.out = args.out.replace("DATASET", Path(args.dataset).resolve().name)
    if min(args.T, args.steps, args.sampling_steps, args.num_samples) < 1 or not 0 < args.p_uncond < 1:
        p.error("--T, --steps, --sampling-steps, --num-samples start at 1; --p-uncond lies between 0 and 1")
    return args

def main(args):
    """Train (or load), sweep over w, evaluate, draw; writes it all into args.out and returns the numbers."""
    start, out, path, real = time.time(), Path(args.out), Path(args.out, "checkpoint.pt"), None
    state = load_checkpoint(args.checkpoint or path) if args.checkpoint or args.resume else None
    torch.manual_seed(args.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            real = load_images(args.dataset, args.data_dir, download=not args.checkpoint)
            real = [[v.to(args.device) for v in pair] for pair in real]  # each pair: images, labels
        except OSError:
            if not args.checkpoint:  # which is all that sampling needs
                raise
        shape = state["image_shape"] if state else list(real[0][0].shape[1:])
        K = state["K"] if state else int(max(y.max() for _, y in real)) + 1
        args.classes = [int(c) for c in args.classes.split(",")] if args.classes else list(range(K))
        guided(None, torch.tensor(args.classes), K, 0)  # a ValueError now, not after the training
        nets = {"eps_theta": make_eps_theta(args, shape, K), "classifier": make_classifier(args, shape, K)}
        nets = nn.ModuleDict(nets).to(args.device)
        ema = copy.deepcopy(nets).requires_grad_(False).eval()
        if state:
            nets.load_state_dict(state["net"])
            ema.load_state_dict(state["ema"])
    except (OSError, ValueError, RuntimeError, AssertionError) as e:  # data, labels, sizes, the device
        fail(" ".join(str(e).split())[:500] or repr(e))
    s = make_schedule(args.schedule, args.T).to(args.device)
    if not state and path.exists():
        print("the earlier checkpoint is now", path.rename(out / f"checkpoint-{path.stat().st_mtime_ns}.pt"))
    state = state if args.checkpoint else train(args, nets, ema, s, *real[0], path, state)
    metrics = {k: getattr(args, k) for k in "dataset seed device sampler sampling_steps num_samples".split()}
    metrics |= {"script": "ddpm_conditional_cfg", "torch": torch.__version__, "steps": state["step"],
                "params": sum(p.numel() for p in nets["eps_theta"].parameters()),
                "seconds_train": state["seconds"], "loss": state["losses"][-100:].mean().item()}
    y = torch.tensor((args.classes * args.num_samples)[:args.num_samples], device=args.device)
    if judged := real and len(y) > 64:  # the covariance of 64 features needs more samples than that
        torch.manual_seed(args.seed)  # the same classifier for every run on this data: numbers compare
        judge = train_classifier(*real[0], min(1000, args.steps))
        real = [[v[torch.isin(pair[1], y)] for v in pair] for pair in real]  # the classes asked for
        f_real, f_held = (torch.cat([judge[0](to_float(x)) for x in images.split(500)])
                          for images in (real[0][0][:len(y)], real[1][0]))
        metrics |= {"frechet_floor": frechet_distance(f_real, f_held), "held_out": len(f_held),
                    "label_accuracy_real": evaluate(*real[1], judge, f_held)["label_accuracy"]}
    rows, sweeps, n = {}, {kind: [] for kind in args.guidance}, min(20, len(y))
    if real:  # above the samples, training images of the same labels
        x, c = real[0]
        rows["data"] = torch.stack([x[c == y[k]][(y[:k] == y[k]).sum()] for k in range(n)])
    for kind, w in ((kind, w) for kind in sweeps for w in args.w):
        images = sample(ema, kind, s, args, y, w, shape)
        row = evaluate(images, y, judge, f_held) if judged else {}
        print(f"{kind}, w = {w:g} (scale 1 + w = {1 + w:g})", *(f"{k} {row[k]:.4f}" for k in row), sep="   ")
        sweeps[kind].append({"w": w} | row)
        rows[f"{kind}, w = {w:g}"] = images[:n]
        if kind == args.guidance[0] and w == min(args.w, key=abs):
            np.savez_compressed(out / "samples.npz", images.permute(0, 2, 3, 1).cpu(), y.cpu())  # N, H, W, C
    draw(out, rows, y[:n].tolist(), sweeps, metrics.get("frechet_floor"))
    metrics |= {f"sweep_{kind}" if i else "sweep": sweep for i, (kind, sweep) in enumerate(sweeps.items())}
    metrics |= {"seconds_total": time.time() - start, "config": vars(args)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(json.dumps({k: v for k, v in metrics.items() if k != "config" and "sweep" not in k}, indent=1))
    return metrics

if __name__ == "__main__":
    main(get_args())

"""Classifier-Free Diffusion Guidance.  Ho & Salimans 2022, arXiv 2207.12598.

One idea: train one network with the label y and, by dropping labels, without it; the difference of its two
predictions points towards "more like class y", and w says how far to go.

    python ddpm_conditional_cfg.py                  # 8x8 digits, sweep over w: 9 minutes on one CPU core
    python ddpm_conditional_cfg.py --dataset mnist --guidance free       # 28x28 digits, one kind of guidance
    python ddpm_conditional_cfg.py --dataset cars   # or cifar10, or a folder with a folder per class
    python ddpm_conditional_cfg.py --checkpoint assets/mnist_cfg.pt --w 2 --classes 7   # sevens, in seconds

Seed 0, Fréchet distance (floor 9.0), label accuracy: w = -1: 27.6, 0.091; w = 0: 13.6, 0.992; w = 1: 27.6,
1.000; w = 4: 42.2, 1.000; by the classifier, best at w = 1: 14.9, 0.954.
Differs from the paper:
  - Ho et al. 2020's T steps by the cosine schedule (CIFAR-10 and, on a GPU, cars: linear); the paper draws
    the log-SNR λ in continuous time, from a form of that schedule on [-20, 20].
  - σ_t² = β_t or β̃_t, not the paper's interpolation of the two (v = 0.3, 0.2); fewer sampling steps, but for
    CIFAR-10. Also drawn: w = -1, ε_θ(x_t, t, ∅) alone.
  - Ho et al. 2020's U-Net, but for CIFAR-10 smaller, not Dhariwal & Nichol's. Their classifier pools by
    attention at 8x8; ours takes the mean, and is half as wide as the U-Net.
  - As in ddpm_ho_2020.py, for the reasons given there: gradients clipped, learning rate and EMA warmed up,
    x̂_0 clipped to [-1, 1] in sampling; the learning rate of the small presets falls to 0.
  - No FID or Inception Score, which need a downloaded network: the Fréchet distance and exp E KL are from a
    small classifier trained here. Compare them across w and with the floor, not with the paper's.
What stands under "Copied from ddpm_ho_2020.py" is explained there, with Ho et al. 2020's equation numbers;
for guidance, read the rest.
Shapes: B batch, C channels, H height, W width, D embedding, K classes, () one number.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from schedules import SCHEDULES, Schedule, extract, from_alpha_bar, make_schedule

# ------------------------------------------------------------------- Algorithm 1: the loss and one step of it

def drop_labels(y, null, p_uncond):
    """y becomes ∅ with probability p_uncond, for each example on its own.  Algorithm 1.  (B,) -> (B,)"""
    return torch.where(torch.rand(len(y), device=y.device) < p_uncond, null, y)

def l_cfg(net, s, x0, t, eps, y):
    """E |ε - ε_θ(√ᾱ_t x_0 + √(1 - ᾱ_t) ε, t, y)|², per dimension, some of the y being ∅.  Algorithm 1.  -> ()
    x0 (B, C, H, W) in [-1, 1];  t (B,) in 1..T;  eps like x0, from N(0, I);  y (B,) in 0..K, K being ∅"""
    return F.mse_loss(net(s.q_sample(x0, t, eps), t, y), eps)

def train_step(net, ema, opt, s, x0, y, null, p_uncond=0.1, loss=l_cfg, decay=0.9999):
    """One step of Algorithm 1 on images x0 (B, C, H, W) in [-1, 1] with labels y (B,) in 0..K-1.  -> loss, ()

        net = ConditionalUNet(10, (1, 28, 28), channels=32, multipliers=(1, 2, 2), attention=(7,))
        ema, opt = copy.deepcopy(net).eval(), torch.optim.Adam(net.parameters(), 2e-4)
        s = make_schedule("linear", 1000)
        batches = [(torch.rand(64, 1, 28, 28), torch.randint(10, (64,)))]  # yours, from -1 to 1, and labels
        for n, (x0, y) in enumerate(batches, start=1):
            train_step(net, ema, opt, s, x0, y, null=10, decay=min(0.9999, n / (9 + n)))

    But for the label this is Ho et al. 2020's Algorithm 1: ε_θ learns p(x | y) and, where y is ∅, p(x)."""
    y = drop_labels(y, null, p_uncond)
    t = torch.randint(1, s.T + 1, (len(x0),), device=x0.device)  # t ~ Uniform({1, ..., T})
    eps = torch.randn_like(x0)  # ε ~ N(0, I)
    value = loss(net, s, x0, t, eps, y)
    opt.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), net.parameters()):
            average.lerp_(weight, 1 - decay)  # decay · average + (1 - decay) · weight
    return value.detach()

# -------------------------------------------------------- Sec. 3: guidance, without a classifier and with one

def guided(eps_theta, y, null, w):
    """ε̃(x_t, t) = (1 + w) ε_θ(x_t, t, y) - w ε_θ(x_t, t, ∅).  Eq. (6).  -> callable (x, t), for any sampler

        eps_tilde = guided(ema, torch.full((16,), 7), null=10, w=2)  # sixteen sevens
        for t, x, x0_hat in ddpm_sample(eps_tilde, s, torch.randn(16, 1, 28, 28)):
            pass

    This in ddpm_sample is Algorithm 2. w = 0 is the conditional model and w = -1 the unconditional one, with
    one evaluation, not two. Much other code calls 1 + w the scale.  y (B,) in 0..null-1, else ValueError."""
    if y.min() < 0 or y.max() >= null:  # on CUDA an embedding fails on these without a useful message
        raise ValueError(f"labels must lie in 0..{null - 1}, not {y.min()}..{y.max()}")
    none = torch.full_like(y, null)

    def eps_tilde(x, t):
        both = eps_theta(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, none]))  # in one batch of 2B
        eps_y, eps_null = both.chunk(2)
        return (1 + w) * eps_y - w * eps_null

    if w == 0:
        return lambda x, t: eps_theta(x, t, y)
    if w == -1:
        return lambda x, t: eps_theta(x, t, none)
    return eps_tilde

def classifier_guided(eps_theta, classifier, s, y, null, w, conditional=False):
    """ε̂(x_t, t) = ε_θ(x_t, t, ∅) - (1 + w) √(1 - ᾱ_t) ∇ log p(y | x_t).  Sec. 3.1; Dhariwal & Nichol 2021.

    As ∇ log p(x_t) ≈ -ε_θ(x_t, t, ∅) / √(1 - ᾱ_t), this follows ∇ log p(x_t) + (1 + w) ∇ log p(y | x_t), the
    score in Eq. (6) if all are exact. conditional=True, which Dhariwal & Nichol found better, starts from
    ε_θ(x_t, t, y), which holds one ∇ log p(y | x_t) already: its scale is w.
    Their Algorithm 2 is this for DDIM. In ddpm_sample, unclipped, it shifts μ_θ by (1 + w) β_t / √α_t
    ∇ log p(y | x_t). Their Algorithm 1 shifts by Σ ∇ log p: if σ_t² = β_t the same, but for 1 / √α_t.
    classifier: any callable (x, t) -> logits (B, K) with a gradient in x.   -> callable (x, t)"""
    if conditional:
        base, scale = guided(eps_theta, y, null, 0), w
    else:
        base, scale = guided(eps_theta, y, null, -1), 1 + w
    if scale == 0:
        return base

    def eps_hat(x, t):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_()
            log_p = -F.cross_entropy(classifier(x_in, t), y, reduction="sum")  # Σ log p(y | x_t)
            gradient = torch.autograd.grad(log_p, x_in)[0]
        return base(x, t) - scale * extract((1 - s.alpha_bar).sqrt(), t, x) * gradient

    return eps_hat

def l_classifier(net, s, x0, t, eps, y):
    """E -log p(y | x_t): a classifier that is to guide has to know noised images, and t.  -> ()
    For train_step(classifier, ..., null=K, p_uncond=0, loss=l_classifier): no label may become ∅."""
    return F.cross_entropy(net(s.q_sample(x0, t, eps), t), y)

# ------------------------------------------------------------ the samplers: they take any ε_θ, guided or not

# Copied from ddpm_ho_2020.py
def predict_x0(s, xt, t, eps_hat, clip=True):
    """x̂_0 = (x_t - √(1 - ᾱ_t) ε̂) / √ᾱ_t.  Eq. (15).

    Near t = T this divides by almost 0: a small error of ε̂ throws x̂_0 far out of the data's range. The clip
    brings it back. It matters most where β_t is large, by Eq. (11): in few steps, at the end of cosine."""
    x0_hat = (xt - extract((1 - s.alpha_bar).sqrt(), t, xt) * eps_hat) / extract(s.alpha_bar.sqrt(), t, xt)
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    return x0_hat

def predict_eps(s, xt, t, x0_hat):
    """ε̂ = (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t), the noise that takes x̂_0 to x_t: Eq. (4) solved for ε."""
    return (xt - extract(s.alpha_bar.sqrt(), t, xt) * x0_hat) / extract((1 - s.alpha_bar).sqrt(), t, xt)

def p_theta(eps_theta, s, xt, t, variance="beta", clip=True):
    """p_θ(x_{t-1} | x_t) = N(μ_θ, σ_t² I), Eq. (1).  t (B,) in 1..T -> μ_θ, σ_t² (B, 1, ..., 1), x̂_0

    μ_θ is μ̃_t of Eq. (7) at x̂_0. Without clipping it is Eq. (11), (x_t - β_t / √(1 - ᾱ_t) ε_θ) / √α_t.
    σ_t² = β_t is right if x_0 ~ N(0, I), σ_t² = β̃_t if x_0 is one point (Sec. 3.2); real data lie between.
    eps_theta: any callable (x (B, ...), t (B,)) -> (B, ...)."""
    x0_hat = predict_x0(s, xt, t, eps_theta(xt, t), clip)
    mu_theta, beta_tilde = s.q_posterior(x0_hat, xt, t)
    sigma2 = extract(s.beta, t, xt) if variance == "beta" else beta_tilde
    return mu_theta, sigma2, x0_hat

@torch.no_grad()
def ddpm_sample(eps_theta, s, x, variance="beta", clip=True, start=None):
    """Algorithm 2 from x = x_T ~ N(0, I), or x_start.  Yields t = T-1 .. 0, x_t, and x̂_0 predicted at t + 1.

        for t, x, x0_hat in ddpm_sample(ema, s, torch.randn(16, 1, 28, 28)):
            pass  # in the end x is x_0: 16 images"""
    start = s.T if start is None else start
    for t in range(start, 0, -1):
        ts = torch.full((len(x),), t, device=x.device)
        mu_theta, sigma2, x0_hat = p_theta(eps_theta, s, x, ts, variance, clip)
        z = torch.randn_like(x) if t > 1 else torch.zeros_like(x)  # the last step adds no noise
        x = mu_theta + sigma2.sqrt() * z
        yield t - 1, x, x0_hat

@torch.no_grad()
def ddim_sample(eps_theta, s, x, clip=True):
    """DDIM: the same ε_θ, no noise.  Song, Meng & Ermon 2020, Eq. (12), σ = 0; their α is our ᾱ.
    x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1}) ε̂.  Yields what ddpm_sample yields, and is used like it."""
    for t in range(s.T, 0, -1):
        ts = torch.full((len(x),), t, device=x.device)
        x0_hat = predict_x0(s, x, ts, eps_theta(x, ts), clip)
        eps_hat = predict_eps(s, x, ts, x0_hat)  # the ε̂ that goes with the clipped x̂_0
        x = s.q_sample(x0_hat, t - 1, eps_hat)
        yield t - 1, x, x0_hat

def subchain(eps_theta, s, steps):
    """A shorter chain through `steps` of the T times: its i = 1..steps stands for t = i T / steps, rounded.
    Song, Meng & Ermon 2020, Sec. 4.2.  -> its ε_θ(x, i) and its Schedule: any sampler then yields i
        short_theta, short = subchain(ema, s, 50)
        chain = ddim_sample(short_theta, short, torch.randn(16, 1, 28, 28))"""
    grid = torch.linspace(0, s.T, steps + 1).round().long().to(s.beta.device)
    beta = from_alpha_bar(s.alpha_bar[grid].cpu().double(), largest=1 - 1e-12)  # 0.999 would change ᾱ

    def short_theta(x, i):
        return eps_theta(x, grid[i])

    return short_theta, Schedule(beta).to(s.beta.device)

# ---------------------------------------------------------------------------------------------- the networks

# Copied from ddpm_ho_2020.py
def norm(C):
    """GroupNorm in 32 groups, as in the authors' code, or in fewer, so that each has 4 channels at least:
    C = 128 -> 32 groups of 4; 32 -> 8 of 4; 96 -> 8 of 12 (8 is the largest that divides 32 and 96 / 4)."""
    return nn.GroupNorm(math.gcd(32, C // 4), C)

def conv3(C_in, C_out, stride=1):
    """A 3x3 convolution that keeps H and W or, with stride 2, halves them."""
    return nn.Conv2d(C_in, C_out, 3, stride, padding=1)

def time_embedding(t, dim):
    """sin(t f) and cos(t f) for dim/2 frequencies f from 1 down to 1/10000.  (B,) -> (B, dim)

    The fast ones tell t from t + 1, the slow ones early from late, as the two hands of a clock do. The last f
    is exactly 1/10000, as in the authors' code; Vaswani et al. 2017 stop one step before it."""
    f = torch.logspace(0, -4, dim // 2, device=t.device)
    angle = t[:, None] * f
    return torch.cat([angle.sin(), angle.cos()], 1)

class Attention(nn.Module):
    """Self-attention among the pixels of a feature map, one head, a residual.  (B, C, H, W) -> the same"""
    def __init__(self, C):
        super().__init__()
        self.norm = norm(C)
        self.qkv = nn.Conv2d(C, 3 * C, 1)
        self.out = nn.Conv2d(C, C, 1)

    def forward(self, h):
        qkv = self.qkv(self.norm(h)).flatten(2).transpose(1, 2)  # (B, H W, 3 C)
        q, k, v = qkv[:, None].chunk(3, -1)  # each (B, 1, H W, C): the 1 is the head
        r = F.scaled_dot_product_attention(q, k, v)[:, 0]  # softmax(q kᵀ / √C) v
        return h + self.out(r.transpose(1, 2).reshape(h.shape))

class ResBlock(nn.Module):
    """skip(h) + conv(conv(h) + embedding of t), then attention if asked for. A conv is GroupNorm, Swish, (the
    second: dropout,) 3x3; skip is 1x1 if widths differ.  h (B, C_in, H, W), emb (B, D) -> (B, C_out, H, W)"""
    def __init__(self, C_in, C_out, D, dropout=0.0, attention=False):
        super().__init__()
        self.norm1, self.conv1 = norm(C_in), conv3(C_in, C_out)
        self.embed = nn.Linear(D, C_out)
        self.norm2, self.dropout = norm(C_out), nn.Dropout(dropout)
        self.out = conv3(C_out, C_out)
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()
        self.attention = Attention(C_out) if attention else nn.Identity()

    def forward(self, h, emb):
        r = self.conv1(F.silu(self.norm1(h)))
        r = r + self.embed(F.silu(emb))[:, :, None, None]
        r = self.out(self.dropout(F.silu(self.norm2(r))))
        return self.attention(self.skip(h) + r)

class UNet(nn.Module):
    """ε_θ(x_t, t).  (B, C, H, W), (B,) -> (B, C, H, W).  Without other arguments the paper's for CIFAR-10:

        net = UNet((3, 32, 32))
        eps_hat = net(torch.randn(2, 3, 32, 32), torch.tensor([1, 1000]))
        run = torch.load("assets/mnist.pt")  # or any checkpoint.pt, weights.pt
        c = run["config"]
        net = UNet(run["image_shape"], c["channels"], c["multipliers"], c["blocks"], c["attention"]).eval()
        net.load_state_dict(run["ema"])  # for ddpm_sample, with s = make_schedule(c["schedule"], c["T"])

    Level i works at 1/2^i of the image's size with channels * multipliers[i] channels. It has `blocks`
    residual blocks on the way down and blocks + 1 on the way up; each of the latter is also given a map from
    the way down (skip connection). Attention follows every block of the levels whose shorter side it names,
    and stands once in the middle, always. timed=False: a network that is not told t.
    ValueError if the sides cannot be halved so often, or if attention names a size that no level has."""
    def __init__(self, image_shape, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,),
                 dropout=0.1, timed=True):
        super().__init__()
        C, H, W = image_shape
        sizes = [min(H, W) // 2 ** level for level in range(len(multipliers))]
        factor = 2 ** (len(multipliers) - 1)
        if H % factor or W % factor:
            raise ValueError(f"{H}x{W}: {len(multipliers)} multipliers need sides that {factor} divides")
        if not set(attention) <= set(sizes):
            raise ValueError(f"attention at {list(attention)}: the levels' sizes are {sizes}")
        self.channels, self.timed = channels, timed
        D = 4 * channels
        self.embed = nn.Sequential(nn.Linear(channels, D), nn.SiLU(), nn.Linear(D, D))

        self.conv_in = conv3(C, channels)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width = channels  # of the map at hand
        skips = [channels]  # widths of the maps that the way up is given
        for level, size in enumerate(sizes):
            if level > 0:
                self.down.append(conv3(width, width, stride=2))
                skips.append(width)
            for _ in range(blocks):
                C_out = channels * multipliers[level]
                self.down.append(ResBlock(width, C_out, D, dropout, size in attention))
                width = C_out
                skips.append(width)
        self.middle = nn.ModuleList([ResBlock(width, width, D, dropout, attention=True),
                                     ResBlock(width, width, D, dropout)])
        for level in reversed(range(len(sizes))):
            for _ in range(blocks + 1):
                C_in, C_out = width + skips.pop(), channels * multipliers[level]
                self.up.append(ResBlock(C_in, C_out, D, dropout, sizes[level] in attention))
                width = C_out
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv3(width, width)))
        self.out = nn.Sequential(norm(width), nn.SiLU(), conv3(width, C))
        self.apply(init_weights)
        nn.init.zeros_(self.out[-1].weight)

    def embedding(self, t):  # (B,) -> (B, D)
        if not self.timed:
            t = torch.zeros_like(t)
        return self.embed(time_embedding(t, self.channels))

    def encode(self, x, emb):
        """The way down and the middle.  -> the map in the middle, and those of the way down for the way up"""
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        return h, skips

    def decode(self, h, skips, emb):
        """The way up, from what encode returns.  -> (B, C, H, W)"""
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), emb) if isinstance(layer, ResBlock) else layer(h)
        return self.out(h)

    def forward(self, x, t):
        emb = self.embedding(t)
        h, skips = self.encode(x, emb)
        return self.decode(h, skips, emb).to(x.dtype)  # bfloat16 under autocast; the process stays float32

def init_weights(module):
    """The authors' initialisation: uniform, of variance 2 / (fan_in + fan_out); biases are 0. Each residual
    branch ends in zeros: at first a block is its skip, the identity where the width stays."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, Attention):  # q, k and v are one layer here and three in theirs: fan_out is C there
        nn.init.xavier_uniform_(module.qkv.weight, gain=2 ** 0.5)
    if isinstance(module, (ResBlock, Attention)):  # called after the layers that they hold
        nn.init.zeros_(module.out.weight)

# Only here: what guidance adds to the U-Net.
class ConditionalUNet(UNet):
    """ε_θ(x_t, t, y): the U-Net, with the embedding of the label y added to that of t.
    (B, C, H, W), (B,), (B,) in 0..K -> (B, C, H, W).  Row K of the table is the null token ∅.
    UNet's docstring says how to load assets/mnist_cfg.pt; here K = len(run["names"]) comes first."""
    def __init__(self, K, *args, **options):
        super().__init__(*args, **options)
        self.label = nn.Embedding(K + 1, self.embed[-1].out_features)

    def forward(self, x, t, y):
        emb = self.embedding(t) + self.label(y)
        h, skips = self.encode(x, emb)
        return self.decode(h, skips, emb).to(x.dtype)

class NoisyClassifier(UNet):
    """Logits of p(y | x_t): the U-Net's way down and middle, the mean over pixels, a linear layer.
    (B, C, H, W), (B,) -> logits (B, K).  After Dhariwal & Nichol 2021, Sec. 4"""
    def __init__(self, K, *args, **options):
        super().__init__(*args, **options)
        self.up = self.out = None  # not used here
        self.head = nn.Linear(self.middle[-1].out.out_channels, K)

    def forward(self, x, t):
        h, _ = self.encode(x, self.embedding(t))
        return self.head(h.mean((2, 3))).to(x.dtype)

# The paper ends here; the rest trains, measures and draws.

# Copied from ddpm_ho_2020.py
import argparse
import json
import os
import signal
import sys
import textwrap
import threading
import time
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy.io import loadmat
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, MNIST
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------- data

# Copied from ddpm_ho_2020.py
def fail(message):
    """End the run on a user's mistake: one line, below the bars that are there, and exit status 2."""
    tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)

def load_data(dataset, data_dir, download=True):
    """-> (images, labels) to train on, (images, labels) held out, the names of the K classes.
    uint8 (N, C, H, W), int64 (N,): one tensor, so that a batch is an index. OSError if not to be had."""
    if dataset == "digits":
        x, y = load_digits(return_X_y=True)
        x = torch.tensor(x * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)  # grey levels were 0..16
        x, x_held, y, y_held = train_test_split(x, torch.tensor(y), test_size=450, random_state=0)
        return (x, y), (x_held, y_held), [str(k) for k in range(10)]
    kind, files = MNIST, [f"MNIST/raw/{name[:-3]}, or .gz" for name, _ in MNIST.resources]
    if dataset == "cifar10":
        kind, files = CIFAR10, [CIFAR10.base_folder]
    try:
        sets = [kind(data_dir, train, download=download) for train in (True, False)]  # what is there stays
    except Exception as e:  # no network, no room, a truncated file: whatever it was, the remedy is the same
        raise OSError(f"{dataset} was neither read nor downloaded ({type(e).__name__}): --data-dir {data_dir}"
                      f" needs {'; '.join(files)}. --dataset digits needs no download") from e
    pairs = []
    for part in sets:
        x = torch.as_tensor(part.data)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)  # grey, or colours last
        pairs.append((x, torch.as_tensor(part.targets)))
    return pairs[0], pairs[1], [name.split()[0] for name in sets[0].classes]  # MNIST's are "0 - zero" ...

def body_of(model):
    """"Audi TT RS Coupe 2012" -> "Coupe": one of 8 types, or "other" for the 15 names that have none."""
    for body in ("Cab", "Convertible", "Coupe", "Hatchback", "SUV", "Sedan", "Van", "Wagon"):
        if f" {body} " in model.replace("Minivan", "Van"):
            return body
    return "other"

def load_folder(dataset, data_dir, size, labels="model"):
    """As load_data, for Stanford Cars (dataset "cars") in any layout of its copies, or for the images in a
    folder and below: scaled and cropped in the middle to size (H, W), in colour. The class is what the
    cars' .mat says, or with labels="body" what body_of makes of that; else the folder that an image lies in.
    A broken image is named and skipped."""
    folder = root = Path(dataset)
    if dataset == "cars":
        folder = root = Path(data_dir)
        for name in ("cars_train", "stanford_cars"):
            if Path(data_dir, name).is_dir():
                folder = Path(data_dir, name)
    files = [Path(top, name) for top, _, names in os.walk(root, followlinks=True) for name in names]
    paths = sorted(path for path in files if path.suffix.lower() in Image.registered_extensions()
                   and path.is_relative_to(folder)
                   and "cars_test" not in path.relative_to(folder).parts)  # named like the training images

    def decode(path):
        try:
            image = Image.open(path)
            image.draft("RGB", (2 * size[1], 2 * size[0]))  # a JPEG is decoded no larger than it need be
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # convert would cut at 255
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.mode.endswith("A") or "transparency" in image.info:  # what is clear becomes white
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.array(ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.BICUBIC))
        except Exception as e:  # truncated, or not an image whatever its name says
            tqdm.write(f"skipped {path}: {str(e) or type(e).__name__}", file=sys.stderr)

    with ThreadPool() as pool:
        decoded = list(tqdm(pool.imap(decode, paths), f"reading {folder}", len(paths)))
    images = {path: image for path, image in zip(paths, decoded) if image is not None}
    if len(images) < 2:
        found = ", ".join(sorted(path.name for path in folder.glob("*"))[:9]) or "nothing"
        raise OSError(f"{len(images)} readable images in {folder}, 2 are needed; it holds {found}. Cars: put"
                      " the folder stanford_cars or cars_train of any copy of the set into --data-dir, as of"
                      " kaggle.com/datasets/jessicali9530/stanford-cars-dataset")
    mats, model_names, model_of = {path.name: path for path in files}, None, {}
    if "cars_meta.mat" in mats:
        model_names = [str(name) for name in loadmat(mats["cars_meta.mat"], squeeze_me=True)["class_names"]]
    if "cars_train_annos.mat" in mats:
        for image in loadmat(mats["cars_train_annos.mat"], squeeze_me=True)["annotations"]:
            k = int(image["class"])  # from 1
            model_of[str(image["fname"])] = f"model {k:03}" if model_names is None else model_names[k - 1]
    classes = [model_of.get(path.name, path.parent.name) for path in images]
    if dataset == "cars" and labels == "body":
        classes = [body_of(model) for model in classes]
    names, y = np.unique(classes, return_inverse=True)
    x = torch.tensor(np.stack(list(images.values()))).permute(0, 3, 1, 2)  # (N, C, H, W)
    held = max(1, len(x) // 10)
    x, x_held, y, y_held = train_test_split(x, torch.tensor(y), test_size=held, random_state=0)
    return (x, y), (x_held, y_held), names.tolist()

def to_float(images):
    """uint8 0..255 -> float32 [-1, 1].  Sec. 3.3."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """[-1, 1] -> uint8 0..255, rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

# ------------------------------------------------------------------------- the judge, which needs no download

# Copied from ddpm_ho_2020.py
def train_judge(images, labels, K, steps, batch=128):
    """A small classifier of real images, in whose 64 features samples and real images are compared.
    uint8 (N, C, H, W), int64 (N,) -> Sequential(features, head); None if there is but one class"""
    if K == 1:
        return None
    torch.manual_seed(0)  # the same classifier in runs of 1000 steps or more, so that distances compare
    _, C, H, W = images.shape
    layers = [conv3(C, 32), nn.ReLU(), conv3(32, 64, 2), nn.ReLU(), conv3(64, 64, 2), nn.ReLU(),
              nn.AvgPool2d(max(1, min(H, W) // 16)), nn.Flatten(), nn.Dropout(0.2)]  # of 64x64 images: by 4
    size = nn.Sequential(*layers)(torch.zeros(1, C, H, W)).shape[1]
    features = nn.Sequential(*layers, nn.Linear(size, 64), nn.ReLU())
    judge = nn.Sequential(features, nn.Linear(64, K)).to(images.device)
    opt = torch.optim.Adam(judge.parameters())
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for step in tqdm(range(steps), "judge", leave=False):
            opt.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            i = torch.randint(len(images), (batch,), device=images.device)
            loss = F.cross_entropy(judge(to_float(images[i])), labels[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
    return judge.eval().requires_grad_(False)

def features_of(judge, images):
    """uint8 (N, C, H, W) -> (N, 64); without a judge, 4x4 thumbnails"""
    if judge is None:
        return F.interpolate(images.cpu().float(), (4, 4), mode="area").flatten(1) / 127.5 - 1
    return torch.cat([judge[0](to_float(part)) for part in images.split(500)])

def frechet_distance(a, b):
    """|m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½) for the means m and covariances S of two sets of features.
    (N, D), (M, D) -> float"""
    a, b = a.cpu().double(), b.cpu().double()
    S_a, S_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()  # the trace of the root
    return ((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * root).item()

def some_of(images, n, seed):
    """n images drawn by the seed: real ones, in place of n samples, give the floor of the distance."""
    i = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    return images[i.to(images.device)]

# Only here: samples that were asked for by label.
def class_scores(log_p, y):
    """log_p (N, K), a classifier's log p(k | x) of samples asked for with labels y (N,).  -> dict
    classifier_score = exp E KL(p(k | x) || p(k)), the Inception Score's formula: from 1 to K."""
    p = log_p.exp()
    kl = (p * (log_p - p.mean(0).log())).sum(1).mean()
    return {"classifier_score": kl.exp().item(),
            "label_accuracy": (log_p.argmax(1) == y).double().mean().item()}

def evaluate(images, y, judge, f_held):
    """Samples, uint8 (N, C, H, W), drawn for the labels y; f_held: features of real images.  -> dict"""
    f = features_of(judge, images)
    log_p = judge[1](f).cpu().double().log_softmax(1)
    return {"frechet": frechet_distance(f, f_held)} | class_scores(log_p, y.cpu())

def examples(real, y, seed=None):
    """Real images of the classes y (n,): of each class the first, the second, ... (once more from the first,
    if it has too few); with a seed, shuffled."""
    (images, labels), (held_out, held_labels), _ = real
    picked = images.new_empty(len(y), *images.shape[1:])
    for k in y.unique():
        asked, of_class = y == k, images[labels == k]
        if len(of_class) == 0:  # of a small class, all may be held out
            of_class = held_out[held_labels == k]
        if seed is not None:
            of_class = some_of(of_class, len(of_class), seed)
        i = torch.arange(asked.sum(), device=y.device) % len(of_class)
        picked[asked] = of_class[i]
    return picked

def judge_of(real, y, K, args):
    """The judge, its features of held-out images of the classes in y, and its scores of real images.
    Too few samples or images for a covariance of 64 features: None, None, {}."""
    (images, labels), (held_out, held_labels), _ = real
    held = torch.isin(held_labels, y)
    if min(len(y), held.sum()) <= 64:
        return None, None, {}
    judge = train_judge(images, labels, K, min(1000, args.steps))
    f_held = features_of(judge, held_out[held])
    f_real = features_of(judge, examples(real, y, args.seed))
    right = judge[1](f_held).argmax(1) == held_labels[held]
    return judge, f_held, {"frechet_floor": frechet_distance(f_real, f_held),
                           "label_accuracy_real": right.double().mean().item()}

# ----------------------------------------------------------------------------------- what a run leaves behind

# Copied from ddpm_ho_2020.py
def random_state(device):
    """The state of the CPU's random numbers and of the device's own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()  # torch.cuda, torch.mps
    return state

def set_random_state(state, device):
    """Back to what random_state has returned; on another kind of device, only the CPU's part."""
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type])

def make_folder(out):
    """The folder of a new run. If results of an earlier one are in it, it is kept under another name."""
    try:
        if (out / "checkpoint.pt").exists() or (out / "metrics.json").exists():
            n = 1
            while out.with_name(f"{out.name}-{n}").exists():
                n += 1
            print(f"the earlier {out} is now", out.rename(out.with_name(f"{out.name}-{n}")))
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:  # ValueError: --out . has no name to add -1 to
        fail(f"--out {out}: {e}")

def save(state, path):
    """Write a checkpoint, then rename it: a run that is killed meanwhile leaves the last one whole."""
    try:
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:  # a full disk is either
        fail(f"{path} could not be written and is as it was: {e}")

def load_checkpoint(path):
    """The dict that train has saved at path. Ends the run if it is missing, damaged or of another script."""
    script = Path(__file__).stem
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # the bytes of a damaged file can lead anywhere
        fail(f"no checkpoint of {script}.py at {path}: missing, truncated or another ({type(e).__name__})")
    if not isinstance(state, dict) or state.get("script") != script or not PARTS <= state.keys():
        fail(f"no checkpoint of {script}.py at {path}: it is of another script, or lacks a part")
    name = state["config"]["schedule"]
    if name not in ["learned", *SCHEDULES]:
        fail(f"no checkpoint of {script}.py at {path}: schedules.py has no schedule {name}")
    return state

def open_run(args):
    """The checkpoint that args name, or a run of 0 steps; and the data, or None if --checkpoint has none."""
    run, real = None, None
    if args.checkpoint or args.resume:
        run = load_checkpoint(args.checkpoint or Path(args.out, "checkpoint.pt"))
        if args.resume and not {"net", "optimizer", "random"} <= run.keys():
            fail(f"{args.out} has weights to sample from, not a run to resume: --checkpoint takes them")
    try:
        if args.dataset in ("digits", "mnist", "cifar10"):
            train, held_out, names = load_data(args.dataset, args.data_dir, download=not args.checkpoint)
        else:
            train, held_out, names = load_folder(args.dataset, args.data_dir, args.image_size, args.labels)
        real = [v.to(args.device) for v in train], [v.to(args.device) for v in held_out], names
    except OSError as e:
        if not args.checkpoint:
            fail(e)
        print(f"nothing to compare samples with: {e}")
    if run is None:
        run = {"script": Path(__file__).stem, "image_shape": list(train[0].shape[1:]), "names": names,
               "step": 0, "seconds": 0.0, "losses": torch.zeros(0), "snapshots": {}}
    if real is not None and list(train[0].shape[1:]) != run["image_shape"]:
        fail(f"the checkpoint draws {run['image_shape']}, {args.dataset} has {list(train[0].shape[1:])}")
    if not args.checkpoint:
        run["config"] = {name: value for name, value in vars(args).items() if name not in ONCE}
    return run, real

def networks(make, run, args):
    """The network that make() returns and the average of its weights, on args.device, as far as run is."""
    torch.manual_seed(args.seed)
    try:
        net = make().to(args.device)
        ema = copy.deepcopy(net).requires_grad_(False).eval()
        if run["step"] > 0:
            net.load_state_dict(run.get("net", run["ema"]))  # a file for sampling alone has no net
            ema.load_state_dict(run["ema"])
    except (ValueError, RuntimeError) as e:  # sizes that do not fit each other, or the checkpoint
        fail(str(e)[:300])
    if args.compile:
        net.compile()
        ema.compile()
    return net, ema

def save_weights(run, path):
    """All that --checkpoint needs, in half precision: an eighth of a checkpoint's size."""
    weights = {part: run[part] for part in PARTS}
    weights["ema"] = {name: value.half() for name, value in run["ema"].items()}
    save(weights, path)

# -------------------------------------------------------------------------------------- training and sampling

# Copied from ddpm_ho_2020.py
def train(args, net, ema, s, images, labels, train_step, loss, look, path, run):
    """Algorithm 1 from where run is to args.steps; Ctrl-C stops it after the step at hand.  -> run, now there
    Saves run to path each minute and at the end: a dict that holds all that the next step depends on.

    train_step: one step, as above, of the given loss.  look: None, or gives samples for training.png.
    Of the processes that torchrun starts, each learns from its share of every batch; the first one saves."""
    device, rank, world = images.device, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    done, start, saved = run["step"], time.time() - run["seconds"], time.time()
    if done >= args.steps:
        return run
    opt = torch.optim.Adam(net.parameters(), args.lr)
    if done > 0:
        opt.load_state_dict(run["optimizer"])
        set_random_state(run["random"], device)
    model = net
    if world > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group()
        model = nn.parallel.DistributedDataParallel(net)

    def share_of_loss(_, s, x0, t, eps, y):
        """The loss of this process's share of the batch, which all have drawn alike."""
        mine = slice(rank, None, world)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            return loss(model, s, x0[mine], t[mine], eps[mine], y[mine])

    stop = threading.Event()
    handler = signal.signal(signal.SIGINT, lambda *_: stop.set())  # Ctrl-C
    losses = torch.zeros(args.steps, device=device)
    losses[:done] = run["losses"]
    milestones = {max(1, args.steps // 2 ** i) for i in range(6)}  # a row of samples each: one sees it learn
    bar = tqdm(range(done + 1, args.steps + 1), "training", args.steps, initial=done, disable=rank > 0)
    for step in bar:
        fall = 1 - (step - 1) / args.steps if args.decay_lr else 1
        opt.param_groups[0]["lr"] = args.lr * min(1, step / args.warmup) * fall
        i = torch.randint(len(images), (args.batch,), device=device)
        x0 = to_float(images[i])
        if args.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        decay = min(args.ema, step / (9 + step))
        losses[step - 1] = train_step(net, ema, opt, s, x0, labels[i], loss=share_of_loss, decay=decay)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{losses[step - 50:step].mean():.4f}")
        if look is not None and step in milestones and rank == 0:
            run["snapshots"][step] = look().cpu()
            draw_rows(path.with_name("training.png"), [(f"step {k}", x) for k, x in run["snapshots"].items()])
        if rank == 0 and (stop.is_set() or step == args.steps or time.time() - saved > 60):
            finite = [v.isfinite().all().item() for v in (losses[:step], *net.parameters())]
            if not all(finite):
                fail(f"the loss is no longer finite at step {step}: try a smaller --lr. {path} is as it was")
            saved = time.time()
            run |= {"step": step, "seconds": saved - start, "losses": losses[:step].cpu(),
                    "net": net.state_dict(), "ema": ema.state_dict(), "optimizer": opt.state_dict(),
                    "random": random_state(device)}
            save(run, path)
        if stop.is_set():
            print(f"stopped at step {step} of {args.steps}; --resume goes on from here")
            break
    signal.signal(signal.SIGINT, handler)
    return run | {"step": step}  # also in the processes that do not save

def leave_torchrun():
    """After training, the first of torchrun's processes goes on alone."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)) > 0:
        sys.exit()

def portions(n, device):
    """n images as numbers of images to draw at once: 50, which a CPU's cache holds, or 500.  -> list"""
    at_once = 50 if device == "cpu" else 500
    return [min(at_once, n - i) for i in range(0, n, at_once)]

@torch.no_grad()
def sample(parts, s, args, image_shape, show=True):
    """Images by args.sampler from the seed's noise, uint8 (N, C, H, W), and (t, x_t, x̂_0) of the first 16.
    parts: pairs of an ε_θ and the number of images that it draws at once. Leaves the random state as it was:
    looking at samples in between does not change the training."""
    device, steps, images, frames = s.beta.device, min(args.sampling_steps, s.T), [], []
    options = {"variance": args.variance} if args.sampler == "ddpm" else {}
    state = random_state(device)
    torch.manual_seed(args.seed)
    bar = tqdm(total=len(parts) * steps, desc="sampling", disable=not show)
    with bar, torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        for eps_theta, n in parts:
            eps_theta, short = subchain(eps_theta, s, steps)
            x = torch.randn(n, *image_shape, device=device)
            for i, xt, x0_hat in SAMPLERS[args.sampler](eps_theta, short, x, clip=args.clip, **options):
                if not images:
                    frames.append((round(i * s.T / steps), xt[:16].clone(), x0_hat[:16].clone()))
                bar.update()
            images.append(to_uint8(xt))
    set_random_state(state, device)
    return torch.cat(images), frames

def in_fast_format(net, args):
    """The memory format that is faster: channels last, but on a CPU in bfloat16 the usual one."""
    if args.device == "cpu" and args.bf16:
        return net
    return net.to(memory_format=torch.channels_last)

# Only here: the networks.
def make_eps_theta(args, image_shape, K=10):
    """The network that args describe, for images (C, H, W) of K classes.  ValueError if they do not fit."""
    net = ConditionalUNet(K, image_shape, args.channels, args.multipliers, args.blocks, args.attention,
                          args.dropout)
    return in_fast_format(net, args)

def make_classifier(args, image_shape, K=10):
    """The classifier of noised images, half as wide as the U-Net.  ValueError if they do not fit."""
    net = NoisyClassifier(K, image_shape, max(4, args.channels // 2), args.multipliers, args.blocks,
                          args.attention, args.dropout)
    return in_fast_format(net, args)

# ---------------------------------------------------------------------------------------------------- figures

# Copied from ddpm_ho_2020.py
def draw_rows(path, rows, columns=()):
    """Images as a table. rows: pairs of a label and images, uint8 (n, C, H, W); columns: labels on top.
        kept = [(name, np.load(f"runs/schedule-{name}/samples.npz")["arr_0"][:16]) for name in SCHEDULES]
        draw_rows("trained.png", [(name, torch.tensor(x).permute(0, 3, 1, 2)) for name, x in kept])"""
    x = torch.stack([images.cpu() for _, images in rows])
    x = F.pad(x, (1, 1, 1, 1), value=255)  # (rows, n, C, H + 2, W + 2)
    R, n, C, H, W = x.shape
    table = x.permute(0, 3, 1, 4, 2).reshape(R * H, n * W, C).expand(-1, -1, 3)
    ax = Figure((1.5 + 0.7 * n, 0.4 + 0.75 * R * H / W), layout="constrained").subplots()
    ax.imshow(table.numpy(), interpolation="nearest")
    ax.set_xticks([(i + 0.5) * W for i in range(len(columns))], columns)
    ax.set_yticks([(i + 0.5) * H for i in range(R)], [label for label, _ in rows])
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.figure.savefig(path, dpi=100, bbox_inches="tight")

# Only here: the paper's trade-off.
def draw_tradeoff(path, sweeps, metrics):
    """Fréchet distance and label accuracy over w for sweeps {kind: [{"w", ...}]}; dotted: of real images."""
    figure = Figure((9, 3.6), layout="constrained")
    panels = ("frechet", "frechet_floor", "Fréchet distance"), \
             ("label_accuracy", "label_accuracy_real", "label accuracy")
    for ax, (name, of_real, ylabel) in zip(figure.subplots(1, 2), panels):
        for kind, sweep in sweeps.items():
            w, value = [row["w"] for row in sweep], [row[name] for row in sweep]
            ax.plot(w, value, "o-", label=f"guidance: {kind}")
        ax.axhline(metrics[of_real], color="gray", linestyle=":", label="real images")
        ax.set(xlabel="w", ylabel=ylabel)
        ax.legend()
    figure.savefig(path, dpi=100)

# ------------------------------------------------------------------------------------------------------- main

# Copied from ddpm_ho_2020.py
SMALL = dict(blocks=1, dropout=0.0, flip=False, lr=2e-3, decay_lr=True, warmup=200, ema=0.998,
             schedule="cosine", sampling_steps=100, variance="beta_tilde")
PRESETS = {  # what differs from the flags' defaults, which are the paper's for CIFAR-10
    "digits": SMALL | dict(channels=32, multipliers=[1, 2], attention=[4], steps=1700, sampling_steps=50),
    "mnist": SMALL | dict(channels=16, multipliers=[1, 2, 4], attention=[7], steps=7000, batch=64, lr=4e-3),
    "cifar10": {},
    "cars": SMALL | dict(channels=16, multipliers=[1, 2, 4], attention=[8], steps=4000, batch=64, flip=True,
                         image_size=[32, 32]),
}
ON_CUDA = PRESETS | {
    "mnist": PRESETS["mnist"] | dict(channels=32, multipliers=[1, 2, 3], steps=20_000, lr=2e-3),
    "cars": dict(channels=64, multipliers=[1, 2, 3, 4], steps=100_000, batch=64, sampling_steps=250),
}

# Only here: what --quick makes small, and what a checkpoint keeps.
QUICK = dict(channels=16, blocks=1, steps=30, num_samples=100, sampling_steps=5, image_size=[32, 32])
PARTS = {"script", "config", "image_shape", "names", "step", "seconds", "losses", "ema"}  # of a checkpoint
ONCE = "checkpoint resume out device bf16 quick num_samples classes w compile".split()  # not kept in it
SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample}
KINDS = ["free", "classifier", "both"]

# Copied from ddpm_ho_2020.py
def between(low, high=1e38, kind=float):
    """argparse's type for numbers from low to high, as --T and --lr are."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's own message: invalid int value
    return parse

def image_size(text):
    """64 -> [64, 64], 48x64 -> [48, 64]: height, width."""
    sides = [between(1, kind=int)(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text} is not a size, as 64 or 48x64")
    return [sides[0], sides[-1]]

def open_device(name):
    """The device called name, once it has done an addition: a card that is not there, or for which this torch
    has no kernels, ends the run here."""
    try:
        device = torch.device(name)
        torch.zeros(2, device=device).add(1).sum().item()
    except (RuntimeError, AssertionError) as e:
        if "kernel image" in str(e):
            e = "too old a card for this torch: pip install 'torch<2.8' 'torchvision<0.23'"
        fail(f"--device {name}: {str(e).split('. ')[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device

def fast_in_bfloat16(device):
    """Whether the device computes faster in bfloat16: GPUs since 2020, CPUs with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # an older torch cannot tell
        able = torch.cpu.get_capabilities()
        return able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return False

def add_flags(p):
    """The flags of both image scripts; their defaults are the paper's."""
    yes_no, count, fraction = argparse.BooleanOptionalAction, between(1, kind=int), between(0, 1)
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's processes have a GPU each
    p.add_argument("--dataset", default="digits", help="digits, mnist, cifar10, cars, or a folder of images")
    p.add_argument("--data-dir", default="data", help="the folder that holds MNIST, CIFAR-10 or cars")
    p.add_argument("--image-size", type=image_size, default=[64, 64], help="of cars, folders: 64 or 48x64")
    p.add_argument("--labels", choices=["body", "model"], default="body", help="of cars: 9 types, or 196")
    p.add_argument("--out", help="folder for all that is written; runs at the same time need one each")
    p.add_argument("--seed", type=between(0, 2 ** 32, int), default=0, help="of weights, batches, samples")
    p.add_argument("--device", default=device, help="cpu, cuda, cuda:1, mps")
    p.add_argument("--bf16", action=yes_no, help="compute in bfloat16; default: where it is faster")
    p.add_argument("--quick", action="store_true", help="the whole way in seconds, to see that it works")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--checkpoint", help="sample from this file instead of training; needs no other flag")
    start.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--T", type=between(2, kind=int), default=1000, help="diffusion steps (paper: 1000)")
    p.add_argument("--schedule", choices=SCHEDULES, default="linear", help="noise schedule (paper: linear)")
    p.add_argument("--steps", type=count, default=800_000, help="training steps (paper: 800000)")
    p.add_argument("--batch", type=count, default=128, help="images per training step (paper: 128)")
    p.add_argument("--lr", type=between(1e-12), default=2e-4, help="Adam's learning rate (paper: 2e-4)")
    p.add_argument("--decay-lr", action=yes_no, default=False, help="to 0 over the --steps (paper: no)")
    p.add_argument("--warmup", type=count, default=5000, help="steps to the full --lr (authors' code: 5000)")
    p.add_argument("--ema", type=fraction, default=0.9999, help="decay of the moving average (paper: 0.9999)")
    p.add_argument("--flip", action=yes_no, default=True, help="random horizontal flips (paper: yes)")
    p.add_argument("--channels", type=count, default=128, help="of the first level (authors' code: 128)")
    p.add_argument("--multipliers", type=count, nargs="+", default=[1, 2, 2, 2], help="(authors': 1 2 2 2)")
    p.add_argument("--blocks", type=count, default=2, help="residual blocks per level (paper: 2)")
    p.add_argument("--attention", type=count, nargs="*", default=[16], help="sizes that have it (paper: 16)")
    p.add_argument("--dropout", type=fraction, default=0.1, help="in the residual blocks (paper: 0.1)")
    p.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="(paper: ddpm)")
    p.add_argument("--sampling-steps", type=count, default=1000, help="of the sampler, at most T (paper: T)")
    p.add_argument("--variance", choices=["beta", "beta_tilde"], default="beta", help="sigma_t^2 of ddpm")
    p.add_argument("--clip", action=yes_no, default=True, help="clip x0_hat to [-1, 1] (authors' code: yes)")
    p.add_argument("--num-samples", type=count, default=1000, help="(paper: 50000); 64 with --checkpoint")

def read_flags(p, argv):
    """Flags, over the config in a checkpoint or else the dataset's preset, over the flags' defaults."""
    p.error = fail  # one line instead of the whole usage
    argv = sys.argv[1:] if argv is None else argv
    unset = argparse.Namespace(**dict.fromkeys(vars(p.parse_args([]))))  # every flag as None
    given = p.parse_args([word for word in argv if word not in ("-h", "--help")], unset)
    dataset = given.dataset or "digits"
    suffix = "-quick" if given.quick else ""
    out = f"runs/{Path(__file__).stem}-{Path(dataset).resolve().name}{suffix}"
    device = open_device(given.device or p.get_default("device"))
    if given.checkpoint:
        defaults = load_checkpoint(given.checkpoint)["config"] | {"num_samples": 64}
        dataset = given.dataset or defaults["dataset"]
        out = f"runs/{Path(__file__).stem}-{Path(dataset).resolve().name}-samples"
    elif given.resume:
        defaults = load_checkpoint(Path(given.out or out, "checkpoint.pt"))["config"]
    else:
        presets = ON_CUDA if device.type == "cuda" else PRESETS
        defaults = presets.get(dataset, presets["cars"]).copy()
        if given.quick:
            defaults |= QUICK
        steps = given.steps or defaults.get("steps", p.get_default("steps"))
        warmup = defaults.get("warmup", p.get_default("warmup"))
        defaults["warmup"] = min(warmup, max(1, steps // 10))  # made for the preset's own steps
        if dataset not in PRESETS and not Path(dataset).is_dir():
            fail(f"--dataset {dataset} is neither one of {', '.join(PRESETS)} nor a folder")
    for name in ("T", "schedule", "predict", "time_embedding"):  # the weights hold for these alone
        asked, trained = getattr(given, name, None), defaults.get(name)
        if (given.checkpoint or given.resume) and asked not in (None, trained):
            flag = name.replace("_", "-")
            fail(f"--{flag} {asked}: the checkpoint's is {trained}; for fewer steps, --sampling-steps")
    p.set_defaults(**{"out": out, "bf16": fast_in_bfloat16(device)} | defaults)
    args = p.parse_args(argv)
    if given.attention is None:  # the preset's sizes, where the levels of this network have them
        side = {"digits": 8, "mnist": 28, "cifar10": 32}.get(args.dataset, min(args.image_size))
        sizes = [side // 2 ** level for level in range(len(args.multipliers))]
        args.attention = [size for size in args.attention if size in sizes]
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.channels % 4 or args.batch % world:
        fail(f"--channels must be a multiple of 4, --batch of {world}, the number of processes")
    return args

def announce(args, net, run, real):
    """Two lines that say what a run is about to do, then its folder; for torchrun, by the first process."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    images = f"{args.dataset}, {'x'.join(str(n) for n in run['image_shape'])}"
    plan = f"weights after {run['step']} steps"
    if real is not None:
        (x, _), (held_out, _), names = real
        images += f": {len(x)} images of {len(names)} classes, {len(held_out)} held out"
        if not args.checkpoint:
            epochs = args.steps * args.batch / len(x)
            plan = f"{args.steps} steps of {args.batch} ({epochs:.1f} epochs), learning rate {args.lr:g}"
    params = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    precision = "bfloat16" if args.bf16 else "float32"
    print(f"{images}; {params:.2f} M parameters, {args.device}, {precision}")
    print(f"{plan}; {args.num_samples} samples by {args.sampler} in {min(args.sampling_steps, args.T)} steps;"
          f" results go to {args.out}", flush=True)
    if not args.resume:
        make_folder(Path(args.out))

def finish(args, run, net, metrics, begin):
    """Keep and print the numbers, say what was written and how to go on.  -> the numbers"""
    out, losses = Path(args.out), run["losses"]
    metrics = {"script": run["script"], "dataset": args.dataset, "seed": args.seed, "device": args.device,
               "torch": torch.__version__, "steps": run["step"],
               "params": sum(parameter.numel() for parameter in net.parameters()),
               "loss": losses[-max(1, len(losses) // 20):].mean().item(), "seconds_train": run["seconds"],
               "images_per_second": run["step"] * run["config"]["batch"] / run["seconds"], **metrics,
               "seconds_total": time.time() - begin, "config": vars(args)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    for name, value in metrics.items():
        if isinstance(value, float):
            print(f"{name:<28}{value:.4f}")
        elif not isinstance(value, (dict, list)):
            print(f"{name:<28}{value}")
    print(f"in {out}:", *sorted(path.name for path in out.iterdir()))
    if not args.checkpoint:
        print(f"to draw more: python {run['script']}.py --checkpoint {out / 'checkpoint.pt'}")
        steps = args.steps if run["step"] < args.steps else 2 * run["step"]
        print(f"to go on: python {run['script']}.py --resume --out {out} --steps {steps}")
    return metrics

def run_from_shell():
    """main(get_args()); what a user can cause is told in one line, in whatever encoding the console has."""
    sys.stdout.reconfigure(errors="replace")
    sys.stderr.reconfigure(errors="replace")
    try:
        main(get_args())
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C")
    except OSError as e:  # no space left, no permission
        fail(e)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or "out of memory" in str(e) or "allocate memory" in str(e):
            fail("out of memory: a smaller --batch or --num-samples needs less")
        raise

# Only here: the flags of guidance, and the run.
def label_list(text):
    """3,7 -> [3, 7]"""
    return [int(label) for label in text.split(",")]

def get_args(argv=None):
    """Flags, over the config in a checkpoint or else the dataset's preset, over Ho et al. 2020's values."""
    p = argparse.ArgumentParser(description="Ho & Salimans 2022; for --T to --num-samples the paper is Ho et "
                                            "al. 2020. --dataset X --help shows the values for X.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(p)
    p.add_argument("--p-uncond", type=between(0, 1), default=0.1, help="share of labels dropped (paper: 0.1)")
    p.add_argument("--guidance", nargs="+", choices=KINDS, default=["free", "classifier"],
                   help="by Eq. (6); by a classifier; by a classifier on top of the label")
    p.add_argument("--w", type=between(-100, 100), nargs="+", default=[-1, 0, 0.1, 0.3, 1, 4],
                   help="weights of Eq. (6) (paper: 0 to 4); the samples of the least |w| are kept")
    p.add_argument("--classes", type=label_list, help="labels to draw, in equal shares, as 3,7; None: all")
    return read_flags(p, argv)

def possible(kind, w, p_uncond):
    """Whether the network was shown what (kind, w) needs: ∅ if p_uncond > 0, labels if p_uncond < 1."""
    needs_null = kind == "classifier" or (kind == "free" and w != 0)
    needs_label = kind == "both" or (kind == "free" and w != -1)
    return (p_uncond > 0 or not needs_null) and (p_uncond < 1 or not needs_label)

def guide(kind, ema, classifier, s, y, K, w):
    """The ε of --guidance kind, for the labels y."""
    if kind == "free":
        return guided(ema, y, K, w)
    return classifier_guided(ema, classifier, s, y, K, w, conditional=kind == "both")

def main(args):
    """Train (or load), sweep over w, evaluate, draw; writes it all into args.out and returns the numbers."""
    begin, out, path = time.time(), Path(args.out), Path(args.out, "checkpoint.pt")
    run, real = open_run(args)
    shape, names, K = run["image_shape"], run["names"], len(run["names"])
    args.classes = args.classes or list(range(K))
    if K < 2:
        fail(f"guidance needs two classes, {args.dataset} has one: give each its folder or, for cars, put "
             "cars_train_annos.mat and cars_meta.mat, of the set's devkit, beside the images")
    if min(args.classes) < 0 or max(args.classes) >= K:
        fail(f"labels must lie in 0..{K - 1}, --classes are {args.classes}")
    if real is not None and real[2] != names:
        fail(f"{args.dataset} has other classes than the checkpoint: {', '.join(names)[:200]}")
    classifier_path = Path(args.checkpoint or path).with_name("classifier.pt")
    lacking = args.checkpoint and not classifier_path.exists()
    todo = [(kind, w) for kind in args.guidance for w in sorted(args.w)
            if possible(kind, w, args.p_uncond) and (kind == "free" or not lacking)]
    if len(todo) < len(args.guidance) * len(args.w):
        print("only these can be drawn:", *todo)
    if not todo and lacking:
        fail(f"--guidance {' '.join(args.guidance)} needs {classifier_path}, which --resume trains")
    if not todo:
        fail("none of --w can be drawn: --p-uncond 0 has no ε(x, t, ∅), --p-uncond 1 no ε(x, t, y)")

    classifier, guides = None, any(kind != "free" for kind, _ in todo)
    if guides:
        classifier_run = run | {"step": 0, "seconds": 0.0, "losses": torch.zeros(0), "snapshots": {}}
        if (args.checkpoint or args.resume) and classifier_path.exists():
            classifier_run = load_checkpoint(classifier_path)
        classifier_net, classifier = networks(lambda: make_classifier(args, shape, K), classifier_run, args)
    net, ema = networks(lambda: make_eps_theta(args, shape, K), run, args)  # last: its seed is then in force
    s = make_schedule(args.schedule, args.T).to(args.device)
    announce(args, net, run, real)
    if not args.checkpoint:
        def look():
            y = torch.arange(16, device=args.device) % K
            w = -1 if args.p_uncond == 1 else 0
            return sample([(guided(ema, y, K, w), 16)], s, args, shape, show=False)[0]
        one_step = partial(train_step, null=K, p_uncond=args.p_uncond)
        run = train(args, net, ema, s, *real[0], one_step, l_cfg, look, path, run)
        if guides and run["step"] == args.steps:  # not after Ctrl-C
            one_step = partial(train_step, null=K, p_uncond=0)
            classifier_run = train(args, classifier_net, classifier, s, *real[0], one_step, l_classifier,
                                   None, classifier_path, classifier_run)
        leave_torchrun()
        save_weights(run, out / "weights.pt")
    if guides and classifier_run["step"] == 0:
        todo = [(kind, w) for kind, w in todo if kind == "free"]
    if not todo:
        fail("the classifier is not trained yet; --resume goes on")

    y = torch.tensor((args.classes * args.num_samples)[:args.num_samples], device=args.device)
    judge, f_held, metrics = None, None, {}
    if real is not None:
        judge, f_held, metrics = judge_of(real, y, K, args)
    first_kind, _ = todo[0]
    least = min([w for kind, w in todo if kind == first_kind], key=abs)  # whose samples are kept
    sweeps = {kind: [] for kind, _ in todo}
    n = 2 * K if K <= 10 else 8  # columns in the figure
    rows = [] if real is None else [("data", examples(real, y[:n]))]
    for kind, w in todo:
        parts, began = [], time.time()
        for some in y.split(portions(len(y), args.device)):
            parts.append((guide(kind, ema, classifier, s, some, K, w), len(some)))
        images, _ = sample(parts, s, args, shape)
        row = {"w": w, "seconds": time.time() - began}
        if judge is not None:
            row |= evaluate(images, y, judge, f_held)
        sweeps[kind].append(row)
        rows.append((f"{kind}, w = {w:g}", images[:n]))
        numbers = [f"{name} {value:.4f}" for name, value in row.items() if name != "w"]
        print(f"{kind}, w = {w:g}", *numbers, sep="   ")
        if (kind, w) == (first_kind, least):
            np.savez_compressed(out / "samples.npz", images.permute(0, 2, 3, 1).cpu(), y.cpu())  # N, H, W, C
    draw_rows(out / "samples.png", rows, [textwrap.fill(names[k], 11) for k in y[:n].tolist()])
    if judge is not None:
        draw_tradeoff(out / "tradeoff.png", sweeps, metrics)
    metrics["sweep"] = sweeps[first_kind]
    metrics |= {f"sweep_{kind}": sweep for kind, sweep in sweeps.items() if kind != first_kind}
    return finish(args, run, net, metrics, begin)

if __name__ == "__main__":
    run_from_shell()

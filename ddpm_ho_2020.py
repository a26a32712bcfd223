"""Denoising Diffusion Probabilistic Models.  Ho, Jain, Abbeel 2020, arXiv 2006.11239.

One idea: noise an image x_0 to x_t and train a network ε_θ(x_t, t) to say which noise ε was added; then start
from pure noise x_T and take a little of the predicted noise away, T times. Equation numbers are the paper's.

    python ddpm_ho_2020.py                             # 8x8 digits, no download; then 28x28 ones
    python ddpm_ho_2020.py --dataset mnist
    python ddpm_ho_2020.py --dataset mnist --resume --steps 20000                 # go on with that run
    python ddpm_ho_2020.py --checkpoint runs/ddpm_ho_2020-mnist/checkpoint.pt     # draw from it
    python ddpm_ho_2020.py --experiments               # and bits/dim, coding, interpolation, inpainting
    python ddpm_ho_2020.py --dataset cars              # or cifar10, or a folder of images
    torchrun --nproc-per-node 4 ddpm_ho_2020.py --dataset cars                   # the same batch on four GPUs

Expect of the first, on two CPU cores, seed 0: 135 s and 1.1 GB; a classifier is sure of 94 % of 1000 samples
(of real digits 98 %), the rarest class is 8 % of them, their Fréchet distance is 1.8 times the floor.

Differs from the paper:
  - Smaller networks, less training and fewer than T sampling steps for digits, MNIST, cars: see PRESETS.
  - x̂_0 is clipped to [-1, 1] in sampling: in the authors' code, not in Algorithm 2 (--no-clip turns it off).
  - The EMA's decay is warmed up, min(decay, n / (9 + n)): short runs would sample their first weights.
  - Gradients are clipped at 1 and σ_1² of L_0 is β̃_2: in the authors' code. Bits/dim of 128 held-out images.
  - DDIM, Langevin dynamics and inpainting are not the paper's: their docstrings name the source.
  - bfloat16 autocast on CUDA, but not for μ̃, which is nearer to x_t than its resolution; batches drawn with
    replacement; strided convolutions pad both sides alike.
  - No FID, whose network has to be downloaded, but the Fréchet distance in features of a small classifier
    trained here: compare it with the floor beside it and with other runs on the same data, not with FID.
Shapes: B batch, C channels, H height, W width, D embedding.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock  # which comes with torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from schedules import SCHEDULES, Schedule, like, make_schedule

# ------------------------------------------------------------ Sec. 3.2, 3.4: the loss and the reverse process

def l_simple(net, s, x0, t, eps, predict="eps"):
    """L_simple = E |ε - ε_θ(√ᾱ_t x_0 + √(1 - ᾱ_t) ε, t)|², per dimension.  Eq. (14), Algorithm 1.

    x0 (B, C, H, W) in [-1, 1];  t (B,) drawn from 1..T;  eps like x0, drawn from N(0, I).  -> ()
    Table 2's other networks predict μ̃_t instead of ε, or, as Sec. 3.2 mentions, x_0: predict="mu", "x0"."""
    xt = s.q_sample(x0, t, eps)
    return F.mse_loss(net(xt, t), {"eps": eps, "x0": x0, "mu": s.q_posterior(x0, xt, t)[0]}[predict])

def as_eps_theta(net, s, predict):
    """The ε_θ of a network that predicts "eps", "x0" or "mu": Eq. (7) solved for x̂_0, Eq. (4) for ε̂."""
    def eps_theta(xt, t):
        x0_hat = net(xt, t)
        if predict == "mu":  # μ̃_t is linear in x_0 and x_t
            x0_hat = (x0_hat - s.q_posterior(0 * xt, xt, t)[0]) / s.q_posterior(1 + 0 * xt, 0 * xt, t)[0]
        return eps_of(s, xt, t, x0_hat)
    return net if predict == "eps" else eps_theta

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

def score(eps_theta, s, xt, t):
    """∇ log q(x_t) ≈ -ε_θ(x_t, t) / √(1 - ᾱ_t), as ∇ log q(x_t | x_0) = -ε / √(1 - ᾱ_t): L_simple is
    denoising score matching (Vincent 2011) at every noise level, weighted by 1 - ᾱ_t.  Sec. 3.2"""
    return -eps_theta(xt, t) / like((1 - s.alpha_bar[t]).sqrt(), xt)

def langevin_sample(eps_theta, s, x, clip=True, each=5, step=0.1):
    """Annealed Langevin dynamics, Song & Ermon 2019, Algorithm 1.  Yields as ddpm_sample does.

    `each` steps x ← x + α/2 ∇ log q(x) + √α z a noise level, α ∝ σ², then on to the next. Our levels are
    those of q: σ² is 1 - ᾱ_t, and x, which shrinks by √ᾱ_t where theirs does not, is rescaled in between.
    What is returned at t = 0 is x̂_0, free of the last level's noise, which their algorithm leaves in."""
    for t in range(s.T, 0, -1):
        ts, alpha = torch.full((len(x),), t, device=x.device), like(2 * step * (1 - s.alpha_bar[t]), x)
        for _ in range(each):
            x = x + alpha / 2 * score(eps_theta, s, x, ts) + alpha.sqrt() * torch.randn_like(x)
        x0_hat = predict_x0(s, x, t, eps_theta(x, ts), clip)
        x = x0_hat if t == 1 else x * like((s.alpha_bar[t - 1] / s.alpha_bar[t]).sqrt(), x)
        yield t - 1, x, x0_hat

def interpolate(s, a, b, t, weights):
    """x̄_t = (1 - λ) x_t + λ x'_t of two noised images, which ddpm_sample(.., first=t) takes back to t = 0.
    Sec. 4.4.  a, b (1, C, H, W), weights: n numbers λ -> (n, C, H, W)"""
    a, b = (s.q_sample(x, t, torch.randn_like(x)) for x in (a, b))
    return torch.cat([(1 - w) * a + w * b for w in weights])

def inpaint(eps_theta, s, x0, known, clip=True):
    """An ε_θ that makes any sampler fill in the unknown pixels of x0: it points from x_t to x̂_0 with the
    known pixels set right. A heuristic, not the posterior.  x0, known (bool): broadcast to x_t's shape"""
    def fill(xt, t):
        return torch.where(known, x0, predict_x0(s, xt, t, eps_theta(xt, t), clip))
    return lambda xt, t: eps_of(s, xt, t, fill(xt, t))

# ------------------------------------------------------- Secs. 3.1, 3.3: the bound on the likelihood, in bits

def discrete_log_likelihood(x0, mean, sigma):
    """log ∫ N(x; mean, σ²) dx over x_0's grey level, 1/127.5 wide, open at -1 and 1, in nats.  Eq. (13)"""
    lower, upper = (torch.special.ndtr((x0 + d - mean) / sigma) for d in (-1 / 255, 1 / 255))
    p = torch.where(x0 > 0.999, 1.0, upper) - torch.where(x0 < -0.999, 0.0, lower)
    return p.clamp(min=1e-12).log()

def vlb_term(eps_theta, s, x0, t, eps, variance="beta", clip=True):
    """One term of Eq. (5) an example, bits/dim, and |x_0 - x̂_0|² per dimension.  t (B,) -> (B,), (B,)

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p_θ(x_{t-1} | x_t)), Eq. (8) with the variances' part, for t > 1;
    L_0 = -log p_θ(x_0 | x_1), Eq. (13), with σ_1² = β̃_2 as in the authors' code: β̃_1 is 0."""
    xt = s.q_sample(x0, t, eps)
    mu_theta, sigma2, x0_hat = p_theta(eps_theta, s, xt, t, variance, clip)
    (mu_tilde, beta_tilde), first = s.q_posterior(x0, xt, t), like(t, x0) == 1
    sigma2 = torch.where(first, s.beta_tilde[2].to(x0.dtype), sigma2)
    kl = ((sigma2 / beta_tilde).log() - 1 + (beta_tilde + (mu_tilde - mu_theta) ** 2) / sigma2) / 2
    nats = torch.where(first, -discrete_log_likelihood(x0, mu_theta, sigma2.sqrt()), kl)
    return nats.flatten(1).mean(1) / math.log(2), ((x0 - x0_hat) ** 2).flatten(1).mean(1)

@torch.no_grad()
def rate_distortion(eps_theta, s, x0, variance="beta", clip=True):
    """Who has received x_T .. x_t has paid L_T + L_{T-1} + .. + L_t and knows x̂_0(x_t).  Sec. 4.3.

    x0 (B, C, H, W) -> the bits/dim paid when x_t is known, t = T..0, of which the last is all of Eq. (5), the
    bound on the negative log-likelihood; the RMSE of x̂_0(x_t) in grey levels of 255, t = T..1."""
    alpha_bar = s.alpha_bar[-1]  # L_T = KL(q(x_T | x_0) || N(0, I))
    L_T = (alpha_bar * x0 ** 2 - alpha_bar - (1 - alpha_bar).log()).mean() / 2 / math.log(2)
    terms = [vlb_term(eps_theta, s, x0, t.expand(len(x0)), torch.randn_like(x0), variance, clip)
             for t in tqdm(torch.arange(s.T, 0, -1, device=x0.device), "bits/dim")]
    rate = np.cumsum([L_T.item()] + [bits.mean().item() for bits, _ in terms]).tolist()
    return rate, [127.5 * error.mean().sqrt().item() for _, error in terms]

# --------------------------------------------------------------------------- Sec. 4 and Appendix B: the U-Net

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

def make_eps_theta(args, image_shape):
    """The network that args describe, for images of shape (C, H, W).  ValueError if the size does not fit."""
    net = UNet(image_shape, args.channels, args.multipliers, args.blocks, args.attention, args.dropout,
               args.time_embedding)
    return net.to(memory_format=torch.channels_last)  # a quarter faster on a CPU, more on a GPU

# ------------------------------------------------------------------------------------------------------- data

def fail(message):
    """End the run on a user's mistake: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

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

def load_folder(dataset, data_dir, size, cache):
    """As load_data: each image below the folder dataset, or of Stanford Cars in any of the layouts of its
    copies, scaled and cropped in the middle to size (H, W), in colour. The class is the folder that it lies
    in, or what the cars' .mat says. Decoded once, then kept in the file cache until something changes.
    OSError if there are fewer than two."""
    cars = [data_dir / "stanford_cars", data_dir / "cars_train"]
    folder = Path(dataset) if dataset != "cars" else next((f for f in cars if f.is_dir()), data_dir)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions()
                   and p.is_file() and "cars_test" not in p.parts)  # named like the training images
    classes = {}
    for mat in folder.rglob("cars_train_annos.mat"):
        from scipy.io import loadmat
        classes = {str(a["fname"]): int(a["class"]) for a in loadmat(mat, squeeze_me=True)["annotations"]}
    key = str([size, classes] + [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths])
    with suppress(Exception):  # no cache yet, or not a whole one: it is made again
        kept = torch.load(cache, weights_only=True)
        if kept["key"] == key:
            return kept["sets"]
    images = {}
    for path in tqdm(paths, f"reading {folder}"):
        try:
            images[path] = np.array(ImageOps.fit(Image.open(path).convert("RGB"), size[::-1], Image.BICUBIC))
        except Exception as e:  # truncated, or not an image whatever its name says
            print(f"skipped {path}: {str(e) or type(e).__name__}", file=sys.stderr)
    if len(images) < 2:
        found = ", ".join(p.name for p in sorted(folder.glob("*"))[:9]) or "nothing"
        cars = (", for cars stanford_cars/cars_train/*.jpg, nested again, a folder a class, or flat (see "
                "kaggle.com/datasets/jessicali9530/stanford-cars-dataset, github.com/pytorch/vision/"
                "issues/7545)") * (dataset == "cars")
        raise OSError(f"{len(images)} readable images in {folder} and below: wanted two{cars}, found {found}")
    y = np.unique([classes.get(p.name, p.parent.name) for p in images], return_inverse=True)[1]
    x, y = torch.tensor(np.stack(list(images.values()))).permute(0, 3, 1, 2), torch.tensor(y)  # (N, C, H, W)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    sets = [(x[i], y[i]) for i in order.split(len(x) - max(1, len(x) // 10))]  # a tenth is held out
    torch.save({"key": key, "sets": sets}, cache)
    return sets

def to_float(images):
    """uint8 0..255 -> float32 [-1, 1].  Sec. 3.3."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """[-1, 1] -> uint8 0..255, rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

# ------------------------------------------------------------------------------ evaluation, without downloads

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

def evaluate(samples, train, held_out, steps, seed):
    """Samples against held-out images, and as many training images likewise: the floor.  uint8 -> dict"""
    torch.manual_seed(seed)  # the same classifier for every run on this data, so that distances compare
    if train[1].max() == 0:  # no classes to tell apart: compare 4x4 thumbnails instead
        net = nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()), nn.Identity())
    else:
        net = train_classifier(*train, steps)
    real = train[0][torch.randperm(len(train[0]), device=samples.device)[:len(samples)]]
    f, f_real, f_held = (torch.cat([net[0](to_float(x)) for x in images.split(500)])
                         for images in (samples, real, held_out[0]))  # features, (N, 64)
    metrics = {"frechet": frechet_distance(f, f_held), "frechet_floor": frechet_distance(f_real, f_held)}
    if train[1].max() == 0:
        return metrics
    p, p_held = net[1](f).softmax(1), net[1](f_held).softmax(1)
    return metrics | {"confident_share": (p.amax(1) > 0.9).float().mean().item(),
                      "confident_share_real": (p_held.amax(1) > 0.9).float().mean().item(),
                      "rarest_class_share": p.argmax(1).bincount(minlength=p.shape[1]).min().item() / len(p),
                      "classifier_accuracy": (p_held.argmax(1) == held_out[1]).float().mean().item()}

# -------------------------------------------------------------------------------- sampling and training loops

@torch.no_grad()
def sample(net, s, args, n, image_shape, bar=False):
    """n images from the seed's noise by args.sampler, uint8 (n, C, H, W); [(t, x_t, x̂_0)] of the first 16.
    Leaves the random state as it was, so that looking at samples in between does not change the training."""
    device, cuda, frames, images = s.beta.device, s.beta.is_cuda, [], []
    eps_theta = as_eps_theta(net, s, args.predict)
    eps_theta, short = subchain(eps_theta, s, steps := min(args.sampling_steps or s.T, s.T))
    fast = torch.autocast(device.type, torch.bfloat16, enabled=cuda and args.predict != "mu")
    with torch.random.fork_rng([device] * cuda), fast:
        torch.manual_seed(args.seed)
        for first in range(0, n, 250):
            x = torch.randn(min(250, n - first), *image_shape, device=device)
            chain = (ddim_sample(eps_theta, short, x, args.clip) if args.sampler == "ddim" else
                     langevin_sample(eps_theta, short, x, args.clip) if args.sampler == "langevin" else
                     ddpm_sample(eps_theta, short, x, args.variance, args.clip))
            for i, xt, x0_hat in tqdm(chain, f"sampling {first + len(x)}/{n}", steps, disable=not bar):
                if first == 0:
                    frames.append((round(i * s.T / steps), xt[:16].clone(), x0_hat[:16].clone()))
            images.append(to_uint8(xt))
    return torch.cat(images), frames

def load_checkpoint(path):
    """The dict that train saved. Exits with a message if it is not there, truncated, or of another script."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert state["script"] == Path(__file__).stem, f"written by {state['script']}.py"
        return state
    except Exception as e:
        fail(f"no checkpoint of {Path(__file__).name} at {path}: missing, truncated or another ({e!r:.60})")

def train(args, net, ema, s, images, path, state):
    """Algorithm 1, from state (a checkpoint, or None) to args.steps; Ctrl-C stops it after the step at hand.
    Saves to path each minute and at the end, and returns what it saved. Of the processes that torchrun
    starts each learns from its share of every batch; only the first saves and returns."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    device, model, opt = images.device, net, torch.optim.Adam(net.parameters(), args.lr)
    if world > 1:
        if images.is_cuda:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group()
        model = nn.parallel.DistributedDataParallel(net)
    if state:  # which holds all that the next step depends on
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        torch.cuda.manual_seed_all(state["step"])  # on a GPU the rest of the run draws other numbers
    elif path.exists() and rank == 0:
        print("the earlier checkpoint is now", path.rename(path.with_stem(f"checkpoint-{time.time_ns()}")))
    run = state or {"step": 0, "seconds": 0.0, "losses": torch.zeros(0), "snapshots": {}}
    first, start, saved, stop = run["step"], time.time() - run["seconds"], time.time(), []
    losses = F.pad(run["losses"], (0, max(0, args.steps - first))).to(device)
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    milestones = {max(1, args.steps // 2 ** i) for i in range(6)}  # a row of samples each: one sees it learn
    bar = tqdm(range(first + 1, args.steps + 1), "training", args.steps, initial=first, disable=rank > 0)
    for step in bar:
        opt.param_groups[0]["lr"] = args.lr * min(1, step / args.warmup)
        x0 = to_float(images[torch.randint(len(images), (args.batch,), device=device)])
        if args.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        t = torch.randint(1, s.T + 1, (len(x0),), device=device)
        eps = torch.randn_like(x0)
        x0, t, eps = (v[rank::world] for v in (x0, t, eps))  # each process has drawn the same batch
        with torch.autocast(device.type, torch.bfloat16, enabled=images.is_cuda and args.predict != "mu"):
            if args.loss == "simple":
                loss = l_simple(model, s, x0, t, eps, args.predict)
            else:  # Eq. (5): T times a random one of its terms
                eps_theta = as_eps_theta(model, s, args.predict)
                loss = s.T * vlb_term(eps_theta, s, x0, t, eps, args.variance, clip=False)[0].mean()
        opt.zero_grad()
        loss.backward()
        size = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        decay = min(args.ema, step / (9 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in net.parameters()], 1 - decay)
        losses[step - 1] = loss.detach() + 0 * size  # so that it is not finite if the gradient is not
        if step % 50 == 0:
            bar.set_postfix(loss=f"{losses[step - 50:step].mean():.4f}")
        if step in milestones and rank == 0:
            run["snapshots"][f"step {step}"] = sample(ema, s, args, 16, images.shape[1:])[0].cpu()
            draw_rows(path.with_name("training.png"), run["snapshots"])
        if rank == 0 and (stop or step == args.steps or time.time() - saved > 60):
            if not losses[:step].isfinite().all():
                fail(f"the loss is no longer finite at step {step}: try a smaller --lr. {path} is as it was")
            saved = time.time()
            run |= {"script": Path(__file__).stem, "image_shape": list(images.shape[1:]), "step": step,
                    "config": {k: v for k, v in vars(args).items() if k not in OF_THE_RUN},
                    "seconds": saved - start, "losses": losses[:step].cpu(), "rng": torch.get_rng_state(),
                    "net": net.state_dict(), "ema": ema.state_dict(), "optimizer": opt.state_dict()}
            torch.save(run, f"{path}.tmp")  # a run killed while saving leaves the last checkpoint whole
            os.replace(f"{path}.tmp", path)
        if stop:
            print(f"stopped at step {step} of {args.steps}; --resume goes on from here")
            break
    signal.signal(signal.SIGINT, handler)
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        sys.exit()  # the first process alone goes on to sample
    return run

# ---------------------------------------------------------------------------------------------------- figures

def draw_rows(path, rows, columns=()):
    """Images as a table. rows: {label: uint8 (n, C, H, W)}; columns: labels above the first row."""
    x = F.pad(torch.stack(list(rows.values())).cpu(), (1, 1, 1, 1), value=255)
    R, n, C, H, W = x.shape
    ax = Figure((1.5 + 0.7 * n, 0.3 + 0.75 * R * H / W), layout="constrained").subplots()
    ax.imshow(x.permute(0, 3, 1, 4, 2).reshape(R * H, n * W, C).expand(-1, -1, 3).numpy())
    ax.set_xticks([(i + 0.5) * W for i in range(len(columns))], columns)
    ax.set_yticks([(i + 0.5) * H for i in range(R)], rows)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.figure.savefig(path, dpi=100, bbox_inches="tight")

def draw_curve(path, x, y, xlabel, ylabel, yscale="linear"):
    ax = Figure((6, 4), layout="constrained").subplots()
    ax.plot(x, y)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    ax.figure.savefig(path, dpi=100)

def draw_all(out, images, frames, real, losses):
    """samples.png (real images in the first row), progressive.png (as Fig. 6), reverse.gif and loss.png."""
    n = min(16, len(images))
    rows = {} if real is None else {"data": real[torch.arange(n) % len(real)]}
    lines = images[:min(64, len(images) // n * n)].split(n)
    draw_rows(out / "samples.png", rows | {" " * i or "samples": line for i, line in enumerate(lines)})
    shares = 0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .98, 1  # of the way from x_T to x_0
    columns = [frames[round((len(frames) - 1) * u)] for u in shares]
    rows = {name + " " * k: to_uint8(torch.stack([c[i][k] for c in columns]))
            for k in range(min(3, n)) for i, name in ((1, "x_t"), (2, "x̂_0"))}
    draw_rows(out / "progressive.png", rows, [f"t={t}" for t, _, _ in columns])
    gif = [ImageOps.contain(to_pil_image(make_grid(to_uint8(x), 4)), (256, 256), Image.NEAREST)
           for _, x, _ in frames[::-1][::len(frames) // 40 + 1][::-1]]  # some 30 of them, the last included
    gif[0].save(out / "reverse.gif", save_all=True, append_images=gif[1:] + gif[-1:] * 20, duration=80)
    means = [part.mean() for part in losses.chunk(100)]  # of each hundredth of the run
    ends = np.linspace(0, len(losses), len(means) + 1)[1:]
    draw_curve(out / "loss.png", ends, means, "step", "loss", "log")

@torch.no_grad()
def experiments(args, net, s, held_out, out):
    """Bits/dim, progressive coding (Sec. 4.3), interpolation (Sec. 4.4), inpainting of held-out images."""
    from scipy.ndimage import distance_transform_edt
    torch.manual_seed(args.seed)
    eps_theta, x0 = as_eps_theta(net, s, args.predict), to_float(held_out[:128])
    rate, rmse = rate_distortion(eps_theta, s, x0, args.variance, args.clip)
    draw_curve(out / "rate_distortion.png", rate[:-1], rmse, "rate, bits/dim", "RMSE of x̂_0 (0..255)")

    def last(x, model=eps_theta, first=None):
        return to_uint8(deque(ddpm_sample(model, s, x, args.variance, args.clip, first), maxlen=1)[0][1])
    weights, ts = [i / 10 for i in range(11)], [max(1, s.T * k // 4) for k in (1, 2, 3, 4)]
    rows = {f"t = {t}": last(interpolate(s, x0[:1], x0[-1:], t, weights), first=t) for t in ts}
    mixed = to_uint8(torch.cat([(1 - w) * x0[:1] + w * x0[-1:] for w in weights]))
    draw_rows(out / "interpolation.png", {"pixels": mixed} | rows, [f"λ={w}" for w in weights])

    x0, data, (H, W) = x0[:16], held_out[:16], x0.shape[2:]
    known = torch.ones(H, W, dtype=torch.bool, device=x0.device)
    known[H // 4:H - H // 4, W // 4:W - W // 4] = False
    filled = last(torch.randn_like(x0), inpaint(eps_theta, s, x0, known, args.clip))
    row, column = distance_transform_edt(~known.cpu().numpy(), return_distances=False, return_indices=True)
    nearest = data[:, :, row, column]  # the known pixel nearest to each
    rows = {"data": data, "given": torch.where(known, data, 128), "inpainted": filled, "nearest": nearest}
    draw_rows(out / "inpainting.png", rows)
    error, error_nearest = ((to_float(x) - x0)[:, :, ~known].square().mean().sqrt().item() * 127.5
                            for x in (filled, nearest))
    return {"bits_per_dim": rate[-1], "bits_per_dim_L_T": rate[0], "bits_per_dim_rate": rate[-2],
            "rmse_at_rate": rmse[-1], "inpainting_rmse": error, "inpainting_rmse_nearest": error_nearest}

# ------------------------------------------------------------------------------------------------------- main

SMALL = dict(channels=32, blocks=1, dropout=0.0, flip=False, lr=2e-3, ema=0.998)
PRESETS = {  # what differs from the flags' defaults, which are the paper's for CIFAR-10
    "digits": SMALL | dict(multipliers=[1, 2], attention=[4], steps=1700, warmup=100, sampling_steps=250),
    "mnist": SMALL | dict(multipliers=[1, 2, 3], attention=[7], steps=4200, batch=64, warmup=200,
                          sampling_steps=100, variance="beta_tilde"),
    "cifar10": {},
    "cars": dict(channels=64, multipliers=[1, 2, 3, 4], steps=100_000, batch=64, sampling_steps=250),
}
QUICK = dict(channels=16, steps=30, num_samples=100, sampling_steps=10, warmup=10)
OF_THE_RUN = "checkpoint resume ablation out device quick num_samples experiments compile".split()
TABLE_2 = {"mu-vlb": 13.22, "mu-simple": math.inf,  # the paper's FID, infinite where unstable
           "eps-vlb": 13.51, "eps-simple": 3.17}

def get_args(argv=None):
    """Flags, over the config in a checkpoint or else the dataset's preset, over the paper's values."""
    p = argparse.ArgumentParser(description="Ho et al. 2020. Each --dataset's preset replaces some defaults.")
    yes_no = argparse.BooleanOptionalAction
    p.add_argument("--dataset", default="digits", help="digits, mnist, cifar10, cars, or a folder")
    p.add_argument("--data-dir", default="data", help="the folder that holds MNIST, CIFAR-10 or cars")
    p.add_argument("--image-size", type=lambda size: [int(n) for n in (size.split("x") * 2)[:2]],
                   default=[64, 64], help="of cars and folders: 64, or 48x64, 48 high and 64 wide")
    p.add_argument("--out", default="runs/ddpm_ho_2020-DATASET", help="folder for all that is written")
    p.add_argument("--seed", type=int, default=0)
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's processes have a GPU each
    p.add_argument("--device", default=cuda if torch.cuda.is_available() else
                   "mps" if torch.backends.mps.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="the whole way in seconds, to see that it works")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--checkpoint", help="sample from this file instead of training; needs no other flag")
    start.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--experiments", action="store_true", help="bits/dim, coding, interpolation, inpainting")
    start.add_argument("--ablation", action="store_true", help="Table 2: four runs, beside the paper's")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--T", type=int, default=1000, help="diffusion steps (paper: 1000)")
    p.add_argument("--schedule", choices=SCHEDULES, default="linear", help="noise schedule (paper: linear)")
    p.add_argument("--predict", choices=["eps", "x0", "mu"], default="eps", help="(paper: eps)")
    p.add_argument("--loss", choices=["simple", "vlb"], default="simple", help="(paper: simple)")
    p.add_argument("--steps", type=int, default=800_000, help="training steps (paper: 800000)")
    p.add_argument("--batch", type=int, default=128, help="images a training step (paper: 128)")
    p.add_argument("--lr", type=float, default=2e-4, help="Adam's learning rate (paper: 2e-4)")
    p.add_argument("--warmup", type=int, default=5000, help="steps to the full --lr (authors' code: 5000)")
    p.add_argument("--ema", type=float, default=0.9999, help="decay of the moving average (paper: 0.9999)")
    p.add_argument("--flip", action=yes_no, default=True, help="random horizontal flips (paper: yes)")
    p.add_argument("--channels", type=int, default=128, help="width of the first level (paper: 128)")
    p.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 2, 2], help="(paper: 1 2 2 2)")
    p.add_argument("--blocks", type=int, default=2, help="residual blocks a level (paper: 2)")
    p.add_argument("--attention", type=int, nargs="*", default=[16], help="sizes with attention (paper: 16)")
    p.add_argument("--dropout", type=float, default=0.1, help="in the residual blocks (paper: 0.1)")
    p.add_argument("--time-embedding", action=yes_no, default=True, help="tell the network t, or always 0")
    p.add_argument("--sampler", choices=["ddpm", "ddim", "langevin"], default="ddpm", help="(paper: ddpm)")
    p.add_argument("--sampling-steps", type=int, help="steps of the sampler (paper: T)")
    p.add_argument("--variance", choices=["beta", "beta_tilde"], default="beta", help="sigma_t^2")
    p.add_argument("--clip", action=yes_no, default=True, help="clip x0_hat to [-1, 1] (authors' code: yes)")
    p.add_argument("--num-samples", type=int, default=1000, help="(paper: 50000); 64 with --checkpoint")

    args = p.parse_args(argv)  # a first look, to see whose defaults to take
    if args.checkpoint:  # what it draws goes elsewhere, so that a run's own numbers are not overwritten
        config = load_checkpoint(args.checkpoint)["config"]
        p.set_defaults(**config | {"num_samples": 64, "out": args.out + "-samples"})
    elif args.resume:
        out = args.out.replace("DATASET", Path(args.dataset).resolve().name)
        p.set_defaults(**load_checkpoint(f"{out}/checkpoint.pt")["config"])
    else:
        p.set_defaults(**PRESETS.get(args.dataset, PRESETS["cars"]) | (QUICK if args.quick else {}))
    args = p.parse_args(argv)
    args.out = args.out.replace("DATASET", Path(args.dataset).resolve().name)
    if args.dataset not in PRESETS and not args.checkpoint and not Path(args.dataset).is_dir():
        p.error(f"--dataset {args.dataset} is neither one of {', '.join(PRESETS)} nor a folder")
    counts = args.steps, args.batch, args.warmup, args.blocks, args.num_samples, *args.multipliers, args.T - 1
    if min(*counts, args.sampling_steps or 1) < 1 or args.channels < 4 or args.channels % 4:
        p.error("--steps, --batch, --warmup, --blocks, --num-samples, --sampling-steps, --multipliers start "
                "at 1, --T at 2, --channels at 4, of which it is a multiple")
    if args.batch % (world := int(os.environ.get("WORLD_SIZE", 1))) or args.ablation and world > 1:
        p.error(f"{world} processes: --batch must be a multiple of that, and --ablation runs in one")
    return args

def ablation(args):
    """Table 2, small: a run for each of its rows with the covariance fixed, in folders below args.out."""
    rows, samples = {}, {}
    for name in TABLE_2:
        predict, loss = name.split("-")
        row = {"predict": predict, "loss": loss, "out": f"{args.out}/{name}", "experiments": True}
        rows[name] = main(argparse.Namespace(**vars(args) | row | {"ablation": False}))
        images = torch.tensor(np.load(f"{args.out}/{name}/samples.npz")["arr_0"][:16])
        samples[name] = images.permute(0, 3, 1, 2)
        if rows[name]["steps"] < args.steps:  # Ctrl-C
            break
    draw_rows(f"{args.out}/ablation.png", samples)
    print("\npredicts, loss   Fréchet   bits/dim   paper's FID on CIFAR-10 (inf: unstable)")
    for (name, m), fid in zip(rows.items(), TABLE_2.values()):
        print(f"{name:<14}{m.get('frechet', math.nan):>10.1f}{m['bits_per_dim']:>11.2f}{fid:>11.2f}")
    return rows

def main(args):
    """Train (or load), sample, evaluate, draw; writes it all into args.out and returns the numbers."""
    if args.ablation:
        return ablation(args)
    start, out, path, real = time.time(), Path(args.out), Path(args.out, "checkpoint.pt"), None
    state = load_checkpoint(args.checkpoint or path) if args.checkpoint or args.resume else None
    if args.resume and "optimizer" not in state:
        fail(f"{path} has weights to sample from, not a run to resume: --checkpoint takes it")
    torch.manual_seed(args.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Sampling alone needs no data. The lock: of torchrun's processes one decodes, then the others read.
        with suppress(OSError if args.checkpoint and not args.experiments else ()), FileLock(out / ".lock"):
            real = (load_data(args.dataset, args.data_dir, download=not args.checkpoint)
                    if args.dataset in ("digits", "mnist", "cifar10") else
                    load_folder(args.dataset, Path(args.data_dir), args.image_size, out / "cache.pt"))
            real = [[v.to(args.device) for v in pair] for pair in real]  # each pair: images, labels
        shape = state["image_shape"] if state else list(real[0][0].shape[1:])
        net = make_eps_theta(args, shape).to(args.device)
        ema = copy.deepcopy(net).requires_grad_(False).eval()
        if state:
            net.load_state_dict(state.get("net", state["ema"]))
            ema.load_state_dict(state["ema"])
        s = make_schedule(args.schedule, args.T).to(args.device)
    except (OSError, ValueError, RuntimeError, AssertionError) as e:  # data, sizes, shapes, the device
        fail(" ".join(str(e).split())[:500] or repr(e))
    for model in (net, ema) if args.compile else ():
        model.compile()
    if not args.checkpoint:
        state = train(args, net, ema, s, real[0][0], path, state)
        weights = {k: state[k] for k in ("script", "config", "image_shape", "step", "seconds", "losses")}
        weights["ema"] = {k: v.half() for k, v in state["ema"].items()}
        torch.save(weights, out / "weights.pt")  # all that --checkpoint needs, an eighth of the size
    drawn, losses = time.time(), state["losses"]
    images, frames = sample(ema, s, args, args.num_samples, shape, bar=True)
    metrics = {"script": "ddpm_ho_2020", "dataset": args.dataset, "seed": args.seed, "device": args.device,
               "torch": torch.__version__, "steps": state["step"],
               "params": sum(p.numel() for p in net.parameters()),
               "loss": losses[-max(1, len(losses) // 20):].mean().item(), "seconds_train": state["seconds"],
               "images_per_second": state["step"] * state["config"]["batch"] / state["seconds"],
               "seconds_sample": time.time() - drawn}
    if real and min(len(images), len(real[1][0])) > 64:  # fewer have no covariance of 64 features
        metrics |= evaluate(images, *real, min(1000, args.steps), args.seed)
    if real and args.experiments:
        metrics |= experiments(args, ema, s, real[1][0], out)
    draw_all(out, images, frames, real and real[0][0], losses)
    np.savez_compressed(out / "samples.npz", images.permute(0, 2, 3, 1).cpu().numpy())  # arr_0: N, H, W, C
    metrics |= {"seconds_total": time.time() - start, "config": vars(args)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    for name, value in list(metrics.items())[:-1]:
        print(f"{name:<26}{value:.4f}" if isinstance(value, float) else f"{name:<26}{value}")
    print(f"figures in {out}:", *sorted(p.name for p in out.iterdir() if p.suffix in (".png", ".gif")))
    return metrics

if __name__ == "__main__":
    main(get_args())

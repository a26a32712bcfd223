"""Denoising Diffusion Probabilistic Models.  Ho, Jain, Abbeel 2020, arXiv 2006.11239.

One idea: noise an image x_0 to x_t and train a network ε_θ(x_t, t) to say which noise ε was added; then start
from pure noise x_T and take a little of the predicted noise away, T times. Equation numbers are the paper's.

    python ddpm_ho_2020.py                             # 8x8 digits, no download
    python ddpm_ho_2020.py --dataset mnist             # 28x28 digits, downloaded into data/
    python ddpm_ho_2020.py --checkpoint runs/ddpm_ho_2020-mnist/checkpoint.pt     # draw from that run
    python ddpm_ho_2020.py --experiments               # and bits/dim, coding, interpolation, inpainting
    python ddpm_ho_2020.py --dataset cars              # or cifar10, or a folder of images

Expect of the first, on one CPU core, seed 0: 5 minutes and 1.0 GB; a classifier is sure of 96 % of 1000
samples (of real digits 98 %), the rarest class is 9 %, their Fréchet distance is 1.2 times the floor.
Differs from the paper:
  - Digits, MNIST and cars: smaller networks, shorter training, another learning rate (falling to 0), batch,
    EMA, dropout and flips; the cosine schedule, better on MNIST in equal time; fewer than T sampling steps;
    σ_t² = β̃_t, in bits/dim too. Cars on a GPU: the paper's schedule and σ_t². See PRESETS.
  - As in the authors' code: gradients clipped at 1, the learning rate warmed up, x̂_0 clipped to [-1, 1] in
    sampling and bits/dim (not if μ̃ is predicted), σ_1² = β̃_2 in L_0, L trained as the mean of its terms,
    and the U-Net's widths, of which the paper says only that they make 35.7 M parameters.
  - Only here: the EMA's decay is warmed up; GroupNorm of narrow networks has fewer than 32 groups; strided
    convolutions pad both sides alike; batches are drawn with replacement; bfloat16 where it is faster, except
    to predict μ̃, which is too near to x_t. Bits/dim are of 128 held-out images. No learned Σ (Table 2).
  - No FID, whose network has to be downloaded, but the Fréchet distance in features of a small classifier
    trained here: compare it with the floor beside it and with other runs on the same data, not with FID.
Shapes: B batch, C channels, H height, W width, D embedding, K classes, () one number.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from schedules import SCHEDULES, Schedule, extract, from_alpha_bar, make_schedule

# ------------------------------------------------------- Secs. 3.2, 3.4: the loss and one step of Algorithm 1

def l_simple(net, s, x0, t, eps, y=None):
    """L_simple = E |ε - ε_θ(√ᾱ_t x_0 + √(1 - ᾱ_t) ε, t)|², per dimension.  Eq. (14).  -> ()

    x0 (B, C, H, W) in [-1, 1];  t (B,) integers in 1..T;  eps like x0, drawn from N(0, I).
    y: the labels, if there are any; this loss has no use for them."""
    return F.mse_loss(net(s.q_sample(x0, t, eps), t), eps)

def train_step(net, ema, opt, s, x0, y=None, loss=l_simple, decay=0.9999):
    """One step of Algorithm 1 on the images x0 (B, C, H, W) in [-1, 1].  -> the loss, ()

        net = UNet((1, 28, 28), channels=32, multipliers=(1, 2, 2), attention=(7,))
        ema, opt = copy.deepcopy(net).eval(), torch.optim.Adam(net.parameters(), 2e-4)
        s, batches = make_schedule("linear", 1000), [torch.rand(64, 1, 28, 28)]  # yours, from -1 to 1
        for n, x0 in enumerate(batches, start=1):
            train_step(net, ema, opt, s, x0, decay=min(0.9999, n / (9 + n)))

    One samples from ema, the moving average of the weights (Appendix B), whose decay is warmed up here."""
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

# ------------------------------------------------------------- Secs. 2, 3.2: the reverse process, Algorithm 2

def predict_x0(s, xt, t, eps_hat, clip=True):
    """x̂_0 = (x_t - √(1 - ᾱ_t) ε̂) / √ᾱ_t.  Eq. (15).

    Near t = T this divides by almost 0: a small error of ε̂ throws x̂_0 far out of the data's range. The clip
    brings it back. It matters most where β_t is large, by Eq. (11): in few steps, at the end of cosine."""
    x0_hat = (xt - extract((1 - s.alpha_bar).sqrt(), t, xt) * eps_hat) / extract(s.alpha_bar.sqrt(), t, xt)
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    return x0_hat

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

# ------------------------------------------------------------------------------ Sec. 4, Appendix B: the U-Net

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

# ----------------------------- Secs. 2, 3, 4.3, 4.4: the bound in bits/dim, progressive coding, interpolation

def discrete_log_likelihood(x0, mean, sigma):
    """log ∫ N(x; mean, σ²) dx over the grey level of x_0, 2/255 wide, open at -1 and 1: a factor of Eq. (13).
    x0, mean (B, ...), sigma (B, 1, ..., 1) -> (B, ...), nats; at least log 1e-12, as in the authors' code"""
    upper = torch.where(x0 > 0.999, 1.0, torch.special.ndtr((x0 + 1 / 255 - mean) / sigma))
    lower = torch.where(x0 < -0.999, 0.0, torch.special.ndtr((x0 - 1 / 255 - mean) / sigma))
    return (upper - lower).clamp(min=1e-12).log()

def vlb_term(eps_theta, s, x0, t, eps, variance="beta", clip=True):
    """One term of Eq. (5) per example, in bits/dim, and |x_0 - x̂_0|² per dimension.  t (B,) -> (B,), (B,)

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p_θ(x_{t-1} | x_t)), Eq. (8) with its C written out, for t > 1;
    L_0 = -log p_θ(x_0 | x_1), Eq. (13), with σ_1² = β̃_2 as in the authors' code: β̃_1 is 0."""
    xt = s.q_sample(x0, t, eps)
    mu_theta, sigma2, x0_hat = p_theta(eps_theta, s, xt, t, variance, clip)
    mu_tilde, beta_tilde = s.q_posterior(x0, xt, t)
    is_1 = (t == 1).reshape(sigma2.shape)
    sigma2 = torch.where(is_1, s.beta_tilde[2].to(x0.dtype), sigma2)
    kl = ((sigma2 / beta_tilde).log() - 1 + (beta_tilde + (mu_tilde - mu_theta) ** 2) / sigma2) / 2  # ∞ at 1
    nats = torch.where(is_1, -discrete_log_likelihood(x0, mu_theta, sigma2.sqrt()), kl)
    return nats.flatten(1).mean(1) / math.log(2), ((x0 - x0_hat) ** 2).flatten(1).mean(1)

@torch.no_grad()
def rate_distortion(eps_theta, s, x0, variance="beta", clip=True):
    """Progressive coding, Sec. 4.3: x_T is sent, then x_{T-1}, and so on; with each, x̂_0 gets better.

    x0 (B, C, H, W) -> rates L_T, L_T + L_{T-1}, ...: the bits/dim paid once x_T, x_{T-1}, ..., x_0 are there,
    T + 1 of them, of which the last is all of Eq. (5), the bound on the negative log-likelihood;
    RMSE of x̂_0(x_t) in grey levels of 255, t = T..1.
        rates, rmse = rate_distortion(ema, s, x0)"""
    alpha_bar_T = s.alpha_bar[-1]
    L_T = (alpha_bar_T * x0 ** 2 - alpha_bar_T - (1 - alpha_bar_T).log()).mean() / 2  # KL from N(0, I)
    rates, rmse = [L_T.item() / math.log(2)], []
    for t in tqdm(range(s.T, 0, -1), "bits/dim"):
        ts = torch.full((len(x0),), t, device=x0.device)
        bits, error = vlb_term(eps_theta, s, x0, ts, torch.randn_like(x0), variance, clip)
        rates.append(rates[-1] + bits.mean().item())
        rmse.append(127.5 * error.mean().sqrt().item())
    return rates, rmse

def interpolate(s, a, b, t, weights):
    """x̄_t = (1 - λ) x_t + λ x'_t of two images, noised to t.  Sec. 4.4 (which prints x_0 for x_t).
    a, b (1, C, H, W), n weights λ -> (n, C, H, W)
        chain = ddpm_sample(ema, s, interpolate(s, a, b, 500, [0, 0.25, 0.5, 0.75, 1]), start=500)"""
    a_t = s.q_sample(a, t, torch.randn_like(a))
    b_t = s.q_sample(b, t, torch.randn_like(b))
    return torch.cat([(1 - weight) * a_t + weight * b_t for weight in weights])

# ----------------------------------------- Sec. 3.2, Table 2: what else a network may predict, and the loss L

def predict_eps(s, xt, t, x0_hat):
    """ε̂ = (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t), the noise that takes x̂_0 to x_t: Eq. (4) solved for ε."""
    return (xt - extract(s.alpha_bar.sqrt(), t, xt) * x0_hat) / extract((1 - s.alpha_bar).sqrt(), t, xt)

def l_x0(net, s, x0, t, eps, y=None):
    """E |x_0 - net(x_t, t)|², per dimension: the network predicts x_0 (Sec. 3.2).  -> ()"""
    return F.mse_loss(net(s.q_sample(x0, t, eps), t), x0)

def l_mu(net, s, x0, t, eps, y=None):
    """E |μ̃_t - net(x_t, t)|², per dimension: the network is μ_θ, Eq. (8) without its factor.  -> ()"""
    xt = s.q_sample(x0, t, eps)
    mu_tilde, _ = s.q_posterior(x0, xt, t)
    return F.mse_loss(net(xt, t), mu_tilde)

def as_eps_theta(net, s, predict):
    """The ε_θ of a network that predicts "eps", "x0" or "mu": for any sampler, and for the bound."""
    def from_x0(xt, t):
        return predict_eps(s, xt, t, net(xt, t))
    def from_mu(xt, t):
        a, b = s.posterior_coefficients(t, xt)
        x0_hat = (net(xt, t) - b * xt) / a  # Eq. (7), μ̃_t = a x_0 + b x_t, solved for x_0
        return predict_eps(s, xt, t, x0_hat)

    return {"eps": net, "x0": from_x0, "mu": from_mu}[predict]

def l_vlb(net, s, x0, t, eps, y=None, predict="eps", variance="beta"):
    """An estimate of (L - L_T) / T, Eq. (5): the mean of the terms of the t drawn, in bits/dim.  -> ()"""
    bits, _ = vlb_term(as_eps_theta(net, s, predict), s, x0, t, eps, variance, clip=False)
    return bits.mean()

# -------------------------------------------------- not the paper's: DDIM, the score and Langevin, inpainting

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

def score(eps_theta, s, xt, t):
    """∇ log q(x_t) ≈ -ε_θ(x_t, t) / √(1 - ᾱ_t), as ∇ log q(x_t | x_0) = -ε / √(1 - ᾱ_t): L_simple is
    denoising score matching (Vincent 2011) at every noise level, with weight 1 - ᾱ_t.  -> (B, ...)"""
    return -eps_theta(xt, t) / extract((1 - s.alpha_bar).sqrt(), t, xt)

@torch.no_grad()
def langevin_sample(eps_theta, s, x, clip=True, each=5, step=0.2):
    """Annealed Langevin dynamics, Song & Ermon 2019, Algorithm 1.  Yields what ddpm_sample yields.

    x ← x + α/2 ∇ log q(x) + √α z, `each` times per noise level. α, no 1 - β_t here, is a step size, 0.2 σ² as
    theirs. Our levels are those of q: σ² = 1 - ᾱ_t, and x goes from one to the next unchanged. They take 100
    steps at 10 levels, we 5 at T. We end in x̂_0; they leave the last level's noise in."""
    for t in range(s.T, 0, -1):
        ts = torch.full((len(x),), t, device=x.device)
        alpha = extract(step * (1 - s.alpha_bar), t, x)
        for _ in range(each):
            x = x + alpha / 2 * score(eps_theta, s, x, ts) + alpha.sqrt() * torch.randn_like(x)
        x0_hat = predict_x0(s, x, ts, eps_theta(x, ts), clip)
        if t == 1:
            x = x0_hat
        yield t - 1, x, x0_hat

@torch.no_grad()
def repaint_sample(eps_theta, s, x, x0, known, variance="beta", clip=True, times=10):
    """Inpainting: RePaint, Lugmayr et al. 2022, Algorithm 1.  Yields what ddpm_sample yields.
        chain = repaint_sample(ema, s, torch.randn_like(x0), x0, known=torch.rand(28, 28) < 0.5)
    The pixels of x0 (B, C, H, W) where known (bool, broadcast) is True come from q(x_{t-1} | x_0), the others
    from p_θ(x_{t-1} | x_t). The two do not fit, so one step of q leads back to x_t and p_θ draws again:
    `times` (their U) draws per t, so that the others adapt. Larger steps let them adapt more: in equal time,
    25 steps (subchain) of 40 beat 100 of 10. (They print ᾱ_t, β_{t-1} for ᾱ_{t-1}, β_t; no √ over 1 - ᾱ.)"""
    for t in range(s.T, 0, -1):
        ts = torch.full((len(x),), t, device=x.device)
        draws = times if t > 1 else 1
        for draw in range(draws):
            if draw > 0:  # back to x_t by q(x_t | x_{t-1}), Eq. (2)
                x = extract(s.alpha.sqrt(), t, x) * x + extract(s.beta.sqrt(), t, x) * torch.randn_like(x)
            mu_theta, sigma2, x0_hat = p_theta(eps_theta, s, x, ts, variance, clip)
            z = torch.randn_like(x) if t > 1 else torch.zeros_like(x)
            given = s.q_sample(x0, t - 1, torch.randn_like(x))  # at t = 1 that is x_0
            x = torch.where(known, given, mu_theta + sigma2.sqrt() * z)
        yield t - 1, x, x0_hat

# The paper ends here; the rest trains, measures and draws.

import argparse
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy.io import loadmat
from scipy.ndimage import distance_transform_edt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, MNIST
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

# ------------------------------------------------------------------------------------------------------- data

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

# Only here: without labels asked for, a sample is good if clearly of some class, and if no class is missing.
def confidence(p):
    """p (N, K), a classifier's probabilities -> the share that it is sure of, and that of the rarest class"""
    return {"confident_share": (p.amax(1) > 0.9).float().mean().item(),
            "rarest_class_share": p.argmax(1).bincount(minlength=p.shape[1]).min().item() / len(p)}

def evaluate(samples, judge, real, seed):
    """Samples, uint8 (N, C, H, W), against the held-out images of real, a triple as of load_data.  -> dict"""
    (images, _), (held_out, labels), _ = real
    f, f_held = features_of(judge, samples), features_of(judge, held_out)
    f_real = features_of(judge, some_of(images, len(samples), seed))
    metrics = {"frechet": frechet_distance(f, f_held), "frechet_floor": frechet_distance(f_real, f_held)}
    if judge is not None:
        p, p_held = judge[1](f).softmax(1), judge[1](f_held).softmax(1)
        metrics |= confidence(p)
        metrics["confident_share_real"] = confidence(p_held)["confident_share"]
        metrics["classifier_accuracy"] = (p_held.argmax(1) == labels).float().mean().item()
    return metrics

# Both image scripts have what follows.
# ----------------------------------------------------------------------------------- what a run leaves behind

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

# Only here: the network.
def make_eps_theta(args, image_shape):
    """The network that args describe, for images of shape (C, H, W).  ValueError if the size does not fit."""
    net = UNet(image_shape, args.channels, args.multipliers, args.blocks, args.attention, args.dropout,
               args.time_embedding)
    return in_fast_format(net, args)

# ---------------------------------------------------------------------------------------------------- figures

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

# Only here: what this paper's figures show.
def draw_curve(path, x, y, xlabel, ylabel, yscale="linear"):
    ax = Figure((6, 4), layout="constrained").subplots()
    ax.plot(x, y)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    ax.figure.savefig(path, dpi=100)

def draw_all(out, images, frames, real, losses):
    """samples.png (real images, if any, in the first row), progressive.png, reverse.gif and loss.png."""
    n = min(16, len(images))
    rows = [("samples", line) for line in images[:4 * n].split(n) if len(line) == n]
    if real is not None:
        rows.insert(0, ("data", real[torch.arange(n) % len(real)]))
    draw_rows(out / "samples.png", rows)

    shares = 0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .98, 1  # of the way from x_T to x_0
    columns = [frames[round((len(frames) - 1) * share)] for share in shares]
    rows = []
    for k in range(min(3, n)):
        rows.append(("x_t", to_uint8(torch.stack([xt[k] for _, xt, _ in columns]))))
        rows.append(("x̂_0", to_uint8(torch.stack([x0_hat[k] for _, _, x0_hat in columns]))))
    draw_rows(out / "progressive.png", rows, [f"t={t}" for t, _, _ in columns])  # Fig. 6 is its rows x̂_0

    pictures = []
    for i in np.linspace(0, len(frames) - 1, 30).round().astype(int):
        _, xt, _ = frames[i]
        grid = to_pil_image(make_grid(to_uint8(xt), 4))
        pictures.append(ImageOps.scale(grid, max(1, 256 // grid.width), Image.NEAREST))
    pictures += pictures[-1:] * 20  # the end stands still for a while
    pictures[0].save(out / "reverse.gif", save_all=True, append_images=pictures[1:], duration=80)

    means = [part.mean().item() for part in losses.chunk(100)]  # of each hundredth of the run
    ends = np.linspace(0, len(losses), len(means) + 1)[1:]
    draw_curve(out / "loss.png", ends, means, "step", "loss", "log")

def end_of(chain):
    """The images in which a sampler ends, uint8."""
    for _, x, _ in chain:  # noqa: B007
        pass
    return to_uint8(x)

@torch.no_grad()
def experiments(args, eps_theta, s, judge, held_out, out):
    """Bits/dim, progressive coding, interpolation of held-out images; then inpainting.  -> numbers"""
    torch.manual_seed(args.seed)
    x0 = to_float(held_out[0][:128])
    rates, rmse = rate_distortion(eps_theta, s, x0, args.variance, args.clip)
    draw_curve(out / "rate_distortion.png", rates[:-1], rmse, "rate, bits/dim", "RMSE of x̂_0 (0..255)")
    metrics = {"bits_per_dim": rates[-1], "bits_per_dim_L_T": rates[0], "bits_per_dim_rate": rates[-2],
               "rmse_at_rate": rmse[-1]}

    a, b, weights = x0[:1], x0[-1:], [i / 10 for i in range(11)]
    rows = [("pixels", to_uint8(torch.cat([(1 - weight) * a + weight * b for weight in weights])))]
    for t in (max(1, s.T // 4), s.T // 2, 3 * s.T // 4, s.T):
        mixed = interpolate(s, a, b, t, weights)
        rows.append((f"t = {t}", end_of(ddpm_sample(eps_theta, s, mixed, args.variance, args.clip, t))))
    draw_rows(out / "interpolation.png", rows, [f"λ={weight}" for weight in weights])

    return metrics | inpainting(args, eps_theta, s, judge, held_out, out)

def inpainting(args, eps_theta, s, judge, held_out, out):
    """RePaint beside the nearest known pixel, on 400 held-out images without their middle.  -> numbers:
    the RMSE of the pixels filled in, of 255, and the share in which the judge sees what was there."""
    images, labels = held_out[0][:400], held_out[1][:400]
    H, W = images.shape[2:]
    known = torch.ones(H, W, dtype=torch.bool, device=images.device)
    top, left = 3 * H // 10, 3 * W // 10
    known[top:H - top, left:W - left] = False
    x0 = to_float(images)
    steps = min(25, args.sampling_steps, s.T)  # few steps of many draws, see repaint_sample
    short_theta, short = subchain(eps_theta, s, steps)
    parts = []
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
        for part in x0.split(portions(len(x0), args.device)):
            noise = torch.randn_like(part)
            chain = repaint_sample(short_theta, short, noise, part, known, args.variance, args.clip, times=40)
            parts.append(end_of(tqdm(chain, "inpainting", steps)))
    repaint = torch.cat(parts)
    i, j = distance_transform_edt(~known.cpu().numpy(), return_distances=False, return_indices=True)
    nearest, metrics = images[:, :, i, j], {}
    for name, filled in (("RePaint", repaint), ("nearest", nearest)):
        error = (to_float(filled) - x0)[:, :, ~known]
        metrics[f"inpainting_rmse_{name}"] = error.square().mean().sqrt().item() * 127.5
        if judge is not None:
            kept = judge(to_float(filled)).argmax(1) == labels
            metrics[f"inpainting_kept_{name}"] = kept.float().mean().item()
    given = torch.where(known, images, 128)
    rows = ("data", images), ("given", given), ("RePaint", repaint), ("nearest", nearest)
    draw_rows(out / "inpainting.png", [(name, x[:16]) for name, x in rows])
    return metrics

# ------------------------------------------------------------------------------------------------------- main

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
QUICK = dict(channels=16, blocks=1, steps=30, num_samples=100, sampling_steps=10, image_size=[32, 32])
PARTS = {"script", "config", "image_shape", "names", "step", "seconds", "losses", "ema"}  # of a checkpoint
ONCE = "checkpoint resume out device bf16 quick num_samples experiments compile".split()  # not kept in it
SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample, "langevin": langevin_sample}

# Both image scripts take these.
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

# Only here: the flags that the other script has no use for, and the run.
def get_args(argv=None):
    """Flags, over the config in a checkpoint or else the dataset's preset, over the paper's values."""
    p = argparse.ArgumentParser(description="Ho et al. 2020. --dataset X --help shows the values for X.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(p)
    p.add_argument("--experiments", action="store_true", help="bits/dim, coding, interpolation, inpainting")
    p.add_argument("--predict", choices=["eps", "x0", "mu"], default="eps", help="Sec. 3.2 (paper: eps)")
    p.add_argument("--loss", choices=["simple", "vlb"], default="simple", help="Table 2 (paper: simple)")
    p.add_argument("--time-embedding", action=argparse.BooleanOptionalAction, default=True,
                   help="tell the network t, or always 0")
    args = read_flags(p, argv)
    if args.predict == "mu":  # the network is μ_θ: there is nothing to clip, and bfloat16 is too coarse
        args.clip = args.bf16 = False
    return args

def loss_of(args):
    """The loss that --predict and --loss name."""
    if args.loss == "vlb":
        return partial(l_vlb, predict=args.predict, variance=args.variance)
    return {"eps": l_simple, "x0": l_x0, "mu": l_mu}[args.predict]

def main(args):
    """Train (or load), sample, evaluate, draw; writes it all into args.out and returns the numbers."""
    begin, out = time.time(), Path(args.out)
    run, real = open_run(args)
    if args.experiments and real is None:
        fail("--experiments needs held-out images: --data-dir")
    shape = run["image_shape"]
    net, ema = networks(lambda: make_eps_theta(args, shape), run, args)
    s = make_schedule(args.schedule, args.T).to(args.device)
    eps_theta = as_eps_theta(ema, s, args.predict)
    announce(args, net, run, real)
    if not args.checkpoint:
        def look():
            return sample([(eps_theta, 16)], s, args, shape, show=False)[0]
        run = train(args, net, ema, s, *real[0], train_step, loss_of(args), look, out / "checkpoint.pt", run)
        leave_torchrun()
        save_weights(run, out / "weights.pt")

    drawn = time.time()
    parts = [(eps_theta, n) for n in portions(args.num_samples, args.device)]
    samples, frames = sample(parts, s, args, shape)
    metrics, shown = {"seconds_sample": time.time() - drawn}, None
    if real is not None:
        (shown, labels), held_out, names = real
        enough = min(len(samples), len(held_out[0])) > 64  # for a covariance of 64 features
        if not enough:
            print("no Fréchet distance: it needs more than 64 samples and held-out images")
        if enough or args.experiments:
            judge = train_judge(shown, labels, len(names), min(1000, args.steps))
        if enough:
            metrics |= evaluate(samples, judge, real, args.seed)
        if args.experiments:
            metrics |= experiments(args, eps_theta, s, judge, held_out, out)
    draw_all(out, samples, frames, shown, run["losses"])
    np.savez_compressed(out / "samples.npz", samples.permute(0, 2, 3, 1).cpu().numpy())  # arr_0: N, H, W, C
    return finish(args, run, net, metrics, begin)

if __name__ == "__main__":
    run_from_shell()

"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics. Sohl-Dickstein et al., arXiv 1503.03585.

One idea: destroy the structure of data by T small steps of noise, q. Each step undone is nearly as simple as
the step itself, so a network can learn it, p, and the chain of these turns noise into data. What is maximised
is a bound on the mean log-likelihood with every term in closed form, Eq. (14):

    K = - Σ_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) + H_q(X_T|X_0) - H_q(X_1|X_0) - H_p(X_T)

There is no t = 1 in the sum: p(x_0 | x_1) = q(x_1 | x_0) π(x_0) / π(x_1), the forward step reversed under the
noise's own distribution π, has nothing to learn.

    python sohl_dickstein_2015.py                             # Swiss roll, T = 40, β learned
    python sohl_dickstein_2015.py --schedule geometric        # β fixed: any name of schedules.py
    python sohl_dickstein_2015.py --data heartbeat            # binary sequences, T = 2000
    python sohl_dickstein_2015.py --checkpoint runs/sohl_dickstein_2015-swiss_roll/checkpoint.pt

Expect, on two CPU cores, seed 0: K = 2.64 ± 0.01 bits in 2 minutes; 2.70 is possible, and the paper has 2.35
for its roll. Heartbeat: K = -2.37 bits in 1.5 minutes (possible -2.32, paper -2.41), 99 % of samples valid.

Differs from the paper:
  - The network is given the log-SNR, not t, and says what x_0 may be: its mean and covariance or, of bits,
    probabilities. The closed form of q makes f_mu, f_sigma, f_b of that. The paper's gives these themselves.
  - Roll: a residual MLP on sines of x_t for 16 radial basis functions; f_sigma full, not diagonal. The paper
    does not say how noisy its roll is, and K depends on that: hold K against the ceiling.
  - Heartbeat: the paper's three sigmoid layers of 50, but one readout for all t instead of one each.
  - Posteriors: the r(x_t) that is exact where p(x_0 | x_t) is Gaussian, not the same r for all t, Eq. (23).
  - Adam, its rate decayed to 0, and averaged weights; the paper has SFO, a quasi-Newton method.

Shapes: B batch, D dimensions of x (2 of the roll, 20 of the heartbeat).  Bounds: bits in print, nats inside.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from tqdm import tqdm

from schedules import SCHEDULES, Schedule, like, make_schedule

LOG2 = math.log(2)  # nats in a bit

# ------------------------------------------------ Secs. 2.2, 2.4: Gaussian diffusion, its reversal, the bound

def reverse_kernel(s, moments, xt, t):
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_sigma(x_t, t)), t >= 2.  Table App.1.

    moments: a callable (x_t (B, D), t (B,)) -> mean x̂_0 (B, D) and covariance S (B, D, D) of x_0 given x_t.
    q(x_{t-1} | x_t, x_0) averaged over such x_0 has mean f_mu = μ̃_t(x̂_0, x_t) and covariance
    f_sigma = β̃_t (I + (SNR_{t-1} - SNR_t) S); the Gaussian with the right moments has the smallest KL.
    -> (B, D), (B, D, D)"""
    x0_hat, S = moments(xt, t)
    f_mu, beta_tilde = s.q_posterior(x0_hat, xt, t)
    gain = like(s.snr[t - 1] - s.snr[t], S)
    return f_mu, beta_tilde[..., None] * (torch.eye(xt.shape[1]).to(S) + gain * S)

def gaussian_kl(s, moments, x0, xt, t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, for each example.  (B,)

    KL(N(μ, σ² I) || N(m, Σ)) = ½ [tr(M⁻¹) + (m - μ)ᵀ M⁻¹ (m - μ) / σ² - D + log det M],  M = Σ / σ²"""
    mu_tilde, beta_tilde = s.q_posterior(x0, xt, t)
    f_mu, f_sigma = reverse_kernel(s, moments, xt, t)
    M, delta = f_sigma / beta_tilde[..., None], (f_mu - mu_tilde) / beta_tilde.sqrt()
    inverse = torch.linalg.inv(M)
    distance = (delta[:, None] @ inverse @ delta[..., None])[:, 0, 0]
    return (inverse.diagonal(dim1=1, dim2=2).sum(1) + distance - xt.shape[1] + M.logdet()) / 2

def gaussian_entropies(s, D):
    """H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T) in nats, where H(N(., v I)) = D/2 log(2πe v).  ()"""
    return D / 2 * ((1 - s.alpha_bar[-1]).log() - s.beta[1].log() - math.log(2 * math.pi * math.e))

@torch.no_grad()
def reverse(s, moments, x):
    """The reverse process from x = x_T ~ N(0, I) (B, D).  Yields (t, x_t) for t = T-1..0."""
    for t in range(s.T, 1, -1):
        f_mu, f_sigma = reverse_kernel(s, moments, x, torch.full((len(x),), t))
        x = f_mu + (torch.linalg.cholesky(f_sigma) @ torch.randn_like(x)[..., None])[..., 0]
        yield t - 1, x
    beta = like(s.beta[1], x)  # the forward step, its own reverse where x_1 ~ N(0, I)
    yield 0, (1 - beta).sqrt() * x + beta.sqrt() * torch.randn_like(x)

def given(moments, y, precision):
    """Sec. 2.5: the moments of p(x_0) r(x_0) / Z given x_t, for r(x_0) = Π_i N(y_i; x_0i, 1 / precision_i).

    A noisy observation y of all coordinates denoises, of some (precision 0 for the others) inpaints. Given to
    reverse, it multiplies p(x_{t-1} | x_t) by r(x_{t-1}) = E[r(x_0) | x_{t-1}]: Eq. (22).
    y, precision: (D,)"""
    def posterior(xt, t):
        x0_hat, S = moments(xt, t)
        S = torch.linalg.solve(torch.eye(len(y)).to(S) + S * precision, S)  # (S⁻¹ + diag(precision))⁻¹
        return x0_hat + (S @ (precision * (y - x0_hat))[..., None])[..., 0], S
    return posterior

def score(s, x0_hat, xt, t):
    """∇ log q(x_t) = (√ᾱ_t E[x_0 | x_t] - x_t) / (1 - ᾱ_t), the mean of ∇ log q(x_t | x_0).  Vincent 2011.

    f_mu is μ̃_t at x̂_0, so it gives the score, and K fits it by denoising score matching.  -> (B, D)"""
    alpha_bar = s.alpha_bar[t]
    return (like(alpha_bar.sqrt(), xt) * x0_hat - xt) / like(1 - alpha_bar, xt)

# ------------------------------------------------------ binomial diffusion: now and then a bit is drawn anew

def binomial_posterior(s, x0, xt, t, rho):
    """The rates of q(x_{t-1} = 1 | x_t, x_0) ∝ q(x_t | x_{t-1} = 1) q(x_{t-1} = 1 | x_0).  Table App.1.

    q(x_t | x_{t-1}) = B((1 - β_t) x_{t-1} + β_t ρ) and so q(x_t | x_0) = B(ᾱ_t x_0 + (1 - ᾱ_t) ρ): with
    probability β_t a bit is drawn anew, from B(ρ).  x0, xt (B, D) of 0. and 1. -> (B, D)"""
    beta, alpha_bar_prev = like(s.beta[t], xt), like(s.alpha_bar[t - 1], xt)
    one = alpha_bar_prev * x0 + (1 - alpha_bar_prev) * rho
    stay, flip = 1 - beta * (1 - rho), beta * rho  # q(x_t = 1 | x_{t-1} = 1), q(x_t = 1 | x_{t-1} = 0)
    a = one * torch.where(xt == 1, stay, 1 - stay)
    return a / (a + (1 - one) * torch.where(xt == 1, flip, 1 - flip))

def f_b(s, x0_hat, xt, t, rho):
    """The rates of p(x_{t-1} = 1 | x_t): q(x_{t-1} | x_t, x_0) averaged over x_0 ~ B(x0_hat).  (B, D)"""
    one, zero = (binomial_posterior(s, torch.full_like(xt, v), xt, t, rho) for v in (1, 0))
    return x0_hat * one + (1 - x0_hat) * zero

def binomial_kl(s, predict, x0, xt, t, rho):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, summed over the bits.  (B,)"""
    q, p = binomial_posterior(s, x0, xt, t, rho), f_b(s, predict(xt, t), xt, t, rho)
    return (torch.xlogy(q, q / p) + torch.xlogy(1 - q, (1 - q) / (1 - p))).sum(1)

def binomial_entropies(s, x0, rho):
    """H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T) in nats, for each example.  (B,)"""
    def H(p):
        return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum(1)
    T, one = s.alpha_bar[-1], s.alpha_bar[1]
    return H(T * x0 + (1 - T) * rho) - H(one * x0 + (1 - one) * rho) - H(torch.full_like(x0, rho))

@torch.no_grad()
def binomial_reverse(s, predict, x, rho):
    """The reverse process from x = x_T ~ B(ρ) (B, D).  Yields (t, x_t) for t = T-1..0."""
    for t in range(s.T, 1, -1):
        ts = torch.full((len(x),), t)
        x = torch.bernoulli(f_b(s, predict(x, ts), x, ts, rho))
        yield t - 1, x
    yield 0, torch.bernoulli((1 - s.beta[1]) * x + s.beta[1] * rho)  # the forward step, reversed under B(ρ)

# ----------------------------------------------------------------------------------------------- the networks

class RollNet(nn.Module):
    """x_t, SNR -> the mean and covariance of x_0 given x_t.  (B, 2), (B,) -> (B, 2), (B, 2, 2)

    x̂_0 = √ᾱ x_t + √(1 - ᾱ) g,  S = (1 - ᾱ) L Lᵀ: with g = 0, L = I (a new network) this is right for N(0, I)
    data, and K = L_null. The network gives g, near the roll -ε across it, and the triangular L."""

    def __init__(self, width):
        super().__init__()
        self.frequency = nn.Parameter(3 * torch.randn(2, width // 2))
        self.embed = nn.Linear(2 * (width // 2) + 3, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                                  nn.Linear(width, width)) for _ in range(3))
        self.out = nn.Linear(width, 5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, xt, snr):
        snr, angle = like(snr, xt), xt @ self.frequency
        alpha_bar, sigma2 = snr / (1 + snr), 1 / (1 + snr)
        h = self.embed(torch.cat([xt, snr.log() / 4, angle.sin(), angle.cos()], 1))
        for block in self.blocks:
            h = h + block(h)
        g_0, g_1, a, b, c = self.out(F.silu(h)).unbind(1)
        L = torch.stack([a.exp(), 0 * b, b, c.exp()], 1).reshape(-1, 2, 2)
        x0_hat = alpha_bar.sqrt() * xt + sigma2.sqrt() * torch.stack([g_0, g_1], 1)
        return x0_hat, sigma2[..., None] * L @ L.mT

class HeartbeatNet(nn.Sequential):
    """x_t -> the probabilities that the bits of x_0 are 1: the paper's MLP.  (B, D), (B,), rate -> (B, D)

    Its inputs are what each bit says alone, log q(x_t | x_0 = 1) / q(x_t | x_0 = 0): t matters only there."""

    def __init__(self, D, width):
        super().__init__(nn.Linear(D, width), nn.Sigmoid(), nn.Linear(width, width), nn.Sigmoid(),
                         nn.Linear(width, width), nn.Sigmoid(), nn.Linear(width, D), nn.Sigmoid())

    def forward(self, xt, alpha_bar, rho):
        alpha_bar = like(alpha_bar, xt)
        zero = (1 - alpha_bar) * rho  # q(x_t = 1 | x_0 = 0)
        one = alpha_bar + zero
        evidence = torch.where(xt == 1, (one / zero).log(), ((1 - one) / (1 - zero)).log())
        return super().forward(evidence.float() / 4).to(xt)

# ------------------------------------------------------------------------ the data, whose densities are known

def roll_density(noise):
    """scikit-learn's Swiss roll seen from above, standardised, as a mixture of n Gaussians along the spiral
    (cos φ, sin φ) φ, φ uniform in [1.5π, 4.5π], closer to each other than they are wide.
    -> centres (n, 2), their variances (2,), and the mean and deviation that standardised them (2,), (2,)"""
    n = int(140 / noise)
    phi = 1.5 * math.pi * (1 + 2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    m = torch.stack([phi * phi.cos(), phi * phi.sin()], 1)
    mean, std = m.mean(0), (m.var(0, unbiased=False) + noise ** 2).sqrt()
    return (m - mean) / std, (noise / std) ** 2, mean, std

def draw_roll(n, noise, seed):
    """n points of the roll, standardised.  float32 (n, 2)"""
    from sklearn.datasets import make_swiss_roll
    _, _, mean, std = roll_density(noise)
    x = torch.tensor(make_swiss_roll(n, noise=noise, random_state=seed)[0][:, [0, 2]])
    return ((x - mean) / std).float()

def exact_moments(density, s):
    """What RollNet has to learn: the true mean and covariance of x_0 given x_t.  float64"""
    m, v = density[:2]

    def moments(xt, t):
        xt, alpha_bar = xt.double(), s.alpha_bar[t].cpu().reshape(-1, 1)
        var = alpha_bar * v + 1 - alpha_bar  # of x_t about √ᾱ m_j
        w = sum(-(xt[:, i, None] - alpha_bar.sqrt() * m[:, i]) ** 2 / (2 * var[:, i, None]) for i in (0, 1))
        w = w.softmax(1)  # p(j | x_t), (B, n)
        mean, square = w @ m, (w @ (m[:, :, None] * m[:, None]).flatten(1)).reshape(-1, 2, 2)
        C = square - mean[:, :, None] * mean[:, None]
        a, b = (1 - alpha_bar) / var, alpha_bar.sqrt() * v / var  # x_0 given x_t and j: a m_j + b x_t
        S = a[:, :, None] * C * a[:, None] + torch.diag_embed(v * (1 - alpha_bar) / var)
        return a * mean + b * xt, S
    return lambda xt, t: tuple(map(torch.cat, zip(*map(moments, xt.split(250), t.split(250)))))

def negative_entropy(density):
    """-H(X) = E log q(x_0) in nats: the mean over the spiral of 7 x 7 Gauss-Hermite points about it."""
    m, v = density[:2]
    z, weight = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(7))
    total, step = 0, max(1, len(m) // 200)
    for i in range(7):
        for j in range(7):
            x = m[step // 2::step] + torch.stack([z[i], z[j]]) * v.sqrt()
            log_w = -((x[:, None] - m) ** 2 / (2 * v)).sum(2)
            total += weight[i] * weight[j] * log_w.logsumexp(1).mean() / (2 * math.pi)
    return (total - math.log(len(m)) - (2 * math.pi * v.prod().sqrt()).log()).item()

def posterior_of_roll(density, y, precision, n):
    """n exact draws of q(x_0) r(x_0) / Z for the r of given().  float64 (n, 2)"""
    m, v = density[:2]
    total = v + 1 / precision  # the variance of y about m_j; infinite where y is not known
    j = (-((y - m) ** 2 / (2 * total)).sum(1)).softmax(0).multinomial(n, replacement=True)
    z = torch.randn(n, 2, dtype=torch.float64)
    return m[j] + v / total * (y - m[j]) + (v * (1 - v / total)).sqrt() * z

HEARTBEATS = torch.eye(5, dtype=torch.float64).repeat(1, 4)  # all five of them: a 1 at every 5th of 20 bits
RHO = 0.2  # rate of the binomial noise: the data's, App. D.1.2 (Table App.1 has 0.5; Table 1 agrees with 0.2)

# --------------------------------------------------------------------------------------------------- training

# Copied from ddpm_ho_2020.py
def fail(message):
    """End the run on a user's mistake: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

# Copied from ddpm_ho_2020.py
def load_checkpoint(path):
    """The dict that train saved. Exits with a message if it is not there, truncated, or of another script."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint at {path}")
    except Exception as e:
        fail(f"{path} cannot be read: truncated, or not a checkpoint ({type(e).__name__})")
    if not isinstance(state, dict) or state.get("script") != Path(__file__).stem:
        fail(f"{path} is not a checkpoint of {Path(__file__).name}")
    return state

def start_beta(args):
    """β_1..β_T of --schedule; learned starts with the log-SNR evenly spaced from 16 to -6. (T,)"""
    if args.schedule != "learned":
        return make_schedule(args.schedule, args.T).beta[1:]
    alpha_bar = F.pad(torch.linspace(16, -6, args.T, dtype=torch.float64).sigmoid(), (1, 0), value=1)
    return 1 - alpha_bar[1:] / alpha_bar[:-1]

def schedule_of(args, logits):
    """The Schedule of β_t = sigmoid(logits[t - 1]); gradients flow into all but β_1, Sec. 2.4.1."""
    if args.schedule == "learned":
        logits = torch.cat([logits[:1].detach(), logits[1:]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the signal left at T, which K itself weighs
        return Schedule(F.pad(logits.sigmoid(), (1, 0))).to(logits.device)

def bound(s, net, x0, t):
    """The KL of step t at one x_t for each x_0, and the entropies of Eq. (14), in nats.  (B,), (B,) or ()"""
    if isinstance(net, HeartbeatNet):
        xt = torch.bernoulli(like(s.alpha_bar[t], x0) * (x0 - RHO) + RHO)
        kl = binomial_kl(s, lambda xt, t: net(xt, s.alpha_bar[t], RHO), x0, xt, t, RHO)
        return kl, binomial_entropies(s, x0, RHO)
    xt = s.q_sample(x0, t, torch.randn_like(x0))  # the noise is frozen: β moves x_t, and K through it
    return gaussian_kl(s, lambda xt, t: net(xt, s.snr[t]), x0, xt, t), gaussian_entropies(s, 2)

def train(args, net, ema, logits, data, path, state):
    """Gradient ascent on K, from state (a checkpoint, or None) to args.steps; Ctrl-C stops it after the step.
    Saves to path each minute and at the end, and returns what it saved."""
    opt = torch.optim.Adam([{"params": net.parameters(), "lr": args.lr}, {"params": [logits], "lr": 0.01}],
                           betas=(0.9, 0.99))
    first, seconds, losses = 0, 0.0, torch.zeros(args.steps, device=data.device)
    rates = [group["lr"] for group in opt.param_groups]
    if state:  # which holds all that the next step depends on
        first, seconds = state["step"], state["seconds"]
        losses = torch.cat([state["losses"].to(data.device), losses[first:]])
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    def save():
        state = {"script": Path(__file__).stem, "config": vars(args), "step": step, "logits": logits.detach(),
                 "seconds": seconds + time.time() - start, "net": net.state_dict(), "ema": ema.state_dict(),
                 "losses": losses[:step].cpu(), "optimizer": opt.state_dict(), "rng": torch.get_rng_state()}
        torch.save(state, f"{path}.tmp")  # a run killed while saving leaves the last checkpoint whole
        os.replace(f"{path}.tmp", path)
        return state

    stop, start, saved, step = [], time.time(), time.time(), first
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    bar = tqdm(total=args.steps, desc="training", initial=first, mininterval=1)
    s = schedule_of(args, logits)
    while step < args.steps and not stop:
        for group, lr in zip(opt.param_groups, rates):
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / args.steps)) / 2
        if args.schedule == "learned":
            s = schedule_of(args, logits)
        x0 = data[torch.randint(len(data), (args.batch,), device=data.device)]
        t = torch.randint(2, s.T + 1, (args.batch,), device=data.device)  # one term of the sum each
        kl, entropies = bound(s, net, x0, t)
        loss = ((s.T - 1) * kl - entropies).mean()  # an estimate of -K without bias
        opt.zero_grad()
        loss.backward()
        size = nn.utils.clip_grad_norm_(net.parameters(), 100)
        if not (loss + size).isfinite():
            fail(f"the bound is no longer finite at step {step}: try a smaller --lr. {path} is as last saved")
        opt.step()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in net.parameters()], 1 - decay)
        losses[step] = loss.detach() / LOG2
        step += 1
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(K=f"{-losses[step - 50:step].mean():.3f} bits")
        if time.time() - saved > 60:
            save()
            saved = time.time()
    bar.close()
    signal.signal(signal.SIGINT, handler)
    if stop:
        print(f"stopped at step {step} of {args.steps}; --resume goes on from here")
    return save()

# ------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(s, net, x0):
    """K in bits over x0, its standard error, and the bits that each step t = 2..T takes from it."""
    steps = []
    for t in tqdm(range(2, s.T + 1), "bound", disable=s.T < 1000):
        kl, entropies = bound(s, net, x0, torch.full((len(x0),), t))
        steps.append(kl.double())
    K = (entropies - sum(steps)) / LOG2
    return K.mean().item(), (K.std() / len(K) ** 0.5).item(), [kl.mean().item() / LOG2 for kl in steps]

def ideal(s, density, x0):
    """K in bits if reverse_kernel had the true moments: none does better with this schedule. A matched
    Gaussian costs ½ E log det(I + (SNR_{t-1} - SNR_t) S) at step t.  -> K, the bits that each step takes"""
    steps = []
    for t in range(2, s.T + 1):
        xt = s.q_sample(x0, t, torch.randn_like(x0))
        _, S = exact_moments(density, s)(xt, torch.full((len(x0),), t))
        gain = s.snr[t - 1] - s.snr[t]
        steps.append((torch.eye(2) + gain * S).logdet().mean().item() / 2 / LOG2)
    return gaussian_entropies(s, 2).item() / LOG2 - sum(steps), steps

# ------------------------------------------------------------------------------------ experiments and figures

def draw(path, rows, T=0):
    """A table of pictures: (title, points (n, 2)), (title, points, arrows (n, 2)), (title, {name: curve})."""
    fig = Figure(figsize=(3.2 * len(rows[0]), 3.2 * len(rows)), layout="constrained")
    for ax, (title, *what) in zip(fig.subplots(len(rows), len(rows[0])).flat, sum(rows, [])):
        ax.set_title(title, fontsize=10)
        if isinstance(what[0], dict):
            for (name, curve), style in zip(what[0].items(), ("-", "--")):
                ax.plot(range(T + 1 - len(curve), T + 1), curve, style, label=name)  # which ends at t = T
            ax.legend()
            continue
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
        xy = [column for a in what for column in a.numpy().T]
        ax.quiver(*xy) if what[1:] else ax.scatter(*xy, s=0.5, c="k")
    fig.savefig(path, dpi=80)

@torch.no_grad()
def roll_experiments(args, out, s, net, held_out, K_steps):
    """The ceilings, Fig. 1, the posteriors of Sec. 2.5, the score, their figures.  -> the numbers"""
    density, x0, T = roll_density(args.noise), held_out[:len(held_out) // 100], s.T
    moments, exact = (lambda xt, t: net(xt, s.snr[t])), exact_moments(density, s)
    K_ideal, ideal_steps = ideal(s, density, x0)
    metrics = {"ceiling_bits": negative_entropy(density) / LOG2, "K_ideal_bits": K_ideal}
    for name in SCHEDULES:
        metrics[f"K_ideal_bits_{name}"] = ideal(make_schedule(name, T), density, x0[:200])[0]
    beta = {"at the end": s.beta[1:].log10().tolist(), "at the start": start_beta(args).log10().tolist()}
    bits = {"network": K_steps, "true moments": ideal_steps}
    draw(out / "bound.png", [[("log10 β_t", beta), ("bits lost at step t", bits)]], T)

    x, axis = torch.randn(2000, 2), torch.linspace(-2.6, 2.6, 18)
    p, grid = {T: x} | dict(reverse(s, moments, x)), torch.cartesian_prod(axis, axis)
    rows = [[] for _ in range(5)]
    for t in (0, T // 2, T):
        u = max(t, T // 4, 2)  # no f_mu is learned at t = 0, and at small t only very near the roll
        ts = torch.full((len(grid),), u)
        xt = s.q_sample(held_out[:2000], t, torch.randn(2000, 2))
        rows[0] += [(f"q, t = {t}", xt)]
        rows[1] += [(f"p, t = {t}", p[t])]
        rows[2] += [(f"f_mu(x, t) - x, t = {u}", grid, reverse_kernel(s, moments, grid, ts)[0] - grid)]
        rows[3] += [(f"∇ log q by f_mu, t = {u}", grid, score(s, moments(grid, ts)[0], grid, ts))]
        rows[4] += [(f"∇ log q, exact, t = {u}", grid, score(s, exact(grid, ts)[0], grid, ts))]
    draw(out / "swiss_roll.png", rows)
    for t in sorted({max(2, T * k // 4) for k in range(5)}):
        ts, xt = torch.full((len(x0),), t), s.q_sample(x0, t, torch.randn_like(x0))
        ours, true = (score(s, f(xt, ts)[0], xt, ts) for f in (moments, exact))
        metrics[f"score_error_t{t}"] = ((ours - true).norm() / true.norm()).item()

    rows, y = [], torch.tensor([0.5, -0.3])
    for task, precision in ("denoise", (4, 4)), ("inpaint", (1e4, 0)):
        precision = torch.tensor(precision, dtype=torch.float32)
        x = dict(reverse(s, given(moments, y, precision), torch.randn(5000, 2)))[0]
        true, again = (posterior_of_roll(density, y, precision, 5000) for _ in "ab")
        for name, points in ("", x), ("_floor", again), ("_without_r", p[0]):
            by_coordinate = map(wasserstein_distance, points.numpy().T, true.numpy().T)
            metrics[f"{task}_distance{name}"] = max(by_coordinate)
        rows += [[(f"{task}: exact", true), (f"{task}: the reverse process, perturbed", x)]]
    draw(out / "posteriors.png", rows)

    frames = [PIL.Image.new("1", (300, 300), 1) for _ in range(T + 1)]
    for t, image in enumerate(frames):
        PIL.ImageDraw.Draw(image).point([tuple(xy) for xy in (p[T - t] * 50 + 150).tolist()], 0)
    more = frames[1:] + frames[-1:] * 10
    frames[0].save(out / "reverse.gif", save_all=True, append_images=more, duration=100)
    return metrics

def heartbeat_experiments(out, s, net, n):
    """The share of n samples that are heartbeats; samples.png: 40 of them, and what they came from."""
    x = torch.bernoulli(torch.full((n, 20), RHO, dtype=torch.float64))
    chain = binomial_reverse(s, lambda xt, t: net(xt, s.alpha_bar[t], RHO), x, RHO)
    ts = (s.T, s.T // 2, s.T // 10, s.T // 100, 0)
    p = {s.T: x} | {t: xt for t, xt in chain if t in ts}
    fig = Figure(figsize=(10, 4), layout="constrained")
    for ax, t in zip(fig.subplots(1, 5), ts):
        ax.imshow(p[t][:40].numpy(), cmap="gray_r", aspect="auto")
        ax.set(title=f"t = {t}", xticks=[], yticks=[])
    fig.savefig(out / "samples.png", dpi=80)
    return {"valid_share": (p[0][:, None] == HEARTBEATS).all(2).any(1).double().mean().item()}

# ------------------------------------------------------------------------------------------------------- main

PRESETS = {"swiss_roll": dict(T=40, schedule="learned", steps=6000, batch=2048, lr=4e-3, width=128),
           "heartbeat": dict(T=2000, schedule="inverse", steps=8000, batch=2048, lr=1e-2, width=50)}
QUICK = dict(steps=100, batch=256, width=32, num_samples=2000)

def get_args(argv=None):
    """Flags, over the config in a checkpoint or else the preset of --data."""
    p = argparse.ArgumentParser(description="Deep Unsupervised Learning using Nonequilibrium Thermodynamics.",
                                epilog="Each --data has a preset for the flags without a default here.")
    p.add_argument("--data", choices=PRESETS, default="swiss_roll")
    p.add_argument("--out", help="folder for all that is written; default runs/sohl_dickstein_2015-<data>")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="default cpu: the networks are too small for a GPU")
    p.add_argument("--quick", action="store_true", help="the whole way in seconds, to see that it works")
    p.add_argument("--checkpoint", help="evaluate this file instead of training; needs no other flag")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--noise", type=float, default=0.02, help="of the roll (paper: not given)")
    p.add_argument("--T", type=int, help="diffusion steps (paper: 40 for the roll, 2000)")
    p.add_argument("--schedule", choices=["learned", *SCHEDULES], help="(paper: learned; inverse)")
    p.add_argument("--steps", type=int, help="training steps")
    p.add_argument("--batch", type=int, help="examples a training step")
    p.add_argument("--lr", type=float, help="Adam's learning rate")
    p.add_argument("--width", type=int, help="of the network (paper: 16 for the roll, 50)")
    p.add_argument("--num-samples", type=int, default=100_000, help="fresh data for K, a tenth for bits")
    args = p.parse_args(argv)  # a first look, to see whose defaults to take
    if args.checkpoint or args.resume:
        path = args.checkpoint or f"{args.out or f'runs/sohl_dickstein_2015-{args.data}'}/checkpoint.pt"
        config = load_checkpoint(path)["config"]
        p.set_defaults(**{k: config[k] for k in ("data", "noise", "seed", *PRESETS["heartbeat"])})
    else:
        p.set_defaults(**PRESETS[args.data] | QUICK if args.quick else PRESETS[args.data])
    args = p.parse_args(argv)
    args.out = args.out or f"runs/sohl_dickstein_2015-{args.data}"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {args.device} does not work here: {str(e).splitlines()[0]}")
    if args.data == "heartbeat" and args.schedule == "learned":
        p.error("--schedule learned is for the roll: noise on bits cannot be frozen (Sec. 2.4.1)")
    if min(args.steps, args.batch, args.T - 1, args.num_samples - 1999, args.width // 2) < 1:
        p.error("--steps and --batch must be at least 1, --T and --width 2, --num-samples 2000")
    if not 0.005 <= args.noise <= 10:
        p.error("--noise must be from 0.005 (with none the roll has no density) to 10")
    return args

def main(args):
    """Train (or load), evaluate, draw; writes it all into args.out and returns the numbers."""
    begin, out, roll = time.time(), Path(args.out), args.data == "swiss_roll"
    path = out / "checkpoint.pt"
    state = load_checkpoint(args.checkpoint or path) if args.checkpoint or args.resume else None
    torch.manual_seed(args.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        net = (RollNet(args.width) if roll else HeartbeatNet(20, args.width)).to(args.device)
        ema, logits = copy.deepcopy(net).requires_grad_(False), start_beta(args).logit().to(args.device)
        if state and len(state["logits"]) != args.T:
            fail(f"the checkpoint has T = {len(state['logits'])}, not {args.T}")
        if state:
            net.load_state_dict(state["net"])
            ema.load_state_dict(state["ema"])
            logits = state["logits"].to(logits)
    except OSError as e:
        fail(e)
    except RuntimeError as e:
        fail(f"the checkpoint has other shapes than the flags ask for: {str(e).splitlines()[-1].strip()}")
    if not state and path.exists():
        kept = path.rename(out / f"checkpoint-{path.stat().st_mtime_ns}.pt")
        print(f"an earlier run's checkpoint is kept as {kept}")
    if not args.checkpoint:
        data = draw_roll(400_000, args.noise, args.seed + 1) if roll else HEARTBEATS
        logits.requires_grad_(args.schedule == "learned")
        state = train(args, net, ema, logits, data.to(args.device), path, state)

    torch.manual_seed(args.seed)
    net, s = ema.cpu(), schedule_of(args, state["logits"].cpu())
    n = args.num_samples if roll else args.num_samples // 10
    held_out = draw_roll(n, args.noise, args.seed + 2) if roll else HEARTBEATS[torch.randint(5, (n,))]
    K, K_stderr, K_steps = evaluate(s, net, held_out)
    metrics = {"script": "sohl_dickstein_2015", "dataset": args.data, "seed": args.seed,
               "device": args.device, "torch": torch.__version__, "steps": state["step"],
               "params": sum(p.numel() for p in net.parameters()), "seconds_train": state["seconds"]}
    if roll:
        L_null = -math.log2(2 * math.pi * math.e)  # of N(0, I), if the data have variance 1
        metrics |= roll_experiments(args, out, s, net, held_out, K_steps)
        metrics |= {"L_null_bits": L_null, "K_minus_L_null_bits": K - L_null, "K_bits": K}
        paper = f"paper: K 2.35, K - L_null 6.45; ceiling -H(X) = {metrics['ceiling_bits']:.3f}"
    else:
        metrics |= heartbeat_experiments(out, s, net, n)
        metrics |= {"true_bits_per_sequence": -math.log2(5), "K_bits_per_sequence": K}
        paper = "paper: K -2.414"
    metrics |= {"K_stderr_bits": K_stderr, "seconds_total": time.time() - begin, "config": vars(args)}
    (out / "metrics.json").write_text(json.dumps(metrics | {"KL_bits_of_step": K_steps}, indent=1))
    for name, value in list(metrics.items())[:-1]:
        print(f"{name:<28}{value:.4f}" if isinstance(value, float) else f"{name:<28}{value}")
    print(f"{paper}\nfigures in {out}")
    return metrics

if __name__ == "__main__":
    main(get_args())

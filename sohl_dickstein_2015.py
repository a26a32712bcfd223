"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics. Sohl-Dickstein et al., arXiv 1503.03585.

One idea: destroy the structure of data by T small steps of noise, q. The reverse of a small step has the same
form, Gaussian or binomial (Sec. 2.2), so a network need only learn its parameters: p. Training maximises a
bound on the mean log-likelihood in which every term has a closed form, Eq. (14):

    K = - Σ_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) + H_q(X_T|X_0) - H_q(X_1|X_0) - H_p(X_T)

The last step, p(x_0 | x_1), is not learned: it is the forward step with β_1, App. B.2, Eq. (44). Eq. (14)
holds if -E log π(x_t) = H_p(X_T) for all t: so the roll is standardised, and π's bits have the data's rate ρ.

    python sohl_dickstein_2015.py                             # Swiss roll, T = 40, β learned
    python sohl_dickstein_2015.py --dataset heartbeat         # binary sequences, T = 2000
    python sohl_dickstein_2015.py --checkpoint runs/sohl_dickstein_2015-swiss_roll/checkpoint.pt

Expect, on one CPU core, seed 0: K = 2.61 ± 0.01 bits in 4 minutes (ceiling -H(X_0) = 2.70; paper 2.35, for
its own roll). Heartbeat: K = -2.37 bits in 4 minutes (ceiling -2.32, paper -2.41), 99 % of samples valid.
With the true moments in place of the network the roll's K is 0.033 bits higher. With the schedules' β, not
learned, even they reach at most 0.8 bits (geometric); inverse, which the paper's footnote 2 calls as good as
a learned β, -3.1. Posteriors (Sec. 2.5): the modes are found, but their weights are off, with stray points,
where p(x_0 | x_t) is not Gaussian; Wasserstein-1 distance in the worse coordinate: denoised 0.085, inpainted
0.151 (two exact sets: 0.014, 0.008; without r: 0.67, 0.88).

Differs from the paper:
  - The network gets ᾱ_t, not t, and predicts the mean and covariance of x_0 or, for bits, P(x_0 = 1); f_mu,
    f_sigma and f_b follow from q. The paper's predicts these directly, with one readout layer per t and a
    diagonal f_sigma, below 1 by a sigmoid. Ours has one readout layer and a full f_sigma.
  - Roll: an MLP on x_t and sines of it, not 16 radial basis functions; standardised per coordinate, not by
    one constant. The paper does not give its roll's noise, on which K depends: compare K with the ceiling.
    The figure's arrows are scores, where Fig. 1 has the drift f_mu(x_t, t) - x_t.
  - Heartbeat: the paper's three sigmoid layers of 50, but they get each bit's evidence, not the bits; β_T is
    0.999, not 1.
  - Posteriors: r(x_t) = E[r(x_0) | x_t] as if p(x_0 | x_t) were Gaussian, not one r for every t, Eq. (23);
    x_T is drawn from π alone.
  - Adam (its second β 0.99), its rate decayed to 0, gradients clipped at 100; the paper: SFO, quasi-Newton.

Shapes: B batch, D dimensions of x (2 of the roll, 20 of the heartbeat); t (B,), and so ᾱ_t by extract (B, 1).
All is float64, since 1 - ᾱ_1 is 1e-7; only the networks' layers are float32.
"""
import math
from functools import partial

import torch
import torch.nn as nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, kl_divergence

from schedules import SCHEDULES, Schedule, extract, from_alpha_bar, make_schedule

RHO = 0.2  # P(a bit is 1) under π and in the data, App. D.1.2 (Table App.1 has 0.5)
NO_SIGNAL = torch.tensor(0.0, dtype=torch.float64)  # ᾱ = 0: q(x_t | x_0) is then π

# -------------------------------------------------- Sec. 2.1, Table App.1: the forward process, q(x_t | x_0)

def gaussian_q(x0, alpha_bar):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I).  x0 (B, D), alpha_bar (B, 1) or one for all -> B Gaussians
        xt = gaussian_q(x0, extract(s.alpha_bar, t, x0)).sample()"""
    std = (1 - alpha_bar).sqrt() * torch.ones_like(x0)
    return MultivariateNormal(alpha_bar.sqrt() * x0, scale_tril=torch.diag_embed(std), validate_args=False)

def bernoulli(rate):
    """B(rate): D independent bits, each 1 with its own probability.  rate (B, D)"""
    return Independent(Bernoulli(rate, validate_args=False), 1)

def binomial_q(x0, alpha_bar):
    """q(x_t | x_0) = B(ᾱ_t x_0 + (1 - ᾱ_t) ρ).  x0 (B, D) of 0. and 1., alpha_bar (B, 1) or one for all
        xt = binomial_q(x0, extract(s.alpha_bar, t, x0)).sample()"""
    return bernoulli(alpha_bar * x0 + (1 - alpha_bar) * RHO)

# ------------------------------------------- Sec. 2.2: the reverse process, p(x_{t-1} | x_t) for t = T..2

def gaussian_posterior(s, xt, t, x0):
    """q(x_{t-1} | x_t, x_0) = N(μ̃_t(x_t, x_0), β̃_t I): the target of p in the KL of Eq. (14)."""
    mu_tilde, beta_tilde = s.q_posterior(x0, xt, t)
    std = beta_tilde.sqrt().expand_as(xt)
    return MultivariateNormal(mu_tilde, scale_tril=torch.diag_embed(std), validate_args=False)

def gaussian_p(s, xt, t, moments):
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_sigma(x_t, t)), from the moments of x_0 given x_t: x̂_0 and S.
        f_mu = μ̃_t(x_t, x̂_0),   f_sigma = β̃_t (I + (SNR_{t-1} - SNR_t) S)
    These are the moments of q(x_{t-1} | x_t, x_0) averaged over x_0, and so of the Gaussian nearest in KL.
    moments: x̂_0 (B, D), S (B, D, D)
        x_prev = gaussian_p(s, xt, t, net(xt, extract(s.alpha_bar, t, xt))).sample()"""
    x0_hat, S = moments
    f_mu, beta_tilde = s.q_posterior(x0_hat, xt, t)
    identity = torch.eye(xt.shape[1], dtype=xt.dtype, device=xt.device)
    gain = extract(s.snr, t - 1, S) - extract(s.snr, t, S)  # (B, 1, 1)
    f_sigma = beta_tilde[:, None] * (identity + gain * S)
    L = torch.linalg.cholesky_ex(f_sigma).L  # raises nothing where S is NaN; train_step sees that in K
    return MultivariateNormal(f_mu, scale_tril=L, validate_args=False)

def evidence(xt, alpha_bar):
    """log q(x_t | x_0 = 1) - log q(x_t | x_0 = 0) for each bit: what x_t says of x_0.  alpha_bar (B, 1)
    With α_t instead of ᾱ_t: what x_t says of x_{t-1}.  xt (B, D) -> (B, D)"""
    rate_of_0 = (1 - alpha_bar) * RHO  # q(x_t = 1 | x_0 = 0)
    rate_of_1 = rate_of_0 + alpha_bar  # q(x_t = 1 | x_0 = 1)
    said_by_1 = (rate_of_1 / rate_of_0).log()
    said_by_0 = ((1 - rate_of_1) / (1 - rate_of_0)).log()
    return torch.where(xt == 1, said_by_1, said_by_0)

def binomial_posterior(s, xt, t, x0):
    """q(x_{t-1} | x_t, x_0), by Bayes' rule: log-odds of x_{t-1} given x_0, plus the evidence of x_t."""
    log_odds = binomial_q(x0, extract(s.alpha_bar, t - 1, x0)).mean.logit()
    return bernoulli((log_odds + evidence(xt, extract(s.alpha, t, xt))).sigmoid())

def binomial_p(s, xt, t, rate):
    """p(x_{t-1} | x_t) = B(f_b(x_t, t)): q(x_{t-1} | x_t, x_0), averaged over x_0 ~ B(rate).  rate (B, D)
        x_prev = binomial_p(s, xt, t, net(xt, extract(s.alpha_bar, t, xt))).sample()"""
    f_b_of_1 = binomial_posterior(s, xt, t, torch.ones_like(xt)).mean
    f_b_of_0 = binomial_posterior(s, xt, t, torch.zeros_like(xt)).mean
    return bernoulli(rate * f_b_of_1 + (1 - rate) * f_b_of_0)

GAUSSIAN = (gaussian_q, gaussian_posterior, gaussian_p)  # the functions below take one as `kind`
BINOMIAL = (binomial_q, binomial_posterior, binomial_p)

@torch.no_grad()
def reverse(kind, s, net, x):
    """The generative process, Eqs. (4), (5), from x = x_T ~ π (B, D).  Yields (t, x_t) for t = T-1..0.
        for t, x in reverse(GAUSSIAN, s, net, torch.randn(1000, 2, dtype=torch.float64)):
            pass  # after the loop t is 0 and x are 1000 samples"""
    q, _, p = kind
    for step in range(s.T, 1, -1):
        t = torch.full((len(x),), step, device=x.device)
        x = p(s, x, t, net(x, extract(s.alpha_bar, t, x))).sample()
        yield step - 1, x
    yield 0, q(x, s.alpha_bar[1]).sample()  # Eq. (44): p(x_0 | x_1) is the forward step with β_1

# ----------------------------------------------------------------- Secs. 2.3, 2.4: the bound, and training

def bound(kind, s, net, x0, t):
    """The KL of step t, at one x_t ~ q(x_t | x_0) per x_0, and the entropies of Eq. (14), both in bits.
    x0 (B, D), t (B,) in 2..T -> (B,), (B,)
        kl, entropies = bound(GAUSSIAN, s, net, x0, t)
        K = entropies - (s.T - 1) * kl  # for t drawn evenly from 2..T, an estimate of K without bias"""
    q, posterior, p = kind
    alpha_bar = extract(s.alpha_bar, t, x0)
    q_t = q(x0, alpha_bar)
    xt = q_t.rsample() if q_t.has_rsample else q_t.sample()  # rsample: β gets a gradient through x_t
    kl = kl_divergence(posterior(s, xt, t, x0), p(s, xt, t, net(xt, alpha_bar)))
    H_q_T = q(x0, s.alpha_bar[-1]).entropy()
    H_q_1 = q(x0, s.alpha_bar[1]).entropy()
    H_p_T = q(x0, NO_SIGNAL).entropy()
    return kl / math.log(2), (H_q_T - H_q_1 - H_p_T) / math.log(2)

def schedule_of(net):
    """The Schedule of net.logits (T,): β_t = sigmoid(logits[t-1]). All but β_1 may learn, Sec. 2.4.1."""
    logits = torch.cat([net.logits[:1].detach(), net.logits[1:]])
    beta = logits.sigmoid().clamp(1e-15, 0.999)  # inside (0, 1), as Schedule demands; 0.999 as in schedules
    return Schedule(nn.functional.pad(beta, (1, 0)))  # β_0 = 0

def train_step(kind, net, opt, x0):
    """One step of gradient ascent on K, Eq. (15), with one random t per example.  x0 (B, D) -> K in bits, ()
    Raises FloatingPointError, with net as it was, if K or its gradient is not finite.
        net = RollNet(start_beta("learned", 40), learned=True)
        opt = torch.optim.Adam(net.parameters(), 4e-3, maximize=True)
        K = train_step(GAUSSIAN, net, opt, x0)  # x0 (B, 2), standardised"""
    s = schedule_of(net)
    t = torch.randint(2, s.T + 1, (len(x0),), device=x0.device)
    kl, entropies = bound(kind, s, net, x0, t)
    K = (entropies - (s.T - 1) * kl).mean()
    opt.zero_grad()
    K.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 100)
    if not (K.isfinite() and norm.isfinite()):
        raise FloatingPointError("K or its gradient is not finite")
    opt.step()
    return K.detach()

# ------------------------------------------ Sec. 2.5: posteriors.  Sec. 2.6: the entropy of a reverse step

def given(net, y, precision, xt, alpha_bar):
    """The moments of x_0 given x_t and y, for r(x_0) = Π_i N(y_i; x_0i, 1 / precision_i).  Sec. 2.5
    Used as the net, it gives p(x_{t-1} | x_t) r(x_{t-1}) / Z, Eq. (22), r(x_{t-1}) = E[r(x_0) | x_{t-1}];
    exactly if p(x_0 | x_t) is Gaussian, else nearly. precision (D,): 0 where y (D,) is not observed.
        chain = reverse(GAUSSIAN, s, partial(given, net, y, precision), xT)"""
    x0_hat, S = net(xt, alpha_bar)
    identity = torch.eye(len(y), dtype=S.dtype, device=S.device)
    S = torch.linalg.solve(identity + S * precision, S)  # (S⁻¹ + diag(precision))⁻¹
    return x0_hat + (S @ (precision * (y - x0_hat))[..., None])[..., 0], S

@torch.no_grad()
def entropy_of_step(kind, s, net, x0, t):
    """Bounds from q alone on the entropy of the reverse step t, Eq. (24), and the entropy of our p
        H_q(X_t|X_{t-1}) + H_q(X_{t-1}|X_0) - H_q(X_t|X_0)  ≤  H_q(X_{t-1}|X_t)  ≤  H_q(X_t|X_{t-1})
    The left side is H_q(X_{t-1}|X_t,X_0). The right inequality needs H_q(X_{t-1}) ≤ H_q(X_t): true of
    standardised data and of bits of rate ρ. With exact moments, p's mean entropy lies between; it exceeds
    the left side by the KL of Eq. (14).  x0 (B, D), t (B,) in 2..T -> left, p's, right in bits, (B,) each
        left, middle, right = entropy_of_step(GAUSSIAN, s, net, x0, t)"""
    q, _, p = kind
    alpha_bar_prev, alpha_bar = extract(s.alpha_bar, t - 1, x0), extract(s.alpha_bar, t, x0)
    q_prev = q(x0, alpha_bar_prev)
    q_step = q(q_prev.sample(), extract(s.alpha, t, x0))  # q(x_t | x_{t-1}): a jump with α_t for ᾱ_t
    xt = q_step.sample()
    right = q_step.entropy()
    left = right + q_prev.entropy() - q(x0, alpha_bar).entropy()
    middle = p(s, xt, t, net(xt, alpha_bar)).entropy()
    return left / math.log(2), middle / math.log(2), right / math.log(2)

# -------------------------------------------------- App. D.1: the networks, which hold β as well (Sec. 2.4.1)

def start_beta(schedule, T):
    """β_1..β_T to start from: a schedule's; for "learned", the log-SNR evenly spaced from 16 to -6.  (T,)"""
    if schedule != "learned":
        return make_schedule(schedule, T).beta[1:]
    alpha_bar = torch.linspace(16, -6, T, dtype=torch.float64).sigmoid()
    return from_alpha_bar(nn.functional.pad(alpha_bar, (1, 0), value=1))[1:]  # ᾱ_0 = 1

def mlp(widths, activation):
    """Linear layers from widths[0] to widths[-1], an activation between them; the last one starts at 0."""
    layers = []
    for inputs, outputs in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(inputs, outputs), activation()]
    for parameter in layers[-2].parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(*layers[:-1])  # no activation behind the last

class RollNet(nn.Module):
    """x_t, ᾱ_t -> the mean x̂_0 and the covariance S of x_0 given x_t.  (B, 2), (B, 1) -> (B, 2), (B, 2, 2)
        x̂_0 = √ᾱ x_t + √(1 - ᾱ) g,   S = (1 - ᾱ) L Lᵀ
    The layers give g, which is -v of Salimans & Ho 2022, and the triangular L. In a new network g = 0, L = I,
    right for data from N(0, I): K starts at L_null = E log π(x_0).  beta: start_beta's"""
    def __init__(self, beta, learned=False, width=128):
        super().__init__()
        self.layers = mlp([67, width, width, width, width, 5], nn.SiLU)  # 67 = 2 x + 1 log SNR + 64 waves
        self.logits = nn.Parameter(beta.logit(), requires_grad=learned)

    def forward(self, xt, alpha_bar):
        x, log_snr = xt.float(), alpha_bar.logit().float()  # SNR = ᾱ / (1 - ᾱ); its log is 16 to -6
        waves = (x[:, :, None] * torch.arange(1, 17, device=x.device)).flatten(1)  # (B, 32)
        out = self.layers(torch.cat([x, log_snr / 4, waves.sin(), waves.cos()], 1)).to(xt.dtype)
        g, log_diagonal, below = out.split([2, 2, 1], 1)
        L = torch.diag_embed(log_diagonal.exp())
        L[:, 1, 0] = below[:, 0]
        return alpha_bar.sqrt() * xt + (1 - alpha_bar).sqrt() * g, (1 - alpha_bar)[:, None] * L @ L.mT

class HeartbeatNet(nn.Module):
    """x_t, ᾱ_t -> P(x_0 = 1 | x_t) for each bit.  (B, 20), (B, 1) -> (B, 20)"""
    def __init__(self, beta, width=50):
        super().__init__()
        self.layers = mlp([20, width, width, width, 20], nn.Sigmoid)
        self.logits = nn.Parameter(beta.logit(), requires_grad=False)

    def forward(self, xt, alpha_bar):
        return self.layers(evidence(xt, alpha_bar).float() / 4).sigmoid().to(xt.dtype)

# -------------------------------------------------------------------------------------- not in the paper

def score(x0_hat, xt, alpha_bar):
    """∇ log q(x_t) = (√ᾱ_t E[x_0 | x_t] - x_t) / (1 - ᾱ_t): ∇ log q(x_t | x_0), averaged over q(x_0 | x_t).
    f_mu is μ̃_t at x̂_0, linear in the score: learning f_mu is score matching (Vincent 2011).  -> (B, D)
        x0_hat, S = net(xt, alpha_bar)
        field = score(x0_hat, xt, alpha_bar)"""
    return (alpha_bar.sqrt() * x0_hat - xt) / (1 - alpha_bar)

# The paper ends here; the rest trains, measures and draws.

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from sklearn.datasets import make_swiss_roll
from tqdm import tqdm

# ------------------------------------------------------------------------ data whose probabilities are known

HEARTBEATS = torch.eye(5, dtype=torch.float64).repeat(1, 4)  # all five of them: a 1 at every 5th of 20 bits

def valid_share(x):
    """The share of the sequences that are heartbeats, all 20 bits of them.  (N, 20) -> a number"""
    same = (x[:, None] == HEARTBEATS).all(2)  # (N, 5)
    return same.any(1).double().mean().item()

def roll_density(noise):
    """scikit-learn's Swiss roll seen from above, standardised, as a mixture of n Gaussians along the spiral
    (cos φ, sin φ) φ, φ uniform in [1.5π, 4.5π]. Their distances are smaller than their widths.
    -> centres (n, 2), their variances (2,), and the mean and deviation that standardised them (2,), (2,)"""
    n = max(200, int(140 / noise))
    phi = 1.5 * math.pi * (1 + 2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    spiral = torch.stack([phi * phi.cos(), phi * phi.sin()], 1)
    mean = spiral.mean(0)
    std = (spiral.var(0, unbiased=False) + noise ** 2).sqrt()
    return (spiral - mean) / std, (noise / std) ** 2, mean, std

def draw_roll(n, noise, seed):
    """n points of the roll, standardised.  (n, 2)"""
    _, _, mean, std = roll_density(noise)
    points, _ = make_swiss_roll(n, noise=noise, random_state=seed)
    return (torch.tensor(points[:, [0, 2]]) - mean) / std

def exact_moments(density, xt, alpha_bar):
    """What RollNet has to learn: the mean and covariance of x_0 given x_t, which is a mixture as well."""
    m, v, _, _ = density
    variance = alpha_bar * v + 1 - alpha_bar  # of x_t about √ᾱ m_j, (B, 2)
    log_w = (alpha_bar.sqrt() * xt / variance) @ m.T - (alpha_bar / variance) @ (m ** 2).T / 2
    w = log_w.softmax(1)  # p(j | x_t), (B, n)
    mean = w @ m
    square = (w @ (m[:, :, None] * m[:, None]).flatten(1)).reshape(-1, 2, 2)
    C = square - mean[:, :, None] * mean[:, None]  # covariance of the centres
    a, b = (1 - alpha_bar) / variance, alpha_bar.sqrt() * v / variance  # x_0 | j, x_t ~ N(a m_j + b x_t, a v)
    return a * mean + b * xt, a[:, :, None] * C * a[:, None] + torch.diag_embed(a * v)

def negative_entropy(density):
    """-H(X) = E log q(x_0) in bits: the mean over the spiral of 7 x 7 Gauss-Hermite points about it."""
    m, v, _, _ = density
    centres = m / v.sqrt()  # in units of the noise
    some = centres[len(m) // 400::len(m) // 200]  # the middles of 200 parts of the spiral or more
    z, weight = np.polynomial.hermite_e.hermegauss(7)
    mean = 0.0
    for i in range(7):
        for j in range(7):
            distance = torch.cdist(some + torch.tensor([z[i], z[j]]), centres)
            mean += weight[i] * weight[j] / (2 * math.pi) * (-distance ** 2 / 2).logsumexp(1).mean()
    return ((mean - torch.log(2 * math.pi * len(m) * v.prod().sqrt())) / math.log(2)).item()

# Copied from ddpm_ho_2020.py
def fail(message):
    """End the run on a user's mistake: one line, below the bars that are there, and exit status 2."""
    tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)

def between(low, high=1e38, kind=float):
    """argparse's type for numbers from low to high, as --T and --lr are."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's own message: invalid int value
    return parse

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

# ------------------------------------------------------------------------------- training and evaluation

PARTS = {"config", "step", "seconds", "net", "optimizer", "random"}  # of a checkpoint

def train(args, kind, net, data, path, state):
    """Train from state (a checkpoint, or None) to args.steps, or to Ctrl-C.  -> the last checkpoint"""
    opt = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), maximize=True)
    done, seconds, stop = 0, 0.0, threading.Event()
    if state:  # it holds all that the next step depends on
        opt.load_state_dict(state["optimizer"])
        set_random_state(state["random"], data.device)
        done, seconds = state["step"], state["seconds"]
    handler = signal.signal(signal.SIGINT, lambda *_: stop.set())  # Ctrl-C
    start = saved = time.time()
    bar = tqdm(range(done + 1, args.steps + 1), "training", args.steps, initial=done, mininterval=1)
    for step in bar:
        opt.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        x0 = data[torch.randint(len(data), (args.batch,), device=data.device)]
        try:
            K = train_step(kind, net, opt, x0)
        except FloatingPointError:
            fail(f"the bound is no longer finite in step {step}: try a smaller --lr")
        bar.set_postfix(K=f"{K:.3f} bits", refresh=False)
        if step == done + 50:
            left = (time.time() - start) / 50 * (args.steps - step)
            tqdm.write(f"training takes another {tqdm.format_interval(left)} or so")
        if stop.is_set() or step == args.steps or time.time() - saved > 60:
            saved = time.time()
            state = {"script": Path(__file__).stem, "config": vars(args), "step": step,
                     "seconds": seconds + saved - start, "net": net.state_dict(),
                     "optimizer": opt.state_dict(), "random": random_state(data.device)}
            save(state, path)
        if stop.is_set():
            tqdm.write(f"stopped at step {step} of {args.steps}; --resume goes on from here")
            break
    signal.signal(signal.SIGINT, handler)
    return state

@torch.no_grad()
def evaluate(kind, s, net, x0, seed=1):
    """An estimate of K for each x_0, and the mean KL of each step t = 2..T, in bits.  (B,), (T-1,)"""
    torch.manual_seed(seed)
    sum_of_kl, kl_of_step = torch.zeros_like(x0[:, 0]), []
    for t in tqdm(range(2, s.T + 1), "bound", leave=False):
        kl, entropies = bound(kind, s, net, x0, torch.full((len(x0),), t))
        sum_of_kl = sum_of_kl + kl
        kl_of_step.append(kl.mean())
    return entropies - sum_of_kl, torch.stack(kl_of_step)

# ---------------------------------------------------------------------------------- experiments and figures

def wasserstein(a, b):
    """The larger, over the two coordinates, of the Wasserstein-1 distances of two sets.  (n, 2), (m, 2)"""
    return max(wasserstein_distance(a[:, i], b[:, i]) for i in range(2))

def draw_table(path, titles, rows, observed):
    """A table of pictures. rows: {name: list of points (n, 2) or arrows (n, 4)}; observed: in red, by row"""
    fig = Figure(figsize=(8.5, 8.5 * len(rows) / len(titles)), layout="constrained")
    table = fig.subplots(len(rows), len(titles), sharex=True, sharey=True)
    for axes, (name, pictures), red in zip(table, rows.items(), observed):
        axes[0].set(ylabel=name, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
        for ax, points in zip(axes, pictures):
            if points.shape[1] == 4:
                ax.quiver(*points.T.numpy(), scale=20, width=0.006)
            else:
                ax.plot(*points.T.numpy(), "k.", ms=20 / len(titles), mew=0)
            ax.plot(*red, "r-+", ms=20, mew=2, zorder=0)
    for ax, title in zip(table[0], titles):
        ax.set_title(title)
    fig.savefig(path, dpi=120)

def draw_bound(path, s, kl_of_step, lost, left, middle, right):
    """β_t; the band of Eq. (24), with its left side as zero; the bits that the network loses.  (T-1,) each"""
    t = range(2, s.T + 1)
    fig = Figure(figsize=(8.5, 5.5), layout="constrained")
    top, centre, bottom = fig.subplots(3, sharex=True, height_ratios=(2, 3, 2))
    top.plot(t, s.beta[2:].numpy(), ".-")
    top.set(title="the variance of each forward step", ylabel=r"$\beta_t$", yscale="log")
    centre.fill_between(t, 0, right - left, color="0.85", label="$H_q(X_{t-1}|X_t)$ lies here, Eq. (24)")
    centre.plot(t, middle - left, "ko", ms=8, mfc="none", label="entropy of $p(x_{t-1}|x_t)$")
    centre.plot(t, kl_of_step.numpy(), ".-", label="KL that step t takes from K, Eq. (14)")
    centre.set(title="each reverse step: entropies less $H_q(X_{t-1}|X_t, X_0)$, and the KL", ylabel="bits")
    centre.legend()
    bottom.plot(t, lost.numpy(), ".-")
    bottom.set(title="KL of each step, less that of a perfect network", xlabel="t", ylabel="bits")
    fig.savefig(path, dpi=130)

def roll_experiments(noise, out, s, net, held_out, kl_of_step):
    """The ceilings, Eq. (24), Fig. 1, the score, the posteriors of Sec. 2.5; their figures.  -> numbers"""
    density, x0 = roll_density(noise), held_out[:min(len(held_out) // 100, 1000)]
    exact = partial(exact_moments, density)
    K_exact, kl_exact = evaluate(GAUSSIAN, s, exact, x0)
    K, kl_same = evaluate(GAUSSIAN, s, net, x0)  # the same x_t
    metrics = {"ceiling_bits": negative_entropy(density), "network_loses_bits": (K_exact - K).mean().item()}
    for name in SCHEDULES:
        K_ideal, _ = evaluate(GAUSSIAN, make_schedule(name, s.T), exact, x0)
        metrics[f"K_ideal_bits_{name}"] = K_ideal.mean().item()
    some, sides = held_out[:10_000], []
    for t in range(2, s.T + 1):
        three = entropy_of_step(GAUSSIAN, s, net, some, torch.full((len(some),), t))
        sides.append(torch.stack(three).mean(1).numpy())
    draw_bound(out / "bound.png", s, kl_of_step, kl_same - kl_exact, *np.stack(sides, 1))

    xT = torch.randn(2000, 2, dtype=torch.float64)
    samples = {s.T: xT}  # of p(x_t), by t
    for t, x in reverse(GAUSSIAN, s, net, xT):
        samples[t] = x
    times = [max(2, s.T * quarter // 4) for quarter in range(5)]  # f_mu starts at t = 2: x_2 is nearly x_0
    rows = {"q(x_t)": [], "p(x_t)": [], "∇ log q by f_mu": [], "∇ log q, exact": []}
    for t in times:
        rows["q(x_t)"].append(s.q_sample(held_out[:2000], t, torch.randn(2000, 2)))
        rows["p(x_t)"].append(samples[t])
        xt = s.q_sample(x0, t, torch.randn_like(x0))
        alpha_bar = s.alpha_bar[t].expand(len(xt), 1)
        ours = score(net(xt, alpha_bar)[0], xt, alpha_bar)
        true = score(exact(xt, alpha_bar)[0], xt, alpha_bar)
        size = true.norm(dim=1).mean()  # one scale for the two pictures of this t
        rows["∇ log q by f_mu"].append(torch.cat([xt, ours / size], 1)[:100])
        rows["∇ log q, exact"].append(torch.cat([xt, true / size], 1)[:100])
        metrics[f"score_error_t{t}"] = ((ours - true).norm() / true.norm()).item()
    draw_table(out / "swiss_roll.png", [f"t = {t}" for t in times], rows, [([], [])] * 4)

    y, precisions = torch.tensor([0.5, -0.3]).double(), torch.tensor([[4.0, 4.0], [1e4, 0.0]]).double()
    many, rows = draw_roll(2_000_000, noise, 1), {}
    for task, precision in zip(("denoise", "inpaint"), precisions):
        r = (-precision * (y - many) ** 2 / 2).sum(1).exp()
        accepted = torch.rand(len(many)) < r  # rejection sampling
        wanted, again = many[accepted][:10_000].chunk(2)
        pure_noise = torch.randn(5000, 2, dtype=torch.float64)
        for _, xt in reverse(GAUSSIAN, s, partial(given, net, y, precision), pure_noise):
            x = xt  # x_0 comes last
        metrics[f"{task}_distance"] = wasserstein(x, wanted)
        metrics[f"{task}_distance_floor"] = wasserstein(again, wanted)
        metrics[f"{task}_distance_without_r"] = wasserstein(samples[0], wanted[:2000])
        rows[f"{task}; red: observed"] = [samples[0], wanted[:2000], x[:2000]]
    observed = ([0.5], [-0.3]), ([0.5, 0.5], [-9, 9])  # all of y; y_1: a line
    draw_table(out / "posteriors.png", ["p alone", "exact posterior", "p, r in each step"], rows, observed)

    ax = Figure(figsize=(3, 3)).add_axes((0, 0, 1, 1), xlim=(-3, 3), ylim=(-3, 3))
    dots = ax.scatter(*xT.T.numpy(), s=0.5, c="k")
    frames = [*range(s.T, 0, -1 - s.T // 60), *[0] * 10]  # 60 at most, then x_0 for a second
    film = FuncAnimation(ax.figure, lambda t: dots.set_offsets(samples[t].numpy()), frames)
    film.save(out / "reverse.gif", "pillow", 10)
    return metrics

def heartbeat_experiments(s, net, xT):
    """Samples of the heartbeat, eight of them printed.  -> the numbers"""
    for _, xt in tqdm(reverse(BINOMIAL, s, net, xT), "sampling", s.T):
        x = xt  # x_0 comes last
    for sequence in x[:8]:
        print("".join("·█"[int(bit)] for bit in sequence))
    return {"valid_share": valid_share(x), "true_bits_per_sequence": -math.log2(5)}

# ------------------------------------------------------------------------------------------- flags and main

PRESETS = {"swiss_roll": dict(T=40, schedule="learned", steps=6000, lr=4e-3, width=128, num_samples=100_000),
           "heartbeat": dict(T=2000, schedule="inverse", steps=8000, lr=1e-2, width=50, num_samples=10_000)}
QUICK = {"swiss_roll": dict(steps=100, batch=256, width=32, num_samples=2000),
         "heartbeat": dict(T=200, steps=200, batch=256, width=32, num_samples=2000)}
OF_THIS_CALL = {"device", "out", "quick", "checkpoint", "resume"}  # not taken over from a checkpoint

def get_args(argv=None):
    """The flags. Their defaults are the checkpoint's settings, or those of --dataset and --quick."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = fail
    p.add_argument("--dataset", choices=PRESETS, default="swiss_roll", help="what to learn")
    p.add_argument("--out", help="folder for all that is written")
    p.add_argument("--seed", type=between(0, 2 ** 31, int), default=0, help="of all random numbers")
    p.add_argument("--device", default="cpu", help="for training; the networks are small")
    p.add_argument("--quick", action="store_true", help="the whole way in seconds, to see that it works")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", help="evaluate this file instead of training; needs no other flag")
    source.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--noise", type=between(0.005, 9), default=0.02, help="of the roll (paper: unsaid)")
    p.add_argument("--T", type=between(2, kind=int), help="diffusion steps (paper: 40; 2000)")
    p.add_argument("--schedule", choices=["learned", *SCHEDULES], help="of β (paper: learned; inverse)")
    p.add_argument("--steps", type=between(1, kind=int), help="training steps")
    p.add_argument("--batch", type=between(1, kind=int), default=2048, help="examples per training step")
    p.add_argument("--lr", type=between(1e-12), help="Adam's learning rate, which decays to 0")
    p.add_argument("--num-samples", type=between(2000, kind=int), help="examples over which K is averaged")

    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args([word for word in argv if word not in ("-h", "--help")])  # whose defaults to take?
    config = {"dataset": args.dataset} | PRESETS[args.dataset]
    out = f"runs/{Path(__file__).stem}-{args.dataset}"
    if args.quick:
        config, out = config | QUICK[args.dataset], f"{out}-quick"
    path = args.checkpoint
    if args.resume:
        path = Path(args.out or out) / "checkpoint.pt"
    if path:
        saved = load_checkpoint(path)["config"]
        if args.schedule not in (None, saved["schedule"]):
            fail(f"--schedule {args.schedule}: the checkpoint's is {saved['schedule']}")
        config = {name: value for name, value in saved.items() if name not in OF_THIS_CALL}
    if args.checkpoint:
        out = f"runs/{Path(__file__).stem}-{config['dataset']}-samples"
    p.set_defaults(out=out, **config)
    args = p.parse_args(argv)
    if args.dataset == "heartbeat" and args.schedule == "learned":
        fail("--schedule learned is for the roll: noise on bits cannot be frozen (Sec. 2.4.1)")
    return args

def main(args):
    """Train (or load), evaluate, draw; writes it all into args.out and returns the numbers."""
    begin, out, device, state = time.time(), Path(args.out), open_device(args.device), None
    if device.type == "mps":
        fail("--device mps: it has no float64, which 1 - ᾱ_1 = 1e-7 needs; take cpu")
    if args.checkpoint or args.resume:
        state = load_checkpoint(args.checkpoint or out / "checkpoint.pt")
    torch.manual_seed(args.seed)
    beta = start_beta(args.schedule, args.T)
    if args.dataset == "swiss_roll":
        kind, net = GAUSSIAN, RollNet(beta, args.schedule == "learned", args.width)
        data = draw_roll(400_000, args.noise, args.seed + 1)
        held_out = draw_roll(args.num_samples, args.noise, args.seed + 2)
    else:
        kind, net, data = BINOMIAL, HeartbeatNet(beta, args.width), HEARTBEATS
        held_out = HEARTBEATS[torch.arange(args.num_samples) % 5]
    if state:
        try:
            net.load_state_dict(state["net"])
        except RuntimeError as e:
            fail(f"the checkpoint is not of this network: {e}")
    params = sum(parameter.numel() for parameter in net.parameters())
    print(f"{args.dataset} of {len(data)} examples, on {device}; a network of {params} parameters; "
          f"T = {args.T}, schedule {args.schedule}")
    print(f"{args.steps} steps of {args.batch} examples, lr {args.lr}; K over {args.num_samples}; "
          f"results in {out}")
    if not args.resume:
        make_folder(out)
    if not args.checkpoint:
        state = train(args, kind, net.to(device), data.to(device), out / "checkpoint.pt", state)

    s = schedule_of(net.cpu().requires_grad_(False))
    K, kl_of_step = evaluate(kind, s, net, held_out, args.seed + 1)
    q, _, _ = kind
    pi = q(held_out, NO_SIGNAL)
    metrics = {"script": Path(__file__).stem, "dataset": args.dataset, "seed": args.seed,
               "device": args.device, "torch": torch.__version__, "steps": state["step"], "params": params,
               "seconds_train": state["seconds"]}
    if args.dataset == "swiss_roll":
        metrics |= roll_experiments(args.noise, out, s, net, held_out, kl_of_step)
        name_of_K, of_paper = "K_bits", "2.35, 6.45"
    else:
        metrics |= heartbeat_experiments(s, net, pi.sample())
        name_of_K, of_paper = "K_bits_per_sequence", "-2.414, 12.024"
    K_bits, L_null = K.mean().item(), -pi.entropy().mean().item() / math.log(2)
    metrics |= {"K_minus_L_null_bits": K_bits - L_null, "K_stderr_bits": K.std().item() / len(K) ** 0.5,
                name_of_K: K_bits, "L_null_bits": L_null, "paper's K, K - L_null": of_paper}
    for name, value in metrics.items():
        if isinstance(value, float):
            value = f"{value:.4f}"
        print(f"{name:<28}{value}")
    metrics |= {"config": vars(args), "KL_bits_of_step": kl_of_step.tolist(),
                "seconds_total": time.time() - begin}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    print("written to", out, "are", ", ".join(sorted(file.name for file in out.iterdir())))
    if not args.checkpoint:
        command = f"python {Path(__file__).name}"
        print(f"go on with: {command} --checkpoint {out}/checkpoint.pt")
        steps = args.steps if state["step"] < args.steps else 2 * state["step"]
        print(f"        or: {command} --resume --out {out} --steps {steps}")
    return metrics

if __name__ == "__main__":
    run_from_shell()

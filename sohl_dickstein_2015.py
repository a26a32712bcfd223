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

Expect, on two CPU cores, seed 0: K = 2.62 ± 0.01 bits in 2 minutes; 2.70 is possible, and the paper has 2.35
for its roll. Heartbeat: K = -2.37 bits in 1.5 minutes (possible -2.32, paper -2.41), 99 % of samples valid.

Differs from the paper:
  - The network is given ᾱ_t, not t, and says what x_0 may be: its mean and covariance or, of bits,
    probabilities. The closed form of q makes f_mu, f_sigma, f_b of that. The paper's gives these themselves.
  - Roll: an MLP on x_t and its sines for 16 radial basis functions; f_sigma full, not diagonal. The paper
    does not say how noisy its roll is, and K depends on that: hold K against the ceiling.
  - Heartbeat: the paper's three sigmoid layers of 50, but one readout for all t instead of one each.
  - Posteriors: the r(x_t) that is exact where p(x_0 | x_t) is Gaussian, not the same r for all t, Eq. (23).
  - Adam, its rate decayed to 0; the paper has SFO, a quasi-Newton method.

Shapes: B batch, D dimensions of x (2 of the roll, 20 of the heartbeat).
"""
import argparse
import json
import math
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from sklearn.datasets import make_swiss_roll
from torch.distributions import Bernoulli, Independent, MultivariateNormal, kl_divergence
from tqdm import tqdm

from schedules import SCHEDULES, Schedule, from_alpha_bar, like, make_schedule

RHO = 0.2  # rate of the noise on bits, App. D.1.2 (Table App.1: 0.5). The data's, so that -E log π = H_p(X_T)

# --------------------------------------------------- Table App.1: Gaussian diffusion, forward and in reverse

def gaussian_q(x0, alpha_bar):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I); with ᾱ = 0 the noise itself, π = N(0, I).  x0 (B, D)"""
    return isotropic(like(alpha_bar.sqrt(), x0) * x0, like(1 - alpha_bar, x0))

def gaussian_posterior(s, x0, xt, t):
    """q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I)."""
    return isotropic(*s.q_posterior(x0, xt, t))

def isotropic(mean, variance):
    return MultivariateNormal(mean, scale_tril=torch.diag_embed(variance.sqrt().expand_as(mean)))

def gaussian_p(s, moments, xt, t):
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_sigma(x_t, t)), t >= 2.

    moments: a callable (x_t (B, D), ᾱ_t (B,)) -> mean x̂_0 (B, D) and covariance S (B, D, D) of x_0 given x_t.
    q(x_{t-1} | x_t, x_0) averaged over such x_0 has mean f_mu = μ̃_t(x̂_0, x_t) and covariance
    f_sigma = β̃_t (I + (SNR_{t-1} - SNR_t) S); the Gaussian with the right moments has the smallest KL."""
    x0_hat, S = moments(xt, s.alpha_bar[t])
    f_mu, beta_tilde = s.q_posterior(x0_hat, xt, t)
    f_sigma = beta_tilde[..., None] * (torch.eye(xt.shape[1]).to(S) + like(s.snr[t - 1] - s.snr[t], S) * S)
    return MultivariateNormal(f_mu, f_sigma)

def given(moments, y, precision):
    """Sec. 2.5: the moments of p(x_0) r(x_0) / Z given x_t, for r(x_0) = Π_i N(y_i; x_0i, 1 / precision_i).

    A noisy observation y of all coordinates denoises, of some (precision 0 for the others) inpaints. Given to
    reverse, it multiplies p(x_{t-1} | x_t) by r(x_{t-1}) = E[r(x_0) | x_{t-1}]: Eq. (22).
    y, precision: (D,)"""
    def posterior(xt, alpha_bar):
        x0_hat, S = moments(xt, alpha_bar)
        S = torch.linalg.solve(torch.eye(len(y)).to(S) + S * precision, S)  # (S⁻¹ + diag(precision))⁻¹
        return x0_hat + (S @ (precision * (y - x0_hat))[..., None])[..., 0], S
    return posterior

def score(x0_hat, xt, alpha_bar):
    """∇ log q(x_t) = (√ᾱ_t E[x_0 | x_t] - x_t) / (1 - ᾱ_t), the mean of ∇ log q(x_t | x_0).  Vincent 2011.

    f_mu is μ̃_t at x̂_0, so it gives the score, and K fits it by denoising score matching.  -> (B, D)"""
    return (like(alpha_bar.sqrt(), xt) * x0_hat - xt) / like(1 - alpha_bar, xt)

# ----------------------------------------- Table App.1: binomial diffusion, now and then a bit is drawn anew

def bits(rate):
    return Independent(Bernoulli(rate), 1)

def binomial_q(x0, alpha_bar):
    """q(x_t | x_0) = B(ᾱ_t x_0 + (1 - ᾱ_t) ρ); with ᾱ = 0 the noise itself, B(ρ).  x0 (B, D): 0., 1."""
    return bits(like(alpha_bar, x0) * (x0 - RHO) + RHO)

def binomial_posterior(s, x0, xt, t):
    """q(x_{t-1} = 1 | x_t, x_0) ∝ q(x_t | x_{t-1} = 1) q(x_{t-1} = 1 | x_0), where
    q(x_t | x_{t-1}) = B((1 - β_t) x_{t-1} + β_t ρ): with probability β_t a bit is drawn anew, from B(ρ)."""
    beta, one = like(s.beta[t], xt), binomial_q(x0, s.alpha_bar[t - 1]).mean
    stay, flip = 1 - beta * (1 - RHO), beta * RHO  # q(x_t = 1 | x_{t-1} = 1), q(x_t = 1 | x_{t-1} = 0)
    a = one * torch.where(xt == 1, stay, 1 - stay)
    return bits(a / (a + (1 - one) * torch.where(xt == 1, flip, 1 - flip)))

def binomial_p(s, x0_hat, xt, t):
    """p(x_{t-1} | x_t) = B(f_b(x_t, t)): q(x_{t-1} | x_t, x_0) averaged over x_0 ~ B(x0_hat(x_t, ᾱ_t))."""
    rate = x0_hat(xt, s.alpha_bar[t])
    one, zero = (binomial_posterior(s, torch.full_like(xt, bit), xt, t).mean for bit in (1, 0))
    return bits(rate * one + (1 - rate) * zero)

# ------------------------------------------------- Secs. 2.2 to 2.4: for both, the reverse process, the bound

GAUSSIAN = gaussian_q, gaussian_posterior, gaussian_p
BINOMIAL = binomial_q, binomial_posterior, binomial_p

def bound(kind, s, net, x0, t):
    """The KL of step t at one x_t for each x_0, and the entropies of Eq. (14), in bits.  (B,), (B,)"""
    q, posterior, p = kind
    xt = q(x0, s.alpha_bar[t])
    xt = xt.rsample() if xt.has_rsample else xt.sample()  # the noise is frozen: β moves x_t, and K through it
    kl = kl_divergence(posterior(s, x0, xt, t), p(s, net, xt, t))
    # The noise's own entropy, H_p(X_T), is that of q for ᾱ = 0 = β_0.
    H_q_T, H_q_1, H_p_T = (q(x0, a).entropy() for a in (s.alpha_bar[-1], s.alpha_bar[1], s.beta[0]))
    return kl / math.log(2), (H_q_T - H_q_1 - H_p_T) / math.log(2)

@torch.no_grad()
def reverse(kind, s, net, x):
    """The reverse process from x = x_T ~ π (B, D).  Yields (t, x_t) for t = T-1..0."""
    q, _, p = kind
    for t in range(s.T, 1, -1):
        x = p(s, net, x, torch.full((len(x),), t)).sample()
        yield t - 1, x
    yield 0, q(x, s.alpha_bar[1]).sample()  # the forward step, its own reverse where x_1 ~ π

# ----------------------------------------------------------------------------------------------- the networks

def mlp(sizes, activation):
    """Linear layers with an activation between them; the last is 0, so that a new network says nothing."""
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())][:-1]
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers

class RollNet(nn.Sequential):
    """x_t, ᾱ_t -> the mean and covariance of x_0 given x_t.  (B, 2), (B,) -> (B, 2), (B, 2, 2)

    x̂_0 = √ᾱ x_t + √(1 - ᾱ) g,  S = (1 - ᾱ) L Lᵀ: with g = 0, L = I (a new network) this is right for N(0, I)
    data, and K = L_null. The layers give g, near the roll -ε across it, and the triangular L."""

    def forward(self, xt, alpha_bar):
        sigma2, log_snr = like(1 - alpha_bar, xt), like(alpha_bar.logit(), xt)
        waves = (xt[..., None] * torch.arange(1, 17, device=xt.device)).flatten(1)  # (B, 32)
        h = super().forward(torch.cat([xt, log_snr / 4, waves.sin(), waves.cos()], 1))
        L = torch.stack([h[:, 2].exp(), 0 * h[:, 3], h[:, 3], h[:, 4].exp()], 1).reshape(-1, 2, 2)
        return like(alpha_bar.sqrt(), xt) * xt + sigma2.sqrt() * h[:, :2], sigma2[..., None] * L @ L.mT

class HeartbeatNet(nn.Sequential):
    """x_t, ᾱ_t -> the probabilities that the bits of x_0 are 1: the paper's MLP.  (B, 20), (B,) -> (B, 20)

    Its inputs are what each bit says alone, log q(x_t | x_0 = 1) / q(x_t | x_0 = 0): t matters only there."""

    def forward(self, xt, alpha_bar):
        one, zero = (binomial_q(torch.full_like(xt, bit), alpha_bar).base_dist for bit in (1, 0))
        return super().forward((one.log_prob(xt) - zero.log_prob(xt)).float() / 4).sigmoid().to(xt)

# ------------------------------------------------------------------------ the data, whose densities are known

HEARTBEATS = torch.eye(5, dtype=torch.float64).repeat(1, 4)  # all five of them: a 1 at every 5th of 20 bits

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
    _, _, mean, std = roll_density(noise)
    x = torch.tensor(make_swiss_roll(n, noise=noise, random_state=seed)[0][:, [0, 2]])
    return ((x - mean) / std).float()

def exact_moments(density):
    """What RollNet has to learn: the mean and covariance of x_0 given x_t, a mixture as well.  float64"""
    m, v = density[:2]

    def moments(xt, alpha_bar):
        xt, alpha_bar = xt.double(), alpha_bar[:, None]
        variance = alpha_bar * v + 1 - alpha_bar  # of x_t about √ᾱ m_j, (B, 2)
        w = ((alpha_bar.sqrt() * xt / variance) @ m.T - (alpha_bar / variance) @ (m ** 2).T / 2).softmax(1)
        mean, square = w @ m, w @ (m[:, :, None] * m[:, None]).flatten(1)  # w is p(j | x_t), (B, n)
        C = square.reshape(-1, 2, 2) - mean[:, :, None] * mean[:, None]
        a, b = (1 - alpha_bar) / variance, alpha_bar.sqrt() * v / variance  # x_0 given j: near a m_j + b x_t
        return a * mean + b * xt, a[:, :, None] * C * a[:, None] + torch.diag_embed(v * a)
    return moments

def negative_entropy(density):
    """-H(X) = E log q(x_0) in bits: the mean over the spiral of 7 x 7 Gauss-Hermite points about it."""
    m, v = density[:2]
    z, weight = map(torch.tensor, np.polynomial.hermite_e.hermegauss(7))
    nats = -(2 * math.pi * len(m) * v.prod().sqrt()).log()
    for dz, w in zip(torch.cartesian_prod(z, z), torch.cartesian_prod(weight, weight).prod(1) / 2 / math.pi):
        x = m[len(m) // 400::len(m) // 200] + dz * v.sqrt()
        nats += w * (-((x[:, None] - m) ** 2 / v).sum(2) / 2).logsumexp(1).mean()
    return nats.item() / math.log(2)

def accept(x, y, precision):
    """Of draws x of p(x), those that are draws of p(x) r(x) / Z for the r of given(): rejection sampling."""
    return x[torch.rand(len(x)) < (-precision * (y - x) ** 2 / 2).sum(1).exp()]

# --------------------------------------------------------------------------------------- training, evaluation

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
        script = state["script"]
    except Exception as e:
        fail(f"no checkpoint can be read at {path}: missing, truncated or another file ({type(e).__name__})")
    if script != Path(__file__).stem:
        fail(f"{path} is not a checkpoint of {Path(__file__).name}")
    return state

def start_beta(schedule, T):
    """β_1..β_T of --schedule; learned starts with the log-SNR evenly spaced from 16 to -6.  (T,)"""
    alpha_bar = nn.functional.pad(torch.linspace(16, -6, T, dtype=torch.float64).sigmoid(), (1, 0), value=1)
    return from_alpha_bar(alpha_bar)[1:] if schedule == "learned" else make_schedule(schedule, T).beta[1:]

def schedule_of(net):
    """The Schedule of β_t = sigmoid(net.logits[t - 1]); if they learn, all but β_1 do: Sec. 2.4.1."""
    return Schedule(nn.functional.pad(torch.cat([net.logits[:1].detach(), net.logits[1:]]).sigmoid(), (1, 0)))

def train(args, kind, net, data, path, state):
    """Gradient ascent on K, from state (a checkpoint, or None) to args.steps; Ctrl-C stops it after the step.
    Saves to path each minute and at the end, and returns what it saved."""
    opt = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    if state:  # which holds all that the next step depends on
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    first, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
    stop, start, saved = [], time.time(), time.time()
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    bar = tqdm(range(first, args.steps), "training", args.steps, initial=first, mininterval=1)
    for step in bar:
        opt.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * step / args.steps)) / 2
        x0 = data[torch.randint(len(data), (args.batch,))]
        s = schedule_of(net)
        kl, entropies = bound(kind, s, net, x0, torch.randint(2, s.T + 1, (args.batch,)))
        K = (entropies - (s.T - 1) * kl).mean()  # one term of the sum each: an estimate without bias
        opt.zero_grad()
        (-K).backward()
        size = nn.utils.clip_grad_norm_(net.parameters(), 100)
        if not (K + size).isfinite():
            raise ValueError
        opt.step()
        bar.set_postfix(K=f"{K:.3f} bits", refresh=False)
        if stop or step + 1 == args.steps or time.time() - saved > 60:
            saved = time.time()
            state = {"script": Path(__file__).stem, "config": vars(args), "step": step + 1,
                     "seconds": seconds + saved - start, "net": net.state_dict(),
                     "optimizer": opt.state_dict(), "rng": torch.get_rng_state()}
            torch.save(state, f"{path}.tmp")  # a run killed while saving leaves the last checkpoint whole
            Path(f"{path}.tmp").replace(path)
        if stop:
            print(f"stopped at step {step + 1} of {args.steps}; --resume goes on from here")
            break
    signal.signal(signal.SIGINT, handler)
    return state

@torch.no_grad()
def evaluate(kind, s, net, x0, seed=1):
    """An estimate of K in bits for each x_0, and the bits that each step t = 2..T takes.  (B,), a list"""
    torch.manual_seed(seed)
    steps = []
    for t in tqdm(range(2, s.T + 1), "bound", disable=s.T < 1000):
        kl, entropies = bound(kind, s, net, x0, torch.full((len(x0),), t))
        steps.append(kl.double())
    return entropies - sum(steps), [kl.mean().item() for kl in steps]

# ------------------------------------------------------------------------------------ experiments and figures

def draw(path, rows):
    """A table of pictures, each (title, points (n, 2)) or (title, points, arrows (n, 2))."""
    fig = Figure(figsize=(3 * len(rows[0]), 3 * len(rows)), layout="constrained")
    for ax, (title, *what) in zip(fig.subplots(len(rows), len(rows[0])).flat, sum(rows, [])):
        ax.set(title=title, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
        xy = [column for a in what for column in a.numpy().T]
        ax.quiver(*xy) if what[1:] else ax.scatter(*xy, s=0.5, c="k")
    fig.savefig(path, dpi=60)

@torch.no_grad()
def roll_experiments(args, out, s, net, held_out, K_steps):
    """The ceilings, Fig. 1, the posteriors of Sec. 2.5, the score, their figures.  -> the numbers"""
    density, T, x0 = roll_density(args.noise), s.T, held_out[:len(held_out) // 100]
    exact = exact_moments(density)
    K_exact, exact_steps = evaluate(GAUSSIAN, s, exact, x0)
    lost = K_exact - evaluate(GAUSSIAN, s, net, x0)[0]  # of the same x_0 and x_t
    metrics = {"ceiling_bits": negative_entropy(density), "network_loses_bits": lost.mean().item()}
    for name in SCHEDULES:
        K, _ = evaluate(GAUSSIAN, make_schedule(name, T), exact, x0)
        metrics[f"K_ideal_bits_{name}"] = K.mean().item()
    fig = Figure(figsize=(7, 3), layout="constrained")
    left, right = fig.subplots(1, 2)
    left.semilogy(range(1, T + 1), s.beta[1:])
    left.set(title="β_t", xlabel="t")
    right.plot(range(2, T + 1), torch.tensor([K_steps, exact_steps]).T, label=["network", "true moments"])
    right.set(title="bits lost at step t", xlabel="t")
    right.legend()
    fig.savefig(out / "bound.png", dpi=100)

    x, columns = torch.randn(2000, 2), []
    p = {T: x} | dict(reverse(GAUSSIAN, s, net, x))
    for t in (0, T // 4, T // 2, 3 * T // 4, T):
        u = torch.full((len(x0),), max(t, 2))  # the first t that has an f_mu
        xt, alpha_bar = s.q_sample(x0, u, torch.randn_like(x0)), s.alpha_bar[u]
        drift = gaussian_p(s, net, xt, u).mean - xt
        ours, true = (score(f(xt, alpha_bar)[0], xt, alpha_bar) for f in (net, exact))
        metrics[f"score_error_t{u[0]}"] = ((ours - true).norm() / true.norm()).item()
        q = s.q_sample(held_out[:2000], t, torch.randn(2000, 2))
        fields = ("f_mu(x, t) - x", drift), ("∇ log q by f_mu", ours), ("∇ log q, exact", true)
        fields = [(f"{name}, t = {u[0]}", xt[:300], field[:300]) for name, field in fields]
        columns += [[(f"q, t = {t}", q), (f"p, t = {t}", p[t]), *fields]]
    draw(out / "swiss_roll.png", [list(row) for row in zip(*columns)])

    rows, y = [], torch.tensor([0.5, -0.3])
    for task, precision in ("denoise", (4.0, 4.0)), ("inpaint", (1e4, 0.0)):
        precision = torch.tensor(precision)
        x = dict(reverse(GAUSSIAN, s, given(net, y, precision), torch.randn(5000, 2)))[0]
        true, again = (accept(draw_roll(10 ** 6, args.noise, seed), y, precision)[:5000] for seed in (1, 2))
        for name, points in ("", x), ("_floor", again), ("_without_r", p[0]):
            by_coordinate = map(wasserstein_distance, points.numpy().T, true.numpy().T)
            metrics[f"{task}_distance{name}"] = max(by_coordinate)
        rows += [[(f"{task}: exact", true), (f"{task}: the reverse process, perturbed", x)]]
    draw(out / "posteriors.png", rows)

    fig = Figure(figsize=(3, 3))
    dots = fig.add_axes((0, 0, 1, 1), xlim=(-3, 3), ylim=(-3, 3)).scatter(*p[T].T, s=0.5, c="k")
    frames = [*range(T, 0, -1 - T // 60), *[0] * 10]
    FuncAnimation(fig, lambda t: dots.set_offsets(p[t]), frames).save(out / "reverse.gif", "pillow", 10)
    return metrics

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
        p.set_defaults(**PRESETS[args.data] | (QUICK if args.quick else {}))
    args = p.parse_args(argv)
    args.out = args.out or f"runs/sohl_dickstein_2015-{args.data}"
    if args.data == "heartbeat" and args.schedule == "learned":
        p.error("--schedule learned is for the roll: noise on bits cannot be frozen (Sec. 2.4.1)")
    if min(args.steps, args.batch, args.T - 1, args.num_samples - 1999, args.width - 1) < 1:
        p.error("--steps and --batch must be at least 1, --T and --width 2, --num-samples 2000")
    if not 0.005 <= args.noise <= 10:
        p.error("--noise must be from 0.005 (with none the roll has no density) to 10")
    return args

def main(args):
    """Train (or load), evaluate, draw; writes it all into args.out and returns the numbers."""
    begin, out, roll = time.time(), Path(args.out), args.data == "swiss_roll"
    path, kind = out / "checkpoint.pt", GAUSSIAN if roll else BINOMIAL
    state = load_checkpoint(args.checkpoint or path) if args.checkpoint or args.resume else None
    torch.manual_seed(args.seed)
    width = [args.width]
    net = (RollNet(*mlp([67, *width * 4, 5], nn.SiLU)) if roll else
           HeartbeatNet(*mlp([20, *width * 3, 20], nn.Sigmoid)))
    net.logits = nn.Parameter(start_beta(args.schedule, args.T).logit(), args.schedule == "learned")
    try:
        if state:
            net.load_state_dict(state["net"])
        out.mkdir(parents=True, exist_ok=True)
        if not state and path.exists():
            kept = path.rename(out / f"checkpoint-{path.stat().st_mtime_ns}.pt")
            print(f"an earlier run's checkpoint is kept as {kept}")
        if not args.checkpoint:
            data = draw_roll(400_000, args.noise, args.seed + 1) if roll else HEARTBEATS
            net, data = net.to(args.device), data.to(args.device)
            state = train(args, kind, net, data, path, state)
    except (ValueError, torch.linalg.LinAlgError):  # p's parameters are not numbers
        fail(f"the bound is no longer finite: try a smaller --lr. {path} is as last saved")
    except (OSError, RuntimeError) as e:  # no such folder, device, or shapes in the checkpoint
        fail(str(e).splitlines()[-1].strip())

    torch.manual_seed(args.seed)
    net = net.cpu().requires_grad_(False)
    s = schedule_of(net)
    n = args.num_samples if roll else args.num_samples // 10
    held_out = draw_roll(n, args.noise, args.seed + 2) if roll else HEARTBEATS[torch.randint(5, (n,))]
    K, K_steps = evaluate(kind, s, net, held_out, args.seed + 1)
    metrics = {"script": "sohl_dickstein_2015", "dataset": args.data, "seed": args.seed,
               "device": args.device, "torch": torch.__version__, "steps": state["step"],
               "params": sum(p.numel() for p in net.parameters()), "seconds_train": state["seconds"]}
    if roll:
        metrics |= roll_experiments(args, out, s, net, held_out, K_steps)
        L_null = -math.log2(2 * math.pi * math.e)  # of N(0, I), if the data have variance 1
        metrics |= {"L_null_bits": L_null, "K_minus_L_null_bits": K.mean().item() - L_null}
    else:
        *_, (_, x) = reverse(kind, s, net, binomial_q(held_out, s.beta[0]).sample())
        valid = (x[:, None] == HEARTBEATS).all(2).any(1)
        metrics |= {"valid_share": valid.double().mean().item(), "true_bits_per_sequence": -math.log2(5)}
        print(*("".join("·█"[int(bit)] for bit in row) for row in x[:8]), sep="\n")
    metrics |= {"K_bits" if roll else "K_bits_per_sequence": K.mean().item(),
                "K_stderr_bits": (K.std() / n ** 0.5).item(), "seconds_total": time.time() - begin}
    for name, value in metrics.items():
        print(f"{name:<28}{value:.4f}" if isinstance(value, float) else f"{name:<28}{value}")
    print("paper (Table 1): K 2.35, K - L_null 6.45" if roll else "paper (Table 1): K -2.414")
    metrics |= {"config": vars(args), "KL_bits_of_step": K_steps}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics

if __name__ == "__main__":
    main(get_args())

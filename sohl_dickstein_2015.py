"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics. Sohl-Dickstein et al., arXiv 1503.03585.

One idea: destroy the structure of data by T small steps of noise, q. Each step undone is nearly as simple as
the step itself, so a network can learn it, p, and the chain of these turns noise into data. What is maximised
is a bound on the mean log-likelihood with every term in closed form, Eq. (14):

    K = - Σ_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) + H_q(X_T|X_0) - H_q(X_1|X_0) - H_p(X_T)

The step t = 1 has nothing to learn: it is the forward step, reversed under the noise's own distribution π.

    python sohl_dickstein_2015.py                             # Swiss roll, T = 40, β learned
    python sohl_dickstein_2015.py --data heartbeat            # binary sequences, T = 2000
    python sohl_dickstein_2015.py --checkpoint runs/sohl_dickstein_2015-swiss_roll/checkpoint.pt

Expect, on two CPU cores, seed 0: K = 2.60 ± 0.01 bits in 2 minutes; 2.70 is possible, and the paper has 2.35
for its roll. Heartbeat: K = -2.37 bits in 2 minutes (possible -2.32, paper -2.41), 99 % of samples valid.

Differs from the paper:
  - The network is given ᾱ_t, not t, and says what x_0 may be: its mean and covariance or, of bits,
    probabilities. The closed form of q makes f_mu, f_sigma, f_b of that. The paper's gives these themselves.
  - Roll: an MLP on x_t and sines of it, not on 16 radial basis functions; f_sigma full, not diagonal. How
    noisy the paper's roll is it does not say, and K depends on that: hold K against the ceiling.
  - Heartbeat: the paper's three sigmoid layers of 50, but one readout for all t instead of one each.
  - Posteriors: the r(x_t) that is exact where p(x_0 | x_t) is Gaussian, not the same r for all t, Eq. (23).
  - Adam, its rate decayed to 0, gradients clipped at 100; the paper has SFO, a quasi-Newton method.

Shapes: B batch, D dimensions of x (2 of the roll, 20 of the heartbeat).
"""
import argparse
import json
import math
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from scipy import special, stats
from sklearn.datasets import make_swiss_roll
from torch.distributions import Bernoulli, Independent, MultivariateNormal, kl_divergence
from torchvision.ops import MLP
from tqdm import tqdm

from schedules import SCHEDULES, Schedule, from_alpha_bar, like, make_schedule

RHO = 0.2  # rate of the noise on bits, App. D.1.2 (Table App.1: 0.5). The data's, so that -E log π = H_p(X_T)

# -------------------------------------- Table App.1: Gaussian and binomial diffusion, forward and in reverse

def gaussian_q(x0, alpha_bar):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I); with ᾱ = 0 the noise itself, π = N(0, I).  x0 (B, D)"""
    std = like((1 - alpha_bar).sqrt(), x0).expand_as(x0)
    return MultivariateNormal(like(alpha_bar.sqrt(), x0) * x0, scale_tril=torch.diag_embed(std))

def gaussian_p(s, xt, t, x0_hat, S=0):
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_sigma(x_t, t)), t >= 2, from moments of x_0 given x_t.

    With x_0 itself and S = 0 this is q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I). Averaged over x_0 that has mean
    f_mu = μ̃_t(x̂_0, x_t) and covariance f_sigma = β̃_t (I + (SNR_{t-1} - SNR_t) S); the Gaussian with the
    right moments has the smallest KL.  x0_hat (B, D), S (B, D, D)"""
    f_mu, beta_tilde = s.q_posterior(x0_hat, xt, t)
    f_sigma = torch.eye(xt.shape[1]).to(xt) + like(s.snr[t - 1] - s.snr[t], xt)[..., None] * S
    return MultivariateNormal(f_mu, beta_tilde[..., None] * f_sigma)

def given(moments, y, precision, xt, alpha_bar):
    """Sec. 2.5: the moments of p(x_0) r(x_0) / Z given x_t, for r(x_0) = Π_i N(y_i; x_0i, 1 / precision_i).

    A noisy observation y (D,) of all coordinates denoises, of some (precision 0 elsewhere) inpaints. In place
    of moments, it multiplies p(x_{t-1} | x_t) by r(x_{t-1}) = E[r(x_0) | x_{t-1}]: Eq. (22)."""
    x0_hat, S = moments(xt, alpha_bar)
    S = torch.linalg.solve(torch.eye(len(y)).to(S) + S * precision, S)  # (S⁻¹ + diag(precision))⁻¹
    return x0_hat + (S @ (precision * (y - x0_hat))[..., None])[..., 0], S

def score(x0_hat, xt, alpha_bar):
    """∇ log q(x_t) = (√ᾱ_t E[x_0 | x_t] - x_t) / (1 - ᾱ_t), the mean of ∇ log q(x_t | x_0).  Vincent 2011.

    f_mu is μ̃_t at x̂_0, so it gives the score, and K fits it by denoising score matching.  -> (B, D)"""
    return (like(alpha_bar.sqrt(), xt) * x0_hat - xt) / like(1 - alpha_bar, xt)

def binomial_q(x0, alpha_bar):
    """q(x_t | x_0) = B(ᾱ_t x_0 + (1 - ᾱ_t) ρ); with ᾱ = 0 the noise itself, B(ρ).  x0 (B, D): 0., 1."""
    return Independent(Bernoulli(like(alpha_bar, x0) * (x0 - RHO) + RHO), 1)

def evidence(xt, alpha_bar):
    """What each bit says alone, log q(x_t | x_0 = 1) / q(x_t | x_0 = 0); with α_t, of x_{t-1}.  (B, D)"""
    zero = like(RHO * (1 - alpha_bar), xt)  # q(x_t = 1 | x_0 = 0)
    one = zero + like(alpha_bar, xt)  # q(x_t = 1 | x_0 = 1)
    return torch.where(xt == 1, (one / zero).log(), ((1 - one) / (1 - zero)).log())

def binomial_p(s, xt, t, rate):
    """p(x_{t-1} | x_t) = B(f_b(x_t, t)): q(x_{t-1} | x_t, x_0) averaged over x_0 ~ B(rate).

    By Bayes' rule the log-odds of q(x_{t-1} | x_t, x_0) are those of q(x_{t-1} | x_0) and what x_t says."""
    said = evidence(xt, s.alpha[t])
    prior = (binomial_q(torch.full_like(xt, bit), s.alpha_bar[t - 1]).mean.logit() for bit in (1, 0))
    one, zero = ((said + log_odds).sigmoid() for log_odds in prior)
    return Independent(Bernoulli(rate * one + (1 - rate) * zero), 1)

# ------------------------------------------------- Secs. 2.2 to 2.4: for both, the reverse process, the bound

GAUSSIAN, BINOMIAL = (gaussian_q, gaussian_p), (binomial_q, binomial_p)

def bound(kind, s, net, x0, t):
    """The KL of step t at one x_t for each x_0, and the entropies of Eq. (14), in bits.  (B,), (B,)"""
    q, p = kind
    q_t = q(x0, s.alpha_bar[t])
    xt = q_t.rsample() if q_t.has_rsample else q_t.sample()  # frozen noise: β moves x_t, and K through it
    kl = kl_divergence(p(s, xt, t, x0), p(s, xt, t, *net(xt, s.alpha_bar[t])))
    # The noise's own entropy, H_p(X_T), is that of q for ᾱ = 0 = β_0.
    H_q_T, H_q_1, H_p_T = (q(x0, a).entropy() for a in (s.alpha_bar[-1], s.alpha_bar[1], s.beta[0]))
    return kl / math.log(2), (H_q_T - H_q_1 - H_p_T) / math.log(2)

def reverse(kind, s, net, x):
    """The reverse process from x = x_T ~ π (B, D).  Yields (t, x_t) for t = T-1..0."""
    q, p = kind
    for t in range(s.T, 1, -1):
        ts = torch.full((len(x),), t)
        x = p(s, x, ts, *net(x, s.alpha_bar[ts])).sample()
        yield t - 1, x
    yield 0, q(x, s.alpha_bar[1]).sample()  # the forward step, its own reverse where x_1 ~ π

# ---------------------------------------------------- the networks, and the data, whose densities are known

class RollNet(MLP):
    """x_t, ᾱ_t -> the mean and covariance of x_0 given x_t.  (B, 2), (B,) -> (B, 2), (B, 2, 2)

    x̂_0 = √ᾱ x_t + √(1 - ᾱ) g,  S = (1 - ᾱ) L Lᵀ: with g = 0, L = I (a new network) this is right for N(0, I)
    data, and K = L_null. The layers give g, which is -v of Salimans & Ho 2022, and the triangular L."""

    def forward(self, xt, alpha_bar):
        sigma2, log_snr = like(1 - alpha_bar, xt), like(alpha_bar.logit(), xt)
        waves = (xt[..., None] * torch.arange(1, 17, device=xt.device)).flatten(1)  # (B, 32)
        h = super().forward(torch.cat([xt, log_snr / 4, waves.sin(), waves.cos()], 1))
        L = torch.stack([h[:, 2].exp(), 0 * h[:, 3], h[:, 3], h[:, 4].exp()], 1).reshape(-1, 2, 2)
        return like(alpha_bar.sqrt(), xt) * xt + sigma2.sqrt() * h[:, :2], sigma2[..., None] * L @ L.mT

class HeartbeatNet(MLP):
    """evidence(x_t, ᾱ_t) -> the probabilities that the bits of x_0 are 1: the paper's MLP.  -> ((B, 20),)"""

    def forward(self, xt, alpha_bar):
        return super().forward(evidence(xt, alpha_bar).float() / 4).sigmoid().to(xt),  # a tuple of one

HEARTBEATS = torch.eye(5, dtype=torch.float64).repeat(1, 4)  # all five of them: a 1 at every 5th of 20 bits

def roll_density(noise):
    """scikit-learn's Swiss roll seen from above, standardised, as a mixture of n Gaussians along the spiral
    (cos φ, sin φ) φ, φ uniform in [1.5π, 4.5π], closer to each other than they are wide.
    -> centres (n, 2), their variances (2,), and the mean and deviation that standardised them (2,), (2,)"""
    n = max(200, int(140 / noise))
    phi = 1.5 * math.pi * (1 + 2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    m = torch.stack([phi * phi.cos(), phi * phi.sin()], 1)
    mean, std = m.mean(0), (m.var(0, unbiased=False) + noise ** 2).sqrt()
    return (m - mean) / std, (noise / std) ** 2, mean, std

def draw_roll(n, noise, seed):
    """n points of the roll, standardised.  float32 (n, 2)"""
    *_, mean, std = roll_density(noise)
    x = torch.tensor(make_swiss_roll(n, noise=noise, random_state=seed)[0][:, [0, 2]])
    return ((x - mean) / std).float()

def exact_moments(density, xt, alpha_bar):
    """What RollNet has to learn: the mean and covariance of x_0 given x_t, a mixture as well.  float64"""
    m, v = density[:2]
    xt, alpha_bar = xt.double(), alpha_bar[:, None]
    variance = alpha_bar * v + 1 - alpha_bar  # of x_t about √ᾱ m_j, (B, 2)
    w = ((alpha_bar.sqrt() * xt / variance) @ m.T - (alpha_bar / variance) @ (m ** 2).T / 2).softmax(1)
    mean, square = w @ m, w @ (m[:, :, None] * m[:, None]).flatten(1)  # w is p(j | x_t), (B, n)
    C = square.reshape(-1, 2, 2) - mean[:, :, None] * mean[:, None]
    a, b = (1 - alpha_bar) / variance, alpha_bar.sqrt() * v / variance  # x_0 | j, x_t: N(a m_j + b x_t, a v)
    return a * mean + b * xt, a[:, :, None] * C * a[:, None] + torch.diag_embed(v * a)

def negative_entropy(density):
    """-H(X) = E log q(x_0) in bits: the mean over the spiral of 7 x 7 Gauss-Hermite points about it."""
    m, v = density[:2]
    z, weight = map(torch.tensor, special.roots_hermitenorm(7))
    c = m / v.sqrt()  # the centres, in units of the noise
    nats = -(2 * math.pi * len(c) * v.prod().sqrt()).log()
    for dz, w in zip(torch.cartesian_prod(z, z), torch.cartesian_prod(weight, weight).prod(1) / 2 / math.pi):
        nats += w * (-torch.cdist(c[len(c) // 400::len(c) // 200] + dz, c) ** 2 / 2).logsumexp(1).mean()
    return nats.item() / math.log(2)

# --------------------------------------------------------------- training, evaluation, experiments, figures

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

def start_beta(schedule, T):
    """β_1..β_T of --schedule; learned starts with the log-SNR evenly spaced from 16 to -6.  (T,)"""
    alpha_bar = nn.functional.pad(torch.linspace(16, -6, T, dtype=torch.float64).sigmoid(), (1, 0), value=1)
    return from_alpha_bar(alpha_bar)[1:] if schedule == "learned" else make_schedule(schedule, T).beta[1:]

def schedule_of(net):
    """The Schedule of β_t = sigmoid(net.logits[t - 1]); if they learn, all but β_1 do: Sec. 2.4.1."""
    return Schedule(nn.functional.pad(torch.cat([net.logits[:1].detach(), net.logits[1:]]).sigmoid(), (1, 0)))

def train(args, kind, net, data, path, state):
    """Gradient ascent on K, from state (a checkpoint, or None) to args.steps, or Ctrl-C.  -> what it saved"""
    opt = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), maximize=True)
    if state:  # which holds all that the next step depends on
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    first, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
    stop, start, saved = [], time.time(), time.time()
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    bar = tqdm(range(first + 1, args.steps + 1), "training", args.steps, initial=first, mininterval=1)
    for step in bar:
        opt.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        x0 = data[torch.randint(len(data), (args.batch,))]
        s = schedule_of(net)
        kl, entropies = bound(kind, s, net, x0, torch.randint(2, s.T + 1, (args.batch,)))
        K = (entropies - (s.T - 1) * kl).mean()  # one term of the sum each: an estimate without bias
        opt.zero_grad()
        K.backward()
        if not nn.utils.clip_grad_norm_(net.parameters(), 100).isfinite():
            raise ValueError
        opt.step()
        bar.set_postfix(K=f"{K:.3f} bits", refresh=False)
        if stop or step == args.steps or time.time() - saved > 60:
            saved = time.time()
            state = {"script": Path(__file__).stem, "config": vars(args), "step": step,
                     "seconds": seconds + saved - start, "net": net.state_dict(),
                     "optimizer": opt.state_dict(), "rng": torch.get_rng_state()}
            torch.save(state, f"{path}.tmp")  # a run killed while saving leaves the last checkpoint whole
            Path(f"{path}.tmp").replace(path)
        if stop:
            print(f"stopped at step {step} of {args.steps}; --resume goes on from here")
            break
    signal.signal(signal.SIGINT, handler)
    return state

def evaluate(kind, s, net, x0, seed=1):
    """An estimate of K in bits for each x_0, and the bits that each step t = 2..T takes.  (B,), a list"""
    torch.manual_seed(seed)
    steps = []
    for t in tqdm(range(2, s.T + 1), "bound", disable=s.T < 1000):
        kl, entropies = bound(kind, s, net, x0, torch.full((len(x0),), t))
        steps.append(kl.double())
    return entropies - sum(steps), [kl.mean().item() for kl in steps]

def draw(path, rows):
    """A table of pictures, each (title, points (n, 2)) or (title, points and arrows (n, 4))."""
    fig = Figure(figsize=(3 * len(rows[0]), 3 * len(rows)), layout="constrained")
    for ax, (title, xy) in zip(fig.subplots(len(rows), len(rows[0])).flat, sum(rows, [])):
        ax.set(title=title, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
        ax.quiver(*xy.T) if xy.shape[1] > 2 else ax.plot(*xy.T, "k,")
    fig.savefig(path, dpi=70)

def roll_experiments(noise, out, s, net, held_out, K_steps):
    """The ceilings, Fig. 1, the posteriors of Sec. 2.5, the score, their figures.  -> the numbers"""
    density, T, x0 = roll_density(noise), s.T, held_out[:min(len(held_out) // 100, 1000)]
    exact = partial(exact_moments, density)
    K_exact, exact_steps = evaluate(GAUSSIAN, s, exact, x0)
    lost = K_exact - evaluate(GAUSSIAN, s, net, x0)[0]  # of the same x_0 and x_t
    metrics = {"ceiling_bits": negative_entropy(density), "network_loses_bits": lost.mean().item()}
    ideal = {name: evaluate(GAUSSIAN, make_schedule(name, T), exact, x0)[0] for name in SCHEDULES}
    metrics |= {f"K_ideal_bits_{name}": K.mean().item() for name, K in ideal.items()}
    ax = Figure(figsize=(6, 4), layout="constrained").subplots(subplot_kw={"xlabel": "t"})
    curves = torch.stack([s.beta[2:], torch.tensor(K_steps), torch.tensor(exact_steps)], 1)
    ax.semilogy(range(2, T + 1), curves, label=["β_t", "bits lost at step t", "... with the true moments"])
    ax.legend()
    ax.figure.savefig(out / "bound.png", dpi=100)

    x, columns = torch.randn(2000, 2), []
    p = {T: x} | dict(reverse(GAUSSIAN, s, net, x))
    for t in (0, T // 4, T // 2, 3 * T // 4, T):
        u = torch.full((len(x0),), max(t, 2))  # the first t that has an f_mu
        xt, alpha_bar = s.q_sample(x0, u, torch.randn_like(x0)), s.alpha_bar[u]
        drift = gaussian_p(s, xt, u, *net(xt, alpha_bar)).mean - xt
        ours, true = (score(f(xt, alpha_bar)[0], xt, alpha_bar) for f in (net, exact))
        metrics[f"score_error_t{u[0]}"] = ((ours - true).norm() / true.norm()).item()
        q = s.q_sample(held_out[:2000], t, torch.randn(2000, 2))
        fields = ("f_mu(x, t) - x", drift), ("∇ log q by f_mu", ours), ("∇ log q, exact", true)
        fields = [(f"{name}, t = {u[0]}", torch.cat([xt, field], 1)[:300]) for name, field in fields]
        columns += [[(f"q, t = {t}", q), (f"p, t = {t}", p[t]), *fields]]
    draw(out / "swiss_roll.png", [list(row) for row in zip(*columns)])

    rows, y, roll = [], torch.tensor([0.5, -0.3]), draw_roll(2_000_000, noise, 1)
    for task, precision in ("denoise", torch.tensor([4.0, 4.0])), ("inpaint", torch.tensor([1e4, 0.0])):
        x = dict(reverse(GAUSSIAN, s, partial(given, net, y, precision), torch.randn(5000, 2)))[0]
        accept = torch.rand(len(roll)) < (-precision * (y - roll) ** 2 / 2).sum(1).exp()  # rejection sampling
        true, again = roll[accept][:10_000].chunk(2)
        for name, points in ("", x), ("_floor", again), ("_without_r", p[0]):
            metrics[f"{task}_distance{name}"] = max(map(stats.wasserstein_distance, points.T, true.T))
        rows += [[(f"{task}: exact", true), (f"{task}: by reverse", x)]]
    draw(out / "posteriors.png", rows)

    fig = Figure(figsize=(3, 3))
    dots = fig.add_axes((0, 0, 1, 1), xlim=(-3, 3), ylim=(-3, 3)).scatter(*p[T].T, s=0.5, c="k")
    frames = [*range(T, 0, -1 - T // 60), *[0] * 10]
    FuncAnimation(fig, lambda t: dots.set_offsets(p[t]), frames).save(out / "reverse.gif", "pillow", 10)
    return metrics

PRESETS = {"swiss_roll": dict(T=40, schedule="learned", steps=6000, lr=4e-3, width=128, num_samples=100_000),
           "heartbeat": dict(T=2000, schedule="inverse", steps=8000, lr=1e-2, width=50, num_samples=10_000)}
QUICK = dict(steps=100, batch=256, width=32, num_samples=2000)

def get_args(argv=None):
    """Flags, over the config in a checkpoint or else the preset of --data."""
    p = argparse.ArgumentParser(description="No default shown: each --data has its own, in PRESETS.")
    p.add_argument("--data", choices=PRESETS, default="swiss_roll")
    p.add_argument("--out", default="runs/sohl_dickstein_2015-<data>", help="folder for all that is written")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="default cpu: the networks are too small for a GPU")
    p.add_argument("--quick", action="store_true", help="the whole way in seconds, to see that it works")
    p.add_argument("--checkpoint", help="evaluate this file instead of training; needs no other flag")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--noise", type=float, default=0.02, help="of the roll (paper: not given)")
    p.add_argument("--T", type=int, help="diffusion steps (paper: 40 for the roll, 2000)")
    p.add_argument("--schedule", choices=["learned", *SCHEDULES], help="(paper: learned; inverse)")
    p.add_argument("--steps", type=int, help="training steps")
    p.add_argument("--batch", type=int, default=2048, help="examples a training step")
    p.add_argument("--lr", type=float, help="Adam's learning rate")
    p.add_argument("--num-samples", type=int, help="fresh data, of which K is a mean")
    args = p.parse_args(argv)  # a first look, to see whose defaults to take
    defaults = PRESETS[args.data] | (QUICK if args.quick else {})
    if args.checkpoint or args.resume:
        out = args.out.replace("<data>", args.data)
        config = load_checkpoint(args.checkpoint or f"{out}/checkpoint.pt")["config"]
        if args.schedule not in (None, config["schedule"]):
            p.error(f"--schedule {args.schedule}: the checkpoint's is {config['schedule']}")
        defaults = {k: config[k] for k in ("data", "noise", "seed", "batch", *defaults)}
    p.set_defaults(**defaults)
    args = p.parse_args(argv)
    args.out = args.out.replace("<data>", args.data)
    if args.data == "heartbeat" and args.schedule == "learned":
        p.error("--schedule learned is for the roll: noise on bits cannot be frozen (Sec. 2.4.1)")
    if min(args.steps, args.batch, args.T - 1, args.num_samples - 1999, args.seed + 1, args.noise * 200) < 1:
        p.error("--steps, --batch must be at least 1, --T 2, --num-samples 2000, --seed 0, --noise 0.005")
    return args

def main(args):
    """Train (or load), evaluate, draw; writes it all into args.out and returns the numbers."""
    begin, out, roll = time.time(), Path(args.out), args.data == "swiss_roll"
    path, kind = out / "checkpoint.pt", GAUSSIAN if roll else BINOMIAL
    state = load_checkpoint(args.checkpoint or path) if args.checkpoint or args.resume else None
    torch.manual_seed(args.seed)
    net = (RollNet(67, [args.width] * 4 + [5], activation_layer=nn.SiLU) if roll else
           HeartbeatNet(20, [args.width] * 3 + [20], activation_layer=nn.Sigmoid))
    for parameter in net[-2].parameters():  # the last layer (MLP ends in a Dropout of 0) starts at 0
        nn.init.zeros_(parameter)
    net.logits = nn.Parameter(start_beta(args.schedule, args.T).logit(), args.schedule == "learned")
    try:
        if state:
            net.load_state_dict(state["net"])
        net.to(args.device)
        out.mkdir(parents=True, exist_ok=True)
        if not args.checkpoint:
            if not args.resume and path.exists():
                print("earlier run kept as", path.rename(out / f"checkpoint-{path.stat().st_mtime_ns}.pt"))
            data = draw_roll(400_000, args.noise, args.seed + 1) if roll else HEARTBEATS
            state = train(args, kind, net, data.to(args.device), path, state)
        s = schedule_of(net.cpu().requires_grad_(False))
    except (ValueError, torch.linalg.LinAlgError):  # p's parameters are not numbers
        fail("the bound is no longer finite: try a smaller --lr")
    except (OSError, RuntimeError, AssertionError, TypeError) as e:  # folder, device, checkpoint
        fail(" ".join(str(e).split())[:500] or repr(e))

    torch.manual_seed(args.seed)
    n = args.num_samples
    held_out = draw_roll(n, args.noise, args.seed + 2) if roll else HEARTBEATS[torch.randint(5, (n,))]
    K, K_steps = evaluate(kind, s, net, held_out, args.seed + 1)
    metrics = {"script": "sohl_dickstein_2015", "dataset": args.data, "seed": args.seed,
               "device": args.device, "torch": torch.__version__, "steps": state["step"],
               "params": sum(p.numel() for p in net.parameters()), "seconds_train": state["seconds"]}
    if roll:
        metrics |= roll_experiments(args.noise, out, s, net, held_out, K_steps)
    else:
        noise = binomial_q(held_out, s.beta[0]).sample()
        _, x = min(tqdm(reverse(kind, s, net, noise), "sampling", args.T))  # the smallest t: 0
        valid = (x[:, None] == HEARTBEATS).all(2).any(1)
        metrics |= {"valid_share": valid.double().mean().item(), "true_bits_per_sequence": -math.log2(5)}
        print(*("".join("·█"[int(bit)] for bit in row) for row in x[:8]), sep="\n")
    L_null = -kind[0](held_out, s.beta[0]).entropy().mean().item() / math.log(2)
    metrics |= {"K_minus_L_null_bits": K.mean().item() - L_null, "K_stderr_bits": K.std().item() / n ** 0.5,
                "K_bits" if roll else "K_bits_per_sequence": K.mean().item(), "L_null_bits": L_null,
                "paper's K, K - L_null": "2.35, 6.45" if roll else "-2.414, 12.024"}
    for name, value in metrics.items():
        print(f"{name:<28}{value:.4f}" if isinstance(value, float) else f"{name:<28}{value}")
    metrics |= {"config": vars(args), "KL_bits_of_step": K_steps, "seconds_total": time.time() - begin}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics

if __name__ == "__main__":
    main(get_args())

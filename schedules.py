"""Noise schedules, and q, the forward process of a diffusion model. Its β may be fixed or learned.

The forward process adds Gaussian noise in T small steps, or in one jump (Ho et al. 2020, Eqs. (2), (4)):
    q(x_t | x_{t-1}) = N(√(1 - β_t) x_{t-1}, β_t I),   t = 1..T
    q(x_t | x_0)     = N(√ᾱ_t x_0, (1 - ᾱ_t) I),       α_t = 1 - β_t,  ᾱ_t = α_1 α_2 ... α_t

The index is the papers' t. Tables have T + 1 entries, beta[0] = 0 and alpha_bar[0] = 1 (t = 0 is the data),
so alpha_bar[t - 1] is right at t = 1 too. They are float64, cast at the last moment.

    python schedules.py           # draws every schedule and what it does to data, into runs/schedules

Add your own: a function of T that returns beta, with @schedule above it, appears in these figures, in every
script's --schedule and in the tests.  Shapes: B batch, ... one example (2 for a point, C, H, W for an image).
"""
import argparse
import json
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

SCHEDULES = {}  # name -> function of T that gives beta: float64, (T+1,), beta[0] = 0, 0 < beta[1:] < 1

def schedule(f):
    """Register f(T) -> beta under its own name."""
    SCHEDULES[f.__name__] = f
    return f

def from_alpha_bar(alpha_bar, largest=0.999):
    """β_t = 1 - ᾱ_t / ᾱ_{t-1}, at most 0.999 as Nichol & Dhariwal bound it.  ᾱ_0..ᾱ_T (T+1,) -> (T+1,)"""
    beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest)
    return F.pad(beta, (1, 0))  # β_0 = 0

def time(T):
    """t/T for t = 0..T, float64, shape (T+1,)."""
    return torch.arange(T + 1, dtype=torch.float64) / T

@schedule
def linear(T):
    """β_t evenly spaced from 1e-4 to 0.02.  Ho et al. 2020, Sec. 4, T = 1000; times 1000/T, at most 0.999."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T  # fewer steps, each of them larger
    return F.pad(beta.clamp(max=0.999), (1, 0))  # β_0 = 0

@schedule
def quadratic(T):
    """√β_t evenly spaced, with the ends of linear.  One of those that Ho et al. 2020 tried, Appendix B."""
    beta = torch.linspace(1e-4 ** 0.5, 0.02 ** 0.5, T, dtype=torch.float64) ** 2 * 1000 / T
    return F.pad(beta.clamp(max=0.999), (1, 0))

@schedule
def constant(T):
    """The same β at every t.  One of those that Ho et al. 2020 tried, Appendix B; their code has 0.02.

    Ours is about 0.01 for T = 1000, so that ᾱ_t = e^(-10 t/T) ends where linear does."""
    return from_alpha_bar(torch.exp(-10 * time(T)))

@schedule
def cosine(T):
    """ᾱ_t = f(t) / f(0),  f(t) = cos²(π/2 (t/T + 0.008) / 1.008).  Nichol & Dhariwal 2021, Eq. (17)."""
    f = torch.cos(math.pi / 2 * (time(T) + 0.008) / 1.008) ** 2
    return from_alpha_bar(f / f[0])

@schedule
def sigmoid(T):
    """ᾱ_t falls as a sigmoid from -3 to 3, stretched to go from 1 to 0.  Jabri et al. 2022, τ = 1."""
    v = torch.sigmoid(6 * time(T) - 3)
    return from_alpha_bar((v[-1] - v) / (v[-1] - v[0]))

@schedule
def geometric(T):
    """Noise levels σ_1 = 0.01 .. σ_T = 50, evenly spaced in log σ.  Song & Ermon 2019, Sec. 4.1.

    They add noise without shrinking the data, x_0 + σ_t z. Divided by √(1 + σ_t²) the variance stays 1, and
    ᾱ_t = 1 / (1 + σ_t²). Theirs: 0.01 .. 1 (Sec. 5), in 2020 up to 50 on CIFAR-10, for pixels in [0, 1]. On
    [-1, 1] these would be doubled; we keep the numbers. A top of 1 would leave 0.71 of the signal."""
    sigma = F.pad(torch.logspace(-2, math.log10(50), T, dtype=torch.float64), (1, 0))  # σ_0 = 0
    return from_alpha_bar(1 / (1 + sigma ** 2))

@schedule
def inverse(T):
    """β_t = 1 / (T - t + 1): ᾱ_t = 1 - t/T, the signal of bits, loses 1/T per step.  Sohl-Dickstein et al.
    2015, Sec. 2.4.1, for binomial diffusion. There β_T = 1; here 0.999, as x̂_0 from ε divides by √ᾱ_T."""
    return from_alpha_bar(1 - time(T))

def extract(table, t, x):
    """The entry of a table for each example's t, shaped to multiply x.  t (B,), or one integer for all.
    table (T+1,) float64, x (B, ...) -> (B, 1, ..., 1) in x's type"""
    ones = [1] * (x.dim() - 1)
    return table[t].to(x.dtype).reshape(-1, *ones)

class Schedule:
    """The tables of one schedule, indexed by the paper's t, and the two distributions of q in closed form.

    beta: (T+1,), beta[0] = 0, 0 < beta[1:] < 1, else ValueError. Warns if √ᾱ_T > 0.1: q then does not end in
    N(0, I), where sampling starts (the usual cause: betas for T = 1000 with a smaller T).

        s = make_schedule("linear", 1000)
        xt = s.q_sample(x0, t, torch.randn_like(x0))"""

    def __init__(self, beta):
        beta = torch.as_tensor(beta, dtype=torch.float64)
        if beta.dim() != 1 or len(beta) < 2 or beta[0] != 0 or not ((beta[1:] > 0) & (beta[1:] < 1)).all():
            raise ValueError("beta must have T + 1 entries: beta[0] = 0, then 0 < beta[t] < 1 for t = 1..T")
        self.T = len(beta) - 1
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = self.alpha.cumprod(0)
        self.snr = self.alpha_bar / (1 - self.alpha_bar)  # signal-to-noise ratio, infinite at t = 0
        beta_tilde = (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:]) * beta[1:]  # Eq. (7), t = 1..T
        self.beta_tilde = F.pad(beta_tilde, (1, 0))  # β̃_1 = 0; the entry for t = 0 is there for the index
        signal_left = self.alpha_bar[-1].sqrt().item()
        if signal_left > 0.1:
            warnings.warn(f"this schedule leaves sqrt(alpha_bar[T]) = {signal_left:.2f} of the signal, but "
                          "samplers start from pure noise", stacklevel=2)

    def to(self, device):
        """Move the tables. They stay float64, except on Apple's MPS, which has only float32."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name in ("beta", "alpha", "alpha_bar", "snr", "beta_tilde"):
            setattr(self, name, getattr(self, name).to(dtype).to(device))
        return self

    def q_sample(self, x0, t, eps):
        """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε, a draw from q(x_t | x_0) if ε ~ N(0, I).  Eq. (4).
        x0, eps: (B, ...);  t: (B,) integers in 0..T, or one integer for all.  -> (B, ...)"""
        return extract(self.alpha_bar.sqrt(), t, x0) * x0 + extract((1 - self.alpha_bar).sqrt(), t, x0) * eps

    def posterior_coefficients(self, t, x):
        """The two factors in μ̃_t = a_t x_0 + b_t x_t, Eq. (7), for t in 1..T.  -> (B, 1, ..., 1) each
        a_t = √ᾱ_{t-1} β_t / (1 - ᾱ_t),   b_t = √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)"""
        alpha_bar, alpha_bar_prev = self.alpha_bar[1:], self.alpha_bar[:-1]  # ᾱ_t and ᾱ_{t-1}, t = 1..T
        a = alpha_bar_prev.sqrt() * self.beta[1:] / (1 - alpha_bar)
        b = self.alpha[1:].sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        return extract(F.pad(a, (1, 0)), t, x), extract(F.pad(b, (1, 0)), t, x)  # padded: index t is t

    def q_posterior(self, x0, xt, t):
        """q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I), a forward step reversed, x_0 being known.  Eqs. (6), (7).
        x0, xt: (B, ...);  t: (B,) integers in 1..T, or one for all.  -> μ̃_t (B, ...), β̃_t (B, 1, ..., 1)"""
        a, b = self.posterior_coefficients(t, xt)
        return a * x0 + b * xt, extract(self.beta_tilde, t, xt)

def make_schedule(name, T):
    """The schedule of SCHEDULES called name, with T steps. ValueError for another name or T < 1."""
    if name not in SCHEDULES or T < 1:
        raise ValueError(f"no schedule {name!r} with T = {T}: T starts at 1; names: {', '.join(SCHEDULES)}")
    return Schedule(SCHEDULES[name](T))

# --------------------------------------------------- the first practical: what does a schedule do to data?

def accuracy_at(s, t, x, y, eps):
    """1-nearest-neighbour accuracy on the last 500 digits, noised to t. The others, scaled by √ᾱ_t, are the
    training set: the nearest is the x_0 of largest log q(x_t | x_0) = -|x_t - √ᾱ_t x_0|² / (2 (1 - ᾱ_t)) + c.
    x (N, 64), y (N,), eps (500, 64)"""
    from sklearn.neighbors import KNeighborsClassifier
    nearest = KNeighborsClassifier(1).fit(s.alpha_bar[t].sqrt() * x[:-500], y[:-500])
    return nearest.score(s.q_sample(x[-500:], t, eps), y[-500:])

def main(args):
    """Draw schedules.png and destruction.png, measure how long structure lives.  -> {schedule: numbers}"""
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits, make_swiss_roll
    from sklearn.preprocessing import scale
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x) / 8 - 1  # grey levels 0..16 -> [-1, 1]
    roll, _ = make_swiss_roll(2000, noise=0.02, random_state=args.seed)
    roll = torch.tensor(scale(roll[:, [0, 2]]))  # (2000, 2), each coordinate of variance 1
    torch.manual_seed(args.seed)
    eps, eps_roll = torch.randn_like(x[-500:]), torch.randn_like(roll)  # the same noise for all

    ts = torch.linspace(0, args.T, min(args.T, 50) + 1).round().long()
    columns = (args.T * torch.linspace(0, 1, 6) ** 2.5).round().long()  # dense where the roll is lost
    curves = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = curves.subplots(2, 2).ravel()
    pictures = Figure(figsize=(8.5, 0.72 * len(SCHEDULES)), layout="constrained")
    table = pictures.subplots(len(SCHEDULES), 12, subplot_kw=dict(xticks=[], yticks=[]))
    metrics = {}
    for name, row in zip(SCHEDULES, table):
        s = make_schedule(name, args.T)
        accuracy = torch.tensor([accuracy_at(s, t, x, y, eps) for t in ts])
        share = (accuracy[1:] > 0.5).double().mean().item()
        metrics[name] = {"signal_left": s.alpha_bar[-1].sqrt().item(), "structure_share": share}
        print(f"{name:<12} signal left at T: {metrics[name]['signal_left']:.4f}   "
              f"share of steps with accuracy > 1/2: {share:.2f}")
        for ax, values in zip(axes, (s.beta, s.alpha_bar.sqrt(), s.snr.log())):
            ax.plot(time(args.T)[1:].numpy(), values[1:].numpy(), label=name)
        axes[3].plot((ts / args.T).numpy(), accuracy.numpy())
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for t, left, right in zip(columns, row[:6], row[6:]):
            left.plot(*s.q_sample(roll, t, eps_roll).T.numpy(), "k.", ms=1.2, mew=0)
            left.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
            digit = s.q_sample(x[:1], t, eps[:1]).reshape(8, 8)
            right.imshow(digit.numpy(), cmap="gray", vmin=-1, vmax=1)

    for ax, title in zip(axes, ("β", "√ᾱ, the signal left", "log SNR", "accuracy on noised digits")):
        ax.set(title=title, xlabel="t/T")
    axes[0].set_yscale("log")
    curves.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for ax, t in zip(table[0], [*columns, *columns]):
        ax.set_title(f"t={t}", fontsize=10)
    curves.savefig(f"{args.out}/schedules.png", dpi=150)
    pictures.savefig(f"{args.out}/destruction.png", dpi=150)
    text = json.dumps({"config": vars(args), **metrics}, indent=1)
    Path(args.out, "metrics.json").write_text(text, encoding="utf-8")
    return metrics

def get_args(argv=None):
    p = argparse.ArgumentParser(description="Draw every noise schedule and what it does to data.")
    p.error = lambda message: p.exit(2, f"error: {message}\n")  # a user's mistake in one line
    p.add_argument("--T", type=int, default=1000, help="diffusion steps, at least 2 (Ho et al. 2020: 1000)")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--out", default="runs/schedules", help="folder for the figures")
    args = p.parse_args(argv)
    if args.T < 2 or not 0 <= args.seed < 2 ** 32:
        p.error("--T must be at least 2, --seed from 0 to 4294967295")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        p.error(f"--out {args.out}: {e}")
    return args

if __name__ == "__main__":
    main(get_args())

"""Noise schedules and q, the forward process of a diffusion model.

The forward process destroys an image x_0 by adding Gaussian noise in T small steps. Step t shrinks
the image a little and adds noise of variance β_t (Ho et al. 2020, Eq. (2)):

    q(x_t | x_{t-1}) = N(√(1 - β_t) x_{t-1}, β_t I),   t = 1..T

The factor √(1 - β_t) keeps the size of x_t: if x_{t-1} has variance 1, so has x_t, because
(1 - β_t) · 1 + β_t = 1. Many such steps together are again one Gaussian, so we can jump from x_0
to any x_t at once (Ho et al. 2020, Eq. (4)):

    q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I),   where α_t = 1 - β_t and ᾱ_t = α_1 α_2 ... α_t

For if x_{t-1} has the mean √ᾱ_{t-1} x_0 and the variance 1 - ᾱ_{t-1}, then step t makes of them the
mean √α_t √ᾱ_{t-1} x_0 = √ᾱ_t x_0 and the variance α_t (1 - ᾱ_{t-1}) + β_t = 1 - ᾱ_t. Here too the
size is kept: ᾱ_t + (1 - ᾱ_t) = 1. A schedule says how fast ᾱ_t falls from 1 (at t = 0,
the data) to almost 0 (at t = T, pure noise). This file holds seven schedules and the class
`Schedule`, which makes the tables of one. Nothing in it is learned.

The index is the papers' t. Every table has T + 1 entries; beta[0] = 0 and alpha_bar[0] = 1 stand
for the data. So alpha_bar[t - 1] is right at t = 1 too. Most other code counts t from 0 to T - 1
and is off by one from the papers on every line. The tables are float64, cast at the last moment.

    python schedules.py           # draws every schedule and what it does to data

To add your own schedule, write a function of T that returns β, with @register above it. It then
appears in the figures of this file, in every script's --schedule and in the tests.

Shapes: B is the batch, and ... stands for the shape of one example, such as C, H, W.
"""
import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

SCHEDULES = {}  # name -> function of T that returns β: float64, (T+1,), with β_0 = 0

def register(make_beta):
    """Put a function of T that returns β into SCHEDULES, under the function's own name."""
    SCHEDULES[make_beta.__name__] = make_beta
    return make_beta

def beta_of_alpha_bar(alpha_bar, largest=0.999):
    """The β that leads to a given ᾱ: β_t = 1 - ᾱ_t / ᾱ_{t-1}.  ᾱ_0..ᾱ_T, (T+1,) -> β_0..β_T, (T+1,)

    Where ᾱ_T is 0, β_T would be 1. Then x_T would hold nothing of x_0. A network that predicts the
    noise makes its guess of the image by dividing by √ᾱ_T (DDPM Eq. (15)), which would be 0. So β
    is at most 0.999, as in Nichol & Dhariwal 2021."""
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    return F.pad(beta.clamp(max=largest), (1, 0))  # puts β_0 = 0 in front

def time_from_0_to_1(T):
    """t / T for t = 0..T, float64, (T+1,)."""
    return torch.arange(T + 1, dtype=torch.float64) / T

@register
def linear(T):
    """β_t evenly spaced from 1e-4 to 0.02 for T = 1000.  Ho et al. 2020, Sec. 4.

    For another T each β is multiplied by 1000 / T. Then Σ β_t is the same for all T > 1, and fewer
    steps take away about as much in all: log ᾱ_T = Σ log(1 - β_t) is about -Σ β_t, or somewhat less
    where β is large. So ᾱ_T is 4e-5 at T = 1000, 2e-5 at T = 100 and 4e-6 at T = 40. β is at most
    0.999, which cuts it off for T below 21."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    return F.pad(beta.clamp(max=0.999), (1, 0))

@register
def quadratic(T):
    """√β_t evenly spaced, with the same ends as linear.  Tried by Ho et al. 2020, Appendix B."""
    beta = torch.linspace(1e-4 ** 0.5, 0.02 ** 0.5, T, dtype=torch.float64) ** 2 * 1000 / T
    return F.pad(beta.clamp(max=0.999), (1, 0))

@register
def constant(T):
    """The same β at every t.  Tried by Ho et al. 2020, Appendix B; the authors' code has β = 0.02.

    Ours is about 0.01 for T = 1000, chosen so that ᾱ_T = e^-10 is about where linear ends."""
    return beta_of_alpha_bar(torch.exp(-10 * time_from_0_to_1(T)))

@register
def cosine(T):
    """ᾱ_t = f(t) / f(0),  f(t) = cos²(π/2 · (t/T + 0.008) / 1.008).

    Nichol & Dhariwal 2021, Eq. (17).
    Without the offset 0.008 the first β would be so small that the noise in x_1 is far finer than a
    grey level. They chose it so that √β_1 is slightly below a grey level, 1/127.5, for T = 1000."""
    f = torch.cos(math.pi / 2 * (time_from_0_to_1(T) + 0.008) / 1.008) ** 2
    return beta_of_alpha_bar(f / f[0])

@register
def sigmoid(T):
    """ᾱ_t falls as the sigmoid of -(6 t/T - 3) / τ, stretched to go from 1 to 0.

    Jabri et al. 2022. The range from -3 to 3 is the default of their code, and so is τ = 1, which
    is left out below."""
    v = torch.sigmoid(6 * time_from_0_to_1(T) - 3)
    return beta_of_alpha_bar((v[-1] - v) / (v[-1] - v[0]))

@register
def geometric(T):
    """Noise levels σ_1 = 0.01 .. σ_T = 50, evenly spaced in log σ.  Song & Ermon 2019, Sec. 4.1.

    Theirs are numbered the other way: their σ_1 is the largest.
    They add noise without shrinking the data: x_0 + σ_t z. Dividing this by √(1 + σ_t²) makes it a
    process of our kind, with ᾱ_t = 1 / (1 + σ_t²). In 2019 their largest σ was 1, which would leave
    0.71 of the signal in x_T. The 50 is of their paper of 2020, for CIFAR-10. Their images lie in
    [0, 1]; in images from -1 to 1, like ours, the same σ is half as much noise."""
    sigma = torch.logspace(-2, math.log10(50), T, dtype=torch.float64)
    sigma = F.pad(sigma, (1, 0))  # σ_0 = 0
    return beta_of_alpha_bar(1 / (1 + sigma ** 2))

@register
def inverse(T):
    """β_t = 1 / (T - t + 1), so that ᾱ_t = 1 - t/T.  Sohl-Dickstein et al. 2015, Sec. 2.4.1.

    Made for bits, where ᾱ_t is the share of them that noise has not yet drawn anew: each step
    erases the same share, 1/T, of the original bits. There β_T = 1; here it is 0.999, because of
    beta_of_alpha_bar."""
    return beta_of_alpha_bar(1 - time_from_0_to_1(T))

def extract(table, t, x):
    """The table's entry for the t of each example, in a shape that multiplies x.

    table (T+1,);  t (B,) integers, or one integer for all;  x (B, ...)
    -> (B, 1, ..., 1) or (1, 1, ..., 1), in the type of x"""
    if not x.is_floating_point():
        raise TypeError(f"x is of type {x.dtype}: make it float, with images in [-1, 1]")
    ones = [1] * (x.dim() - 1)
    return table[t].to(x.dtype).reshape(-1, *ones)

class Schedule:
    """The tables of one schedule, indexed by the paper's t, and q in closed form.

        s = make_schedule("linear", 1000)
        xt = s.q_sample(x0, t, torch.randn_like(x0))

    beta: (T+1,), with beta[0] = 0 and 0 < beta[t] < 1 for t = 1..T; otherwise ValueError.
    It warns if √ᾱ_T > 0.1. Then x_T still shows the image, but sampling starts from pure noise.
    The usual cause is a β made for T = 1000 that is used with a smaller T."""

    def __init__(self, beta):
        beta = torch.as_tensor(beta, dtype=torch.float64)
        if beta.dim() != 1 or len(beta) < 2 or beta[0] != 0:
            raise ValueError("beta must have T + 1 entries, of which beta[0] = 0")
        if not ((beta[1:] > 0) & (beta[1:] < 1)).all():
            raise ValueError("beta[t] must lie between 0 and 1 for t = 1..T")
        self.T = len(beta) - 1
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = self.alpha.cumprod(0)
        self.snr = self.alpha_bar / (1 - self.alpha_bar)  # signal-to-noise ratio, infinite at t = 0

        # Ho et al. 2020, Eq. (7), for t = 1..T. An entry for t = 0 is put in front of each, so that
        # table[t] is the value at t. No step uses t = 0. For it, q_posterior returns x_0 as the
        # mean, and the variance 0.
        alpha_bar, alpha_bar_prev = self.alpha_bar[1:], self.alpha_bar[:-1]  # ᾱ_t and ᾱ_{t-1}
        beta_tilde = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta[1:]
        weight_x0 = alpha_bar_prev.sqrt() * beta[1:] / (1 - alpha_bar)
        weight_xt = self.alpha[1:].sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        self.beta_tilde = F.pad(beta_tilde, (1, 0), value=0)
        self.weight_x0 = F.pad(weight_x0, (1, 0), value=1)
        self.weight_xt = F.pad(weight_xt, (1, 0), value=0)

        signal_left = self.alpha_bar[-1].sqrt().item()
        if signal_left > 0.1:
            warnings.warn(f"this schedule leaves sqrt(alpha_bar[T]) = {signal_left:.2f} of the "
                          "signal, but samplers start from pure noise", stacklevel=2)

    def to(self, device):
        """Move the tables. They stay float64, except on Apple's MPS, which has only float32."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name, table in vars(self).items():
            if isinstance(table, torch.Tensor):
                setattr(self, name, table.cpu().to(dtype).to(device))
        return self

    def q_sample(self, x0, t, eps):
        """Noise x_0 to x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.  Ho et al. 2020, Eq. (4)

        With ε ~ N(0, I) this is a draw from q(x_t | x_0).
        x0, eps: (B, ...);  t: (B,) integers in 0..T, or one integer for all.  -> (B, ...)"""
        signal = extract(self.alpha_bar.sqrt(), t, x0)
        noise = extract((1 - self.alpha_bar).sqrt(), t, x0)
        return signal * x0 + noise * eps

    def posterior_coefficients(self, xt, t):
        """The factors of μ̃_t = a_t x_0 + b_t x_t, shaped to multiply x_t.  Ho et al. 2020, Eq. (7)

        a_t = √ᾱ_{t-1} β_t / (1 - ᾱ_t),   b_t = √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)
        xt: (B, ...);  t: (B,) integers in 1..T, or one for all.  -> (B, 1, ..., 1) each"""
        return extract(self.weight_x0, t, xt), extract(self.weight_xt, t, xt)

    def q_posterior(self, x0, xt, t):
        """One step of q reversed, with x_0 known: q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I).

        Ho et al. 2020, Eqs. (6), (7). By Bayes' rule it is q(x_t | x_{t-1}) q(x_{t-1} | x_0) up to
        a factor. Both are Gaussians in x_{t-1}: the first has mean x_t / √α_t and variance
        β_t / α_t, the second √ᾱ_{t-1} x_0 and 1 - ᾱ_{t-1}. So is their product: the exponents are
        added and the square is completed. Its precision is the sum of theirs,
        1/β̃_t = α_t/β_t + 1/(1 - ᾱ_{t-1}), and its mean is their mean, weighted by precision:
        μ̃_t = β̃_t (√α_t x_t / β_t + √ᾱ_{t-1} x_0 / (1 - ᾱ_{t-1})), which is Eq. (7). At t = 1 the
        second has variance 0, and Eq. (7) gives x_0 itself.
        x0, xt: (B, ...);  t: (B,) integers in 1..T, or one for all.
        -> μ̃_t (B, ...), β̃_t (B, 1, ..., 1)"""
        a, b = self.posterior_coefficients(xt, t)
        return a * x0 + b * xt, extract(self.beta_tilde, t, xt)

def make_schedule(name, T):
    """The Schedule of that name, with T steps. ValueError for an unknown name or T < 1."""
    if name not in SCHEDULES or T < 1:
        names = ", ".join(SCHEDULES)
        raise ValueError(f"no schedule {name!r} with T = {T}: T starts at 1; names: {names}")
    return Schedule(SCHEDULES[name](T))

# ---------------------------------------- The first practical: what does a schedule do to data?

def readable_share(s, t, x, y, eps):
    """How readable are data noised to t? Of the last 500, the share whose nearest neighbour is of
    their class.  x: 8x8 digits or points of the Swiss roll;  y: their classes

    If all x_0 are equally likely, the most probable one given x_t is that of largest q(x_t | x_0).
    This is the x_0 for which √ᾱ_t x_0 is nearest to x_t, as log q(x_t | x_0) =
    -|x_t - √ᾱ_t x_0|² / (2 (1 - ᾱ_t)) + constant. We take its class. (A vote of all x_0, weighted
    by q(x_t | x_0), would be right a little more often.)
    x (N, D), y (N,), eps (500, D).  All but the last 500 are the neighbours to choose from."""
    from sklearn.neighbors import KNeighborsClassifier
    nearest = KNeighborsClassifier(1).fit(s.alpha_bar[t].sqrt() * x[:-500], y[:-500])
    return nearest.score(s.q_sample(x[-500:], t, eps), y[-500:])

def main(args):
    """Draw schedules.png and destruction.png; how long does structure last?  -> {name: numbers}"""
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits, make_swiss_roll
    from sklearn.preprocessing import scale
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(f"error: --out {args.out}: {e}", file=sys.stderr)
        sys.exit(2)
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x) / 8 - 1  # grey levels 0..16 -> [-1, 1]
    roll, angle = make_swiss_roll(2000, noise=0.02, random_state=args.seed)
    roll = torch.tensor(scale(roll[:, [0, 2]]))  # (2000, 2), of variance 1
    rank = angle.argsort().argsort()  # argsort twice: how many points come before this one?
    piece = 10 * rank // len(angle)  # ten pieces of the spiral, of 200 points each
    torch.manual_seed(args.seed)
    eps, eps_roll = torch.randn_like(x[-500:]), torch.randn_like(roll)  # the same noise for all

    ts = torch.linspace(0, args.T, min(args.T, 50) + 1).round().long()
    columns = (args.T * torch.linspace(0, 1, 6) ** 2.5).round().long()  # dense at first
    curves = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = curves.subplots(2, 2).ravel()
    pictures = Figure(figsize=(8.5, 0.72 * len(SCHEDULES)), layout="constrained")
    table = pictures.subplots(len(SCHEDULES), 12, subplot_kw=dict(xticks=[], yticks=[]))
    metrics = {}
    print("Readable: the share of steps at which a nearest neighbour gets more than half right.")
    print(f"{'schedule':<12}{'signal left at T':>18}{'digits readable':>18}{'roll readable':>16}")
    for name, row in zip(SCHEDULES, table):
        s = make_schedule(name, args.T)
        of_digits = torch.tensor([readable_share(s, t, x, y, eps) for t in ts])
        of_roll = torch.tensor([readable_share(s, t, roll, piece, eps_roll[-500:]) for t in ts])
        numbers = {"signal_left": s.alpha_bar[-1].sqrt().item(),
                   "structure_share": (of_digits[1:] > 0.5).double().mean().item(),
                   "structure_share_roll": (of_roll[1:] > 0.5).double().mean().item()}
        metrics[name] = numbers
        print(f"{name:<12}{numbers['signal_left']:>18.4f}{numbers['structure_share']:>18.2f}"
              f"{numbers['structure_share_roll']:>16.2f}")

        for ax, values in zip(axes, (s.beta, s.alpha_bar.sqrt(), s.snr.log())):
            ax.plot(time_from_0_to_1(args.T)[1:].numpy(), values[1:].numpy(), label=name)
        axes[3].plot((ts / args.T).numpy(), of_digits.numpy())
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for t, left, right in zip(columns, row[:6], row[6:]):
            left.plot(*s.q_sample(roll, t, eps_roll).T.numpy(), "k.", ms=1.2, mew=0)
            left.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
            digit = s.q_sample(x[:1], t, eps[:1]).reshape(8, 8)
            right.imshow(digit.numpy(), cmap="gray", vmin=-1, vmax=1)

    titles = ("β", "√ᾱ, the signal left", "log SNR", "accuracy on noised digits")
    for ax, title in zip(axes, titles):
        ax.set(title=title, xlabel="t/T")
    axes[0].set_yscale("log")
    curves.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for ax, t in zip(table[0], [*columns, *columns]):
        ax.set_title(f"t={t}", fontsize=10)
    curves.savefig(f"{args.out}/schedules.png", dpi=150)
    pictures.savefig(f"{args.out}/destruction.png", dpi=150)
    text = json.dumps({"config": vars(args), **metrics}, indent=1)
    Path(args.out, "metrics.json").write_text(text, encoding="utf-8")
    print(f"The figures are {args.out}/schedules.png and {args.out}/destruction.png")
    return metrics

def get_args(argv=None):
    p = argparse.ArgumentParser(description="Draw every noise schedule and what it does to data.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"error: {message}\n")  # a user's mistake in one line
    p.add_argument("--T", type=int, default=1000, help="number of diffusion steps, at least 2")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise")
    p.add_argument("--out", default="runs/schedules", help="folder for the figures")
    args = p.parse_args(argv)
    if args.T < 2 or not 0 <= args.seed < 2 ** 32 or not args.out:
        p.error("--T must be at least 2, --seed from 0 to 4294967295, and --out a folder")
    return args

if __name__ == "__main__":
    main(get_args())

"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics.  Sohl-Dickstein et al. 2015.

The paper is arXiv 1503.03585. Its idea is to destroy the structure of data x_0 by T small steps of
noise, until x_T is a draw from a simple distribution π. This is the forward process q. The reverse
of a small step has the same form as the step itself, Gaussian or binomial (Sec. 2.2). So a network
only has to learn the parameters of each reverse step p(x_{t-1} | x_t). Started from x_T ~ π, the
reverse steps generate data.

Training maximises K, a lower bound on the mean log-likelihood E log p(x_0) of the data, Eq. (14):

    K = - Σ_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
        + H_q(X_T|X_0) - H_q(X_1|X_0) - H_p(X_T)

E is the mean over data x_0 and over x_t drawn from q(x_t | x_0). H_q(X_t|X_0) is the entropy of
q(x_t | x_0) and H_p(X_T) is that of π. Given x_0 and x_t, every term has a closed form.

Where it comes from. By Jensen's inequality, log p(x_0) is at least
E_q log p(x_0, ..., x_T) / q(x_1, ..., x_T | x_0). This is the mean, under q, of
log π(x_T) + Σ_t log p(x_{t-1} | x_t) / q(x_t | x_{t-1}). By Bayes' rule, for t ≥ 2,

    q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x_0) · q(x_t | x_0) / q(x_{t-1} | x_0)

The first factor makes the KL of each step. Of the others, when their logarithms are added up, all
cancel but q(x_T | x_0) and q(x_1 | x_0), whose mean logarithms are minus their entropies. The sum
starts at t = 2 because the last step p(x_0 | x_1) is not learned: it is the forward step with β_1,
and adds nothing to K, as `reverse` shows. DDPM's bound, its Eq. (5), is -K, except that there the
last step is learned. In -K, the part H_p(X_T) - H_q(X_T|X_0) is DDPM's L_T, the KLs are its
L_{t-1}, and H_q(X_1|X_0) stands in place of its L_0 = E -log p(x_0 | x_1), because here
E log p(x_0 | x_1) is E log q(x_1 | x_0).

Eq. (14) assumes that -E log π(x_t) is the same for every t. As ᾱ_t goes to 0, x_t becomes a draw
from π and this value becomes H_p(X_T), the entropy of π; if it is the same for every t, it is
H_p(X_T) everywhere. This is why the Swiss roll is standardised. log π is a constant less half the
sum of squares of the coordinates; each has mean 0 and variance 1, as under π, and x_t keeps both at
every t. For the same reason the bits of π are 1 as often as those of the heartbeat data.

    python sohl_dickstein_2015.py                       # Swiss roll, T = 40, β is learned too
    python sohl_dickstein_2015.py --dataset heartbeat   # binary sequences, T = 2000
    python sohl_dickstein_2015.py --checkpoint runs/sohl_dickstein_2015-swiss_roll/checkpoint.pt

Expect a K of about 2.6 bits on the roll after some minutes on one CPU core. No model can exceed 2.7
there, the ceiling. The heartbeat's K comes within 0.05 bits of its ceiling, log2(1/5).

Differs from the paper, most important first:
  - Our networks predict moments of x_0 given x_t; p is computed from them. The paper's predict p.
  - Ours get ᾱ_t as an input. The paper's have a readout layer for each t.
  - Our covariance f_sigma is a full matrix. The paper's is diagonal, kept below 1 by a sigmoid.
  - The roll's network is an MLP with sines of x_t. The paper's has radial basis functions.
  - The roll's noise, on which K depends, is our choice: the paper does not give its own.
  - Beside the paper's rule for posteriors, Eqs. (22) and (23), there is our own, `given`.
  - The heartbeat's network gets a log-likelihood ratio for each bit. The paper's gets the bit.
  - We standardise each coordinate of the roll. The paper divides both by one number.
  - β_T of the heartbeat is 0.999, not 1.
  - The figure shows scores, where the paper's Fig. 1 shows the drift f_mu(x_t, t) - x_t.
  - The optimiser is Adam, with clipped gradients. The paper's is SFO, a quasi-Newton method.

As in DDPM, ᾱ_t = (1 - β_1) ... (1 - β_t); schedules.py, to be read first, says more of it. Here
it is the share of the variance of x_t that comes from x_0 or, for a bit, the probability that it is
still that of x_0: in step t a bit is drawn anew from π with probability β_t.

Shapes: B is the batch. D is the number of coordinates of x: 2 for the roll, 20 for the heartbeat.
t is (B,), integers. ᾱ_t for each example is (B, 1), made by extract(s.alpha_bar, t, x0). All is
float64, because 1 - ᾱ_1 is 1e-7 and float32 numbers just below 1 are 6e-8 apart. Only the layers of
the networks are float32.
"""
import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, kl_divergence
from tqdm import tqdm

from schedules import SCHEDULES, Schedule, beta_of_alpha_bar, extract, make_schedule

# -------------------------------------------------------------------------------------------------
# Sec. 2.1 and Table App.1: the forward process q(x_t | x_0)
# -------------------------------------------------------------------------------------------------

def isotropic(mean, variance):
    """N(mean, variance · I).  mean (B, D); variance (B, 1), or a tensor () for all

    Its class is the Gaussian with a full covariance matrix, because p has one, and torch computes a
    KL only between two Gaussians of the same class. The arguments are not checked, to save time."""
    std = variance.sqrt().expand_as(mean)
    return MultivariateNormal(mean, scale_tril=torch.diag_embed(std), validate_args=False)

def gaussian_q(x0, alpha_bar):
    """Gaussian diffusion: q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I).

        xt = gaussian_q(x0, extract(s.alpha_bar, t, x0)).sample()

    x0 (B, D);  alpha_bar (B, 1), or a tensor () for all.  -> B distributions"""
    return isotropic(alpha_bar.sqrt() * x0, 1 - alpha_bar)

# P(a bit is 1) under π. It is 1/5 as in the heartbeat data (App. D.1.2), so that Eq. (14) holds.
# The paper's Table App.1 has 0.5, but its L_null of -14.4 bits for 20 bits is that of 0.2.
RHO = 0.2

def bernoulli(rate):
    """B(rate): D independent bits, each 1 with its own probability.  rate (B, D)"""
    return Independent(Bernoulli(rate, validate_args=False), 1)

def binomial_q(x0, alpha_bar):
    """Binomial diffusion: q(x_t | x_0) = B(ᾱ_t x_0 + (1 - ᾱ_t) ρ).

    A bit of x_t is still that of x_0 with probability ᾱ_t. Otherwise it has been drawn anew from π,
    where it is 1 with probability ρ.
    x0 (B, D) of 0. and 1.;  alpha_bar (B, 1), or a tensor () for all.  -> B distributions"""
    return bernoulli(alpha_bar * x0 + (1 - alpha_bar) * RHO)

# -------------------------------------------------------------------------------------------------
# Sec. 2.2: the reverse process p(x_{t-1} | x_t), for t = T..2
# -------------------------------------------------------------------------------------------------

def gaussian_posterior(s, xt, t, x0):
    """q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I), which p has to match in Eq. (14).

    μ̃_t = a_t x_0 + b_t x_t, by Ho et al. 2020, Eq. (7), which schedules.py derives:

        a_t = √ᾱ_{t-1} β_t / (1 - ᾱ_t),   b_t = √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t),
        β̃_t = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) β_t

    xt, x0 (B, D);  t (B,) in 2..T.  -> B distributions"""
    mu_tilde, beta_tilde = s.q_posterior(x0, xt, t)
    return isotropic(mu_tilde, beta_tilde)

def gaussian_p(s, xt, t, moments):
    """p(x_{t-1} | x_t) = N(f_mu, f_sigma), from the mean x̂_0 and covariance S of x_0 given x_t.

        f_mu = a_t x̂_0 + b_t x_t,   f_sigma = β̃_t I + a_t² S

    Think of drawing x_{t-1} in two steps: first x_0 given x_t, then x_{t-1} from
    N(a_t x_0 + b_t x_t, β̃_t I). By the law of total variance, the covariance of the result is the
    mean of the second step's covariance, β̃_t I, plus the covariance of its mean, a_t² S. Among all
    Gaussians, the one with this mean and covariance has the smallest KL in Eq. (14) on average over
    x_0 given x_t, whatever its distribution: the average of KL(q(x_{t-1} | x_t, x_0) || p) is
    KL(q(x_{t-1} | x_t) || p) plus a term without p. And of all Gaussians p, the one with the mean
    and covariance of a distribution q has the smallest KL(q || p).

        x_prev = gaussian_p(s, xt, t, net(xt, extract(s.alpha_bar, t, xt))).sample()

    moments: x̂_0 (B, D), S (B, D, D).  -> B distributions"""
    x0_hat, S = moments
    a, b = s.posterior_coefficients(xt, t)
    f_mu = a * x0_hat + b * xt
    identity = torch.eye(xt.shape[1], dtype=xt.dtype, device=xt.device)
    beta_tilde = extract(s.beta_tilde, t, S)  # (B, 1, 1)
    f_sigma = beta_tilde * identity + a[:, :, None] ** 2 * S
    # cholesky would raise an error on NaN. cholesky_ex returns NaN, which train_step sees in K.
    L = torch.linalg.cholesky_ex(f_sigma).L
    return MultivariateNormal(f_mu, scale_tril=L, validate_args=False)

def log_likelihood_ratio(xt, alpha_bar):
    """log q(x_t | x_0 = 1) - log q(x_t | x_0 = 0) for each bit: how much x_t speaks for x_0 = 1.

    With α_t in place of ᾱ_t it is log q(x_t | x_{t-1} = 1) - log q(x_t | x_{t-1} = 0).
    xt (B, D), alpha_bar (B, 1) -> (B, D)"""
    rate_if_0 = (1 - alpha_bar) * RHO  # q(x_t = 1 | x_0 = 0)
    rate_if_1 = rate_if_0 + alpha_bar  # q(x_t = 1 | x_0 = 1)
    ratio_if_xt_is_1 = (rate_if_1 / rate_if_0).log()
    ratio_if_xt_is_0 = ((1 - rate_if_1) / (1 - rate_if_0)).log()
    return torch.where(xt == 1, ratio_if_xt_is_1, ratio_if_xt_is_0)

def binomial_posterior(s, xt, t, x0):
    """q(x_{t-1} | x_t, x_0) for bits: by Bayes' rule, q(x_{t-1} | x_0) times q(x_t | x_{t-1}).

    In log-odds, log P(1) - log P(0), the product is a sum: the log-odds of x_{t-1} given x_0, plus
    what x_t says of x_{t-1}.
    xt, x0 (B, D);  t (B,) in 2..T.  -> B distributions"""
    rate = binomial_q(x0, extract(s.alpha_bar, t - 1, x0)).mean  # P(x_{t-1} = 1 | x_0)
    log_odds = rate.logit() + log_likelihood_ratio(xt, extract(s.alpha, t, xt))
    return bernoulli(log_odds.sigmoid())

def binomial_p(s, xt, t, rate):
    """p(x_{t-1} | x_t) = B(f_b), from the probability that each bit of x_0 is 1, given x_t.

        f_b = rate · P(x_{t-1} = 1 | x_t, x_0 = 1) + (1 - rate) · P(x_{t-1} = 1 | x_t, x_0 = 0)

        x_prev = binomial_p(s, xt, t, net(xt, extract(s.alpha_bar, t, xt))).sample()

    xt, rate (B, D);  t (B,) in 2..T.  -> B distributions"""
    f_b_if_1 = binomial_posterior(s, xt, t, torch.ones_like(xt)).mean
    f_b_if_0 = binomial_posterior(s, xt, t, torch.zeros_like(xt)).mean
    return bernoulli(rate * f_b_if_1 + (1 - rate) * f_b_if_0)

# Sampling and training are the same for both kinds of diffusion. They take one of these two as
# `kind`, and call kind.q(x0, alpha_bar), kind.posterior(s, xt, t, x0), kind.p(s, xt, t, net(...)).
GAUSSIAN = SimpleNamespace(q=gaussian_q, posterior=gaussian_posterior, p=gaussian_p)
BINOMIAL = SimpleNamespace(q=binomial_q, posterior=binomial_posterior, p=binomial_p)

def prior(kind, x0):
    """π, for as many examples as x0 has: q(x_t | x_0) at ᾱ_t = 0, where nothing of x_0 is left."""
    return kind.q(x0, torch.zeros_like(x0[:, :1]))

@torch.no_grad()
def reverse(kind, s, net, x, modify=lambda p: p):
    """The generative process, Eqs. (4) and (5), from x = x_T ~ π.  Yields (t, x_t) for t = T-1..0.

        x0 = end_of(reverse(GAUSSIAN, s, net, torch.randn(1000, 2, dtype=torch.float64)))

    Its end looks like a mistake: x_0 is drawn by *adding* noise to x_1. But this is Eq. (44), where
    p(x_0 | x_1) is the forward step with β_1. It does little harm, because β_1 is so small that x_1
    is nearly x_0 already. And it makes K simple. If x_0 ~ π, a forward step is its own reverse, so
    π(x_0) q(x_1 | x_0) = π(x_1) p(x_0 | x_1). Hence step 1 adds E log p(x_0 | x_1) / q(x_1 | x_0) =
    E log π(x_0) - E log π(x_1) to K, and this is 0 where E log π(x_t) is the same for every t.

    x (B, D);  modify: a function of p that returns what to draw from; see `times_r`"""
    x = x.double()
    for step in range(s.T, 1, -1):
        t = torch.full((len(x),), step, device=x.device)
        p = kind.p(s, x, t, net(x, extract(s.alpha_bar, t, x)))
        x = modify(p).sample()
        yield step - 1, x
    yield 0, modify(kind.q(x, s.alpha_bar[1])).sample()

def end_of(chain):
    """The x_0 with which a chain like reverse(...) ends.  (B, D)"""
    for _, xt in chain:
        x = xt
    return x

# -------------------------------------------------------------------------------------------------
# Secs. 2.3 and 2.4: the bound, and training
# -------------------------------------------------------------------------------------------------

def kl_and_entropies(kind, s, net, x0, t):
    """The parts of K for each example, in bits: the KL of step t at one x_t ~ q(x_t | x_0), and the
    entropies of Eq. (14),

        H_q(X_T|X_0) - H_q(X_1|X_0) - H_p(X_T)

    x0 (B, D), float64;  t (B,) in 2..T.  -> (B,), (B,)"""
    alpha_bar = extract(s.alpha_bar, t, x0)
    q = kind.q(x0, alpha_bar)
    # rsample draws as sample does, but lets the gradient pass to β: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε
    # depends on β while the noise ε is frozen (Sec. 2.4.1). There is no such formula for bits, and
    # their β is not learned.
    xt = q.rsample() if q.has_rsample else q.sample()
    p = kind.p(s, xt, t, net(xt, alpha_bar))
    kl = kl_divergence(kind.posterior(s, xt, t, x0), p)
    H_q_T = kind.q(x0, s.alpha_bar[-1]).entropy()
    H_q_1 = kind.q(x0, s.alpha_bar[1]).entropy()
    H_p_T = prior(kind, x0).entropy()
    return kl / math.log(2), (H_q_T - H_q_1 - H_p_T) / math.log(2)

def K_estimate(s, kl, entropies):
    """K of Eq. (14) from the parts above. The sum over t = 2..T is T - 1 times the mean over t.

    kl is that mean or, for an unbiased estimate, the KL of one t that is drawn evenly from 2..T.
    kl, entropies (B,) -> (B,)"""
    return entropies - (s.T - 1) * kl

@torch.no_grad()
def at_every_step(measure, kind, s, net, x0, seed=0):
    """Call measure(kind, s, net, x0, t) for t = 2..T.  -> its outputs, (number of outputs, T-1, B)

    measure is kl_and_entropies or entropy_of_step. The same seed draws the same noise, so that two
    networks compare. Random numbers outside are not touched, so it may be called while training."""
    outputs = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in tqdm(range(2, s.T + 1), "measuring", leave=False):
            t = torch.full((len(x0),), step, device=x0.device)
            outputs.append(torch.stack(measure(kind, s, net, x0.double(), t)))
    return torch.stack(outputs, 1)

def evaluate(kind, s, net, x0, seed=0):
    """An estimate of K for each x_0 from all t, and the mean KL of each step, in bits.

        K, kl_of_step = evaluate(GAUSSIAN, s, net, x0)
        print(K.mean())  # how good the model is: compare it with the ceiling, -H(X_0)

    x0 (B, D), of any floating type -> (B,), (T-1,) for t = 2..T"""
    kl, entropies = at_every_step(kl_and_entropies, kind, s, net, x0, seed)
    return K_estimate(s, kl.mean(0), entropies[0]), kl.mean(1)

def learned_schedule(beta_logits):
    """The Schedule with β_t = sigmoid(beta_logits[t - 1]). All but β_1 may be learned, Sec. 2.4.1.

    β_1 stays as it is, or the model would overfit: it could put an ever narrower peak around each
    training example, and K would grow without bound as β_1 goes to 0.  beta_logits (T,)"""
    logits = torch.cat([beta_logits[:1].detach(), beta_logits[1:]])
    beta = logits.sigmoid().clamp(1e-15, 0.999)  # Schedule demands 0 < β < 1; 0.999 as in schedules
    return Schedule(nn.functional.pad(beta, (1, 0)))  # puts β_0 = 0 in front

def train_step(kind, net, opt, x0):
    """One step of training, Eq. (15): follow the gradient of K, estimated at one t per example.

        net = RollNet(start_beta("learned", 40), learned=True)
        opt = torch.optim.Adam(net.parameters(), 4e-3, betas=(0.9, 0.99))
        for step in range(6000):  # the script lets the learning rate fall to 0 meanwhile
            x0 = draw_roll(2048, 0.02, seed=step)  # a new batch (B, 2), standardised; your data
            K = train_step(GAUSSIAN, net, opt, x0)
        s = learned_schedule(net.beta_logits.detach())  # the β that were learned, for `reverse`

    Raises FloatingPointError, and leaves net as it was, if K or its gradient is not finite.
    net: moments of x_0, as RollNet or HeartbeatNet gives. It holds β too, as net.beta_logits (T,):
    the schedule is made from these at each step.
    x0 (B, D), of any floating type.  -> K in bits, (); the larger the better, it is not a loss"""
    x0 = x0.double()
    s = learned_schedule(net.beta_logits)
    t = torch.randint(2, s.T + 1, (len(x0),), device=x0.device)
    kl, entropies = kl_and_entropies(kind, s, net, x0, t)
    loss = -K_estimate(s, kl, entropies).mean()
    opt.zero_grad()
    loss.backward()
    # The largest norm in our runs is 20 to 30. Only a step that would ruin the network exceeds 100.
    norm = nn.utils.clip_grad_norm_(net.parameters(), 100)
    if not (loss.isfinite() and norm.isfinite()):
        raise FloatingPointError("K or its gradient is not finite; try a smaller learning rate")
    opt.step()
    return -loss.detach()

# -------------------------------------------------------------------------------------------------
# Sec. 2.5: multiply p(x_0) by a function r(x_0), to get a posterior
# -------------------------------------------------------------------------------------------------

# Here r(x_0) is the likelihood of an observation y that is x_0 plus Gaussian noise:
#     r(x_0) = Π_i N(y_i; x_0i, 1 / precision_i)
# Then p(x_0) r(x_0) / Z is the posterior of x_0 given y. A precision of 0 says that coordinate i is
# not observed. To denoise, we observe all of x_0 with noise; to inpaint, some of it nearly exactly.

def multiply_by_r(mean, C, y, precision):
    """The mean and the covariance of N(x; mean, C) r(x) / Z, which is a Gaussian as well.

        C' = (C⁻¹ + P)⁻¹ = (I + C P)⁻¹ C,   mean' = mean + C' P (y - mean),   P = diag(precision)

    Precisions add up, and the mean moves towards y.  mean (B, D), C (B, D, D); y, precision (D,)"""
    identity = torch.eye(len(y), dtype=C.dtype, device=C.device)
    C = torch.linalg.solve(identity + C * precision, C)  # C * precision is C P
    pull = precision * (y - mean)
    return mean + (C @ pull[:, :, None])[:, :, 0], C

def times_r(p, y, precision):
    """The paper's rule: multiply each reverse step by r, and take the same r for every t.

        p̃(x_{t-1} | x_t) = p(x_{t-1} | x_t) r(x_{t-1}) / Z(x_t),   Eq. (22)
        r(x_t) = r(x_0), with x_t put in the place of x_0,         Eq. (23)

        modify = partial(times_r, y=y, precision=precision)  # y, precision: as in `given`, below
        pi = prior(GAUSSIAN, torch.zeros(1000, 2, dtype=torch.float64))  # of this shape
        xT = modify(pi).sample()  # π is multiplied by r too, Eq. (16)
        x0 = end_of(reverse(GAUSSIAN, s, net, xT, modify))

    The product is exact, as Sec. 2.5.3 allows; Table App.1 moves only the mean, to first order.
    Eq. (23) is a choice. The paper also names r(x_0)^((T - t) / T). The r that leads to the exact
    posterior is E[r(x_0) | x_t], which becomes broader as t grows, because x_t then says less about
    x_0. `given` takes that one. p: B Gaussians;  y, precision (D,).  -> B Gaussians"""
    mean, C = multiply_by_r(p.mean, p.covariance_matrix, y, precision)
    return MultivariateNormal(mean, C, validate_args=False)

def given(net, y, precision, xt, alpha_bar):
    """Our rule: give p the moments of x_0 given x_t *and y*. They come from Bayes' rule,

        p(x_0 | x_t, y) = p(x_0 | x_t) r(x_0) / Z

    because y depends on x_0 alone. In this formula and the next two, p is a perfect model: it has
    the exact distributions of q started from the data. Given x_{t-1}, x_0 does not depend on x_t
    any more. So by Bayes' rule

        q(x_{t-1} | x_t, x_0) p(x_0 | x_t) = p(x_{t-1} | x_t) p(x_0 | x_{t-1})

    Multiply both sides by r(x_0), and integrate over x_0. By the first formula, p(x_0 | x_t) r(x_0)
    is Z(x_t) p(x_0 | x_t, y) with Z(x_t) = E[r(x_0) | x_t]. So the left side becomes Z(x_t) times
    the average of q(x_{t-1} | x_t, x_0) over x_0 given x_t and y, which is p(x_{t-1} | x_t, y):

        p(x_{t-1} | x_t, y) = p(x_{t-1} | x_t) r(x_{t-1}) / Z(x_t)

    with r(x_{t-1}) = E[r(x_0) | x_{t-1}]. This is Eq. (22) with the r that leads to the exact
    posterior.

        y = torch.tensor([0.5, -0.3], dtype=torch.float64)
        precision = torch.tensor([4.0, 0.0], dtype=torch.float64)  # 0: y_2 is not observed
        xT = torch.randn(1000, 2, dtype=torch.float64)  # x_T says nothing of x_0, so it needs no r
        x0 = end_of(reverse(GAUSSIAN, s, partial(given, net, y, precision), xT))

    It is exact if p(x_0 | x_t) is Gaussian, where the paper's rule is biased. On the roll
    p(x_0 | x_t) has several modes, one on each turn nearby, and neither rule is exact. Which is
    nearer to the exact posterior depends on y and on the roll's noise: ours more often, but not
    always. `measure_posteriors`, below, compares the two for one y.
    net: any that returns moments, as RollNet does;  xt (B, D), alpha_bar (B, 1);  y, precision (D,)
    -> moments as of net: (B, D), (B, D, D)"""
    x0_hat, S = net(xt, alpha_bar)
    return multiply_by_r(x0_hat, S, y, precision)

# -------------------------------------------------------------------------------------------------
# Sec. 2.6: what the entropy of a reverse step can be
# -------------------------------------------------------------------------------------------------

@torch.no_grad()
def entropy_of_step(kind, s, net, x0, t):
    """Bounds from q alone on the entropy of the reverse step t, Eq. (24), and the entropy of our p.

        H_q(X_t|X_{t-1}) + H_q(X_{t-1}|X_0) - H_q(X_t|X_0)  ≤  H_q(X_{t-1}|X_t)  ≤  H_q(X_t|X_{t-1})

    The left side is H_q(X_{t-1}|X_t,X_0): to know x_0 as well can only lower an entropy. The right
    inequality holds if H_q(X_{t-1}) ≤ H_q(X_t). This is true of standardised data and of bits of
    rate ρ: there E log π(x_t) is the same for all t, so that H_q(X_t) is a constant minus
    KL(q(x_t) || π). If two distributions go through the same step, their KL cannot grow (the data
    processing inequality). As a step turns π into π, KL(q(x_t) || π) cannot grow, and H_q(X_t)
    never falls.

    If the moments are exact, the mean entropy of p exceeds the left side by the KL of step t in
    Eq. (14). That KL is the mean of -log p(x_{t-1} | x_t), less the left side. And -log p is
    quadratic in x_{t-1} (for bits, linear), so its mean depends only on the mean and covariance of
    x_{t-1} given x_t. If p has the same two, it is the mean under p itself: the entropy of p.

    With exact moments, the mean entropy of p is also at most the right side.
      - The roll: the guess √ᾱ_t x_t of each coordinate of x_0 has an error of variance 1 - ᾱ_t, so
        the mean of S over x_t has diagonal entries of at most that, and the mean of f_sigma has
        entries of at most β̃_t + a_t² (1 - ᾱ_t) = β_t there. The mean of log det f_sigma is at most
        log det of that mean, as log det is concave. This is at most the sum of the logarithms of
        its diagonal entries (Hadamard), and so at most log det β_t I, that of a step of q.
      - Bits: given all of x_t, the entropy of a bit of x_{t-1} is at most its entropy given only
        the same bit of x_t. Both bits have the rate ρ, and so the same entropy. Hence the entropy
        of the one given the other is that of the other given the one, which is that of a step of q.

        left, ours, right = entropy_of_step(GAUSSIAN, s, net, x0, t)

    x0 (B, D);  t (B,) in 2..T.  -> left, ours, right in bits, for a draw of x_t: (B,) each"""
    alpha_bar_prev, alpha_bar = extract(s.alpha_bar, t - 1, x0), extract(s.alpha_bar, t, x0)
    q_prev = kind.q(x0, alpha_bar_prev)
    q_step = kind.q(q_prev.sample(), extract(s.alpha, t, x0))  # one step: α_t in place of ᾱ_t
    xt = q_step.sample()
    right = q_step.entropy()
    left = right + q_prev.entropy() - kind.q(x0, alpha_bar).entropy()
    ours = kind.p(s, xt, t, net(xt, alpha_bar)).entropy()
    return left / math.log(2), ours / math.log(2), right / math.log(2)

# -------------------------------------------------------------------------------------------------
# The networks. The roll's is our own; the heartbeat's has the layers of App. D.1.2. Both hold β.
# -------------------------------------------------------------------------------------------------

def start_beta(schedule, T):
    """β_1..β_T to start from: those of a schedule or, for "learned", with evenly spaced log-SNR.

    "learned" means only this starting point. Whether β is then trained is decided by RollNet's
    argument `learned`.

    The signal-to-noise ratio is SNR = ᾱ / (1 - ᾱ). Its log falls from 16 to -6. At 16 the noise in
    x_1 has variance e^-16 = 1e-7, far below that of the roll's own noise, 1e-5. At -6 only
    √ᾱ_T = 0.05 of the signal is left in x_T.  -> (T,)"""
    if schedule != "learned":
        return make_schedule(schedule, T).beta[1:]
    alpha_bar = torch.linspace(16, -6, T, dtype=torch.float64).sigmoid()
    alpha_bar = nn.functional.pad(alpha_bar, (1, 0), value=1)  # puts ᾱ_0 = 1 in front
    return beta_of_alpha_bar(alpha_bar)[1:]

def mlp(widths, activation):
    """Linear layers from widths[0] to widths[-1], activations in between. The last starts at 0."""
    layers = []
    for inputs, outputs in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(inputs, outputs), activation()]
    layers.pop()  # no activation behind the last layer
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)

class RollNet(nn.Module):
    """x_t, ᾱ_t -> the mean x̂_0 and the covariance S of x_0 given x_t.

        x̂_0 = √ᾱ_t x_t + √(1 - ᾱ_t) g,   S = (1 - ᾱ_t) L Lᵀ

    The layers compute g and the triangular matrix L. In a new network g = 0 and L = I, which gives
    the right moments for data from N(0, I). So training starts from K = L_null, the mean
    log-likelihood of the data under π.
    beta (T,) is of start_beta; learned says whether it is trained.
    xt (B, 2), alpha_bar (B, 1) -> (B, 2), (B, 2, 2)"""
    def __init__(self, beta, learned=False, width=128):
        super().__init__()
        self.layers = mlp([67, width, width, width, width, 5], nn.SiLU)  # 67 = 2 + 1 + 64 inputs
        self.beta_logits = nn.Parameter(beta.logit(), requires_grad=learned)

    def forward(self, xt, alpha_bar):
        x = xt.float()
        # Layers that see only x learn smooth functions first, but the moments change quickly from
        # one turn of the roll to the next. Sines of x give them detail. The shortest of 16 waves
        # has the length 2π / 16 = 0.4, which is less than half the distance of two turns, 0.9.
        waves = (x[:, :, None] * torch.arange(1, 17, device=x.device)).flatten(1)  # (B, 32)
        log_snr = alpha_bar.logit().float()  # from 16 to -6; a quarter of it is about as large as x
        out = self.layers(torch.cat([x, log_snr / 4, waves.sin(), waves.cos()], 1)).to(xt.dtype)
        g, log_diagonal, below = out.split([2, 2, 1], 1)
        L = torch.diag_embed(log_diagonal.exp())
        L[:, 1, 0] = below[:, 0]
        x0_hat = alpha_bar.sqrt() * xt + (1 - alpha_bar).sqrt() * g
        return x0_hat, (1 - alpha_bar)[:, :, None] * L @ L.mT

class HeartbeatNet(nn.Module):
    """x_t, ᾱ_t -> P(x_0 = 1 | x_t) for each bit.  (B, 20), (B, 1) -> (B, 20)

    The layers get the log-likelihood ratio of each bit, which says what the bit is worth: much at
    small t, nothing at T. So they need no t. Ratios lie between -8 and 9. A quarter of that does
    not yet saturate the sigmoids of the first layer, where the gradient would vanish."""
    def __init__(self, beta, width=50):
        super().__init__()
        self.layers = mlp([20, width, width, width, 20], nn.Sigmoid)
        self.beta_logits = nn.Parameter(beta.logit(), requires_grad=False)

    def forward(self, xt, alpha_bar):
        ratio = log_likelihood_ratio(xt, alpha_bar).float()
        return self.layers(ratio / 4).sigmoid().to(xt.dtype)

# -------------------------------------------------------------------------------------------------
# Not in the paper: the score; what a perfect network would answer; the highest K there can be
# -------------------------------------------------------------------------------------------------

def score_of_x0_hat(x0_hat, xt, alpha_bar):
    """The score ∇ log q(x_t) = (√ᾱ_t x̂_0 - x_t) / (1 - ᾱ_t), where x̂_0 = E[x_0 | x_t].

    It is ∇ log q(x_t | x_0), averaged over x_0 given x_t. Because f_mu is linear in x̂_0, whoever
    learns f_mu has learned the score (Vincent 2011).

        x0_hat, S = net(xt, alpha_bar)
        arrows = score_of_x0_hat(x0_hat, xt, alpha_bar)

    x0_hat, xt (B, D), alpha_bar (B, 1) -> (B, D)"""
    return (alpha_bar.sqrt() * x0_hat - xt) / (1 - alpha_bar)

def moments_of_mixture(m, v, xt, alpha_bar):
    """The exact mean and covariance of x_0 given x_t, if x_0 is from one of n Gaussians at random.

    The j-th is N(m_j, diag(v)). Given x_t and j, x_0 has mean c m_j + d x_t and variance c v, where

        c = (1 - ᾱ_t) / u,   d = √ᾱ_t v / u,   u = ᾱ_t v + 1 - ᾱ_t

    These are averaged over j with the weights p(j | x_t) ∝ N(x_t; √ᾱ_t m_j, diag(u)). By the law of
    total variance, the covariance of the means is added to the average of the variances.

        exact = partial(moments_of_mixture, m, v)  # in place of a network
        x0 = end_of(reverse(GAUSSIAN, s, exact, xT))

    m (n, D), v (D,), xt (B, D), alpha_bar (B, 1) -> (B, D), (B, D, D)"""
    u = alpha_bar * v + 1 - alpha_bar  # the variance of x_t given j, (B, D)
    log_w = (alpha_bar.sqrt() * xt / u) @ m.T - (alpha_bar / u) @ (m ** 2).T / 2
    w = log_w.softmax(1)  # p(j | x_t), (B, n)
    mean_m = w @ m
    products = m[:, :, None] * m[:, None]  # m_j m_jᵀ, (n, D, D)
    mean_of_products = (w @ products.flatten(1)).unflatten(1, products.shape[1:])
    covariance_m = mean_of_products - mean_m[:, :, None] * mean_m[:, None]
    c = (1 - alpha_bar) / u
    d = alpha_bar.sqrt() * v / u
    S = c[:, :, None] * covariance_m * c[:, None] + torch.diag_embed(c * v)
    return c * mean_m + d * xt, S

def rates_of_sequences(sequences, xt, alpha_bar):
    """The exact P(x_0 = 1 | x_t) for each bit, if x_0 is one of n sequences, all equally likely.

    Bayes' rule: q(x_t | x_0 = sequence j) is, up to a factor, the exponential of the sum of the
    log-likelihood ratios at the ones of sequence j.
    sequences (n, D), xt (B, D), alpha_bar (B, 1) -> (B, D)"""
    weight = (log_likelihood_ratio(xt, alpha_bar) @ sequences.T).softmax(1)  # p(j | x_t), (B, n)
    return weight @ sequences

def ceiling_of_curve(m, v):
    """-H(X_0) = E log q(x_0) in bits, for a mixture along a smooth curve. No K can be higher.

    The n Gaussians N(m_j, diag(v)) must be nearer to each other than they are wide, and D = 2. In
    units of √v the curve is nearly a straight line, with noise of variance 1 across it. The entropy
    is a sum of two. For the position along the line it is the mean of log(n · length of a piece),
    as each piece between two neighbours has a probability of about 1/n. For the noise across it is
    ½ log 2πe. That leaves out what the noise adds beyond the two ends of the curve, and at its
    bends. For the roll the entropy comes out too low by 8e-4 bits if the noise is 0.02, and by 0.03
    bits if it is 1, the most that --noise allows. So -H(X_0), which is returned, is too high by as
    much, and still a ceiling.
    m (n, 2), v (2,) -> a number"""
    pieces = (m / v.sqrt()).diff(dim=0).norm(dim=1)  # their lengths
    along = (len(m) * pieces).log().mean()
    across = math.log(2 * math.pi * math.e) / 2
    nats = along + across + v.sqrt().log().sum()  # the last turns units of √v into those of x_0
    return -nats.item() / math.log(2)

# The paper ends here; the rest trains, measures and draws.

import argparse
import json
import sys
import time
from pathlib import Path

from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from sklearn.datasets import make_swiss_roll

# -------------------------------------------------------------------------------------------------
# Data whose distribution is known
# -------------------------------------------------------------------------------------------------

HEARTBEATS = torch.eye(5, dtype=torch.float64).repeat(1, 4)  # all five: a 1 at every 5th of 20 bits

def valid_share(x):
    """The share of the sequences that are heartbeats, all 20 bits of them.  (N, 20) -> a number"""
    same = (x[:, None] == HEARTBEATS).all(2)  # (N, 5)
    return same.any(1).double().mean().item()

def roll_density(noise):
    """scikit-learn's Swiss roll, seen from above and standardised, as a mixture of n Gaussians.

    It is the spiral φ (cos φ, sin φ), with φ uniform in [1.5π, 4.5π], plus noise. Neighbours among
    the n Gaussians along the spiral are nearer to each other than they are wide.
    -> their means (n, 2), their variances (2,), the mean and deviation of the roll (2,), (2,)"""
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

# -------------------------------------------------------------------------------------------------
# Mistakes and folders
# -------------------------------------------------------------------------------------------------

# Copied from ddpm_ho_2020.py
def fail(message):
    """End the run on a user's mistake: one line, and exit status 2."""
    tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)

def claim_folder(name, default):
    """Make the folder of a new run: the one called name or, without a name, the first that is free
    of default, default-2, default-3, ...  mkdir fails where there is one already, so that two runs
    that start at once never share a folder, and nothing of another run is touched.  -> Path"""
    names = [name] if name else [default] + [f"{default}-{n}" for n in range(2, 10_000)]
    for folder in map(Path, names):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    fail(f"--out {folder} is there already; choose a new name, as a run makes its folder")

def positive(text):
    """argparse's type for a number of things."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)

def not_empty(text):
    """argparse's type for names. An unset variable, as in --out "$UNSET", gives an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text

def open_device(name):
    """Compute something on the device: one that is not there ends the run here.  -> its name"""
    try:
        torch.zeros(2, device=name).sum().item()
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: {str(e).splitlines()[0]}")
    return name

# -------------------------------------------------------------------------------------------------
# Training and checkpoints
# -------------------------------------------------------------------------------------------------

SCRIPT = "sohl_dickstein_2015"

def load_checkpoint(path):
    """What train has saved at path."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file can raise anything
        fail(f"--checkpoint {path} could not be read ({type(e).__name__}): missing or damaged?")
    if not isinstance(state, dict) or state.get("script") != SCRIPT or "step" in state:
        fail(f"--checkpoint {path} is not of {SCRIPT}.py, or of an older version of it")
    return state

def train(args, kind, net, data, path):
    """args.steps times train_step, with a learning rate that falls to 0 along a cosine.

    -> what is saved at path"""
    opt = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    start = time.time()
    bar = tqdm(range(1, args.steps + 1), "training")
    for step in bar:
        torch.manual_seed(10 ** 9 * args.seed + step)
        opt.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        x0 = data[torch.randint(len(data), (args.batch,), device=data.device)]
        K = train_step(kind, net, opt, x0)
        bar.set_postfix(K=f"{K:.3f} bits", refresh=False)
    state = {"script": SCRIPT, "config": vars(args), "seconds": time.time() - start,
             "net": net.cpu().state_dict()}
    torch.save(state, path)
    return state

# -------------------------------------------------------------------------------------------------
# Figures
# -------------------------------------------------------------------------------------------------

def draw_table(path, titles, rows, pictures, marks):
    """A table of pictures, each of at most 2000 points (n, 2) or of arrows (n, 4).

    pictures[row][column];  marks[row]: x and y of a red line"""
    fig = Figure(figsize=(8.5, 8.5 * len(rows) / len(titles)), layout="constrained")
    table = fig.subplots(len(rows), len(titles), sharex=True, sharey=True)
    for axes, row, line, mark in zip(table, rows, pictures, marks):
        axes[0].set(ylabel=row, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
        for ax, points in zip(axes, line):
            if points.shape[1] == 4:
                ax.quiver(*points.T.numpy(), scale=20, width=0.006)
            else:
                ax.plot(*points[:2000].T.numpy(), "k.", ms=20 / len(titles), mew=0)
            ax.plot(*mark, "r-+", ms=20, mew=2, zorder=0)
    for ax, title in zip(table[0], titles):
        ax.set_title(title)
    fig.savefig(path, dpi=120)
    return fig

def draw_bound(path, s, kl, lost, left, ours, right):
    """β_t; both sides of Eq. (24), less the left one; what the network loses in each step.

    kl, lost, left, ours, right: (T-1,) each"""
    t = range(2, s.T + 1)
    fig = Figure(figsize=(8.5, 5.5), layout="constrained")
    top, centre, bottom = fig.subplots(3, sharex=True, height_ratios=(2, 3, 2))
    top.plot(t, s.beta[2:], ".-")
    top.set(title="the variance of each forward step", ylabel=r"$\beta_t$", yscale="log")
    centre.fill_between(t, 0, right - left, color="0.85", label="the band of Eq. (24)")
    centre.plot(t, ours - left, "ko", ms=8, mfc="none", label="entropy of $p(x_{t-1}|x_t)$")
    centre.plot(t, kl, ".-", label="KL that step t takes from K, Eq. (14)")
    centre.set(title="entropies of each reverse step, less $H_q(X_{t-1}|X_t, X_0)$", ylabel="bits")
    centre.legend()
    bottom.plot(t, lost, ".-")
    bottom.set(title="KL of each step, less that of exact moments", xlabel="t", ylabel="bits")
    fig.savefig(path, dpi=120)
    return fig

def draw_film(path, samples):
    """From x_T to x_0, in at most 60 frames, and x_0 for a second.  samples: {t: x_t}"""
    T = max(samples)
    ax = Figure(figsize=(3, 3)).add_axes((0, 0, 1, 1), xlim=(-3, 3), ylim=(-3, 3))
    dots = ax.scatter(*samples[T].T.numpy(), s=0.5, c="k")
    frames = [*range(T, 0, -1 - T // 60), *[0] * 10]
    film = FuncAnimation(ax.figure, lambda t: dots.set_offsets(samples[t].numpy()), frames)
    film.save(path, "pillow", fps=10)
    return ax.figure

# -------------------------------------------------------------------------------------------------
# Experiments. Each seeds itself and returns numbers, and what draws its figures: {file: function}.
# -------------------------------------------------------------------------------------------------

def measure_K(args, kind, s, net, exact, held_out):
    """K, what the network loses of it, and the entropies of Eq. (24).

    Exact moments take long to compute, but few examples suffice: on the same x_t, the two K's
    differ less from each other than from one example to the next."""
    K, kl = evaluate(kind, s, net, held_out, args.seed)
    few = held_out[:args.exact_samples]
    K_net, kl_net = evaluate(kind, s, net, few, args.seed)
    K_exact, kl_exact = evaluate(kind, s, exact, few, args.seed)
    entropies = at_every_step(entropy_of_step, kind, s, net, few, args.seed).mean(2)
    loss = (K_exact - K_net).mean().item()
    L_null = -prior(kind, few[:1]).entropy().item() / math.log(2)
    numbers = {
        "K_bits": K.mean().item(),
        "K_stderr_bits": K.std().item() / len(K) ** 0.5,
        "L_null_bits": L_null,
        "K_minus_L_null_bits": K.mean().item() - L_null,
        "network_loses_bits": loss,
        "K_exact_bits": K.mean().item() + loss,
        "KL_bits_of_step": kl.tolist()}
    return numbers, {"bound.png": partial(
        draw_bound, s=s, kl=kl, lost=kl_net - kl_exact,
        left=entropies[0], ours=entropies[1], right=entropies[2])}

def compare_schedules(args, kind, s, net, exact, held_out):
    """K with exact moments for each schedule of schedules.py."""
    few, numbers = held_out[:args.exact_samples], {}
    for name in SCHEDULES:
        K, _ = evaluate(kind, make_schedule(name, s.T), exact, few, args.seed)
        numbers[f"K_exact_bits_{name}"] = K.mean().item()
    return numbers, {}

@torch.no_grad()
def compare_with_q(args, kind, s, net, exact, held_out):
    """Fig. 1: draws of q, draws of p, and two scores: that of the network and the exact one."""
    torch.manual_seed(args.seed)
    xT = prior(kind, torch.zeros(2000, 2, dtype=torch.float64)).sample()
    samples = {s.T: xT} | dict(reverse(kind, s, net, xT))  # x_t of p, by t
    times = [max(2, s.T * quarter // 4) for quarter in range(5)]  # x_2 is nearly x_0
    columns = []
    for t in times:
        xt = kind.q(held_out[:2000], s.alpha_bar[t]).sample()
        few = xt[:100]
        alpha_bar = s.alpha_bar[t].expand(len(few), 1)
        column = [xt, samples[t]]
        for moments in (net, exact):
            score = score_of_x0_hat(moments(few, alpha_bar)[0], few, alpha_bar)
            arrows = score / score.norm(dim=1).mean()  # each picture has its own scale
            column.append(torch.cat([few, arrows], 1))
        columns.append(column)
    table = partial(
        draw_table, titles=[f"t = {t}" for t in times],
        rows=["q(x_t)", "p(x_t)", "score, network", "score, exact"],
        pictures=list(zip(*columns)), marks=[([], [])] * 4)
    return {}, {"swiss_roll.png": table, "reverse.gif": partial(draw_film, samples=samples)}

def wasserstein(a, b):
    """The Wasserstein-1 distance of two sets in the worse of both coordinates.  (n, 2), (m, 2)"""
    return max(wasserstein_distance(a[:, i], b[:, i]) for i in range(2))

def measure_posteriors(args, kind, s, net, exact, held_out):
    """Sec. 2.5: samples given an observation y, by both rules, and their distance to exact ones.

    A draw of x_0 that is kept with probability r(x_0) is an exact sample: rejection sampling."""
    torch.manual_seed(args.seed)
    many = draw_roll(2_000_000, args.noise, args.seed + 3)
    y = torch.tensor([0.5, -0.3], dtype=torch.float64)  # to inpaint, only y_1 is observed
    precisions = torch.tensor([[4.0, 4.0], [1e4, 0.0]], dtype=torch.float64)
    numbers, pictures = {}, []
    for task, precision in zip(("denoise", "inpaint"), precisions):
        r = (-precision * (y - many) ** 2 / 2).sum(1).exp()
        wanted, exact_again = many[torch.rand(len(many)) < r][:10_000].chunk(2)
        pi = prior(kind, wanted)
        alone = end_of(reverse(kind, s, net, pi.sample()))
        ours = end_of(reverse(kind, s, partial(given, net, y, precision), pi.sample()))
        modify = partial(times_r, y=y, precision=precision)
        paper = end_of(reverse(kind, s, net, modify(pi).sample(), modify))
        pictures.append([alone, exact_again, ours, paper])
        for name, x in zip(("without_r", "exact", "ours", "paper"), pictures[-1]):
            numbers[f"{task}_distance_{name}"] = wasserstein(x, wanted)
    return numbers, {"posteriors.png": partial(
        draw_table, titles=["p alone", "exact posterior", "our rule", "the paper's rule"],
        rows=["denoise; y is the cross", "inpaint; y_1 is the line"],
        pictures=pictures, marks=[([0.5], [-0.3]), ([0.5, 0.5], [-9, 9])])}

def sample_heartbeats(args, kind, s, net, exact, held_out):
    """How many samples are heartbeats, with the network and with exact rates. Eight are printed."""
    torch.manual_seed(args.seed)
    xT = prior(kind, held_out).sample()
    x = end_of(tqdm(reverse(kind, s, net, xT), "sampling", s.T, leave=False))
    x_exact = end_of(tqdm(reverse(kind, s, exact, xT), "sampling", s.T, leave=False))
    print("Eight samples. In a heartbeat every fifth bit is 1, shown as #, and no other:")
    for sequence in x[:8]:
        print("".join(".#"[int(bit)] for bit in sequence))
    return {"valid_share": valid_share(x), "valid_share_exact": valid_share(x_exact)}, {}

EXPERIMENTS = {
    "swiss_roll": [measure_K, compare_schedules, compare_with_q, measure_posteriors],
    "heartbeat": [measure_K, sample_heartbeats]}

# -------------------------------------------------------------------------------------------------
# Flags and main
# -------------------------------------------------------------------------------------------------

# run: how its folder is called; exact_samples: on how many examples exact moments are computed
PRESETS = {
    "swiss_roll": dict(T=40, schedule="learned", steps=6000, batch=2048, lr=4e-3, noise=0.02,
                       width=128, num_samples=100_000, exact_samples=1000, run="swiss_roll"),
    "heartbeat": dict(T=2000, schedule="inverse", steps=8000, batch=2048, lr=1e-2, noise=None,
                      width=50, num_samples=10_000, exact_samples=2000, run="heartbeat")}
QUICK = {
    "swiss_roll": dict(steps=100, batch=256, width=32, num_samples=2000, exact_samples=20,
                       run="swiss_roll-quick"),
    "heartbeat": dict(steps=200, batch=256, width=32, num_samples=2000, exact_samples=200, T=200,
                      run="heartbeat-quick")}
PAPERS_K = {"swiss_roll": 2.35, "heartbeat": -2.414}  # in bits, Table 1

LABELS = {  # a number of metrics.json -> what the console calls it
    "K_bits": "K, a lower bound on the mean log-likelihood, in bits",
    "ceiling_bits": "the most that K can be, minus the data's entropy, bits",
    "paper_K_bits": "K in the paper, bits",
    "K_stderr_bits": "standard error of K, bits",
    "L_null_bits": "L_null, the mean log-likelihood under pure noise, bits",
    "K_minus_L_null_bits": "K - L_null, bits",
    "network_loses_bits": "what K loses by the errors of the network, bits",
    "K_exact_bits": "K with exact moments in place of the network, bits",
    **{f"K_exact_bits_{name}": f"the same with the schedule {name}, bits" for name in SCHEDULES},
    "denoise_distance_ours": "denoised by our rule: distance to exact samples, in std",
    "denoise_distance_paper": "denoised by the paper's rule",
    "denoise_distance_exact": "for comparison, more exact samples",
    "denoise_distance_without_r": "for comparison, samples that ignore y",
    "inpaint_distance_ours": "inpainted by our rule: distance to exact samples, in std",
    "inpaint_distance_paper": "inpainted by the paper's rule",
    "inpaint_distance_exact": "for comparison, more exact samples",
    "inpaint_distance_without_r": "for comparison, samples that ignore y",
    "valid_share": "share of samples that are heartbeats in all 20 bits",
    "valid_share_exact": "the same with exact rates in place of the network"}

def get_args(argv=None):
    """The flags. What is not typed comes from the checkpoint, or from PRESETS and QUICK."""
    p = argparse.ArgumentParser(
        description="Train a diffusion model as in Sohl-Dickstein et al. 2015 and measure it.",
        epilog=f"examples:\n  python {SCRIPT}.py --quick\n  python {SCRIPT}.py --dataset heartbeat",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False)
    p.error = fail
    p.add_argument("--dataset", choices=PRESETS, help="what to learn (default: %(default)s)")
    p.add_argument("--noise", type=float, help="noise of the Swiss roll (default: %(default)s)")
    p.add_argument("--out", type=not_empty, help="a new folder for the results (default: in runs/)")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--quick", action="store_true", help="see in a minute that everything runs")
    source.add_argument("--checkpoint", type=not_empty, metavar="FILE",
                        help="measure and draw what a run has saved; needs no other flag")
    p.add_argument("--seed", type=int, help="seed of all random numbers (default: %(default)s)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                   help="where to train; the networks are small (default: %(default)s)")
    p.add_argument("--T", type=positive, help="number of diffusion steps (default: %(default)s)")
    p.add_argument("--schedule", choices=["learned", *SCHEDULES],
                   help="how the noise grows; learned: roll only (default: %(default)s)")
    p.add_argument("--steps", type=positive, help="training steps (default: %(default)s)")
    p.add_argument("--batch", type=positive, help="examples per step (default: %(default)s)")
    p.add_argument("--lr", type=float, help="learning rate at the start (default: %(default)s)")
    p.add_argument("--num-samples", type=positive,
                   help="examples to measure K on (default: %(default)s)")

    typed, _ = p.parse_known_args(argv)
    dataset = typed.dataset or "swiss_roll"
    config = {"dataset": dataset, "seed": 0, "quick": typed.quick} | PRESETS[dataset]
    if typed.quick:
        config |= QUICK[dataset]
    if typed.checkpoint:
        saved = load_checkpoint(typed.checkpoint)["config"]
        for name in ("dataset", "noise", "T", "schedule", "steps", "batch", "lr"):
            if getattr(typed, name) not in (None, saved[name]):
                fail(f"--{name}: the checkpoint's is {saved[name]}, and it cannot be changed")
        config = {name: saved[name] for name in config} | {"run": f"{saved['dataset']}-samples"}
    p.set_defaults(**config)
    p.add_argument("-h", "--help", action="help", help="show this and exit")
    args = p.parse_args(argv)
    if args.dataset == "heartbeat" and (args.schedule == "learned" or args.noise is not None):
        fail("--noise and --schedule learned are for the Swiss roll; the heartbeat has neither")
    thin = args.dataset == "heartbeat" or 0.005 <= args.noise <= 1
    if not (thin and args.T > 1 and args.lr > 0 and 0 <= args.seed < 2 ** 31):
        fail("the limits are: --T from 2, --lr above 0, --seed from 0, --noise from 0.005 to 1")
    return args

def open_dataset(args):
    """-> kind, new network, training data, fresh data to measure on, exact moments, ceiling of K"""
    beta = start_beta(args.schedule, args.T)
    if args.dataset == "heartbeat":
        held_out = HEARTBEATS[torch.arange(args.num_samples) % 5]
        exact = partial(rates_of_sequences, HEARTBEATS)
        return BINOMIAL, HeartbeatNet(beta, args.width), HEARTBEATS, held_out, exact, -math.log2(5)
    net = RollNet(beta, args.schedule == "learned", args.width)
    data = draw_roll(400_000, args.noise, args.seed + 1)
    held_out = draw_roll(args.num_samples, args.noise, args.seed + 2)
    m, v, _, _ = roll_density(args.noise)
    return GAUSSIAN, net, data, held_out, partial(moments_of_mixture, m, v), ceiling_of_curve(m, v)

def main(args):
    """Train or load, measure, write the numbers, then draw.  -> the numbers"""
    device = open_device(args.device)
    torch.manual_seed(args.seed)
    kind, net, data, held_out, exact, ceiling = open_dataset(args)
    params = sum(parameter.numel() for parameter in net.parameters())
    out = claim_folder(args.out, f"runs/{SCRIPT}-{args.run}")
    print(f"{args.dataset}: {len(data)} examples; {params} parameters; on {device}; writes {out}")
    if args.checkpoint:
        state = load_checkpoint(args.checkpoint)
        net.load_state_dict(state["net"])
    else:
        state = train(args, kind, net.to(device), data.to(device), out / "checkpoint.pt")

    s = learned_schedule(net.beta_logits.detach())
    metrics = {
        "script": SCRIPT, "dataset": args.dataset, "seed": args.seed, "device": device,
        "torch": torch.__version__, "steps": args.steps, "params": params,
        "seconds_train": state["seconds"], "config": vars(args),
        "ceiling_bits": ceiling, "paper_K_bits": PAPERS_K[args.dataset]}
    pictures = {}
    for experiment in EXPERIMENTS[args.dataset]:
        numbers, drawings = experiment(args, kind, s, net, exact, held_out)
        metrics |= numbers
        pictures |= drawings
    if args.dataset == "heartbeat":
        metrics["K_bits_per_sequence"] = metrics["K_bits"]
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    if args.quick:
        print("--quick: this network is all but untrained, and its numbers mean nothing.")
    for key, label in LABELS.items():
        if key in metrics:
            print(f"{label:<57}{metrics[key]:>8.3f}")
    for name, draw in pictures.items():
        draw(out / name)
    print(f"Look at {out}/{'bound' if args.dataset == 'heartbeat' else 'swiss_roll'}.png")
    return metrics

if __name__ == "__main__":
    try:
        main(get_args())
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C; a checkpoint is saved only when training has ended")
    except (OSError, FloatingPointError) as e:  # a full disk, no permission; a diverged training
        fail(e)

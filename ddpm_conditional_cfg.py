"""Classifier-Free Diffusion Guidance.  Ho & Salimans 2022, arXiv 2207.12598.

The idea. A diffusion model that is told the label y draws images of that class, but not always
clear ones. Train one network with the label and, for some of the images, without it. The difference
of its two predictions points from "any image" to "an image of class y". Going further in that
direction, by a weight w, gives clearer images of the class, and less variety among them.

    python ddpm_conditional_cfg.py                     # 8x8 digits: minutes on a CPU
    python ddpm_conditional_cfg.py --dataset mnist     # also cifar10, cars, or a folder of folders
    python ddpm_conditional_cfg.py --checkpoint assets/mnist_cfg.pt --w 2 --classes 7    # sevens

Expect the paper's trade-off: as w grows, a classifier recognises more of the samples as the class
that was asked for. Their distance from real images may fall a little at a small w (the paper's best
FID is at w = 0.1 and 0.3) and grows from there on.

Why Eq. (6). By Bayes' rule p(y | x_t) is proportional to p(x_t | y) / p(x_t), so

    ∇ log p(y | x_t) = ∇ log p(x_t | y) - ∇ log p(x_t)          (gradients are in x_t)

A classifier's gradient is the difference of two scores, and a network that predicts noise knows
both: ∇ log p(x_t | y) = -ε_θ(x_t, t, y) / √(1 - ᾱ_t); `score` in ddpm_ho_2020.py says why. Adding
w times that gradient to the score of p(x_t | y) gives Eq. (6),

    ε̃ = (1 + w) ε_θ(x_t, t, y) - w ε_θ(x_t, t, ∅),     where ∅ stands for "no label"

At each t this is the score of p(x_t | y) p(y | x_t)^w, which is proportional to
p(x_t) p(y | x_t)^(1 + w). The power prefers images of which the class is certain: at w = 1 the
classifier's probability is squared. Images that could be of another class are lost, and what is
left lies farther from the other classes (the paper's Fig. 2). That is why guidance trades variety
for fidelity. All this holds only roughly. If one noises draws of p(x_0) p(y | x_0)^(1 + w) up to t,
the result does not have the density p(x_t) p(y | x_t)^(1 + w), so these scores do not belong to one
diffusion, and sampling does not end in p(x_0 | y) p(y | x_0)^w. The three Gaussians of
`draw_gaussians`, near the end of this file, show it. Their means lie at a distance of 1 from the
origin. At w = 1 the mean of p(x_0 | y) p(y | x_0)^w lies at 1.05, and the mean of the guided
samples at 1.21. And the difference of two learned ε_θ need not be the gradient of any classifier.

How the label enters. `ConditionalUNet`, below, is DDPM's U-Net with one more table of vectors, one
for each class and one for ∅. The vector of y is added to the embedding of t. ∅ is the number K of
classes, as the classes are 0..K-1. In the code ∅ is called null.

The paper's notation. It writes z_λ for x_t, with λ = log(ᾱ_t / (1 - ᾱ_t)) as the time, α_λ² for
ᾱ_t, σ_λ² for 1 - ᾱ_t, and c for y. Our letters are those of DDPM (Ho, Jain & Abbeel 2020);
schedules.py, to be read first, defines them.

Differs from the paper:
  - T steps by the cosine schedule; the paper draws λ in continuous time, from such a schedule.
    (The preset "paper" is DDPM's training, with its linear schedule and σ_t² = β_t.)
  - Small networks and data, as in ddpm_ho_2020.py, where the settings are explained. For cars the
    network predicts x_0, from which ε follows.
  - No FID or Inception Score, which need a downloaded network. The Fréchet distance and the score
    exp E KL are taken from a small classifier that is trained here. Compare them across w, and with
    the distance of real images.
  - σ_t² is β̃_t in all presets but "paper". The default of `ddpm_sample` is β_t. The paper (in its
    Sec. 2) takes β̃_t^(1-v) β_t^v, with v = 0.3 at 64x64 and 0.2 at 128x128.
  - Also drawn: w = -1, which is the unconditional model, and classifier guidance of an
    unconditional model (--guidance classifier). Sec. 3.1 guides a conditional one: there the
    network is told the label, and a classifier guides it too (--guidance both).
  - The classifier takes the mean over pixels, Dhariwal & Nichol's pools by attention.

Shapes: B batch, C channels, H height, W width, D embedding, K classes; () is one number.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from schedules import SCHEDULES, Schedule, beta_of_alpha_bar, extract, make_schedule

# ------------------------------------------ Algorithm 1: training, with labels that are dropped

def drop_labels(y, null, p_uncond):
    """Replace each label by ∅ with probability p_uncond, independently.  Algorithm 1.  (B,) -> (B,)

    Each example for itself: dropping the labels of a whole batch at once would train on batches of
    one kind only, and make the gradient far noisier."""
    dropped = torch.rand(len(y), device=y.device) < p_uncond
    return torch.where(dropped, null, y)

def l_cfg(net, s, x0, t, eps, y, predict="eps"):
    """E |ε - ε_θ(x_t, t, y)|², per dimension, where some of the y are ∅.  Algorithm 1.  -> ()

    x0 (B, C, H, W) in [-1, 1];  t (B,) in 1..T;  eps like x0, from N(0, I);  y (B,) in 0..K (K: ∅)
    predict="x0": the network predicts x_0 instead (DDPM Sec. 3.2), and the target is x_0."""
    target = {"eps": eps, "x0": x0}[predict]
    return F.mse_loss(net(s.q_sample(x0, t, eps), t, y), target)

def cfg_train_step(net, ema, opt, s, x0, y, step, null, p_uncond=0.1, loss=l_cfg, decay=0.9999):
    """One step of Algorithm 1 on images with labels. The numbers on the right are the lines there.

        device = "cuda" if torch.cuda.is_available() else "cpu"
        net = ConditionalUNet(10, (1, 28, 28), channels=32, multipliers=(1, 2, 2), attention=(7,))
        net = net.to(device)
        ema = copy.deepcopy(net).eval()
        opt = torch.optim.Adam(net.parameters(), lr=2e-4)
        s = make_schedule("linear", 1000).to(device)
        for step in range(1, 3):  # thousands; do not start at 1 again in each epoch
            x0 = torch.rand(64, 1, 28, 28, device=device) * 2 - 1  # your images, from -1 to 1
            y = torch.randint(10, (64,), device=device)            # and their labels
            cfg_train_step(net, ema, opt, s, x0, y, step, null=10)

    But for the labels it is DDPM's Algorithm 1. Where y is a label, ε_θ learns p(x | y), and where
    it is ∅, p(x). ema is the moving average of net's weights, from which one samples. Each step
    replaces it by decay · average + (1 - decay) · weights. For decay the smaller of decay and step
    / (step + 9) is taken, so that the average forgets the untrained weights. In runs below 90,000
    steps, 0.9999 is therefore never reached.
    x0 (B, C, H, W) in [-1, 1];  y (B,) in 0..K-1;  step counts from 1.  -> the loss, ()"""
    y = drop_labels(y, null, p_uncond)                           # 3: c becomes ∅
    t = torch.randint(1, s.T + 1, (len(x0),), device=x0.device)  # 4: the paper draws λ
    eps = torch.randn_like(x0)                                   # 5: ε ~ N(0, I)
    value = loss(net, s, x0, t, eps, y)                          # 6, 7: noise x_0, and compare
    opt.zero_grad()  # PyTorch adds new gradients to old ones, so the old ones have to go
    value.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # a rare huge gradient must not undo all
    opt.step()
    decay = min(decay, step / (9 + step))
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), net.parameters()):
            average.lerp_(weight, 1 - decay)  # decay · average + (1 - decay) · weight
    return value.detach()  # without its graph, which would keep the batch in memory

# ------------------------------------------------- Sec. 3.2, Algorithm 2: classifier-free guidance

def guided(eps_theta, y, null, w, t_max=None):
    """The guided noise ε̃(x_t, t) = (1 + w) ε_θ(x_t, t, y) - w ε_θ(x_t, t, ∅).  Eq. (6).

        eps_tilde = guided(ema, torch.full((16,), 7, device=device), null=10, w=2)  # sixteen sevens
        noise = torch.randn(16, 1, 28, 28, device=device)
        x0 = last_image(ddpm_sample(eps_tilde, s, noise))

    w = 0 is the conditional model and w = -1 the unconditional one; these need one evaluation of
    the network and not two. Much other code has a "guidance scale", which is our 1 + w.

    t_max: guide only where t ≤ t_max, and use w = 0 at larger t. This is not in the paper but from
    Kynkäänniemi et al. 2024, who found that in the noisiest steps guidance drives the samples of a
    class to a few images. They guide at the t in the middle only: not at small t, either.

    For few steps guide first, and take the subchain then. t_max is a t of the long chain.

        short_tilde, short = subchain(eps_tilde, s, 50)
        x0 = last_image(ddpm_sample(short_tilde, short, noise, variance="beta_tilde"))

    eps_theta: any callable of x, t, y;  y (B,) in 0..null-1, else ValueError
    -> a callable of x, t, for any sampler"""
    if y.min() < 0 or y.max() >= null:  # on CUDA an embedding fails without a useful message
        raise ValueError(f"labels must lie in 0..{null - 1}, not {y.min()}..{y.max()}")
    y_null = torch.full_like(y, null)

    def eps_tilde(x, t):
        # Both predictions in one batch of 2 B images, which is faster than two batches.
        both = eps_theta(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y_null]))
        eps_y, eps_null = both.chunk(2)
        weight = w
        if t_max is not None:
            weight = w * (t <= t_max).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return (1 + weight) * eps_y - weight * eps_null

    if w == 0:
        return lambda x, t: eps_theta(x, t, y)
    if w == -1 and t_max is None:
        return lambda x, t: eps_theta(x, t, y_null)
    return eps_tilde

def class_scores(log_p, y):
    """What does a classifier say of samples that were drawn for the labels y?  Sec. 4

    classifier_score is exp E KL(p(k | x) || p(k)), from 1 to K: the formula of the Inception Score.
    It is high if each sample is clearly of a class, and all classes occur. label_accuracy is the
    share of samples in which the classifier sees the class asked for.
    log_p (N, K), log p(k | x);  y (N,) -> two floats"""
    p = log_p.exp()
    kl = (p * (log_p - p.mean(0).log())).sum(1).mean()
    return kl.exp().item(), (log_p.argmax(1) == y).double().mean().item()

# -------------------------- in the manner of Fig. 2: guidance where every score is known exactly

def gaussians_eps_theta(s, means, variance):
    """The exact ε_θ(x, t, y) for K equally likely classes, each N(m_y, variance I) in the plane.

    x_t given y is N(√ᾱ_t m_y, v_t I) with v_t = ᾱ_t variance + 1 - ᾱ_t, and without a label a
    mixture of these. The score of a mixture is the mean of its parts' scores, weighted by
    p(y | x_t). As everywhere, ε = -√(1 - ᾱ_t) ∇ log p.

        s = make_schedule("linear", 1000)
        eps_theta = gaussians_eps_theta(s, torch.eye(3)[:, :2], variance=0.2)
        y, noise = torch.tensor([0, 1, 2]), torch.randn(3, 2)
        x0 = last_image(ddpm_sample(guided(eps_theta, y, 3, w=1), s, noise, clip=False))

    clip=False, because these points, unlike images, are not confined to [-1, 1].
    means (K, 2), y = K for ∅ -> a callable of x (B, 2), t, y"""
    K = len(means)

    def eps_theta(x, t, y):
        alpha_bar = extract(s.alpha_bar, t, x)                           # (B, 1)
        v = alpha_bar * variance + 1 - alpha_bar
        away = x[:, None] - alpha_bar.sqrt()[:, None] * means            # (B, K, 2)
        p = (-away.square().sum(2) / (2 * v)).softmax(1)                 # p(y | x_t), (B, K)
        known = F.one_hot(y.clamp(max=K - 1), K).to(x.dtype)
        p = torch.where((y < K)[:, None], known, p)
        score = -(p[:, :, None] * away).sum(1) / v
        return -(1 - alpha_bar).sqrt() * score

    return eps_theta

# ------------------------------------------------------------------ Sec. 3.1: classifier guidance

def classifier_guided(eps_theta, classifier, s, y, null, w, conditional=True):
    """Guidance by a classifier that knows noised images.  Sec. 3.1, after Dhariwal & Nichol 2021.

    ε̂(x_t, t) = ε_θ(x_t, t, y) - w √(1 - ᾱ_t) ∇ log p(y | x_t): the gradient moves the noise, and
    so the image, to where the classifier is surer of y. With conditional=False it starts from the
    model without a label, ε_θ(x_t, t, ∅) - (1 + w) √(1 - ᾱ_t) ∇ log p(y | x_t), and a network that
    takes no labels will do: eps_theta = lambda x, t, y: net(x, t).

    ∇ log p(y | x_t) is the score with the label minus the score without it. So if network and
    classifier are exact, both of these and Eq. (6) give the same noise. In practice Dhariwal &
    Nichol got their best results from the conditional one, and so the paper guides that one.

        classifier = NoisyClassifier(10, (1, 28, 28), 16, (1, 2, 2), attention=(7,)).to(device)
        average = copy.deepcopy(classifier).eval()
        its_opt = torch.optim.Adam(classifier.parameters())
        x0 = torch.rand(64, 1, 28, 28, device=device) * 2 - 1  # a batch of your images
        y = torch.randint(10, (64,), device=device)            # and their labels
        cfg_train_step(classifier, average, its_opt, s, x0, y, step=1, null=10, p_uncond=0,
                       loss=l_classifier)                      # step 1 of many
        sevens = torch.full((16,), 7, device=device)
        eps_hat = classifier_guided(ema, average, s, sevens, null=10, w=1)
        short_hat, short = subchain(eps_hat, s, 50)

    For few steps guide first, with the long s, and take the subchain then, as in the last line: the
    classifier was trained for the t of the long chain.
    In ddim_sample without clipping (clip=False), ε̂ gives Dhariwal & Nichol's Algorithm 2. In
    ddpm_sample it shifts μ_θ by w β_t / √α_t ∇ log p(y | x_t); with conditional=False, 1 + w stands
    in place of w. Their Algorithm 1 shifts it by w σ_t² ∇ log p (their Σ is the covariance σ_t² I),
    which for σ_t² = β_t is the same but for the factor 1 / √α_t.
    classifier: any callable of x, t that returns logits (B, K) with a gradient in x
    -> a callable of x, t, for any sampler"""
    if conditional:
        base, scale = guided(eps_theta, y, null, 0), w
    else:
        base, scale = guided(eps_theta, y, null, -1), 1 + w
    if scale == 0:
        return base

    def eps_hat(x, t):
        with torch.enable_grad():  # the samplers run under no_grad
            x_in = x.detach().requires_grad_()
            log_p = -F.cross_entropy(classifier(x_in, t), y, reduction="sum")  # Σ log p(y | x_t)
            gradient = torch.autograd.grad(log_p, x_in)[0]
        return base(x, t) - scale * extract((1 - s.alpha_bar).sqrt(), t, x) * gradient

    return eps_hat

def l_classifier(net, s, x0, t, eps, y):
    """E -log p(y | x_t), (): train the classifier on noised images, as it is to guide at every t.

    Use it as cfg_train_step(classifier, ..., null=K, p_uncond=0, loss=l_classifier), so that no
    label becomes ∅, which is no class."""
    return F.cross_entropy(net(s.q_sample(x0, t, eps), t), y)

# ---- DDPM's samplers. They take any ε_θ, guided or not. Equations and sections are here DDPM's

# Copied from ddpm_ho_2020.py
def predict_x0(s, xt, t, eps_hat, clip=True):
    """The image that remains if the predicted noise is taken out of x_t.  Eq. (15).

    x̂_0 = (x_t - √(1 - ᾱ_t) ε̂) / √ᾱ_t, which is Eq. (4) solved for x_0. Near t = T it divides by
    almost 0, so that a small error of ε̂ throws x̂_0 far out of the range of images. Clipping to
    [-1, 1] brings it back.  xt, eps_hat: (B, ...);  t (B,) -> (B, ...)"""
    signal = extract(s.alpha_bar.sqrt(), t, xt)
    noise = extract((1 - s.alpha_bar).sqrt(), t, xt)
    x0_hat = (xt - noise * eps_hat) / signal
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    return x0_hat

def predict_eps(s, xt, t, x0_hat):
    """The noise that leads from x̂_0 to x_t: ε̂ = (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t).  Eq. (4)"""
    signal = extract(s.alpha_bar.sqrt(), t, xt)
    noise = extract((1 - s.alpha_bar).sqrt(), t, xt)
    return (xt - signal * x0_hat) / noise

def p_theta(eps_theta, s, xt, t, variance="beta", clip=True):
    """One step of the reverse process: p_θ(x_{t-1} | x_t) = N(μ_θ, σ_t² I).  Eq. (1).

    If x_0 were known, the step would be q(x_{t-1} | x_t, x_0), with the mean μ̃_t of Eq. (7). It is
    not, so the network's guess x̂_0 takes its place: μ_θ = μ̃_t(x_t, x̂_0).

    Without clipping this is Eq. (11), μ_θ = (x_t - β_t / √(1 - ᾱ_t) ε_θ) / √α_t, and the sampler is
    Algorithm 2 as printed. To see it, put Eq. (15) into Eq. (7). The factor of x_t becomes
    (β_t + α_t (1 - ᾱ_{t-1})) / ((1 - ᾱ_t) √α_t) = 1 / √α_t, since α_t ᾱ_{t-1} = ᾱ_t and
    β_t + α_t = 1; the factor of ε_θ becomes -β_t / (√(1 - ᾱ_t) √α_t).

    variance: "beta" is σ_t² = β_t, which is right if x_0 ~ N(0, I), and "beta_tilde" is σ_t² =
    β̃_t, right if x_0 is one fixed image (Sec. 3.2). Real data lie between the two, and in 1000
    steps it hardly matters. In few steps it does: at small t the image is nearly decided, so that
    the right variance is near β̃_t, and β_t is much larger there (with 50 steps of the linear
    schedule, 3.4 times β̃_t in the last step but one and 2.1 times in the step before). With β_t,
    x_{t-1} then holds more noise than the network was trained to expect at t - 1. It takes out what
    it expects, and after the last step the surplus is still in the image. DDIM's Table 1 has, for
    10 steps on CIFAR-10, an FID of 367 with β_t and 41 with β̃_t. So take "beta_tilde" with a
    subchain, as all presets do but "paper", which is DDPM's training.
    eps_theta: any callable of x (B, ...) and t (B,) that returns the predicted noise (B, ...)
    -> μ_θ (B, ...), σ_t² (B, 1, ..., 1), x̂_0 (B, ...)"""
    x0_hat = predict_x0(s, xt, t, eps_theta(xt, t), clip)
    mu_theta, beta_tilde = s.q_posterior(x0_hat, xt, t)
    sigma2 = {"beta": extract(s.beta, t, xt), "beta_tilde": beta_tilde}[variance]
    return mu_theta, sigma2, x0_hat

@torch.no_grad()
def ddpm_sample(eps_theta, s, x, variance="beta", clip=True, start=None):
    """DDPM's Algorithm 2: from noise x_T to an image x_0. The numbers on the right are its lines.

        eps_theta = ema  # if it takes labels: guided(ema, y, null, w), see ddpm_conditional_cfg.py
        noise = torch.randn(16, 1, 28, 28, device=device)
        x0 = last_image(ddpm_sample(eps_theta, s, noise))  # 16 images in [-1, 1]

    This is a generator, so that one can watch: nothing happens until one loops over it. After each
    step it yields t, x_t and the x̂_0 that the step was made from, for t = T-1 down to 0. The last
    x_t is x_0. start: begin at x_start instead of x_T, with x drawn from q(x_start | some x_0).
    The other samplers yield the same, but always begin at x_T."""
    start = s.T if start is None else start
    for t in range(start, 0, -1):                                    # 2
        ts = torch.full((len(x),), t, device=x.device)
        mu_theta, sigma2, x0_hat = p_theta(eps_theta, s, x, ts, variance, clip)
        z = torch.randn_like(x) if t > 1 else torch.zeros_like(x)    # 3: no noise in the last step
        x = mu_theta + sigma2.sqrt() * z                             # 4
        yield t - 1, x, x0_hat

def last_image(chain):
    """Run a sampler to its end.  -> x_0 (B, C, H, W)"""
    for _, x, _ in chain:  # noqa: B007
        pass
    return x

@torch.no_grad()
def ddim_sample(eps_theta, s, x, clip=True):
    """Sample without noise.  Song, Meng & Ermon 2020 (DDIM), Eq. (12) with σ = 0; their α is our ᾱ.

    x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1}) ε̂: take x_t apart into image and noise, and mix the
    same two again at the ratio of t - 1. The same ε_θ serves: in training it saw only q(x_t | x_0)
    for each t, not by which steps x_t is reached, and DDIM's process has the same q(x_t | x_0)."""
    for t in range(s.T, 0, -1):
        ts = torch.full((len(x),), t, device=x.device)
        x0_hat = predict_x0(s, x, ts, eps_theta(x, ts), clip)
        eps_hat = predict_eps(s, x, ts, x0_hat)  # the noise that belongs to the clipped x̂_0
        x = s.q_sample(x0_hat, t - 1, eps_hat)
        yield t - 1, x, x0_hat

def subchain(eps_theta, s, steps, last=None):
    """A shorter chain, through only `steps` of the T times.  Song, Meng & Ermon 2020, Sec. 4.2.

        short_theta, short = subchain(eps_theta, s, 50)  # eps_theta as in ddpm_sample's example
        noise = torch.randn(16, 1, 28, 28, device=device)
        x0 = last_image(ddim_sample(short_theta, short, noise))

    If we keep only some of x_0, ..., x_T, these too are a chain of the kind of Eq. (2): going from
    a kept x_r to the next kept x_t adds noise of variance 1 - ᾱ_t / ᾱ_r. So the kept times have a
    Schedule of their own, with the same ᾱ and these larger β, and the trained network is right for
    it as it stands. The new i = 1..steps stands for t = i · last / steps, rounded.

    last is T, unless one names a smaller t to begin at. Near t = T of the cosine schedule √ᾱ_t is
    so small that x̂_0, the result of dividing by it, is nothing but clipped noise. In 1000 steps
    this is soon mended, in 20 it is not. With last=980 no step is spent on t > 980. At t = 980,
    where √ᾱ_t = 0.03, the image is still noise to the eye.
    With ddpm_sample pass variance="beta_tilde" here; p_theta says why. Guide first and take the
    subchain then, because a classifier knows only the t of the long chain.
    steps is at most T (or last), else ValueError.
    -> the ε_θ(x, i) of the short chain, and its Schedule"""
    last = s.T if last is None else last
    times = torch.linspace(0, last, steps + 1).round().long().to(s.beta.device)
    alpha_bar = s.alpha_bar[times].cpu().double()
    beta = beta_of_alpha_bar(alpha_bar, largest=1 - 1e-12)  # a smaller bound would change ᾱ

    def short_theta(x, i, *y):  # y: the labels, for a network that takes them
        return eps_theta(x, times[i], *y)

    return short_theta, Schedule(beta).to(s.beta.device)

def as_eps_theta(net, s, predict):
    """Turn a network that predicts "eps", "x0" or "mu" into ε_θ, for whatever takes an ε_θ.

    s is the schedule that the network was trained with. Do this first, then guide, and take the
    subchain last. Any other order can be wrong without an error: the t that is looked up in s has
    to be of the long chain, and a classifier's gradient has to be added to ε, not to x̂_0 or μ.
    -> a callable of x_t, t (and of the labels, if the network takes them)"""
    def from_x0(xt, t, *y):  # y: the labels, for a network that takes them
        return predict_eps(s, xt, t, net(xt, t, *y))
    def from_mu(xt, t, *y):
        a, b = s.posterior_coefficients(xt, t)
        x0_hat = (net(xt, t, *y) - b * xt) / a  # Eq. (7), μ̃_t = a x_0 + b x_t, solved for x_0
        return predict_eps(s, xt, t, x0_hat)

    return {"eps": net, "x0": from_x0, "mu": from_mu}[predict]

# ---------------------------------------------------- DDPM's scale of images, and FID's formula

# Copied from ddpm_ho_2020.py
def to_float(images):
    """Grey levels 0..255 (uint8) to float32 in [-1, 1], the scale of Sec. 3.3."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """[-1, 1] to grey levels 0..255 (uint8), rounded; values outside are clipped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def frechet_distance(a, b):
    """How far apart are two sets of features, if each is seen as a Gaussian? The formula of FID.

    |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½), with the means m and covariances S. The trace of a
    matrix's root is the sum of the roots of its eigenvalues; those of S_a S_b are real and not
    negative, but for rounding. FID takes the features from an Inception network, we from a small
    classifier of the data.  a (N, D), b (M, D) -> float"""
    a, b = a.cpu().double(), b.cpu().double()
    S_a, S_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * root).item()

# ------------------ DDPM's U-Net, and labels. "The authors" are in this section those of DDPM

# Copied from ddpm_ho_2020.py
def norm(C):
    """GroupNorm, in 32 groups as in the authors' code, or in fewer, of 4 channels at least.

    It normalises each image by itself. BatchNorm would mix the images of a batch, which have
    different t. C = 128 gives 32 groups of 4, C = 32 gives 8 of 4, and C = 96 gives 8 of 12."""
    return nn.GroupNorm(math.gcd(32, C // 4), C)

def conv3(C_in, C_out, stride=1):
    """A 3x3 convolution that keeps H and W or, with stride 2, halves them."""
    return nn.Conv2d(C_in, C_out, 3, stride, padding=1)

def time_embedding(t, dim):
    """Write t as sines and cosines of dim/2 frequencies, from 1 down to 1/10000.  (B,) -> (B, dim)

    The fast ones tell t from t + 1 and the slow ones early from late, like the hands of a clock.
    The last frequency is exactly 1/10000, as in the authors' code. In Vaswani et al. 2017 the
    frequencies end one step before it."""
    f = torch.logspace(0, -4, dim // 2, device=t.device)
    angle = t[:, None] * f
    return torch.cat([angle.sin(), angle.cos()], 1)

class Attention(nn.Module):
    """Self-attention: each pixel of a feature map is given a weighted mean of all pixels.

    The weights are softmax(q kᵀ / √C), with one head, and the result is added to h.
    (B, C, H, W) -> the same"""
    def __init__(self, C):
        super().__init__()
        self.norm = norm(C)
        self.qkv = nn.Conv2d(C, 3 * C, 1)
        self.out = nn.Conv2d(C, C, 1)

    def forward(self, h):
        pixels = self.qkv(self.norm(h)).flatten(2).transpose(1, 2)  # (B, H W, 3 C)
        q, k, v = pixels[:, None].chunk(3, -1)  # (B, 1, H W, C) each; the 1 is the number of heads
        mean = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H W, C)
        return h + self.out(mean.transpose(1, 2).reshape(h.shape))

class ResBlock(nn.Module):
    """The input plus what two convolutions make of it and of t; then attention, if asked for.

    Each convolution comes after GroupNorm and Swish (silu), the second one after dropout as well.
    The embedding of t is added between the two, the same for all pixels. Where the number of
    channels changes, a 1x1 convolution (skip) fits the input to the sum.
    h (B, C_in, H, W), emb (B, D) -> (B, C_out, H, W)"""
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
    """The network ε_θ(x_t, t).  (B, C, H, W), (B,) -> (B, C, H, W)

    Without other arguments it is Ho et al. 2020's network for CIFAR-10:

        net = UNet((3, 32, 32))
        eps_hat = net(torch.randn(2, 3, 32, 32), torch.tensor([1, 1000]))

    It goes down to small maps that see the whole image and up again to the full size. Level i has
    1/2^i of the image's size and channels * multipliers[i] channels. On the way down it has
    `blocks` residual blocks and on the way up blocks + 1. Each block on the way up is also given a
    map from the way down (a long skip connection), which holds the details that the small maps have
    lost. Attention follows every block of the levels whose size (shorter side) is named, and stands
    once in the middle, always. timed=False makes a network that is not told t.

    UNet((1, 28, 28), 16, (1, 2, 4), 1, (7,)), which `--dataset mnist` trains, has these channels.
    An image goes down on the left, through the middle and up on the right. The skips are dashed.

      28x28    x_t 1 -> 16 - - - - - - - -> 16 -> 1 ε̂
      14x14             32 - - - - - - - -> 32
      7x7               64 - - - - - - - -> 64   with attention
      middle            `-----> 64 -------->|    with attention

    ValueError if a side cannot be halved so often, if attention names a size that no level has, or
    if channels is not a multiple of 4."""
    def __init__(self, image_shape, channels=128, multipliers=(1, 2, 2, 2), blocks=2,
                 attention=(16,), dropout=0.1, timed=True):
        super().__init__()
        C, H, W = image_shape
        sizes = [min(H, W) // 2 ** level for level in range(len(multipliers))]
        factor = 2 ** (len(multipliers) - 1)
        if H % factor or W % factor:
            halvings = len(multipliers) - 1
            raise ValueError(f"images of {H}x{W} cannot be halved {halvings} times, which"
                             f" {len(multipliers)} multipliers need")
        if not set(attention) <= set(sizes):
            raise ValueError(f"attention at {list(attention)}: the levels' sizes are {sizes}")
        if channels % 4:
            raise ValueError(f"{channels} channels: their number must be a multiple of 4")
        self.channels, self.timed = channels, timed
        D = 4 * channels
        self.embed = nn.Sequential(nn.Linear(channels, D), nn.SiLU(), nn.Linear(D, D))

        self.conv_in = conv3(C, channels)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width = channels  # channels of the map at hand
        skip_widths = [channels]  # channels of the maps that are kept for the way up
        for level, size in enumerate(sizes):
            if level > 0:
                self.down.append(conv3(width, width, stride=2))
                skip_widths.append(width)
            for _ in range(blocks):
                C_out = channels * multipliers[level]
                self.down.append(ResBlock(width, C_out, D, dropout, size in attention))
                width = C_out
                skip_widths.append(width)
        self.middle = nn.ModuleList([ResBlock(width, width, D, dropout, attention=True),
                                     ResBlock(width, width, D, dropout)])
        for level in reversed(range(len(sizes))):
            for _ in range(blocks + 1):
                C_in, C_out = width + skip_widths.pop(), channels * multipliers[level]
                self.up.append(ResBlock(C_in, C_out, D, dropout, sizes[level] in attention))
                width = C_out
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv3(width, width)))
        self.out = nn.Sequential(norm(width), nn.SiLU(), conv3(width, C))
        self.apply(init_weights)
        nn.init.zeros_(self.out[-1].weight)  # at first it predicts 0, the mean of the noise

    def embed_time(self, t):
        """The vector that tells every block the t of each image.  (B,) -> (B, D)"""
        if not self.timed:
            t = torch.zeros_like(t)
        waves = time_embedding(t, self.channels)
        return self.embed(waves.to(self.embed[0].weight.dtype))

    def go_down(self, x, emb):
        """The way down and the middle.  -> the map in the middle, and the maps for the way up"""
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, nn.Conv2d) else layer(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        return h, skips

    def go_up(self, h, skips, emb):
        """The way up, from what go_down returns.  -> (B, C, H, W)"""
        for layer in self.up:
            if isinstance(layer, nn.Sequential):
                h = layer(h)
            else:
                h = layer(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)

    def forward(self, x, t):
        emb = self.embed_time(t)
        h, skips = self.go_down(x, emb)
        return self.go_up(h, skips, emb).to(x.dtype)  # under autocast, back to float32

def init_weights(module):
    """The authors' initialisation, for UNet.apply: uniform, with variance 2 / (fan_in + fan_out).

    The last layer of each residual branch starts at 0, so that at first a block returns its input
    (or what skip makes of it) and a deep network is as easy to train as a shallow one."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, Attention):
        # q, k and v are one layer of 3 C outputs here and three layers of C in the authors' code.
        # The gain makes up for it: 2 · 2 / (C + 3 C) is their 2 / (C + C).
        nn.init.xavier_uniform_(module.qkv.weight, gain=2 ** 0.5)
    if isinstance(module, (ResBlock, Attention)):  # apply comes to these after their layers
        nn.init.zeros_(module.out.weight)

# Not copied: what labels add to the U-Net.
class ConditionalUNet(UNet):
    """The network ε_θ(x_t, t, y): the U-Net, with the vector of the label y added to that of t.

    K: the number of classes; the other arguments are UNet's.  Row K of the table stands for ∅.
    (B, C, H, W), (B,), (B,) in 0..K -> (B, C, H, W)"""
    def __init__(self, K, *unet_arguments, **unet_options):
        super().__init__(*unet_arguments, **unet_options)
        self.label = nn.Embedding(K + 1, self.embed[-1].out_features)  # starts from N(0, 1)

    def forward(self, x, t, y):
        emb = self.embed_time(t) + self.label(y)
        h, skips = self.go_down(x, emb)
        return self.go_up(h, skips, emb).to(x.dtype)

class NoisyClassifier(UNet):
    """Logits of p(y | x_t): the U-Net's way down, the mean over pixels, and a linear layer.

    After Dhariwal & Nichol 2021, Sec. 4.  (B, C, H, W), (B,) -> logits (B, K)"""
    def __init__(self, K, *unet_arguments, **unet_options):
        super().__init__(*unet_arguments, **unet_options)
        self.up = self.out = None  # a classifier has no way up
        self.head = nn.Linear(self.middle[-1].out.out_channels, K)

    def forward(self, x, t):
        h, _ = self.go_down(x, self.embed_time(t))
        return self.head(h.mean((2, 3))).to(x.dtype)

# The paper ends here. The rest is a laboratory: it reads data, trains, measures and draws.

import argparse
import itertools
import json
import os
import re
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy.io import loadmat
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, MNIST
from torchvision.utils import make_grid
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

SCRIPT = Path(__file__).stem
SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample}
RANK = int(os.environ.get("RANK", 0))  # torchrun starts WORLD processes, numbered by RANK
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ------------------------------------------------------------------------------------------ data

# Copied from ddpm_ho_2020.py
def fail(message):
    """End the run on a user's mistake: one line, and exit status 2."""
    tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)

def load_data(args):
    """The data set that args name, as tensors on args.device, so that a batch is an index.

    -> images, held_out: uint8 (N, C, H, W); labels, held_labels: int64 (N,); names (of the K)"""
    if args.dataset == "digits":
        x, y = load_digits(return_X_y=True)
        x = torch.tensor(x * 255 / 16).round().to(torch.uint8)  # grey levels were 0..16
        x, y, names = x.reshape(-1, 1, 8, 8), torch.tensor(y), list("0123456789")
        parts = train_test_split(x, y, test_size=450, random_state=0)
    elif args.dataset in ("mnist", "cifar10"):
        parts, names = load_torchvision(args.dataset, args.data_dir)
    else:
        if args.dataset == "cars":
            listing = list_cars(args.data_dir, args.labels)
        else:
            listing = list_folder(args.dataset)
        x, y, names = read_images(listing, args.image_size)
        parts = train_test_split(x, y, test_size=max(1, len(x) // 10), random_state=0)
    images, held_out, labels, held_labels = [part.to(args.device) for part in parts]
    return SimpleNamespace(images=images, held_out=held_out, labels=labels, held_labels=held_labels,
                           names=names)

def load_torchvision(dataset, data_dir):
    """MNIST or CIFAR-10, downloaded into data_dir unless it is there.
    -> (images, held-out images, labels, held-out labels), names of the classes"""
    kind = {"mnist": MNIST, "cifar10": CIFAR10}[dataset]
    try:
        train, test = [kind(data_dir, part, download=True) for part in (True, False)]
    except Exception as e:  # no network, no room, or a damaged file, which can raise anything
        fail(f"{dataset} can neither be read from {data_dir} nor downloaded"
             f" ({type(e).__name__}: {e}). If it is there, a file is damaged or missing."
             " --dataset digits needs no files")
    names = [name.split()[0] for name in train.classes]  # MNIST's are "0 - zero", ...
    pixels = [torch.as_tensor(part.data) for part in (train, test)]  # MNIST's have no colour axis
    images = [x.reshape(*x.shape[:3], -1).permute(0, 3, 1, 2) for x in pixels]
    labels = [torch.as_tensor(part.targets) for part in (train, test)]
    return images + labels, names

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
HIDDEN = (".", "@", "__")  # so begin the names that systems and programs give to their own files

def natural(name):
    """A key to sort names by, such that 2 comes before 10."""
    return [part.zfill(12) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]

def list_folder(folder):
    """Every image of a person's own folder. The folders in it are the classes, each with all that
    lies below it; images that lie in no such folder are a class named after the folder itself.
    Hidden files, links to folders and folders named "runs" are left out.
    -> [(path, class, None)]"""
    if not Path(folder).is_dir():
        fail(f"--dataset {folder}: no such folder, and not digits, mnist, cifar10 or cars")
    listing = []
    for path in Path(folder).rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(HIDDEN) or part == "runs" for part in parts)
        if path.suffix.lower() in SUFFIXES and not hidden:
            classname = parts[0] if len(parts) > 1 else Path(folder).resolve().name
            listing.append((path, classname, None))
    return listing

def body_of(model):
    """"Audi TT RS Coupe 2012" -> "Coupe": one of 8 types, or "other", as 15 names have none."""
    bodies = ("Cab", "Convertible", "Coupe", "Hatchback", "SUV", "Sedan", "Van", "Wagon")
    model = model.replace("Minivan", "Van")
    return next((body for body in bodies if f" {body} " in model), "other")

def list_cars(data_dir, labels):
    """The training images of Stanford Cars, as torchvision's or Kaggle's copy lays them out.

    The class is the car's body type or, with labels="model", its model, and each car is cropped by
    the box of its annotation.  -> [(path, class, (left, top, right, bottom))]"""
    paths = {path.name: path for path in Path(data_dir).rglob("cars_train/*.jpg")}
    where = "github.com/pytorch/vision/issues/7545 says where to get"
    if not paths:
        fail(f"no Stanford Cars in {data_dir}: {where} them; put stanford_cars or cars_train there."
             " Any folder of images can be named instead: --dataset FOLDER")
    mats = {path.name: path for path in Path(data_dir).rglob("cars_*.mat")}
    if not {"cars_train_annos.mat", "cars_meta.mat"} <= mats.keys():
        print("cars without cars_train_annos.mat and cars_meta.mat are one class, and not cropped;"
              f" {where} them")
        return [(path, "car", None) for path in paths.values()]
    models = loadmat(mats["cars_meta.mat"], squeeze_me=True)["class_names"]
    annotations = loadmat(mats["cars_train_annos.mat"], squeeze_me=True)["annotations"]
    listing = []
    for image in annotations:
        model = str(models[int(image["class"]) - 1])  # classes count from 1, and pixels too
        left, top, right, bottom = [int(image[f"bbox_{side}"]) for side in ("x1", "y1", "x2", "y2")]
        name = body_of(model) if labels == "body" else model
        if image["fname"] in paths:
            listing.append((paths[image["fname"]], name, (left - 1, top - 1, right, bottom)))
    return listing

def read_image(path, box, size):
    """One image as (size, size, 3), uint8: cropped to its box, turned upright, scaled so that its
    shorter side fits, and cropped in the middle."""
    image = ImageOps.exif_transpose(Image.open(path).crop(box))
    if image.mode.startswith("I;16"):  # 16 bits
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("grey levels without a known range; save it with 8 bits")
    if image.has_transparency_data:  # what is clear becomes white
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))

def read_images(listing, size):
    """The images of a listing, [(path, class, box)]. One that cannot be read is named and skipped.
    -> uint8 (N, 3, size, size), int64 (N,), the names of the classes"""
    def attempt(entry):
        path, name, box = entry
        try:
            return read_image(path, box, size), name
        except Exception as e:  # truncated, or no image whatever its name says
            tqdm.write(f"skipped {path}: {str(e) or type(e).__name__}", file=sys.stderr)

    listing = sorted(listing, key=lambda entry: natural(str(entry[0])))
    pairs = thread_map(attempt, listing, desc="reading images", disable=RANK > 0)
    found = [pair for pair in pairs if pair is not None]
    if len(found) < 2:
        fail(f"only {len(found)} of {len(listing)} images can be read, and at least 2 are needed")
    names = sorted({name for _, name in found}, key=natural)
    x = torch.tensor(np.stack([image for image, _ in found]))
    y = torch.tensor([names.index(name) for _, name in found])
    return x.permute(0, 3, 1, 2).contiguous(), y, names

# ------------------------------------------- the judge: how near are samples to real images?

# Copied from ddpm_ho_2020.py
JUDGE_STEPS = 1000  # the same for every run, so that all distances on the same data compare

def train_judge(data, batch=128):
    """A small classifier of the real images. In its 64 features samples are compared with real
    ones. Large images are seen at about 32x32, which is enough to tell classes apart.
    -> Sequential(features, head)"""
    torch.manual_seed(0)
    _, C, H, W = data.images.shape
    stride = max(1, min(H, W) // 32)
    pool = 2 if min(H, W) >= 32 else 1
    layers = [conv3(C, 32, stride), nn.ReLU(), conv3(32, 64, 2), nn.ReLU(), conv3(64, 64, 2),
              nn.ReLU(), nn.AvgPool2d(pool), nn.Flatten(), nn.Dropout(0.2)]
    size = nn.Sequential(*layers)(torch.zeros(1, C, H, W)).shape[1]
    features = nn.Sequential(*layers, nn.Linear(size, 64), nn.ReLU())
    judge = nn.Sequential(features, nn.Linear(64, len(data.names))).to(data.images.device)
    opt = torch.optim.Adam(judge.parameters())
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for step in tqdm(range(JUDGE_STEPS), "training the judge", leave=False):
            opt.param_groups[0]["lr"] = 2e-3 * (1 - step / JUDGE_STEPS)
            i = torch.randint(len(data.images), (batch,), device=data.images.device)
            loss = F.cross_entropy(judge(to_float(data.images[i])), data.labels[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
    return judge.eval().requires_grad_(False)

def features_of(judge, images):
    """uint8 (N, C, H, W) -> (N, 64)"""
    return torch.cat([judge[0](to_float(part)) for part in images.split(500)])

# Not copied: samples that were asked for by label.
def real_like(data, y, seed):
    """Real training images with the labels y (n,), drawn by the seed; of a small class some
    twice."""
    picked = data.images.new_empty(len(y), *data.images.shape[1:])
    for k in y.unique():
        of_class = data.images[data.labels == k]
        if len(of_class) == 0:  # all images of a small class may be held out
            of_class = data.held_out[data.held_labels == k]
        asked = (y == k).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=torch.Generator().manual_seed(seed))
        i = torch.arange(len(asked)) % len(of_class)
        picked[asked] = of_class[order[i].to(y.device)]
    return picked

def evaluate(images, y, judge, f_held):
    """Samples, uint8 (N, C, H, W), drawn for the labels y; f_held: features of real ones."""
    f = features_of(judge, images)
    classifier_score, accuracy = class_scores(judge[1](f).cpu().double().log_softmax(1), y.cpu())
    return {"frechet": frechet_distance(f, f_held), "classifier_score": classifier_score,
            "label_accuracy": accuracy}

# -------------------------------------------------------------------------- folders, checkpoints

# Copied from ddpm_ho_2020.py
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

def save(state, path):
    """Write a checkpoint under another name, then rename it: a run that is killed meanwhile leaves
    the last checkpoint whole."""
    with open(f"{path}.tmp", "wb") as file:  # to a name, torch.save reports no OSError
        torch.save(state, file)
    os.replace(f"{path}.tmp", path)

def load_checkpoint(path):
    """What save has written. Ends the run if it is missing, damaged or another script's."""
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        script, schedule = run["script"], run["config"]["schedule"]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        fail(f"{path}: there is no such file (--checkpoint takes a file, --resume a folder)")
    except Exception as e:  # the bytes of a damaged file can lead anywhere
        fail(f"{path} is damaged, or no checkpoint of {SCRIPT}.py ({type(e).__name__})")
    if script != SCRIPT or schedule not in SCHEDULES:
        fail(f"{path} is a checkpoint of {script}.py with the schedule {schedule}")
    return run

# Not copied: the networks.
def make_network(config, image_shape, names):
    """The network that a run's settings describe.  names: of the classes"""
    return ConditionalUNet(len(names), image_shape, config["channels"], config["multipliers"],
                           config["blocks"], config["attention"], config["dropout"])

def make_classifier(config, image_shape, names):
    """The classifier of noised images, half as wide as the U-Net."""
    return NoisyClassifier(len(names), image_shape, max(4, config["channels"] // 8 * 4),
                           config["multipliers"], config["blocks"], config["attention"],
                           config["dropout"])

def load(path, device="cpu"):
    """What a notebook needs of a checkpoint: ε_θ(x, t, y) (whatever the network predicts), the
    schedule, the shape of an image (C, H, W), and the names of the classes, whose number stands for
    ∅.

        eps_theta, s, shape, names = load("assets/mnist_cfg.pt")
        y = torch.full((16,), names.index("7"))
        eps_tilde = guided(eps_theta, y, null=len(names), w=1)
        sevens = last_image(ddim_sample(*subchain(eps_tilde, s, 50), torch.randn(16, *shape)))"""
    run = load_checkpoint(path)
    net = make_network(run["config"], run["image_shape"], run["names"])
    net.load_state_dict(run["ema"])
    net = in_fast_format(net.to(device), device).eval().requires_grad_(False)
    s = make_schedule(run["config"]["schedule"], run["config"]["T"]).to(device)
    predict = run["config"].get("predict", "eps")  # mnist_cfg.pt is older than this setting
    eps_theta = as_eps_theta(net, s, predict)
    return eps_theta, s, run["image_shape"], run["names"]

def load_classifier(path, device):
    """The classifier that was trained beside a checkpoint."""
    path = Path(path).with_name("classifier.pt")
    if not path.is_file():
        fail(f"{path}: there is no classifier beside the checkpoint; --guidance free needs none")
    run = load_checkpoint(path)
    net = make_classifier(run["config"], run["image_shape"], run["names"])
    net.load_state_dict(run["ema"])
    return in_fast_format(net.to(device), device).eval().requires_grad_(False)

# ------------------------------------------------------------------------- training and sampling

# Copied from ddpm_ho_2020.py
def fast_in_bfloat16(device):
    """Does a device compute faster in bfloat16? GPUs since 2020 do, and some CPUs."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device == "cpu" and (able.get("avx512_bf16", False) or able.get("amx_bf16", False))

def in_fast_format(net, device):
    """The order in memory that is faster: channels last, but on a CPU in bfloat16 the usual one."""
    if device == "cpu" and fast_in_bfloat16(device):
        return net
    return net.to(memory_format=torch.channels_last)

def in_bfloat16(function, args):
    """The same function with networks that compute in bfloat16, if args.bf16 says so."""
    kind = torch.device(args.device).type  # "cuda:1" is of the type cuda
    return torch.autocast(kind, torch.bfloat16, enabled=args.bf16)(function)

def train(args, run, make, data, path, one_step, look=None):
    """Train a network from where the run is to args.steps. The run is saved to path each minute and
    at the end, and whoever wants to draw loads it from there.

    run is the dictionary that open_run has made; it becomes the checkpoint. make is make_network,
    or another function like it.
    one_step(net, ema, opt, x0, y, step) -> loss is one step of training on a batch; ema is the
    average of net, and opt is Adam.  look(ema) draws the images of a row of training.png, on which
    one sees the network learn.

    Every step has a seed of its own. So a run that was killed and resumed is the uninterrupted run,
    bit for bit on a CPU, although no random state is saved. (With more --steps than it was begun
    with it is another run, as the learning rate falls to 0 at the end.) Of the processes that
    torchrun starts, each takes its share of the batch from its own seed, and their gradients are
    averaged (DDP)."""
    if run["step"] >= args.steps:
        return
    torch.manual_seed(args.seed)
    net = make(vars(args), run["image_shape"], run["names"])
    net = in_fast_format(net.to(args.device), args.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    opt = torch.optim.Adam(net.parameters(), args.lr)
    if run["step"] > 0:
        net.load_state_dict(run["net"])
        ema.load_state_dict(run["ema"])
        opt.load_state_dict(run["optimizer"])
    millions = sum(weight.numel() for weight in net.parameters()) / 1e6
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    device, warmup = data.images.device, min(args.warmup, max(1, args.steps // 10))
    losses = torch.zeros(args.steps, device=device)
    losses[:run["step"]] = run["losses"]
    milestones = {max(1, args.steps // 2 ** i) for i in range(6)}
    began, saved, before = time.monotonic(), time.monotonic(), run["seconds"]
    bar = tqdm(range(run["step"] + 1, args.steps + 1), f"training {millions:.2f} M parameters",
               args.steps, initial=run["step"], disable=RANK > 0)
    for step in bar:
        torch.manual_seed(10 ** 9 * args.seed + WORLD * step + RANK)
        fall = 1 - (step - 1) / args.steps if args.decay_lr else 1
        opt.param_groups[0]["lr"] = args.lr * min(1, step / warmup) * fall
        i = torch.randint(len(data.images), (args.batch // WORLD,), device=device)
        x0 = to_float(data.images[i])
        if args.flip:
            mirrored = torch.rand(len(x0), 1, 1, 1, device=device) < 0.5
            x0 = torch.where(mirrored, x0.flip(3), x0)
        losses[step - 1] = one_step(model, ema, opt, x0, data.labels[i], step)

        due = step == args.steps or time.monotonic() - saved > 60
        if step % 100 == 0 or due:
            # One loss that is not finite makes all weights so.
            if not all(weight.isfinite().all() for weight in net.parameters()):
                fail(f"the loss is no longer finite at step {step}: try a smaller --lr than"
                     f" {args.lr:g}. The last checkpoint is as it was")
            bar.set_postfix(loss=losses[max(0, step - 100):step].mean().item())
        if look is not None and step in milestones and RANK == 0:
            run["snapshots"][step] = look(ema).cpu()
            rows = [(f"step {k}", images) for k, images in run["snapshots"].items()]
            draw_table(path.with_name("training.png"), rows)
        if due and RANK == 0:
            saved = time.monotonic()
            run.update(step=step, seconds=before + saved - began, losses=losses[:step].cpu(),
                       net=net.state_dict(), ema=ema.state_dict(), optimizer=opt.state_dict())
            save(run, path)

@torch.no_grad()
def sample(args, s, image_shape, theta_of, n):
    """Draw n images from the seed's noise.

    theta_of(first, last) is the ε_θ that draws the images first to last - 1. With labels it differs
    from image to image, otherwise it does not.

    They are drawn in portions of 50, which fit a CPU's cache, or 500. Of the first 16 images the
    frames are kept that the figures need, from the largest t (of the whole chain) to 0:
    {t: (x_t, x̂_0)}, as uint8.
    -> uint8 (n, C, H, W), frames"""
    torch.manual_seed(args.seed)
    portion = 50 if args.device == "cpu" else 500
    options = {"variance": args.variance} if args.sampler == "ddpm" else {}
    steps, images, frames = args.sampling_steps, [], {}
    kept = {round(i) for i in np.linspace(0, steps - 1, 21)}
    for first in range(0, n, portion):
        last = min(first + portion, n)
        theta, short = subchain(in_bfloat16(theta_of(first, last), args), s, steps)
        noise = torch.randn(last - first, *image_shape, device=s.beta.device)
        chain = SAMPLERS[args.sampler](theta, short, noise, clip=args.clip, **options)
        for i, x, x0_hat in tqdm(chain, f"sampling, {last} of {n}", steps, leave=False):
            if first == 0 and i in kept:
                frames[round(i * s.T / steps)] = to_uint8(x[:16]).cpu(), to_uint8(x0_hat[:16]).cpu()
        images.append(to_uint8(x))
    return torch.cat(images), frames

# --------------------------------------------------------------------------------------- figures

# Copied from ddpm_ho_2020.py
def table_of(rows):
    """Rows of n images, uint8 (n, C, H, W), as one picture with white lines between them."""
    images = torch.cat([images.cpu() for _, images in rows])
    grid = make_grid(images, nrow=len(rows[0][1]), padding=1, pad_value=255)
    return grid.permute(1, 2, 0).numpy()

def draw_table(path, rows, columns=()):
    """Save a table of images.  rows: [(label, uint8 (n, C, H, W))];  columns: the labels on top
    -> matplotlib's picture of the table"""
    table, n = table_of(rows), len(rows[0][1])
    H, W = table.shape[0] / len(rows), table.shape[1] / n
    size = 1.2 + 0.7 * n, 0.4 + 0.7 * len(rows) * H / W
    ax = Figure(size, layout="constrained").subplots()
    picture = ax.imshow(table, interpolation="nearest")
    ax.set_xticks((np.arange(len(columns)) + 0.5) * W, columns)
    ax.set_yticks((np.arange(len(rows)) + 0.5) * H, [label for label, _ in rows])
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.figure.savefig(path, dpi=100)
    return picture

def draw_curve(path, x, y, xlabel, ylabel, yscale="linear"):
    """Save a curve."""
    ax = Figure((6, 4), layout="constrained").subplots()
    ax.plot(x, y)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    ax.figure.savefig(path, dpi=100)

def draw_loss(path, losses):
    """Save the curve of the loss: the mean of each hundredth of the run."""
    means = [part.mean().item() for part in losses.chunk(100)]
    steps = np.linspace(0, len(losses), len(means) + 1)[1:]
    draw_curve(path, steps, means, "step", "loss", "log")

# Not copied: the reverse process as a film, the paper's trade-off, and its Fig. 2.
def draw_film(path, frames, n, columns=()):
    """Save the reverse process of n images, x_t above x̂_0, as a looping GIF; its end as PNG."""
    rows = [[("x_t", xt[:n]), ("x̂_0", x0_hat[:n])] for xt, x0_hat in frames.values()]
    picture = draw_table(path.with_suffix(".png"), rows[-1], columns)
    picture.figure.set_layout_engine("none")  # where things are now they stay
    order = [*range(len(rows)), *[len(rows) - 1] * 20]  # the end stands still for a while
    film = FuncAnimation(picture.figure, lambda i: picture.set_data(table_of(rows[i])), order)
    film.save(path, "pillow", fps=10, dpi=100)

def draw_tradeoff(path, sweeps, metrics):
    """Save distance and label accuracy over w, and the distance over the classifier score (Figs. 4,
    5).

    sweeps: {kind of guidance: [{"w": ..., "frechet": ...}, ...]}.  Dotted: real images."""
    figure = Figure((11, 3.4), layout="constrained")
    panels = [("w", "frechet", "Fréchet distance"), ("w", "label_accuracy", "label accuracy"),
              ("classifier_score", "frechet", "Fréchet distance")]
    for ax, (x, name, ylabel) in zip(figure.subplots(1, 3), panels):
        for kind, rows in sweeps.items():
            ax.plot([row[x] for row in rows], [row[name] for row in rows], "o-", label=kind)
        of_real = {"frechet": "frechet_floor", "label_accuracy": "label_accuracy_real"}[name]
        ax.axhline(metrics[of_real], color="gray", linestyle=":", label="real images")
        ax.set(xlabel=x.replace("_", " "), ylabel=ylabel)
    ax.legend()
    figure.savefig(path, dpi=100)

@torch.no_grad()
def draw_gaussians(path, weights=(0, 1, 3), n=3000):
    """Save samples of three Gaussians, from exact scores, guided by each weight.

    The paper's Fig. 2 shows the densities p(x | y) p(y | x)^w. Guided samples lie farther out.

        python -c "import ddpm_conditional_cfg as cfg; cfg.draw_gaussians('gaussians.png')" """
    torch.manual_seed(0)
    s = make_schedule("cosine", 200)
    angles = torch.tensor([90.0, 210.0, 330.0]).deg2rad()
    means = torch.stack([angles.cos(), angles.sin()], 1)
    y, noise = torch.arange(n) % 3, torch.randn(n, 2)
    eps_theta = gaussians_eps_theta(s, means, variance=0.2)
    figure = Figure((3 * len(weights), 3.5), layout="constrained")
    for ax, w in zip(figure.subplots(1, len(weights), sharex=True, sharey=True), weights):
        x = last_image(ddpm_sample(guided(eps_theta, y, 3, w), s, noise, "beta_tilde", clip=False))
        ax.scatter(*x.T, s=2, c=y, cmap="brg")
        ax.set(title=f"w = {w}", aspect="equal")
    figure.savefig(path, dpi=110)

# ----------------------------------------------------------------------------- presets and flags

# Copied from ddpm_ho_2020.py
PAPER = dict(  # Ho et al. 2020's training on CIFAR-10
    T=1000, schedule="linear", predict="eps", loss="simple",
    channels=128, multipliers=[1, 2, 2, 2], blocks=2, attention=[16], dropout=0.1,
    time_embedding=True,
    steps=800_000, batch=128, lr=2e-4,
    decay_lr=False,  # whether the learning rate falls to 0
    warmup=5000,  # steps until the learning rate is reached (from the authors' code)
    ema=0.9999,
    flip=True,  # whether half of the images are mirrored
    sampler="ddpm", sampling_steps=1000, variance="beta", clip=True,
    num_samples=1000)  # the paper draws 50,000
SMALL = PAPER | dict(  # what a laptop can train
    schedule="cosine", blocks=1, dropout=0.0, lr=2e-3, decay_lr=True, warmup=200, ema=0.998,
    flip=False, sampling_steps=100, variance="beta_tilde")
CARS = SMALL | dict(
    predict="x0", channels=16, multipliers=[1, 2, 4, 8], attention=[8], batch=32, steps=7000,
    ema=0.999, flip=True)
PRESETS = {  # each data set's own, and more for --preset
    "digits": SMALL | dict(channels=32, multipliers=[1, 2], attention=[4], steps=1700,
                           sampling_steps=50),
    "mnist": SMALL | dict(channels=16, multipliers=[1, 2, 4], attention=[7], steps=7000, batch=64,
                          lr=4e-3),
    "cifar10": SMALL | dict(channels=32, multipliers=[1, 2, 2], attention=[8], steps=8000, batch=64,
                            flip=True),
    "cars": CARS,
    "folder": CARS | dict(flip=False),  # mirrored letters or digits would be wrong
    "cars-long": CARS | dict(steps=28_000),
    "paper": PAPER,
}
QUICK = dict(channels=16, blocks=1, steps=30, num_samples=100, sampling_steps=10)
SIZES = {"digits": 8, "mnist": 28, "cifar10": 32}  # of images that are not scaled

UNSET = dict(  # flags that are of one call, as they are when they are not typed
    out=None, resume=None, checkpoint=None, evaluate=False, experiments=False, quick=False,
    t_max=None, classes=None)
OF_A_CALL = {*UNSET, "device", "bf16"}  # a checkpoint does not keep these
OF_SAMPLING = {"sampler", "sampling_steps", "variance", "num_samples", "guidance", "w", "t_max",
               "classes", "evaluate", "experiments", "device", "data_dir"}

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

class HelpFormat(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the defaults in force, and the examples line by line."""

def add_flags(p):
    """The flags of both image scripts. Their defaults come from a preset or a checkpoint."""
    g = p.add_argument_group("the run")
    g.add_argument("--out", type=not_empty, help="the folder to make for the results (without it,"
                   " a new one in runs/)")
    g.add_argument("--resume", type=not_empty, metavar="FOLDER",
                   help="go on with the training in this folder")
    g.add_argument("--checkpoint", type=not_empty, metavar="FILE",
                   help="draw from this file; needs no other flag")
    g.add_argument("--evaluate", action="store_true", help="--checkpoint: compare with real images")
    g.add_argument("--quick", action="store_true", help="everything once, in seconds; draws noise")
    g.add_argument("--seed", type=int, help="of the weights, batches and samples")
    g.add_argument("--device", type=open_device, help="cpu, cuda or cuda:1")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", type=not_empty, help="digits, mnist, cifar10, cars, or the path of"
                   " a folder of images, in which each folder is a class")
    g.add_argument("--data-dir", help="where MNIST, CIFAR-10 and cars are")
    g.add_argument("--image-size", type=positive,
                   help="scale cars, or your images, to such squares")
    g = p.add_argument_group("network")
    g.add_argument("--channels", type=positive, help="channels at full size; twice as many learn"
                   " more, and take three times as long")
    g.add_argument("--multipliers", type=positive, nargs="+", help="one level for each number, half"
                   " as large as the one before, with this many times the channels")
    g = p.add_argument_group("training")
    g.add_argument("--preset", choices=PRESETS, help="settings of another data set or paper")
    g.add_argument("--T", type=positive, help="number of diffusion steps (paper: 1000)")
    g.add_argument("--schedule", choices=SCHEDULES, help="how fast noise is added (paper: linear)")
    g.add_argument("--steps", type=positive, help="training steps; epochs = steps x batch / images")
    g.add_argument("--batch", type=positive, help="images in a training step")
    g.add_argument("--lr", type=float, help="learning rate; smaller if the loss is not finite")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of them?")
    g = p.add_argument_group("sampling")
    g.add_argument("--sampler", choices=SAMPLERS, help="ddpm: Algorithm 2; ddim: without noise")
    g.add_argument("--sampling-steps", type=positive, help="steps from noise to image, at most T")
    g.add_argument("--num-samples", type=positive, help="images to draw")
    return g

def read_flags(p, argv, **own_defaults):
    """The flags: what was typed, over the settings of a checkpoint or a preset.  -> Namespace

    The words are parsed twice: first to see what was typed, on which the defaults depend, then with
    these defaults, which -h shows. p was made with argument_default=SUPPRESS, so that at first what
    was not typed has no value at all."""
    p.error = fail  # one line instead of the whole usage
    argv = sys.argv[1:] if argv is None else argv
    typed = vars(p.parse_args([word for word in argv if word not in ("-h", "--help")]))
    defaults = {"seed": 0, "dataset": "digits", "data_dir": "data", "device": default_device(),
                **own_defaults}
    if "checkpoint" in typed or "resume" in typed:
        defaults |= settings_of(typed)
    else:
        defaults |= preset_of(typed)
    defaults["sampling_steps"] = min(defaults["sampling_steps"], typed.get("T", defaults["T"]))
    p.set_defaults(**defaults)
    args = p.parse_args(argv, argparse.Namespace(**UNSET))

    sizes = [args.image_size // 2 ** level for level in range(len(args.multipliers))]
    if "attention" not in typed:  # a preset may name sizes that these levels do not have
        args.attention = [size for size in args.attention if size in sizes]
    if args.sampling_steps > args.T:
        fail(f"--sampling-steps {args.sampling_steps}: there are only {args.T} steps")
    if args.batch % WORLD:
        fail(f"--batch {args.batch} cannot be shared evenly by {WORLD} processes")
    try:
        with torch.device("meta"):  # do the sizes fit each other? this network takes no memory
            UNet((3, args.image_size, args.image_size), args.channels, args.multipliers,
                 args.blocks, args.attention)
    except ValueError as e:
        fail(e)
    # bfloat16 has 8 bits, which cannot tell μ̃_t from x_t.
    args.bf16 = fast_in_bfloat16(args.device) and args.predict != "mu"
    return args

def default_device():
    """A GPU, of which torchrun's processes have one each, or the CPU. A Mac's GPU is not used."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"

def preset_of(typed):
    """The settings of a new run: those of --preset, else those of its data set."""
    dataset = typed.get("dataset", "digits")
    if dataset in SIZES and "image_size" in typed:
        fail(f"--image-size: {dataset} has images of {SIZES[dataset]} pixels, and keeps them")
    own_preset = dataset if dataset in (*SIZES, "cars") else "folder"
    defaults = PRESETS[typed.get("preset", own_preset)] | {"image_size": SIZES.get(dataset, 64)}
    if "quick" in typed:
        defaults |= QUICK | {"image_size": SIZES.get(dataset, 32)}
    return defaults

def settings_of(typed):
    """A checkpoint's settings. Beside --checkpoint one may type only what concerns drawing, beside
    --resume also --steps and --lr."""
    if "checkpoint" in typed:
        path, free = typed["checkpoint"], {"checkpoint", "out", "seed"}
    else:
        path, free = Path(typed["resume"], "checkpoint.pt"), {"resume", "steps", "lr"}
    run = load_checkpoint(path)
    config = PAPER | run["config"] | {"image_size": run["image_shape"][-1]}
    for name in typed.keys() - free - OF_SAMPLING:
        if typed[name] != config.get(name):
            flag = name.replace("_", "-")
            fail(f"--{flag} {typed[name]} does not go with {path}, which was trained with"
                 f" {config.get(name, 'no such setting')}")
    if "checkpoint" in typed and "evaluate" not in typed:
        config["num_samples"] = 64
    return config

# ------------------------------------------------------------------------------------------ main

# Copied from ddpm_ho_2020.py
def open_run(args):
    """The data, or None where drawing needs none; and the run, new or from its checkpoint. Under
    torchrun the processes meet here; main ends that."""
    data = None
    if WORLD > 1:
        torch.distributed.init_process_group()
    if not args.checkpoint or args.evaluate:
        data = load_data(args)
    if args.checkpoint or args.resume:
        run = load_checkpoint(args.checkpoint or Path(args.resume, "checkpoint.pt"))
        run["config"] |= {"steps": args.steps, "lr": args.lr}  # --resume may have changed them
        if data is not None and run["names"] != data.names:
            names = ", ".join(run["names"])[:200]
            fail(f"{args.dataset} has other classes than the checkpoint, which has {names}")
    else:
        config = {name: value for name, value in vars(args).items() if name not in OF_A_CALL}
        run = {"script": SCRIPT, "config": config, "image_shape": list(data.images.shape[1:]),
               "names": data.names, "step": 0, "seconds": 0.0, "losses": torch.zeros(0),
               "snapshots": {}}
    return data, run

def open_folder(args, run, data):
    """Find or make the run's folder, and say what is about to run.  -> Path"""
    name = f"runs/{SCRIPT}-{Path(args.dataset).resolve().name}"
    if args.quick:
        name += "-quick"
    if args.checkpoint:
        name += "-samples"
    if RANK > 0:  # only the first of torchrun's processes writes
        return Path(args.resume or name)
    args.out = args.resume or str(claim_folder(args.out, name))
    print(f"{args.dataset}, {run['image_shape']}, on {args.device}; results in {args.out}")
    if data is not None:
        print(f"{len(data.images)} images of the classes {', '.join(data.names[:15])}", flush=True)
    return Path(args.out)

def finish(args, run, measured):
    """Write metrics.json, print the numbers and what to type next. The last line names the picture,
    which is drawn after this, so that no number is lost if it fails."""
    metrics = {"script": SCRIPT, "dataset": args.dataset, "seed": args.seed, "device": args.device,
               "torch": torch.__version__, "steps": run["step"],
               "params": sum(weight.numel() for weight in run["ema"].values()), **measured}
    if not args.checkpoint:
        last = max(1, len(run["losses"]) // 20)
        metrics |= {"loss": run["losses"][-last:].mean().item(), "seconds_train": run["seconds"]}
    metrics["config"] = {name: value for name, value in vars(args).items() if value is not None}
    text = json.dumps(metrics, indent=1, ensure_ascii=False)
    Path(args.out, "metrics.json").write_text(text, encoding="utf-8")
    for line in LINES.strip().splitlines():
        try:
            print(line.format(**metrics))
        except KeyError:  # a number that this run does not have
            continue
    if args.quick:
        print("--quick trains for seconds only: its samples are still noise")
    if not args.checkpoint:
        draw_loss(Path(args.out, "loss.png"), run["losses"])
        print(f"draw more:  python {SCRIPT}.py --checkpoint {args.out}/checkpoint.pt")
        print(f"train on:   python {SCRIPT}.py --resume {args.out} --steps {2 * run['step']}")
    print(f"look at:    {args.out}/samples.png")
    return metrics

def run_from_shell():
    """main(get_args()), with one line and exit status 2 for what a user can cause."""
    args = get_args()
    try:
        main(args)
    except KeyboardInterrupt:
        folder = args.resume or args.out
        if args.checkpoint or not folder or not Path(folder, "checkpoint.pt").is_file():
            fail("stopped by Ctrl-C. No checkpoint was made; a training makes one each minute")
        fail(f"stopped by Ctrl-C. To go on: python {SCRIPT}.py --resume {folder}. To draw from"
             f" the last checkpoint: python {SCRIPT}.py --checkpoint {folder}/checkpoint.pt")
    except OSError as e:  # no space left, no permission
        fail(f"{e}. What was saved before is as it was")
    except torch.cuda.OutOfMemoryError:
        fail(f"the GPU's memory is full: take a smaller --batch (now {args.batch}), --channels"
             f" ({args.channels}) or --image-size ({args.image_size})")

# Not copied: the flags of guidance, and the run.
LINES = """
real images       {frechet_floor:20.2f} {label_accuracy_real:16.1%}
loss {loss:.4f}, training {seconds_train:.0f} s"""
ROW = "{kind:<12}{w:>7g}{frechet:>19.2f}{label_accuracy:>17.1%}{classifier_score:>19.2f}"

def get_args(argv=None):
    """The flags of this script.  argv: a list of words; None takes those of the command line"""
    p = argparse.ArgumentParser(
        description="Train a class-conditional diffusion model and guide it (Ho & Salimans 2022).",
        epilog="examples:\n  python ddpm_conditional_cfg.py --dataset mnist\n"
               "  python ddpm_conditional_cfg.py --dataset photos    (a folder for each class)\n"
               "  python ddpm_conditional_cfg.py --checkpoint assets/mnist_cfg.pt --classes 3 7",
        formatter_class=HelpFormat, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    add_flags(p)
    g = p.add_argument_group("labels and guidance")
    g.add_argument("--labels", choices=["body", "model"],
                   help="the classes of cars: 9 body types, or 196 models")
    g.add_argument("--p-uncond", type=float, help="share of the labels that are dropped in training"
                   " (paper: 0.1); 0 trains the conditional model alone, 1 the unconditional one")
    g.add_argument("--guidance", choices=["free", "classifier", "both"], nargs="+",
                   help="free: by Eq. (6); classifier: by a classifier, of the"
                   " model without a label; both: the same of the model with the label")
    g.add_argument("--w", type=float, nargs="+",
                   help="weights: 0 is no guidance; more makes the class clearer and the images of"
                        " it more alike")
    g.add_argument("--t-max", type=int, help="free: guide only where t is at most this")
    g.add_argument("--classes", nargs="+", help="names of the classes to draw (default: all)")
    args = read_flags(p, argv, labels="body", p_uncond=0.1, guidance=["free"],
                      w=[-1, 0, 0.1, 0.3, 1, 4])
    if not 0 <= args.p_uncond <= 1:
        fail(f"--p-uncond {args.p_uncond} is a share, from 0 to 1")
    if args.p_uncond in (0, 1):  # Eq. (6) needs both models
        print(f"--p-uncond {args.p_uncond} trains one model, which is drawn from without guidance")
        args.guidance, args.w = ["free"], [0 - args.p_uncond]  # w = -1 is the one without labels
    return args

def labels_to_draw(args, names):
    """--num-samples labels, the --classes in turn.  -> y (N,)"""
    if len(names) < 2:
        fail(f"guidance needs two classes, and {args.dataset} has one: give each class a folder")
    unknown = set(args.classes or names) - set(names)
    if unknown:
        fail(f"--classes {' '.join(unknown)}: the classes are {', '.join(names)[:300]}")
    y = torch.tensor([names.index(name) for name in args.classes or names], device=args.device)
    return y.repeat(args.num_samples)[:args.num_samples]

def guide(kind, eps_theta, classifier, s, y, K, w, t_max):
    """The ε of one kind of guidance, for the labels y.  -> a callable of x, t"""
    if kind == "free":
        return guided(eps_theta, y, K, w, t_max)
    return classifier_guided(eps_theta, classifier, s, y, K, w, conditional=kind == "both")

def train_networks(args, run, data, out):
    """Train ε_θ(x_t, t, y) and, if one is to guide it, the classifier of noised images by the same
    settings; or go on with them. They are saved as checkpoint.pt and classifier.pt."""
    K = len(data.names)
    s = make_schedule(args.schedule, args.T).to(args.device)
    loss = in_bfloat16(partial(l_cfg, predict=args.predict), args)
    classifier_loss = in_bfloat16(l_classifier, args)

    def one_step(net, ema, opt, x0, y, step):
        return cfg_train_step(net, ema, opt, s, x0, y, step, K, args.p_uncond, loss, args.ema)

    def classifier_step(net, ema, opt, x0, y, step):
        return cfg_train_step(net, ema, opt, s, x0, y, step, K, 0, classifier_loss, args.ema)

    def look(ema):
        y = torch.arange(16, device=args.device) % K
        w = -1 if args.p_uncond == 1 else 0
        eps_tilde = guided(as_eps_theta(ema, s, args.predict), y, K, w)
        return sample(args, s, run["image_shape"], lambda first, last: eps_tilde, 16)[0]

    path = out / "classifier.pt"
    own_run = {**run, "step": 0, "seconds": 0.0, "losses": torch.zeros(0), "snapshots": {}}
    train(args, run, make_network, data, out / "checkpoint.pt", one_step, look)
    if args.guidance != ["free"]:
        if args.resume and path.is_file():
            own_run = load_checkpoint(path)
        train(args, own_run, make_classifier, data, path, classifier_step)

def compare_real(args, data, y):
    """The judge, its features of held-out images of the classes in y, and its numbers: the distance
    of training images with the labels y, and the label accuracy of the held-out ones. Or None,
    None, {} where there are too few. Prints the head of the table to which the sweep adds rows."""
    held = torch.isin(data.held_labels, y)
    if args.quick or min(len(y), held.sum()) <= 64:  # fewer have no covariance of 64 features
        print("no Fréchet distance: it takes over 64 samples and held-out images, and no --quick")
        return None, None, {}
    judge = train_judge(data)
    f_held = features_of(judge, data.held_out[held])
    f_real = features_of(judge, real_like(data, y, args.seed))
    print("guidance          w   Fréchet distance   label accuracy   classifier score")
    right = judge[1](f_held).argmax(1) == data.held_labels[held]
    return judge, f_held, {"frechet_floor": frechet_distance(f_real, f_held),
                           "label_accuracy_real": right.double().mean().item()}

def main(args):
    """Train, unless there is a checkpoint; then sweep over w and compare.  -> the numbers"""
    data, run = open_run(args)
    names, K = run["names"], len(run["names"])
    y, classifier = labels_to_draw(args, names), None
    with_classifier = args.guidance != ["free"]
    if args.checkpoint and with_classifier:
        load_classifier(args.checkpoint, "cpu")  # one that is missing ends the run before a folder
    out = open_folder(args, run, data)
    if not args.checkpoint:
        train_networks(args, run, data, out)
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    if RANK > 0:  # the first of torchrun's processes draws alone
        sys.exit()

    path = args.checkpoint or out / "checkpoint.pt"
    eps_theta, s, _, _ = load(path, args.device)
    if with_classifier:
        classifier = load_classifier(path, args.device)
    rows, judge, metrics, n = [], None, {}, min(16, len(y))
    if data is not None:
        judge, f_held, metrics = compare_real(args, data, y)
        rows.append(("real", real_like(data, y[:n], args.seed)))
    sweeps = {kind: [] for kind in args.guidance}
    kept_w = min(args.w, key=abs)
    for kind, w in itertools.product(args.guidance, sorted(args.w)):
        def theta_of(first, last, kind=kind, w=w):
            return guide(kind, eps_theta, classifier, s, y[first:last], K, w, args.t_max)
        images, frames = sample(args, s, run["image_shape"], theta_of, len(y))
        row = {"w": w}
        if judge is not None:
            row |= evaluate(images, y, judge, f_held)
            print(ROW.format(kind=kind, **row))
        sweeps[kind].append(row)
        rows.append((f"{kind}, w = {w:g}", images[:n]))
        if (kind, w) == (args.guidance[0], kept_w):  # for samples.npz and the film
            kept, kept_frames = images, frames
    for kind, sweep in sweeps.items():
        metrics["sweep" if kind == args.guidance[0] else f"sweep_{kind}"] = sweep
    metrics = finish(args, run, metrics)
    arrays = kept.permute(0, 2, 3, 1).cpu().numpy()  # N, H, W, C, as tools for FID read it
    np.savez_compressed(out / "samples.npz", arrays, y.cpu().numpy())
    columns = [textwrap.fill(names[k], 11) for k in y[:n].tolist()]
    draw_table(out / "samples.png", rows, columns)
    draw_film(out / "reverse.gif", kept_frames, min(10, n), columns[:10])
    if judge is not None:
        draw_tradeoff(out / "tradeoff.png", sweeps, metrics)
    return metrics

if __name__ == "__main__":
    run_from_shell()

"""Denoising Diffusion Probabilistic Models.  Ho, Jain, Abbeel 2020, arXiv 2006.11239.

One idea: noise an image x_0 to x_t, train a network ε_θ(x_t, t) to say which noise ε was added, and then, starting from pure
noise x_T, take a little of the predicted noise away T times. Equation, section and algorithm numbers are the paper's.

    python ddpm_ho_2020.py                                   # 8x8 digits, no download        @@ on two CPU cores
    python ddpm_ho_2020.py --dataset mnist                   # 28x28 digits                   @@
    python ddpm_ho_2020.py --resume --dataset mnist --steps 20000         # go on from where that run stopped
    python ddpm_ho_2020.py --checkpoint runs/ddpm_ho_2020-mnist/checkpoint.pt --sampler ddim --sampling-steps 50

Numbers to expect (seed 0): @@

Differs from the paper:
  - Smaller networks, larger learning rates and fewer steps for digits and MNIST (PRESETS); the flags' own defaults are the paper's.
  - x̂_0 is clipped to [-1, 1] when sampling: in the authors' code, not in Algorithm 2 (--no-clip turns it off).
  - The EMA's decay is warmed up, min(decay, (1 + n) / (10 + n)), so that short runs do not sample from their initial weights.
  - Samples of the small sets take fewer steps than T: the same chain seen at a subset of its t (--sampling-steps 1000 for all).
  - bfloat16 autocast on CUDA. Down-samplings pad both sides (TensorFlow's pad one). Batches are drawn with replacement.
  - FID needs a network that has to be downloaded. The Fréchet distance here is between features of a small classifier trained
    in this script, and comparable only with itself: with the floor printed beside it, and other runs on the same data set.

Legend for shapes: B batch, C channels, H height, W width, D embedding.
"""
import argparse
import copy
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from schedules import SCHEDULES, Schedule, like, make_schedule

# ------------------------------------------------------------------------------- Sec. 3.2, 3.4: reverse process and loss


def l_simple(eps_theta, s, x0, t, eps):
    """L_simple = E |ε - ε_θ(√ᾱ_t x_0 + √(1 - ᾱ_t) ε, t)|², per dimension.  Eq. (14), Algorithm 1.

    x0 (B, C, H, W) in [-1, 1];  t (B,) drawn from 1..T;  eps like x0, drawn from N(0, I).  -> ()"""
    return F.mse_loss(eps_theta(s.q_sample(x0, t, eps), t), eps)


def predict_x0(s, xt, t, eps_hat, clip=True):
    """x̂_0 = (x_t - √(1 - ᾱ_t) ε̂) / √ᾱ_t: Eq. (4) solved for x_0.  Eq. (15).  Near t = T this divides by almost 0, and a small
    error of ε̂ throws x̂_0 far out of the data's range, from where sampling does not come back: hence the clip."""
    alpha_bar = s.alpha_bar[t]
    x0_hat = (xt - like((1 - alpha_bar).sqrt(), xt) * eps_hat) / like(alpha_bar.sqrt(), xt)
    return x0_hat.clamp(-1, 1) if clip else x0_hat


def ddpm_sample(eps_theta, s, x, variance="beta", clip=True):
    """Algorithm 2, ancestral sampling from x = x_T ~ N(0, I).  Yields (t, x_t, x̂_0) for t = T-1..0.

    μ_θ is μ̃_t of Eq. (7) at x_0 = x̂_0, which without clipping equals Eq. (11), (x_t - β_t / √(1 - ᾱ_t) ε_θ) / √α_t.
    σ_t² = β_t is right if x_0 ~ N(0, I), σ_t² = β̃_t if x_0 is one point (Sec. 3.2): data lie between.
    eps_theta: any callable (x (B, ...), t (B,)) -> (B, ...)."""
    for t in range(s.T, 0, -1):
        eps_hat = eps_theta(x, torch.full((len(x),), t, device=x.device))
        x0_hat = predict_x0(s, x, t, eps_hat, clip)
        mu_theta, beta_tilde = s.q_posterior(x0_hat, x, t)
        sigma2 = like(s.beta[t], x) if variance == "beta" else beta_tilde
        z = torch.randn_like(x) if t > 1 else torch.zeros_like(x)  # the last step adds no noise
        x = mu_theta + sigma2.sqrt() * z
        yield t - 1, x, x0_hat


def ddim_sample(eps_theta, s, x, clip=True):
    """DDIM with η = 0: the same ε_θ, no noise.  Song, Meng & Ermon 2020, Eq. (12).  Yields (t, x_t, x̂_0) for t = T-1..0.

    x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1}) ε̂"""
    for t in range(s.T, 0, -1):
        alpha_bar, alpha_bar_prev = s.alpha_bar[t], s.alpha_bar[t - 1]
        eps_hat = eps_theta(x, torch.full((len(x),), t, device=x.device))
        x0_hat = predict_x0(s, x, t, eps_hat, clip)
        eps_hat = (x - like(alpha_bar.sqrt(), x) * x0_hat) / like((1 - alpha_bar).sqrt(), x)  # agrees with the clipped x̂_0
        x = like(alpha_bar_prev.sqrt(), x) * x0_hat + like((1 - alpha_bar_prev).sqrt(), x) * eps_hat
        yield t - 1, x, x0_hat


def subchain(eps_theta, s, steps):
    """The same forward process seen only at `steps` of its T times: a chain of its own, i = 1..steps at t = grid[i], with
    ᾱ_i = ᾱ_{grid[i]}, which every sampler takes as it takes the whole.  The grid holds 0 and T.
    -> (eps_theta of the short chain, its Schedule)"""
    grid = torch.linspace(0, s.T, steps + 1).round().long().to(s.beta.device)
    alpha_bar = s.alpha_bar[grid]
    beta = torch.cat([alpha_bar[:1] * 0, (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=1 - 1e-12)])
    return (lambda x, i: eps_theta(x, grid[i])), Schedule(beta.cpu()).to(s.beta.device)


# -------------------------------------------------------------------------------------- Sec. 4 and Appendix B: the U-Net


def norm(C):
    """GroupNorm; 32 groups from 128 channels on, as in the paper, and groups of at least four below."""
    return nn.GroupNorm(math.gcd(32, C // 4), C)


def conv3(C_in, C_out, stride=1):
    return nn.Conv2d(C_in, C_out, 3, stride, padding=1)


def zero(layer):
    """Start a layer at 0, so that every residual block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def time_embedding(t, D):
    """sin and cos of t at D/2 frequencies, from 1 down to 1/10000, evenly spaced in the exponent (Vaswani et al. 2017).
    (B,) -> (B, D)"""
    frequency = 10000 ** -torch.linspace(0, 1, D // 2, device=t.device)
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class ResBlock(nn.Module):
    """h + conv(conv(h) + embedding of t), where each conv means GroupNorm, Swish, 3x3 convolution.
    h (B, C_in, H, W), emb (B, D) or None -> (B, C_out, H, W)"""

    def __init__(self, C_in, C_out, D, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(C_in), conv3(C_in, C_out)
        self.embed = nn.Linear(D, C_out) if D else None
        self.norm2, self.dropout, self.conv2 = norm(C_out), nn.Dropout(dropout), conv3(C_out, C_out)
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, h, emb):
        r = self.conv1(F.silu(self.norm1(h)))
        if emb is not None:
            r = r + self.embed(F.silu(emb))[:, :, None, None]
        return self.skip(h) + self.conv2(self.dropout(F.silu(self.norm2(r))))


class Attention(nn.Module):
    """Self-attention among all pixels of a feature map, one head, with a residual.  (B, C, H, W) -> the same; emb is unused."""

    def __init__(self, C):
        super().__init__()
        self.norm, self.qkv, self.out = norm(C), nn.Conv2d(C, 3 * C, 1), nn.Conv2d(C, C, 1)

    def forward(self, h, emb):
        q, k, v = self.qkv(self.norm(h)).flatten(2).transpose(1, 2).chunk(3, -1)  # each (B, H W, C)
        r = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √C) v
        return h + self.out(r.transpose(1, 2).reshape(h.shape))


class UNet(nn.Module):
    """ε_θ(x_t, t).  x (B, C, H, W), t (B,) -> (B, C, H, W).  Built for one image_shape; ValueError if that does not divide.

    Level i works at 1/2^i of the image's size with channels * multipliers[i] channels, `blocks` residual blocks going down
    and one more going up, where each takes one of the skip connections. Attention follows the blocks of every level whose
    shorter side is in `attention`."""

    def __init__(self, image_shape, channels, multipliers, blocks, attention, dropout=0.0, time=True):
        super().__init__()
        C, H, W = image_shape
        step = 2 ** (len(multipliers) - 1)
        if H % step or W % step:
            raise ValueError(f"images of {H}x{W} cannot be halved {len(multipliers) - 1} times: use a height and width that "
                             f"{step} divides (--image-size), or fewer --multipliers")
        self.channels, D = channels, 4 * channels if time else 0
        self.embed = nn.Sequential(nn.Linear(channels, D), nn.SiLU(), nn.Linear(D, D)) if time else None

        def block(C_in, C_out, level):
            layers = [ResBlock(C_in, C_out, D, dropout)]
            return nn.ModuleList(layers + [Attention(C_out)] * (min(H, W) >> level in attention))

        widths = [channels * m for m in multipliers]
        self.conv_in, h, skips = conv3(C, channels), channels, [channels]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(h, width, level))
                h = width
                skips.append(h)
            if level < len(widths) - 1:
                self.down.append(conv3(h, h, stride=2))
                skips.append(h)
        self.middle = nn.ModuleList([ResBlock(h, h, D, dropout), Attention(h), ResBlock(h, h, D, dropout)])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(h + skips.pop(), width, level))
                h = width
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv3(h, h)))
        self.out = nn.Sequential(norm(h), nn.SiLU(), conv3(h, C))

        for m in self.modules():  # the authors' initialisation: uniform with variance 2 / (fan_in + fan_out), biases 0
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, ResBlock | Attention):
                zero(m.conv2 if isinstance(m, ResBlock) else m.out)
        zero(self.out[-1])

    def forward(self, x, t):
        return self.body(x, None if self.embed is None else self.embed(time_embedding(t, self.channels)))

    def body(self, x, emb):
        h = self.conv_in(x)
        skips = [h]
        for layers in self.down:
            if isinstance(layers, nn.ModuleList):
                for layer in layers:
                    h = layer(h, emb)
            else:
                h = layers(h)  # down-sampling
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layers in self.up:
            if isinstance(layers, nn.ModuleList):
                h = torch.cat([h, skips.pop()], 1)
                for layer in layers:
                    h = layer(h, emb)
            else:
                h = layers(h)  # up-sampling
        return self.out(h).to(x.dtype)  # under autocast the network works in bfloat16, the process around it in float32


def make_eps_theta(args, image_shape):
    """The network that args describe, for images of image_shape (C, H, W).  ValueError if the size does not fit."""
    return UNet(image_shape, args.channels, args.multipliers, args.blocks, args.attention, args.dropout, args.time_embedding)


# ------------------------------------------------------------------------------------------------------------------ data


def fail(message):
    """End the run on a user's mistake: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load_data(dataset, data_dir):
    """-> ((images, labels) to train on, (images, labels) held out): uint8 (N, C, H, W) and int64 (N,).
    The whole set is one tensor, so that a batch is an index and needs no loader. Exits with a message if it is not there."""
    if dataset == "digits":
        from sklearn.datasets import load_digits
        x, y = load_digits(return_X_y=True)
        x = torch.tensor(x * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
        order, n = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)), 1347  # writers mixed; a quarter held out
        return tuple((x[i], torch.tensor(y)[i]) for i in (order[:n], order[n:]))
    from torchvision.datasets import MNIST
    files = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
    try:
        try:
            sets = [MNIST(data_dir, train=train) for train in (True, False)]
        except RuntimeError:  # not there
            sets = [MNIST(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as e:  # no network, no room, a file that is cut short: whatever it was, the remedy is the same
        fail(f"MNIST could not be read or downloaded ({str(e).splitlines()[0] if str(e) else type(e).__name__}). Wanted in "
             f"{Path(data_dir, 'MNIST/raw')}: {files} (or each .gz). --data-dir says where MNIST/ is; --dataset digits "
             "needs no download")
    return tuple((d.data[:, None], d.targets) for d in sets)


def to_float(images):
    """uint8 0..255 -> float32 [-1, 1].  Sec. 3.3."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8 0..255, rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------- evaluation, no download


class Classifier(nn.Module):
    """A small convolutional classifier; its 64 features are where samples and real images are compared."""

    def __init__(self, C, classes):
        super().__init__()
        self.features = nn.Sequential(conv3(C, 32), nn.ReLU(), conv3(32, 64, 2), nn.ReLU(), conv3(64, 64, 2), nn.ReLU(),
                                      nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.features(x))


def train_classifier(images, labels, steps, batch=128):
    """Fit a Classifier to real images by cross-entropy.  uint8 (N, C, H, W), int64 (N,) -> Classifier in eval mode"""
    net = Classifier(images.shape[1], int(labels.max()) + 1).to(images.device)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        i = torch.randint(len(images), (batch,), device=images.device)
        loss = F.cross_entropy(net(to_float(images[i])), labels[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
        decay.step()
    return net.eval().requires_grad_(False)


def frechet_distance(a, b):
    """|m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½) of the Gaussians fitted to two sets of features.  (N, D), (M, D) -> float"""
    a, b = a.double(), b.double()
    S_a, S_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()  # the trace of a root: the sum of the eigenvalues' roots
    return ((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * root).item()


def evaluate(samples, train, held_out, steps):
    """Compare samples with held-out images, and as many training images with the same (the floor).  All uint8; -> dict"""
    net = train_classifier(*train, steps)

    def look(images):
        parts = [to_float(x) for x in images.split(500)]
        return torch.cat([net.features(x) for x in parts]), torch.cat([net(x).softmax(1) for x in parts])
    real = train[0][torch.randperm(len(train[0]), device=samples.device)[:len(samples)]]
    (f, p), (f_held, p_held), (f_real, _) = look(samples), look(held_out[0]), look(real)
    share = p.argmax(1).bincount(minlength=p.shape[1]) / len(p)
    return {"frechet": frechet_distance(f, f_held), "frechet_floor": frechet_distance(f_real, f_held),
            "confident_share": (p.amax(1) > 0.9).float().mean().item(), "rarest_class_share": share.min().item(),
            "confident_share_real": (p_held.amax(1) > 0.9).float().mean().item(),
            "classifier_accuracy": (p_held.argmax(1) == held_out[1]).float().mean().item(), "evaluated_on": len(held_out[0])}


# -------------------------------------------------------------------------------------------------- training, Algorithm 1


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def sample(net, s, args, n, image_shape, bar=False, keep=16):
    """n images by args.sampler from the seed's noise; leaves the random state as it was, so that drawing during training
    does not change the training.  -> uint8 (n, C, H, W), and [(t, x_t, x̂_0)] of the first `keep`, from t = T to 0"""
    device, frames, images = s.beta.device, [], []
    sampler = {"ddpm": lambda *a: ddpm_sample(*a, args.variance, args.clip), "ddim": lambda *a: ddim_sample(*a, args.clip)}
    steps = min(args.sampling_steps or s.T, s.T)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast(device):
        torch.manual_seed(args.seed)
        for first in tqdm(range(0, n, 250), "sampling", leave=False, disable=not bar):
            x = torch.randn(min(250, n - first), *image_shape, device=device)
            eps_theta, short = subchain(net, s, steps)
            if not first:
                frames.append((s.T, x[:keep], torch.zeros_like(x[:keep])))
            for i, x, x0_hat in tqdm(sampler[args.sampler](eps_theta, short, x), leave=False, total=steps, disable=not bar):
                if not first:
                    frames.append((round(i * s.T / steps), x[:keep], x0_hat[:keep]))
            images.append(to_uint8(x))
    return torch.cat(images), frames


def save_checkpoint(path, **state):
    """Write to another name, then move: a run killed while saving leaves the last checkpoint whole."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path):
    """The dict that save_checkpoint wrote; exits with a message if it is not there, cut short, or not from this script."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint at {path}")
    except Exception as e:
        fail(f"{path} cannot be read as a checkpoint: it is cut short or another kind of file ({type(e).__name__})")
    if not isinstance(state, dict) or state.get("script") != Path(__file__).stem:
        fail(f"{path} is not a checkpoint of {Path(__file__).name}")
    return state


def restore(module, weights, path):
    try:
        module.load_state_dict(weights)
    except RuntimeError as e:
        fail(f"the network in {path} has other shapes than the flags ask for: {str(e).splitlines()[1].strip()}")


def train(args, net, ema, s, images, path, state):
    """Algorithm 1 with Adam, warm-up, clipped gradients and an EMA of the weights, from state (a checkpoint, or None) to
    args.steps. Ctrl-C stops it after the step at hand. Saves to path each minute and at the end.
    -> the checkpoint's dict: losses (steps,), seconds, snapshots {step: uint8 images}, ..."""
    opt = torch.optim.Adam(net.parameters(), args.lr)
    losses, done, seconds, snapshots, device = torch.zeros(args.steps, device=images.device), 0, 0.0, {}, images.device
    if state:
        done, seconds, snapshots = state["step"], state["seconds"], state["snapshots"]
        losses = torch.cat([state["losses"].to(device), losses[done:]])
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])
    stop, start, saved, step = [], time.time(), time.time(), done
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    milestones = {args.steps // 2 ** i for i in range(6)} - {0}  # where a row of samples shows what has been learnt

    def save():
        if not losses[:step].isfinite().all():
            fail(f"the loss is not finite (step {int(losses[:step].isfinite().int().argmin()) + 1}); the last good checkpoint "
                 f"is kept at {path}. A smaller --lr helps")
        now = dict(script=Path(__file__).stem, config=vars(args), image_shape=list(images.shape[1:]), step=step,
                   losses=losses[:step].cpu(), seconds=seconds + time.time() - start, snapshots=snapshots, net=net.state_dict(),
                   ema=ema.state_dict(), optimizer=opt.state_dict(), rng=torch.get_rng_state())
        save_checkpoint(path, **now, **({"cuda_rng": torch.cuda.get_rng_state()} if device.type == "cuda" else {}))
        return now
    bar = tqdm(range(done, args.steps), "training", initial=done, total=args.steps, mininterval=1)
    for step in bar:
        if stop:
            break
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / args.warmup)
        x0 = to_float(images[torch.randint(len(images), (args.batch,), device=device)])
        if args.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        t = torch.randint(1, s.T + 1, (len(x0),), device=device)
        with autocast(device):
            loss = l_simple(net, s, x0, t, torch.randn_like(x0))
        opt.zero_grad()
        loss.backward()
        size = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        with torch.no_grad():
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        losses[step] = loss.detach() + 0 * size  # not finite if the gradient is not
        step += 1
        if step % 50 == 0:
            bar.set_postfix(loss=f"{losses[step - 50:step].mean():.4f}")
        if step in milestones:
            few = argparse.Namespace(**{**vars(args), "sampler": "ddim", "sampling_steps": 50})
            snapshots[step] = sample(ema, s, few, 16, images.shape[1:])[0].cpu()
        if time.time() - saved > 60:
            save()
            saved = time.time()
    signal.signal(signal.SIGINT, previous)
    if stop:
        print(f"stopped at step {step} of {args.steps}; --resume goes on from here")
    return save()


# --------------------------------------------------------------------------------------------------------------- figures


def draw_rows(path, rows, columns=()):
    """Images as a table. rows: {label: (n, C, H, W) in [-1, 1]}; columns: labels above the first row."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n, C, H, W = next(iter(rows.values())).shape
    fig, axes = plt.subplots(len(rows), 1, figsize=(1.5 + 0.7 * n, 0.75 * len(rows) * H / W + 0.3), squeeze=False,
                             layout="constrained")
    for ax, (label, x) in zip(axes[:, 0], rows.items()):
        strip = F.pad(to_uint8(x.float()), (1, 1, 1, 1), value=255).permute(2, 0, 3, 1).reshape(H + 2, -1, C).cpu()
        ax.imshow(strip.expand(-1, -1, 3), interpolation="nearest")
        ax.set_ylabel(label.strip(), rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    if columns:
        axes[0, 0].xaxis.tick_top()
        axes[0, 0].set_xticks([(i + 0.5) * (W + 2) for i in range(n)], columns)
    fig.savefig(path, dpi=1600 / max(16, fig.get_figwidth()))
    plt.close(fig)


def draw_all(out, images, frames, real, state):
    """samples.png, progressive.png (Fig. 6), reverse.gif, training.png, loss.png in the folder out."""
    import matplotlib.pyplot as plt
    from PIL import Image
    x, real = to_float(images.cpu()), to_float(real[:16].cpu())
    rows = {"samples": x[:16], **{" " * i: x[16 * i:16 * i + 16] for i in range(1, 4) if len(x) >= 16 * i + 16}}
    draw_rows(out / "samples.png", {"data": real[:len(x[:16])], **rows})
    ts = [0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    picked = [min(frames, key=lambda f: abs(f[0] - u * frames[0][0])) for u in reversed(ts)]
    rows = {}
    for k in range(min(3, len(x))):
        rows["x_t" + " " * k] = torch.stack([f[1][k] for f in picked])
        rows["x̂_0" + " " * k] = torch.stack([f[2][k] for f in picked])
    draw_rows(out / "progressive.png", rows, [f"t={f[0]}" for f in picked])
    gif = []
    for _, xt, _ in frames[::max(1, len(frames) // 40)] + [frames[-1]]:
        n = math.isqrt(len(xt))
        a = to_uint8(xt[:n * n]).cpu().reshape(n, n, *xt.shape[1:]).permute(0, 3, 1, 4, 2).reshape(n * xt.shape[2], -1, xt.shape[1])
        a = Image.fromarray(a.expand(-1, -1, 3).numpy())
        gif.append(a.resize([side * max(1, 256 // a.width) for side in a.size], Image.NEAREST))
    gif[0].save(out / "reverse.gif", save_all=True, append_images=gif[1:], duration=[80] * (len(gif) - 1) + [2000], loop=0)
    if state["snapshots"]:
        draw_rows(out / "training.png", {f"step {k}": to_float(v) for k, v in state["snapshots"].items()})
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    losses, k = state["losses"], max(1, len(state["losses"]) // 100)
    ax.plot(torch.arange(len(losses) // k) * k + k, losses[:len(losses) // k * k].reshape(-1, k).mean(1))
    ax.set(xlabel="step", ylabel="L_simple, Eq. (14)", yscale="log")
    fig.savefig(out / "loss.png", dpi=100)
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------------------- main

PRESETS = {  # what differs from the flags' defaults, which are the paper's for CIFAR-10
    "digits": dict(channels=32, multipliers=[1, 2], blocks=1, attention=[4], dropout=0.0, batch=128, steps=2200, lr=2e-3,
                   warmup=100, ema=0.995, sampling_steps=100, flip=False, classifier_steps=600),
    "mnist": dict(channels=32, multipliers=[1, 2, 4], blocks=1, attention=[7], dropout=0.0, batch=64, steps=4000, lr=1e-3,
                  warmup=200, ema=0.999, sampling_steps=200, flip=False, classifier_steps=1000),
}
QUICK = dict(channels=16, steps=30, num_samples=100, sampling_steps=10, warmup=10, classifier_steps=30)
OF_THE_RUN = ("checkpoint", "resume", "out", "device", "data_dir", "seed", "quick", "num_samples")  # never from a checkpoint


def get_args(argv=None):
    p = argparse.ArgumentParser(description="Denoising Diffusion Probabilistic Models (Ho et al. 2020).",
                                epilog="Defaults are the paper's; each --dataset has a preset, and a checkpoint brings its own.")
    on_off = argparse.BooleanOptionalAction
    p.add_argument("--dataset", default="digits", help="digits (8x8, no download) or mnist")
    p.add_argument("--data-dir", default="data", help="where MNIST/ is, or is downloaded to")
    p.add_argument("--out", help="folder for everything written; default runs/ddpm_ho_2020-<dataset>")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--quick", action="store_true", help="the whole way in seconds, to see that it works")
    p.add_argument("--checkpoint", help="sample from this file instead of training; needs no other flag")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--T", type=int, default=1000, help="diffusion steps (paper: 1000)")
    p.add_argument("--schedule", choices=SCHEDULES, default="linear", help="noise schedule (paper: linear)")
    p.add_argument("--steps", type=int, default=800_000, help="training steps (paper: 800000)")
    p.add_argument("--batch", type=int, default=128, help="images a training step (paper: 128)")
    p.add_argument("--lr", type=float, default=2e-4, help="Adam's learning rate (paper: 2e-4)")
    p.add_argument("--warmup", type=int, default=5000, help="steps until the full learning rate (authors' code: 5000)")
    p.add_argument("--ema", type=float, default=0.9999, help="decay of the weights' moving average (paper: 0.9999)")
    p.add_argument("--flip", action=on_off, default=True, help="random horizontal flips (paper: yes)")
    p.add_argument("--channels", type=int, default=128, help="width of the first level, a multiple of 4 (paper: 128)")
    p.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 2, 2], help="widths of the levels (paper: 1 2 2 2)")
    p.add_argument("--blocks", type=int, default=2, help="residual blocks a level (paper: 2)")
    p.add_argument("--attention", type=int, nargs="*", default=[16], help="resolutions with attention (paper: 16)")
    p.add_argument("--dropout", type=float, default=0.1, help="in the residual blocks (paper: 0.1)")
    p.add_argument("--time-embedding", action=on_off, default=True, help="tell the network t (paper: yes)")
    p.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="ddpm: Algorithm 2; ddim: Song et al. 2020")
    p.add_argument("--sampling-steps", type=int, help="steps of the sampler (paper: T)")
    p.add_argument("--variance", choices=["beta", "beta_tilde"], default="beta", help="sigma_t^2 (paper: both, alike)")
    p.add_argument("--clip", action=on_off, default=True, help="clip x0_hat to [-1, 1] (authors' code: yes)")
    p.add_argument("--num-samples", type=int, default=1000, help="images to draw and evaluate (paper: 50000)")
    p.add_argument("--classifier-steps", type=int, default=1000, help="training steps of the evaluation's classifier")

    args = p.parse_args(argv)  # a first look, for where the other defaults come from; then flags win over them
    if args.checkpoint or args.resume:
        path = args.checkpoint or Path(args.out or f"runs/ddpm_ho_2020-{args.dataset}", "checkpoint.pt")
        config = load_checkpoint(path)["config"]
        p.set_defaults(**{k: v for k, v in config.items() if k not in OF_THE_RUN})
        p.set_defaults(num_samples=64 if args.checkpoint else 1000)
    elif args.dataset not in PRESETS:
        p.error(f"no dataset is called {args.dataset!r}; there are: {', '.join(PRESETS)}")
    else:
        p.set_defaults(**PRESETS[args.dataset])
    if args.quick:
        p.set_defaults(**QUICK)
    args = p.parse_args(argv)
    args.out = args.out or f"runs/ddpm_ho_2020-{args.dataset}"
    args.device = args.device or ("cuda" if torch.cuda.is_available() else
                                  "mps" if torch.backends.mps.is_available() else "cpu")
    for name in ("T", "steps", "batch", "warmup", "channels", "blocks", "num_samples"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.channels % 4:
        p.error("--channels must be a multiple of 4")
    return args


def main(args):
    start, out = time.time(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {args.device} does not work here: {str(e).splitlines()[0]}")
    torch.manual_seed(args.seed)
    path = out / "checkpoint.pt"
    state = load_checkpoint(args.checkpoint or path) if args.checkpoint or args.resume else None
    sets = load_data(args.dataset, args.data_dir)
    (images, labels), held_out = [[v.to(device) for v in pair] for pair in sets]
    shape = images.shape[1:]
    try:
        net = make_eps_theta(args, shape).to(device, memory_format=torch.channels_last)
    except ValueError as e:
        fail(str(e))
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    s = make_schedule(args.schedule, args.T).to(device)
    if state:
        restore(net, state["net"], args.checkpoint or path)
        restore(ema, state["ema"], args.checkpoint or path)
    elif path.exists():
        kept = next(p for p in (out / f"checkpoint-{i}.pt" for i in itertools.count(1)) if not p.exists())
        print(f"an earlier run's checkpoint is in {out}: moved to {kept.name}")
        path.rename(kept)
    if not args.checkpoint:
        state = train(args, net, ema, s, images, path, state)

    drawn = time.time()
    samples, frames = sample(ema, s, args, args.num_samples, shape, bar=True)
    metrics = {"script": "ddpm_ho_2020", "dataset": args.dataset, "seed": args.seed, "device": str(device),
               "torch": torch.__version__, "steps": state["step"], "params": sum(p.numel() for p in net.parameters()),
               "loss": state["losses"][-max(1, len(state["losses"]) // 20):].mean().item(), "seconds_train": state["seconds"],
               "seconds_sample": time.time() - drawn, "num_samples": len(samples),
               "images_per_second": state["step"] * state["config"]["batch"] / state["seconds"]}
    if len(samples) > 64:  # the features' covariance needs more samples than features
        metrics |= evaluate(samples, (images, labels), held_out, args.classifier_steps)
    np.savez_compressed(out / "samples.npz", samples.permute(0, 2, 3, 1).cpu().numpy())
    draw_all(out, samples, frames, images, state)
    metrics |= {"seconds_total": time.time() - start, "config": vars(args)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    for name, value in metrics.items():
        if name != "config":
            print(f"{name:<22}{value:.4f}" if isinstance(value, float) else f"{name:<22}{value}")
    print(f"pictures: {out}/samples.png, progressive.png, reverse.gif, training.png, loss.png")
    return metrics


if __name__ == "__main__":
    main(get_args())

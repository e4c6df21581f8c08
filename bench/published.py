"""The published implementation's training iteration and sampler, as the baseline: what it computes and what it costs.

Written from the paper and from the described behaviour of github.com/longinYu/HSIVI, on the networks of this project
(in plain torch):

* For every update the whole batch is rolled anew from x_K down to the lowest layer drawn. One state a sample is kept,
  gathered in a Python loop.
* It is float32 throughout, at torch's default precision.
* Layer and losses are plain operations that keep their noise. The student's loss goes back through one graph of all
  three networks.
* Adam is torch's default one, and the average goes parameter by parameter.
* On a GPU the host waits in every update, and the cache is emptied in every iteration.
* Images go through PNG files for their distance.

That it computes the same is tested on the numbers of the published code (tests/bench/test_published.py).
"""

import tempfile
from pathlib import Path

import numpy as np
import torch


class PublishedTraining:
    """The two updates of one training iteration.

    student, score_net, teacher: modules (x [B, *event], t [B] int) -> [B, *event].
    schedule: `Schedule`; eta: DDIM's eta; per_step, per_pixel: the shape of log_gamma.
    rates: (student_lr, score_net_lr) as functions of the step.
    """

    def __init__(self, student, score_net, teacher, schedule, eta, per_step, per_pixel, rates, clip=1.0, ema=0.999):
        device = next(teacher.parameters()).device
        self.student, self.score_net, self.teacher = student, score_net, teacher.requires_grad_(False)
        self.nfe, self.per_step, self.per_pixel = schedule.nfe, per_step, per_pixel
        self.rates, self.clip, self.decay = rates, clip, ema
        self.tau = torch.from_numpy(schedule.timesteps).to(device)
        variance = torch.from_numpy(1 - schedule.alpha_bar)
        low, high = variance[:-1], variance[1:]
        c1 = eta * torch.sqrt((1 - (1 - high) / (1 - low)) * low / high)
        a = torch.sqrt((1 - low) / (1 - high))
        b = torch.sqrt(low - c1**2) - a * torch.sqrt(high)
        # Tables [K + 1], indexed by k = 1 .. K.
        self.a, self.b, self.c1, self.sigma = (
            torch.cat([torch.zeros(1), table.float()]).to(device) for table in (a, b, c1, low.sqrt())
        )
        steps = (schedule.nfe,) if per_step else ()
        pixels = tuple(student.event_shape) if per_pixel else ()
        self.log_gamma = torch.nn.Parameter(torch.zeros(steps + pixels or (1,), device=device))
        student.register_parameter("log_scaled_gamma", self.log_gamma)
        self.optimizers, self.averages, self.updates = {}, {}, {}
        for name, network in (("student", student), ("score_net", score_net)):
            self.optimizers[name] = torch.optim.Adam(network.parameters(), lr=0.0, amsgrad=True)
            self.averages[name] = {key: value.detach().clone() for key, value in network.named_parameters()}
            self.updates[name] = 0

    def layer(self, x, k, noise):
        """(x_{k-1}, z / gamma) of states x = x_k at layers k [B]."""

        def column(table):
            return table[k].reshape(-1, *[1] * (x.ndim - 1))

        log_gamma = self.log_gamma[k - 1] if self.per_step else self.log_gamma
        if not self.per_pixel:
            log_gamma = log_gamma.reshape(-1, *[1] * (x.ndim - 1))
        scale = torch.exp(log_gamma) * column(self.c1)
        mean = column(self.a) * x + column(self.b) * self.student(x, self.tau[k])
        return mean + scale * noise, noise / (scale / column(self.sigma))

    @torch.no_grad()
    def rollout(self, x, k, noise=None):
        """Every sample's x_k: the whole batch goes down to the lowest layer drawn.

        noise [rolled layers, B, *event] replaces torch.randn.
        """
        states = {self.nfe: x}
        for index, current in enumerate(range(self.nfe, int(k.min()), -1)):
            z = torch.randn_like(x) if noise is None else noise[index]
            x, _ = self.layer(x, torch.full_like(k, current), z)
            states[current - 1] = x
        return torch.stack([states[int(k[i])][i] for i in range(len(k))])

    def draw(self, batch):
        """(k [B] in antithetic pairs, x_K, noise of the layer)."""
        k = torch.randint(1, self.nfe + 1, (batch // 2 + 1,), device=self.tau.device)
        k = torch.cat([k, self.nfe + 1 - k])[:batch]
        event = (batch, *self.student.event_shape)
        return k, torch.randn(event, device=self.tau.device), torch.randn(event, device=self.tau.device)

    def update_student(self, step, k, x_top, noise, rollout_noise=None):
        """One update of the student; the loss."""
        self.score_net.requires_grad_(False)
        x, target = self.layer(self.rollout(x_top, k, rollout_noise), k, noise)
        f, e = self.score_net(x, self.tau[k - 1]), self.teacher(x, self.tau[k - 1])
        weight = self.sigma[k].square().reshape(-1, *[1] * (x.ndim - 1))
        loss = (weight * (2 * (f - e) * (target - e) - (f - e).square())).flatten(1).sum(1).mean()
        self._descend("student", self.student, loss, self.rates[0](step))
        self.score_net.requires_grad_(True)
        return loss.item()

    def update_score_net(self, step, k, x_top, noise, rollout_noise=None):
        """One update of the score network; the loss."""
        with torch.no_grad():
            x, target = self.layer(self.rollout(x_top, k, rollout_noise), k, noise)
        f = self.score_net(x, self.tau[k - 1])
        weight = self.sigma[k].square().reshape(-1, *[1] * (x.ndim - 1))
        loss = (weight * (f - target).square()).flatten(1).sum(1).mean()
        self._descend("score_net", self.score_net, loss, self.rates[1](step))
        return loss.item()

    def _descend(self, name, network, loss, rate):
        optimizer = self.optimizers[name]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        self.updates[name] += 1
        decay = min(self.decay, (1 + self.updates[name]) / (10 + self.updates[name]))
        with torch.no_grad():
            for key, value in network.named_parameters():
                self.averages[name][key].mul_(decay).add_(value, alpha=1 - decay)
        if name == "score_net" and loss.device.type == "cuda":
            # Once an iteration, and each of those updates the score network. What the host waits for is the loss.
            torch.cuda.empty_cache()

    def cycle(self, step, batch, f_learning_times):
        """One cycle as a run has it: an update of the student and `f_learning_times` of the score network."""
        self.update_student(step, *self.draw(batch))
        for index in range(f_learning_times):
            self.update_score_net(step + index, *self.draw(batch))


@torch.no_grad()
def published_sample(training, batch, x=None, noise=None):
    """Images of the student, [batch, *event], float32; the last layer without noise.

    noise [K - 1, B, *event] and x = x_K replace torch.randn.
    """
    device = training.tau.device
    if x is None:
        x = torch.randn(batch, *training.student.event_shape, device=device)
    for index, current in enumerate(range(training.nfe, 0, -1)):
        if current == 1:
            z = torch.zeros_like(x)
        else:
            z = torch.randn_like(x) if noise is None else noise[index]
        x, _ = training.layer(x, torch.full((batch,), current, device=device), z)
    return x


def through_png(images, folder=None):
    """Images in [-1, 1] as uint8 [B, H, W, C] after the published way to the distance.

    They are truncated, written as PNG files, and read again.
    """
    from PIL import Image  # here: for distances alone

    values = ((images + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        files = [Path(place) / f"{index}.png" for index in range(len(values))]
        for file, value in zip(files, values):
            Image.fromarray(value.squeeze()).save(file)
        return np.stack([np.asarray(Image.open(file)).reshape(values.shape[1:]) for file in files])


def published_frechet_distance(images, features, reference):
    """Frechet distance of images [N, C, H, W] in [-1, 1], the published way: through PNG files, and by a matrix root.

    features: uint8 images [n, H, W, C] -> [n, D], called on batches of 64.
    reference: statistics {"mu", "sigma"}.
    """
    import scipy.linalg  # here: for distances alone

    images, total, outer = through_png(images), 0, 0
    for first in range(0, len(images), 64):
        part = features(torch.from_numpy(images[first : first + 64])).double()
        total, outer = total + part.sum(0), outer + part.T @ part
    mu = total / len(images)
    sigma = ((outer - len(images) * torch.outer(mu, mu)) / (len(images) - 1)).cpu().numpy()
    root = scipy.linalg.sqrtm(sigma @ reference["sigma"])
    between_means = np.square(mu.cpu().numpy() - reference["mu"]).sum()
    return float(between_means + np.trace(sigma + reference["sigma"]) - 2 * np.trace(root).real)


def expected_layers(nfe, batch):
    """How many layers a published update runs the student through, on average over the draw of the lowest one."""
    pairs = batch // 2 + 1
    second = batch - pairs  # samples with K + 1 - k

    def above(m):
        """P(min > m) of the minimum over k_1 .. k_pairs and K + 1 - k_1 .. K + 1 - k_second, the k uniform."""
        return (max(nfe - 2 * m, 0) / nfe) ** second * ((nfe - m) / nfe) ** (pairs - second)

    lowest = 1 + sum(above(m) for m in range(1, nfe))
    return nfe - lowest + 1


def cycle_work(nfe, batch, f_learning_times):
    """Expected work of a published cycle, in forwards over the batch (backward = 2, input-only backward = 1).

    An update runs `expected_layers`. The score network's then costs a forward and a backward (3). The student's costs
    its backward (2), and two forwards and two input-only backwards (4).
    """
    layers = expected_layers(nfe, batch)
    return f_learning_times * (layers + 3) + layers + 2 + 4


def cycle_calls(nfe, batch, f_learning_times):
    """Expected calls of networks in a published cycle."""
    layers = expected_layers(nfe, batch)
    return f_learning_times * (layers + 1) + layers + 2

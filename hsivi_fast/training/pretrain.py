"""Small teachers, where no checkpoint can be had: a UNet by the DDPM loss, and the metric's feature network."""

import contextlib
import dataclasses
import math
import sys

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from .. import ops
from ..build import build_context, build_network, choose_device
from ..checkpoints.files import as_written, make_folder, write_tensors
from ..checkpoints.run_folder import RunFolder
from ..data import load_data, to_uint8
from ..method.class_labels import if_given
from ..method.schedule import signal_levels
from ..metrics.distances import StreamingMoments, save_statistics
from ..metrics.features import CLASSIFIERS, DigitsClassifier, describe_features
from ..parallel.interrupt import Interrupted, StopRequest
from ..parallel.out_of_memory import memory_advice
from ..parallel.world import ALONE, processes
from .engine import PlainEngine
from .estimate import check_teacher_memory

# Purposes of the run seed's random numbers (see rollout.py for those of the distillation).
IMAGES, TIMES, NOISE, DROPPED_LABELS = range(101, 105)
CLIP = 1.0
HELD_OUT = 360  # labelled images that the feature network is not trained on
EPOCHS = {"digits": 40, "mnist": 10}  # of the feature networks


def train_teacher(config, outdir, progress=False):
    """Train `config.network` on `config.data` by the squared error of what it predicts (`_Loss`).

    A network with classes learns them from the labels of the data. Rate: linear warm-up, then a cosine to zero. A run
    that is in `outdir` is continued.
    Returns the path of teacher.safetensors, the averaged (EMA) weights. Raises ValueError where the configuration names
    no data or is another run's, and `Interrupted` after SIGINT, SIGTERM or SIGHUP, when it has been saved.
    """
    if config.data is None:
        raise ValueError("data: missing; a teacher needs images to learn from")
    if config.teacher.vae is not None:
        raise ValueError(f"teacher.vae: {config.teacher.vae!r} is of latents; a teacher is trained on images here")
    if processes() > 1:
        launched = f"{processes()} processes were launched"
        raise ValueError(f"WORLD_SIZE: {launched}; a teacher is trained in one, start it without a launcher")
    settings = config.teacher_train
    check_teacher_memory(config, choose_device(config.device))
    context = build_context(dataclasses.replace(config, cuda_graphs=False), ALONE)
    device = context.device
    network = build_network(config, device)
    loss_of = _Loss(config, network, load_data(config.data, config.data_path), device)
    engine = PlainEngine(network, CLIP, settings.ema, context.execution)

    title, advice = (
        f"teacher {config.name}",
        memory_advice(f"teacher_train.batch_size: {settings.batch_size}; lower it"),
    )
    with contextlib.ExitStack() as held, RunFolder.taken(outdir, config) as folder, StopRequest() as stop, advice:
        step, state = folder.newest_state(["teacher_updates"])
        total, count = torch.zeros((), device=device), 0
        if state is not None:
            engine.load("teacher", lambda stem: folder.load_tensors(step, stem), state)
            before, count = (state.get("losses") or {}).get("loss", (0.0, 0))  # since the last record
            total += before
        folder.take_up()
        folder.drop_old_checkpoints()
        folder.forget_metrics_after(step)
        bar = held.enter_context(_bar(settings.steps, title, progress, step))
        while step < settings.steps:
            step += 1
            loss, gradient, eps_hat = loss_of(engine.predict, step)
            engine.backward([eps_hat], [gradient])
            engine.step(_rate(settings, step))
            total, count = total + loss, count + 1
            stopping = stop.requested  # read once, as in trainer.py
            scheduled = step % config.save_every == 0 or step == settings.steps
            if scheduled or stopping or step % config.log_every == 0:
                mean = float(total) / count
                if not math.isfinite(mean):
                    raise FloatingPointError(
                        f"the loss is not finite before step {step}; try a smaller teacher_train.lr"
                    )
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            if scheduled or step % config.log_every == 0:
                folder.append("metrics.jsonl", {"step": step, "loss": mean, "lr": _rate(settings, step)})
                total, count = torch.zeros_like(total), 0
            if scheduled or stopping:
                tensors, numbers = engine.state("teacher")
                losses = {"loss": (float(total), count)}
                stopped = {"stopped": not scheduled, "losses": losses}
                folder.save_checkpoint(step, tensors, {"metric": None, **stopped, **numbers})
                folder.drop_old_checkpoints()
            bar.update(1)
            if stopping:
                where = f"stopped at step {step} of {settings.steps}; saved in {folder.path}"
                raise Interrupted(f"{where}; the same command goes on from there", stopping)
    file = folder.path / "teacher.safetensors"
    write_tensors(file, engine.averaged())
    return file


def _bar(total, title, progress, done=0):
    return tqdm(total=total, initial=done, desc=title, unit="step", disable=not progress, dynamic_ncols=True)


class _Loss:
    """E |F - F_hat|^2 of what a network predicts: the DDPM loss of noise (Ho et al. 2020, arXiv 2006.11239, eq. 14).

    An EDM network's is that of Karras et al. 2022 (arXiv 2206.00364, eq. 8): its F has unit variance at every level.
    Where F is not the noise, the loss in it is that of the noise by the square of the factor between them.
    data: a `DataSet`. Raises ValueError where it has other images than the network, or no labels for its classes.
    """

    def __init__(self, config, network, data, device):
        self.seed, self.settings, self.null_class = config.seed, config.teacher_train, config.teacher.null_class
        self.images = torch.from_numpy(data.images).to(device)  # [N, C, H, W]
        if self.images.shape[1:] != network.event_shape:
            found = f"the data {config.data!r} has {list(self.images.shape[1:])}"
            raise ValueError(f"network: makes images {list(network.event_shape)}, {found}")
        self.labels = self._labels(config, network, data, device)
        levels = signal_levels(config.teacher.betas, config.teacher.steps)
        self.alpha_bar = torch.from_numpy(levels).float().to(device)
        self.factor = None if network.coefficients is None else network.coefficients[3]  # eps = skip x + factor F
        self.chosen = None  # timesteps that the levels of EDM's loss fall on, evenly among themselves
        if self.settings.levels == "edm":
            self.chosen = torch.from_numpy(_edm_timesteps(levels)).to(device)

    def _labels(self, config, network, data, device):
        """int64 [N] of the images, or None for a network without classes."""
        if network.classes is None:
            if self.settings.label_dropout:
                raise ValueError(
                    f"teacher_train.label_dropout: {self.settings.label_dropout}, and the network has no classes; "
                    "leave it out"
                )
            return None
        if self.settings.label_dropout and self.null_class is None:
            raise ValueError(
                f"teacher_train.label_dropout: {self.settings.label_dropout} needs the label that stands for no class; "
                "say it with teacher.null_class"
            )
        if data.labels is None:
            raise ValueError(f"network.classes: {network.classes}, and the data {config.data!r} has no labels")
        if data.labels.max() >= network.classes:
            found = f"the data {config.data!r} has the label {data.labels.max()}"
            raise ValueError(f"network.classes: {network.classes}, and {found}; use at least {data.labels.max() + 1}")
        return torch.from_numpy(data.labels).to(device)

    def __call__(self, predict, step):
        """(loss, d loss / d eps_hat, eps_hat) of one minibatch.

        Its images, times, noise and dropped labels are addressed by (run seed, step).
        """
        place = step, self.settings.batch_size, self.images.device
        index = ops.integers_below(len(self.images), self.seed, IMAGES, *place)
        t = ops.integers_below(len(self.alpha_bar if self.chosen is None else self.chosen), self.seed, TIMES, *place)
        t = t if self.chosen is None else self.chosen[t]
        noise = ops.draw_noise(ops.integers(self.seed, NOISE, *place), 0, self.images.shape[1:])
        level = self.alpha_bar[t].reshape(-1, *[1] * (self.images.ndim - 1))
        labels = self._labels_of(index, place)
        eps_hat = predict(level.sqrt() * self.images[index] + (1 - level).sqrt() * noise, t, *if_given(labels))
        difference = eps_hat.detach() - noise
        if self.factor is not None:
            difference = difference / self.factor[t].reshape(level.shape)
        gradient = difference * (2 / difference.numel())
        if self.factor is not None:
            gradient = gradient / self.factor[t].reshape(level.shape)
        return difference.square().mean(), gradient, eps_hat

    def _labels_of(self, index, place):
        """The labels of images, some of them dropped; or None."""
        if self.labels is None:
            return None
        labels, limit = self.labels[index], 2**20
        if self.settings.label_dropout:
            drawn = ops.integers_below(limit, self.seed, DROPPED_LABELS, *place)
            labels = torch.where(drawn < round(self.settings.label_dropout * limit), self.null_class, labels)
        return labels


def _edm_timesteps(levels, count=2**16):
    """`count` timesteps, int64: those next to the levels of EDM's loss at even quantiles.

    There ln(sigma) is normal with mean -1.2 and deviation 1.2 (Karras et al. 2022, table 1). levels: alpha_bar [T].
    """
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    wanted = (torch.special.ndtri(quantiles) * 1.2 - 1.2).numpy()
    log_sigma = np.log((1 - levels) / levels) / 2  # rises with t
    return np.interp(wanted, log_sigma, np.arange(len(levels))).round().astype(np.int64)


def _rate(settings, step):
    warmup = min(step / max(settings.warmup, 1), 1.0)
    return settings.lr * warmup * (1 + math.cos(math.pi * step / settings.steps)) / 2


def train_feature_network(config, outdir, progress=False):
    """Train the classifier of a data set's labels whose penultimate activations are the features of its metric.

    AdamW with a one-cycle rate and label smoothing, on all but `HELD_OUT` images; prints its accuracy on those. Writes
    features.safetensors, and reference.npz with the features' mean and covariance over all images.
    Returns the path of the first. Raises ValueError for a data set without labels or of another size.
    """
    if config.data not in CLASSIFIERS:
        raise ValueError(f"data: {config.data!r} has no feature network to train; choose {' or '.join(CLASSIFIERS)}")
    data = load_data(config.data, config.data_path)
    if data.labels is None:
        raise ValueError(f"data_path: {config.data_path!r} holds no labels; a feature network is trained on them")
    images, labels = to_uint8(torch.from_numpy(data.images), data.levels), torch.from_numpy(data.labels)
    network = _train_classifier(config, images, labels, progress)
    moments = StreamingMoments()
    with torch.no_grad():
        for batch in images.split(250):
            moments.add(network.features(batch))
    outdir = as_written(outdir)
    make_folder(outdir)
    file = outdir / "features.safetensors"
    write_tensors(file, network.state_dict())
    statistics = {**moments.statistics(), "features": describe_features(config.data, file)}
    save_statistics(outdir / "reference.npz", statistics)
    return file


def _train_classifier(config, images, labels, progress):
    """The data set's classifier, trained on uint8 images [N, C, H, W] and labels [N]."""
    epochs, batch_size = EPOCHS[config.data], 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = DigitsClassifier(CLASSIFIERS[config.data])
        held_out, trained = torch.randperm(len(images)).tensor_split([HELD_OUT])
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        steps = epochs * -(-len(trained) // batch_size)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        with _bar(steps, "feature network", progress) as bar:
            for _ in range(epochs):
                for batch in trained[torch.randperm(len(trained))].split(batch_size):
                    loss = F.cross_entropy(network(images[batch]), labels[batch], label_smoothing=0.1)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    rate.step()
                    bar.update(1)
            with torch.no_grad():
                accuracy = (network(images[held_out]).argmax(1) == labels[held_out]).float().mean()
            bar.write(f"accuracy on {HELD_OUT} held-out images: {accuracy:.4f}", file=sys.stderr)
    return network

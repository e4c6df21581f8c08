"""Small teachers, where no checkpoint can be had: a UNet by the DDPM loss, and the metric's feature network."""

import contextlib
import dataclasses
import math
import sys

import torch
from torch.nn import functional as F
from tqdm import tqdm

from .. import ops
from ..build import build_context, build_network, choose_device
from ..checkpoints.files import as_written, make_folder, write_tensors
from ..checkpoints.run_folder import RunFolder
from ..data import load_data, to_uint8
from ..method.schedule import signal_levels
from ..metrics.distances import StreamingMoments, save_statistics
from ..metrics.features import CLASSIFIERS, DigitsClassifier, describe_features
from ..parallel.interrupt import Interrupted, StopRequest
from ..parallel.out_of_memory import memory_advice
from ..parallel.world import ALONE, processes
from .engine import PlainEngine
from .estimate import check_teacher_memory

# Purposes of the run seed's random numbers (see rollout.py for those of the distillation).
IMAGES, TIMES, NOISE = range(101, 104)
CLIP = 1.0
HELD_OUT = 360  # labelled images that the feature network is not trained on
EPOCHS = {"digits": 40, "mnist": 10}  # of the feature networks


def train_teacher(config, outdir, progress=False):
    """Train `config.network` on `config.data` with the DDPM loss E |eps - eps_hat(x_t, t)|^2 (Ho et al. 2020, eq. 14).

    Rate: linear warm-up, then a cosine to zero. A run that is in `outdir` is continued.
    Returns the path of teacher.safetensors, the averaged (EMA) weights. Raises ValueError where the configuration names
    no data or is another run's, and `Interrupted` after SIGINT, SIGTERM or SIGHUP, when it has been saved.
    """
    if config.data is None:
        raise ValueError("data: missing; a teacher needs images to learn from")
    if processes() > 1:
        launched = f"{processes()} processes were launched"
        raise ValueError(f"WORLD_SIZE: {launched}; a teacher is trained in one, start it without a launcher")
    settings = config.teacher_train
    check_teacher_memory(config, choose_device(config.device))
    context = build_context(dataclasses.replace(config, cuda_graphs=False), ALONE)
    device = context.device
    images = torch.from_numpy(load_data(config.data, config.data_path).images).to(device)  # [N, C, H, W]
    alpha_bar = torch.from_numpy(signal_levels(config.teacher.betas, config.teacher.steps)).float().to(device)
    network = build_network(config, device)
    if images.shape[1:] != network.event_shape:
        found = f"the data {config.data!r} has {list(images.shape[1:])}"
        raise ValueError(f"network: makes images {list(network.event_shape)}, {found}")
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
            loss, gradient, eps_hat = _ddpm_loss(
                engine.predict, images, alpha_bar, config.seed, step, settings.batch_size
            )
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


def _ddpm_loss(predict, images, alpha_bar, run_seed, step, batch_size):
    """(loss, d loss / d eps_hat, eps_hat) of one minibatch.

    Its images, times and noise are addressed by (run seed, step).
    """
    device = images.device
    index = ops.integers_below(len(images), run_seed, IMAGES, step, batch_size, device)
    t = ops.integers_below(len(alpha_bar), run_seed, TIMES, step, batch_size, device)
    noise = ops.draw_noise(ops.integers(run_seed, NOISE, step, batch_size, device), 0, images.shape[1:])
    level = alpha_bar[t].reshape(-1, *[1] * (images.ndim - 1))
    eps_hat = predict(level.sqrt() * images[index] + (1 - level).sqrt() * noise, t)
    difference = eps_hat.detach() - noise
    return difference.square().mean(), difference * (2 / difference.numel()), eps_hat


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

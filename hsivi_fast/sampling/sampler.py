"""The few-step sampler: K layers from noise to image, one seed an image. DDIM is the same code with the teacher."""

import math
from collections.abc import Sequence

import torch

from .. import ops
from ..build import build_context, build_ddim_layers, build_untrained_student
from ..checkpoints.run_folder import RunFolder
from ..checkpoints.weights import load_weights
from ..config import change_config
from ..data import to_uint8
from ..execution import EAGER
from ..method.class_labels import ClassLabels, if_given
from ..nets import network_arguments
from ..nets.prepared import as_prepared
from ..parallel.machine import refuse_beyond_memory
from ..parallel.out_of_memory import memory_advice
from ..parallel.seeds import Cycled
from ..parallel.world import connect

WEIGHTS = ("ema", "raw")
MOST_AT_ONCE = 65_536  # samples of one network call

# Below this batch the CPU's convolutions and matrix products take other kernels, which round otherwise, and a sampler
# amplifies that 25-fold on its way down. Smaller batches are filled up, so that an image does not depend on its batch.
SMALLEST_CPU_BATCH = 16


class Batches:
    """Cuts seeds into batches of a size that `execution` can take.

    Where shapes are fixed all batches have one size. On a CPU none is smaller than `SMALLEST_CPU_BATCH`. A GPU's
    libraries choose their kernels by the batch: there none is smaller than the largest before it, so that the last
    images of many are computed as the first.
    """

    def __init__(self, execution, class_labels):
        self.execution, self.class_labels = execution, class_labels
        self.fixed_size = None  # of the batch that was compiled or recorded
        self.largest = 1  # on a GPU

    def __call__(self, draw, seeds, device, batch_size, on_batch=None, labels=None):
        """draw(seeds [B] int64, labels [B] or None) -> samples [B, *event], of all seeds: see `Sampler.__call__`."""
        check_request(seeds, batch_size)
        seeds = sliceable(seeds)
        if labels is not None:
            labels = check_labels(labels, len(seeds), self.class_labels.classes)
        if device.type == "cpu":
            smallest = SMALLEST_CPU_BATCH
        else:
            self.largest = max(self.largest, min(batch_size, len(seeds)))
            smallest = min(self.largest, batch_size)
        if self.execution.fixed_shapes:
            self.fixed_size = self.fixed_size or max(smallest, min(batch_size, len(seeds)))
            batch_size = smallest = self.fixed_size
        batches = []
        for start in range(0, len(seeds), batch_size):
            chunk = _as_tensor(seeds[start : start + batch_size], device)
            wanted = len(chunk)
            if wanted < smallest:
                chunk = torch.cat([chunk, chunk[-1:].expand(smallest - wanted)])
            of_chunk = self.class_labels(chunk)  # None where there are no classes
            if labels is not None:
                of_chunk[:wanted] = torch.tensor(list(labels[start : start + wanted]), dtype=torch.int64)
            batches.append(draw(chunk, of_chunk)[:wanted])
            if on_batch:
                on_batch(wanted)
        return torch.cat(batches)


def check_request(seeds, batch_size):
    """ValueError for no seeds, or a batch of none or of too many."""
    if len(seeds) == 0:
        raise ValueError("seeds: none given; ask for at least one image")
    if not 1 <= batch_size <= MOST_AT_ONCE:
        bound = "at least 1" if batch_size < 1 else f"at most {MOST_AT_ONCE}"
        raise ValueError(f"batch: {batch_size} must be {bound}")


def check_labels(labels, count, classes):
    """Labels of `count` samples as a sequence: one label stands for all. ValueError where they do not fit.

    classes: how many the network has, or None.
    """
    if classes is None:
        raise ValueError("labels: the run's network has no classes; leave them out")
    labels = labels.tolist() if hasattr(labels, "tolist") else labels  # a tensor or an array
    labels = Cycled([labels], count) if isinstance(labels, int) else sliceable(labels)
    if len(labels) != count:
        raise ValueError(f"labels: {len(labels)} for {count} images; give one for all, or one for each")
    different = labels.items if isinstance(labels, Cycled) else labels
    lowest, highest = min(different), max(different)
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"labels: {wrong} is none of the network's {classes} classes; use 0 to {classes - 1}")
    return labels


def sliceable(seeds):
    """The seeds as they are where they can be cut, as a range can; otherwise as a list."""
    return seeds if isinstance(seeds, Sequence) or hasattr(seeds, "shape") else list(seeds)


def _as_tensor(seeds, device):
    """Some seeds as int64 [B]."""
    try:
        return torch.as_tensor(seeds if torch.is_tensor(seeds) else list(seeds), dtype=torch.int64, device=device)
    except (RuntimeError, OverflowError) as error:
        if "verflow" not in str(error) and "too large" not in str(error):
            raise
        raise ValueError(f"seeds: {max(seeds)} is too large; a seed is below 2^63") from None


NO_CLASSES = ClassLabels()


class Sampler:
    """A noise-prediction network with the layers that it runs through.

    network: (x [B, *event], t [B] int, labels [B] or None) -> noise, a module with `event_shape`.
    class_labels: the `ClassLabels` of seeds for which nobody says a label.
    layers: `Layers`; log_gamma: in the layers' shape.
    execution: eager, compiled, and on a CUDA device all layers as one graph.
    Network and log_gamma may be changed in place between calls. The network is called as `Prepared`.
    """

    def __init__(self, network, layers, log_gamma, execution=EAGER, class_labels=NO_CLASSES):
        classes = getattr(network, "classes", None)
        if classes != class_labels.classes:
            raise ValueError(f"network.classes: {classes}, and the sampler's labels are of another network")
        self.network, self.layers, self.log_gamma, self.execution = network, layers, log_gamma, execution
        self.class_labels = class_labels
        self._prepared = as_prepared(network).at(layers.tau[1:])
        self.predict = execution.compiled(self._prepared)
        self._draw = execution.graphed(self._all_layers)
        self._batches = Batches(execution, class_labels)

    @torch.no_grad()
    def __call__(self, seeds, batch_size=250, on_batch=None, labels=None):
        """Draw one sample a seed: seeds, a sequence of ints -> float32 [N, *event] on the network's device.

        labels: of a network with classes, one int for all samples or one for each; by default each seed has its own.
        A sample depends on its own seed and label alone, not on the batch that it is drawn in; on a GPU another batch
        may round otherwise. `on_batch(n)` is called after every batch with the number of samples in it. Raises
        ValueError for no seeds, a batch of none, and labels that do not fit.
        """
        self._prepared.refresh()
        return self._batches(self._draw, seeds, self.layers.tau.device, batch_size, on_batch, labels)

    @torch.no_grad()
    def _all_layers(self, seeds, labels):
        """x_0 of the seeds [B], from x_K through all layers: what is recorded as one graph."""
        return self.from_layer(ops.draw_noise(seeds, 0, self.network.event_shape), self.layers.nfe, seeds, labels)

    @torch.no_grad()
    def from_layer(self, x, top, seeds, labels):
        """x_0 [B, *event], from x = x_top, through the layers top .. 1; seeds [B] int64, labels [B] or None."""
        for current in range(top, 0, -1):
            x = self._through(x, current, seeds, labels)
        return x

    @torch.no_grad()
    def states(self, seeds):
        """[x_0, ..., x_K] of the samples of seeds [B] int64, in one batch; for networks without classes."""
        states = [ops.draw_noise(seeds, 0, self.network.event_shape)]
        for current in range(self.layers.nfe, 0, -1):
            states.append(self._through(states[-1], current, seeds, None))
        return states[::-1]

    def _through(self, x, current, seeds, labels):
        """x_{k-1} of x = x_k, k = `current`."""
        k = torch.full_like(seeds, current)
        eps_hat = self.predict(x, self.layers.tau[k], *if_given(labels))
        # The last layer of an image gives its mean: noise there would only be seen as noise. DDIM with eta 0 has none
        # anywhere.
        is_last = current == 1 and not self.layers.ends_with_noise
        if is_last or self.layers.eta == 0:
            return self.layers.mean(x, eps_hat, k)
        return self.layers.step(x, eps_hat, self.log_gamma, ops.Noise(seeds, k))

    @property
    def nfe(self):
        """Network evaluations per sample."""
        return self.layers.nfe


class ParameterSampler:
    """The sampler of a run with a target: what it draws are the target's parameters, float32 [N, D].

    sampler: `Sampler`, whose samples are coordinates of the base; to_target: what makes parameters of them.
    """

    def __init__(self, sampler, to_target):
        self.sampler, self.to_target = sampler, to_target
        self.nfe, self.log_gamma, self.layers, self.network = (
            *(sampler.nfe, sampler.log_gamma, sampler.layers, sampler.network),
        )

    @torch.no_grad()
    def __call__(self, seeds, batch_size=250, on_batch=None):
        """One draw a seed; arguments as of `Sampler.__call__`."""
        return self.to_target(self.sampler(seeds, batch_size, on_batch))


def of_parameters(sampler, context):
    """A run's sampler as others use it: with a target, of its parameters; otherwise as it is."""
    return sampler if context.config.target is None else ParameterSampler(sampler, context.decoder)


def ddim_sampler(context, nfe, eta, own_knots=False):
    """DDIM with `nfe` evaluations of the context's teacher; spacing and `own_knots` as of `build_ddim_layers`."""
    layers = build_ddim_layers(context.config, nfe, eta, context.device, own_knots)
    log_gamma = torch.zeros(1, device=context.device)
    return Sampler(context.prepared_teacher, layers, log_gamma, context.execution, context.class_labels)


def student_sampler(context, network, execution=None):
    """The sampler of a student with the context's layers and labels; execution: in the place of the context's."""
    execution = execution or context.execution
    return Sampler(network, context.layers, network.log_scaled_gamma, execution, context.class_labels)


def load_sampler(run, world, weights="ema", step=None, changes=None):
    """The sampler of a run's newest checkpoint, or of that of a step; every rank of `world` gets it, rank 0 reads it.

    run: what `train` returned or a folder's path; weights: the "ema" or the "raw" ones.
    changes: keys of the run's configuration with other values, as {"backend": "torch", "compile": False}.
    Returns (Sampler, Context without a teacher, step). Raises ValueError where the run has no checkpoint, the weights
    are unknown, or what is asked for cannot run here.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: {weights!r} is unknown; choose ema or raw")
    folder = RunFolder.of(run)
    config, steps = world.from_main(lambda: (folder.config(), folder.checkpoints()))
    if not steps:
        raise ValueError(f"run {str(folder.path)!r}: has no checkpoint yet; let `hsivi train` get further")
    step = steps[-1] if step is None else step
    context = build_context(change_config(config, changes or {}), world)
    if config.target is not None:
        context = context.with_bridge(world.from_main(folder.bridge))
    student = build_untrained_student(context)
    stem = "student_ema" if weights == "ema" else "student"
    tensors = world.tensors_from_main(lambda: folder.load_tensors(step, stem))
    file = folder.checkpoint_path(step) / f"{stem}.safetensors"
    load_weights(student, tensors, file)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"checkpoint {str(file)!r}: {name} is not finite, which no sample can come from; delete {file.parent} "
                "for an older one, or train again with smaller learning rates"
            )
    return student_sampler(context, student), context, step


def sample(run, seeds, weights="ema", batch_size=250, on_batch=None, labels=None, **changes):
    """Draw images from a run.

    run: what `train` returned or a folder's path; seeds: a sequence of ints; weights: "ema" or "raw".
    labels: as of `Sampler.__call__`.
    on_batch(n): called after every batch of at most `batch_size` images.
    changes: in the place of the run's keys, as backend="torch", compile=True or cuda_graphs=False.

    Returns uint8 [N, C, H, W] on the CPU; for a 2-D target float32 points [N, 2]. Image n of a seed is always the same
    image, whatever the batch; on a GPU another batch may round otherwise. Started once per process by a launcher, each
    rank draws its share and all have the result. Raises ValueError for a path that holds no run, more images than the
    memory holds (`sample_in_batches` streams them), and as `load_sampler`.
    """
    batches = []

    def keep(_, images):
        batches.append(images)

    def check(event_shape):
        advice = "ask for fewer, or let `hsivi sample` write them as they come"
        size = math.prod(event_shape) * (1 if len(event_shape) == 3 else 4)
        refuse_beyond_memory(f"seeds: {len(seeds)} at once", 2 * len(seeds) * size, torch.device("cpu"), advice)

    sample_in_batches(run, seeds, keep, weights, batch_size, on_batch, check, True, labels, **changes)
    return torch.cat(batches)


def sample_in_batches(
    run,
    seeds,
    take,
    weights="ema",
    batch_size=250,
    on_batch=None,
    check=None,
    on_all_ranks=False,
    labels=None,
    **changes,
):
    """Draw images from a run and hand them on as they come, so that no more than a batch is held.

    take(seeds, images): called with each batch, images as of `sample`, on rank 0 or on all ranks.
    check(shape): called with that of an image once before anything is drawn; what it raises is raised.
    The rest is as of `sample`.
    """
    folder = RunFolder.of(run)
    config = folder.config()
    seeds = sliceable(seeds)
    check_request(seeds, batch_size)
    world = connect(config)
    advice = f"batch: {min(batch_size, len(seeds))} images at once; use a smaller one"
    with world.watched(config.distributed.timeout), memory_advice(advice):
        sampler, context, _ = load_sampler(folder, world, weights, changes=changes)
        event_shape = sampler.network.event_shape
        is_image = len(event_shape) == 3
        _check_batch(context, event_shape, min(batch_size, len(seeds)))
        if check:
            check(context.image_shape(event_shape))
        if labels is not None:
            labels = check_labels(labels, len(seeds), context.class_labels.classes)
        told = world.counting(on_batch)
        for start in range(0, len(seeds), batch_size * world.size):
            chunk = seeds[start : start + batch_size * world.size]
            of_chunk = None if labels is None else world.share(labels[start : start + batch_size * world.size])
            x = sampler(world.share(chunk), batch_size, told, of_chunk)
            images = world.gather_shares(to_uint8(context.images(x)) if is_image else context.images(x), len(chunk))
            if world.is_main or on_all_ranks:
                take(chunk, images.cpu())


def _check_batch(context, event_shape, batch_size):
    """ValueError where not even the first level of the network fits for a batch, or the images that are decoded."""
    channels = network_arguments(context.config.network).get("channels", 1)
    needed = max(channels * math.prod(event_shape[1:]), math.prod(context.image_shape(event_shape)))
    refuse_beyond_memory(f"batch: {batch_size}", 4 * batch_size * needed, context.device, "use a smaller one")

"""Measuring samplers: the metric of a run, the rows that it gives, and the table that a run ends with."""

import contextlib
import copy
import hashlib
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..checkpoints.run_folder import RunFolder
from ..config import MOST_IMAGES, change_config
from ..data import cache_folder, has_data, load_data, to_uint8
from ..density.teacher import target_of
from ..parallel.machine import picture_size, refuse_beyond_disk, refuse_beyond_memory
from ..parallel.out_of_memory import memory_advice
from ..parallel.world import connect
from ..sampling.sampler import ddim_sampler, load_sampler
from ..sampling.solvers import COMBINATIONS, NAMES, SchedulerSampler, baseline_sampler, solver_sampler
from .density import OfAnotherRun, PosteriorMetric, baselines
from .distances import (
    FEATURES_KEPT,
    KeptFeatures,
    StreamingMoments,
    frechet_distance,
    js_divergence,
    kernel_distance,
    load_statistics,
    plane_edges,
    precision_recall,
    save_statistics,
    sliced_wasserstein,
)
from .features import SIZES, check_images, describe_features, feature_extractor, image_features, network_of
from .image_files import ImageFiles
from .needed_files import fetch_needed
from .references import load_reference
from .table import spread_key


class ImageMetric:
    """Frechet distance of samples to reference images, on a feature network, after rounding to the data's grey levels.

    context: the run's. The reference is `eval.reference`, see `load_reference`, and without it the run's data.
    Statistics of images are kept in a folder of the user (`cached_statistics`).
    event_shape: that of the run's images, decoded, which the images that they are compared with must have.
    With eval.kid and eval.prc also kernel distance, precision and recall: they need such images, and look at up to
    `FEATURES_KEPT` of each side.
    Raises ValueError with nothing to compare with, or with a reference of another feature network.
    """

    batch_size = 250  # samples per network call

    def __init__(self, context, event_shape=None):
        config, self.world, self.device = context.config, context.world, context.device
        self.images_of = context.images
        settings = config.eval
        self.name = network_of(config)
        self.weights = settings.inception if self.name == "inception" else None
        self.levels = load_data("digits").levels if config.data == "digits" else 256
        self.kid, self.prc = settings.kid, settings.prc
        self.columns = (
            "frechet_distance",
            *["kernel_inception_distance"] * self.kid,
            *["precision", "recall", "f_score"] * self.prc,
        )
        reference, images, are_small = None, None, False
        if settings.reference is not None:
            reference = load_reference(settings.reference, progress=sys.stderr.isatty())
        if reference is not None and "images" in reference:
            images, reference = _fitting("ref", torch.from_numpy(reference["images"]), event_shape), None
        elif reference is None or self.kid or self.prc:
            images = _fitting("data_path", self._data(config, reference), event_shape)
            are_small = config.data == "digits"  # they come with the package, and are measured sooner than looked up
        self.extractor = feature_extractor(self.name, self.device, self.weights)
        if reference is None:
            reference = self.statistics(images) if are_small else self.cached_statistics(images)
        self.reference = reference
        self._check_reference()
        self.reference_features = self._some_features(images) if self.kid or self.prc else None

    def _data(self, config, reference):
        """The run's data [N, C, H, W] in -1 .. 1."""
        if not has_data(config):
            if reference is not None:
                raise ValueError("data_path: missing; eval.kid and eval.prc compare with images")
            nothing = "without reference images or statistics (eval.reference, ref) there is nothing to measure against"
            raise ValueError(f"data_path: missing; {nothing} (eval.num_samples=0 switches measuring off)")
        return torch.from_numpy(load_data(config.data, config.data_path).images)

    def _check_reference(self):
        size, made_by = len(self.reference["mu"]), self.reference.get("features")
        if size != SIZES[self.name]:
            raise ValueError(f"ref: has {size} features, the feature network {self.name} gives {SIZES[self.name]}")
        measured_by = describe_features(self.name, self.weights)
        if made_by is not None and made_by != measured_by:
            raise ValueError(f"ref: made by {made_by!r}, this run measures by {measured_by!r}")

    def rounded(self, images):
        """Images in -1 .. 1 as uint8, on the data's grey levels; what is uint8 already has been rounded."""
        return images if images.dtype == torch.uint8 else to_uint8(images, self.levels)

    def rounded_samples(self, samples):
        """What a sampler draws as uint8 images, latents decoded; what is uint8 already is that."""
        return samples if samples.dtype == torch.uint8 else self.rounded(self.images_of(samples))

    def statistics(self, images):
        """Feature statistics of images [N, C, H, W] in -1 .. 1 (or uint8, rounded) that this process has all of."""
        moments = StreamingMoments()
        for _, features in self._features(images.split(self.batch_size)):
            moments.add(features)
        return moments.statistics()

    def measure(self, samples, count):
        """{column: value} of `count` samples over all ranks, and how much the kernel distance varies over its subsets.

        samples: this rank's share of them as the run's sampler draws them, images [N, C, H, W] in -1 .. 1 or latents
        (or uint8, rounded), or batches of these as they come: no more than a batch is held.
        """
        batches = samples.split(self.batch_size) if torch.is_tensor(samples) else samples
        kept = KeptFeatures(self.world, count) if self.kid or self.prc else None
        moments, counted = StreamingMoments(), self.world.counted(count)
        for start, features in self._features(map(self.rounded_samples, batches)):
            if kept:
                kept.add(features)
            moments.add(features[: max(counted - start, 0)])
        if self.world.size > 1:
            moments.reduce(self.world)
        values = {"frechet_distance": frechet_distance(moments.statistics(), self.reference)}
        if kept:
            features = kept.gathered()
            values |= kernel_distance(features, self.reference_features) if self.kid else {}
            values |= precision_recall(features, self.reference_features) if self.prc else {}
        return values

    def _features(self, batches):
        """(number of the first image, features [N, D]) of each batch of images."""
        start = 0
        for batch in batches:
            self.world.mark_detail("measuring images")
            yield start, image_features(self.extractor, self.rounded(batch.to(self.device)))
            start += len(batch)

    def distance_alone(self):
        """The same metric of the Frechet distance alone, for a search."""
        metric = copy.copy(self)
        metric.kid = metric.prc = False
        metric.columns = self.columns[:1]
        return metric

    def cached_statistics(self, images):
        """Statistics of reference images [N, C, H, W], from $HSIVI_CACHE (~/.cache/hsivi_fast) if whole there.

        A file's name is a hash of the rounded images, the feature network with its weights, and what else its numbers
        depend on.
        """
        features = describe_features(self.name, self.weights)
        machine = f"{self.device.type} {torch.__version__} {torch.backends.cudnn.allow_tf32}"
        digest = hashlib.sha256(f"{features} {list(images.shape)} {self.levels} {machine}".encode())
        for batch in images.split(self.batch_size):
            self.world.mark_detail("reading reference images")
            digest.update(self.rounded(batch).numpy().tobytes())
        folder = cache_folder(Path.home() / ".cache" / "hsivi_fast")
        file = folder / f"statistics_{self.name}_{digest.hexdigest()[:20]}.npz"
        with contextlib.suppress(ValueError):  # not there, or damaged: measured again
            kept = load_statistics(file)
            if kept.get("features") == features and len(kept["mu"]) == SIZES[self.name]:
                return kept
        statistics = {**self.statistics(images), "features": features}
        save_statistics(file, statistics)
        return statistics

    def _some_features(self, images):
        """Features of up to `FEATURES_KEPT` reference images, float32 on the CPU.

        Of more images, it is an even choice that is always the same.
        """
        if len(images) > FEATURES_KEPT:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            images = images[order[:FEATURES_KEPT].sort().values]
        batches = images.split(self.batch_size)
        return torch.cat(
            [image_features(self.extractor, self.rounded(batch.to(self.device))).cpu() for batch in batches]
        )


def _fitting(key, images, event_shape):
    """Images [N, C, H, W], where they are of the run's shape; ValueError that begins with `key` otherwise."""
    if event_shape is not None and tuple(images.shape[1:]) != tuple(event_shape):
        raise ValueError(f"{key}: holds images {list(images.shape[1:])}, the run makes {list(event_shape)}")
    return images


class PlaneMetric:
    """Jensen-Shannon divergence (nats, on a grid with exact target masses) and sliced Wasserstein-2 distance.

    target: the exact teacher of a 2-D run; world: the processes that have shares of the samples.
    """

    columns = ("js_divergence", "sliced_wasserstein")
    batch_size = 5000

    def __init__(self, target, world):
        self.target, self.world = target, world
        masses = target.bin_masses(plane_edges()).flatten()
        self.masses = torch.cat([masses, (1 - masses.sum()).clamp_min(0)[None]])  # the last one is all outside

    def measure(self, samples, count):
        """{column: value} of `count` points over all ranks; samples: this rank's share of them, [N, 2], or batches."""
        points = samples if torch.is_tensor(samples) else torch.cat(list(samples))
        points = self.world.gather_shares(points, count).cpu().double()
        exact = self.target.samples(len(points), seed=1).double()
        return {
            "js_divergence": js_divergence(points, self.masses),
            "sliced_wasserstein": sliced_wasserstein(points, exact),
        }

    def distance_alone(self):
        """Itself: both columns cost little."""
        return self


def build_metric(context, network=None):
    """What measures a run's samples; called by all of several processes at once.

    network: any with the run's `event_shape`, the context's
    teacher by default; a 2-D run is measured against its teacher.
    Raises ValueError where the configuration names nothing to compare with.
    """
    config = context.config
    if config.target is not None:
        return PosteriorMetric(context)
    if config.teacher.target is not None:
        return PlaneMetric(context.teacher, context.world)
    if config.data is None and config.eval.reference is None:
        nothing = "without reference images or statistics (eval.reference) there is nothing to measure against"
        raise ValueError(f"data: missing; {nothing} (eval.num_samples=0 switches measuring off)")
    event_shape = context.image_shape((network or context.teacher).event_shape)
    check_images(network_of(config), event_shape)
    return ImageMetric(context, event_shape)


def measure_row(name, sampler, metric, num_samples, seed_sets, world, on_batch=None, nfe=None, files=None, first_set=0):
    """One row of a table.

    It has the metric's columns (mean) and *_std over seed sets, images per second of the sampler alone (latents are
    decoded outside of that time), and what was sampled. Set n has the seeds n num_samples .. (n + 1) num_samples - 1;
    `first_set` is the number of the first one.
    nfe: the evaluations that were asked for; where the sampler needs fewer (timesteps that its spacing repeats are
    dropped), the row says so under `evaluations`. Each rank of `world` draws its share, and all have the row;
    the rate is that of all. Samples go to the metric batch by batch as they are drawn, rounded once, and into `files`
    (`ImageFiles`), if given.
    """
    measured, drawing = [], _Drawing(sampler, metric, world, world.counting(on_batch), files)
    for index in range(first_set, first_set + seed_sets):
        world.mark(f"{name} at {sampler.nfe} evaluations")
        seeds = range(index * num_samples, (index + 1) * num_samples)
        measured.append(metric.measure(drawing.batches(seeds), num_samples))
    seconds = world.greatest(round(drawing.seconds * 1e6)) / 1e6  # of the slowest rank
    row = {"sampler": name, "nfe": nfe or sampler.nfe}
    if row["nfe"] != sampler.nfe:
        row["evaluations"] = sampler.nfe
    for column in metric.columns:
        values = [values[column] for values in measured]
        row[column] = float(np.mean(values))
        row[spread_key(column)] = float(np.std(values, ddof=1)) if seed_sets > 1 else None
    others = [key for key in measured[0] if key not in metric.columns]
    row |= {key: float(np.mean([values[key] for values in measured])) for key in others}
    return {**row, "images_per_second": seed_sets * num_samples / seconds, "num_samples": num_samples}


class _Drawing:
    """Draws this rank's share of samples in batches of the metric's size.

    `seconds` adds up what the sampler took, without compiling, recording, and the calls before it is at its speed.
    """

    def __init__(self, sampler, metric, world, on_batch, files):
        self.sampler, self.metric, self.world, self.on_batch, self.files = sampler, metric, world, on_batch, files
        self.seconds, self.is_warm = 0.0, False

    def batches(self, seeds):
        """Samples [N, *event] of this rank's share of the seeds; uint8 where they are written to files too."""
        share, counted = self.world.share(seeds), self.world.counted(len(seeds))
        for start in range(0, len(share), self.metric.batch_size):
            chunk = share[start : start + self.metric.batch_size]
            self._warm_up(chunk)
            samples = self._timed(chunk)
            if self.files:
                samples = self.metric.rounded_samples(samples)
                # A PNG of a repeated seed is another rank's to write.
                written = len(chunk) if self.files.one_file else max(counted - start, 0)
                self.files.add(chunk[:written], samples[:written])
            yield samples

    def _warm_up(self, seeds):
        """Draw the first batch as often as nobody should time; the samples are the same."""
        for _ in range(0 if self.is_warm else self.sampler.execution.warm_up_calls):
            self.sampler(seeds, self.metric.batch_size)
            self.world.mark_detail("warming up")
        self.is_warm = True

    def _timed(self, seeds):
        began, prepared = time.perf_counter(), self.sampler.execution.seconds
        samples = self.sampler(seeds, self.metric.batch_size, self.on_batch)
        if samples.is_cuda:
            torch.cuda.synchronize(samples.device)
        self.seconds += time.perf_counter() - began - (self.sampler.execution.seconds - prepared)
        return samples


def final_table(context, run, metric, progress=False):
    """The table that a run ends with, a list of rows, see `measure_row`; every row uses the same seeds.

    It has `eval.baselines`, each at all of `eval.ddim_nfe` ("best": see `best_row`), DDIM with the run's eta, the
    student at the end of its start, if it had one, and at the end, EMA and raw.
    """
    config, settings = context.config, context.config.eval
    samplers = []  # (name, NFE, sampler); None for the best solver, which has yet to be found
    for name in settings.baselines:
        for nfe in settings.ddim_nfe:
            samplers.append((NAMES[name], nfe, None if name == "best" else baseline_sampler(context, name, nfe)))
    samplers.append(("ddim_eta", config.nfe, ddim_sampler(context, config.nfe, config.eta, own_knots=True)))
    start = context.world.from_main(run.start_checkpoint)
    if start is not None:
        samplers.append(("start", config.nfe, load_sampler(run, context.world, "raw", start)[0]))
    for weights in ("ema", "raw"):
        samplers.append((f"hsivi_{weights}", config.nfe, load_sampler(run, context.world, weights)[0]))
    sets = settings.seeds
    searched = len(COMBINATIONS) + sets - 1
    total = sum(sampler.nfe * sets if sampler else nfe * searched for _, nfe, sampler in samplers)
    rows, shown = [], {"desc": "final table", "unit": "evaluation", "unit_scale": True, "dynamic_ncols": True}
    with tqdm(total=total * settings.num_samples, disable=not progress, **shown) as bar:
        while samplers:
            name, nfe, sampler = samplers.pop(0)  # let go when it is done: a recorded one holds memory for all layers

            def count(images, evaluations=sampler.nfe if sampler else nfe):
                bar.update(images * evaluations)

            if sampler:
                row = measure_row(name, sampler, metric, settings.num_samples, sets, context.world, count, nfe)
                if isinstance(sampler, SchedulerSampler) and settings.solver_spacing != "linspace":
                    row["spacing"] = settings.solver_spacing
            else:
                row = best_row(context, metric, nfe, count)
            rows.append(row)
    return rows


def density_table(context, run, metric, bridge, evaluations, single_layer=None, progress=False):
    """The table of a run with a target, a list of rows as of `measure_row`: `eval.baselines`, the start, the student.

    evaluations: of the target's gradient by the run, which its rivals have too. Rows say theirs.
    single_layer: the folder of a run with one layer, and its evaluations, for the row of that name.
    """
    settings, rows = context.config.eval, []
    samplers = baselines(context, bridge, evaluations)
    if single_layer is not None:
        other, of_other = single_layer
        samplers["single_layer"] = OfAnotherRun(context, *load_sampler(other, context.world)[:2]), of_other
    start = context.world.from_main(run.start_checkpoint)
    if start is not None:
        samplers["start"] = load_sampler(run, context.world, "raw", start)[0], bridge.evaluations
    for weights in ("ema", "raw"):
        samplers[f"hsivi_{weights}"] = load_sampler(run, context.world, weights)[0], evaluations
    with tqdm(total=len(samplers), desc="final table", disable=not progress, dynamic_ncols=True) as bar:
        for name, (sampler, of_gradient) in samplers.items():
            row = measure_row(name, sampler, metric, settings.num_samples, settings.seeds, context.world)
            rows.append({**row, "gradient_evaluations": of_gradient})
            bar.update()
    return rows


def best_row(context, metric, nfe, on_batch=None):
    """The row of the best solver with up to `nfe` evaluations, see `measure_row`.

    Of all `COMBINATIONS` of solver and spacing it has the lowest distance on the first set of seeds. The row is of the
    other sets, on which nothing was chosen: of them are mean and deviation. It names the choice under `solver` and
    `spacing`.
    """
    settings, world, distance, sampler = context.config.eval, context.world, metric.distance_alone(), None
    found = []
    for name, spacing in COMBINATIONS:
        sampler = solver_sampler(context, name, nfe, spacing, like=sampler)
        row = measure_row("best", sampler, distance, settings.num_samples, 1, world, on_batch, nfe)
        value = row[distance.columns[0]]
        found.append(value if math.isfinite(value) else math.inf)
    # On one rank: elsewhere the distances may differ by rounding.
    name, spacing = COMBINATIONS[world.from_main(lambda: found.index(min(found)))]
    sampler = solver_sampler(context, name, nfe, spacing, like=sampler)
    sets = settings.seeds - 1
    row = measure_row("best", sampler, metric, settings.num_samples, sets, world, on_batch, nfe, first_set=1)
    return {**row, "solver": NAMES[name], "spacing": spacing}


def evaluate(
    run,
    num_samples=50000,
    ref=None,
    weights="ema",
    on_batch=None,
    metric=None,
    inception=None,
    save_images=None,
    **changes,
):
    """Measure a run's sampler on images of the seeds 0 .. num_samples-1; returns a row as in results.json.

    run: what `train` returned or a folder's path; weights: "ema" or "raw".
    ref: in the place of the run's own reference, see `load_reference`.
    on_batch(n): called after every batch with the number of samples in it.
    metric, inception: in the place of eval.metric and eval.inception. Another feature network is compared with the
    data, or with `ref`, and not with eval.reference.
    save_images: a folder of PNGs or FILE.npz to which the images go as they were measured, on the data's grey levels,
    see `ImageFiles`.
    changes: in the place of the run's keys, as backend="torch", compile=True or cuda_graphs=False.

    Started once per process by a launcher, each rank draws its share, statistics are summed, and all have the row.
    Raises ValueError for less than 2 samples, statistics of another feature size, or a folder that holds no run.
    """
    check_num_samples(num_samples)
    if metric is not None and metric not in SIZES:
        raise ValueError(f"metric: {metric!r} is unknown; choose {', '.join(SIZES)}")
    folder = RunFolder.of(run)
    config = folder.config()
    world = connect(config)
    with world.watched(config.distributed.timeout):
        sampler, context, step = load_sampler(folder, world, weights, changes=changes)
        if config.teacher.target is not None:
            _refuse_in_the_plane(ref=ref, metric=metric, inception=inception, save_images=save_images)
            context = context.with_teacher()
        if config.target is not None:
            _refuse_for_a_target(metric=metric, inception=inception, save_images=save_images)
            context = context.with_bridge(folder.bridge(), target_of(config.target, context.device))
        config = context.config
        # The run's own statistics are not of another network.
        if config.target is None and metric not in (None, network_of(config)):
            config = replace(config, eval=replace(config.eval, metric=metric, reference=None))
        given = {"eval.inception": inception, "eval.reference": ref}
        config = change_config(config, {key: value and str(value) for key, value in given.items()})
        fetch_needed(config, teacher=False, measured=True)
        measure = build_metric(replace(context, config=config), sampler.network)
        image_shape = context.image_shape(sampler.network.event_shape)
        if save_images is not None:
            world.from_main(lambda: _check_room(num_samples, image_shape, save_images))
        files = ImageFiles(save_images, world) if save_images is not None else None
        with memory_advice(f"batch: {measure.batch_size} images at once, and num-samples: {num_samples}; lower it"):
            row = measure_row(f"hsivi_{weights}", sampler, measure, num_samples, 1, world, on_batch, files=files)
        if files:
            files.finish(num_samples)
        return {**row, "step": step}


def check_num_samples(num_samples):
    """ValueError for too few samples to have a covariance, or too many for any run."""
    if num_samples < 2:
        raise ValueError(f"num-samples: {num_samples} is too few; use at least 2")
    if num_samples > MOST_IMAGES:
        raise ValueError(f"num-samples: {num_samples} is too many; use at most {MOST_IMAGES}")


def _check_room(num_samples, image_shape, path):
    """ValueError where images cannot be kept: in memory for one file, or on the disk."""
    what, advice = f"num-samples: {num_samples} with --save-images", "lower it, or choose another disk"
    size = math.prod(image_shape)
    if str(path).lower().endswith(".npz"):
        refuse_beyond_memory(what, 2 * num_samples * size, torch.device("cpu"), "lower it, or give a folder")
        refuse_beyond_disk(what, num_samples * size, path, advice)
    else:
        refuse_beyond_disk(what, num_samples * picture_size(image_shape), path, advice, files=num_samples)


def _given_option(options):
    """The first option that has a value, as it is written on the command line; None for none."""
    return next((name.replace("_", "-") for name, value in options.items() if value is not None), None)


def _refuse_for_a_target(**options):
    """ValueError for the first option that a run with a target has no use for."""
    if option := _given_option(options):
        raise ValueError(f"{option}: a run with a target draws parameters, and no images")


def _refuse_in_the_plane(**options):
    """ValueError for the first option that a 2-D run has no use for."""
    if option := _given_option(options):
        what = "statistics do" if option == "ref" else "this does"
        raise ValueError(f"{option}: a 2-D run is measured against its exact target; {what} not apply")

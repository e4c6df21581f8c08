"""How good samples are: Frechet distance from streaming statistics for images, two distances for 2-D targets; the tables of them."""

import dataclasses
import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ..build import device_of, load_teacher
from ..checkpoints.download import CACHE_VARIABLE
from ..checkpoints.run_folder import RunFolder
from ..data import has_data, load_data, to_uint8
from ..execution import EAGER
from ..parallel.world import ALONE, connect
from ..sampling.sampler import ddim_sampler, load_sampler
from ..sampling.solvers import NAMES, baseline_sampler
from .features import SIZES, check_images, describe_features, feature_extractor, image_features, network_of
from .image_files import ImageFiles

PLANE_BINS, PLANE_PROJECTIONS = 48, 32
FEATURES_KEPT = 10_000  # per side, for the metrics that need features and not their moments alone
NEIGHBOURS = 3  # of precision and recall (Kynkaanniemi et al. 2019)
TITLES = {
    "frechet_distance": "Frechet distance",
    "kernel_inception_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "f_score": "F-score",
    "js_divergence": "JS divergence",
    "sliced_wasserstein": "sliced Wasserstein",
}
SAMPLERS = {
    "ddim": "DDIM",
    "ddim_eta": "start (DDIM, run's eta)",
    "ddpm": "DDPM (ancestral)",
    "dpmpp_2m": "DPM-Solver++(2M)",
    "unipc": "UniPC",
    "hsivi_ema": "HSIVI (EMA)",
    "hsivi_raw": "HSIVI (raw)",
}


class StreamingMoments:
    """Mean and covariance of features that arrive in batches: sums and outer products in float64."""

    def __init__(self):
        self.count, self.total, self.outer = 0, None, None

    def add(self, features):
        """Take in features [N, D]."""
        features = features.double()
        total, outer = features.sum(0), features.T @ features
        self.count += len(features)
        self.total = total if self.total is None else self.total + total
        self.outer = outer if self.outer is None else self.outer + outer

    def reduce(self, world):
        """Take in what the other ranks have: every rank has all of it afterwards."""
        count = torch.tensor([self.count], dtype=torch.float64, device=self.total.device)
        for value in (count, self.total, self.outer):
            world.sum(value)
        self.count = int(count)

    def statistics(self):
        """{"mu": [D], "sigma": [D, D]}, float64 arrays; sigma is the unbiased covariance."""
        if self.count < 2:
            raise ValueError(f"num-samples: {self.count} is too few for a covariance; use at least 2")
        mu = self.total / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return {"mu": mu.cpu().numpy(), "sigma": sigma.cpu().numpy()}


def frechet_distance(first, second):
    """Frechet distance between two Gaussians {"mu", "sigma"} (Heusel et al. 2017, eq. 6), by torch-fidelity's function.

    Raises ValueError where their feature sizes differ.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if np.shape(first["mu"]) != np.shape(second["mu"]):
        raise ValueError(
            f"statistics: {np.shape(first['mu'])[0]} features on one side and {np.shape(second['mu'])[0]} on the other; both must come from the same feature network"
        )
    first, second = (
        {key: np.asarray(value[key], dtype=np.float64) for key in ("mu", "sigma")} for value in (first, second)
    )
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def load_statistics(path):
    """Reference statistics from an npz file with `mu` [D] and `sigma` [D, D] (as EDM publishes them), and `features` where it says what made them."""
    try:
        with np.load(path) as file:
            statistics = {
                "mu": file["mu"],
                "sigma": file["sigma"],
                **({"features": str(file["features"])} if "features" in file else {}),
            }
    except FileNotFoundError:
        raise ValueError(f"reference {str(path)!r}: no such file") from None
    except Exception as error:  # not a zip, no such array, pickled objects: numpy raises many kinds
        raise ValueError(
            f"reference {str(path)!r}: expected an npz file with mu and sigma ({' '.join(str(error).split())})"
        ) from None
    if statistics["mu"].ndim != 1 or statistics["sigma"].shape != 2 * statistics["mu"].shape:
        raise ValueError(
            f"reference {str(path)!r}: mu {statistics['mu'].shape} and sigma {statistics['sigma'].shape} do not fit each other"
        )
    return statistics


def save_statistics(path, statistics):
    """Write {"mu", "sigma", "features" (what made them, see `describe_features`)} to an npz file that `load_statistics` reads, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".unfinished"
    )  # a name of its own: several processes may be at it
    try:
        with open(descriptor, "wb") as file:
            np.savez(file, **statistics)
        Path(beside).replace(path)
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


class KeptFeatures:
    """The first features of a stream, of all ranks `FEATURES_KEPT` at most, for metrics that compare sample by sample."""

    def __init__(self, world=ALONE, count=None):
        self.world, self.count, self.parts = world, count, []
        self.room = FEATURES_KEPT if world.size == 1 else min(-(-count // world.size), FEATURES_KEPT // world.size)

    def add(self, features):
        """Take in features [N, D] of this rank's samples, repeated ones included."""
        if self.room:
            self.parts.append(features[: self.room])
            self.room -= len(self.parts[-1])

    def gathered(self):
        """Float32 [M, D] on the CPU, without the repetitions that fill up ranks' shares; on every rank."""
        own = torch.cat(self.parts)
        if self.world.size == 1:
            return own.cpu()
        share = -(-self.count // self.world.size)
        return torch.cat(
            [part[: max(self.count - rank * share, 0)] for rank, part in enumerate(self.world.gather(own))]
        ).cpu()


class ImageMetric:
    """Frechet distance of samples to reference images, on a feature network, after rounding to the data's grey levels.

    reference: statistics; otherwise those of the file `eval.reference`, otherwise of the run's data, which are kept in a folder of the user (`cached_statistics`).
    event_shape: that of the run's images, which the data must have; world: where progress is noted.
    With eval.kid and eval.prc kernel distance, precision and recall too: they need the data, and look at up to `FEATURES_KEPT` images of each side.
    Raises ValueError where there is nothing to compare with, or the reference comes from another feature network.
    """

    batch_size = 250  # samples per network call

    def __init__(self, config, device, reference=None, event_shape=None, world=ALONE):
        settings, self.world = config.eval, world
        self.name, self.device = network_of(config), device
        self.weights = settings.inception if self.name == "inception" else None
        self.levels = load_data("digits").levels if config.data == "digits" else 256
        self.kid, self.prc = settings.kid, settings.prc
        self.columns = (
            "frechet_distance",
            *["kernel_inception_distance"] * self.kid,
            *["precision", "recall", "f_score"] * self.prc,
        )
        if reference is None and settings.reference is not None:
            reference = load_statistics(settings.reference)
        needs_images = reference is None or self.kid or self.prc
        if needs_images and not has_data(config):
            what = (
                "eval.kid and eval.prc compare with images"
                if reference is not None
                else "without reference images or statistics (eval.reference, ref) there is nothing to measure against"
            )
            raise ValueError(
                f"data_path: missing; {what}"
                + ("" if reference is not None else " (eval.num_samples=0 switches measuring off)")
            )
        self.extractor = feature_extractor(self.name, device, self.weights)
        images = torch.from_numpy(load_data(config.data, config.data_path).images) if needs_images else None
        if images is not None and event_shape is not None and tuple(images.shape[1:]) != tuple(event_shape):
            raise ValueError(f"data_path: holds images {list(images.shape[1:])}, the run makes {list(event_shape)}")
        if reference is None:
            # What comes with the package is small, and measured sooner than looked up.
            reference = self.statistics(images) if config.data_path is None else self.cached_statistics(images)
        self.reference = reference
        if len(reference["mu"]) != SIZES[self.name]:
            raise ValueError(
                f"ref: has {len(reference['mu'])} features, the feature network {self.name} gives {SIZES[self.name]}"
            )
        if "features" in reference and reference["features"] != describe_features(self.name, self.weights):
            raise ValueError(
                f"ref: made by {reference['features']!r}, this run measures by {describe_features(self.name, self.weights)!r}"
            )
        self.reference_features = self._some_features(images) if self.kid or self.prc else None

    def rounded(self, images):
        """Images in -1 .. 1 as uint8, on the data's grey levels; what is uint8 already has been rounded."""
        return images if images.dtype == torch.uint8 else to_uint8(images, self.levels)

    def statistics(self, images, world=ALONE, count=None, kept=None):
        """Feature statistics of images [N, C, H, W] in -1 .. 1 (or uint8, rounded), or of batches of them as they come: no more than a batch is held.

        With several processes, of each rank's share of `count` images. kept: `KeptFeatures` that the features go to too.
        """
        batches = images.split(self.batch_size) if torch.is_tensor(images) else images
        if count is None and torch.is_tensor(images):
            count = len(images)
        counted = None if count is None else world.counted(count)
        moments, first = StreamingMoments(), 0
        for batch in batches:
            self.world.mark_part("measuring images")
            features = image_features(self.extractor, self.rounded(batch.to(self.device)))
            if kept:
                kept.add(features)
            moments.add(features if counted is None else features[: max(counted - first, 0)])
            first += len(batch)
        if world.size > 1:
            moments.reduce(world)
        return moments.statistics()

    def measure(self, images, world=ALONE, count=None):
        """{column: value}, and how much the kernel distance varies over its subsets; arguments as of `statistics`."""
        kept = KeptFeatures(world, count) if self.kid or self.prc else None
        values = {"frechet_distance": frechet_distance(self.statistics(images, world, count, kept), self.reference)}
        if kept:
            features = kept.gathered()
            values |= kernel_distance(features, self.reference_features) if self.kid else {}
            values |= precision_recall(features, self.reference_features) if self.prc else {}
        return values

    def cached_statistics(self, images):
        """Statistics of reference images [N, C, H, W], from $HSIVI_CACHE (~/.cache/hsivi_fast) where they have been measured before.

        A file's name is a hash of the rounded images, the feature network with its weights, and what else its numbers depend on.
        """
        features = describe_features(self.name, self.weights)
        digest = hashlib.sha256(
            f"{features} {list(images.shape)} {self.levels} {self.device.type} {torch.__version__} {torch.backends.cudnn.allow_tf32}".encode()
        )
        for batch in images.split(self.batch_size):
            self.world.mark_part("reading reference images")
            digest.update(self.rounded(batch).numpy().tobytes())
        file = (
            Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "hsivi_fast")
            / f"statistics_{self.name}_{digest.hexdigest()[:20]}.npz"
        )
        if file.is_file():
            return load_statistics(file)
        statistics = {**self.statistics(images), "features": features}
        save_statistics(file, statistics)
        return statistics

    def _some_features(self, images):
        """Features of up to `FEATURES_KEPT` reference images, float32 on the CPU; of more, an even choice that is always the same."""
        if len(images) > FEATURES_KEPT:
            images = images[
                torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:FEATURES_KEPT].sort().values
            ]
        return torch.cat(
            [
                image_features(self.extractor, self.rounded(batch.to(self.device))).cpu()
                for batch in images.split(self.batch_size)
            ]
        )


def kernel_distance(features, reference):
    """Kernel distance (KID, Binkowski et al. 2018) of features [N, D] to [M, D], by torch-fidelity's function on its 100 subsets.

    A subset has 1,000 images, or all where there are fewer. Returns its mean and, under `kernel_inception_subset_std`, its deviation over subsets.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    values = kid_features_to_metric(
        features, reference, kid_subset_size=min(1000, len(features), len(reference)), verbose=False
    )
    return {
        "kernel_inception_distance": values[KEY_METRIC_KID_MEAN],
        "kernel_inception_subset_std": values[KEY_METRIC_KID_STD],
    }


def precision_recall(features, reference):
    """{"precision", "recall", "f_score"} (Kynkaanniemi et al. 2019) of features [N, D] against [M, D], by torch-fidelity's function.

    Raises ValueError where a side has too few images for a neighbourhood.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(features), len(reference)) <= NEIGHBOURS:
        raise ValueError(
            f"num-samples: {min(len(features), len(reference))} images are too few for precision and recall; use more than {NEIGHBOURS}"
        )
    # Rows of the distance matrix in parts: whole, it takes 400 MB for 10,000 images a side.
    return prc_features_to_metric(
        features, reference, prc_neighborhood=NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )


class PlaneMetric:
    """Jensen-Shannon divergence (nats, on a grid with an overflow cell, exact target masses) and sliced Wasserstein-2 distance."""

    columns = ("js_divergence", "sliced_wasserstein")
    batch_size = 5000

    def __init__(self, target):
        self.target = target
        self.edges = torch.linspace(-3, 3, PLANE_BINS + 1, dtype=torch.float64)
        masses = target.bin_masses(self.edges).flatten()
        self.masses = torch.cat([masses, (1 - masses.sum()).clamp_min(0)[None]])

    def measure(self, points, world=ALONE, count=None):
        """{"js_divergence": value, "sliced_wasserstein": value} of points [N, 2] or of batches of them; with several processes, of each rank's share of `count` points."""
        points = points if torch.is_tensor(points) else torch.cat(list(points))
        points = world.gather_shares(points, count).cpu().double()
        return {"js_divergence": self._js(points), "sliced_wasserstein": self._sliced_wasserstein(points)}

    def _js(self, points):
        counts, _ = torch.histogramdd(points, [self.edges, self.edges])
        counts = torch.cat([counts.flatten(), (len(points) - counts.sum())[None]])
        p, q = counts / counts.sum(), self.masses
        middle = (p + q) / 2
        return float((torch.special.xlogy(p, p / middle).nansum() + torch.special.xlogy(q, q / middle).nansum()) / 2)

    def _sliced_wasserstein(self, points):
        exact = self.target.samples(len(points), seed=1).double()
        angles = torch.arange(PLANE_PROJECTIONS, dtype=torch.float64) * (torch.pi / PLANE_PROJECTIONS)
        directions = torch.stack([angles.cos(), angles.sin()])  # [2, P]
        difference = (points @ directions).sort(dim=0).values - (exact @ directions).sort(dim=0).values
        return float(difference.square().mean().sqrt())


def build_metric(config, teacher, reference=None, world=ALONE):
    """What measures a run's samples; ValueError where the configuration names nothing to compare with.

    teacher: any network with the run's `event_shape`; for a 2-D target the exact one. Called by all of several processes at once.
    """
    if config.teacher.target is not None:
        return PlaneMetric(teacher)
    if config.data is None and config.eval.reference is None and reference is None:
        raise ValueError(
            "data: missing; without reference images or statistics (eval.reference) there is nothing to measure against (eval.num_samples=0 switches measuring off)"
        )
    check_images(network_of(config), teacher.event_shape)
    return ImageMetric(config, device_of(teacher), reference, teacher.event_shape, world)


def measure_row(name, sampler, metric, num_samples, seed_sets, on_batch=None, nfe=None, world=ALONE, files=None):
    """One row of a table: the metric's columns (mean) and *_std over seed sets, images per second of the sampler alone, and what was sampled.

    `nfe`: the evaluations that were asked for. Where the sampler needs fewer (DDIM drops timesteps that its spacing
    repeats), the row says so under `evaluations`. With several processes each rank draws its share, and all have the row; the rate is that of all.
    Samples go to the metric batch by batch as they are drawn, rounded once, and into `files` (`ImageFiles`), if given.
    """
    measured, drawing = [], _Drawing(sampler, metric, world, world.counting(on_batch), files)
    for index in range(seed_sets):
        world.mark(f"{name} at {sampler.nfe} evaluations")
        measured.append(
            metric.measure(drawing.batches(range(index * num_samples, (index + 1) * num_samples)), world, num_samples)
        )
    seconds = world.greatest(round(drawing.seconds * 1e6)) / 1e6  # of the slowest rank
    row = {"sampler": name, "nfe": nfe or sampler.nfe}
    if row["nfe"] != sampler.nfe:
        row["evaluations"] = sampler.nfe
    for column in metric.columns:
        values = [values[column] for values in measured]
        row[column] = float(np.mean(values))
        row[_std_key(column)] = float(np.std(values, ddof=1)) if seed_sets > 1 else None
    row |= {
        key: float(np.mean([values[key] for values in measured])) for key in measured[0] if key not in metric.columns
    }
    return {**row, "images_per_second": seed_sets * num_samples / seconds, "num_samples": num_samples}


class _Drawing:
    """Draws this rank's share of samples in batches of the metric's size; `seconds` adds up what the sampler took, without compiling and recording."""

    def __init__(self, sampler, metric, world, on_batch, files):
        self.sampler, self.metric, self.world, self.on_batch, self.files, self.seconds = (
            sampler,
            metric,
            world,
            on_batch,
            files,
            0.0,
        )

    def batches(self, seeds):
        """Samples [N, *event] of this rank's part of the seeds; uint8 where they are written to files too."""
        own, counted = self.world.share(seeds), self.world.counted(len(seeds))
        for first in range(0, len(own), self.metric.batch_size):
            chunk = own[first : first + self.metric.batch_size]
            start, prepared = time.perf_counter(), self.sampler.execution.seconds
            samples = self.sampler(chunk, self.metric.batch_size, self.on_batch)
            if samples.is_cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - start - (self.sampler.execution.seconds - prepared)
            if self.files:
                samples = self.metric.rounded(samples)
                own_files = (
                    len(chunk) if self.files.one_file else max(counted - first, 0)
                )  # a PNG of a repeated seed is another rank's to write
                self.files.add(chunk[:own_files], samples[:own_files])
            yield samples


def _std_key(column):
    """frechet_distance -> frechet_std, and so on."""
    return column.removesuffix("_distance").removesuffix("_divergence") + "_std"


def final_table(run, config, teacher, metric, execution=EAGER, progress=False, world=ALONE):
    """The table that a run ends with: `eval.baselines`, each at all of `eval.ddim_nfe`, the start (DDIM with the run's eta), and the student, EMA and raw.

    Every row uses the same seeds. Returns a list of rows, see `measure_row`.
    """
    from tqdm import tqdm

    settings = config.eval
    samplers = [
        (NAMES[name], nfe, baseline_sampler(config, teacher, name, nfe, execution))
        for name in settings.baselines
        for nfe in settings.ddim_nfe
    ]
    samplers.append(("ddim_eta", config.nfe, ddim_sampler(config, teacher, config.nfe, config.eta, execution)))
    samplers += [
        (f"hsivi_{weights}", config.nfe, load_sampler(run, weights, world=world)[0]) for weights in ("ema", "raw")
    ]
    total = sum(sampler.nfe for _, _, sampler in samplers) * settings.seeds * settings.num_samples
    with tqdm(
        total=total, desc="final table", unit="evaluation", unit_scale=True, disable=not progress, dynamic_ncols=True
    ) as bar:
        rows = []
        while samplers:
            name, nfe, sampler = samplers.pop(
                0
            )  # let go when it is done: a recorded one holds the memory of all its layers
            rows.append(
                measure_row(
                    name,
                    sampler,
                    metric,
                    settings.num_samples,
                    settings.seeds,
                    lambda n, each=sampler.nfe: bar.update(n * each),
                    nfe,
                    world,
                )
            )
        return rows


def evaluate(
    run,
    num_samples=50000,
    ref=None,
    weights="ema",
    on_batch=None,
    backend=None,
    compile=None,
    cuda_graphs=None,
    metric=None,
    inception=None,
    save_images=None,
):
    """Measure a run's sampler on images of the seeds 0 .. num_samples-1.

    run: what `train` returned or a folder's path; ref: an npz file of reference statistics instead of the run's own reference;
    weights: "ema" or "raw"; on_batch(n): called after every batch; backend, compile, cuda_graphs: as of `load_sampler`; metric, inception: in the place of
    eval.metric and eval.inception (another feature network is compared with the data, or with `ref`, and not with eval.reference); save_images: a folder of PNGs or
    FILE.npz to which the images go as they were measured, on the data's grey levels, see `ImageFiles`. Returns a row as in results.json.
    Started once per process by a launcher, each rank draws its part, statistics are summed, and all have the row.
    Raises ValueError for less than 2 samples, statistics of another feature size, or a folder that holds no run.
    """
    if num_samples < 2:
        raise ValueError(f"num-samples: {num_samples} is too few; use at least 2")
    if metric is not None and metric not in SIZES:
        raise ValueError(f"metric: {metric!r} is unknown; choose {', '.join(SIZES)}")
    reference = load_statistics(ref) if ref is not None else None
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    config = folder.config()
    world = connect(config)
    with world.watched(config.distributed.timeout):
        sampler, config, step = load_sampler(
            folder, weights, backend=backend, compile=compile, cuda_graphs=cuda_graphs, world=world
        )
        plane = config.teacher.target is not None
        for option, value in (("ref", ref), ("metric", metric), ("inception", inception), ("save-images", save_images)):
            if plane and value is not None:
                raise ValueError(
                    f"{option}: a 2-D run is measured against its exact target; {'statistics do' if option == 'ref' else 'this does'} not apply"
                )
        if metric not in (None, network_of(config)):
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, metric=metric, reference=None))
        if inception is not None:
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, inception=str(inception)))
        measure = build_metric(
            config, load_teacher(config, sampler.layer.tau.device) if plane else sampler.network, reference, world
        )
        files = ImageFiles(save_images, world) if save_images is not None else None
        row = measure_row(f"hsivi_{weights}", sampler, measure, num_samples, 1, on_batch, world=world, files=files)
        if files:
            files.finish(num_samples)
        return {**row, "step": step}


def table_lines(rows):
    """Rows as lists of cells, the heading first."""
    columns = [column for column in TITLES if column in rows[0]]
    lines = [["sampler", "NFE", *[TITLES[column] for column in columns], "images/s"]]
    for row in rows:
        cells = []
        for column in columns:
            spread, digits = row[_std_key(column)], 2 if column == "frechet_distance" else 4
            cells.append(f"{row[column]:.{digits}f}" + (f" +- {spread:.{digits}f}" if spread is not None else ""))
        nfe = f"{row['nfe']} ({row['evaluations']} distinct)" if "evaluations" in row else str(row["nfe"])
        lines.append([sampler_title(row["sampler"]), nfe, *cells, f"{row['images_per_second']:.0f}"])
    return lines


def format_table(rows):
    """Rows as aligned text for a terminal."""
    lines = table_lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def sampler_title(name):
    """What a sampler of results.json is called in tables and pictures."""
    return SAMPLERS[name]

"""How good samples are: Frechet distance from streaming statistics for images, two distances for 2-D targets."""

import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .config import ASSETS
from .data import load_data, to_uint8
from .distributed import ALONE, connect
from .frozen import EAGER
from .models import device_of, load_teacher
from .nets.checkpoints import load_weights, read_weights
from .run_folder import RunFolder
from .sampler import ddim_sampler, load_sampler

PLANE_BINS, PLANE_PROJECTIONS = 48, 32
TITLES = {"frechet_distance": "Frechet distance", "js_divergence": "JS divergence", "sliced_wasserstein": "sliced Wasserstein"}


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
        raise ValueError(f"statistics: {np.shape(first['mu'])[0]} features on one side and {np.shape(second['mu'])[0]} on the other; both must come from the same feature network")
    first, second = ({key: np.asarray(value[key], dtype=np.float64) for key in ("mu", "sigma")} for value in (first, second))
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def load_statistics(path):
    """Reference statistics from an npz file with `mu` [D] and `sigma` [D, D] (as EDM publishes them)."""
    try:
        with np.load(path) as file:
            statistics = {"mu": file["mu"], "sigma": file["sigma"]}
    except FileNotFoundError:
        raise ValueError(f"ref {str(path)!r}: no such file") from None
    except Exception as error:  # not a zip, no such array, pickled objects: numpy raises many kinds
        raise ValueError(f"ref {str(path)!r}: expected an npz file with mu and sigma ({' '.join(str(error).split())})") from None
    if statistics["mu"].ndim != 1 or statistics["sigma"].shape != 2 * statistics["mu"].shape:
        raise ValueError(f"ref {str(path)!r}: mu {statistics['mu'].shape} and sigma {statistics['sigma'].shape} do not fit each other")
    return statistics


class DigitsClassifier(nn.Module):
    """A small classifier of 8x8 digits; its 64 penultimate activations are the features of the digits metric."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(256, 64)
        self.classes = nn.Linear(64, 10)

    def features(self, images):
        """uint8 images [N, 1, 8, 8] -> [N, 64]."""
        x = images.float() / 127.5 - 1
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images):
        """uint8 images [N, 1, 8, 8] -> logits [N, 10]."""
        return self.classes(self.features(images))


def feature_extractor(name, device):
    """A feature network out of torch-fidelity's registry, where the digits classifier is entered too.

    Calling it on uint8 images [N, C, H, W] gives a tuple whose first entry is [N, D].
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor

    class DigitsFeatures(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.classifier = DigitsClassifier()
            file = ASSETS / "digits_features.safetensors"
            load_weights(self.classifier, read_weights(file), file)

        @staticmethod
        def get_provided_features_list():
            return ("64",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "64"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            return (self.classifier.features(images),)

    if "digits" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("digits", DigitsFeatures)
    return create_feature_extractor(name, ["64"], cuda=False, verbose=False).to(device)


class ImageMetric:
    """Frechet distance of samples to a data set, on a feature network, after rounding to the data's grey levels."""

    columns = ("frechet_distance",)
    batch_size = 250  # samples per network call

    def __init__(self, config, device, reference=None):
        data = load_data(config.data)
        self.levels = data.levels
        self.extractor = feature_extractor(config.eval.metric or config.data, device)
        self.reference = reference or self.statistics(torch.from_numpy(data.images).to(device))
        size = len(self.statistics(torch.from_numpy(data.images[:2]).to(device))["mu"])
        if len(self.reference["mu"]) != size:
            raise ValueError(f"ref: has {len(self.reference['mu'])} features, the feature network {config.eval.metric or config.data} gives {size}")

    def statistics(self, images, world=ALONE, count=None):
        """Feature statistics of images [N, C, H, W] in -1 .. 1; with several processes, of each rank's share of `count` images."""
        moments, counted = StreamingMoments(), world.counted(len(images) if count is None else count)
        for first in range(0, len(images), self.batch_size):
            with torch.no_grad():
                features = self.extractor(to_uint8(images[first:first + self.batch_size], self.levels))[0]
            moments.add(features[:max(counted - first, 0)])
        if world.size > 1:
            moments.reduce(world)
        return moments.statistics()

    def measure(self, images, world=ALONE, count=None):
        """{"frechet_distance": value}; arguments as of `statistics`."""
        return {"frechet_distance": frechet_distance(self.statistics(images, world, count), self.reference)}


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
        """{"js_divergence": value, "sliced_wasserstein": value} of points [N, 2]; with several processes, of each rank's share of `count` points."""
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


def build_metric(config, teacher, reference=None):
    """What measures a run's samples; ValueError where the configuration names nothing to compare with."""
    if config.teacher.target is not None:
        return PlaneMetric(teacher)
    if config.data is None:
        raise ValueError("data: missing; without reference images there is nothing to measure against (eval.num_samples=0 switches measuring off)")
    return ImageMetric(config, device_of(teacher), reference)


def measure_row(name, sampler, metric, num_samples, seed_sets, on_batch=None, nfe=None, world=ALONE):
    """One row of a table: the metric's columns (mean) and *_std over seed sets, images per second, and what was sampled.

    `nfe`: the evaluations that were asked for. Where the sampler needs fewer (DDIM drops timesteps that its spacing
    repeats), the row says so under `evaluations`. With several processes each rank draws its share, and all have the row; the rate is that of all.
    """
    measured, seconds = [], 0.0
    for index in range(seed_sets):
        start, prepared = time.perf_counter(), sampler.execution.seconds
        world.mark(f"{name} at {sampler.nfe} evaluations")
        samples = sampler(world.share(range(index * num_samples, (index + 1) * num_samples)), metric.batch_size, world.counting(on_batch))
        if samples.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start - (sampler.execution.seconds - prepared)
        measured.append(metric.measure(samples, world, num_samples))
    seconds = world.greatest(round(seconds * 1e6)) / 1e6  # of the slowest rank
    row = {"sampler": name, "nfe": nfe or sampler.nfe}
    if row["nfe"] != sampler.nfe:
        row["evaluations"] = sampler.nfe
    for column in metric.columns:
        values = [values[column] for values in measured]
        row[column] = float(np.mean(values))
        row[_std_key(column)] = float(np.std(values, ddof=1)) if seed_sets > 1 else None
    return {**row, "images_per_second": seed_sets * num_samples / seconds, "num_samples": num_samples}


def _std_key(column):
    """frechet_distance -> frechet_std, and so on."""
    return column.removesuffix("_distance").removesuffix("_divergence") + "_std"


def final_table(run, config, teacher, metric, execution=EAGER, progress=False, world=ALONE):
    """The table that a run ends with: DDIM, the start (DDIM with the run's eta), and the student, EMA and raw.

    Every row uses the same seeds. Returns a list of rows, see `measure_row`.
    """
    from tqdm import tqdm

    settings = config.eval
    samplers = [("ddim", nfe, ddim_sampler(config, teacher, nfe, 0.0, execution)) for nfe in settings.ddim_nfe]
    samplers.append(("ddim_eta", config.nfe, ddim_sampler(config, teacher, config.nfe, config.eta, execution)))
    samplers += [(f"hsivi_{weights}", config.nfe, load_sampler(run, weights, world=world)[0]) for weights in ("ema", "raw")]
    total = sum(sampler.nfe for _, _, sampler in samplers) * settings.seeds * settings.num_samples
    with tqdm(total=total, desc="final table", unit="evaluation", unit_scale=True, disable=not progress, dynamic_ncols=True) as bar:
        rows = []
        while samplers:
            name, nfe, sampler = samplers.pop(0)  # let go when it is done: a recorded one holds the memory of all its layers
            rows.append(measure_row(name, sampler, metric, settings.num_samples, settings.seeds, lambda n, each=sampler.nfe: bar.update(n * each), nfe, world))
        return rows


def evaluate(run, num_samples=50000, ref=None, weights="ema", on_batch=None, backend=None, compile=None, cuda_graphs=None):
    """Measure a run's sampler on images of the seeds 0 .. num_samples-1.

    run: what `train` returned or a folder's path; ref: an npz file of reference statistics instead of the run's data set;
    weights: "ema" or "raw"; on_batch(n): called after every batch; backend, compile, cuda_graphs: as of `load_sampler`. Returns a row as in results.json.
    Started once per process by a launcher, each rank draws its part, statistics are summed, and all have the row.
    Raises ValueError for less than 2 samples, statistics of another feature size, or a folder that holds no run.
    """
    if num_samples < 2:
        raise ValueError(f"num-samples: {num_samples} is too few; use at least 2")
    reference = load_statistics(ref) if ref is not None else None
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    config = folder.config()
    world = connect(config)
    with world.watched(config.distributed.timeout):
        sampler, config, step = load_sampler(folder, weights, backend=backend, compile=compile, cuda_graphs=cuda_graphs, world=world)
        if reference is not None and config.teacher.target is not None:
            raise ValueError("ref: a 2-D run is measured against its exact target; statistics do not apply")
        metric = build_metric(config, load_teacher(config, sampler.layer.tau.device), reference)
        return {**measure_row(f"hsivi_{weights}", sampler, metric, num_samples, 1, on_batch, world=world), "step": step}


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
    return "\n".join("  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(line, widths))) for line in lines)


def sampler_title(name):
    """What a sampler of results.json is called in tables and pictures."""
    return {"ddim": "DDIM", "ddim_eta": "start (DDIM, run's eta)", "hsivi_ema": "HSIVI (EMA)", "hsivi_raw": "HSIVI (raw)"}[name]

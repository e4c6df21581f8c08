"""Distances between sets of samples, and what they are computed from: moments and features that arrive in batches.

Frechet distance, kernel distance, precision and recall are torch-fidelity's functions, on features of images. The
distances of samples themselves, Jensen-Shannon in the plane and sliced Wasserstein in any dimension, are our own.
"""

from pathlib import Path

import numpy as np
import torch

from ..checkpoints.files import make_folder, write_arrays
from ..data import brief, npz_arrays, read_npz_array

PLANE_BINS, PLANE_PROJECTIONS = 48, 32
SPACE_PROJECTIONS, PROJECTION_SEED = 128, 0  # of the sliced Wasserstein distance, but in the plane
FEATURES_KEPT = 10_000  # per side, for the metrics that need features and not their moments alone
LARGEST_FEATURES = 2**13  # of a reference
LARGEST_STATISTIC = 1e12  # in a reference: squares and sums of it are finite
ROUNDING = 1e-5  # of a reference's covariance, relative to its largest entry
NEIGHBOURS = 3  # of precision and recall (Kynkaanniemi et al. 2019)


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


class KeptFeatures:
    """The first features of a stream, `FEATURES_KEPT` at most over all ranks of `world`.

    They are for metrics that compare sample by sample. count: how many samples there are, over all ranks.
    """

    def __init__(self, world, count):
        self.world, self.count, self.batches = world, count, []
        self.room = min(-(-count // world.size), FEATURES_KEPT // world.size)

    def add(self, features):
        """Take in features [N, D] of this rank's samples, repeated ones included."""
        if self.room:
            self.batches.append(features[: self.room])
            self.room -= len(self.batches[-1])

    def gathered(self):
        """Float32 [M, D] on the CPU, without the repetitions that fill up ranks' shares; on every rank."""
        features = torch.cat(self.batches)
        if self.world.size == 1:
            return features.cpu()
        share = -(-self.count // self.world.size)
        by_rank = enumerate(self.world.gather(features))
        return torch.cat([kept[: max(self.count - rank * share, 0)] for rank, kept in by_rank]).cpu()


def frechet_distance(first, second):
    """Frechet distance between two Gaussians {"mu", "sigma"} (Heusel et al. 2017, eq. 6), by torch-fidelity's function.

    Raises ValueError where their feature sizes differ.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # here: it takes a second

    if np.shape(first["mu"]) != np.shape(second["mu"]):
        sizes = f"{np.shape(first['mu'])[0]} features on one side and {np.shape(second['mu'])[0]} on the other"
        raise ValueError(f"statistics: {sizes}; both must come from the same feature network")
    return fid_statistics_to_metric(_as_float64(first), _as_float64(second), verbose=False)[KEY_METRIC_FID]


def _as_float64(statistics):
    return {key: np.asarray(statistics[key], dtype=np.float64) for key in ("mu", "sigma")}


def kernel_distance(features, reference):
    """Kernel distance (KID, Binkowski et al. 2018) of features [N, D] to [M, D], by torch-fidelity's 100 subsets.

    A subset has 1,000 images, or all where there are fewer. Returns the mean over subsets and, under
    `kernel_inception_subset_std`, the deviation.
    """
    # Here: it takes a second, and few runs measure it.
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    subset = min(1000, len(features), len(reference))
    values = kid_features_to_metric(features, reference, kid_subset_size=subset, verbose=False)
    return {
        "kernel_inception_distance": values[KEY_METRIC_KID_MEAN],
        "kernel_inception_subset_std": values[KEY_METRIC_KID_STD],
    }


def precision_recall(features, reference):
    """{"precision", "recall", "f_score"} (Kynkaanniemi et al. 2019) of features [N, D] against [M, D].

    Raises ValueError where a side has too few images for a neighbourhood.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric  # here: it takes a second, and few runs measure it

    count = min(len(features), len(reference))
    if count <= NEIGHBOURS:
        problem = f"{count} images are too few for precision and recall"
        raise ValueError(f"num-samples: {problem}; use more than {NEIGHBOURS}")
    # 1,000 rows of the distance matrix at a time: whole, it takes 400 MB for 10,000 images a side.
    return prc_features_to_metric(
        features, reference, prc_neighborhood=NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )


def plane_edges():
    """The edges of the grid on which 2-D samples are counted, float64 [M + 1]."""
    return torch.linspace(-3, 3, PLANE_BINS + 1, dtype=torch.float64)


def js_divergence(points, masses):
    """Jensen-Shannon divergence, in nats, of points [N, 2] to the exact masses of the grid's cells.

    masses: [M M + 1], the last one of all that is outside of the grid.
    """
    edges = plane_edges()
    counts, _ = torch.histogramdd(points, [edges, edges])
    counts = torch.cat([counts.flatten(), (len(points) - counts.sum())[None]])
    p, q = counts / counts.sum(), masses
    middle = (p + q) / 2
    return float((torch.special.xlogy(p, p / middle).nansum() + torch.special.xlogy(q, q / middle).nansum()) / 2)


def sliced_wasserstein(points, exact):
    """Sliced Wasserstein-2 distance of points [N, D] to exact samples [M, D].

    The root of the mean square over directions: in the plane `PLANE_PROJECTIONS` at even angles, in more dimensions
    `SPACE_PROJECTIONS` random ones, always the same. Along each it is exact, whether N and M are equal or not.
    """
    directions = _directions(exact.shape[1])  # [D, P]
    first, second = ((side @ directions).sort(dim=0).values for side in (points, exact))
    if len(first) == len(second):
        return float((first - second).square().mean().sqrt())
    # Quantiles are constant between the multiples of 1/N and 1/M: these levels, times N M, as integers.
    n, m = len(first), len(second)
    levels = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = levels.diff(prepend=levels.new_zeros(1)).to(first.dtype) / (n * m)
    difference = first[(levels - 1) // m] - second[(levels - 1) // n]
    return float((widths @ difference.square()).mean().sqrt())


def _directions(dim):
    """Unit vectors [dim, P], float64."""
    if dim == 2:
        angles = torch.arange(PLANE_PROJECTIONS, dtype=torch.float64) * (torch.pi / PLANE_PROJECTIONS)
        return torch.stack([angles.cos(), angles.sin()])
    if dim == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    random = torch.Generator().manual_seed(PROJECTION_SEED)
    directions = torch.randn(dim, SPACE_PROJECTIONS, generator=random, dtype=torch.float64)
    return directions / directions.norm(dim=0)


def load_statistics(path):
    """Reference statistics from an npz file, as EDM publishes them: `mu` [D] and `sigma` [D, D], float64.

    `features` too where the file says what made them. Raises ValueError, in one line that names the file and the array,
    where they cannot be a mean and a covariance: see `checked_statistics`.
    """
    where = f"reference {str(path)!r}"
    arrays = npz_arrays(path, where, "mu and sigma")
    for name in ("mu", "sigma"):
        if name not in arrays:
            raise ValueError(
                f"{where}: expected an npz file with mu and sigma, it holds {', '.join(arrays) or 'nothing'}"
            )
    _check_shapes(where, *(arrays[name] for name in ("mu", "sigma")))  # before either is read
    statistics = checked_statistics(where, *(read_npz_array(path, name, where) for name in ("mu", "sigma")))
    if arrays.get("features", (None, None))[0] == ():  # one text
        statistics["features"] = brief(read_npz_array(path, "features", where))
    return statistics


def _check_shapes(where, mu, sigma):
    """ValueError where two arrays, each (shape, dtype), can be no mean and covariance."""
    for name, (_, dtype) in (("mu", mu), ("sigma", sigma)):
        if dtype.kind != "f":
            raise ValueError(f"{where}: {name} is {brief(dtype)}; expected numbers of type float64 or float32")
    shape = mu[0]
    if len(shape) != 1 or sigma[0] != 2 * shape or not 0 < shape[0] <= LARGEST_FEATURES:
        raise ValueError(
            f"{where}: mu {brief(shape)} and sigma {brief(sigma[0])} do not fit each other; "
            f"expected [D] and [D, D] with D from 1 to {LARGEST_FEATURES}"
        )


def checked_statistics(where, mu, sigma):
    """{"mu": [D], "sigma": [D, D]} of two arrays, as float64.

    Raises ValueError that begins with `where` where they are of other shapes, no floats or not finite, or sigma is no
    covariance: asymmetric or with a negative eigenvalue, each beyond what rounding does to float32 sums.
    """
    mu, sigma = np.asarray(mu), np.asarray(sigma)
    _check_shapes(where, (mu.shape, mu.dtype), (sigma.shape, sigma.dtype))
    statistics = {"mu": mu.astype(np.float64), "sigma": sigma.astype(np.float64)}
    for name, values in statistics.items():
        strange = np.argwhere(~(np.abs(values) <= LARGEST_STATISTIC))  # NaN is among them
        if len(strange):
            at = strange[0].tolist()
            raise ValueError(
                f"{where}: {name} at {at} is {values[tuple(at)]:g}; expected finite numbers below {LARGEST_STATISTIC:g}"
            )
    sigma = statistics["sigma"]
    allowed = ROUNDING * np.abs(sigma).max()
    difference = np.abs(sigma - sigma.T)
    if difference.max() > allowed:
        i, j = np.unravel_index(difference.argmax(), difference.shape)
        raise ValueError(
            f"{where}: sigma at {[int(i), int(j)]} is {sigma[i, j]:g} and at {[int(j), int(i)]} {sigma[j, i]:g}; "
            "a covariance is symmetric"
        )
    smallest = float(np.linalg.eigvalsh(sigma)[0])
    if smallest < -allowed:
        raise ValueError(f"{where}: sigma has the eigenvalue {smallest:g}; a covariance has none below 0")
    return statistics


def save_statistics(path, statistics):
    """Write statistics to an npz file that `load_statistics` reads, atomically.

    statistics: {"mu", "sigma", "features" (what made them, see `describe_features`)}.
    """
    path = Path(path)
    make_folder(path.parent)
    write_arrays(path, shared=True, **statistics)  # several processes may be at it

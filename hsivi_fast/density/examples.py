"""The shipped targets: shapes in the plane, the funnel, mixtures, and two regressions on data of scikit-learn.

Each has a `name`, a `dim`, names of its `parameters`, and `log_density`: x [B, dim] -> [B], up to a constant where none
is known. Where the distribution is known they have exact draws and moments too. All are smooth, and need no transform.
"""

import functools
import math

import numpy as np
import torch

LOG_2_PI = math.log(2 * math.pi)
HIDDEN_UNITS = 8  # of the Bayesian neural network
TRAINING_ROWS, SPLIT_SEED = 353, 0  # of the 442 patients of the diabetes data, 80 in 100; the others are held out


class Example:
    """A shipped target.

    Attributes: `name`, `dim`, `parameters` (dim names), and, where they are known, `mean` [dim] and `covariance`
    [dim, dim] in float64, else None. `exact` says whether `samples` can draw.
    constants: {name: array}, which `_constant` gives back as tensors.
    """

    name, dim, mean, covariance, exact = "", 0, None, None, False

    def __init__(self, **constants):
        self.parameters = [f"x{number + 1}" for number in range(self.dim)]
        self._arrays, self._tensors = constants, {}

    def log_density(self, x):
        """Log density of x [B, dim], up to a constant: [B]."""
        raise NotImplementedError

    def samples(self, n, seed=0):
        """n exact and independent draws, float32 [n, dim] on the CPU. Raises ValueError where there are none."""
        if not self.exact:
            raise ValueError(f"target: {self.name} has no exact draws")
        return torch.from_numpy(self._samples(n, np.random.default_rng(seed)).astype(np.float32))

    def summary(self, x):
        """What draws x [N, dim] are compared on, [N, S], with `summary_names`: here x itself."""
        return x

    @property
    def summary_names(self):
        """Names of the S columns of `summary`."""
        return self.parameters

    def _constant(self, name, like):
        """An array of the constructor as a tensor on the device and of the type of `like`."""
        key = name, like.device, like.dtype
        if key not in self._tensors:
            with torch.inference_mode(False):  # it is kept, and the next call may want gradients through it
                self._tensors[key] = torch.as_tensor(self._arrays[name], dtype=like.dtype, device=like.device)
        return self._tensors[key]


class Mixture(Example):
    """A mixture of J Gaussians: weights [J], means [J, dim], covariances [J, dim, dim].

    `weights` and `means` are attributes too, float64 arrays.
    """

    exact = True

    def __init__(self, name, weights, means, covariances):
        weights, means, covariances = (np.asarray(value, dtype=np.float64) for value in (weights, means, covariances))
        self.name, self.dim, self.weights, self.means = name, means.shape[1], weights, means
        self._factors = np.linalg.cholesky(covariances)  # [J, dim, dim], lower
        precision_factors = np.linalg.inv(self._factors)
        log_scales = np.log(np.diagonal(self._factors, axis1=1, axis2=2)).sum(1)
        offsets = np.log(weights) - log_scales - self.dim * LOG_2_PI / 2
        # L^-1 (x - m) = L^-1 x - L^-1 m: one product with a matrix for all J at once, [dim, J dim].
        whitening = precision_factors.reshape(-1, self.dim).T
        shifts = np.einsum("jab,jb->ja", precision_factors, means)
        super().__init__(whitening=whitening, shifts=shifts, offsets=offsets)
        self.mean = weights @ means
        centred = means - self.mean
        self.covariance = np.einsum("j,jab->ab", weights, covariances) + (weights * centred.T) @ centred

    def log_density(self, x):
        """Exact log density of x [B, dim], normalised: [B]."""
        white = (x @ self._constant("whitening", x)).reshape(len(x), len(self.weights), self.dim)
        squares = (white - self._constant("shifts", x)).square().sum(2)  # [B, J]
        return torch.logsumexp(self._constant("offsets", x) - squares / 2, dim=1)

    def _samples(self, n, random):
        chosen = random.choice(len(self.weights), size=n, p=self.weights)
        noise = random.standard_normal((n, self.dim))
        draws = np.empty((n, self.dim))
        for number, (mean, factor) in enumerate(zip(self.means, self._factors)):
            here = chosen == number
            draws[here] = mean + noise[here] @ factor.T
        return draws


class Banana(Example):
    """(x1, x2 + x1^2 + 1) is Gaussian with mean 0, variances 1 and covariance 0.9 (Titsias & Ruiz 2019, table 1)."""

    name, dim, exact = "banana", 2, True
    correlation = 0.9

    def __init__(self):
        super().__init__()
        # x2 = v2 - x1^2 - 1 with v2 Gaussian: variance 1 + 2, and x1^2 has no covariance with x1 or v2.
        self.mean = np.array([0.0, -2.0])
        self.covariance = np.array([[1.0, 0.9], [0.9, 3.0]])

    def log_density(self, x):
        """Exact log density of x [B, 2], normalised: [B]."""
        first, second = x[:, 0], x[:, 1] + x[:, 0].square() + 1
        left = 1 - self.correlation**2  # variance of the second, given the first
        squares = first.square() + (second - self.correlation * first).square() / left
        return -squares / 2 - LOG_2_PI - math.log(left) / 2

    def _samples(self, n, random):
        first, noise = random.standard_normal((2, n))
        second = self.correlation * first + math.sqrt(1 - self.correlation**2) * noise
        return np.stack([first, second - first**2 - 1], axis=1)


class Funnel(Example):
    """Neal's funnel in 10 dimensions (Neal 2003): v ~ N(0, 3^2), and nine x_i ~ N(0, exp(v)).

    The tails of the x_i are so heavy that the variances of ten thousand exact draws are far from the exact ones, and
    two such sets far from each other in sliced Wasserstein. So draws are compared on asinh(x_i): see `summary`.
    """

    name, dim, exact = "funnel", 10, True

    def __init__(self):
        super().__init__()
        self.parameters = ["v", *(f"x{number}" for number in range(1, self.dim))]
        self.mean = np.zeros(self.dim)
        self.covariance = np.diag([9.0, *[math.exp(4.5)] * (self.dim - 1)])

    def log_density(self, x):
        """Exact log density of x [B, 10], normalised: [B]."""
        v, rest = x[:, 0], x[:, 1:]
        squares = v.square() / 9 + torch.exp(-v) * rest.square().sum(1)
        return -(squares + (self.dim - 1) * v + self.dim * LOG_2_PI) / 2 - math.log(3)

    def summary(self, x):
        """v and asinh of the nine x_i: x [N, 10] -> [N, 10]."""
        return torch.cat([x[:, :1], torch.asinh(x[:, 1:])], dim=1)

    @property
    def summary_names(self):
        """Names of the columns of `summary`."""
        return ["v", *(f"asinh_{name}" for name in self.parameters[1:])]

    def _samples(self, n, random):
        v = 3 * random.standard_normal((n, 1))
        return np.concatenate([v, np.exp(v / 2) * random.standard_normal((n, self.dim - 1))], axis=1)


class Logistic(Example):
    """Bayesian logistic regression on the breast cancer data of scikit-learn: 569 patients, 30 measurements.

    The measurements are standardised. The intercept and the 30 coefficients have independent priors N(0, 1).
    """

    name, dim = "logistic", 31

    def __init__(self):
        from sklearn.datasets import load_breast_cancer  # here: it takes a second, and few runs need the data

        data = load_breast_cancer()
        design = np.concatenate([np.ones((len(data.data), 1)), _standardised(data.data, data.data)], axis=1)
        signs = 2.0 * data.target[:, None] - 1
        super().__init__(design=(signs * design).T)  # [31, 569]; with the sign of the outcome in it
        self.parameters = ["intercept", *(name.replace(" ", "_") for name in map(str, data.feature_names))]

    def log_density(self, x):
        """Log density of x [B, 31] but for the evidence, a constant: [B]."""
        likelihood = torch.nn.functional.logsigmoid(x @ self._constant("design", x)).sum(1)
        return likelihood - x.square().sum(1) / 2 - self.dim * LOG_2_PI / 2


class BayesianNetwork(Example):
    """A Bayesian neural network on the diabetes data of scikit-learn: 10 measurements, and the disease a year later.

    One layer of `HIDDEN_UNITS` tanh units; 353 patients are trained on, 89 held out, by a fixed permutation. Inputs and
    outcome are standardised with the means and deviations of the training part. All 98 coordinates, weights, biases and
    the log of the noise's deviation, have independent priors N(0, 1); weights are divided by the root of the number of
    their layer's inputs.

    Permuting the units, or changing the sign of one, leaves the density as it is. So a weight by itself means little,
    and draws are compared by what they predict: see `summary`.
    """

    name = "bayesian_network"
    inputs = 10
    dim = (inputs + 2) * HIDDEN_UNITS + 2

    def __init__(self):
        from sklearn.datasets import load_diabetes  # here: it takes a second, and few runs need the data

        data, outcomes = load_diabetes(return_X_y=True, scaled=False)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(data))
        data, outcomes = data[order], outcomes[order, None]
        trained = slice(TRAINING_ROWS)
        data = _standardised(data, data[trained]) / math.sqrt(self.inputs)  # the scale of the first layer's weights
        outcomes = _standardised(outcomes, outcomes[trained])[:, 0]
        super().__init__(
            trained=data[trained].T, outcomes=outcomes[trained], held_out=data[TRAINING_ROWS:].T
        )  # [10, 353], [353], [10, 89]
        self.held_out_outcomes = outcomes[TRAINING_ROWS:]
        units = range(1, HIDDEN_UNITS + 1)
        self.parameters = [
            *(f"weight{i}_{unit}" for unit in units for i in range(1, self.inputs + 1)),
            *(f"bias_{unit}" for unit in units),
            *(f"output_weight_{unit}" for unit in units),
            "output_bias",
            "log_noise",
        ]

    def log_density(self, x):
        """Log density of x [B, 98] but for the evidence, a constant: [B]."""
        residuals = self._outputs(x, "trained") - self._constant("outcomes", x)
        log_noise = x[:, -1]
        squares = torch.exp(-2 * log_noise) * residuals.square().sum(1)
        likelihood = -squares / 2 - TRAINING_ROWS * (log_noise + LOG_2_PI / 2)
        return likelihood - x.square().sum(1) / 2 - self.dim * LOG_2_PI / 2

    def summary(self, x):
        """The network's outputs for the 89 held-out patients, and the log of the noise: x [N, 98] -> [N, 90]."""
        return torch.cat([self._outputs(x, "held_out"), x[:, -1:]], dim=1)

    @property
    def summary_names(self):
        """Names of the columns of `summary`."""
        rows = len(self.held_out_outcomes)
        return [*(f"prediction_{number}" for number in range(1, rows + 1)), "log_noise"]

    def _outputs(self, x, rows):
        """Outputs [B, R] of the networks x [B, 98] for R patients."""
        first = self.inputs * HIDDEN_UNITS
        weights, biases, output_weights, output_bias = x[:, :-1].split([first, HIDDEN_UNITS, HIDDEN_UNITS, 1], dim=1)
        hidden = weights.reshape(-1, self.inputs) @ self._constant(rows, x)  # [B HIDDEN_UNITS, R]
        hidden = torch.tanh(hidden.reshape(len(x), HIDDEN_UNITS, -1) + biases[:, :, None])
        scaled = output_weights[:, None] / math.sqrt(HIDDEN_UNITS)
        return torch.bmm(scaled, hidden)[:, 0] + output_bias


def _standardised(values, like):
    """Columns of values, minus the means and divided by the standard deviations of those of `like`."""
    return (values - like.mean(0)) / like.std(0)


def _multimodal():
    return Mixture("multimodal", [0.5, 0.5], [[-2, 0], [2, 0]], [np.eye(2)] * 2)


def _x_shape():
    return Mixture("x_shape", [0.5, 0.5], np.zeros((2, 2)), [[[2, 1.8], [1.8, 2]], [[2, -1.8], [-1.8, 2]]])


def _mixture(dim):
    """Four Gaussians of variance 1 and weights 0.4 to 0.1, about 6 apart from each other.

    The signs of their means are those of a Hadamard matrix: each two differ in about half of the coordinates.
    """
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    means = 3 / math.sqrt(dim / 2) * np.tile(signs, -(-dim // 4))[:, :dim]
    return Mixture(f"mixture_{dim}", [0.4, 0.3, 0.2, 0.1], means, [np.eye(dim)] * 4)


EXAMPLES = {
    "banana": Banana,
    "x_shape": _x_shape,
    "multimodal": _multimodal,
    "funnel": Funnel,
    "mixture_10": functools.partial(_mixture, 10),
    "mixture_50": functools.partial(_mixture, 50),
    "logistic": Logistic,
    "bayesian_network": BayesianNetwork,
}

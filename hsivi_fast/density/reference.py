"""Draws that samplers are compared with: NUTS, Gaussian fits (ADVI) and Langevin chains of a target.

NUTS and the fits are Pyro's, the extra `vi`. Langevin is our own. The draws of NUTS that ship with the package were
made by

    python -m hsivi_fast.density.reference NAME --out FILE
"""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .target import load_target

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EXACT_DRAWS, EXACT_SEED = 10_000, 0  # of `reference_for`
LANGEVIN_CHAINS = 100
WANTED_ACCEPTANCE = 0.574  # of MALA, in high dimensions (Roberts & Rosenthal 1998)
# Of a Gaussian fit: the fewest draws a step, the most steps, and Adam's first and last learning rate.
FIT_PARTICLES, FIT_STEPS, FIRST_RATE, LAST_RATE = 16, 2000, 0.05, 0.0005
MANTISSA_BITS = 10  # kept of the shipped draws: an error of 1 part in 2,000, far below that of having few draws
# How the shipped draws were made, for the targets without exact ones.
SHIPPED = {
    "logistic": {"draws": 4000, "chains": 4, "warmup": 500, "thin": 1, "seed": 0},
    "bayesian_network": {"draws": 2000, "chains": 4, "warmup": 300, "thin": 1, "seed": 0},
}


def nuts_draws(target, draws, chains=4, warmup=500, seed=0, thin=1):
    """Draws of a target by Pyro's NUTS: (float64 [draws, dim] on the CPU, diagnostics).

    chains: one after the other, each from a point of N(0, I), with `warmup` steps first and every `thin`-th draw kept;
    the draws of the first chain come first. In float64, or in float32 where the log density fails in float64.
    Diagnostics: `r_hat` (the largest split R-hat) and `effective_sample_size` (the smallest) over the columns of
    `target.summary`, both also of the coordinates as `r_hat_coordinates` and `effective_sample_size_coordinates`;
    `divergences` over all chains after the warmup; and `evaluations`, the gradient evaluations, the warmup's included.
    Raises ValueError where Pyro is not installed, or the draws are fewer than 4 a chain.
    """
    pyro = _pyro()
    from pyro.infer import MCMC, NUTS  # with Pyro, which is an extra

    per_chain = -(-draws // chains)
    if per_chain < 4:
        raise ValueError(f"target: {draws} draws of {chains} chains are too few for NUTS; use at least 4 a chain")
    dtype, before = _working_dtype(target), target.evaluations
    kept, divergences = [], 0
    with _own_randomness(pyro, target, seed):
        starts = torch.randn(chains, target.dim, dtype=dtype).to(target.device)
        for start in starts:
            kernel = NUTS(potential_fn=lambda parameters: -_counted_log_density(target, parameters["x"][None])[0])
            sampler = MCMC(
                kernel,
                num_samples=per_chain * thin,
                warmup_steps=warmup,
                initial_params={"x": start},
                disable_progbar=True,
            )
            sampler.run()
            kept.append(sampler.get_samples()["x"][thin - 1 :: thin].detach())
            divergences += sum(len(found) for found in sampler.diagnostics()["divergences"].values())
    kept = torch.stack(kept)  # [chains, per_chain, dim]
    with torch.no_grad():
        summary = torch.stack([target.summary(chain) for chain in kept])
    diagnostics = {
        **_convergence(summary.double().cpu(), ""),
        **_convergence(kept.double().cpu(), "_coordinates"),
        "divergences": divergences,
        "evaluations": target.evaluations - before,
    }
    return kept.reshape(-1, target.dim)[:draws].double().cpu(), diagnostics


def _convergence(chains, ending):
    """Largest split R-hat and smallest effective sample size over the columns of chains [C, N, S], one chain too."""
    from pyro.ops.stats import effective_sample_size, split_gelman_rubin  # with Pyro, which is an extra

    return {
        f"r_hat{ending}": float(split_gelman_rubin(chains).max()),
        f"effective_sample_size{ending}": float(effective_sample_size(chains).min()),
    }


class GaussianFit(NamedTuple):
    """A Gaussian in the unconstrained coordinates, on the CPU in float64.

    mean [dim]; covariance [dim, dim]; factor [dim, dim], lower, whose product with its transpose is the covariance;
    evaluations: the gradient evaluations that the fit took.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    factor: torch.Tensor
    evaluations: int

    def sample(self, n, seed=0):
        """n draws, float64 [n, dim]."""
        random = torch.Generator().manual_seed(seed)
        return self.mean + torch.randn(n, len(self.mean), generator=random, dtype=torch.float64) @ self.factor.T


def gaussian_fit(target, kind, evaluations, seed=0):
    """The Gaussian nearest to a target in the sense of ADVI (Kucukelbir et al. 2017), by Pyro: a `GaussianFit`.

    kind: `mean_field` (independent coordinates) or `full_rank`. It climbs the evidence lower bound from N(0, 0.1^2 I)
    by Adam, whose rate falls from `FIRST_RATE` to `LAST_RATE`, in up to `FIT_STEPS` steps: of `FIT_PARTICLES` draws
    each, or more where the gradient evaluations are enough for that. It takes no more than `evaluations` of them.
    Raises ValueError where Pyro is not installed, the kind is another, or the evaluations are not enough for a step.
    """
    pyro = _pyro()
    # With Pyro, which is an extra.
    from pyro import distributions
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
    from pyro.optim import ClippedAdam

    guides = {"mean_field": AutoNormal, "full_rank": AutoMultivariateNormal}
    if kind not in guides:
        raise ValueError(f"target: {kind!r} is no Gaussian fit; choose one of {', '.join(guides)}")
    particles = max(FIT_PARTICLES, (evaluations - 1) // FIT_STEPS)
    steps = (evaluations - 1) // particles  # one evaluation makes the guide
    if steps < 1:
        raise ValueError(f"target: {evaluations} gradient evaluations are not enough for a step of {FIT_PARTICLES}")
    dtype, before = _working_dtype(target), target.evaluations
    origin = torch.zeros(target.dim, dtype=dtype, device=target.device)

    def model():
        # A place for x that adds nothing to the density; all of it is the factor's.
        place = distributions.Normal(origin, torch.ones_like(origin)).to_event(1).mask(False)
        x = pyro.sample("x", place)
        rows = x.reshape(-1, target.dim)
        pyro.factor("log_density", _counted_log_density(target, rows).reshape(x.shape[:-1]))

    with pyro.get_param_store().scope(), _own_randomness(pyro, target, seed):
        pyro.clear_param_store()
        guide = guides[kind](model, init_loc_fn=init_to_value(values={"x": origin}), init_scale=0.1)
        decay = (LAST_RATE / FIRST_RATE) ** (1 / steps)
        optimizer = ClippedAdam({"lr": FIRST_RATE, "lrd": decay, "clip_norm": float("inf")})
        bound = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)
        inference = SVI(model, guide, optimizer, bound)
        with pyro.poutine.block():
            guide()  # makes its parameters, which takes a call of the model
        for _ in range(steps):
            inference.step()
        with torch.no_grad():
            if kind == "full_rank":
                mean = guide.loc
                factor = guide.scale[:, None] * guide.scale_tril
            else:
                mean = guide.locs.x
                factor = torch.diag(guide.scales.x)
    mean, factor = (value.detach().double().cpu() for value in (mean, factor))
    return GaussianFit(mean, factor @ factor.T, factor, target.evaluations - before)


def langevin_draws(target, n, evaluations, seed=0):
    """n draws of Langevin chains with Metropolis's correction (MALA): [n, dim], float32 on the CPU.

    `LANGEVIN_CHAINS` chains from N(0, I), or n where that is less, take a step for one gradient evaluation each; in all
    they take `evaluations` or a little less. In the first half of the steps the step size of each chain goes where it
    takes `WANTED_ACCEPTANCE` of its proposals: a common one would leave chains behind where the slopes are steeper. The
    draws are states at even distances in the second half, or in all but the first step where there are few. Raises
    ValueError where a chain would have too few steps.
    """
    chains = min(n, LANGEVIN_CHAINS)
    steps, kept = evaluations // chains - 1, -(-n // chains)  # one evaluation at the start
    if steps < kept:
        raise ValueError(f"target: {evaluations} gradient evaluations are too few for {n} draws by {chains} chains")
    first_kept = max(min(steps // 2, steps - kept), 0)  # steps before the draws
    wanted = set(np.linspace(steps, first_kept, kept, endpoint=False).round().astype(int).tolist())
    random = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(chains, target.dim, generator=random).to(target.device)

    x, draws = normal(), []
    size = torch.full((chains, 1), 0.1 / target.dim ** (1 / 3), device=target.device)
    value, score = target.value_and_score(x)
    for step in range(1, steps + 1):
        proposal = x + size * score + (2 * size).sqrt() * normal()
        new_value, new_score = target.value_and_score(proposal)
        forward = (proposal - x - size * score).square().sum(1)
        backward = (x - proposal - size * new_score).square().sum(1)
        log_ratio = new_value - value + (forward - backward) / (4 * size[:, 0])
        log_ratio = torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf)  # beyond where floats reach
        taken = torch.rand(chains, generator=random).to(target.device).log() < log_ratio
        x = torch.where(taken[:, None], proposal, x)
        score, value = torch.where(taken[:, None], new_score, score), torch.where(taken, new_value, value)
        if step <= steps // 2:  # Robbins and Monro
            size = size * torch.exp((log_ratio.clamp(max=0).exp()[:, None] - WANTED_ACCEPTANCE) / step**0.6)
        if step in wanted:
            draws.append(x.cpu())
    return torch.cat(draws)[:n].float()


def reference_for(target, n=EXACT_DRAWS, seed=EXACT_SEED):
    """What a target's samplers are compared with: [N, dim] in float64 on the CPU, or None.

    n exact draws of that seed where a shipped target has them, else all of its shipped draws of NUTS; see
    `reference_kind`.
    """
    kind = reference_kind(target)
    if kind == "exact":
        return target.example.samples(n, seed).double()
    if kind == "nuts":
        with np.load(_shipped_file(target.name), allow_pickle=False) as file:
            return torch.from_numpy(file["draws"].astype(np.float64))
    return None


def reference_kind(target):
    """`exact`, `nuts` (the shipped draws), or None where a target has no reference."""
    if target.example is None:
        return None
    if target.example.exact:
        return "exact"
    return "nuts" if _shipped_file(target.name).is_file() else None


def _shipped_file(name):
    return ASSETS / f"{name}_draws.npz"


def _counted_log_density(target, x):
    """Log density [B] of x [B, dim], whose gradient the caller takes: so it counts as an evaluation of each row."""
    target.evaluations += len(x)
    return target.log_density(x)


def _working_dtype(target):
    """torch.float64, or torch.float32 for a log density that fails in float64 (its data may be float32)."""
    try:
        target.log_density(torch.zeros(1, target.dim, dtype=torch.float64, device=target.device))
    except Exception:  # whatever a user's function raises
        return torch.float32
    return torch.float64


@contextlib.contextmanager
def _own_randomness(pyro, target, seed):
    """Within it torch's random numbers begin at a seed and Pyro validates nothing; afterwards all is as it was."""
    devices = [] if target.device.type == "cpu" else [target.device]
    with torch.random.fork_rng(devices), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        yield


def _pyro():
    try:
        import pyro  # here: it is an extra
    except ImportError:
        raise ValueError("target: NUTS needs Pyro; pip install 'hsivi_fast[vi]'") from None
    return pyro


def _rounded(draws):
    """Draws as float32 with `MANTISSA_BITS` of 23 left, the others zero: such files pack well."""
    dropped = 23 - MANTISSA_BITS
    bits = np.ascontiguousarray(draws, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + (1 << (dropped - 1))) >> dropped << dropped
    return bits.astype(np.uint32).view(np.float32)


def _main():
    parser = argparse.ArgumentParser(description="Draw from a shipped target by NUTS, as the shipped draws were made.")
    parser.add_argument("name", choices=sorted(SHIPPED))
    parser.add_argument("--out", type=Path, required=True, help="the npz file to write")
    arguments = parser.parse_args()
    draws, diagnostics = nuts_draws(load_target(arguments.name), **SHIPPED[arguments.name])
    unfinished = arguments.out.with_name(f".{arguments.out.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            np.savez_compressed(file, draws=_rounded(draws.numpy()))
        os.replace(unfinished, arguments.out)
    finally:
        unfinished.unlink(missing_ok=True)
    print(json.dumps({key: round(value, 4) for key, value in diagnostics.items()}))


if __name__ == "__main__":
    _main()

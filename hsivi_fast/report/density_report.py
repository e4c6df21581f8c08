"""The report of a run with a target: its draws beside the reference's, and the bridge layer by layer."""

import numpy as np
import torch

from ..density.examples import EXAMPLES
from ..density.reference import reference_for
from ..density.target import load_target
from ..metrics.table import table_lines
from . import figures, page
from .sections import load_sampler_to_draw

DRAWS = 20_000
MARGINALS, PAIRS = 12, 4  # parameters that are shown, each and in pairs
NOISE_SCALE = "The learned deviation exp(log_gamma) of the noise of each layer, in the coordinates of the base."


def write_density_report(folder, backend=None):
    """Draw the pictures of a run with a target into its samples/ folder and write report.html. Returns the page's path.

    folder: `RunFolder`, with a checkpoint. Nothing of the target's code is run: the reference is that of a shipped
    target, and other runs are shown alone. Raises ValueError as `load_sampler`.
    """
    sampler, context, step = load_sampler_to_draw(folder, backend)
    config, metrics, results = context.config, folder.metrics(), folder.read_json("results.json", [])
    layers = sampler.states(torch.arange(DRAWS, device=context.device))
    names, draws, reference = compared_draws(context, layers[0])
    of_both = {"HSIVI": draws} if reference is None else {"reference": reference, "HSIVI": draws}
    pictures = {
        "marginals": figures.marginals(of_both, names[:MARGINALS]),
        "pairs": figures.pair_densities(of_both, names[:PAIRS]),
        "bridge": figures.bridge_layers([context.decoder.unconstrained(u)[:, :2].cpu().numpy() for u in layers]),
    }
    sections = {
        "Marginals": page.chart(pictures["marginals"], "densities of single parameters"),
        "Pairs": page.chart(pictures["pairs"], "densities of pairs of parameters"),
        "The bridge": page.paragraph("The first two coordinates of the states x_K to x_0.")
        + page.chart(pictures["bridge"], "densities of the states, layer by layer"),
    }
    if results:
        sections["Table"] = page.html_table(table_lines(results))
    if metrics:
        pictures["losses"] = figures.loss_curves(metrics)
        sections["Training"] = page.chart(pictures["losses"], "loss curves")
    divergence = folder.read_json("fisher.json")
    if divergence:
        lines = [["layer", "Fisher divergence"], *[[str(k), f"{value:.4g}"] for k, value in enumerate(divergence, 1)]]
        sections["Fisher divergence"] = page.paragraph(
            "What the score network measures of each layer: the mean squared difference of a coordinate of the two "
            "scores, in squared scales of the density there. 0 is a perfect layer; an error of the score network "
            "counts too."
        ) + page.html_table(lines)
    gamma, log_gamma = config.gamma, sampler.log_gamma.detach().cpu().numpy()
    pictures["log_gamma"] = figures.log_gamma_picture(log_gamma, gamma.per_step, gamma.per_pixel, bottom=0)
    sections["Noise scale"] = page.paragraph(NOISE_SCALE) + page.chart(pictures["log_gamma"], "exp(log_gamma)")
    sections["Configuration"] = page.folded(
        "config.yaml, every key", page.preformatted((folder.path / "config.yaml").read_text())
    )
    for stem, png in pictures.items():
        folder.write(f"samples/{stem}.png", png)
    summary = f"{config.nfe} network evaluations a draw, none of the target; step {step}."
    folder.write("report.html", page.html_page(f"hsivi_fast: {config.name}", summary, sections))
    return folder.path / "report.html"


def compared_draws(context, u):
    """(names, draws [N, D] of the sampler, those of a reference or None), arrays."""
    settings = context.config.target
    if settings.log_density in EXAMPLES:
        target = load_target(settings.log_density)
        known = reference_for(target, DRAWS)
        draws = target.summary(context.decoder.unconstrained(u).cpu())
        reference = None if known is None else target.summary(known.float()).numpy()
        return target.summary_names, draws.numpy(), reference
    draws = context.decoder(u).cpu().numpy()
    return parameter_names(settings, draws.shape[1]), draws, None


def parameter_names(settings, count):
    """The names of a target's parameters, without its code: settings, a run's `target`; count, how many there are."""
    if settings.log_density in EXAMPLES:
        return list(EXAMPLES[settings.log_density]().parameters)
    return list(settings.parameters or (f"x{number}" for number in np.arange(1, count + 1)))

"""The files that a run needs of others: all are there, or are fetched, before anything is computed."""

import sys

from ..checkpoints.autoencoder import check_vae
from ..checkpoints.download import locate_reference
from ..checkpoints.weights import locate_teacher
from ..data import MissingFile, fetch_cifar10, has_data, regular_file
from ..nets import all_arguments
from .features import fetch_inception, network_of


def fetch_needed(config, teacher, measured):
    """Fetch what a run needs and this machine has not: teacher, reference, Inception's weights, CIFAR-10.

    teacher: whether it is needed; measured: whether samples will be.
    Raises ValueError, in one line, which names all files that are missing, where they are to be had, and where they
    belong.
    """
    problems = []
    for fetch in _needs(config, teacher, measured):
        try:
            fetch()
        except ValueError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ValueError(f"{len(problems)} files are missing or not right; {_told(problems)}")


def _needs(config, teacher, measured):
    """Functions without arguments, each of which fetches a file or raises ValueError."""
    settings, named, progress = config.eval, config.eval.reference, sys.stderr.isatty()
    if config.teacher.target is not None or config.target is not None:
        return
    if config.teacher.vae is not None:
        yield lambda: check_vae(config.teacher.vae, all_arguments(config.network).get("image_channels"))
    if teacher:
        yield lambda: locate_teacher(config, progress)
    if not measured:
        return
    if named is not None:
        yield lambda: regular_file(locate_reference(named, progress), f"reference {named!r}")
    looks_at_data = named is None or settings.kid or settings.prc
    if config.data == "cifar10" and config.data_path is None and looks_at_data:
        yield fetch_cifar10
    # Where there is nothing to measure against, that is told, and nothing is downloaded in vain.
    if network_of(config) == "inception" and (named is not None or has_data(config)):
        yield lambda: fetch_inception(settings.inception)


def _told(problems):
    """Problems in words: first what can be put into its folder by hand, folder by folder, then all others."""
    folders, parts = {}, []
    for problem in problems:
        if isinstance(problem, MissingFile):
            folders.setdefault(problem.file.parent, []).append(problem)
    if folders:
        placed = [f"{' and '.join(map(_wanted, missing))} into {folder}" for folder, missing in folders.items()]
        reasons = dict.fromkeys(problem.reason for missing in folders.values() for problem in missing)
        parts.append(f"no download was possible ({', '.join(reasons)}), so put {', and '.join(placed)} by hand")
    return "; ".join(parts + [str(problem) for problem in problems if not isinstance(problem, MissingFile)])


def _wanted(problem):
    """An address, and under which name its file is looked for where that is another one."""
    same = problem.address.rpartition("/")[2] == problem.file.name
    return problem.address if same else f"{problem.address} as {problem.file.name}"

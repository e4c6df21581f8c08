"""One page about several runs: what differs between them, their samples on the same seeds, their distances."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..checkpoints.files import as_written, make_folder, write_atomically
from ..checkpoints.run_folder import RunFolder
from ..config import Config, phases_of, resolved_dict, without_password, without_passwords
from ..metrics.table import table_lines
from ..sampling.sampler import ddim_sampler
from . import figures, page
from .density_report import MARGINALS, PAIRS, compared_draws
from .sections import (
    NOISE_SCALE,
    PLANE_POINTS,
    ddim_title,
    draw_samples,
    gpu_section,
    load_sampler_to_draw,
    noise_scale_picture,
    teacher_evaluations,
    teacher_title,
)

SUMMARY = (
    "run",
    "data",
    "NFE",
    "steps",
    "batch",
    "precision",
    "rollout",
    "processes",
    "device",
    "training images/s",
    "best distance",
    "final distance",
    "seconds",
)
PROGRESS = {"images": "training images seen by the score network", "seconds": "seconds of training"}
SPEEDS = {"nfe": "network evaluations", "images_per_second": "samples per second"}


@dataclass(frozen=True)
class _Run:
    """What the page needs of one run; label: its name on the page; color: its own in every picture.

    results: the rows of results.json; metrics: the records of metrics.jsonl, with the images seen until then.
    """

    label: str
    color: str
    folder: RunFolder
    config: Config
    results: list
    metrics: list


def compare_runs(folders, outfile, backend=None):
    """Write one self-contained page about several runs to `outfile`; returns its path.

    folders: paths of runs or `RunFolder`s; backend: as of `load_sampler`. Distances are drawn together where they were
    measured against the same data. Runs without a checkpoint or a table have less on the page, and what keeps a run
    from being drawn is said there.
    Raises ValueError for no run, a folder that holds none, or one that is given twice.
    """
    if not folders:
        raise ValueError("runs: none given; name at least one run's folder")
    runs = _read([RunFolder.of(folder) for folder in folders])
    by_data = _grouped(runs, _data_key)

    sections = {"Runs": page.html_table([SUMMARY, *(_summary(run) for run in runs)])}
    if len(runs) > 1:
        sections["What differs"] = _differences(runs)
    sections["Samples"] = "".join(_samples(group, backend) for group in _grouped(runs, _teacher_key))
    sections["Distance against network evaluations"] = _distances(by_data, "nfe")
    sections["Distance against the sampler's speed"] = _distances(by_data, "images_per_second")
    sections["Distance during training"] = _progress(by_data)
    sections["Losses"] = _losses(runs)
    sections["Noise scale"] = page.paragraph(NOISE_SCALE) + "".join(_noise_scale(run) for run in runs)
    sections["GPU"] = gpu_section({run.label: run.metrics for run in runs}, _colors(runs))
    sections["Tables"] = "".join(_table(run) for run in runs)
    sections["Configurations"] = "".join(_configuration(run) for run in runs)

    labels = [run.label for run in runs]
    title = f"{len(runs)} runs" if len(runs) > 1 else labels[0]
    outfile = as_written(outfile)
    make_folder(outfile.parent)
    write_atomically(outfile, page.html_page(f"hsivi_fast: {title}", ", ".join(labels), sections, contents=True))
    return outfile


# ---- the runs --------------------------------------------------------------------------------------------------------


def _read(folders):
    """A `_Run` of each folder."""
    runs = []
    for number, (label, folder) in enumerate(_labelled(folders).items()):
        config = folder.config()
        metrics = [{**record, "images": record["step"] * config.train.batch_size} for record in folder.metrics()]
        runs.append(_Run(label, f"C{number % 10}", folder, config, folder.read_json("results.json", []), metrics))
    return runs


def _labelled(folders):
    """{label: folder}: runs by their shortest names that tell them apart.

    These are the configurations', else the folders', else the paths.
    """
    paths = [str(folder.path.resolve()) for folder in folders]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise ValueError(f"run {twice!r}: is given twice")
    choices = ([folder.config().name for folder in folders], [Path(path).name for path in paths], paths)
    names = next(names for names in choices if len(set(names)) == len(names))
    return dict(zip(names, folders))


def _grouped(runs, key):
    """Lists of runs whose configurations have the same key."""
    groups = {}
    for run in runs:
        groups.setdefault(key(run.config), []).append(run)
    return list(groups.values())


def _data_key(config):
    """What a run's distances are measured by and against: only equal ones compare."""
    target = config.target and config.target.log_density
    return target or config.teacher.target or config.data, config.data_path, config.eval.metric, config.eval.reference


def _teacher_key(config):
    """What its teacher's samplers depend on."""
    return repr((config.target, config.teacher, config.network, config.spacing))


def _data_title(config):
    if config.target is not None:
        return config.target.log_density
    return config.teacher.target or config.data or "no data"


def _colors(runs):
    return {run.label: run.color for run in runs}


def _names(runs):
    return ", ".join(run.label for run in runs)


# ---- tables ----------------------------------------------------------------------------------------------------------


def _summary(run):
    """The cells of a run under the headings `SUMMARY`."""
    config, environment = run.config, run.folder.read_json("environment.json", {})
    step = max([record["step"] for record in run.metrics] + run.folder.checkpoints(), default=0)
    measured = _recorded(run, "metric")
    students = [row for row in run.results if row["sampler"] == "hsivi_ema"]
    final = [row[figures.distance_column(row)] for row in students] or measured[-1:]
    rates = [rate for rate in _recorded(run, "images_per_second") if rate]
    seconds = _recorded(run, "seconds")
    return [
        run.label,
        _data_title(config),
        config.nfe,
        step if step == phases_of(config).total else f"{step} of {phases_of(config).total}",
        config.train.batch_size,
        config.precision,
        _rollout_title(config.rollout),
        environment.get("world_size", "-"),
        environment.get("device_name") or environment.get("device", "-"),
        f"{statistics.median(rates):.0f}" if rates else "-",
        f"{min(measured + final):.4g}" if measured + final else "-",
        f"{min(final):.4g}" if final else "-",
        f"{max(seconds):.0f}" if seconds else "-",
    ]


def _recorded(run, key):
    """The values of a key in the records of a run's training."""
    return [record[key] for record in run.metrics if record.get(key) is not None]


def _rollout_title(rollout):
    return f"{rollout.mode}, {rollout.redraw} draws" if rollout.redraw > 1 else rollout.mode


def _differences(runs):
    """The table of the keys in which configurations differ."""
    values = {run.label: _flat(without_passwords(resolved_dict(run.config))) for run in runs}
    keys = dict.fromkeys(key for of_run in values.values() for key in of_run)
    lines = []
    for key in keys:
        of_runs = [of_run.get(key) for of_run in values.values()]
        if len({repr(value) for value in of_runs}) > 1:
            lines.append([key, *map(_as_yaml, of_runs)])
    if not lines:
        return page.paragraph("The configurations are the same.")
    return page.html_table([["key", *values], *lines])


def _flat(values, prefix=""):
    """{"a.b": value} of nested dicts {"a": {"b": value}}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _as_yaml(value):
    """A value in one line, as a configuration has it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _table(run):
    content = page.html_table(table_lines(run.results)) if run.results else page.paragraph("not measured yet")
    return page.subheading(run.label) + content


def _configuration(run):
    return page.folded(run.label, page.preformatted(without_password((run.folder.path / "config.yaml").read_text())))


# ---- samples ---------------------------------------------------------------------------------------------------------


def _samples(runs, backend):
    """Samples of runs of one teacher, ordered by evaluations, its DDIM beside them: the same seeds for all."""
    if runs[0].config.target is not None:
        return _draws(runs, backend)
    content, context, students = "", None, {}  # students: {evaluations: {title: samples}}
    for run in sorted(runs, key=lambda run: run.config.nfe):
        try:
            student, context_of_run, step = load_sampler_to_draw(run.folder, backend)
            context = context or context_of_run.with_teacher()
        except ValueError as error:  # no checkpoint yet, a device that this machine lacks: other runs can be drawn
            content += page.paragraph(str(error))
            continue
        title = f"{run.label}, step {step}, {student.nfe} evaluations"
        students.setdefault(student.nfe, {})[title] = draw_samples(context_of_run, student)
    if not students:
        return content
    most = teacher_evaluations([run.config for run in runs])
    best = {teacher_title(most): _draw_ddim(context, most)}
    by_nfe = {nfe: {ddim_title(nfe): _draw_ddim(context, nfe), **samples} for nfe, samples in students.items()}
    show = _points if context.config.teacher.target is not None else _images
    return content + show(context, best, by_nfe)


def _draws(runs, backend):
    """The draws of runs on one target, ordered by evaluations, beside a reference where the target has one."""
    content, shown = "", {}
    for run in sorted(runs, key=lambda run: run.config.nfe):
        try:
            student, context, step = load_sampler_to_draw(run.folder, backend)
        except ValueError as error:
            content += page.paragraph(str(error))
            continue
        names, draws, reference = compared_draws(context, draw_samples(context, student))
        if reference is not None:
            shown.setdefault("reference", reference)
        shown[f"{run.label}, step {step}, {student.nfe} evaluations"] = draws
    if not shown:
        return content
    chart = page.chart(figures.marginals(shown, names[:MARGINALS]), "densities of single parameters")
    chart += page.chart(figures.pair_densities(shown, names[:PAIRS]), "densities of pairs of parameters")
    return content + page.subheading(_data_title(runs[0].config)) + chart


def _draw_ddim(context, nfe):
    return draw_samples(context, ddim_sampler(context, nfe, 0.0))


def _points(context, best, by_nfe):
    """All densities in one picture: the target's, the teacher's {title: points}, and those of each evaluations."""
    points = {"target": context.teacher.samples(PLANE_POINTS), **best}
    for samples in by_nfe.values():
        points.update(samples)
    chart = page.chart(figures.densities(points), "density of " + "; ".join(points))
    return page.subheading(_data_title(context.config)) + chart


def _images(context, best, by_nfe):
    """A gallery for each number of evaluations, {title: images}, and the teacher's at the end."""
    galleries = {f"{nfe} evaluations": samples for nfe, samples in by_nfe.items()}
    galleries["the teacher"] = best
    content = ""
    for heading, samples in galleries.items():
        content += page.subheading(f"{_data_title(context.config)}, {heading}")
        content += page.gallery({title: figures.image_grid(images) for title, images in samples.items()})
    return content


def _noise_scale(run):
    """The noise scale of a run's newest checkpoint."""
    return page.subheading(run.label) + _noise_scale_chart(run)


def _noise_scale_chart(run):
    steps = run.folder.checkpoints()
    if not steps:
        return page.paragraph("no checkpoint yet")
    try:
        log_gamma = run.folder.load_tensors(steps[-1], "student_ema")["log_scaled_gamma"]
    except ValueError as error:  # a damaged file: said in a line
        return page.paragraph(str(error))
    shape = " x ".join(map(str, log_gamma.shape))
    return page.chart(noise_scale_picture(run.config, log_gamma), f"exp(log_gamma), {shape}")


# ---- curves ----------------------------------------------------------------------------------------------------------


def _distances(by_data, key):
    """A picture for each group of runs that were measured against the same data; key: of `SPEEDS`."""
    measured = [[run for run in runs if run.results] for runs in by_data]
    content = "".join(_distance_chart(runs, key) for runs in measured if runs)
    return content or page.paragraph("No run has a table yet; `hsivi train` measures one at a run's end.")


def _distance_chart(runs, key):
    """Runs measured against the same data and every sampler of their teachers, in one picture."""
    series = _teacher_rows(runs)
    for run in runs:
        rows = [row for row in run.results if figures.is_of_student(row)]
        if rows:
            series[run.label] = rows
    counts = sorted({row["num_samples"] for rows in series.values() for row in rows})
    measured = f"Measured on {', '.join(map(str, counts))} samples"
    if len(counts) > 1:
        measured += ": distances from different numbers of samples do not compare."
    else:
        measured += " for each seed set."
    chart = page.chart(
        figures.distance_curves(series, key, _colors(runs)), f"distance against {SPEEDS[key]} of {_names(runs)}"
    )
    return page.subheading(_data_title(runs[0].config)) + page.paragraph(measured) + chart


def _teacher_rows(runs):
    """{label: rows of results.json} of the teachers of runs; where there is one only, its label is "".

    Several runs have measured the same teacher: the rows of the first of them stand for all.
    """
    groups = _grouped(runs, _teacher_key)
    series = {}
    for group in groups:
        rows = {}
        for run in reversed(group):
            others = [row for row in run.results if not figures.is_of_student(row) and row["nfe"] > 0]
            rows |= {(row["sampler"], row["nfe"]): row for row in others}  # what evaluates no network has no place
        if rows:
            series["" if len(groups) == 1 else f"teacher of {_names(group)}"] = list(rows.values())
    return series


def _progress(by_data):
    """Distances during training, for each group of runs that were measured against the same data."""
    measured = [[run for run in runs if _recorded(run, "metric")] for runs in by_data]
    content = "".join(_progress_charts(runs) for runs in measured if runs)
    return content or page.paragraph("No run was measured while it trained (eval.every).")


def _progress_charts(runs):
    """The distance against images seen and against time."""
    content = page.subheading(_data_title(runs[0].config))
    records = {run.label: run.metrics for run in runs}
    for key, title in PROGRESS.items():
        picture = figures.curves(records, [("distance", "metric")], key, title, _colors(runs))
        content += page.chart(picture, f"distance against {title} of {_names(runs)}")
    return content


def _losses(runs):
    records = {run.label: run.metrics for run in runs if run.metrics}
    if not records:
        return page.paragraph("No run has records yet.")
    picture = figures.curves(records, figures.LOSSES, colors=_colors(runs))
    return page.chart(picture, "losses of all runs against steps")

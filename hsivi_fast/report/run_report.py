"""Reports: `write_report` draws one run's pictures and its page, `compare_runs` puts several runs on one page."""

import statistics
from pathlib import Path

from tqdm import tqdm

from ..checkpoints.files import as_written
from ..checkpoints.run_folder import RunFolder
from ..config import resolved_dict
from ..data import to_uint8
from ..metrics.table import table_lines
from ..metrics.features import network_of
from ..parallel.world import ALONE
from ..sampling.sampler import ddim_sampler, load_sampler
from . import figures, page
from .figures import GRID, image_grid

PLANE_POINTS = 20000
LOSSES = [("score network's loss", "loss_score_net"), ("student's loss", "loss_student")]
GPU = [("power (W)", "gpu_power_watts"), ("utilisation (%)", "gpu_utilisation_percent")]
SCALE = "The learned factor exp(log_gamma) on the noise of each layer, in the averaged student: 1 is where training starts, below it a layer adds less noise than DDIM with the run's eta."


def write_report(folder, teacher=None, backend=None, beside_teacher=True, progress=False):
    """Draw a run's pictures into its samples/ folder and write report.html. Returns the page's path.

    beside_teacher: draw the teacher's samples beside the run's, which takes many more evaluations.
    progress: show a bar on stderr where drawing takes more than 5 seconds.
    backend: as of `load_sampler`. The run needs a checkpoint; the table and its picture are left out where it was not measured.
    """
    config = folder.config()
    student, context, step = load_sampler(folder, ALONE, changes=_eagerly(backend))
    context = context.with_teacher(teacher)
    teacher = context.teacher
    results, metrics = folder.read_json("results.json", []), folder.metrics()
    teacher_nfe = max(
        config.eval.ddim_nfe
    )  # what "teacher" means beside a few-step sampler: DDIM with the most evaluations of the table
    samplers = {}
    if beside_teacher:
        samplers[_ddim_title(teacher_nfe, "teacher")] = ddim_sampler(context, teacher_nfe, 0.0)
        samplers[_ddim_title(config.nfe)] = ddim_sampler(context, config.nfe, 0.0)
    samplers[f"HSIVI, {config.nfe} evaluations"] = student
    sections, pictures = {}, {}
    samples = _all_drawn(samplers, progress)
    if config.teacher.target is not None:
        pictures["density"] = figures.densities({"target": teacher.samples(PLANE_POINTS), **samples})
        sections["Samples"] = page.paragraph("The same seeds for every sampler.") + page.chart(
            pictures["density"], "density of the target and of each sampler"
        )
    else:
        grids = {title: image_grid(images) for title, images in samples.items()}
        names = ("teacher", "ddim", "hsivi") if beside_teacher else ("hsivi",)
        pictures.update(zip(names, grids.values()))
        if beside_teacher:
            pictures["comparison"] = figures.comparison(samples)
        sections["Samples"] = page.paragraph("The same seeds for every sampler.") + page.gallery(grids)
    if results:
        pictures["distance_vs_nfe"] = figures.distance_against_nfe(results)
        if config.teacher.target is None and network_of(config) == "inception":
            pictures["fid_vs_nfe"] = pictures["distance_vs_nfe"]
        sections["Table"] = page.table(table_lines(results))
        sections["Distance against network evaluations"] = page.chart(
            pictures["distance_vs_nfe"], "distance against network evaluations"
        )
    if metrics:
        pictures["losses"] = figures.loss_curves(metrics)
        sections["Training"] = page.chart(pictures["losses"], "loss curves")
    pictures["log_gamma"] = _noise_scale(config, student.log_gamma)
    sections["Noise scale"] = page.paragraph(SCALE) + page.chart(pictures["log_gamma"], "exp(log_gamma)")
    sections["GPU"] = _gpu_section({config.name: metrics})
    sections["Configuration"] = page.preformatted((folder.path / "config.yaml").read_text())
    for stem, png in pictures.items():
        folder.write(f"samples/{stem}.png", png)
    summary = f"{config.nfe} network evaluations per sample; {step} updates of the score network, {step // config.train.f_learning_times} of the student."
    folder.write("report.html", page.html_page(f"hsivi_fast: {config.name}", summary, sections))
    return folder.path / "report.html"


def compare_runs(folders, outfile, backend=None):
    """Write one self-contained page about several runs to `outfile`; returns its path.

    folders: paths of runs or `RunFolder`s; backend: as of `load_sampler`. Distances are drawn together where they were measured against the same data; runs
    without a checkpoint or a table have less on the page, and what keeps a run from being drawn is said there.
    Raises ValueError for no run, a folder that holds none, or one that is given twice.
    """
    if not folders:
        raise ValueError("runs: none given; name at least one run's folder")
    runs = _labelled([folder if isinstance(folder, RunFolder) else RunFolder(folder) for folder in folders])
    configs = {label: folder.config() for label, folder in runs.items()}
    results = {label: folder.read_json("results.json", []) for label, folder in runs.items()}
    metrics = {
        label: [{**record, "images": record["step"] * configs[label].train.batch_size} for record in folder.metrics()]
        for label, folder in runs.items()
    }
    colors = {label: f"C{number % 10}" for number, label in enumerate(runs)}

    sections = {"Runs": page.table(_summary_lines(runs, configs, results, metrics))}
    if len(runs) > 1:
        sections["What differs"] = _differences(configs)
    sections["Samples"] = "".join(
        _samples_section(members, runs, configs, backend) for members in _grouped(configs, _teacher_key)
    )
    groups = _grouped(configs, _data_key)
    drawn = {"Distance against network evaluations": "nfe", "Distance against the sampler's speed": "images_per_second"}
    for heading, key in drawn.items():
        parts = [_distance_section(members, configs, results, key, colors) for members in groups]
        sections[heading] = "".join(parts) or page.paragraph(
            "No run has a table yet; `hsivi train` measures one at a run's end."
        )
    sections["Distance during training"] = "".join(
        _progress_section(members, configs, metrics, colors) for members in groups
    ) or page.paragraph("No run was measured while it trained (eval.every).")
    recorded = {label: records for label, records in metrics.items() if records}
    sections["Losses"] = (
        page.chart(figures.curves(recorded, LOSSES, colors=colors), "losses of all runs against steps")
        if recorded
        else page.paragraph("No run has records yet.")
    )
    sections["Noise scale"] = page.paragraph(SCALE) + "".join(
        page.subheading(label) + _saved_noise_scale(folder, configs[label]) for label, folder in runs.items()
    )
    sections["GPU"] = _gpu_section(metrics, colors)
    sections["Tables"] = "".join(
        page.subheading(label) + (page.table(table_lines(rows)) if rows else page.paragraph("not measured yet"))
        for label, rows in results.items()
    )
    sections["Configurations"] = "".join(
        page.folded(label, page.preformatted((folder.path / "config.yaml").read_text()))
        for label, folder in runs.items()
    )
    outfile = as_written(outfile)
    outfile.parent.mkdir(parents=True, exist_ok=True)
    outfile.write_bytes(
        page.html_page(
            f"hsivi_fast: {len(runs)} runs" if len(runs) > 1 else f"hsivi_fast: {next(iter(runs))}",
            ", ".join(runs),
            sections,
            contents=True,
        )
    )
    return outfile


def _labelled(folders):
    """{label: folder}: runs by their shortest names that tell them apart: the configuration's, the folder's, the path."""
    paths = [str(folder.path.resolve()) for folder in folders]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise ValueError(f"run {twice!r}: is given twice")
    choices = ([folder.config().name for folder in folders], [Path(path).name for path in paths], paths)
    names = next(names for names in choices if len(set(names)) == len(names))
    return dict(zip(names, folders))


def _grouped(configs, key):
    """Lists of labels whose configurations have the same key."""
    groups = {}
    for label, config in configs.items():
        groups.setdefault(key(config), []).append(label)
    return list(groups.values())


def _data_key(config):
    """What a run's distances are measured by and against: only equal ones compare."""
    return config.teacher.target or config.data, config.data_path, config.eval.metric, config.eval.reference


def _teacher_key(config):
    """What its teacher's samplers depend on."""
    return repr((config.teacher, config.network, config.spacing))


def _data_title(config):
    return config.teacher.target or config.data or "no data"


# Sections


def _summary_lines(runs, configs, results, metrics):
    lines = [
        [
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
        ]
    ]
    for label, folder in runs.items():
        config, environment, records = configs[label], folder.read_json("environment.json", {}), metrics[label]
        step = max([record["step"] for record in records] + folder.checkpoints(), default=0)
        rates = [record["images_per_second"] for record in records if record.get("images_per_second")]
        measured = [record["metric"] for record in records if record.get("metric") is not None]
        final = [
            value
            for row in results[label]
            if row["sampler"] == "hsivi_ema"
            for value in [row.get("frechet_distance", row.get("js_divergence"))]
        ] or measured[-1:]
        seconds = [record["seconds"] for record in records if "seconds" in record]
        rollout = config.rollout.mode + (f", {config.rollout.redraw} draws" if config.rollout.redraw > 1 else "")
        lines.append(
            [
                label,
                _data_title(config),
                config.nfe,
                step if step == config.train.steps else f"{step} of {config.train.steps}",
                config.train.batch_size,
                config.precision,
                rollout,
                environment.get("world_size", "-"),
                environment.get("device_name") or environment.get("device", "-"),
                f"{statistics.median(rates):.0f}" if rates else "-",
                *(f"{min(values):.4g}" if values else "-" for values in (measured + final, final)),
                f"{max(seconds):.0f}" if seconds else "-",
            ]
        )
    return lines


def _differences(configs):
    """The table of the keys in which configurations differ."""
    import yaml

    flat = {label: _flat(resolved_dict(config)) for label, config in configs.items()}
    different = [
        key
        for key in dict.fromkeys(key for values in flat.values() for key in values)
        if len({repr(values.get(key)) for values in flat.values()}) > 1
    ]
    if not different:
        return page.paragraph("The configurations are the same.")
    shown = lambda value: (
        yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    )
    return page.table(
        [["key", *flat], *([key, *(shown(values.get(key)) for values in flat.values())] for key in different)]
    )


def _flat(values, prefix=""):
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _samples_section(members, runs, configs, backend):
    """Samples of runs of one teacher, ordered by evaluations, its DDIM beside them: the same seeds for all."""
    config = configs[members[0]]
    plane, problems, students, context = config.teacher.target is not None, [], {}, None
    for label in sorted(members, key=lambda label: configs[label].nfe):
        try:
            student, own, step = load_sampler(runs[label], ALONE, changes=_eagerly(backend))
            context = context or own.with_teacher()
        except ValueError as error:  # no checkpoint yet, a device that this machine lacks: the other runs can be drawn
            problems.append(page.paragraph(str(error)))
            continue
        students.setdefault(student.nfe, {})[f"{label}, step {step}, {student.nfe} evaluations"] = _drawn(student)
    content = "".join(problems)
    if not students:
        return content
    groups = {
        f"{nfe} evaluations": {_ddim_title(nfe): _drawn(ddim_sampler(context, nfe, 0.0)), **samples}
        for nfe, samples in students.items()
    }
    most = max(nfe for label in members for nfe in configs[label].eval.ddim_nfe)
    best = {_ddim_title(most, "teacher"): _drawn(ddim_sampler(context, most, 0.0))}
    if plane:
        groups, best = (
            {
                "": {"target": context.teacher.samples(PLANE_POINTS)}
                | {title: points for samples in [best, *groups.values()] for title, points in samples.items()}
            },
            {},
        )
    name = _data_title(config)
    for heading, samples in {**groups, "the teacher": best}.items():
        if samples:
            content += page.subheading(f"{name}, {heading}" if heading else name)
            content += (
                page.chart(figures.densities(samples), "density of " + "; ".join(samples))
                if plane
                else page.gallery({title: image_grid(images) for title, images in samples.items()})
            )
    return content


def _distance_section(members, configs, results, key, colors):
    """Runs measured against the same data and every sampler of their teachers, in one picture; "" where none has a table."""
    members = [label for label in members if results[label]]
    if not members:
        return ""
    teachers = _grouped({label: configs[label] for label in members}, _teacher_key)
    series = {}
    for own in teachers:  # of one teacher: several runs have measured it, and the first one's rows stand for all
        rows = {
            (row["sampler"], row["nfe"]): row
            for label in reversed(own)
            for row in results[label]
            if row["sampler"] not in figures.STUDENTS
        }
        if rows:
            series["" if len(teachers) == 1 else f"teacher of {', '.join(own)}"] = list(rows.values())
    series.update(
        {
            label: rows
            for label in members
            if (rows := [row for row in results[label] if row["sampler"] in figures.STUDENTS])
        }
    )
    counts = sorted({row["num_samples"] for rows in series.values() for row in rows})
    warning = (
        f"Measured on {', '.join(map(str, counts))} samples: distances from different numbers of samples do not compare."
        if len(counts) > 1
        else f"Measured on {counts[0]} samples for each seed set."
    )
    against = {"nfe": "network evaluations", "images_per_second": "samples per second"}[key]
    return (
        page.subheading(_data_title(configs[members[0]]))
        + page.paragraph(warning)
        + page.chart(figures.distances(series, key, colors), f"distance against {against} of {', '.join(members)}")
    )


def _progress_section(members, configs, metrics, colors):
    """The distance against images seen and against time, of runs measured against the same data; "" where none was."""
    measured = {
        label: metrics[label] for label in members if any(record.get("metric") is not None for record in metrics[label])
    }
    if not measured:
        return ""
    content = page.subheading(_data_title(configs[members[0]]))
    for key, title in (("images", "training images seen by the score network"), ("seconds", "seconds of training")):
        content += page.chart(
            figures.curves(measured, [("distance", "metric")], key, title, colors),
            f"distance against {title} of {', '.join(measured)}",
        )
    return content


def _gpu_section(metrics, colors={}):
    """Power and utilisation over the steps of {label: records}."""
    measured = {
        label: [record for record in records if "gpu_power_watts" in record or "gpu_utilisation_percent" in record]
        for label, records in metrics.items()
    }
    measured = {label: records for label, records in measured.items() if records}
    if not measured:
        return page.paragraph("no GPU: there are no records of one")
    content = page.chart(
        figures.curves(measured, GPU, colors=colors),
        f"power and utilisation of the GPU of rank 0 in {', '.join(measured)}",
    )
    for label, records in measured.items():
        memory, energy = (
            [record[key] for record in records if key in record] for key in ("gpu_memory_bytes", "joules_per_image")
        )
        said = [f"{max(memory) / 1e9:.1f} GB of memory"] if memory else []
        said += [f"{statistics.median(energy):.3g} J per training image (median)"] if energy else []
        content += page.paragraph(f"{label}: {', '.join(said)}") if said else ""
    return content


def _saved_noise_scale(folder, config):
    """The noise scale of a run's newest checkpoint."""
    steps = folder.checkpoints()
    if not steps:
        return page.paragraph("no checkpoint yet")
    try:
        log_gamma = folder.load_tensors(steps[-1], "student_ema")["log_scaled_gamma"]
    except ValueError as error:  # a damaged file: said in a line
        return page.paragraph(str(error))
    return page.chart(_noise_scale(config, log_gamma), "exp(log_gamma), " + " x ".join(map(str, log_gamma.shape)))


def _noise_scale(config, log_gamma):
    return figures.log_gamma_picture(log_gamma.detach().cpu().numpy(), config.gamma.per_step, config.gamma.per_pixel)


def _eagerly(backend):
    """Changes of a run's keys for a few pictures: eager calls are done before a compiler is."""
    return {"backend": backend, "compile": False, "cuda_graphs": False}


def _ddim_title(nfe, name="DDIM"):
    return f"{name} (DDIM, {nfe} evaluations)" if name != "DDIM" else f"DDIM, {nfe} evaluations"


def _all_drawn(samplers, progress):
    """{title: what is shown of a sampler}, with a bar where it takes more than 5 seconds."""
    samples, shown = {}, {"desc": "report", "unit": "evaluation", "unit_scale": True, "dynamic_ncols": True}
    plane = any(len(sampler.network.event_shape) == 1 for sampler in samplers.values())
    total = sum(sampler.nfe for sampler in samplers.values()) * (PLANE_POINTS if plane else GRID**2)
    with tqdm(total=total, disable=not progress, delay=5, leave=False, **shown) as bar:
        for title, sampler in samplers.items():
            samples[title] = _drawn(sampler, lambda images, sampler=sampler: bar.update(images * sampler.nfe))
    return samples


def _drawn(sampler, on_batch=None):
    """What is shown of a sampler, on the CPU: uint8 images [64, C, H, W] as an array, or points [N, 2]."""
    if len(sampler.network.event_shape) == 1:
        return sampler(range(PLANE_POINTS), PLANE_POINTS, on_batch).cpu()
    return to_uint8(sampler(range(GRID**2), GRID**2 // 4, on_batch)).cpu().numpy()

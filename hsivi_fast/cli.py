"""The command `hsivi`.

Imports of ours stay inside the commands: torch alone takes more than a second, and --help and a misspelt key are to be
answered at once.
"""

import contextlib
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path

import click

from .parallel.interrupt import Interrupted
from .parallel.out_of_memory import is_out_of_memory
from .parallel.seeds import Cycled, Seeds

MOST_SEEDS = 1_000_000_000
MOST_LABELS = 1_000_000
RANK_0_SPEAKS = 3.0  # seconds that the other ranks wait before they leave with an error
LONGEST_MESSAGE = 900  # characters of an error
LOGGED_BAR = 10  # seconds between two states of a bar that goes into a file
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
LEGEND = """\
start: the student before training, which is DDIM with the run's eta. EMA: averaged weights, the ones to use; raw: as
the optimizer left them. "distinct": the spacing repeats timesteps, and the doubles are left out. +- is the standard
deviation over seed sets."""


class Command(click.Command):
    """A command whose help keeps the line breaks of its example."""

    def format_epilog(self, context, formatter):
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"Example:\n  {self.epilog}\n")


def sampler_options(command):
    """The options of a command that samples: which weights, and what goes in the place of the run's keys."""
    options = [
        click.option(
            "--weights",
            type=click.Choice(["ema", "raw"]),
            default="ema",
            show_default=True,
            help="Averaged weights, or as the optimizer left them.",
        ),
        backend_option,
        click.option(
            "--compile/--no-compile",
            default=None,
            help="Compile the network (pays for many batches), or not; as the run by default.",
        ),
        click.option(
            "--cuda-graphs/--no-cuda-graphs",
            default=None,
            help="All layers as one CUDA graph, or not; as the run by default.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def backend_option(command):
    """The option --backend."""
    return click.option("--backend", type=click.Choice(["auto", "torch", "triton"]), help="In the place of the run's.")(
        command
    )


def config_arguments(command):
    """The arguments CONFIG [KEY=VALUE]..."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.argument("config")(command)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="hsivi_fast")
def hsivi():
    """Few-step samplers from diffusion models: HSIVI-SM, made fast."""


@hsivi.command(
    cls=Command,
    short_help="Distil a teacher into a few-step sampler.",
    epilog="hsivi train digits --outdir runs/a train.steps=400",
)
@config_arguments
@click.option("--outdir", help="The run's folder; runs/CONFIG by default. A run that is there is continued.")
@click.option(
    "--fresh",
    is_flag=True,
    help="Refuse to go on with a run that is there. To start anew, give another --outdir; nothing is ever overwritten.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the resolved config, and what memory and work it needs; train nothing."
)
@click.option(
    "--processes",
    type=click.IntRange(1, 1_000_000),
    help="With --dry-run: for so many processes (those of the launcher by default).",
)
def train(config, overrides, outdir, fresh, dry_run, processes):
    """Distil a teacher into a few-step sampler, or approximate a density, and end with table and report.

    CONFIG is a name in configs/ or a YAML file. The names: digits (5 evaluations), digits_nfe1 to
    digits_nfe4, digits_nfe10, digits_long, toy2d, smoke, and mnist, cifar10, celeba64, imagenet64,
    these four also with _nfe5 and _nfe15 (10 evaluations otherwise); mnist_edm; edm_cifar10,
    edm_cifar10_cond, edm_ffhq64 and edm_imagenet64, also with _nfe5. Of a density: density, logistic.
    """
    from .config import load_config, resolved_yaml

    config = load_config(config, overrides)  # before torch is imported: a misspelt key is told at once
    if processes and not dry_run:
        raise ValueError("processes: goes with --dry-run; a launcher says how many processes train")
    _say_that_it_starts()
    if dry_run:
        from .parallel.world import processes as launched_processes
        from .training.estimate import estimate_text

        text = estimate_text(config, processes or launched_processes())
        if _is_main():
            click.echo(f"{resolved_yaml(config)}\n{text}")
        return
    from .metrics.table import format_table
    from .training.trainer import train

    began = time.monotonic()
    folder = train(config, outdir, fresh, progress=True)
    if not _is_main():
        return
    rows = folder.read_json("results.json")
    if rows:
        legend = LEGEND if config.target is None else LEGEND_OF_TARGET
        click.echo(f"\n{format_table(rows)}\n\n{legend}\n")
    click.echo(f"report: {folder.path / 'report.html'}\nsamples: {folder.path / 'samples'}")
    click.echo(f"took: {_duration(time.monotonic() - began)}; next: hsivi sample {folder.path} --seeds 0-63")


LEGEND_OF_TARGET = """\
gradients: evaluations of the target's gradient. means, deviations, correlations: their mean errors, a mean's in
deviations of the reference. particles: what the student has learned from. start: the student before score matching.
EMA: averaged weights, the ones to use. +- is the standard deviation over seed sets."""


@hsivi.command(
    cls=Command,
    short_help="Draw images from a run, one a seed.",
    epilog="hsivi sample runs/digits --seeds 0-63 --outdir pictures",
)
@click.argument("run")
@click.option("--seeds", required=True, help="One seed an image: 0-63, or 1,5,9-12.")
@click.option("--outdir", help="Where images go; samples/seeds in the run's folder by default.")
@click.option("--labels", help="Classes of the images: 3 for all, or 0-9, over and over; by default a seed's own.")
@click.option("--batch", default=250, show_default=True, help="Images per network call.")
@sampler_options
def sample(run, seeds, outdir, labels, batch, weights, **changes):
    """Draw images from a run: one PNG a seed and grid.png; for a 2-D target, points.npz.

    A seed always gives the same image, or with --labels the same image of each class.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from .checkpoints.files import write_arrays, write_atomically
    from .checkpoints.run_folder import RunFolder
    from .metrics.image_files import write_pictures
    from .parallel.machine import picture_size, refuse_beyond_disk, refuse_beyond_memory
    from .report.figures import image_grid
    from .sampling.sampler import sample_in_batches

    numbers = parse_seeds(seeds)
    if labels is not None:
        labels = Cycled(parse_numbers(labels, "labels", most=MOST_LABELS), len(numbers))
    folder = RunFolder(run)
    target = _output_folder(outdir or folder.path / "samples" / "seeds")
    kept = []  # points, or the images of the grid

    def check_room(event_shape):
        if not _is_main():
            return
        what, advice = f"seeds: {len(numbers)}", "ask for fewer, or choose another --outdir"
        if len(event_shape) == 3:
            refuse_beyond_disk(what, len(numbers) * picture_size(event_shape), target, advice, files=len(numbers))
        else:
            size = 16 * event_shape[0] * len(numbers)  # and in the npz
            refuse_beyond_memory(what, size, torch.device("cpu"), "ask for fewer")

    def take(chunk, samples):
        target.mkdir(parents=True, exist_ok=True)
        if samples.ndim == 4:
            write_pictures(target, chunk, samples.numpy().transpose(0, 2, 3, 1))
            samples = samples[: max(256 - sum(map(len, kept)), 0)]
        kept.append(samples)

    with tqdm(total=len(numbers), unit="image", desc="sample", disable=not _is_main(), dynamic_ncols=True) as bar:
        sample_in_batches(folder, numbers, take, weights, batch, bar.update, check_room, labels=labels, **changes)
    if not _is_main():
        return
    samples = torch.cat(kept).numpy()
    if folder.config().target is not None:
        from .report.draws import write_draws

        click.echo(
            f"{len(samples)} draws: {', '.join(map(str, write_draws(target, samples, numbers, folder.config())))}"
        )
        return
    if samples.ndim == 2:
        write_arrays(target / "points.npz", points=samples, seeds=np.array(numbers))
        click.echo(f"{len(samples)} points: {target / 'points.npz'}")
        return
    write_atomically(target / "grid.png", image_grid(samples))
    click.echo(f"{len(numbers)} images and grid.png: {target}")


@hsivi.command(
    name="eval",
    cls=Command,
    short_help="Measure a run's sampler: FID, and more.",
    epilog="hsivi eval runs/digits --num-samples 5000",
)
@click.argument("run")
@click.option("--num-samples", default=50000, show_default=True, help="Images to draw, seeds 0 to this minus 1.")
@click.option(
    "--ref",
    help="In the place of the run's reference: cifar10, ffhq64, afhqv2, imagenet64, an address, or a file.",
)
@click.option(
    "--metric",
    type=click.Choice(["digits", "mnist", "inception"]),
    help="Feature network in the place of the run's.",
)
@click.option(
    "--inception",
    metavar="FILE",
    help="torch-fidelity's weights of Inception; otherwise those in torch's cache, or a download.",
)
@click.option(
    "--save-images",
    metavar="PATH",
    help="Write the images too: into a folder as PNGs, or into one FILE.npz (arr_0, uint8 [N, H, W, C]).",
)
@sampler_options
def evaluate(run, num_samples, ref, weights, **options):
    """Measure the Frechet distance of a run's sampler: FID where the run's features are Inception's."""
    from tqdm import tqdm

    from .metrics.evaluation import check_num_samples, evaluate
    from .metrics.table import format_table

    check_num_samples(num_samples)  # before a bar of such a length is drawn
    with tqdm(total=num_samples, unit="image", desc="eval", disable=not _is_main(), dynamic_ncols=True) as bar:
        row = evaluate(run, num_samples, ref, weights, on_batch=bar.update, **options)
    if _is_main():
        click.echo(format_table([row]))


@hsivi.command(
    cls=Command, short_help="Train a small teacher.", epilog="hsivi teacher digits --outdir runs/digits_teacher"
)
@config_arguments
@click.option("--outdir", help="Where teacher.safetensors goes; runs/CONFIG_teacher by default.")
@click.option(
    "--feature-network",
    is_flag=True,
    help="Train the metric's classifier instead, to features.safetensors and reference.npz.",
)
def teacher(config, overrides, outdir, feature_network):
    """Train a small noise-prediction teacher on the config's data, where no checkpoint can be had.

    A teacher that was stopped goes on where it was.
    """
    from .config import load_config
    from .training.pretrain import train_feature_network, train_teacher

    config = load_config(config, overrides)
    target = _output_folder(outdir or f"runs/{config.name}_teacher")
    train = train_feature_network if feature_network else train_teacher
    click.echo(f"written: {train(config, target, progress=True)}")


@hsivi.command(
    cls=Command,
    short_help="Make a data set's images of a folder of pictures.",
    epilog="hsivi prepare celeba64 img_align_celeba --to celeba64.npz --count 50000",
)
@click.argument("name", metavar="SET", type=click.Choice(["celeba64", "celeba64_ddpm_torch", "images"]))
@click.argument("folder")
@click.option("--to", "target", required=True, help="A new file, FILE.npz: arr_0, uint8 [N, H, W, C].")
@click.option("--count", type=click.IntRange(1, 10_000_000), help="The first so many pictures by name; all by default.")
def prepare(name, folder, target, count):
    """Write the images of a data set into one file, for data_path or eval.reference.

    SET is celeba64 (of CelebA's aligned pictures, the 128x128 pixels around (89, 121), at 64x64: DDIM's crop, and that
    of the published statistics), celeba64_ddpm_torch (148x148 pixels from (15, 40), as ddpm-torch trains), or images:
    pictures of one size, as they are. Of CelebA the training part is taken, which is the pictures up to number 162770.
    """
    from .metrics.image_files import prepare_images

    written = prepare_images(name, folder, target, count, progress=_is_main())
    click.echo(f"{written} images: {target}")


@hsivi.command(
    cls=Command,
    short_help="Read checkpoints of others, or write a published one.",
    epilog="hsivi convert cifar10_2040.pt --to teachers/cifar10",
)
@click.argument("source")
@click.option(
    "--to",
    "target",
    required=True,
    help="A folder for safetensors files, or, from a run of ours, a FILE.pt in the published layout.",
)
def convert(source, target):
    """Turn checkpoints of others into files of ours, and a run of ours into a file of the published code.

    SOURCE: a ddpm-torch, improved-diffusion or published HSIVI file, a folder of diffusers' UNet2DModel, the name of a
    published teacher (cifar10, imagenet64), an address, or a run's folder. What it is is read from its content. No code
    in it is run.
    """
    from .checkpoints.convert import convert_checkpoint

    for path in convert_checkpoint(source, target):
        click.echo(f"written: {path}")


@hsivi.command(
    cls=Command,
    short_help="Write a run's sampler for others to use.",
    epilog="hsivi export runs/digits --format diffusers --outdir digits_pipeline",
)
@click.argument("run")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["safetensors", "diffusers", "aoti"]),
    help="What the folder is for.",
)
@click.option("--outdir", required=True, help="A new folder.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True, help="Which weights.")
def export(run, form, outdir, weights):
    """Write a run's sampler in a form that others can use, after comparing it with the run's own.

    safetensors: weights, a JSON config and a model card. diffusers: a folder for HSIVIPipeline.from_pretrained. aoti:
    one compiled file that needs torch alone.
    """
    from .checkpoints.run_folder import RunFolder
    from .export.write import export_run

    folder = RunFolder(run)
    if form == "aoti":
        click.echo("compiling all layers, which takes minutes", err=True)
    click.echo(f"exported: {export_run(folder, form, outdir, weights)}")


@hsivi.command(
    cls=Command,
    short_help="Draw a run's report again, or compare runs.",
    epilog="hsivi report runs/mnist runs/mnist_nfe5 --out comparison.html",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", help="Where the page that compares several runs goes; comparison.html by default.")
@backend_option
def report(runs, out, backend):
    """Draw a run's pictures and report.html again; of several runs, one page that compares them."""
    from .checkpoints.run_folder import RunFolder
    from .report.comparison import compare_runs
    from .report.run_report import write_report

    folders = [RunFolder(run) for run in runs]
    if len(folders) == 1 and out is None:
        click.echo(f"report: {write_report(folders[0], backend=backend, progress=True)}")
    else:
        click.echo(f"report: {compare_runs(folders, out or 'comparison.html', backend=backend)}")


def parse_seeds(text):
    """The seeds of "0-63" or "1,5,9-12", a `Seeds` of ranges; ValueError for anything else."""
    return parse_numbers(text, "seeds", MOST_SEEDS)


def parse_numbers(text, key, most):
    """The numbers of "0-63" or "1,5,9-12", a `Seeds` of ranges; key: begins the ValueError for anything else.

    most: how many a range may have.
    """
    ranges = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,40})(?:-(\d{1,40}))?", item.strip())
        if not match:
            shown = repr(text) if len(text) <= 80 else f"{text[:60]!r} ..."
            raise ValueError(f"{key}: {shown} is not understood; write 0-63 or 1,5,9-12")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{key}: {item.strip()!r} runs backwards; write {last}-{first}")
        if last >= 2**63:
            raise ValueError(f"{key}: {last} is too large; use numbers below 2^63")
        if last - first >= most:
            raise ValueError(f"{key}: {item.strip()!r} are too many; ask for at most {most} at a time")
        ranges.append(range(first, last + 1))
    return Seeds(*ranges)


def _output_folder(path):
    """Where a command will write; it is made when there is something to write."""
    from .checkpoints.files import as_written

    path = as_written(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"outdir {str(path)!r}: is a file; give a folder")
    return path


def _say_that_it_starts():
    """A line before the first silence: torch and what stands on it take some seconds to load."""
    if _is_main() and sys.stderr.isatty():
        click.echo("loading ...", err=True)


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def main(arguments=None):
    """Run the command.

    Exit code 0 on success, 2 and one line on a user's error, 128 + signal after a saved interruption.
    arguments: those of the command line by default. Of several processes that a launcher has started, rank 0 speaks.
    A reader of the output that has gone (`hsivi ... | head`) ends the command with 1, without a word.
    """
    _open_closed_streams()
    _only_ours()
    streams = sys.stdout, sys.stderr
    if not (sys.stderr and sys.stderr.isatty()):  # a log keeps every state of a bar
        os.environ.setdefault("TQDM_MININTERVAL", str(LOGGED_BAR))  # read when tqdm is imported
    sys.stdout, sys.stderr = output, _ = _Stream(sys.stdout, forgiving=False), _Stream(sys.stderr, forgiving=True)
    try:
        hsivi.main(arguments, standalone_mode=False)
        output.flush()
        if output.failed:  # click leaves out what it cannot write
            raise output.failed
    except click.exceptions.Abort:
        _fail("interrupted; a run that was training goes on from its newest checkpoint with the same command", 130)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except BrokenPipeError:
        sys.exit(1)  # as click itself does where it writes
    except Interrupted as error:
        _fail(str(error), 128 + error.signal_number)
    except Exception as error:
        if isinstance(error, OSError) and output.failed:
            _fail(f"cannot write the output: {output.failed}", 2)
        if is_out_of_memory(error):
            _fail(_out_of_memory(error), 2)
        if not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        _fail(" ".join(str(error).split()), 2)
    finally:
        sys.stdout, sys.stderr = streams


def launched(command):
    """What the files in launch/ do: one command, with the arguments that the deepspeed launcher passes on.

    The launcher adds --local_rank, which is left out.
    """
    main([command, *(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))])
    from .parallel.world import disconnect

    disconnect()


class _Stream:
    """stdout or stderr; `failed` is the first error of writing to it.

    forgiving: what cannot be written is left out. So is stderr, since a full disk, a closed pipe or a terminal that has
    gone must not end a training.
    """

    def __init__(self, stream, forgiving):
        self.stream, self.forgiving, self.failed = stream, forgiving, None

    def write(self, text):
        """As of a stream."""
        return self._try(lambda: self.stream.write(text), len(text))

    def flush(self):
        """As of a stream."""
        self._try(self.stream.flush, None)

    def _try(self, call, otherwise):
        try:
            return call()
        except (OSError, ValueError) as error:
            self.failed = self.failed or error
            _to_nowhere(self.stream)
            if not self.forgiving:
                raise
            return otherwise

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _to_nowhere(stream):
    """Let go to /dev/null what a stream still holds and what comes, so that the exit code is ours."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def _open_closed_streams():
    """Put /dev/null where stdin, stdout or stderr are closed: otherwise the next file that is opened would be taken for
    them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def _only_ours():
    """Show our warnings as a line, and leave those of libraries to logging, where nobody listens by default.

    With `python -W` or PYTHONWARNINGS all are shown. torch's C++ code says what it logs by TORCH_CPP_LOG_LEVEL.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read when torch is imported
    if sys.warnoptions:
        return
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    warnings.showwarning = _show_warning


def _show_warning(message, category, filename, lineno, file=None, line=None):
    if not _is_ours(message, category):
        logging.getLogger("py.warnings").warning("%s:%s: %s: %s", filename, lineno, category.__name__, message)
    elif _is_main():
        click.echo(f"hsivi: warning: {' '.join(str(message).split())}", err=True)


def _is_ours(message, category):
    """Whether a warning comes from a `warnings.warn` in this package, whatever line it is said to be about.

    What torch's C++ code and numpy warn of stands in a frame of ours too; the first says where it was triggered, the
    second has categories of its own.
    """
    if category is not UserWarning or "Triggered internally" in str(message):
        return False
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == warnings.__file__:
        frame = frame.f_back
    return frame is not None and Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _out_of_memory(error):
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) and said.startswith("out of memory"):
        return said
    reason = f" ({said[:120]})" if said else ""
    return f"out of memory{reason}; close other programs, raise `ulimit -v` if it is set, or ask for less at once"


def _is_main():
    return os.environ.get("RANK", "0") == "0"


def _fail(message, code):
    if not _is_main():
        time.sleep(RANK_0_SPEAKS)  # its launcher ends all when one has ended
        from .parallel.world import connected

        if connected() or os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(code)
        message = f"rank {os.environ['RANK']}: {message}"  # on a machine of its own, before the ranks have met
    message = str(message)
    if len(message) > LONGEST_MESSAGE:  # of a path that somebody gave, say; what is wrong stands first, advice last
        message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"
    with contextlib.suppress(OSError):
        click.echo(f"hsivi: {message}", err=True)
    sys.stderr.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()

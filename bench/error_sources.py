"""Where does a student's distance come from? From the teacher, its paths, or one of the layers?

    python -m bench.error_sources runs/digits --images 4000 --json FILE

The teacher's paths are those of the run's start, or of a start like it where the run had none. The student goes on from
the path's state x_k, for each k: from x_0 it does nothing, so that row is the path itself, and from x_K it is the whole
student. What a row has more than the one above it is its layer's. Beside the distance stand
the root mean square difference of the images from the path's own, what share of them the data set's classifier is not
sure of (its largest probability is below 0.9), and how far the proportions of its classes are from the data's: half the
sum of the differences. The last line is of real images where the data can be read, in as many as there are.

Of the score network, where the run has trained it, the loss is printed beside the teacher's on the same samples of the
layers. It has to be below, since the score of the student's samples is another than the teacher's.
"""

import statistics
import sys
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench.measure import describe, write_records
from bench.options import command_line
from bench.tables import Column, text_table
from hsivi_fast import ops
from hsivi_fast.build import build_network, build_untrained_student
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.checkpoints.weights import load_weights
from hsivi_fast.data import has_data, load_data
from hsivi_fast.method.class_labels import if_given
from hsivi_fast.method.losses import score_net_loss_and_grads
from hsivi_fast.method.schedule import signal_levels
from hsivi_fast.method.trajectory import path_steps, roll_path
from hsivi_fast.metrics.evaluation import build_metric
from hsivi_fast.metrics.features import CLASSIFIERS, load_classifier, network_of
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.sampling.sampler import load_sampler
from hsivi_fast.training.rollout import build_rollout
from hsivi_fast.training.start import path_knots

BATCH = 250
SURE = 0.9
SCORED = 16  # batches of the score network's losses
MEASURED = ("frechet_distance", "difference", "unsure", "proportions")
COLUMNS = [
    Column("images", "{images}"),
    Column("Frechet distance", lambda row: f"{max(row['frechet_distance'], 0):.3f}"),  # of itself, to rounding, 0
    Column("from the path's images", "{difference:.3f}", needs="difference"),
    Column("not sure", "{unsure:.1%}", needs="unsure"),
    Column("class proportions off by", "{proportions:.1%}", needs="proportions"),
]


def summary(rows):
    """One dict for each kind of images: means over runs of one configuration with other seeds."""
    lines = []
    for name in dict.fromkeys(row["images"] for row in rows):
        own = [row for row in rows if row["images"] == name]
        means = {key: None if own[0][key] is None else statistics.mean(row[key] for row in own) for key in MEASURED}
        lines.append({"images": name, **means})
    return lines


class Student:
    """A run's averaged student, its context with the teacher, and the states of the teacher's paths."""

    def __init__(self, run, images):
        self.run = RunFolder.of(run)
        self.sampler, context, self.step = load_sampler(self.run, ALONE, changes={"compile": False})
        self.context, self.layers, self.images = context.with_teacher(), context.layers, images
        self.seeds = torch.arange(images, device=context.device)

    @torch.no_grad()
    def path_states(self):
        """x_0 .. x_K of the paths that the seeds start, each [N, *event]."""
        config, device = self.context.config, self.context.device
        levels = signal_levels(config.teacher.betas, config.teacher.steps)
        steps = path_steps(path_knots(config), levels, config.start.substeps, config.start.solver)
        states = [[] for _ in range(self.layers.nfe + 1)]
        for seeds in self.seeds.split(BATCH):
            x = ops.draw_noise(seeds, 0, self.sampler.network.event_shape)
            labels = if_given(self.context.class_labels(seeds))

            def predict(x, t, labels=labels):
                return self.context.teacher(x, torch.full((len(x),), t, device=device), *labels)

            states[self.layers.nfe].append(x)
            for k, state in roll_path(predict, steps, x):
                states[k].append(state)
        return [torch.cat(of_layer) for of_layer in states]

    @torch.no_grad()
    def from_layer(self, states, top):
        """x_0 [N, *event] that the student makes of x_top = states, as its sampler does."""
        images = []
        for x, seeds in zip(states.split(BATCH), self.seeds.split(BATCH), strict=True):
            images.append(self.sampler.from_layer(x, top, seeds, self.context.class_labels(seeds)))
        return torch.cat(images)


def classifier_of(config):
    """(the classifier of a run's data set, the proportions of its classes [10]), or (None, None)."""
    name = network_of(config)
    if name not in CLASSIFIERS:
        return None, None
    return load_classifier(name), torch.full((10,), 0.1)  # both data sets have nearly equal classes


@torch.no_grad()
def judged(classifier, proportions, images):
    """{unsure, proportions} of uint8 images [N, C, H, W], by the data set's classifier; None without one."""
    if classifier is None:
        return {"unsure": None, "proportions": None}
    probabilities = torch.cat([classifier(part).softmax(1) for part in images.cpu().split(1000)])
    found = torch.bincount(probabilities.argmax(1), minlength=10) / len(images)
    unsure = float((probabilities.amax(1) < SURE).float().mean())
    return {"unsure": unsure, "proportions": float((found - proportions).abs().sum()) / 2}


def sources(run, images):
    """One dict a row of the table of a run."""
    student = Student(run, images)
    config, rows = student.context.config, []
    metric = build_metric(student.context)
    classifier, proportions = classifier_of(config)
    if config.data == "digits" or (has_data(config) and classifier is not None):
        labels = load_data(config.data, config.data_path).labels
        proportions = torch.bincount(torch.from_numpy(labels), minlength=10) / len(labels)
    states = student.path_states()
    for k, state in enumerate(states):
        made = student.from_layer(state, k)
        name = "the paths" if k == 0 else f"student from x_{k}" + (", the whole" if k == len(states) - 1 else "")
        rows.append(
            {
                "images": name,
                "frechet_distance": metric.measure(made, images)["frechet_distance"],
                "difference": float((made - states[0]).square().mean().sqrt()),
                **judged(classifier, proportions, metric.rounded_samples(made)),
            }
        )
    if has_data(config):
        real = torch.from_numpy(load_data(config.data, config.data_path).images)
        real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))][:images]
        real = metric.rounded(real)
        distance = metric.measure(real, len(real))["frechet_distance"]
        known = judged(classifier, proportions, real)
        rows.append({"images": f"{len(real)} real ones", "frechet_distance": distance, "difference": None, **known})
    return [{"run": student.run.path.name, "step": student.step, **row} for row in rows]


@torch.no_grad()
def score_network(run):
    """(its loss, the teacher's) on samples of the averaged student's layers, means over `SCORED` batches."""
    student = Student(run, BATCH)
    context, folder = student.context, student.run
    network = build_untrained_student(context)
    load_weights(network, folder.load_tensors(student.step, "student_ema"), "student")
    f = build_network(context.config, context.device).eval()
    load_weights(f, folder.load_tensors(student.step, "score_net"), "score_net")
    rollout, losses = build_rollout(context, network), []
    cycle = context.config.train.f_learning_times
    for step in range(SCORED):
        if step % cycle == 0:
            rollout.start_cycle(10**6 + step // cycle)  # cycles that no training has seen
        batch = rollout.score_net_batch(10**6 * cycle + step)
        t, labels = context.matching.t[batch.noise.stream], if_given(batch.labels)
        both = [
            score_net_loss_and_grads(net(batch.x, t, *labels), context.matching, network.log_scaled_gamma, batch.noise)[
                0
            ]
            for net in (f, context.teacher)
        ]
        losses.append(torch.stack([of_net.mean() for of_net in both]))
    return torch.stack(losses).mean(0).tolist()


def main():
    parser = command_line(__doc__, images=4000, json=None)
    parser.add_argument("runs", nargs="+", help="folders of runs of images")
    arguments = parser.parse_args()
    rows = []
    for run in arguments.runs:
        own = sources(run, arguments.images)
        loss, of_teacher = score_network(run)
        print(f"{RunFolder.of(run).path}\n{text_table(own, COLUMNS)}")
        print(f"loss of the score network {loss:.4f}, of the teacher in its place {of_teacher:.4f}\n")
        named = {"loss_score_net": loss, "loss_teacher": of_teacher, "num_samples": arguments.images}
        rows += [{**row, **named, **describe(torch.device("cpu"))} for row in own]
    if arguments.json:
        write_records(arguments.json, rows)


if __name__ == "__main__":
    main()

"""The averaged student during a run: what is measured and shown of it."""

import torch

from ..build import build_untrained_student
from ..execution import EAGER
from ..metrics.evaluation import measure_row
from ..sampling.sampler import student_sampler

PICTURED = 64  # samples of a grid during training


class AveragedStudent:
    """The student with its averaged weights: one network, whose weights are replaced in place.

    All ranks have to ask at the same step: in ZeRO 3 putting the weights together is a collective, and each rank draws
    its share of the samples.
    """

    def __init__(self, context, student):
        self.context, self.student = context, student
        self.network = self.sampler = None

    def distance(self, metric):
        """The metric's first column, on one set of seeds; every rank draws its share of them."""
        network = self._with_present_weights()
        self.sampler = self.sampler or student_sampler(self.context, network)
        num_samples = self.context.config.eval.num_samples
        row = measure_row("hsivi_ema", self.sampler, metric, num_samples, 1, world=self.context.world)
        return row[metric.columns[0]]

    def states(self, count):
        """[x_0, ..., x_K] of the seeds 0 .. count - 1, each [count, *event], the same on every rank."""
        sampler = student_sampler(self.context, self._with_present_weights(), EAGER)
        return sampler.states(torch.arange(count, device=self.context.device))

    def pictures(self):
        """(images of the seeds 0 .. 63 in -1 .. 1, log_gamma).

        Of a run without images no samples are shown, and few are drawn.
        """
        network, world = self._with_present_weights(), self.context.world
        count = PICTURED if len(self.context.teacher.event_shape) == 3 else 1
        world.mark("drawing pictures")
        # Called eagerly: a sampler that is compiled or recorded keeps the batch of its first call, and measurements
        # have a larger one.
        sampler = student_sampler(self.context, network, EAGER)
        samples = self.context.images(sampler(world.share(range(count)), on_batch=world.counting(None)))
        return world.gather_shares(samples, count), network.log_scaled_gamma

    def _with_present_weights(self):
        averaged = self.student.averaged()
        if self.network is None:
            self.network = build_untrained_student(self.context)
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(averaged[name])
        return self.network

"""Which class the image of a seed is of, and a teacher that is guided towards its class."""

import torch
from torch import nn

from .. import ops


class ClassLabels(nn.Module):
    """seeds [B] int64 -> class labels [B] int64, or None for a network without classes.

    The label is a function of the seed alone, uniform over the classes (`ops.integers_of_seeds`): whoever has a seed
    has its label.
    classes: how many the network has, or None; chosen: some of them, in the place of all.
    """

    def __init__(self, classes=None, chosen=None):
        super().__init__()
        self.classes = classes
        chosen = range(classes or 0) if chosen is None else chosen
        self.register_buffer("chosen", torch.tensor(list(chosen), dtype=torch.int64), persistent=False)

    def forward(self, seeds):
        if self.classes is None:
            return None
        return self.chosen[ops.integers_of_seeds(seeds, len(self.chosen))]


def if_given(labels):
    """The arguments after (x, t) of a network's call: labels [B], and none where these are None.

    So a network without classes may be any function of (x, t).
    """
    return () if labels is None else (labels,)


class GuidedTeacher(nn.Module):
    """Classifier-free guidance: eps = eps(no class) + guidance (eps(class) - eps(no class)), one call of both halves.

    Ho & Salimans 2022, arXiv 2207.12598, eq. 6, whose 1 + w is `guidance`: 1 is the teacher itself.
    network: a noise prediction that has learned `null_class`, the label that stands for no class.
    """

    def __init__(self, network, guidance, null_class):
        super().__init__()
        self.network, self.guidance, self.null_class = network, guidance, null_class
        self.event_shape, self.classes = network.event_shape, network.classes

    def forward(self, x, t, class_labels):
        no_class = torch.full_like(class_labels, self.null_class)
        both = self.network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([class_labels, no_class]))
        of_class, of_none = both.chunk(2)
        return of_none + self.guidance * (of_class - of_none)

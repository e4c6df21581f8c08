"""Feature networks that distances are measured on.

They are a classifier of digits in two sizes, and torch-fidelity's port of Inception.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..checkpoints.download import fetch_file
from ..checkpoints.files import file_sha256
from ..checkpoints.tensor_files import is_named_tensors, read_torch
from ..checkpoints.weights import load_weights, read_weights
from ..config import ASSETS
from ..data import MissingFile

INCEPTION = "inception-v3-compat"  # its name in torch-fidelity's registry
CLASSIFIERS = {"digits": 8, "mnist": 32}  # side of the images that each was trained on
SIZES = {"digits": 64, "mnist": 64, "inception": 2048}  # features of each network


class DigitsClassifier(nn.Module):
    """A small classifier of digits; its 64 penultimate activations are the features of a metric.

    image_size: 8 (scikit-learn's digits), 32 (MNIST with its border) or another power of two from 4 on: the images are
    halved until they are 2x2. ValueError for another one.
    """

    def __init__(self, image_size=8):
        super().__init__()
        if image_size < 4 or image_size & (image_size - 1):
            raise ValueError(f"image_size: {image_size} is no power of two from 4 on")
        self.image_size = image_size
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        # For 8x8 images conv1 .. conv3, for 32x32 conv1 .. conv5.
        self.convs = [f"conv{number}" for number in range(1, image_size.bit_length())]
        for name in self.convs[1:]:
            self.add_module(name, nn.Conv2d(32 if name == "conv2" else 64, 64, 3, stride=2, padding=1))
        self.hidden = nn.Linear(256, 64)
        self.classes = nn.Linear(64, 10)

    def features(self, images):
        """uint8 images [N, 1, image_size, image_size] -> [N, 64]."""
        x = images.float() / 127.5 - 1
        for name in self.convs:
            x = F.relu(getattr(self, name)(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images):
        """uint8 images [N, 1, image_size, image_size] -> logits [N, 10]."""
        return self.classes(self.features(images))


def network_of(config):
    """The name of a run's feature network: what it says, else the classifier of its data set, else Inception."""
    if config.eval.metric:
        return config.eval.metric
    return config.data if config.data in CLASSIFIERS else "inception"


def check_images(name, event_shape):
    """ValueError where a feature network cannot see images of this shape [C, H, W]."""
    shape = list(event_shape)
    if name in CLASSIFIERS:
        seen = [1, CLASSIFIERS[name], CLASSIFIERS[name]]
        if shape != seen:
            raise ValueError(f"eval.metric: {name!r} sees images {seen}, the run makes {shape}; choose inception")
    if name == "inception" and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(f"eval.metric: 'inception' sees images of 1 or 3 channels, the run makes {shape}")


def feature_extractor(name, device, weights=None):
    """The feature network "digits", "mnist" or "inception", out of torch-fidelity's registry.

    The classifiers are entered there too. weights: the file of Inception's weights, as torch-fidelity publishes it;
    otherwise they are taken from torch's cache or, with a network, downloaded into it.
    Calling it on uint8 images [N, C, H, W] gives a tuple whose first entry is [N, D]; see `image_features`.
    Raises ValueError for an unknown name, and where the weights are missing or are not Inception's.
    """
    if name not in SIZES:
        raise ValueError(f"eval.metric: {name!r} is unknown; choose {', '.join(SIZES)}")
    # Late: torch-fidelity takes seconds to import, and most uses of this module do without it.
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor

    if name == "inception":
        return _inception_from(create_feature_extractor, fetch_inception(weights)).to(device)
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, _classifier_features())
    return create_feature_extractor(name, ["64"], cuda=False, verbose=False).to(device)


def image_features(extractor, images):
    """Features [N, D] of uint8 images [N, C, H, W]; for Inception grey images are repeated to three channels."""
    if images.shape[1] == 1 and extractor.get_name() == INCEPTION:
        images = images.expand(-1, 3, -1, -1)
    with torch.no_grad():
        return extractor(images)[0]


def weights_file(name, weights=None):
    """The file that holds a feature network's weights, `weights` if given; Inception's need not be there yet."""
    if weights:
        return Path(weights)
    if name in CLASSIFIERS:
        return ASSETS / f"{name}_features.safetensors"
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3  # late: as above

    return Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(URL_INCEPTION_V3)


def describe_features(name, weights=None):
    """What made a set of statistics, in words that say so exactly: whose port, which layer, which weights."""
    port = f"torch-fidelity {INCEPTION}" if name == "inception" else f"hsivi_fast {name}"
    return f"{port}, {SIZES[name]} features, weights sha256 {file_sha256(weights_file(name, weights))[:16]}"


def load_classifier(name):
    """The `DigitsClassifier` of the data set "digits" or "mnist", with the weights that ship."""
    network, file = DigitsClassifier(CLASSIFIERS[name]), weights_file(name)
    load_weights(network, read_weights(file), file)
    return network.eval()


def _classifier_features():
    """The class that torch-fidelity makes the classifiers of."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # late: as above

    class ClassifierFeatures(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.classifier = load_classifier(name)

        @staticmethod
        def get_provided_features_list():
            return ("64",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "64"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            return (self.classifier.features(images),)

    return ClassifierFeatures


def _inception_from(create, file):
    """torch-fidelity's Inception with the weights of a file, in which no pickled code is run.

    torch-fidelity unpickles what it is given. So the tensors are read here, and it is given a copy that we wrote.
    """
    problem = f"eval.inception: {str(file)!r} does not hold torch-fidelity's Inception"
    try:
        tensors = read_torch(file)
    except ValueError as error:
        raise ValueError(f"{problem} ({str(error).partition(': ')[2]})") from None
    if not is_named_tensors(tensors):
        raise ValueError(f"{problem} (it is no dict of tensors)")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, copy)
        try:
            return create(INCEPTION, ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=str(copy))
        except Exception as error:  # loading raises many kinds, some over hundreds of lines
            raise ValueError(f"{problem} ({type(error).__name__})") from None


def fetch_inception(weights=None):
    """The file of Inception's weights: `weights` if given, else that of torch's cache, which is downloaded at first.

    A download whose sum is not the one in the file's name is deleted.
    Raises ValueError, in one line, where it is not there, and `MissingFile` where it cannot be downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3  # late: as above

    file = weights_file("inception", weights)
    if file.is_file():
        return file
    if weights:
        raise ValueError(f"eval.inception: {str(file)!r} is not there")
    start_of_sum = re.search(r"-([0-9a-f]+)\.", file.name)[1]
    try:
        return fetch_file(URL_INCEPTION_V3, file, start_of_sum, "eval.inception", progress=sys.stderr.isatty())
    except MissingFile as error:
        raise MissingFile(
            f"eval.inception: missing, and Inception's weights could not be downloaded ({error.reason}); "
            f"say eval.inception=FILE, or put {URL_INCEPTION_V3} into {file.parent}",
            URL_INCEPTION_V3,
            file,
            error.reason,
        ) from None

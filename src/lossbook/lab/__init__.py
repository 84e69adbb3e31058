"""The small kit that the labs share: profile, seeds, data, models, augmentation, plots and claims.

A lab writes ``from lossbook import lab`` and ``run = lab.start()``. Importing the kit loads torch and numpy only; each
function loads the library that it calls. ``pip install lossbook[lab]`` brings what the quick profile needs,
``pip install lossbook[full]`` what the full profile needs.
"""

from lossbook.lab._augment import augment, two_views
from lossbook.lab._claims import ClaimError, claim
from lossbook.lab._data import (
    Images,
    data_root,
    load_cifar10,
    load_cifar100,
    load_digits,
    load_faces,
    load_graph,
    load_mnist,
    load_patches,
    load_rotated_digits,
    load_stl10,
    load_text,
    load_textures,
    load_usps,
)
from lossbook.lab._hub import PretrainedTransformer, load_hub_dataset, load_language_model
from lossbook.lab._models import MLP, ConvNet, ResNet, Transformer
from lossbook.lab._plots import COLORS, band, mean_interval, slider_figure
from lossbook.lab._start import Run, seed_all, start

__all__ = [
    "COLORS",
    "MLP",
    "ClaimError",
    "ConvNet",
    "Images",
    "PretrainedTransformer",
    "ResNet",
    "Run",
    "Transformer",
    "augment",
    "band",
    "claim",
    "data_root",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_faces",
    "load_graph",
    "load_hub_dataset",
    "load_language_model",
    "load_mnist",
    "load_patches",
    "load_rotated_digits",
    "load_stl10",
    "load_text",
    "load_textures",
    "load_usps",
    "mean_interval",
    "seed_all",
    "slider_figure",
    "start",
    "two_views",
]

"""What tests of several parts need."""

import importlib
import sys

import pytest
import torch


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, also where its compiled operators do not load.

    Beside a torch of another build (CPU wheels from one index, torchvision from another) the import stops at operators
    without a schema. The data sets and models are pure Python; declaring the two schemas lets them be imported.
    """
    try:
        yield importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # the schemas live as long as this object
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield importlib.import_module("torchvision")

"""Real data: what ships inside the installed libraries (quick) and what torchvision fetches (full)."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled set of images held in memory.

    Args:
        images: float32 ``(N, C, H, W)`` in [0, 1].
        labels: int64 ``(N,)``, indices into ``classes``; -1 where there is no label.
        classes: the names of the classes.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Images":
        """Return the same set on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def _images(pixels: np.ndarray, labels: Sequence[int] | np.ndarray, classes: Sequence[str], maximum: float) -> Images:
    images = torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32).div_(maximum)
    return Images(images, torch.tensor(np.asarray(labels), dtype=torch.int64), tuple(classes))


# ---- inside the installed libraries -------------------------------------------------------------------------------


@functools.cache  # labs load them for every network; reading the file takes as long as fifty training steps
def _digits() -> tuple[np.ndarray, np.ndarray, list[str]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images[:, None], digits.target, [str(name) for name in digits.target_names]


def load_digits() -> Images:
    """Load scikit-learn's 1797 handwritten digits.

    Returns:
        :class:`Images` of shape ``(1797, 1, 8, 8)`` with ten classes.

    Example:
        >>> load_digits().images.shape
        torch.Size([1797, 1, 8, 8])
    """
    return _images(*_digits(), 16)


def load_rotated_digits(turns: Sequence[int] = (0, 1, 2, 3)) -> Images:
    """Load scikit-learn's digits once for each quarter turn; a class is a digit at an angle, as in Omniglot's few-shot tasks.

    For an open world take whole digits for training and other digits for the test, with all their angles: an image and its
    rotated copies then never lie on both sides. Some classes look alike, such as 0 at 0 and at 180 degrees.

    Args:
        turns: which quarter turns (90 degrees counterclockwise each), different, from 0 to 3.

    Returns:
        :class:`Images` of shape ``(1797 * len(turns), 1, 8, 8)``, one turn after the other; the label of digit ``c`` at ``turns[j]`` is
        ``c * len(turns) + j``, its name for instance ``"7 at 90°"``.

    Raises:
        ValueError: ``turns`` is empty, repeats a turn, or has one outside of 0 to 3.

    Example:
        >>> digits = load_rotated_digits((0, 1))
        >>> digits.images.shape, digits.classes[:3]
        (torch.Size([3594, 1, 8, 8]), ('0 at 0°', '0 at 90°', '1 at 0°'))
    """
    if not turns or len(set(turns)) < len(turns) or not set(turns) <= {0, 1, 2, 3}:
        raise ValueError(f"turns must be different numbers from 0 to 3, got {tuple(turns)}")
    digits = load_digits()
    images = torch.cat([digits.images.rot90(turn, dims=(2, 3)) for turn in turns])
    labels = torch.cat([digits.labels * len(turns) + j for j in range(len(turns))])
    return Images(images, labels, tuple(f"{name} at {90 * turn}°" for name in digits.classes for turn in turns))


def load_patches(count: int, size: int = 16, *, seed: int = 0, part: str = "all") -> Images:
    """Cut random square patches from six color photographs that ship with scikit-image and scikit-learn.

    Patches of one photograph may overlap. For a held-out set take ``part="train"`` and ``part="test"``: they come from
    disjoint regions, the left three quarters and the right quarter of each photograph.

    Args:
        count: number of patches, as equally many from each photograph as ``count`` allows.
        size: side in pixels.
        seed: of the positions and the order.
        part: ``"all"``, ``"train"`` or ``"test"``.

    Returns:
        :class:`Images` of shape ``(count, 3, size, size)``; the label says which photograph.

    Raises:
        ValueError: ``count`` is not positive, ``size`` does not fit into the region, or ``part`` is another word.

    Example:
        >>> load_patches(12, 8).images.shape
        torch.Size([12, 3, 8, 8])
    """
    from skimage import data
    from sklearn.datasets import load_sample_image

    photographs = {
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "china": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }
    return _crops(photographs, count, size, seed, part)


def load_textures(count: int, size: int = 32, *, seed: int = 0, part: str = "all") -> Images:
    """Cut random square patches from scikit-image's three gray textures, brick, grass and gravel.

    Patches of one texture may overlap. For a held-out set take ``part="train"`` and ``part="test"``: they come from
    disjoint regions, the left three quarters and the right quarter of each photograph.

    Args:
        count: number of patches, as equally many from each texture as ``count`` allows.
        size: side in pixels.
        seed: of the positions and the order.
        part: ``"all"``, ``"train"`` or ``"test"``.

    Returns:
        :class:`Images` of shape ``(count, 1, size, size)``; the label says which texture.

    Raises:
        ValueError: ``count`` is not positive, ``size`` does not fit into the region, or ``part`` is another word.

    Example:
        >>> load_textures(6).classes
        ('brick', 'grass', 'gravel')
    """
    from skimage import data

    return _crops({"brick": data.brick(), "grass": data.grass(), "gravel": data.gravel()}, count, size, seed, part)


def _crops(photographs: dict[str, np.ndarray], count: int, size: int, seed: int, part: str) -> Images:
    if count < 1:
        raise ValueError(f"count must be positive, got {count}")
    if part not in ("all", "train", "test"):
        raise ValueError(f"part must be 'all', 'train' or 'test', got {part!r}")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(photographs))
    pixels = None
    for label, (name, photograph) in enumerate(photographs.items()):
        region = np.atleast_3d(photograph)
        border = region.shape[1] * 3 // 4
        region = {"all": region, "train": region[:, :border], "test": region[:, border:]}[part]
        if not 1 <= size <= min(region.shape[:2]):
            raise ValueError(f"size must lie in [1, {min(region.shape[:2])}] for {name}, part {part!r}, got {size}")
        windows = np.lib.stride_tricks.sliding_window_view(
            region, (size, size), axis=(0, 1)
        )  # (rows, columns, C, s, s)
        chosen = labels == label
        rows, columns = (rng.integers(extent, size=chosen.sum()) for extent in windows.shape[:2])
        if pixels is None:
            pixels = np.empty((count, *windows.shape[2:]), np.uint8)
        pixels[chosen] = windows[rows, columns]
    return _images(pixels, labels, list(photographs), 255)


def load_faces() -> Images:
    """Load scikit-image's subset of Labeled Faces in the Wild: 100 faces and 100 patches of background.

    Returns:
        :class:`Images` of shape ``(200, 1, 25, 25)``; label 1 is a face.

    Example:
        >>> load_faces().classes
        ('background', 'face')
    """
    from skimage import data

    return _images(data.lfw_subset()[:, None], np.repeat([1, 0], 100), ("background", "face"), 1)


def load_text() -> str:
    """Load English prose: CPython's own documentation topics, which ship with the interpreter.

    Returns:
        About 460,000 characters, the topics in alphabetical order. The text differs a little from one Python release to
        the next.

    Example:
        >>> "import" in load_text()
        True
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def load_graph(name: str) -> "networkx.Graph":
    """Load one of networkx's social graphs.

    Args:
        name: ``"karate"`` (34 nodes), ``"les_miserables"`` (77), ``"davis"`` (32, bipartite) or ``"florentine"`` (15).

    Returns:
        ``networkx.Graph``. The karate club has a community per node, stored as the integer node attribute ``label``
        (0: Mr. Hi's club, 1: the Officer's); the other graphs come without labels.

    Raises:
        ValueError: ``name`` is none of the four.

    Example:
        >>> load_graph("karate").nodes[33]["label"]
        1
    """
    import networkx as nx

    makers = {
        "karate": nx.karate_club_graph,
        "les_miserables": nx.les_miserables_graph,
        "davis": nx.davis_southern_women_graph,
        "florentine": nx.florentine_families_graph,
    }
    if name not in makers:
        raise ValueError(f"name must be one of {', '.join(makers)}, got {name!r}")
    graph = makers[name]()
    if name == "karate":
        clubs = graph.nodes(data="club")
        nx.set_node_attributes(graph, {node: int(club == "Officer") for node, club in clubs}, "label")
    return graph


# ---- through torchvision ------------------------------------------------------------------------------------------


def data_root() -> Path:
    """Return the folder for downloaded data: ``LOSSBOOK_DATA`` where set, else ``~/.cache/lossbook``."""
    return Path(os.environ.get("LOSSBOOK_DATA") or Path.home() / ".cache" / "lossbook")


def _datasets():
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("this data set comes through torchvision: pip install lossbook[full]") from error
    return datasets


def load_mnist(root: str | Path | None = None, *, train: bool = True, download: bool = True) -> Images:
    """Load MNIST through ``torchvision.datasets``.

    Args:
        root: folder of the data; ``None`` means :func:`data_root`.
        train: the 60,000 training images, or the 10,000 test images.
        download: fetch the files where they are missing.

    Returns:
        :class:`Images` of shape ``(N, 1, 28, 28)``; 190 MB for the training set.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the files are missing or damaged, and ``download`` is false.
    """
    mnist = _datasets().MNIST(root or data_root(), train=train, download=download)
    return _images(mnist.data.numpy()[:, None], mnist.targets.numpy(), [str(digit) for digit in range(10)], 255)


def load_usps(root: str | Path | None = None, *, train: bool = True, download: bool = True) -> Images:
    """Load USPS, the postal service's handwritten digits, through ``torchvision.datasets``.

    Args:
        root: folder of the data; ``None`` means :func:`data_root`.
        train: the 7291 training images, or the 2007 test images.
        download: fetch the file where it is missing.

    Returns:
        :class:`Images` of shape ``(N, 1, 16, 16)``.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the file is missing, and ``download`` is false.
    """
    try:
        usps = _datasets().USPS(root or data_root(), train=train, download=download)
    except FileNotFoundError as error:
        raise RuntimeError(f"USPS not found: {error.filename}; download=True fetches it") from error
    return _images(usps.data[:, None], usps.targets, [str(digit) for digit in range(10)], 255)


def load_cifar10(root: str | Path | None = None, *, train: bool = True, download: bool = True) -> Images:
    """Load CIFAR-10 through ``torchvision.datasets``.

    Args:
        root: folder of the data; ``None`` means :func:`data_root`.
        train: the 50,000 training images, or the 10,000 test images.
        download: fetch the files where they are missing.

    Returns:
        :class:`Images` of shape ``(N, 3, 32, 32)``; 610 MB for the training set.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the files are missing or damaged, and ``download`` is false.
    """
    return _cifar("CIFAR10", root, train, download)


def load_cifar100(root: str | Path | None = None, *, train: bool = True, download: bool = True) -> Images:
    """Load CIFAR-100 with its 100 fine labels through ``torchvision.datasets``.

    Args:
        root: folder of the data; ``None`` means :func:`data_root`.
        train: the 50,000 training images, or the 10,000 test images.
        download: fetch the files where they are missing.

    Returns:
        :class:`Images` of shape ``(N, 3, 32, 32)``; 610 MB for the training set.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the files are missing or damaged, and ``download`` is false.
    """
    return _cifar("CIFAR100", root, train, download)


def _cifar(name: str, root: str | Path | None, train: bool, download: bool) -> Images:
    cifar = getattr(_datasets(), name)(root or data_root(), train=train, download=download)
    return _images(cifar.data.transpose(0, 3, 1, 2), cifar.targets, cifar.classes, 255)


def load_stl10(root: str | Path | None = None, split: str = "train", *, download: bool = True) -> Images:
    """Load STL-10 through ``torchvision.datasets``.

    Args:
        root: folder of the data; ``None`` means :func:`data_root`.
        split: ``"train"`` (5,000 images), ``"test"`` (8,000), ``"unlabeled"`` (100,000) or ``"train+unlabeled"``.
        download: fetch the files where they are missing.

    Returns:
        :class:`Images` of shape ``(N, 3, 96, 96)``, label -1 without a label; 550 MB for the training set, 11 GB for
        the unlabeled one.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the files are missing or damaged, and ``download`` is false.
        ValueError: ``split`` is another word.
    """
    stl10 = _datasets().STL10(root or data_root(), split=split, download=download)
    return _images(stl10.data, stl10.labels, stl10.classes, 255)

import bz2
import dataclasses
import gzip
import hashlib
import pickle
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import skimage.data
import torch
from sklearn import datasets

from lossbook import lab

pytestmark = pytest.mark.usefixtures("no_network")


def check_images(images, shape, num_classes):
    assert images.images.shape == shape and images.images.dtype == torch.float32
    assert images.labels.shape == shape[:1] and images.labels.dtype == torch.int64
    assert 0 <= images.images.min() and images.images.max() <= 1
    assert len(images) == shape[0]
    assert len(images.classes) == num_classes and all(isinstance(name, str) for name in images.classes)


# ---- inside the installed libraries


def test_images_move_and_stay_frozen():
    images = lab.Images(torch.rand(2, 1, 3, 3), torch.tensor([0, 1]), ("a", "b"))
    moved = images.to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.classes == images.classes and images.images.device.type == "cpu"
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.labels = images.labels + 1


def test_digits_are_scikit_learns():
    digits = lab.load_digits()
    check_images(digits, (1797, 1, 8, 8), 10)
    reference = datasets.load_digits()
    np.testing.assert_array_equal(digits.images.flatten(1).numpy() * 16, reference.data)
    np.testing.assert_array_equal(digits.labels.numpy(), reference.target)
    assert digits.classes == tuple("0123456789")
    digits.images.zero_(), digits.labels.zero_()  # what is read once is not what a caller gets
    again = lab.load_digits()
    assert again.images.any() and again.labels.any()


def test_rotated_digits_are_turned_and_named():
    digits, plain = lab.load_rotated_digits((0, 3)), lab.load_digits()
    check_images(digits, (2 * 1797, 1, 8, 8), 20)
    assert digits.classes[15] == "7 at 270°"
    assert torch.equal(digits.images[:1797], plain.images) and torch.equal(digits.labels[:1797], 2 * plain.labels)
    turned = np.rot90(plain.images[100, 0].numpy(), 3)
    np.testing.assert_array_equal(digits.images[1797 + 100, 0].numpy(), turned)
    assert digits.classes[digits.labels[1797 + 100]] == f"{plain.labels[100]} at 270°"
    assert len(lab.load_rotated_digits().classes) == 40
    for turns in [(), (1, 1), (4,), (-1,)]:
        with pytest.raises(ValueError, match="turns"):
            lab.load_rotated_digits(turns)


def occurs(patch, photograph):
    """Whether the patch (C, s, s) in [0, 1] occurs in the photograph (H, W) or (H, W, C) of bytes."""
    pixels = np.rint(patch.numpy() * 255).astype(np.uint8)
    photograph = np.atleast_3d(photograph)
    windows = np.lib.stride_tricks.sliding_window_view(photograph, pixels.shape[1:], axis=(0, 1))
    candidates = np.argwhere(windows[..., 0, 0, 0] == pixels[0, 0, 0])
    return any((windows[row, column] == pixels).all() for row, column in candidates)


def test_patches_come_from_their_photograph():
    patches = lab.load_patches(20, 8)
    check_images(patches, (20, 3, 8, 8), 6)
    counts = patches.labels.bincount(minlength=6)
    assert counts.max() - counts.min() <= 1
    photographs = {"astronaut": skimage.data.astronaut(), "flower": datasets.load_sample_image("flower.jpg")}
    for name, photograph in photographs.items():
        chosen = patches.images[patches.labels == patches.classes.index(name)]
        assert len(chosen) >= 3 and all(occurs(patch, photograph) for patch in chosen)


def test_textures_come_from_their_photograph():
    textures = lab.load_textures(12)
    check_images(textures, (12, 1, 32, 32), 3)
    for label, name in enumerate(textures.classes):
        chosen = textures.images[textures.labels == label]
        assert len(chosen) == 4 and all(occurs(patch, getattr(skimage.data, name)()) for patch in chosen)


def test_parts_are_disjoint_regions():
    brick = skimage.data.brick()
    regions = {"train": brick[:, :384], "test": brick[:, 384:]}
    for part, region in regions.items():
        textures = lab.load_textures(30, part=part)
        assert all(occurs(patch, region) for patch in textures.images[textures.labels == 0])


@pytest.mark.parametrize("load", [lab.load_patches, lab.load_textures])
def test_crops_follow_the_seed(load):
    first, again, other = load(9, seed=1), load(9, seed=1), load(9, seed=2)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("load", [lab.load_patches, lab.load_textures])
@pytest.mark.parametrize(
    ("argument", "options"),
    [("count", {"count": 0}), ("size", {"count": 3, "size": 0}), ("size", {"count": 3, "size": 600})]
    + [("part", {"count": 3, "part": "valid"})],
)
def test_bad_crops_are_named(load, argument, options):
    with pytest.raises(ValueError, match=f"^{argument} must"):
        load(**options)


def test_faces_and_background():
    faces = lab.load_faces()
    check_images(faces, (200, 1, 25, 25), 2)
    assert faces.labels.bincount().tolist() == [100, 100]
    assert faces.classes == ("background", "face")
    pixels = skimage.data.lfw_subset().astype(np.float32)  # documented: the first hundred are faces
    np.testing.assert_array_equal(faces.images[faces.labels == 1, 0].numpy(), pixels[:100])
    np.testing.assert_array_equal(faces.images[faces.labels == 0, 0].numpy(), pixels[100:])


def test_text_is_every_topic_in_alphabetical_order():
    text = lab.load_text()
    assert len(text) > 300_000
    for name in sorted(topics):
        assert text.startswith(topics[name]), name
        text = text[len(topics[name]) + 2 :]
    assert text == ""


@pytest.mark.parametrize(
    ("name", "nodes", "edges"),
    [("karate", 34, 78), ("les_miserables", 77, 254), ("davis", 32, 89), ("florentine", 15, 20)],
)
def test_graphs(name, nodes, edges):
    graph = lab.load_graph(name)
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (nodes, edges)
    labels = [label for _, label in graph.nodes(data="label")]
    if name == "karate":
        assert sorted(labels) == [0] * 17 + [1] * 17
        assert graph.nodes[0]["label"] == 0 and graph.nodes[33]["label"] == 1
    else:
        assert set(labels) == {None}


def test_unknown_graph_is_named():
    with pytest.raises(ValueError, match="name must be one of karate.*'facebook'"):
        lab.load_graph("facebook")


# ---- through torchvision, on small files in the data sets' own formats


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the idx format: magic number, sizes as big-endian int32, values."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture(params=["unpacked", "gz"])
def mnist(request, tmp_path, torchvision, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    sets = {}
    resources = []
    for number, prefix in enumerate(("train", "t10k")):
        images, labels = pixels(number, 7 - number, 28, 28), pixels(9, 7 - number) % 10
        sets[prefix == "train"] = images, labels
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            packed = raw / f"{name}.gz"
            packed.write_bytes(gzip.compress(idx(array)))
            resources.append((packed.name, md5(packed)))
            if request.param == "unpacked":
                (raw / name).write_bytes(idx(array))
                packed.unlink()
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    return tmp_path, sets, request.param == "gz"


@pytest.mark.parametrize("train", [True, False])
def test_mnist(mnist, train):
    root, sets, download = mnist  # from .gz: `download` finds the right files there and only unpacks them
    loaded = lab.load_mnist(root, train=train, download=download)
    images, labels = sets[train]
    check_images(loaded, (len(labels), 1, 28, 28), 10)
    np.testing.assert_array_equal(np.rint(loaded.images[:, 0].numpy() * 255), images)
    np.testing.assert_array_equal(loaded.labels.numpy(), labels)


@pytest.mark.parametrize("train", [True, False])
def test_usps(train, tmp_path, torchvision):
    sets = {True: (pixels(0, 5, 16, 16), [10, 1, 3, 3, 7]), False: (pixels(1, 2, 16, 16), [2, 10])}  # labels from one
    for name, (images, labels) in zip(("usps.bz2", "usps.t.bz2"), sets.values(), strict=True):
        values = (images.reshape(len(images), -1) + 0.5) / 127.5 - 1  # a line: label, then index:value in [-1, 1]
        lines = [
            f"{y} " + " ".join(f"{i}:{v:.6f}" for i, v in enumerate(x, 1)) for y, x in zip(labels, values, strict=True)
        ]
        (tmp_path / name).write_bytes(bz2.compress("\n".join(lines).encode() + b"\n"))
    loaded = lab.load_usps(tmp_path, train=train, download=False)
    images, labels = sets[train]
    check_images(loaded, (len(labels), 1, 16, 16), 10)
    np.testing.assert_array_equal(np.rint(loaded.images[:, 0].numpy() * 255), images)
    assert loaded.labels.tolist() == [label - 1 for label in labels]


CIFAR = {
    "CIFAR10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"),
    "CIFAR100": ("cifar-100-python", ["train"], "test", "meta"),
}


@pytest.fixture(params=CIFAR)
def cifar(request, tmp_path, torchvision, monkeypatch):
    folder, train_files, test_file, meta_file = CIFAR[request.param]
    dataset = getattr(torchvision.datasets, request.param)
    label_key = "labels" if request.param == "CIFAR10" else "fine_labels"
    names = [f"class {i}" for i in range(10 if request.param == "CIFAR10" else 100)]
    (tmp_path / folder).mkdir()

    def write(name, content):
        path = tmp_path / folder / name
        path.write_bytes(pickle.dumps(content, protocol=2))
        return [name, md5(path)]

    def write_batch(seed, name):
        batch = {"data": pixels(seed, 2, 3 * 32 * 32), label_key: [seed, len(names) - 1 - seed]}
        batches.append(batch)
        return write(name, batch)

    batches = []
    monkeypatch.setattr(dataset, "train_list", [write_batch(seed, name) for seed, name in enumerate(train_files)])
    monkeypatch.setattr(dataset, "test_list", [write_batch(9, test_file)])
    checksum = write(meta_file, {dataset.meta["key"]: names})[1]
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": checksum})
    sets = {
        train: (np.concatenate([b["data"] for b in chosen]), sum((b[label_key] for b in chosen), []))
        for train, chosen in ((True, batches[:-1]), (False, batches[-1:]))
    }
    load = {"CIFAR10": lab.load_cifar10, "CIFAR100": lab.load_cifar100}[request.param]
    return load, tmp_path, sets, names, tmp_path / folder / test_file


@pytest.mark.parametrize("train", [True, False])
def test_cifar(cifar, train):
    load, root, sets, names, _ = cifar
    loaded = load(root, train=train, download=False)
    data, labels = sets[train]
    check_images(loaded, (len(labels), 3, 32, 32), len(names))
    np.testing.assert_array_equal(np.rint(loaded.images.flatten(1).numpy() * 255), data)  # stored plane by plane
    assert loaded.labels.tolist() == labels and loaded.classes == tuple(names)


def test_a_damaged_file_is_refused(cifar):
    load, root, _, _, path = cifar
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(RuntimeError, match="corrupted"):
        load(root, download=False)


@pytest.fixture
def stl10(tmp_path, torchvision, monkeypatch):
    dataset = torchvision.datasets.STL10
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    stored = {
        "train_X.bin": pixels(0, 3, 3, 96, 96),  # (N, channel, column, row): the format is column-major
        "train_y.bin": np.array([1, 10, 4], np.uint8),  # from one
        "unlabeled_X.bin": pixels(1, 2, 3, 96, 96),
        "test_X.bin": pixels(2, 1, 3, 96, 96),
        "test_y.bin": np.array([2], np.uint8),
    }
    for name, array in stored.items():
        (folder / name).write_bytes(array.tobytes())
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(dataset, table, [[name, md5(folder / name)] for name, _ in getattr(dataset, table)])
    return tmp_path, stored, names


@pytest.mark.parametrize(
    ("split", "files", "labels"),
    [
        ("train", ["train_X.bin"], [0, 9, 3]),
        ("test", ["test_X.bin"], [1]),
        ("unlabeled", ["unlabeled_X.bin"], [-1, -1]),
        ("train+unlabeled", ["train_X.bin", "unlabeled_X.bin"], [0, 9, 3, -1, -1]),
    ],
)
def test_stl10(stl10, split, files, labels):
    root, stored, names = stl10
    loaded = lab.load_stl10(root, split, download=False)
    check_images(loaded, (len(labels), 3, 96, 96), 10)
    expected = np.concatenate([stored[name] for name in files]).swapaxes(2, 3)
    np.testing.assert_array_equal(np.rint(loaded.images.numpy() * 255), expected)
    assert loaded.labels.tolist() == labels and loaded.classes == tuple(names)


def test_unknown_split_is_named(stl10):
    with pytest.raises(ValueError, match="split"):
        lab.load_stl10(stl10[0], "valid", download=False)


def test_default_root(cifar, monkeypatch, tmp_path):
    load, root, sets, _, _ = cifar
    monkeypatch.setenv("LOSSBOOK_DATA", str(root))
    assert lab.data_root() == root and len(load(download=False)) == len(sets[True][1])
    monkeypatch.delenv("LOSSBOOK_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert lab.data_root() == tmp_path / "home" / ".cache" / "lossbook"


@pytest.mark.parametrize("load", [lab.load_mnist, lab.load_usps, lab.load_cifar10, lab.load_cifar100, lab.load_stl10])
def test_missing_files_and_missing_torchvision(load, tmp_path, torchvision, monkeypatch):
    with pytest.raises(RuntimeError, match="not found"):
        load(tmp_path, download=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install lossbook\[full\]"):
        load(tmp_path, download=False)

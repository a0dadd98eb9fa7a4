"""Small archives in the layouts of published zoos."""

import io
import itertools
import json
import tarfile
import zipfile

import numpy as np

from tests.torch_pickles import state_dict


def network(seed, sizes=(2, 4, 4, 1)):
    """Random layers as torch has them: weight `[out, in]` and bias."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(fan_out, fan_in)).astype(np.float32) / 5, rng.normal(size=fan_out).astype(np.float32) / 5)
        for fan_in, fan_out in itertools.pairwise(sizes)
    ]


def dwsnets_state(layers):
    return {
        f"seq.{i}.{name}": array
        for i, layer in enumerate(layers)
        for name, array in zip(("weight", "bias"), layer, strict=True)
    }


def nfn_state(layers):
    return {
        f"net.{i}{'.linear' * (i < len(layers) - 1)}.{name}": array
        for i, layer in enumerate(layers)
        for name, array in zip(("weight", "bias"), layer, strict=True)
    }


def checkpoint_of(state):
    return state_dict(state, root="net")


# -- networks, by name in the archive ---------------------------------------------------------------------------------


def mnist_name(of, label, image):
    return f"mnist-inrs/mnist_png_{of}ing_{label}_{image}/checkpoints/mnist_png_{of}ing_{label}_{image}.pth"


def mnist_layers(train=12, test=3):
    """`{name: layers}`; image i has label 3 i mod 10."""
    names = [mnist_name("train", 3 * i % 10, i) for i in range(train)]
    names += [mnist_name("test", 3 * i % 10, i) for i in range(test)]
    return {name: network(i) for i, name in enumerate(names)}


def fashion_layers(train=6, test=3):
    names = [f"fmnist_inrs/train/model_{i}.pth" for i in range(train)]
    names += [f"fmnist_inrs/test/model_{i}.pth" for i in range(test)]
    return {name: network(i) for i, name in enumerate(names)}


def fashion_label(name):
    return int(name.rpartition("_")[2].removesuffix(".pth")) * 7 % 10


def fashion_files(layers):
    names = list(layers)
    train = [name for name in names if "/train/" in name]
    splits = {
        "train": [f"/home/somebody/data/{name}" for name in train[2:]],
        "val": [f"/home/somebody/data/{name}" for name in train[:2]],
        "test": [f"/home/somebody/data/{name}" for name in names if "/test/" in name],
    }
    files = {
        name: checkpoint_of(dwsnets_state(network) | {"label": fashion_label(name)}) for name, network in layers.items()
    }
    return files | {"fmnist_inrs/splits.json": json.dumps(splits).encode()}


NFN_IMAGES = (0, 1, 44_999, 45_000, 49_999, 50_000, 59_999, 60_000)


def nfn_name(image, view=0, *, of="mnist"):
    augmented = f"aug{view - 1}_" if view else ""
    return f"siren_{of}_wts/randinit_smaller_{augmented}{image % 7}s/net{image}.pth"


def nfn_layers(views=3, sizes=(2, 4, 4, 1)):
    """All images once, those for training (below 45,000) `views` times."""
    return {
        nfn_name(image, view): network((image, view), sizes)
        for view in range(views)
        for image in NFN_IMAGES
        if view == 0 or image < 45_000
    }


def mnist_files(layers):
    return {name: checkpoint_of(dwsnets_state(network)) for name, network in layers.items()}


def nfn_files(layers):
    return {name: checkpoint_of(nfn_state(network)) for name, network in layers.items()}


# -- containers -------------------------------------------------------------------------------------------------------


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            if name.startswith(("mnist", "siren")):
                folder = tarfile.TarInfo(name.rpartition("/")[0])
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path

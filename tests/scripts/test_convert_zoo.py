"""The command that converts published zoos, on small archives."""

import importlib.util
import os
import pathlib
import re
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from ngjax import zoo
from ngjax.zoo import published
from tests.zoo.published_archives import (
    mnist_files,
    mnist_layers,
    mnist_name,
    network,
    nfn_files,
    nfn_layers,
    nfn_name,
    write_tar,
    write_zip,
)

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "convert_zoo.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_zoo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_zoo"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["convert_zoo"]


def test_table(script, tmp_path, capsys):
    source = write_tar(tmp_path / "siren_mnist_wts.tar", nfn_files(nfn_layers()))
    made = script.main(script.Config(name="nfn_mnist", source=source, out=tmp_path / "zoo"))
    assert len(made) == 14
    printed = capsys.readouterr().out.splitlines()
    assert "MNIST SIRENs of NFN (Zhou et al. 2023): 2-4-4-1, omega 30" in printed
    table = {line.split()[0]: line.split()[1:4] for line in printed if line.startswith(published.SPLITS)}
    assert table == {"train": ["9", "3", "3"], "validation": ["2", "2", "1"], "test": ["3", "3", "1"]}
    assert printed[-1] == f"14 networks converted, 14 in the zoo {tmp_path / 'zoo'}"


def test_again_changes_nothing(script, tmp_path, capsys):
    source = write_zip(tmp_path / "mnist-inrs.zip", mnist_files(mnist_layers()))
    config = script.Config(name="dwsnets_mnist", source=source, out=tmp_path / "zoo", validation=4)
    script.main(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "zoo").iterdir() if path.name != ".lock"}
    script.main(config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "zoo").iterdir() if path.name != ".lock"} == before
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 networks converted, 15 in the zoo")


def test_comparison_with_the_images(script, tmp_path, capsys, monkeypatch):
    """Networks without weights draw a gray of their own, whose distance from the image is known."""
    grays = {image: np.float32(image + 1) / 8 for image in range(3)}
    pixels = [np.zeros((2, 28, 28), np.uint8), np.zeros((2, 28, 28), np.uint8)]
    pixels[1][0] = 255  # the first test image is white, all others are black
    for prefix, array in zip(("train", "t10k"), pixels, strict=True):
        labels = np.zeros(len(array), np.uint8)
        for kind, content in (("images-idx3", array), ("labels-idx1", labels)):
            header = struct.pack(f">{content.ndim + 1}I", 0x0800 + content.ndim, *content.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(header + content.tobytes())

    def layers(gray):
        return [*(tuple(0 * array for array in layer) for layer in network(0)[:-1]), (np.zeros((1, 4), "f"), gray)]

    # DWSNets adds 0.5; images 0 and 1 are for training, 0 for testing.
    files = {
        mnist_name(of, 0, i): layers(np.array([grays[i] - 0.5])) for of, i in (("train", 0), ("train", 1), ("test", 0))
    }
    source = write_zip(tmp_path / "mnist-inrs.zip", mnist_files(files))
    config = script.Config(
        name="dwsnets_mnist", source=source, out=tmp_path / "dws", validation=0, compare=2, data_dir=tmp_path
    )
    script.main(config)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(published.SPLITS)]
    train = np.median([-20 * np.log10(1 / 8), -20 * np.log10(2 / 8)])
    assert [line.split()[-2:] for line in table] == [[f"{train:.1f}", "dB"], [f"{-20 * np.log10(7 / 8):.1f}", "dB"]]

    # NFN: from -1 to 1, and image 2 is the first one of the test images.
    monkeypatch.setitem(zoo.IMAGE_SETS, "mnist", zoo.IMAGE_SETS["mnist"]._replace(num_images=(2, 2)))
    files = {nfn_name(i): layers(np.array([2 * grays[i] - 1])) for i in grays}
    source = write_tar(tmp_path / "siren_mnist_wts.tar", nfn_files(files))
    config = script.Config(
        name="nfn_mnist", source=source, out=tmp_path / "nfn", split_points=(1, 2), compare=2, data_dir=tmp_path
    )
    script.main(config)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(published.SPLITS)]
    distances = (1 / 8, 2 / 8, 5 / 8)
    assert [line.split()[-2] for line in table] == [f"{-20 * np.log10(distance):.1f}" for distance in distances]


def test_left_out_checkpoints_are_told(script, tmp_path, capsys):
    files = nfn_files({nfn_name(0): network(0)}) | {"siren_mnist_wts/other/net1.pth": b""}
    script.main(script.Config(name="nfn_mnist", source=write_tar(tmp_path / "a.tar", files), out=tmp_path / "zoo"))
    assert "left out 1 checkpoints of another layout, such as siren_mnist_wts/other/net1.pth" in capsys.readouterr().out


def test_progress_with_time_left(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "_SHARD_NETWORKS", 5)
    source = write_zip(tmp_path / "mnist-inrs.zip", mnist_files(mnist_layers()))
    script.main(script.Config(name="dwsnets_mnist", source=source, out=tmp_path / "zoo", validation=4))
    assert re.search(r"15/15 \[\d\d:\d\d<\d\d:\d\d", capsys.readouterr().err)


def test_command_that_is_killed_goes_on(script, tmp_path, monkeypatch):
    """The process is killed at any moment after the first shards; the command given again ends with the same zoo."""
    files = nfn_files({nfn_name(image): network(image) for image in range(400)})
    source = write_tar(tmp_path / "siren_mnist_wts.tar", files)
    # Small shards, and a wait after each of them, so that there is something to interrupt.
    start = f"""
import runpy, time
from ngjax import zoo
from ngjax.zoo import published
append = zoo.ZooWriter.append
published._SHARD_NETWORKS = 20
zoo.ZooWriter.append = lambda *args: (append(*args), time.sleep(0.2))
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    arguments = ["--name", "nfn_mnist", "--source", str(source), "--out", str(tmp_path / "zoo")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", start, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(list((tmp_path / "zoo").glob("shard-*.safetensors"))) < 3:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert 40 <= len(zoo.open(tmp_path / "zoo")) < 400
    monkeypatch.setattr(published, "_SHARD_NETWORKS", 20)
    made = script.main(script.Config(name="nfn_mnist", source=source, out=tmp_path / "zoo"))
    made.verify()
    assert made.labels["image"].tolist() == list(range(400))

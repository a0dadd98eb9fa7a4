"""Image data sets: layouts, places, downloads from a server on this machine, and wrong files."""

import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading

import numpy as np
import pytest

from ngjax.zoo import IMAGE_SETS, load_digits, load_images

FILES = tuple(IMAGE_SETS["mnist"].files)


def idx(array):
    return struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def idx_files(seed=0, counts=(5, 3), shape=(28, 28)):
    """Contents of the four files, by name, and the arrays in them."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, size=(count, *shape), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = rng.integers(0, 10, size=count, dtype=np.uint8)
    return {name: idx(array) for name, array in arrays.items()}, arrays


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def cifar_batches(seed=0, records=4):
    rng = np.random.default_rng(seed)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    arrays = {}
    for name in names:
        arrays[name] = rng.integers(0, 256, size=(records, 3073), dtype=np.uint8)
        arrays[name][:, 0] %= 10
    return {name: array.tobytes() for name, array in arrays.items()}, arrays


def tar_of(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_tar(batches):
    return tar_of([(f"cifar-10-batches-bin/{name}", content) for name, content in batches.items()])


OFFICIAL = dict(IMAGE_SETS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder, empty; nothing is downloaded from anywhere but a server of the test."""
    monkeypatch.delenv("NGJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name, image_set in IMAGE_SETS.items():
        monkeypatch.setitem(IMAGE_SETS, name, image_set._replace(address="http://127.0.0.1:9/nothing/"))
    return tmp_path / "cache" / "ngjax" / "images"


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files(tmp_path, name, compressed):
    files, arrays = idx_files()
    if compressed:
        files = {f"{file}.gz": gzip.compress(content) for file, content in files.items()}
    write_files(tmp_path / "data" / name, files)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        loaded = load_images(name, split, data_dir=tmp_path / "data")
        expected = arrays[f"{prefix}-images-idx3-ubyte"][..., None] / 255
        np.testing.assert_allclose(loaded.images, expected, rtol=1e-6)
        np.testing.assert_array_equal(loaded.labels, arrays[f"{prefix}-labels-idx1-ubyte"])
        assert (loaded.images.dtype, loaded.labels.dtype) == (np.float32, np.int32)
        assert loaded.class_names == IMAGE_SETS[name].class_names
        assert len(loaded.class_names) == 10


def test_a_compressed_file_is_recognized_by_its_content(tmp_path):
    files, arrays = idx_files()
    write_files(tmp_path, {file: gzip.compress(content) for file, content in files.items()})
    loaded = load_images("mnist", "train", data_dir=tmp_path)
    np.testing.assert_array_equal(loaded.labels, arrays[FILES[1]])


@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, packed):
    batches, arrays = cifar_batches()
    if packed:
        write_files(tmp_path / "cifar10", {"cifar-10-binary.tar.gz": cifar_tar(batches)})
    else:
        write_files(tmp_path / "cifar10" / "cifar-10-batches-bin", batches)
    train, test = (load_images("cifar10", split, data_dir=tmp_path) for split in ("train", "test"))
    assert train.images.shape == (20, 32, 32, 3)
    assert test.images.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(test.labels, arrays["test_batch.bin"][:, 0])
    # Image 5 is the second of the second batch; after the label come all reds, all greens, all blues, row by row.
    record = arrays["data_batch_2.bin"][1]
    assert train.labels[5] == record[0]
    for row, column, channel in ((0, 0, 0), (3, 7, 1), (31, 30, 2)):
        value = record[1 + channel * 1024 + row * 32 + column]
        assert train.images[5, row, column, channel] == np.float32(value) / np.float32(255)


def test_digits():
    train, test, everything = load_images("digits", "train"), load_images("digits", "test"), load_digits()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    np.testing.assert_array_equal(np.concatenate([train.images, test.images]), everything.images)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), everything.labels)
    assert train.class_names == everything.class_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("name", "split", "mean", "deviation"),
    [
        ("mnist", "train", 0.1307, 0.3081),
        ("mnist", "test", 0.1325, 0.3105),
        ("fashion_mnist", "train", 0.2860, 0.3530),
        ("fashion_mnist", "test", 0.2868, 0.3524),
    ],
)
def test_real_files(data_dir, name, split, mean, deviation):
    if not (data_dir / name).is_dir():
        pytest.skip(f"there is no {name} in {data_dir}")
    loaded = load_images(name, split, data_dir=data_dir)
    assert loaded.images.shape == (60_000 if split == "train" else 10_000, 28, 28, 1)
    assert loaded.images.mean(dtype=np.float64) == pytest.approx(mean, abs=5e-5)
    assert loaded.images.std(dtype=np.float64) == pytest.approx(deviation, abs=5e-5)


# -- places -----------------------------------------------------------------------------------------------------------


def test_folder_of_the_set_then_data_dir_then_cache(tmp_path, cache):
    data, labels = tmp_path / "data", {}
    for seed, folder in enumerate((data / "mnist", data, cache / "mnist")):
        files, arrays = idx_files(seed)
        labels[folder] = arrays[FILES[1]]
        write_files(folder, {f"{file}.gz": gzip.compress(content) for file, content in files.items()})
    for folder in (data / "mnist", data, cache / "mnist"):
        np.testing.assert_array_equal(load_images("mnist", "train", data_dir=data).labels, labels[folder])
        for file in FILES:
            (folder / f"{file}.gz").unlink()


def test_environment_variable_and_argument(tmp_path, monkeypatch):
    labels = []
    for seed in (0, 1):
        files, arrays = idx_files(seed)
        write_files(tmp_path / str(seed), files)
        labels.append(arrays[FILES[1]])
    monkeypatch.setenv("NGJAX_DATA_DIR", str(tmp_path / "0"))
    np.testing.assert_array_equal(load_images("mnist", "train").labels, labels[0])
    np.testing.assert_array_equal(load_images("mnist", "train", data_dir=tmp_path / "1").labels, labels[1])


def test_missing_data_dir(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="data_dir='.*nowhere' is not a folder"):
        load_images("mnist", "train", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("NGJAX_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="NGJAX_DATA_DIR=.*elsewhere is not a folder"):
        load_images("mnist", "train")


def test_images_without_their_labels(tmp_path):
    files, _ = idx_files()
    write_files(tmp_path / "mnist", {FILES[0]: files[FILES[0]]})
    with pytest.raises(FileNotFoundError, match=f"{FILES[0]} but not {FILES[1]}"):
        load_images("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize(("name", "split"), [("MNIST", "train"), ("cifar100", "train")])
def test_unknown_names(name, split):
    with pytest.raises(ValueError, match=rf"name='{name}', expected one of mnist, fashion_mnist, cifar10, digits"):
        load_images(name, split)


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_unknown_splits(name):
    with pytest.raises(ValueError, match=r"split='validation', expected one of train, test"):
        load_images(name, "validation")


# -- downloads --------------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, by path; `cut` ends a transfer that early, whatever it announced. Keeps the paths asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.cut = {}, [], None

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}/sets/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path.removeprefix("/sets/"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server that has all sets, with the hashes of what it serves in the table."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        files, server.arrays = idx_files(7)
        server.files = {f"{file}.gz": gzip.compress(content) for file, content in files.items()}
        archive = cifar_tar(cifar_batches()[0])
        server.files["cifar-10-binary.tar.gz"] = archive
        md5s = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
        monkeypatch.setitem(IMAGE_SETS, "mnist", IMAGE_SETS["mnist"]._replace(address=server.address, files=md5s))
        md5s = {"cifar-10-binary.tar.gz": hashlib.md5(archive).hexdigest()}
        monkeypatch.setitem(IMAGE_SETS, "cifar10", IMAGE_SETS["cifar10"]._replace(address=server.address, files=md5s))
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def cached(cache):
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_downloads_once_what_is_asked_for(server, cache):
    for _ in range(2):
        loaded = load_images("mnist", "test")
        np.testing.assert_array_equal(loaded.labels, server.arrays["t10k-labels-idx1-ubyte"])
        assert server.asked == ["/sets/t10k-images-idx3-ubyte.gz", "/sets/t10k-labels-idx1-ubyte.gz"]
    assert cached(cache) == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


def test_downloads_only_what_the_cache_lacks(server, cache):
    load_images("mnist", "train")
    (cache / "mnist" / f"{FILES[1]}.gz").unlink()
    server.asked.clear()
    load_images("mnist", "train")
    assert server.asked == [f"/sets/{FILES[1]}.gz"]


def test_downloads_cifar(server, cache):
    train, test = load_images("cifar10", "train"), load_images("cifar10", "test")
    assert (len(train.labels), len(test.labels)) == (20, 4)
    assert server.asked == ["/sets/cifar-10-binary.tar.gz"]
    assert cached(cache) == ["cifar-10-binary.tar.gz"]


def test_a_folder_without_the_files_does_not_stop_the_download(server, tmp_path):
    load_images("mnist", "test", data_dir=tmp_path)
    assert len(server.asked) == 2


def test_progress_counts_to_the_size(server):
    calls = []
    load_images("cifar10", "test", progress=lambda done, total: calls.append((done, total)))
    size = len(server.files["cifar-10-binary.tar.gz"])
    assert calls[-1] == (size, size)
    assert [total for _, total in calls] == [size] * len(calls)


def test_wrong_hash_leaves_nothing(server, cache, monkeypatch):
    right = IMAGE_SETS["mnist"].files[FILES[0]]
    server.files[f"{FILES[0]}.gz"] = gzip.compress(b"something else")
    received = hashlib.md5(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"{server.address}{FILES[0]}.gz .* is {received}, expected {right}"):
        load_images("mnist", "train")
    assert cached(cache) == []


def test_a_page_instead_of_the_file_leaves_nothing(server, cache):
    server.files[f"{FILES[0]}.gz"] = b"<html>log in first</html>"
    with pytest.raises(ValueError, match="no whole gzip file"):
        load_images("mnist", "train")
    server.files["cifar-10-binary.tar.gz"] = b"<html>log in first</html>"
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz .* expected"):
        load_images("cifar10", "train")
    assert cached(cache) == []


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_cut_transfer_leaves_nothing_and_can_be_repeated(server, cache, name):
    server.cut = 100
    with pytest.raises(FileNotFoundError, match=r"the connection ended after 100 of \d+ bytes"):
        load_images(name, "train")
    assert cached(cache) == []
    server.cut = None
    assert len(load_images(name, "train").labels) > 0


def test_missing_on_the_server(server, cache):
    del server.files[f"{FILES[1]}.gz"]
    with pytest.raises(FileNotFoundError, match=f"{server.address}{FILES[1]}.gz failed: HTTP Error 404"):
        load_images("mnist", "train")
    assert cached(cache) == [f"{FILES[0]}.gz"]


def test_without_a_connection_the_error_says_what_to_do(tmp_path, cache):
    with pytest.raises(FileNotFoundError) as raised:
        load_images("mnist", "train", data_dir=tmp_path)
    message = str(raised.value)
    for part in (f"http://127.0.0.1:9/nothing/{FILES[0]}.gz", str(cache / "mnist"), "data_dir", "NGJAX_DATA_DIR"):
        assert part in message
    assert "refused" in message
    assert cached(cache) == []


def test_official_addresses_and_hashes():
    assert {name: image_set.address for name, image_set in OFFICIAL.items()} == {
        "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "cifar10": "https://www.cs.toronto.edu/~kriz/",
        "digits": "",
    }
    assert OFFICIAL["cifar10"].files == {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d13530"}


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_official_hashes_are_those_of_real_files(data_dir, name):
    for file, md5 in OFFICIAL[name].files.items():
        path = data_dir / name / f"{file}.gz"
        if not path.is_file():
            pytest.skip(f"there is no {path}")
        assert hashlib.md5(gzip.decompress(path.read_bytes())).hexdigest() == md5


# -- files that are not what they should be ---------------------------------------------------------------------------


def bad_idx_cases():
    files, arrays = idx_files()
    images, labels = files[FILES[0]], files[FILES[1]]
    wrong_label = arrays[FILES[1]].copy()
    wrong_label[3] = 10
    return {
        "cut": (FILES[0], images[:-1], r"expected 3936 bytes, as its header says 5 x 28 x 28, found 3935"),
        "too long": (FILES[0], images + b"\0", r"expected 3936 bytes.*found 3937"),
        "empty": (FILES[0], b"", "header of 16 bytes, found 0 bytes"),
        "header cut": (FILES[1], labels[:6], "header of 8 bytes, found 6 bytes"),
        "magic": (
            FILES[0],
            b"\x89PNG" + images[4:],
            r"expected an IDX file with magic number 2051 .* found 2303741511",
        ),
        "floats": (FILES[0], b"\0\0\x0d\x03" + images[4:], r"2051 \(unsigned bytes, 3 dimensions\), found 3331"),
        "labels for images": (FILES[0], labels + bytes(8), r"2051 .* found 2049"),
        "images for labels": (FILES[1], images, r"2049 \(unsigned bytes, 1 dimension\), found 2051"),
        "size": (FILES[0], idx(np.zeros((5, 32, 28), np.uint8)), r"expected images of 28 x 28 pixels .* found 32 x 28"),
        "none": (FILES[0], idx(np.zeros((0, 28, 28), np.uint8)), "at least one image"),
        "fewer labels": (FILES[1], idx(np.zeros(4, np.uint8)), "holds 5 images but .* 4 labels"),
        "label": (FILES[1], idx(wrong_label), "expected labels below 10, found 10 for image 3"),
        "gzip cut": (FILES[0], gzip.compress(images)[:-20], "not a whole gzip file"),
        "gzip broken": (FILES[0], b"\x1f\x8b" + images, "not a whole gzip file"),
    }


@pytest.mark.parametrize("case", bad_idx_cases())
def test_bad_idx(tmp_path, case):
    file, content, message = bad_idx_cases()[case]
    files, _ = idx_files()
    write_files(tmp_path, files | {file: content})
    with pytest.raises(ValueError, match=message) as raised:
        load_images("mnist", "train", data_dir=tmp_path)
    assert str(tmp_path / file) in str(raised.value)


def test_files_of_another_set_are_noticed(tmp_path, server):
    files, _ = idx_files(7)
    write_files(tmp_path, files)
    assert len(load_images("mnist", "train", data_dir=tmp_path).labels) == 5
    with pytest.raises(ValueError, match=f"{FILES[0]} of fashion_mnist, but has the content of {FILES[0]} of mnist"):
        load_images("fashion_mnist", "train", data_dir=tmp_path)


def test_training_and_test_files_swapped_are_noticed(tmp_path, server):
    files, _ = idx_files(7)
    write_files(tmp_path, {FILES[0]: files[FILES[2]], FILES[1]: files[FILES[3]]})
    with pytest.raises(ValueError, match=f"{FILES[0]} of mnist, but has the content of {FILES[2]} of mnist"):
        load_images("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "positive multiple of 3073 bytes.*found 0"),
        (bytes(3072), "found 3072 bytes"),
        (bytes(3073) + b"\x0a" + bytes(3072), "expected labels below 10, found 10 for image 1"),
    ],
)
def test_bad_cifar_batches(tmp_path, content, message):
    batches, _ = cifar_batches()
    batches["data_batch_3.bin"] = content
    folder = write_files(tmp_path / "cifar-10-batches-bin", batches)
    with pytest.raises(ValueError, match=message) as raised:
        load_images("cifar10", "train", data_dir=tmp_path)
    assert str(folder / "data_batch_3.bin") in str(raised.value)
    assert len(load_images("cifar10", "test", data_dir=tmp_path).labels) == 4


def test_cifar_batch_missing_in_a_folder(tmp_path):
    batches, _ = cifar_batches()
    del batches["data_batch_4.bin"]
    write_files(tmp_path / "cifar-10-batches-bin", batches)
    with pytest.raises(FileNotFoundError, match=r"but not data_batch_4.bin"):
        load_images("cifar10", "train", data_dir=tmp_path)


def bad_archives():
    batches, _ = cifar_batches()
    named = [(f"cifar-10-batches-bin/{name}", content) for name, content in batches.items()]
    whole = tar_of(named)
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    return {
        "missing": (tar_of(named[:2]), "not there: cifar-10-batches-bin/data_batch_3.bin, .*data_batch_5.bin"),
        "traversal": (tar_of([("../../outside", b"x"), *named]), r"member '../../outside' points outside"),
        "absolute": (tar_of([*named, ("/etc/cron.d/x", b"x")]), "member '/etc/cron.d/x' points outside"),
        "twice": (tar_of([*named, named[0]]), "data_batch_1.bin' is there twice"),
        "link": (link.getvalue(), "expected member .*data_batch_1.bin' to be a file"),
        "cut": (whole[: len(whole) // 2], "not a whole tar archive"),
        "no tar": (b"<html></html>", "not a whole tar archive"),
        "size": (
            tar_of([(named[0][0], b"short"), *named[1:]]),
            r"member .*data_batch_1.bin: expected .* found 5 bytes",
        ),
    }


@pytest.mark.parametrize("case", bad_archives())
def test_bad_archives(tmp_path, case):
    content, message = bad_archives()[case]
    write_files(tmp_path, {"cifar-10-binary.tar.gz": content})
    with pytest.raises(ValueError, match=message) as raised:
        load_images("cifar10", "train", data_dir=tmp_path)
    assert str(tmp_path / "cifar-10-binary.tar.gz") in str(raised.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["cifar-10-binary.tar.gz"], "nothing was unpacked"

# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

import io
import re
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests
from scipy.io import savemat

from numpyro_ebm import datasets


def _or_skip(load, *args):
    try:
        return load(*args)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    get = requests.get

    def only_here(url, **kwargs):
        if not url.startswith("http://127.0.0.1:"):
            raise requests.ConnectionError("no network in tests")
        return get(url, **kwargs)

    monkeypatch.setattr(requests, "get", only_here)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class _Server(ThreadingHTTPServer):
    """Serves one file at every address of its own, in two halves so that threads overlap, and counts."""

    def __init__(self, content):
        self.content, self.num_requests = content, 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/x.csv"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.num_requests += 1
        content = self.server.content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for half in (content[: len(content) // 2], content[len(content) // 2 :]):
            self.wfile.write(half)
            self.wfile.flush()
            time.sleep(0.1)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Starts a server of some bytes in place of the public copy of the batters, with an empty cache."""
    servers = []

    def start(content, sha256=None):
        servers.append(server := _Server(content))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sha256 = sha256 or datasets.hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(datasets.FILES, "small/EfronMorris.csv", (sha256, server.url))
        return server

    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    monkeypatch.delenv("NUMPYRO_EBM_DATA", raising=False)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_mnist_has_its_published_sizes():
    # Catches a header that is read with the wrong byte order or offset.
    images, labels = _or_skip(datasets.mnist, False)
    assert images.shape == (10_000, 28, 28)
    assert images.dtype == np.uint8
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_wisconsin_drops_the_rows_with_a_missing_value():
    features, malignant = _or_skip(datasets.breast_cancer_wisconsin)
    assert features.shape == (683, 9)
    assert features.min() == 1
    assert features.max() == 10
    assert np.bincount(malignant).tolist() == [444, 239]


def test_eight_schools_reference_draws_have_their_published_means():
    # Catches draws read in the wrong order: schools and chains exchanged.
    schools = _or_skip(datasets.eight_schools)
    assert schools.draws["theta"].shape == (10, 1000, 8)
    assert schools.draws["mu"].mean() == pytest.approx(4.41, abs=0.01)
    assert schools.draws["tau"].mean() == pytest.approx(3.60, abs=0.01)
    assert schools.draws["theta"].mean((0, 1)).argsort()[[0, -1]].tolist() == [4, 6]


def test_efron_morris_starts_with_clemente():
    batters = _or_skip(datasets.efron_morris)
    assert batters.name[0] == "Roberto Clemente"
    assert (batters.early[0], batters.rest[0], batters.num_rest[0]) == (0.4, 0.346, 367)
    assert len(batters.name) == 18


def test_frey_faces_are_the_frames_of_the_video():
    # Catches images read transposed or out of order: neighboring frames are alike, and so are neighboring pixels.
    images = _or_skip(datasets.frey_faces)
    assert images.shape == (1965, 28, 20)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (8, 238)
    assert images.mean() == pytest.approx(154.461, abs=1e-3)
    frames, pixels = images.astype(float), np.abs(np.diff(images.astype(float), axis=1)).mean()
    assert (
        np.abs(np.diff(frames, axis=0)).mean()
        < 0.5 * np.abs(frames[1:] - frames[np.random.default_rng(0).permutation(1964)]).mean()
    )
    assert pixels < 0.5 * frames.std()


def test_frey_faces_are_read_from_the_original_file_and_checked_by_their_pixels(monkeypatch, tmp_path):
    # Catches the original's columns read as rows, and a changed image read as the data.
    images = _or_skip(datasets.frey_faces)
    original = io.BytesIO()
    savemat(original, {"ff": images.reshape(1965, 560).T})
    monkeypatch.setenv("NUMPYRO_EBM_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"frey_rawface.mat is neither in .* set NUMPYRO_EBM_DATA"):
        datasets.frey_faces()
    (tmp_path / "frey").mkdir(exist_ok=True)
    (tmp_path / "frey" / "frey_rawface.mat").write_bytes(original.getvalue())
    np.testing.assert_array_equal(datasets.frey_faces(), images)
    np.savez(tmp_path / "frey" / "frey_faces.npz", X=images[::-1])
    with pytest.raises(ValueError, match=r"frey_faces.npz is not the file that was tested"):
        datasets.frey_faces()
    np.savez(tmp_path / "frey" / "frey_faces.npz", Y=images)
    with pytest.raises(ValueError, match=r"frey_faces.npz is not the file that was tested, it cannot be read .*remove it"):
        datasets.frey_faces()
    (tmp_path / "frey" / "frey_faces.npz").unlink()
    (tmp_path / "frey" / "frey_rawface.mat").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"frey_rawface.mat is not the file that was tested, it cannot be read .*remove it"):
        datasets.frey_faces()


def test_cifar10_is_read_color_by_color_in_the_order_of_its_batches(monkeypatch, tmp_path):
    # Catches colors or rows read in another order, a label taken for a pixel, and training images given as test images.
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(12, dtype=np.uint8)
    rows = np.concatenate([labels[:, None], *(images[..., color].reshape(12, -1) for color in range(3))], 1)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for i, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = rows[2 * i : 2 * i + 2].nbytes
            archive.addfile(member, io.BytesIO(rows[2 * i : 2 * i + 2].tobytes()))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(packed.getvalue())
    monkeypatch.setenv("NUMPYRO_EBM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is not the file that was tested"):
        datasets.cifar10()
    sha256 = datasets.hashlib.sha256(packed.getvalue()).hexdigest()
    monkeypatch.setitem(datasets.FILES, "cifar10/cifar-10-binary.tar.gz", (sha256, "https://example.org/x.tar.gz"))
    for part, chosen in ((datasets.cifar10(), slice(2, None)), (datasets.cifar10(train=False), slice(2))):
        np.testing.assert_array_equal(part.images, images[chosen])
        np.testing.assert_array_equal(part.labels, labels[chosen])


def test_cifar10_gives_photographs_upright_and_in_color():
    # Catches axes exchanged: neighboring pixels of a photograph are alike, and the sky is above.
    images, labels = _or_skip(datasets.cifar10, False)
    assert images.shape[1:] == (32, 32, 3)
    assert images.dtype == np.uint8
    assert labels[:5].tolist() == [3, 8, 8, 0, 6]
    pixels = images.astype(float)
    assert max(np.abs(np.diff(pixels, axis=axis)).mean() for axis in (1, 2)) < 0.3 * pixels.std()
    assert pixels[:, :4, :, 2].mean() > pixels[:, -4:, :, 2].mean()


def test_file_that_is_nowhere_is_named_with_the_fix(monkeypatch, tmp_path):
    # Catches an error that leaves out one of the two places, the address or the reason.
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    wanted = "small/EfronMorris.csv is neither in $NUMPYRO_EBM_DATA ({}) nor in " + str(tmp_path / "cache")
    for folder in (str(tmp_path), ""):
        monkeypatch.setenv("NUMPYRO_EBM_DATA", folder)
        with pytest.raises(FileNotFoundError, match=re.escape(wanted.format(folder or "which is not set"))) as caught:
            datasets.efron_morris()
        for part in ("no network in tests", "EfronMorris.csv and put it under that name", "set NUMPYRO_EBM_DATA to a folder"):
            assert part in str(caught.value)


def test_download_without_pooch_names_the_extra(monkeypatch, tmp_path):
    # Catches a ModuleNotFoundError for users who have the files of the package alone.
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    monkeypatch.delenv("NUMPYRO_EBM_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(FileNotFoundError, match=r"pooch: pip install 'numpyro_ebm\[examples\]'"):
        datasets.efron_morris()


def test_only_the_two_named_folders_are_looked_in(monkeypatch, tmp_path):
    # Catches a third place that the documentation does not name, and the cache preferred to the folder that was named.
    table = "name,y,p,n\n{},1,1,1\n"
    for folder in ("cache", "named"):
        (tmp_path / folder / "small").mkdir(parents=True)
        (tmp_path / folder / "small" / "EfronMorris.csv").write_text(table.format(folder))
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "_require_checksum", lambda *args: None)
    monkeypatch.setenv("NUMPYRO_EBM_DATA", str(tmp_path / "named"))
    assert datasets.efron_morris().name == ["named"]
    monkeypatch.delenv("NUMPYRO_EBM_DATA")
    assert datasets.efron_morris().name == ["cache"]


def test_file_with_another_checksum_is_refused(monkeypatch, tmp_path):
    # Catches a half-written or changed file that is read as the data.
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "EfronMorris.csv").write_text("name,y,p,n\nNobody,1,1,1\n")
    monkeypatch.setenv("NUMPYRO_EBM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="is not the file that was tested"):
        datasets.efron_morris()


def test_download_is_kept_whole_in_the_cache(serve, tmp_path):
    server = serve(b"name,y,p,n\nSomebody,1,1,1\n")
    assert datasets.efron_morris().name == datasets.efron_morris().name == ["Somebody"]
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["EfronMorris.csv"]
    assert server.num_requests == 1


def test_six_threads_that_fetch_one_file_all_get_it(serve, tmp_path):
    # Catches a temporary file of one name, which the first to finish moves away from under the others.
    serve(b"name,y,p,n\nSomebody,1,1,1\n")
    together = threading.Barrier(6)

    def fetch(_):
        together.wait()
        return datasets.efron_morris().name

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(fetch, range(6))) == [["Somebody"]] * 6
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["EfronMorris.csv"]


def test_download_with_another_checksum_is_refused_and_not_kept(serve, tmp_path):
    # Catches a page of a captive portal kept in the cache as the data.
    serve(b"<html>", sha256="0" * 64)
    with pytest.raises(ValueError, match=r"x.csv is not the file that was tested"):
        datasets.efron_morris()
    assert list((tmp_path / "small").iterdir()) == []

# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Real data of the examples, with checksums.

Files are looked for in the folder that the environment variable ``NUMPYRO_EBM_DATA`` names and in ``~/.cache/numpyro_ebm``; a
file that is in neither is downloaded into the latter, by pooch. A file with another checksum than the one that was tested is
refused.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

CACHE = Path.home() / ".cache" / "numpyro_ebm"

_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/"
_POSTERIORDB = "https://raw.githubusercontent.com/stan-dev/posteriordb/master/posterior_database/"
_FREY = "https://cs.nyu.edu/~roweis/data/frey_rawface.mat"
_FREY_PIXELS = "2438ba4f0d2a6bd8bac43de756141eaa33c8d248dd613d464bdb1210d9b7af78"  # sha256 of the images themselves
# sha256 of the images and labels of 5000 from CIFAR-10: 4000 of the first training batch, 1000 of the test batch
_CIFAR_SUBSET = {
    "cifar10/cifar10_5k_images.npy.xz": "7c5a01b9970b7418e8c9ce7002933f9e1be55695db587fd4ea6da6c1cebdf85f",
    "cifar10/cifar10_5k_labels.npy": "7b9656e3ad53d9841abbe12057fc8843297763d1ecc87d1ca2d97457beb66eb0",
}
_RDATASETS = "https://vincentarelbundock.github.io/Rdatasets/csv/"

# by path in the data folder: sha256, and where the public copy is
FILES = {
    "mnist/train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        _MNIST + "train-images-idx3-ubyte.gz",
    ),
    "mnist/train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        _MNIST + "train-labels-idx1-ubyte.gz",
    ),
    "mnist/t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        _MNIST + "t10k-images-idx3-ubyte.gz",
    ),
    "mnist/t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        _MNIST + "t10k-labels-idx1-ubyte.gz",
    ),
    "cifar10/cifar-10-binary.tar.gz": (
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    ),
    "uci/breast-cancer-wisconsin.data": (
        "402c585309c399237740f635ef9919dc512cca12cbeb20de5e563a4593f22b64",
        _UCI + "breast-cancer-wisconsin/breast-cancer-wisconsin.data",
    ),
    "small/eight_schools_noncentered_draws.json.zip": (
        "0858641e630c877103dba2b78beaf6bc1f39435fc43d2894c4dff5d609c7a264",
        _POSTERIORDB + "reference_posteriors/draws/draws/eight_schools-eight_schools_noncentered.json.zip",
    ),
    "small/EfronMorris.csv": (
        "18859844ec0c0d7fcfb35c1a625a75965750b026ab54cf0de7822d8c1eee33bc",
        _RDATASETS + "pscl/EfronMorris.csv",
    ),
}


class LabeledImages(NamedTuple):
    """Images with their labels."""

    images: np.ndarray  # (num_images, height, width), uint8; with a last axis of three colors if it has colors
    labels: np.ndarray  # (num_images,), uint8


class Patients(NamedTuple):
    """The Wisconsin breast cancer data, without the 16 rows that lack a value."""

    features: np.ndarray  # (683, 9), float64, from 1 to 10
    malignant: np.ndarray  # (683,), int64, 0 or 1


class EightSchools(NamedTuple):
    """Effects of coaching in eight schools, and samples of a full Bayesian analysis (posteriordb, 10 chains of 1000)."""

    effect: np.ndarray  # (8,)
    standard_error: np.ndarray  # (8,)
    draws: dict[str, np.ndarray]  # "theta" (10, 1000, 8), "mu" (10, 1000), "tau" (10, 1000)


class Batters(NamedTuple):
    """Efron and Morris's batters of 1970: hits in 45 at-bats, and the rest of the season."""

    name: list[str]
    early: np.ndarray  # (18,), average over 45 at-bats
    rest: np.ndarray  # (18,), average over the rest of the season
    num_rest: np.ndarray  # (18,), at-bats of the rest


def mnist(train: bool = True) -> LabeledImages:
    """Handwritten digits (LeCun et al. 1998): 60 000 images of 28 x 28 pixels to train on, 10 000 to test on.

    :raises FileNotFoundError: if the files are not found and cannot be downloaded.
    :raises ValueError: if a file has a wrong checksum.
    """
    part = "train" if train else "t10k"
    return LabeledImages(_idx(f"mnist/{part}-images-idx3-ubyte.gz"), _idx(f"mnist/{part}-labels-idx1-ubyte.gz"))


def cifar10(train: bool = True) -> LabeledImages:
    """Photographs of ten kinds of things (Krizhevsky 2009): 50 000 of 32 x 32 pixels to train on, 10 000 to test on.

    A data folder without the archive may hold a subset of 4000 and 1000 as ``cifar10/cifar10_5k_images.npy.xz`` and
    ``cifar10/cifar10_5k_labels.npy``, which is then given. The archive, of 170 MB, is downloaded if neither is there.

    :return: images of ``(num_images, 32, 32, 3)``.
    :raises FileNotFoundError: if the files are not found and cannot be downloaded.
    :raises ValueError: if a file has a wrong checksum.
    """
    archive = "cifar10/cifar-10-binary.tar.gz"
    subset = [(path, sha256) for name, sha256 in _CIFAR_SUBSET.items() if (path := _find(name)) is not None]
    if _find(archive) is None and len(subset) == len(_CIFAR_SUBSET):
        images, labels = (_cifar_subset(path, sha256) for path, sha256 in subset)
        part = slice(None, 4000) if train else slice(4000, None)
        return LabeledImages(images[part], labels[part])
    batches = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    with tarfile.open(fileobj=io.BytesIO(_read(archive))) as files:
        contents = [files.extractfile(f"cifar-10-batches-bin/{batch}.bin").read() for batch in batches]  # type: ignore[union-attr]
    rows = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # a label, and color by color the pixels
    return LabeledImages(np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), rows[:, 0].copy())


def breast_cancer_wisconsin() -> Patients:
    """Nine scores of a biopsy each, and whether the tumor was malignant (Wolberg and Mangasarian 1990).

    :raises FileNotFoundError: if the file is not found and cannot be downloaded.
    :raises ValueError: if the file has a wrong checksum.
    """
    rows = [line.split(",") for line in _read("uci/breast-cancer-wisconsin.data").decode().split()]
    table = np.array([row for row in rows if "?" not in row], float)
    return Patients(table[:, 1:10], (table[:, 10] == 4).astype(int))


def eight_schools() -> EightSchools:
    """Eight schools (Rubin 1981) with the reference samples of posteriordb.

    :raises FileNotFoundError: if the file of the samples is not found and cannot be downloaded.
    :raises ValueError: if it has a wrong checksum.
    """
    archive = zipfile.ZipFile(io.BytesIO(_read("small/eight_schools_noncentered_draws.json.zip")))
    chains = json.loads(archive.read(archive.namelist()[0]))
    theta = np.stack([[chain[f"theta[{j}]"] for j in range(1, 9)] for chain in chains]).transpose(0, 2, 1)
    draws = {"theta": theta, **{name: np.array([chain[name] for chain in chains]) for name in ("mu", "tau")}}
    effect, standard_error = np.array([28.0, 8, -3, 7, -1, 1, 18, 12]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    return EightSchools(effect, standard_error, draws)


def efron_morris() -> Batters:
    """Batting averages of 18 players (Efron and Morris 1975).

    :raises FileNotFoundError: if the file is not found and cannot be downloaded.
    :raises ValueError: if the file has a wrong checksum.
    """
    rows = list(csv.DictReader(io.StringIO(_read("small/EfronMorris.csv").decode())))
    early, rest, num_rest = (np.array([float(row[column]) for row in rows]) for column in ("y", "p", "n"))
    return Batters([row["name"] for row in rows], early, rest, num_rest)


def frey_faces() -> np.ndarray:
    """Brendan Frey's face, 1965 frames of a video of 28 x 20 pixels in their order (Roweis, Saul and Hinton 2001).

    The data folder may hold them as ``frey/frey_faces.npz``, with the images under ``X``, or as the original
    ``frey/frey_rawface.mat``, which is downloaded if neither is there. The checksum is that of the images.

    :return: of shape (1965, 28, 20), uint8.
    :raises FileNotFoundError: if the file is not found and cannot be downloaded.
    :raises ValueError: if the images have a wrong checksum.
    """
    table, original = "frey/frey_faces.npz", "frey/frey_rawface.mat"
    found = _find(table) or _find(original) or _download(original, _FREY, None)
    try:
        images = np.ascontiguousarray(_frey_images(found), np.uint8)
    except Exception as error:  # of a file that is none of its kind, each reader raises what it likes
        raise ValueError(
            f"{found} is not the file that was tested, it cannot be read ({error}): remove it and get it anew."
        ) from error
    _require_checksum(images.tobytes(), _FREY_PIXELS, found)
    return images


def _frey_images(found: Path) -> np.ndarray:
    content = io.BytesIO(found.read_bytes())
    if found.suffix == ".npz":
        return np.load(content)["X"]
    from scipy.io import loadmat  # on first use: slow to import

    return loadmat(content)["ff"].T.reshape(-1, 28, 20)  # one column per frame


def _cifar_subset(path: Path, sha256: str) -> np.ndarray:
    content = path.read_bytes()
    _require_checksum(content, sha256, path)
    return np.load(io.BytesIO(lzma.decompress(content) if path.suffix == ".xz" else content))


def _idx(path: str) -> np.ndarray:
    """An idx file: byte 3 is the number of axes, then their sizes as big-endian int32, then uint8 values."""
    content = gzip.decompress(_read(path))
    ndim = content[3]
    shape = np.frombuffer(content, ">i4", ndim, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _read(path: str) -> bytes:
    """A file with the right checksum."""
    sha256, url = FILES[path]
    found = _find(path) or _download(path, url, sha256)
    content = found.read_bytes()
    _require_checksum(content, sha256, found)
    return content


def _find(path: str) -> Path | None:
    folders = [os.environ.get("NUMPYRO_EBM_DATA"), CACHE]
    return next((Path(folder) / path for folder in folders if folder and (Path(folder) / path).is_file()), None)


def _require_checksum(content: bytes, sha256: str, source: Path | str) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{source} is not the file that was tested, its sha256 is not {sha256}: remove it and get it anew.")


def _download(path: str, url: str, sha256: str | None) -> Path:
    """The file in the cache, whole or not at all, however many processes fetch it at once."""
    target = CACHE / path
    try:
        import pooch  # an extra, which only a download needs

        known = None if sha256 is None else f"sha256:{sha256}"
        return Path(pooch.retrieve(url, known, fname=target.name, path=target.parent))
    except ImportError as error:
        why = "a download needs pooch: pip install 'numpyro_ebm[examples]'"
        raise FileNotFoundError(_nowhere(path, url, why)) from error
    except OSError as error:  # those of requests among them
        raise FileNotFoundError(_nowhere(path, url, f"the download failed ({error})")) from error
    except ValueError as error:
        raise ValueError(f"{url} is not the file that was tested: {error}") from error


def _nowhere(path: str, url: str, why: str) -> str:
    folder = os.environ.get("NUMPYRO_EBM_DATA") or "which is not set"
    return (
        f"{path} is neither in $NUMPYRO_EBM_DATA ({folder}) nor in {CACHE}, and {why}. Get it from {url} and put it under that "
        "name into one of them, or set NUMPYRO_EBM_DATA to a folder that has it."
    )

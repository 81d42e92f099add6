# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest

from numpyro_ebm import datasets


def _or_skip(load, *args):
    try:
        return load(*args)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def unreachable(url, timeout):
        raise OSError("no network in tests")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", unreachable)


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


def test_file_that_is_nowhere_is_named_with_the_mend(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMPYRO_EBM_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "BESIDE", tmp_path)
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"EfronMorris.csv is in none of .* set NUMPYRO_EBM_DATA"):
        datasets.efron_morris()


def test_file_with_another_checksum_is_refused(monkeypatch, tmp_path):
    # Catches a half-written or changed file that is read as the data.
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "EfronMorris.csv").write_text("name,y,p,n\nNobody,1,1,1\n")
    monkeypatch.setenv("NUMPYRO_EBM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="is not the file that was tested"):
        datasets.efron_morris()


def test_download_is_kept_whole_in_the_cache(monkeypatch, tmp_path):
    content = b"name,y,p,n\nSomebody,1,1,1\n"

    class Response:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def read(self):
            return content

    monkeypatch.setattr(datasets.urllib.request, "urlopen", lambda url, timeout: Response())
    monkeypatch.setattr(datasets, "BESIDE", tmp_path / "none")
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    monkeypatch.delenv("NUMPYRO_EBM_DATA", raising=False)
    sha256 = datasets.hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(datasets.FILES, "small/EfronMorris.csv", (sha256, "https://example.org/x.csv"))
    assert datasets.efron_morris().name == ["Somebody"]
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["EfronMorris.csv"]

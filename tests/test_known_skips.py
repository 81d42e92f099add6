# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The option ``--known-skips``, in a run of pytest of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = {
    "test_data.py": "import pytest\ndef test_mnist(): pytest.skip('no data')\ndef test_rest(): pass\n",
    "test_nets.py": "import pytest\npytest.importorskip('a_package_that_is_not_there')\n",
}


@pytest.mark.parametrize(
    ("known", "closing"),
    [
        (["test_data.py::test_mnist", "test_nets.py"], "1 passed, 2 skipped in"),
        (["test_data.py::test_mnist"], "1 error in"),
        (["# test_data.py::test_mnist", "test_nets.py"], "1 failed, 1 passed, 1 skipped in"),
    ],
)
def test_skips_that_are_not_known_fail(tmp_path, known, closing):
    """Catches a list that is not read, one that lets everything pass, and files that are skipped as a whole."""
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    for name, text in TESTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "known").write_text("\n".join(known))
    command = [sys.executable, "-m", "pytest", "--rootdir", tmp_path, "--color=no", "--known-skips", tmp_path / "known", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert closing in run.stdout.splitlines()[-1]
    assert run.returncode == 0 if "failed" not in closing and "error" not in closing else run.returncode > 0

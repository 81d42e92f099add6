# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What all files of tests share: how they are spread over workers, which may be skipped, what is freed after each, and helpers."""

import gc
import importlib.util
from pathlib import Path

import jax
import jaxlib.version
import pytest

import numpyro_ebm

# Where JAX_DISABLE_MOST_OPTIMIZATIONS is set, XLA's emitter of fusions goes too: it takes half of the time that compiling still
# takes. No public setting does so for a part of a process, and later versions of XLA cannot do without their emitter.
if jaxlib.version.__version_info__ < (0, 11):
    from jax._src import compiler

    as_set = compiler.get_compile_options
    CHEAP = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}

    def _compile_options(*args, **kwargs):
        options = as_set(*args, **kwargs)
        if jax.config.read("jax_disable_most_optimizations"):
            options.env_option_overrides = [*options.env_option_overrides, *CHEAP.items()]
        return options

    compiler.get_compile_options = _compile_options


# Thousands of tests make runs of a few steps: those of the report ask for it.
numpyro_ebm.enable_reports(False)


def pytest_addoption(parser):
    parser.addoption("--known-skips", type=Path, metavar="FILE", help="a skipped test fails, unless a line of this file is its id")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file share a worker, and what they compile; those of the engines' contract only with the same engine.

    xdist's own ``--dist loadgroup`` cannot do it: xdist 3.8 renames tests in a way that pytest 9.2 does not see.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFileAndEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            engine = test.partition("[")[2].rstrip("]").partition("-")[0]  # its name comes first
            return f"{file} {engine}" if file.endswith("test_engine_contract.py") else file

    return ByFileAndEngine(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return _failed_if_skipped(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _failed_if_skipped(collector.config, (yield))


def _failed_if_skipped(config, report):
    """Catches tests that a missing file or package leaves out, which nobody would notice among so many."""
    known = config.getoption("--known-skips")
    is_skipped = report.skipped and not hasattr(report, "wasxfail")
    if known and is_skipped and report.nodeid.split("@")[0] not in known.read_text().splitlines():
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr[2]}, but {known} does not name {report.nodeid.split('@')[0]}"
    return report


@pytest.fixture(scope="module", autouse=True)
def _memory_of_one_file():
    """The programs of a file are of no use to the next one, and all together take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def example_nets():
    """``example_nets(name)``: the module of networks of that name beside the examples."""

    def load(name):
        path = Path(__file__).parents[1] / "examples" / "nets" / f"{name}.py"
        if not path.exists():
            pytest.skip("the package is installed without its examples")
        spec = importlib.util.spec_from_file_location(f"{name}_nets", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def optimized():
    """Programs compiled as for users, whatever ``make test`` says: else two that do the same may round otherwise."""
    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    jax.config.update(flag, False)
    yield
    jax.config.update(flag, before)


@pytest.fixture
def double_precision():
    """In double precision errors of rounding are far below those of a wrong formula."""
    with jax.enable_x64(True):
        yield

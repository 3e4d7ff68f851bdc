"""A working folder whose one store the tests of a module share."""

import shutil
from pathlib import Path

import pytest
import told


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory):
    """The working folder; each test has an experiment of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("workspace"))
        yield Path.cwd()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return told.make_results(tmp_path_factory.mktemp("whole") / "results")


@pytest.fixture
def results(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "results")


@pytest.fixture
def experiment(request):
    return request.node.name


@pytest.fixture
def store(experiment):
    """Made when it is asked: the experiment is not there before."""
    return lambda: told.Store(experiment)

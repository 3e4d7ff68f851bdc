"""A working folder whose one store the tests of a module share."""

import shutil
from pathlib import Path

import pytest
import told
from dgmr.track import store as making


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """A store that is made, which takes seconds."""
    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    making.make(database, "unused")
    return database


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory, empty):
    """The working folder; each test has an experiment of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("workspace"))
        shutil.copy(empty, "mlflow.db")
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


@pytest.fixture
def uri(workspace):
    """Of the store, for those who work elsewhere."""
    return f"sqlite:///{workspace}/mlflow.db"

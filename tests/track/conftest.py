"""A working folder whose one store the tests share."""

import shutil

import pytest
import told
from dgmr.track import store as making
from server import server  # noqa: F401 - fixture


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """With a store, which takes seconds to make: MLflow keeps a connection to it all session."""
    folder = tmp_path_factory.mktemp("workspace")
    making.make(folder / "mlflow.db", "unused")
    return folder


@pytest.fixture(scope="module", autouse=True)
def workspace(workplace):
    """The working folder; each test has an experiment of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        yield workplace


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
def store(experiment, uri):
    """Made when it is asked: the experiment is not there before."""
    return lambda: told.Store(experiment, uri)


@pytest.fixture
def uri(workspace):
    """Of the store, for those who work elsewhere."""
    return f"sqlite:///{workspace}/mlflow.db"

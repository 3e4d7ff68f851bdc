from tiny import teacher  # noqa: F401 - a fixture

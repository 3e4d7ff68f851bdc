from tiny import data, features, teacher  # noqa: F401 - fixtures

"""dgmr: prune the redundant MLP neurons of vision transformers, distil what they knew."""

__version__ = "0.1.0"

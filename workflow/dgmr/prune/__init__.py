"""Prune: keep a diverse subset of every MLP's hidden units, drop the rest.

Importing it imports torch.
"""

from dgmr.prune.gram_schmidt import gram_schmidt_order
from dgmr.prune.model import prune_model

__all__ = ["gram_schmidt_order", "prune_model"]

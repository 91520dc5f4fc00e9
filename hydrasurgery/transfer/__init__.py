"""Transfer: train a hybrid to follow its teacher in three stages (align, distil, lengthen)."""

from hydrasurgery.transfer.data import Batch, BatchSource, TokenStream, as_source
from hydrasurgery.transfer.losses import SplitModel, language_loss, relative_error
from hydrasurgery.transfer.recipe import RECIPES, Recipe, Stage, get_recipe
from hydrasurgery.transfer.stages import TransferResult, distill
from hydrasurgery.transfer.start import calibrate
from hydrasurgery.transfer.trainable import addition_names

__all__ = [
    "RECIPES",
    "Batch",
    "BatchSource",
    "Recipe",
    "SplitModel",
    "Stage",
    "TokenStream",
    "TransferResult",
    "addition_names",
    "as_source",
    "calibrate",
    "distill",
    "get_recipe",
    "language_loss",
    "relative_error",
]

"""Every error a user can meet.

Each message says what is wrong, where (the module's or file's name) and what to do.
"""

from __future__ import annotations


class HydraError(Exception):
    """Base of all errors raised on purpose by hydrasurgery."""


class UnsupportedModelError(HydraError):
    """The model has an attention this library cannot cut out (ALiBi, MLA, shared KV, code that bypasses the interface)."""


class PlanError(HydraError):
    """A plan does not fit the model, or its file is not a plan."""


class PassError(HydraError):
    """A pass failed; the message begins with the pass's name and the region's."""


class PreconditionError(PassError):
    """The region is not in the form that a pass requires."""


class PostconditionError(PassError):
    """A pass left the region in a form it promised not to."""


class PipelineError(HydraError):
    """A pipeline string names an unknown pass or option."""


class CheckpointError(HydraError):
    """A checkpoint is incomplete, truncated or of another model."""


class SequenceLengthError(HydraError):
    """A sequence is longer than the model's position limit."""

    @classmethod
    def of(cls, model: str, length: int, limit: int) -> SequenceLengthError:
        """The error of a model that has `limit` positions for a sequence of `length` tokens."""
        return cls(
            f"{model}: the sequence has {length} tokens, the model's position limit is {limit} "
            "(config.max_position_embeddings); give shorter sequences or extend the model's positions first"
        )


class TokenizerError(HydraError):
    """A tokenizer lacks a token that the task needs."""


class DataError(HydraError):
    """A data file is empty or cannot be read as text."""


class ProbeError(HydraError):
    """Scoring has no usable pair: the clean model answers none of them."""


class DivergedError(HydraError):
    """A loss became NaN or infinite; the last good checkpoint is kept."""


class RecipeError(HydraError):
    """A transfer recipe has a field out of range, or its file is not a recipe."""


class CompileError(HydraError):
    """A model's layers could not be compiled; the message says how to run them as they are."""


class OutputError(HydraError):
    """A file or folder cannot be written: no place for it, something there that would be lost, a disk that is full."""


class ExportError(HydraError):
    """A model cannot be written for a target: an op or opset it lacks, a path that exists, a disk that is full."""


class DemoError(HydraError):
    """The demo cannot go on: one of its processes was killed, or a saved hybrid gives other tokens than before."""


class RegionTextError(HydraError):
    """The text of a region cannot be read; the message holds the line."""

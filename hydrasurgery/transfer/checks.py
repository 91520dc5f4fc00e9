"""What must hold of a hybrid, its teacher and a recipe before a run's first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.decoders import check_length, evaluating, vocabulary_size
from hydrasurgery.errors import PlanError
from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.transfer.losses import whole_logits
from hydrasurgery.transfer.recipe import Recipe

_PROBED = 8  # tokens of the batch that the models are tried on
# Wrappers of models by the name of a class among their ancestors, with what to give instead.
WRAPPERS = {
    "DataParallel": "give the model inside, `.module`",
    "DistributedDataParallel": "give the model inside, `.module`",
    "DeepSpeedEngine": "give the model inside, `.module`",
    "FSDPModule": "give a model that is not sharded",
    "FullyShardedDataParallel": "give a model that is not sharded",
    "OptimizedModule": "give the model inside, `._orig_mod`; to compile it in place, call its own `.compile()`",
}


def check_models(hybrid: nn.Module, teacher: nn.Module | None, recipe: Recipe) -> None:
    """Refuse what `distill` cannot train, or would train wrongly.

    Raises:
        PlanError: a model is wrapped, a stage lacks its teacher, the two models hold one tensor, they do not fit each other
            in a way that a stage needs, or several processes train.
    """
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise PlanError(
            f"distill runs in one process, and torch.distributed has {torch.distributed.get_world_size()}, which would all train "
            "on the same batches; call it without torchrun"
        )
    check_bare(hybrid, "hybrid")
    narrow = next((name for name, value in hybrid.named_parameters() if value.dtype == torch.float16), None)
    if narrow is not None:
        raise PlanError(
            f"hybrid: {narrow} is float16, in which AdamW's eps of 1e-8 is 0; train it in float32 (hybrid.float()), with the "
            "recipe's autocast if memory is short. The teacher may be float16"
        )
    if teacher is None:
        needing = [stage.name for stage in recipe.stages if stage.name != "lengthen"]
        if needing:
            raise PlanError(f"stage {needing[0]!r} needs a teacher")
        return
    check_bare(teacher, "teacher")
    if hybrid is teacher:
        raise PlanError("hybrid and teacher are the same object: pass hybrid=rewrite(teacher, plan)")
    _check_apart(hybrid, teacher)
    known = [vocabulary_size(model) for model in (hybrid, teacher)]
    if None not in known and known[0] != known[1]:
        raise PlanError(
            f"{_names(hybrid, teacher)}: the hybrid embeds {known[0]} tokens and the teacher {known[1]}; give the teacher that the "
            "hybrid was rewritten from, with a vocabulary of the same size (resize_token_embeddings)"
        )
    if any(stage.name == "align" for stage in recipe.stages):
        _check_layers(hybrid, teacher)


def check_bare(model: nn.Module, role: str) -> None:
    """Refuse a model that is wrapped, sharded or wears adapters.

    Raises:
        PlanError: naming the module and what to give instead.
    """
    for name, module in model.named_modules():
        where = f"{role}: {name or 'the model'} is a {type(module).__name__}"
        ancestors = {ancestor.__name__ for ancestor in type(module).__mro__}
        if found := sorted(ancestors & WRAPPERS.keys()):
            raise PlanError(f"{where}; {WRAPPERS[found[0]]}")
        if any(ancestor.__module__.partition(".")[0] == "peft" for ancestor in type(module).__mro__):
            raise PlanError(
                f"{where} of PEFT, whose save_pretrained would save the adapter alone; merge the adapter first (merge_and_unload), "
                "and rewrite the merged teacher"
            )
    sharded = next((name for name, value in model.named_parameters() if type(value).__name__ == "DTensor"), None)
    if sharded is not None:
        raise PlanError(f"{role}: {sharded} is sharded over devices (a DTensor); give a model that is not sharded")


def check_run(hybrid: nn.Module, teacher: nn.Module | None, recipe: Recipe, inputs: Mapping[str, Any]) -> None:
    """Try both models on the first tokens of a batch, as the recipe will run them.

    Args:
        hybrid, teacher: the models; nothing of them is changed.
        recipe: what will be run.
        inputs: arguments of the models' forward, `input_ids` [B, T] among them.

    Raises:
        SequenceLengthError: a stage's sequences are longer than a model's positions reach.
        PlanError: a model cannot be run so, or their logits or hidden states do not fit each other.
    """
    models = [model for model in (hybrid, teacher) if model is not None]
    check_length(models, max(stage.length for stage in recipe.stages))
    size = tuple(inputs["input_ids"].shape)
    few = {
        name: value[:1, :_PROBED] if isinstance(value, Tensor) and tuple(value.shape[:2]) == size else value
        for name, value in inputs.items()
    }
    widths = []
    for model, role in ((hybrid, "hybrid"), (teacher, "teacher")):
        if model is not None:
            widths.append(_try(model, role, few, recipe))
    if len(widths) == 2 and widths[0] != widths[1] and any(stage.name == "distil" for stage in recipe.stages):
        raise PlanError(
            f"{_names(hybrid, teacher)}: the hybrid gives {widths[0]} logits and the teacher {widths[1]}; stage 'distil' needs "
            "equal vocabularies"
        )


def _try(model: nn.Module, role: str, inputs: Mapping[str, Any], recipe: Recipe) -> int:
    """Run a model on few tokens; returns the width of its logits."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), _last_called(model) as called, autocast(recipe.autocast, device):
        try:
            return whole_logits(model, inputs).shape[-1]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise PlanError(
                f"{role}: {type(model).__name__} cannot be run on the data's {', '.join(inputs)} ({called[-1]}: {error}); "
                f"{_mixture(model)}give columns that its forward takes, and one dtype throughout or a recipe with autocast"
            ) from error


@contextlib.contextmanager
def _last_called(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the modules that were called, in order."""
    called = [type(model).__name__]
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_pre_hook(lambda _module, _args, name=name: called.append(name))
                hooks.callback(handle.remove)
        yield called


def _mixture(model: nn.Module) -> str:
    """In words, that a model has parameters of several dtypes, with one of each."""
    found: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(parameter.dtype, name)
    return "" if len(found) < 2 else f"{' and '.join(f'{name} is {dtype}' for dtype, name in found.items())}; "


def _check_apart(hybrid: nn.Module, teacher: nn.Module) -> None:
    """Refuse models that hold one tensor: training the one would train the other."""
    held = {_storage(parameter): name for name, parameter in teacher.named_parameters()}
    for name, parameter in hybrid.named_parameters():
        if _storage(parameter) in held:
            raise PlanError(
                f"{name} of the hybrid is the teacher's {held[_storage(parameter)]}, one tensor in both models, so that training "
                "the one trains the other; pass hybrid=rewrite(teacher, plan), or a copy.deepcopy of it"
            )


def _storage(parameter: nn.Parameter) -> int:
    """What tells tensors apart that do not alias each other; lazy copies do not."""
    return parameter.untyped_storage()._cdata if parameter.layout == torch.strided else id(parameter)


def _check_layers(hybrid: nn.Module, teacher: nn.Module) -> None:
    """Stage align runs every layer of the hybrid on what the teacher's layer of the same name sees."""
    modules, found = dict(teacher.named_modules()), region_modules(hybrid)
    for name in found:
        if name not in modules:
            raise PlanError(f"{name} is a region of the hybrid, but the teacher has no module of that name")
    kinds = {type(modules[name]) for name in found}
    more = [name for name, module in modules.items() if type(module) in kinds and name not in found]
    if more:
        raise PlanError(
            f"{more[0]} of the teacher has no layer in the hybrid, which has {len(found)}: stage 'align' needs equal layers"
        )
    for name, region in found.items():
        ours, theirs = (dict(m.named_parameters()) for m in (region, modules[name]))
        for key in sorted(ours.keys() & theirs.keys()):
            if ours[key].ndim > 1 and ours[key].shape[-1] != theirs[key].shape[-1]:
                raise PlanError(
                    f"{name}.{key} is {list(ours[key].shape)} in the hybrid, {list(theirs[key].shape)} in the teacher: stage "
                    "'align' needs layers of one width"
                )


def _names(hybrid: nn.Module, teacher: nn.Module | None) -> str:
    return f"{type(hybrid).__name__} and {type(teacher).__name__}"


def autocast(dtype: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype`, if one is named, on the device's kind."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=getattr(torch, dtype))

"""What every part needs to know of a decoder: its layers, how it is called and held still, its modes, and how much it can take."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.errors import CheckpointError, PlanError, SequenceLengthError
from hydrasurgery.records import Count, read_value


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside the block every submodule is in eval mode; after it, also after an error, each is back in its own.

    A module that is part of several models, or occurs several times in one, comes back to the mode it had at first.

    Args:
        models: any number of modules.

    Example:
        >>> student, teacher = nn.Dropout(), nn.Dropout().eval()
        >>> with evaluating(student, teacher):
        ...     student.training, teacher.training
        (False, False)
        >>> student.training, teacher.training
        (True, False)
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def running(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside the block each module runs the function given for it in the place of its `forward`.

    The modules' hooks still run. After the block, also after an error, each module's own `forward` is back, even one that was set
    on the object.

    Args:
        forwards: for each module, a function that is called with what its `forward` would be.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with running({layer: lambda x: x + 1}):
        ...     layer(torch.zeros(2))
        tensor([1., 1.])
    """
    own = [(vars(module), vars(module).get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for attributes, before in own:
            if before is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = before


@contextlib.contextmanager
def standing_still(*modules: nn.Module, output: Any) -> Iterator[None]:
    """Inside the block a call of any of the modules computes nothing and returns `output`; see `running`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with standing_still(model[0], output=torch.tensor([-1.0, 3.0])):
        ...     model(torch.zeros(2))
        tensor([0., 3.])
    """
    with running(dict.fromkeys(modules, lambda *_args, **_kwargs: output)):
        yield


def list_member(model: nn.Module, name: str) -> str:
    """The path of the member of the innermost module list that the module `name` stands in; "" if it stands in none.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> list_member(load_teacher()[0], "model.layers.3.self_attn")
        'model.layers.3'
    """
    while name:
        above = name.rpartition(".")[0]
        if isinstance(model.get_submodule(above), nn.ModuleList):
            return name
        name = above
    return ""


def decoder_layers(model: nn.Module, attention: Iterable[str]) -> list[nn.Module]:
    """The layers that a decoder runs one after another: all members of the module lists that its attention modules stand in.

    Args:
        model: a decoder.
        attention: paths of attention modules; those that the model does not have are left out.

    Returns:
        Each layer once, in order; nothing if no attention module stands in a list.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> len(decoder_layers(load_teacher()[0], ["model.layers.3.self_attn"]))
        8
    """
    known = dict(model.named_modules())
    members = [list_member(model, name) for name in attention if name in known]
    lists = dict.fromkeys(known[member.rpartition(".")[0]] for member in members if member)
    return list(dict.fromkeys(layer for each in lists for layer in each.children()))


def takes(model: nn.Module, option: str) -> bool:
    """Whether the model's `forward` names an argument `option`.

    Example:
        >>> from transformers import Qwen3ForCausalLM
        >>> takes(Qwen3ForCausalLM, "logits_to_keep"), takes(nn.Linear(2, 2), "logits_to_keep")
        (True, False)
    """
    return option in inspect.signature(model.forward).parameters


def understands(model: nn.Module, option: str) -> bool:
    """Whether an option may be given: `forward` names it, or takes any and is that of a transformers model.

    Example:
        >>> from transformers import Qwen3ForCausalLM
        >>> understands(Qwen3ForCausalLM, "position_ids"), understands(nn.Linear(2, 2), "position_ids")
        (True, False)
    """
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return option in parameters or (anything and hasattr(model, "config"))


def run_model(model: nn.Module, input_ids: Tensor, **options: Any) -> Any:
    """Call a decoder on `input_ids` [B, T] on its own device, without a cache where it knows of one.

    Args:
        model: A decoder of transformers, or a plain module whose first argument is the tokens, whatever it calls them.
        options: Further arguments of its `forward`.

    Returns:
        What the model gives: an output object, a tuple or a tensor.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, tokenizer = load_teacher()
        >>> run_model(model, torch.ones(1, 5, dtype=torch.long)).logits.shape == (1, 5, len(tokenizer))
        True
    """
    if understands(model, "use_cache"):
        options = {"use_cache": False, **options}
    return model(input_ids.to(_device(model, input_ids)), **options)


def logits_at(model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Logits [B, P, vocabulary] at some positions; the model's head runs on those only where the model can do so.

    Args:
        model: As in `run_model`; its output is the logits, holds them as `.logits`, or is a tuple that begins with them.
        input_ids: [B, T], no padding.
        positions: [P] int64, from 0 to T - 1.
        position_ids: [B, T], for tokens whose places are not 0 to T - 1; left out for a model that takes none.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, tokenizer = load_teacher()
        >>> input_ids = torch.ones(1, 5, dtype=torch.long)
        >>> logits_at(model, input_ids, torch.tensor([4])).shape == (1, 1, len(tokenizer))
        True
    """
    wanted = {"position_ids": position_ids, "logits_to_keep": positions.to(_device(model, input_ids))}
    options = {name: value for name, value in wanted.items() if value is not None and understands(model, name)}
    out = run_model(model, input_ids, **options)
    logits = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
    return logits if logits.shape[1] == len(positions) else logits[:, positions.to(logits.device)]


def text_config(model: nn.Module) -> Any:
    """The config of the part that reads text: `model.config`, or the one in it; None for a plain module.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> text_config(load_teacher()[0]).num_hidden_layers
        8
    """
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def end_tokens(model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a text, as the model's generation config says; none where it has none.

    Raises:
        CheckpointError: they are no token ids.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> end_tokens(load_teacher()[0])
        (706,)
    """
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if ids is None else ids if isinstance(ids, (list, tuple)) else [ids]
    where = f"{type(model).__name__}: eos_token_id of generation_config.json"
    return read_value(tuple[Count, ...], ids, where, CheckpointError)


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence, in tokens, that the model's positions are made for; None where it states no limit.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> position_limit(load_teacher()[0])
        4096
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None


def check_length(models: Sequence[nn.Module], length: int) -> None:
    """Refuse sequences that a model has too few positions for.

    Args:
        models: Every model that the sequences will be given to.
        length: Tokens of the longest sequence.

    Raises:
        SequenceLengthError: `length` is above a model's `position_limit`; the message names both numbers.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> check_length([load_teacher()[0]], 4097)
        Traceback (most recent call last):
        ...
        hydrasurgery.errors.SequenceLengthError: Qwen3ForCausalLM: the sequence has 4097 tokens, ...
    """
    for model in models:
        limit = position_limit(model)
        if limit is not None and length > limit:
            raise SequenceLengthError.of(type(model).__name__, length, limit)


def vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids the model knows: rows of its input embedding, or what its config says; None if neither is there.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, tokenizer = load_teacher()
        >>> vocabulary_size(model) == len(tokenizer)
        True
    """
    if hasattr(model, "get_input_embeddings"):
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        return embedding.weight.shape[0]
    return getattr(text_config(model), "vocab_size", None)


def check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse two models whose next-token distributions cannot be compared, as far as they say how many tokens they know.

    Raises:
        PlanError: they know different numbers of tokens.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, _ = load_teacher()
        >>> check_vocabularies(model, model)
    """
    ours, theirs = vocabulary_size(student), vocabulary_size(teacher)
    if None not in (ours, theirs) and ours != theirs:
        raise PlanError(
            f"{type(student).__name__} embeds {ours} tokens and its teacher, a {type(teacher).__name__}, {theirs}; give the "
            "teacher that it was rewritten from, with a vocabulary of the same size"
        )


def _device(model: nn.Module, input_ids: Tensor) -> torch.device:
    """Where the model's parameters are; where the tokens are for a model without any."""
    return next((parameter.device for parameter in model.parameters()), input_ids.device)

"""Classes of hybrids, made on demand of a model's and a config's own, so that a hybrid is built, saved and loaded like its base.

A hybrid's config is of a subclass of its base's config class and holds the surgery, its plan and pipeline. Its model is of a
subclass of its base's model class, of the same name, which builds the base and then runs the pipeline over it: on the empty
model where `from_pretrained` does so, before the weights are read from safetensors. The Auto classes in which the base stands
know these subclasses. Nothing in a checkpoint is executed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import output_capturing

from hydrasurgery.errors import CheckpointError, HydraError, PipelineError, UnsupportedModelError
from hydrasurgery.inference import graphs
from hydrasurgery.ir.interface import use_reach
from hydrasurgery.ir.region import RegionModule
from hydrasurgery.ir.stitch import region_modules, regions
from hydrasurgery.passes import parse
from hydrasurgery.placement import check_placed, check_request
from hydrasurgery.plan import Plan
from hydrasurgery.quantized import keep_plain
from hydrasurgery.stored import KEY, json_text, unstored
from hydrasurgery.surgery import apply_plan
from hydrasurgery.trust import check_shards

# Where transformers looks up what belongs to a config class, besides models.
OTHER_MAPPINGS = {
    "tokenization_auto": "TOKENIZER_MAPPING",
    "processing_auto": "PROCESSOR_MAPPING",
    "image_processing_auto": "IMAGE_PROCESSOR_MAPPING",
    "video_processing_auto": "VIDEO_PROCESSOR_MAPPING",
    "feature_extraction_auto": "FEATURE_EXTRACTOR_MAPPING",
}


class HybridConfig:
    """A base model's config with the surgery, `hydrasurgery`: {"plan": the plan as JSON data, "pipeline": its passes}.

    Its `model_type` is the base's, by which tools know what the model is like; `hydrasurgery.stored` has the form of the file.
    """

    base: Any  # the config class that it extends
    hydrasurgery: Any

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        values, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return unstored(values, _source(args, kwargs)), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        source = str(kwargs.get("name_or_path") or "config")
        values = unstored(config_dict, source)
        kind = values.get("model_type", cls.base.model_type)
        if kind != cls.base.model_type:
            own = config_class_of(kind, source)
            if _has_models_of(own.base, cls.base):  # internlm3 is a llama with a config of its own
                return own.from_dict(values, **kwargs)
            raise CheckpointError(
                f"{source}: is a hybrid of a model of type {kind!r}, not {cls.base.model_type!r}; load it with an Auto class"
            )
        return super().from_dict(values, **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        return json_text(super().to_json_string(use_diff))  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, super().__reduce_ex__(protocol))


class HybridModel:
    """A model of the class that it extends whose config holds a surgery."""

    base: Any  # the model class that it extends

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not isinstance(config, HybridConfig):
            raise CheckpointError(
                f"{type(self).__name__}: the config holds no surgery; build the model with {self.base.__module__}."
                f"{self.base.__name__}, and rewrite it"
            )
        if not region_modules(self):  # type: ignore[arg-type]  # else a part was built as a hybrid by an Auto class
            _operate(self, config.hydrasurgery)
        _settle(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        check_request(cls.__name__, kwargs)
        check_shards(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        kwargs.setdefault("use_safetensors", True)
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        added = {
            f"{name}.hydra.{key}" for name, m in region_modules(model).items() for key, _ in m.hydra.named_parameters()
        }
        if lacking & added:
            raise CheckpointError(
                f"{cls.__name__}: the checkpoint lacks {min(lacking & added)} (or holds it in another shape); save the hybrid "
                "again with save_pretrained"
            )
        check_placed(model)
        for module in region_modules(model).values():
            module._original = (None,)  # type: ignore[assignment]  # it holds tensors of the empty model
        return (model, report) if output_loading_info else model

    _is_stateful = (
        True  # transformers' word for models that cannot take tokens back, and so have no assisted generation
    )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: what `generate_batch` and `cache_implementation="paged"` call before they compute anything."""
        raise UnsupportedModelError(
            f"{type(self).__name__}: a hybrid's recurrent states have no pages, so there is no continuous batching "
            "(generate_batch, cache_implementation='paged'); call generate with a padded batch"
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """On CUDA, a call of `generate` that asks for no cache of its own gets a static one, for decoding by CUDA graphs.

        Long prompts are computed in pieces, whose activations are all that is held at once.
        """
        given = any(model_kwargs.get(name) is not None for name in ("past_key_values", "cache_params"))
        plain = generation_mode in ("greedy_search", "sample", "beam_search", "beam_sample")
        asked = generation_config.cache_implementation or generation_config.disable_compile or not plain
        if self.device.type == "cuda" and generation_config.use_cache and not (given or asked):  # type: ignore[attr-defined]
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            reason = graphs.why_not(self, rows, max_cache_length)
            if reason is None:
                generation_config.cache_implementation = "static"
            else:
                graphs.say(reason)
            if generation_config.prefill_chunk_size is None and max_cache_length > graphs.CHUNK:
                generation_config.prefill_chunk_size = graphs.CHUNK
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Of the length asked for, where nothing was compiled for another; without buffers made in advance for the keys of all
        heads."""
        if "prefill_chunk_size" in kwargs:
            kwargs["prefill_chunk_size"] = None
        if not hasattr(
            self, "_compiled_call"
        ):  # transformers' own memory of the longest call, which saves compilations
            vars(self).pop("_previous_max_cache_length", None)
        return super()._prepare_static_cache(*args, **kwargs)  # type: ignore[misc]

    def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
        valid: bool = super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]
        if valid and self._steps_by_graph(generation_config.compile_config):
            reason = graphs.why_not_with(self, model_kwargs.get("past_key_values"))
            if reason is not None:
                graphs.say(reason)
            return reason is None
        return valid

    def _steps_by_graph(self, compile_config: Any) -> bool:
        return compile_config is None and self.device.type == "cuda"  # type: ignore[attr-defined,no-any-return]

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What `generate` calls for every token after the first: a step by CUDA graph, or what `compile_config` asks for."""
        if self._steps_by_graph(compile_config):
            return graphs.StepGraph(self.__call__)  # type: ignore[operator]
        return super().get_compiled_call(compile_config)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        record_passes(self)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: Any) -> None:
        """Called for what the files do not hold: buffers of a region are made by what its base model does for its attention."""
        original: Any = module.original if isinstance(module, RegionModule) else module
        if original is None:
            return
        if original is not module:
            for own, others in ((original._parameters, module._parameters), (original._buffers, module._buffers)):
                own.update({key: value for key, value in others.items() if key in own})
        super()._init_weights(original)  # type: ignore[misc]
        if original is not module:
            module._buffers.update({key: value for key, value in original._buffers.items() if key in module._buffers})

    @classmethod
    def is_custom_code(cls) -> bool:
        return cls.base.is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.base._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.base._can_set_experts_implementation()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, super().__reduce_ex__(protocol))


# --- making classes ---------------------------------------------------------------------------------------------------


@functools.cache
def _config_class(base: Any) -> Any:
    # The constructor is the base's: that of a new dataclass would not be what a base with a constructor of its own has.
    members = {"__init__": base.__init__, "__doc__": base.__doc__, "__module__": __name__, "base": base}
    return type(f"Hybrid{base.__name__}", (HybridConfig, base), members)


@functools.cache
def _model_class(base: Any) -> Any:
    members = {"__doc__": base.__doc__, "__module__": __name__, "base": base}
    if base.config_class is not None:
        members["config_class"] = _config_class(base.config_class)
    made = type(base.__name__, (HybridModel, base), members)
    # What it records (hidden states) transformers looks up by the class's name, which only the constructor tells it.
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(made), base._can_record_outputs)
    return made


def model_class(base: Any) -> Any:
    """The class of hybrids of the model class `base`: itself if it is one."""
    return base if issubclass(base, HybridModel) else _model_class(base)


def config_class(base: Any) -> Any:
    """The class of hybrids' configs of the config class `base`, known to every Auto class that knows `base`."""
    if issubclass(base, HybridConfig):
        return base
    new = _config_class(base)
    for mapping in _mappings():
        if base in mapping:
            found = mapping[base]
            known = tuple(_of_hybrids(cls, base) for cls in _each(found))
            ours = tuple(cls for cls in known if cls is not None)
            if ours:
                mapping.register(new, ours if isinstance(found, (tuple, list)) else ours[0], exist_ok=True)
    return new


def config_class_of(model_type: str, source: str) -> Any:
    """The class of hybrids' configs of a model type; CheckpointError, naming `source`, if transformers knows no such type."""
    known: Any = transformers.CONFIG_MAPPING
    if model_type not in known or model_type == KEY:
        raise CheckpointError(
            f"{source}: is a hybrid of a model of type {model_type!r}, which transformers {transformers.__version__} does not "
            "know; install a version that does, or register the model with the Auto classes"
        )
    return config_class(known[model_type])


def _mappings() -> Iterator[Any]:
    """The tables of transformers that have something for a config class."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for cls in vars(auto).values():
        if isinstance(cls, type) and issubclass(cls, auto._BaseAutoModelClass):
            mapping = vars(cls).get("_model_mapping")
            if mapping is not None:
                yield mapping
    for module, name in OTHER_MAPPINGS.items():
        yield getattr(importlib.import_module(f"transformers.models.auto.{module}"), name)


def _of_hybrids(cls: Any, config: Any) -> Any:
    """What stands for `cls` in a table of hybrids: tokenizers and the like stay; None for a part that has a config of its own."""
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        return None if cls.config_class in config.sub_configs.values() else model_class(cls)
    return cls


def _has_models_of(one: Any, other: Any) -> bool:
    """Whether models with a config of class `one` are of a class made for configs of class `other`."""
    found = (cls for mapping in _mappings() if one in mapping for cls in _each(mapping[one]))
    return other not in one.sub_configs.values() and any(getattr(cls, "config_class", None) is other for cls in found)


def _each(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _reduced(thing: Any, reduced: Any) -> Any:
    """What pickle makes of an object, with the base's class in the place of one that is made on demand."""
    maker, (cls, *rest), *state = reduced
    return (_made, (maker, cls.base, *rest), *state)


def _made(maker: Any, base: Any, *rest: Any) -> Any:
    return maker(config_class(base) if issubclass(base, PreTrainedConfig) else model_class(base), *rest)


def __getattr__(name: str) -> Any:
    """The class of hybrids of a class of transformers, by its name: what pickle and PEFT look up."""
    base = None if name.startswith("_") else getattr(transformers, name.removeprefix("Hybrid"), None)
    if isinstance(base, type) and issubclass(base, PreTrainedModel) and base.__name__ == name:
        return model_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedConfig) and f"Hybrid{base.__name__}" == name:
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- the surgery of a model -------------------------------------------------------------------------------------------


def mark(hybrid: Any, plan: Plan, pipeline: str) -> None:
    """Make what was rewritten, if it is a model of transformers, a hybrid whose config holds the surgery."""
    config = getattr(hybrid, "config", None)
    if isinstance(hybrid, PreTrainedModel) and isinstance(config, PreTrainedConfig):
        keep_plain(hybrid)
        config.__class__ = config_class(type(config))
        config.hydrasurgery = {"plan": plan.to_dict(), "pipeline": pipeline}  # type: ignore[attr-defined]
        if hasattr(config, "auto_map"):  # code of the base model's checkpoint, which is not that of a hybrid
            del config.auto_map
        hybrid.__class__ = model_class(type(hybrid))
        _settle(hybrid)


def unmark(model: Any) -> None:
    """Make a hybrid a model of its base's class again."""
    for changed, implementation in vars(model).pop("_dense_masks", ()):
        changed._attn_implementation = implementation
    for module in model.modules():
        if isinstance(module, HybridModel):
            module.__class__ = module.base
    config: Any = getattr(model, "config", None)
    if isinstance(config, HybridConfig):
        del config.hydrasurgery
        config.__class__ = config.base


def record_passes(model: Any) -> None:
    """Add the passes that ran over a hybrid's regions since the rewrite to the pipeline of its config.

    Raises:
        CheckpointError: they did not run over all regions, or loading would not know one of them; or `model` is a part of a
            hybrid, with a config of its own.
    """
    name = type(model).__name__
    if not isinstance(model.config, HybridConfig):
        raise CheckpointError(f"{name}: is a part of a hybrid, whose config holds no plan; save the whole hybrid")
    found = regions(model)
    later = {region.later: region.name for region in found}
    if not any(later):
        return
    if len(later) > 1:
        raise CheckpointError(
            f"{', '.join(later.values())}: passes ran over some regions only ({'; '.join(map(','.join, later))}), which a "
            "checkpoint cannot repeat; run them over hydrasurgery.regions(hybrid), or save with pickle"
        )
    (steps,) = later
    try:
        parse(",".join(steps))
    except PipelineError as error:
        raise CheckpointError(f"{name}: a pass that ran on it cannot be run at loading: {error}") from error
    surgery = model.config.hydrasurgery
    model.config.hydrasurgery = {**surgery, "pipeline": ",".join((surgery["pipeline"], *steps))}
    for region in found:
        region.later = ()


def _operate(model: Any, surgery: dict[str, Any]) -> None:
    """Run a surgery over a model that was just built."""
    try:
        apply_plan(model, _fitted(Plan.from_dict(surgery["plan"]), model), surgery["pipeline"])
    except HydraError as error:
        raise CheckpointError(f"{type(model).__name__}: the surgery in its config does not fit it: {error}") from error


def _fitted(plan: Plan, model: Any) -> Plan:
    """The plan with layers by their names in `model`, which may be the base model of the plan's (as in `AutoModel`) or hold it."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    names = [layer.name for layer in plan.layers]
    for other in (names, [name.removeprefix(prefix) for name in names], [f"{prefix}{name}" for name in names]):
        if all(name in modules for name in other):
            return replace(plan, layers=tuple(map(_renamed, plan.layers, other)))
    return plan


def _renamed(layer: Any, name: str) -> Any:
    return replace(layer, name=name)


def _settle(model: Any) -> None:
    """Make hybrids of the models inside that hold regions: transformers asks each for its part of building and saving.

    They make masks as structure where every region takes them so.
    """
    found = region_modules(model).values()
    if all(module.region.takes_reach for module in found) and (before := use_reach(found)):
        vars(model)["_dense_masks"] = before
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, HybridModel) and region_modules(module):
            module.__class__ = model_class(type(module))


def _source(args: Any, kwargs: Any) -> str:
    return str(args[0] if args else kwargs.get("pretrained_model_name_or_path", "config"))

"""How a hybrid lies on disk and is loaded: by every way of transformers, never as another model, never by running code."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hydrasurgery as hs
from hydrasurgery import stored
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.errors import CheckpointError, UnsupportedModelError
from hydrasurgery.loading import load_model
from hydrasurgery.trust import check_config
from tests.families import SMALL, tiny
from tests.test_families import half_plan, stir

IDS = torch.arange(3, 35).view(2, 16)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(ids, use_cache=False).logits


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).last_hidden_state


def hybrid_of(model: Any) -> Any:
    return stir(hs.rewrite(model, half_plan(model))).eval()


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return hybrid_of(tiny("qwen3"))


@pytest.fixture(scope="module")
def folder(hybrid: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    hybrid.save_pretrained(path)
    return path


@pytest.fixture
def tampered(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder, with other entries in its config.json."""

    def tamper(**entries: Any) -> Path:
        path = shutil.copytree(folder, tmp_path / "tampered", dirs_exist_ok=True)
        values = json.loads((folder / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**values, **entries}))
        return path

    return tamper


# --- ways to load -----------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "auto": lambda hybrid, folder: AutoModelForCausalLM.from_pretrained(folder),
    "class": lambda hybrid, folder: type(hybrid).from_pretrained(folder),
    "config": lambda hybrid, folder: AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder)
    ),
    "state dict": lambda hybrid, folder: type(hybrid).from_pretrained(
        None, config=hybrid.config, state_dict=hybrid.state_dict()
    ),
    "device map": lambda hybrid, folder: AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype="auto"),
    "load_model": lambda hybrid, folder: load_model(folder),
    "deepcopy": lambda hybrid, folder: copy.deepcopy(hybrid),
    "pickle": lambda hybrid, folder: pickle.loads(pickle.dumps(hybrid)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_hybrid(way: str, hybrid: Any, folder: Path) -> None:
    loaded = WAYS[way](hybrid, folder)
    assert type(loaded) is type(hybrid)
    assert type(loaded.config) is type(hybrid.config)
    assert loaded.config.hydrasurgery == hybrid.config.hydrasurgery
    assert torch.equal(logits(loaded), logits(hybrid))


def test_a_hybrid_built_from_its_config_takes_the_weights(hybrid: Any, folder: Path) -> None:
    for config in (hybrid.config, AutoConfig.from_pretrained(folder)):
        built: Any = AutoModelForCausalLM.from_config(config)
        assert len(hs.region_modules(built)) == 2
        built.load_state_dict(hybrid.state_dict())
        assert torch.equal(logits(built), logits(hybrid))


def test_the_base_model_of_a_causal_hybrid_and_the_reverse(hybrid: Any, folder: Path, tmp_path: Path) -> None:
    base: Any = AutoModel.from_pretrained(folder)
    assert type(base).__name__ == "Qwen3Model"
    assert torch.equal(states(base), states(hybrid.model))
    base.save_pretrained(tmp_path / "base")
    hybrid.model.save_pretrained(tmp_path / "inner")
    for name in ("base", "inner"):
        assert torch.equal(states(AutoModel.from_pretrained(tmp_path / name)), states(base))
        causal: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(states(causal.model), states(base))


def test_a_task_head_on_a_hybrid(hybrid: Any, folder: Path, tmp_path: Path) -> None:
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(states(classifier.model), states(hybrid.model))
    classifier.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, IDS[:1]), logits(classifier, IDS[:1]))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text", "opt", "mixtral", "persimmon"])
def test_tensors_that_files_do_not_hold_are_made_at_loading(family: str, tmp_path: Path) -> None:
    hybrid = hybrid_of(tiny(family))
    hybrid.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(hybrid))
    buffers = dict(hybrid.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for name, module in loaded.named_modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)], name


@pytest.mark.parametrize(
    ("family", "rope"),
    [("phi3", "longrope"), ("llama", "longrope"), ("qwen3", "dynamic"), ("llama", "yarn")],
)
def test_rotary_embeddings_that_depend_on_the_length(family: str, rope: str, tmp_path: Path) -> None:
    options = {
        "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    }[rope]
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **options}
    more = {"original_max_position_embeddings": 16} if family == "phi3" else {}
    hybrid = hybrid_of(tiny(family, rope_parameters=parameters, **more))
    hybrid.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for length in (8, 40, 8):
        ids = torch.arange(3, 3 + length)[None]
        assert torch.equal(logits(loaded, ids), logits(hybrid, ids)), length


def test_capture_leaves_no_trace_in_a_rotary_embedding() -> None:
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model: Any = tiny("llama", rope_parameters={**parameters, "original_max_position_embeddings": 16})
    before = set(vars(model.model.rotary_emb))
    hs.capture(model)
    assert set(vars(model.model.rotary_emb)) == before


@torch.no_grad()
def test_a_text_decoder_inside_a_multimodal_model(tmp_path: Path) -> None:
    text = {**SMALL, "query_pre_attn_scalar": 16, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, image_token_index=95
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    hybrid: Any = hs.rewrite(model, half_plan(model))
    hybrid.save_pretrained(tmp_path)
    loaded = type(hybrid).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(hybrid))
    assert torch.equal(states(AutoModel.from_pretrained(tmp_path)), states(hybrid.model))
    with pytest.raises(CheckpointError, match="part of a hybrid"):
        hybrid.model.language_model.save_pretrained(tmp_path / "part")


class OwnConfig(Qwen3Config):
    """A config class outside of transformers, with a constructor of its own."""

    model_type = "own_decoder"

    def __init__(self, extra: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig


def test_a_model_class_outside_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hybrid = hybrid_of(OwnModel(OwnConfig(extra=5, **SMALL)))
    hybrid.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="'own_decoder', which transformers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoConfig.register("own_decoder", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnModel)
    for loaded in (
        type(hybrid).from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(hybrid)),
    ):
        assert isinstance(loaded, OwnModel)
        assert loaded.config.extra == 5
        assert torch.equal(logits(loaded), logits(hybrid))


# --- what lies on disk ------------------------------------------------------------------------------------------------


def test_the_file_is_a_form_of_its_own_and_the_object_is_like_its_base(hybrid: Any, folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "hydrasurgery"
    assert values["hydrasurgery"]["base"]["model_type"] == "qwen3"
    assert values["architectures"] == ["Qwen3ForCausalLM"]
    assert (values["hidden_size"], values["tie_word_embeddings"]) == (64, stored.ADVICE)
    assert "quantization_config" not in values
    config = AutoConfig.from_pretrained(folder)
    for read in (config, hybrid.config):
        assert isinstance(read, Qwen3Config)
        assert (read.model_type, read.to_dict()["model_type"]) == ("qwen3", "qwen3")
        assert (read.tie_word_embeddings, read.eos_token_id) == (False, 2)
    assert isinstance(hybrid, Qwen3ForCausalLM)
    assert type(hybrid).__name__ == "Qwen3ForCausalLM"


def test_configs_come_back_as_they_were(hybrid: Any, tmp_path: Path) -> None:
    config = hybrid.config
    config.save_pretrained(tmp_path)
    for again in (
        AutoConfig.from_pretrained(tmp_path),
        type(config).from_pretrained(tmp_path),
        type(config).from_dict(config.to_dict()),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert type(again) is type(config)
        assert json.loads(again.to_json_string()) == json.loads(config.to_json_string())
    assert pickle.loads(pickle.dumps(type(hybrid))) is type(hybrid)
    assert pickle.loads(pickle.dumps(type(config))) is type(config)


def test_shards_variants_and_repeated_saves(hybrid: Any, tmp_path: Path) -> None:
    hybrid.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len([*(tmp_path / "sharded").glob("model-*.safetensors")]) > 1
    hybrid.save_pretrained(tmp_path / "variant", variant="half")
    sharded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    variant: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", variant="half")
    sharded.save_pretrained(tmp_path / "again")
    for loaded in (sharded, variant, AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        assert torch.equal(logits(loaded), logits(hybrid))


def test_half_precision_comes_back(folder: Path, tmp_path: Path) -> None:
    half: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(half))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_what_lies_beside_a_hybrid(tmp_path: Path) -> None:
    teacher, tokenizer = load_teacher()
    hybrid: Any = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="random", ratio="3:1"))
    hybrid.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(tmp_path).to_dict() == hybrid.generation_config.to_dict()
    text = pipeline("text-generation", model=str(tmp_path))("The for", max_new_tokens=3, do_sample=False)
    prompt = tokenizer("The for", return_tensors="pt")
    wanted = hybrid.generate(**prompt, max_new_tokens=3, do_sample=False)[0]
    assert text[0]["generated_text"] == tokenizer.decode(wanted, skip_special_tokens=True)


def test_training_goes_on_from_a_checkpoint(hybrid: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def train(steps: int, model: Any, resume: bool) -> Any:
        options = {"max_steps": steps, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-3}
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(4, copy.deepcopy(hybrid), resume=False)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = train(4, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), resume=True)
    assert torch.equal(logits(resumed), logits(whole))


def test_lora_finds_the_hybrid_again(folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

    for task in ("CAUSAL_LM", None):
        lora = LoraConfig(r=2, task_type=task)  # its targets are looked up by the model type
        adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / str(task))
        wanted = logits(adapted)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / str(task)))
        assert torch.equal(logits(again), wanted)
        allowed = None if task else [type(adapted.get_base_model()).__module__]
        found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / str(task)), import_allowlist=allowed)
        assert torch.equal(logits(found), wanted)


# --- never another model ----------------------------------------------------------------------------------------------

LOADS = (
    "AutoModelForCausalLM.from_pretrained(path)",
    "AutoModel.from_pretrained(path)",
    "AutoConfig.from_pretrained(path)",
    "Qwen3ForCausalLM.from_pretrained(path)",
    "Qwen3Model.from_pretrained(path, dtype=torch.float32, ignore_mismatched_sizes=True)",
    "Qwen3ForCausalLM.from_pretrained(path, config=Qwen3Config.from_pretrained(path, dtype=torch.float32))",
    "LlamaForCausalLM.from_pretrained(path)",
    "pipeline('text-generation', model=path)",
)
WITHOUT = """
import sys, torch
from transformers import *
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model
path = sys.argv[1]
for load in sys.argv[2:]:
    try:
        eval(load)
    except Exception as error:
        print("raises", type(error).__name__, str(error).replace(chr(10), " "))
    else:
        print("loads")
assert "hydrasurgery" not in sys.modules
""".replace("from transformers import *\n", "")


def test_without_the_import_nothing_loads_a_hybrid(folder: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(folder), *LOADS]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder.parent).stdout.splitlines()
    assert len(said) == len(LOADS)
    for load, line in zip(LOADS, said, strict=True):
        assert line.startswith("raises"), load
    for line in said[:3]:
        assert "model type `hydrasurgery`" in line
    for line in said[3:-1]:
        assert stored.ADVICE in line


def test_no_config_class_of_a_decoder_reads_the_form() -> None:
    form = stored.stored({"model_type": "some", stored.KEY: {}})
    for model_type in ("llama", "qwen3", "gpt2", "opt", "phi3", "gemma2", "mixtral", "bloom", "cohere2", "gpt_neox"):
        with pytest.raises(Exception, match="import hydrasurgery"):
            CONFIG_MAPPING[model_type].from_dict(dict(form))
    for model_type in ("gemma3", "llama4", "mllama"):  # whose decoders are in a text_config
        with pytest.raises(Exception, match="import hydrasurgery"):
            CONFIG_MAPPING[model_type].from_dict(
                stored.stored({"model_type": model_type, "text_config": {}, stored.KEY: {}})
            )
    PreTrainedConfig.from_dict(dict(form))


def test_the_base_class_does_not_load_a_hybrid_as_its_base(folder: Path) -> None:
    with pytest.raises(Exception, match="load it with an Auto class"):
        Qwen3ForCausalLM.from_pretrained(folder)


def test_in_another_process_a_pickle_brings_what_it_needs(hybrid: Any, tmp_path: Path) -> None:
    (tmp_path / "hybrid.pickle").write_bytes(pickle.dumps(hybrid))
    program = (
        "import pickle, sys; hybrid = pickle.load(open(sys.argv[1], 'rb'));"
        "from transformers import AutoModelForCausalLM; print(type(AutoModelForCausalLM.from_config(hybrid.config)).__module__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "hybrid.pickle")]
    root = Path(hs.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "hydrasurgery.pretrained"
    assert "RuntimeWarning" not in done.stderr


def test_a_hybrids_class_loads_hybrids_only(hybrid: Any, folder: Path, tmp_path: Path) -> None:
    tiny("qwen3").save_pretrained(tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="is no hybrid"):
        type(hybrid).from_pretrained(tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="holds no surgery"):
        type(hybrid)(tiny("qwen3").config)
    other = hybrid_of(tiny("llama"))
    with pytest.raises(CheckpointError, match="model of type 'qwen3', not 'llama'"):
        type(other).from_pretrained(folder)


@pytest.mark.parametrize(
    "surgery",
    [
        None,
        [],
        {},
        {"plan": {}, "pipeline": 3},
        {"plan": {}, "pipeline": "x"},
        {"plan": {}, "pipeline": "x", "base": "qwen3"},
    ],
)
def test_a_config_without_a_whole_surgery_is_refused(surgery: Any, tampered: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(tampered(hydrasurgery=surgery))


def test_an_unknown_base_is_named(folder: Path, tampered: Callable[..., Path]) -> None:
    surgery = json.loads((folder / "config.json").read_text())["hydrasurgery"]
    for unknown in ("no_such_model", "hydrasurgery"):
        with pytest.raises(CheckpointError, match=unknown):
            AutoModelForCausalLM.from_pretrained(tampered(hydrasurgery={**surgery, "base": {"model_type": unknown}}))


def test_a_restored_hybrid_is_of_its_own_class_again(tmp_path: Path) -> None:
    model = tiny("qwen3")
    restored: Any = hs.restore(hs.rewrite(model, half_plan(model)))
    assert (type(restored), type(restored.model), type(restored.config)) == (
        type(model),
        type(model.model),
        type(model.config),
    )
    restored.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
    hybrid = hybrid_of(model)
    hybrid.save_pretrained(tmp_path / "hybrid")
    with pytest.raises(UnsupportedModelError, match="holds no original"):
        hs.restore(AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid"))


# --- never code, never other files ------------------------------------------------------------------------------------

CODE = [
    {"attn_implementation": "someone/kernel"},
    {"_attn_implementation": "someone/kernel@v1:flash"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
    {"text_config": {"_attn_implementation_internal": "someone/kernel"}},
    {"per_layer": [{"attn_implementation": "paged|someone/kernel"}]},
    {"experts_implementation": "deepgemm"},
    {"use_kernels": True},
    {"kernel_config": {"RMSNorm": "someone/kernel:RMSNorm"}},
    {"transformers_weights": "../other.safetensors"},
    {"configuration_files": ["../config.4.0.0.json"]},
]


@pytest.mark.parametrize("entries", CODE, ids=lambda entries: json.dumps(entries)[:40])
def test_a_config_that_asks_for_code_is_refused(
    entries: dict[str, Any], tampered: Callable[..., Path], tmp_path: Path
) -> None:
    path = tampered(**entries)
    with pytest.raises(CheckpointError, match=next(iter(entries))):
        AutoModelForCausalLM.from_pretrained(path) if "configuration_files" not in entries else load_model(path)
    tiny("qwen3").save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    for where in (path, tmp_path / "teacher"):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_model(where)


def test_configs_that_ask_for_nothing_are_let_through(folder: Path) -> None:
    check_config(
        {"attn_implementation": None, "use_kernels": False, "text_config": {"attn_implementation": "sdpa"}}, ""
    )
    check_config(json.loads((folder / "config.json").read_text()), "")


def test_code_beside_a_hybrid_is_not_run(tampered: Callable[..., Path]) -> None:
    path = tampered(auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (path / "code.py").write_text("raise SystemExit('was run')")
    for trust in (None, False, True):
        with pytest.raises(CheckpointError, match="auto_map"):
            AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust)


def test_code_of_a_teacher_is_not_that_of_its_hybrid(tmp_path: Path) -> None:
    model = tiny("qwen3")
    model.config.auto_map = {"AutoModelForCausalLM": "code.Model"}
    hybrid_of(model).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert hasattr(model.config, "auto_map")


@pytest.mark.parametrize("away", ["../other.safetensors", "{}/other.safetensors", "sub/other.safetensors"])
def test_shards_of_other_folders_are_not_read(away: str, hybrid: Any, tmp_path: Path) -> None:
    hybrid.save_pretrained(tmp_path / "hybrid", max_shard_size="50KB")
    index = tmp_path / "hybrid" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    name = next(iter(values["weight_map"]))
    values["weight_map"][name] = away.format(tmp_path)
    index.write_text(json.dumps(values))
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(CheckpointError, match=r"other\.safetensors"):
            load(tmp_path / "hybrid")


# --- where weights lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tp_plan": "auto"},
        {"tp_size": 2},
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
        {"device_map": {"model": "cpu", "lm_head": 0}},
    ],
    ids=str,
)
def test_split_weights_are_refused_at_loading(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(options))):
        AutoModelForCausalLM.from_pretrained(folder, offload_folder=tmp_path, **options)


def test_offloaded_weights_are_refused_at_the_first_call(hybrid: Any, tmp_path: Path) -> None:
    for offload in (
        lambda model: accelerate.cpu_offload(model, torch.device("cpu")),
        lambda model: accelerate.disk_offload(model, str(tmp_path), torch.device("cpu")),
        lambda model: accelerate.cpu_offload(model.model, torch.device("cpu")),
    ):
        away = copy.deepcopy(hybrid)
        logits(away)
        offload(away)
        with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn: accelerate offloads"):
            logits(away)


def test_a_split_teacher_is_refused() -> None:
    model = tiny("qwen3")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="accelerate moves"):
        hs.rewrite(model, half_plan(tiny("qwen3")))


# --- quantised teachers -----------------------------------------------------------------------------------------------


def quantized(config: Any, tmp_path: Path) -> Any:
    tiny("qwen3", hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(tmp_path / "plain")
    options = {"dtype": torch.float32, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, **options)


def test_torchao_weights_stay_quantised(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    hybrid = hybrid_of(quantized(TorchAoConfig(torchao.Int8WeightOnlyConfig()), tmp_path))
    hybrid.save_pretrained(tmp_path / "hybrid")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", device_map="cpu")
    kinds = {name: type(value) for name, value in hybrid.state_dict().items()}
    assert {name: type(value) for name, value in loaded.state_dict().items()} == kinds
    assert len(set(kinds.values())) == 2
    assert torch.equal(logits(loaded), logits(hybrid))


def test_quanto_weights_cannot_be_saved(tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    hybrid = hybrid_of(quantized(QuantoConfig(weights="int8"), tmp_path))
    logits(hybrid)
    with pytest.raises(ValueError, match="quanto"):
        hybrid.save_pretrained(tmp_path / "hybrid")
    assert not (tmp_path / "hybrid").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_refused_by_name(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = quantized(BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"self_attn.*quantised by bitsandbytes"):
        hs.capture(model)


@pytest.mark.parametrize("described", [{"quant_method": "fp8", "dequantize": True}, {"quant_method": "mxfp4"}], ids=str)
def test_a_model_that_was_dequantised_does_not_call_itself_quantised(described: Any, tmp_path: Path) -> None:
    model = tiny("qwen3")
    model.config.quantization_config = SimpleNamespace(**described, to_dict=lambda: described)
    hybrid = hybrid_of(model)
    hybrid.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(hybrid))
    assert model.config.quantization_config.quant_method == described["quant_method"]

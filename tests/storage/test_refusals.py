"""What is refused of hybrids on disk: to be another model, to run code, to lie in pieces, to be quantised by half."""

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
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    Qwen3ForCausalLM,
)

import hydrasurgery as hs
from hydrasurgery import stored
from hydrasurgery.errors import CheckpointError, UnsupportedModelError
from hydrasurgery.loading import load_model
from hydrasurgery.trust import check_config
from tests.storage.models import hybrid_of, logits, small
from tests.test_families import half_plan


@pytest.fixture
def tampered(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder, with other entries in its config.json."""

    def tamper(**entries: Any) -> Path:
        path = shutil.copytree(folder, tmp_path / "tampered", dirs_exist_ok=True)
        values = json.loads((folder / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**values, **entries}))
        return path

    return tamper


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
    small("qwen3").save_pretrained(tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="is no hybrid"):
        type(hybrid).from_pretrained(tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="holds no surgery"):
        type(hybrid)(small("qwen3").config)
    other = hybrid_of(small("llama"))
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
    model = small("qwen3")
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
    small("qwen3").save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    for where in (path, tmp_path / "teacher"):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_model(where)


@pytest.mark.parametrize(
    "entries", [{"auto_map": {}}, {"text_config": {"attn_implementation": "someone/kernel"}}], ids=str
)
def test_what_stands_for_the_base_is_looked_at_as_well(
    entries: dict[str, Any], folder: Path, tampered: Callable[..., Path]
) -> None:
    surgery = json.loads((folder / "config.json").read_text())["hydrasurgery"]
    path = tampered(hydrasurgery={**surgery, "base": {**surgery["base"], **entries}})
    with pytest.raises(CheckpointError, match=next(iter(entries))):
        AutoModelForCausalLM.from_pretrained(path)


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
    model = small("qwen3")
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
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: .*names"):
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
    model = small("qwen3")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="accelerate moves"):
        hs.rewrite(model, half_plan(small("qwen3")))


# --- quantised teachers -----------------------------------------------------------------------------------------------


def quantized(config: Any, tmp_path: Path) -> Any:
    small("qwen3", hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(tmp_path / "plain")
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
    model = small("qwen3")
    model.config.quantization_config = SimpleNamespace(**described, to_dict=lambda: described)
    hybrid = hybrid_of(model)
    hybrid.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(hybrid))
    assert model.config.quantization_config.quant_method == described["quant_method"]

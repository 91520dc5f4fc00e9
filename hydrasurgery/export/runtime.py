"""An exported decoder in ONNX Runtime, a step or a greedy loop at a time: NumPy in, NumPy out, no PyTorch needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from hydrasurgery.errors import ExportError, SequenceLengthError
from hydrasurgery.json_files import parse_json
from hydrasurgery.records import Count, read_value

PAST, PRESENT = "past_key_values.", "present."
DTYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
KERNELS = " (it lacks a kernel; for a CPU it has none for bfloat16: export float16 or float32)"


class OnnxDecoder:
    """A file that `export_onnx` wrote with `cache=True`.

    Args:
        path: the ONNX file.
        providers: execution providers of ONNX Runtime, by preference.
        threads: within one operator; ONNX Runtime's own choice if None.

    Raises:
        ExportError: the file cannot be run, or is no such export.
        ImportError: onnxruntime is not installed.

    Attributes:
        eos_token_ids: tokens that end a row, of the exported model.
        position_limit: the longest sequence, in tokens, that the exported model's positions are made for; None where none is known.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"running ONNX needs onnxruntime ({error}): pip install 'hydrasurgery[onnx]'") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime has an exception class per cause, without a common base
            hint = KERNELS if type(error).__name__ == "NotImplemented" else ""
            raise ExportError(f"{os.fspath(path)}: ONNX Runtime cannot load it: {error}{hint}") from error
        self._inputs = {i.name: i for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]
        self._states = [name for name in self._inputs if name.startswith(PAST)]
        if "input_ids" not in self._inputs or not self._states:
            raise ExportError(f"{os.fspath(path)}: is no decoder with states; export it with cache=True")
        strange = [x.type for x in self._inputs.values() if x.type not in DTYPES]
        if strange:
            raise ExportError(
                f"{os.fspath(path)}: its states are {strange[0]}, which NumPy lacks: export float16 or float32"
            )
        shapes = [self._inputs[name].shape for name in self._states]
        if len(self._outputs) != 1 + len(shapes) or not all(shape and None not in shape for shape in shapes):
            raise ExportError(
                f"{os.fspath(path)}: its states are not those of an export; export it again with cache=True"
            )
        self._path = os.fspath(path)
        properties = self.session.get_modelmeta().custom_metadata_map
        self._model = properties.get("hydrasurgery.model", self._path)

        def noted(key: str, kind: Any, default: str) -> Any:
            where = f"{self._path}: hydrasurgery.{key}"
            text = properties.get(f"hydrasurgery.{key}", default)
            return read_value(kind, parse_json(text, where, ExportError), where, ExportError)

        self.eos_token_ids: list[int] = list(noted("eos_token_ids", tuple[Count, ...], "[]"))
        self.position_limit: int | None = noted("position_limit", Count | None, "null")

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """The states of `batch` rows before the first token: no keys, zeros elsewhere."""
        states = {}
        for name in self._states:
            first, *rest = self._inputs[name].shape
            shape = [batch, *(0 if isinstance(size, str) else size for size in rest)]
            states[name] = np.zeros(shape, DTYPES[self._inputs[name].type])
        return states

    def step(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, states: dict[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits [B, T, vocabulary] of the new tokens [B, T], and the states after them.

        Args:
            input_ids: [B, T].
            attention_mask: [B, P + T], of all tokens up to now; 0 for padding.
            states: what the last step returned; None at the start.

        Raises:
            ExportError: the file is not what `export_onnx` wrote, or the arguments are not as above.
        """
        length = input_ids.shape[1]
        feed: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": np.maximum(attention_mask.cumsum(-1) - 1, 0)[:, -length:],
        }
        feed = {name: np.ascontiguousarray(value, np.int64) for name, value in feed.items() if name in self._inputs}
        feed.update(self.empty(len(input_ids)) if states is None else states)
        try:
            logits, *present = self.session.run(self._outputs, feed)
        except Exception as error:  # as for loading
            raise ExportError(f"{self._path}: ONNX Runtime cannot run it: {error}") from error
        names = (PAST + name.removeprefix(PRESENT) for name in self._outputs[1:])
        return logits, dict(zip(names, present, strict=True))

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        max_new_tokens: int = 64,
        eos_token_ids: Sequence[int] | None = None,
        pad_token_id: int = 0,
    ) -> np.ndarray:
        """Continue each row with its likeliest tokens.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 for padding on the left; all ones if None.
            max_new_tokens: at most; fewer if every row ends before.
            eos_token_ids: tokens that end a row; by default those of the exported model.
            pad_token_id: what follows a row's end.

        Returns:
            [B, T + N] int64, the prompts and N new tokens.

        Raises:
            SequenceLengthError: T + `max_new_tokens` is above the model's position limit.
        """
        ids = np.asarray(input_ids, np.int64)
        length = ids.shape[1] + max_new_tokens
        if self.position_limit is not None and length > self.position_limit:
            raise SequenceLengthError.of(self._model, length, self.position_limit)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
        ends = list(self.eos_token_ids if eos_token_ids is None else eos_token_ids)
        running = np.ones(len(ids), bool)
        states, new = None, ids
        for _ in range(max_new_tokens):
            logits, states = self.step(new, mask, states)
            new = np.where(running, logits[:, -1].argmax(-1), pad_token_id)[:, None]
            ids, mask = np.concatenate([ids, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
            running &= ~np.isin(new[:, 0], ends)
            if not running.any():
                break
        return ids


__all__ = ["OnnxDecoder"]

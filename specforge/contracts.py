"""What passes between the rooms of the house: prompts, references to features, batches, and what an algorithm needs.

The records are frozen, tensor-free and JSON: they are what the control plane may carry. Tensors live in a
feature store and are fetched by reference; only :class:`TrainBatch` and :class:`TokenCounts` hold any.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Self, TypeVar

import torch
import xxhash
from torch import Tensor

AUX_HIDDEN_STATES = "aux_hidden_states"
LAST_HIDDEN_STATES = "last_hidden_states"
INPUT_IDS = "input_ids"
LOSS_MASK = "loss_mask"

_T = TypeVar("_T")


SAMPLE_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}", re.ASCII)  # can name no path outside a folder
ENCODINGS = ("raw", "float8_e4m3fn")
_MOST_TOKENS, _MOST_BYTES = 2**31 - 1, 2**53  # of a sample; what exceeds them is damage


class Record:
    """JSON form of a frozen dataclass; tuples become lists and come back as tuples."""

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON values.

        Raises:
            TypeError: a field holds something else, such as a tensor.
        """
        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}  # type: ignore[attr-defined]

    @classmethod
    def from_json(cls, fields: Any) -> Self:
        """Rebuild a record, whoever wrote it.

        Raises:
            ValueError: a field is missing, unknown, or not what it can be; says which.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"{cls.__name__} is an object with fields, not {reprlib.repr(fields)}")
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))  # type: ignore[attr-defined]
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {reprlib.repr(unknown[0])}")
        try:
            record = cls(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()})
        except TypeError as error:
            raise ValueError(f"{cls.__name__} lacks {str(error).partition(': ')[2]}") from error
        record.check()
        return record

    def check(self) -> None:
        """Refuse values that no such record can have, whatever their types.

        Raises:
            ValueError: says which field.
        """
        fitting = self.fitting()
        if False in fitting.values():
            name = next(name for name, fits in fitting.items() if not fits)
            raise ValueError(f"{name} cannot be {reprlib.repr(getattr(self, name))}")

    def fitting(self) -> dict[str, bool]:
        """Whether each field has a value that it can have."""
        return {}


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any, most: int = _MOST_BYTES) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_dtype(name: Any) -> bool:
    return _is_text(name) and isinstance(getattr(torch, name, None), torch.dtype)


def plain(value: Any) -> Any:
    """JSON value of a record, of text, of a number, or of sequences of them.

    Raises:
        TypeError: there is something else in it, such as a tensor.
    """
    if isinstance(value, (tuple, list)):
        return [x if type(x) is int else plain(x) for x in value]
    if isinstance(value, Record):
        return value.to_json()
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


@dataclass(frozen=True, slots=True)
class FeatureSpec(Record):
    """One stored tensor of a sample.

    Attributes:
        name: its name, such as ``aux_hidden_states``.
        dtype: torch dtype name, such as ``bfloat16``.
        shape: full shape; the first dimension counts tokens.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def fitting(self) -> dict[str, bool]:
        """See :meth:`Record.fitting`."""
        shape = isinstance(self.shape, tuple) and 0 < len(self.shape) < 8
        return {
            "name": _is_text(self.name) and bool(self.name),
            "dtype": _is_dtype(self.dtype),
            "shape": shape and all(map(_is_count, self.shape)) and math.prod(self.shape) <= _MOST_BYTES,
        }


@dataclass(frozen=True, slots=True)
class CapturePolicy(Record):
    """What to keep of the target's forward pass.

    Attributes:
        layer_ids: 0-based decoder layers whose outputs are concatenated into ``aux_hidden_states``.
        last_hidden_states: also keep the state after the final norm, which ``lm_head`` reads.
    """

    layer_ids: tuple[int, ...]
    last_hidden_states: bool = True

    def fitting(self) -> dict[str, bool]:
        """See :meth:`Record.fitting`."""
        return {
            "layer_ids": isinstance(self.layer_ids, tuple) and all(map(_is_count, self.layer_ids)),
            "last_hidden_states": type(self.last_hidden_states) is bool,
        }


@dataclass(frozen=True, slots=True)
class Provenance(Record):
    """Where features come from; two samples are alike only if all of it is equal.

    Attributes:
        target: name of the target, as the user gave it.
        target_fingerprint: hash of its config and weights.
        tokenizer_fingerprint: hash of the tokenizer and its chat template.
        capture: what was captured.
        dtype: compute dtype of the target's forward pass.
        draft_weight_version: kept for engines that decode with a draft; nothing reads it.
        encoding: how features are stored: ``raw``, or ``float8_e4m3fn``.
    """

    target: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    capture: CapturePolicy
    dtype: str
    draft_weight_version: str = ""
    encoding: str = "raw"

    @classmethod
    def from_json(cls, fields: Any) -> Provenance:
        """Rebuild, with the nested policy; see :meth:`Record.from_json`."""
        if isinstance(fields, dict) and "capture" in fields:
            fields = {**fields, "capture": CapturePolicy.from_json(fields["capture"])}
        return super(Provenance, cls).from_json(fields)

    def fitting(self) -> dict[str, bool]:
        """See :meth:`Record.fitting`."""
        texts = ("target", "target_fingerprint", "tokenizer_fingerprint", "draft_weight_version")
        return {name: _is_text(getattr(self, name)) for name in texts} | {
            "capture": isinstance(self.capture, CapturePolicy),
            "dtype": _is_dtype(self.dtype) and getattr(torch, self.dtype).is_floating_point,
            "encoding": self.encoding in ENCODINGS,
        }

    @property
    def makes(self) -> tuple[str, CapturePolicy, str, str]:
        """What the bytes of a prompt's features depend on; names and the tokenizer are not of it."""
        return self.target_fingerprint, self.capture, self.dtype, self.encoding


@dataclass(frozen=True, slots=True)
class PromptTask(Record):
    """One tokenised conversation, waiting for its features.

    Attributes:
        task_id: hash of the tokens and the mask.
        input_ids: token ids.
        loss_mask: 1 where the token was written by the assistant and is to be learnt.
        source: file and line it came from.
        attempt: how often producing it has been tried before.
    """

    task_id: str
    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    source: str = ""
    attempt: int = 0

    def fitting(self) -> dict[str, bool]:
        """See :meth:`Record.fitting`; what no target can read, such as an unknown token, the target will say."""
        ids, mask = _packed(_int32, self.input_ids), _packed(bytes, self.loss_mask)
        return {
            "task_id": _is_text(self.task_id),
            "source": _is_text(self.source),
            "attempt": _is_count(self.attempt),
            "input_ids": ids is not None,
            "loss_mask": mask is not None and len(mask) == len(ids or ()) and not mask.translate(None, b"\0\1"),
        }


_int32 = partial(array, "i")


def _packed(kind: Callable[[tuple[int, ...]], _T], values: Any) -> _T | None:
    """Whole numbers in C's form, the quickest way to look at hundreds; None if they are something else."""
    try:
        return kind(values) if isinstance(values, tuple) else None
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class SampleRef(Record):
    """A committed sample: everything about its features but the tensors.

    Attributes:
        sample_id: hash of tokens, mask, target fingerprint and capture policy.
        generation: tells a second put of the same sample from the first.
        features: the stored tensors.
        num_tokens: tokens of the sample.
        num_supervised: tokens under the loss mask.
        nbytes: bytes of all its tensors.
        checksum: xxh3-64 over the stored bytes.
        uri: where in its store the bytes lie; only the store reads it.
        source: file and line of the conversation.
        provenance: target, tokenizer and capture.
    """

    sample_id: str
    generation: int
    features: tuple[FeatureSpec, ...]
    num_tokens: int
    num_supervised: int
    nbytes: int
    checksum: str
    uri: str
    source: str
    provenance: Provenance

    @classmethod
    def from_json(cls, fields: Any) -> SampleRef:
        """Rebuild, with the nested records; see :meth:`Record.from_json`."""
        if isinstance(fields, dict) and {"features", "provenance"} <= fields.keys():
            features = fields["features"]
            if not isinstance(features, list):
                raise ValueError(f"features cannot be {reprlib.repr(features)}")
            nested = {"features": tuple(map(FeatureSpec.from_json, features))}
            fields = {**fields, **nested, "provenance": Provenance.from_json(fields["provenance"])}
        return super(SampleRef, cls).from_json(fields)

    def fitting(self) -> dict[str, bool]:
        """See :meth:`Record.fitting`."""
        tokens = self.num_tokens
        return {
            "sample_id": type(self.sample_id) is str and SAMPLE_ID.fullmatch(self.sample_id) is not None,
            "generation": _is_count(self.generation),
            "num_tokens": _is_count(tokens, _MOST_TOKENS),
            "features": all([feature.shape[0] == tokens for feature in self.features]),
            "num_supervised": _is_count(tokens) and _is_count(self.num_supervised, tokens),
            "nbytes": _is_count(self.nbytes),
            "checksum": type(self.checksum) is str,
            "uri": type(self.uri) is str,
            "source": type(self.source) is str,
        }


@dataclass(frozen=True, slots=True)
class StrategySpec(Record):
    """What an algorithm asks of the data path; each LightningModule owns its own.

    Attributes:
        algorithm: its name in tables and files.
        capture: what to keep of the target.
        features: names of the stored tensors it reads.
        positions: how many tokens ahead it is trained to draft.
        min_tokens: shortest sample it can learn from.
    """

    algorithm: str
    capture: CapturePolicy
    features: tuple[str, ...]
    positions: int
    min_tokens: int


@dataclass(frozen=True)
class TokenCounts:
    """How often each token occurs in the prompts: ``supervised [V]`` under the loss mask, ``context [V]`` elsewhere."""

    supervised: Tensor
    context: Tensor


def content_id(*parts: Any) -> str:
    """128-bit hash, in hex, of byte strings or JSON values."""
    digest = xxhash.xxh3_128()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@dataclass
class TrainBatch:
    """Documents packed one after another into a flat row; the only record that holds tensors.

    Attributes:
        input_ids: ``[N]`` int64.
        loss_mask: ``[N]`` bool.
        features: named tensors, each ``[N, width]``.
        lengths: tokens of each document; what lies behind their sum is padding.
        spans: supervised tokens as flat ``(start, stop)`` runs; host copy of ``loss_mask``.
        sample_ids: identity of each document.
        cursor: position of the stream after this batch, handed back by the acknowledgement.
        plan: the algorithm's index tensors for training on this batch, made by the loader; None if it made none.
    """

    input_ids: Tensor
    loss_mask: Tensor
    features: dict[str, Tensor]
    lengths: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    sample_ids: tuple[str, ...] = ()
    cursor: Any = field(default=None, compare=False)
    plan: Any = field(default=None, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row, padding included."""
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens under the loss mask."""
        return sum(stop - start for start, stop in self.spans)

    def to(self, device: torch.device, non_blocking: bool = False) -> TrainBatch:
        """The batch with its tensors on ``device``."""
        moved = self._map(lambda x: x.to(device, non_blocking=non_blocking))
        return moved if self.plan is None else dataclasses.replace(moved, plan=self.plan.to(device))

    def pin_memory(self) -> TrainBatch:
        """The batch in page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, move: Any) -> TrainBatch:
        return dataclasses.replace(
            self,
            input_ids=move(self.input_ids),
            loss_mask=move(self.loss_mask),
            features={name: move(x) for name, x in self.features.items()},
        )


def mask_spans(loss_mask: Sequence[bool] | Tensor, lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Runs of supervised tokens of a packed row, cut at every document's border."""
    mask = torch.as_tensor(loss_mask, dtype=torch.bool)
    edges = torch.zeros(len(mask) + 1, dtype=torch.int8)
    edges[1:-1] = mask[1:] ^ mask[:-1]
    edges[0] = mask[0] if len(mask) else 0
    edges[-1] = mask[-1] if len(mask) else 0
    bounds = set(edges.nonzero().flatten().tolist())
    position = 0
    for length in lengths:
        position += length
        if position < len(mask) and bool(mask[position]) and bool(mask[position - 1]):
            bounds.add(position)
    points = sorted(bounds)
    return tuple((start, stop) for start, stop in pairwise(points) if bool(mask[start]))

"""Types that packages exchange: prompts, references to features, batches, and the requirements of an algorithm.

Records are frozen, free of tensors, and have a JSON form: the control plane carries nothing else. Tensors live in a
feature store and are read by reference; only :class:`TrainBatch` and :class:`TokenCounts` hold any.
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
from typing import Any, Protocol, Self, TypeVar

import torch
import xxhash
from torch import Tensor

AUX_HIDDEN_STATES = "aux_hidden_states"
LAST_HIDDEN_STATES = "last_hidden_states"
INPUT_IDS = "input_ids"
LOSS_MASK = "loss_mask"

_T = TypeVar("_T")

SAMPLE_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}", re.ASCII)  # cannot name a path outside a folder
ENCODINGS = ("raw", "float8_e4m3fn")
ANY_ENGINE = "*"
_MAX_TOKENS, _MAX_BYTES = 2**31 - 1, 2**53  # per sample; larger values mean damage


class Record:
    """A frozen dataclass with a JSON form, in which tuples are lists."""

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON values.

        Raises:
            TypeError: a field holds anything else, such as a tensor.
        """
        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}  # type: ignore[attr-defined]

    @classmethod
    def from_json(cls, fields: Any) -> Self:
        """Rebuild a record from untrusted JSON.

        Raises:
            ValueError: names a field that is missing, unknown, or has an impossible value.
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
        """Reject impossible values.

        Raises:
            ValueError: names the field.
        """
        valid = self._valid_fields()
        if False in valid.values():
            name = next(name for name, is_valid in valid.items() if not is_valid)
            raise ValueError(f"{name} cannot be {reprlib.repr(getattr(self, name))}")

    def _valid_fields(self) -> dict[str, bool]:
        """For each checked field, whether its value is possible; values may be of any type."""
        return {}


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any, limit: int = _MAX_BYTES) -> bool:
    return type(value) is int and 0 <= value <= limit


def _is_dtype(name: Any) -> bool:
    return _is_text(name) and isinstance(getattr(torch, name, None), torch.dtype)


def engine_label(engine: str) -> str:
    """The engine of a provenance, as messages name it."""
    return engine or "transformers"


def plain(value: Any) -> Any:
    """JSON value of a record, a text, a number, or a sequence of these.

    Raises:
        TypeError: the value contains anything else, such as a tensor.
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
        name: for example ``aux_hidden_states``.
        dtype: name of the torch dtype, such as ``bfloat16``.
        shape: full shape; the first dimension is the number of tokens.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def _valid_fields(self) -> dict[str, bool]:
        shape = isinstance(self.shape, tuple) and 0 < len(self.shape) < 8
        return {
            "name": _is_text(self.name) and bool(self.name),
            "dtype": _is_dtype(self.dtype),
            "shape": shape and all(map(_is_count, self.shape)) and math.prod(self.shape) <= _MAX_BYTES,
        }


@dataclass(frozen=True, slots=True)
class CapturePolicy(Record):
    """Which hidden states of the target to capture.

    Attributes:
        layer_ids: 0-based decoder layers; their outputs are concatenated into ``aux_hidden_states``.
        last_hidden_states: also capture the output of the final norm, the input of ``lm_head``.
    """

    layer_ids: tuple[int, ...]
    last_hidden_states: bool = True

    def _valid_fields(self) -> dict[str, bool]:
        return {
            "layer_ids": isinstance(self.layer_ids, tuple) and all(map(_is_count, self.layer_ids)),
            "last_hidden_states": type(self.last_hidden_states) is bool,
        }


@dataclass(frozen=True, slots=True)
class Provenance(Record):
    """Origin of features.

    Attributes:
        target: name of the target, as the user gave it.
        target_fingerprint: hash of the target's config and weights.
        tokenizer_fingerprint: hash of the tokenizer and its chat template.
        capture: captured hidden states.
        dtype: compute dtype of the target's forward pass.
        draft_weight_version: part of the file format, unused.
        encoding: storage format of the features, ``raw`` or ``float8_e4m3fn``.
        engine: what ran the target: engine, version and parallelism. Empty for transformers on one device; ``*``, of
            features to come, for any. Engines differ in the last bits of a feature.
    """

    target: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    capture: CapturePolicy
    dtype: str
    draft_weight_version: str = ""
    encoding: str = "raw"
    engine: str = ""

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON values; an empty engine is left out, as earlier versions do not know the field."""
        return {
            name: value for name, value in super(Provenance, self).to_json().items() if (name, value) != ("engine", "")
        }

    @classmethod
    def from_json(cls, fields: Any) -> Provenance:
        """Rebuild a record and its nested policy."""
        if isinstance(fields, dict) and "capture" in fields:
            fields = {**fields, "capture": CapturePolicy.from_json(fields["capture"])}
        return super(Provenance, cls).from_json(fields)

    def _valid_fields(self) -> dict[str, bool]:
        texts = ("target", "target_fingerprint", "tokenizer_fingerprint", "draft_weight_version", "engine")
        return {name: _is_text(getattr(self, name)) for name in texts} | {
            "capture": isinstance(self.capture, CapturePolicy),
            "dtype": _is_dtype(self.dtype) and getattr(torch, self.dtype).is_floating_point,
            "encoding": self.encoding in ENCODINGS,
        }

    @property
    def feature_key(self) -> tuple[str, CapturePolicy, str, str, str]:
        """Everything besides the prompt that determines the bytes of its features."""
        return self.target_fingerprint, self.capture, self.dtype, self.encoding, self.engine


@dataclass(frozen=True, slots=True)
class PromptTask(Record):
    """A tokenised conversation to capture features for.

    Attributes:
        task_id: hash of the tokens and the mask.
        input_ids: token ids.
        loss_mask: 1 for supervised tokens, those written by the assistant.
        source: file and line of the conversation.
        attempt: number of earlier attempts to produce features for it.
    """

    task_id: str
    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    source: str = ""
    attempt: int = 0

    def _valid_fields(self) -> dict[str, bool]:
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
    """Integers as a C array, the fastest way to check hundreds of them; None for anything else."""
    try:
        return kind(values) if isinstance(values, tuple) else None
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class SampleRef(Record):
    """A stored sample: everything about its features except the tensors.

    Attributes:
        sample_id: hash of tokens, mask, target fingerprint and capture policy.
        generation: counts the puts of a sample.
        features: the stored tensors.
        num_tokens: tokens of the sample.
        num_supervised: tokens under the loss mask.
        nbytes: stored bytes of all tensors.
        checksum: xxh3-64 of the stored bytes.
        uri: location of the bytes; only the store interprets it.
        source: file and line of the conversation.
        provenance: origin of the features.
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
        """Rebuild a record and its nested records."""
        if isinstance(fields, dict) and {"features", "provenance"} <= fields.keys():
            features = fields["features"]
            if not isinstance(features, list):
                raise ValueError(f"features cannot be {reprlib.repr(features)}")
            nested = {"features": tuple(map(FeatureSpec.from_json, features))}
            fields = {**fields, **nested, "provenance": Provenance.from_json(fields["provenance"])}
        return super(SampleRef, cls).from_json(fields)

    def _valid_fields(self) -> dict[str, bool]:
        tokens = self.num_tokens
        return {
            "sample_id": type(self.sample_id) is str and SAMPLE_ID.fullmatch(self.sample_id) is not None,
            "generation": _is_count(self.generation),
            "num_tokens": _is_count(tokens, _MAX_TOKENS),
            "features": all([feature.shape[0] == tokens for feature in self.features]),
            "num_supervised": _is_count(tokens) and _is_count(self.num_supervised, tokens),
            "nbytes": _is_count(self.nbytes),
            "checksum": type(self.checksum) is str,
            "uri": type(self.uri) is str,
            "source": type(self.source) is str,
        }


@dataclass(frozen=True, slots=True)
class ExpectedSample:
    """A sample that is not produced yet: its prompt, and everything about its features that follows from the prompt.

    Attributes:
        sample_id: id of the :class:`SampleRef` to come.
        task: the prompt.
        features: the tensors to come.
        nbytes: their stored bytes.
        provenance: target, and what to capture.
    """

    sample_id: str
    task: PromptTask
    features: tuple[FeatureSpec, ...]
    nbytes: int
    provenance: Provenance

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample."""
        return len(self.task.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens under the loss mask."""
        return sum(self.task.loss_mask)

    @property
    def source(self) -> str:
        """File and line of the conversation."""
        return self.task.source

    def matches(self, ref: SampleRef) -> bool:
        """Whether a stored sample has the expected features."""
        found = ref.provenance
        if self.provenance.engine == ANY_ENGINE:
            found = dataclasses.replace(found, engine=ANY_ENGINE)
        return (ref.features, found.feature_key) == (self.features, self.provenance.feature_key)


Sample = SampleRef | ExpectedSample
SampleT = TypeVar("SampleT", bound=Sample)


@dataclass(frozen=True, slots=True)
class StrategySpec(Record):
    """Requirements of an algorithm on the data path.

    Attributes:
        algorithm: name of the algorithm in tables and files.
        capture: hidden states to capture.
        features: names of the stored tensors that it reads.
        positions: number of tokens that it is trained to draft ahead.
        min_tokens: length of the shortest sample that it can train on.
    """

    algorithm: str
    capture: CapturePolicy
    features: tuple[str, ...]
    positions: int
    min_tokens: int


@dataclass(frozen=True)
class TokenCounts:
    """Occurrences of each token in the prompts: ``supervised [V]`` under the loss mask, ``context [V]`` elsewhere."""

    supervised: Tensor
    context: Tensor


class TrainingData(Protocol):
    """The interface of datamodules to algorithms."""

    def sample_refs(self) -> Sequence[Sample]:
        """Samples to train on, or those to validate on where nothing is trained."""

    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts; None where nothing is trained."""

    def batches_per_epoch(self) -> int:
        """Micro-batches per epoch on each rank."""


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
    """Documents packed end to end into one flat row.

    Attributes:
        input_ids: ``[N]`` int64.
        loss_mask: ``[N]`` bool.
        features: named tensors, each ``[N, width]``.
        lengths: tokens of each document; the tokens after their sum are padding.
        spans: supervised tokens as flat ``(start, stop)`` runs; the host's copy of ``loss_mask``.
        sample_ids: sample id of each document.
        cursor: ``epoch`` of the batch, and its number in it counted from 1; the loader's position once it is trained.
        plan: index tensors of the algorithm's training step, made by the loader; None if it made none.
    """

    input_ids: Tensor
    loss_mask: Tensor
    features: dict[str, Tensor]
    lengths: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    sample_ids: tuple[str, ...] = ()
    cursor: dict[str, int] = field(default_factory=dict, compare=False)
    plan: Any = field(default=None, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row, including padding."""
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens under the loss mask."""
        return sum(stop - start for start, stop in self.spans)

    def to(self, device: torch.device, non_blocking: bool = False) -> TrainBatch:
        """A copy of the batch on ``device``."""
        moved = self._map(lambda x: x.to(device, non_blocking=non_blocking))
        return moved if self.plan is None else dataclasses.replace(moved, plan=self.plan.to(device))

    def pin_memory(self) -> TrainBatch:
        """A copy of the batch and of its plan in page-locked memory."""
        pin = getattr(self.plan, "pin_memory", None)
        plan = self.plan if pin is None else pin()
        return dataclasses.replace(self._map(lambda x: x.pin_memory()), plan=plan)

    def _map(self, move: Any) -> TrainBatch:
        return dataclasses.replace(
            self,
            input_ids=move(self.input_ids),
            loss_mask=move(self.loss_mask),
            features={name: move(x) for name, x in self.features.items()},
        )


def mask_spans(loss_mask: Sequence[bool] | Tensor, lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Runs of supervised tokens in a packed row as ``(start, stop)``, cut at document boundaries."""
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

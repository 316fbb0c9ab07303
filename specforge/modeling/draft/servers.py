"""What servers make of a family's drafts: which forms they serve, what they would misread, and the command that serves.

A family's format (:class:`~specforge.modeling.draft.format.DraftFormat`) lists its servers. What they say is also the
table in docs/user-guide.md, which a test compares with it.
"""

from __future__ import annotations

import json
import math
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles


class Proof(Enum):
    """What SpecForge's tests have seen of a form in the server itself."""

    SERVED = "its answers equal the target's, in as many rounds as `specforge evaluate` counts"


# Rejects, with a UserError, fields of a draft's config that the named server would read as another network.
Check = Callable[[Mapping[str, Any], TargetFiles, str], None]


@dataclass(frozen=True)
class Server(ABC):
    """How one server serves a family's drafts.

    Attributes:
        name: the server's name in messages.
        version: the version that the tests run.
        method: the server's name of the algorithm.
        forms: for each form of the family (:meth:`~specforge.modeling.draft.format.DraftFormat.form`) what tests have
            seen, or the reason why the server cannot serve it, as the end of a sentence that starts with its name.
        check_fields: further checks of a form that it serves.
        in_target: whether the draft's folder is the target with the draft inside.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    method: str
    forms: Mapping[str, Proof | str]
    check_fields: Check | None = None
    in_target: bool = False

    def check(self, form: str, config: Mapping[str, Any], target: TargetFiles) -> Proof:
        """Reject a draft that the server cannot serve, or would serve as a different network.

        Returns:
            What tests have seen of this form.

        Raises:
            UserError: the form or the field, and what the server makes of it.
        """
        tested = self.forms[form]
        if isinstance(tested, str):
            raise UserError(f"export: {self.name} {tested}")
        check_positions(config, self.name)
        if self.check_fields is not None:
            self.check_fields(config, target, self.name)
        return tested

    @abstractmethod
    def command(self, target: str, folder: Path, tokens: int) -> str:
        """The command that serves the draft in ``folder`` with ``tokens`` drafted tokens per round."""


@dataclass(frozen=True)
class VLLM(Server):
    """VLLM.

    Attributes:
        options: further fields of ``--speculative-config``.
    """

    name = "vLLM"
    version = "0.32.0"
    options: Mapping[str, Any] = field(default_factory=dict)

    def command(self, target: str, folder: Path, tokens: int) -> str:
        """``vllm serve``."""
        draft = {} if self.in_target else {"model": str(folder)}
        config = {"method": self.method, **draft, "num_speculative_tokens": tokens, **self.options}
        served = str(folder) if self.in_target else target
        return shlex.join(["vllm", "serve", served, "--speculative-config", json.dumps(config)])


@dataclass(frozen=True)
class SGLang(Server):
    """SGLang.

    Attributes:
        chain: whether the draft runs once per drafted token; the config of other drafts sets their number of tokens.
    """

    name = "SGLang"
    version = "0.5.23"
    chain: bool = False

    def command(self, target: str, folder: Path, tokens: int) -> str:
        """``sglang.launch_server``."""
        words = ["python", "-m", "sglang.launch_server", "--model-path", str(folder) if self.in_target else target]
        words += ["--speculative-algorithm", self.method]
        words += [] if self.in_target else ["--speculative-draft-model-path", str(folder)]
        if self.chain:
            words += ["--speculative-num-steps", str(tokens), "--speculative-eagle-topk", "1"]
            words += ["--speculative-num-draft-tokens", str(tokens + 1)]
        return shlex.join(words)


def check_captured_layers(layers: list[int], target: TargetFiles, server: str) -> None:
    """Reject captured layers that a server cannot hand over, or not in this order.

    Raises:
        UserError: the layers do not ascend; or the last is captured, and the server is SGLang, which captures the
            *input* of the layer above.
    """
    if layers != sorted(layers):
        raise UserError(
            f"export: the draft reads layers {layers} in this order, but {server} hands them over in ascending order; "
            "train with ascending model.layer_ids"
        )
    if server == SGLang.name and layers[-1] >= target.num_layers - 1:
        raise UserError(
            f"export: layer {layers[-1]} is the last of {target.name}; SGLang captures the input of the layer above, "
            "so it cannot serve this draft"
        )


def check_positions(config: Mapping[str, Any], server: str) -> None:
    """Reject scaled rotary positions that a server computes in another way than transformers, and so than training.

    For latent attention, both servers compute DeepSeek's YaRN whatever the type is, and read no ``attention_factor``
    (but vLLM leaves the temperature of the scores out if that is 1). SGLang does not read it for other layers either.

    Raises:
        UserError: names the field, or both factors of cosine and sine.
    """
    rope, latent = config.get("rope_parameters") or {}, "kv_lora_rank" in config
    kind = rope.get("rope_type", "default")
    if latent and kind not in ("default", "yarn"):
        raise UserError(
            f"export: rope_type is {kind}; for latent attention, {server} would compute yarn; use default or yarn"
        )
    if kind != "yarn":
        return
    if latent and "attention_factor" in rope:
        raise UserError(
            f"export: attention_factor is {rope['attention_factor']}, which {server} does not read for latent "
            "attention; use mscale and mscale_all_dim"
        )
    ours, theirs = _factor(rope), _factor(rope)
    if latent:
        theirs = _grown(rope, rope.get("mscale", 1)) / _grown(rope, rope.get("mscale_all_dim", 0))
    elif server == SGLang.name:
        both = "mscale" in rope and "mscale_all_dim" in rope
        theirs = _grown(rope, rope["mscale"]) / _grown(rope, rope["mscale_all_dim"]) if both else _grown(rope, 1)
    if not math.isclose(ours, theirs):
        raise UserError(
            f"export: the draft was trained with cosines and sines times {ours:.4g}, but {server} would multiply them "
            f"by {theirs:.4g} (attention_factor, mscale and mscale_all_dim in rope_parameters)"
            + ("; use --to vllm" if server == SGLang.name and not latent else "")
        )


def _factor(rope: Mapping[str, Any]) -> float:
    """YaRN's factor of cosine and sine, as transformers computes it."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _grown(rope, rope["mscale"]) / _grown(rope, rope["mscale_all_dim"])
    return _grown(rope, 1)


def _grown(rope: Mapping[str, Any], mscale: float) -> float:
    """``0.1 mscale ln(factor) + 1`` (YaRN, arXiv 2309.00071, with DeepSeek's ``mscale``)."""
    return 0.1 * mscale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

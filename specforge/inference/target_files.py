"""The files of a frozen target: its folder, config, single tensors, and fingerprint.

The files are interpreted as transformers does, whose classes run the target: defaults of fields that config.json omits,
which tensors are the embedding and the head, whether the two are tied, and how the class scales or caps the logits.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from specforge.errors import UserError
from specforge.files import first_line, open_safetensors, read_json, weight_files
from specforge.inference.float8_blocks import FLOAT8, SCALE, Block, dequantise

_SAMPLE = 1 << 16
_SAMPLES_PER_FILE = 64
# Names in checkpoints that differ from those in the class; transformers renames such tensors when loading.
_OTHER_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
# Config fields by which classes multiply (1) or divide (-1) the logits; only HyperCLOVA X multiplies by logits_scaling.
_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class TargetFiles:
    """A target model's folder."""

    name: str  # folder or hub name, as given by the user
    folder: Path  # local folder with config.json and safetensors

    @classmethod
    def find(cls, name: str, what: str = "target") -> TargetFiles:
        """Locate a target by folder or hub name.

        Raises:
            UserError: the folder does not exist, and the hub has no such model or does not respond.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = _from_hub(name, what)
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: no config.json, so this is not a model folder")
        return cls(name, folder)

    @property
    def config(self) -> dict[str, Any]:
        """A copy of the config's fields as transformers reads them, including the defaults of the class.

        For a model of several modalities, the config of the text part. Fields with a class-specific name (GPT-2's
        ``n_embd``) are also present under the common name.
        """
        config = self._parsed
        return {**config.to_dict(), **{name: getattr(config, name) for name in config.attribute_map}}

    @cached_property
    def _parsed(self) -> Any:
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind = self._raw.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            code = "; code in the model folder (auto_map) is never run" if "auto_map" in self._raw else ""
            raise UserError(f"{self.folder / 'config.json'}: transformers has no model_type {kind!r}{code}"[:400])
        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False).get_text_config(decoder=True)
        except Exception as error:  # a class may raise anything for a user's file
            raise UserError(f"{self.folder / 'config.json'}: {first_line(error)}") from error

    @cached_property
    def _raw(self) -> dict[str, Any]:
        whole = read_json(self.folder / "config.json")
        if not isinstance(whole, dict):
            raise UserError(f"{self.folder / 'config.json'}: not a JSON object")
        return whole

    def model_config(self) -> Any:
        """A copy of the transformers config."""
        return copy.deepcopy(self._parsed)

    @cached_property
    def skeleton(self) -> Any:
        """The target's model without weights, for the names and kinds of its modules."""
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self._parsed, trust_remote_code=False)
        except Exception as error:  # a class may raise anything for a user's file
            raise UserError(f"{self.folder}: transformers cannot build it ({first_line(error)})") from error

    @cached_property
    def _quantisation(self) -> dict[str, Any]:
        return self._raw.get("quantization_config") or self.config.get("quantization_config") or {}

    @property
    def quantisation(self) -> str:
        """How the weights are quantised, such as fp8, gptq or compressed-tensors; empty if they are not."""
        return str(self._quantisation.get("quant_method", ""))

    @cached_property
    def weight_block(self) -> Block | None:
        """Rows and columns of the blocks of 8-bit weights; None if the weights are not quantised in blocks."""
        form = self._quantisation
        block: list[int] = form.get("weight_block_size") or []
        return (int(block[0]), int(block[1])) if len(block) == 2 else None

    @cached_property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self._count("hidden_size")

    @cached_property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self._count("num_hidden_layers")

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._count("vocab_size")

    def compute_dtype(self, name: str) -> str:
        """Name of a compute dtype; ``auto`` is that of the checkpoint: its config's, or else its embedding's.

        Raises:
            UserError: it is not a floating-point dtype.
        """
        if name == "auto":
            found = self.config.get("dtype") or self.embedding().dtype
            name = str(found).removeprefix("torch.")
        torch_dtype(name)
        return name

    def _count(self, key: str) -> int:
        value = self.config.get(key)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.folder / 'config.json'}: {key} is {value}, not a whole number of at least 1")
        return value

    @cached_property
    def max_positions(self) -> int | None:
        """Maximum sequence length that the target supports; None if the config does not specify it."""
        found = self.config.get("max_position_embeddings")
        if type(found) is not int or found < 1:
            return None
        factors = [
            part.get("factor") or 1
            for part in self._rope_parts
            if part.get("rope_type") in ("linear", "dynamic", "yarn")
            and not part.get("original_max_position_embeddings")
        ]
        return int(found * max(factors, default=1))

    @cached_property
    def learned_positions(self) -> int | None:
        """Maximum sequence length with learned position embeddings; None if the target has none."""
        return learned_positions(self.skeleton, self.config.get("max_position_embeddings"))

    @cached_property
    def positions_change_at(self) -> int | None:
        """Sequence length beyond which the rotary embedding of all tokens changes; None if it never changes.

        This applies to the types ``longrope`` and ``dynamic`` of transformers, for which hidden states depend on the
        length of the sequence and of the batch.
        """
        limits = [
            (part.get("original_max_position_embeddings") if kind == "longrope" else None)
            or self.config.get("max_position_embeddings")
            for part in self._rope_parts
            if (kind := part.get("rope_type")) in ("longrope", "dynamic")
        ]
        return min((limit for limit in limits if type(limit) is int and limit > 0), default=None)

    @property
    def _rope_parts(self) -> list[dict[str, Any]]:
        """Parameters of the rotary embedding, per kind of layer if they differ."""
        rope = self.config.get("rope_parameters") or {}
        return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]

    @cached_property
    def weight_files(self) -> dict[str, Path]:
        """The safetensors file of each tensor."""
        files = weight_files(self.folder)
        if files is not None:
            return files
        pickles = sorted(p.name for p in self.folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which SpecForge never loads" if pickles else ""
        raise UserError(f"{self.folder}: no model.safetensors{hint}")

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; 8-bit weights with one scale per block are converted to fp32.

        Raises:
            UserError: the tensor is quantised in another format.
        """
        tensor = self._stored(name)
        if tensor.dtype.itemsize > 1:
            return tensor
        scales = name + SCALE
        if tensor.dtype != FLOAT8 or self.weight_block is None or scales not in self.weight_files:
            raise UserError(
                f"{self.name}: {name} is quantised to {str(tensor.dtype).removeprefix('torch.')}, but only "
                "float8_e4m3fn with one scale per block is supported; use a bfloat16 copy"
            )
        try:
            return dequantise(tensor, self._stored(scales), self.weight_block)
        except ValueError as error:
            raise UserError(f"{self.name}: {name}: {error}") from error

    def _stored(self, name: str) -> Tensor:
        with open_safetensors(self.weight_files[name]) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def embedding(self) -> Tensor:
        """The token embedding, ``[V, H]``.

        Raises:
            UserError: the embedding is missing or has another shape.
        """
        found = self._module_tensor(self.skeleton.get_input_embeddings(), "weight", "token embedding")
        if found.shape != (self.vocab_size, self.hidden_size):
            raise UserError(
                f"{self.name}: its embedding is {tuple(found.shape)}, not {(self.vocab_size, self.hidden_size)}; "
                "drafts need embeddings of the same width as the states"
            )
        return found

    def lm_head(self) -> Tensor:
        """The output matrix ``[V, H]``, multiplied by the class's logit scale.

        If config and files tie it, this is the embedding. As in transformers, a separate head in the files takes
        precedence.
        """
        found, scale = self._head_or_none("weight"), self.logit_scale
        if found is None:
            if not self.config.get("tie_word_embeddings"):
                raise UserError(
                    f"{self.folder}: no lm_head among its tensors, and its config does not tie it to the embedding"
                )
            found = self.embedding()
        return found if scale == 1.0 else (found.float() * scale).to(found.dtype)

    def has_own_head(self) -> bool:
        """Whether :meth:`lm_head` differs from :meth:`embedding`."""
        return self._head_name("weight") is not None or self.logit_scale != 1.0

    def lm_head_bias(self) -> Tensor | None:
        """The bias of the head, ``[V]``; None if it has none."""
        if getattr(self.skeleton.get_output_embeddings(), "bias", None) is None:
            return None
        bias = self._head_or_none("bias")
        if bias is None:
            raise UserError(f"{self.folder}: its head has a bias, but the tensor is missing")
        return bias if self.logit_scale == 1.0 else bias * self.logit_scale

    @cached_property
    def logit_scale(self) -> float:
        """Factor by which the class multiplies the logits."""
        config = self.config
        powers = _SCALES | ({"logits_scaling": 1} if config["model_type"] == "hyperclovax" else {})
        factors = [
            float(value) ** power for key, power in powers.items() if (value := getattr(self._parsed, key, None))
        ]
        return float(math.prod(factors))

    @cached_property
    def softcap(self) -> float | None:
        """C if the class caps its logits as ``c tanh(z / c)``, else None."""
        caps = (self.config.get(key) for key in _CAPS)
        return next((float(cap) for cap in caps if cap), None)

    def _head_name(self, part: str) -> str | None:
        return self._stored_name(self.skeleton.get_output_embeddings(), part, _OTHER_HEADS if part == "weight" else ())

    def _head_or_none(self, part: str) -> Tensor | None:
        name = self._head_name(part)
        return None if name is None else self.tensor(name)

    def _module_tensor(self, module: Any, part: str, what: str) -> Tensor:
        name = self._stored_name(module, part)
        if name is None:
            raise UserError(f"{self.folder}: no {what} among its tensors")
        return self.tensor(name)

    def _stored_name(self, module: Any, part: str, others: tuple[str, ...] = ()) -> str | None:
        """Name of a module's tensor in the files, whose prefix may be longer or shorter than in the class."""
        path = next((name for name, x in self.skeleton.named_modules() if x is module), None)
        if path is None:
            return None
        words = f"{path}.{part}".split(".")
        for name in (*(".".join(words[i:]) for i in range(len(words) - 1)), *others):
            ends = [n for n in self._own_names if n == name or n.endswith(f".{name}")]
            if ends:
                return min(ends, key=len)
        return None

    @property
    def _own_names(self) -> list[str]:
        """Names of all tensors except those of MTP modules, which have their own norms and sometimes embeddings."""
        return [n for n in self.weight_files if not n.startswith("mtp.")]

    def final_norm(self) -> Tensor:
        """Weight ``[H]`` of the norm before ``lm_head``."""
        return self._first(("norm.weight",), "final norm")

    def norm_module(self, dtype: torch.dtype) -> nn.Module:
        """The module that computes the last hidden states ``[n, H]`` from the output of the last layer.

        It is transformers' own, so it also knows the norms whose multiplier is not their weight.

        Raises:
            UserError: the class has no norm after its layers, or a tensor is missing.
        """
        groups = ([*module.children()] for module in self.skeleton.modules())
        siblings = next((x for x in groups if any(_is_list(child, self.num_layers) for child in x)), [])
        norms = [module for module in siblings if "norm" in type(module).__name__.lower()]
        if not norms:
            raise UserError(f"{self.name}: {type(self.skeleton).__name__} has no norm after its layers")
        norm = copy.deepcopy(norms[-1])
        parts = {part: self._module_tensor(norms[-1], part, "final norm") for part in norm.state_dict()}
        norm.load_state_dict({part: x.to(dtype) for part, x in parts.items()}, assign=True)
        return norm.eval().requires_grad_(False)

    def layer_tensor(self, layer: int, name: str) -> Tensor:
        """A tensor of a decoder layer, such as ``mlp.up_proj.weight``."""
        return self._first((f"layers.{layer}.{name}",), f"{name} in layer {layer}")

    def _first(self, names: tuple[str, ...], what: str) -> Tensor:
        ends = [n for n in self._own_names if any(n == x or n.endswith("." + x) for x in names)]
        if not ends:
            raise UserError(f"{self.folder}: no {what} among its tensors (looked for {', '.join(names)})")
        return self.tensor(min(ends, key=len))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config and of the weights: tensor names, shapes, and 64 samples of 64 KiB of each file."""
        digest = xxhash.xxh3_128()
        volatile = ("transformers_version", "_name_or_path")
        text = self._raw.get("text_config") or self._raw
        config = {k: v for k, v in text.items() if k not in volatile}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for path in sorted(set(self.weight_files.values())):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                for i in range(1, _SAMPLES_PER_FILE + 1):
                    file.seek(max(0, (size - _SAMPLE) * i // _SAMPLES_PER_FILE))
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()


def _is_list(module: nn.Module, length: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == length


def learned_positions(model: Any, size: int | None) -> int | None:
    """``size`` if a model has a table of learned positions of this size, else None."""
    words = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words)
    # Some classes reserve two rows of the table for padding.
    return size if size and any(m.num_embeddings - size in (0, 2) for m in tables) else None


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype with a name such as ``bfloat16``.

    Raises:
        UserError: it is not a floating-point dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype {name!r}: use auto, float32, bfloat16 or float16")
    return dtype


def _from_hub(name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{what} {name!r}: no such folder, and not a model hub name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{what} {name!r}: no such folder, and not found on the model hub ({reason})") from error

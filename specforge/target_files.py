"""A frozen target as files: where it is, what its config says, single tensors, and its fingerprint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specforge.errors import UserError
from specforge.files import read_json
from specforge.float8_blocks import FLOAT8, SCALE, Block, dequantise

_SAMPLE = 1 << 16
_SAMPLES_PER_FILE = 64
_EMBEDDING_NAMES = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight")
_HEAD_NAMES = ("lm_head.weight", "model.lm_head.weight", "output.weight", "embed_out.weight")


@dataclass(frozen=True)
class TargetFiles:
    """A target model's folder.

    Attributes:
        name: what the user called it.
        folder: local folder with config.json and safetensors.
    """

    name: str
    folder: Path

    @classmethod
    def find(cls, name: str, what: str = "target") -> TargetFiles:
        """Locate a target by folder or hub name.

        Args:
            name: folder or hub name.
            what: what to call it in an error message.

        Raises:
            UserError: no such folder, and the hub has no such model or does not answer.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = _from_hub(name, what)
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: no config.json, so this is not a model folder")
        return cls(name, folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Fields of config.json; of its text part where the model has several modalities."""
        return dict(self._whole_config.get("text_config") or self._whole_config)

    @cached_property
    def _whole_config(self) -> dict[str, Any]:
        return dict(read_json(self.folder / "config.json"))

    @cached_property
    def weight_block(self) -> Block | None:
        """Rows and columns of a block of 8-bit weights with one scale each; None where the config has no such."""
        form = self._whole_config.get("quantization_config") or self.config.get("quantization_config") or {}
        block: list[int] = form.get("weight_block_size") or []
        return (int(block[0]), int(block[1])) if len(block) == 2 else None

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self._field("hidden_size"))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self._field("num_hidden_layers"))

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self._field("vocab_size"))

    def _field(self, key: str) -> Any:
        try:
            return self.config[key]
        except KeyError:
            raise UserError(f"{self.folder / 'config.json'}: no field {key}") from None

    @cached_property
    def weight_files(self) -> dict[str, Path]:
        """Tensor name to the safetensors file that holds it."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            return {name: self.folder / file for name, file in read_json(index)["weight_map"].items()}
        single = self.folder / "model.safetensors"
        if not single.exists():
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle, which SpecForge never loads" if pickles else ""
            raise UserError(f"{self.folder}: no model.safetensors{hint}")
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; 8-bit weights with one scale a block become fp32.

        Raises:
            UserError: it is quantised otherwise.
        """
        tensor = self._stored(name)
        if tensor.dtype.itemsize > 1:
            return tensor
        scales = name + SCALE
        if tensor.dtype != FLOAT8 or self.weight_block is None or scales not in self.weight_files:
            raise UserError(
                f"{self.name}: {name} is quantised to {str(tensor.dtype).removeprefix('torch.')}, of which only "
                "float8_e4m3fn with one scale a block is read; use a bfloat16 copy"
            )
        try:
            return dequantise(tensor, self._stored(scales), self.weight_block)
        except ValueError as error:
            raise UserError(f"{self.name}: {name}: {error}") from error

    def _stored(self, name: str) -> Tensor:
        with open_safetensors(self.weight_files[name]) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def embedding(self) -> Tensor:
        """The token embedding, ``[V, H]``."""
        return self._first(_EMBEDDING_NAMES, "token embedding")

    def lm_head(self) -> Tensor:
        """The output matrix, ``[V, H]``; the embedding where they are tied."""
        if self.config.get("tie_word_embeddings") and not any(n in self.weight_files for n in _HEAD_NAMES):
            return self.embedding()
        return self._first(_HEAD_NAMES, "lm_head")

    def final_norm(self) -> Tensor:
        """Weight of the norm before ``lm_head``, ``[H]``."""
        return self._first(("norm.weight",), "final norm")

    def layer_tensor(self, layer: int, name: str) -> Tensor:
        """A tensor of a decoder layer, such as ``mlp.up_proj.weight``."""
        return self._first((f"layers.{layer}.{name}",), f"{name} in layer {layer}")

    def _first(self, names: tuple[str, ...], what: str) -> Tensor:
        # A model's MTP modules have a norm and sometimes an embedding of their own.
        own = [n for n in self.weight_files if not n.startswith("mtp.")]
        ends = [n for n in own if any(n == x or n.endswith("." + x) for x in names)]
        if not ends:
            raise UserError(f"{self.folder}: no {what} among its tensors (looked for {', '.join(names)})")
        return self.tensor(min(ends, key=len))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config and of the weights: tensor names, shapes, and 64 samples of 64 KiB of each file."""
        digest = xxhash.xxh3_128()
        volatile = ("transformers_version", "_name_or_path")
        config = {k: v for k, v in self.config.items() if k not in volatile}
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


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file for reading on the CPU.

    Raises:
        UserError: the file is missing or not safetensors.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def torch_dtype(name: str) -> torch.dtype:
    """Torch dtype of a name such as ``bfloat16``.

    Raises:
        UserError: there is no such floating-point dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype {name!r}: use float32, bfloat16 or float16")
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
        raise UserError(
            f"{what} {name!r}: no such folder, and not found on the model hub ({reason})"
        ) from error

"""A small language model of its own as the draft: any causal LM of transformers with the target's vocabulary.

It reads nothing of the target but the text. Its weights keep their names behind ``model.``, so that an export is
the ordinary folder that transformers and servers load.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specforge.errors import UserError
from specforge.modeling.draft.registry import Draft, copy_into
from specforge.modeling.target_head import distance
from specforge.target_files import TargetFiles


class StandaloneDraft(Draft):
    """A causal LM of transformers.

    Args:
        config: fields of its ``config.json``. With a ``draft_vocab_size`` below ``vocab_size`` it has an output head
            of that many rows, untied from the embedding.
        where: what to call the config in an error message.

    Raises:
        UserError: transformers has no such model, or its logits are not its head times its last state.
    """

    attention_implementations = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")

    def __init__(self, config: Mapping[str, Any], where: str = "draft config") -> None:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        fields = {
            key: value for key, value in config.items() if key not in ("model_type", *_NOT_THE_NETWORKS)
        }
        kind = config.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise UserError(f"{where}: transformers has no model_type {kind!r}")
        reduced = (fields.get("draft_vocab_size") or config["vocab_size"]) < config["vocab_size"]
        if reduced:
            fields["tie_word_embeddings"] = False
        try:
            super().__init__(CONFIG_MAPPING[kind](**fields))
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except (AttributeError, ImportError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
            raise UserError(f"{where}: {str(error).splitlines()[-1].strip()}") from error
        self.architecture = type(self.model).__name__
        self.config.architectures = [self.architecture]
        if getattr(self.model.get_output_embeddings(), "bias", None) is not None:
            raise UserError(
                f"{where}: the output head of {self.architecture} has a bias, which is not supported"
            )
        if reduced:
            self.model.set_output_embeddings(nn.Linear(self.config.hidden_size, len(self.d2t), bias=False))
            nn.init.normal_(self.head_weight, std=0.02)
        self._check_logits(where)
        self._keep_tied_tensors_once()
        self._cast: tuple[Any, Any] | None = None

    @torch.no_grad()
    def _check_logits(self, where: str) -> None:
        """Training multiplies states by the head, decoding runs the model: two tokens show whether that is the same.

        Raises:
            UserError: the class scales or caps its logits, say.
        """
        tokens = torch.tensor([[0, self.config.vocab_size // 2]])
        mine, own = self.forward(tokens) @ self.head_weight.T, self.model(tokens).logits
        if mine.shape != own.shape or not distance(mine, own) < 1e-3:
            raise UserError(
                f"{where}: the logits of {self.architecture} are not its output head times its last states, which is "
                "not supported for a draft"
            )

    @property
    def head_weight(self) -> Tensor:
        """``[D, H]``, rows of the output head."""
        return self.model.get_output_embeddings().weight  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Last hidden states ``[B, L, H]`` of ``input_ids [B, L]``, padded on the right: attention is causal."""
        output = self.model.base_model(input_ids=input_ids, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def decoder(self, dtype: torch.dtype) -> Any:
        """The causal LM in another dtype; the copy is kept until the weights change."""
        if dtype == self.head_weight.dtype:
            return self.model
        key = (dtype, self.head_weight.device, *(p._version for p in self.model.parameters()))
        if self._cast is None or self._cast[0] != key:
            self._cast = (key, copy.deepcopy(self.model).to(dtype))
        return self._cast[1]

    @torch.no_grad()
    def start_from_target(self, target: TargetFiles) -> None:
        """Copy embedding, head, final norm and as many decoder layers of the target as the draft has, evenly spaced.

        Raises:
            UserError: a tensor is missing in the target, or of another shape.
        """
        layers = spread(self.config.num_hidden_layers, target.num_layers)
        head = next((name for name, p in self.model.named_parameters() if p is self.head_weight), None)
        for name, parameter in self.model.named_parameters():
            if name == head and parameter is not self.model.get_input_embeddings().weight:
                value = target.lm_head()[self.target_ids]
            else:
                source = _in_layer(name, layers)
                if source not in target.weight_files:
                    raise UserError(f"{target.name}: has no tensor {source}, so the draft cannot start there")
                value = target.tensor(source)
            copy_into(parameter, value, f"{name} of {target.name}")

    def _keep_tied_tensors_once(self) -> None:
        """A tied tensor is stored under its first name only, and shared again when it is loaded."""
        first: dict[int, str] = {}
        tied: dict[str, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                tied[name] = first[id(parameter)]

        def drop(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
            for name in tied:
                state.pop(prefix + name, None)

        def share(module: Any, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            for name, source in tied.items():
                if prefix + source in state:
                    state.setdefault(prefix + name, state[prefix + source])

        self.register_state_dict_post_hook(drop)
        self.register_load_state_dict_pre_hook(share)


# Fields that say nothing of the network; a quantised target's draft is not quantised.
_NOT_THE_NETWORKS = (
    "_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version",
)  # fmt: skip


def config_like(target: TargetFiles, layers: int) -> dict[str, Any]:
    """Fields of a model like the target with fewer layers."""
    config = {key: value for key, value in target.config.items() if key not in _NOT_THE_NETWORKS}
    config["num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][i] for i in spread(layers, target.num_layers)]
    return config


def spread(count: int, layers: int) -> list[int]:
    """``count`` of a model's layers, evenly spaced, the first and the last among them."""
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def _in_layer(name: str, layers: list[int]) -> str:
    """A tensor's name in the model whose layers ``layers`` were taken."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is not None:
        parts[at] = str(layers[int(parts[at])])
    return ".".join(parts)

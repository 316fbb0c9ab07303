"""A separate small language model as the draft: any causal LM of transformers with the target's vocabulary.

It reads only the text, no features of the target. Its weights keep their names after the prefix ``model.``, so that an
export is the usual folder that transformers and servers load.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.target_files import TargetFiles, learned_positions
from specforge.inference.target_layers import backbone
from specforge.modeling.draft.fields import ROPE_SPELLINGS, bookkeeping, quoted
from specforge.modeling.draft.registry import LIBRARY_ERRORS, Draft, check_memory
from specforge.modeling.draft.starting import copy_into, spread


class StandaloneDraft(Draft):
    """A causal LM of transformers.

    Args:
        config: fields of its ``config.json``. A ``draft_vocab_size`` below ``vocab_size`` gives it an output head with
            that many rows, untied from the embedding.
        where: name of the config, for error messages.

    Raises:
        UserError: transformers has no such model, or its logits are not its head times its last state.
    """

    attention_implementations = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")

    def __init__(self, config: Mapping[str, Any], where: str = "draft config") -> None:
        from transformers import AutoModelForCausalLM

        size = config.get("vocab_size")
        if type(size) is not int or not 0 < size < 1 << 24:
            raise UserError(f"{where}: vocab_size is {quoted(size)}, not a number of tokens")
        reduced = config.get("draft_vocab_size") not in (None, size)
        fields = {**config, "tie_word_embeddings": False} if reduced else config
        made = _config_of(fields, where)
        try:
            check_memory(lambda: AutoModelForCausalLM.from_config(copy.deepcopy(made)))
            super().__init__(made)
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except (ImportError, *LIBRARY_ERRORS) as error:
            raise UserError(f"{where}: {first_line(error)}") from error
        self.architecture = type(self.model).__name__
        self.config.architectures = [self.architecture]
        if getattr(self.model.get_output_embeddings(), "bias", None) is not None:
            raise UserError(f"{where}: the output head of {self.architecture} has a bias, which is not supported")
        if reduced:
            self.model.set_output_embeddings(nn.Linear(self.config.hidden_size, len(self.d2t), bias=False))
            nn.init.normal_(self.head_weight, std=0.02)
        self._check_logits(where)
        self._keep_tied_tensors_once()
        self._cast: tuple[Any, Any] | None = None

    def checkpoint_activations(self, what: Literal["none", "mlp", "layer"]) -> None:
        """As in :class:`Draft`, by transformers' own means: of a layer everything is computed again, or nothing.

        Raises:
            UserError: the model cannot.
        """
        if what == "layer":
            try:
                model = self.model  # the first name is that of newer versions
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
            except ValueError as error:
                raise UserError(f"model.checkpoint_activations: {first_line(error)}") from error

    @property
    def head_weight(self) -> Tensor:
        """``[D, H]`` matrix of the output head."""
        return self.model.get_output_embeddings().weight  # type: ignore[no-any-return]

    @property
    def longest(self) -> int | None:
        """Maximum number of tokens of a training text; None if there is no limit.

        Learned positions end there. Rotary positions that depend on the length of the text change there, for all texts
        of a batch.
        """
        table = getattr(self.config, "max_position_embeddings", None)
        if (learned := learned_positions(self.model, table)) is not None:
            return learned
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
        return table if rope.get("rope_type") == "dynamic" else None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Last hidden states ``[B, L, H]`` of ``input_ids [B, L]``, padded on the right: attention is causal."""
        output = backbone(self.model)(input_ids=input_ids, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @torch.no_grad()
    def _check_logits(self, where: str) -> None:
        """Check on two tokens that the logits are the head times the last state, as training assumes."""
        seen: list[Tensor] = []

        def enlarge(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.append(inputs[0])
            seen.append(output * (1000 / output.abs().max()))  # large enough for a cap to show
            return seen[1]

        ids = torch.tensor([[0, self.config.vocab_size - 1]])
        self.eval()  # a class may have dropout
        handle = self.model.get_output_embeddings().register_forward_hook(enlarge)
        try:
            logits = self.model(ids, use_cache=False).logits
            plain = torch.allclose(logits, seen[1]) and torch.allclose(self(ids), seen[0])
        except (ImportError, *LIBRARY_ERRORS) as error:
            raise UserError(f"{where}: the model fails on two tokens ({first_line(error)})") from error
        finally:
            handle.remove()
            self.train()
        if not plain:
            raise UserError(
                f"{where}: the logits of {self.architecture} are not its output head times its last states (its config "
                "scales or caps them), which is not supported for a draft"
            )

    def difference(
        self, config: Mapping[str, Any], where: str, ignored: Container[str] = ()
    ) -> tuple[str, Any, Any] | None:
        """As in :class:`Draft`, for all fields of the model's config."""
        theirs, mine = (x.to_dict() for x in (_config_of(config, where), self.config))
        names = sorted(theirs.keys() - bookkeeping() - {"draft_vocab_size"})
        found = next((n for n in names if n not in ignored and theirs[n] != mine.get(n)), None)
        return None if found is None else (found, theirs[found], mine.get(found))

    def decoder(self, dtype: torch.dtype) -> Any:
        """The causal LM in ``dtype``; a converted copy is kept until the weights change."""
        if dtype == self.head_weight.dtype:
            return self.model
        key = (dtype, self.head_weight.device, *(p._version for p in self.model.parameters()))
        if self._cast is None or self._cast[0] != key:
            self._cast = (key, copy.deepcopy(self.model).to(dtype))
        return self._cast[1]

    @torch.no_grad()
    def start_from_target(self, target: TargetFiles) -> None:
        """Copy the target's embedding, head, final norm and evenly spaced decoder layers, as many as the draft has.

        Raises:
            UserError: a tensor is missing in the target, or has another shape.
        """
        layers = spread(self.config.num_hidden_layers, target.num_layers)
        head = next((name for name, p in self.model.named_parameters() if p is self.head_weight), None)
        for name, parameter in self.model.named_parameters():
            if name == head and parameter is not self.model.get_input_embeddings().weight:
                value = target.lm_head()[self.target_ids]
            else:
                source = _in_layer(name, layers)
                if source not in target.weight_files:
                    raise UserError(f"{target.name}: has no tensor {source}, so the draft cannot start from it")
                value = target.tensor(source)
            copy_into(parameter, value, f"{name} of {target.name}")

    def _keep_tied_tensors_once(self) -> None:
        """Store tied tensors under their first name only, and share them again on loading."""
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


# Fields that do not describe the network. The draft of a quantised target is not quantised.
_NOT_THE_NETWORKS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)


def _config_of(config: Mapping[str, Any], where: str) -> Any:
    """The transformers config with these fields."""
    kind = config.get("model_type")
    fields = copy.deepcopy({key: x for key, x in config.items() if key not in ("model_type", *_NOT_THE_NETWORKS)})
    try:
        return _config_class(kind, where)(**fields)
    except UserError:
        raise
    except (ImportError, *LIBRARY_ERRORS) as error:
        raise UserError(f"{where}: {first_line(error)}") from error


def _config_class(kind: Any, where: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{where}: transformers has no model_type {quoted(kind)}")
    return CONFIG_MAPPING[kind]


def changes_of(given: Mapping[str, Any], kind: Any, where: str) -> dict[str, Any]:
    """A user's fields for a model of ``model_type`` ``kind``, under the names in its config class.

    Raises:
        UserError: the class has no such field and would ignore it.
    """
    made = _config_class(kind, where)()
    known = {*made.to_dict(), *made.attribute_map, *ROPE_SPELLINGS, "draft_vocab_size", "attn_implementation"}
    for name, value in given.items():
        if name not in known | bookkeeping() and value is not None and value is not False:
            raise UserError(
                f"{where}: {name} is {quoted(value)}, but model_type {kind!r} has no such field; leave it out"
            )
    return {made.attribute_map.get(name, name): value for name, value in given.items()}


def config_like(target: TargetFiles, layers: Any) -> dict[str, Any]:
    """Fields of a model like the target, with fewer layers; lists with one entry per layer keep evenly spaced ones.

    Raises:
        UserError: the target does not have that many layers.
    """
    config, count = target.config, target.num_layers
    names = _config_class(config["model_type"], target.name).attribute_map
    if type(layers) is not int or not 1 <= layers <= count:
        raise UserError(f"model.draft_config: num_hidden_layers is {quoted(layers)}, but {target.name} has {count}")
    kept = spread(layers, count)
    fields = {
        name: [value[i] for i in kept] if isinstance(value, list) and len(value) == count else value
        for name, value in config.items()
        if name not in names and name not in _NOT_THE_NETWORKS
    }
    return {**fields, names.get("num_hidden_layers", "num_hidden_layers"): layers}


def _in_layer(name: str, layers: list[int]) -> str:
    """The name that a tensor has in the model from which ``layers`` were taken."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is not None:
        parts[at] = str(layers[int(parts[at])])
    return ".".join(parts)

"""The target in transformers: hidden states by hooks on the decoder layers, answers by ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.errors import UserError
from specforge.inference.target_engine.base import check_layers, feature_widths
from specforge.target_files import TargetFiles, torch_dtype


class FeatureTap:
    """Keeps what a policy asks for of every forward pass.

    Args:
        model: a transformers causal LM.
        policy: which layers, and whether the state after the final norm.
    """

    def __init__(self, model: Any, policy: CapturePolicy) -> None:
        self.policy = policy
        self._outputs: dict[int, Tensor] = {}
        self._last: Tensor | None = None
        layers = decoder_layers(model) if policy.layer_ids else ()
        self._handles = [layers[i].register_forward_hook(self._keep(i)) for i in policy.layer_ids]
        if policy.last_hidden_states:
            self._handles.append(model.base_model.register_forward_hook(self._keep_last))

    def _keep(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = output.last_hidden_state

    def features(self) -> dict[str, Tensor]:
        """Features of the last pass: ``aux_hidden_states [B, L, k H]``, ``last_hidden_states [B, L, H]``."""
        features: dict[str, Tensor] = {}
        if self.policy.layer_ids:
            features[AUX_HIDDEN_STATES] = torch.cat([self._outputs[i] for i in self.policy.layer_ids], dim=-1)
        if self._last is not None:
            features[LAST_HIDDEN_STATES] = self._last
        return features

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a transformers model.

    Raises:
        UserError: none of its module lists has as many entries as the config has layers.
    """
    config: Any = model.config
    config = config.get_text_config()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise UserError(f"{type(model).__name__}: no list of {config.num_hidden_layers} decoder layers found")


def _to_host(x: Tensor) -> Tensor:
    """Contiguous, on the CPU; what comes from a GPU is page-locked, and still being written."""
    if x.device.type != "cuda":
        return x.cpu().contiguous()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class HFTargetEngine:
    """A transformers causal LM, frozen.

    Args:
        target: where it lies.
        dtype: compute dtype.
        device: where it runs.

    Raises:
        UserError: transformers cannot load it.
    """

    def __init__(self, target: TargetFiles, dtype: str = "bfloat16", device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.target, self.dtype, self.device = target, dtype, torch.device(device)
        _ = target.weight_files  # refuses pickles, before transformers would look at them
        try:
            model = AutoModelForCausalLM.from_pretrained(
                target.folder, dtype=torch_dtype(dtype), use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{target.folder}: transformers cannot load it ({str(error).splitlines()[0]})"
            ) from error
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def check(self, policy: CapturePolicy) -> None:
        """Prove on two tokens that the policy can be met.

        Raises:
            UserError: a layer does not exist, or a feature comes out with the wrong width or dtype.
        """
        check_layers(policy, self.target.num_layers, self.target.name)
        features = self.capture([[0, 0]], policy)[0]
        for name, width in feature_widths(policy, self.target.hidden_size).items():
            found, dtype = tuple(features[name].shape), features[name].dtype
            if found != (2, width) or dtype != torch_dtype(self.dtype):
                raise UserError(
                    f"{self.target.name}: {name} of layers {list(policy.layer_ids)} is {dtype} {found}, "
                    f"not {self.dtype} (2, {width})"
                )

    @torch.inference_mode()
    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Features of each sequence; see :class:`TargetEngine`.

        Sequences are padded on the right without a mask: attention is causal, so no token sees padding.
        """
        longest = max(len(ids) for ids in input_ids)
        padded = torch.zeros(len(input_ids), longest, dtype=torch.int64)
        for row, ids in zip(padded, input_ids, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        tap = FeatureTap(self.model, policy)
        try:
            self.model.base_model(input_ids=padded.to(self.device), use_cache=False)
            features = tap.features()
        finally:
            tap.close()
        found = [
            {name: _to_host(x[i, : len(ids)]) for name, x in features.items()}
            for i, ids in enumerate(input_ids)
        ]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return found

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_ids: Sequence[int],
        temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0,
    ) -> list[list[int]]:  # fmt: skip
        """Continue each prompt until an end token (included) or ``max_new_tokens``.

        Args:
            prompts: token ids; padded on the left to one length.
            max_new_tokens: most tokens to add.
            end_ids: tokens that end an answer.
            temperature: 0 for greedy.
            top_p: nucleus of sampling.
            top_k: tokens to sample from; 0 for all.
            seed: of sampling.
        """
        longest = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), longest), end_ids[0], dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        torch.manual_seed(seed)
        output = self.model.generate(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids), pad_token_id=end_ids[0],
            **(sampling if temperature > 0 else {"do_sample": False}),
        )  # fmt: skip
        return [_until_end(row, frozenset(end_ids)) for row in output[:, longest:].tolist()]


def _until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1]
    return ids

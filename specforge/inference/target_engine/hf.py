"""The target in transformers: hidden states by forward hooks on the decoder layers, answers by ``generate``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.target_engine.base import TargetEngine, check_layers, feature_widths
from specforge.inference.target_files import TargetFiles, torch_dtype
from specforge.inference.target_head import TargetHead, distance
from specforge.inference.target_layers import backbone, decoder_layers
from specforge.system import multiplies_in, pick_device


class FeatureTap:
    """Records the features of every forward pass."""

    def __init__(self, model: Any, policy: CapturePolicy) -> None:
        self.policy = policy
        self._outputs: dict[int, Tensor] = {}
        self._last: Tensor | None = None
        layers = decoder_layers(model) if policy.layer_ids else ()
        self._handles = [layers[i].register_forward_hook(self._keep(i)) for i in policy.layer_ids]
        if policy.last_hidden_states:
            self._handles.append(backbone(model).register_forward_hook(self._keep_last))

    def _keep(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = output.last_hidden_state

    def features(self) -> dict[str, Tensor]:
        """Features of the latest pass: ``aux_hidden_states [B, L, k H]``, ``last_hidden_states [B, L, H]``."""
        features: dict[str, Tensor] = {}
        if self.policy.layer_ids:
            outputs = [self._outputs[i] for i in self.policy.layer_ids]
            # A target that is spread over several devices has its last layers on the last one.
            features[AUX_HIDDEN_STATES] = torch.cat([x.to(outputs[-1].device) for x in outputs], dim=-1)
        if self._last is not None:
            features[LAST_HIDDEN_STATES] = self._last
        return features

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


_CAN_ROLL_BACK: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_roll_back(model: Any) -> bool:
    """Whether tokens can be rolled back from a model's cache, which then contains only keys and values of tokens.

    Tested once per model on seven tokens. This detects recurrent states and convolutions wherever a class keeps them.
    """
    if model not in _CAN_ROLL_BACK:
        _CAN_ROLL_BACK[model] = not model._is_stateful and _rolls_back(model)
    return _CAN_ROLL_BACK[model]


@torch.inference_mode()
def _rolls_back(model: Any) -> bool:
    from transformers import DynamicCache

    cache, size = DynamicCache(), model.get_input_embeddings().num_embeddings
    tokens = torch.tensor([[7, 3, 11, 5, 2, 13, 1]], device=model.device) % size
    try:
        model(input_ids=tokens[:, :3], past_key_values=cache, use_cache=True)
        model(input_ids=tokens[:, 3:5], past_key_values=cache, use_cache=True)
        cache.crop(-2)
        again = model(input_ids=tokens[:, 5:], past_key_values=cache, use_cache=True).logits[0]
    except Exception:  # a class with its own cache may raise anything
        return False
    text = torch.cat([tokens[:, :3], tokens[:, 5:]], dim=1)
    whole = model(input_ids=text, use_cache=False).logits[0, 3:]
    return distance(again, whole) <= _tolerance(whole, 1e-2)


def _tolerance(logits: Tensor, least: float) -> float:
    """Allowed distance between two computations of the same logits, given the rounding of their dtype."""
    return least + 4 * torch.finfo(logits.dtype).eps * float(logits.abs().max())


def takes_positions(model: Any) -> bool:
    """Whether a model takes the positions of tokens as an input."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _to_host(x: Tensor) -> Tensor:
    """Copy to contiguous CPU memory; from a GPU, the copy is page-locked and asynchronous."""
    if x.device.type != "cuda":
        return x.cpu().contiguous()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class HFTargetEngine(TargetEngine):
    """A transformers causal LM in this process, frozen.

    Args:
        target: files of the target.
        dtype: compute dtype, and that of the features; a CPU without instructions for it multiplies in fp32.
        device: cpu, cuda, cuda:N or auto (default: the command's --device).
        device_map: spread the layers over the devices of this machine, and over memory and disk where these do not
            suffice: auto, balanced, sequential, or devices by module; replaces the device. Needs accelerate.
        attention: attention implementation of transformers, such as sdpa, eager or flash_attention_2 (default: its
            choice).

    Raises:
        UserError: transformers cannot load the target, tensors are missing from its files, or a package that it needs.
    """

    emulates = False  # a CPU without instructions for the dtype multiplies in it nevertheless, slowly

    def __init__(
        self,
        target: TargetFiles,
        dtype: str = "bfloat16",
        device: str | None = None,
        device_map: str | dict[str, str | int] | None = None,
        attention: str | None = None,
    ) -> None:
        from transformers import GenerationConfig

        super().__init__(target, dtype)
        self.attention = attention
        self.device = torch.device(pick_device(device or "cpu"))
        if device_map is None and target.quantisation and self.device.type != "cpu":
            device_map = {"": str(self.device)}  # quantised weights are placed while they are loaded
        wanted, may_use_gpus = torch_dtype(self.dtype), device_map is not None and torch.accelerator.is_available()
        self._multiplies_in = wanted if self.emulates or may_use_gpus else multiplies_in(wanted, self.device)
        model = _load(target, self._multiplies_in, device_map, attention)
        # Ignore penalties, beams and suppressed tokens in the folder's generation_config.json: no verifier of drafts
        # applies them. Only its end tokens are used, by ChatTemplate.
        model.generation_config = GenerationConfig()
        if device_map is None:
            model.to(self.device)
        else:
            self.device = _execution_device(model.get_input_embeddings())
        if self.device.type == "cpu":
            self.batch_tokens = 2048
        self.model = model.eval().requires_grad_(False)
        self._gpus = {x.device for x in model.parameters() if x.device.type == "cuda"}

    @property
    def description(self) -> str:
        """Empty unless the attention is chosen; which devices run which layers does not change what they compute."""
        from transformers import __version__

        return f"transformers {__version__}, {self.attention} attention" if self.attention else ""

    @torch.inference_mode()
    def check(self, policy: CapturePolicy) -> None:
        """Test on two tokens that the policy works and that the head in the files computes the target's logits."""
        check_layers(policy, self.target.num_layers, self.target.name)
        ids = [0, self.target.vocab_size // 2]
        try:
            (features,) = self.capture([ids], policy)
        except UserError:
            raise
        except Exception as error:  # a class may raise anything for a user's config
            raise UserError(f"{self.target.name}: cannot read two tokens ({first_line(error)})") from error
        for name, width in feature_widths(policy, self.target.hidden_size).items():
            found, dtype = tuple(features[name].shape), features[name].dtype
            if found != (2, width) or dtype != torch_dtype(self.dtype):
                raise UserError(
                    f"{self.target.name}: {name} of layers {list(policy.layer_ids)} is {dtype} {found}, "
                    f"not {self.dtype} (2, {width})"
                )
        self._check_head(ids)

    def _check_head(self, ids: list[int]) -> None:
        """Compare the target's logits for two tokens with those that training computes from its last states."""
        head = TargetHead.load(self.target, self._multiplies_in).to(self.device)
        tokens = torch.tensor(ids, device=self.device)
        embedding = self.model.get_input_embeddings()
        # Weights that are kept on a disk are not compared.
        if not embedding.weight.is_meta and not torch.equal(head.embed(tokens), embedding.weight[tokens]):
            raise UserError(
                f"{self.target.name}: the embedding in its files differs from the one that transformers uses"
            )
        (features,) = self.capture([ids], CapturePolicy(()))
        expected = self.model(input_ids=tokens[None], use_cache=False).logits[0]
        found = head.logits(features[LAST_HIDDEN_STATES].to(self.device)).to(expected.device)
        apart = distance(found, expected) if found.shape == expected.shape else math.inf
        if not apart <= _tolerance(found.to(torch_dtype(self.dtype)), 1e-3):
            raise UserError(
                f"{self.target.name}: its logits are not its output head times its last states (log-probabilities "
                f"differ by {apart:.2g}), so drafts would learn another distribution; {type(self.model).__name__} is "
                "not supported, or its files do not match its config"
            )

    @torch.inference_mode()
    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Features of each sequence, as :meth:`TargetEngine.capture` specifies.

        Sequences are padded on the right without a mask: attention is causal, so no token attends to padding.
        """
        found: dict[int, dict[str, Tensor]] = {}
        tap = FeatureTap(self.model, policy)
        try:
            for part in self._passes(input_ids):
                found |= zip(part, self._capture([input_ids[i] for i in part], tap), strict=True)
        finally:
            tap.close()
        for gpu in self._gpus:
            torch.cuda.current_stream(gpu).synchronize()
        return [found[i] for i in range(len(input_ids))]

    def _capture(self, input_ids: Sequence[Sequence[int]], tap: FeatureTap) -> list[dict[str, Tensor]]:
        longest = max(len(ids) for ids in input_ids)
        padded = torch.zeros(len(input_ids), longest, dtype=torch.int64)
        for row, ids in zip(padded, input_ids, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        backbone(self.model)(input_ids=padded.to(self.device), use_cache=False)
        features = {name: x.to(torch_dtype(self.dtype)) for name, x in tap.features().items()}
        return [{name: _to_host(x[i, : len(ids)]) for name, x in features.items()} for i, ids in enumerate(input_ids)]

    def _passes(self, input_ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Batches of sequence indices: one batch, unless the length of one sequence changes the positions of others."""
        limit = self.target.positions_change_at
        indices = range(len(input_ids))
        short = [i for i in indices if limit is None or len(input_ids[i]) <= limit]
        if short:
            yield short
        for i in indices:
            if i not in short:
                # transformers keeps the rotary frequencies of the longest text so far until it reads a short one.
                backbone(self.model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device))
                yield [i]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continue each prompt until an end token (included) or ``max_new_tokens``.

        Args:
            prompts: token ids; padded on the left to one length.
            max_new_tokens: maximum number of tokens to add.
            end_ids: tokens that end an answer; if empty, every answer has ``max_new_tokens`` tokens.
            temperature: sampling temperature; 0 for greedy.
            top_p: nucleus sampling: smallest set of tokens with this total probability.
            top_k: sample from the k most likely tokens; 0 for all.
            seed: random seed for sampling.
        """
        cached = can_roll_back(self.model)
        # In other models, padding would affect recurrent states or shift positions.
        together = cached and takes_positions(self.model) and self.target.positions_change_at is None
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": list(end_ids) or None,
            "pad_token_id": next(iter(end_ids), 0),
            **(sampling if temperature > 0 else {"do_sample": False}),
        }
        answers: list[list[int]] = []
        for part in [list(prompts)] if together else [[prompt] for prompt in prompts]:
            torch.manual_seed(seed + len(answers))
            answers += self._generate(part, cached, options)
        return [_until_end(answer, frozenset(end_ids)) for answer in answers]

    def _generate(self, prompts: Sequence[Sequence[int]], cached: bool, options: dict[str, Any]) -> list[list[int]]:
        from transformers import DynamicCache

        longest = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), longest), options["pad_token_id"], dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        # An explicit cache, because transformers' default one drops tokens outside a window in the config.
        cache = {"past_key_values": DynamicCache()} if cached else {}
        output = self.model.generate(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **options, **cache
        )
        return output[:, longest:].tolist()  # type: ignore[no-any-return]


def _execution_device(module: nn.Module) -> torch.device:
    """Where a module runs; its weights may be elsewhere if accelerate loads them for every call."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def _dequantised(target: TargetFiles) -> dict[str, Any]:
    """Options that load quantised weights dequantised, where transformers' default does not run on every device."""
    if target.quantisation != "compressed-tensors" or find_spec("compressed_tensors") is None:
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}  # type: ignore[no-untyped-call]


def _load(target: TargetFiles, dtype: torch.dtype, device_map: Any = None, attention: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _ = target.weight_files  # rejects pickles before transformers reads them
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            target.folder,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attention,
            **_dequantised(target),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a class, or a package that it needs, may raise anything
        raise UserError(f"{target.folder}: transformers cannot load it ({first_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{target.folder}: its files lack {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}, "
            "which would be initialised at random"
        )
    modules = {name for name, _ in model.named_modules()}
    unread = sorted(name for name in info["unexpected_keys"] if name.rpartition(".")[0] in modules)
    if target.quantisation and unread:
        raise UserError(
            f"{target.folder}: transformers does not read {len(unread)} of its tensors, such as {unread[0]}, so the "
            f"quantisation {target.quantisation} of its weights would be ignored"
        )
    if getattr(model, "hf_quantizer", None) is None:  # transformers dequantises and leaves the rest in bf16
        for weight in model.parameters():
            if weight.dtype in (torch.bfloat16, torch.float16):
                weight.data = weight.data.to(dtype)
    return model


def _until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1]
    return ids

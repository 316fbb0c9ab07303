"""The target's decoder layers: finding them in a transformers model, and checking a draft against the last one.

A draft that starts as the target's last layer must compute the same function. The names of tensors do not determine a
norm's multiplier, the activation function or the positions. So transformers runs the layer on a few random states, and
the draft's own layer must give the same result (:meth:`LastLayer.check`).

Shape legend: n tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.target_files import TargetFiles

_TOKENS = 7
_TOLERANCE = 1e-3
_HINT = "its last layer cannot be run on its own, so no draft can start from it; leave init_from out"


def backbone(model: Any) -> nn.Module:
    """The part of a causal LM below its head."""
    base: nn.Module = model.base_model
    if base is not model:
        return base
    layers = decoder_layers(model)  # a class without base_model_prefix: take the module that holds the layers
    return next(module for module in model.modules() if layers in module.children())


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers of a transformers model; for a multimodal model, of its text part.

    Raises:
        UserError: no module list has as many entries as the config has layers.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__}: no list of {count} decoder layers found")


class LastLayer:
    """The last decoder layer of a target and the norm after it. Weights are read when they are needed.

    Attributes:
        names: names of the layer's tensors in its transformers class.

    Raises:
        UserError: transformers cannot build the target.
    """

    def __init__(self, target: TargetFiles) -> None:
        from transformers import AutoModelForCausalLM

        self.target, config = target, target.model_config()
        config._experts_implementation = "eager"  # it runs on any device, in any dtype
        try:
            with _without_weights(), torch.random.fork_rng(devices=[]):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation="eager"
                ).eval()
            layers = decoder_layers(model)
            # The last layer becomes the only one, so its kind must be the first in the list of kinds.
            del layers[:-1]
            model.config.num_hidden_layers = 1
            if getattr(model.config, "layer_types", None):
                model.config.layer_types = model.config.layer_types[-1:]
        except UserError:
            raise
        except Exception as error:  # a user's file can make any class fail in any way
            raise UserError(f"{target.name}: {_HINT} ({first_line(error)})") from error
        self._backbone, self._layer = backbone(model), layers[0]
        self._norm = getattr(self._backbone, "norm", None)
        self.names = frozenset(self._layer.state_dict())
        self._split = _fused(self.names, config)
        self._norms = {
            name: self._layer.get_submodule(name.removesuffix(".weight"))
            for name, x in self._layer.state_dict().items()
            if x.ndim == 1 and name.endswith(".weight")
        }

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in Llama's layers; for a norm, its multiplier.

        Raises:
            UserError: there is no such tensor.
        """
        if name in self._split:
            fused, sizes, part = self._split[name]
            return self._stored(fused).split(sizes)[part]
        value, norm = self._stored(name), self._norms.get(name)
        return value if norm is None else _multiplier(norm, value)

    def final_norm(self) -> Tensor:
        """The multiplier of the norm after the last layer.

        Raises:
            UserError: the target has no such norm.
        """
        value = self.target.final_norm()
        return value if self._norm is None else _multiplier(self._norm, value)

    def _stored(self, name: str) -> Tensor:
        try:
            return self.target.layer_tensor(self.target.num_layers - 1, name)
        except UserError as error:
            raise UserError(f"{error}, so no draft can start from it; leave init_from out") from error

    @torch.no_grad()
    def check(
        self,
        network: Callable[[Tensor], Tensor],
        names: Collection[str],
        what: str,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Check that a network computes the same function as the layer.

        Args:
            network: the draft's layer, a function of the states ``[n, H]`` of n tokens.
            names: the network's tensors, by their names in Llama's layers.
            what: name of the network, for error messages.
            shared: tensors of the network that replace those that the target's files store in another form.

        Raises:
            UserError: names a tensor that the network lacks, or reports how much the results differ.
        """
        layer = f"{self.target.name}: its last layer"
        hint = f"so {what} cannot start from it; leave init_from out"
        split = {fused for fused, _, _ in self._split.values()}
        unused = sorted(self.names - split - set(names))
        if unused:
            raise UserError(f"{layer} has {unused[0]}, which the draft's layer does not have, {hint}")
        norms = {name: (norm, self._stored(name)) for name, norm in self._norms.items()}
        for norm, weight in (*norms.values(), (self._norm, self.target.final_norm())):
            if not _is_rms_norm(norm, weight):
                raise UserError(f"{layer} has norms that are not RMS norms ({type(norm).__name__}), {hint}")
        states = torch.randn(_TOKENS, self.target.hidden_size, generator=torch.Generator().manual_seed(0))
        expected, actual = self._run(states, shared or {}) - states, network(states) - states
        difference = float((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not difference < _TOLERANCE:
            config = self.target.config
            act = config.get("hidden_activation") or config.get("hidden_act")
            raise UserError(
                f"{layer} ({config['model_type']}, activation {act}) does not compute what the draft's layer computes "
                f"(the results differ by {difference:.0%}), {hint}"
            )

    def _run(self, states: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """The output of the target's own layer for ``states [n, H]``."""
        found: list[Tensor] = []

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((states[None], *args[1:]), {k: x for k, x in kwargs.items() if k != "hidden_states"})

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0])

        handles = [
            self._layer.register_forward_pre_hook(replace, with_kwargs=True),
            self._layer.register_forward_hook(keep),
        ]
        try:
            weights = {n: (shared[n] if n in shared else self._stored(n)).float() for n in self.names}
            self._layer.load_state_dict(weights, assign=True)
            self._norm.load_state_dict({"weight": self.target.final_norm().float()}, assign=True)  # type: ignore[union-attr]
            self._backbone(inputs_embeds=torch.zeros_like(states[None]), use_cache=False)
        except UserError:
            raise
        except Exception as error:  # a class may need layers that are no longer there
            raise UserError(f"{self.target.name}: {_HINT} ({first_line(error)})") from error
        finally:
            for handle in handles:
                handle.remove()
        return found[0]


def _fused(names: Collection[str], config: Any) -> dict[str, tuple[str, list[int], int]]:
    """For each part of a fused tensor, by its name in Llama: the fused tensor, the sizes of its parts, its index."""
    found: dict[str, tuple[str, list[int], int]] = {}
    qkv, gate_up = "self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"
    if qkv in names:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        sizes = [head * count for count in counts]
        found |= {f"self_attn.{x}_proj.weight": (qkv, sizes, i) for i, x in enumerate("qkv")}
    if gate_up in names:
        sizes = [config.intermediate_size] * 2
        found |= {f"mlp.{x}_proj.weight": (gate_up, sizes, i) for i, x in enumerate(("gate", "up"))}
    return found


def _multiplier(norm: nn.Module, weight: Tensor) -> Tensor:
    """The multiplier of an RMS norm with this weight: the weight, or in some families 1 + the weight."""
    zero = torch.zeros(len(weight))
    shift = _normed(norm, torch.ones(1, len(weight)), zero)[0].round()
    return weight + shift.to(weight.dtype) if bool(shift.any()) else weight


def _is_rms_norm(norm: nn.Module | None, weight: Tensor) -> bool:
    if norm is None or set(norm.state_dict()) != {"weight"}:
        return False
    states = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)) * 10 + 5
    expected = states * states.square().mean(-1, keepdim=True).rsqrt() * _multiplier(norm, weight).float()
    return torch.allclose(_normed(norm, states, weight), expected, rtol=1e-3, atol=1e-3)


def _normed(norm: nn.Module, states: Tensor, weight: Tensor) -> Tensor:
    """The output of a norm for ``states [n, H]``, with biases of zero."""
    others = {name: torch.zeros_like(x, device="cpu") for name, x in norm.named_parameters()}
    return functional_call(norm, {**others, "weight": weight.float()}, (states,))  # type: ignore[no-any-return]


@contextmanager
def _without_weights() -> Iterator[None]:
    """Build modules with parameters on the meta device. Buffers are real, because no file stores them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

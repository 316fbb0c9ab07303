"""Memory and bandwidth of a served target, estimated from its config before anything is started.

The figures leave out activations, CUDA graphs and communication buffers, for which servers keep about a tenth of the
memory of each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specforge.contracts import CapturePolicy
from specforge.inference.target_engine.base import feature_widths
from specforge.inference.target_files import TargetFiles, torch_dtype
from specforge.runtime.data_plane.encoding import stored_width

_USABLE = 0.9  # share of a GPU's memory that servers use for weights and caches
_QUANTISED = {"fp8": 1.0, "gptq": 0.5, "awq": 0.5, "mxfp4": 0.53, "bitsandbytes": 0.5}  # bytes per weight


@dataclass(frozen=True)
class Sizes:
    """Estimated sizes, all in bytes; those per token are of one sequence's token.

    Attributes:
        weights: all weights of the target.
        cache: key-value cache per token on each GPU.
        captured: captured states per token on each GPU, which servers keep until they are written.
        features: stored features per token.
        devices: number of GPUs that share the weights.
    """

    weights: int
    cache: int
    captured: int
    features: int
    devices: int

    def tokens(self, device_bytes: float) -> int:
        """Tokens that fit into the caches at once; negative if not even the weights fit."""
        return int((device_bytes * _USABLE - self.weights / self.devices) / (self.cache + self.captured))

    def lines(self, device_bytes: float | None, tokens_per_second: float = 10_000.0) -> list[str]:
        """The estimate in words.

        Args:
            device_bytes: memory of one GPU; None if it is not known.
            tokens_per_second: rate at which the target reads prompts.
        """
        rate = self.features * tokens_per_second
        share = f", {self.weights / self.devices / 1e9:,.1f} GB on each of {self.devices} devices"
        lines = [
            f"weights: {self.weights / 1e9:,.1f} GB" + share * (self.devices > 1),
            f"key-value cache: {self.cache / 1024:,.1f} KiB per token and device, and {self.captured / 1024:,.1f} KiB "
            "for the captured states",
            f"features: {self.features:,} bytes per token; {tokens_per_second:,.0f} tokens/s write {rate / 1e6:,.0f} "
            "MB/s to the store, and the trainer reads the same amount",
        ]
        if device_bytes is not None:
            fits = self.tokens(device_bytes)
            free = (
                f"about {fits:,} tokens fit into the caches" if fits > 0 else "the weights do not fit; use more devices"
            )
            lines.insert(2, f"with {device_bytes / 1e9:,.0f} GB per device, {free}")
        return lines


def estimate(
    target: TargetFiles, policy: CapturePolicy, *, dtype: str = "bfloat16", encoding: str = "raw", devices: int = 1
) -> Sizes:
    """Estimate what serving a target and capturing its states takes.

    The weights themselves are not needed. Heads are split over the devices; the compressed cache of latent attention
    and the captured states are whole on each.

    Args:
        target: the target's files.
        policy: what is captured.
        dtype: compute dtype.
        encoding: storage format of the features.
        devices: number of GPUs that share the target by tensor parallelism.

    Raises:
        UserError: transformers cannot build the target.
    """
    item, hidden = torch_dtype(dtype).itemsize, target.hidden_size
    widths = feature_widths(policy, hidden)
    states = len(policy.layer_ids) + policy.last_hidden_states
    return Sizes(
        weights=_weights(target, item),
        cache=_cache(target.config, devices) * item,
        captured=states * hidden * item,
        features=sum(stored_width(width, item, encoding) for width in widths.values()) + 5,  # token id and mask
        devices=devices,
    )


def _weights(target: TargetFiles, itemsize: int) -> int:
    """Bytes of the weights, quantised as the config says; embeddings, norms and the head are not quantised."""
    method = (target.config.get("quantization_config") or {}).get("quant_method")
    size = _QUANTISED.get(str(method), float(itemsize))
    total = 0.0
    for name, x in target.skeleton.named_parameters():
        whole = x.dim() < 2 or "embed" in name or name.endswith("lm_head.weight")
        total += x.numel() * (itemsize if whole else size)
    return int(total)


def _cache(config: dict[str, Any], devices: int) -> int:
    """Values that the key-value cache of one device holds per token; layers with a bounded state take none."""
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    layers = sum(kind == "full_attention" for kind in kinds) or config["num_hidden_layers"]
    if config.get("kv_lora_rank"):
        return int(layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"]))
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(layers * 2 * max(1, -(-heads // devices)) * width)

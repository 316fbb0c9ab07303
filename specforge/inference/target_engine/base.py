"""The interface of target engines: run the frozen target over token ids and return selected hidden states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, PromptTask, Provenance, SampleRef
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.runtime.data_plane.store import BadSampleError, StoreFullError


class UnavailableError(UserError):
    """The server of an engine does not respond, or is another one; the same request may succeed later."""


class TargetEngine(ABC):
    """Computes features of the target; a context manager that closes itself.

    A subclass takes the target and the dtype as its first two arguments. Its other arguments are the options of
    ``--engine``: ``--engine.NAME`` on the command line, ``init_args`` in YAML.

    Args:
        target: files of the target.
        dtype: compute dtype, and dtype of the features; ``auto`` for that of the checkpoint.

    Attributes:
        target: files of the target.
        dtype: name of the compute dtype; never ``auto``.
        batch_tokens: number of tokens, padding included, that one call should have unless the user sets another.
        concurrency: number of calls of :meth:`generate` with one prompt each that may run at a time; 0 if it is best
            called with many prompts, one call at a time.
        encodings: formats in which it can transfer features to this process.
        encoding: the one that it uses.
        independent: whether it reads each prompt of a call by itself, so that a call may have any number.
    """

    batch_tokens = 65536
    concurrency = 0
    encodings: tuple[str, ...] = ("raw",)
    independent = False
    encoding = "raw"

    def __init__(self, target: TargetFiles, dtype: str) -> None:
        self.target, self.dtype = target, target.compute_dtype(dtype)

    @property
    def description(self) -> str:
        """Engine, version and parallelism, for the provenance of features; known after :meth:`check`.

        Empty for transformers on one device, whose features earlier versions do not describe either. Whatever changes
        the last bits of a feature belongs here, unless the provenance has a field of its own for it (dtype, encoding).
        """
        return ""

    @property
    def options(self) -> str:
        """Options of `specforge fit` that use the same server as this engine; empty if there is none."""
        return ""

    @classmethod  # noqa: B027 - few engines have options to check
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Check what can be known of an engine's options before anything is created or started.

        Raises:
            UserError: an option cannot be used.
        """

    def check_running(self) -> None:  # noqa: B027 - few engines start a server
        """Check a server that this engine has started.

        Raises:
            UserError: the server has ended.
        """

    @abstractmethod
    def check(self, policy: CapturePolicy) -> None:
        """Test the policy on two tokens.

        Raises:
            UnavailableError: the engine's server does not respond, or refuses the request: no prompt is to blame.
            UserError: a layer does not exist, or a feature has the wrong width or dtype.
        """

    @abstractmethod
    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Features of each sequence, on the CPU, without padding.

        Args:
            input_ids: token ids, preferably of similar lengths.
            policy: the features to return.

        Returns:
            Per sequence ``aux_hidden_states [L, k H]`` and, if asked for, ``last_hidden_states [L, H]``.

        Raises:
            UnavailableError: the engine's server does not respond; a producer then stops and releases its prompts.
            Exception: these sequences cannot be captured; a producer tries each by itself.
        """

    def delivers_to(self, backend: object) -> bool:
        """Whether :meth:`deliver` stores samples in this store."""
        return False

    def deliver(
        self, tasks: Sequence[PromptTask], names: Sequence[str], provenance: Provenance
    ) -> list[SampleRef | BadSampleError | StoreFullError]:
        """Have samples stored by the engine's server; their tensors never pass through this process.

        Args:
            tasks: prompts.
            names: ids of their samples.
            provenance: what to capture, and the encoding.

        Returns:
            Per prompt the reference of its stored sample, or why there is none.

        Raises:
            UnavailableError: the server does not respond.
            UserError: the server refuses a request. In both cases nothing is stored.
        """
        raise UserError(f"engine {type(self).__name__}: does not store samples itself")

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
        """Continue each prompt until an end token (included) or ``max_new_tokens``; an engine need not be able to.

        Args:
            prompts: token ids.
            max_new_tokens: maximum number of tokens to add.
            end_ids: tokens that end an answer; if empty, every answer has ``max_new_tokens`` tokens.
            temperature: sampling temperature; 0 for greedy.
            top_p: nucleus sampling: smallest set of tokens with this total probability.
            top_k: sample from the k most likely tokens; 0 for all.
            seed: random seed for sampling.

        Raises:
            UserError: this engine only captures.
        """
        raise UserError(f"engine {type(self).__name__}: captures hidden states, but does not generate; use --engine hf")

    def close(self) -> None:  # noqa: B027 - few engines hold anything
        """Release what the engine holds: connections, processes, memory. It is not used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def feature_widths(policy: CapturePolicy, hidden_size: int) -> dict[str, int]:
    """Name and width of each feature in a policy."""
    widths = {AUX_HIDDEN_STATES: len(policy.layer_ids) * hidden_size} if policy.layer_ids else {}
    return widths | ({LAST_HIDDEN_STATES: hidden_size} if policy.last_hidden_states else {})


def check_layers(policy: CapturePolicy, num_layers: int, target: str) -> None:
    """Check that the target has the captured layers.

    Raises:
        UserError: a layer does not exist, or is listed twice.
    """
    for layer in policy.layer_ids:
        if not 0 <= layer < num_layers:
            raise UserError(f"layer {layer}: {target} has {num_layers} layers, 0 to {num_layers - 1}")
    if len(set(policy.layer_ids)) != len(policy.layer_ids):
        raise UserError(f"layers {list(policy.layer_ids)}: a layer is listed twice")

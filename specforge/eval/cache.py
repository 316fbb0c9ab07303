"""Answers of the target and their features, generated once and kept on disk.

The key of an entry covers everything that affects them: the target's weights, the tokenizer, the prompts, the sampler,
the end tokens, the length limit, the captured features, the dtype, the kind of device and the library versions. An
entry takes its final name when it is complete. If two processes need the same entry, the second one waits and reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from specforge.contracts import CapturePolicy, TrainBatch, content_id, mask_spans
from specforge.decoding.verify import Sampling
from specforge.files import disk_error, open_safetensors

FORMAT = 2


@dataclass(frozen=True)
class EvalKey:
    """Everything that reference answers depend on."""

    target_fingerprint: str
    tokenizer_fingerprint: str
    capture: CapturePolicy
    dtype: str
    device: str
    versions: tuple[str, ...]
    end_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int

    def digest(self, prompts: Sequence[Sequence[int]]) -> str:
        """Name of the entry for these prompts."""
        return content_id(FORMAT, asdict(self), [list(p) for p in prompts])


@dataclass(frozen=True)
class Reference:
    """A prompt, the target's answer to it, and the features of both."""

    prompt: list[int]  # token ids
    answer: list[int]  # token ids, including the end token if the target wrote one
    features: dict[str, Tensor]  # named tensors [L, width] over prompt and answer

    def batch(self) -> TrainBatch:
        """A batch of this one document, in which the answer is supervised."""
        ids = torch.tensor([*self.prompt, *self.answer])
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[len(self.prompt) :] = True
        return TrainBatch(ids, mask, self.features, (len(ids),), mask_spans(mask, (len(ids),)))


class EvalCache:
    """Reference answers on disk.

    Args:
        folder: created when the first entry is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, key: EvalKey, prompts: Sequence[Sequence[int]], produce: Callable[[], list[Reference]]
    ) -> list[Reference]:
        """Load the references of ``prompts``; produce and store them first if they are missing.

        Raises:
            UserError: the entry is damaged, or the disk is full.
        """
        path = self.folder / f"{key.digest(prompts)}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):  # a second process waits, then reads
                if not path.exists():
                    self._store(path, produce())
        return self._load(path, prompts)

    def _store(self, path: Path, references: Sequence[Reference]) -> None:
        """Write an entry; the caller holds its lock."""
        tensors = {}
        for i, reference in enumerate(references):
            tensors[f"{i}/answer"] = torch.tensor(reference.answer, dtype=torch.int64)
            tensors |= {f"{i}/{name}": x.contiguous() for name, x in reference.features.items()}
        part = path.with_suffix(".part")
        try:
            save_file(tensors, part)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise disk_error(path, error if isinstance(error, OSError) else OSError(str(error))) from error

    def _load(self, path: Path, prompts: Sequence[Sequence[int]]) -> list[Reference]:
        references = []
        with open_safetensors(path) as file:
            names = list(file.keys())
            for i, prompt in enumerate(prompts):
                tensors = {n.split("/", 1)[1]: file.get_tensor(n) for n in names if n.startswith(f"{i}/")}
                answer = tensors.pop("answer").tolist()
                references.append(Reference(list(prompt), answer, tensors))
        return references

"""Reference answers of the target and their features, produced once.

The key covers everything that changes them: the target's weights, the tokenizer, the prompts, the sampler, the
tokens that end an answer, the length limit, what computes (dtype, kind of device, versions of the libraries) and what
is captured. An entry is written under a temporary name and takes its own when it is complete; of two processes that
produce the same entry, one wins and both are right.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from specforge.contracts import CapturePolicy, TrainBatch, content_id, mask_spans
from specforge.decoding.verify import Sampling
from specforge.files import disk_error, open_safetensors

FORMAT = 2


@dataclass(frozen=True)
class EvalKey:
    """What reference answers depend on."""

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
        """Name of the entry."""
        return content_id(FORMAT, asdict(self), [list(p) for p in prompts])


@dataclass(frozen=True)
class Reference:
    """One prompt, the target's own answer to it, and the features of both.

    Attributes:
        prompt: token ids.
        answer: token ids, the end token included if there was one.
        features: named tensors ``[L, width]`` over prompt and answer.
    """

    prompt: list[int]
    answer: list[int]
    features: dict[str, Tensor]

    def batch(self) -> TrainBatch:
        """The document as a batch whose supervised tokens are the answer."""
        ids = torch.tensor([*self.prompt, *self.answer])
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[len(self.prompt) :] = True
        return TrainBatch(ids, mask, self.features, (len(ids),), mask_spans(mask, (len(ids),)))


class EvalCache:
    """Reference answers on disk.

    Args:
        folder: created when something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, key: EvalKey, prompts: Sequence[Sequence[int]], produce: Callable[[], list[Reference]]
    ) -> list[Reference]:
        """The references of ``prompts``, produced and stored if they are not there.

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
        staging = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.folder))
        tensors = {}
        for i, reference in enumerate(references):
            tensors[f"{i}/answer"] = torch.tensor(reference.answer, dtype=torch.int64)
            tensors |= {f"{i}/{name}": x.contiguous() for name, x in reference.features.items()}
        try:
            save_file(tensors, staging / path.name)
            (staging / path.name).replace(path)
        except OSError as error:
            raise disk_error(path, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _load(self, path: Path, prompts: Sequence[Sequence[int]]) -> list[Reference]:
        references = []
        with open_safetensors(path) as file:
            names = list(file.keys())
            for i, prompt in enumerate(prompts):
                mine = {n.split("/", 1)[1]: file.get_tensor(n) for n in names if n.startswith(f"{i}/")}
                answer = mine.pop("answer").tolist()
                references.append(Reference(list(prompt), answer, mine))
        return references

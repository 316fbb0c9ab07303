"""Training on features that the target produces during training: in this process, or behind a server.

The store, the loader and the training code are those of offline training. The loader's prefetching thread runs the
target over the prompts of the next batches while the current batch is trained.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.base import Split, batch_bytes
from datamodules.prompts import PromptDataModule
from specforge.contracts import ANY_ENGINE, ExpectedSample, SampleRef
from specforge.data.prompts import PromptSet
from specforge.errors import UserError
from specforge.inference.rollout_worker import capture_one, expect
from specforge.inference.target_engine import (
    Engine,
    HFTargetEngine,
    HTTPTargetEngine,
    TargetEngine,
    engine_class,
    on_device,
)
from specforge.options import NonNegativeInt
from specforge.runtime.data_plane.local import MemoryBackend
from specforge.runtime.data_plane.on_demand import ProducedSamples
from specforge.runtime.data_plane.store import FeatureStore
from specforge.system import pick_device

_TOGETHER = 32  # prompts of a batch that an independent engine is asked for at a time


class OnlineDataModule(PromptDataModule):
    """Prompts from `specforge prepare`; features are produced when they are needed and dropped once they are trained.

    The target reads one prompt at a time, so a prompt's features do not depend on other prompts: a killed run resumes
    bit for bit, and gives the same weights as a run on features of `specforge capture --batch_tokens 1`.

    Args:
        prompts: folder with ``train`` and, for validation, ``heldout``.
        device: device of the target, for an engine in this process: cpu, cuda, ...; ``auto`` for the device of the
            draft.
        keep_bytes: keep up to this many bytes of trained features for the next epochs; others are produced again.
        server: address of `specforge target serve`; short for the engine ``http`` with this url.
        token_file: file with that server's token.
        engine: what runs the target: ``hf`` (transformers, in this process), ``vllm``, ``sglang``, ``http``
            (`specforge target serve`), or the class path of your own.
        **options: options of every datamodule that starts from prompts.
    """

    def __init__(
        self,
        prompts: str,
        device: str = "auto",
        keep_bytes: NonNegativeInt = 0,
        server: str | None = None,
        token_file: str = "runs/target.token",
        engine: Engine = HFTargetEngine,
        **options: Any,
    ) -> None:
        super().__init__(prompts, **options)
        self.device, self.keep_bytes = device if device == "auto" else pick_device(device), keep_bytes
        self.engine = engine
        if server is not None:
            if engine_class(engine) is not HFTargetEngine:
                raise UserError("data: give either server or engine; server is short for the engine http")
            self.engine, self.device = partial(HTTPTargetEngine, url=server, token_file=Path(token_file)), "auto"
        if self.encoding not in engine_class(self.engine).encodings:
            raise UserError(
                f"data.encoding is {self.encoding}, but features are neither sent nor stored here; remove it, or "
                "name a data.server"
            )
        self._engine: TargetEngine | None = None
        self._engine_lock = threading.Lock()  # training and validation share the target
        self._together: ThreadPoolExecutor | None = None  # for an engine that reads several prompts at a time

    def open_split(self, name: str, prompts: PromptSet) -> Split:
        """The samples of some prompts, and the store that gets them."""
        engine, store = self._open_engine(), FeatureStore(MemoryBackend(), max_bytes=self.max_bytes)
        provenance = self.provenance(prompts, engine.description)
        held = replace(provenance, encoding="raw")  # the engine decodes what a server sends
        expected = expect(prompts.tasks, held, self.module.target.hidden_size)

        def produce(sample: ExpectedSample) -> SampleRef:
            with nullcontext() if engine.independent else self._engine_lock:
                return capture_one(engine, store, sample.task, held)

        keep = self.keep_bytes if name == "train" else 0
        limits = self.limits if name == "train" else {"batch_size": self.val_batch_size, "max_tokens": None}
        self._check_space(batch_bytes(expected, **limits), keep)
        # Samples carry encoding and engine, so that a resumed run cannot change them.
        carried = replace(provenance, engine=ANY_ENGINE) if self.mix_engines else provenance
        samples = [replace(sample, provenance=carried) for sample in expected]
        return Split(samples, ProducedSamples(store, produce, keep_bytes=keep, together=self._together))

    def _open_engine(self) -> TargetEngine:
        if self._engine is None:
            engine = on_device(self.engine, self.device, auto=str(self.trainer.strategy.root_device))
            self._engine = engine(self.module.target, self.dtype)
            self._engine.encoding = self.encoding
            self._engine.check(self.module.spec.capture)
            if self._engine.independent:
                self._together = ThreadPoolExecutor(_TOGETHER, "produce")
        return self._engine

    def on_exception(self, exception: BaseException) -> None:
        """Close the engine, so that nothing that was asked for stays in its server's store."""
        if self._engine is not None:
            self._engine.close()

    def teardown(self, stage: str) -> None:
        """Close the engine, and drop the samples that it would produce."""
        engine, self._engine, self._splits = self._engine, None, {}
        if self._together is not None:
            self._together.shutdown(cancel_futures=True)
            self._together = None
        if engine is not None:
            engine.close()

    def _check_space(self, batch: int, keep: int) -> None:
        if batch + keep > self.max_bytes:
            kept = f" and keep_bytes {keep:,}" if keep else ""
            raise UserError(
                f"data: the features of a batch may take {batch:,} bytes; with them{kept}, max_bytes must be at "
                f"least {batch + keep:,}, not {self.max_bytes:,}"
            )

"""Training on features that producers in other processes, on this host or others, put into a shared store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from datamodules.base import Split, batch_bytes
from datamodules.prompts import PromptDataModule
from specforge.contracts import ANY_ENGINE, ExpectedSample, content_id
from specforge.data.prompts import PromptSet
from specforge.errors import UserError
from specforge.inference.rollout_worker import expect
from specforge.options import PositiveInt, PositiveSeconds, PositiveShare, Seconds
from specforge.runtime.addresses import open_backend, open_metadata, shown
from specforge.runtime.control_plane.claim import TrainerClaim
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.streamed import KEPT, Budget, StreamedSamples
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.store import FeatureStore


class DisaggregatedDataModule(PromptDataModule):
    """Prompts from `specforge prepare`; `specforge produce`, in other processes, produces their features.

    Batches equal those of offline and online training bit for bit, whichever producer makes which sample in whatever
    order. The target is not loaded here. Each epoch trains every sample once, even if processes are killed and
    restarted.

    Args:
        prompts: folder with ``train`` and, for validation, ``heldout``.
        store: address of the feature store: a folder that all processes can access, or ``mooncake://...``.
        metadata: address of the metadata store: a file (SQLite), for one host, or ``redis://host:port/0#name``.
        max_samples: maximum number of samples that are queued, produced or held at once.
        low_water: refill once usage drops below this fraction of the limits.
        retain: keep features until a checkpoint covers them, as far as there is space (``until_durable``), or only
            until they are trained (``until_trained``); a run that resumes from an earlier step then has them produced
            again.
        lease_seconds: a producer that has not responded for this long is presumed dead.
        max_tries: attempts per prompt before it is given up.
        stall_seconds: report the reason if no sample arrives for this long.
        wait_seconds: stop the run if no sample arrives for this long.
        **options: options of every datamodule that starts from prompts.
    """

    def __init__(
        self,
        prompts: str,
        store: str,
        metadata: str,
        max_samples: PositiveInt = 4096,
        low_water: PositiveShare = 0.75,
        retain: Literal["until_durable", "until_trained"] = "until_durable",
        lease_seconds: PositiveSeconds = 60.0,
        max_tries: PositiveInt = 3,
        stall_seconds: Seconds = 30.0,
        wait_seconds: Seconds = 3600.0,
        **options: Any,
    ) -> None:
        super().__init__(prompts, **options)
        self.store, self.metadata = store, metadata
        self.max_samples, self.low_water = max_samples, low_water
        self.retain, self.lease_seconds, self.max_tries = retain, lease_seconds, max_tries
        self.stall_seconds, self.wait_seconds = stall_seconds, wait_seconds
        self._controller: DataFlowController | None = None
        self._claim: TrainerClaim | None = None
        self._streams: dict[str, StreamedSamples] = {}

    def setup(self, stage: str) -> None:
        """Open the stores and read the prompts.

        Raises:
            UserError: a store cannot be used, another trainer uses it, or ranks share their batches (context
                parallelism); nothing is queued.
        """
        if self.shares_batches:
            raise UserError(
                "trainer.strategy: context parallelism does not work with DisaggregatedDataModule, which hands every "
                "sample to one rank; use ddp or fsdp2, or capture the features and use OfflineDataModule"
            )
        if self._controller is None:
            features = FeatureStore(open_backend(self.store, create=True))  # first, as producers expect
            controller = DataFlowController(
                open_metadata(self.metadata, create=True),
                features,
                retain=self.retain,
                lease_seconds=self.lease_seconds,
                max_tries=self.max_tries,
            )
            self._claim = self._take_claim(controller)
            self._controller = controller
        super().setup(stage)

    def _take_claim(self, controller: DataFlowController) -> TrainerClaim | None:
        """Make this run the only trainer of the metadata store; the first rank holds the claim."""
        trainer, claim, reason = self.trainer, None, ""
        if trainer.is_global_zero:
            run = str(getattr(trainer, "default_root_dir", "a run"))
            claim = TrainerClaim(
                controller.metadata, shown(self.metadata), run, self.lease_seconds, lambda: controller.clock()
            )
            try:
                claim.take()
            except UserError as error:
                reason = str(error)
        if trainer.world_size > 1:
            reason = trainer.strategy.broadcast(reason)
        if reason:
            controller.metadata.close()
            raise UserError(reason)
        return claim

    def open_split(self, name: str, prompts: PromptSet) -> Split:
        """The samples of some prompts, and the stream that gets them."""
        assert self._controller is not None
        # The engine is the producers', whose first one decides it for the run.
        wanted, trainer = self.provenance(prompts, ANY_ENGINE), self.trainer
        samples = expect(prompts.tasks, wanted, self.module.target.hidden_size)
        heldout = self._splits["heldout"].samples if "heldout" in self._splits else ()
        budget = Budget(
            (self.max_bytes - sum(sample.nbytes for sample in heldout)) // trainer.world_size,
            (self.max_samples - len(heldout)) // trainer.world_size,
            self.low_water,
        )
        if name == "train":
            self._check_space(samples, budget)
        self._streams[name] = StreamedSamples(
            self._controller,
            wanted if self.mix_engines else replace(wanted, engine=""),
            budget,
            stamp=self._stamp(samples if name == "train" else ()),
            kept=self._kept_keys(),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
            claim=self._claim,
            stall_seconds=self.stall_seconds,
            wait_seconds=self.wait_seconds,
        )
        return Split(samples, self._streams[name])

    def _stamp(self, planned: Sequence[ExpectedSample]) -> str:
        """Separates the samples of this run from those of runs with other features or another training order.

        Sample ids cover tokens, target and layers; the stamp covers the rest. So the leftovers of a run with a wrong
        option are never mistaken for the samples of another.
        """
        plan = [
            self.limits,
            self.limit_samples,
            self.seed,
            self.trainer.world_size,
            self.trainer.accumulate_grad_batches,
        ]
        names = "".join(sample.sample_id for sample in planned).encode()
        return content_id(self.dtype, self.encoding, *([names, plan] if planned else ()))[:16]

    def _check_space(self, samples: Sequence[ExpectedSample], budget: Budget) -> None:
        wanted = (self.trainer.accumulate_grad_batches + 1) * batch_bytes(samples, **self.limits)
        if wanted > budget.max_bytes:
            least = self.max_bytes + (wanted - budget.max_bytes) * self.trainer.world_size
            raise UserError(
                "data: the store must hold an optimizer step, one more batch and the held-out samples; max_bytes must "
                f"be at least {least:,}, not {self.max_bytes:,}"
            )

    def _kept_keys(self) -> list[str]:
        """Keys of the held-out samples."""
        if "heldout" not in self._splits:
            return []
        stream = self._streams["heldout"]
        return [stream.key(sample.sample_id, KEPT) for sample in self._splits["heldout"].samples]

    def val_dataloader(self) -> FeatureDataLoader | list[Any]:
        """A loader of the held-out samples, in order; they are produced once and stay stored until the run ends."""
        if "heldout" in self._splits:
            samples, _ = self._splits["heldout"]
            self._streams["heldout"].keep(samples)
        return super().val_dataloader()

    def teardown(self, stage: str) -> None:
        """Drop the held-out samples and close the stores."""
        if self._controller is not None:
            for stream in self._streams.values():
                stream.close()
            if self.trainer.is_global_zero and "heldout" in self._splits:
                self._controller.forget(self._kept_keys())
            self._end_claim()
            self._controller.metadata.close()
        self._controller, self._splits, self._streams = None, {}, {}

    def on_exception(self, exception: BaseException) -> None:
        """Release the claim, so that a resumed run need not wait until it expires."""
        self._end_claim()

    def _end_claim(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.end()

"""Training on features that producers in other processes, on this host or others, put into a store that all share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from datamodules.base import FeatureDataModule
from specforge.contracts import Provenance, SampleRef, TokenCounts, content_id
from specforge.data.prompts import PromptSet
from specforge.errors import UserError
from specforge.inference.rollout_worker import expect, plan_batches
from specforge.options import Dtype, NonNegativeInt, PositiveInt, PositiveSeconds, PositiveShare, Seconds, Seed
from specforge.runtime.addresses import open_backend, open_metadata, shown
from specforge.runtime.control_plane.claim import TrainerClaim
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.streamed import KEPT, Room, StreamedSamples
from specforge.runtime.data_plane.loader import FeatureDataLoader
from specforge.runtime.data_plane.store import FeatureStore, SampleStore


class DisaggregatedDataModule(FeatureDataModule):
    """Prompts from `specforge prepare`; `specforge produce`, in other processes, makes their features.

    The batches are those of the offline and the online run, bit for bit, whoever produces what in which order. No
    target is loaded here. Every sample is trained once in each epoch, whatever is killed and restarted.

    Args:
        prompts: folder with ``train`` and, for validation, ``heldout``.
        store: where the features are: a folder that all processes see.
        metadata: where the states of samples are: a file (SQLite), for one host, or redis://host:port/0#name.
        batch_size: documents of a micro-batch; or
        max_tokens: most tokens of a micro-batch. Exactly one of the two.
        dtype: compute dtype of the target, and that of the features.
        encoding: producers store features as they are, or in 8 bits.
        max_bytes: most bytes of features that the store holds; a slow trainer slows the producers.
        max_samples: most samples that are queued, produced or held at once.
        low_water: what has filled up is filled again when no more than this part of it is taken.
        retain: keep features until a checkpoint covers them, as far as there is room; or only until they are trained,
            and produce them again when the run goes back.
        lease_seconds: a producer that was silent for so long is taken for dead.
        max_tries: how often a prompt is tried before it is given up.
        stall_seconds: say what is missing when a sample has not come for so long.
        wait_seconds: give up when it has not come for so long.
        limit_samples: train on so many samples, drawn by the seed; all by default.
        seed: of the epochs' orders.
        prefetch: most batches fetched ahead.
        bad_samples: what to do with a sample that was given up: ``error`` stops, ``skip`` leaves it out.
        pad_to: pad batches to a multiple of this many tokens; it changes the speed (few shapes), not the result.
        val_batch_size: documents of a validation batch.
    """

    def __init__(
        self,
        prompts: str,
        store: str,
        metadata: str,
        batch_size: PositiveInt | None = None,
        max_tokens: PositiveInt | None = None,
        dtype: Dtype = "bfloat16",
        encoding: Literal["raw", "float8_e4m3fn"] = "raw",
        max_bytes: PositiveInt = 4 << 30,
        max_samples: PositiveInt = 4096,
        low_water: PositiveShare = 0.75,
        retain: Literal["until_durable", "until_trained"] = "until_durable",
        lease_seconds: PositiveSeconds = 60.0,
        max_tries: PositiveInt = 3,
        stall_seconds: Seconds = 30.0,
        wait_seconds: Seconds = 3600.0,
        limit_samples: PositiveInt | None = None,
        seed: Seed = 0,
        prefetch: NonNegativeInt = 2,
        bad_samples: Literal["error", "skip"] = "error",
        pad_to: PositiveInt = 64,
        val_batch_size: PositiveInt = 8,
    ) -> None:
        super().__init__(batch_size, max_tokens, limit_samples, seed, prefetch, bad_samples, pad_to, val_batch_size)
        self.folder, self.store, self.metadata = Path(prompts), store, metadata
        self.dtype, self.encoding = dtype, encoding
        self.max_bytes, self.max_samples, self.low_water = max_bytes, max_samples, low_water
        self.retain, self.lease_seconds, self.max_tries = retain, lease_seconds, max_tries
        self.stall_seconds, self.wait_seconds = stall_seconds, wait_seconds
        self._controller: DataFlowController | None = None
        self._claim: TrainerClaim | None = None
        self._splits: dict[str, tuple[list[SampleRef], StreamedSamples]] = {}
        self._counts: TokenCounts | None = None

    def setup(self, stage: str) -> None:
        """Read the prompts and reach the stores.

        Raises:
            UserError: a store cannot be used, or another trainer is at work on it; nothing is queued.
        """
        if self._controller is None:
            controller = DataFlowController(
                open_metadata(self.metadata),
                FeatureStore(open_backend(self.store)),
                retain=self.retain,
                lease_seconds=self.lease_seconds,
                max_tries=self.max_tries,
            )
            self._claim = self._claimed(controller)
            self._controller = controller
        heldout = self.folder / "heldout"
        if heldout.exists():
            self._splits["heldout"] = self._streamed(PromptSet.load(heldout), plan=False)
        elif stage != "fit":
            raise UserError(f"{heldout}: no such folder; there is nothing held out to validate on")
        if stage == "fit":
            prompts = PromptSet.load(self.folder / "train")
            self._counts = prompts.counts
            self._splits["train"] = self._streamed(prompts, plan=True)
            self._check_room()

    def _claimed(self, controller: DataFlowController) -> TrainerClaim | None:
        """Make this run the only trainer, by its first rank.

        Raises:
            UserError: another one is at work, on every rank.
        """
        trainer = self.trainer
        assert trainer is not None
        claim, refusal = None, ""
        if trainer.is_global_zero:
            run = str(getattr(trainer, "default_root_dir", "a run"))
            claim = TrainerClaim(
                controller.metadata, shown(self.metadata), run, self.lease_seconds, lambda: controller.clock()
            )
            try:
                claim.take()
            except UserError as error:
                refusal = str(error)
        if trainer.world_size > 1:
            refusal = trainer.strategy.broadcast(refusal)
        if refusal:
            controller.metadata.close()
            raise UserError(refusal)
        return claim

    def split(self, name: str) -> tuple[Sequence[SampleRef], SampleStore] | None:
        """References and tensors of ``train`` or ``heldout``."""
        return self._splits.get(name)

    def token_counts(self) -> TokenCounts | None:
        """Token counts of the training prompts."""
        return self._counts

    def val_dataloader(self) -> FeatureDataLoader | list[object]:
        """The held-out samples, in order; they are produced once, and stay in the store until the run ends."""
        if "heldout" in self._splits:
            refs, stream = self._splits["heldout"]
            stream.keep(refs)
        return super().val_dataloader()

    def teardown(self, stage: str) -> None:
        """Let the held-out samples go, and the stores."""
        assert self.trainer is not None
        if self._controller is not None:
            for _, stream in self._splits.values():
                stream.close()
            if self.trainer.is_global_zero and "heldout" in self._splits:
                self._controller.forget(self._kept())
            self._let_others_train()
            self._controller.metadata.close()
        self._controller, self._splits = None, {}

    def on_exception(self, exception: BaseException) -> None:
        """Whoever resumes this run need not wait until its claim ends."""
        self._let_others_train()

    def _let_others_train(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.end()

    def _kept(self) -> list[str]:
        refs, stream = self._splits["heldout"]
        return [stream.key(ref.sample_id, KEPT) for ref in refs]

    # The ledger: see :class:`specforge.callbacks.ledger.SampleLedger`.

    def rewind(self, loader: FeatureDataLoader, step: int) -> None:
        """Take the control plane back to the checkpoint of ``step``, and queue what the loader asks for next."""
        trainer, stream = self.trainer, self._splits["train"][1]
        assert trainer is not None
        assert self._controller is not None
        if trainer.is_global_zero:
            kept = set(self._kept()) if "heldout" in self._splits else set()
            wanted = set(kept)
            for rank in range(trainer.world_size):
                wanted.update(stream.room.window(self._ahead(loader, rank), stream.stamp))
            # Other queued prompts would be produced before the held-out samples, which a stopped run drops, and delay
            # the first validation.
            self._controller.resume(step, keep=wanted, queued=kept)
        trainer.strategy.barrier("the control plane is at the step of the checkpoint")
        stream.start(self._ahead(loader, trainer.global_rank))

    def trained(self, epoch: int, sample_ids: tuple[str, ...], step: int) -> None:
        """Record what a step used.

        Raises:
            UserError: another trainer has taken this one's place.
        """
        if self._claim is not None:
            self._claim.check()
        stream = self._splits["train"][1]
        stream.trained([stream.key(name, epoch) for name in sample_ids], step)

    def durable(self, step: int) -> None:
        """Record a complete checkpoint; features that it covers are deleted."""
        trainer = self.trainer
        assert trainer is not None
        assert self._controller is not None
        if trainer.is_global_zero:
            self._controller.durable(step)
            self._controller.remove_orphans()
        trainer.strategy.barrier("what the checkpoint covers is deleted")
        self._splits["train"][1].durable(step)

    def flow(self) -> dict[str, float]:
        """What to log: see :meth:`StreamedSamples.flow`."""
        return self._splits["train"][1].flow()

    def _ahead(self, loader: FeatureDataLoader, rank: int) -> Iterator[tuple[int, Sequence[SampleRef]]]:
        """Epoch and samples of the batches that a rank will train, up to the end of the run."""
        trainer = self.trainer
        assert trainer is not None
        length, window = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
        for epoch, number, refs in loader.upcoming(rank):
            step = epoch * -(-length // window) + number // window
            if (epochs is not None and epoch >= epochs) or (0 <= trainer.max_steps <= step):
                return
            if number < length:
                yield epoch, refs

    def _streamed(self, prompts: PromptSet, plan: bool) -> tuple[list[SampleRef], StreamedSamples]:
        module = self.trainer.lightning_module  # type: ignore[union-attr]
        assert self._controller is not None
        provenance = Provenance(
            module.target.name,
            module.target.fingerprint,
            prompts.tokenizer,
            module.spec.capture,
            self.dtype,
            encoding=self.encoding,
        )
        tasks = [x for batch in plan_batches(prompts.tasks, 1) for x in batch]  # in the order of capture
        refs = expect(tasks, provenance, module.target.hidden_size)
        kept, _ = self._splits.get("heldout", ([], None))
        room = Room(
            self._share(self.max_bytes, sum(ref.nbytes for ref in kept)),
            self._share(self.max_samples, len(kept)),
            self.low_water,
        )
        stream = StreamedSamples(
            self._controller,
            dict(zip((ref.sample_id for ref in refs), tasks, strict=True)),
            provenance,
            room,
            stamp=self._stamp(refs if plan else ()),
            stall_seconds=self.stall_seconds,
            wait_seconds=self.wait_seconds,
            probe=self._probe,
        )
        return refs, stream

    def _stamp(self, planned: Sequence[SampleRef]) -> str:
        """Tells samples from those of runs that make other features of a prompt, or train in another order.

        Identities of samples hold the rest: tokens, target and layers. So what a run with a wrong option leaves is
        never taken for what another one asked for.

        Args:
            planned: the samples whose order of training counts, if it does.
        """
        trainer = self.trainer
        assert trainer is not None
        plan = [self.limits, self.limit_samples, self.seed, trainer.world_size, trainer.accumulate_grad_batches]
        names = "".join(ref.sample_id for ref in planned).encode()
        return content_id(self.dtype, self.encoding, *([names, plan] if planned else ()))[:16]

    def _probe(self) -> None:
        if self._claim is not None:
            self._claim.renew()

    def _share(self, total: int, kept: int) -> int:
        assert self.trainer is not None
        return (total - kept) // self.trainer.world_size

    def _check_room(self) -> None:
        refs, stream = self._splits["train"]
        sizes = sorted((ref.nbytes for ref in refs), reverse=True)
        size, tokens = self.limits["batch_size"], self.limits["max_tokens"]
        per_token = max(ref.nbytes / ref.num_tokens for ref in refs)
        batch = sum(sizes[:size]) if tokens is None else int(tokens * per_token)
        trainer = self.trainer
        assert trainer is not None
        wanted = (trainer.accumulate_grad_batches + 1) * batch
        if wanted > stream.room.max_bytes:
            least = self.max_bytes + (wanted - stream.room.max_bytes) * trainer.world_size
            raise UserError(
                "data: the store must hold an optimizer step, a batch more and the held-out samples; max_bytes must "
                f"be at least {least:,}, not {self.max_bytes:,}"
            )

"""A separate small language model as the draft, distilled from the target.

Row p reads tokens 0 .. p of the text and predicts token p+1; its teacher is the target's distribution there. Teacher
forcing on text that the target wrote is on-policy distillation for greedy decoding: up to the first rejection
the draft reads the target's own tokens (DistillSpec, arXiv 2310.08461, has the losses and their effect). The loss is
Σ_rows loss / (supervised tokens of the optimizer window). Documents are rows of one padded batch, so they cannot
attend to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_modules.distilled import DistilledModule, Students
from specforge.contracts import TrainBatch
from specforge.data.templates import ChatTemplate
from specforge.errors import UserError
from specforge.files import read_json
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft import canonical
from specforge.modeling.draft.fields import quoted
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.plan import Plan
from specforge.modeling.draft.registry import find_draft_config
from specforge.modeling.draft.standalone.drafter import StandaloneDrafter
from specforge.modeling.draft.standalone.export import StandaloneFormat
from specforge.modeling.draft.standalone.network import StandaloneDraft, changes_of, config_like
from specforge.modeling.draft.starting import SavedDraft, load_weights


@dataclass
class TextPlan(Plan):
    """Supervised tokens of a batch whose documents become rows of equal length."""

    labels: Tensor  # [M] flat token of each label
    rows: Tensor  # [M, 1] flat index of the state that predicts it, among the padded rows


class StandaloneModule(DistilledModule):
    """A causal language model of transformers with the target's vocabulary.

    Args:
        target: folder or hub name of the frozen target.
        draft: folder or hub name of the model to start from, such as Qwen/Qwen3-0.6B for Qwen/Qwen3-8B.
        draft_config: JSON file of the draft's config, or fields that replace those of ``draft``; without ``draft``,
            those of a four-layer model like the target. ``draft_vocab_size`` speeds up training by using only the most
            frequent tokens, but such a draft cannot be exported.
        init_from: weights to start from: a SpecForge checkpoint, an exported draft, or ``target`` for the target's own
            embedding, head and evenly spaced layers. By default those of ``draft``, else random.
        train_embedding: train the token embedding too, and with it a head that is tied to it.
    """

    algorithm: ClassVar[str] = "standalone"
    architectures: ClassVar[tuple[str, ...]] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    export_format: ClassVar[DraftFormat] = StandaloneFormat()
    draft: StandaloneDraft

    def __init__(
        self,
        target: str,
        draft: str | None = None,
        draft_config: str | dict[str, Any] | None = None,
        init_from: str | None = None,
        train_embedding: bool = True,
        **training: Any,
    ) -> None:
        files = TargetFiles.find(target)
        base = None if draft is None else TargetFiles.find(draft, "draft")
        if base is not None and init_from is not None:
            raise UserError("model: give either draft or init_from; both name the weights to start from")
        source = SavedDraft.named(init_from, self.export_format, ("target",))
        if base is not None:
            source = SavedDraft.read(base.folder, self.export_format)
        config, where = _draft_config(files, source, draft_config)
        _check_vocabulary(files, base, config, where)
        network = StandaloneDraft(config, where)
        network.model.get_input_embeddings().weight.requires_grad_(train_embedding)
        if source is not None:
            load_weights(network, source, self.export_format)
        super().__init__(
            files,
            network,
            self.capture_policy(files),
            weights=torch.ones(1),
            has_vocabulary=init_from not in (None, "target"),
            **training,
        )
        self.start = network.start_from_target if init_from == "target" else None

    def setup(self, stage: str) -> None:
        """Reject texts that are longer than the draft supports, besides the common setup."""
        super().setup(stage)
        most, limit = max((ref.num_tokens for ref in self.training_samples()), default=0), self.draft.longest
        if limit is not None and most > limit:
            raise UserError(
                f"a sample has {most} tokens, but the draft supports texts of up to {limit}; prepare the data with "
                f"--max_length {limit}, or choose another draft"
            )

    def full_plan(self, batch: TrainBatch, positions: int) -> TextPlan:
        """Plan of all supervised tokens.

        Up to the first rejection the draft reads the answer itself, so all positions are alike.
        """
        width = max((_read(length) for length in batch.lengths), default=1)
        begins = [0, *torch.tensor(batch.lengths, dtype=torch.int64).cumsum(0).tolist()]
        labels: list[int] = []
        rows: list[int] = []
        for document, (begin, end) in enumerate(pairwise(begins)):
            for first, stop in batch.spans:
                inside = range(max(first, begin + 2), min(stop, end))
                labels += inside
                rows += [document * width + label - 2 - begin for label in inside]
        return TextPlan(torch.tensor(labels).long(), torch.tensor(rows).long().unsqueeze(1))

    def students(self, batch: TrainBatch, head: TargetHead, plan: TextPlan) -> Students:
        """Run the draft over all documents."""
        documents = batch.input_ids[: sum(batch.lengths)].split(list(batch.lengths))
        read = [tokens[len(tokens) - _read(len(tokens)) :] for tokens in documents]
        # A rank without documents takes part in the reductions of the others.
        ids = pad_sequence(read or [batch.input_ids.new_zeros(1)], batch_first=True)
        states = self.draft(ids).flatten(0, 1).to(head.dtype)
        valid, count = torch.ones_like(plan.rows, dtype=torch.bool), len(plan.labels)
        return Students(states[None], [self.draft.head_weight], plan.labels, plan.rows, valid, count, count)

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> StandaloneDrafter:
        """A drafter with the current weights."""
        return StandaloneDrafter(self.draft.decoder(dtype), self.draft.target_ids, self.target.vocab_size)


def _read(length: int) -> int:
    """Tokens of a document that the draft reads: all but the first, since SGLang shifts a draft's input by one."""
    return max(1, length - 1)


def _draft_config(
    target: TargetFiles, source: SavedDraft | None, given: str | Mapping[str, Any] | None
) -> tuple[dict[str, Any], str]:
    """The draft's config, and the name of its source for error messages."""
    where = given if isinstance(given, str) else "model.draft_config"
    given = read_json(find_draft_config(given)) if isinstance(given, str) else given or {}
    own = canonical(given, where)
    if "model_type" in own or where != "model.draft_config":
        return own, where  # a complete config, which transformers checks
    if source is not None:
        changes = changes_of(own, source.config.get("model_type"), str(source.path))
        return {**source.config, **changes}, where if changes else str(source.path)
    layers = own.get("num_hidden_layers", min(4, target.num_layers))
    return {**config_like(target, layers), **changes_of(own, target.config["model_type"], where)}, where


def _check_vocabulary(target: TargetFiles, start: TargetFiles | None, config: Mapping[str, Any], where: str) -> None:
    """Reject a draft whose vocabulary differs from the target's, naming the sizes or the first token that differs."""
    if config.get("vocab_size") != target.vocab_size:
        raise UserError(
            f"{where}: vocab_size is {config.get('vocab_size')}, but the target {target.name} has {target.vocab_size}"
        )
    size = config.get("draft_vocab_size")
    if size is not None and (type(size) is not int or not 0 < size <= target.vocab_size):
        raise UserError(
            f"{where}: draft_vocab_size is {quoted(size)}, but {target.name} has {target.vocab_size} tokens"
        )
    if start is not None and config.get("draft_vocab_size", target.vocab_size) != target.vocab_size:
        raise UserError(f"{where}: comes with a head for the whole vocabulary; leave draft_vocab_size out")
    if start is None or not (start.folder / "tokenizer_config.json").exists():
        return
    ours, theirs = (ChatTemplate.load(files).tokenizer.get_vocab() for files in (target, start))
    if ours != theirs:
        token = min(t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t))
        raise UserError(
            f"{where}: its tokenizer is not {target.name}'s: token {token!r} is {theirs.get(token)}, "
            f"not {ours.get(token)}"
        )

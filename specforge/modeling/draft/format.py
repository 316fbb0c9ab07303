"""How drafts look to others: what every algorithm's format has in common.

A format is one small subclass a kind of network, in this folder: the field's tensor names, the config that a
server reads, and what that server would silently misread. ``hf`` is the field's own form,
``sglang`` what SGLang serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import Draft, build_draft, config_fields, read_draft, save_draft
from specforge.modeling.draft.checks import check_tensors, target_ids

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class DraftFormat:
    """A draft's folder as others read and write it.

    Attributes:
        aliases: beginnings of tensor names that others use, and what they are here; tried in this order.
        not_the_drafts: names (as they are here) of tensors in others' files that are not the draft's.
        hf_embedding: whether the ``hf`` form carries the target's embedding.
        refusal: why SGLang cannot serve such a draft at all; None where it can.
        server: SGLang's name of the algorithm; None where it has none.
        chain: tokens that the server drafts one after another; 0 where the draft's config says how many.
    """

    aliases: ClassVar[tuple[tuple[str, str], ...]] = ()
    not_the_drafts: ClassVar[tuple[str, ...]] = ("embed_tokens.weight",)
    hf_embedding: ClassVar[bool] = False
    refusal: ClassVar[str | None] = None
    server: ClassVar[str | None] = None
    chain: ClassVar[int] = 0

    def check(self, config: dict[str, Any], target: TargetFiles) -> None:
        """Refuse a draft that SGLang cannot serve, or would serve as another network.

        Raises:
            UserError: says which field, and what the server would make of it.
        """
        if self.refusal is not None:
            raise UserError(f"export: {self.refusal}")

    def config(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """Fields of the written ``config.json``."""
        return {**config, **_rope_twice(config), "dtype": dtype, "torch_dtype": dtype}

    def build(self, config: Mapping[str, Any], where: str = "draft config") -> Draft:
        """The network of a ``config.json``, at random."""
        return build_draft(config, where)

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The draft's tensors under the names that are written."""
        return state

    def serve(self, target: str, folder: Path) -> str | None:
        """The command that serves the draft; None where SGLang has no such algorithm."""
        if self.server is None:
            return None
        command = f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {self.server} "
        command += f"--speculative-draft-model-path {folder}"
        steps, tokens = self.chain, self.chain + 1
        chain = f" --speculative-num-steps {steps} --speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens}"
        return command + chain if self.chain else command

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Somebody's tensors under SpecForge's names, in fp32, with both vocabulary maps.

        Args:
            config: their config.json.
            tensors: their tensors.
            where: what to call them in an error message.

        Raises:
            UserError: there is no vocabulary map where one is needed.
        """
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            new = name
            for old, replacement in self.aliases:
                if new.startswith(old):
                    new = replacement + new.removeprefix(old)
            if new not in self.not_the_drafts:
                renamed[new] = tensor.float() if tensor.dtype.itemsize > 1 and tensor.is_floating_point() else tensor
        vocab = config["vocab_size"]
        size = config.get("draft_vocab_size") or vocab
        if "d2t" not in renamed:
            if size != vocab:
                raise UserError(f"{where}: no tensor d2t, but the draft vocabulary is {size} of {vocab} tokens")
            renamed["d2t"] = torch.zeros(size, dtype=torch.int64)
        ids = target_ids(renamed["d2t"], size, vocab, where)
        renamed["d2t"] = renamed["d2t"].long()
        renamed["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
        return renamed

    def to_hf(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
        """Write config.json and model.safetensors in the field's own form.

        Raises:
            UserError: the draft was never trained, is damaged, or does not fit the target.
        """
        extra = {"embed_tokens.weight": target.embedding().to(DTYPES[dtype])} if self.hf_embedding else {}
        self._write(draft, folder, dtype, extra)

    def to_sglang(self, draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
        """Write a folder for ``--speculative-draft-model-path``; SGLang takes the embedding from the target.

        Raises:
            UserError: the draft was never trained, is damaged, or would not be loaded as what it is.
        """
        self.check(config_fields(draft), target)
        self._write(draft, folder, dtype, {})

    def _write(self, draft: Draft, folder: Path, dtype: str, extra: dict[str, Tensor]) -> None:
        where = f"export to {folder}"
        state = {name: x.detach().cpu() for name, x in draft.state_dict().items()}
        config = config_fields(draft)
        check_tensors(state, self.build(config).state_dict(), where, draft.trained)
        state = {n: x.to(DTYPES[dtype]) if x.is_floating_point() else x for n, x in state.items()}
        save_draft(self.config(config, dtype), {**self.tensors(state), **extra}, folder)
        self._read_back(folder, state)

    def _read_back(self, folder: Path, written: dict[str, Tensor]) -> None:
        """Parity probe: what lies on disk, read as a stranger would, is the network that was written."""
        config, tensors = read_draft(folder)
        again = self.build(config, str(folder))
        again.load_state_dict(self.read(config, tensors, str(folder)))
        for name, tensor in again.state_dict().items():
            if not torch.equal(tensor.to(written[name].dtype), written[name]):
                raise UserError(f"{folder}: tensor {name} did not survive the round trip")


def _rope_twice(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE fields in the old form too; servers read one or the other."""
    rope = dict(config.get("rope_parameters") or {})
    fields: dict[str, Any] = {}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return fields

"""Medusa and Hydra drafts: read and written under SpecForge's own names; SGLang has neither."""

from __future__ import annotations

from specforge.export.format import DraftFormat


class HeadsFormat(DraftFormat):
    """``heads.{k}.blocks.{j}.weight`` and ``heads.{k}.lm_head.weight``."""

    refusal = "SGLang has no heads on the last hidden state, so it cannot serve such a draft; use --to hf"

"""Hydra: Medusa's heads made sequential (arXiv 2402.05109).

Head k reads, beside the last hidden state of token p, the embeddings of the tokens p+1 .. p+1+k: in training those of
the data (teacher forcing), in decoding the committed token and those drafted by the heads before it.
"""

from __future__ import annotations

from typing import ClassVar

from lightning_modules.medusa import MedusaModule
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.heads.export import HeadsFormat


class HydraModule(MedusaModule):
    """Hydra, with the options of :class:`MedusaModule`.

    Two parts of Hydra++ are options: its teacher loss is ``loss: kl``, its deeper MLP ``num_head_blocks`` of the
    draft config.
    """

    algorithm: ClassVar[str] = "hydra"
    architectures: ClassVar[tuple[str, ...]] = ("HydraDraft",)
    export_format: ClassVar[DraftFormat] = HeadsFormat()

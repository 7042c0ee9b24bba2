"""The loss of next tokens as a module around the model, so that all weights are used inside one forward pass.

FSDP2 gathers weights for the time of a forward pass, and the head is used by the loss, outside of the model's own.
"""

from __future__ import annotations

from torch import Tensor, nn

from llama2cli.nn import ops
from llama2cli.nn.model import Llama


class NextToken(nn.Module):
    """-log p(next token), summed."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        scale_BT: Tensor | None = None,
    ) -> Tensor:
        """Sum over tokens of scale * nll, a scalar in fp32; a target of -100 has no loss."""
        hidden = self.model(ids_BT, positions_BT, segments_BT)
        scale = None if scale_BT is None else scale_BT.reshape(-1)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return ops.linear_cross_entropy(flat, self.model.head_weight(), targets_BT.reshape(-1), scale_N=scale)

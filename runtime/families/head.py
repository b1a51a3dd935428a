"""The head that all families share: final norm, logits, softcap, argmax."""

from __future__ import annotations

from typing import TypedDict

import torch

from runtime.families.state import DecodeState, Sampling
from runtime.kernels.ops import Ops
from runtime.model.model import Model


class Residual(TypedDict):
    """What the layers leave for the head; see `pick_token`."""

    x: torch.Tensor
    branch: torch.Tensor | None
    branch_norm: torch.Tensor | None


def pick_token(
    ops: Ops,
    model: Model,
    state: DecodeState,
    token: torch.Tensor,
    x: torch.Tensor,
    *,
    logits: torch.Tensor | None,
    branch: torch.Tensor | None = None,
    branch_norm: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    mask: torch.Tensor | None = None,
    leaves_pick: bool = False,
) -> None:
    """Picks the next token of each row.

    Args:
        ops: the backend.
        model: the model.
        state: of at least as many rows, whose workspaces are used.
        token: [rows] int64, written; NO_TOKEN where a row's logits are not finite.
        x: [rows, hidden] in the model's dtype d: the residual after the last layer.
        logits: [rows, vocab] d, written if given.
        branch: [rows, hidden] d: the last branch, if it has not been added to x.
        branch_norm: [hidden] d: the norm of that branch.
        sampling: of the rows; None where all are greedy.
        mask: [rows, words] int32: which tokens each row may pick, a bit for each; None where all are allowed.
        leaves_pick: whether `advance` follows, which on a GPU picks the tokens in its own launch.
    """
    ops.lm_head_argmax(
        token,
        x,
        model.weights.final_norm,
        model.weights.head,
        eps=model.config.rms_norm_eps,
        softcap=model.config.final_softcap,
        branch=branch,
        branch_norm=branch_norm,
        logits=logits,
        **({} if sampling is None else sampling._asdict()),
        mask=mask,
        argmax_keys=state.argmax_keys,
        normed=state.normed_of(len(x)),
        leaves_pick=leaves_pick,
    )

"""Selective language modeling: train on the tokens that the model has most to learn of.

Lin et al., "Rho-1: Not All Tokens Are What You Need", arXiv 2404.07965, section 2.2: with the excess loss of a token

    L_Δ(x_i) = L_θ(x_i) − L_ref(x_i)                              (equation 3, after a reference model was trained)

the loss is the mean of L_θ over the k % of a batch's tokens with the largest L_Δ (equations 4 and 5). The batch is the
global one here, so that the choice does not depend on the number of ranks.
"""

from pretrain.selection import BoolArray, Scored, Top


class Rho1:
    """The `share` of each batch's tokens with the largest excess loss over the reference model."""

    needs_reference = True

    def __init__(self, *, share: float = 0.6) -> None:
        """`share`: k, as a part of 1. The paper takes 0.6 for its 1.1B model on mathematics and 0.7 for the 7B."""
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share!r}")
        self.share = share

    def select(self, scored: Scored, top: Top) -> BoolArray:
        """The tokens of largest excess loss."""
        assert scored.reference is not None, "needs_reference"
        return top(scored.losses - scored.reference, self.share)

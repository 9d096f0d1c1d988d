"""Leave out documents that the model has learned: those whose mean loss is low."""

from pretrain.selection import BoolArray, Scored, Top


class LossThreshold:
    """Documents below a loss, or the share of a step's documents with the lowest loss, are left out."""

    needs_reference = False

    def __init__(self, *, below: float | None = None, share: float | None = None) -> None:
        """`below`: nats per token; a document is left out when its mean loss is lower. `share`: of the documents of
        each global batch, how many to leave out, 0 to 1; those with equal loss at the edge are all kept."""
        if (below is None) == (share is None):
            raise ValueError("give below (nats per token) or share (of the documents), not both")
        for name, value in (("below", below), ("share", share)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if below is not None and not 0 <= below < float("inf"):
            raise ValueError(f"below must be a loss from 0 on, got {below!r}")
        if share is not None and not 0 <= share < 1:
            raise ValueError(f"share must be from 0 to below 1, got {share!r}")
        self.below, self.share = below, share

    def select(self, scored: Scored, top: Top) -> BoolArray:
        """All tokens of the documents that are kept."""
        means, places = scored.document_means()
        if self.below is not None:
            kept: BoolArray = means >= self.below
        else:
            assert self.share is not None
            kept = top(means, 1.0 - self.share)
        return kept[places]

"""Which checkpoints stay."""

from hypothesis import given
from hypothesis import strategies as st

from pretrain.recovery.retention import GB, doomed

steps = st.lists(st.integers(1, 1000), unique=True, min_size=1).map(sorted)


@given(steps, st.integers(0, 5), st.integers(0, 50))
def test_newest_and_milestones_stay(steps: list[int], keep_last: int, keep_every: int) -> None:
    gone = doomed(steps, keep_last, keep_every)
    newest = steps[-keep_last:] if keep_last else steps
    assert gone == [step for step in steps if step not in newest and (not keep_every or step % keep_every)]


@given(steps, st.integers(1, 9), st.data())
def test_the_oldest_go_until_the_rest_fits_and_the_newest_never(steps: list[int], gb: int, data: st.DataObject) -> None:
    sizes = {step: data.draw(st.integers(0, 3 * GB)) for step in steps}
    gone = doomed(steps, 0, 0, gb, sizes)
    staying = [step for step in steps if step not in gone]
    assert gone == steps[: len(gone)]
    assert steps[-1] in staying
    assert len(staying) == 1 or sum(sizes[step] for step in staying) <= gb * GB
    if gone:  # one less gone would have been too large
        assert sum(sizes[step] for step in [gone[-1], *staying]) > gb * GB

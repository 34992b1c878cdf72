"""Oracle: a rearranged document put back together by its sentinels."""

import random

import numpy as np
import pytest

from nemotron_train.data.fim import ROOM, SHORTEST, FillInTheMiddle

EOD, PREFIX, SUFFIX, MIDDLE = 1, 2, 3, 4


def fim(spm_rate: float = 0.5, seed: int = 9) -> FillInTheMiddle:
    return FillInTheMiddle(
        eod_id=EOD, prefix_id=PREFIX, suffix_id=SUFFIX, middle_id=MIDDLE, spm_rate=spm_rate, seed=seed
    )


def window(seed: int, documents: int = 12) -> np.ndarray:
    """Documents of 0 to 60 tokens, all different; the last one is cut by the end of the window."""
    dice, token, tokens = random.Random(seed), 10, []
    for number in range(documents):
        length = dice.randint(0, 60)
        tokens += [*range(token, token + length), *([EOD] if number + 1 < documents else [])]
        token += length
    return np.array(tokens, dtype=np.int64)


def split(tokens: np.ndarray) -> list[list[int]]:
    return [
        part.tolist()[bool(number) :] for number, part in enumerate(np.split(tokens, np.flatnonzero(tokens == EOD)))
    ]


def put_back(document: list[int]) -> tuple[str, list[int]]:
    """Return the form of a rearranged document and its text in order."""
    assert document[0] == PREFIX
    suffix_at, middle_at = document.index(SUFFIX), document.index(MIDDLE)
    if suffix_at == 1:
        # Prefix and middle follow each other in this form: cutting between them is not needed to put them back.
        suffix, rest = document[2:middle_at], document[middle_at + 1 :]
        before = [token for token in rest if not suffix or token < suffix[0]]
        return ("SPM" if suffix_at == 1 else ""), before + suffix
    prefix, suffix, middle = document[1:suffix_at], document[suffix_at + 1 : middle_at], document[middle_at + 1 :]
    return "PSM", prefix + middle + suffix


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_documents_are_rearranged_and_nothing_else(seed: int, spm_rate: float) -> None:
    """Fails if text is lost beyond the last three tokens, mixed up between documents, or an end moves."""
    before = window(seed)
    after = fim(spm_rate).rearrange(before, "code", 1000 * seed, rate=1.0)
    assert len(after) == len(before)
    assert np.array_equal(after == EOD, before == EOD)
    for old, new in zip(split(before), split(after), strict=True):
        if len(old) < SHORTEST:
            assert new == old
        else:
            assert put_back(new)[1] == old[:-ROOM]


def test_rates_are_those_asked_for() -> None:
    """Fails if the rate, or the share of suffix-first documents, does nothing or means something else."""
    counts = {"PSM": 0, "SPM": 0, "left": 0}
    document = np.arange(10, 510, dtype=np.int64)
    for start in range(4000):
        after = fim(spm_rate=0.25).rearrange(document, "code", start, rate=0.6)
        is_left = np.array_equal(after, document)
        counts["left" if is_left else "SPM" if after[1] == SUFFIX else "PSM"] += 1
    total = sum(counts.values())
    assert counts["left"] / total == pytest.approx(0.4, abs=0.03)
    assert counts["SPM"] / (counts["SPM"] + counts["PSM"]) == pytest.approx(0.25, abs=0.03)
    assert np.array_equal(fim().rearrange(window(1), "code", 0, rate=0.0), window(1))


def test_the_result_follows_from_the_place_and_the_seed_alone() -> None:
    """Fails if anything read before changes it, or two places, sources or seeds are rearranged alike."""
    before = window(3)
    first = fim().rearrange(before, "code", 500, rate=0.7)
    for other in range(5):
        fim().rearrange(window(other), "code", other, rate=0.7)
    assert np.array_equal(fim().rearrange(before, "code", 500, rate=0.7), first)
    # The same documents in a window that starts earlier: each is cut as before.
    longer = np.concatenate((np.full(40, 999), [EOD], before))
    assert np.array_equal(fim().rearrange(longer, "code", 459, rate=0.7)[41:], first)
    for changed in (
        fim().rearrange(before, "code", 501, rate=0.7),
        fim().rearrange(before, "prose", 500, rate=0.7),
        fim(seed=10).rearrange(before, "code", 500, rate=0.7),
    ):
        assert not np.array_equal(changed, first)


def test_cuts_are_spread_over_the_document() -> None:
    """Fails if cuts favour a place: the model would learn to fill in there only."""
    document = np.arange(10, 113, dtype=np.int64)  # 100 tokens are kept
    lengths = []
    for start in range(4000):
        after = fim(spm_rate=0.0).rearrange(document, "code", start, rate=1.0).tolist()
        lengths.append(after.index(SUFFIX) - 1)
    thirds = np.bincount(np.array(lengths) // 34, minlength=3)
    assert thirds / 4000 == pytest.approx([0.56, 0.33, 0.11], abs=0.03)  # the smaller of two uniform cuts

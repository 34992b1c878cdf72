"""What did the doctor find? One finding for each thing looked at, the same for a person and for a script."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum


class Status(str, Enum):
    """From good to bad."""

    ok = "ok"
    skipped = "skipped"  # not looked at, or optional and not there
    slow = "slow"
    missing = "missing"
    wrong = "wrong"


@dataclass(frozen=True)
class Finding:
    """Anything that is slow, missing or wrong comes with what to do about it."""

    check: str  # what was looked at
    status: Status
    found: str  # with its unit
    fix: str = ""
    required: bool = True  # nothing can be trained without it

    @property
    def forbids_training(self) -> bool:
        return self.required and self.status in (Status.missing, Status.wrong)

    def as_record(self) -> dict[str, object]:
        return {**asdict(self), "status": self.status.value}


def merge(by_rank: Sequence[Sequence[Finding]], places: Sequence[str]) -> list[Finding]:
    """Return the worst finding of every check over all ranks, which names its rank where ranks differ in status.

    Args:
        places: what to call each rank, e.g. "rank 3 on node-a".
    """
    worst: dict[str, tuple[Finding, str]] = {}
    statuses: dict[str, set[Status]] = {}
    for findings, place in zip(by_rank, places, strict=True):
        for finding in findings:
            statuses.setdefault(finding.check, set()).add(finding.status)
            known = worst.get(finding.check)
            if known is None or _badness(finding) > _badness(known[0]):
                worst[finding.check] = (finding, place)
    return [
        Finding(f.check, f.status, f"{place}: {f.found}" if len(statuses[f.check]) > 1 else f.found, f.fix, f.required)
        for f, place in worst.values()
    ]


def _badness(finding: Finding) -> int:
    return list(Status).index(finding.status)

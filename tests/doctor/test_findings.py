"""What do many ranks' findings become?"""

from nemotron_train.doctor.findings import Finding, Status, merge


def test_the_worst_of_all_ranks_is_told_and_its_rank_named() -> None:
    """Fails if one sick GPU among many hides behind the first, or a check that one rank alone made is lost."""
    good, bad = Finding("product", Status.ok, "700"), Finding("product", Status.wrong, "3 rows", "replace it")
    disk = Finding("disk", Status.slow, "5 MB/s", "another folder", required=False)
    merged = merge([[good], [good, disk], [bad]], ["rank 0 on a", "rank 1 on a", "rank 2 on b"])
    assert merged == [Finding("product", Status.wrong, "rank 2 on b: 3 rows", "replace it"), disk]
    assert merge([[good], [good]], ["rank 0 on a", "rank 1 on b"]) == [good]


def test_only_what_is_required_forbids_training() -> None:
    """Fails if a slow disk stops a job, or a missing package does not."""
    forbids = {
        (status, required)
        for status in Status
        for required in (True, False)
        if Finding("x", status, "", required=required).forbids_training
    }
    assert forbids == {(Status.missing, True), (Status.wrong, True)}

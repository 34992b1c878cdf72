"""The doctor's findings as a person reads them."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemotron_train.doctor.findings import Finding, Status

_STYLE = {Status.ok: "green", Status.skipped: "dim", Status.slow: "yellow", Status.missing: "red", Status.wrong: "red"}


def show(findings: Sequence[Finding]) -> None:
    """Write a table, then what to do about each thing that is not well."""
    console = Console(highlight=False)
    table = Table("checked", "", "found")
    for finding in findings:
        state = Text(finding.status.value, style=_STYLE[finding.status])
        table.add_row(Text(finding.check), state, Text(finding.found))
    console.print(table)
    ill = [finding for finding in findings if finding.status not in (Status.ok, Status.skipped)]
    for finding in ill:
        console.print(Text(f"{finding.check} ({finding.status.value}): {finding.fix}", _STYLE[finding.status]))
    forbidding = sum(finding.forbids_training for finding in findings)
    if forbidding:
        console.print(f"{forbidding} of these must be mended before anything can be trained here.")
    elif ill:
        console.print("Training works here; what stands above makes it slower, or concerns other commands.")
    else:
        console.print("All is well.")

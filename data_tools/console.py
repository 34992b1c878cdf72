"""How do the tools write lines? As they are: names and paths may hold what rich takes for markup, as `a[/b]` does."""

from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False, emoji=False)

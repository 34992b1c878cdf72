"""On a terminal there is a bar; anywhere else there are whole lines, not too many."""

import io

from rich.console import Console

from nemotron_train.observe.console_writer import LINE_INTERVAL_SECONDS, ConsoleWriter, clock_time, short_count


def record(step: int, **more: float) -> dict[str, int | float | None]:
    return {"step": step, "consumed_tokens": step * 4096, "loss": 10 / step, "seconds_left": 100.0 - step, **more}


def lines_of_a_run(num_steps: int, seconds_per_step: float, eval_steps: tuple[int, ...] = ()) -> list[str]:
    output, now = io.StringIO(), [0.0]
    console = Console(file=output, width=80)
    writer = ConsoleWriter(num_steps=num_steps, resume_step=0, console=console, clock=lambda: now[0])
    for step in range(1, num_steps + 1):
        now[0] += seconds_per_step
        writer.write(record(step, **({"eval_loss": 3.25, "eval_loss/code": 3.5} if step in eval_steps else {})))
    writer.close()
    return output.getvalue().splitlines()


def test_a_file_gets_first_last_and_a_line_every_interval() -> None:
    """Fails if every step is printed, if nothing is printed for long, or if the end is missing."""
    lines = lines_of_a_run(num_steps=100, seconds_per_step=LINE_INTERVAL_SECONDS / 4)
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == [1, *range(5, 100, 4), 100]


def test_every_evaluation_is_printed_with_its_sources() -> None:
    """Fails if an evaluation between two due lines is lost."""
    lines = lines_of_a_run(num_steps=50, seconds_per_step=0.001, eval_steps=(17, 33))
    assert [line.split()[1] for line in lines] == ["1/50", "17/50", "33/50", "50/50"]
    assert "held-out loss 3.2500 (code 3.5000)" in lines[1]


def test_a_line_stays_one_line_without_control_characters() -> None:
    """Fails if a narrow or absent terminal folds lines, or brackets in a path are read as markup."""
    output = io.StringIO()
    writer = ConsoleWriter(num_steps=10, resume_step=0, console=Console(file=output, width=40))
    writer.event("checkpoint saved: /data/[bold]/runs/" + "x" * 100)
    writer.write(record(1, grad_norm=1.0, learning_rate=1e-3, tokens_per_second_per_gpu=17_000.0, skipped_steps=2))
    writer.close()
    lines = output.getvalue().splitlines()
    assert lines[0].endswith("[bold]/runs/" + "x" * 100)
    assert len(lines) == 2
    assert "\x1b" not in output.getvalue()
    for part in ("step 1/10", "4.1k tokens", "loss 10.0000", "17k tokens/s per rank", "2 steps skipped", "1:39 left"):
        assert part in lines[1]


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes() -> None:
    """Fails if the bar does not follow the step, or an evaluation is not kept above it."""
    output = io.StringIO()
    console = Console(file=output, width=140, force_terminal=True, force_interactive=True)
    writer = ConsoleWriter(num_steps=100, resume_step=40, console=console)
    writer.write(record(41))
    writer.write(record(42, eval_loss=3.25))
    assert writer._bar is not None
    assert writer._bar.tasks[0].completed == 42
    writer.close()
    assert "held-out loss 3.2500" in output.getvalue()
    assert " 42/100" in output.getvalue()


def test_counts_and_times_are_short() -> None:
    """Fails if a rounded count crosses a unit ("1000k") or a minute loses its zero."""
    assert [short_count(x) for x in (999.0, 999_600.0, 1_234_567.0, 20e12)] == ["999", "1M", "1.23M", "20T"]
    assert [clock_time(x) for x in (7.4, 59.6, 754.0, 11_045.0)] == ["0:07", "1:00", "12:34", "3:04:05"]

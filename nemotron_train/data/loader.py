"""How do samples reach the training loop in time? One thread per rank reads ahead; the only state is `consumed_tokens`.

A context-parallel rank reads its part of a sample and nothing else (sequence_part.py), but for two kinds of samples,
which it reads whole and then cuts: those of a source that its phase gives a fim_rate, because a document's middle moves
to its end, which may lie on another rank; and all samples where documents are told apart, because which document a
token is in depends on all tokens before it.

A thread is enough: a sample is one `pread`, which releases the interpreter lock. There are no worker processes that
could be killed by a signal meant for the trainer, and nothing to restore on resume but one integer.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nemotron_train.data.batch import Batch, RankShare, build_batch, take_part
from nemotron_train.data.blend import BlendPlan
from nemotron_train.data.fim import FillInTheMiddle
from nemotron_train.data.sequence_part import WHOLE, SequencePart
from nemotron_train.data.source import Source
from nemotron_train.data.source_order import Span
from nemotron_train.errors import ConfigError

_POLL_SECONDS = 0.1  # how long a blocked thread takes to notice that the loader was closed


class SampleReader:
    """Reads sample g of the run: the plan says where it lies, the sources hold it."""

    def __init__(self, plan: BlendPlan, sources: Sequence[Source], fim: FillInTheMiddle | None = None) -> None:
        names = tuple(source.name for source in sources)
        if names != plan.source_names:
            raise ValueError(f"plan of sources {plan.source_names} does not belong to sources {names}")
        self.plan = plan
        self.sources = tuple(sources)
        self._fim = fim

    def read(self, sample: int, part: SequencePart = WHOLE) -> tuple[int, NDArray[np.int64]]:
        """Return the number of the sample's source and its seq_length + 1 tokens, or of these the runs of a part, each
        with the label of its last token."""
        location = self.plan.locate(sample)
        source = self.sources[location.source]
        seq_length = sum(span.count for span in location.spans) - 1
        if location.fim_rate and self._fim is not None:
            tokens = _read(source, location.spans, range(seq_length + 1))
            tokens = self._fim.rearrange(tokens, source.name, location.start_token, location.fim_rate)
            return location.source, part.cut_window(tokens)
        runs = [_read(source, location.spans, range(run.start, run.stop + 1)) for run in part.runs(seq_length)]
        return location.source, runs[0] if len(runs) == 1 else np.concatenate(runs)


def _read(source: Source, spans: Sequence[Span], places: range) -> NDArray[np.int64]:
    """Read tokens by their places in a window that lies in `spans`."""
    pieces = []
    first = 0  # place of the span's first token
    for span in spans:
        start, stop = max(places.start - first, 0), min(places.stop - first, span.count)
        if start < stop:
            pieces.append(source.read((span.start + start) % source.num_tokens, stop - start))
        first += span.count
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class DataLoader(Iterator[Batch]):
    """Endless iterator over this rank's micro-batches, step after step, from `consumed_tokens` on.

    An error of the reading thread is raised by `next`, at its place in the stream and ever after. Close the loader when
    done, or use it as a context manager.
    """

    def __init__(
        self,
        reader: SampleReader,
        share: RankShare,
        global_batch_size_at: Callable[[int], int],
        consumed_tokens: int = 0,
        eod_id: int | None = None,
        prefetch_micro_batches: int = 8,
    ) -> None:
        """Start reading ahead.

        Args:
            global_batch_size_at: samples of the step (all ranks) that starts after so many consumed tokens.
            consumed_tokens: of the run so far, a whole number of steps.
            eod_id: ends documents, where the model is to tell them apart.
        """
        self.consumed_tokens = consumed_tokens  # of all ranks, in steps whose micro-batches were all handed out
        self._reader = reader
        self._share = share
        self._global_batch_size_at = global_batch_size_at
        self._eod_id = eod_id
        self._ready: queue.Queue[tuple[Batch, int] | BaseException] = queue.Queue(maxsize=prefetch_micro_batches)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._read_ahead, args=(consumed_tokens,), name="data-loader", daemon=True
        )
        self._thread.start()

    def __next__(self) -> Batch:
        if self._failure is None:
            if self._closed.is_set():
                raise StopIteration
            item = self._ready.get()
            if not isinstance(item, BaseException):
                batch, self.consumed_tokens = item
                return batch
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call twice."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "DataLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(self, consumed_tokens: int) -> None:
        try:
            for item in self._micro_batches(consumed_tokens):
                if not self._put(item):
                    return
        except BaseException as error:  # whatever it is, it belongs to the consumer, who would wait forever otherwise
            self._put(error)

    def _put(self, item: tuple[Batch, int] | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def _micro_batches(self, consumed_tokens: int) -> Iterator[tuple[Batch, int]]:
        """Yield micro-batches, each with the tokens the run has consumed once it was handed out."""
        plan, size, part = self._reader.plan, self._share.micro_batch_size, self._share.part
        read_part = part if self._eod_id is None else WHOLE
        while True:
            first_sample = plan.sample_at(consumed_tokens)
            global_batch_size = self._global_batch_size_at(consumed_tokens)
            after_step = plan.tokens_before(first_sample + global_batch_size)
            samples = self._share.samples(first_sample, global_batch_size)
            for start in range(samples.start, samples.stop, size):
                numbers, windows = zip(
                    *(self._reader.read(sample, read_part) for sample in range(start, start + size)), strict=True
                )
                if len({len(window) for window in windows}) > 1:
                    raise ConfigError(
                        f"Samples {start} ... {start + size - 1} have different lengths: a phase with another "
                        "seq_length starts within a micro-batch. Move its start_tokens to the start of a step."
                    )
                last = start + size == samples.stop
                length = len(windows[0]) - read_part.num_runs
                batch = build_batch(windows, numbers, size, length, self._eod_id, read_part.num_runs)
                batch = batch if read_part == part else take_part(batch, part)
                yield batch, after_step if last else consumed_tokens
            consumed_tokens = after_step

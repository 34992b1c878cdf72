"""From configuration to open data: which files are the sources, do they fit the model, and what is the plan?"""

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_train.config.schema import DataSection, SourceConfig
from nemotron_train.data.blend import BlendPlan, Phase
from nemotron_train.data.shard import OpenFiles, Shard
from nemotron_train.data.source import Source
from nemotron_train.errors import ConfigError, DataError


@dataclass(frozen=True)
class OpenData:
    """The shards of a run, opened and checked, in the order of data.sources."""

    training: tuple[Source, ...]
    heldout: tuple[Source | None, ...]  # None: this source has no held-out shards


def open_data(data: DataSection, vocab_size: int, seq_length: int) -> OpenData:
    """Open every shard of the configuration.

    Raises:
        ConfigError: names repeat, a shard is both trained on and held out, or the tokenizer is larger than the model.
        DataError: a shard or the tokenizer is missing or damaged, or a source is shorter than one window.
    """
    check_tokenizer(Path(data.path) / data.tokenizer, vocab_size)
    names = [source.name for source in data.sources]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"data.sources has the names {names}; it needs at least one, and each once.")
    files = OpenFiles()
    training_paths = [expand_prefixes(data, source, source.prefixes, "prefixes") for source in data.sources]
    heldout_paths = [expand_prefixes(data, source, source.eval_prefixes, "eval_prefixes") for source in data.sources]
    _check_apart(training_paths, heldout_paths)
    training, heldout = [], []
    for name, paths, eval_paths in zip(names, training_paths, heldout_paths, strict=True):
        if not paths:
            raise ConfigError(f"Source {name!r} has no shards: data.sources[].prefixes is empty.")
        training.append(_open_source(name, paths, files, vocab_size, seq_length))
        heldout.append(_open_source(name, eval_paths, files, vocab_size, seq_length) if eval_paths else None)
    return OpenData(tuple(training), tuple(heldout))


def build_plan(data: DataSection, training: Sequence[Source], seq_length: int, seed: int) -> BlendPlan:
    """Build the plan of samples from the configured phases.

    Raises:
        ConfigError: the phases are impossible with these sources.
    """
    phases = []
    for number, phase in enumerate(data.phases):
        weights = {share.source: share.weight for share in phase.weights}
        if len(weights) < len(phase.weights):
            named = [share.source for share in phase.weights]
            raise ConfigError(f"data.phases[{number}].weights names a source twice: {', '.join(named)}.")
        phases.append(Phase(phase.start_tokens, seq_length, weights))
    return BlendPlan(phases, {source.name: source.num_tokens for source in training}, seed)


def check_epochs(plan: BlendPlan, train_tokens: int, max_epochs: float) -> None:
    """Raise ConfigError if a run of `train_tokens` repeats a source more often than `max_epochs`."""
    for name, by_phase in plan.epochs(train_tokens).items():
        if sum(by_phase) > max_epochs:
            phases = " + ".join(f"{epochs:.2f}" for epochs in by_phase)
            raise ConfigError(
                f"{train_tokens} tokens read source {name!r} {sum(by_phase):.2f} times ({phases} by phase), more than "
                f"data.max_epochs={max_epochs}. Lower its weight in data.phases, add text, or raise data.max_epochs."
            )


def expand_prefixes(data: DataSection, source: SourceConfig, prefixes: Sequence[str], key: str) -> list[Path]:
    """Return the shard prefixes that match, those of one pattern sorted by name.

    Raises:
        DataError: a prefix matches no shard.
        ConfigError: two prefixes match the same shard.
    """
    found: list[Path] = []
    for prefix in prefixes:
        pattern = "*".join(glob.escape(part) for part in str(Path(data.path) / prefix).split("*"))
        matches = sorted(match.removesuffix(".idx") for match in glob.glob(pattern + ".idx"))
        if not matches:
            raise DataError(
                f"Source {source.name!r}: no file {Path(data.path) / prefix}.idx (data.path={data.path}, "
                f"{key} {prefix!r}). A prefix is the name of a shard without .bin and .idx."
            )
        found.extend(Path(match) for match in matches)
    repeated = sorted({str(path) for path in found if found.count(path) > 1}) if len(set(found)) < len(found) else []
    if repeated:
        raise ConfigError(f"Source {source.name!r} names shards twice in {key}: {', '.join(repeated)}.")
    return found


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Check that every id of a `tokenizer.json` is a row of the model's embedding.

    Raises:
        DataError: the file is missing or no tokenizer.
        ConfigError: it has more ids than model.vocab_size.
    """
    size = tokenizer_size(path)
    if size > vocab_size:
        raise ConfigError(f"{path} has {size} tokens, model.vocab_size={vocab_size}. Raise model.vocab_size.")


def tokenizer_size(path: Path) -> int:
    """Return the largest token id of a Hugging Face `tokenizer.json`, plus one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        ids = set(vocab.values()) if isinstance(vocab, dict) else set(range(len(vocab)))  # Unigram has a list
        ids.update(token["id"] for token in content.get("added_tokens", ()))
        return max(ids) + 1
    except OSError as error:
        raise DataError(f"{path}: {error.strerror} (data.path, data.tokenizer).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no Hugging Face tokenizer.json: {error!r}.") from error


def _open_source(name: str, paths: Sequence[Path], files: OpenFiles, vocab_size: int, seq_length: int) -> Source:
    source = Source(name, [Shard(path, files) for path in paths], vocab_size)
    if source.num_tokens <= seq_length:
        raise DataError(
            f"Source {name!r} has {source.num_tokens} tokens in {paths[0]} and its other shards; "
            f"one window needs {seq_length + 1} (train.seq_length + 1)."
        )
    return source


def _check_apart(training: Sequence[Sequence[Path]], heldout: Sequence[Sequence[Path]]) -> None:
    trained = {path.resolve() for paths in training for path in paths}
    both = sorted(str(path) for paths in heldout for path in paths if path.resolve() in trained)
    if both:
        raise ConfigError(f"Shards are trained on and held out at once: {', '.join(both)} (prefixes, eval_prefixes).")

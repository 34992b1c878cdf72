"""From configuration to open data: which files are the sources, do they fit the model, and what is the plan?"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from nemotron_train.config.schema import DataSection, DocumentBoundary, SourceConfig
from nemotron_train.data.blend import BlendPlan, Phase
from nemotron_train.data.shard import OpenFiles, Shard
from nemotron_train.data.shard_meta import ManifestShard, SourceManifest, read_manifest
from nemotron_train.data.source import Source
from nemotron_train.data.tokenizer_file import check_tokenizer, token_id, tokenizer_hash
from nemotron_train.errors import ConfigError, DataError

# Runs of more shards start without looking at each of them; a damaged one is then found when it is first read.
SHARDS_CHECKED_AT_START = 1000


@dataclass(frozen=True)
class OpenData:
    """The shards of a run, opened and checked, in the order of data.sources."""

    training: tuple[Source, ...]  # without shards where a source is only evaluated on
    heldout: tuple[Source | None, ...]  # None: this source has no held-out shards


def open_data(data: DataSection, vocab_size: int, seq_length: int) -> OpenData:
    """Open every shard of the configuration.

    Raises:
        ConfigError: names repeat, a source lacks shards to train on, a shard is both trained on and held out, or the
            tokenizer is larger than the model.
        DataError: a shard or the tokenizer is missing or damaged, or a source is shorter than one window.
    """
    check_tokenizer(Path(data.path) / data.tokenizer, vocab_size)
    names = [source.name for source in data.sources]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"data.sources has the names {names}; it needs at least one, and each once.")
    files = OpenFiles()
    known = _Manifests(data, vocab_size)
    training_paths = [expand_prefixes(data, source, source.prefixes, "prefixes") for source in data.sources]
    heldout_paths = [expand_prefixes(data, source, source.eval_prefixes, "eval_prefixes") for source in data.sources]
    _check_apart(training_paths, heldout_paths)
    for source, paths, eval_paths in zip(data.sources, training_paths, heldout_paths, strict=True):
        known.check_complete(source, [_pattern(data, prefix) for prefix in source.prefixes], paths)
        known.check_complete(source, [_pattern(data, prefix) for prefix in source.eval_prefixes], eval_paths)
    drawn = {share.source for phase in data.phases for share in phase.weights if share.weight > 0}
    training, heldout = [], []
    for name, paths, eval_paths in zip(names, training_paths, heldout_paths, strict=True):
        if not paths and (name in drawn or not eval_paths):
            raise ConfigError(
                f"Source {name!r} has no shards: its prefixes in data.sources are empty. List some, or give it "
                "eval_prefixes and no weight above 0 in data.phases; then it is only evaluated on."
            )
        training.append(_open_source(name, paths, files, known, vocab_size, seq_length))
        heldout.append(_open_source(name, eval_paths, files, known, vocab_size, seq_length) if eval_paths else None)
    shards = [shard for source in (*training, *heldout) if source is not None for shard in source.shards]
    if len(shards) <= SHARDS_CHECKED_AT_START:
        for shard in shards:
            _ = shard.layout  # compares the files with their manifest
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
        fim_rates = {share.source: share.fim_rate for share in phase.weights if share.fim_rate}
        phases.append(Phase(phase.start_tokens, phase.seq_length or seq_length, weights, fim_rates))
    tokens = {source.name: source.num_tokens for source in training}
    fim_form: list[float | str] = [data.fim_spm_rate, *data.fim_tokens, data.eod_token]
    return BlendPlan(phases, tokens, seed, {source.name: source.identity for source in training}, fim_form)


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
        matches = sorted(match.removesuffix(".idx") for match in glob.glob(_pattern(data, prefix) + ".idx"))
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


def _pattern(data: DataSection, prefix: str) -> str:
    """Return a prefix as a pattern of paths in which "*" alone stands for anything."""
    return "*".join(glob.escape(part) for part in str(Path(data.path) / prefix).split("*"))


class _Manifests:
    """What the manifests in the folders of the shards say, each file read once."""

    def __init__(self, data: DataSection, vocab_size: int) -> None:
        self._tokenizer = Path(data.path) / data.tokenizer
        self._vocab_size = vocab_size
        self._wants_boundaries = data.document_boundary is DocumentBoundary.reset
        self._eod_token = data.eod_token
        self._folder = cache(_read_folder)
        self._checked: set[Path] = set()

    @cached_property
    def _tokenizer_hash(self) -> str:
        return tokenizer_hash(self._tokenizer)

    def open(self, prefix: Path, files: OpenFiles) -> Shard:
        """Open a shard by what its manifest says; without one, by its index."""
        entry = self._folder(prefix.parent).get(prefix.name)
        if entry is None:
            return Shard(prefix, files)
        path, facts, manifest = entry
        if path not in self._checked:  # only those of shards that are read: others may lie in the same folder
            self._check(path, manifest)
            self._checked.add(path)
        return Shard(prefix, files, facts=facts, dtype=np.dtype(manifest.dtype))

    def check_complete(self, source: SourceConfig, patterns: Sequence[str], found: Sequence[Path]) -> None:
        """Raise DataError if a manifest lists a shard that a pattern of the source means and that is not there."""
        there = set(found)
        for folder in {path.parent for path in found}:
            for name in self._folder(folder):
                wanted = any(fnmatchcase(str(folder / name), pattern) for pattern in patterns)
                if wanted and folder / name not in there:
                    raise DataError(
                        f"Source {source.name!r}: {folder / name}.idx is missing; the manifest beside it lists it. "
                        "Restore the shard, or tokenize the source anew."
                    )

    def _check(self, path: Path, manifest: SourceManifest) -> None:
        if manifest.tokenizer_hash not in (None, self._tokenizer_hash):
            raise DataError(
                f"{path}: these shards were made with another tokenizer (hash {manifest.tokenizer_hash}) than "
                f"{self._tokenizer} ({self._tokenizer_hash}). Set data.tokenizer to that one."
            )
        if manifest.max_id >= self._vocab_size:
            raise DataError(
                f"{path}: these shards hold token {manifest.max_id}; the model knows 0 ... {self._vocab_size - 1} "
                "(model.vocab_size)."
            )
        if not self._wants_boundaries:
            return
        eod = token_id(self._tokenizer, self._eod_token, "data.eod_token")
        if not manifest.eod_terminated or manifest.eod_id != eod:
            raise DataError(
                f"{path}: data.document_boundary=reset needs every document to end with token {eod} "
                f"(data.eod_token={self._eod_token}); these end with {manifest.eod_id}, all of them: "
                f"{manifest.eod_terminated}. Tokenize the source with it, or set document_boundary=none."
            )


def _read_folder(folder: Path) -> dict[str, tuple[Path, ManifestShard, SourceManifest]]:
    """Return what the manifests of a folder say of each shard."""
    known = {}
    for path in sorted(folder.glob("*.manifest.json")):
        manifest = read_manifest(path)
        if manifest is not None:
            known.update({shard.name: (path, shard, manifest) for shard in manifest.shards})
    return known


def _open_source(
    name: str, paths: Sequence[Path], files: OpenFiles, known: _Manifests, vocab_size: int, seq_length: int
) -> Source:
    source = Source(name, [known.open(path, files) for path in paths], vocab_size)
    if paths and source.num_tokens <= seq_length:
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

"""Oracle: the files that were put there; every message is looked at for the key or file to change."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from nemotron_train.config.schema import DataSection, PhaseConfig, SourceConfig, SourceWeight
from nemotron_train.data.loader import SampleReader
from nemotron_train.data.open_sources import build_plan, check_epochs, open_data
from nemotron_train.data.tokenizer_file import tokenizer_size
from nemotron_train.errors import ConfigError, DataError, NemotronTrainError

WriteShard = Callable[..., Path]
S, VOCAB = 8, 1000


@pytest.fixture
def data(tmp_path: Path, write_tokens: WriteShard) -> DataSection:
    for name, size in {"web_0": 100, "web_1": 50, "web_10": 70, "code": 90, "held": 30, "tiny": S}.items():
        write_tokens(name, [range(size)], "<u2")
    write_tokens("wide", [range(90)], "<i4")
    write_tokens("floats", [range(90)], "<f4")
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(998)}, unk_token="w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return DataSection(
        path=str(tmp_path),
        sources=[
            SourceConfig("web", prefixes=["web_*"], eval_prefixes=["held"]),
            SourceConfig("code", prefixes=[str(tmp_path / "code")]),
        ],
        phases=[
            PhaseConfig(0, [SourceWeight("web", 3.0), SourceWeight("code", 1.0)]),
            PhaseConfig(400, [SourceWeight("code", 1.0)]),
        ],
    )


def test_prefixes_open_the_files_they_name_in_order(data: DataSection) -> None:
    """Fails if a pattern misses or adds a shard, the order is not that of the names, or an absolute prefix is moved."""
    opened = open_data(data, VOCAB, S)
    assert [source.name for source in opened.training] == ["web", "code"]
    assert [shard.path.name for shard in opened.training[0].shards] == ["web_0.bin", "web_1.bin", "web_10.bin"]
    assert [source and source.num_tokens for source in opened.heldout] == [30, None]
    plan = build_plan(data, opened.training, S, seed=0)
    assert plan.source_names == ("web", "code")
    assert [plan.locate(sample).phase for sample in (0, 49, 50)] == [0, 0, 1]


def change_source(data: DataSection, **changes: object) -> DataSection:
    return replace(data, sources=[replace(data.sources[0], **changes), *data.sources[1:]])  # type: ignore[arg-type]


BAD_SOURCES = {
    "no such shard": (lambda d: change_source(d, prefixes=["wbe_*"]), DataError, r"no file .*wbe_\*\.idx .*prefixes"),
    "no such held-out shard": (lambda d: change_source(d, eval_prefixes=["hold"]), DataError, "eval_prefixes 'hold'"),
    "weighed without shards": (lambda d: change_source(d, prefixes=[]), ConfigError, "'web' has no shards"),
    "neither trained nor evaluated on": (
        lambda d: replace(d, sources=[*d.sources, SourceConfig("more")]),
        ConfigError,
        "'more' has no shards",
    ),
    "shard twice": (lambda d: change_source(d, prefixes=["web_*", "web_1"]), ConfigError, "twice in prefixes: .*web_1"),
    "trained on and held out": (
        lambda d: change_source(d, eval_prefixes=["code"]),
        ConfigError,
        "held out at once: .*code",
    ),
    "two dtypes": (lambda d: change_source(d, prefixes=["web_0", "wide"]), DataError, r"uint16 in .*web_0.bin, int32"),
    "float tokens": (lambda d: change_source(d, prefixes=["floats"]), DataError, r"floats\.bin: tokens .* are float32"),
    "too short": (lambda d: change_source(d, prefixes=["tiny"]), DataError, "has 8 tokens in .*tiny .* needs 9"),
    "held out too short": (lambda d: change_source(d, eval_prefixes=["tiny"]), DataError, "has 8 tokens in .*tiny"),
    "a name twice": (
        lambda d: change_source(d, name="code"),
        ConfigError,
        r"data.sources has the names \['code', 'code'\]",
    ),
    "no tokenizer": (lambda d: replace(d, tokenizer="t.json"), DataError, r"t\.json: No such file .*data\.tokenizer"),
    "not a tokenizer": (
        lambda d: replace(d, tokenizer="web_0.idx"),
        DataError,
        r"web_0.idx is no Hugging Face tokenizer",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_impossible_sources_are_refused(data: DataSection, case: str) -> None:
    """Fails if the mistake passes, or the message does not say which file or key it is in."""
    change, error, message = BAD_SOURCES[case]
    with pytest.raises(error, match=message):
        open_data(change(data), VOCAB, S)


@pytest.mark.parametrize("weights", [[], [SourceWeight("held", 0.0)]])
def test_a_source_with_held_out_shards_alone_is_only_evaluated_on(
    data: DataSection, weights: list[SourceWeight]
) -> None:
    """Fails if it is refused, or shifts the sources after it: losses would be logged under another one's name, or other
    samples be read."""
    sources = [
        SourceConfig("held", eval_prefixes=["held"]),
        replace(data.sources[0], eval_prefixes=[]),
        data.sources[1],
    ]
    phases = [replace(phase, weights=[*weights, *phase.weights]) for phase in data.phases]
    opened = open_data(replace(data, sources=sources, phases=phases), VOCAB, S)
    assert [source and source.num_tokens for source in opened.heldout] == [30, None, None]
    plan = build_plan(replace(data, phases=phases), opened.training, S, seed=0)
    assert plan.source_names == ("held", "web", "code")
    before = open_data(data, VOCAB, S).training
    alone = SampleReader(build_plan(data, before, S, seed=0), before)
    beside = SampleReader(plan, opened.training)
    for sample in range(100):
        number, tokens = beside.read(sample)
        assert (number - 1, tokens.tolist()) == (alone.read(sample)[0], alone.read(sample)[1].tolist())
    assert plan.epochs(1000)["held"] == (0.0, 0.0)
    assert plan.past_hash(800) == alone.plan.past_hash(800)


def test_a_tokenizer_larger_than_the_model_is_refused(data: DataSection, tmp_path: Path) -> None:
    """Fails if added tokens are not counted, or a model of exactly the tokenizer's size is refused."""
    open_data(data, 999, S)
    with pytest.raises(ConfigError, match=r"tokenizer.json has 999 tokens, model.vocab_size=998"):
        open_data(data, 998, S)
    (tmp_path / "unigram.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}))
    assert tokenizer_size(tmp_path / "unigram.json") == 2


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({}, "is no Hugging Face tokenizer.json: it has no tokens"),
        ([], "is no Hugging Face tokenizer.json: it has no tokens"),
        (3, "is no Hugging Face tokenizer.json"),
        ({"a": 0, "b": "1"}, "token 'b' has the id '1'"),
        ({"a": 0, "b": -1}, "token 'b' has the id -1"),
        ({"a": 0, "b": None}, "token 'b' has the id None"),
    ],
)
def test_a_damaged_vocabulary_is_refused(data: DataSection, tmp_path: Path, vocab: object, message: str) -> None:
    """Fails if a tokenizer without tokens, or with ids that are none, ends in a traceback or passes."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    with pytest.raises(DataError, match=rf"tokenizer\.json:? {message}"):
        open_data(data, VOCAB, S)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([SourceWeight("web", 1.0), SourceWeight("web", 2.0)], "names a source twice: web, web"),
        ([SourceWeight("wbe", 1.0)], "names source 'wbe'; data.sources has web, code"),
        ([SourceWeight("web", -1.0)], "weight -1.0"),
        ([], "no source with a weight above 0"),
    ],
)
def test_impossible_weights_are_refused(data: DataSection, weights: list[SourceWeight], message: str) -> None:
    """Fails if a phase that cannot be drawn passes, or its number is not named."""
    bad = replace(data, phases=[data.phases[0], PhaseConfig(400, weights)])
    with pytest.raises(NemotronTrainError, match=rf"data\.phases\[1\].*{message}"):
        build_plan(bad, open_data(data, VOCAB, S).training, S, seed=0)


def test_too_many_epochs_are_refused_with_the_source_and_its_phases(data: DataSection) -> None:
    """Fails if epochs of several phases are not added up, or the limit itself is refused."""
    plan = build_plan(data, open_data(data, VOCAB, S).training, S, seed=0)
    by_phase = plan.epochs(1000)["code"]
    assert by_phase[1] == pytest.approx(600 / 90)
    check_epochs(plan, 1000, max_epochs=sum(by_phase))
    with pytest.raises(ConfigError, match=rf"source 'code' {sum(by_phase):.2f} times .* data.max_epochs=7.0"):
        check_epochs(plan, 1000, max_epochs=7.0)

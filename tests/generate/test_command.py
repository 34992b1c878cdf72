"""Does the command read a checkpoint and text, and write what the model says?"""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemotron_train.checkpoint.whole_weights import read_reference_model
from nemotron_train.config.load import write_resolved
from nemotron_train.generate.__main__ import main, thinking_budget, write
from nemotron_train.generate.continuations import Continuation, End
from nemotron_train.generate.thinking import ThinkingBudget
from tests.random_checkpoints import random_checkpoint
from tests.small_runs import VOCAB, small_config

END = "<|endoftext|>"
ALPHABET = "abcdefghijklmnopqrstuvwxyz <>/\nABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"


def write_tokenizer(path: Path) -> Tokenizer:
    """A token a letter, and the end of documents."""
    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(ALPHABET)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a run folder whose configuration names a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    write_tokenizer(folder / "tokenizer.json")
    config = small_config(folder, folder / "run", model={"layer_pattern": "M*-"})
    write_resolved(config, folder / "run" / "resolved.yaml")
    return random_checkpoint(folder / "run", config.model)


def greedy(checkpoint: Path, prompt: str, count: int) -> list[int]:
    model = read_reference_model(checkpoint, torch.float32)
    tokens = [ALPHABET.index(letter) for letter in prompt]
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_prompts_are_continued(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a prompt is left out, encoded by another tokenizer, or continued by other weights."""
    (tmp_path / "more.jsonl").write_text('"of two\\nlines"\n"c"\n')
    arguments = [f"--checkpoint={checkpoint}", "--prompt=abc", f"--prompts={tmp_path / 'more.jsonl'}"]
    assert main([*arguments, "--max-new-tokens=6", "--json"]) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [facts["prompt"] for facts in written] == ["abc", "of two\nlines", "c"]
    for facts in written:
        expected = greedy(checkpoint, facts["prompt"], 6)
        assert facts["tokens"] == expected
        letters = [ALPHABET[token] if token < len(ALPHABET) else END for token in expected if token <= len(ALPHABET)]
        assert facts["text"] == "".join(letters)
        assert facts["end"] == "length"


def test_a_stop_token_ends_a_text_and_the_text_is_shown(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if --stop is ignored, or text for people is not the prompt and what follows."""
    letters = [ALPHABET[token] for token in greedy(checkpoint, "abc", 12) if token < len(ALPHABET)]
    stop = next(letter for letter in letters if letter.isalnum())
    until = "".join(letters[: letters.index(stop)])
    assert main([f"--checkpoint={checkpoint}", "--prompt=abc", "--max-new-tokens=12", f"--stop={stop}"]) == 0
    assert capsys.readouterr().out.startswith(f"abc{until}\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_text_is_written_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture, as_json: bool) -> None:
    """Fails if a tab becomes spaces, `:100:` an emoji, `[b]` a style, or a long line two."""
    text = "if x[:100:2]:\n\treturn [b]x[/b]" + " long" * 100
    write([text], [Continuation([0, 1], End.length)], write_tokenizer(tmp_path / "tokenizer.json"), as_json=as_json)
    written = capsys.readouterr().out
    if as_json:
        assert json.loads(written) == {"prompt": text, "text": "ab", "tokens": [0, 1], "end": "length"}
    else:
        assert written == f"{text}ab\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt=a", "--stop=<eos>"], "has no token '<eos>'"),
        (["--prompt=a", "--top-p=2"], "--top-p=2"),
        (["--prompt=a", "--thinking-budget=-1"], "--thinking-budget=-1"),
        (["--prompt=a", "--max-new-tokens=0"], "--max-new-tokens=0"),
        ([], "0 prompts"),
        (["--prompt="], "Prompt 1 of 1"),
        (["--prompts=no_such_file"], "no_such_file"),
        (["--prompt=a", "--tokenizer=no_such_file"], "no_such_file"),
    ],
)
def test_mistakes_are_named(checkpoint: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    """Fails if a mistake ends in a traceback, or in a message that does not name it."""
    assert main([f"--checkpoint={checkpoint}", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model_or_unreadable_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Fails if ids beyond the embedding get as far as the model, or half a tokenizer ends in a traceback."""
    Tokenizer(models.WordLevel({str(id): id for id in range(VOCAB + 5)}, unk_token="0")).save(str(tmp_path / "t.json"))
    assert main([f"--checkpoint={checkpoint}", "--prompt=1", f"--tokenizer={tmp_path / 't.json'}"]) == 1
    assert f"{VOCAB + 5} tokens, model.vocab_size={VOCAB}" in capsys.readouterr().err
    (tmp_path / "t.json").write_text('{"model": {"vocab": {"a": 0}}}')
    assert main([f"--checkpoint={checkpoint}", "--prompt=1", f"--tokenizer={tmp_path / 't.json'}"]) == 1
    assert "t.json is no Hugging Face tokenizer.json" in capsys.readouterr().err


def test_the_budget_is_counted_in_the_tokenizers_ids(tmp_path: Path) -> None:
    """Fails if the tags are not the tokenizer's tokens, or a newline token is missed."""
    found = thinking_budget(write_tokenizer(tmp_path / "tokenizer.json"), 5)
    opening, closing = (tuple(map(ALPHABET.index, tag)) for tag in ("<think>", "</think>"))
    expected = ThinkingBudget(tokens=5, opening=opening, closing=closing, newlines=frozenset({ALPHABET.index("\n")}))
    assert found == expected

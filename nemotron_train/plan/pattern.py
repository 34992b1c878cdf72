"""Which layers the model has: reads `model.layer_pattern`, a letter a layer, `|` where the pipeline is cut by hand."""

from dataclasses import dataclass
from enum import Enum

from nemotron_train.errors import ConfigError

CUT = "|"


class LayerKind(str, Enum):
    """A layer's letter in the pattern."""

    mamba = "M"
    attention = "*"
    mlp = "-"


@dataclass(frozen=True)
class ParsedPattern:
    """The layers from input to output, and the index of the first layer after every `|` (None: not cut by hand)."""

    layers: tuple[LayerKind, ...]
    cuts: tuple[int, ...] | None = None

    def count(self, kind: LayerKind) -> int:
        return self.layers.count(kind)


def has_layers(pattern: str, kind: LayerKind) -> bool:
    """Return whether any layer is of this kind; where none is, its keys are not read."""
    return kind.value in pattern


def parse_pattern(text: str) -> ParsedPattern:
    """Read a pattern such as `M-M|*-`.

    Raises:
        ConfigError: an unknown letter (its position counts from 1), no layers, or a `|` with no layer on one side.
    """
    layers: list[LayerKind] = []
    cuts: list[int] = []
    for position, letter in enumerate(text, start=1):
        if letter == CUT:
            if len(layers) == (cuts[-1] if cuts else 0):
                raise ConfigError(f"model.layer_pattern={text!r}: no layer before the `|` at position {position}.")
            cuts.append(len(layers))
            continue
        try:
            layers.append(LayerKind(letter))
        except ValueError:
            known = ", ".join(f"{kind.value} ({kind.name})" for kind in LayerKind)
            raise ConfigError(
                f"model.layer_pattern={text!r}: unknown letter {letter!r} at position {position}. "
                f"Layers are {known}; | cuts the pipeline."
            ) from None
    if not layers:
        raise ConfigError(f"model.layer_pattern={text!r} has no layers.")
    if cuts and cuts[-1] == len(layers):
        raise ConfigError(f"model.layer_pattern={text!r}: no layer after the last `|`.")
    return ParsedPattern(tuple(layers), tuple(cuts) if cuts else None)

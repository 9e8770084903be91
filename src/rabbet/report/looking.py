"""What is seen of a compressed network when the float one stands beside it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from rabbet.choose.sensitivity import output_errors, require_gradients
from rabbet.errors import ModelError
from rabbet.model.compressed import all_layers
from rabbet.model.tensors import stored_tensors
from rabbet.reconstruct.outcome import layer_errors
from rabbet.report.examples import Example, examples_of
from rabbet.workpiece import Workpiece


@dataclass(frozen=True)
class Look:
    """Errors and harms of layers by name, examples, and what could not be told, in words."""

    errors: Mapping[str, float]
    harms: Mapping[str, float]
    examples: tuple[Example, ...]
    unknown: tuple[str, ...] = ()


def require_together(network: nn.Module, student: nn.Module) -> None:
    """Raise ModelError for networks that lie on different devices."""
    places = [
        next((t.device for t in stored_tensors(model).values()), None)
        for model in (network, student)
    ]
    if None not in places and places[0] != places[1]:
        raise ModelError(
            f"the network beside the report lies on {places[0]}, the compressed one on "
            f"{places[1]}; move it there"
        )


def look(piece: Workpiece, student: nn.Module) -> Look:
    """Run both networks on the task of a workpiece, whose network is the float one.

    Raises what the user's forward raises.
    """
    errors, examples = layer_errors(student, piece), examples_of(piece, student)
    changes = {
        name: (layer.canonical - piece.weight(piece.survey[name]))[None]
        for name, layer in all_layers(student).items()
    }
    try:
        require_gradients(piece)
        harms = {name: float(harm) for name, harm in output_errors(piece, changes).items()}
    except ModelError as e:
        return Look(errors, {}, examples, (f"what each layer alone does is not known: {e}",))
    return Look(errors, harms, examples)

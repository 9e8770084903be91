"""A nets.py to start from, in which only the user's data are missing."""

import inspect
from pathlib import Path

from torch import nn


def program_for(reference: str, network: nn.Module, file: str) -> str:
    """The text of a nets.py, by its name, for a network that a reference names."""
    place = Path(reference)
    return TEMPLATE.format(
        file=file,
        reference=str(place.resolve()) if place.exists() else reference,
        kind=type(network).__name__,
        arguments=", ".join(inspect.signature(network.forward).parameters),
        inputs=_inputs(network),
    )


def _inputs(network: nn.Module) -> str:
    """What the first layer that says it wants to be given."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Embedding):
            return f"{name} takes int64 below {layer.num_embeddings}, [examples, length]"
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            sides = ("depth", "height", "width")[3 - len(layer.kernel_size) :]
            return (
                f"{name} takes float32 [{', '.join(('examples', str(layer.in_channels), *sides))}]"
            )
        if isinstance(layer, nn.Linear):
            return f"{name} takes float32 [examples, ..., {layer.in_features}]"
    return "no conv, linear or embedding was found"


TEMPLATE = '''"""A network, and data for it, as the commands of rabbet take them.

    rabbet survey {file}:network --data {file}:batches
    rabbet compress {file}:network --data {file}:batches --test {file}:labelled \\
        --budget "bytes <= 10%" --output small.safetensors
    rabbet export small.safetensors --model {file}:network --data {file}:batches \\
        --output small.onnx
"""

import torch
from torch.utils.data import DataLoader

from rabbet.cli.networks import open_network

TRAIN = None  # YOUR TRAINING DATA: a torch Dataset of (inputs, label), prepared as in training
TEST = None  # YOUR TEST DATA, likewise; it is only measured on


def network():
    """The trained network ({kind}), in eval mode; its forward takes: {arguments}."""
    return open_network({reference!r})


def batches():
    """Some 500 to 2,000 examples of the training data, without labels and without augmentation.

    {inputs}.
    A batch is what the network is given: a tensor, a tuple of arguments, or a mapping of arguments
    by name. Examples drawn at random stand for all classes; the same ones come every time, so that
    a run can be resumed.
    """
    if TRAIN is None:
        raise ValueError("fill in TRAIN in {file}")
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(TRAIN, batch_size=32, shuffle=True, generator=order)
    for count, (inputs, _) in enumerate(loader):
        if count == 32:
            break
        yield inputs


def labelled():
    """Pairs of (inputs, labels): whole numbers of classes, which are on axis 1 of the outputs."""
    if TEST is None:
        raise ValueError("fill in TEST in {file}")
    yield from DataLoader(TEST, batch_size=64)
'''

"""A nets.py to start from, in which only the user's data are missing."""

import inspect

from torch import nn


def program_for(reference: str, network: nn.Module) -> str:
    """The text of a nets.py for a network that a reference names."""
    return TEMPLATE.format(
        reference=reference,
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

    rabbet survey nets.py:network --data nets.py:batches
    rabbet compress nets.py:network --data nets.py:batches --test nets.py:labelled \\
        --budget "bytes <= 10%" --output small.safetensors
    rabbet export small.safetensors --model nets.py:network --data nets.py:batches \\
        --output small.onnx
"""

from torch.utils.data import DataLoader

from rabbet.cli.networks import open_network

TRAIN = ...  # YOUR TRAINING DATA: a torch Dataset of (inputs, label), prepared as in training
TEST = ...  # YOUR TEST DATA, likewise; it is only measured on


def network():
    """The trained network ({kind}), in eval mode; its forward takes: {arguments}."""
    return open_network({reference!r})


def batches():
    """Some 500 to 2,000 examples of the training data, without labels and without augmentation.

    {inputs}. A batch is what the network is given: a tensor, a tuple of arguments, or a mapping of
    arguments by name. Examples drawn at random stand for all classes.
    """
    for count, (inputs, _) in enumerate(DataLoader(TRAIN, batch_size=32, shuffle=True)):
        if count == 32:
            break
        yield inputs


def labelled():
    """Pairs of (inputs, labels): whole numbers of classes, which are on axis 1 of the outputs."""
    yield from DataLoader(TEST, batch_size=64)
'''

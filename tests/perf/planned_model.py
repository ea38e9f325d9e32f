"""Models that tests plan, by functions and by name, as in planned_model:pairs."""

from torch import nn


def pairs() -> nn.Sequential:
    """Return three pairs of a convolution and a BatchNorm, one of them 1x1."""
    layers: list[nn.Module] = []
    for inputs, outputs, taps in ((3, 64, 3), (64, 128, 3), (128, 128, 1)):
        layers += [nn.Conv2d(inputs, outputs, taps, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def classifier() -> nn.Sequential:
    """Return three pairs and a head, which Inductor gives to a library."""
    return pairs().append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(128, 5))


def linear() -> nn.Linear:
    """Return a model that takes no images."""
    return nn.Linear(5, 5)

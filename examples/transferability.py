"""LEEP and LogME, by which IOMT judges how well a pretrained network fits a task, for a published ResNet-20.

    python -m examples.transferability weights.safetensors PATH…

The weights are those of `examples/specialize_resnet20.py`; each PATH is a set of images, likewise. Beside the two it
prints what they should predict: the test accuracy of a linear head on the network's features. A random network of the
same form is the control. It needs scikit-learn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from examples.specialize_resnet20 import ResNet20
from l3rs.baselines import iomt
from tasks.torch_data import Images, image_splits


@torch.no_grad()
def outputs(network: ResNet20, images: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features [n, 64], probabilities of its own classes [n, 10], labels [n])"""
    found: list[torch.Tensor] = []
    hook = network.linear.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    pixels, labels = zip(*(images[i] for i in range(len(images))), strict=True)
    logits = torch.cat([network(batch) for batch in torch.stack(pixels).split(256)])
    hook.remove()
    return torch.cat(found).numpy(), logits.softmax(-1).numpy(), torch.stack(labels).numpy()


def main(weights: str, folders: Sequence[str]) -> None:
    torch.manual_seed(0)
    networks = {"pretrained": ResNet20(), "random": ResNet20()}
    networks["pretrained"].load_state_dict(load_file(weights))
    print(f"{'images':40} {'network':10} {'LEEP':>7} {'LogME':>7} {'head':>7}")
    for folder in folders:
        splits, _ = image_splits(folder, 32, crop_flip=False)
        for name, network in networks.items():
            features, probabilities, labels = outputs(network.eval(), splits["train"])
            scores = iomt.leep(probabilities, labels), iomt.logme(features, labels)
            head = LogisticRegression(max_iter=1000).fit(features, labels)
            test_features, _, test_labels = outputs(network, splits["test"])
            right = head.score(test_features, test_labels)
            print(f"{folder[-40:]:40} {name:10} {scores[0]:7.3f} {scores[1]:7.3f} {right:7.1%}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])

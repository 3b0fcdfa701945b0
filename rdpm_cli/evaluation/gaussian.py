"""A Gaussian a class on principal components of the pixels: samples without a network, to read a generator's scores by.

Legend: N images, P = 3 · side² values of an image, C components."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdpm_cli import noise
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.data.source import spread
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation.features import pieces
from rdpm_cli.evaluation.metrics import Array, matrix_root, statistics
from rdpm_cli.generator.sampler import balanced_labels

COMPONENTS = 64
COMPONENT_IMAGES = 10_000  # that the components are computed from; images of 256×256 fill 8 GB
EXACT = 1024  # values of an image up to which the components are exact


@dataclass(frozen=True)
class ClassGaussian:
    """x = mean + (mu_y + root_y n) W: W (C, P) the components of all images, mu_y and root_y² moments of a class."""

    name: str  # of the images it was fitted to
    side: int
    class_names: list[str]
    components: Any  # scikit-learn's PCA
    moments: Mapping[int, tuple[Array, Array]]  # by label: mu (C,), root (C, C)

    def draw(self, label: int, seed: int, index: int) -> Pixels:
        """Sample `index`, of a class: (side, side, 3) uint8, clipped and rounded."""
        mean_C, root_CC = self.moments[label]
        normal_C = noise.normal("gaussian", seed, index, 0, 0, mean_C.shape)
        # One at a time, since the last bits of a matrix product depend on the number of rows.
        values_1P = self.components.inverse_transform((mean_C + root_CC @ normal_C)[None])
        return np.clip(np.rint(values_1P), 0, 255).astype(np.uint8).reshape(self.side, self.side, 3)

    def samples(self, per_class: int, seed: int) -> ImageSet:
        """per_class samples of every class in random order, drawn when they are read."""
        labels = balanced_labels(sorted(self.moments), per_class, seed)

        def read(ranges: Iterable[range]) -> Iterator[Pixels]:
            for piece in ranges:
                yield np.stack([self.draw(labels[index], seed, index) for index in piece])

        return ImageSet(f"class Gaussian of {self.name}", len(labels), self.side, labels, self.class_names, read)


def fit(images: ImageSet) -> ClassGaussian:
    """The Gaussians of the classes of these images, or of all of them where there are no classes.

    The components are those of at most 10,000 images, evenly spaced, by an exact eigendecomposition for up to 1,024
    values an image (18×18), by a randomised one with a fixed seed for more; mean and covariance are those of all
    images. Fewer images or values than 64 give fewer components. Raises DataError for a class of one image."""
    from sklearn.decomposition import PCA  # seconds to import

    exact, rows = 3 * images.resolution**2 <= EXACT, spread(images.count, COMPONENT_IMAGES)
    sample = images.read(range(row, row + 1) for row in rows)
    values_NP = np.concatenate([pixels.reshape(1, -1).astype(np.float64 if exact else np.float32) for pixels in sample])
    solver = "covariance_eigh" if exact else "randomized"
    components = PCA(min(COMPONENTS, *values_NP.shape), copy=False, svd_solver=solver, random_state=0).fit(values_NP)
    parts = images.read(pieces(images.count))
    projected_NC = np.concatenate([components.transform(pixels.reshape(len(pixels), -1)) for pixels in parts])
    labels_N, moments = np.array(images.labels or [0] * images.count), dict[int, tuple[Array, Array]]()
    for label in np.unique(labels_N).tolist():
        if (labels_N == label).sum() < 2:
            name = images.class_names[label] if images.class_names else label
            raise DataError(f"class '{name}' of {images.name} has one image", "a covariance needs two: add images")
        of_class = statistics(projected_NC[labels_N == label])
        moments[label] = of_class.mean_D, matrix_root(of_class.covariance_DD)
    return ClassGaussian(images.name, images.resolution, images.class_names, components, moments)

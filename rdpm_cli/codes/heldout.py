"""Images or recordings outside a store, encoded by its tokenizer, for measurements during training."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rdpm_cli.codes.ragged import RaggedStore
from rdpm_cli.codes.store import CodeStore, Ints, Manifest
from rdpm_cli.codes.write import MicroBatch, encode, shard_arrays
from rdpm_cli.data import text
from rdpm_cli.data.audio import AudioSource, open_audio
from rdpm_cli.data.labels import match_classes
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, to_model
from rdpm_cli.data.source import Source, spread
from rdpm_cli.distributed import one_thread
from rdpm_cli.errors import DataError
from rdpm_cli.tokenizer.model import Tokenizer

LEAST, MOST, AT_ONCE = 256, 2000, 32  # items: fewer say little; of more some are taken, evenly spaced
PURPOSE = "heldout"  # of their noise


def open_heldout(spec: str, manifest: Manifest, reading: Mapping[str, Any] | None = None) -> Source | AudioSource:
    """Images of classes that the store has, with its numbers of them; or recordings with texts of its units.

    Raises DataError, or UsageError of a text, for others, and for too few."""
    source = (open_audio if manifest.speech else open_source)(spec, **(reading or {}))
    if len(source) < LEAST:
        raise DataError(f"--heldout {spec} holds {len(source)} items, fewer than {LEAST}", "give more, or none")
    if isinstance(source, AudioSource):
        _check_texts(source, manifest)
        return source
    labels = source.need_labels()
    numbers, fault = match_classes(manifest.class_names, source.class_names, labels, "the store")
    if fault:
        raise DataError(f"--heldout {spec}: {fault}", "give images of its classes")
    source.labels, source.class_names = [numbers[label] for label in labels], list(manifest.class_names)
    return source


def _check_texts(source: AudioSource, manifest: Manifest) -> None:
    """Raise DataError unless recordings have texts and durations as the store's, UsageError for an unknown unit."""
    assert manifest.speech is not None
    assert manifest.speech.text is not None
    if source.texts is None or (manifest.speech.durations and source.word_seconds is None):
        lacking = "texts" if source.texts is None else "word_seconds"
        raise DataError(f"--heldout {source.spec} has no {lacking}", "list them in a manifest.jsonl")
    for sentence in source.texts:
        text.encode(manifest.speech.text, manifest.speech.units, sentence)


class EncodedRecordings(RaggedStore):
    """Recordings in memory, one view each, held out as a whole. index: in the source, which addresses the noise."""

    def __init__(self, source: AudioSource, tokenizer: Tokenizer, manifest: Manifest) -> None:
        """source: of `open_heldout`. Raises AudioError, and DataError for durations that do not fit."""
        numbers, inputs, encoded = spread(len(source), MOST), tokenizer.inputs, []
        assert manifest.speech is not None
        speech = manifest.speech.model_copy(update={"speakers": ()})  # those of the store may be others
        changes = {"views": 1, "seed": 0, "class_names": (), "speech": speech, "rows": len(numbers)}
        self.manifest = plan = manifest.model_copy(update=changes)
        for number in numbers:
            item = inputs.read(source, number)
            eps_BTCS = tokenizer.noise(PURPOSE, plan.seed, [number], [0], inputs.positions(item))
            arrays = {"items": item[None], "eps_VBTCS": eps_BTCS[None].numpy()}
            with one_thread():
                encoded.append(encode(tokenizer, plan, MicroBatch([number], [], arrays)))
        self.offsets = np.array([0, len(numbers)])
        self._hold([shard_arrays(encoded, source, plan)])


class EncodedImages(CodeStore):
    """Codes in memory, one view an image, held out as a whole. index: in the source, which addresses the noise."""

    def __init__(self, source: Source, tokenizer: Tokenizer, manifest: Manifest, device: torch.device) -> None:
        """source: of `open_heldout`."""
        numbers, size = spread(len(source), MOST), manifest.resolution
        labels = source.need_labels()
        self.manifest = manifest.model_copy(update={"views": 1, "flip": False, "latents": True, "seed": 0})
        self.index = np.array(numbers)
        self.columns = {"labels": np.array([labels[number] for number in numbers], dtype=np.int32)}
        codes, latents = [], []
        for start in range(0, len(numbers), AT_ONCE):
            part = numbers[start : start + AT_ONCE]
            pixels = np.stack([source.pixels(number, size) for number in part])
            eps_BTCS = tokenizer.noise(PURPOSE, self.manifest.seed, part, [0] * len(part)).to(device)
            with one_thread():
                z_BCS = tokenizer.latents(to_model(chw(pixels)).to(device))
                codes.append(tokenizer.quantizer.encode(z_BCS, eps_BTCS).cpu().numpy())
            latents.append(z_BCS.half().cpu().numpy())
        self.codes_NTS, self.latents_NCS = np.concatenate(codes).astype(np.uint16), np.concatenate(latents)

    def __len__(self) -> int:
        return len(self.index)

    def codes(self, rows: Ints) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return self.codes_NTS[rows]

    def latents(self, rows: Ints) -> np.ndarray[Any, np.dtype[np.float16]]:
        return self.latents_NCS[rows]

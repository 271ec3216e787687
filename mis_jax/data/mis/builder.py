"""MIS as a TensorFlow-Datasets builder; importing this imports tensorflow_datasets.

A `ShardBasedBuilder`, not a `GeneratorBasedBuilder`: the latter keeps a split in memory up to 1 GB
and then wants tensorflow, even where nothing is shuffled. Here a shard is in memory at a time.
"""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mis_jax.data.mis.annotations import VERSION, Sample
from mis_jax.storage.files import read_bytes, remove_tree

SHARD_BYTES = 256 << 20  # of images; a shard has at least one sample

_DESCRIPTION = """
MIS: questions about two images whose danger lies in what the images show together. `train` has
answers that describe the images, reason about the risk and decline safely; `easy`, `hard` and
`real` have questions alone. Holds offensive and dangerous content, for safety research.
Records stand in the order of the published files and hold the image files byte for byte.
"""
_CITATION = """
@article{ding2025rethinking,
  title={Rethinking Bottlenecks in Safety Fine-Tuning of Vision Language Models},
  author={Ding, Yi and Li, Lijun and Cao, Bing and Shao, Jing},
  journal={arXiv preprint arXiv:2501.18533},
  year={2025}
}
"""


class Mis(tfds.core.ShardBasedBuilder, skip_registration=True):
    """The splits of a published MIS folder; `build` of `mis_tfds` makes one."""

    VERSION = tfds.core.Version(VERSION)
    # Where checksums of downloads would lie, and there are none. Looking for it, a builder in an
    # installed package needs importlib_resources, which tensorflow_datasets does not install.
    code_path = None

    def __init__(
        self,
        *,
        data_dir: Path,
        root: Path,
        splits: Mapping[str, Sequence[Sample]],
        written: Callable[[], None],
    ):
        self._root = root
        self._splits = splits
        self._written = written
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            citation=_CITATION,
            license="Apache-2.0",
            homepage="https://github.com/DripNowhy/MIS",
            disable_shuffling=True,
            # What a split does not have is an empty text or an empty sequence.
            features=features.FeaturesDict(
                {
                    "id": features.Text(doc="The row's own id, or its number in the file."),
                    "category": features.Text(),
                    "sub_category": features.Text(),
                    "question": features.Text(doc="Of easy, hard and real."),
                    "conversations": features.Sequence(
                        {"from": features.Text(), "value": features.Text()}, doc="Of train."
                    ),
                    "images": features.Sequence(
                        features.Scalar(np.object_), doc="The image files' bytes."
                    ),
                    "image_names": features.Sequence(features.Text()),
                    "widths": features.Sequence(np.int32, doc="Pixels."),
                    "heights": features.Sequence(np.int32, doc="Pixels."),
                }
            ),
        )

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        return {
            split: [functools.partial(self._examples, shard) for shard in self._shards(samples)]
            for split, samples in self._splits.items()
        }

    def _shards(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The samples in order, cut where the images of a shard would pass SHARD_BYTES."""
        shards: list[list[Sample]] = []
        filled = SHARD_BYTES
        for sample in samples:
            size = sum(os.path.getsize(self._root / name) for name in sample.names)
            if filled + size > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(sample)
            filled += size
        return shards

    def _examples(self, samples: Sequence[Sample]) -> Iterator[tuple[int, dict[str, Any]]]:
        for sample in samples:
            fields = sample.fields
            turns = fields.get("conversations", []) if sample.split == "train" else []
            yield (
                sample.number,
                {
                    "id": sample.id,
                    "category": fields.get("category") or "",
                    "sub_category": fields.get("sub_category") or "",
                    "question": fields["question"] if sample.split != "train" else "",
                    "conversations": [{"from": t["from"], "value": t["value"]} for t in turns],
                    "images": [read_bytes(self._root / name) for name in sample.names],
                    "image_names": list(sample.names),
                    "widths": [width for width, _ in sample.sizes],
                    "heights": [height for _, height in sample.sizes],
                },
            )
            self._written()


def write_records(
    work: Path, root: Path, splits: Mapping[str, Sequence[Sample]], written: Callable[[], None]
) -> Path:
    """Store checked samples under `work`, as `mis/VERSION/`; returns that folder.

    `written` is called once for each sample.
    """
    builder = Mis(data_dir=work, root=root, splits=splits, written=written)
    with contextlib.redirect_stdout(io.StringIO()):  # what it says there is about downloads
        builder.download_and_prepare(file_format="array_record")
    remove_tree(work / "downloads")  # always made, always empty
    return Path(builder.data_dir)

"""Medical multiple choice in three modalities: 600 MRI pairs to train, 300 of each to test.

    - {task: medical_mri, split: train}
    - {task: medical_xray, split: test}

The protocol of MedVLM-R1 (Pan et al. 2025, arXiv 2502.19634): training on MRI alone, tests on MRI
(in domain), CT and X-ray (out of domain). The pairs are from OmniMedVQA as bundled with the
evaluation data of HuatuoGPT-Vision (Chen et al. 2024), a JSON list whose rows have `image`,
`question`, `options`, `answer` (the text of an option), `dataset` and `subset`, with the images in
images.zip. These names are taken from MedVLM-R1's program and published list; the layout inside the
archive is not documented, so both a folder images and bare files are accepted.

Which 600 pairs MedVLM-R1 trained on is not published. Its 900 test pairs are: the file
MRI_CT_XRAY_300each_dataset.json of github.com/JZPeterPan/MedVLM-R1, option `test_list`. Without
it both are chosen here: the pairs of a modality whose answer is exactly one of the options are
sorted by the SHA-256 of image name, line break and question; every pair whose image (by the bytes
of its file) came before is dropped; the first 300 are the test, the next 600 the training set. So
no image is in both, and every machine chooses the same pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mm_agrae.errors import DataError
from mm_agrae.tasks.files import ColumnName
from mm_agrae.tasks.images import find_file
from mm_agrae.tasks.published import CatalogEntry, CatalogTask, locate, task_class
from mm_agrae.tasks.rows import LazyRow, TableRow, listing, read_rows

TEST_PAIRS, TRAIN_PAIRS = 300, 600
BUNDLE = "medical_multimodel_evaluation_data.json"


class MedicalTask(CatalogTask):
    __doc__ = f"""{CatalogTask.__doc__}
    `test_list`: file of MedVLM-R1's test pairs; not set: chosen as `tasks/medical.py` says.
    """

    subset_name: str

    def __init__(
        self,
        path: str = "",
        *,
        split: str = "",
        test_list: str = "",
        where: Mapping[str, Any] | None = None,
        columns: Mapping[str, ColumnName] | None = None,
        grading: Mapping[str, Any] | None = None,
        show_choices: bool = True,
        image_root: str | None = None,
        meta: Sequence[str] = (),
        limit: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
    ):
        self.test_list = test_list
        super().__init__(
            path,
            split=split,
            columns=columns,
            where=where,
            grading=grading,
            show_choices=show_choices,
            image_root=image_root,
            meta=meta,
            limit=limit,
            on_bad_row=on_bad_row,
        )

    def _read_rows(self, path: str) -> Iterator[LazyRow]:
        found = locate(self.name, self.entry, path, self.split)
        if found.is_dir() and (found / f"{self.split}.jsonl").is_file():
            return read_rows(str(found / f"{self.split}.jsonl"))
        table = found / BUNDLE if found.is_dir() else found
        if found.is_dir() and not table.is_file():
            raise DataError(
                f"{self.name}: {found} holds neither {BUNDLE} nor {self.split}.jsonl; it holds "
                f"{listing(sorted(file.name for file in found.iterdir()))}"
            )
        return iter(self._choose(table))

    def _choose(self, table: Path) -> list[LazyRow]:
        pairs = {}
        for lazy in read_rows(str(table)):
            row = lazy.read()
            if (row.get("dataset"), row.get("subset")) == ("OmniMedVQA", self.subset_name):
                pairs[_key(row, lazy.origin)] = lazy
        if not pairs:
            raise DataError(
                f"{table}: has no rows with dataset 'OmniMedVQA' and subset {self.subset_name!r}"
            )
        usable = [key for key, lazy in pairs.items() if _has_answer(lazy.read())]
        ordered = sorted(usable, key=lambda key: hashlib.sha256("\n".join(key).encode()).digest())
        listed = self._listed(pairs)
        seen: set[bytes] = set()
        root = Path(self.image_root or table.parent)
        # The published test asks several questions about an image; the training set does not.
        test = listed or self._take(ordered, TEST_PAIRS, seen, pairs, root)
        seen |= {_image_hash(key[0], root, pairs[key].origin) for key in listed}
        chosen = test
        if self.split == "train":
            chosen = self._take(ordered, TRAIN_PAIRS, seen, pairs, root)
        return [pairs[key] for key in chosen]

    def _take(
        self,
        ordered: Iterable[tuple[str, str]],
        count: int,
        seen: set[bytes],
        pairs: Mapping[tuple[str, str], LazyRow],
        root: Path,
    ) -> list[tuple[str, str]]:
        """The first `count` pairs whose images are not in `seen`, which is extended by them."""
        taken: list[tuple[str, str]] = []
        for key in ordered:
            if len(taken) == count:
                break
            image = _image_hash(key[0], root, pairs[key].origin)
            if image not in seen:
                seen.add(image)
                taken.append(key)
        if len(taken) < count:
            raise DataError(
                f"{self.name}: only {len(taken)} pairs with distinct images, {count} needed "
                f"({self.split}); {len(pairs)} rows have subset {self.subset_name!r}"
            )
        return taken

    def _listed(self, pairs: Mapping[tuple[str, str], LazyRow]) -> list[tuple[str, str]]:
        if not self.test_list:
            return []
        listed = []
        for lazy in read_rows(self.test_list):
            row = lazy.read()
            if row.get("subset") == self.subset_name:
                listed.append(_key(row, lazy.origin))
                if listed[-1] not in pairs:
                    raise DataError(f"{lazy.origin}: the pair {listed[-1]} is not in the data")
        if not listed:
            raise DataError(f"{self.test_list}: has no rows with subset {self.subset_name!r}")
        return listed


def _key(row: TableRow, origin: str) -> tuple[str, str]:
    images, question = row.get("image"), row.get("question")
    image = images[0] if isinstance(images, list) and images else images
    if not isinstance(image, str) or not isinstance(question, str):
        raise DataError(f"{origin}: needs image and question; the columns are {listing(row)}")
    return image, question


def _has_answer(row: TableRow) -> bool:
    options = row.get("options")
    texts = [str(text).strip() for text in options] if isinstance(options, list) else []
    return texts.count(str(row.get("answer")).strip()) == 1


def _image_hash(image: str, root: Path, origin: str) -> bytes:
    try:
        return hashlib.sha256(find_file(image, root).read_bytes()).digest()
    except DataError as error:
        zipped = root / "images.zip"
        unpack = f"; unpack the images: unzip -q {zipped} -d {root}" if zipped.is_file() else ""
        raise DataError(f"{origin}: {error}{unpack}") from None


def _entry(*splits: str) -> CatalogEntry:
    counts = {"train": TRAIN_PAIRS, "test": TEST_PAIRS}
    return CatalogEntry(
        hub="FreedomIntelligence/Medical_Multimodal_Evaluation_Data",
        files={split: (f"{split}.jsonl", BUNDLE) for split in splits},
        rows={split: counts[split] for split in splits},
        licence="Apache-2.0 of the bundle; the images have those of their sources",
        url="https://github.com/FreedomIntelligence/HuatuoGPT-Vision",
        folders=("medical",),
        archive="images.zip",
    )


CATALOG = {
    "medical_mri": _entry("train", "test"),
    "medical_ct": _entry("test"),
    "medical_xray": _entry("test"),
}
SUBSETS = {
    "medical_mri": "MR (Mag-netic Resonance Imaging)",
    "medical_ct": "CT(Computed Tomography)",
    "medical_xray": "X-Ray",
}


TASKS = {
    name: task_class(name, entry, MedicalTask, subset_name=SUBSETS[name])
    for name, entry in CATALOG.items()
}

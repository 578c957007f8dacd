"""Medical multiple choice in three modalities: 600 MRI pairs to train, 300 of each to test.

    - {task: medical_mri, split: train}
    - {task: medical_xray, split: test}

The protocol of MedVLM-R1 (Pan et al. 2025, arXiv 2502.19634): training on MRI alone, tests on MRI (in domain), CT and
X-ray (out of domain). The pairs are from OmniMedVQA as bundled with the evaluation data of HuatuoGPT-Vision (Chen et
al. 2024), a JSON list whose rows have `image`, `question`, `options`, `answer` (the text of an option), `dataset` and
`subset`, with the images in images.zip. These names are taken from MedVLM-R1's program and published list; the layout
inside the archive is not documented, so both a folder images and bare files are accepted.

Which 600 pairs MedVLM-R1 trained on is not published. Its 900 test pairs are: the file
MRI_CT_XRAY_300each_dataset.json of github.com/JZPeterPan/MedVLM-R1, option `test_list`. Without it both are chosen
here: the pairs of a modality whose answer is exactly one of the options are sorted by the SHA-256 of image name, line
break and question; every pair whose image (by the bytes of its file) came before is dropped; the first 300 are the
test, the next 600 the training set. So no image is in both, and every machine chooses the same pairs.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mm_agrae.errors import DataError
from mm_agrae.tasks.images import find_file
from mm_agrae.tasks.published import CatalogEntry, CatalogTask, task_class
from mm_agrae.tasks.rows import LazyRow, TableRow, listing, read_rows

Pair = tuple[str, str]
"""Image and question."""
ROWS = {"train": 600, "test": 300}
BUNDLE = "medical_multimodel_evaluation_data.json"


class MedicalTask(CatalogTask):
    __doc__ = f"""{CatalogTask.__doc__}
    `test_list`: file of MedVLM-R1's test pairs; not set: chosen as `tasks/medical.py` says.
    """

    subset_name: str

    def __init__(self, path: str = "", *, test_list: str = "", **options: Any):
        self.test_list = test_list
        super().__init__(path, **options)

    def _read_rows(self, path: str) -> Iterator[LazyRow]:
        found = self._locate(path)
        if not found.is_dir():
            return iter(self._choose(found))
        own, table = found / f"{self.split}.jsonl", found / BUNDLE
        if own.is_file():
            return read_rows(str(own))
        if not table.is_file():
            raise DataError(
                f"{self.name}: {found} holds neither {BUNDLE} nor {own.name}; it holds "
                f"{listing(sorted(file.name for file in found.iterdir()))}"
            )
        return iter(self._choose(table))

    def _choose(self, table: Path) -> list[LazyRow]:
        """The split's pairs, as the module's docstring says."""
        pairs: dict[Pair, LazyRow] = {}
        for lazy in read_rows(str(table)):
            row = lazy.read()
            if (row.get("dataset"), row.get("subset")) == ("OmniMedVQA", self.subset_name):
                pairs[_pair(row, lazy.origin)] = lazy
        if not pairs:
            raise DataError(f"{table}: has no rows with dataset 'OmniMedVQA' and subset {self.subset_name!r}")
        usable = [pair for pair, lazy in pairs.items() if _has_answer(lazy.read())]
        usable.sort(key=lambda pair: hashlib.sha256("\n".join(pair).encode()).digest())
        root = Path(self.image_root or table.parent)

        def image_of(pair: Pair) -> bytes:
            return _image_hash(pair[0], root, pairs[pair].origin)

        # The published test asks several questions about an image; the training set does not.
        chosen = self._listed(pairs)
        seen = {image_of(pair) for pair in chosen}
        chosen = chosen or self._take("test", usable, image_of, seen)
        if self.split == "train":
            chosen = self._take("train", usable, image_of, seen)
        return [pairs[pair] for pair in chosen]

    def _take(self, split: str, usable: list[Pair], image_of: Callable[[Pair], bytes], seen: set[bytes]) -> list[Pair]:
        """The first pairs whose images are not in `seen`, which is extended by them."""
        taken: list[Pair] = []
        for pair in usable:
            if len(taken) < ROWS[split] and (image := image_of(pair)) not in seen:
                seen.add(image)
                taken.append(pair)
        if len(taken) < ROWS[split]:
            raise DataError(
                f"{self.name}: only {len(taken)} pairs with distinct images, {ROWS[split]} needed "
                f"({self.split}); {len(usable)} rows of subset {self.subset_name!r} have an answer"
            )
        return taken

    def _listed(self, pairs: Mapping[Pair, LazyRow]) -> list[Pair]:
        """The pairs of `test_list`, if there is one."""
        if not self.test_list:
            return []
        listed = []
        for lazy in read_rows(self.test_list):
            row = lazy.read()
            if row.get("subset") == self.subset_name:
                listed.append(_pair(row, lazy.origin))
                if listed[-1] not in pairs:
                    raise DataError(f"{lazy.origin}: the pair {listed[-1]} is not in the data")
        if not listed:
            raise DataError(f"{self.test_list}: has no rows with subset {self.subset_name!r}")
        return listed


def _pair(row: TableRow, origin: str) -> Pair:
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
    return CatalogEntry(
        hub="FreedomIntelligence/Medical_Multimodal_Evaluation_Data",
        files={split: (f"{split}.jsonl", BUNDLE) for split in splits},
        rows={split: ROWS[split] for split in splits},
        licence="Apache-2.0 of the bundle; the images have those of their sources",
        url="https://github.com/FreedomIntelligence/HuatuoGPT-Vision",
        folders=("medical",),
        archive="images.zip",
    )


CATALOG = {"medical_mri": _entry("train", "test"), "medical_ct": _entry("test"), "medical_xray": _entry("test")}
SUBSETS = {
    "medical_mri": "MR (Mag-netic Resonance Imaging)",
    "medical_ct": "CT(Computed Tomography)",
    "medical_xray": "X-Ray",
}
TASKS = {name: task_class(name, entry, MedicalTask, subset_name=SUBSETS[name]) for name, entry in CATALOG.items()}

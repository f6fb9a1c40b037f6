"""Written digits, 8 x 8 pixels: the set that comes with scikit-learn."""

from __future__ import annotations

from deltatune.data.formats import Table
from deltatune.data.images import inline
from deltatune.data.rows import canonical
from deltatune.data.split import cut, distinct
from deltatune.data.task import SPLITS, Kind, Task


def digits_5_9() -> Task:
    """Digits 5 to 9, which the backbone `digits-vit` has never seen: it is trained on 0 to 4.

    Source: the test part of Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998,
    doi:10.24432/C50P49, CC BY 4.0, in scikit-learn.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    held = load_digits()
    pixels = np.rint(held.images * (255 / 16)).astype(np.uint8)  # there 0 to 16
    rows = [
        {"image": inline(Image.fromarray(image)), "label": str(digit)}
        for image, digit in zip(pixels, held.target.tolist(), strict=True)
        if digit >= 5
    ]
    table = Table("digits_5_9", ("image", "label"), rows, [f"image {number}" for number in range(1, len(rows) + 1)])
    kind: Kind = "image_classification"
    placed, _ = distinct(kind, canonical(table, kind, {field: field for field in table.columns}))
    splits = cut(table.name, kind, placed, ("dev", "test"), 0)
    train, dev, test = ([row for _, row in splits[split]] for split in SPLITS)
    labels = tuple(sorted({row["label"] for row in rows}))
    return Task(table.name, kind, "accuracy", train, dev, test, labels, source="scikit-learn's digits")

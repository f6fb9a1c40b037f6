"""An embedding delta merged into its backbone, as a folder that `SentenceTransformer(folder)` loads by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltatune.backbone.load import Backbone
from deltatune.delta.delta import Delta
from deltatune.delta.files import whole_folder
from deltatune.delta.merge import merge
from deltatune.errors import OutputError, UserError
from deltatune.heads.embedding import Embedding

# The names that every version of sentence-transformers reads.
MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def save(delta: Delta, backbone: Backbone, folder: Path, limit: int) -> None:
    """Merge a delta into `backbone`, in place, and save both with mean pooling and unit norm, cut at `limit` tokens.

    UserError if the delta was not fitted for embeddings, SiteError if it cannot be merged, OutputError if `folder`
    exists. Source: the layout of sentence-transformers' `SentenceTransformer.save`, which is not needed for it.
    """
    if not isinstance(delta.head, Embedding):
        raise UserError(
            f"{delta.name!r} makes no embeddings: its head is {type(delta.head).__name__}; export one that was fitted "
            f"to rows of anchor and positive"
        )
    if folder.exists():
        raise OutputError(f"{folder} exists already; choose another place or remove it")
    merge(backbone, delta)
    module: Any = backbone.module
    with whole_folder(folder) as work:
        module.save_pretrained(work)
        backbone.processor.save_pretrained(work)
        _write(work / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
        _write(
            work / "modules.json",
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
                for i, (path, name) in enumerate(MODULES)
            ],
        )
        for path, _ in MODULES[1:]:
            (work / path).mkdir()
        pooling = {"word_embedding_dimension": backbone.width, "pooling_mode_mean_tokens": True}
        _write(work / "1_Pooling" / "config.json", {**pooling, "pooling_mode_cls_token": False})


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

